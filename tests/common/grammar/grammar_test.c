/* What grammars let through, keep out and refuse; random schemas and random walks against a second
 * validator; masks against single steps. */
#include "common/grammar/grammar.h"

#include "check.h"
#include "common/base/json.h"
#include "common/grammar/random_schema.h"
#include "common/grammar/validate.h"
#include "common/grammar/words.h"

static struct grammar_vocab *vocab;
static struct grammar *compile(const char *spec)
{
    struct grammar *g = NULL;
    CHECK_OK(grammar_compile(spec, strlen(spec), &g));
    if (!g)
        fprintf(stderr, "  for %s\n", spec);
    return g;
}

static struct grammar *compile_schema(const char *schema)
{
    struct json_out spec = {0};
    json_out_fmt(&spec, "{\"schema\":%s}", schema);
    struct grammar *g = compile(spec.data);
    json_out_finish(&spec);
    return g;
}

/* Only a complete output may end. */
static bool is_complete(struct matcher *m, struct grammar_state s)
{
    bool fits = false;
    CHECK_OK(matcher_accept(m, &s, WORDS_EOS, &fits));
    return fits;
}

/* "<tag>" in text becomes the tag's id, everything else bytes. */
static bool accepts(const struct grammar *g, const char *text)
{
    OWNED(matcher) m = NULL;
    CHECK_OK(matcher_create(g, vocab, &m));
    if (!m)
        return false;
    struct grammar_state s = matcher_start(m);
    for (size_t i = 0; text[i];) {
        int32_t id = (uint8_t)text[i];
        size_t n = 1;
        for (int tag = 0; tag < GRAMMAR_N_TAGS; tag++)
            if (!strncmp(text + i, grammar_tag_text[tag], strlen(grammar_tag_text[tag]))) {
                id = WORDS_TAG + tag;
                n = strlen(grammar_tag_text[tag]);
            }
        bool fits;
        CHECK_OK(matcher_accept(m, &s, id, &fits));
        if (!fits)
            return false;
        i += n;
    }
    return is_complete(m, s);
}

struct sample {
    const char *schema;
    const char *yes[8], *no[12];
};

