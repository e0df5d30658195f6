/* api_messages.c: POST /v1/messages and /v1/messages/count_tokens, Anthropic's shape.
 *
 * A message is a list of blocks: text, thinking, tool_use, tool_result. They become the chat
 * shape's messages and share its template and limits. Thinking is off unless the request asks for
 * it, as in the original: clients that did not ask take the first block for the answer.
 * cache_control is accepted and needs no honouring, because every prefix is cached anyway.
 *
 *   message_start ping (content_block_start content_block_delta* content_block_stop)*
 *   message_delta message_stop
 */
#include "router/api_internal.h"

#include <string.h>

static enum err read_system(const json_t *system, struct api_history *h, struct api_failure *f);
static enum err read_message(const json_t *m, size_t i, struct api_history *h,
                             struct api_failure *f);
static enum err read_tools(const json_t *tools, json_t **ret, struct api_failure *f);

/* ---- request ---- */

static enum err read_messages(const json_t *messages, struct api_history *h, struct api_failure *f)
{
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return api_refuse(f, "messages",
                          "messages is required and must be an array that is not "
                          "empty");
    for (size_t i = 0; i < json_array_size(messages); i++)
        TRY(read_message(json_array_get(messages, i), i, h, f));
    return ERR_OK;
}

/* An assistant's message at the end is the beginning of the answer. */
static void take_prefill(const json_t *messages, struct api_params *p)
{
    const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const char *role = json_string_value(json_object_get(last, "role"));
    if (!role || strcmp(role, "assistant") != 0)
        return;
    p->continue_final_message = true;
    p->add_generation_prompt = false;
}

static enum err render(struct api_call *call, const json_t *body)
{
    struct api_failure *f = &call->failure;
    __attribute__((cleanup(api_history_finish))) struct api_history h = {0};
    json_auto_t *tools = NULL;
    TRY(read_system(json_object_get(body, "system"), &h, f));
    TRY(read_messages(json_object_get(body, "messages"), &h, f));
    TRY(read_tools(json_object_get(body, "tools"), &tools, f));
    return api_history_render(&h, tools, call);
}

static enum err count_parse(struct api_call *call, const json_t *body)
{
    struct api_params *p = &call->params;
    TRY(api_params_read(body, API_MESSAGES, &call->model, p, &call->failure));
    if (p->thinking == API_THINKING_DEFAULT)
        p->thinking = API_THINKING_OFF;
    take_prefill(json_object_get(body, "messages"), p);
    return render(call, body);
}

static enum err messages_parse(struct api_call *call, const json_t *body)
{
    TRY(count_parse(call, body));
    if (call->params.max_tokens < 0)
        return api_refuse(&call->failure, "max_tokens", "max_tokens is required");
    return ERR_OK;
}

static enum err messages_encode(struct api_call *call)
{
    TRY(api_chat_encode(call));
    return api_call_encoded(call, "messages");
}

static enum err bad_block(struct api_failure *f, const char *where, const char *what)
{
    return api_refuse(f, "messages", "%s %s", where, what);
}

/* Text blocks to the message of that role. A client's line about itself, new in every request,
 * would spoil the prefix for the cache: it is no instruction to the model. */
static enum err read_text(const json_t *block, const char *role, const char *where,
                          struct api_history *h, struct api_failure *f)
{
    static const char billing[] = "x-anthropic-billing-header:";
    const json_t *text = json_object_get(block, "text");
    if (!json_is_string(text))
        return bad_block(f, where, "must have a text that is a string");
    if (strcmp(role, "system") != 0 ||
        strncmp(json_string_value(text), billing, strlen(billing)) != 0)
        api_history_text(h, role, text);
    return ERR_OK;
}

static enum err read_system(const json_t *system, struct api_history *h, struct api_failure *f)
{
    if (!system || json_is_null(system))
        return ERR_OK;
    if (json_is_string(system)) {
        api_history_text(h, "system", system);
        return ERR_OK;
    }
    if (!json_is_array(system))
        return api_refuse(f, "system", "system must be a string or an array of text blocks");
    for (size_t i = 0; i < json_array_size(system); i++) {
        const json_t *block = json_array_get(system, i);
        const char *type = json_string_value(json_object_get(block, "type"));
        char where[32];
        snprintf(where, sizeof(where), "system[%zu]", i);
        if (!type || strcmp(type, "text") != 0)
            return api_refuse(f, "system", "%s must be a text block", where);
        TRY(read_text(block, "system", where, h, f));
    }
    return ERR_OK;
}

