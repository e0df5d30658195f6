/* api_responses.c: POST /v1/responses, OpenAI's newer shape, without a memory.
 *
 * Input items become the chat shape's messages: what an assistant's turn consists of (reasoning,
 * message, calls) is one message again. Output is a list of items, each announced, filled and
 * closed by numbered events:
 *
 *   created in_progress
 *     (output_item.added [content_part.added] deltas done [content_part.done] output_item.done)*
 *   completed | incomplete | error
 *
 * Nothing is stored: store is answered with false, and what refers to earlier responses is refused
 * by name. The deltas are the hot path and are written by hand; done events repeat the whole text.
 */
#include "router/api_internal.h"

#include <string.h>

static enum err read_input(const json_t *input, struct api_history *h, struct api_failure *f);
static enum err read_item(const json_t *item, const char *where, struct api_history *h,
                          struct api_failure *f);
static enum err read_tools(const json_t *tools, json_t **ret, struct api_failure *f);
static enum err keep_echo(struct api_call *call, const json_t *body);

/* ---- request ---- */

static enum err render(struct api_call *call, const json_t *body)
{
    struct api_failure *f = &call->failure;
    const json_t *instructions = json_object_get(body, "instructions");
    __attribute__((cleanup(api_history_finish))) struct api_history h = {0};
    json_auto_t *tools = NULL;
    if (json_is_string(instructions))
        api_history_text(&h, "system", instructions);
    else if (instructions && !json_is_null(instructions))
        return api_refuse(f, "instructions", "instructions must be a string");
    TRY(read_input(json_object_get(body, "input"), &h, f));
    TRY(read_tools(json_object_get(body, "tools"), &tools, f));
    return api_history_render(&h, tools, call);
}

static enum err responses_parse(struct api_call *call, const json_t *body)
{
    TRY(api_params_read(body, API_RESPONSES, &call->model, &call->params, &call->failure));
    TRY(render(call, body));
    return keep_echo(call, body);
}

static enum err responses_encode(struct api_call *call)
{
    TRY(api_chat_encode(call));
    return api_call_encoded(call, "input");
}

static enum err bad_item(struct api_failure *f, const char *where, const char *what)
{
    return api_refuse(f, "input", "%s %s", where, what);
}

static enum err read_input(const json_t *input, struct api_history *h, struct api_failure *f)
{
    if (json_is_string(input)) {
        api_history_close(h);
        api_history_text(h, "user", input);
        return ERR_OK;
    }
    if (!json_is_array(input) || json_array_size(input) == 0)
        return api_refuse(f, "input",
                          "input is required and must be a string or an array that is not empty");
    for (size_t i = 0; i < json_array_size(input); i++) {
        char where[32];
        snprintf(where, sizeof(where), "input[%zu]", i);
        TRY(read_item(json_array_get(input, i), where, h, f));
    }
    return ERR_OK;
}

/* A string, or parts of text; to the message of that role. */
static enum err read_content(const json_t *content, const char *role, const char *where,
                             struct api_history *h, struct api_failure *f)
{
    if (json_is_string(content)) {
        api_history_text(h, role, content);
        return ERR_OK;
    }
    if (!json_is_array(content))
        return bad_item(f, where, "must have a string or an array of parts for its content");
    for (size_t k = 0; k < json_array_size(content); k++) {
        const json_t *part = json_array_get(content, k);
        const char *type = json_string_value(json_object_get(part, "type"));
        bool refusal = type && !strcmp(type, "refusal");
        const json_t *text = json_object_get(part, refusal ? "refusal" : "text");
        if (!type || (strcmp(type, "input_text") && strcmp(type, "output_text") &&
                      strcmp(type, "text") && !refusal))
            return api_refuse(f, "input",
                              "%s: content of type \"%.32s\" is not supported: this model reads "
                              "text only",
                              where, type ? type : "");
        if (!json_is_string(text))
            return bad_item(f, where, "has a part whose text is no string");
        api_history_text(h, role, text);
    }
    return ERR_OK;
}

static enum err read_message(const json_t *item, const char *where, struct api_history *h,
                             struct api_failure *f)
{
    static const char *const roles[] = {"user", "assistant", "system", "developer"};
    const char *role = json_string_value(json_object_get(item, "role")), *known = NULL;
    for (size_t i = 0; role && i < ARRAY_LEN(roles); i++)
        if (!strcmp(role, roles[i]))
            known = roles[i];
    if (!known)
        return bad_item(f, where, "must have a role: user, assistant, system or developer");
    if (strcmp(known, "assistant") != 0 || api_history_says(h))
        api_history_close(h);
    return read_content(json_object_get(item, "content"), known, where, h, f);
}

