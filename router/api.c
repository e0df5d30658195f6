/* api.c: from an HTTP exchange to gens and back.
 *
 * Paths are routed by a table. A request with a body becomes an api_call (api_internal.h has its
 * states): small bodies are parsed and tokenised on the loop, large ones in the libuv pool; whether
 * the cluster would take the request is asked before any tokenising. Then n choices run as gens,
 * and the shape writes what they say.
 *
 * Streams answer late on purpose: headers go out with the first output, so that failures before it
 * keep a real status. A stream that is silent for 10 s gets its headers and a comment, because
 * proxies cut silent connections. After the headers a failure is an error event, and the chunked
 * body is then broken off: a body that ends well without [DONE] would look like success to SDKs.
 */
#include "router/api.h"

#include <assert.h>
#include <ctype.h>
#include <stdarg.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/base/warm.h"
#include "router/api_internal.h"
#include "router/sse.h"

/* A write that fails needs no answer here: the exchange's gone follows from the loop. */
#define IGNORE_WRITE(call)                                                                         \
    do {                                                                                           \
        if ((call) != ERR_OK)                                                                      \
            break;                                                                                 \
    } while (0)

#define SILENCE_US 10000000u
#define TICK_MS    1000u
#define KEEP_BYTES (1u << 20)
#define WAIT_BYTES (512u << 20)

enum { GET = 1, POST = 2 };

/* A path ending in '*' stands for all that begin like it and go on. */
struct route {
    const char *path;
    unsigned methods;
    api_get_fn *get;
    const struct api_shape *shape;
    bool stream; /* the path itself asks for a stream */
    bool open;   /* needs no key */
};

static const struct route routes[] = {
    {"/", GET, .get = api_get_page, .open = true},
    {"/health", GET, .get = api_get_health, .open = true},
    {"/healthz", GET, .get = api_get_health, .open = true},
    {"/liveness", GET, .get = api_get_health, .open = true},
    {"/ready", GET, .get = api_get_ready, .open = true},
    {"/readiness", GET, .get = api_get_ready, .open = true},
    {"/metrics", GET, .get = api_get_metrics},
    {"/status", GET, .get = api_get_status},
    {"/version", GET, .get = api_get_version, .open = true},
    {"/openapi.json", GET, .get = api_get_openapi, .open = true},
    {"/v1/models", GET, .get = api_get_models},
    {"/v1/models/*", GET, .get = api_get_model},
    {"/v1/chat/completions", POST, .shape = &api_shape_chat},
    {"/v1/completions", POST, .shape = &api_shape_completions},
    {"/v1/responses", POST, .shape = &api_shape_responses},
    {"/v1/messages", POST, .shape = &api_shape_messages},
    {"/v1/messages/count_tokens", POST, .shape = &api_shape_count_tokens},
    {"/generate", POST, .shape = &api_shape_generate},
    {"/generate_stream", POST, .shape = &api_shape_generate, .stream = true},
    {"/tokenize", POST, .shape = &api_shape_tokenize},
    {"/tokens", POST, .shape = &api_shape_tokenize},
    {"/detokenize", POST, .shape = &api_shape_detokenize},
};

static void on_headers(void *user, struct http_exchange *x, const struct http_request *r);
static void on_request(void *user, struct http_exchange *x, const struct http_request *r);
static void on_gone(void *user, struct http_exchange *x);
static void on_refused(void *user, struct http_exchange *x, int status, const char *message,
                       const char *request_id);
static void on_tick(uv_timer_t *timer);

static const struct route *gate(struct api *a, struct http_exchange *x,
                                const struct http_request *r);
static void call_arrive(struct api *a, struct http_exchange *x, const struct http_request *r,
                        const struct route *route);
static void call_in_pool(uv_work_t *work);
static void call_after_pool(uv_work_t *work, int status);
static enum err call_prepare(struct api_call *call);
static enum err call_admit(struct api_call *call, uint32_t n);
static void call_run(struct api_call *call);
static void call_open_stream(struct api_call *call);
static void call_complete(struct api_call *call);
static void call_fail(struct api_call *call);
static void call_fail_with(struct api_call *call, const struct api_failure *f);
static void call_release(struct api_call *call);

/* ---- the api ---- */

uint64_t api_random(struct api *a)
{
    a->random += 0x9e3779b97f4a7c15u;
    return hash_mix(a->random);
}

