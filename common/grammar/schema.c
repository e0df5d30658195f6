/* schema.c: JSON Schema to automaton.
 *
 * A schema is compiled where it stands, with what follows it as continuation, so most of an answer
 * needs no frame. Where it may come again ($ref, items, merged ones) it is a rule, compiled once:
 * rules wait in a list, so C recursion is bounded by the nesting of the text.
 *
 * Two forms. JSON: inside JSON, strings quoted. ARGUMENT: a call's argument, between tags: strings
 * verbatim, all else JSON. The client types an argument's text by the schema, and where a string is
 * one of several types, text that happens to be JSON of another type becomes that type. So if those
 * others have constraints (the form's bits name them), strings may not begin like them.
 */
#include "common/grammar/schema.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/base/json.h"
#include "common/grammar/merge.h"
#include "common/grammar/number.h"
#include "common/grammar/pattern.h"

#define MAX_RULES  4000
#define MAX_BUDGET 100000
#define ANY_DEPTH  16 /* of JSON that no schema describes */
#define MAX_WHERE  160
#define MAX_INDENT 20

enum { FORM_JSON = 0, FORM_ARGUMENT = 128 }; /* an ARGUMENT form has T_ bits below */

struct rule {
    json_t *schema;
    unsigned form;
    uint32_t forward;
    char where[MAX_WHERE];
};

struct schema_compiler {
    struct grammar *g;
    struct schema_context x;
    char where[MAX_WHERE];
    struct rule *rules;
    size_t n_rules, cap_rules, n_done;
    json_t *known; /* text of a merged schema -> itself, so that equal ones are one rule */
    json_t *empty; /* {} */
    uint32_t space, quoted_char, verbatim_char, wide_char, any[ANY_DEPTH + 1];
};

static enum err build(struct schema_compiler *c, const json_t *schema, unsigned form, uint32_t next,
                      uint32_t *ret);
static enum err plain(struct schema_compiler *c, const json_t *s, unsigned form, uint32_t next,
                      uint32_t *ret);
static uint32_t any(struct schema_compiler *c, int depth);

/* ---- what all schemas share ---- */

/* Nothing, a space, or a new line and its indentation. */
static uint32_t space(struct schema_compiler *c, uint32_t next)
{
    struct grammar *g = c->g;
    if (!c->space) {
        struct symset blank = {0};
        symset_add(&blank, ' ');
        symset_add(&blank, '\t');
        uint32_t indent = program_set(g, &blank, PROGRAM_RETURN);
        indent = program_repeat(g, indent, 0, MAX_INDENT, PROGRAM_RETURN);
        uint32_t edges[] = {PROGRAM_RETURN, program_text(g, " ", 1, PROGRAM_RETURN),
                            program_text(g, "\n", 1, indent)};
        c->space = program_split(g, edges, 3);
    }
    return program_call(g, c->space, next);
}

static uint32_t wide_char(struct schema_compiler *c)
{
    if (!c->wide_char)
        c->wide_char = program_wide_char(c->g, PROGRAM_RETURN);
    return c->wide_char;
}

static uint32_t hex_digits(struct grammar *g, const char *const *sets, size_t n, uint32_t next)
{
    while (n-- > 0) {
        struct symset set = {0};
        for (const char *c = sets[n]; *c; c++)
            symset_add(&set, (uint8_t)*c);
        next = program_set(g, &set, next);
    }
    return next;
}

/* \uXXXX: neither NUL, which many programs cannot hold, nor half a character. */
static uint32_t escape_u(struct grammar *g, uint32_t next)
{
#define HEX "0123456789abcdefABCDEF"
    static const char *const any4[] = {"123456789abcefABCEF", HEX, HEX, HEX};
    static const char *const zero[] = {"0", "123456789abcdefABCDEF", HEX, HEX};
    static const char *const zeros[] = {"0", "0", "123456789abcdefABCDEF", HEX};
    static const char *const ascii[] = {"0", "0", "0", "123456789abcdefABCDEF"};
    static const char *const d[] = {"dD", "01234567", HEX, HEX};
    static const char *const high[] = {"dD", "89abAB", HEX, HEX};
    static const char *const low[] = {"dD", "cdefCDEF", HEX, HEX};
#undef HEX
    uint32_t second = program_text(g, "\\u", 2, hex_digits(g, low, 4, next));
    uint32_t edges[] = {hex_digits(g, any4, 4, next),  hex_digits(g, zero, 4, next),
                        hex_digits(g, zeros, 4, next), hex_digits(g, ascii, 4, next),
                        hex_digits(g, d, 4, next),     hex_digits(g, high, 4, second)};
    return program_text(g, "u", 1, program_split(g, edges, ARRAY_LEN(edges)));
}

