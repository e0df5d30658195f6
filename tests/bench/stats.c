/* stats.c: see stats.h. */
#include "tests/bench/stats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

#define SERIES_POINTS 120 // at most about that many intervals

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void sort_doubles(double *values, size_t n) { qsort(values, n, sizeof(*values), compare); }

double percentile(const double *values, size_t n, double p)
{
    double rank = p / 100 * (double)(n - 1);
    size_t below = (size_t)rank;
    if (below + 1 >= n)
        return values[n - 1];
    return values[below] + (rank - (double)below) * (values[below + 1] - values[below]);
}

const char *metric_name(enum metric m) { return (const char *[]){"TTFT", "TPOT", "ITL", "E2E"}[m]; }

const char *metric_key(enum metric m) { return (const char *[]){"ttft", "tpot", "itl", "e2el"}[m]; }

/* Sorts values. */
static void describe(double *values, size_t n, struct distribution *d)
{
    *d = (struct distribution){.n = n};
    if (n == 0)
        return;
    sort_doubles(values, n);
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++)
        sum += values[i];
    d->mean = sum / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (values[i] - d->mean) * (values[i] - d->mean);
    d->std = sqrt(squares / (double)n);
    d->p50 = percentile(values, n, 50);
    d->p90 = percentile(values, n, 90);
    d->p95 = percentile(values, n, 95);
    d->p99 = percentile(values, n, 99);
    d->min = values[0];
    d->max = values[n - 1];
    for (int i = 0; i < N_QUANTILES; i++)
        d->quantiles[i] = percentile(values, n, i * 100.0 / (N_QUANTILES - 1));
}

static size_t gather(const struct record *r, size_t n, enum metric m, double *values)
{
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        if (r[i].outcome != OUTCOME_OK)
            continue;
        double tpot = record_tpot_ms(&r[i]);
        if (m == METRIC_TTFT)
            values[k++] = record_ttft_ms(&r[i]);
        else if (m == METRIC_E2EL)
            values[k++] = record_e2el_ms(&r[i]);
        else if (m == METRIC_TPOT && !isnan(tpot))
            values[k++] = tpot;
        for (uint32_t e = 1; m == METRIC_ITL && e < r[i].n_events; e++)
            values[k++] = (double)(r[i].event_us[e] - r[i].event_us[e - 1]) / 1e3;
    }
    return k;
}

static bool is_good(const struct record *r, const struct slo *slo)
{
    double tpot = record_tpot_ms(r);
    return (!(slo->ttft_ms > 0) || record_ttft_ms(r) <= slo->ttft_ms) &&
           (!(slo->tpot_ms > 0) || isnan(tpot) || tpot <= slo->tpot_ms) &&
           (!(slo->e2el_ms > 0) || record_e2el_ms(r) <= slo->e2el_ms);
}

static void count(const struct record *r, size_t n, const struct slo *slo, struct stats *s)
{
    size_t n_good = 0;
    for (size_t i = 0; i < n; i++) {
        s->by_outcome[r[i].outcome]++;
        if (r[i].outcome != OUTCOME_OK)
            continue;
        s->n_short += r[i].output_tokens < r[i].wanted_tokens;
        s->input_tokens += (uint64_t)MAX(r[i].prompt_tokens, 0);
        s->output_tokens += (uint64_t)r[i].output_tokens;
        s->cached_tokens += (uint64_t)MAX(r[i].cached_tokens, 0);
        n_good += is_good(&r[i], slo);
    }
    s->n_requests = n;
    s->n_ok = s->by_outcome[OUTCOME_OK];
    s->n_unfinished = s->by_outcome[OUTCOME_PENDING];
    s->n_failed = n - s->n_ok - s->n_unfinished;
    double d = s->duration_s > 0 ? s->duration_s : INFINITY;
    s->requests_per_s = (double)s->n_ok / d;
    s->goodput_per_s = (double)n_good / d;
    s->output_tokens_per_s = (double)s->output_tokens / d;
    s->total_tokens_per_s = (double)(s->input_tokens + s->output_tokens) / d;
}

/* Calls add for every event of an OK request, with the tokens that it stands for. */
static void each_event(const struct record *r, size_t n, double interval_s, double *tokens,
                       size_t len)
{
    for (size_t i = 0; i < n; i++) {
        double weight = r[i].n_events ? (double)r[i].output_tokens / r[i].n_events : 0;
        for (uint32_t e = 0; r[i].outcome == OUTCOME_OK && e < r[i].n_events; e++) {
            size_t at = (size_t)((double)(r[i].sent_us + r[i].event_us[e]) / 1e6 / interval_s);
            tokens[MIN(at, len - 1)] += weight;
        }
    }
}

