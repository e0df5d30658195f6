/* stats.h: the figures of a run, by the definitions of vllm bench serve.
 *
 *   TTFT      request sent to first event with output
 *   ITL       gap between two events with output of one request (an event may bring several tokens)
 *   TPOT      (E2E - TTFT) / (output tokens - 1) of each request with two tokens or more
 *   E2E       request sent to last event of the answer, usage and [DONE] not counted
 *   duration  start of the run to the end of its last request
 *   goodput   requests/s that keep every service level; TPOT counts as 0 with one token
 *
 * Only complete answers count, for tokens too. Percentiles are numpy's: linear between ranks.
 * Request sent is when the load generator begins to connect or to write, after any wait for
 * --max-concurrency.
 */
#ifndef BATON_BENCH_STATS_H
#define BATON_BENCH_STATS_H

#include <stddef.h>
#include <stdint.h>

#include "tests/bench/options.h"
#include "tests/bench/record.h"

enum { N_QUANTILES = 201 }; // 0, 0.5, 1 ... 100 %

struct distribution { // ms; all 0 without samples
    size_t n;
    double mean, std, p50, p90, p95, p99, min, max;
    double quantiles[N_QUANTILES];
};

enum metric { METRIC_TTFT, METRIC_TPOT, METRIC_ITL, METRIC_E2EL, N_METRICS };

struct series { // one value per interval
    double interval_s;
    size_t len;
    double *output_tokens_per_s, *in_flight, *requests_per_s; // in_flight: mean of the interval
};

struct stats {
    double duration_s;
    size_t n_requests, n_ok, n_failed, n_unfinished; // unfinished: the run was interrupted
    size_t n_short;                                  // ok, but fewer tokens than asked for
    size_t by_outcome[N_OUTCOMES];
    uint64_t input_tokens, output_tokens, cached_tokens;
    double requests_per_s, output_tokens_per_s, total_tokens_per_s, goodput_per_s;
    double peak_output_tokens_per_s; // best second
    size_t peak_concurrency;
    double lag_p99_ms; // sent later than due, without --max-concurrency
    struct distribution metric[N_METRICS];
    struct series series;
};

MUST_CHECK enum err stats_create(const struct record *r, size_t n, uint64_t duration_us,
                                 const struct slo *slo, struct stats **ret);
void stats_destroy(struct stats *s);

const char *metric_name(enum metric m); // "TTFT"
const char *metric_key(enum metric m);  // "ttft"

/* Of ascending values[n], n > 0; p in [0, 100]. */
double percentile(const double *values, size_t n, double p);
void sort_doubles(double *values, size_t n);

#endif
