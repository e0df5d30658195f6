/* glm_parser_test.c: what each output means, and that it means so however it is cut.
 *
 * Rows are written as the model writes; between two \1 tags are only spelled, not meant. What
 * comes out is written r{reasoning} c{content} f{name|arguments}, in order, with ! at the end if
 * the output broke off inside arguments. Every row is run whole, token by token, with all text
 * after all ids, and at random splits.
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

static const char tools_text[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"object\","
    "\"$defs\":{\"str\":{\"type\":\"string\"},\"loop\":{\"$ref\":\"#/$defs/loop\"},"
    "\"wide\":{\"anyOf\":[{\"$ref\":\"#/$defs/wide\"},{\"$ref\":\"#/$defs/wide\"}]},"
    "\"a/b~c\":{\"type\":\"integer\"},\"more\":{\"properties\":{\"inherited\":{\"type\":"
    "\"string\"}}}},\"allOf\":[{\"$ref\":\"#/$defs/more\"}],"
    "\"properties\":{\"s\":{\"type\":\"string\"},\"t\":{\"type\":\"string\"},"
    "\"i\":{\"type\":\"integer\"},\"n\":{\"type\":\"number\"},\"b\":{\"type\":\"boolean\"},"
    "\"o\":{\"type\":\"object\"},\"a\":{\"type\":\"array\"},\"z\":{\"type\":\"null\"},"
    "\"os\":{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]},"
    "\"ls\":{\"type\":[\"string\",\"null\"]},"
    "\"oi\":{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"null\"}]},"
    "\"si\":{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"integer\"}]},"
    "\"sb\":{\"type\":[\"string\",\"boolean\"]},\"sa\":{\"type\":[\"string\",\"array\"]},"
    "\"so\":{\"type\":[\"string\",\"object\"]},"
    "\"e\":{\"enum\":[\"1\",\"two\"]},\"ei\":{\"enum\":[1,2]},\"em\":{\"enum\":[\"a\",1]},"
    "\"ci\":{\"const\":7},\"cs\":{\"const\":\"7\"},\"r\":{\"$ref\":\"#/$defs/str\"},"
    "\"rp\":{\"$ref\":\"#/$defs/a~1b~0c\"},\"loop\":{\"$ref\":\"#/$defs/loop\"},"
    "\"wide\":{\"$ref\":\"#/$defs/wide\"},\"lost\":{\"$ref\":\"#/$defs/none\"},"
    "\"all\":{\"allOf\":[{\"type\":[\"string\",\"integer\"]},{\"type\":\"string\"}]},"
    "\"ns\":{\"type\":\"string\",\"nullable\":true},\"x\":{},\"p\":{\"properties\":{}},"
    "\"l\":{\"items\":{}},\"odd\":{\"type\":\"date\"}}}}},"
    "{\"type\":\"function\",\"function\":{\"name\":\"g\"}},"
    "{\"type\":\"function\",\"function\":{\"name\":\"h\",\"parameters\":{\"type\":\"object\","
    "\"additionalProperties\":{\"type\":\"string\"}}}}]";

enum { THINKING = 1, NO_CALLS = 2, LENGTH = 4, NO_SCHEMA = 8 };

struct row {
    int flags;
    const char *in, *want;
};

/* A value of one key, of many types. */
#define TYPED(key, value, json)                                                                    \
    {                                                                                              \
        0, F(ARG(key, value)), "f{f|{\"" key "\": " json "}}"                                      \
    }
#define NAME_256                                                                                   \
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"             \
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"             \
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"             \
    "0123456789abcdef"

