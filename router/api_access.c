/* api_access.c: keys, limits, browsers and the access log, as HTTP has them. The rules are
 * access.c's.
 */
#include "router/api_internal.h"

#include <string.h>
#include <strings.h>

#include "common/base/clock.h"
#include "common/base/log.h"

#define MAX_RETRY_S 60u /* SDKs wait no longer than that */

enum err api_access_open(struct api *a)
{
    const struct config *c = a->c.config;
    a->log_access = c->access_log && !strcmp(c->access_log, "on");
    if (!c->api_key_file || !c->api_key_file[0])
        return ERR_OK;
    struct access_limits defaults = {.concurrency = (uint32_t)c->api_key_concurrency,
                                     .tokens_per_minute = (uint64_t)c->api_key_tokens_per_minute};
    enum err e = access_create(c->api_key_file, &defaults, &a->access);
    return e == ERR_OK ? e : err_prefix(e, "--api-key-file");
}

enum err api_reload_keys(struct api *a, size_t *ret_n_keys)
{
    *ret_n_keys = 0;
    if (!a->access)
        return ERR_OK;
    TRY(access_reload(a->access));
    *ret_n_keys = access_n_keys(a->access);
    return ERR_OK;
}

/* ---- keys and limits ---- */

bool api_access_find(const struct api *a, const struct http_request *r, struct access_key **ret)
{
    static const char bearer[] = "bearer ";
    const char *secret = r->api_key;
    *ret = NULL;
    if (!a->access)
        return true;
    if (r->authorization[0]) {
        if (strncasecmp(r->authorization, bearer, strlen(bearer)) != 0)
            return false;
        secret = r->authorization + strlen(bearer);
        secret += strspn(secret, " ");
    }
    *ret = access_find(a->access, secret, strlen(secret));
    return *ret != NULL;
}

void api_access_refuse(struct http_exchange *x, const struct http_request *r, struct api_failure *f)
{
    bool none = !r->authorization[0] && !r->api_key[0];
    http_add_header(x, "WWW-Authenticate", "Bearer");
    (void)api_fail(f, 401, "invalid_api_key", "",
                   none ? "an API key is required: Authorization: Bearer KEY, or x-api-key: KEY"
                        : "the API key is not valid here");
}

static void add_number(struct http_exchange *x, const char *name, uint64_t v)
{
    char text[32];
    snprintf(text, sizeof(text), "%llu", (unsigned long long)v);
    http_add_header(x, name, text);
}

static void add_duration(struct http_exchange *x, const char *name, uint32_t s)
{
    char text[32];
    if (s < 60)
        snprintf(text, sizeof(text), "%us", s);
    else
        snprintf(text, sizeof(text), "%um%us", s / 60, s % 60);
    http_add_header(x, name, text);
}

static void add_rate_headers(struct http_exchange *x, const struct access_state *s)
{
    if (s->limits.concurrency) {
        add_number(x, "x-ratelimit-limit-requests", s->limits.concurrency);
        add_number(x, "x-ratelimit-remaining-requests",
                   s->limits.concurrency - MIN(s->n_running, s->limits.concurrency));
        add_duration(x, "x-ratelimit-reset-requests", 1);
    }
    if (s->limits.tokens_per_minute) {
        add_number(x, "x-ratelimit-limit-tokens", s->limits.tokens_per_minute);
        add_number(x, "x-ratelimit-remaining-tokens", s->tokens_left);
        add_duration(x, "x-ratelimit-reset-tokens", s->full_s);
    }
}

enum err api_access_take(struct access_key *k, struct http_exchange *x, struct api_failure *f)
{
    struct access_state s;
    if (!k)
        return ERR_OK;
    enum err e = access_take(k, clock_now_us(), &s);
    add_rate_headers(x, &s);
    if (e == ERR_OK)
        return ERR_OK;
    (void)api_fail_err(f, e, "");
    f->retry_after_s = (int)MIN(s.retry_s, MAX_RETRY_S);
    return e;
}

/* ---- browsers ---- */

/* Is origin in the list "a, b, c" or is that "*"? */
static bool origin_allowed(const char *list, const char *origin)
{
    size_t n_origin = strlen(origin);
    while (*list) {
        list += strspn(list, ", ");
        size_t n = strcspn(list, ", ");
        if ((n == 1 && *list == '*') || (n == n_origin && n && !strncasecmp(list, origin, n)))
            return true;
        list += n;
    }
    return false;
}

void api_cors(const struct api *a, struct http_exchange *x, const struct http_request *r)
{
    const char *list = a->c.config->cors_allow_origin;
    if (!list || !list[0])
        return;
    http_add_header(x, "Vary", "Origin");
    if (!r->origin[0] || !origin_allowed(list, r->origin))
        return;
    http_add_header(x, "Access-Control-Allow-Origin", r->origin);
    http_add_header(x, "Access-Control-Expose-Headers",
                    "X-Request-Id, request-id, openai-processing-ms, Retry-After, retry-after-ms, "
                    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
                    "x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
                    "x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens");
    if (strcmp(r->method, "OPTIONS") != 0)
        return;
    /* What the page wants to send is no secret and does no harm: SDKs send a dozen of their own. */
    http_add_header(x, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
    http_add_header(x, "Access-Control-Allow-Headers",
                    r->cors_headers[0] ? r->cors_headers : "authorization, content-type");
    http_add_header(x, "Access-Control-Max-Age", "86400");
}

/* ---- the log ---- */

void api_access_log(const struct api_call *call)
{
    uint64_t n_prompt = 0, n_cached = 0, n_output = 0;
    if (!call->api->log_access)
        return;
    for (size_t i = 0; i < call->n_prompts; i++)
        n_prompt += call->prompts[i].n_ids;
    for (size_t i = 0; call->choices && i < call->n_choices; i++) {
        n_output += call->choices[i].n_tokens;
        if (i % call->n_each == 0)
            n_cached += call->choices[i].usage.n_cached;
    }
    log_info("access",
             "req=%s key=%s path=%s status=%d stream=%d prompt=%llu cached=%llu output=%llu "
             "ms=%llu%s%s",
             call->request_id, call->key ? access_label(call->key) : "-", call->path, call->status,
             call->params.stream, (unsigned long long)n_prompt, (unsigned long long)n_cached,
             (unsigned long long)n_output,
             (unsigned long long)((clock_now_us() - call->arrival_us + 500) / 1000),
             call->trace.trace_id[0] ? " trace=" : "", call->trace.trace_id);
}

void api_access_log_refused(const struct api *a, const char *request_id, const char *path,
                            int status)
{
    if (a->log_access)
        log_info("access", "req=%s key=- path=%s status=%d refused",
                 request_id[0] ? request_id : "-", path, status);
}
