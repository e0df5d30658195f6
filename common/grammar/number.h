/* number.h: JSON numbers within bounds. Inside common/grammar only. */
#ifndef BATON_GRAMMAR_NUMBER_H
#define BATON_GRAMMAR_NUMBER_H

#include "common/grammar/program.h"

struct number_range {
    double min, max; /* -INFINITY, INFINITY: none */
    bool min_exclusive, max_exclusive;
};

/* Numbers of the range, at most 18 digits (integers) or 15 and, without bounds, an exponent of two:
 * what a double holds exactly enough that no reader's rounding leaves the range. */
uint32_t number_build(struct grammar *g, const struct number_range *r, bool integer, uint32_t next);

#endif
