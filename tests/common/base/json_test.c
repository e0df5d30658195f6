/* json_test.c: what is refused and in which words, and text equal to Python's. */
#include "common/base/json.h"

#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "common/base/own.h"

static const struct json_limits tiny = {
    .max_bytes = 100, .max_depth = 3, .max_containers = 4, .max_values = 6};

static enum err parse(const char *text, const struct json_limits *limits)
{
    json_t *root = NULL;
    enum err e = json_parse(text, strlen(text), limits, &root);
    CHECK(e == ERR_OK ? root != NULL : root == NULL);
    json_decref(root);
    return e;
}

static void good_texts_are_parsed(void)
{
    static const char *const good[] = {
        "{}", "[]", "{\"a\": [1, 2.5, null, true, \"x\"]}", "\"s\"", "5", "-0.5e3", "  [1]  "};
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
        CHECK_OK(parse(good[i], &json_limits_request));
}

static void bad_texts_are_refused(void)
{
    static const char *const bad[] = {"",
                                      "{",
                                      "{\"a\":1,\"a\":2}",
                                      "[1] x",
                                      "{'a':1}",
                                      "[1,]",
                                      "\"\\ud800\"",
                                      "\"\xff\"",
                                      "\"\xc0\xaf\"",
                                      "\"\x01\"",
                                      "nul",
                                      "[1e400x]",
                                      "[01e400]",
                                      "[1e+400+]",
                                      "[1.e400]",
                                      "[+1e400]",
                                      "\xef\xbb\xbf{}",
                                      "[099999999999999999999]",
                                      "[9999999999999999999x]",
                                      "{\"\\u0000\": 1}",
                                      "\"\xed\xa0\x80\"",
                                      "[01]",
                                      "\""};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        CHECK_INT(parse(bad[i], &json_limits_request), ERR_INVALID);
    CHECK_INT(parse("{\"a\": 1,\n \"a\": 2}", &json_limits_request), ERR_INVALID);
    CHECK(strstr(err_text(ERR_INVALID), "line 2"));
    CHECK(strstr(err_text(ERR_INVALID), "duplicate"));
    CHECK_INT(parse("{\"secret words\": secret}", &json_limits_request), ERR_INVALID);
    CHECK(!strstr(err_text(ERR_INVALID), "secret")); // the sentence may be logged
    json_t *root = NULL;
    CHECK_INT(json_parse("[1]\0[2]", 7, &json_limits_request, &root), ERR_INVALID);
    CHECK(!root);
}

/* Programs put into a conversation what they found in a file, and other languages' integers. */
static void clients_may_say_what_jansson_refuses(void)
{
    static const struct {
        const char *text, *want; // as Python would write it
    } rows[] = {
        {"9223372036854775807", "9223372036854775807"},
        {"-9223372036854775808", "-9223372036854775808"},
        {"9223372036854775808", "9.223372036854776e+18"},
        {"[1, -9223372036854775809, 18446744073709551615]",
         "[1, -9.223372036854776e+18, 1.8446744073709552e+19]"},
        {"{\"99999999999999999999\": \"\\\"99999999999999999999\\\\\", \"b\": "
         "99999999999999999999}",
         "{\"99999999999999999999\": \"\\\"99999999999999999999\\\\\", \"b\": 1e+20}"},
        {"[99999999999999999999.5, 99999999999999999999e2, 0.99999999999999999999]",
         "[1e+20, 1e+22, 1.0]"},
        {"[1e308, 1e309, -1e309, 9E+308, 123.5e99999999999, 1e-400, \"1e400\"]",
         "[1e+308, 1e+308, -1e+308, 1e+308, 1e+308, 0.0, \"1e400\"]"},
        {"\"a\\u0000b\"", "\"a\\u0000b\""},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        json_t *v = NULL;
        CHECK_OK(json_parse(rows[i].text, strlen(rows[i].text), &json_limits_request, &v));
        char *got = v ? json_dump_python(v) : NULL;
        CHECK_STR(got, rows[i].want);
        free(got);
        json_decref(v);
    }
    char digits[401];
    memset(digits, '7', sizeof(digits));
    digits[400] = 0;
    json_t *v = NULL;
    CHECK_OK(json_parse(digits, 400, &json_limits_request, &v));
    CHECK(json_real_value(v) == 1e308);
    json_decref(v);
    CHECK_INT(parse("1e309", &tiny), ERR_INVALID);
    CHECK_INT(parse("9223372036854775808", &tiny), ERR_INVALID); // our own files have none of it
    CHECK_INT(parse("\"\\u0000\"", &tiny), ERR_INVALID);
}

