/* api_info.c: what answers without generating: models, health, metrics, version, the tokeniser. */
#include "router/api_internal.h"

#include <string.h>
#include <time.h>

#include "common/base/clock.h"

#ifndef BATON_VERSION
#define BATON_VERSION "0"
#endif

static void answer(struct api *a, struct http_exchange *x, const struct http_request *r, int status,
                   const char *type, const char *text)
{
    api_reply(a, x, r->request_id, clock_now_us(), status, type, text, strlen(text));
}

static void answer_out(struct api *a, struct http_exchange *x, const struct http_request *r,
                       const char *type, struct json_out *o)
{
    uint64_t now_us = clock_now_us();
    if (o->failed) {
        struct api_failure f = {0};
        (void)api_fail_err(&f, err_set(ERR_NOMEM, "no memory for the answer"), "");
        api_reply_failure(a, x, r->request_id, now_us, NULL, &f);
    } else {
        api_reply(a, x, r->request_id, now_us, 200, type, o->data, o->len);
    }
    json_out_finish(o);
}

/* ---- state ---- */

void api_get_health(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    answer(a, x, r, 200, NULL, "{\"status\":\"ok\"}");
}

void api_get_ready(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    if (a->draining || a->destroyed)
        answer(a, x, r, 503, NULL, "{\"status\":\"draining\"}");
    else if (!cluster_ready(a->c.cluster))
        answer(a, x, r, 503, NULL, "{\"status\":\"no workers\"}");
    else
        answer(a, x, r, 200, NULL, "{\"status\":\"ready\"}");
}

void api_get_version(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    answer(a, x, r, 200, NULL, "{\"version\":\"" BATON_VERSION "\"}");
}

void api_get_metrics(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    struct json_out o = {0};
    if (a->c.write_metrics)
        a->c.write_metrics(a->c.metrics_user, &o);
    json_out_raw(&o, "", 0);
    answer_out(a, x, r, "text/plain; version=0.0.4; charset=utf-8", &o);
}

/* ---- models ---- */

/* OpenAI's members and Anthropic's in one object: each SDK reads its own. */
static void out_model(struct api *a, struct json_out *o)
{
    const struct cluster_model *m = cluster_get_model(a->c.cluster);
    out_raw(o, "{\"id\":");
    out_text(o, m->name);
    json_out_fmt(o, ",\"object\":\"model\",\"created\":%llu,\"owned_by\":\"baton\",\"root\":",
                 (unsigned long long)a->created_s);
    out_text(o, m->name);
    json_out_fmt(o, ",\"parent\":null,\"max_model_len\":%u,\"type\":\"model\",\"display_name\":",
                 m->max_total_tokens);
    out_text(o, m->name);
    time_t created_s = (time_t)a->created_s;
    struct tm tm;
    char when[32];
    gmtime_r(&created_s, &tm);
    strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", &tm);
    json_out_fmt(o, ",\"created_at\":\"%s\"}", when);
}

void api_get_models(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    struct json_out o = {0};
    out_raw(&o, "{\"object\":\"list\",\"data\":[");
    out_model(a, &o);
    const char *name = cluster_get_model(a->c.cluster)->name;
    out_raw(&o, "],\"has_more\":false,\"first_id\":");
    out_text(&o, name);
    out_raw(&o, ",\"last_id\":");
    out_text(&o, name);
    out_raw(&o, "}");
    answer_out(a, x, r, NULL, &o);
}

static int hex(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* Is text, with %XX decoded, name? Names contain slashes, which SDKs encode. */
static bool path_equals(const char *text, const char *name)
{
    for (; *text && *name; text++, name++) {
        char c = *text;
        if (c == '%' && hex(text[1]) >= 0 && hex(text[2]) >= 0) {
            c = (char)(hex(text[1]) << 4 | hex(text[2]));
            text += 2;
        }
        if (c != *name)
            return false;
    }
    return !*text && !*name;
}

void api_get_model(struct api *a, struct http_exchange *x, const struct http_request *r)
{
    const char *name = r->path + strlen("/v1/models/");
    if (!path_equals(name, cluster_get_model(a->c.cluster)->name)) {
        struct api_failure f = {0};
        (void)api_fail(&f, 404, "model_not_found", "model", "the model `%.128s` does not exist",
                       name);
        api_reply_failure(a, x, r->request_id, clock_now_us(), NULL, &f);
        return;
    }
    struct json_out o = {0};
    out_model(a, &o);
    answer_out(a, x, r, NULL, &o);
}

/* ---- tokeniser ---- */

static enum err tokenize_parse(struct api_call *call, const json_t *body)
{
    static const char *const names[] = {"text", "prompt", "inputs", "messages"};
    TRY(api_params_read(body, API_TOKENIZE, &call->model, &call->params, &call->failure));
    const json_t *given = NULL;
    const char *name = NULL;
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        const json_t *v = json_object_get(body, names[i]);
        if (!v || json_is_null(v))
            continue;
        if (given)
            return api_refuse(&call->failure, names[i], "%s and %s cannot both be given", name,
                              names[i]);
        given = v;
        name = names[i];
    }
    if (!given)
        return api_refuse(&call->failure, "text",
                          "one of text, prompt, inputs and messages is required");
    if (!strcmp(name, "messages"))
        return api_chat_render(call, body);
    if (!json_is_string(given))
        return api_refuse(&call->failure, name, "%s must be a string", name);
    struct api_prompt *p = api_call_add_prompts(call, 1);
    if (!p)
        return ERR_NOMEM;
    p->text = json_string_value(given);
    p->n_text = json_string_length(given);
    return ERR_OK;
}

