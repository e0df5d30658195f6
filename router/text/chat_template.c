/* chat_template.c: messages to the text that GLM-4.7-Flash was trained on.
 *
 * The model's template ships as Jinja; this is what it does, in C. Odd inputs are rendered as the
 * template would through Python (an integer as content prints as str() does), so that prompts equal
 * those of other servers byte for byte. Where the template prints nonsense or fails,
 * chat_template.h says what happens instead.
 *
 * Pieces break exactly at the added tokens that the template itself writes: those are control
 * pieces. All other text, the template's own words included, is in user pieces: cutting elsewhere
 * would change how the words beside the cut are tokenised.
 */
#include "router/text/chat_template.h"

#include <string.h>

#include "common/base/json.h"

enum role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL };

struct span {
    const char *p;
    size_t n;
};

struct render {
    struct json_out text;
    struct chat_piece *pieces;
    size_t n_pieces, cap;
};

static enum err render_all(struct render *r, const json_t *messages, const json_t *tools,
                           const struct chat_options *options);
static void render_tools(struct render *r, const json_t *tools);
static enum err render_assistant(struct render *r, const json_t *message, size_t i, bool keep);
static enum err render_tool_calls(struct render *r, const json_t *message, size_t i);
static enum err render_tool_result(struct render *r, const json_t *message, size_t i,
                                   bool after_tool);

static enum err message_role(const json_t *message, size_t i, enum role *ret);
static enum err content_text(const json_t *message, size_t i, struct json_out *ret);
static void python_str(const json_t *value, struct json_out *ret);
static void python_repr(const json_t *value, struct json_out *ret);
static struct span strip(struct span s);

/* ---- pieces ---- */

static void put(struct render *r, bool control, const char *text, size_t n)
{
    if (n == 0 || r->text.failed)
        return;
    if (r->n_pieces == 0 || r->pieces[r->n_pieces - 1].control != control) {
        if (r->n_pieces == r->cap) {
            size_t cap = r->cap ? r->cap * 2 : 32;
            struct chat_piece *grown = realloc(r->pieces, cap * sizeof(*grown));
            if (!grown) {
                r->text.failed = true;
                return;
            }
            r->pieces = grown;
            r->cap = cap;
        }
        r->pieces[r->n_pieces++] = (struct chat_piece){.start = r->text.len, .control = control};
    }
    json_out_raw(&r->text, text, n);
    r->pieces[r->n_pieces - 1].n += n;
}

static void put_control(struct render *r, const char *tags) { put(r, true, tags, strlen(tags)); }
static void put_words(struct render *r, const char *words) { put(r, false, words, strlen(words)); }
static void put_span(struct render *r, struct span s) { put(r, false, s.p, s.n); }

static void put_json(struct render *r, const json_t *value)
{
    OWNED_MEM char *text = json_dump_python(value);
    if (text)
        put_words(r, text);
    else
        r->text.failed = true;
}

static void scratch_drop(struct json_out *o) { json_out_finish(o); }
#define SCRATCH __attribute__((cleanup(scratch_drop))) struct json_out

static struct span span_of(const struct json_out *o) { return (struct span){o->data, o->len}; }
static void append(struct json_out *o, const char *text) { json_out_raw(o, text, strlen(text)); }

/* ---- the template ---- */

enum err chat_render(const json_t *messages, const json_t *tools,
                     const struct chat_options *options, struct chat_prompt *ret)
{
    struct render r = {0};
    enum err e = render_all(&r, messages, tools, options);
    json_out_raw(&r.text, "", 1);
    if (e == ERR_OK && r.text.failed)
        e = err_set(ERR_NOMEM, "chat prompt");
    if (e != ERR_OK) {
        json_out_finish(&r.text);
        free(r.pieces);
        return e;
    }
    *ret = (struct chat_prompt){
        .text = r.text.data, .n_text = r.text.len - 1, .pieces = r.pieces, .n_pieces = r.n_pieces};
    return ERR_OK;
}

void chat_prompt_finish(struct chat_prompt *p)
{
    free(p->text);
    free(p->pieces);
    *p = (struct chat_prompt){0};
}