static void limits_are_kept_and_named(void)
{
    CHECK_OK(parse("[[[]]]", &tiny));
    CHECK_INT(parse("[[[[]]]]", &tiny), ERR_TOO_LARGE);
    CHECK(strstr(err_text(ERR_TOO_LARGE), "3 levels"));
    CHECK_OK(parse("[{},[],{}]", &tiny));
    CHECK_INT(parse("[{},[],{},[]]", &tiny), ERR_TOO_LARGE);
    CHECK(strstr(err_text(ERR_TOO_LARGE), "4 objects"));
    CHECK_OK(parse("[1,2,3,4,5]", &tiny));
    CHECK_INT(parse("[1,2,3,4,5,6,7]", &tiny), ERR_TOO_LARGE);
    CHECK(strstr(err_text(ERR_TOO_LARGE), "6 values"));
    char big[102];
    memset(big, ' ', sizeof(big) - 1);
    big[sizeof(big) - 1] = 0;
    CHECK_INT(parse(big, &tiny), ERR_TOO_LARGE);
    // Structure inside strings is text, also behind escapes.
    CHECK_OK(parse("\"[[[[[[,,,,,,,,{{{{\"", &tiny));
    CHECK_OK(parse("[\"\\\"[[[[[[\", \"\\\\\", \"]]]\"]", &tiny));
}

static void the_request_limits_bound_a_mebibyte_of_braces(void)
{
    size_t n = 1 << 20;
    char *text = malloc(n);
    for (size_t i = 0; i + 1 < n; i += 3)
        memcpy(text + i, "{},", MIN(3, n - i));
    text[0] = '[';
    json_t *root = NULL;
    CHECK_INT(json_parse(text, n, &json_limits_request, &root), ERR_TOO_LARGE);
    memset(text, '[', n);
    CHECK_INT(json_parse(text, n, &json_limits_request, &root), ERR_TOO_LARGE);
    free(text);
}

static void members_are_typed(void)
{
    const char *text = "{\"i\": 5, \"r\": 2.5, \"t\": true, \"s\": \"x\", \"n\": null, \"o\": {}}";
    json_t *o = NULL;
    CHECK_OK(json_parse(text, strlen(text), &json_limits_request, &o));
    int64_t i = -1;
    double d = -1;
    bool b = false;
    const char *s = "default";

    CHECK_OK(json_get_int(o, "i", 0, 10, &i));
    CHECK_INT(i, 5);
    CHECK_OK(json_get_int(o, "missing", 0, 10, &i));
    CHECK_OK(json_get_int(o, "n", 0, 10, &i));
    CHECK_INT(i, 5);
    CHECK_INT(json_get_int(o, "i", 6, 10, &i), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "i is 5, must be in 6 .. 10");
    CHECK_INT(json_get_int(o, "r", 0, 10, &i), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "r is a number, must be an integer");
    CHECK_INT(json_get_int(o, "t", 0, 10, &i), ERR_INVALID);
    CHECK_INT(i, 5);

    CHECK_OK(json_get_double(o, "r", 0, 10, &d));
    CHECK_NEAR(d, 2.5, 0);
    CHECK_OK(json_get_double(o, "i", 0, 10, &d));
    CHECK_NEAR(d, 5, 0);
    CHECK_INT(json_get_double(o, "r", 3, 10, &d), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "r is 2.5, must be in 3 .. 10");
    CHECK_INT(json_get_double(o, "s", 0, 10, &d), ERR_INVALID);

    CHECK_OK(json_get_bool(o, "t", &b));
    CHECK(b);
    CHECK_INT(json_get_bool(o, "i", &b), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "i is an integer, must be true or false");

    CHECK_OK(json_get_string(o, "n", &s));
    CHECK_STR(s, "default");
    CHECK_OK(json_get_string(o, "s", &s));
    CHECK_STR(s, "x");
    CHECK_INT(json_get_string(o, "o", &s), ERR_INVALID);
    CHECK_STR(err_text(ERR_INVALID), "o is an object, must be a string");
    json_decref(o);
}

static void dumps(const char *text, const char *want)
{
    json_t *v = NULL;
    CHECK_OK(json_parse(text, strlen(text), &json_limits_file, &v));
    char *got = v ? json_dump_python(v) : NULL;
    CHECK_STR(got, want);
    free(got);
    json_decref(v);
}