static enum err read_result(const json_t *block, const char *where, struct api_history *h,
                            struct api_failure *f)
{
    const json_t *id = json_object_get(block, "tool_use_id");
    const json_t *content = json_object_get(block, "content");
    if (!json_is_string(id))
        return bad_block(f, where, "must have a tool_use_id that is a string");
    api_history_result(h, id);
    if (json_is_string(content)) {
        api_history_text(h, "tool", content);
    } else if (json_is_array(content)) {
        for (size_t i = 0; i < json_array_size(content); i++) {
            const json_t *part = json_array_get(content, i);
            const char *type = json_string_value(json_object_get(part, "type"));
            if (!type || strcmp(type, "text") != 0)
                return bad_block(f, where, "has content that is no text block");
            TRY(read_text(part, "tool", where, h, f));
        }
    } else if (content && !json_is_null(content)) {
        return bad_block(f, where, "must have content that is a string or an array of blocks");
    }
    return ERR_OK;
}

static enum err read_use(const json_t *block, const char *where, struct api_history *h,
                         struct api_failure *f)
{
    const json_t *id = json_object_get(block, "id"), *name = json_object_get(block, "name");
    const json_t *input = json_object_get(block, "input");
    if (!json_is_string(id) || !json_is_string(name) || !json_is_object(input))
        return bad_block(f, where, "must have the strings id and name and an object input");
    api_history_call(h, id, name, input);
    return ERR_OK;
}

static enum err read_block(const json_t *block, const char *role, const char *where,
                           struct api_history *h, struct api_failure *f)
{
    const char *type = json_string_value(json_object_get(block, "type"));
    bool assistant = !strcmp(role, "assistant");
    if (!type)
        return bad_block(f, where, "must be a block with a type");
    if (!strcmp(type, "text"))
        return read_text(block, role, where, h, f);
    if (!strcmp(type, "tool_result") && !assistant)
        return read_result(block, where, h, f);
    if (!strcmp(type, "tool_use") && assistant)
        return read_use(block, where, h, f);
    if (!strcmp(type, "redacted_thinking") && assistant)
        return ERR_OK; /* nobody can read it */
    if (!strcmp(type, "thinking") && assistant) {
        const json_t *text = json_object_get(block, "thinking");
        if (!json_is_string(text))
            return bad_block(f, where, "must have a thinking that is a string");
        api_history_reasoning(h, text);
        return ERR_OK;
    }
    return api_refuse(f, "messages",
                      "%s: blocks of type \"%.32s\" are not supported in a message "
                      "of role %.16s",
                      where, type, role);
}

static enum err read_message(const json_t *m, size_t i, struct api_history *h,
                             struct api_failure *f)
{
    const char *role = json_string_value(json_object_get(m, "role"));
    const json_t *content = json_object_get(m, "content");
    char where[64];
    snprintf(where, sizeof(where), "messages[%zu]", i);
    if (!role || (strcmp(role, "user") && strcmp(role, "assistant") && strcmp(role, "system")))
        return bad_block(f, where, "must have a role: user, assistant or system");
    api_history_close(h);
    if (json_is_string(content)) {
        api_history_text(h, role, content);
        return ERR_OK;
    }
    if (!json_is_array(content))
        return bad_block(f, where, "must have content that is a string or an array of blocks");
    for (size_t k = 0; k < json_array_size(content); k++) {
        snprintf(where, sizeof(where), "messages[%zu].content[%zu]", i, k);
        TRY(read_block(json_array_get(content, k), role, where, h, f));
    }
    return ERR_OK;
}

static enum err read_tools(const json_t *tools, json_t **ret, struct api_failure *f)
{
    if (!tools || json_is_null(tools))
        return ERR_OK;
    if (!json_is_array(tools))
        return api_refuse(f, "tools", "tools must be an array");
    json_t *all = *ret = json_array();
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i);
        const char *type = json_string_value(json_object_get(tool, "type"));
        if (type && strcmp(type, "custom") != 0)
            return api_refuse(f, "tools", "tools[%zu]: tools of type \"%.48s\" are not supported",
                              i, type);
        json_t *strict = json_object_get(tool, "strict");
        json_t *name = json_object_get(tool, "name");
        json_t *schema = json_object_get(tool, "input_schema");
        if (!json_is_string(name) || !json_is_object(schema))
            return api_refuse(f, "tools", "tools[%zu] must have a name and an object input_schema",
                              i);
        json_t *out =
            json_pack("{s:s,s:{s:O,s:O*,s:O,s:O*}}", "type", "function", "function", "name", name,
                      "description", json_object_get(tool, "description"), "parameters", schema,
                      "strict", json_is_true(strict) ? strict : NULL);
        if (json_array_append_new(all, out) != 0)
            return api_fail_err(f, err_set(ERR_NOMEM, "no memory for the request"), "tools");
    }
    return ERR_OK;
}

