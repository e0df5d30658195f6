/* schema_value.c: schemas without combinators: enums, strings, numbers, arrays. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/base/json.h"
#include "common/grammar/pattern.h"
#include "common/grammar/schema_impl.h"

static enum err literal_members(struct schema_compiler *c, const json_t *v, uint32_t next,
                                uint32_t *ret);

int64_t schema_count(const json_t *s, const char *key, int64_t otherwise)
{
    const json_t *v = json_object_get(s, key);
    return v ? json_integer_value(v) : otherwise;
}

uint32_t schema_max(const json_t *s, const char *key)
{
    const json_t *v = json_object_get(s, key);
    return v ? (uint32_t)json_integer_value(v) : REPEAT_UNLIMITED;
}

/* A bound as a double; an integer that is none is moved inwards. */
static void bound(const json_t *s, const char *key, bool exclusive, bool is_min, double *limit,
                  bool *limit_exclusive)
{
    const json_t *v = json_object_get(s, key);
    if (!v)
        return;
    double x = json_number_value(v);
    if (json_is_integer(v) && fabs(x) >= 9007199254740992.0)
        x = nextafter(x, is_min ? INFINITY : -INFINITY);
    if (is_min ? x < *limit || (x == *limit && !exclusive)
               : x > *limit || (x == *limit && !exclusive))
        return;
    *limit = x;
    *limit_exclusive = exclusive;
}

struct number_range schema_range(const json_t *s)
{
    struct number_range r = {-INFINITY, INFINITY, false, false};
    bound(s, "minimum", false, true, &r.min, &r.min_exclusive);
    bound(s, "exclusiveMinimum", true, true, &r.min, &r.min_exclusive);
    bound(s, "maximum", false, false, &r.max, &r.max_exclusive);
    bound(s, "exclusiveMaximum", true, false, &r.max, &r.max_exclusive);
    return r;
}

static size_t n_chars(const json_t *string)
{
    size_t n = 0;
    const char *c = json_string_value(string);
    for (size_t i = 0; i < json_string_length(string); i++)
        n += ((uint8_t)c[i] & 0xc0) != 0x80;
    return n;
}

/* Is a value of an enum valid for the keywords beside it? */
static enum err value_fits(struct schema_compiler *c, const json_t *s, const json_t *v, bool *ret)
{
    static const char *const hard[] = {"properties",    "required",      "additionalProperties",
                                       "minProperties", "maxProperties", "items",
                                       "prefixItems",   "minItems",      "maxItems",
                                       "pattern",       "format"};
    for (size_t i = 0; i < ARRAY_LEN(hard); i++)
        if (json_object_get(s, hard[i]))
            return schema_refuse(c->where, "\"enum\" or \"const\" beside \"%s\" is not supported",
                                 hard[i]);
    struct number_range r = schema_range(s);
    unsigned type = json_type_of(v);
    double x = json_number_value(v);
    *ret = (schema_types(s) & type) != 0;
    if (type == T_STRING)
        *ret = *ret && (int64_t)n_chars(v) >= schema_count(s, "minLength", 0) &&
               n_chars(v) <= schema_max(s, "maxLength");
    if (type & (T_NUMBER | T_INTEGER))
        *ret = *ret && (r.min_exclusive ? x > r.min : x >= r.min) &&
               (r.max_exclusive ? x < r.max : x <= r.max);
    return ERR_OK;
}

static enum err literal_members(struct schema_compiler *c, const json_t *v, uint32_t next,
                                uint32_t *ret)
{
    bool object = json_is_object(v);
    uint32_t at = program_text(c->g, object ? "}" : "]", 1, next);
    size_t n = object ? json_object_size(v) : json_array_size(v), i = n;
    const char **keys = calloc(n + 1, sizeof(*keys)), *key;
    json_t *item;
    if (!keys)
        return err_set(ERR_NOMEM, "no memory for a schema");
    if (object) {
        i = 0;
        json_object_foreach ((json_t *)v, key, item)
            keys[i++] = key;
    }
    if (n > 0)
        at = schema_space(c, at);
    enum err err = ERR_OK;
    for (i = n; i-- > 0 && err == ERR_OK;) {
        err =
            schema_literal(c, object ? json_object_get(v, keys[i]) : json_array_get(v, i), at, &at);
        if (err == ERR_OK && object) {
            json_t *name = json_string(keys[i]);
            err = name ? schema_literal(c, name, schema_colon(c, at), &at)
                       : err_set(ERR_NOMEM, "no memory");
            json_decref(name);
        }
        at = i > 0 ? schema_comma(c, at) : schema_space(c, at);
    }
    free(keys);
    TRY(err);
    *ret = program_text(c->g, object ? "{" : "[", 1, at);
    return c->g->err;
}

