/* json.h: jansson with bounds, and getters that name what is wrong.
 *
 * jansson alone turns 1 MiB of `[{},{},...]` into 81 MB and takes the last of duplicate keys, so
 * json_parse scans the bytes first: depth, number of containers, number of values.
 */
#ifndef BATON_JSON_H
#define BATON_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"

struct json_limits {
    size_t max_bytes, max_depth, max_containers, max_values;
    /* Takes "\\u0000" in strings, and any number: integers beyond int64 become reals, and what is
     * beyond a double 1e308 or -1e308. */
    bool any_value;
};

/* For what clients send: 64 deep, 20,000 containers, 300,000 values, any_value: what a program has
 * read from a file, or got as an id, comes back in its conversation. Mind that a string's length is
 * json_string_length then. */
extern const struct json_limits json_limits_request;
/* For our own files (tokenizer.json, safetensors headers, config.json). */
extern const struct json_limits json_limits_file;

/* Parses text[0..n). Duplicate keys, trailing bytes, bad UTF-8, NUL bytes: ERR_INVALID with line,
 * column and reason; over a limit: ERR_TOO_LARGE naming the limit. *ret is owned by the caller
 * (json_decref). */
MUST_CHECK enum err json_parse(const char *text, size_t n, const struct json_limits *limits,
                               json_t **ret);

/* Reads a whole file (max_bytes checked before reading) and parses it. Sentences name the file. */
MUST_CHECK enum err json_parse_file(const char *path, const struct json_limits *limits,
                                    json_t **ret);

/* Reads a whole file into a NUL-terminated buffer that the caller frees. ERR_NOT_FOUND, ERR_IO,
 * ERR_TOO_LARGE name the path. */
MUST_CHECK enum err file_read(const char *path, size_t max_bytes, char **ret, size_t *ret_bytes);

/* Typed members of an object. Missing or null: *ret untouched (so preset the default), ERR_OK.
 * Wrong type or out of [min, max]: ERR_INVALID, the sentence names key, value and range. */
MUST_CHECK enum err json_get_int(const json_t *obj, const char *key, int64_t min, int64_t max,
                                 int64_t *ret);
MUST_CHECK enum err json_get_double(const json_t *obj, const char *key, double min, double max,
                                    double *ret);
MUST_CHECK enum err json_get_bool(const json_t *obj, const char *key, bool *ret);
MUST_CHECK enum err json_get_string(const json_t *obj, const char *key, const char **ret);

/* Writes like Python's json.dumps(ensure_ascii=False): ", " and ": ", floats by shortest repr
 * ("1.0", "1e+20"), key order kept. Caller frees. NULL when out of memory. Used for prompts. */
char *json_dump_python(const json_t *value);

/* Appends JSON text to a growing buffer: the hot path of streaming builds no jansson tree. */
struct json_out {
    char *data;
    size_t len, cap;
    bool failed; // out of memory: nothing is appended any more
};
void json_out_raw(struct json_out *o, const char *text, size_t n);
void json_out_fmt(struct json_out *o, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void json_out_string(struct json_out *o, const char *utf8, size_t n); /* quoted and escaped */
void json_out_double(struct json_out *o, double v);                   /* shortest that reads back */
void json_out_finish(struct json_out *o);

#endif