/* The answer is written here and not on the loop: it may have millions of ids. */
static enum err tokenize_encode(struct api_call *call)
{
    TRY(call->prompts[0].text ? api_prompts_encode(call) : api_chat_encode(call));
    struct json_out *o = &call->head;
    const struct ids *ids = &call->prompts[0].ids;
    out_raw(o, "{\"tokens\":[");
    for (size_t i = 0; i < ids->len; i++) {
        if (i)
            out_raw(o, ",");
        out_uint(o, (uint32_t)ids->data[i]);
    }
    json_out_fmt(o, "],\"count\":%zu,\"ntokens\":%zu,\"max_model_len\":%u}", ids->len, ids->len,
                 call->model.max_total_tokens);
    return ERR_OK;
}

static void tokenize_answer(struct api_call *call) { api_call_reply(call, &call->head); }

const struct api_shape api_shape_tokenize = {
    .parse = tokenize_parse,
    .encode = tokenize_encode,
    .answer = tokenize_answer,
};

static enum err detokenize_parse(struct api_call *call, const json_t *body)
{
    struct api_failure *f = &call->failure;
    TRY(api_params_read(body, API_DETOKENIZE, &call->model, &call->params, f));
    const json_t *tokens = json_object_get(body, "tokens");
    if (!json_is_array(tokens))
        return api_refuse(f, "tokens", "tokens is required and must be an array of token ids");
    struct api_prompt *p = api_call_add_prompts(call, 1);
    if (!p)
        return ERR_NOMEM;
    for (size_t i = 0; i < json_array_size(tokens); i++) {
        const json_t *v = json_array_get(tokens, i);
        if (!json_is_integer(v))
            return api_refuse(f, "tokens", "tokens[%zu] must be a token id", i);
        if (json_integer_value(v) < 0 || json_integer_value(v) >= call->model.n_token_ids)
            return api_refuse(f, "tokens", "tokens[%zu] is %lld, must be between 0 and %d", i,
                              (long long)json_integer_value(v), call->model.n_token_ids - 1);
        if (ids_push(&p->ids, (int32_t)json_integer_value(v)) != ERR_OK)
            return api_fail_err(f, ERR_NOMEM, "tokens");
    }
    return ERR_OK;
}

static enum err detokenize_encode(struct api_call *call)
{
    struct api_prompt *p = &call->prompts[0];
    struct json_out text = {0};
    struct detokenizer d;
    detokenizer_init(&d, call->api->c.tokenizer, false);
    for (size_t i = 0; i < p->ids.len; i++)
        detokenizer_push(&d, p->ids.data[i], &text);
    detokenizer_flush(&d, &text);
    if (text.failed) {
        json_out_finish(&text);
        return api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the answer"), "");
    }
    p->echo = text.data;
    p->n_echo = text.len;
    return ERR_OK;
}

static void detokenize_answer(struct api_call *call)
{
    struct json_out *o = &call->api->line;
    const struct api_prompt *p = &call->prompts[0];
    o->len = 0;
    o->failed = false;
    out_raw(o, "{\"prompt\":");
    json_out_string(o, p->n_echo ? p->echo : "", p->n_echo);
    out_raw(o, ",\"text\":");
    json_out_string(o, p->n_echo ? p->echo : "", p->n_echo);
    out_raw(o, "}");
    api_call_reply(call, o);
}

const struct api_shape api_shape_detokenize = {
    .parse = detokenize_parse,
    .encode = detokenize_encode,
    .answer = detokenize_answer,
};