/* clang-format off */
static const struct sample samples[] = {
    {"{\"type\":\"string\"}", {"\"\"", "\"a b\"", "\"\\n\\u00e9\\\"\"", "\"\xc3\xa9\xe4\xb8\xad\"", "\"\\ud83d\\ude00\""},
        {"", "a", "\"", "\"\n\"", "\"\xc3\"", "\"\\x\"", "\"a\" ", " \"a\"", "\"\\ud83d\"", "\"\\u0000\"", "1"}},
    {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", {"\"ab\"", "\"\xc3\xa9\xe4\xb8\xad\\n\""}, {"\"a\"", "\"abcd\"", "\"\""}},
    {"{\"type\":\"integer\"}", {"0", "-12", "123456789012345678"}, {"01", "1.0", "1e3", "-", "+1", "1234567890123456789"}},
    {"{\"type\":\"number\"}", {"0", "-1.5", "2e10", "0.25E-3", "-0"}, {".5", "1.", "1e", "00", "1e400", "NaN"}},
    {"{\"type\":\"integer\",\"minimum\":3,\"maximum\":120}", {"3", "9", "10", "99", "120", "100"}, {"2", "121", "0", "-5", "1000", "200"}},
    {"{\"type\":\"integer\",\"exclusiveMinimum\":-3,\"maximum\":2}", {"-2", "-1", "0", "2"}, {"-3", "3", "-10", "-0"}},
    {"{\"type\":\"integer\",\"minimum\":-20,\"exclusiveMaximum\":-7}", {"-20", "-8", "-10"}, {"-7", "-21", "0", "8"}},
    {"{\"type\":\"number\",\"minimum\":0.5,\"exclusiveMaximum\":10}", {"0.5", "0.50", "0.7", "9.99", "1"}, {"0.4", "0.49", "10", "10.0", "0", "-1", "11"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":0,\"maximum\":1}", {"1", "1.0", "0.001"}, {"0", "0.0", "1.1", "1e0"}},
    {"{\"type\":\"number\",\"minimum\":-1.25,\"maximum\":-0.5}", {"-1.25", "-0.5", "-1", "-0.75"}, {"-1.26", "-0.49", "0", "-2"}},
    {"{\"type\":[\"boolean\",\"null\"]}", {"true", "false", "null"}, {"0", "tru", "nulll"}},
    {"{\"enum\":[\"a\",\"ab\",1,null,{\"k\":[1]}]}", {"\"a\"", "\"ab\"", "1", "null", "{\"k\": [1]}", "{\"k\":[1]}"}, {"\"b\"", "\"abc\"", "11", "{}"}},
    {"{\"type\":\"integer\",\"enum\":[1.0,2.5,3]}", {"1.0", "3"}, {"2.5", "1.5"}},
    {"{\"const\":\"x\\\"y\"}", {"\"x\\\"y\""}, {"\"x\"", "\"xy\""}},
    {"{\"enum\":[1,20,\"long\",\"no\"],\"minimum\":5,\"minLength\":3}", {"20", "\"long\""}, {"1", "\"no\""}},
    {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"boolean\"}},\"required\":[\"a\"]}",
        {"{\"a\":1}", "{ \"a\": 1, \"b\": true }", "{\n  \"a\": 1\n}"}, {"{}", "{\"b\":true}", "{\"b\":true,\"a\":1}", "{\"a\":1,}", "{\"a\":1,\"c\":2}", "{,\"a\":1}", "{\"a\":\"1\"}", "{\"a\":1,\"a\":1}"}},
    {"{\"type\":\"object\",\"properties\":{\"ab\":{\"type\":\"integer\"}},\"additionalProperties\":{\"type\":\"null\"}}",
        {"{}", "{\"ab\":1}", "{\"ab\":1,\"x\":null}", "{\"abc\":null}", "{\"a\":null}", "{\"\xc3\xa9\":null}", "{\"x\\u0061\":null}"},
        {"{\"ab\":null}", "{\"ab\":1,\"ab\":null}", "{\"\\u0061b\":null}", "{\"x\":1}", "{\"a\\u0062\":null}", "{\"ab\":1,}"}},
    {"{\"type\":\"object\"}", {"{}", "{\"a\":[1,{\"b\":null}]}", "{\"a\":1,\"b\":\"\"}"}, {"[]", "1", "{a:1}"}},
    {"{\"type\":\"object\",\"maxProperties\":1,\"minProperties\":1}", {"{\"a\":1}"}, {"{}", "{\"a\":1,\"b\":1}"}},
    {"{\"type\":\"object\",\"required\":[\"k\"]}", {"{\"k\":1}", "{\"k\":1,\"z\":2}"}, {"{}", "{\"z\":1}"}},
    {"{\"type\":\"object\",\"properties\":{}}", {"{}", "{ }"}, {"{\"a\":1}"}},
    {"{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":1,\"maxItems\":3}", {"[1]", "[1,2]", "[ 1, 2, 3 ]"}, {"[]", "[1,2,3,4]", "[1,]", "[\"a\"]"}},
    {"{\"type\":\"array\",\"items\":{\"type\":\"integer\"}}", {"[]", "[1]", "[1,2,3,4,5]"}, {"[,]", "[1 ,2]"}},
    {"{\"type\":\"array\",\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"string\"}],\"items\":{\"type\":\"null\"},\"maxItems\":3}",
        {"[]", "[1]", "[1,\"a\"]", "[1,\"a\",null]"}, {"[\"a\"]", "[1,2]", "[1,\"a\",1]", "[1,\"a\",null,null]"}},
    {"{\"type\":\"array\",\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"string\"}],\"items\":false,\"minItems\":2}", {"[1,\"a\"]"}, {"[]", "[1]", "[1,\"a\",1]"}},
    {"{\"type\":\"array\",\"items\":false}", {"[]"}, {"[1]"}},
    {"{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"string\",\"maxLength\":1}]}", {"12", "\"a\"", "\"\""}, {"\"ab\"", "null"}},
    {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"string\"}]}", {"12", "\"a\""}, {"null"}},
    {"{\"oneOf\":[{\"type\":\"object\",\"properties\":{\"t\":{\"const\":\"x\"},\"n\":{\"type\":\"integer\"}},\"required\":[\"t\"]},"
        "{\"type\":\"object\",\"properties\":{\"t\":{\"const\":\"y\"}},\"required\":[\"t\"]}]}", {"{\"t\":\"x\"}", "{\"t\":\"x\",\"n\":1}", "{\"t\":\"y\"}"}, {"{\"t\":\"y\",\"n\":1}", "{\"t\":\"z\"}", "{}"}},
    {"{\"allOf\":[{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"]},{\"properties\":{\"b\":{\"type\":\"integer\"},\"a\":{\"minimum\":5}}}]}",
        {"{\"a\":5}", "{\"a\":7,\"b\":1}"}, {"{\"a\":4}", "{\"b\":1}"}},
    {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"integer\"}},\"anyOf\":[{\"required\":[\"a\"]},{\"required\":[\"b\"]}]}",
        {"{\"a\":1}", "{\"b\":1}", "{\"a\":1,\"b\":1}"}, {"{}"}},
    {"{\"$ref\":\"#/$defs/n\",\"$defs\":{\"n\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/n\"},{\"type\":\"null\"}]}},\"required\":[\"v\"]}}}",
        {"{\"v\":1}", "{\"v\":1,\"next\":null}", "{\"v\":1,\"next\":{\"v\":2,\"next\":{\"v\":3}}}"}, {"{\"next\":null}", "{\"v\":1,\"next\":{}}"}},
    {"{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}", {"[]", "[[],[[]]]"}, {"[1]", "[[]"}},
    {"{\"type\":\"object\",\"properties\":{\"c\":{\"allOf\":[{\"$ref\":\"#\"},{\"required\":[\"c\"]}]}}}", {"{}"}, {"{\"c\":{}}"}},
    {"{\"type\":\"string\",\"pattern\":\"^[a-c]+\\\\d{2,3}$\"}", {"\"a12\"", "\"cab123\""}, {"\"12\"", "\"a1\"", "\"a1234\"", "\"d12\""}},
    {"{\"type\":\"string\",\"pattern\":\"b|^x\"}", {"\"abc\"", "\"b\"", "\"xy\""}, {"\"ac\"", "\"ax\"", "\"\""}},
    {"{\"type\":\"string\",\"pattern\":\"^(?:a|[^b-z\\\"])?\\\\.$\"}", {"\"a.\"", "\".\"", "\"\xc3\xa9.\"", "\"\\n.\""}, {"\"b.\"", "\"a\"", "\"\\\".\""}},
    {"{\"type\":\"string\",\"pattern\":\"^\\\\\\\\\\\"[\\u00e0-\\u4e2d]$\"}", {"\"\\\\\\\"\xc3\xa9\"", "\"\\\\\\\"\xe4\xb8\xad\""}, {"\"\\\\\\\"a\"", "\"\\\\\\\"\xe4\xb8\xae\""}},
    {"{\"type\":\"string\",\"pattern\":\"^[a-z]+$\",\"minLength\":2,\"maxLength\":3}", {"\"ab\"", "\"abc\""}, {"\"a\"", "\"abcd\"", "\"a1\""}},
    {"{\"type\":\"string\",\"pattern\":\"^x[a-z]*\\\\d{2}$\",\"maxLength\":5}", {"\"x12\"", "\"xab12\""}, {"\"xabc12\"", "\"x1\""}},
    {"{\"type\":\"string\",\"pattern\":\"^ab\",\"minLength\":1,\"maxLength\":4}", {"\"ab\"", "\"abcd\""}, {"\"abcde\"", "\"a\"", "\"xab\""}},
    {"{\"type\":\"string\",\"pattern\":\"ab$\",\"minLength\":3}", {"\"xab\"", "\"xxab\""}, {"\"ab\"", "\"abx\""}},
    {"{\"type\":\"string\",\"pattern\":\"^(?:a|bc)$\",\"minLength\":1,\"maxLength\":9}", {"\"a\"", "\"bc\""}, {"\"b\"", "\"\""}},
    {"{\"type\":\"string\",\"format\":\"uuid\",\"maxLength\":36}", {"\"123e4567-e89b-12d3-a456-426614174000\""}, {"\"1\""}},
    {"{\"type\":\"string\",\"format\":\"date-time\"}", {"\"2024-02-28T23:59:59Z\"", "\"1999-12-31T00:00:00.5+01:00\""}, {"\"2024-02-30T00:00:00Z\"", "\"2024-13-01T00:00:00Z\"", "\"2024-01-01\""}},
    {"{\"type\":\"string\",\"format\":\"uuid\"}", {"\"123e4567-e89b-12d3-a456-426614174000\""}, {"\"123e4567e89b12d3a456426614174000\""}},
    {"{\"type\":\"string\",\"format\":\"ipv4\"}", {"\"0.10.200.255\""}, {"\"256.1.1.1\"", "\"1.1.1\"", "\"01.1.1.1\""}},
    {"{}", {"1", "\"a\"", "[]", "{\"a\":{}}", "null"}, {"", "[1,]", "{\"a\"}"}},
    {"true", {"1", "{}"}, {"x"}},
    {"{\"title\":\"T\",\"description\":\"D\",\"default\":1,\"x-note\":1,\"uniqueItems\":false}", {"1"}, {"x"}},
};
/* clang-format on */

