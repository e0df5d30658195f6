/* json_type.h: JSON Schema's types as bits, each value in exactly one of them.
 *
 * A number is an integer if its fraction is zero, however it is spelled: 1.0 and 10e-1 are. So
 * T_INTEGER stands for those, T_NUMBER for all others, and the type "number" is both.
 */
#ifndef BATON_JSON_TYPE_H
#define BATON_JSON_TYPE_H

#include <jansson.h>

enum {
    T_STRING = 1,
    T_INTEGER = 2,
    T_NUMBER = 4,
    T_BOOLEAN = 8,
    T_OBJECT = 16,
    T_ARRAY = 32,
    T_NULL = 64,
    T_ALL = 127,
};

/* Of a type's name; 0: there is none of that name, or it is NULL. */
unsigned json_type_named(const char *name);
unsigned json_type_of(const json_t *value);
/* Of a number's text by JSON's grammar, of any length and size; 0: it is none. */
unsigned json_type_of_number(const char *text, size_t n);

#endif
