/* byte_level.h: the alphabet in which byte-level BPE vocabularies are written. */
#ifndef BATON_BYTE_LEVEL_H
#define BATON_BYTE_LEVEL_H

#include <stdbool.h>
#include <stddef.h>

/* Undoes the alphabet: text[0..n) ("Ġa") to its bytes (" a"), at most n of them, in ret. False if a
 * character is not of the alphabet. */
bool byte_level_decode(const char *text, size_t n, char *ret, size_t *ret_n);

#endif