static void values_of_schemas(void)
{
    for (size_t i = 0; i < ARRAY_LEN(samples); i++) {
        OWNED(grammar) g = compile_schema(samples[i].schema);
        if (!g)
            continue;
        for (size_t k = 0; k < ARRAY_LEN(samples[i].yes) && samples[i].yes[k]; k++)
            if (!accepts(g, samples[i].yes[k])) {
                CHECK(!"accepted");
                fprintf(stderr, "  %s\n  %s\n", samples[i].schema, samples[i].yes[k]);
            }
        for (size_t k = 0; k < ARRAY_LEN(samples[i].no) && samples[i].no[k]; k++)
            if (accepts(g, samples[i].no[k])) {
                CHECK(!"kept out");
                fprintf(stderr, "  %s\n  %s\n", samples[i].schema, samples[i].no[k]);
            }
    }
}

static void schemas_that_are_refused(void)
{
    /* clang-format off */
    static const struct {
        const char *schema, *why;
    } bad[] = {
        {"{\"not\":{}}", "\"not\" is not supported"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"if\":{}}}}", "properties.a: \"if\" is not supported"},
        {"{\"type\":\"array\",\"items\":{\"contains\":1}}", "items: \"contains\" is not supported"},
        {"{\"patternProperties\":{}}", "\"patternProperties\" is not supported"},
        {"{\"type\":\"array\",\"uniqueItems\":true}", "\"uniqueItems\" is not supported"},
        {"{\"type\":\"integer\",\"multipleOf\":3}", "\"multipleOf\" is not supported"},
        {"{\"frobnicate\":1}", "\"frobnicate\" is not supported"},
        {"{\"type\":\"string\",\"format\":\"hostname\"}", "\"format\" \"hostname\" is not supported"},
        {"{\"type\":\"str\"}", "\"type\" has no type named \"str\""},
        {"{\"type\":5}", "\"type\" has a value that it cannot have"},
        {"{\"minLength\":-1}", "\"minLength\" has a value that it cannot have"},
        {"{\"properties\":{\"a\":1}}", "\"properties\" has a value that it cannot have"},
        {"{\"items\":[{}]}", "\"items\" as a list is not supported: use prefixItems"},
        {"{\"$ref\":\"#/$defs/x\"}", "\"$ref\" \"#/$defs/x\" does not lead to a schema in this one"},
        {"{\"$ref\":\"http://x/y\"}", "\"$ref\" \"http://x/y\" does not lead to a schema in this one"},
        {"{\"$ref\":\"#\"}", "no value can match the schema"},
        {"{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}", "$ref leads to itself without any content between"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}", "no value can match the schema"},
        {"false", "no value can match the schema"},
        {"{\"type\":\"integer\",\"minimum\":3,\"maximum\":2}", "no value can match the schema"},
        {"{\"type\":\"string\",\"minLength\":3,\"maxLength\":2}", "no value can match the schema"},
        {"{\"oneOf\":[{\"type\":\"number\"},{\"type\":\"integer\"}]}", "\"oneOf\": branches 0 and 1 may both match, so it cannot be enforced: use anyOf"},
        {"{\"oneOf\":[{\"enum\":[1.0]},{\"type\":\"integer\"}]}", "\"oneOf\": branches 0 and 1 may both match, so it cannot be enforced: use anyOf"},
        {"{\"type\":\"string\",\"pattern\":\"(?=a)\"}", "\"pattern\" (?=a): look-around or a flag is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"(a)\\\\1\"}", "\"pattern\" (a)\\1: \\1 is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"a(\"}", "\"pattern\" a(: an unfinished group is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"a\",\"maxLength\":3}", "\"pattern\" a beside this \"minLength\" or \"maxLength\" is not supported"},
        {"{\"type\":\"string\",\"pattern\":\"^[a-z]{5,}$\",\"maxLength\":3}", "no value can match the schema"},
        {"{\"enum\":[1],\"pattern\":\"a\"}", "\"enum\" or \"const\" beside \"pattern\" is not supported"},
        {"{\"type\":\"object\",\"minProperties\":2}", "\"minProperties\" is only supported where the declared properties settle it, or without any"},
    };
    /* clang-format on */
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        struct json_out spec = {0};
        struct grammar *g = NULL;
        json_out_fmt(&spec, "{\"schema\":%s}", bad[i].schema);
        enum err err = grammar_compile(spec.data, spec.len, &g);
        CHECK_INT(err, ERR_INVALID);
        if (err != ERR_OK)
            CHECK_STR(err_text(err), bad[i].why);
        else
            fprintf(stderr, "  %s\n", bad[i].schema);
        grammar_destroy(g);
        json_out_finish(&spec);
    }
}

