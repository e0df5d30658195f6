/* json_type_test.c: which type a number is of, as a value and as a text. */
#include "common/base/json_type.h"

#include <string.h>

#include "check.h"
#include "common/base/own.h"

static const struct {
    const char *text;
    unsigned type;
} numbers[] = {
    {"0", T_INTEGER},      {"-0", T_INTEGER},     {"5", T_INTEGER},         {"-120", T_INTEGER},
    {"1.0", T_INTEGER},    {"1.50", T_NUMBER},    {"0.0", T_INTEGER},       {"-0.0", T_INTEGER},
    {"1e3", T_INTEGER},    {"1E+3", T_INTEGER},   {"1e-3", T_NUMBER},       {"100e-2", T_INTEGER},
    {"100e-3", T_NUMBER},  {"1.25e2", T_INTEGER}, {"1.25e1", T_NUMBER},     {"1.20e1", T_INTEGER},
    {"0.001", T_NUMBER},   {"0e-9", T_INTEGER},   {"0.000e-99", T_INTEGER}, {"10.0e-1", T_INTEGER},
    {"12.0e-1", T_NUMBER}, {"120.50", T_NUMBER},
};

static void numbers_are_integers_without_fraction(void)
{
    for (size_t i = 0; i < ARRAY_LEN(numbers); i++) {
        const char *text = numbers[i].text;
        CHECK_INT(json_type_of_number(text, strlen(text)), numbers[i].type);
        json_t *v = json_loads(text, JSON_DECODE_ANY, NULL);
        REQUIRE(v != NULL);
        CHECK_INT(json_type_of(v), numbers[i].type);
        json_decref(v);
    }
    static const char *const large[] = {"123456789012345678901234567890", "1e400", "1e99999999999",
                                        "-1234567890123456789.0"};
    for (size_t i = 0; i < ARRAY_LEN(large); i++)
        CHECK_INT(json_type_of_number(large[i], strlen(large[i])), T_INTEGER);
    CHECK_INT(json_type_of_number("1.00000000000000000000001", 25), T_NUMBER);
    CHECK_INT(json_type_of_number("1e-99999999999", 14), T_NUMBER);
}

static void other_texts_are_none(void)
{
    static const char *const none[] = {"",    "-",  ".5", "1.",   "01", "-01", "+1",   "1e",  "1e+",
                                       "NaN", "1 ", " 1", "1.e1", "1x", "0x1", "1.5.", "--1", "e1"};
    for (size_t i = 0; i < ARRAY_LEN(none); i++)
        CHECK_INT(json_type_of_number(none[i], strlen(none[i])), 0);
}

static void values_have_one_type(void)
{
    static const char *const texts[] = {"\"a\"", "1", "1.5", "true", "{}", "[]", "null"};
    unsigned seen = 0;
    for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
        json_t *v = json_loads(texts[i], JSON_DECODE_ANY, NULL);
        REQUIRE(v != NULL);
        CHECK(!(seen & json_type_of(v)));
        seen |= json_type_of(v);
        json_decref(v);
    }
    CHECK_INT(seen, T_ALL);
    CHECK_INT(json_type_named("number"), T_NUMBER | T_INTEGER);
    CHECK_INT(json_type_named("integer"), T_INTEGER);
    CHECK_INT(json_type_named("date"), 0);
    CHECK_INT(json_type_named(NULL), 0);
}

int main(void)
{
    RUN(numbers_are_integers_without_fraction);
    RUN(other_texts_are_none);
    RUN(values_have_one_type);
    return check_done();
}