/* ---- output ---- */

static const char *block_type(const struct api_item *item)
{
    return item->kind == GLM_EVENT_REASONING ? "thinking"
           : item->kind == GLM_EVENT_CONTENT ? "text"
                                             : "tool_use";
}

static void out_usage(const struct api_choice *choice, uint32_t n_output, struct json_out *o)
{
    const struct gen_usage *u = &choice->usage;
    uint32_t n_cached = choice->ended ? u->n_cached : 0;
    json_out_fmt(o,
                 "{\"input_tokens\":%u,\"cache_creation_input_tokens\":0,"
                 "\"cache_read_input_tokens\":%u,\"output_tokens\":%u}",
                 choice->prompt->n_ids - n_cached, n_cached, n_output);
}

static void out_stop(const struct api_choice *choice, struct json_out *o)
{
    const char *finish = api_finish_name(choice);
    bool string = choice->text.len > 0 && !strcmp(finish, "stop"); /* see messages_end */
    json_out_fmt(o, "\"stop_reason\":\"%s\",\"stop_sequence\":",
                 string                      ? "stop_sequence"
                 : !strcmp(finish, "stop")   ? "end_turn"
                 : !strcmp(finish, "length") ? "max_tokens"
                                             : "tool_use");
    if (string)
        json_out_string(o, choice->text.data, choice->text.len);
    else
        out_raw(o, "null");
}

static void out_message_begin(const struct api_call *call, struct json_out *o)
{
    json_out_fmt(o,
                 "{\"id\":\"%s\",\"type\":\"message\",\"role\":\"assistant\",\"model\":", call->id);
    out_text(o, call->model.name);
    out_raw(o, ",\"content\":[");
}

static void messages_open(struct api_choice *choice)
{
    struct api_call *call = choice->call;
    struct json_out *o = api_event_begin(call, "message_start");
    out_raw(o, "{\"type\":\"message_start\",\"message\":");
    out_message_begin(call, o);
    out_raw(o, "],\"stop_reason\":null,\"stop_sequence\":null,\"usage\":");
    out_usage(choice, 0, o);
    out_raw(o, "}}");
    api_line_end(call);
    o = api_event_begin(call, "ping");
    out_raw(o, "{\"type\":\"ping\"}");
    api_line_end(call);
}

static void block_start(struct api_choice *choice)
{
    const struct api_item *item = &choice->items[choice->n_items - 1];
    struct json_out *o = api_event_begin(choice->call, "content_block_start");
    json_out_fmt(o, "{\"type\":\"content_block_start\",\"index\":%zu,\"content_block\":{\"type\":",
                 choice->n_items - 1);
    out_text(o, block_type(item));
    if (item->kind == GLM_EVENT_CALL_START) {
        json_out_fmt(o, ",\"id\":\"%s\",\"name\":", item->id);
        json_out_string(o, item->name.data, item->name.len);
        out_raw(o, ",\"input\":{}}}");
    } else {
        out_raw(o, item->kind == GLM_EVENT_CONTENT ? ",\"text\":\"\"}}"
                                                   : ",\"thinking\":\"\",\"signature\":\"\"}}");
    }
    api_line_end(choice->call);
}

static void block_delta(struct api_choice *choice, const char *type, const char *member,
                        const char *text, size_t n)
{
    struct json_out *o = api_event_begin(choice->call, "content_block_delta");
    json_out_fmt(o,
                 "{\"type\":\"content_block_delta\",\"index\":%zu,\"delta\":{\"type\":\"%s\","
                 "\"%s\":",
                 choice->n_items - 1, type, member);
    json_out_string(o, text, n);
    out_raw(o, "}}");
    api_line_end(choice->call);
}

static void block_stop(struct api_choice *choice, size_t idx)
{
    struct json_out *o = api_event_begin(choice->call, "content_block_stop");
    json_out_fmt(o, "{\"type\":\"content_block_stop\",\"index\":%zu}", idx);
    api_line_end(choice->call);
}

static void messages_output(void *user, const struct glm_event *e)
{
    struct api_choice *choice = user;
    struct api_call *call = choice->call;
    bool begins = api_gather_begins(choice, e);
    if (!call->params.stream || call->broken)
        return;
    if (begins && choice->n_items > 1)
        block_stop(choice, choice->n_items - 2);
    if (begins)
        block_start(choice);
    if (e->kind == GLM_EVENT_REASONING)
        block_delta(choice, "thinking_delta", "thinking", e->text, e->n_text);
    else if (e->kind == GLM_EVENT_CONTENT)
        block_delta(choice, "text_delta", "text", e->text, e->n_text);
    else if (e->kind == GLM_EVENT_ARGUMENTS)
        block_delta(choice, "input_json_delta", "partial_json", e->text, e->n_text);
}

