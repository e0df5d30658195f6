/* request.c: see request.h. The names of members are those that vllm bench serve sends. */
#include "tests/bench/request.h"

#include <stdlib.h>
#include <string.h>

#define RAW(o, text) json_out_raw(o, text, strlen(text))

enum err request_form_init(struct request_form *f, const struct options *o, const struct client *c)
{
    *f = (struct request_form){.o = o, .client = c};
    if (o->model[0])
        f->model = strdup(o->model);
    f->extra = strdup("");
    if (!o->extra_body[0])
        return ERR_OK;
    json_t *json = NULL;
    enum err e = json_parse(o->extra_body, strlen(o->extra_body), &json_limits_request, &json);
    if (e == ERR_OK && !json_is_object(json))
        e = err_set(ERR_INVALID, "not an object");
    if (e == ERR_OK && json_object_size(json)) {
        free(f->extra);
        f->extra = json_dumps(json, JSON_COMPACT);
        f->extra[0] = ','; // ,"a":1} : the brace becomes ours
        f->extra[strlen(f->extra) - 1] = '\0';
    }
    json_decref(json);
    return e ? err_prefix(e, "--extra-body") : ERR_OK;
}

void request_form_finish(struct request_form *f)
{
    free(f->model);
    free(f->extra);
}

static void write_prompt(const struct prompt *p, struct json_out *b)
{
    if (p->messages) {
        RAW(b, p->messages);
        return;
    }
    if (p->text) {
        json_out_string(b, p->text, strlen(p->text));
        return;
    }
    for (size_t i = 0; i < p->n_ids; i++)
        json_out_fmt(b, "%c%d", i ? ',' : '[', p->ids[i]);
    RAW(b, "]");
}

static void write_openai(const struct request_form *f, const struct prompt *p, struct json_out *b)
{
    bool chat = f->o->endpoint_kind == ENDPOINT_CHAT;
    bool bare = chat && !p->messages;
    RAW(b, chat ? "{\"messages\":" : "{\"prompt\":");
    RAW(b, bare ? "[{\"role\":\"user\",\"content\":" : "");
    write_prompt(p, b);
    RAW(b, bare ? "}]" : "");
    if (f->model) {
        RAW(b, ",\"model\":");
        json_out_string(b, f->model, strlen(f->model));
    }
    json_out_fmt(b, ",\"%s\":%u,\"temperature\":", chat ? "max_completion_tokens" : "max_tokens",
                 p->output_tokens);
    json_out_double(b, f->o->temperature);
    json_out_fmt(b,
                 ",\"ignore_eos\":%s,\"stream\":true,\"stream_options\":{\"include_usage\":true}",
                 f->o->do_ignore_eos ? "true" : "false");
    RAW(b, f->extra);
    RAW(b, "}");
}

static void write_generate(const struct request_form *f, const struct prompt *p, struct json_out *b)
{
    RAW(b, "{\"inputs\":");
    write_prompt(p, b);
    json_out_fmt(b, ",\"parameters\":{\"max_new_tokens\":%u,\"ignore_eos\":%s,\"do_sample\":%s",
                 p->output_tokens, f->o->do_ignore_eos ? "true" : "false",
                 f->o->temperature > 0 ? "true" : "false");
    if (f->o->temperature > 0) {
        RAW(b, ",\"temperature\":");
        json_out_double(b, f->o->temperature);
    }
    RAW(b, f->extra);
    RAW(b, "}}");
}

void request_write_raw(const struct request_form *f, const char *method, const char *path,
                       const struct json_out *body, struct json_out *out)
{
    out->len = 0;
    json_out_fmt(out, "%s %s%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: baton-bench\r\n", method,
                 client_prefix(f->client), path, client_host(f->client));
    if (f->o->api_key[0])
        json_out_fmt(out, "Authorization: Bearer %s\r\n", f->o->api_key);
    if (body)
        json_out_fmt(out, "Content-Type: application/json\r\nContent-Length: %zu\r\n", body->len);
    RAW(out, "\r\n");
    if (body) {
        json_out_raw(out, body->data, body->len);
        out->failed |= body->failed;
    }
}

void request_write(const struct request_form *f, const struct prompt *p, struct json_out *out)
{
    struct json_out body = {0};
    if (f->o->endpoint_kind == ENDPOINT_GENERATE)
        write_generate(f, p, &body);
    else
        write_openai(f, p, &body);
    request_write_raw(f, "POST", endpoint_path(f->o->endpoint_kind), &body, out);
    json_out_finish(&body);
}