enum err chat_encode(const struct tokenizer *t, const struct chat_prompt *p, struct ids *ids)
{
    for (size_t i = 0; i < p->n_pieces; i++) {
        const struct chat_piece *piece = &p->pieces[i];
        TRY(tokenizer_encode(t, p->text + piece->start, piece->n, piece->control, ids));
    }
    return ERR_OK;
}

static enum err render_all(struct render *r, const json_t *messages, const json_t *tools,
                           const struct chat_options *options)
{
    if (!json_is_array(messages))
        return err_set(ERR_INVALID, "messages must be an array");
    if (tools && !json_is_null(tools) && !json_is_array(tools))
        return err_set(ERR_INVALID, "tools must be an array");

    put_control(r, "[gMASK]<sop>");
    if (json_array_size(tools) > 0)
        render_tools(r, tools);

    size_t n = json_array_size(messages);
    size_t after_last_user = 0; /* 0: there is none, and all messages come after it */
    enum role role = ROLE_USER;
    for (size_t i = 0; i < n; i++) {
        TRY(message_role(json_array_get(messages, i), i, &role));
        if (role == ROLE_USER)
            after_last_user = i + 1;
    }
    if (options->continue_final_message && (n == 0 || role != ROLE_ASSISTANT))
        return err_set(ERR_INVALID,
                       "continue_final_message needs an assistant message as the last one");

    bool after_tool = false;
    for (size_t i = 0; i < n; i++) {
        const json_t *message = json_array_get(messages, i);
        TRY(message_role(message, i, &role));
        if (role == ROLE_ASSISTANT) {
            TRY(render_assistant(r, message, i, !options->clear_thinking || i >= after_last_user));
        } else if (role == ROLE_TOOL) {
            TRY(render_tool_result(r, message, i, after_tool));
        } else {
            SCRATCH text = {0};
            TRY(content_text(message, i, &text));
            put_control(r, role == ROLE_USER ? "<|user|>" : "<|system|>");
            put_span(r, span_of(&text));
            r->text.failed |= text.failed;
        }
        after_tool = role == ROLE_TOOL;
    }
    if (options->add_generation_prompt && !options->continue_final_message)
        put_control(r, options->enable_thinking ? "<|assistant|><think>" : "<|assistant|></think>");
    return ERR_OK;
}

static void render_tools(struct render *r, const json_t *tools)
{
    put_control(r, "<|system|>");
    put_words(r, "\n# Tools\n\n"
                 "You may call one or more functions to assist with the user query.\n\n"
                 "You are provided with function signatures within <tools></tools> XML tags:\n"
                 "<tools>\n");
    size_t i;
    const json_t *tool;
    json_array_foreach (tools, i, tool) {
        put_json(r, tool);
        put_words(r, "\n");
    }
    put_words(r, "</tools>\n\nFor each function call, output the function name and arguments "
                 "within the following XML format:\n");
    put_control(r, "<tool_call>");
    put_words(r, "{function-name}");
    static const char *const examples[][2] = {{"{arg-key-1}", "{arg-value-1}"},
                                              {"{arg-key-2}", "{arg-value-2}"}};
    for (size_t k = 0; k < ARRAY_LEN(examples); k++) {
        put_control(r, "<arg_key>");
        put_words(r, examples[k][0]);
        put_control(r, "</arg_key><arg_value>");
        put_words(r, examples[k][1]);
        put_control(r, "</arg_value>");
    }
    put_words(r, "...");
    put_control(r, "</tool_call>");
}

/* Text before the first, or after the last, occurrence of mark; all of s without one. */
static struct span before_first(struct span s, const char *mark)
{
    const char *at = s.n ? memmem(s.p, s.n, mark, strlen(mark)) : NULL;
    return at ? (struct span){s.p, (size_t)(at - s.p)} : s;
}

static struct span after_last(struct span s, const char *mark)
{
    const size_t n_mark = strlen(mark);
    for (const char *at; s.n && (at = memmem(s.p, s.n, mark, n_mark));)
        s = (struct span){at + n_mark, s.n - (size_t)(at + n_mark - s.p)};
    return s;
}

static struct span strip_newlines(struct span s, bool left, bool right)
{
    while (right && s.n && s.p[s.n - 1] == '\n')
        s.n--;
    while (left && s.n && s.p[0] == '\n')
        s = (struct span){s.p + 1, s.n - 1};
    return s;
}

