/* cluster_status.c: what the status page shows, as one JSON object: the cluster now, and a sample
 * of every second of the last two minutes, so that a page that was opened just now has curves to
 * draw.
 *
 * Totals are totals and rates are left to whoever asks twice; only the samples are rates.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "router/cluster_impl.h"

#define SAMPLE_US 1000000u
#define N_SAMPLES 120u

/* name in JSON, value; over the cluster c, the windows h, sched_stats s and the seconds dt. */
#define SAMPLE_TABLE(X)                                                                            \
    X("tokens_per_s", rate(c, METRIC_generation_tokens, &h->generated, dt))                        \
    X("prompt_tokens_per_s", rate(c, METRIC_prompt_tokens, &h->prompted, dt))                      \
    X("ttft_p50_ms", quantile_ms(c, METRIC_ttft, &h->ttft, 0.5))                                   \
    X("ttft_p99_ms", quantile_ms(c, METRIC_ttft, &h->ttft, 0.99))                                  \
    X("itl_mean_ms", h->itl.n ? 1e3 * h->itl.sum / (double)h->itl.n : NAN)                         \
    X("itl_p99_ms", quantile_ms(c, METRIC_itl, &h->itl, 0.99))                                     \
    X("waiting", s.n_new + s.n_resume)                                                             \
    X("running", s.n_prefill + s.n_decode)

#define X(name, value) +1
enum { N_COLUMNS = 0 SAMPLE_TABLE(X) };
#undef X

struct cluster_history {
    uint64_t sampled_us; // 0: never
    uint32_t n, next;    // samples, and where the next one goes
    float at[N_SAMPLES][N_COLUMNS];
    struct metric_window ttft, itl;
    double generated, prompted;
};

enum err cluster_history_create(struct cluster_history **ret)
{
    struct cluster_history *h = calloc(1, sizeof(*h));
    if (!h)
        return err_set(ERR_NOMEM, "no memory for the status page");
    *ret = h;
    return ERR_OK;
}

static double rate(struct cluster *c, enum metric_row row, double *last, double dt)
{
    double v = metric_value(cluster_metric(c, row)), d = v - *last;
    *last = v;
    return d / dt;
}

static double quantile_ms(struct cluster *c, enum metric_row row, const struct metric_window *w,
                          double q)
{
    return 1e3 * metric_window_quantile(w, cluster_metric(c, row), q);
}

void cluster_history_tick(struct cluster *c, uint64_t now_us)
{
    struct cluster_history *h = c->history;
    if (h->sampled_us && now_us - h->sampled_us < SAMPLE_US)
        return;
    double dt = h->sampled_us ? (double)(now_us - h->sampled_us) / 1e6 : 1;
    h->sampled_us = now_us;
    struct sched_stats s = sched_get_stats(c->sched);
    metric_window_move(&h->ttft, cluster_metric(c, METRIC_ttft));
    metric_window_move(&h->itl, cluster_metric(c, METRIC_itl));
    float *to = h->at[h->next];
#define X(name, value) *to++ = (float)(value);
    SAMPLE_TABLE(X)
#undef X
    h->next = (h->next + 1) % N_SAMPLES;
    h->n = MIN(h->n + 1, N_SAMPLES);
}

/* -- as JSON -- */

static json_t *history_json(const struct cluster_history *h)
{
    static const char *const names[] = {
#define X(name, value) name,
        SAMPLE_TABLE(X)
#undef X
    };
    json_t *o = json_pack("{s:i}", "interval_ms", (int)(SAMPLE_US / 1000));
    for (size_t k = 0; k < N_COLUMNS; k++) {
        json_t *column = json_array();
        for (uint32_t i = 0; i < h->n; i++) {
            float v = h->at[(h->next + N_SAMPLES - h->n + i) % N_SAMPLES][k];
            json_array_append_new(column, isfinite(v) ? json_real(v) : json_null());
        }
        json_object_set_new(o, names[k], column);
    }
    return o;
}

static json_t *transports_json(uint32_t bits)
{
    static const struct {
        uint32_t bit;
        const char *name;
    } names[] = {
        {WIRE_KV_IPC, "ipc"}, {WIRE_KV_NCCL, "nccl"}, {WIRE_KV_SHM, "shm"}, {WIRE_KV_TCP, "tcp"}};
    json_t *list = json_array();
    for (size_t i = 0; i < ARRAY_LEN(names); i++)
        if (bits & names[i].bit)
            json_array_append_new(list, json_string(names[i].name));
    return list;
}

static void put(json_t *o, const char *name, uint64_t v)
{
    json_object_set_new(o, name, json_integer((json_int_t)v));
}

