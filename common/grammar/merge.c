/* merge.c: $ref, allOf, anyOf and oneOf worked into plain schemas.
 *
 * Members that both sides constrain (a property, items) become {"allOf": [a, b]} and are merged
 * when they are compiled, so a merge goes one level deep and recursion through $ref stays lazy.
 */
#include "common/grammar/merge.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/base/json.h"

#define MAX_NESTED 32 /* $ref after $ref, combination in combination */

#define MAX_ENTRIES 1000 /* of a list or map, definitions aside */

enum shape {
    ANY,
    SCHEMA,
    SCHEMAS,
    SCHEMA_MAP,
    COUNT,
    NUMBER,
    STRING,
    STRINGS,
    VALUES,
    TYPES,
    BOOLEAN
};

/* clang-format off */
static const struct keyword {
    const char *name;
    enum keyword_kind kind;
    enum shape shape;
} keywords[] = {
    {"$ref",                 KEYWORD_COMBINES, STRING},
    {"allOf",                KEYWORD_COMBINES, SCHEMAS},
    {"anyOf",                KEYWORD_COMBINES, SCHEMAS},
    {"oneOf",                KEYWORD_COMBINES, SCHEMAS},
    {"type",                 KEYWORD_ASSERTS,  TYPES},
    {"enum",                 KEYWORD_ASSERTS,  VALUES},
    {"const",                KEYWORD_ASSERTS,  ANY},
    {"properties",           KEYWORD_ASSERTS,  SCHEMA_MAP},
    {"required",             KEYWORD_ASSERTS,  STRINGS},
    {"additionalProperties", KEYWORD_ASSERTS,  SCHEMA},
    {"minProperties",        KEYWORD_ASSERTS,  COUNT},
    {"maxProperties",        KEYWORD_ASSERTS,  COUNT},
    {"items",                KEYWORD_ASSERTS,  SCHEMA},
    {"prefixItems",          KEYWORD_ASSERTS,  SCHEMAS},
    {"minItems",             KEYWORD_ASSERTS,  COUNT},
    {"maxItems",             KEYWORD_ASSERTS,  COUNT},
    {"minLength",            KEYWORD_ASSERTS,  COUNT},
    {"maxLength",            KEYWORD_ASSERTS,  COUNT},
    {"pattern",              KEYWORD_ASSERTS,  STRING},
    {"format",               KEYWORD_ASSERTS,  STRING},
    {"minimum",              KEYWORD_ASSERTS,  NUMBER},
    {"maximum",              KEYWORD_ASSERTS,  NUMBER},
    {"exclusiveMinimum",     KEYWORD_ASSERTS,  NUMBER},
    {"exclusiveMaximum",     KEYWORD_ASSERTS,  NUMBER},
    {"$schema",              KEYWORD_NOTE,     ANY},
    {"$id",                  KEYWORD_NOTE,     ANY},
    {"$comment",             KEYWORD_NOTE,     ANY},
    {"$defs",                KEYWORD_NOTE,     SCHEMA_MAP},
    {"definitions",          KEYWORD_NOTE,     SCHEMA_MAP},
    {"title",                KEYWORD_NOTE,     ANY},
    {"description",          KEYWORD_NOTE,     ANY},
    {"default",              KEYWORD_NOTE,     ANY},
    {"example",              KEYWORD_NOTE,     ANY},
    {"examples",             KEYWORD_NOTE,     ANY},
    {"deprecated",           KEYWORD_NOTE,     ANY},
    {"readOnly",             KEYWORD_NOTE,     ANY},
    {"writeOnly",            KEYWORD_NOTE,     ANY},
    {"discriminator",        KEYWORD_NOTE,     ANY}, // OpenAPI: which branch, not what is valid
    {"contentMediaType",     KEYWORD_NOTE,     ANY},
    {"contentEncoding",      KEYWORD_NOTE,     ANY},
};
/* clang-format on */

enum err schema_refuse(const char *where, const char *fmt, ...)
{
    char text[300];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return err_set(ERR_INVALID, "%s%s%s", where, where[0] ? ": " : "", text);
}