static const json_t *reasoning_of(const json_t *message)
{
    const json_t *reasoning = json_object_get(message, "reasoning_content");
    const json_t *other = json_object_get(message, "reasoning");
    return json_string_length(reasoning) == 0 && json_is_string(other) ? other : reasoning;
}

/* keep: this message's reasoning stays in the prompt. */
static enum err render_assistant(struct render *r, const json_t *message, size_t i, bool keep)
{
    SCRATCH text = {0};
    TRY(content_text(message, i, &text));
    r->text.failed |= text.failed;

    struct span content = span_of(&text), reasoning = {"", 0};
    const json_t *given = reasoning_of(message);
    if (json_is_string(given)) {
        reasoning = (struct span){json_string_value(given), json_string_length(given)};
    } else {
        struct span head = before_first(content, "</think>");
        if (head.n < content.n) { /* reasoning came inside the content */
            head = after_last(strip_newlines(head, false, true), "<think>");
            reasoning = strip_newlines(head, true, false);
            content = strip_newlines(after_last(content, "</think>"), true, false);
        }
    }

    put_control(r, "<|assistant|>");
    if (keep && reasoning.n > 0) {
        put_control(r, "<think>");
        put_span(r, strip(reasoning));
    }
    put_control(r, "</think>");
    put_span(r, strip(content));
    return render_tool_calls(r, message, i);
}

/* The arguments object of a call, with a reference the caller owns. */
static enum err call_arguments(const json_t *call, const char *where, json_t **ret)
{
    const json_t *given = json_object_get(call, "arguments");
    if (!given || json_is_null(given) || (json_is_string(given) && !json_string_length(given))) {
        *ret = json_object();
        return *ret ? ERR_OK : err_set(ERR_NOMEM, "%s.arguments", where);
    }
    json_t *parsed;
    if (json_is_string(given)) {
        parsed = NULL;
        enum err e = json_parse(json_string_value(given), json_string_length(given),
                                &json_limits_request, &parsed);
        if (e != ERR_OK) {
            char why[256];
            snprintf(why, sizeof(why), "%s", err_text(e));
            return err_set(e == ERR_NOMEM ? e : ERR_INVALID, "%s.arguments: %s", where, why);
        }
    } else {
        parsed = json_incref((json_t *)given);
    }
    if (!json_is_object(parsed)) {
        json_decref(parsed);
        return err_set(ERR_INVALID, "%s.arguments must be a JSON object", where);
    }
    *ret = parsed;
    return ERR_OK;
}

static enum err render_tool_calls(struct render *r, const json_t *message, size_t i)
{
    const json_t *calls = json_object_get(message, "tool_calls");
    if (!calls || json_is_null(calls))
        return ERR_OK;
    if (!json_is_array(calls))
        return err_set(ERR_INVALID, "messages[%zu].tool_calls must be an array", i);
    size_t k;
    const json_t *call;
    json_array_foreach (calls, k, call) {
        char where[96];
        snprintf(where, sizeof(where), "messages[%zu].tool_calls[%zu]", i, k);
        if (!json_is_object(call))
            return err_set(ERR_INVALID, "%s must be an object", where);
        const json_t *function = json_object_get(call, "function");
        if (json_object_size(function) > 0) {
            call = function;
            snprintf(where, sizeof(where), "messages[%zu].tool_calls[%zu].function", i, k);
        }
        const json_t *name = json_object_get(call, "name");
        if (!json_is_string(name))
            return err_set(ERR_INVALID, "%s.name must be a string", where);
        json_auto_t *arguments = NULL;
        TRY(call_arguments(call, where, &arguments));

        put_control(r, "<tool_call>");
        put(r, false, json_string_value(name), json_string_length(name));
        const char *key;
        const json_t *value;
        json_object_foreach (arguments, key, value) {
            put_control(r, "<arg_key>");
            put_words(r, key);
            put_control(r, "</arg_key><arg_value>");
            if (json_is_string(value))
                put(r, false, json_string_value(value), json_string_length(value));
            else
                put_json(r, value);
            put_control(r, "</arg_value>");
        }
        put_control(r, "</tool_call>");
    }
    return ERR_OK;
}

static bool is_text_part(const json_t *item)
{
    const char *type = json_string_value(json_object_get(item, "type"));
    return type && !strcmp(type, "text");
}

