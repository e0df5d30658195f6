/* cluster_impl.h: what gen.c, cluster.c and cluster_metrics.c share. Nobody else includes it. */
#ifndef BATON_CLUSTER_IMPL_H
#define BATON_CLUSTER_IMPL_H

#include "common/base/json.h"
#include "common/base/link.h"
#include "router/cluster.h"
#include "router/sched.h"
#include "router/trace.h"
#include "router/workers.h"

/* Prompt and output ids of all gens together. A stream that does not get memory for its ids any
 * more goes on, but cannot move to another worker. */
#define CLUSTER_MAX_ID_BYTES (1u << 30)

enum metric_row {
#define METRIC(field, ...)   METRIC_##field,
#define FINISHED(field, ...) FINISHED_##field,
#include "router/metrics.def"
    N_METRIC_ROWS
};

struct cluster {
    uv_loop_t *loop;
    const struct config *config;
    const struct tokenizer *tokenizer;
    struct metrics *metrics;
    struct metric *rows[N_METRIC_ROWS];

    struct cluster_model model;
    uint32_t max_total_tokens;              // as configured; workers may lower the model's
    struct wire_fingerprint wanted, agreed; // agreed: what the present workers have
    bool has_agreed;
    uint64_t refused_instance; // logged already

    struct link_hub *hub;
    uint64_t epoch;
    struct wire_buf out;
    void (*flush)(void *user, bool more); // of cluster_config
    void *flush_user;
    struct sched *sched;
    struct workers workers;
    uint64_t n_stale, n_lost, n_refused;
    uint64_t jitter;

    struct gen **buckets; // by id; a power of two
    uint32_t n_buckets;
    size_t n_gens, id_bytes;
    uint64_t next_id;
    struct json_out text, piece; // scratch of gen.c

    struct cluster_history *history;
    struct trace *trace; // NULL: not wanted
    uint64_t flushed_us;
    uv_timer_t pump, tick;
    uv_prepare_t before_poll;
    uv_check_t after_poll;
    uint64_t pulsed_us;
    uint64_t polled_us, idle_ns; // when the loop began to poll; its time asleep until then
    uint64_t woken_us;           // what arrives now did not arrive before
    int n_handles;               // of the four above, until their close callbacks ran
    bool closed;
};

/* cluster.c */
void cluster_kick(struct cluster *c); /* carry out actions as soon as the loop comes round */
enum err cluster_send(struct cluster *c, uint32_t worker); /* c->out */
/* The worker is out: its requests go elsewhere, its peers are told. died: without a goodbye. */
void cluster_lose(struct cluster *c, struct worker_entry *w, bool died, const char *why);

/* gen.c: what cluster.c tells it. ERR_PROTO from gen_take: the worker that sent it talks nonsense.
 */
void gen_submit(struct cluster *c, const struct sched_action *a);
MUST_CHECK enum err gen_take(struct cluster *c, uint32_t worker, const struct wire_stream_view *v,
                             uint64_t now_us);
/* What gen_take will read of these is on its way to the cache when this returns: gens of a step are
 * waited for together instead of one by one. n is at most GENS_WARM_MAX. */
#define GENS_WARM_MAX 16u
void gens_warm(const struct cluster *c, const uint64_t *ids, uint32_t n);
void gen_attempt_failed(struct cluster *c, uint32_t worker, const struct wire_msg *m);
void gen_fail(struct gen *g, enum err code, const char *text);
void gen_table_finish(struct cluster *c);

/* cluster_status.c: samples for cluster_status, taken when one is due. */
MUST_CHECK enum err cluster_history_create(struct cluster_history **ret);
void cluster_history_tick(struct cluster *c, uint64_t now_us);

/* cluster_metrics.c */
void cluster_metrics_create(struct cluster *c);
void cluster_metrics_worker_joined(struct cluster *c, struct worker_entry *w);
void cluster_metrics_worker_left(struct cluster *c, struct worker_entry *w);
static inline struct metric *cluster_metric(struct cluster *c, enum metric_row row)
{
    return c->rows[row];
}
#define COUNT(c, row, n)     metric_add(cluster_metric(c, METRIC_##row), (double)(n))
#define OBSERVE(c, row, us)  metric_observe(cluster_metric(c, METRIC_##row), (double)(us) / 1e6)
#define OBSERVE_N(c, row, n) metric_observe(cluster_metric(c, METRIC_##row), (double)(n))

#endif