static void too_much_is_refused(void)
{
    struct json_out o = {0};
    struct grammar *g = NULL;
    json_out_fmt(&o, "{\"schema\":{\"enum\":[\"");
    for (int i = 0; i < 300000; i++)
        json_out_raw(&o, "x", 1);
    json_out_fmt(&o, "\"]}}");
    CHECK_INT(grammar_compile(o.data, o.len, &g), ERR_TOO_LARGE);
    o.len = 0;
    json_out_fmt(&o, "{\"schema\":"); /* deep */
    for (int i = 0; i < 100; i++)
        json_out_fmt(&o, "{\"items\":");
    json_out_fmt(&o, "{}");
    for (int i = 0; i < 101; i++)
        json_out_raw(&o, "}", 1);
    CHECK_INT(grammar_compile(o.data, o.len, &g), ERR_TOO_LARGE);
    o.len = 0;
    json_out_fmt(&o, "{\"schema\":{\"allOf\":["); /* 2^20 combinations */
    for (int i = 0; i < 20; i++)
        json_out_fmt(&o, "%s{\"anyOf\":[{\"minimum\":%d},{\"maximum\":%d}]}", i ? "," : "", i,
                     i + 50);
    json_out_fmt(&o, "]}}");
    CHECK_INT(grammar_compile(o.data, o.len, &g), ERR_INVALID);
    o.len = 0; /* texts and names as long as a grammar may be */
    json_out_fmt(&o, "{\"schema\":{\"enum\":[");
    for (int k = 0; k < 2; k++) {
        json_out_fmt(&o, "%s\"%d", k ? "," : "", k);
        for (int i = 0; i < 60000; i++)
            json_out_raw(&o, "y", 1);
        json_out_fmt(&o, "%d\"", k);
    }
    json_out_fmt(&o, "]}}");
    CHECK_OK(grammar_compile(o.data, o.len, &g));
    grammar_destroy(g);
    g = NULL;
    for (int i = 0; i < (int)o.len; i++) /* the same prefix in both */
        o.data[i] = o.data[i] == '1' ? '0' : o.data[i];
    o.data[o.len - 5] = '1';
    CHECK_OK(grammar_compile(o.data, o.len, &g));
    grammar_destroy(g);
    g = NULL;
    o.len = 0;
    json_out_fmt(&o, "{\"schema\":{\"additionalProperties\":{},\"properties\":{\"");
    for (int i = 0; i < 100000; i++)
        json_out_raw(&o, "n", 1);
    json_out_fmt(&o, "\":{}}}}");
    CHECK_INT(grammar_compile(o.data, o.len, &g), ERR_INVALID);
    o.len = 0;
    json_out_fmt(&o, "{\"schema\":{\"required\":[");
    for (int i = 0; i < 1001; i++)
        json_out_fmt(&o, "%s\"%d\"", i ? "," : "", i);
    json_out_fmt(&o, "]}}");
    CHECK_INT(grammar_compile(o.data, o.len, &g), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "\"required\" has more than 1000 entries");
    o.len = 0; /* recursion whose schemas grow for ever */
    json_out_fmt(
        &o, "{\"schema\":{\"type\":\"object\",\"properties\":{\"c\":{\"allOf\":[{\"$ref\":\"#\"},"
            "{\"properties\":{\"c\":{\"required\":[\"x\"]}}}]}}}}");
    CHECK(grammar_compile(o.data, o.len, &g) == ERR_OK || g == NULL);
    grammar_destroy(g);
    json_out_finish(&o);
}

