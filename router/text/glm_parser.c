/* glm_parser.c: GLM-4.7's output as events.
 *
 * Two stages. Marks: a detokeniser of our own over the ids tells at which byte of the text each tag
 * stands, however late that text arrives. States: text and tags, in order, drive the machine below.
 *
 *   REASONING -</think>-> CONTENT <-> RAW (a call that is none)
 *       |                    |  ^
 *       +----<tool_call>-----+  |
 *                 v             +--------------------</tool_call>----------+
 *               NAME -<arg_key>-> KEY -</arg_key>-> AFTER_KEY -<arg_value>-> VALUE <-> CLOSING
 *                                  ^----------------------<arg_key>-----------------------+
 *
 *  1. Without `calls`, only </think> means anything.
 *  2. <tool_call> ends reasoning: models forget </think> before a call. If no call comes of it,
 *     reasoning goes on. A </think> that comes after such a call is dropped.
 *  3. A name has no space in it and at most MAX_NAME bytes; space around it is dropped. What
 *     follows <tool_call> otherwise is text: all of it, up to </tool_call>.
 *  4. The call is announced at the tag after its name, whether or not the function is known.
 *  5. </arg_value> closes a value only if <arg_key> or </tool_call> follows, after whitespace. All
 *     else is text of the value, tags included: models write about their own format.
 *  6. Strings go out as they come, verbatim. A value that may be something else waits until it is
 *     certain; see put_typed for what it becomes.
 *  7. Of pairs with the same key the first is kept: it may have been sent already, and JSON with
 *     duplicate keys would be refused when the client sends the conversation back.
 *  8. A key without a value gets null. <arg_value> may be missing, or </arg_key> before it.
 *  9. Around calls, text is content as it is, whitespace too; a stray </tool_call> is dropped, and
 *     so is a <think> that begins reasoning, and newlines right after </think>.
 */
#include "router/text/glm_parser.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/json_type.h"
#include "common/base/own.h"

#define MAX_NAME   256
#define MAX_STEPS  1000 /* through a schema, per key */
#define MAX_NESTED 16   /* of schemas */

enum { REASONING, CONTENT, RAW, NAME, KEY, AFTER_KEY, VALUE, CLOSING };
enum { VALUE_STRING, VALUE_BUFFER, VALUE_DROP };
#define T_ANY T_ALL /* nothing is known */

struct glm_mark {
    uint64_t at;
    uint32_t n;
    enum glm_tag tag;
};

static const char *const tag_text[GLM_N_TAGS] = {
    "<think>",   "</think>",   "<tool_call>", "</tool_call>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
};

static void on_text(struct glm_parser *p, const char *s, size_t n);
static void on_tag(struct glm_parser *p, enum glm_tag tag, size_t n_shown);
static unsigned key_types(const struct glm_parser *p);

void glm_parser_init(struct glm_parser *p, const struct glm_options *options, glm_event_fn *fn,
                     void *user)
{
    *p = (struct glm_parser){.options = *options, .fn = fn, .user = user};
    for (int i = 0; i < GLM_N_TAGS; i++)
        p->tag_ids[i] = tokenizer_added_id(options->tokenizer, tag_text[i]);
    if (p->tag_ids[GLM_CALL] < 0 || p->tag_ids[GLM_CALL_END_TAG] < 0)
        p->options.calls = false;
    p->thinking_ids = options->reasoning && p->tag_ids[GLM_THINK_END] >= 0;
    p->state = p->thinking_ids ? REASONING : CONTENT;
    detokenizer_init(&p->detok, options->tokenizer, options->skip_special);
}

void glm_parser_finish(struct glm_parser *p)
{
    struct json_out *all[] = {&p->scratch, &p->held, &p->key, &p->value, &p->arguments};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        json_out_finish(all[i]);
    free(p->marks);
    free(p->keys);
    *p = (struct glm_parser){0};
}

/* ---- marks ---- */

/* Room for one more; n_items is how many there are. */
static void *grow(void *items, size_t n_items, size_t *cap, size_t item_bytes)
{
    if (n_items < *cap)
        return items;
    size_t more = *cap ? *cap * 2 : 16;
    void *bigger = realloc(items, more * item_bytes);
    if (bigger)
        *cap = more;
    return bigger;
}