static json_t *worker_json(struct cluster *c, const struct worker_entry *w, uint64_t now_us)
{
    const struct wire_beat *b = &w->beat;
    struct sched_worker_stats s = sched_get_worker_stats(c->sched, w->idx);
    const char *state = !w->active ? "joining" : b->draining ? "draining" : "active";
    json_t *o =
        json_pack("{s:s, s:s, s:s, s:{s:I, s:I, s:I, s:I, s:I, s:I}}", "name", w->hello.name,
                  "role", worker_role_name(w->hello.role), "state", state, "pages", "total",
                  (json_int_t)w->hello.total_pages, "free", (json_int_t)b->free_pages, "reserved",
                  (json_int_t)b->reserved_pages, "in_flight", (json_int_t)b->in_flight_pages,
                  "live", (json_int_t)b->live_pages, "cached", (json_int_t)b->cached_pages);
    put(o, "pid", w->hello.pid);
    put(o, "uptime_s", (now_us - w->joined_us) / 1000000u);
    put(o, "beat_age_ms", w->beat_us ? (now_us - w->beat_us) / 1000u : 0);
    put(o, "running", b->n_running);
    put(o, "max_running", w->hello.max_running);
    put(o, "waiting", b->n_waiting);
    put(o, "held", s.n_held);
    put(o, "step_us", b->step_us);
    put(o, "steps", b->n_steps);
    put(o, "prompt_tokens", b->prompt_tokens);
    put(o, "generated_tokens", b->generated_tokens);
    put(o, "handoffs", b->n_handoffs);
    put(o, "handoff_failures", b->n_handoff_failures);
    put(o, "handoff_bytes", b->handoff_bytes);
    put(o, "handoff_us", b->handoff_us);
    if (w->hello.role == WIRE_PREFILL) {
        put(o, "waiting_tokens", b->waiting_tokens);
        put(o, "prefix_queried_tokens", b->prefix_queried_tokens);
        put(o, "prefix_hit_tokens", b->prefix_hit_tokens);
        return o;
    }
    put(o, "mtp_step", w->hello.mtp_step);
    put(o, "preemptions", b->n_preemptions);
    put(o, "draft_tokens", b->n_draft_tokens);
    put(o, "accepted_tokens", b->n_accepted_tokens);
    return o;
}

/* Every prefill worker feeds every decode worker; the transport is the first that both have. */
static json_t *links_json(const struct cluster *c)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < c->workers.n; i++) {
        const struct worker_entry *p = &c->workers.at[i];
        if (!p->present || p->hello.role != WIRE_PREFILL)
            continue;
        for (uint32_t k = 0; k < c->workers.n; k++) {
            const struct worker_entry *d = &c->workers.at[k];
            if (!d->present || d->hello.role != WIRE_DECODE)
                continue;
            uint32_t common = p->hello.transports & d->hello.transports;
            if (p->hello.host != d->hello.host)
                common &= ~(uint32_t)(WIRE_KV_IPC | WIRE_KV_SHM);
            json_array_append_new(list, json_pack("{s:s, s:s, s:o, s:I}", "prefill", p->hello.name,
                                                  "decode", d->hello.name, "transports",
                                                  transports_json(common), "attempts",
                                                  (json_int_t)p->n_paired[k]));
        }
    }
    return list;
}

static json_t *totals_json(struct cluster *c)
{
    static const struct {
        const char *name;
        enum metric_row row;
    } rows[] = {{"requests", METRIC_admitted},
                {"refused", METRIC_refused},
                {"prompt_tokens", METRIC_prompt_tokens},
                {"cached_tokens", METRIC_cached_tokens},
                {"generated_tokens", METRIC_generation_tokens},
                {"stop", FINISHED_stop},
                {"length", FINISHED_length},
                {"abort", FINISHED_abort},
                {"error", FINISHED_error}};
    json_t *o = json_object();
    for (size_t i = 0; i < ARRAY_LEN(rows); i++)
        put(o, rows[i].name, (uint64_t)metric_value(cluster_metric(c, rows[i].row)));
    struct sched_stats s = sched_get_stats(c->sched);
    put(o, "attempts", s.n_placed);
    put(o, "retries", s.n_retries);
    put(o, "preempted", s.n_preempted);
    put(o, "timeouts", s.n_timeouts);
    put(o, "workers_lost", c->n_lost);
    return o;
}

json_t *cluster_status(struct cluster *c)
{
    struct sched_stats s = sched_get_stats(c->sched);
    uint64_t now_us = clock_now_us();
    json_t *workers = json_array();
    for (uint32_t i = 0; i < c->workers.n; i++)
        if (c->workers.at[i].present)
            json_array_append_new(workers, worker_json(c, &c->workers.at[i], now_us));
    return json_pack("{s:s, s:I, s:b, s:{s:I, s:I, s:I, s:I}, s:o, s:o, s:o, s:o}", "model",
                     c->model.name, "max_total_tokens", (json_int_t)c->model.max_total_tokens,
                     "ready", cluster_ready(c), "requests", "queued", (json_int_t)s.n_new,
                     "resuming", (json_int_t)s.n_resume, "prefill", (json_int_t)s.n_prefill,
                     "decode", (json_int_t)s.n_decode, "totals", totals_json(c), "workers", workers,
                     "links", links_json(c), "history", history_json(c->history));
}