static bool is_schema(const json_t *v) { return json_is_object(v) || json_is_boolean(v); }

static bool has_shape(const json_t *v, enum shape shape)
{
    size_t i;
    const char *key;
    json_t *item;
    switch (shape) {
    case ANY:
        return true;
    case SCHEMA:
        return is_schema(v);
    case SCHEMAS:
        json_array_foreach ((json_t *)v, i, item)
            if (!is_schema(item))
                return false;
        return json_array_size(v) > 0;
    case SCHEMA_MAP:
        json_object_foreach ((json_t *)v, key, item)
            if (!is_schema(item))
                return false;
        return json_is_object(v);
    case COUNT:
        return json_is_integer(v) && json_integer_value(v) >= 0 &&
               json_integer_value(v) < INT32_MAX;
    case NUMBER:
        return json_is_number(v) && isfinite(json_number_value(v));
    case STRING:
        return json_is_string(v);
    case STRINGS:
        json_array_foreach ((json_t *)v, i, item)
            if (!json_is_string(item))
                return false;
        return json_is_array(v);
    case VALUES:
        return json_array_size(v) > 0;
    case TYPES:
        return json_is_string(v) || json_array_size(v) > 0;
    case BOOLEAN:
        return json_is_boolean(v);
    }
    return false;
}

static enum err check_types(const json_t *v, const char *where)
{
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *name = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_type_named(json_string_value(name)))
            return schema_refuse(where, "\"type\" has no type named \"%.40s\"",
                                 json_is_string(name) ? json_string_value(name) : "?");
    }
    return ERR_OK;
}

enum err schema_keywords(const json_t *schema, const char *where, unsigned *ret)
{
    const char *key;
    json_t *v;
    *ret = 0;
    json_object_foreach ((json_t *)schema, key, v) {
        const struct keyword *k = NULL;
        for (size_t i = 0; i < ARRAY_LEN(keywords) && !k; i++)
            if (!strcmp(key, keywords[i].name))
                k = &keywords[i];
        bool says_nothing =
            (!strcmp(key, "uniqueItems") || !strcmp(key, "nullable")) && json_is_false(v);
        if (!k && (says_nothing || !strncmp(key, "x-", 2)))
            continue;
        if (!k)
            return schema_refuse(where, "\"%.60s\" is not supported", key);
        if (!strcmp(key, "items") && json_is_array(v))
            return schema_refuse(where, "\"items\" as a list is not supported: use prefixItems");
        if (k->kind != KEYWORD_NOTE && json_array_size(v) + json_object_size(v) > MAX_ENTRIES)
            return schema_refuse(where, "\"%s\" has more than %d entries", key, MAX_ENTRIES);
        if (!has_shape(v, k->shape))
            return schema_refuse(where, "\"%s\" has a value that it cannot have", key);
        if (k->shape == TYPES)
            TRY(check_types(v, where));
        *ret |= 1u << k->kind;
    }
    return ERR_OK;
}

/* ---- references ---- */

static int hex(char c)
{
    return c >= '0' && c <= '9'                 ? c - '0'
           : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                : -1;
}

enum err schema_follow(struct schema_context *x, const char *ref, const json_t **ret)
{
    const json_t *at = x->root;
    const char *c = ref + 1;
    bool ok = ref[0] == '#';
    while (ok && at && *c == '/') {
        char name[256];
        size_t n = 0;
        for (c++; *c && *c != '/' && n + 1 < sizeof(name); c++) {
            name[n] = *c;
            if (c[0] == '~' && (c[1] == '0' || c[1] == '1'))
                name[n] = *++c == '0' ? '~' : '/';
            else if (c[0] == '%' && hex(c[1]) >= 0 && hex(c[2]) >= 0)
                name[n] = (char)(hex(c[1]) * 16 + hex(c[2])), c += 2;
            n++;
        }
        name[n] = 0;
        at = json_is_array(at) ? json_array_get(at, strtoul(name, NULL, 10))
                               : json_object_get(at, name);
    }
    if (!ok || *c || !at || !is_schema(at))
        return schema_refuse(x->where, "\"$ref\" \"%.80s\" does not lead to a schema in this one",
                             ref);
    *ret = at;
    return ERR_OK;
}