static void mark_add(struct glm_parser *p, enum glm_tag tag, size_t n_shown)
{
    if (p->first_mark == p->n_marks)
        p->first_mark = p->n_marks = 0;
    void *marks = grow(p->marks, p->n_marks, &p->cap_marks, sizeof(*p->marks));
    if (!marks) {
        p->failed = true;
        return;
    }
    p->marks = marks;
    p->marks[p->n_marks++] =
        (struct glm_mark){.at = p->n_bytes - n_shown, .n = (uint32_t)n_shown, .tag = tag};
}

static void find_tags(struct glm_parser *p, const int32_t *ids, size_t n)
{
    for (size_t i = 0; i < n && (p->options.calls || p->thinking_ids); i++) {
        p->scratch.len = 0;
        detokenizer_push(&p->detok, ids[i], &p->scratch);
        p->n_bytes += p->scratch.len;
        p->n_reasoning += p->thinking_ids;
        for (int tag = 0; tag < GLM_N_TAGS; tag++) {
            if (ids[i] != p->tag_ids[tag])
                continue;
            bool hidden =
                p->options.skip_special && tokenizer_is_special(p->options.tokenizer, ids[i]);
            mark_add(p, (enum glm_tag)tag, hidden ? 0 : strlen(tag_text[tag]));
            if (tag == GLM_THINK_END || (tag == GLM_CALL && p->options.calls))
                p->thinking_ids = false;
        }
    }
    p->failed |= p->scratch.failed;
}

static void flush_arguments(struct glm_parser *p);

void glm_parser_push(struct glm_parser *p, const int32_t *ids, size_t n_ids, const char *text,
                     size_t n_text)
{
    find_tags(p, ids, n_ids);
    for (;;) {
        const struct glm_mark *m = p->first_mark < p->n_marks ? &p->marks[p->first_mark] : NULL;
        size_t n = n_text;
        if (m && p->n_text >= m->at) {
            n = MIN(n, m->n - p->in_tag);
            p->in_tag += (uint32_t)n;
            if (p->in_tag < m->n) {
                p->n_text += n;
                break;
            }
            p->first_mark++;
            p->in_tag = 0;
            on_tag(p, m->tag, m->n);
        } else {
            if (n == 0)
                break;
            if (m)
                n = MIN((uint64_t)n, m->at - p->n_text);
            on_text(p, text, n);
        }
        p->n_text += n;
        text += n;
        n_text -= n;
    }
    flush_arguments(p);
}

/* ---- events ---- */

static void emit(struct glm_parser *p, enum glm_event_kind kind, const char *text, size_t n)
{
    if (n == 0 && kind != GLM_EVENT_CALL_END)
        return;
    struct glm_event e = {.kind = kind, .text = text, .n_text = n};
    if (kind >= GLM_EVENT_CALL_START)
        e.call_idx = p->n_calls - 1;
    char id[32];
    if (kind == GLM_EVENT_CALL_START) {
        uint64_t a = hash_mix(p->options.id_seed + p->n_calls * 0x9e3779b97f4a7c15u);
        uint32_t b = (uint32_t)hash_mix(a + 0x9e3779b97f4a7c15u);
        snprintf(id, sizeof(id), "call_%016llx%08x", (unsigned long long)a, b);
        e.id = id;
    }
    p->fn(p->user, &e);
}

/* Pieces of arguments are gathered, so that one push gives one delta. */
static void flush_arguments(struct glm_parser *p)
{
    p->failed |= p->arguments.failed | p->held.failed | p->key.failed | p->value.failed;
    if (p->arguments.len)
        emit(p, GLM_EVENT_ARGUMENTS, p->arguments.data, p->arguments.len);
    p->arguments.len = 0;
}

static void plain(struct glm_parser *p, const char *s, size_t n)
{
    if (p->state == REASONING) {
        p->reasoning_begun |= n > 0;
        emit(p, GLM_EVENT_REASONING, s, n);
        return;
    }
    for (; p->skip_newlines && n > 0 && *s == '\n'; n--)
        s++;
    if (n > 0)
        p->skip_newlines = false;
    emit(p, GLM_EVENT_CONTENT, s, n);
}