/* The text itself where we gave it; else the summary that others give. */
static enum err read_reasoning(const json_t *item, const char *where, struct api_history *h,
                               struct api_failure *f)
{
    const json_t *parts = json_object_get(item, "content");
    if (json_array_size(parts) == 0)
        parts = json_object_get(item, "summary");
    if (api_history_says(h))
        api_history_close(h);
    for (size_t k = 0; k < json_array_size(parts); k++) {
        const json_t *text = json_object_get(json_array_get(parts, k), "text");
        if (!json_is_string(text))
            return bad_item(f, where, "has a part whose text is no string");
        api_history_reasoning(h, text);
    }
    return ERR_OK;
}

static enum err read_item(const json_t *item, const char *where, struct api_history *h,
                          struct api_failure *f)
{
    const char *type = json_string_value(json_object_get(item, "type"));
    const json_t *id = json_object_get(item, "call_id");
    if (!json_is_object(item))
        return bad_item(f, where, "must be an object");
    if (!type || !strcmp(type, "message"))
        return read_message(item, where, h, f);
    if (!strcmp(type, "reasoning"))
        return read_reasoning(item, where, h, f);
    if (!strcmp(type, "function_call")) {
        const json_t *name = json_object_get(item, "name");
        const json_t *arguments = json_object_get(item, "arguments");
        if (!json_is_string(id) || !json_is_string(name) || !json_is_string(arguments))
            return bad_item(f, where, "must have the strings call_id, name and arguments");
        api_history_call(h, id, name, arguments);
        return ERR_OK;
    }
    if (!strcmp(type, "function_call_output")) {
        if (!json_is_string(id))
            return bad_item(f, where, "must have the string call_id");
        api_history_result(h, id);
        return read_content(json_object_get(item, "output"), "tool", where, h, f);
    }
    return api_refuse(f, "input", "%s: items of type \"%.48s\" are not supported", where, type);
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
        if (!type || strcmp(type, "function") != 0)
            return api_refuse(f, "tools",
                              "tools[%zu]: tools of type \"%.48s\" are not supported, "
                              "only \"function\"",
                              i, type ? type : "");
        json_t *strict = json_object_get(tool, "strict");
        json_t *name = json_object_get(tool, "name");
        if (!json_is_string(name))
            return api_refuse(f, "tools", "tools[%zu].name must be a string", i);
        json_t *parameters = json_object_get(tool, "parameters");
        json_t *out = json_pack("{s:s,s:{s:O,s:O*,s:O*,s:O*}}", "type", "function", "function",
                                "name", name, "description", json_object_get(tool, "description"),
                                "parameters", json_is_null(parameters) ? NULL : parameters,
                                "strict", json_is_true(strict) ? strict : NULL);
        if (json_array_append_new(all, out) != 0)
            return api_fail_err(f, err_set(ERR_NOMEM, "no memory for the request"), "tools");
    }
    return ERR_OK;
}

/* ---- the response object ---- */

static void out_member(struct json_out *o, const json_t *body, const char *name,
                       const char *otherwise)
{
    json_t *v = json_object_get(body, name);
    char *text = v && !json_is_null(v) ? json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    json_out_fmt(o, ",\"%s\":", name);
    out_raw(o, text ? text : otherwise);
    free(text);
}

/* What every response object repeats of the request, to call->head. */
static enum err keep_echo(struct api_call *call, const json_t *body)
{
    const struct api_params *p = &call->params;
    struct json_out *o = &call->head;
    json_out_fmt(o,
                 "{\"id\":\"%s\",\"object\":\"response\",\"created_at\":%llu,\"model\":", call->id,
                 (unsigned long long)call->created_s);
    out_text(o, call->model.name);
    out_raw(o, ",\"temperature\":");
    json_out_double(o, p->temperature >= 0 ? p->temperature : call->model.default_temperature);
    out_raw(o, ",\"top_p\":");
    json_out_double(o, p->top_p >= 0 ? p->top_p : call->model.default_top_p);
    out_member(o, body, "instructions", "null");
    out_member(o, body, "max_output_tokens", "null");
    out_member(o, body, "metadata", "{}");
    out_member(o, body, "tools", "[]");
    out_member(o, body, "tool_choice", "\"auto\"");
    out_member(o, body, "text", "{\"format\":{\"type\":\"text\"}}");
    out_member(o, body, "user", "null");
    out_member(o, body, "reasoning", "{\"effort\":null,\"summary\":null}");
    json_out_fmt(o,
                 ",\"parallel_tool_calls\":%s,\"truncation\":\"disabled\",\"store\":false,"
                 "\"background\":false,"
                 "\"previous_response_id\":null",
                 p->parallel_tool_calls ? "true" : "false");
    if (o->failed)
        return api_fail_err(&call->failure, err_set(ERR_NOMEM, "no memory for the request"), "");
    return ERR_OK;
}