enum err api_create(const struct api_config *c, struct http_handler *handler, struct api **ret)
{
    OWNED_MEM struct api *a = calloc(1, sizeof(*a));
    if (!a)
        return err_set(ERR_NOMEM, "api");
    a->c = *c;
    if (uv_random(NULL, NULL, &a->random, sizeof(a->random), 0, NULL) != 0)
        a->random = clock_wall_us() ^ (uint64_t)getpid() << 48;
    a->created_s = clock_wall_us() / 1000000u;
    a->silence_us = SILENCE_US;
    a->max_pool_bytes = WAIT_BYTES;
    a->split_reasoning = strcmp(c->config->reasoning_parser, "none") != 0;
    a->parse_calls = strcmp(c->config->tool_call_parser, "none") != 0;
    a->call_end_id = tokenizer_added_id(c->tokenizer, "</tool_call>");
    a->default_thinking = strcmp(c->config->default_reasoning, "off") != 0;
    TRY(api_access_open(a));
    int r = uv_timer_init(c->loop, &a->tick);
    if (r == 0)
        r = uv_timer_start(&a->tick, on_tick, TICK_MS, TICK_MS);
    if (r != 0) {
        access_destroy(a->access);
        return err_set(ERR_IO, "api timer: %s", uv_strerror(r));
    }
    uv_unref((uv_handle_t *)&a->tick); /* does not keep the loop alive */
    a->tick.data = a;
    *handler = (struct http_handler){
        .headers = on_headers, .request = on_request, .gone = on_gone, .refused = on_refused};
    *ret = take(&a);
    return ERR_OK;
}

size_t api_n_active(const struct api *a) { return a->n_calls; }

void api_drain(struct api *a) { a->draining = true; }

/* Buffers that a large answer blew up are given back. */
static void trim(struct json_out *o)
{
    if (o->cap > KEEP_BYTES)
        json_out_finish(o);
}

static void maybe_free(struct api *a)
{
    if (!a->destroyed || !a->tick_closed || a->calls)
        return;
    json_out_finish(&a->line);
    json_out_finish(&a->scratch);
    access_destroy(a->access);
    free(a);
}

static void on_tick_closed(uv_handle_t *handle)
{
    struct api *a = handle->data;
    a->tick_closed = true;
    maybe_free(a);
}

void api_destroy(struct api *a)
{
    if (!a)
        return;
    a->destroyed = true;
    uv_close((uv_handle_t *)&a->tick, on_tick_closed);
    for (struct api_call *call = a->calls, *next; call; call = next) {
        next = call->next;
        if (call->state == CALL_ENDED)
            continue;
        /* call->failure may be the pool's at this moment */
        struct api_failure f = {0};
        (void)api_fail(&f, 503, "unavailable", "", "the server is shutting down");
        f.retry_after_s = 1;
        call_fail_with(call, &f);
    }
}

static void on_tick(uv_timer_t *timer)
{
    struct api *a = timer->data;
    uint64_t now_us = clock_now_us();
    for (struct api_call *call = a->calls, *next; call; call = next) {
        next = call->next;
        if (call->state == CALL_ENDED)
            continue;
        if (call->broken) {
            (void)api_fail(&call->failure, 503, "nomem", "", "%s", err_meaning(ERR_NOMEM));
            call_fail(call);
        } else if (call->state == CALL_RUNNING && call->params.stream && call->x &&
                   now_us - call->last_write_us >= a->silence_us) {
            call_open_stream(call);
            IGNORE_WRITE(sse_keepalive(call->x));
            call->last_write_us = now_us;
        }
    }
}

/* ---- failures ---- */

static void failure_set(struct api_failure *f, int status, const char *code, const char *param,
                        const char *fmt, va_list ap) __attribute__((format(printf, 5, 0)));
static void failure_set(struct api_failure *f, int status, const char *code, const char *param,
                        const char *fmt, va_list ap)
{
    f->status = status;
    f->code = code;
    f->type = status == 401   ? "authentication_error"
              : status == 429 ? "rate_limit_error"
              : status >= 500 ? "server_error"
                              : "invalid_request_error";
    f->retry_after_s = 0;
    f->hopeless = false;
    snprintf(f->param, sizeof(f->param), "%s", param);
    vsnprintf(f->message, sizeof(f->message), fmt, ap);
    /* What was cut short may end inside a character. */
    f->param[utf8_check(f->param, strlen(f->param))] = '\0';
    f->message[utf8_check(f->message, strlen(f->message))] = '\0';
}

enum err api_refuse(struct api_failure *f, const char *param, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    failure_set(f, 400, NULL, param, fmt, ap);
    va_end(ap);
    return ERR_INVALID;
}

enum err api_fail(struct api_failure *f, int status, const char *code, const char *param,
                  const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    failure_set(f, status, code, param, fmt, ap);
    va_end(ap);
    return ERR_INVALID;
}

static void failure_from(struct api_failure *f, enum err code, const char *param, const char *text)
{
    static const char *const names[] = {
        [ERR_BUSY] = "rate_limit_exceeded",
        [ERR_NO_PAGES] = "rate_limit_exceeded",
        [ERR_TOO_LONG] = "context_length_exceeded",
        [ERR_UNAVAILABLE] = "unavailable",
        [ERR_TIMEOUT] = "timeout",
        [ERR_INTERNAL] = "internal_error",
    };
    const char *name = (size_t)code < ARRAY_LEN(names) ? names[code] : NULL;
    /* 499 is for logs: nobody reads it. */
    int status = code == ERR_CANCELLED ? 500 : err_http(code);
    (void)api_fail(f, status, name, param, "%s", text);
    f->hopeless = code == ERR_INTERNAL;
    if (status == 429 || status == 503)
        f->retry_after_s = 1;
}

enum err api_fail_err(struct api_failure *f, enum err code, const char *param)
{
    failure_from(f, code, param, err_text(code));
    return code;
}

