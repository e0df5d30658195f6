/* api_chat.c: POST /v1/chat/completions, OpenAI's shape.
 *
 * Reasoning is sent twice, as reasoning_content (what most clients read) and as reasoning (what
 * newer ones read). The lines of a stream are written by hand, field by field: this is the hot
 * path. Logprob entries wait for the next line that carries something, so none is lost when text is
 * held back.
 */
#include "router/api_internal.h"

#include <string.h>

static enum err check_messages(const json_t *messages, struct api_failure *f);
static enum err check_tools(const json_t *tools, struct api_failure *f);

/* ---- request ---- */

static enum err stop_after_call(struct api_call *call)
{
    struct api_params *p = &call->params;
    if (!call->api->parse_calls || call->api->call_end_id < 0)
        return ERR_OK;
    if (p->n_stop_ids == WIRE_MAX_STOP_IDS)
        return api_refuse(&call->failure, "stop_token_ids",
                          "stop_token_ids has %u ids, must have at most %u without "
                          "parallel_tool_calls",
                          p->n_stop_ids, WIRE_MAX_STOP_IDS - 1);
    p->stop_ids[p->n_stop_ids++] = call->api->call_end_id;
    call->one_call = true;
    return ERR_OK;
}

/* Prompts are made of messages in /tokenize as well. */
enum err api_chat_render(struct api_call *call, const json_t *body)
{
    struct api_failure *f = &call->failure;
    const struct api_params *p = &call->params;
    const json_t *messages = json_object_get(body, "messages");
    const json_t *tools = json_object_get(body, "tools");
    TRY(check_messages(messages, f));
    if (json_is_null(tools))
        tools = NULL;
    if (tools)
        TRY(check_tools(tools, f));
    if (p->tool_choice == API_TOOLS_NONE)
        tools = NULL;
    if (p->continue_final_message) {
        const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
        if (strcmp(json_string_value(json_object_get(last, "role")), "assistant") != 0)
            return api_refuse(f, "continue_final_message",
                              "continue_final_message needs a last message of role assistant");
    }
    bool thinking = p->thinking == API_THINKING_DEFAULT ? call->api->default_thinking
                                                        : p->thinking == API_THINKING_ON;
    struct chat_options options = {.add_generation_prompt = p->add_generation_prompt,
                                   .enable_thinking = thinking,
                                   .clear_thinking = p->clear_thinking,
                                   .continue_final_message = p->continue_final_message};
    enum err e = chat_render(messages, tools, &options, &call->chat);
    if (e == ERR_INVALID)
        return api_refuse(f, "messages", "%s", err_text(e));
    if (e != ERR_OK)
        return api_fail_err(f, e, "messages");
    call->thinking = thinking && p->add_generation_prompt;
    if (json_array_size(tools) > 0) {
        call->tools = json_incref((json_t *)tools);
        if (!p->parallel_tool_calls)
            TRY(stop_after_call(call));
    }
    TRY(api_grammar_make(call, tools));
    return api_call_add_prompts(call, 1) ? ERR_OK : ERR_NOMEM;
}

enum err api_chat_encode(struct api_call *call)
{
    enum err e = chat_encode(call->api->c.tokenizer, &call->chat, &call->prompts[0].ids);
    return e == ERR_OK ? ERR_OK : api_fail_err(&call->failure, e, "messages");
}

static enum err chat_parse(struct api_call *call, const json_t *body)
{
    TRY(api_params_read(body, API_CHAT, &call->model, &call->params, &call->failure));
    TRY(api_chat_render(call, body));
    json_out_fmt(&call->head, "{\"id\":\"%s\",\"object\":\"chat.completion%s\",\"created\":%llu,",
                 call->id, call->params.stream ? ".chunk" : "",
                 (unsigned long long)call->created_s);
    out_raw(&call->head, "\"model\":");
    out_text(&call->head, call->model.name);
    out_raw(&call->head, ",\"choices\":[");
    if (call->head.failed)
        return api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
    return ERR_OK;
}