/* ---- merging ---- */

static enum err no_memory(void) { return err_set(ERR_NOMEM, "no memory for a schema"); }

static unsigned declared_types(const json_t *type)
{
    unsigned types = 0;
    size_t i;
    json_t *name;
    if (!type)
        return T_ALL;
    if (json_is_string(type))
        return json_type_named(json_string_value(type));
    json_array_foreach ((json_t *)type, i, name)
        types |= json_type_named(json_string_value(name));
    return types;
}

/* Without "type", keywords that speak of some types only leave those: less than the schema admits,
 * and what its author means. */
unsigned schema_types(const json_t *plain)
{
    static const struct {
        const char *name;
        unsigned types;
    } hints[] = {
        {"properties", T_OBJECT},
        {"required", T_OBJECT},
        {"additionalProperties", T_OBJECT},
        {"minProperties", T_OBJECT},
        {"maxProperties", T_OBJECT},
        {"items", T_ARRAY},
        {"prefixItems", T_ARRAY},
        {"minItems", T_ARRAY},
        {"maxItems", T_ARRAY},
        {"minLength", T_STRING},
        {"maxLength", T_STRING},
        {"pattern", T_STRING},
        {"format", T_STRING},
        {"minimum", T_NUMBER | T_INTEGER},
        {"maximum", T_NUMBER | T_INTEGER},
        {"exclusiveMinimum", T_NUMBER | T_INTEGER},
        {"exclusiveMaximum", T_NUMBER | T_INTEGER},
    };
    const json_t *type = json_object_get(plain, "type"), *values = json_object_get(plain, "enum");
    if (type || values) {
        unsigned listed = 0;
        for (size_t i = 0; i < json_array_size(values); i++)
            listed |= json_type_of(json_array_get(values, i));
        return declared_types(type) & (values ? listed : T_ALL);
    }
    unsigned types = 0;
    for (size_t i = 0; i < ARRAY_LEN(hints); i++)
        if (json_object_get(plain, hints[i].name))
            types |= hints[i].types;
    return types ? types : T_ALL;
}

static json_t *both(json_t *a, json_t *b)
{
    if (!a || !b || json_is_true(a) || json_is_false(b))
        return json_incref(b ? b : a);
    if (json_is_true(b) || json_is_false(a) || json_equal(a, b))
        return json_incref(a);
    return json_pack("{s:[O,O]}", "allOf", a, b);
}

static bool listed(const json_t *list, const json_t *value)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (json_equal(json_array_get(list, i), value))
            return true;
    return false;
}

/* A copy of one schema object without combinators and notes; const becomes enum. */
static json_t *strip(const json_t *schema)
{
    json_t *copy = json_object();
    const char *key;
    json_t *v;
    json_object_foreach ((json_t *)schema, key, v) {
        for (size_t i = 0; i < ARRAY_LEN(keywords); i++)
            if (!strcmp(key, keywords[i].name) && keywords[i].kind == KEYWORD_ASSERTS &&
                strcmp(key, "const") != 0)
                json_object_set(copy, key, v);
    }
    json_t *only = json_object_get(schema, "const");
    json_t *values = json_object_get(copy, "enum");
    if (only && (!values || listed(values, only)))
        json_object_set_new(copy, "enum", json_pack("[O]", only));
    else if (only)
        json_object_set_new(copy, "type", json_array()); /* no value is both */
    return copy;
}

static json_t *common_values(const json_t *a, const json_t *b)
{
    json_t *values = json_array();
    for (size_t i = 0; i < json_array_size(a); i++)
        if (listed(b, json_array_get(a, i)))
            json_array_append(values, json_array_get(a, i));
    return values;
}