enum err api_fail_context(struct api_failure *f, const char *param, size_t n_prompt,
                          int64_t max_tokens, uint32_t limit)
{
    if (max_tokens < 0)
        return api_fail(f, 400, "context_length_exceeded", param,
                        "This model's maximum context length is %u tokens, but the prompt has %zu "
                        "tokens. Please shorten it.",
                        limit, n_prompt);
    return api_fail(f, 400, "context_length_exceeded", param,
                    "This model's maximum context length is %u tokens, but %llu were requested "
                    "(%zu in the prompt, %lld to be generated). Please reduce either.",
                    limit, (unsigned long long)n_prompt + (unsigned long long)max_tokens, n_prompt,
                    (long long)max_tokens);
}

void api_out_failure(struct json_out *o, const struct api_failure *f)
{
    out_raw(o, "{\"error\":{\"message\":");
    out_text(o, f->message);
    out_raw(o, ",\"type\":");
    out_text(o, f->type);
    out_raw(o, ",\"param\":");
    out_text(o, f->param[0] ? f->param : NULL);
    out_raw(o, ",\"code\":");
    out_text(o, f->code);
    out_raw(o, "}}");
}

/* ---- answers ---- */

static void draw_request_id(struct api *a, char *ret, size_t cap)
{
    snprintf(ret, cap, "req-%016llx%016llx", (unsigned long long)api_random(a),
             (unsigned long long)api_random(a));
}

static void add_headers(struct api *a, struct http_exchange *x, const char *request_id,
                        uint64_t arrival_us)
{
    char text[64];
    if (!request_id[0]) {
        draw_request_id(a, text, sizeof(text));
        request_id = text;
    }
    http_add_header(x, "X-Request-Id", request_id);
    http_add_header(x, "request-id", request_id); /* what Anthropic's SDKs read */
    snprintf(text, sizeof(text), "%llu",
             (unsigned long long)((clock_now_us() - arrival_us + 500) / 1000));
    http_add_header(x, "openai-processing-ms", text);
}

void api_reply(struct api *a, struct http_exchange *x, const char *request_id, uint64_t arrival_us,
               int status, const char *type, const char *body, size_t n)
{
    add_headers(a, x, request_id, arrival_us);
    http_reply(x, status, type ? type : "application/json", body, n);
}

void api_reply_failure(struct api *a, struct http_exchange *x, const char *request_id,
                       uint64_t arrival_us, const struct api_shape *shape,
                       const struct api_failure *f)
{
    int status = f->status;

    if (f->retry_after_s > 0) {
        char text[32];
        snprintf(text, sizeof(text), "%d", f->retry_after_s);
        http_add_header(x, "Retry-After", text);
        snprintf(text, sizeof(text), "%d000", f->retry_after_s);
        http_add_header(x, "retry-after-ms", text);
    }
    if (f->hopeless) /* OpenAI's and Anthropic's SDKs know it */
        http_add_header(x, "x-should-retry", "false");
    struct json_out o = {0};
    if (shape && shape->anthropic) {
        status = status == 503 ? 529 : status;
        api_out_failure_anthropic(&o, f, request_id);
    } else {
        api_out_failure(&o, f);
    }
    static const char poor[] = "{\"error\":{\"message\":\"out of memory\",\"type\":"
                               "\"server_error\",\"param\":null,\"code\":null}}";
    if (o.failed)
        api_reply(a, x, request_id, arrival_us, 503, NULL, poor, sizeof(poor) - 1);
    else
        api_reply(a, x, request_id, arrival_us, status, NULL, o.data, o.len);
    json_out_finish(&o);
}

/* ---- routing ---- */

static const struct route *route_find(const char *path)
{
    for (size_t i = 0; i < ARRAY_LEN(routes); i++) {
        size_t n = strlen(routes[i].path);
        if (routes[i].path[n - 1] == '*' ? !strncmp(path, routes[i].path, n - 1) && path[n - 1]
                                         : !strcmp(path, routes[i].path))
            return &routes[i];
    }
    return NULL;
}

static const char *route_allow(const struct route *route)
{
    if (!route)
        return "GET, HEAD, POST, OPTIONS";
    return route->methods == GET ? "GET, HEAD, OPTIONS" : "POST, OPTIONS";
}

/* application/json with or without parameters; none at all is tolerated. */
static bool is_json_type(const char *type)
{
    static const char json[] = "application/json";
    if (!type[0])
        return true;
    if (strncasecmp(type, json, sizeof(json) - 1) != 0)
        return false;
    const char *p = type + sizeof(json) - 1;
    while (*p == ' ' || *p == '\t')
        p++;
    return *p == '\0' || *p == ';';
}

