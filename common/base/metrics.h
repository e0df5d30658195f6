/* metrics.h: counters, gauges and histograms in Prometheus text form.
 *
 * A registry belongs to one thread. Series are made once (labels fixed), updated by handle, and
 * written all together. Names and help come from the caller's own table (router/metrics.def).
 */
#ifndef BATON_METRICS_H
#define BATON_METRICS_H

#include <stddef.h>
#include <stdint.h>

#include "common/base/json.h" /* struct json_out, as a growing text buffer */

enum metric_type { METRIC_COUNTER, METRIC_GAUGE, METRIC_HISTOGRAM };

struct metrics;
struct metric; /* one series: a name with one set of labels */

struct metrics *metrics_create(void);
void metrics_destroy(struct metrics *m);

/* labels: 'model_name="demo",engine="0"' or "". bounds: ascending upper bounds without +Inf, only
 * for histograms (kept by reference). The same name and labels give the same series again. Returns
 * NULL when out of memory; updates of NULL do nothing. name is exposed as given (counters: with
 * _total where the caller wants it). */
struct metric *metrics_get(struct metrics *m, enum metric_type type, const char *name,
                           const char *help, const char *labels, const double *bounds,
                           size_t n_bounds);
void metrics_remove(struct metrics *m, struct metric *series);

void metric_add(struct metric *s, double v);     /* counters and gauges */
void metric_set(struct metric *s, double v);     /* gauges, and counters that mirror a total */
void metric_observe(struct metric *s, double v); /* histograms */
void metric_observe_many(struct metric *s, double v, size_t n); /* v, n times */
/* Makes s, a histogram, show what from shows: one measurement under two names. */
void metric_mirror(struct metric *s, const struct metric *from);
double metric_value(const struct metric *s); /* counters, gauges; a histogram's count */

/* What a histogram was shown between two calls of metric_window_move (zero-initialise; the first
 * call shows everything so far). Histograms with more bounds than METRIC_WINDOW_BOUNDS show the
 * mean only. */
#define METRIC_WINDOW_BOUNDS 31
struct metric_window {
    uint64_t n; // observations
    double sum;
    uint64_t in[METRIC_WINDOW_BOUNDS + 1]; // by bucket, those above the last bound at its end
    uint64_t seen[METRIC_WINDOW_BOUNDS + 1], seen_n;
    double seen_sum;
};
void metric_window_move(struct metric_window *w, const struct metric *s);
/* The q-quantile (0..1), interpolated within its bucket as PromQL does; NaN without observations.
 */
double metric_window_quantile(const struct metric_window *w, const struct metric *s, double q);

/* Appends the exposition text: # HELP and # TYPE once per name, series of a name together. */
void metrics_write(const struct metrics *m, struct json_out *out);

#endif