static enum err chat_call_encode(struct api_call *call)
{
    TRY(api_chat_encode(call));
    return api_call_encoded(call, "messages");
}

static enum err check_part(const json_t *part, size_t i, size_t k, struct api_failure *f)
{
    if (json_is_string(part))
        return ERR_OK;
    const char *type = json_string_value(json_object_get(part, "type"));
    if (!type)
        return api_refuse(f, "messages", "messages[%zu].content[%zu] must be an object with a type",
                          i, k);
    if (!strcmp(type, "text") && !json_is_string(json_object_get(part, "text")))
        return api_refuse(f, "messages", "messages[%zu].content[%zu].text must be a string", i, k);
    return ERR_OK; /* chat_render knows which types it can render */
}

static enum err check_messages(const json_t *messages, struct api_failure *f)
{
    if (!messages || json_is_null(messages))
        return api_refuse(f, "messages", "messages is required");
    if (!json_is_array(messages))
        return api_refuse(f, "messages", "messages must be an array");
    if (json_array_size(messages) == 0)
        return api_refuse(f, "messages", "messages is empty, must have at least 1 entry");
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const json_t *m = json_array_get(messages, i);
        if (!json_is_object(m))
            return api_refuse(f, "messages", "messages[%zu] must be an object", i);
        const char *role = json_string_value(json_object_get(m, "role"));
        if (!role)
            return api_refuse(f, "messages", "messages[%zu].role must be a string", i);
        const json_t *content = json_object_get(m, "content");
        const json_t *calls = json_object_get(m, "tool_calls");
        bool absent = !content || json_is_null(content);
        if (absent && strcmp(role, "assistant") != 0)
            return api_refuse(f, "messages", "messages[%zu].content is required for role %.32s", i,
                              role);
        if (!absent && !json_is_string(content) && !json_is_array(content))
            return api_refuse(f, "messages",
                              "messages[%zu].content must be a string or an array of parts", i);
        for (size_t k = 0; k < json_array_size(content); k++)
            TRY(check_part(json_array_get(content, k), i, k, f));
        if (calls && !json_is_null(calls) && !json_is_array(calls))
            return api_refuse(f, "messages", "messages[%zu].tool_calls must be an array", i);
    }
    return ERR_OK;
}

static enum err check_tools(const json_t *tools, struct api_failure *f)
{
    if (!json_is_array(tools))
        return api_refuse(f, "tools", "tools must be an array");
    if (json_array_size(tools) > API_MAX_TOOLS)
        return api_refuse(f, "tools", "tools has %zu entries, must have at most %d",
                          json_array_size(tools), API_MAX_TOOLS);
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i);
        const char *type = json_string_value(json_object_get(tool, "type"));
        if (!type || strcmp(type, "function") != 0)
            return api_refuse(f, "tools", "tools[%zu].type must be \"function\"", i);
        if (!json_is_string(json_object_get(json_object_get(tool, "function"), "name")))
            return api_refuse(f, "tools", "tools[%zu].function.name must be a string", i);
    }
    return ERR_OK;
}

/* ---- output ---- */

static void out_entry(struct json_out *o, const struct tokenizer *t, int32_t id, float logprob)
{
    size_t n = 0;
    const char *bytes = tokenizer_bytes(t, id, &n);
    out_raw(o, "{\"token\":");
    out_token(o, t, id);
    out_raw(o, ",\"logprob\":");
    out_float(o, logprob);
    out_raw(o, ",\"bytes\":[");
    for (size_t i = 0; bytes && i < n; i++)
        json_out_fmt(o, i ? ",%u" : "%u", (unsigned char)bytes[i]);
    out_raw(o, "]");
}