static void put(struct glm_parser *p, const char *text)
{
    json_out_raw(&p->arguments, text, strlen(text));
}

/* The inside of a JSON string. */
static void put_escaped(struct glm_parser *p, const char *s, size_t n)
{
    struct json_out *o = &p->arguments;
    size_t start = o->len;
    json_out_string(o, s, n);
    if (o->failed)
        return;
    memmove(o->data + start, o->data + start + 1, o->len - start - 2);
    o->len -= 2;
}

/* ---- values ---- */

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

struct span {
    const char *s;
    size_t n;
};

static struct span trimmed(const char *s, size_t n)
{
    while (n && is_space(*s))
        s++, n--;
    while (n && is_space(s[n - 1]))
        n--;
    return (struct span){s, n};
}

static struct span out_trimmed(const struct json_out *o)
{
    return o->len ? trimmed(o->data, o->len) : (struct span){"", 0};
}

static bool span_is(struct span t, const char *text)
{
    return t.n == strlen(text) && !memcmp(t.s, text, t.n);
}

/* The type of a JSON text, or 0 if it is none. Of a string, *ret_string (if given) gets the value,
 * which the caller owns. */
static unsigned json_kind(struct span t, json_t **ret_string)
{
    if (t.n == 0)
        return 0;
    if (span_is(t, "null"))
        return T_NULL;
    if (span_is(t, "true") || span_is(t, "false"))
        return T_BOOLEAN;
    if (t.s[0] == '-' || (t.s[0] >= '0' && t.s[0] <= '9'))
        return json_type_of_number(t.s, t.n);
    if (!strchr("{[\"", t.s[0]) || t.s[0] == 0)
        return 0;
    struct json_out list = {0}; /* "[text]": a string alone is no document for every parser */
    json_out_raw(&list, "[", 1);
    json_out_raw(&list, t.s, t.n);
    json_out_raw(&list, "]", 1);
    json_t *parsed = NULL;
    unsigned kind = 0;
    if (!list.failed && json_parse(list.data, list.len, &json_limits_request, &parsed) == ERR_OK &&
        json_array_size(parsed) == 1) {
        json_t *v = json_array_get(parsed, 0);
        kind = json_is_object(v) ? T_OBJECT : json_is_array(v) ? T_ARRAY : T_STRING;
        if (kind == T_STRING && ret_string)
            *ret_string = json_incref(v);
    }
    json_decref(parsed);
    json_out_finish(&list);
    return kind;
}

static void pair_open(struct glm_parser *p)
{
    put(p, p->n_pairs++ ? ", " : "{");
    struct span k = out_trimmed(&p->key);
    json_out_string(&p->arguments, k.s, k.n);
    put(p, ": ");
}

/* Has the key been seen in this call? From now on it has. */
static bool key_again(struct glm_parser *p)
{
    struct span k = out_trimmed(&p->key);
    uint64_t h = hash_bytes(0, k.s, k.n);
    for (size_t i = 0; i < p->n_keys; i++) {
        if (p->keys[i] == h)
            return true;
    }
    void *keys = grow(p->keys, p->n_keys, &p->cap_keys, sizeof(*p->keys));
    if (!keys) {
        p->failed = true;
        return true;
    }
    p->keys = keys;
    p->keys[p->n_keys++] = h;
    return false;
}

static void string_open(struct glm_parser *p)
{
    p->value_mode = VALUE_STRING;
    pair_open(p);
    put(p, "\"");
}

static void value_begin(struct glm_parser *p)
{
    p->state = VALUE;
    p->held.len = p->value.len = 0;
    if (key_again(p)) {
        p->value_mode = VALUE_DROP;
        return;
    }
    p->types = key_types(p);
    p->value_mode = VALUE_BUFFER;
    if (p->types == T_STRING)
        string_open(p);
}

static void null_pair(struct glm_parser *p)
{
    if (out_trimmed(&p->key).n == 0 || key_again(p))
        return;
    pair_open(p);
    put(p, "null");
}