/* Ids of items follow from the response's. */
static void out_item_id(const struct api_choice *choice, size_t i, struct json_out *o)
{
    const struct api_call *call = choice->call;
    enum glm_event_kind kind = choice->items[i].kind;
    json_out_fmt(o, "\"%s%s_%zu\"",
                 kind == GLM_EVENT_REASONING ? "rs_"
                 : kind == GLM_EVENT_CONTENT ? "msg_"
                                             : "fc_",
                 call->id + strlen(call->shape->id_prefix), i);
}

static void out_part(struct json_out *o, const struct api_item *item, bool filled)
{
    bool text = item->kind == GLM_EVENT_CONTENT;
    out_raw(o, text ? "{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":"
                    : "{\"type\":\"reasoning_text\",\"text\":");
    json_out_string(o, filled ? item->text.data : "", filled ? item->text.len : 0);
    out_raw(o, "}");
}

/* filled false: as announced, still empty. */
static void out_item(const struct api_choice *choice, size_t i, bool filled, struct json_out *o)
{
    const struct api_item *item = &choice->items[i];
    bool cut =
        i + 1 == choice->n_items && choice->ended && !strcmp(api_finish_name(choice), "length");
    out_raw(o, "{\"id\":");
    out_item_id(choice, i, o);
    json_out_fmt(o, ",\"status\":\"%s\",",
                 !filled ? "in_progress"
                 : cut   ? "incomplete"
                         : "completed");
    if (item->kind == GLM_EVENT_CALL_START) {
        json_out_fmt(o, "\"type\":\"function_call\",\"call_id\":\"%s\",\"name\":", item->id);
        json_out_string(o, item->name.data, item->name.len);
        out_raw(o, ",\"arguments\":");
        bool some = filled && item->text.len;
        json_out_string(o, some ? item->text.data : "", some ? item->text.len : 0);
        out_raw(o, "}");
        return;
    }
    out_raw(o, item->kind == GLM_EVENT_CONTENT
                   ? "\"type\":\"message\",\"role\":\"assistant\",\"content\":["
                   : "\"type\":\"reasoning\",\"summary\":[],\"content\":[");
    if (filled)
        out_part(o, item, true);
    out_raw(o, "]}");
}

/* over: with its output. */
static void out_response(struct api_choice *choice, bool over, struct json_out *o)
{
    struct api_call *call = choice->call;
    bool cut = over && !strcmp(api_finish_name(choice), "length");
    json_out_raw(o, call->head.data, call->head.len);
    json_out_fmt(o, ",\"status\":\"%s\",\"error\":null,\"incomplete_details\":%s,\"output\":[",
                 !over ? "in_progress"
                 : cut ? "incomplete"
                       : "completed",
                 cut ? "{\"reason\":\"max_output_tokens\"}" : "null");
    for (size_t i = 0; over && i < choice->n_items; i++) {
        out_raw(o, i ? "," : "");
        out_item(choice, i, true, o);
    }
    out_raw(o, "],\"usage\":");
    if (over) {
        const struct gen_usage *u = &choice->usage;
        json_out_fmt(o,
                     "{\"input_tokens\":%u,\"input_tokens_details\":{\"cached_tokens\":%u},"
                     "\"output_tokens\":%u,\"output_tokens_details\":{\"reasoning_tokens\":%u},"
                     "\"total_tokens\":%u}}",
                     u->n_prompt, u->n_cached, u->n_output, choice->parser.n_reasoning,
                     u->n_prompt + u->n_output);
    } else {
        out_raw(o, "null}");
    }
}

/* ---- output ---- */

static struct json_out *event_begin(struct api_choice *choice, const char *name)
{
    struct json_out *o = api_event_begin(choice->call, name);
    json_out_fmt(o, "{\"type\":\"%s\",\"sequence_number\":%u", name, choice->call->n_events++);
    return o;
}

static void event_end(struct api_choice *choice, struct json_out *o)
{
    out_raw(o, "}");
    api_line_end(choice->call);
}

static void response_event(struct api_choice *choice, const char *name, bool over)
{
    struct json_out *o = event_begin(choice, name);
    out_raw(o, ",\"response\":");
    out_response(choice, over, o);
    event_end(choice, o);
}

static void item_event(struct api_choice *choice, const char *name, size_t i, bool filled)
{
    struct json_out *o = event_begin(choice, name);
    json_out_fmt(o, ",\"output_index\":%zu,\"item\":", i);
    out_item(choice, i, filled, o);
    event_end(choice, o);
}

