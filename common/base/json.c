/* json.c: the bounded door to jansson, and writers that do without it.
 *
 * json_parse counts before it parses: one pass over the bytes that knows strings from structure is
 * enough to bound what jansson will allocate. It does not validate; jansson does that afterwards.
 *
 * Floats are written like Python's repr: the fewest digits that read back as the same double, with
 * an exponent from 1e16 up and below 1e-4. Prompts are rendered with this, so it decides tokens.
 */
#include "common/base/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/base/json_type.h"
#include "common/base/own.h"

#define INT64_DIGITS 19u

const struct json_limits json_limits_request = {.max_bytes = 256u << 20,
                                                .max_depth = 64,
                                                .max_containers = 20000,
                                                .max_values = 300000,
                                                .any_value = true};
const struct json_limits json_limits_file = {
    .max_bytes = 512u << 20, .max_depth = 128, .max_containers = 4000000, .max_values = 40000000};

static void dump_value(struct json_out *o, const json_t *value);

/* ---- parsing --------------------------------------------------------------------------------- */

static enum err over(const char *what, size_t limit)
{
    return err_set(ERR_TOO_LARGE, "JSON has more than %zu %s", limit, what);
}

/* *ret_large: some number has INT64_DIGITS digits in a row, or an exponent. */
static enum err scan(const char *text, size_t n, const struct json_limits *limits, bool *ret_large)
{
    size_t depth = 0, n_containers = 0, n_values = 1, n_digits = 0;
    bool in_string = false, opened = false; // opened: the last character that counts was { or [
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
            continue;
        }
        *ret_large |= n_digits && (c == 'e' || c == 'E');
        n_digits = c >= '0' && c <= '9' ? n_digits + 1 : 0;
        *ret_large |= n_digits == INT64_DIGITS;
        bool empty = opened;
        if (c != ' ' && c != '\n' && c != '\t' && c != '\r')
            opened = c == '{' || c == '[';
        switch (c) {
        case '"':
            in_string = true;
            break;
        case '{':
        case '[':
            if (++depth > limits->max_depth)
                return over("levels of nesting", limits->max_depth);
            if (++n_containers > limits->max_containers)
                return over("objects and arrays", limits->max_containers);
            if (++n_values > limits->max_values)
                return over("values", limits->max_values);
            break;
        case '}':
        case ']':
            depth -= depth > 0;
            n_values -= empty; // it was opened as if a value came
            break;
        case ',':
            if (++n_values > limits->max_values)
                return over("values", limits->max_values);
            break;
        default:
            break;
        }
    }
    return ERR_OK;
}

/* jansson refuses integers beyond int64. As 18446744073709551615 they are that here; as
 * 184467440737095516e2, of the same length, they are reals, right to 17 digits. Nor does it take
 * what is beyond a double: -1234e56789 becomes -1e00000308, the largest power of ten that fits. */
static void numbers_to_doubles(char *text)
{
    bool in_string = false;
    for (char *c = text; *c; c++) {
        if (*c == '"')
            in_string = !in_string;
        else if (in_string && *c == '\\' && c[1])
            c++;
        else if (!in_string && (*c == '-' || (*c >= '0' && *c <= '9'))) {
            size_t n_number = strspn(c, "+-.0123456789Ee"), n_digits = strspn(c + 1, "0123456789");
            errno = 0;
            if (n_digits + 1 == n_number && n_number >= INT64_DIGITS) {
                (void)strtoll(c, NULL, 10);
                if (errno == ERANGE)
                    memcpy(c + n_number - 2, "e2", 2);
            }
            if (isinf(strtod(c, NULL)) && json_type_of_number(c, n_number)) {
                char *digits = c + (*c == '-'), *end = c + n_number;
                memset(digits, '0', (size_t)(end - digits));
                memcpy(digits, "1e", 2);
                memcpy(end - 3, "308", 3);
            }
            c += n_number - 1;
        }
    }
}

enum err json_parse(const char *text, size_t n, const struct json_limits *limits, json_t **ret)
{
    if (n > limits->max_bytes)
        return err_set(ERR_TOO_LARGE, "JSON of %zu bytes exceeds %zu", n, limits->max_bytes);
    bool large_numbers = false;
    TRY(scan(text, n, limits, &large_numbers));

    OWNED_MEM char *copy = NULL;
    if (limits->any_value && large_numbers && !memchr(text, 0, n)) {
        copy = strndup(text, n);
        if (!copy)
            return err_set(ERR_NOMEM, "no memory for JSON of %zu bytes", n);
        numbers_to_doubles(copy);
        text = copy;
    }
    size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY;
    json_error_t why;
    json_t *root = json_loadb(text, n, flags | (limits->any_value ? JSON_ALLOW_NUL : 0), &why);
    if (!root && json_error_code(&why) == json_error_out_of_memory)
        return err_set(ERR_NOMEM, "no memory for JSON of %zu bytes", n);
    if (!root) {
        char *near = strstr(why.text, " near "); // the sentence may be logged, the prompt may not
        if (near)
            *near = 0;
        return err_set(ERR_INVALID, "bad JSON at line %d column %d: %s", why.line, why.column,
                       why.text);
    }
    *ret = root;
    return ERR_OK;
}