/* Does what has come so far of a value that may be a string begin no other admissible type? */
static bool only_string(unsigned types, const struct json_out *value)
{
    struct span t = out_trimmed(value);
    if (!(types & T_STRING) || t.n == 0)
        return false;
    static const struct {
        const char *text;
        unsigned type;
    } words[] = {{"null", T_NULL}, {"true", T_BOOLEAN}, {"false", T_BOOLEAN},
                 {"None", T_NULL}, {"True", T_BOOLEAN}, {"False", T_BOOLEAN}};
    for (size_t i = 0; i < ARRAY_LEN(words); i++) {
        if ((types & words[i].type) && t.n <= strlen(words[i].text) &&
            !memcmp(t.s, words[i].text, t.n))
            return false;
    }
    char c = t.s[0];
    if (c == '-' || (c >= '0' && c <= '9'))
        return !(types & (T_INTEGER | T_NUMBER));
    if (c == '{')
        return !(types & T_OBJECT);
    if (c == '[')
        return !(types & T_ARRAY);
    return !(c == '"' && types == T_ANY);
}

static void value_text(struct glm_parser *p, const char *s, size_t n)
{
    if (p->value_mode == VALUE_STRING)
        put_escaped(p, s, n);
    if (p->value_mode != VALUE_BUFFER || n == 0)
        return;
    json_out_raw(&p->value, s, n);
    if (!p->value.failed && only_string(p->types, &p->value)) {
        string_open(p);
        put_escaped(p, p->value.data, p->value.len);
    }
}

/* What a value becomes that is not surely a string:
 * - string admissible among others: JSON of one of the others, else the string, verbatim;
 * - nothing known: JSON, or Python's True, False and None, else the string;
 * - string not admissible: the same, but a JSON string around an admissible value is taken off. */
static void put_typed(struct glm_parser *p)
{
    struct span t = out_trimmed(&p->value);
    unsigned types = p->types;
    json_t *string = NULL;
    unsigned kind = json_kind(t, &string);
    bool raw = kind != 0;
    if ((types & T_STRING) && types != T_ANY) {
        raw = kind & types & ~(unsigned)T_STRING;
    } else if (kind == T_STRING && types != T_ANY) {
        struct span inner = trimmed(json_string_value(string), json_string_length(string));
        if (json_kind(inner, NULL) & types)
            t = inner;
    } else if (kind == 0 && (types & T_BOOLEAN) && (span_is(t, "True") || span_is(t, "False"))) {
        t = span_is(t, "True") ? (struct span){"true", 4} : (struct span){"false", 5};
        raw = true;
    } else if (kind == 0 && (types & T_NULL) && span_is(t, "None")) {
        t = (struct span){"null", 4};
        raw = true;
    }
    if (raw)
        json_out_raw(&p->arguments, t.s, t.n);
    else
        json_out_string(&p->arguments, p->value.len ? p->value.data : "", p->value.len);
    json_decref(string);
}

static void value_close(struct glm_parser *p)
{
    if (p->value_mode == VALUE_STRING)
        put(p, "\"");
    if (p->value_mode != VALUE_BUFFER)
        return;
    pair_open(p);
    put_typed(p);
}

/* ---- calls ---- */

static void call_begin(struct glm_parser *p, size_t n_shown)
{
    p->origin = p->state == REASONING ? REASONING : CONTENT;
    p->state = NAME;
    p->held.len = 0;
    json_out_raw(&p->held, tag_text[GLM_CALL], n_shown);
    p->n_held_tag = p->held.len;
}

static struct span call_name(const struct glm_parser *p)
{
    if (p->held.len == 0)
        return (struct span){"", 0};
    return trimmed(p->held.data + p->n_held_tag, p->held.len - p->n_held_tag);
}

/* Can what follows <tool_call> still become a name? */
static bool may_be_name(const struct glm_parser *p)
{
    struct span t = call_name(p);
    if (p->held.len - p->n_held_tag > MAX_NAME)
        return false;
    for (size_t i = 0; i < t.n; i++) {
        if ((unsigned char)t.s[i] <= ' ' || t.s[i] == 0x7f)
            return false;
    }
    return true;
}

/* It was no call: text again. */
static void call_give_up(struct glm_parser *p)
{
    p->state = p->origin == REASONING ? REASONING : RAW;
    if (p->held.len)
        plain(p, p->held.data, p->held.len);
    p->held.len = 0;
}

