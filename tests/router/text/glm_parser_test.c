/* glm_parser_test.c: what each output means, and that it means so however it is cut.
 *
 * glm_outputs.json is the table; tests/e2e/test_parser_cases.py sends it through a cluster. A case
 * has "in", written as the model writes (between two \1 tags are only spelled, not meant; behind a
 * token that ends the output nothing counts), and "out", the events: ["reasoning", text],
 * ["content", text], ["call", name, arguments]. Or "value": [key, value, the JSON of it], for a
 * call of f. "thinking", "calls": false, "schema": false and "length" (it did not end by itself)
 * say how it was asked, "broken" that it broke off inside arguments, "of" what the case is there
 * for.
 *
 * Here events are written r{reasoning} c{content} f{name|arguments}, in order, with ! at the end of
 * broken ones. Every row is run whole, token by token, with all text after all ids, and at random
 * splits.
 */
#include "router/text/glm_parser.h"

#include "check.h"

#define TC               "<tool_call>"
#define TCE              "</tool_call>"
#define K                "<arg_key>"
#define KE               "</arg_key>"
#define V                "<arg_value>"
#define VE               "</arg_value>"
#define T                "<think>"
#define TE               "</think>"
#define ARG(key, value)  K key KE V value VE
#define CALL(name, args) TC name args TCE
#define F(args)          CALL("f", args)
#define LIT(text)        "\1" text "\1"

static struct tokenizer *tokenizer;
static json_t *tools;
static uint64_t seed = 20240229;

enum { THINKING = 1, NO_CALLS = 2, LENGTH = 4, NO_SCHEMA = 8 };

struct row {
    int flags;
    char *in, *want;
};
static struct row *rows;
static size_t n_rows;