void api_chat_logprobs(struct api_choice *choice, const struct gen_chunk *c)
{
    const struct tokenizer *t = choice->call->api->c.tokenizer;
    struct json_out *o = &choice->logprobs;
    if (choice->call->params.n_logprobs < 0 || c->n_logprobs < 0)
        return;
    for (int i = 0; i < c->n_ids; i++) {
        if (api_ends_output(choice->call, c->ids[i]))
            continue;
        if (o->len)
            out_raw(o, ",");
        out_entry(o, t, c->ids[i], c->logprob[i]);
        out_raw(o, ",\"top_logprobs\":[");
        for (int k = 0; k < c->n_logprobs; k++) {
            const struct wire_top *top = &c->top[(size_t)i * (size_t)c->n_logprobs + (size_t)k];
            if (k)
                out_raw(o, ",");
            out_entry(o, t, top->id, top->logprob);
            out_raw(o, "}");
        }
        out_raw(o, "]}");
    }
    if (o->failed)
        choice->call->broken = true;
}

/* ,"logprobs":.. with what has gathered (and forgets it), ,"finish_reason":.. */
static void out_choice_end(struct api_choice *choice, struct json_out *o, const char *finish)
{
    struct json_out *lp = &choice->logprobs;
    bool wanted = choice->call->params.n_logprobs >= 0;
    if (wanted && (lp->len || !choice->call->params.stream)) {
        out_raw(o, ",\"logprobs\":{\"content\":[");
        json_out_raw(o, lp->len ? lp->data : "", lp->len);
        out_raw(o, "],\"refusal\":null}");
        lp->len = 0;
    } else {
        out_raw(o, ",\"logprobs\":null");
    }
    out_raw(o, ",\"finish_reason\":");
    out_text(o, finish);
    out_raw(o, "}");
}

static void line_end(struct api_call *call, struct json_out *o)
{
    api_out_line_usage(call, o);
    api_line_end(call);
}

static void chat_open(struct api_choice *choice)
{
    struct json_out *o = api_line_begin(choice->call);
    json_out_fmt(o,
                 "{\"index\":%u,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                 "\"logprobs\":null,\"finish_reason\":null}",
                 choice->idx);
    line_end(choice->call, o);
}

static void out_delta(struct json_out *o, const struct glm_event *e)
{
    switch (e->kind) {
    case GLM_EVENT_REASONING:
        out_raw(o, "\"reasoning_content\":");
        json_out_string(o, e->text, e->n_text);
        out_raw(o, ",\"reasoning\":");
        json_out_string(o, e->text, e->n_text);
        break;
    case GLM_EVENT_CONTENT:
        out_raw(o, "\"content\":");
        json_out_string(o, e->text, e->n_text);
        break;
    case GLM_EVENT_CALL_START:
        json_out_fmt(o, "\"tool_calls\":[{\"index\":%u,\"id\":\"%s\",\"type\":\"function\",",
                     e->call_idx, e->id);
        out_raw(o, "\"function\":{\"name\":");
        json_out_string(o, e->text, e->n_text);
        out_raw(o, ",\"arguments\":\"\"}}]");
        break;
    case GLM_EVENT_ARGUMENTS:
        json_out_fmt(o, "\"tool_calls\":[{\"index\":%u,\"function\":{\"arguments\":", e->call_idx);
        json_out_string(o, e->text, e->n_text);
        out_raw(o, "}}]");
        break;
    case GLM_EVENT_CALL_END:
        break;
    }
}

static void chat_output(void *user, const struct glm_event *e)
{
    struct api_choice *choice = user;
    struct api_call *call = choice->call;
    if (e->kind == GLM_EVENT_CALL_END ||
        (e->kind == GLM_EVENT_REASONING && !call->params.include_reasoning))
        return;
    if (!call->params.stream) {
        api_gather(choice, e);
        return;
    }
    struct json_out *o = api_line_begin(call);
    out_raw(o, "{\"index\":");
    out_uint(o, choice->idx);
    out_raw(o, ",\"delta\":{");
    out_delta(o, e);
    out_raw(o, "}");
    out_choice_end(choice, o, NULL);
    line_end(call, o);
}