static enum err part_refuse(const json_t *item, size_t i, size_t k)
{
    const char *type = json_string_value(json_object_get(item, "type"));
    return err_set(ERR_INVALID,
                   "messages[%zu].content[%zu]: parts of type \"%.32s\" are not supported, only "
                   "\"text\"",
                   i, k, type ? type : "");
}

static void part_text(const json_t *part, struct json_out *ret)
{
    const json_t *text = json_object_get(part, "text");
    if (text && !json_is_null(text))
        python_str(text, ret);
}

static void put_tool_response(struct render *r, const struct json_out *text)
{
    put_control(r, "<tool_response>");
    put_span(r, span_of(text));
    put_control(r, "</tool_response>");
    r->text.failed |= text->failed;
}

/* A list of text parts is one result, in pieces. Any other list is several results. */
static enum err render_tool_result(struct render *r, const json_t *message, size_t i,
                                   bool after_tool)
{
    const json_t *content = json_object_get(message, "content");
    bool several = false;
    size_t k;
    const json_t *item;
    json_array_foreach (content, k, item)
        several |= !is_text_part(item);
    if (!several) {
        SCRATCH text = {0};
        TRY(content_text(message, i, &text));
        if (!after_tool)
            put_control(r, "<|observation|>");
        put_tool_response(r, &text);
        return ERR_OK;
    }
    put_control(r, "<|observation|>");
    json_array_foreach (content, k, item) {
        SCRATCH text = {0};
        const json_t *output = json_object_get(item, "output");
        if (output)
            python_str(output, &text);
        else if (is_text_part(item))
            part_text(item, &text);
        else if (json_object_get(item, "type"))
            return part_refuse(item, i, k);
        else
            python_str(item, &text);
        put_tool_response(r, &text);
    }
    return ERR_OK;
}

/* ---- what messages hold ---- */

static enum err message_role(const json_t *message, size_t i, enum role *ret)
{
    static const struct {
        const char *name;
        enum role role;
    } roles[] = {
        {"system", ROLE_SYSTEM}, {"user", ROLE_USER},        {"assistant", ROLE_ASSISTANT},
        {"tool", ROLE_TOOL},     {"developer", ROLE_SYSTEM}, {"function", ROLE_TOOL},
    };
    const char *name = json_string_value(json_object_get(message, "role"));
    for (size_t k = 0; name && k < ARRAY_LEN(roles); k++) {
        if (!strcmp(name, roles[k].name)) {
            *ret = roles[k].role;
            return ERR_OK;
        }
    }
    if (!name)
        return err_set(ERR_INVALID, "messages[%zu].role must be a string", i);
    return err_set(ERR_INVALID, "messages[%zu].role \"%.32s\" is unknown", i, name);
}

static enum err content_text(const json_t *message, size_t i, struct json_out *ret)
{
    const json_t *content = json_object_get(message, "content");
    if (!content || json_is_null(content))
        return ERR_OK;
    if (!json_is_array(content)) {
        python_str(content, ret);
        return ERR_OK;
    }
    size_t k;
    const json_t *item;
    json_array_foreach (content, k, item) {
        if (json_is_string(item))
            python_str(item, ret);
        else if (is_text_part(item))
            part_text(item, ret);
        else if (json_is_object(item))
            return part_refuse(item, i, k);
    }
    return ERR_OK;
}

static void python_str(const json_t *value, struct json_out *ret)
{
    if (json_is_string(value))
        json_out_raw(ret, json_string_value(value), json_string_length(value));
    else
        python_repr(value, ret);
}

/* Characters that Python's repr escapes: controls, format characters, surrogates, private use,
 * and all separators but the space. (Unassigned code points are left out: that list changes.) */
