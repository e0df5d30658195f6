/* arrivals.h: when each request is due. */
#ifndef BATON_BENCH_ARRIVALS_H
#define BATON_BENCH_ARRIVALS_H

#include <stdint.h>

#include "tests/bench/dataset.h"
#include "tests/bench/options.h"

/* Fills ret[d->len] with µs since the start, ascending. As in vllm bench serve, Poisson gaps are
 * stretched so that the last arrival falls exactly on n / rate: runs with other seeds then offer
 * the same load. Constant: one request every 1 / rate s, the first at 0. */
void arrivals_fill(const struct options *o, const struct dataset *d, uint64_t *ret);

#endif