enum err json_parse_file(const char *path, const struct json_limits *limits, json_t **ret)
{
    OWNED_MEM char *text = NULL;
    size_t n;
    TRY(file_read(path, limits->max_bytes, &text, &n));
    enum err e = json_parse(text, n, limits, ret);
    return e == ERR_OK ? ERR_OK : err_prefix(e, "%s", path);
}

enum err file_read(const char *path, size_t max_bytes, char **ret, size_t *ret_bytes)
{
    OWNED_FD fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st))
        return err_set(ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return err_set(ERR_IO, "%s: not a regular file", path);
    if ((uint64_t)st.st_size > max_bytes)
        return err_set(ERR_TOO_LARGE, "%s: %jd bytes exceed %zu", path, (intmax_t)st.st_size,
                       max_bytes);

    size_t size = (size_t)st.st_size, len = 0;
    OWNED_MEM char *data = malloc(size + 1);
    if (!data)
        return err_set(ERR_NOMEM, "%s: no memory for %zu bytes", path, size);
    while (len < size) {
        ssize_t n = read(fd, data + len, size - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return err_set(ERR_IO, "%s: %s", path, strerror(errno));
        if (n == 0)
            break; // it shrank meanwhile
        len += (size_t)n;
    }
    data[len] = 0;
    *ret = take(&data);
    *ret_bytes = len;
    return ERR_OK;
}

/* ---- members --------------------------------------------------------------------------------- */

static const char *type_word(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

/* The member, or NULL when missing or null. */
static const json_t *member(const json_t *obj, const char *key)
{
    const json_t *v = json_object_get(obj, key);
    return v && !json_is_null(v) ? v : NULL;
}

static enum err wrong_type(const char *key, const json_t *v, const char *want)
{
    return err_set(ERR_INVALID, "%s is %s, must be %s", key, type_word(v), want);
}

enum err json_get_int(const json_t *obj, const char *key, int64_t min, int64_t max, int64_t *ret)
{
    const json_t *v = member(obj, key);
    if (!v)
        return ERR_OK;
    if (!json_is_integer(v))
        return wrong_type(key, v, "an integer");
    int64_t n = json_integer_value(v);
    if (n < min || n > max)
        return err_set(ERR_INVALID, "%s is %" PRId64 ", must be in %" PRId64 " .. %" PRId64, key, n,
                       min, max);
    *ret = n;
    return ERR_OK;
}

enum err json_get_double(const json_t *obj, const char *key, double min, double max, double *ret)
{
    const json_t *v = member(obj, key);
    if (!v)
        return ERR_OK;
    if (!json_is_number(v))
        return wrong_type(key, v, "a number");
    double d = json_number_value(v);
    if (!(d >= min && d <= max))
        return err_set(ERR_INVALID, "%s is %g, must be in %g .. %g", key, d, min, max);
    *ret = d;
    return ERR_OK;
}

enum err json_get_bool(const json_t *obj, const char *key, bool *ret)
{
    const json_t *v = member(obj, key);
    if (!v)
        return ERR_OK;
    if (!json_is_boolean(v))
        return wrong_type(key, v, "true or false");
    *ret = json_is_true(v);
    return ERR_OK;
}

enum err json_get_string(const json_t *obj, const char *key, const char **ret)
{
    const json_t *v = member(obj, key);
    if (!v)
        return ERR_OK;
    if (!json_is_string(v))
        return wrong_type(key, v, "a string");
    *ret = json_string_value(v);
    return ERR_OK;
}

/* ---- writing --------------------------------------------------------------------------------- */

static bool out_reserve(struct json_out *o, size_t n)
{
    if (o->failed)
        return false;
    if (o->cap - o->len >= n)
        return true;
    size_t cap = o->cap ? o->cap : 256;
    while (cap - o->len < n) {
        if (cap > SIZE_MAX / 2) {
            o->failed = true;
            return false;
        }
        cap *= 2;
    }
    char *data = realloc(o->data, cap);
    if (!data) {
        o->failed = true;
        return false;
    }
    o->data = data;
    o->cap = cap;
    return true;
}

void json_out_raw(struct json_out *o, const char *text, size_t n)
{
    if (!n || !out_reserve(o, n))
        return;
    memcpy(o->data + o->len, text, n);
    o->len += n;
}

void json_out_fmt(struct json_out *o, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    size_t room = o->failed ? 0 : o->cap - o->len;
    int n = vsnprintf(room ? o->data + o->len : NULL, room, fmt, ap);
    if (n >= 0 && (size_t)n >= room) {
        if (out_reserve(o, (size_t)n + 1))
            vsnprintf(o->data + o->len, (size_t)n + 1, fmt, again);
        else
            n = 0;
    }
    va_end(again);
    va_end(ap);
    if (n < 0)
        o->failed = true;
    else
        o->len += (size_t)n;
}

void json_out_string(struct json_out *o, const char *utf8, size_t n)
{
    json_out_raw(o, "\"", 1);
    size_t plain = 0; // start of the run that needs no escape
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)utf8[i];
        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        json_out_raw(o, utf8 + plain, i - plain);
        plain = i + 1;
        switch (c) {
        case '"':
            json_out_raw(o, "\\\"", 2);
            break;
        case '\\':
            json_out_raw(o, "\\\\", 2);
            break;
        case '\n':
            json_out_raw(o, "\\n", 2);
            break;
        case '\r':
            json_out_raw(o, "\\r", 2);
            break;
        case '\t':
            json_out_raw(o, "\\t", 2);
            break;
        case '\b':
            json_out_raw(o, "\\b", 2);
            break;
        case '\f':
            json_out_raw(o, "\\f", 2);
            break;
        default:
            json_out_fmt(o, "\\u%04x", c);
            break;
        }
    }
    json_out_raw(o, utf8 + plain, n - plain);
    json_out_raw(o, "\"", 1);
}