/* Answers what needs no body: returns NULL if it did. */
static const struct route *gate(struct api *a, struct http_exchange *x,
                                const struct http_request *r)
{
    const struct route *route = route_find(r->path);
    struct api_failure f = {0};
    if (!strcmp(r->method, "OPTIONS") && (route || !strcmp(r->path, "*"))) {
        http_add_header(x, "Allow", route_allow(route));
        add_headers(a, x, r->request_id, clock_now_us());
        http_reply(x, 204, NULL, NULL, 0);
        return NULL;
    }
    bool get = !strcmp(r->method, "GET") || !strcmp(r->method, "HEAD");
    bool post = !strcmp(r->method, "POST");
    struct access_key *key;
    if (!(route && route->open) && !api_access_find(a, r, &key)) {
        api_access_refuse(x, r, &f);
    } else if (!route) {
        (void)api_fail(&f, 404, "not_found", "", "there is nothing at %.200s", r->path);
    } else if (!((get && route->methods & GET) || (post && route->methods & POST))) {
        http_add_header(x, "Allow", route_allow(route));
        (void)api_fail(&f, 405, "method_not_allowed", "", "%.20s is not allowed at %.200s, %s is",
                       r->method, route->path, route_allow(route));
    } else if (post && !is_json_type(r->content_type)) {
        (void)api_fail(&f, 415, "unsupported_media_type", "",
                       "Content-Type is %.100s, must be application/json", r->content_type);
    } else {
        return route;
    }
    api_access_log_refused(a, r->request_id, route ? route->path : "-", f.status);
    api_reply_failure(a, x, r->request_id, clock_now_us(), route ? route->shape : NULL, &f);
    return NULL;
}

static void on_headers(void *user, struct http_exchange *x, const struct http_request *r)
{
    api_cors(user, x, r);
    (void)gate(user, x, r);
}

static void on_refused(void *user, struct http_exchange *x, int status, const char *message,
                       const char *request_id)
{
    struct api *a = user;
    struct api_failure f = {0};
    char drawn[API_REQUEST_ID_BYTES];
    if (!request_id[0]) {
        draw_request_id(a, drawn, sizeof(drawn));
        request_id = drawn;
    }
    (void)api_fail(&f, status, NULL, "", "%s", message);
    api_access_log_refused(a, request_id, "-", status);
    api_reply_failure(a, x, request_id, clock_now_us(), NULL, &f);
}

static void on_request(void *user, struct http_exchange *x, const struct http_request *r)
{
    struct api *a = user;
    const struct route *route = gate(a, x, r);
    if (!route)
        return;
    if (route->get)
        route->get(a, x, r);
    else
        call_arrive(a, x, r, route);
}

static void on_gone(void *user, struct http_exchange *x)
{
    (void)user;
    struct api_call *call = http_get_data(x);
    if (!call)
        return;
    call->x = NULL;
    call->status = 499;
    log_debug("api", "req=%s call=%s client gone", call->request_id, call->id);
    call_release(call);
}

/* ---- a call's way to its gens ---- */

static void call_arrive(struct api *a, struct http_exchange *x, const struct http_request *r,
                        const struct route *route)
{
    uint64_t now_us = clock_now_us();
    struct api_failure f = {0};
    if (a->draining || a->destroyed) {
        (void)api_fail(&f, 503, "unavailable", "", "the server is shutting down");
        f.retry_after_s = 1;
        api_access_log_refused(a, r->request_id, route->path, f.status);
        api_reply_failure(a, x, r->request_id, now_us, route->shape, &f);
        return;
    }
    struct access_key *key = NULL;
    if (!api_access_find(a, r, &key))
        key = NULL; /* gate has just seen it valid */
    if (api_access_take(key, x, &f) != ERR_OK) {
        api_access_log_refused(a, r->request_id, route->path, f.status);
        api_reply_failure(a, x, r->request_id, now_us, route->shape, &f);
        return;
    }
    struct api_call *call = calloc(1, sizeof(*call));
    char *body = malloc(r->n_body + 1);
    if (!call || !body) {
        free(call);
        free(body);
        if (key)
            access_give(key);
        (void)api_fail_err(&f, err_set(ERR_NOMEM, "no memory for the request"), "");
        api_reply_failure(a, x, r->request_id, now_us, route->shape, &f);
        return;
    }
    memcpy(body, r->body ? r->body : "", r->n_body);
    body[r->n_body] = '\0';
    call->api = a;
    call->x = x;
    call->shape = route->shape;
    call->stream_path = route->stream;
    call->path = route->path;
    call->key = key;
    call->body = body;
    call->n_body = r->n_body;
    call->model = *cluster_get_model(a->c.cluster);
    call->arrival_us = call->last_write_us = now_us;
    call->created_s = clock_wall_us() / 1000000u;
    snprintf(call->request_id, sizeof(call->request_id), "%s", r->request_id);
    if (!call->request_id[0])
        draw_request_id(a, call->request_id, sizeof(call->request_id));
    snprintf(call->id, sizeof(call->id), "%s%016llx%08x",
             call->shape->id_prefix ? call->shape->id_prefix : "",
             (unsigned long long)api_random(a), (unsigned)api_random(a));
    if (traceparent_parse(r->traceparent, api_random(a), &call->trace)) {
        char text[TRACEPARENT_BYTES];
        traceparent_write(&call->trace, text);
        http_add_header(x, "traceparent", text);
    }
    call->next = a->calls;
    if (a->calls)
        a->calls->prev = call;
    a->calls = call;
    a->n_calls++;
    http_set_data(x, call);

    if (call->n_body > API_POOL_BYTES) {
        call->work.data = call;
        if (call->shape->generates && call_admit(call, 1) != ERR_OK) {
            call_fail(call);
        } else if (a->pool_bytes + call->n_body > a->max_pool_bytes) {
            (void)api_fail_err(&call->failure, err_set(ERR_BUSY, "too many large requests wait"),
                               "");
            call_fail(call);
        } else if (uv_queue_work(a->c.loop, &call->work, call_in_pool, call_after_pool) != 0) {
            (void)api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
            call_fail(call);
        } else {
            call->in_pool = true;
            a->pool_bytes += call->n_body;
        }
        return;
    }
    enum err e = api_call_parse(call);
    if (e == ERR_OK && call->shape->generates)
        e = call_admit(call, (uint32_t)MAX(call->n_choices, 1));
    if (e == ERR_OK)
        e = call->shape->encode(call);
    if (e == ERR_OK)
        call_run(call);
    else
        call_fail(call);
}

