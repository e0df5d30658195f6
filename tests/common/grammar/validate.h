/* validate.h: is a JSON value valid for a schema? Written from the specification, keyword by
 * keyword, without a look at how grammars do it: the second opinion of the grammar tests. */
#ifndef BATON_TESTS_VALIDATE_H
#define BATON_TESTS_VALIDATE_H

#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

static bool valid(const json_t *root, const json_t *schema, const json_t *v);

static bool valid_equal(const json_t *a, const json_t *b)
{
    if (json_is_number(a) && json_is_number(b))
        return json_number_value(a) == json_number_value(b);
    if (json_is_array(a) && json_is_array(b) && json_array_size(a) == json_array_size(b)) {
        for (size_t i = 0; i < json_array_size(a); i++)
            if (!valid_equal(json_array_get(a, i), json_array_get(b, i)))
                return false;
        return true;
    }
    if (json_is_object(a) && json_is_object(b) && json_object_size(a) == json_object_size(b)) {
        const char *key;
        json_t *x;
        json_object_foreach ((json_t *)a, key, x)
            if (!json_object_get(b, key) || !valid_equal(x, json_object_get(b, key)))
                return false;
        return true;
    }
    return json_equal(a, b);
}

static bool valid_type(const char *name, const json_t *v)
{
    if (!strcmp(name, "integer"))
        return json_is_integer(v) ||
               (json_is_real(v) && json_real_value(v) == floor(json_real_value(v)));
    return (!strcmp(name, "string") && json_is_string(v)) ||
           (!strcmp(name, "number") && json_is_number(v)) ||
           (!strcmp(name, "boolean") && json_is_boolean(v)) ||
           (!strcmp(name, "null") && json_is_null(v)) ||
           (!strcmp(name, "object") && json_is_object(v)) ||
           (!strcmp(name, "array") && json_is_array(v));
}

static bool valid_string(const json_t *s, const json_t *v)
{
    json_int_t n = 0;
    const char *text = json_string_value(v);
    for (size_t i = 0; i < json_string_length(v); i++)
        n += (text[i] & 0xc0) != 0x80;
    const json_t *min = json_object_get(s, "minLength"), *max = json_object_get(s, "maxLength");
    return (!min || n >= json_integer_value(min)) && (!max || n <= json_integer_value(max));
}

static bool valid_number(const json_t *s, const json_t *v)
{
    double x = json_number_value(v);
    const json_t *a = json_object_get(s, "minimum"), *b = json_object_get(s, "maximum");
    const json_t *c = json_object_get(s, "exclusiveMinimum"),
                 *d = json_object_get(s, "exclusiveMaximum");
    return (!a || x >= json_number_value(a)) && (!b || x <= json_number_value(b)) &&
           (!c || x > json_number_value(c)) && (!d || x < json_number_value(d));
}

static bool valid_array(const json_t *root, const json_t *s, const json_t *v)
{
    size_t n = json_array_size(v), i;
    const json_t *min = json_object_get(s, "minItems"), *max = json_object_get(s, "maxItems");
    const json_t *prefix = json_object_get(s, "prefixItems"), *items = json_object_get(s, "items");
    if ((min && n < (size_t)json_integer_value(min)) ||
        (max && n > (size_t)json_integer_value(max)))
        return false;
    for (i = 0; i < n; i++) {
        const json_t *item = i < json_array_size(prefix) ? json_array_get(prefix, i) : items;
        if (item && !valid(root, item, json_array_get(v, i)))
            return false;
    }
    return true;
}

static bool valid_object(const json_t *root, const json_t *s, const json_t *v)
{
    const json_t *properties = json_object_get(s, "properties");
    const json_t *others = json_object_get(s, "additionalProperties");
    const json_t *required = json_object_get(s, "required");
    const json_t *min = json_object_get(s, "minProperties"),
                 *max = json_object_get(s, "maxProperties");
    size_t n = json_object_size(v), i;
    json_t *item;
    const char *key;
    if ((min && n < (size_t)json_integer_value(min)) ||
        (max && n > (size_t)json_integer_value(max)))
        return false;
    json_array_foreach ((json_t *)required, i, item)
        if (!json_object_get(v, json_string_value(item)))
            return false;
    json_object_foreach ((json_t *)v, key, item) {
        const json_t *own = json_object_get(properties, key);
        const json_t *schema = own ? own : others;
        if (schema && !valid(root, schema, item))
            return false;
    }
    return true;
}

static bool valid(const json_t *root, const json_t *s, const json_t *v)
{
    size_t i, n = 0;
    json_t *item;
    if (json_is_boolean(s))
        return json_is_true(s);
    const char *ref = json_string_value(json_object_get(s, "$ref"));
    if (ref) { /* "#" and "#/$defs/name" are all that the tests use */
        const json_t *to =
            strcmp(ref, "#") ? json_object_get(json_object_get(root, "$defs"), ref + 8) : root;
        if (!to || !valid(root, to, v))
            return false;
    }
    const json_t *type = json_object_get(s, "type"), *values = json_object_get(s, "enum");
    if (json_is_string(type) && !valid_type(json_string_value(type), v))
        return false;
    if (json_is_array(type)) {
        json_array_foreach ((json_t *)type, i, item)
            n += valid_type(json_string_value(item), v);
        if (n == 0)
            return false;
    }
    if (values) {
        n = 0;
        json_array_foreach ((json_t *)values, i, item)
            n += valid_equal(item, v);
        if (n == 0)
            return false;
    }
    if (json_object_get(s, "const") && !valid_equal(json_object_get(s, "const"), v))
        return false;
    json_array_foreach (json_object_get(s, "allOf"), i, item)
        if (!valid(root, item, v))
            return false;
    static const char *const unions[] = {"anyOf", "oneOf"};
    for (int u = 0; u < 2; u++) {
        const json_t *branches = json_object_get(s, unions[u]);
        n = 0;
        json_array_foreach ((json_t *)branches, i, item)
            n += valid(root, item, v);
        if (branches && (n == 0 || (u == 1 && n != 1)))
            return false;
    }
    return (!json_is_string(v) || valid_string(s, v)) &&
           (!json_is_number(v) || valid_number(s, v)) &&
           (!json_is_array(v) || valid_array(root, s, v)) &&
           (!json_is_object(v) || valid_object(root, s, v));
}

#endif
