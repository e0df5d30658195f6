/* cluster_metrics.c: what the cluster shows: /metrics by the rows of metrics.def, and accounting.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "router/cluster_impl.h"

#define N_LABEL 512

/* Names come from operators: keep what Prometheus' text form needs escaped out of them. */
static void label_value(char *out, size_t n, const char *in)
{
    size_t at = 0;
    for (; *in && at + 3 < n; in++) {
        if (*in == '\n')
            continue;
        if (*in == '"' || *in == '\\')
            out[at++] = '\\';
        out[at++] = *in;
    }
    out[at] = 0;
}

static const double ttft_le[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                 1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
static const double itl_le[] = {.0005, .001, .002, .003, .004, .005, .0075, .01, .025,
                                .05,   .075, .1,   .15,  .2,   .3,   .4,    .5,  .75,
                                1,     2.5,  5,    7.5,  10,   20,   40,    80};
static const double delay_le[] = {.0001, .0002, .0005, .001, .0015, .002, .0025, .003, .004,
                                  .005,  .0075, .01,   .025, .05,   .1,   .25,   1};
static const double latency_le[] = {.05, .1, .2, .3, .5, .8, 1,   1.5, 2,   2.5, 5,    10,
                                    15,  20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double token_le[] = {1,     2,      5,      10,     20,     50,    100,
                                  200,   500,    1000,   2000,   5000,   10000, 20000,
                                  50000, 100000, 200000, 500000, 1000000};
static const double step_le[] = {1,   2,   4,    8,    16,   32,   64,   128,
                                 256, 512, 1024, 2048, 4096, 8192, 16384};
static const double n_le[] = {1, 2, 5, 10, 20};
/* As metrics.def names them. */
static const struct bounds {
    const double *le;
    size_t n;
} none = {NULL, 0}, ttft_bounds = {ttft_le, ARRAY_LEN(ttft_le)},
  itl_bounds = {itl_le, ARRAY_LEN(itl_le)}, delay_bounds = {delay_le, ARRAY_LEN(delay_le)},
  latency_bounds = {latency_le, ARRAY_LEN(latency_le)},
  token_bounds = {token_le, ARRAY_LEN(token_le)}, step_bounds = {step_le, ARRAY_LEN(step_le)},
  n_bounds = {n_le, ARRAY_LEN(n_le)};

void cluster_metrics_create(struct cluster *c)
{
    char model[N_LABEL / 2], labels[N_LABEL];
    label_value(model, sizeof(model), c->model.name);
#define METRIC(field, type, name, bounds, help)                                                    \
    snprintf(labels, sizeof(labels), "model_name=\"%s\",engine=\"router\"", model);                \
    c->rows[METRIC_##field] =                                                                      \
        metrics_get(c->metrics, METRIC_##type, name, help, labels, bounds.le, bounds.n);
#define FINISHED(field, reason)                                                                    \
    snprintf(labels, sizeof(labels),                                                               \
             "model_name=\"%s\",engine=\"router\",finished_reason=\"" reason "\"", model);         \
    c->rows[FINISHED_##field] =                                                                    \
        metrics_get(c->metrics, METRIC_COUNTER, "vllm:request_success_total",                      \
                    "Requests by how they ended", labels, NULL, 0);
#include "router/metrics.def"
}

/* -- workers -- */

enum worker_row {
#define WORKER(field, ...) WORKER_##field,
#include "router/metrics.def"
    WORKER_cache_config,
    N_WORKER_ROWS
};
static_assert(N_WORKER_ROWS <= WORKERS_N_METRICS, "room for a worker's series");

static double used_share(const struct worker_entry *w)
{
    const struct wire_beat *b = &w->beat;
    uint64_t used = (uint64_t)b->reserved_pages + b->in_flight_pages + b->live_pages;
    return w->hello.total_pages ? (double)used / w->hello.total_pages : 0;
}

void cluster_metrics_worker_joined(struct cluster *c, struct worker_entry *w)
{
    char model[N_LABEL / 2], name[2 * WIRE_MAX_NAME], labels[N_LABEL];
    label_value(model, sizeof(model), c->model.name);
    label_value(name, sizeof(name), w->hello.name);
#define WORKER(field, roles, type, metric, label, value, help)                                     \
    if ((roles)&w->hello.role) {                                                                   \
        snprintf(labels, sizeof(labels), "model_name=\"%s\",engine=\"%s\",role=\"%s\"%s%s", model, \
                 name, worker_role_name(w->hello.role), label[0] ? "," : "", label);               \
        w->series[WORKER_##field] =                                                                \
            metrics_get(c->metrics, METRIC_##type, metric, help, labels, NULL, 0);                 \
    }
#include "router/metrics.def"
    snprintf(labels, sizeof(labels),
             "model_name=\"%s\",engine=\"%s\",block_size=\"%u\",num_gpu_blocks=\"%u\","
             "enable_prefix_caching=\"%s\"",
             model, name, w->hello.fingerprint.page_tokens, w->hello.total_pages,
             w->hello.role == WIRE_PREFILL ? "True" : "False");
    w->series[WORKER_cache_config] = metrics_get(c->metrics, METRIC_GAUGE, "vllm:cache_config_info",
                                                 "Geometry of the KV pool", labels, NULL, 0);
    metric_set(w->series[WORKER_cache_config], 1);
}

void cluster_metrics_worker_left(struct cluster *c, struct worker_entry *w)
{
    for (int i = 0; i < WORKERS_N_METRICS; i++) {
        if (w->series[i])
            metrics_remove(c->metrics, w->series[i]);
        w->series[i] = NULL;
    }
}

/* -- on demand -- */

static void set(struct cluster *c, enum metric_row row, double v)
{
    metric_set(cluster_metric(c, row), v);
}

void cluster_update_metrics(struct cluster *c)
{
    struct sched_stats s = sched_get_stats(c->sched);
    set(c, METRIC_queued, s.n_new + s.n_resume);
    set(c, METRIC_resume_queue, s.n_resume);
    set(c, METRIC_suspects, s.n_suspects);
    set(c, METRIC_retries, (double)s.n_retries);
    set(c, METRIC_reruns, (double)s.n_preempted);
    set(c, METRIC_timeouts, (double)s.n_timeouts);
    set(c, METRIC_poisoned, (double)s.n_poisoned);
    set(c, METRIC_stale_epoch, (double)link_hub_stale(c->hub));
    set(c, METRIC_stale_attempt, (double)c->n_stale);
    set(c, METRIC_bad_frames, (double)link_hub_bad(c->hub));
    set(c, METRIC_workers_lost, (double)c->n_lost);
    set(c, METRIC_workers_refused, (double)c->n_refused);
    set(c, METRIC_n_prefill, workers_usable(&c->workers, WIRE_PREFILL));
    set(c, METRIC_n_decode, workers_usable(&c->workers, WIRE_DECODE));
    set(c, METRIC_gens, (double)c->n_gens);
    set(c, METRIC_ids_bytes, (double)c->id_bytes);
    metric_mirror(cluster_metric(c, METRIC_itl_old), cluster_metric(c, METRIC_itl));
    for (uint32_t i = 0; i < c->workers.n; i++) {
        struct worker_entry *w = &c->workers.at[i];
        const struct wire_beat *b = &w->beat;
        if (!w->present)
            continue;
#define WORKER(field, roles, type, name, label, value, help)                                       \
    metric_set(w->series[WORKER_##field], (double)(value));
#include "router/metrics.def"
    }
}

static json_t *worker_json(struct cluster *c, const struct worker_entry *w)
{
    const struct wire_beat *b = &w->beat;
    struct sched_worker_stats s = sched_get_worker_stats(c->sched, w->idx);
    char instance[20];
    snprintf(instance, sizeof(instance), "%016" PRIx64, w->hello.instance);
    return json_pack("{s:s, s:s, s:i, s:s, s:I, s:s, s:b, s:I, s:I, s:i, s:i, s:i, s:i, s:i, s:i, "
                     "s:i, s:i, s:I, "
                     "s:I, s:I, s:I, s:f}",
                     "name", w->hello.name, "role", worker_role_name(w->hello.role), "idx",
                     (int)w->idx, "instance", instance, "pid", (json_int_t)w->hello.pid, "state",
                     w->active ? "active" : "joining", "draining", (int)b->draining, "progress",
                     (json_int_t)b->progress, "beat_age_us",
                     (json_int_t)(w->beat_us ? clock_now_us() - w->beat_us : 0), "total_pages",
                     (int)w->hello.total_pages, "free_pages", (int)b->free_pages, "reserved_pages",
                     (int)b->reserved_pages, "in_flight_pages", (int)b->in_flight_pages,
                     "live_pages", (int)b->live_pages, "cached_pages", (int)b->cached_pages,
                     "running", (int)b->n_running, "waiting", (int)b->n_waiting, "held",
                     (json_int_t)s.n_held, "tokens_ahead", (json_int_t)s.tokens_ahead,
                     "promised_pages", (json_int_t)s.promised_pages, "stale",
                     (json_int_t)b->n_stale, "us_per_token", s.us_per_token);
}

json_t *cluster_accounting(struct cluster *c)
{
    struct sched_stats s = sched_get_stats(c->sched);
    json_t *workers = json_array();
    for (uint32_t i = 0; i < c->workers.n; i++)
        if (c->workers.at[i].present)
            json_array_append_new(workers, worker_json(c, &c->workers.at[i]));
    char epoch[20];
    snprintf(epoch, sizeof(epoch), "%016" PRIx64, c->epoch);
    return json_pack(
        "{s:s, s:b, s:{s:I, s:I, s:I, s:I, s:I, s:I, s:I}, s:{s:I, s:I, s:I, s:I, s:I, s:I}, "
        "s:{s:I, s:I, s:I}, s:I, s:o}",
        "epoch", epoch, "ready", cluster_ready(c), "requests", "gens", (json_int_t)c->n_gens,
        "queued", (json_int_t)s.n_new, "resuming", (json_int_t)s.n_resume, "prefill",
        (json_int_t)s.n_prefill, "decode", (json_int_t)s.n_decode, "ending", (json_int_t)s.n_over,
        "suspects", (json_int_t)s.n_suspects, "totals", "attempts", (json_int_t)s.n_placed,
        "retries", (json_int_t)s.n_retries, "preempted", (json_int_t)s.n_preempted, "timeouts",
        (json_int_t)s.n_timeouts, "poisoned", (json_int_t)s.n_poisoned, "workers_lost",
        (json_int_t)c->n_lost, "dropped", "stale_epoch", (json_int_t)link_hub_stale(c->hub),
        "stale_attempt", (json_int_t)c->n_stale, "bad_frames", (json_int_t)link_hub_bad(c->hub),
        "id_bytes", (json_int_t)c->id_bytes, "workers", workers);
}