enum err api_call_parse(struct api_call *call)
{
    api_params_init(&call->params);
    enum err e = json_parse(call->body, call->n_body, &json_limits_request, &call->json);
    if (e != ERR_OK) {
        (void)api_fail(&call->failure, e == ERR_NOMEM ? 503 : 400, NULL, "",
                       "the body is not acceptable JSON: %s", err_text(e));
        return e;
    }
    if (!json_is_object(call->json))
        return api_refuse(&call->failure, "", "the body must be a JSON object");
    TRY(call->shape->parse(call, call->json));
    if (call->stream_path)
        call->params.stream = true;
    call->n_each = (size_t)MAX(call->params.n, call->params.best_of);
    call->n_choices = call->n_prompts * call->n_each;
    if (call->n_choices > API_MAX_CHOICES)
        return api_refuse(&call->failure, "n", "%zu prompts with n %zu are %zu choices, at most %d",
                          call->n_prompts, call->n_each, call->n_choices, API_MAX_CHOICES);
    return ERR_OK;
}

/* A large tree takes the loop's time to free: what nobody looks at any more goes in the pool. Of a
 * call that runs, stop strings are still pointed to. */
static void call_strip(struct api_call *call, bool runs)
{
    const char *key;
    json_t *value;
    void *next;
    if (!json_is_object(call->json))
        json_decref(take(&call->json));
    json_object_foreach_safe(call->json, next, key, value)
    {
        bool large = json_is_array(value) || json_is_object(value);
        bool stop = !strcmp(key, "stop") || !strcmp(key, "stop_sequences");
        if (large && !(runs && (stop || !strcmp(key, "parameters"))))
            json_object_del(call->json, key);
    }
}

/* In the pool: touches nothing but the call and what never changes. */
static enum err call_prepare(struct api_call *call)
{
    enum err e = api_call_parse(call);
    if (e == ERR_OK)
        e = call->shape->encode(call);
    call_strip(call, e == ERR_OK);
    return e;
}

static void call_in_pool(uv_work_t *work)
{
    struct api_call *call = work->data;
    call->work_result = call_prepare(call);
}

static void call_after_pool(uv_work_t *work, int status)
{
    struct api_call *call = work->data;
    call->in_pool = false;
    call->api->pool_bytes -= call->n_body;
    if (!call->x || call->state == CALL_ENDED || status == UV_ECANCELED) {
        call_release(call);
        return;
    }
    enum err e = call->work_result;
    if (e == ERR_OK && call->shape->generates)
        e = call_admit(call, (uint32_t)MAX(call->n_choices, 1));
    if (e == ERR_OK)
        call_run(call);
    else
        call_fail(call);
}

static enum err call_admit(struct api_call *call, uint32_t n)
{
    int retry_after_s = 1;
    enum err e = cluster_admits(call->api->c.cluster, n, &retry_after_s);
    if (e != ERR_OK) {
        (void)api_fail_err(&call->failure, e, "");
        call->failure.retry_after_s = MIN(MAX(retry_after_s, 1), 60);
    }
    return e;
}

struct api_prompt *api_call_add_prompts(struct api_call *call, size_t n)
{
    call->prompts = calloc(MAX(n, 1), sizeof(*call->prompts));
    if (!call->prompts) {
        (void)api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
        return NULL;
    }
    call->n_prompts = n;
    return call->prompts;
}

enum err api_prompts_encode(struct api_call *call)
{
    for (size_t i = 0; i < call->n_prompts; i++) {
        struct api_prompt *p = &call->prompts[i];
        if (!p->text)
            continue;
        enum err e = tokenizer_encode(call->api->c.tokenizer, p->text, p->n_text, true, &p->ids);
        if (e != ERR_OK)
            return api_fail_err(&call->failure, e, "prompt");
    }
    return ERR_OK;
}

