/* schema_object.c: objects, and arguments of calls, which are objects in tags.
 *
 * Declared properties come in the schema's order, each once, so what may come next is a place in a
 * list. Undeclared ones come after them, under keys that spell no declared name.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/grammar/schema_impl.h"

#define MAX_NAME 256 /* bytes of a declared name that undeclared keys are kept from */

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
        edges[n_edges++] = wide ? PROGRAM_FAIL : program_call(g, schema_wide_char(k->c), k->rest);
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
    for (size_t i = 0; i < n; i++) {
        keys[i] = json_string_value(json_array_get(names, i));
        if (strlen(keys[i]) > MAX_NAME)
            return schema_refuse(c->where,
                                 "\"additionalProperties\" beside a name of more than %d bytes is "
                                 "not supported",
                                 MAX_NAME);
    }
    qsort(keys, n, sizeof(*keys), name_order);
    struct key_builder k = {.c = c, .symbols = key_symbols(json), .end = end};
    uint32_t in_key = schema_quoted_char(c);
    if (!json)
        in_key = program_either(g, program_set(g, &k.symbols, PROGRAM_RETURN), schema_wide_char(c));
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
    int64_t min = schema_count(s, "minProperties", 0),
            max = schema_count(s, "maxProperties", INT64_MAX);
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
    uint32_t close = program_text(g, "}", 1, next), end = schema_space(c, close);
    uint32_t first = close, rest = end;
    size_t n = json_array_size(m->names);
    if (!m->other && schema_count(s, "minProperties", 0) > m->n_required)
        first = PROGRAM_FAIL; /* and there is no member */
    if (m->other) {
        uint32_t value, pair, max = schema_max(s, "maxProperties");
        TRY(schema_rule_member(c, "additionalProperties", m->other, &value));
        TRY(undeclared_key(c, m->names, true,
                           schema_quote(c, schema_colon(c, program_call(g, value, PROGRAM_RETURN))),
                           &pair));
        pair = schema_quote(c, pair);
        uint32_t more = schema_comma(c, program_call(g, pair, PROGRAM_RETURN));
        rest = program_repeat(g, more, 0, REPEAT_UNLIMITED, end);
        uint32_t most = max == REPEAT_UNLIMITED || n > 0 ? REPEAT_UNLIMITED : max - (max > 0);
        first = program_call(g, pair, program_repeat(g, more, 0, most, end));
        if (n == 0 && max == 0)
            first = PROGRAM_FAIL;
        if (n > 0 || schema_count(s, "minProperties", 0) == 0)
            first = program_either(g, close, first);
    }
    for (size_t i = n; i-- > 0;) {
        const json_t *name = json_array_get(m->names, i);
        const char *key = json_string_value(name);
        uint32_t value, pair;
        TRY(schema_build_member(c, "properties", key, member_schema(s, key), FORM_JSON, rest,
                                &value));
        TRY(schema_literal(c, name, value == PROGRAM_FAIL ? value : schema_colon(c, value), &pair));
        bool optional = !is_required(s, key);
        first = program_either(g, pair, optional ? first : PROGRAM_FAIL);
        rest = program_either(g, schema_comma(c, pair), optional ? rest : PROGRAM_FAIL);
    }
    *ret = program_text(g, "{", 1, schema_space(c, first));
    return g->err;
}

enum err schema_build_object(struct schema_compiler *c, const json_t *s, uint32_t next,
                             uint32_t *ret)
{
    struct members m;
    TRY(members_of(c, s, &m));
    enum err err = build_members(c, s, &m, next, ret);
    json_decref(m.names);
    return err;
}

/* ---- arguments of calls ---- */

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
        struct number_range r = schema_range(s);
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
        err = schema_build(c, schema, form, program_tag(c->g, TAG_VALUE_END, next), &value);
    c->where[n] = 0;
    *ret = program_tag(c->g, TAG_KEY_END, program_tag(c->g, TAG_VALUE, value));
    return err;
}

static enum err arguments(struct schema_compiler *c, const json_t *s, const struct members *m,
                          uint32_t next, uint32_t *ret)
{
    struct grammar *g = c->g;
    uint32_t at = next, value, pair;
    if (schema_count(s, "minProperties", 0) > m->n_required)
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
        err = schema_run_rules(c);
    json_decref(list);
    TRY(err);
    *ret = program_split(c->g, edges, n);
    return c->g->err;
}