static uint32_t random_below(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

/* Events, written down. */
struct record {
    struct json_out all, ids;
    int last; /* kind, or -1 */
    uint32_t n_calls;
    size_t n_events, n_argument_events;
    bool wrong;
};

static void raw(struct json_out *o, const char *text) { json_out_raw(o, text, strlen(text)); }

static void close_text(struct record *r)
{
    if (r->last == GLM_EVENT_REASONING || r->last == GLM_EVENT_CONTENT)
        raw(&r->all, "}");
}

static void on_event(void *user, const struct glm_event *e)
{
    struct record *r = user;
    bool in_call = r->last == GLM_EVENT_CALL_START || r->last == GLM_EVENT_ARGUMENTS;
    bool of_call = e->kind == GLM_EVENT_ARGUMENTS || e->kind == GLM_EVENT_CALL_END;
    r->n_events++;
    r->n_argument_events += e->kind == GLM_EVENT_ARGUMENTS;
    r->wrong |= in_call != of_call;
    r->wrong |= utf8_check(e->text, e->n_text) != e->n_text;
    r->wrong |= (e->n_text == 0) != (e->kind == GLM_EVENT_CALL_END);
    r->wrong |= of_call && e->call_idx + 1 != r->n_calls;
    if ((int)e->kind != r->last) {
        close_text(r);
        if (e->kind == GLM_EVENT_REASONING || e->kind == GLM_EVENT_CONTENT)
            raw(&r->all, e->kind == GLM_EVENT_REASONING ? "r{" : "c{");
    }
    if (e->kind == GLM_EVENT_CALL_START) {
        r->wrong |= e->call_idx != r->n_calls++ || strlen(e->id) != 29 ||
                    strncmp(e->id, "call_", 5) || strspn(e->id + 5, "0123456789abcdef") != 24;
        r->wrong |= r->ids.len && strstr(r->ids.data, e->id);
        raw(&r->ids, e->id);
        json_out_raw(&r->ids, "\n", 2);
        r->ids.len--;
        raw(&r->all, "f{");
    }
    json_out_raw(&r->all, e->text, e->n_text);
    if (e->kind == GLM_EVENT_CALL_START)
        raw(&r->all, "|");
    if (e->kind == GLM_EVENT_CALL_END)
        raw(&r->all, "}");
    r->last = (int)e->kind;
}

static void record_finish(struct record *r)
{
    json_out_finish(&r->all);
    json_out_finish(&r->ids);
}

enum cut { WHOLE, BY_TOKEN, TEXT_LAST, RANDOM };

/* The ends of the texts of ids, and all of it (flushed). */
static size_t *texts_of(const int32_t *ids, size_t n, struct json_out *text)
{
    size_t *ends = calloc(n + 1, sizeof(*ends));
    struct detokenizer d;
    detokenizer_init(&d, tokenizer, true);
    for (size_t i = 0; i < n; i++) {
        detokenizer_push(&d, ids[i], text);
        ends[i] = text->len;
    }
    detokenizer_flush(&d, text);
    return ends;
}

static struct record run(const int32_t *ids, size_t n, int flags, enum cut cut)
{
    struct record r = {.last = -1};
    struct json_out text = {0};
    size_t *ends = texts_of(ids, n, &text);
    struct glm_options options = {.tokenizer = tokenizer,
                                  .skip_special = true,
                                  .reasoning = flags & THINKING,
                                  .calls = !(flags & NO_CALLS),
                                  .tools = flags & NO_SCHEMA ? NULL : tools,
                                  .id_seed = 7};
    struct glm_parser p;
    glm_parser_init(&p, &options, on_event, &r);
    const char *all = text.len ? text.data : "";
    size_t sent = 0;
    for (size_t i = 0; i < n;) {
        size_t k = cut == BY_TOKEN ? 1 : cut == RANDOM ? 1 + random_below(4) : n;
        k = k < n - i ? k : n - i;
        size_t to = cut == TEXT_LAST ? 0 : ends[i + k - 1];
        if (cut == RANDOM && random_below(2)) { /* some is held back */
            to = sent + random_below((uint32_t)(to - sent) + 1);
            while (to > sent && ((unsigned char)all[to] & 0xc0) == 0x80)
                to--;
        }
        glm_parser_push(&p, ids + i, k, all + sent, to - sent);
        sent = to;
        i += k;
    }
    while (sent < text.len) {
        size_t to = sent + 1;
        while (to < text.len && ((unsigned char)all[to] & 0xc0) == 0x80)
            to++;
        glm_parser_push(&p, NULL, 0, all + sent, cut == TEXT_LAST ? to - sent : text.len - sent);
        sent = cut == TEXT_LAST ? to : text.len;
    }
    glm_parser_end(&p, !(flags & LENGTH));
    close_text(&r);
    raw(&r.all, p.broken ? "!" : "");
    json_out_raw(&r.all, "", 1);
    CHECK(!r.wrong && !p.failed && !r.all.failed);
    CHECK_INT(p.n_calls, r.n_calls);
    glm_parser_finish(&p);
    free(ends);
    json_out_finish(&text);
    return r;
}

/* Of an output the part that a worker sends: nothing behind a token that ends it. */
static void cut_at_end(struct ids *ids)
{
    static const char *const ends[] = {"<|endoftext|>", "<|user|>", "<|observation|>"};
    for (size_t i = 0; i < ids->len; i++)
        for (size_t k = 0; k < ARRAY_LEN(ends); k++)
            if (ids->data[i] == tokenizer_added_id(tokenizer, ends[k]))
                ids->len = i;
}

/* \1 switches added tokens off and on. */
static void encode(const char *in, struct ids *ids)
{
    for (bool added = true;; added = !added) {
        size_t n = strcspn(in, "\1");
        CHECK_OK(tokenizer_encode(tokenizer, in, n, added, ids));
        if (in[n] == 0)
            break;
        in += n + 1;
    }
}

static void check_all_cuts(const int32_t *ids, size_t n, int flags, const char *want, int n_random)
{
    struct record whole = run(ids, n, flags, WHOLE);
    if (want)
        CHECK_STR(whole.all.data, want);
    for (int i = 0; i < 2 + n_random; i++) {
        struct record r = run(ids, n, flags, i == 0 ? BY_TOKEN : i == 1 ? TEXT_LAST : RANDOM);
        CHECK_STR(r.all.data, whole.all.data);
        CHECK(r.ids.len == whole.ids.len && (!r.ids.len || !strcmp(r.ids.data, whole.ids.data)));
        record_finish(&r);
    }
    record_finish(&whole);
}

static void table_of_outputs(void)
{
    CHECK(n_rows >= 120);
    for (size_t i = 0; i < n_rows; i++) {
        struct ids ids = {0};
        encode(rows[i].in, &ids);
        cut_at_end(&ids);
        check_all_cuts(ids.data, ids.len, rows[i].flags, rows[i].want, 12);
        ids_finish(&ids);
    }
}

/* Complete arguments are JSON. */
static void arguments_are_json(void)
{
    for (size_t i = 0; i < n_rows; i++) {
        const char *from = strchr(rows[i].want, '|'), *end = strrchr(rows[i].want, '}');
        if (strncmp(rows[i].want, "f{", 2) || !from || strchr(from, '!') || strstr(from, "}f{") ||
            strstr(from, "}c{"))
            continue;
        json_t *v = NULL;
        CHECK_OK(json_parse(from + 1, (size_t)(end - from - 1), &json_limits_request, &v));
        CHECK(json_is_object(v));
        json_decref(v);
    }
}

/* Strings do not wait for their end, nor does a name for its arguments. */
static void strings_stream(void)
{
    static const char *const keys[] = {"s", "os", "ls", "si", "x"};
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        char in[256];
        snprintf(in, sizeof(in), F(ARG("%s", "once upon a time there was a fox")), keys[i]);
        struct ids ids = {0};
        encode(in, &ids);
        struct record r = run(ids.data, ids.len, 0, BY_TOKEN);
        CHECK(r.n_argument_events > 6);
        record_finish(&r);
        ids_finish(&ids);
    }
    struct ids ids = {0};
    encode(TC "f" K, &ids);
    struct record r = {.last = -1};
    struct glm_options options = {.tokenizer = tokenizer, .calls = true, .tools = tools};
    struct glm_parser p;
    glm_parser_init(&p, &options, on_event, &r);
    glm_parser_push(&p, ids.data, ids.len, TC "f" K, strlen(TC "f" K));
    CHECK_INT(r.n_calls, 1);
    glm_parser_finish(&p);
    record_finish(&r);
    ids_finish(&ids);
}