static const struct row rows[] = {
    /* no call at all */
    {0, "", ""},
    {0, "hello", "c{hello}"},
    {0, "if a < b", "c{if a < b}"},
    {0, "ends in <", "c{ends in <}"},
    {0, "ends in <tool", "c{ends in <tool}"},
    {0, LIT(F("")), "c{" F("") "}"},
    {0, "naïve 北京 👩‍👩‍👧", "c{naïve 北京 👩‍👩‍👧}"},
    {0, "\n\nkept", "c{\n\nkept}"},
    {0, "a" K "b" KE V "c" VE, "c{a" K "b" KE V "c" VE "}"},
    {0, T "x" TE "y", "c{" T "x" TE "y}"},
    {0, "a" TCE "b", "c{ab}"},
    {0, TCE, ""},
    {NO_CALLS, "a" F(ARG("s", "v")) "b", "c{a" F(ARG("s", "v")) "b}"},
    {NO_CALLS, "a" TCE "b", "c{a" TCE "b}"},
    /* reasoning */
    {THINKING, "", ""},
    {THINKING, "only", "r{only}"},
    {THINKING, "a" TE "b", "r{a}c{b}"},
    {THINKING, TE "b", "c{b}"},
    {THINKING, TE, ""},
    {THINKING, "a" TE "\n\nb\n", "r{a}c{b\n}"},
    {THINKING, "a\n" TE " b", "r{a\n}c{ b}"},
    {THINKING, T "a" TE "b", "r{a}c{b}"},
    {THINKING, T T "a" TE "b", "r{a}c{b}"},
    {THINKING, "a" T "b" TE "c", "r{a" T "b}c{c}"},
    {THINKING, "a" TE "b" TE "c", "r{a}c{b" TE "c}"},
    {THINKING, "a" LIT(TE) "b" TE "c", "r{a" TE "b}c{c}"},
    {THINKING, "a" K "b" TCE TE "c", "r{a" K "b" TCE "}c{c}"},
    {THINKING | NO_CALLS, "a" TC "b" TE "c", "r{a" TC "b}c{c}"},
    {THINKING | NO_CALLS, "a" TE "\n" TC "c", "r{a}c{" TC "c}"},
    {THINKING, "a" TE F(""), "r{a}f{f|{}}"},
    {THINKING, "a" TE "\n" F(""), "r{a}f{f|{}}"},
    {THINKING, "a" TE "\nb" F(""), "r{a}c{b}f{f|{}}"},
    /* a call ends reasoning */
    {THINKING, "a" F(""), "r{a}f{f|{}}"},
    {THINKING, F(ARG("s", "v")), "f{f|{\"s\": \"v\"}}"},
    {THINKING, "a" F("") TE "b", "r{a}f{f|{}}c{b}"},
    {THINKING, "a" F("") TE "\n\nb", "r{a}f{f|{}}c{b}"},
    {THINKING, "a" F("") TE "b" TE, "r{a}f{f|{}}c{b" TE "}"},
    {THINKING, "use " TC " here" TE "b", "r{use " TC " here}c{b}"},
    {THINKING, "the " TC " tag opens, " TCE " closes" TE "b",
     "r{the " TC " tag opens, " TCE " closes}c{b}"},
    {THINKING, "a" TC, "r{a" TC "}"},
    {THINKING | LENGTH, "a" TC "f", "r{a" TC "f}"},
    {THINKING, "a" TC TC "f" TCE, "r{a" TC "}f{f|{}}"},
    /* names */
    {0, F(""), "f{f|{}}"},
    {0, CALL("g", ""), "f{g|{}}"},
    {0, CALL("unknown_function", ARG("q", "v")), "f{unknown_function|{\"q\": \"v\"}}"},
    {0, CALL("\nf\n", ARG("s", "v")), "f{f|{\"s\": \"v\"}}"},
    {0, CALL(" f ", ""), "f{f|{}}"},
    {0, CALL("f\n", "\n" ARG("s", "v") "\n"), "f{f|{\"s\": \"v\"}}"},
    {0, CALL("a.b-c_d", ""), "f{a.b-c_d|{}}"},
    {0, CALL("", ""), "c{" TC TCE "}"},
    {0, CALL(" \n", ""), "c{" TC " \n" TCE "}"},
    {0, CALL("", ARG("s", "v")), "c{" TC ARG("s", "v") TCE "}"},
    {0, CALL("two words", ARG("s", "v")) "x", "c{" CALL("two words", ARG("s", "v")) "x}"},
    {0, CALL("f\nx", ""), "c{" CALL("f\nx", "") "}"},
    {0, TC "f" V "x" VE TCE F(""), "c{" TC "f" V "x" VE TCE "}f{f|{}}"},
    {0, TC "f" TC "g" TCE, "c{" TC "f}f{g|{}}"},
    {0, TC TC F(""), "c{" TC TC "}f{f|{}}"},
    {0, TC "f" T TCE TCE, "c{" TC "f" T TCE "}"},
    {0, CALL(NAME_256, ""), "f{" NAME_256 "|{}}"},
    {0, CALL(NAME_256 "x", "") F(""), "c{" CALL(NAME_256 "x", "") "}f{f|{}}"},
    {0, TC LIT(TC "f" TCE), "c{" TC TC "f" TCE "}"},
    {0, CALL(LIT("</arg>"), ""), "f{</arg>|{}}"},
    /* text around, several calls */
    {0, "a" F("") "b", "c{a}f{f|{}}c{b}"},
    {0, "a\n" F("") "\n", "c{a\n}f{f|{}}c{\n}"},
    {0, F("") F(""), "f{f|{}}f{f|{}}"},
    {0, F(ARG("i", "1")) F(ARG("i", "2")), "f{f|{\"i\": 1}}f{f|{\"i\": 2}}"},
    {0, F("") "\n" CALL("g", "") "\n" F(""), "f{f|{}}c{\n}f{g|{}}c{\n}f{f|{}}"},
    {0, "a" F("") "b" CALL("g", ARG("k", "1")) "c", "c{a}f{f|{}}c{b}f{g|{\"k\": 1}}c{c}"},
    {0, F("") TCE, "f{f|{}}"},
    {0, F("") TCE F(""), "f{f|{}}f{f|{}}"},
    {0, F("") "<", "f{f|{}}c{<}"},
    /* strings are verbatim */
    TYPED("s", "v", "\"v\""),
    TYPED("s", "", "\"\""),
    TYPED("s", " a ", "\" a \""),
    TYPED("s", "\na\n", "\"\\na\\n\""),
    TYPED("s", "123", "\"123\""),
    TYPED("s", "true", "\"true\""),
    TYPED("s", "null", "\"null\""),
    TYPED("s", "{\"a\": 1}", "\"{\\\"a\\\": 1}\""),
    TYPED("s", "\"abc\"", "\"\\\"abc\\\"\""),
    TYPED("s", "a\\n\tb", "\"a\\\\n\\tb\""),
    TYPED("s", "a\x7f\x1f", "\"a\x7f\\u001f\""),
    TYPED("s", "x <", "\"x <\""),
    TYPED("s", "x <b></b> &amp;", "\"x <b></b> &amp;\""),
    TYPED("s", "Smith", "\"Smith\""),
    TYPED("s", "北京 👩‍👩‍👧", "\"北京 👩‍👩‍👧\""),
    TYPED("s", LIT(VE TCE), "\"" VE TCE "\""),
    /* tags inside values */
    TYPED("s", "a" VE "b", "\"a" VE "b\""),
    TYPED("s", "a" VE " b", "\"a" VE " b\""),
    TYPED("s", "a" VE VE, "\"a" VE VE "\""),
    TYPED("s", "a" VE "\n" VE, "\"a" VE "\\n" VE "\""),
    TYPED("s", VE, "\"" VE "\""),
    TYPED("s", "a" TCE "b", "\"a" TCE "b\""),
    TYPED("s", "a" TC "b", "\"a" TC "b\""),
    TYPED("s", "a" K "b" KE V "c", "\"a" K "b" KE V "c\""),
    TYPED("s", T "a" TE, "\"" T "a" TE "\""),
    TYPED("s", "a" VE V "b", "\"a" VE V "b\""),
    TYPED("s", "a" VE TC "b", "\"a" VE TC "b\""),
    TYPED("o", "{\"a\": \"" VE "x\"}", "{\"a\": \"" VE "x\"}"),
    {0, F(ARG("s", LIT(ARG("t", "x")))), "f{f|{\"s\": \"" ARG("t", "x") "\"}}"},
    /* other types */
    TYPED("i", "5", "5"),
    TYPED("i", " 5\n", "5"),
    TYPED("i", "-5", "-5"),
    TYPED("i", "\"5\"", "5"),
    TYPED("i", "05", "\"05\""),
    TYPED("i", "five", "\"five\""),
    TYPED("i", "", "\"\""),
    TYPED("i", "123456789012345678901234567890", "123456789012345678901234567890"),
    TYPED("n", "1.50", "1.50"),
    TYPED("n", "1e400", "1e400"),
    TYPED("n", "2", "2"),
    TYPED("n", "1.", "\"1.\""),
    TYPED("n", "-", "\"-\""),
    TYPED("n", "NaN", "\"NaN\""),
    TYPED("b", "true", "true"),
    TYPED("b", "True", "true"),
    TYPED("b", "False", "false"),
    TYPED("b", "\"true\"", "true"),
    TYPED("b", "yes", "\"yes\""),
    TYPED("z", "null", "null"),
    TYPED("z", "None", "null"),
    TYPED("o", "{\"a\": [1, {}]}", "{\"a\": [1, {}]}"),
    TYPED("o", "{\n}", "{\n}"),
    TYPED("o", "\"{\\\"a\\\": 1}\"", "{\"a\": 1}"),
    TYPED("o", "{\"a\": 1}}", "\"{\\\"a\\\": 1}}\""),
    TYPED("o", "{\"a\": 1", "\"{\\\"a\\\": 1\""),
    TYPED("o", "{\"a\": 1, \"a\": 2}", "\"{\\\"a\\\": 1, \\\"a\\\": 2}\""),
    TYPED("a", "[1, 2]", "[1, 2]"),
    TYPED("a", "[\"]]\"]", "[\"]]\"]"),
    TYPED("a", "[[1]]", "[[1]]"),
    TYPED("a", "1], [2", "\"1], [2\""),
    TYPED("a", "\"a\", \"b\"", "\"\\\"a\\\", \\\"b\\\"\""),
    /* strings among other types */
    TYPED("os", "Smith", "\"Smith\""),
    TYPED("os", "null", "null"),
    TYPED("os", "nullable", "\"nullable\""),
    TYPED("os", "n", "\"n\""),
    TYPED("os", " null ", "null"),
    TYPED("os", " a ", "\" a \""),
    TYPED("os", "123", "\"123\""),
    TYPED("os", "\"a\"", "\"\\\"a\\\"\""),
    TYPED("os", "", "\"\""),
    TYPED("os", "None", "\"None\""),
    TYPED("ls", "null", "null"),
    TYPED("ls", "no", "\"no\""),
    TYPED("ns", "null", "null"),
    TYPED("ns", "x", "\"x\""),
    TYPED("oi", "3", "3"),
    TYPED("oi", "null", "null"),
    TYPED("si", "3", "3"),
    TYPED("si", "3x", "\"3x\""),
    TYPED("si", "3.5", "\"3.5\""),
    TYPED("sb", "true", "true"),
    TYPED("sb", "truly", "\"truly\""),
    TYPED("sa", "[1]", "[1]"),
    TYPED("sa", "[1", "\"[1\""),
    TYPED("so", "{}", "{}"),
    TYPED("so", "[]", "\"[]\""),
    TYPED("e", "1", "\"1\""),
    TYPED("ei", "1", "1"),
    TYPED("em", "1", "1"),
    TYPED("em", "a", "\"a\""),
    TYPED("ci", "7", "7"),
    TYPED("cs", "7", "\"7\""),
    TYPED("r", "7", "\"7\""),
    TYPED("rp", "7", "7"),
    TYPED("all", "7", "\"7\""),
    TYPED("inherited", "7", "\"7\""),
    TYPED("p", "\"{}\"", "{}"),
    TYPED("l", "\"[]\"", "[]"),
    /* no schema, or none that says something */
    TYPED("x", "7", "7"),
    TYPED("x", "\"a\"", "\"a\""),
    TYPED("x", "a b", "\"a b\""),
    TYPED("x", " a", "\" a\""),
    TYPED("x", "True", "true"),
    TYPED("x", "Truer", "\"Truer\""),
    TYPED("x", "None", "null"),
    TYPED("x", "{\"k\": null}", "{\"k\": null}"),
    TYPED("x", "{k}", "\"{k}\""),
    TYPED("loop", "7", "7"),
    TYPED("wide", "7", "7"),
    TYPED("lost", "7", "7"),
    TYPED("odd", "7", "7"),
    TYPED("nowhere", "7", "7"),
    {0, CALL("g", ARG("k", "7")), "f{g|{\"k\": 7}}"},
    {0, CALL("h", ARG("k", "7")), "f{h|{\"k\": \"7\"}}"},
    {NO_SCHEMA, F(ARG("s", "7")), "f{f|{\"s\": 7}}"},
    /* several pairs, whitespace, mistakes */
    {0, F(ARG("s", "a") ARG("i", "1")), "f{f|{\"s\": \"a\", \"i\": 1}}"},
    {0, F("\n" ARG("s", "a") "\n" ARG("i", "1") "\n"), "f{f|{\"s\": \"a\", \"i\": 1}}"},
    {0, F(K "s" KE "\n" V "a" VE), "f{f|{\"s\": \"a\"}}"},
    {0, F(ARG(" s\n", "1")), "f{f|{\"s\": \"1\"}}"},
    {0, F(ARG("a \"b\"", "1")), "f{f|{\"a \\\"b\\\"\": 1}}"},
    {0, F(ARG("", "1")), "f{f|{\"\": 1}}"},
    {0, F(ARG("s", "a") ARG("s", "b")), "f{f|{\"s\": \"a\"}}"},
    {0, F(ARG("i", "1") ARG("s", "a") ARG("i", "2")), "f{f|{\"i\": 1, \"s\": \"a\"}}"},
    {0, F(ARG("i", "1")) F(ARG("i", "1")), "f{f|{\"i\": 1}}f{f|{\"i\": 1}}"},
    {0, F(K "s" KE), "f{f|{\"s\": null}}"},
    {0, F(K "s"), "f{f|{\"s\": null}}"},
    {0, F(K), "f{f|{}}"},
    {0, F(K "s" KE ARG("i", "1")), "f{f|{\"s\": null, \"i\": 1}}"},
    {0, F(K "s" V "a" VE), "f{f|{\"s\": \"a\"}}"},
    {0, F(K "s" KE " a" VE), "f{f|{\"s\": \"a\"}}"},
    {0, F(K "s" KE VE), "f{f|{\"s\": \"\"}}"},
    {0, F(K "s" KE TE "a" VE), "f{f|{\"s\": \"" TE "a\"}}"},
    {0, F(ARG("s" T, "1")), "f{f|{\"s" T "\": 1}}"},
    /* the end comes too early */
    {LENGTH, TC, "c{" TC "}"},
    {LENGTH, "a" TC "f", "c{a" TC "f}"},
    {0, TC "f\n", "c{" TC "f\n}"},
    {LENGTH, TC "f" K, "f{f|{}!"},
    {LENGTH, TC "f" K "s", "f{f|{\"s}!"},
    {LENGTH, TC "f" K "s" KE, "f{f|{\"s\": }!"},
    {LENGTH, TC "f" K "s" KE V, "f{f|{\"s\": \"}!"},
    {LENGTH, TC "f" K "s" KE V "rm -rf", "f{f|{\"s\": \"rm -rf}!"},
    {0, TC "f" K "s" KE V "a", "f{f|{\"s\": \"a}!"},
    {LENGTH, TC "f" K "i" KE V "4", "f{f|{\"i\": 4}!"},
    {LENGTH, TC "f" K "i" KE V "4}", "f{f|{\"i\": \"4}}!"},
    {LENGTH, TC "f" K "o" KE V "{\"a\": [", "f{f|{\"o\": {\"a\": [}!"},
    {LENGTH, TC "f" ARG("s", "a"), "f{f|{\"s\": \"a\"}!"},
    {0, TC "f" ARG("s", "a"), "f{f|{\"s\": \"a\"}}"},
    {0, TC "f" ARG("i", "1") "\n", "f{f|{\"i\": 1}}"},
    {LENGTH, TC "f" ARG("i", "1") K "t" KE V "x", "f{f|{\"i\": 1, \"t\": \"x}!"},
    {LENGTH, TC "f" ARG("i", "1") K "i" KE V "x", "f{f|{\"i\": 1}!"},
    {0, F("") TC "g", "f{f|{}}c{" TC "g}"},
    {LENGTH, F(ARG("i", "1")) TC "f" K "s" KE V "x", "f{f|{\"i\": 1}}f{f|{\"s\": \"x}!"},
    {0, TC "f" K "s" KE V "a" TCE, "f{f|{\"s\": \"a" TCE "}!"},
};

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
    CHECK(ARRAY_LEN(rows) >= 120);
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        struct ids ids = {0};
        encode(rows[i].in, &ids);
        check_all_cuts(ids.data, ids.len, rows[i].flags, rows[i].want, 12);
        ids_finish(&ids);
    }
}