/* ---- calls ---- */

static void tool_calls(void)
{
    OWNED(grammar)
    g = compile("{\"tools\":[{\"name\":\"now\"},{\"name\":\"get\",\"parameters\":{\"type\":"
                "\"object\",\"properties\":{"
                "\"city\":{\"type\":\"string\"},\"days\":{\"type\":\"integer\",\"minimum\":1},"
                "\"unit\":{\"enum\":[\"c\",\"f\"]},\"tag\":{\"type\":[\"string\",\"null\"]},"
                "\"mix\":{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"integer\",\"maximum\":9},{"
                "\"type\":\"array\"}]}},"
                "\"required\":[\"city\"]}}]}");
    if (!g)
        return;
#define PAIR(k, v)   "<arg_key>" k "</arg_key><arg_value>" v "</arg_value>"
#define CALL(inside) "<tool_call>" inside "</tool_call>"
    static const char *const yes[] = {
        CALL("now"),
        CALL("get" PAIR("city", "New \"York\"\n<b>")),
        CALL("get" PAIR("city", "") PAIR("days", "12") PAIR("unit", "f")),
        CALL("get" PAIR("city", "x") PAIR("tag", "null")),
        CALL("get" PAIR("city", "x") PAIR("mix", "9")),
        CALL("get" PAIR("city", "x") PAIR("mix", "word 12")),
        CALL("get" PAIR("city", "x") PAIR("mix", "[1]")),
        CALL("now") CALL("now") CALL("get" PAIR("city", "a")),
    };
    static const char *const no[] = {
        "",
        "text",
        "now",
        CALL("get"),
        CALL("got"),
        CALL("now" PAIR("a", "b")),
        CALL("get" PAIR("days", "1") PAIR("city", "x")),
        CALL("get" PAIR("city", "x") PAIR("days", "0")),
        CALL("get" PAIR("city", "x") PAIR("days", "\"1\"")),
        CALL("get" PAIR("city", "x") PAIR("unit", "k")),
        CALL("get" PAIR("city", "x") PAIR("mix", "12")),
        CALL("get" PAIR("city", "x") PAIR("mix", "[1")),
        CALL("get" PAIR("city", "x") PAIR("city", "y")),
        CALL("get" PAIR("city", "\xff")),
        CALL("get" PAIR("city", "x") "<arg_key>"),
        CALL("now") "\n",
    };
    for (size_t i = 0; i < ARRAY_LEN(yes); i++)
        if (!accepts(g, yes[i])) {
            CHECK(!"accepted");
            fprintf(stderr, "  %s\n", yes[i]);
        }
    for (size_t i = 0; i < ARRAY_LEN(no); i++)
        if (accepts(g, no[i])) {
            CHECK(!"kept out");
            fprintf(stderr, "  %s\n", no[i]);
        }
}