/* Text cut by a stop string: what the ids say beyond it never happened. */
static void text_is_cut(void)
{
    static const struct {
        const char *text, *want;
    } cuts[] = {{"", ""},
                {"a", "c{a}"},
                {"a<tool", "c{a<tool}"},
                {"a" TC, "c{a" TC "}"},
                {"a" TC "f<arg", "c{a" TC "f<arg}"},
                {"a" TC "f" K "s" KE V "v<", "c{a}f{f|{\"s\": \"v<}!"},
                {"a" TC "f" K "s" KE V "v" VE "</tool", "c{a}f{f|{\"s\": \"v" VE "</tool}!"},
                {"a" TC "f" K "s" KE V "v" VE, "c{a}f{f|{\"s\": \"v\"}}"}};
    for (size_t i = 0; i < ARRAY_LEN(cuts); i++) {
        struct ids ids = {0};
        encode("a" F(ARG("s", "v")), &ids);
        struct record r = {.last = -1};
        struct glm_options options = {.tokenizer = tokenizer, .calls = true, .tools = tools};
        struct glm_parser p;
        glm_parser_init(&p, &options, on_event, &r);
        glm_parser_push(&p, ids.data, ids.len, cuts[i].text, strlen(cuts[i].text));
        glm_parser_end(&p, true);
        close_text(&r);
        json_out_raw(&r.all, p.broken ? "!" : "", 1 + (size_t)p.broken);
        CHECK_STR(r.all.data, cuts[i].want);
        CHECK(!r.wrong);
        glm_parser_finish(&p);
        record_finish(&r);
        ids_finish(&ids);
    }
}

static void reasoning_is_counted(void)
{
    struct ids ids = {0};
    encode("one two three" TE "four" F(""), &ids);
    struct record r = {.last = -1};
    struct glm_options options = {.tokenizer = tokenizer, .reasoning = true, .calls = true};
    struct glm_parser p;
    glm_parser_init(&p, &options, on_event, &r);
    glm_parser_push(&p, ids.data, ids.len, "", 0);
    size_t n = 0;
    while (ids.data[n] != tokenizer_added_id(tokenizer, TE))
        n++;
    CHECK_INT(p.n_reasoning, n + 1);
    CHECK_INT(r.n_events, 0);
    glm_parser_finish(&p);
    record_finish(&r);
    ids_finish(&ids);
}

/* Rows with tokens dropped, doubled, swapped and replaced. */
static void mutated_outputs(void)
{
    static const char *const tags[] = {T, TE, TC, TCE, K, KE, V, VE};
    uint32_t n_ids = (uint32_t)tokenizer_n_ids(tokenizer);
    for (int round = 0; round < 4000; round++) {
        const struct row *row = &rows[random_below((uint32_t)n_rows)];
        struct ids ids = {0};
        encode(row->in, &ids);
        encode(rows[random_below((uint32_t)n_rows)].in, &ids);
        for (uint32_t k = random_below(4); ids.len && k > 0; k--) {
            size_t at = random_below((uint32_t)ids.len);
            int32_t tag = tokenizer_added_id(tokenizer, tags[random_below(ARRAY_LEN(tags))]);
            switch (random_below(4)) {
            case 0:
                memmove(ids.data + at, ids.data + at + 1, (ids.len - at - 1) * sizeof(*ids.data));
                ids.len--;
                break;
            case 1:
                CHECK_OK(ids_push(&ids, tag));
                break;
            case 2:
                ids.data[at] = tag;
                break;
            case 3:
                ids.data[at] = (int32_t)random_below(n_ids + 2) - 1;
                break;
            }
        }
        check_all_cuts(ids.data, ids.len, (int)random_below(16), NULL, 2);
        ids_finish(&ids);
    }
}

