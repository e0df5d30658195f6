/* rng.h: seeded draws that are the same on every machine. */
#ifndef BATON_BENCH_RNG_H
#define BATON_BENCH_RNG_H

#include <math.h>
#include <stdint.h>

#include "common/base/hash.h"

/* SplitMix64. Different streams of one seed do not touch each other. */
struct rng {
    uint64_t state;
};

static inline struct rng rng_init(uint64_t seed, uint64_t stream)
{
    return (struct rng){hash_mix(seed + 0x9e3779b97f4a7c15u * (stream + 1))};
}

static inline uint64_t rng_next(struct rng *r) { return hash_mix(r->state += 0x9e3779b97f4a7c15u); }

/* [0, 1), 53 bits */
static inline double rng_unit(struct rng *r) { return (double)(rng_next(r) >> 11) * 0x1p-53; }

/* [0, n), n > 0 */
static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
    return (uint64_t)(((unsigned __int128)rng_next(r) * n) >> 64);
}

static inline double rng_exponential(struct rng *r) { return -log1p(-rng_unit(r)); }

/* Box-Muller, one of the pair */
static inline double rng_normal(struct rng *r)
{
    double radius = sqrt(2 * rng_exponential(r));
    return radius * cos(2 * M_PI * rng_unit(r));
}

#endif
