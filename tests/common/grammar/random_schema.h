/* random_schema.h: schemas out of a seed, most of them such that they can be enforced. */
#ifndef BATON_TESTS_RANDOM_SCHEMA_H
#define BATON_TESTS_RANDOM_SCHEMA_H

#include <jansson.h>
#include <stdint.h>
#include <string.h>

#include "common/base/own.h"

static uint64_t seed = 1;

static uint32_t draw(uint32_t n) /* splitmix64 */
{
    uint64_t z = seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) % n);
}

static json_t *random_schema(int depth);

static json_t *random_value(int depth)
{
    static const char *const texts[] = {"red", "green", "", "a\"b\\", "\xc3\xa9", "null", "12"};
    switch (draw(depth > 0 ? 7 : 5)) {
    case 0:
        return json_integer((int)draw(100) - 50);
    case 1:
        return json_boolean(draw(2));
    case 2:
        return json_null();
    case 3:
    case 4:
        return json_string(texts[draw(ARRAY_LEN(texts))]);
    case 5: {
        json_t *a = json_array();
        for (uint32_t i = draw(3); i > 0; i--)
            json_array_append_new(a, random_value(depth - 1));
        return a;
    }
    default: {
        json_t *o = json_object();
        for (uint32_t i = draw(3); i > 0; i--)
            json_object_set_new(o, texts[draw(3)], random_value(depth - 1));
        return o;
    }
    }
}

static void random_object(json_t *s, int depth)
{
    static const char *const names[] = {"a",    "ab",    "name", "\xc3\xa9t\xc3\xa9",
                                        "x\"y", "value", "n"};
    json_t *properties = json_object(), *required = json_array();
    for (uint32_t i = 0; i < ARRAY_LEN(names); i++) {
        if (draw(3))
            continue;
        json_object_set_new(properties, names[i], random_schema(depth - 1));
        if (draw(2))
            json_array_append_new(required, json_string(names[i]));
    }
    json_object_set_new(s, "properties", properties);
    json_object_set_new(s, "required", required);
    uint32_t more = draw(4);
    if (more == 1)
        json_object_set_new(s, "additionalProperties", random_schema(depth - 1));
    else if (more == 2)
        json_object_set_new(s, "additionalProperties", json_boolean(draw(2)));
}

static void random_array(json_t *s, int depth)
{
    uint32_t min = draw(3);
    if (draw(4))
        json_object_set_new(s, "items", random_schema(depth - 1));
    if (draw(4) == 0) {
        json_t *prefix = json_array();
        for (uint32_t i = 1 + draw(3); i > 0; i--)
            json_array_append_new(prefix, random_schema(depth - 1));
        json_object_set_new(s, "prefixItems", prefix);
    }
    if (draw(2))
        json_object_set_new(s, "minItems", json_integer(min));
    if (draw(2))
        json_object_set_new(s, "maxItems", json_integer(min + draw(4)));
}

static void random_number(json_t *s, bool integer)
{
    double low = (int)draw(4000) - 2000, scale = integer ? 1 : draw(2) ? 100 : 1;
    static const char *const keys[][2] = {{"minimum", "maximum"},
                                          {"exclusiveMinimum", "exclusiveMaximum"}};
    uint32_t which = draw(2);
    if (draw(2))
        json_object_set_new(s, keys[which][0], json_real(low / scale));
    if (draw(2))
        json_object_set_new(s, keys[which][1], json_real((low + 1 + draw(500)) / scale));
}

static json_t *random_schema(int depth)
{
    static const char *const types[] = {"string", "integer", "number", "boolean",
                                        "null",   "array",   "object"};
    json_t *s = json_object();
    uint32_t what = draw(20);
    if (depth > 0 && what < 3) {
        json_t *branches = json_array();
        for (uint32_t i = 1 + draw(3); i > 0; i--)
            json_array_append_new(branches, random_schema(depth - 1));
        json_object_set_new(s, what == 0 ? "oneOf" : what == 1 ? "anyOf" : "allOf", branches);
        if (draw(3) == 0)
            json_object_set_new(s, "type", json_string(types[draw(7)]));
        return s;
    }
    if (what == 3) {
        json_object_set_new(s, "$ref", json_string(draw(2) ? "#" : "#/$defs/d"));
        return s;
    }
    if (what == 4) {
        json_t *values = json_array();
        for (uint32_t i = 1 + draw(4); i > 0; i--)
            json_array_append_new(values, random_value(1));
        json_object_set_new(s, "enum", values);
        return s;
    }
    if (what == 5) {
        json_object_set_new(s, "const", random_value(2));
        return s;
    }
    const char *type = types[draw(depth > 0 ? 7 : 5)];
    json_object_set_new(s, "type", json_string(type));
    if (draw(6) == 0)
        json_object_set_new(s, "type", json_pack("[s,s]", type, types[draw(5)]));
    if (!strcmp(type, "object"))
        random_object(s, depth);
    else if (!strcmp(type, "array"))
        random_array(s, depth);
    else if (!strcmp(type, "integer") || !strcmp(type, "number"))
        random_number(s, type[0] == 'i');
    else if (!strcmp(type, "string") && draw(2)) {
        uint32_t min = draw(4);
        json_object_set_new(s, "minLength", json_integer(min));
        json_object_set_new(s, "maxLength", json_integer(min + draw(5)));
    }
    return s;
}

#endif