static void around_calls(void)
{
    static const char one[] =
        "{\"one_call\":true,\"tools\":[{\"name\":\"f\",\"parameters\":true}]}";
    static const char free_text[] = "{\"free\":true,\"tools\":[{\"name\":\"f\"}]}";
    static const char thinking[] = "{\"reasoning\":true,\"tools\":[{\"name\":\"f\"}]}";
    static const char both[] =
        "{\"reasoning\":true,\"schema\":{\"type\":\"integer\"},\"tools\":[{\"name\":\"f\"}]}";
    static const char json[] = "{\"reasoning\":true,\"schema\":{\"type\":\"integer\"}}";
    static const struct {
        const char *spec, *text;
        bool fits;
    } cases[] = {
        {one, CALL("f"), true},
        {one, CALL("f" PAIR("any", "{}") PAIR("x.y-z", "")), true},
        {one, CALL("f" PAIR(" a", "1")), false},
        {one, CALL("f") CALL("f"), false},
        {free_text, "", true},
        {free_text, "some text", true},
        {free_text, "text " CALL("f"), true},
        {free_text, "text <tool_call>", false},
        {free_text, CALL("g"), false},
        {thinking, "well", false},
        {thinking, "well</think>" CALL("f"), true},
        {thinking, "well" CALL("f"), true},
        {thinking, "well</think>no", false},
        {thinking, "<arg_key>?</think>" CALL("f"), true},
        {both, "hm</think>12", true},
        {both, "hm</think>\n12", true},
        {both, "hm</think> 12", false},
        {both, "hm</think>" CALL("f"), true},
        {both, "hm", false},
        {both, "12", false},
        {json, "hm" CALL("f"), false},
        {json, "hm</think>-1", true},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        OWNED(grammar) g = compile(cases[i].spec);
        bool fits = g && accepts(g, cases[i].text);
        CHECK_INT(fits, cases[i].fits);
        if (fits != cases[i].fits)
            fprintf(stderr, "  %s\n  %s\n", cases[i].spec, cases[i].text);
    }
    static const struct {
        const char *spec, *why;
    } bad[] = {
        {"[]", "a grammar must be an object"},
        {"{}", "no value can match the schema"},
        {"{\"tools\":[]}", "tools has 0 entries, must have between 1 and 1024"},
        {"{\"tools\":[{\"name\":\"a b\"}]}", "tool \"a b\": a name cannot have a space"},
        {"{\"tools\":[{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":{\"p\":{"
         "\"not\":{}}}}}]}",
         "tool f.p: \"not\" is not supported"},
    };
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        struct grammar *g = NULL;
        enum err err = grammar_compile(bad[i].spec, strlen(bad[i].spec), &g);
        CHECK_INT(err, ERR_INVALID);
        if (err != ERR_OK)
            CHECK_STR(err_text(err), bad[i].why);
        grammar_destroy(g);
    }
}

/* ---- random schemas, random walks ---- */

static const char *token_text(int32_t id, char byte[2])
{
    byte[0] = (char)id;
    byte[1] = 0;
    if (id < 256)
        return byte;
    return id > WORDS_OTHER                      ? words_more[id - WORDS_OTHER - 1]
           : id >= WORDS_TAG && id < WORDS_OTHER ? grammar_tag_text[id - WORDS_TAG]
                                                 : "";
}

/* Draws ids that the masks allow until the output ends; false if it takes too long. Ends are
 * preferred, or random text would never see one. */
static bool walk(struct matcher *m, struct json_out *text)
{
    struct grammar_state s = matcher_start(m);
    int32_t allowed[WORDS_OTHER + 100], ends[WORDS_OTHER + 100];
    for (int step = 0; step < 1500; step++) {
        const uint32_t *mask;
        CHECK_OK(matcher_mask(m, s, &mask));
        uint32_t n = 0, n_ends = 0;
        for (int32_t id = 0; id < (int32_t)(WORDS_OTHER + 1 + ARRAY_LEN(words_more)); id++) {
            char byte[2];
            if (!(mask[id / 32] >> id % 32 & 1))
                continue;
            allowed[n++] = id;
            if (id == WORDS_EOS || strchr("\"]}", token_text(id, byte)[0]))
                ends[n_ends++] = id;
        }
        REQUIRE(n > 0);
        int32_t id = n_ends && draw(3) ? ends[draw(n_ends)] : allowed[draw(n)];
        bool fits;
        CHECK_OK(matcher_accept(m, &s, id, &fits));
        CHECK(fits);
        if (id == WORDS_EOS)
            return true;
        char byte[2];
        const char *more = token_text(id, byte);
        json_out_raw(text, more, id < 256 ? 1 : strlen(more));
    }
    return false;
}

/* A matcher that is asked for masks, and one that only ever reads bytes and tags. */
struct twin {
    struct grammar *g;
    struct matcher *m, *bytes;
    struct grammar_state s, t;
};

static struct twin twin_open(const char *spec)
{
    struct twin w = {.g = compile(spec)};
    REQUIRE(w.g != NULL);
    CHECK_OK(matcher_create(w.g, vocab, &w.m));
    CHECK_OK(matcher_create(w.g, vocab, &w.bytes));
    w.s = matcher_start(w.m);
    w.t = matcher_start(w.bytes);
    return w;
}

static void twin_close(struct twin *w)
{
    matcher_destroy(w->m);
    matcher_destroy(w->bytes);
    grammar_destroy(w->g);
}

/* Whether the one that reads bytes takes id; moves it on. */
static bool reads(struct twin *w, struct grammar_state *t, int32_t id)
{
    bool fits = true;
    if (id < WORDS_OTHER + 1) {
        CHECK_OK(matcher_accept(w->bytes, t, id, &fits));
        return fits;
    }
    for (const char *c = words_more[id - WORDS_OTHER - 1]; *c && fits; c++)
        CHECK_OK(matcher_accept(w->bytes, t, (uint8_t)*c, &fits));
    return fits;
}

/* Every mask bit says what the bytes do. Moves on by one of the allowed, unless that is the end. */
static bool twin_step(struct twin *w)
{
    enum { N = WORDS_OTHER + 1 + ARRAY_LEN(words_more) };
    int32_t allowed[N];
    uint32_t n = 0;
    const uint32_t *mask;
    CHECK_OK(matcher_mask(w->m, w->s, &mask));
    for (int32_t id = 0; id < N; id++) {
        struct grammar_state t = w->t;
        bool fits = reads(w, &t, id);
        CHECK_INT(mask[id / 32] >> id % 32 & 1, fits);
        if (fits && id != WORDS_EOS)
            allowed[n++] = id;
    }
    if (n == 0)
        return false;
    int32_t id = allowed[draw(n)];
    bool fits;
    CHECK_OK(matcher_accept(w->m, &w->s, id, &fits));
    CHECK(fits && reads(w, &w->t, id));
    return true;
}