static void call_start(struct glm_parser *p)
{
    struct span name = call_name(p);
    p->n_keys = 0;
    p->n_pairs = 0;
    p->key.len = 0;
    p->n_calls++;
    p->skip_newlines = false;
    p->schema = NULL;
    size_t i;
    json_t *tool;
    json_array_foreach (p->options.tools, i, tool) {
        const json_t *f = json_object_get(tool, "function");
        const json_t *known = json_object_get(f, "name");
        if (json_is_string(known) && json_string_length(known) == name.n &&
            !memcmp(json_string_value(known), name.s, name.n)) {
            p->schema = json_object_get(f, "parameters");
            break;
        }
    }
    emit(p, GLM_EVENT_CALL_START, name.s, name.n);
    p->held.len = 0;
    p->state = KEY;
}

static void call_end(struct glm_parser *p)
{
    put(p, p->n_pairs ? "}" : "{}");
    flush_arguments(p);
    emit(p, GLM_EVENT_CALL_END, "", 0);
    p->state = CONTENT;
    p->think_end_due |= p->origin == REASONING;
}

/* ---- the machine ---- */

static void on_text(struct glm_parser *p, const char *s, size_t n)
{
    switch (p->state) {
    case REASONING:
    case CONTENT:
    case RAW:
        plain(p, s, n);
        break;
    case NAME:
        json_out_raw(&p->held, s, n);
        if (!may_be_name(p))
            call_give_up(p);
        break;
    case KEY:
        json_out_raw(&p->key, s, n);
        break;
    case AFTER_KEY:
        if (trimmed(s, n).n == 0)
            break;
        value_begin(p); /* <arg_value> is missing */
        while (is_space(*s))
            s++, n--;
        value_text(p, s, n);
        break;
    case VALUE:
        value_text(p, s, n);
        break;
    case CLOSING:
        json_out_raw(&p->held, s, n);
        if (trimmed(s, n).n == 0 || p->held.failed)
            break;
        p->state = VALUE;
        value_text(p, p->held.data, p->held.len);
        break;
    }
}

static void value_closing(struct glm_parser *p, size_t n_shown)
{
    p->state = CLOSING;
    p->held.len = 0;
    json_out_raw(&p->held, tag_text[GLM_VALUE_END], n_shown);
}

static void tag_outside(struct glm_parser *p, enum glm_tag tag, size_t n)
{
    bool calls = p->options.calls;
    if (tag == GLM_CALL && calls) {
        call_begin(p, n);
    } else if (p->state == REASONING && tag == GLM_THINK_END) {
        p->state = CONTENT;
        p->skip_newlines = true;
    } else if (p->state == REASONING && tag == GLM_THINK && !p->reasoning_begun) {
        return;
    } else if (p->state == CONTENT && tag == GLM_THINK_END && p->think_end_due) {
        p->think_end_due = false;
        p->skip_newlines = true;
    } else if (p->state == CONTENT && tag == GLM_CALL_END_TAG && calls) {
        return;
    } else {
        plain(p, tag_text[tag], n);
        if (p->state == RAW && tag == GLM_CALL_END_TAG)
            p->state = CONTENT;
    }
}

static void tag_in_name(struct glm_parser *p, enum glm_tag tag, size_t n)
{
    if ((tag != GLM_KEY && tag != GLM_CALL_END_TAG) || call_name(p).n == 0) {
        call_give_up(p);
        tag_outside(p, tag, n);
        return;
    }
    call_start(p);
    if (tag == GLM_CALL_END_TAG)
        call_end(p);
}

static void tag_after_key(struct glm_parser *p, enum glm_tag tag, size_t n)
{
    if (tag == GLM_KEY) {
        null_pair(p);
        p->key.len = 0;
        p->state = KEY;
    } else if (tag == GLM_CALL_END_TAG) {
        null_pair(p);
        call_end(p);
    } else {
        value_begin(p);
        if (tag == GLM_VALUE_END)
            value_closing(p, n);
        else if (tag != GLM_VALUE)
            value_text(p, tag_text[tag], n);
    }
}