static void chat_chunk(struct api_choice *choice, const struct gen_chunk *c)
{
    api_chat_logprobs(choice, c);
    api_choice_push(choice, c);
}

static void chat_end(struct api_choice *choice, const struct gen_end *e)
{
    api_choice_stop(choice, e);
    if (!choice->call->params.stream)
        return;
    struct json_out *o = api_line_begin(choice->call);
    json_out_fmt(o, "{\"index\":%u,\"delta\":{}", choice->idx);
    out_choice_end(choice, o, api_finish_name(choice));
    line_end(choice->call, o);
}

static void chat_stream_end(struct api_call *call)
{
    if (!call->params.include_usage)
        return;
    struct json_out *o = api_line_begin(call);
    out_raw(o, "],\"usage\":");
    api_out_usage(call, o);
    out_raw(o, "}");
    api_line_end(call);
}

/* All text of a kind as one JSON string. */
static void out_joined(struct json_out *o, struct api_choice *choice, enum glm_event_kind kind)
{
    struct json_out *whole = &choice->call->api->scratch;
    whole->len = 0;
    whole->failed = false;
    for (size_t i = 0; i < choice->n_items; i++)
        if (choice->items[i].kind == kind)
            json_out_raw(whole, choice->items[i].text.data, choice->items[i].text.len);
    json_out_string(o, whole->len ? whole->data : "", whole->len);
    o->failed |= whole->failed;
}

static void out_calls(struct json_out *o, const struct api_choice *choice)
{
    const char *comma = ",\"tool_calls\":[";
    for (size_t i = 0; i < choice->n_items; i++) {
        const struct api_item *item = &choice->items[i];
        if (item->kind != GLM_EVENT_CALL_START)
            continue;
        json_out_fmt(o, "%s{\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":", comma,
                     item->id);
        json_out_string(o, item->name.data, item->name.len);
        out_raw(o, ",\"arguments\":");
        json_out_string(o, item->text.len ? item->text.data : "", item->text.len);
        out_raw(o, "}}");
        comma = ",";
    }
    out_raw(o, "]");
}

static void out_message(struct json_out *o, struct api_choice *choice)
{
    bool has[GLM_EVENT_CALL_END] = {0};
    for (size_t i = 0; i < choice->n_items; i++)
        has[choice->items[i].kind] = true;
    out_raw(o, "{\"role\":\"assistant\",\"content\":");
    if (has[GLM_EVENT_CONTENT] || !has[GLM_EVENT_CALL_START])
        out_joined(o, choice, GLM_EVENT_CONTENT);
    else
        out_raw(o, "null");
    if (has[GLM_EVENT_REASONING]) {
        out_raw(o, ",\"reasoning_content\":");
        out_joined(o, choice, GLM_EVENT_REASONING);
        out_raw(o, ",\"reasoning\":");
        out_joined(o, choice, GLM_EVENT_REASONING);
    }
    if (has[GLM_EVENT_CALL_START])
        out_calls(o, choice);
    out_raw(o, ",\"refusal\":null}");
}

static void chat_body(struct api_call *call, struct json_out *o)
{
    json_out_raw(o, call->head.data, call->head.len);
    for (size_t i = 0; i < call->n_choices; i++) {
        struct api_choice *choice = &call->choices[i];
        json_out_fmt(o, "%s{\"index\":%u,\"message\":", i ? "," : "", choice->idx);
        out_message(o, choice);
        out_choice_end(choice, o, api_finish_name(choice));
    }
    out_raw(o, "],\"usage\":");
    api_out_usage(call, o);
    out_raw(o, "}");
}

const struct api_shape api_shape_chat = {
    .id_prefix = "chatcmpl-",
    .generates = true,
    .done_line = true,
    .parse = chat_parse,
    .encode = chat_call_encode,
    .open = chat_open,
    .chunk = chat_chunk,
    .end = chat_end,
    .output = chat_output,
    .stream_end = chat_stream_end,
    .body = chat_body,
};