/* A character of a JSON string, escapes included. */
static uint32_t quoted_char(struct schema_compiler *c)
{
    struct grammar *g = c->g;
    if (!c->quoted_char) {
        struct symset direct = {0}, escaped = {0};
        for (uint32_t b = 0x20; b < 0x80; b++)
            if (b != '"' && b != '\\')
                symset_add(&direct, b);
        for (const char *e = "\"\\/bfnrt"; *e; e++)
            symset_add(&escaped, (uint8_t)*e);
        uint32_t escape = program_either(g, program_set(g, &escaped, PROGRAM_RETURN),
                                         escape_u(g, PROGRAM_RETURN));
        uint32_t edges[] = {program_set(g, &direct, PROGRAM_RETURN), wide_char(c),
                            program_text(g, "\\", 1, escape)};
        c->quoted_char = program_split(g, edges, 3);
    }
    return c->quoted_char;
}

/* A character of a verbatim string. */
static uint32_t verbatim_char(struct schema_compiler *c)
{
    if (!c->verbatim_char)
        c->verbatim_char =
            program_either(c->g, program_range(c->g, 0x01, 0x7f, PROGRAM_RETURN), wide_char(c));
    return c->verbatim_char;
}

static uint32_t quote(struct schema_compiler *c, uint32_t next)
{
    return program_text(c->g, "\"", 1, next);
}

/* A quoted string of any content. */
static uint32_t any_string(struct schema_compiler *c, uint32_t next)
{
    return quote(c, program_repeat(c->g, quoted_char(c), 0, REPEAT_UNLIMITED, quote(c, next)));
}

static uint32_t comma(struct schema_compiler *c, uint32_t next)
{
    return program_text(c->g, ",", 1, space(c, next));
}

static uint32_t colon(struct schema_compiler *c, uint32_t next)
{
    return program_text(c->g, ":", 1, space(c, next));
}

/* open (item (, item)*)? close, where item is a rule; more: n further items from min to max. */
static uint32_t list_of(struct schema_compiler *c, const char *brackets, uint32_t item,
                        uint32_t min, uint32_t max, uint32_t next)
{
    struct grammar *g = c->g;
    uint32_t close = program_text(g, brackets + 1, 1, next), end = space(c, close);
    uint32_t empty = min == 0 ? close : PROGRAM_FAIL, full = PROGRAM_FAIL;
    if (max > 0) {
        uint32_t more = comma(c, program_call(g, item, PROGRAM_RETURN));
        uint32_t most = max == REPEAT_UNLIMITED ? max : max - 1;
        full = program_call(g, item, program_repeat(g, more, min ? min - 1 : 0, most, end));
    }
    return program_text(g, brackets, 1, space(c, program_either(g, empty, full)));
}

static uint32_t words(struct grammar *g, uint32_t next)
{
    uint32_t edges[] = {program_text(g, "true", 4, next), program_text(g, "false", 5, next),
                        program_text(g, "null", 4, next)};
    return program_split(g, edges, 3);
}

/* A rule: any JSON, `depth` levels of arrays and objects at most. */
static uint32_t any(struct schema_compiler *c, int depth)
{
    if (!c->any[depth]) {
        static const struct number_range all = {-INFINITY, INFINITY, false, false};
        struct grammar *g = c->g;
        uint32_t end = PROGRAM_RETURN, edges[5] = {0};
        uint32_t inner = depth > 0 ? any(c, depth - 1) : PROGRAM_FAIL;
        uint32_t pair = any_string(c, colon(c, program_call(g, inner, end)));
        uint32_t most = depth > 0 ? REPEAT_UNLIMITED : 0;
        edges[0] = any_string(c, end);
        edges[1] = number_build(g, &all, false, end);
        edges[2] = words(g, end);
        edges[3] = list_of(c, "[]", inner, 0, most, end);
        edges[4] = list_of(c, "{}", pair, 0, most, end);
        c->any[depth] = program_split(g, edges, 5);
    }
    return c->any[depth];
}

/* ---- rules ---- */