static void messages_chunk(struct api_choice *choice, const struct gen_chunk *c)
{
    api_choice_push(choice, c);
}

static void messages_end(struct api_choice *choice, const struct gen_end *e)
{
    struct api_call *call = choice->call;
    api_choice_stop(choice, e);
    choice->text.len = 0; /* here: the stop string */
    if (e->stop_string)
        json_out_raw(&choice->text, e->stop_string, strlen(e->stop_string));
    if (choice->text.failed)
        call->broken = true;
    if (!call->params.stream || call->broken)
        return;
    if (choice->n_items)
        block_stop(choice, choice->n_items - 1);
    struct json_out *o = api_event_begin(call, "message_delta");
    out_raw(o, "{\"type\":\"message_delta\",\"delta\":{");
    out_stop(choice, o);
    out_raw(o, "},\"usage\":");
    out_usage(choice, choice->n_tokens, o);
    out_raw(o, "}");
    api_line_end(call);
    o = api_event_begin(call, "message_stop");
    out_raw(o, "{\"type\":\"message_stop\"}");
    api_line_end(call);
}

static void out_block(struct json_out *o, const struct api_item *item)
{
    json_out_fmt(o, "{\"type\":\"%s\",", block_type(item));
    if (item->kind == GLM_EVENT_CALL_START) {
        json_out_fmt(o, "\"id\":\"%s\",\"name\":", item->id);
        json_out_string(o, item->name.data, item->name.len);
        out_raw(o, ",\"input\":");
        /* Arguments that the limit cut are no JSON; the stop_reason tells. */
        json_t *input = NULL;
        bool whole = json_parse(item->text.len ? item->text.data : "", item->text.len,
                                &json_limits_request, &input) == ERR_OK;
        json_out_raw(o, whole ? item->text.data : "{}", whole ? item->text.len : 2);
        json_decref(input);
    } else {
        out_raw(o,
                item->kind == GLM_EVENT_CONTENT ? "\"text\":" : "\"signature\":\"\",\"thinking\":");
        json_out_string(o, item->text.data, item->text.len);
    }
    out_raw(o, "}");
}

static void messages_body(struct api_call *call, struct json_out *o)
{
    const struct api_choice *choice = &call->choices[0];
    out_message_begin(call, o);
    for (size_t i = 0; i < choice->n_items; i++) {
        out_raw(o, i ? "," : "");
        out_block(o, &choice->items[i]);
    }
    out_raw(o, "],");
    out_stop(choice, o);
    out_raw(o, ",\"usage\":");
    out_usage(choice, choice->n_tokens, o);
    out_raw(o, "}");
}

static void messages_failure(struct api_call *call, const struct api_failure *f)
{
    struct json_out *o = api_event_begin(call, "error");
    api_out_failure_anthropic(o, f, call->request_id);
    api_line_end(call);
}

void api_out_failure_anthropic(struct json_out *o, const struct api_failure *f,
                               const char *request_id)
{
    static const struct {
        int status;
        const char *type;
    } types[] = {
        {401, "authentication_error"}, {403, "permission_error"}, {404, "not_found_error"},
        {413, "request_too_large"},    {429, "rate_limit_error"}, {503, "overloaded_error"},
        {504, "timeout_error"},
    };
    const char *type = f->status < 500 ? "invalid_request_error" : "api_error";
    for (size_t i = 0; i < ARRAY_LEN(types); i++)
        if (types[i].status == f->status)
            type = types[i].type;
    json_out_fmt(o, "{\"type\":\"error\",\"error\":{\"type\":\"%s\",\"message\":", type);
    out_text(o, f->message);
    out_raw(o, "},\"request_id\":");
    out_text(o, request_id[0] ? request_id : NULL);
    out_raw(o, "}");
}

const struct api_shape api_shape_messages = {
    .id_prefix = "msg_",
    .generates = true,
    .anthropic = true,
    .parse = messages_parse,
    .encode = messages_encode,
    .open = messages_open,
    .chunk = messages_chunk,
    .end = messages_end,
    .output = messages_output,
    .stream_failure = messages_failure,
    .body = messages_body,
};

/* ---- count_tokens ---- */

static void count_answer(struct api_call *call)
{
    struct json_out *o = &call->api->line;
    o->len = 0;
    o->failed = false;
    json_out_fmt(o, "{\"input_tokens\":%zu}", call->prompts[0].ids.len);
    api_call_reply(call, o);
}

const struct api_shape api_shape_count_tokens = {
    .anthropic = true,
    .parse = count_parse,
    .encode = api_chat_encode,
    .answer = count_answer,
};