static void tag_in_value(struct glm_parser *p, enum glm_tag tag, size_t n)
{
    if (p->state == CLOSING && tag == GLM_KEY) {
        value_close(p);
        p->key.len = 0;
        p->state = KEY;
        return;
    }
    if (p->state == CLOSING && tag == GLM_CALL_END_TAG) {
        value_close(p);
        call_end(p);
        return;
    }
    if (p->state == CLOSING && p->held.len)
        value_text(p, p->held.data, p->held.len);
    p->state = VALUE;
    if (tag == GLM_VALUE_END)
        value_closing(p, n);
    else
        value_text(p, tag_text[tag], n);
}

static void on_tag(struct glm_parser *p, enum glm_tag tag, size_t n_shown)
{
    switch (p->state) {
    case REASONING:
    case CONTENT:
    case RAW:
        tag_outside(p, tag, n_shown);
        break;
    case NAME:
        tag_in_name(p, tag, n_shown);
        break;
    case KEY:
        if (tag == GLM_KEY_END)
            p->state = AFTER_KEY;
        else if (tag == GLM_VALUE || tag == GLM_CALL_END_TAG)
            tag_after_key(p, tag, n_shown);
        else
            json_out_raw(&p->key, tag_text[tag], n_shown);
        break;
    case AFTER_KEY:
        tag_after_key(p, tag, n_shown);
        break;
    case VALUE:
    case CLOSING:
        tag_in_value(p, tag, n_shown);
        break;
    }
}

/* A value as far as it came; as a string, should it happen to make the arguments whole. */
static void value_break_off(struct glm_parser *p)
{
    struct json_out *all = &p->scratch;
    all->len = 0;
    json_out_raw(all, "{\"\":", 4);
    json_out_raw(all, p->value.len ? p->value.data : "", p->value.len);
    if (all->failed || p->value.failed)
        return;
    if (json_kind(trimmed(all->data, all->len), NULL)) {
        put(p, "\"");
        put_escaped(p, p->value.data, p->value.len);
    } else {
        json_out_raw(&p->arguments, all->data + 4, all->len - 4);
    }
}

/* The output broke off inside arguments: what is there of the pair, unfinished. */
static void call_break_off(struct glm_parser *p)
{
    p->broken = true;
    if (p->state == CLOSING) {
        value_close(p);
    } else if (p->state == VALUE && p->value_mode == VALUE_BUFFER) {
        pair_open(p);
        value_break_off(p);
    } else if (p->state == AFTER_KEY && !key_again(p)) {
        pair_open(p);
    } else if (p->state == KEY && p->key.len) {
        put(p, p->n_pairs++ ? ", \"" : "{\"");
        put_escaped(p, p->key.data, p->key.len);
    }
    if (p->n_pairs == 0)
        put(p, "{");
    flush_arguments(p);
    emit(p, GLM_EVENT_CALL_END, "", 0);
}

void glm_parser_end(struct glm_parser *p, bool stopped)
{
    if (p->in_tag)
        on_text(p, tag_text[p->marks[p->first_mark].tag], p->in_tag); /* cut inside the tag */
    p->in_tag = 0;
    p->first_mark = p->n_marks = 0;
    if (p->state == NAME) {
        call_give_up(p);
    } else if (p->state == CLOSING && stopped) {
        value_close(p);
        call_end(p);
    } else if (p->state >= KEY) {
        call_break_off(p);
    }
    p->state = CONTENT;
    flush_arguments(p);
}

/* ---- schemas ---- */

struct walk {
    const json_t *root;
    int n_steps, depth;
};

static unsigned schema_types(const json_t *schema, struct walk *w);

static unsigned type_named(const char *name)
{
    unsigned type = json_type_named(name);
    return type ? type : T_ANY;
}

/* "#/a/b" within root, or NULL. */
static const json_t *follow(const json_t *root, const char *ref)
{
    if (!ref || *ref++ != '#')
        return NULL;
    const json_t *at = root;
    while (at && *ref == '/') {
        char name[256];
        size_t n = 0;
        for (ref++; *ref && *ref != '/' && n + 1 < sizeof(name); ref++) {
            char c = *ref;
            if (c == '~' && (ref[1] == '0' || ref[1] == '1'))
                c = *++ref == '0' ? '~' : '/';
            name[n++] = c;
        }
        name[n] = 0;
        at = json_is_array(at) ? json_array_get(at, strtoul(name, NULL, 10))
                               : json_object_get(at, name);
    }
    return *ref == 0 ? at : NULL;
}