static enum err rule_get(struct schema_compiler *c, const json_t *schema, unsigned form,
                         const char *where, uint32_t *ret)
{
    for (size_t i = 0; i < c->n_rules; i++)
        if (c->rules[i].schema == schema && c->rules[i].form == form) {
            *ret = c->rules[i].forward;
            return ERR_OK;
        }
    if (c->n_rules == MAX_RULES)
        return err_set(ERR_TOO_LARGE,
                       "%s: the schema is too large: it unfolds to more than %d parts", c->where,
                       MAX_RULES);
    if (c->n_rules == c->cap_rules) {
        size_t cap = c->cap_rules ? c->cap_rules * 2 : 32;
        void *rules = realloc(c->rules, cap * sizeof(*c->rules));
        if (!rules)
            return err_set(ERR_NOMEM, "no memory for a schema");
        c->rules = rules;
        c->cap_rules = cap;
    }
    struct rule *r = &c->rules[c->n_rules++];
    *r = (struct rule){
        .schema = json_incref((json_t *)schema), .form = form, .forward = program_forward(c->g)};
    size_t n = MIN(strlen(where), sizeof(r->where) - 1);
    memcpy(r->where, where, n); /* cut where it is too long */
    *ret = r->forward;
    return c->g->err;
}

/* The rule of a schema that was put together: equal ones are one. */
static enum err rule_merged(struct schema_compiler *c, json_t *schema, unsigned form, uint32_t *ret)
{
    char *text = json_dumps(schema, JSON_COMPACT | JSON_SORT_KEYS);
    if (!text)
        return err_set(ERR_NOMEM, "no memory for a schema");
    json_t *known = json_object_get(c->known, text);
    if (!known) {
        json_object_set(c->known, text, schema);
        known = schema;
    }
    free(text);
    return rule_get(c, known, form, c->where, ret);
}

static enum err run_rules(struct schema_compiler *c)
{
    for (; c->n_done < c->n_rules; c->n_done++) {
        struct rule r = c->rules[c->n_done];
        uint32_t node;
        memcpy(c->where, r.where, sizeof(c->where));
        TRY(build(c, r.schema, r.form, PROGRAM_RETURN, &node));
        program_resolve(c->g, r.forward, node);
    }
    return c->g->err;
}

/* Compiles a member of the schema in hand, whose sentences name it. */
static enum err build_member(struct schema_compiler *c, const char *kind, const char *name,
                             const json_t *schema, unsigned form, uint32_t next, uint32_t *ret)
{
    size_t n = strlen(c->where);
    snprintf(c->where + n, sizeof(c->where) - n, "%s%s%s%.60s", n ? "." : "", kind,
             name[0] ? "." : "", name);
    enum err err = build(c, schema, form, next, ret);
    c->where[n] = 0;
    return err;
}

static enum err rule_member(struct schema_compiler *c, const char *kind, const json_t *schema,
                            uint32_t *ret)
{
    char where[2 * MAX_WHERE];
    snprintf(where, sizeof(where), "%s%s%s", c->where, c->where[0] ? "." : "", kind);
    if (json_object_get(schema, "allOf") && json_object_size(schema) == 1) {
        json_t *same = (json_t *)schema; /* perhaps put together */
        return rule_merged(c, same, FORM_JSON, ret);
    }
    return rule_get(c, schema, FORM_JSON, where, ret);
}

/* ---- combinations ---- */

static enum err build_union(struct schema_compiler *c, const char *kind, const json_t *branches,
                            unsigned form, uint32_t next, uint32_t *ret)
{
    uint32_t edges[MERGE_MAX];
    size_t n = json_array_size(branches);
    if (n > MERGE_MAX)
        return schema_refuse(c->where, "\"%s\" has more than %d branches", kind, MERGE_MAX);
    for (size_t i = 0; i < n; i++) {
        char name[24];
        snprintf(name, sizeof(name), "%zu", i);
        TRY(build_member(c, kind, name, json_array_get(branches, i), form, next, &edges[i]));
    }
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}

/* Keywords that say something, the given one aside. */
static bool says_more(const json_t *schema, const char *but)
{
    static const char *const words_[] = {"$ref",
                                         "allOf",
                                         "anyOf",
                                         "oneOf",
                                         "type",
                                         "enum",
                                         "const",
                                         "properties",
                                         "required",
                                         "additionalProperties",
                                         "minProperties",
                                         "maxProperties",
                                         "items",
                                         "prefixItems",
                                         "minItems",
                                         "maxItems",
                                         "minLength",
                                         "maxLength",
                                         "pattern",
                                         "format",
                                         "minimum",
                                         "maximum",
                                         "exclusiveMinimum",
                                         "exclusiveMaximum"};
    for (size_t i = 0; i < ARRAY_LEN(words_); i++)
        if (strcmp(words_[i], but) != 0 && json_object_get(schema, words_[i]))
            return true;
    return false;
}

