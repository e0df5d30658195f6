/* json_type.c: see json_type.h. */
#include "common/base/json_type.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "common/base/own.h"

#define MAX_EXPONENT 1000000000 /* more is no other case */

unsigned json_type_named(const char *name)
{
    static const struct {
        const char *name;
        unsigned type;
    } names[] = {{"string", T_STRING},   {"integer", T_INTEGER}, {"number", T_NUMBER | T_INTEGER},
                 {"boolean", T_BOOLEAN}, {"object", T_OBJECT},   {"array", T_ARRAY},
                 {"null", T_NULL}};
    for (size_t i = 0; name && i < ARRAY_LEN(names); i++)
        if (!strcmp(name, names[i].name))
            return names[i].type;
    return 0;
}

unsigned json_type_of(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_STRING:
        return T_STRING;
    case JSON_INTEGER:
        return T_INTEGER;
    case JSON_REAL:
        return floor(json_real_value(v)) == json_real_value(v) ? T_INTEGER : T_NUMBER;
    case JSON_TRUE:
    case JSON_FALSE:
        return T_BOOLEAN;
    case JSON_OBJECT:
        return T_OBJECT;
    case JSON_ARRAY:
        return T_ARRAY;
    case JSON_NULL:
        break;
    }
    return T_NULL;
}

static size_t digits(const char *s, size_t n, size_t i)
{
    while (i < n && s[i] >= '0' && s[i] <= '9')
        i++;
    return i;
}

/* Behind the digits s[first, end) with n_fraction of them after the point stands 10^exponent. */
static unsigned type_of_parts(const char *s, size_t first, size_t end, int64_t n_fraction,
                              int64_t exponent)
{
    int64_t shift = exponent - n_fraction;
    for (; end > first && (s[end - 1] == '0' || s[end - 1] == '.'); end--)
        shift += s[end - 1] == '0';
    return end == first || shift >= 0 ? T_INTEGER : T_NUMBER;
}

unsigned json_type_of_number(const char *s, size_t n)
{
    size_t first = n > 0 && s[0] == '-', i = digits(s, n, first), from = i;
    int64_t n_fraction = 0, exponent = 0;
    if (i == first || (s[first] == '0' && i > first + 1))
        return 0;
    if (i < n && s[i] == '.') {
        from = i + 1;
        i = digits(s, n, from);
        n_fraction = (int64_t)(i - from);
        if (n_fraction == 0)
            return 0;
    }
    size_t end = i;
    if (i < n && (s[i] == 'e' || s[i] == 'E')) {
        i++;
        bool minus = i < n && s[i] == '-';
        i += i < n && (s[i] == '-' || s[i] == '+');
        from = i;
        i = digits(s, n, from);
        if (i == from)
            return 0;
        for (; from < i; from++)
            exponent = MIN(exponent * 10 + (s[from] - '0'), MAX_EXPONENT);
        exponent = minus ? -exponent : exponent;
    }
    return i == n ? type_of_parts(s, first, end, n_fraction, exponent) : 0;
}