static unsigned narrow(unsigned types, unsigned by) { return types & by ? types & by : types; }

static unsigned union_of(const json_t *schemas, struct walk *w)
{
    unsigned types = 0;
    size_t i;
    json_t *s;
    json_array_foreach (schemas, i, s)
        types |= schema_types(s, w);
    return types ? types : T_ANY;
}

static unsigned declared(const json_t *type)
{
    unsigned types = 0;
    size_t i;
    json_t *name;
    if (!json_is_array(type))
        return type_named(json_string_value(type));
    json_array_foreach (type, i, name)
        types |= type_named(json_string_value(name));
    return types ? types : T_ANY;
}

/* The types a schema admits; T_ANY for what it does not say or we do not understand. */
static unsigned schema_types(const json_t *schema, struct walk *w)
{
    if (!json_is_object(schema) || w->n_steps <= 0 || w->depth >= MAX_NESTED)
        return T_ANY;
    w->n_steps--;
    w->depth++;
    unsigned types = declared(json_object_get(schema, "type"));
    const json_t *ref = json_object_get(schema, "$ref");
    if (ref)
        types = narrow(types, schema_types(follow(w->root, json_string_value(ref)), w));
    const json_t *values = json_object_get(schema, "enum");
    if (json_array_size(values) > 0) {
        unsigned listed = 0;
        size_t i;
        json_t *v;
        json_array_foreach (values, i, v)
            listed |= json_type_of(v);
        types = narrow(types, listed);
    }
    const json_t *only = json_object_get(schema, "const");
    if (only)
        types = narrow(types, json_type_of(only));
    types = narrow(types, union_of(json_object_get(schema, "anyOf"), w));
    types = narrow(types, union_of(json_object_get(schema, "oneOf"), w));
    size_t i;
    json_t *s;
    json_array_foreach (json_object_get(schema, "allOf"), i, s)
        types = narrow(types, schema_types(s, w));
    if (types == T_ANY && json_object_get(schema, "properties"))
        types = T_OBJECT;
    else if (types == T_ANY && json_object_get(schema, "items"))
        types = T_ARRAY;
    if (json_is_true(json_object_get(schema, "nullable")))
        types |= T_NULL;
    w->depth--;
    return types;
}

/* The schema of a property, also if the object's is put together from others. */
static const json_t *property(const json_t *schema, const char *key, struct walk *w)
{
    static const char *const parts[] = {"allOf", "anyOf", "oneOf"};
    if (!json_is_object(schema) || w->n_steps <= 0 || w->depth >= MAX_NESTED)
        return NULL;
    w->n_steps--;
    w->depth++;
    const json_t *found = json_object_get(json_object_get(schema, "properties"), key);
    const json_t *ref = json_object_get(schema, "$ref");
    if (!found && ref)
        found = property(follow(w->root, json_string_value(ref)), key, w);
    for (size_t k = 0; k < ARRAY_LEN(parts) && !found; k++) {
        const json_t *list = json_object_get(schema, parts[k]);
        for (size_t i = 0; i < json_array_size(list) && !found; i++)
            found = property(json_array_get(list, i), key, w);
    }
    const json_t *others = json_object_get(schema, "additionalProperties");
    if (!found && json_is_object(others))
        found = others;
    w->depth--;
    return found;
}

static unsigned key_types(const struct glm_parser *p)
{
    struct span k = out_trimmed(&p->key);
    char *key = strndup(k.s, k.n);
    if (!key || strlen(key) != k.n) { /* a NUL: no property has such a name */
        free(key);
        return T_ANY;
    }
    struct walk w = {.root = p->schema, .n_steps = MAX_STEPS};
    const json_t *schema = property(p->schema, key, &w);
    w = (struct walk){.root = p->schema, .n_steps = MAX_STEPS};
    free(key);
    return schema_types(schema, &w);
}