/* One JSON value. */
enum err schema_literal(struct schema_compiler *c, const json_t *v, uint32_t next, uint32_t *ret)
{
    if (json_is_object(v) || json_is_array(v))
        return literal_members(c, v, next, ret);
    char *text = json_dump_python(v); /* shortest numbers */
    if (!text)
        return err_set(ERR_NOMEM, "no memory for a schema");
    *ret = program_text(c->g, text, strlen(text), next);
    free(text);
    return c->g->err;
}

/* Would the client take this text of a string argument for another type of form? */
static bool reads_as_other(const json_t *v, unsigned form)
{
    json_t *other = json_loadb(json_string_value(v), json_string_length(v), JSON_DECODE_ANY, NULL);
    bool result = other && (json_type_of(other) & form & T_ALL & ~(unsigned)T_STRING);
    json_decref(other);
    return result || memchr(json_string_value(v), 0, json_string_length(v));
}

/* The values of an enum: strings in one tree, the rest side by side. */
static enum err build_enum(struct schema_compiler *c, const json_t *s, unsigned form, uint32_t next,
                           uint32_t *ret)
{
    const json_t *values = json_object_get(s, "enum"), *only = json_object_get(s, "const");
    size_t n = values ? json_array_size(values) : 1, n_edges = 0, n_texts = 0;
    OWNED_MEM uint32_t *edges = malloc((n + 1) * sizeof(*edges));
    OWNED_MEM char **texts = calloc(n, sizeof(*texts));
    OWNED_MEM size_t *lens = calloc(n, sizeof(*lens));
    if (!edges || !texts || !lens)
        return err_set(ERR_NOMEM, "no memory for a schema");
    enum err err = ERR_OK;
    for (size_t i = 0; i < n && err == ERR_OK; i++) {
        const json_t *v = values ? json_array_get(values, i) : only;
        bool fits = true;
        err = value_fits(c, s, v, &fits);
        if (err != ERR_OK || !fits || (only && !json_equal(v, only)))
            continue;
        if (!json_is_string(v)) {
            err = schema_literal(c, v, next, &edges[n_edges++]);
        } else if (form == FORM_JSON) {
            texts[n_texts] = json_dumps(v, JSON_ENCODE_ANY);
            err = texts[n_texts] ? ERR_OK : err_set(ERR_NOMEM, "no memory for a schema");
            lens[n_texts] = texts[n_texts] ? strlen(texts[n_texts]) : 0;
            n_texts += texts[n_texts] != NULL;
        } else if (!reads_as_other(v, form)) {
            texts[n_texts] = strdup(json_string_value(v));
            err = texts[n_texts] ? ERR_OK : err_set(ERR_NOMEM, "no memory for a schema");
            lens[n_texts] = json_string_length(v);
            n_texts += texts[n_texts] != NULL;
        }
    }
    if (err == ERR_OK)
        edges[n_edges++] = program_texts(c->g, (const char *const *)texts, lens, n_texts, next);
    for (size_t i = 0; i < n_texts; i++)
        free(texts[i]);
    TRY(err);
    *ret = program_split(c->g, edges, n_edges);
    return c->g->err;
}

/* A first character that cannot begin a value of the types in form. */
static uint32_t first_char(struct schema_compiler *c, unsigned form, uint32_t next)
{
    struct symset set = {0};
    for (uint32_t b = '!'; b < 0x7f; b++) {
        bool number = b == '-' || (b >= '0' && b <= '9');
        if ((number && form & (T_INTEGER | T_NUMBER)) || (b == '{' && form & T_OBJECT) ||
            (b == '[' && form & T_ARRAY) || ((b == 't' || b == 'f') && form & T_BOOLEAN) ||
            (b == 'n' && form & T_NULL))
            continue;
        symset_add(&set, b);
    }
    return program_either(c->g, program_set(c->g, &set, next),
                          program_call(c->g, schema_wide_char(c), next));
}