static json_t *common_types(const json_t *a, const json_t *b)
{
    static const char *const names[] = {"string", "number", "boolean", "object", "array", "null"};
    unsigned types = declared_types(a) & declared_types(b);
    json_t *list = json_array();
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        unsigned t = json_type_named(names[i]);
        if ((types & t) == t)
            json_array_append_new(list, json_string(names[i]));
    }
    if ((types & T_INTEGER) && !(types & T_NUMBER))
        json_array_append_new(list, json_string("integer"));
    return list;
}

static json_t *merge_properties(const json_t *a, const json_t *b)
{
    json_t *pa = json_object_get(a, "properties"), *pb = json_object_get(b, "properties");
    json_t *ra = json_object_get(a, "additionalProperties");
    json_t *rb = json_object_get(b, "additionalProperties");
    json_t *merged = json_object(), *v;
    const char *key;
    json_object_foreach (pa, key, v) {
        json_t *other = json_object_get(pb, key);
        json_object_set_new(merged, key, both(v, other ? other : rb));
    }
    json_object_foreach (pb, key, v)
        if (!json_object_get(pa, key))
            json_object_set_new(merged, key, both(ra, v));
    return merged;
}

static json_t *merge_prefix(const json_t *a, const json_t *b)
{
    json_t *pa = json_object_get(a, "prefixItems"), *pb = json_object_get(b, "prefixItems");
    json_t *ia = json_object_get(a, "items"), *ib = json_object_get(b, "items");
    json_t *merged = json_array();
    for (size_t i = 0; i < MAX(json_array_size(pa), json_array_size(pb)); i++) {
        json_t *va = json_array_get(pa, i), *vb = json_array_get(pb, i);
        json_t *v = both(va ? va : ia, vb ? vb : ib);
        json_array_append_new(merged, v);
    }
    return merged;
}

/* Both of two stripped schemas. */
static enum err merge(const json_t *a, const json_t *b, const char *where, json_t **ret)
{
    json_t *m = json_copy((json_t *)a);
    const char *key;
    json_t *v;
    if (!m)
        return no_memory();
    json_object_foreach ((json_t *)b, key, v) {
        json_t *old = json_object_get(a, key);
        double x = json_number_value(old), y = json_number_value(v);
        if (!old) {
            json_object_set(m, key, v);
        } else if (!strcmp(key, "type")) {
            json_object_set_new(m, key, common_types(old, v));
        } else if (!strcmp(key, "enum")) {
            json_object_set_new(m, key, common_values(old, v));
        } else if (!strcmp(key, "required")) {
            json_t *all = json_copy(old);
            json_array_extend(all, v);
            json_object_set_new(m, key, all);
        } else if (!strcmp(key, "items") || !strcmp(key, "additionalProperties")) {
            json_object_set_new(m, key, both(old, v));
        } else if (!strncmp(key, "min", 3) || !strcmp(key, "exclusiveMinimum")) {
            json_object_set(m, key, x > y ? old : v);
        } else if (!strncmp(key, "max", 3) || !strcmp(key, "exclusiveMaximum")) {
            json_object_set(m, key, x < y ? old : v);
        } else if ((!strcmp(key, "pattern") || !strcmp(key, "format")) && !json_equal(old, v)) {
            json_decref(m);
            return schema_refuse(where, "two different \"%s\" for one value are not supported",
                                 key);
        }
    }
    if (json_object_get(a, "properties") || json_object_get(b, "properties"))
        json_object_set_new(m, "properties", merge_properties(a, b));
    if (json_object_get(a, "prefixItems") || json_object_get(b, "prefixItems"))
        json_object_set_new(m, "prefixItems", merge_prefix(a, b));
    *ret = m;
    return ERR_OK;
}

static enum err too_many(const struct schema_context *x)
{
    return err_set(ERR_TOO_LARGE, "%s%sthe combinations are too many", x->where,
                   x->where[0] ? ": " : "");
}