/* The begin of an event about the inside of an item; part: it is about its one part. */
static struct json_out *inner_begin(struct api_choice *choice, const char *name, size_t i,
                                    bool part)
{
    struct json_out *o = event_begin(choice, name);
    out_raw(o, ",\"item_id\":");
    out_item_id(choice, i, o);
    json_out_fmt(o, ",\"output_index\":%zu%s", i, part ? ",\"content_index\":0" : "");
    return o;
}

static void part_event(struct api_choice *choice, const char *name, size_t i, bool filled)
{
    struct json_out *o = inner_begin(choice, name, i, true);
    out_raw(o, ",\"part\":");
    out_part(o, &choice->items[i], filled);
    event_end(choice, o);
}

static void item_open(struct api_choice *choice, size_t i)
{
    item_event(choice, "response.output_item.added", i, false);
    if (choice->items[i].kind != GLM_EVENT_CALL_START)
        part_event(choice, "response.content_part.added", i, false);
}

static void item_close(struct api_choice *choice, size_t i)
{
    const struct api_item *item = &choice->items[i];
    struct json_out *o;
    if (item->kind == GLM_EVENT_CALL_START) {
        o = inner_begin(choice, "response.function_call_arguments.done", i, false);
        out_raw(o, ",\"name\":");
        json_out_string(o, item->name.data, item->name.len);
        out_raw(o, ",\"arguments\":");
        json_out_string(o, item->text.len ? item->text.data : "", item->text.len);
        event_end(choice, o);
    } else {
        bool text = item->kind == GLM_EVENT_CONTENT;
        o = inner_begin(choice, text ? "response.output_text.done" : "response.reasoning_text.done",
                        i, true);
        out_raw(o, text ? ",\"logprobs\":[],\"text\":" : ",\"text\":");
        json_out_string(o, item->text.data, item->text.len);
        event_end(choice, o);
        part_event(choice, "response.content_part.done", i, true);
    }
    item_event(choice, "response.output_item.done", i, true);
}

static void responses_open(struct api_choice *choice)
{
    response_event(choice, "response.created", false);
    response_event(choice, "response.in_progress", false);
}

static void responses_output(void *user, const struct glm_event *e)
{
    struct api_choice *choice = user;
    struct api_call *call = choice->call;
    bool begins = api_gather_begins(choice, e);
    if (!call->params.stream || call->broken)
        return;
    if (begins && choice->n_items > 1)
        item_close(choice, choice->n_items - 2);
    if (begins)
        item_open(choice, choice->n_items - 1);
    if (e->kind == GLM_EVENT_CALL_START || e->kind == GLM_EVENT_CALL_END)
        return;
    bool text = e->kind == GLM_EVENT_CONTENT, call_item = e->kind == GLM_EVENT_ARGUMENTS;
    struct json_out *o = inner_begin(choice,
                                     text        ? "response.output_text.delta"
                                     : call_item ? "response.function_call_arguments.delta"
                                                 : "response.reasoning_text.delta",
                                     choice->n_items - 1, !call_item);
    out_raw(o, text ? ",\"logprobs\":[],\"delta\":" : ",\"delta\":");
    json_out_string(o, e->text, e->n_text);
    event_end(choice, o);
}

static void responses_chunk(struct api_choice *choice, const struct gen_chunk *c)
{
    api_choice_push(choice, c);
}

static void responses_end(struct api_choice *choice, const struct gen_end *e)
{
    struct api_call *call = choice->call;
    api_choice_stop(choice, e);
    if (!call->params.stream || call->broken)
        return;
    if (choice->n_items)
        item_close(choice, choice->n_items - 1);
    bool cut = !strcmp(api_finish_name(choice), "length");
    response_event(choice, cut ? "response.incomplete" : "response.completed", true);
}

static void responses_body(struct api_call *call, struct json_out *o)
{
    out_response(&call->choices[0], true, o);
}

/* "error" as well as its members: SDKs look for the one or for the others. */
static void responses_failure(struct api_call *call, const struct api_failure *f)
{
    struct json_out *o = api_event_begin(call, "error");
    json_out_fmt(o, "{\"type\":\"error\",\"sequence_number\":%u,\"code\":", call->n_events++);
    out_text(o, f->code);
    out_raw(o, ",\"message\":");
    out_text(o, f->message);
    out_raw(o, ",\"param\":null,\"error\":{\"type\":");
    out_text(o, f->type);
    out_raw(o, ",\"code\":");
    out_text(o, f->code);
    out_raw(o, ",\"message\":");
    out_text(o, f->message);
    out_raw(o, ",\"param\":null}}");
    api_line_end(call);
}

const struct api_shape api_shape_responses = {
    .id_prefix = "resp_",
    .generates = true,
    .parse = responses_parse,
    .encode = responses_encode,
    .open = responses_open,
    .chunk = responses_chunk,
    .end = responses_end,
    .output = responses_output,
    .stream_failure = responses_failure,
    .body = responses_body,
};