static enum err build_merged(struct schema_compiler *c, const json_t *schema, unsigned form,
                             uint32_t next, uint32_t *ret)
{
    json_t *list = NULL;
    uint32_t edges[MERGE_MAX], rule;
    TRY(schema_expand(&c->x, schema, &list));
    enum err err = ERR_OK;
    size_t n = 0;
    for (; n < json_array_size(list) && err == ERR_OK; n++) {
        err = rule_merged(c, json_array_get(list, n), form, &rule);
        if (err == ERR_OK)
            edges[n] = program_call(c->g, rule, next);
    }
    json_decref(list);
    TRY(err);
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}

static enum err build(struct schema_compiler *c, const json_t *schema, unsigned form, uint32_t next,
                      uint32_t *ret)
{
    *ret = PROGRAM_FAIL;
    TRY(c->g->err);
    if (json_is_false(schema))
        return ERR_OK;
    c->x.where = c->where;
    if (json_is_true(schema))
        return plain(c, c->empty, form, next, ret);
    unsigned kinds;
    TRY(schema_keywords(schema, c->where, &kinds));
    if (!(kinds & 1u << KEYWORD_COMBINES))
        return plain(c, schema, form, next, ret);

    const json_t *ref = json_object_get(schema, "$ref"), *all = json_object_get(schema, "allOf");
    const json_t *some = json_object_get(schema, "anyOf"), *one = json_object_get(schema, "oneOf");
    if (ref && !says_more(schema, "$ref")) {
        const json_t *target;
        uint32_t rule;
        TRY(schema_follow(&c->x, json_string_value(ref), &target));
        TRY(rule_get(c, target, form, json_string_value(ref), &rule));
        *ret = program_call(c->g, rule, next);
        return c->g->err;
    }
    if (json_array_size(all) == 1 && !says_more(schema, "allOf"))
        return build(c, json_array_get(all, 0), form, next, ret);
    if (some && !says_more(schema, "anyOf"))
        return build_union(c, "anyOf", some, form, next, ret);
    if (one && !says_more(schema, "oneOf")) {
        TRY(schema_check_disjoint(&c->x, one));
        return build_union(c, "oneOf", one, form, next, ret);
    }
    return build_merged(c, schema, form, next, ret);
}

/* ---- values ---- */

static int64_t count_of(const json_t *s, const char *key, int64_t otherwise)
{
    const json_t *v = json_object_get(s, key);
    return v ? json_integer_value(v) : otherwise;
}

static uint32_t max_of(const json_t *s, const char *key)
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

static struct number_range range_of(const json_t *s)
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
    struct number_range r = range_of(s);
    unsigned type = schema_type_of(v);
    double x = json_number_value(v);
    *ret = (schema_types(s) & type) != 0;
    if (type == T_STRING)
        *ret = *ret && (int64_t)n_chars(v) >= count_of(s, "minLength", 0) &&
               n_chars(v) <= max_of(s, "maxLength");
    if (type & T_NUMBER)
        *ret = *ret && (r.min_exclusive ? x > r.min : x >= r.min) &&
               (r.max_exclusive ? x < r.max : x <= r.max);
    return ERR_OK;
}

static enum err literal(struct schema_compiler *c, const json_t *v, uint32_t next, uint32_t *ret);

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
        at = space(c, at);
    enum err err = ERR_OK;
    for (i = n; i-- > 0 && err == ERR_OK;) {
        err = literal(c, object ? json_object_get(v, keys[i]) : json_array_get(v, i), at, &at);
        if (err == ERR_OK && object) {
            json_t *name = json_string(keys[i]);
            err = name ? literal(c, name, colon(c, at), &at) : err_set(ERR_NOMEM, "no memory");
            json_decref(name);
        }
        at = i > 0 ? comma(c, at) : space(c, at);
    }
    free(keys);
    TRY(err);
    *ret = program_text(c->g, object ? "{" : "[", 1, at);
    return c->g->err;
}

/* One JSON value. */
static enum err literal(struct schema_compiler *c, const json_t *v, uint32_t next, uint32_t *ret)
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
    bool result = other && (schema_type_of(other) & form & T_ALL & ~(unsigned)T_STRING);
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
            err = literal(c, v, next, &edges[n_edges++]);
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
                          program_call(c->g, wide_char(c), next));
}