/* Mostly tags, in any order. */
static void random_outputs(void)
{
    static const char *const pieces[] = {T,    TE,  TC,   TCE,  K,      KE,  V,    VE,    TC "f" K,
                                         "s",  "i", " ",  "\n", "1",    "{", "}",  "\"",  VE TCE,
                                         "os", "f", "北", "n",  "null", "<", KE V, "tru", VE K};
    for (int round = 0; round < 6000; round++) {
        struct ids ids = {0};
        for (uint32_t k = random_below(24); k > 0; k--)
            encode(pieces[random_below(ARRAY_LEN(pieces))], &ids);
        check_all_cuts(ids.data, ids.len, (int)random_below(16), NULL, 2);
        ids_finish(&ids);
    }
}

/* ---- the table ---- */

static void out_of(const json_t *v, struct json_out *o)
{
    json_out_raw(o, json_string_value(v), json_string_length(v));
}

/* in and want of a value of f's key. */
static void value_row(const json_t *value, struct json_out *in, struct json_out *want)
{
    REQUIRE(json_array_size(value) == 3);
    raw(in, TC "f" K);
    out_of(json_array_get(value, 0), in);
    raw(in, KE V);
    out_of(json_array_get(value, 1), in);
    raw(in, VE TCE);
    raw(want, "f{f|{\"");
    out_of(json_array_get(value, 0), want);
    raw(want, "\": ");
    out_of(json_array_get(value, 2), want);
    raw(want, "}}");
}

static void events_row(const json_t *out, struct json_out *want)
{
    size_t i;
    json_t *e;
    json_array_foreach (out, i, e) {
        const char *kind = json_string_value(json_array_get(e, 0));
        REQUIRE(kind && strchr("rc", kind[0]));
        bool is_call = !strcmp(kind, "call");
        json_out_raw(want, is_call ? "f{" : kind[0] == 'r' ? "r{" : "c{", 2);
        out_of(json_array_get(e, 1), want);
        if (is_call) {
            raw(want, "|");
            out_of(json_array_get(e, 2), want);
        }
        raw(want, "}");
    }
}

static struct row row_of(const json_t *c)
{
    struct json_out in = {0}, want = {0};
    const json_t *value = json_object_get(c, "value");
    int flags = 0;
    if (value) {
        value_row(value, &in, &want);
    } else {
        out_of(json_object_get(c, "in"), &in);
        events_row(json_object_get(c, "out"), &want);
    }
    flags |= json_is_true(json_object_get(c, "thinking")) ? THINKING : 0;
    flags |= json_is_false(json_object_get(c, "calls")) ? NO_CALLS : 0;
    flags |= json_is_false(json_object_get(c, "schema")) ? NO_SCHEMA : 0;
    flags |= json_is_true(json_object_get(c, "length")) ? LENGTH : 0;
    raw(&want, json_is_true(json_object_get(c, "broken")) ? "!" : "");
    json_out_raw(&in, "", 1);
    json_out_raw(&want, "", 1);
    return (struct row){flags, in.data, want.data};
}

static void table_open(const char *path)
{
    json_t *table = NULL, *cases, *c;
    const char *section;
    size_t i, n = 0;
    CHECK_OK(json_parse_file(path, &json_limits_file, &table));
    REQUIRE(table != NULL);
    tools = json_incref(json_object_get(table, "tools"));
    json_object_foreach (json_object_get(table, "cases"), section, cases)
        n += json_array_size(cases);
    rows = calloc(n, sizeof(*rows));
    json_object_foreach (json_object_get(table, "cases"), section, cases)
        json_array_foreach (cases, i, c)
            rows[n_rows++] = row_of(c);
    json_decref(table);
}

static void table_close(void)
{
    for (size_t i = 0; i < n_rows; i++) {
        free(rows[i].in);
        free(rows[i].want);
    }
    free(rows);
    json_decref(tools);
}

int main(void)
{
    const char *dir = getenv("BATON_DEMO_DIR");
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir ? dir : "deploy/demo-model");
    CHECK_OK(tokenizer_load(path, &tokenizer));
    REQUIRE(tokenizer != NULL);
    const char *table = getenv("BATON_GLM_OUTPUTS");
    table_open(table ? table : "tests/router/text/glm_outputs.json");
    RUN(table_of_outputs);
    RUN(arguments_are_json);
    RUN(strings_stream);
    RUN(text_is_cut);
    RUN(reasoning_is_counted);
    RUN(mutated_outputs);
    RUN(random_outputs);
    table_close();
    tokenizer_destroy(tokenizer);
    return check_done();
}
