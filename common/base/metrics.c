/* metrics.c: families of series in the order they were first named.
 *
 * Series are found by comparing strings: that happens when they are made, never when they are
 * updated, and a process has some hundreds of them.
 */
#include "common/base/metrics.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct metric {
    struct metric *next;
    struct family *family;
    char *labels;
    double value; // a histogram's sum
    uint64_t count;
    uint64_t *buckets; // not cumulative; one per bound, +Inf is the rest of count
};

struct family {
    struct family *next;
    enum metric_type type;
    char *name;
    char *help;
    const double *bounds;
    size_t n_bounds;
    struct metric *first, **end;
};

struct metrics {
    struct family *first, **end;
};

static void series_free(struct metric *s)
{
    free(s->labels);
    free(s->buckets);
    free(s);
}

static void family_free(struct family *f)
{
    free(f->name);
    free(f->help);
    free(f);
}

struct metrics *metrics_create(void)
{
    struct metrics *m = calloc(1, sizeof(*m));
    if (m)
        m->end = &m->first;
    return m;
}

void metrics_destroy(struct metrics *m)
{
    if (!m)
        return;
    for (struct family *f = m->first, *f_next; f; f = f_next) {
        f_next = f->next;
        for (struct metric *s = f->first, *s_next; s; s = s_next) {
            s_next = s->next;
            series_free(s);
        }
        family_free(f);
    }
    free(m);
}

static struct family *family_get(struct metrics *m, enum metric_type type, const char *name,
                                 const char *help, const double *bounds, size_t n_bounds)
{
    for (struct family *f = m->first; f; f = f->next)
        if (!strcmp(f->name, name))
            return f->type == type ? f : NULL; // one name, two types: a bug, but not a crash
    struct family *f = calloc(1, sizeof(*f));
    if (!f)
        return NULL;
    f->type = type;
    f->name = strdup(name);
    f->help = strdup(help);
    f->bounds = bounds;
    f->n_bounds = type == METRIC_HISTOGRAM ? n_bounds : 0;
    f->end = &f->first;
    if (!f->name || !f->help) {
        family_free(f);
        return NULL;
    }
    *m->end = f;
    m->end = &f->next;
    return f;
}

struct metric *metrics_get(struct metrics *m, enum metric_type type, const char *name,
                           const char *help, const char *labels, const double *bounds,
                           size_t n_bounds)
{
    struct family *f = m ? family_get(m, type, name, help, bounds, n_bounds) : NULL;
    if (!f)
        return NULL;
    for (struct metric *s = f->first; s; s = s->next)
        if (!strcmp(s->labels, labels))
            return s;
    struct metric *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->family = f;
    s->labels = strdup(labels);
    s->buckets = calloc(f->n_bounds + 1, sizeof(*s->buckets));
    if (!s->labels || !s->buckets) {
        series_free(s);
        return NULL;
    }
    *f->end = s;
    f->end = &s->next;
    return s;
}

void metrics_remove(struct metrics *m, struct metric *series)
{
    if (!series)
        return;
    struct family *f = series->family;
    for (struct metric **at = &f->first; *at; at = &(*at)->next) {
        if (*at != series)
            continue;
        *at = series->next;
        if (f->end == &series->next)
            f->end = at;
        series_free(series);
        return;
    }
}

void metric_add(struct metric *s, double v)
{
    if (s && isfinite(v))
        s->value += v;
}

void metric_set(struct metric *s, double v)
{
    if (s)
        s->value = v;
}

void metric_observe(struct metric *s, double v) { metric_observe_many(s, v, 1); }

void metric_observe_many(struct metric *s, double v, size_t n)
{
    if (!s || !isfinite(v))
        return;
    const struct family *f = s->family;
    s->value += v * (double)n;
    s->count += n;
    for (size_t i = 0; i < f->n_bounds; i++) {
        if (v <= f->bounds[i]) {
            s->buckets[i] += n;
            return;
        }
    }
}

void metric_mirror(struct metric *s, const struct metric *from)
{
    if (!s || !from || s->family->n_bounds != from->family->n_bounds)
        return;
    s->value = from->value;
    s->count = from->count;
    memcpy(s->buckets, from->buckets, s->family->n_bounds * sizeof(*s->buckets));
}