static enum err build_string(struct schema_compiler *c, const json_t *s, unsigned form,
                             uint32_t next, uint32_t *ret)
{
    struct grammar *g = c->g;
    const json_t *pattern = json_object_get(s, "pattern"), *format = json_object_get(s, "format");
    uint32_t min = (uint32_t)count_of(s, "minLength", 0), max = max_of(s, "maxLength");
    uint32_t end = form == FORM_JSON ? quote(c, next) : next;
    *ret = PROGRAM_FAIL;
    if (max < min)
        return ERR_OK;
    if (pattern || format) {
        struct pattern_chars chars = {.any = form == FORM_JSON ? quoted_char(c) : verbatim_char(c),
                                      .json = form == FORM_JSON};
        const char *key = pattern ? "pattern" : "format";
        if (pattern && format)
            return schema_refuse(c->where, "\"pattern\" beside \"format\" is not supported");
        if (min > 0 || max != REPEAT_UNLIMITED)
            return schema_refuse(c->where,
                                 "\"%s\" beside \"minLength\" or \"maxLength\" is not "
                                 "supported",
                                 key);
        if (form != FORM_JSON && form & T_ALL)
            return schema_refuse(c->where,
                                 "\"%s\" in an argument of several types is not supported", key);
        enum err err = pattern ? pattern_build(g, json_string_value(pattern), &chars, end, &end)
                               : format_build(g, json_string_value(format), &chars, end, &end);
        if (err != ERR_OK)
            return c->where[0] ? err_prefix(err, "%s", c->where) : err;
    } else if (form == FORM_JSON) {
        end = program_repeat(g, quoted_char(c), min, max, end);
    } else if (form & T_ALL) {
        uint32_t rest = program_repeat(g, verbatim_char(c), min ? min - 1 : 0,
                                       max == REPEAT_UNLIMITED ? max
                                       : max                   ? max - 1
                                                               : 0,
                                       end);
        rest = max ? first_char(c, form, rest) : PROGRAM_FAIL;
        end = program_either(g, min == 0 ? end : PROGRAM_FAIL, rest);
    } else {
        end = program_repeat(g, verbatim_char(c), min, max, end);
    }
    *ret = form == FORM_JSON ? quote(c, end) : end;
    return g->err;
}

static enum err build_array(struct schema_compiler *c, const json_t *s, uint32_t next,
                            uint32_t *ret)
{
    struct grammar *g = c->g;
    const json_t *prefix = json_object_get(s, "prefixItems"), *items = json_object_get(s, "items");
    size_t n = json_array_size(prefix);
    int64_t min = count_of(s, "minItems", 0);
    uint32_t max = max_of(s, "maxItems"), rule = any(c, ANY_DEPTH);
    if (items)
        TRY(rule_member(c, "items", items, &rule));
    if (json_is_false(items))
        rule = PROGRAM_FAIL;
    if (n == 0) {
        if (rule == PROGRAM_FAIL)
            max = 0;
        *ret = max < min ? PROGRAM_FAIL : list_of(c, "[]", rule, (uint32_t)min, max, next);
        return g->err;
    }
    if (max < n)
        n = max;
    /* Behind the last of the prefix: more items, or the end. From the back, so that each item knows
     * what follows it. */
    uint32_t close = program_text(g, "]", 1, next), end = space(c, close);
    uint32_t more = comma(c, program_call(g, rule, PROGRAM_RETURN));
    uint32_t left = max == REPEAT_UNLIMITED ? max : max - (uint32_t)n;
    uint32_t at = program_repeat(g, more, (uint32_t)MAX(min - (int64_t)n, 0), left, end);
    for (size_t i = n; i-- > 0;) {
        char name[24];
        snprintf(name, sizeof(name), "%zu", i);
        TRY(build_member(c, "prefixItems", name, json_array_get(prefix, i), FORM_JSON, at, &at));
        if (i > 0)
            at = program_either(g, (int64_t)i >= min ? end : PROGRAM_FAIL, comma(c, at));
    }
    at = program_either(g, min <= 0 ? close : PROGRAM_FAIL, n ? at : PROGRAM_FAIL);
    *ret = program_text(g, "[", 1, space(c, at));
    return g->err;
}

/* ---- objects ---- */

static bool is_required(const json_t *s, const char *key)
{
    const json_t *required = json_object_get(s, "required");
    for (size_t i = 0; i < json_array_size(required); i++)
        if (!strcmp(json_string_value(json_array_get(required, i)), key))
            return true;
    return false;
}

/* Characters that may begin, or go on, an undeclared key: in an argument's only those that no
 * client trims or mistakes. */
static struct symset key_symbols(bool json)
{
    struct symset set = {0};
    for (uint32_t b = ' '; b < 0x7f; b++)
        if (json ? b != '"' && b != '\\'
                 : (b >= '0' && b <= '9') || ((b | 32) >= 'a' && (b | 32) <= 'z') ||
                       strchr("$-._", (int)b))
            symset_add(&set, b);
    return set;
}