/* Spreads each request's time in flight over the intervals. */
static void fill_in_flight(const struct record *r, size_t n, struct series *s)
{
    for (size_t i = 0; i < n; i++) {
        if (r[i].outcome == OUTCOME_PENDING)
            continue;
        double from = (double)r[i].sent_us / 1e6 / s->interval_s;
        double to = (double)r[i].end_us / 1e6 / s->interval_s;
        for (size_t at = (size_t)from; at < s->len && (double)at < to; at++)
            s->in_flight[at] += fmin(to, (double)at + 1) - fmax(from, (double)at);
        if (r[i].outcome == OUTCOME_OK)
            s->requests_per_s[MIN((size_t)to, s->len - 1)] += 1 / s->interval_s;
    }
}

static enum err fill_series(const struct record *r, size_t n, struct stats *st)
{
    static const double steps[] = {0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1,   2,
                                   5,    10,   20,   60,  120, 300, 600, 3600};
    struct series *s = &st->series;
    size_t k = 0;
    while (k + 1 < ARRAY_LEN(steps) && st->duration_s / steps[k] > SERIES_POINTS)
        k++;
    s->interval_s = steps[k];
    s->len = (size_t)(st->duration_s / s->interval_s) + 1;
    s->output_tokens_per_s = calloc(s->len, sizeof(double));
    s->in_flight = calloc(s->len, sizeof(double));
    s->requests_per_s = calloc(s->len, sizeof(double));
    size_t n_seconds = (size_t)st->duration_s + 1;
    OWNED_MEM double *seconds = calloc(n_seconds, sizeof(double));
    if (!s->output_tokens_per_s || !s->in_flight || !s->requests_per_s || !seconds)
        return err_set(ERR_NOMEM, "no memory for the figures");
    each_event(r, n, s->interval_s, s->output_tokens_per_s, s->len);
    for (size_t i = 0; i < s->len; i++)
        s->output_tokens_per_s[i] /= s->interval_s;
    fill_in_flight(r, n, s);
    each_event(r, n, 1, seconds, n_seconds);
    for (size_t i = 0; i < n_seconds; i++)
        st->peak_output_tokens_per_s = fmax(st->peak_output_tokens_per_s, seconds[i]);
    return ERR_OK;
}

/* The most requests in flight at once; an end comes before a start at the same time. */
static size_t peak(double *starts, double *ends, size_t n)
{
    size_t best = 0;
    sort_doubles(starts, n);
    sort_doubles(ends, n);
    for (size_t i = 0, k = 0; i < n; i++) {
        while (k < n && ends[k] <= starts[i])
            k++;
        best = MAX(best, i + 1 - k);
    }
    return best;
}

static enum err fill_times(const struct record *r, size_t n, struct stats *s)
{
    size_t n_events = 0, n_ok = 0;
    for (size_t i = 0; i < n; i++)
        n_events += r[i].n_events;
    OWNED_MEM double *values = malloc((MAX(n_events, n) + 1) * sizeof(double));
    OWNED_MEM double *starts = malloc((n + 1) * sizeof(double));
    OWNED_MEM double *ends = malloc((n + 1) * sizeof(double));
    if (!values || !starts || !ends)
        return err_set(ERR_NOMEM, "no memory for the figures");
    for (int m = 0; m < N_METRICS; m++)
        describe(values, gather(r, n, (enum metric)m, values), &s->metric[m]);
    size_t n_sent = 0;
    for (size_t i = 0; i < n; i++) {
        if (r[i].outcome == OUTCOME_OK) {
            starts[n_ok] = (double)r[i].sent_us;
            ends[n_ok++] = (double)r[i].end_us;
        }
        if (r[i].outcome != OUTCOME_PENDING)
            values[n_sent++] = (double)r[i].sent_us / 1e3 - (double)r[i].due_us / 1e3;
    }
    s->peak_concurrency = peak(starts, ends, n_ok);
    sort_doubles(values, n_sent);
    s->lag_p99_ms = n_sent ? percentile(values, n_sent, 99) : 0;
    return ERR_OK;
}

enum err stats_create(const struct record *r, size_t n, uint64_t duration_us, const struct slo *slo,
                      struct stats **ret)
{
    struct stats *s = calloc(1, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "no memory for the figures");
    s->duration_s = (double)duration_us / 1e6;
    count(r, n, slo, s);
    enum err e = fill_times(r, n, s);
    if (e == ERR_OK)
        e = fill_series(r, n, s);
    if (e) {
        stats_destroy(s);
        return e;
    }
    *ret = s;
    return ERR_OK;
}

void stats_destroy(struct stats *s)
{
    if (!s)
        return;
    free(s->series.output_tokens_per_s);
    free(s->series.in_flight);
    free(s->series.requests_per_s);
    free(s);
}