/* The fewest digits that read back: "d.ddde+XX" in text; returns their number. At a power of two
 * the doubles below are closer than those above, so a neighbour of the nearest decimal may be the
 * only one that reads back: it is tried too. */
static int shortest(double v, char text[32])
{
    for (int n = 1; n < 17; n++) {
        snprintf(text, 32, "%.*e", n - 1, v);
        if (strtod(text, NULL) == v)
            return n;
        int last = n == 1 ? 0 : n;
        if (text[last] < '9') {
            text[last]++;
            if (strtod(text, NULL) == v)
                return n;
        }
    }
    snprintf(text, 32, "%.16e", v);
    return 17;
}

void json_out_double(struct json_out *o, double v)
{
    if (!isfinite(v)) {
        json_out_raw(o, "null", 4); // JSON has no word for it
        return;
    }
    if (signbit(v))
        json_out_raw(o, "-", 1);
    v = fabs(v);
    if (v == 0) {
        json_out_raw(o, "0.0", 3);
        return;
    }

    char e[32], digits[24];
    int n = shortest(v, e);
    int exponent = atoi(strchr(e, 'e') + 1);
    digits[0] = e[0];
    memcpy(digits + 1, e + 2, (size_t)(n - 1));

    if (exponent < -4 || exponent >= 16) {
        json_out_raw(o, digits, 1);
        if (n > 1) {
            json_out_raw(o, ".", 1);
            json_out_raw(o, digits + 1, (size_t)(n - 1));
        }
        json_out_fmt(o, "e%c%02d", exponent < 0 ? '-' : '+', abs(exponent));
    } else if (exponent < 0) {
        json_out_raw(o, "0.000", (size_t)(1 - exponent));
        json_out_raw(o, digits, (size_t)n);
    } else {
        for (int i = 0; i <= exponent || i < n; i++) {
            json_out_raw(o, i < n ? &digits[i] : "0", 1);
            if (i == exponent)
                json_out_raw(o, ".", 1);
        }
        if (n <= exponent + 1)
            json_out_raw(o, "0", 1);
    }
}

void json_out_finish(struct json_out *o)
{
    free(o->data);
    *o = (struct json_out){0};
}

char *json_dump_python(const json_t *value)
{
    struct json_out o = {0};
    dump_value(&o, value);
    json_out_raw(&o, "", 1);
    if (o.failed) {
        json_out_finish(&o);
        return NULL;
    }
    return o.data;
}

/* Recursion is bounded by the limits of json_parse. */
static void dump_value(struct json_out *o, const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT: {
        const char *key;
        json_t *v;
        bool first = true;
        json_out_raw(o, "{", 1);
        json_object_foreach ((json_t *)(uintptr_t)value, key, v) {
            if (!first)
                json_out_raw(o, ", ", 2);
            first = false;
            json_out_string(o, key, strlen(key));
            json_out_raw(o, ": ", 2);
            dump_value(o, v);
        }
        json_out_raw(o, "}", 1);
        break;
    }
    case JSON_ARRAY:
        json_out_raw(o, "[", 1);
        for (size_t i = 0; i < json_array_size(value); i++) {
            if (i)
                json_out_raw(o, ", ", 2);
            dump_value(o, json_array_get(value, i));
        }
        json_out_raw(o, "]", 1);
        break;
    case JSON_STRING:
        json_out_string(o, json_string_value(value), json_string_length(value));
        break;
    case JSON_INTEGER:
        json_out_fmt(o, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        break;
    case JSON_REAL:
        json_out_double(o, json_real_value(value));
        break;
    case JSON_TRUE:
        json_out_raw(o, "true", 4);
        break;
    case JSON_FALSE:
        json_out_raw(o, "false", 5);
        break;
    case JSON_NULL:
        json_out_raw(o, "null", 4);
        break;
    }
}