/* Do the first n bytes of UTF-8 text end inside a character? */
static bool cuts_char(const char *text, size_t n)
{
    size_t back = 0;
    while (back < n && ((uint8_t)text[n - 1 - back] & 0xc0) == 0x80)
        back++;
    uint8_t lead = back < n ? (uint8_t)text[n - 1 - back] : 0;
    size_t whole = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    return back + 1 < whole;
}

struct key_builder {
    struct schema_compiler *c;
    struct symset symbols;
    uint32_t rest, end; /* any more of a key that differs already; what follows the key */
};

/* A key that is none of keys[n], which are sorted and begin with the same `depth` bytes, those that
 * were read. No escapes until it differs: they could spell a name. */
static uint32_t other_key(const struct key_builder *k, const char *const *keys, size_t n,
                          size_t depth)
{
    struct grammar *g = k->c->g;
    struct symset differs = k->symbols;
    uint32_t edges[260];
    size_t n_edges = 0, i = 0;
    bool wide = false, inside = cuts_char(keys[0], depth);
    bool whole = !keys[0][depth]; /* what was read is a name */
    while (i < n && !keys[i][depth])
        i++;
    while (i < n) {
        uint8_t b = (uint8_t)keys[i][depth];
        size_t last = i;
        while (last < n && (uint8_t)keys[last][depth] == b)
            last++;
        wide |= b >= 0x80;
        if (b >= 0x80 || symset_has(&k->symbols, b))
            edges[n_edges++] = program_range(g, b, b, other_key(k, keys + i, last - i, depth + 1));
        differs.bits[b / 64] &= ~(1ull << b % 64);
        i = last;
    }
    if (!inside) {
        edges[n_edges++] = program_set(g, &differs, k->rest);
        edges[n_edges++] = wide ? PROGRAM_FAIL : program_call(g, wide_char(k->c), k->rest);
        edges[n_edges++] = whole || depth == 0 ? PROGRAM_FAIL : k->end;
    }
    return program_split(g, edges, n_edges);
}

