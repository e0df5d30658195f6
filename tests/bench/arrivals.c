/* arrivals.c: see arrivals.h. */
#include "tests/bench/arrivals.h"

#include "tests/bench/rng.h"

#define STREAM_ARRIVALS 16

static void fill_poisson(double rate, uint64_t seed, size_t n, uint64_t *ret)
{
    double total = 0, at = 0;
    for (int pass = 0; pass < 2; pass++) { // the first one measures
        struct rng r = rng_init(seed, STREAM_ARRIVALS);
        double scale = pass ? (double)n / rate / total * 1e6 : 0;
        at = 0;
        for (size_t i = 0; i < n; i++) {
            at += rng_exponential(&r);
            ret[i] = (uint64_t)(at * scale);
        }
        total = at;
    }
}

void arrivals_fill(const struct options *o, const struct dataset *d, uint64_t *ret)
{
    if (o->arrival_kind == ARRIVE_POISSON) {
        fill_poisson(o->request_rate, (uint64_t)o->seed, d->len, ret);
        return;
    }
    for (size_t i = 0; i < d->len; i++)
        ret[i] = o->arrival_kind == ARRIVE_CONSTANT ? (uint64_t)((double)i * 1e6 / o->request_rate)
                 : o->arrival_kind == ARRIVE_RECORDED
                     ? (uint64_t)(d->prompts[i].arrival_s * o->time_scale * 1e6)
                     : 0;
}