double metric_value(const struct metric *s)
{
    if (!s)
        return 0;
    return s->family->type == METRIC_HISTOGRAM ? (double)s->count : s->value;
}

/* ---- windows -------------------------------------------------------------------------------- */

void metric_window_move(struct metric_window *w, const struct metric *s)
{
    if (!s)
        return;
    w->n = s->count - w->seen_n;
    w->sum = s->value - w->seen_sum;
    w->seen_n = s->count;
    w->seen_sum = s->value;
    size_t n = s->family->n_bounds;
    if (n > METRIC_WINDOW_BOUNDS)
        return;
    uint64_t above = w->n;
    for (size_t i = 0; i < n; i++) {
        w->in[i] = s->buckets[i] - w->seen[i];
        w->seen[i] = s->buckets[i];
        above -= w->in[i];
    }
    w->in[n] = above;
}

double metric_window_quantile(const struct metric_window *w, const struct metric *s, double q)
{
    if (!s || !w->n || !s->family->n_bounds || s->family->n_bounds > METRIC_WINDOW_BOUNDS)
        return NAN;
    const double *bounds = s->family->bounds;
    size_t n = s->family->n_bounds;
    double rank = q * (double)w->n, below = 0;
    for (size_t i = 0; i < n; i++) {
        double in = (double)w->in[i], from = i ? bounds[i - 1] : 0;
        if (in > 0 && below + in >= rank)
            return from + (bounds[i] - from) * (rank - below) / in;
        below += in;
    }
    return bounds[n - 1]; // above the last bound: no more is known
}

/* ---- exposition ------------------------------------------------------------------------------ */

static void write_number(struct json_out *out, double v)
{
    if (isnan(v))
        json_out_fmt(out, "NaN");
    else if (isinf(v))
        json_out_fmt(out, "%sInf", v < 0 ? "-" : "+");
    else if (v == floor(v) && fabs(v) <= 9007199254740992.0) // 2^53: exact until here
        json_out_fmt(out, "%.0f", v);
    else
        json_out_double(out, v);
}

static void write_series(struct json_out *out, const char *name, const char *suffix,
                         const char *labels, double v)
{
    json_out_fmt(out, "%s%s", name, suffix);
    if (*labels)
        json_out_fmt(out, "{%s}", labels);
    json_out_fmt(out, " ");
    write_number(out, v);
    json_out_fmt(out, "\n");
}

static void write_histogram(struct json_out *out, const struct family *f, const struct metric *s)
{
    uint64_t below = 0;
    for (size_t i = 0; i <= f->n_bounds; i++) {
        bool last = i == f->n_bounds;
        below = last ? s->count : below + s->buckets[i];
        json_out_fmt(out, "%s_bucket{%s%sle=\"", f->name, s->labels, *s->labels ? "," : "");
        write_number(out, last ? INFINITY : f->bounds[i]);
        json_out_fmt(out, "\"} %" PRIu64 "\n", below);
    }
    write_series(out, f->name, "_sum", s->labels, s->value);
    write_series(out, f->name, "_count", s->labels, (double)s->count);
}

static void write_help(struct json_out *out, const struct family *f)
{
    static const char *const types[] = {"counter", "gauge", "histogram"};
    json_out_fmt(out, "# HELP %s ", f->name);
    for (const char *p = f->help; *p; p++) {
        if (*p == '\\')
            json_out_raw(out, "\\\\", 2);
        else if (*p == '\n')
            json_out_raw(out, "\\n", 2);
        else
            json_out_raw(out, p, 1);
    }
    json_out_fmt(out, "\n# TYPE %s %s\n", f->name, types[f->type]);
}

void metrics_write(const struct metrics *m, struct json_out *out)
{
    for (const struct family *f = m->first; f; f = f->next) {
        if (!f->first)
            continue;
        write_help(out, f);
        for (const struct metric *s = f->first; s; s = s->next) {
            if (f->type == METRIC_HISTOGRAM)
                write_histogram(out, f, s);
            else
                write_series(out, f->name, "", s->labels, s->value);
        }
    }
}