/* list x more, in place; takes over the reference to more. */
static enum err cross(struct schema_context *x, json_t **list, json_t *more)
{
    enum err err = ERR_OK;
    json_t *product = json_array();
    if (json_array_size(*list) * json_array_size(more) > MERGE_MAX)
        err = schema_refuse(x->where, "the combinations have more than %d alternatives", MERGE_MAX);
    for (size_t i = 0; i < json_array_size(*list) && err == ERR_OK; i++)
        for (size_t k = 0; k < json_array_size(more) && err == ERR_OK; k++) {
            const json_t *a = json_array_get(*list, i), *b = json_array_get(more, k);
            json_t *m = NULL;
            x->budget -= 1 + (int)(json_object_size(json_object_get(a, "properties")) +
                                   json_object_size(json_object_get(b, "properties"))) /
                                 16;
            err = x->budget < 0 ? too_many(x) : merge(a, b, x->where, &m);
            if (err == ERR_OK && schema_types(m))
                json_array_append(product, m);
            json_decref(m);
        }
    json_decref(*list);
    json_decref(more);
    *list = product;
    return err;
}

static enum err expand_union(struct schema_context *x, const json_t *branches, json_t **ret)
{
    json_t *all = json_array(), *branch = NULL;
    enum err err = ERR_OK;
    for (size_t i = 0; i < json_array_size(branches) && err == ERR_OK; i++) {
        err = schema_expand(x, json_array_get(branches, i), &branch);
        if (err == ERR_OK) {
            json_array_extend(all, branch);
            json_decref(branch);
        }
        if (json_array_size(all) > MERGE_MAX && err == ERR_OK)
            err = schema_refuse(x->where, "the combinations have more than %d alternatives",
                                MERGE_MAX);
    }
    if (err != ERR_OK)
        json_decref(all);
    else
        *ret = all;
    return err;
}

static enum err expand_combinators(struct schema_context *x, const json_t *schema, json_t **list)
{
    json_t *more;
    const json_t *target, *ref = json_object_get(schema, "$ref");
    if (ref) {
        TRY(schema_follow(x, json_string_value(ref), &target));
        TRY(schema_expand(x, target, &more));
        TRY(cross(x, list, more));
    }
    const json_t *all = json_object_get(schema, "allOf");
    for (size_t i = 0; i < json_array_size(all); i++) {
        TRY(schema_expand(x, json_array_get(all, i), &more));
        TRY(cross(x, list, more));
    }
    static const char *const unions[] = {"anyOf", "oneOf"};
    for (size_t i = 0; i < ARRAY_LEN(unions); i++) {
        const json_t *branches = json_object_get(schema, unions[i]);
        if (!branches)
            continue;
        if (i == 1)
            TRY(schema_check_disjoint(x, branches));
        TRY(expand_union(x, branches, &more));
        TRY(cross(x, list, more));
    }
    return ERR_OK;
}

enum err schema_expand(struct schema_context *x, const json_t *schema, json_t **ret)
{
    if (json_is_boolean(schema)) {
        *ret = json_is_true(schema) ? json_pack("[{}]") : json_array();
        return *ret ? ERR_OK : no_memory();
    }
    unsigned kinds;
    TRY(schema_keywords(schema, x->where, &kinds));
    if (x->depth >= MAX_NESTED)
        return schema_refuse(x->where, "\"$ref\" or combinations are nested too deep");
    if (--x->budget < 0)
        return too_many(x);
    json_t *base = strip(schema);
    json_t *list = base && schema_types(base) ? json_pack("[O]", base) : json_array();
    json_decref(base);
    if (!list)
        return no_memory();
    x->depth++;
    enum err err = kinds & 1u << KEYWORD_COMBINES ? expand_combinators(x, schema, &list) : ERR_OK;
    x->depth--;
    if (err != ERR_OK)
        json_decref(list);
    else
        *ret = list;
    return err;
}

/* ---- oneOf ---- */

static bool requires(const json_t *plain, const char *key)
{
    const json_t *required = json_object_get(plain, "required");
    for (size_t i = 0; i < json_array_size(required); i++)
        if (!strcmp(json_string_value(json_array_get(required, i)), key))
            return true;
    return false;
}