static void check_masks(const char *spec, int n_steps)
{
    struct twin w = twin_open(spec);
    for (int i = 0; i < n_steps && twin_step(&w); i++) {
        struct grammar_state *live = &w.s;
        if (i % 32 == 31)
            CHECK_OK(matcher_trim(w.m, 0, &live, 1));
    }
    twin_close(&w);
}

static void random_walks(void)
{
    int n_compiled = 0, n_complete = 0, n_valid = 0;
    for (int i = 0; i < 400; i++) {
        json_t *schema = random_schema(3);
        json_object_set_new(schema, "$defs", json_pack("{s:o}", "d", random_schema(1)));
        char *text = json_dumps(schema, JSON_COMPACT);
        struct json_out spec = {0};
        json_out_fmt(&spec, "{\"schema\":%s}", text);
        struct grammar *g = NULL;
        struct matcher *m = NULL;
        if (grammar_compile(spec.data, spec.len, &g) == ERR_OK) {
            n_compiled++;
            CHECK_OK(matcher_create(g, vocab, &m));
        }
        for (int k = 0; m && k < 6; k++) {
            struct json_out out = {0};
            json_out_raw(&out, "", 0);
            if (walk(m, &out)) {
                n_complete++;
                json_t *v = json_loadb(out.data, out.len, JSON_DECODE_ANY, NULL);
                bool ok = v && valid(schema, schema, v);
                n_valid += ok;
                if (!ok) {
                    CHECK(!"valid");
                    fprintf(stderr, "  %s\n  %.*s\n", text, (int)out.len, out.data);
                }
                json_decref(v);
            }
            json_out_finish(&out);
        }
        if (m && i % 4 == 0)
            check_masks(spec.data, 40);
        matcher_destroy(m);
        grammar_destroy(g);
        json_out_finish(&spec);
        free(text);
        json_decref(schema);
    }
    printf("%d schemas, %d answers, %d valid\n", n_compiled, n_complete, n_valid);
    CHECK(n_compiled > 200 && n_complete > 1000);
}

/* ---- the matcher ---- */

static void masks_of_strings(void)
{
#define STRING(more) "{\"type\":\"string\"" more "}"
#define MANY(items)  "{\"type\":\"array\",\"minItems\":5,\"items\":" items "}"
#define TOOL(v)                                                                                    \
    "{\"tools\":[{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"required\":[\"v\"],"        \
    "\"properties\":{\"v\":" v "}}}]}"
    static const char *const schemas[] = {
        STRING(""),
        STRING(",\"maxLength\":0"),
        STRING(",\"maxLength\":4"),
        STRING(",\"minLength\":3"),
        STRING(",\"minLength\":30,\"maxLength\":40"),
        STRING(",\"maxLength\":70"),
        STRING(",\"minLength\":9,\"maxLength\":9"),
        STRING(",\"pattern\":\"^[^a]*$\""),
        STRING(",\"pattern\":\"^(..){2,7}$\""),
        STRING(",\"pattern\":\"^(a|[^b]){3,60}$\""),
        STRING(",\"pattern\":\"^.{3,9}x?.{2,40}$\""),
        STRING(",\"pattern\":\"^[a-z]{2,60}$\",\"maxLength\":30"),
        "{\"type\":\"array\",\"items\":{\"enum\":[\"abc\",\"hello\",\"abd\"]}}",
        MANY(STRING(",\"maxLength\":5")),
        MANY(STRING(",\"minLength\":2,\"maxLength\":12")),
        MANY(STRING(",\"pattern\":\"^([^\\\\n][^\\\\n]){2,7}$\"")),
        MANY(STRING(",\"pattern\":\"^.{3,9}x?.{2,40}$\"")),
        MANY(MANY(STRING(",\"maxLength\":20"))),
        "{\"type\":\"array\",\"maxItems\":8,\"items\":" STRING(",\"maxLength\":3") "}",
        "{\"type\":\"array\",\"maxItems\":8,\"items\":{\"anyOf\":[" STRING(
            ",\"maxLength\":3") "," STRING(",\"minLength\":2,\"maxLength\":9") "]}}",
        "{\"type\":\"object\",\"additionalProperties\":" STRING(",\"maxLength\":9") "}"};
    static const char *const specs[] = {
        "{\"free\":true}",
        TOOL(STRING("")),
        TOOL(STRING(",\"maxLength\":40")),
        TOOL(STRING(",\"minLength\":3,\"maxLength\":6")),
        TOOL("{\"type\":[\"string\",\"null\"],\"maxLength\":9}"),
        TOOL(MANY(STRING(",\"maxLength\":9"))),
        "{\"reasoning\":true,\"schema\":" STRING(",\"maxLength\":50") "}"};
    for (size_t i = 0; i < ARRAY_LEN(schemas) * 8; i++) {
        struct json_out spec = {0};
        json_out_fmt(&spec, "{\"schema\":%s}", schemas[i % ARRAY_LEN(schemas)]);
        json_out_raw(&spec, "", 1);
        check_masks(spec.data, 120);
        json_out_finish(&spec);
    }
    for (size_t i = 0; i < ARRAY_LEN(specs) * 8; i++)
        check_masks(specs[i % ARRAY_LEN(specs)], 120);
}

