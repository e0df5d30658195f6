/* api_history.c: a conversation in another API's words becomes the chat shape's messages.
 *
 * Other APIs cut a turn into blocks or items: reasoning, text, calls and results come one by one.
 * Pieces of one role that follow each other become one message, so that the template renders one
 * turn.
 */
#include "router/api_internal.h"

#include <string.h>

/* What the open message has reasoned becomes its member only now: joined piece by piece, many
 * pieces would be copied as many times. */
static void set_reasoning(struct api_history *h)
{
    struct json_out *o = &h->reasoning;
    if (o->len &&
        json_object_set_new(h->open, "reasoning_content", json_stringn(o->data, o->len)) != 0)
        h->failed = true;
    h->failed |= o->failed;
    o->len = 0;
}

void api_history_close(struct api_history *h)
{
    set_reasoning(h);
    h->open = NULL;
}

static json_t *open_as(struct api_history *h, const char *role)
{
    const char *is = json_string_value(json_object_get(h->open, "role"));
    if (is && !strcmp(is, role))
        return h->open;
    api_history_close(h);
    json_t *m = json_pack("{s:s,s:[]}", "role", role, "content");
    if (!h->messages)
        h->messages = json_array();
    if (json_array_append_new(h->messages, m) != 0) {
        h->failed = true;
        m = NULL;
    }
    return h->open = m;
}

static void append(struct api_history *h, json_t *array, json_t *item)
{
    if (json_array_append_new(array, item) != 0)
        h->failed = true;
}

void api_history_text(struct api_history *h, const char *role, const json_t *text)
{
    json_t *m = open_as(h, role);
    append(h, json_object_get(m, "content"),
           json_pack("{s:s,s:O}", "type", "text", "text", (json_t *)text));
}

void api_history_reasoning(struct api_history *h, const json_t *text)
{
    if (open_as(h, "assistant"))
        json_out_raw(&h->reasoning, json_string_value(text), json_string_length(text));
}

void api_history_call(struct api_history *h, const json_t *id, const json_t *name,
                      const json_t *arguments)
{
    json_t *m = open_as(h, "assistant");
    json_t *calls = json_object_get(m, "tool_calls");
    if (!calls) {
        calls = json_array();
        if (json_object_set_new(m, "tool_calls", calls) != 0) {
            h->failed = true;
            return;
        }
    }
    append(h, calls,
           json_pack("{s:O,s:s,s:{s:O,s:O}}", "id", (json_t *)id, "type", "function", "function",
                     "name", (json_t *)name, "arguments", (json_t *)arguments));
}

void api_history_result(struct api_history *h, const json_t *id)
{
    api_history_close(h);
    json_t *m = open_as(h, "tool");
    if (json_object_set(m, "tool_call_id", (json_t *)id) != 0)
        h->failed = true;
}

bool api_history_says(const struct api_history *h)
{
    return json_array_size(json_object_get(h->open, "content")) > 0 ||
           json_object_get(h->open, "tool_calls");
}

enum err api_history_render(struct api_history *h, json_t *tools, struct api_call *call)
{
    api_history_close(h);
    json_t *body = json_pack("{s:O?,s:O?}", "messages", h->messages, "tools", tools);
    enum err e = ERR_OK;
    if (!body || h->failed)
        e = api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
    else
        e = api_chat_render(call, body);
    json_decref(body);
    return e;
}

void api_history_finish(struct api_history *h)
{
    json_decref(h->messages);
    json_out_finish(&h->reasoning);
    *h = (struct api_history){0};
}