enum err api_call_encoded(struct api_call *call, const char *param)
{
    uint32_t limit = call->model.max_total_tokens;
    for (size_t i = 0; i < call->n_prompts; i++) {
        struct api_prompt *p = &call->prompts[i];
        int64_t max_tokens = call->params.max_tokens;
        if (p->ids.len == 0)
            return api_refuse(&call->failure, param, "%s has no tokens, must have at least 1",
                              param);
        if (p->ids.len > WIRE_MAX_PROMPT || p->ids.len >= limit)
            return api_fail_context(&call->failure, param, p->ids.len, -1, limit);
        if (max_tokens > 0 && (uint64_t)max_tokens + p->ids.len > limit)
            return api_fail_context(&call->failure, param, p->ids.len, max_tokens, limit);
        p->n_ids = (uint32_t)p->ids.len;
        p->max_tokens = max_tokens >= 0 ? (uint32_t)max_tokens : limit - p->n_ids;
        if (call->params.min_tokens > p->max_tokens)
            return api_refuse(&call->failure, "min_tokens",
                              "min tokens is %lld, must not exceed the %u that fit the context",
                              (long long)call->params.min_tokens, p->max_tokens);
    }
    return ERR_OK;
}

bool api_ends_output(const struct api_call *call, int32_t id)
{
    for (uint32_t i = 0; i < call->params.n_stop_ids; i++)
        if (call->params.stop_ids[i] == id)
            return true;
    for (int i = 0; i < call->model.n_eos; i++)
        if (call->model.eos[i] == id)
            return !call->params.ignore_eos;
    return false;
}

/* ---- gens ---- */

static void on_chunk(void *user, const struct gen_chunk *c)
{
    struct api_choice *choice = user;
    struct api_call *call = choice->call;
    if (call->params.stream) {
        call_open_stream(call);
        if (!choice->opened && call->shape->open)
            call->shape->open(choice);
        choice->opened = true;
    }
    choice->n_tokens += (uint32_t)c->n_ids;
    call->shape->chunk(choice, c);
}

static void on_end(void *user, const struct gen_end *e)
{
    struct api_choice *choice = user;
    struct api_call *call = choice->call;
    choice->gen = NULL;
    choice->ended = true;
    choice->finish = e->finish;
    choice->usage = e->usage;
    if (call->params.stream) {
        call_open_stream(call);
        if (!choice->opened && call->shape->open)
            call->shape->open(choice);
        choice->opened = true;
    }
    call->shape->end(choice, e);
    if (--call->n_running == 0)
        call_complete(call);
}

static void on_error(void *user, enum err code, const char *text)
{
    struct api_choice *choice = user;
    choice->gen = NULL;
    failure_from(&choice->call->failure, code, "", text);
    call_fail(choice->call);
}

/* What a line of a stream needs, from the choice to the connection. */
static void on_warm(void *user, int depth)
{
    const struct api_choice *choice = user;
    const struct api_call *call = choice->call;
    if (depth == 0) {
        warm(choice, sizeof(*choice));
    } else if (depth == 1) {
        warm(call, offsetof(struct api_call, id));
        warm(&call->params.stream, 1);
    } else if (depth == 2) {
        warm(call->head.data, call->head.len);
        warm(call->x, call->x ? 1 : 0);
    } else if (call->x) {
        http_warm(call->x);
    }
}

static const struct gen_callbacks callbacks = {on_chunk, on_end, on_error, on_warm};

static enum err choice_start(struct api_choice *choice, uint32_t i)
{
    struct api_call *call = choice->call;
    struct gen_params p = {
        .prompt = choice->prompt->ids.data,
        .n_prompt = choice->prompt->n_ids,
        .stop = call->params.stop,
        .stop_len = call->params.stop_len,
        .n_stop = call->params.n_stop,
        .include_stop = call->params.include_stop,
        .skip_special = call->params.skip_special,
        .bias_id = call->params.bias_id,
        .bias_value = call->params.bias_value,
        .n_bias = call->params.n_bias,
        .grammar = call->grammar,
        .n_grammar = call->n_grammar,
        .cache_salt = call->params.cache_salt,
        .arrival_us = call->arrival_us,
        .origin = {.request_id = call->request_id,
                   .trace_id = call->trace.trace_id,
                   .parent_id = call->trace.parent_id,
                   .span_id = call->trace.span_id,
                   .choice = choice->idx,
                   .n_choices = (uint32_t)call->n_choices},
    };
    api_params_sampling(&call->params, &call->model, &p.sampling);
    if (call->n_each > (size_t)call->params.n)
        p.sampling.n_logprobs = MAX(p.sampling.n_logprobs, 0); /* best_of goes by them */
    p.sampling.seed = i == 0 ? call->seed : hash_mix(call->seed ^ i * 0x9e3779b97f4a7c15u);
    p.sampling.max_tokens = choice->prompt->max_tokens;
    TRY(gen_start(call->api->c.cluster, &p, &callbacks, choice, &choice->gen));
    log_debug("api", "req=%s gen=%llx trace=%s choice=%u started", call->request_id,
              (unsigned long long)gen_id(choice->gen),
              call->trace.trace_id[0] ? call->trace.trace_id : "-", choice->idx);
    return ERR_OK;
}