static bool lists_apart(struct schema_context *x, const json_t *a, const json_t *b);

/* Can no value be valid for both schemas? False also where that cannot be shown. */
static bool schemas_apart(struct schema_context *x, const json_t *a, const json_t *b)
{
    json_t *la = NULL, *lb = NULL;
    bool result = schema_expand(x, a, &la) == ERR_OK && schema_expand(x, b, &lb) == ERR_OK;
    x->depth++;
    result = result && lists_apart(x, la, lb);
    x->depth--;
    json_decref(la);
    json_decref(lb);
    return result;
}

/* Types that a validator lets pass, unlike schema_types. */
static unsigned real_types(const json_t *plain)
{
    return json_object_get(plain, "type") || json_object_get(plain, "enum") ? schema_types(plain)
                                                                            : T_ALL;
}

/* A property that a must have, and that b does not take. */
static bool objects_apart(struct schema_context *x, const json_t *a, const json_t *b)
{
    const char *key;
    json_t *v;
    json_object_foreach (json_object_get(a, "properties"), key, v) {
        if (!requires(a, key))
            continue;
        const json_t *other = json_object_get(json_object_get(b, "properties"), key);
        if (!other)
            other = json_object_get(b, "additionalProperties");
        if (json_is_false(other) || (other && schemas_apart(x, v, other)))
            return true;
    }
    return false;
}

static bool values_apart(const json_t *a, const json_t *b)
{
    for (size_t i = 0; i < json_array_size(a); i++)
        for (size_t k = 0; k < json_array_size(b); k++) {
            const json_t *x = json_array_get(a, i), *y = json_array_get(b, k);
            if (json_equal(x, y) || (json_is_number(x) && json_is_number(y) &&
                                     json_number_value(x) == json_number_value(y)))
                return false;
        }
    return true;
}

static bool apart(struct schema_context *x, const json_t *a, const json_t *b)
{
    const json_t *ea = json_object_get(a, "enum"), *eb = json_object_get(b, "enum");
    unsigned types = real_types(a) & real_types(b);
    if (!types || --x->budget < 0)
        return !types;
    if (ea && eb) {
        x->budget -= (int)(json_array_size(ea) * json_array_size(eb) / 64);
        return values_apart(ea, eb);
    }
    return types == T_OBJECT && (objects_apart(x, a, b) || objects_apart(x, b, a));
}

static bool lists_apart(struct schema_context *x, const json_t *a, const json_t *b)
{
    for (size_t i = 0; i < json_array_size(a); i++)
        for (size_t k = 0; k < json_array_size(b); k++)
            if (!apart(x, json_array_get(a, i), json_array_get(b, k)))
                return false;
    return true;
}

static enum err check_pairs(struct schema_context *x, const json_t *lists)
{
    size_t n = json_array_size(lists);
    for (size_t i = 0; i < n; i++)
        for (size_t k = i + 1; k < n; k++)
            if (!lists_apart(x, json_array_get(lists, i), json_array_get(lists, k)))
                return schema_refuse(x->where,
                                     "\"oneOf\": branches %zu and %zu may both match, so it cannot "
                                     "be enforced: use anyOf",
                                     i, k);
    return ERR_OK;
}

enum err schema_check_disjoint(struct schema_context *x, const json_t *branches)
{
    if (json_array_size(branches) > MERGE_MAX)
        return schema_refuse(x->where, "\"oneOf\" has more than %d branches", MERGE_MAX);
    json_t *lists = json_array();
    enum err err = lists ? ERR_OK : no_memory();
    for (size_t i = 0; i < json_array_size(branches) && err == ERR_OK; i++) {
        json_t *list;
        err = schema_expand(x, json_array_get(branches, i), &list);
        if (err == ERR_OK)
            json_array_append_new(lists, list);
    }
    if (err == ERR_OK)
        err = check_pairs(x, lists);
    json_decref(lists);
    return err;
}