static int name_order(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* A key that is not declared, then end. */
static enum err undeclared_key(struct schema_compiler *c, const json_t *names, bool json,
                               uint32_t end, uint32_t *ret)
{
    struct grammar *g = c->g;
    size_t n = json_array_size(names);
    OWNED_MEM const char **keys = calloc(n + 1, sizeof(*keys));
    if (!keys)
        return err_set(ERR_NOMEM, "no memory for a schema");
    for (size_t i = 0; i < n; i++)
        keys[i] = json_string_value(json_array_get(names, i));
    qsort(keys, n, sizeof(*keys), name_order);
    struct key_builder k = {.c = c, .symbols = key_symbols(json), .end = end};
    uint32_t in_key = quoted_char(c);
    if (!json)
        in_key = program_either(g, program_set(g, &k.symbols, PROGRAM_RETURN), wide_char(c));
    k.rest = program_repeat(g, in_key, 0, REPEAT_UNLIMITED, end);
    if (n > 0)
        *ret = other_key(&k, keys, n, 0);
    else
        *ret = json ? k.rest : program_call(g, in_key, k.rest);
    return g->err;
}

/* What an object may hold, in order: the declared names, then those only required. */
struct members {
    json_t *names;       /* strings */
    const json_t *other; /* schema of undeclared ones; NULL: none may come */
    int64_t n_required;
};

static enum err members_of(struct schema_compiler *c, const json_t *s, struct members *ret)
{
    json_t *declared = json_object_get(s, "properties"), *required = json_object_get(s, "required");
    const json_t *other = json_object_get(s, "additionalProperties");
    json_t *v;
    const char *key;
    *ret = (struct members){.names = json_array()};
    if (!ret->names)
        return err_set(ERR_NOMEM, "no memory for a schema");
    if (other ? !json_is_false(other) : !declared)
        ret->other = other ? other : json_true();
    json_object_foreach (declared, key, v) {
        json_array_append_new(ret->names, json_string(key));
        ret->n_required += is_required(s, key);
    }
    for (size_t i = 0; i < json_array_size(required); i++) {
        json_t *name = json_array_get(required, i);
        bool again = json_object_get(declared, json_string_value(name)) != NULL;
        for (size_t k = 0; k < i && !again; k++)
            again = json_equal(name, json_array_get(required, k));
        if (!again) {
            json_array_append(ret->names, name);
            ret->n_required++;
        }
    }
    int64_t min = count_of(s, "minProperties", 0), max = count_of(s, "maxProperties", INT64_MAX);
    int64_t n = (int64_t)json_array_size(ret->names);
    bool closed = !ret->other;
    const char *why = min > ret->n_required && (n > 0 || min > 1)         ? "minProperties"
                      : max < INT64_MAX && !(closed && max >= n) && n > 0 ? "maxProperties"
                                                                          : NULL;
    if (!why)
        return ERR_OK;
    json_decref(ret->names);
    return schema_refuse(c->where,
                         "\"%s\" is only supported where the declared properties settle it, "
                         "or without any",
                         why);
}

static const json_t *member_schema(const json_t *s, const char *name)
{
    const json_t *declared = json_object_get(json_object_get(s, "properties"), name);
    const json_t *other = json_object_get(s, "additionalProperties");
    return declared ? declared : other ? other : json_true();
}

/* Builds from the back. first: what may come while nothing has; rest: after a member. */
static enum err build_members(struct schema_compiler *c, const json_t *s, const struct members *m,
                              uint32_t next, uint32_t *ret)
{
    struct grammar *g = c->g;
    uint32_t close = program_text(g, "}", 1, next), end = space(c, close);
    uint32_t first = close, rest = end;
    size_t n = json_array_size(m->names);
    if (!m->other && count_of(s, "minProperties", 0) > m->n_required)
        first = PROGRAM_FAIL; /* and there is no member */
    if (m->other) {
        uint32_t value, pair, max = max_of(s, "maxProperties");
        TRY(rule_member(c, "additionalProperties", m->other, &value));
        TRY(undeclared_key(c, m->names, true,
                           quote(c, colon(c, program_call(g, value, PROGRAM_RETURN))), &pair));
        pair = quote(c, pair);
        uint32_t more = comma(c, program_call(g, pair, PROGRAM_RETURN));
        rest = program_repeat(g, more, 0, REPEAT_UNLIMITED, end);
        uint32_t most = max == REPEAT_UNLIMITED || n > 0 ? REPEAT_UNLIMITED : max - (max > 0);
        first = program_call(g, pair, program_repeat(g, more, 0, most, end));
        if (n == 0 && max == 0)
            first = PROGRAM_FAIL;
        if (n > 0 || count_of(s, "minProperties", 0) == 0)
            first = program_either(g, close, first);
    }
    for (size_t i = n; i-- > 0;) {
        const json_t *name = json_array_get(m->names, i);
        const char *key = json_string_value(name);
        uint32_t value, pair;
        TRY(build_member(c, "properties", key, member_schema(s, key), FORM_JSON, rest, &value));
        TRY(literal(c, name, value == PROGRAM_FAIL ? value : colon(c, value), &pair));
        bool optional = !is_required(s, key);
        first = program_either(g, pair, optional ? first : PROGRAM_FAIL);
        rest = program_either(g, comma(c, pair), optional ? rest : PROGRAM_FAIL);
    }
    *ret = program_text(g, "{", 1, space(c, first));
    return g->err;
}

static enum err build_object(struct schema_compiler *c, const json_t *s, uint32_t next,
                             uint32_t *ret)
{
    struct members m;
    TRY(members_of(c, s, &m));
    enum err err = build_members(c, s, &m, next, ret);
    json_decref(m.names);
    return err;
}

/* ---- a plain schema ---- */

static enum err plain(struct schema_compiler *c, const json_t *s, unsigned form, uint32_t next,
                      uint32_t *ret)
{
    unsigned types = schema_types(s);
    if (json_object_get(s, "enum") || json_object_get(s, "const"))
        return build_enum(c, s, form, next, ret);
    if (types == T_ALL && form == FORM_JSON && !json_object_get(s, "type")) {
        *ret = program_call(c->g, any(c, ANY_DEPTH), next);
        return c->g->err;
    }
    uint32_t edges[7], n = 0;
    struct number_range range = range_of(s);
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
        TRY(build_object(c, s, next, &edges[n++]));
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}

/* ---- entry ---- */

enum err schema_compiler_create(struct grammar *g, const json_t *root, const char *where,
                                struct schema_compiler **ret)
{
    struct schema_compiler *c = calloc(1, sizeof(*c));
    json_t *known = json_object(), *empty = json_object();
    if (!c || !known || !empty) {
        free(c);
        json_decref(known);
        json_decref(empty);
        return err_set(ERR_NOMEM, "no memory for a schema");
    }
    c->g = g;
    c->x = (struct schema_context){.root = root, .where = c->where, .budget = MAX_BUDGET};
    c->known = known;
    c->empty = empty;
    snprintf(c->where, sizeof(c->where), "%s", where);
    *ret = c;
    return ERR_OK;
}

void schema_compiler_destroy(struct schema_compiler *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n_rules; i++)
        json_decref(c->rules[i].schema);
    free(c->rules);
    json_decref(c->known);
    json_decref(c->empty);
    free(c);
}