static bool python_printable(uint32_t c)
{
    static const uint32_t hidden[][2] = {
        {0x00, 0x1f},       {0x7f, 0xa0},        {0xad, 0xad},       {0x600, 0x605},
        {0x61c, 0x61c},     {0x6dd, 0x6dd},      {0x70f, 0x70f},     {0x890, 0x891},
        {0x8e2, 0x8e2},     {0x1680, 0x1680},    {0x180e, 0x180e},   {0x2000, 0x200f},
        {0x2028, 0x202f},   {0x205f, 0x206f},    {0x3000, 0x3000},   {0xd800, 0xf8ff},
        {0xfeff, 0xfeff},   {0xfff0, 0xfffb},    {0xfffe, 0xffff},   {0x110bd, 0x110bd},
        {0x110cd, 0x110cd}, {0x13430, 0x1343f},  {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a},
        {0xe0000, 0xe00ff}, {0xe01f0, 0x10ffff},
    };
    for (size_t k = 0; k < ARRAY_LEN(hidden); k++)
        if (c >= hidden[k][0] && c <= hidden[k][1])
            return false;
    return true;
}

static void python_repr_string(const char *text, size_t n, struct json_out *ret)
{
    const char quote = memchr(text, '\'', n) && !memchr(text, '"', n) ? '"' : '\'';
    json_out_raw(ret, &quote, 1);
    for (size_t i = 0, more; i < n; i += more) {
        uint8_t lead = (uint8_t)text[i];
        more = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
        more = MIN(more, n - i);
        uint32_t c = more == 1 ? lead : lead & (0x7fu >> more);
        for (size_t k = 1; k < more; k++)
            c = c << 6 | ((uint8_t)text[i + k] & 0x3f);
        if (c == '\n' || c == '\r' || c == '\t')
            json_out_fmt(ret, "\\%c", c == '\n' ? 'n' : c == '\r' ? 'r' : 't');
        else if (c == '\\' || c == (uint8_t)quote)
            json_out_fmt(ret, "\\%c", (char)c);
        else if (python_printable(c))
            json_out_raw(ret, text + i, more);
        else
            json_out_fmt(ret, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
    }
    json_out_raw(ret, &quote, 1);
}

static void python_repr(const json_t *value, struct json_out *ret)
{
    const char *key;
    const json_t *item;
    size_t k, n = 0;
    switch (json_typeof(value)) {
    case JSON_NULL:
        append(ret, "None");
        break;
    case JSON_TRUE:
        append(ret, "True");
        break;
    case JSON_FALSE:
        append(ret, "False");
        break;
    case JSON_STRING:
        python_repr_string(json_string_value(value), json_string_length(value), ret);
        break;
    case JSON_ARRAY:
        append(ret, "[");
        json_array_foreach (value, k, item) {
            append(ret, k ? ", " : "");
            python_repr(item, ret);
        }
        append(ret, "]");
        break;
    case JSON_OBJECT:
        append(ret, "{");
        json_object_foreach ((json_t *)value, key, item) {
            append(ret, n++ ? ", " : "");
            python_repr_string(key, strlen(key), ret);
            append(ret, ": ");
            python_repr(item, ret);
        }
        append(ret, "}");
        break;
    case JSON_INTEGER:
    case JSON_REAL: {
        OWNED_MEM char *number = json_dump_python(value);
        if (number)
            append(ret, number);
        else
            ret->failed = true;
        break;
    }
    }
}

/* Bytes of the whitespace character (as Python's str.isspace has it) that p starts with, or 0. */
static size_t space_bytes(const char *p, size_t n)
{
    uint8_t c = (uint8_t)p[0];
    if ((c >= '\t' && c <= '\r') || (c >= 0x1c && c <= ' '))
        return 1;
    if (c < 0x80)
        return 0;
    static const char *const wide[] = {
        "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\xa8",
        "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80",
    };
    for (size_t k = 0; k < ARRAY_LEN(wide); k++) {
        size_t n_wide = strlen(wide[k]);
        if (n >= n_wide && !memcmp(p, wide[k], n_wide))
            return n_wide;
    }
    bool general = n >= 3 && c == 0xe2 && (uint8_t)p[1] == 0x80 && (uint8_t)p[2] <= 0x8a;
    return general ? 3 : 0; /* U+2000 to U+200A */
}

static struct span strip(struct span s)
{
    for (size_t n; s.n && (n = space_bytes(s.p, s.n)) > 0;)
        s = (struct span){s.p + n, s.n - n};
    while (s.n) {
        size_t n = 1;
        while (n < 3 && n < s.n && ((uint8_t)s.p[s.n - n] & 0xc0) == 0x80)
            n++;
        if (space_bytes(s.p + s.n - n, n) != n)
            break;
        s.n -= n;
    }
    return s;
}
