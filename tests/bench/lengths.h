/* lengths.h: distributions of token counts, as flags spell them. */
#ifndef BATON_BENCH_LENGTHS_H
#define BATON_BENCH_LENGTHS_H

#include <stdint.h>

#include "common/base/err.h"
#include "tests/bench/rng.h"

struct lengths {
    enum { LENGTHS_FIXED, LENGTHS_UNIFORM, LENGTHS_NORMAL, LENGTHS_LOGNORMAL } kind;
    double a, b; // uniform: inclusive bounds; normal: mean, sd; log-normal: mean, sigma of the log
    double min, max;
};

/* text: N, uniform:A:B, normal:MEAN:SD:MIN:MAX or lognormal:MEAN:SIGMA:MIN:MAX. MEAN is that
 * before clipping to MIN..MAX. ERR_INVALID names flag and text. */
MUST_CHECK enum err lengths_parse(const char *flag, const char *text, struct lengths *ret);

/* At least 1 token. */
uint32_t lengths_draw(const struct lengths *l, struct rng *r);

#endif