static void call_run(struct api_call *call)
{
    struct api *a = call->api;
    call->state = CALL_RUNNING;
    if (call->shape->answer) {
        call->shape->answer(call);
        return;
    }
    call->seed = call->params.has_seed ? call->params.seed : api_random(a);
    call->choices = calloc(MAX(call->n_choices, 1), sizeof(*call->choices));
    if (!call->choices) {
        (void)api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
        call_fail(call);
        return;
    }
    size_t n = call->n_each;
    for (size_t i = 0; i < call->n_choices; i++) {
        struct api_choice *choice = &call->choices[i];
        choice->call = call;
        choice->idx = (uint32_t)i;
        choice->prompt = &call->prompts[i / n];
        struct glm_options options = {
            .tokenizer = a->c.tokenizer,
            .skip_special = call->params.skip_special,
            .reasoning = call->thinking && a->split_reasoning && call->params.separate_reasoning,
            .calls = call->tools && a->parse_calls,
            .tools = call->tools,
            .id_seed = api_random(a), /* not the request's seed: ids must differ */
        };
        glm_parser_init(&choice->parser, &options, call->shape->output, choice);
        text_pos_init(&choice->pos, a->c.tokenizer, call->params.skip_special);
        if (choice->prompt->max_tokens == 0) { /* echo only */
            choice->finish = GEN_LENGTH;
            choice->usage.n_prompt = choice->prompt->n_ids;
            continue;
        }
        enum err e = choice_start(choice, (uint32_t)(i % n));
        if (e != ERR_OK) {
            (void)api_fail_err(&call->failure, e, "");
            call_fail(call);
            return;
        }
        call->n_running++;
    }
    for (size_t i = 0; call->key && i < call->n_prompts; i++)
        access_spend(call->key, call->prompts[i].n_ids, clock_now_us());
    /* The gens have copied what they need; a long prompt need not stay here for as long. */
    for (size_t i = 0; i < call->n_prompts; i++)
        ids_finish(&call->prompts[i].ids);
    chat_prompt_finish(&call->chat);
    json_decref(take(&call->json)); /* what is left of it is tools */
    free(take(&call->body));
    if (call->n_running > 0)
        return;
    if (call->params.stream) {
        call_open_stream(call);
        for (size_t i = 0; i < call->n_choices; i++)
            if (call->shape->open)
                call->shape->open(&call->choices[i]);
        for (size_t i = 0; i < call->n_choices; i++)
            call->shape->end(&call->choices[i], &(struct gen_end){.finish = GEN_LENGTH});
    }
    call_complete(call);
}

/* ---- streams, and the end of a call ---- */

static void call_open_stream(struct api_call *call)
{
    if (call->headers_out || !call->x)
        return;
    call->headers_out = true;
    http_add_header(call->x, "Cache-Control", "no-cache");
    http_add_header(call->x, "X-Accel-Buffering", "no");
    add_headers(call->api, call->x, call->request_id, call->arrival_us);
    sse_begin(call->x);
}

struct json_out *api_line_begin(struct api_call *call)
{
    struct json_out *o = &call->api->line;
    o->len = 0;
    o->failed = false;
    out_raw(o, call->shape->done_line ? "data: " : "data:"); /* LightLLM writes no space */
    if (call->head.len)
        json_out_raw(o, call->head.data, call->head.len);
    return o;
}

struct json_out *api_event_begin(struct api_call *call, const char *name)
{
    struct json_out *o = &call->api->line;
    o->len = 0;
    o->failed = false;
    json_out_fmt(o, "event: %s\ndata: ", name);
    return o;
}

void api_line_end(struct api_call *call)
{
    struct json_out *o = &call->api->line;
    json_out_raw(o, "\n\n", 2);
    if (o->failed)
        call->broken = true;
    else if (call->x)
        IGNORE_WRITE(http_write(call->x, o->data, o->len));
    call->last_write_us = uv_now(call->api->c.loop) * 1000;
}

static void write_done(struct api_call *call)
{
    if (call->shape->done_line)
        IGNORE_WRITE(sse_done(call->x));
}

/* Takes the exchange away from the call: it is about to be finished. */
static struct http_exchange *call_take_exchange(struct api_call *call)
{
    struct http_exchange *x = take(&call->x);
    http_set_data(x, NULL);
    return x;
}

/* All gens ended well. */
static void call_complete(struct api_call *call)
{
    if (call->broken) {
        (void)api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the answer"), "");
        call_fail(call);
        return;
    }
    if (call->x && call->params.stream) {
        if (call->shape->stream_end)
            call->shape->stream_end(call);
        write_done(call);
        call->status = 200;
        http_end(call_take_exchange(call));
    } else if (call->x) {
        struct json_out *o = &call->api->line;
        o->len = 0;
        o->failed = false;
        call->shape->body(call, o);
        api_call_reply(call, o);
        return;
    }
    call_release(call);
}

void api_call_reply(struct api_call *call, struct json_out *body)
{
    if (body->failed) {
        (void)api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the answer"), "");
        call_fail(call);
        return;
    }
    call->status = 200;
    if (call->x)
        api_reply(call->api, call_take_exchange(call), call->request_id, call->arrival_us, 200,
                  NULL, body->data, body->len);
    trim(&call->api->line);
    trim(&call->api->scratch);
    call_release(call);
}