/* Each `want` was printed by json.dumps(json.loads(text), ensure_ascii=False). */
static void dumps_are_pythons(void)
{
    dumps("{}", "{}");
    dumps("[]", "[]");
    dumps("{\"b\":1,\"a\":[1,-2,{\"x\":null}],\"c\":true,\"d\":false}",
          "{\"b\": 1, \"a\": [1, -2, {\"x\": null}], \"c\": true, \"d\": false}");
    dumps("\"\\u4f60\\ud83d\\ude00/\\/\\u007f\\u2028\"", "\"你😀//\x7f\xe2\x80\xa8\"");
    dumps("\"\\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u001f\"", "\"\\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u001f\"");
    dumps("[1.0, 1e20, 1.5, 1e-7, 0.1, -0.0, 100.0, 0.0001, 0.00001, 1e15, 1e16, 123456789.125]",
          "[1.0, 1e+20, 1.5, 1e-07, 0.1, -0.0, 100.0, 0.0001, 1e-05, 1000000000000000.0, 1e+16, "
          "123456789.125]");
    dumps("[5e-324, 1.7976931348623157e308, 2.2250738585072014e-308, 9007199254740993.0, "
          "0.30000000000000004, 1e22, 1e23, 1.234e-10, 3.14, 1234567890123456.7]",
          "[5e-324, 1.7976931348623157e+308, 2.2250738585072014e-308, 9007199254740992.0, "
          "0.30000000000000004, 1e+22, 1e+23, 1.234e-10, 3.14, 1234567890123456.8]");
    dumps("[9223372036854775807, -9223372036854775808, -0]",
          "[9223372036854775807, -9223372036854775808, 0]");
}

static void doubles_read_back(void)
{
    uint64_t x = 88172645463325252u;
    struct json_out o = {0};
    for (int i = 0; i < 100000; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        double v, back;
        memcpy(&v, &x, sizeof(v));
        if (!isfinite(v))
            continue;
        o.len = 0;
        json_out_double(&o, v);
        json_out_raw(&o, "", 1);
        back = strtod(o.data, NULL);
        if (memcmp(&v, &back, sizeof(v)))
            CHECK_STR(o.data, "a text that reads back");
    }
    o.len = 0;
    json_out_double(&o, NAN);
    json_out_double(&o, -INFINITY);
    json_out_raw(&o, "", 1);
    CHECK_STR(o.data, "nullnull");
    json_out_finish(&o);
}

static void output_grows(void)
{
    struct json_out o = {0};
    size_t want = 0;
    for (int i = 0; i < 2000; i++) {
        json_out_fmt(&o, "%d,", i);
        json_out_string(&o, "a\"b\0c", 5);
        json_out_fmt(&o, "%s", "");
        want += (size_t)snprintf(NULL, 0, "%d,", i) + strlen("\"a\\\"b\\u0000c\"");
    }
    CHECK(!o.failed);
    CHECK_INT(o.len, want);
    CHECK(!memcmp(o.data, "0,\"a\\\"b\\u0000c\"1,", 17));
    json_out_finish(&o);
    CHECK(!o.data && !o.len);
}

static void files_are_read(void)
{
    char path[] = "/tmp/baton-json-XXXXXX";
    int fd = mkstemp(path);
    REQUIRE(fd >= 0);
    CHECK_INT(write(fd, "{\"a\": 1,}", 9), 9);
    char *text = NULL;
    size_t n = 0;
    CHECK_OK(file_read(path, 9, &text, &n));
    CHECK_INT(n, 9);
    CHECK_STR(text, "{\"a\": 1,}");
    free(text);
    CHECK_INT(file_read(path, 8, &text, &n), ERR_TOO_LARGE);
    json_t *root = NULL;
    CHECK_INT(json_parse_file(path, &json_limits_file, &root), ERR_INVALID);
    CHECK(strstr(err_text(ERR_INVALID), path));
    CHECK_INT(ftruncate(fd, 0), 0);
    CHECK_OK(file_read(path, 0, &text, &n));
    CHECK_INT(n, 0);
    free(text);
    close(fd);
    unlink(path);
    CHECK_INT(file_read(path, 8, &text, &n), ERR_NOT_FOUND);
    CHECK(strstr(err_text(ERR_NOT_FOUND), path));
    CHECK_INT(file_read("/tmp", 8, &text, &n), ERR_IO);
}

int main(void)
{
    RUN(good_texts_are_parsed);
    RUN(bad_texts_are_refused);
    RUN(clients_may_say_what_jansson_refuses);
    RUN(limits_are_kept_and_named);
    RUN(the_request_limits_bound_a_mebibyte_of_braces);
    RUN(members_are_typed);
    RUN(dumps_are_pythons);
    RUN(doubles_read_back);
    RUN(output_grows);
    RUN(files_are_read);
    return check_done();
}