static enum err build_string(struct schema_compiler *c, const json_t *s, unsigned form,
                             uint32_t next, uint32_t *ret)
{
    struct grammar *g = c->g;
    const json_t *pattern = json_object_get(s, "pattern"), *format = json_object_get(s, "format");
    uint32_t min = (uint32_t)schema_count(s, "minLength", 0), max = schema_max(s, "maxLength");
    uint32_t end = form == FORM_JSON ? schema_quote(c, next) : next;
    *ret = PROGRAM_FAIL;
    if (max < min)
        return ERR_OK;
    if (pattern || format) {
        struct pattern_chars chars = {.any = form == FORM_JSON ? schema_quoted_char(c)
                                                               : schema_verbatim_char(c),
                                      .json = form == FORM_JSON,
                                      .min = min,
                                      .max = max};
        const char *key = pattern ? "pattern" : "format";
        if (pattern && format)
            return schema_refuse(c->where, "\"pattern\" beside \"format\" is not supported");
        if (form != FORM_JSON && form & T_ALL)
            return schema_refuse(c->where,
                                 "\"%s\" in an argument of several types is not supported", key);
        enum err err = pattern ? pattern_build(g, json_string_value(pattern), &chars, end, &end)
                               : format_build(g, json_string_value(format), &chars, end, &end);
        if (err != ERR_OK)
            return c->where[0] ? err_prefix(err, "%s", c->where) : err;
    } else if (form == FORM_JSON) {
        end = program_repeat(g, schema_quoted_char(c), min, max, end);
    } else if (form & T_ALL) {
        uint32_t rest = program_repeat(g, schema_verbatim_char(c), min ? min - 1 : 0,
                                       max == REPEAT_UNLIMITED ? max
                                       : max                   ? max - 1
                                                               : 0,
                                       end);
        rest = max ? first_char(c, form, rest) : PROGRAM_FAIL;
        end = program_either(g, min == 0 ? end : PROGRAM_FAIL, rest);
    } else {
        end = program_repeat(g, schema_verbatim_char(c), min, max, end);
    }
    *ret = form == FORM_JSON ? schema_quote(c, end) : end;
    return g->err;
}

static enum err build_array(struct schema_compiler *c, const json_t *s, uint32_t next,
                            uint32_t *ret)
{
    struct grammar *g = c->g;
    const json_t *prefix = json_object_get(s, "prefixItems"), *items = json_object_get(s, "items");
    size_t n = json_array_size(prefix);
    int64_t min = schema_count(s, "minItems", 0);
    uint32_t max = schema_max(s, "maxItems"), rule = schema_any(c, SCHEMA_ANY_DEPTH);
    if (items)
        TRY(schema_rule_member(c, "items", items, &rule));
    if (json_is_false(items))
        rule = PROGRAM_FAIL;
    if (n == 0) {
        if (rule == PROGRAM_FAIL)
            max = 0;
        *ret = max < min ? PROGRAM_FAIL : schema_list(c, "[]", rule, (uint32_t)min, max, next);
        return g->err;
    }
    if (max < n)
        n = max;
    /* Behind the last of the prefix: more items, or the end. From the back, so that each item knows
     * what follows it. */
    uint32_t close = program_text(g, "]", 1, next), end = schema_space(c, close);
    uint32_t more = schema_comma(c, program_call(g, rule, PROGRAM_RETURN));
    uint32_t left = max == REPEAT_UNLIMITED ? max : max - (uint32_t)n;
    uint32_t at = program_repeat(g, more, (uint32_t)MAX(min - (int64_t)n, 0), left, end);
    for (size_t i = n; i-- > 0;) {
        char name[24];
        snprintf(name, sizeof(name), "%zu", i);
        TRY(schema_build_member(c, "prefixItems", name, json_array_get(prefix, i), FORM_JSON, at,
                                &at));
        if (i > 0)
            at = program_either(g, (int64_t)i >= min ? end : PROGRAM_FAIL, schema_comma(c, at));
    }
    at = program_either(g, min <= 0 ? close : PROGRAM_FAIL, n ? at : PROGRAM_FAIL);
    *ret = program_text(g, "[", 1, schema_space(c, at));
    return g->err;
}

enum err schema_build_plain(struct schema_compiler *c, const json_t *s, unsigned form,
                            uint32_t next, uint32_t *ret)
{
    unsigned types = schema_types(s);
    if (json_object_get(s, "enum") || json_object_get(s, "const"))
        return build_enum(c, s, form, next, ret);
    if (types == T_ALL && form == FORM_JSON && !json_object_get(s, "type")) {
        *ret = program_call(c->g, schema_any(c, SCHEMA_ANY_DEPTH), next);
        return c->g->err;
    }
    uint32_t edges[7], n = 0;
    struct number_range range = schema_range(s);
    if (types & T_STRING)
        TRY(build_string(c, s, form, next, &edges[n++]));
    if (types == T_ALL && form == FORM_ARGUMENT && !json_object_get(s, "type"))
        types = 0; /* any text is something */
    if (types & (T_NUMBER | T_INTEGER))
        edges[n++] = number_build(c->g, &range, !(types & T_NUMBER), next);
    if (types & T_BOOLEAN) {
        edges[n++] = program_text(c->g, "true", 4, next);
        edges[n++] = program_text(c->g, "false", 5, next);
    }
    if (types & T_NULL)
        edges[n++] = program_text(c->g, "null", 4, next);
    if (types & T_ARRAY)
        TRY(build_array(c, s, next, &edges[n++]));
    if (types & T_OBJECT)
        TRY(schema_build_object(c, s, next, &edges[n++]));
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}
