/* pattern.h: regular expressions of "pattern" and "format". Inside common/grammar only. */
#ifndef BATON_GRAMMAR_PATTERN_H
#define BATON_GRAMMAR_PATTERN_H

#include "common/grammar/program.h"

struct pattern_chars {
    uint32_t any;      /* rule: one character of the string, as it is written */
    bool json;         /* written inside JSON quotes */
    uint32_t min, max; /* characters of the whole string; REPEAT_UNLIMITED */
};

/* The inside of a string in which text (ECMA 262) is found. ERR_INVALID names what of it is not
 * supported: look-around, back references, \b, \p, anchors inside groups. Classes like \d and \W
 * hold ASCII only, on which all dialects agree. A length that the
 * pattern does not have anyhow is enforced where one repeated character gives way ("^[a-z]+$"), or
 * an end that is not anchored. */
MUST_CHECK enum err pattern_build(struct grammar *g, const char *text,
                                  const struct pattern_chars *chars, uint32_t next, uint32_t *ret);

/* A string of a format: date, time, date-time, uuid, ipv4, email, uri. ERR_INVALID: another one. */
MUST_CHECK enum err format_build(struct grammar *g, const char *name,
                                 const struct pattern_chars *chars, uint32_t next, uint32_t *ret);

#endif