static void equal_states_are_one(void)
{
    OWNED(grammar) g = compile_schema("{\"type\":\"array\",\"items\":{\"type\":\"string\"}}");
    OWNED(matcher) m = NULL;
    CHECK_OK(matcher_create(g, vocab, &m));
    struct grammar_state a = matcher_start(m), b = a;
    bool fits;
    for (const char *c = "[\"x"; *c; c++)
        CHECK_OK(matcher_accept(m, &a, *c, &fits));
    for (const char *c = "[\"x\",\"yy\", \"abc"; *c; c++)
        CHECK_OK(matcher_accept(m, &b, *c, &fits));
    CHECK_INT(a.at, b.at);
    const uint32_t *x, *y;
    CHECK_OK(matcher_mask(m, a, &x));
    CHECK_OK(matcher_mask(m, b, &y));
    CHECK(x == y);
}

static void trimmed_matchers_go_on(void)
{
    OWNED(grammar) g = compile_schema("{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}");
    OWNED(matcher) m = NULL;
    CHECK_OK(matcher_create(g, vocab, &m));
    struct grammar_state s[3];
    const uint32_t *mask;
    bool fits;
    for (int i = 0; i < 3; i++) {
        s[i] = matcher_start(m);
        for (int k = 0; k < 300 * (i + 1); k++) {
            CHECK_OK(matcher_mask(m, s[i], &mask));
            CHECK_OK(matcher_accept(m, &s[i], '[', &fits));
        }
    }
    size_t before = matcher_bytes(m);
    struct grammar_state *live[] = {&s[1], &s[0]};
    CHECK_OK(matcher_trim(m, before, live, 2));
    CHECK_INT(matcher_bytes(m), before);
    CHECK_OK(matcher_trim(m, before / 2, live, 2));
    CHECK(matcher_bytes(m) < before);
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 300 * (i + 1); k++) {
            CHECK(!is_complete(m, s[i]));
            CHECK_OK(matcher_accept(m, &s[i], ']', &fits));
            CHECK(fits);
        }
        CHECK(is_complete(m, s[i]));
    }
}

static void ends_and_strangers(void)
{
    OWNED(grammar) g = compile_schema("{\"type\":\"integer\"}");
    OWNED(matcher) m = NULL;
    CHECK_OK(matcher_create(g, vocab, &m));
    struct grammar_state s = matcher_start(m);
    bool fits;
    static const int32_t never[] = {-1, WORDS_EOS, WORDS_TAG, WORDS_OTHER, 1 << 20};
    for (size_t i = 0; i < ARRAY_LEN(never); i++) {
        CHECK_OK(matcher_accept(m, &s, never[i], &fits));
        CHECK(!fits);
    }
    CHECK_OK(matcher_accept(m, &s, '7', &fits));
    CHECK(is_complete(m, s));
    CHECK_OK(matcher_accept(m, &s, WORDS_EOS, &fits));
    CHECK(fits);
}

static void vocabulary_of_the_demo_model(void)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/tokenizer.json", getenv("BATON_DEMO_DIR"));
    static const int32_t eos[] = {3000, 3007, 3009};
    OWNED(grammar_vocab) v = NULL;
    CHECK_OK(grammar_vocab_load(path, 3072, eos, 3, &v));
    OWNED(grammar) g = compile("{\"free\":true,\"tools\":[{\"name\":\"f\"}]}");
    OWNED(matcher) m = NULL;
    CHECK_OK(matcher_create(g, v, &m));
    const uint32_t *mask;
    CHECK_OK(matcher_mask(m, matcher_start(m), &mask));
    int n = 0;
    for (int id = 0; id < 3072; id++)
        n += mask[id / 32] >> id % 32 & 1;
    /* 3000 texts, 3 ends, the call's tag; 36 added tokens without ends and tags are "other" */
    CHECK_INT(n, 3000 + 3 + 1 + (36 - 3 - 7));
    OWNED(grammar_vocab) none = NULL;
    CHECK_INT(grammar_vocab_load("/nonexistent/tokenizer.json", 10, eos, 3, &none), ERR_NOT_FOUND);
    struct grammar_token tokens[2] = {{"a", 1, false}, {"b", 1, false}};
    CHECK_INT(grammar_vocab_create(tokens, 2, 2, eos, 0, &none), ERR_BAD_MODEL);
}

int main(void)
{
    CHECK_OK(words_vocab(&vocab));
    REQUIRE(vocab);
    RUN(values_of_schemas);
    RUN(schemas_that_are_refused);
    RUN(too_much_is_refused);
    RUN(tool_calls);
    RUN(around_calls);
    RUN(random_walks);
    RUN(masks_of_strings);
    RUN(equal_states_are_one);
    RUN(trimmed_matchers_go_on);
    RUN(ends_and_strangers);
    RUN(vocabulary_of_the_demo_model);
    grammar_vocab_destroy(vocab);
    return check_done();
}