/* Answers f in whatever way is still possible. */
static void call_fail_with(struct api_call *call, const struct api_failure *f)
{
    call->status = f->status;
    if (call->x && call->headers_out && call->shape->stream_failure) {
        call->shape->stream_failure(call, f);
        http_abort(call_take_exchange(call));
    } else if (call->x && call->headers_out) {
        struct json_out *o = &call->api->line;
        o->len = 0;
        o->failed = false;
        out_raw(o, call->shape->done_line ? "data: " : "data:");
        api_out_failure(o, f);
        json_out_raw(o, "\n\n", 2);
        if (!o->failed)
            IGNORE_WRITE(http_write(call->x, o->data, o->len));
        write_done(call);
        http_abort(call_take_exchange(call));
    } else if (call->x) {
        api_reply_failure(call->api, call_take_exchange(call), call->request_id, call->arrival_us,
                          call->shape, f);
    }
    log_debug("api", "req=%s call=%s status=%d %s", call->request_id, call->id, f->status,
              f->message);
    call_release(call);
}

static void call_fail(struct api_call *call) { call_fail_with(call, &call->failure); }

static void choice_finish(struct api_choice *choice)
{
    if (choice->gen)
        gen_cancel(take(&choice->gen));
    glm_parser_finish(&choice->parser);
    for (size_t i = 0; i < choice->n_items; i++) {
        json_out_finish(&choice->items[i].name);
        json_out_finish(&choice->items[i].text);
    }
    free(choice->items);
    json_out_finish(&choice->text);
    json_out_finish(&choice->logprobs);
    json_out_finish(&choice->lp_values);
    json_out_finish(&choice->lp_top);
    json_out_finish(&choice->lp_offsets);
    json_out_finish(&choice->token.text);
}

void api_call_finish(struct api_call *call)
{
    if (call->choices)
        for (size_t i = 0; i < call->n_choices; i++)
            choice_finish(&call->choices[i]);
    free(call->choices);
    for (size_t i = 0; i < call->n_prompts; i++) {
        ids_finish(&call->prompts[i].ids);
        free(call->prompts[i].echo);
    }
    free(call->prompts);
    chat_prompt_finish(&call->chat);
    json_out_finish(&call->head);
    api_params_finish(&call->params);
    free(call->grammar);
    json_decref(call->tools);
    json_decref(call->json);
    free(call->body);
}

/* The output is paid when all of it is known. */
static void pay(struct api_call *call)
{
    uint64_t n = 0;
    for (size_t i = 0; call->choices && i < call->n_choices; i++)
        n += call->choices[i].n_tokens;
    access_spend(call->key, n, clock_now_us());
    access_give(call->key);
}

/* The end of every call: gens are cancelled now, memory goes when the pool lets go of it. */
static void call_release(struct api_call *call)
{
    struct api *a = call->api;
    call->state = CALL_ENDED;
    assert(!call->x);
    if (call->choices)
        for (size_t i = 0; i < call->n_choices; i++)
            if (call->choices[i].gen)
                gen_cancel(take(&call->choices[i].gen));
    if (call->in_pool) {
        (void)uv_cancel((uv_req_t *)&call->work); /* call_after_pool comes in any case */
        return;
    }
    if (call->prev)
        call->prev->next = call->next;
    else
        a->calls = call->next;
    if (call->next)
        call->next->prev = call->prev;
    a->n_calls--;
    api_access_log(call);
    if (call->key)
        pay(call);
    api_call_finish(call);
    free(call);
    maybe_free(a);
}

/* ---- what shapes share ---- */

const char *api_finish_name(const struct api_choice *choice)
{
    if (choice->finish != GEN_STOP || choice->parser.broken)
        return "length";
    return choice->parser.n_calls ? "tool_calls" : "stop";
}

void api_out_usage(struct api_call *call, struct json_out *o)
{
    uint64_t n_prompt = 0, n_output = 0, n_cached = 0, n_reasoning = 0;
    for (size_t i = 0; i < call->n_prompts; i++)
        n_prompt += call->prompts[i].n_ids;
    for (size_t i = 0; i < call->n_choices; i++) {
        const struct api_choice *choice = &call->choices[i];
        n_output += choice->ended ? choice->usage.n_output : choice->n_tokens;
        n_reasoning += choice->parser.n_reasoning;
        if (i % call->n_each == 0)
            n_cached += choice->usage.n_cached;
    }
    json_out_fmt(o,
                 "{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,\"total_tokens\":%llu,"
                 "\"prompt_tokens_details\":{\"cached_tokens\":%llu},"
                 "\"completion_tokens_details\":{\"reasoning_tokens\":%llu}}",
                 (unsigned long long)n_prompt, (unsigned long long)n_output,
                 (unsigned long long)(n_prompt + n_output), (unsigned long long)n_cached,
                 (unsigned long long)n_reasoning);
}

void api_out_line_usage(struct api_call *call, struct json_out *o)
{
    out_raw(o, "]");
    if (call->params.running_usage) {
        out_raw(o, ",\"usage\":");
        api_out_usage(call, o);
    } else if (call->params.include_usage) {
        out_raw(o, ",\"usage\":null");
    }
    out_raw(o, "}");
}
