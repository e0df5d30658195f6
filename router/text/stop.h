/* stop.h: stop strings over a stream of text.
 *
 * The earliest match position wins, ties go to the longest string. Text that could be the beginning
 * of a stop string is held back until it is decided; nothing before a match is ever lost, nothing
 * from the match on is ever sent. Works on bytes; what it releases always ends on a character
 * boundary if what it is given does.
 */
#ifndef BATON_STOP_H
#define BATON_STOP_H

#include "common/base/json.h"

#define STOP_MAX_STRINGS 16
#define STOP_MAX_BYTES   1024 /* of one string */

struct stop;

/* strings are copied. ERR_INVALID: more than STOP_MAX_STRINGS, an empty or an overlong one. */
MUST_CHECK enum err stop_create(const char *const *strings, const size_t *lens, size_t n,
                                struct stop **ret);
void stop_destroy(struct stop *s);

/* Feeds text; appends what is safe to send to out. Returns true once a stop string matched (then
 * *ret_which is its index, and further calls append nothing). */
bool stop_push(struct stop *s, const char *text, size_t n, struct json_out *out, int *ret_which);
/* Generation ended for another reason: releases what was held. If that decides for a match (it was
 * waiting for an earlier or longer one), nothing from it on is released and its index is returned,
 * else -1. */
int stop_flush(struct stop *s, struct json_out *out);

#endif