/* Complete arguments are JSON (of numbers, jansson takes only those that fit). */
static void arguments_are_json(void)
{
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        const char *from = strchr(rows[i].want, '|'), *end = strrchr(rows[i].want, '}');
        if (strncmp(rows[i].want, "f{", 2) || !from || strchr(from, '!') || strstr(from, "}f{") ||
            strstr(from, "}c{") || strstr(from, "1e400") || strstr(from, "123456789012"))
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
        const struct row *row = &rows[random_below(ARRAY_LEN(rows))];
        struct ids ids = {0};
        encode(row->in, &ids);
        encode(rows[random_below(ARRAY_LEN(rows))].in, &ids);
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

int main(void)
{
    const char *dir = getenv("BATON_DEMO_DIR");
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", dir ? dir : "deploy/demo-model");
    CHECK_OK(tokenizer_load(path, &tokenizer));
    REQUIRE(tokenizer != NULL);
    CHECK_OK(json_parse(tools_text, sizeof(tools_text) - 1, &json_limits_request, &tools));
    REQUIRE(tools != NULL);
    RUN(table_of_outputs);
    RUN(arguments_are_json);
    RUN(strings_stream);
    RUN(text_is_cut);
    RUN(reasoning_is_counted);
    RUN(mutated_outputs);
    RUN(random_outputs);
    json_decref(tools);
    tokenizer_destroy(tokenizer);
    return check_done();
}