enum err schema_build_json(struct schema_compiler *c, uint32_t next, uint32_t *ret)
{
    TRY(build(c, c->x.root, FORM_JSON, next, ret));
    return run_rules(c);
}

/* The types beside strings that an argument may have and whose values are constrained: text of a
 * string must not pass for one. */
static enum err argument_form(struct schema_compiler *c, const json_t *schema, unsigned *ret)
{
    json_t *list = NULL;
    *ret = FORM_ARGUMENT;
    c->x.where = c->where;
    TRY(schema_expand(&c->x, schema, &list));
    unsigned all = 0, bound_types = 0;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *s = json_array_get(list, i);
        unsigned types = schema_types(s);
        struct number_range r = range_of(s);
        all |= types;
        if (json_object_size(s) == 0)
            continue; /* anything */
        bound_types |= json_object_get(s, "enum") ? types : types & (T_OBJECT | T_ARRAY);
        if (!isinf(r.min) || !isinf(r.max))
            bound_types |= types & (T_NUMBER | T_INTEGER);
    }
    if (all & T_STRING)
        *ret |= bound_types & ~(unsigned)T_STRING;
    json_decref(list);
    return ERR_OK;
}

static enum err argument(struct schema_compiler *c, const char *key, const json_t *schema,
                         uint32_t next, uint32_t *ret)
{
    unsigned form;
    size_t n = strlen(c->where);
    snprintf(c->where + n, sizeof(c->where) - n, "%s%.60s", n ? "." : "", key);
    enum err err = argument_form(c, schema, &form);
    uint32_t value = PROGRAM_FAIL;
    if (err == ERR_OK)
        err = build(c, schema, form, program_tag(c->g, TAG_VALUE_END, next), &value);
    c->where[n] = 0;
    *ret = program_tag(c->g, TAG_KEY_END, program_tag(c->g, TAG_VALUE, value));
    return err;
}

static enum err arguments(struct schema_compiler *c, const json_t *s, const struct members *m,
                          uint32_t next, uint32_t *ret)
{
    struct grammar *g = c->g;
    uint32_t at = next, value, pair;
    if (count_of(s, "minProperties", 0) > m->n_required)
        return schema_refuse(c->where, "\"minProperties\" of arguments is not supported");
    if (m->other && json_object_get(s, "maxProperties"))
        return schema_refuse(c->where, "\"maxProperties\" of arguments is not supported");
    if (m->other) {
        uint32_t loop = program_forward(g);
        TRY(argument(c, "additionalProperties", m->other, loop, &value));
        TRY(undeclared_key(c, m->names, false, value, &pair));
        at = program_either(g, next, program_tag(g, TAG_KEY, pair));
        program_resolve(g, loop, at);
    }
    for (size_t i = json_array_size(m->names); i-- > 0;) {
        const char *key = json_string_value(json_array_get(m->names, i));
        TRY(argument(c, key, member_schema(s, key), at, &value));
        pair = program_tag(g, TAG_KEY, program_text(g, key, strlen(key), value));
        at = program_either(g, pair, is_required(s, key) ? PROGRAM_FAIL : at);
    }
    *ret = at;
    return g->err;
}

enum err schema_build_arguments(struct schema_compiler *c, uint32_t next, uint32_t *ret)
{
    json_t *list = NULL;
    uint32_t edges[MERGE_MAX];
    size_t n = 0;
    TRY(schema_expand(&c->x, c->x.root, &list));
    enum err err = ERR_OK;
    for (size_t i = 0; i < json_array_size(list) && err == ERR_OK; i++) {
        const json_t *s = json_array_get(list, i);
        struct members m;
        if (!(schema_types(s) & T_OBJECT))
            continue;
        err = json_object_get(s, "enum") ? schema_refuse(c->where, "\"enum\" of arguments is not "
                                                                   "supported")
                                         : members_of(c, s, &m);
        if (err != ERR_OK)
            break;
        err = arguments(c, s, &m, next, &edges[n++]);
        json_decref(m.names);
    }
    if (err == ERR_OK)
        err = run_rules(c);
    json_decref(list);
    TRY(err);
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}
