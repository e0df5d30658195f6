/* cluster.c: real life around sched.c: one hub, its messages, two timers.
 *
 * What comes in (messages, lost links, new and cancelled gens, time) is told to the scheduler; what
 * it decides is carried out by the pump, a timer of zero, so from the loop and never inside a call
 * of ours. All sends happen there or in the handlers of what came in. A send that fails means that
 * the worker is lost, and that is dealt with at once.
 */
#include "router/cluster.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/hash.h"
#include "common/base/link.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "router/cluster_impl.h"

#define TICK_MS    50u
#define PULSE_US   100000u
#define DEAD_US    3000000u
#define FLUSH_US   1000000u
#define SEND_HWM   20000
#define NO_PEER    UINT64_MAX
#define FLUSH_AT   GENS_WARM_MAX /* streams whose events are sent before the next ones are made */
#define LARGE_STEP 64u           /* streams from which on other threads are woken to send */

static void on_hub(void *user, uint64_t peer, enum link_event event, const struct wire_msg *m,
                   const char *text);
static void take_hello(struct cluster *c, uint64_t peer, const struct wire_hello *h);
static void take_beat(struct cluster *c, struct worker_entry *w, const struct wire_beat *b);
static void take_tokens(struct cluster *c, struct worker_entry *w, const struct wire_msg *m);
static void on_pump(uv_timer_t *t);
static void on_tick(uv_timer_t *t);
static void on_before_poll(uv_prepare_t *h);
static void on_after_poll(uv_check_t *h);
static void on_handle_close(uv_handle_t *h);
static void cluster_free(struct cluster *c);
DEFINE_OWNED(cluster)

/* -- life -- */

static uint64_t seconds(double s) { return (uint64_t)(s * 1e6); }

enum err cluster_create(const struct cluster_config *cc, struct cluster **ret)
{
    const struct config *f = cc->config;
    OWNED(cluster) c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for the cluster");
    c->loop = cc->loop;
    c->config = f;
    c->tokenizer = cc->tokenizer;
    c->metrics = cc->metrics;
    c->flush = cc->flush;
    c->flush_user = cc->user;
    c->model = cc->model;
    c->max_total_tokens = cc->model.max_total_tokens;
    c->wanted = cc->fingerprint;
    c->wanted.protocol = WIRE_VERSION;
    if (getrandom(&c->epoch, sizeof(c->epoch), 0) != sizeof(c->epoch))
        return err_set(ERR_IO, "no random bytes for the epoch");
    c->epoch |= 1; // 0 means none
    c->jitter = c->epoch;

    struct sched_config sc = sched_config_default;
    sc.max_queued = (uint32_t)f->max_queued;
    sc.max_attempts = (uint32_t)f->max_attempts;
    sc.queue_timeout_us = seconds(f->queue_timeout_s);
    sc.worker_wait_us = seconds(f->worker_wait_s);
    sc.prefill_timeout_us = seconds(f->prefill_timeout_s);
    sc.request_timeout_us = seconds(f->request_timeout_s);
    if (c->wanted.page_tokens)
        sc.page_tokens = c->wanted.page_tokens;
    c->sched = sched_create(&sc);
    if (!c->sched)
        return err_set(ERR_NOMEM, "no memory for the scheduler");
    cluster_metrics_create(c);
    TRY(cluster_history_create(&c->history));
    if (f->trace_file && f->trace_file[0])
        TRY(trace_open(f->trace_file, &c->trace));

    struct link_limits limits = {.dead_us = DEAD_US, .send_hwm = SEND_HWM};
    (void)uv_loop_configure(c->loop, UV_METRICS_IDLE_TIME);
    TRY(link_hub_create(c->loop, f->router_endpoint, limits, on_hub, c, &c->hub));
    link_hub_set_epoch(c->hub, c->epoch);
    uv_timer_init(c->loop, &c->pump);
    uv_timer_init(c->loop, &c->tick);
    uv_prepare_init(c->loop, &c->before_poll);
    uv_check_init(c->loop, &c->after_poll);
    c->pump.data = c->tick.data = c->before_poll.data = c->after_poll.data = c;
    c->n_handles = 4;
    uv_timer_start(&c->tick, on_tick, TICK_MS, TICK_MS);
    uv_prepare_start(&c->before_poll, on_before_poll);
    uv_check_start(&c->after_poll, on_after_poll);
    log_info("cluster", "endpoint=%s epoch=%" PRIx64 " waiting for workers",
             link_hub_endpoint(c->hub), c->epoch);
    *ret = take(&c);
    return ERR_OK;
}

void cluster_destroy(struct cluster *c)
{
    if (!c || c->closed)
        return;
    if (!c->n_handles) { // creation failed half-way
        c->closed = true;
        cluster_free(c);
        return;
    }
    on_pump(&c->pump); // the last cancels
    c->closed = true;
    link_hub_destroy(c->hub);
    c->hub = NULL;
    uv_close((uv_handle_t *)&c->pump, on_handle_close);
    uv_close((uv_handle_t *)&c->tick, on_handle_close);
    uv_close((uv_handle_t *)&c->before_poll, on_handle_close);
    uv_close((uv_handle_t *)&c->after_poll, on_handle_close);
}

static void on_handle_close(uv_handle_t *h)
{
    struct cluster *c = h->data;
    if (--c->n_handles == 0)
        cluster_free(c);
}

static void cluster_free(struct cluster *c)
{
    gen_table_finish(c);
    sched_destroy(c->sched);
    wire_buf_finish(&c->out);
    free(c->history);
    trace_close(c->trace);
    free(c);
}

/* -- questions -- */

const struct cluster_model *cluster_get_model(const struct cluster *c) { return &c->model; }

enum err cluster_admits(struct cluster *c, uint32_t n, int *ret_retry_after_s)
{
    enum err e = sched_admits(c->sched, n, clock_now_us());
    if (e == ERR_OK)
        return ERR_OK;
    // Clients wait exactly as long as they are told, so not all of them the same time.
    c->jitter = hash_mix(c->jitter + 0x9e3779b97f4a7c15u);
    *ret_retry_after_s = 1 + (int)(c->jitter % 5);
    COUNT(c, refused, 1);
    return e;
}

enum err cluster_reopen_trace(struct cluster *c)
{
    return c->trace ? trace_reopen(c->trace) : ERR_OK;
}

bool cluster_ready(const struct cluster *c)
{
    return workers_usable(&c->workers, WIRE_PREFILL) > 0 &&
           workers_usable(&c->workers, WIRE_DECODE) > 0;
}

/* -- carrying out -- */

void cluster_kick(struct cluster *c)
{
    if (!c->closed && !uv_is_active((uv_handle_t *)&c->pump))
        uv_timer_start(&c->pump, on_pump, 0, 0);
}

static void on_pump(uv_timer_t *t)
{
    struct cluster *c = t->data;
    struct sched_action a;
    while (sched_next(c->sched, clock_now_us(), &a)) {
        switch (a.what) {
        case SCHED_PLACE:
            gen_submit(c, &a);
            break;
        case SCHED_CANCEL:
            if (wire_begin(&c->out, WIRE_CANCEL, a.id, a.attempt) && wire_end(&c->out) == ERR_OK)
                (void)!cluster_send(c, a.p);
            break;
        case SCHED_FAIL:
            gen_fail(a.user, a.code, a.text);
            break;
        }
    }
}

enum err cluster_send(struct cluster *c, uint32_t worker)
{
    struct worker_entry *w = &c->workers.at[worker];
    assert(w->present);
    enum err e = link_hub_send(c->hub, w->peer, &c->out);
    if (e != ERR_OK) // even a full queue: what is not told now would never be told
        cluster_lose(c, w, true, err_text(e));
    return e;
}

static void on_tick(uv_timer_t *t)
{
    struct cluster *c = t->data;
    uint64_t now = clock_now_us();
    sched_tick(c->sched, now);
    cluster_history_tick(c, now);
    if (c->trace && now - c->flushed_us >= FLUSH_US) {
        c->flushed_us = now;
        trace_flush(c->trace);
    }
    if (now - c->pulsed_us >= PULSE_US) {
        c->pulsed_us = now;
        for (uint32_t i = 0; i < c->workers.n; i++) {
            struct worker_entry *w = &c->workers.at[i];
            if (!w->present || !wire_begin(&c->out, WIRE_PULSE, 0, 0) ||
                wire_end(&c->out) != ERR_OK)
                continue;
            if (link_hub_send(c->hub, w->peer, &c->out) == ERR_PEER_LOST)
                cluster_lose(c, w, true, err_text(ERR_PEER_LOST));
        }
    }
    on_pump(&c->pump);
}

/* A message that is found after the loop has polled came at the end of its sleep at the earliest:
 * before, the hub saw to it that there was none. */
static void on_before_poll(uv_prepare_t *h)
{
    struct cluster *c = h->data;
    c->polled_us = clock_now_us();
    c->idle_ns = uv_metrics_idle_time(c->loop);
}

/* Started behind the hub's, so that libuv calls it first. */
static void on_after_poll(uv_check_t *h)
{
    struct cluster *c = h->data;
    c->woken_us = c->polled_us + (uv_metrics_idle_time(c->loop) - c->idle_ns) / 1000;
}

/* -- workers come and go -- */

static void on_hub(void *user, uint64_t peer, enum link_event event, const struct wire_msg *m,
                   const char *text)
{
    struct cluster *c = user;
    struct worker_entry *w = workers_by_peer(&c->workers, peer);
    if (event == LINK_LOST) {
        if (w)
            cluster_lose(c, w, true, text);
        return;
    }
    if (m->head.type == WIRE_HELLO) {
        take_hello(c, peer, m->body);
        return;
    }
    if (!w) {
        if (m->head.type != WIRE_BYE && wire_begin(&c->out, WIRE_WHO, 0, 0) &&
            wire_end(&c->out) == ERR_OK)
            (void)!link_hub_send(c->hub, peer, &c->out);
        return;
    }
    switch (m->head.type) {
    case WIRE_BEAT:
        take_beat(c, w, m->body);
        break;
    case WIRE_TOKENS:
        take_tokens(c, w, m);
        break;
    case WIRE_FAILED:
        gen_attempt_failed(c, w->idx, m);
        break;
    case WIRE_BYE: {
        const struct wire_text *b = m->body;
        cluster_lose(c, w, false, b->text);
        break;
    }
    case WIRE_PULSE:
        break;
    default:
        log_warn("cluster", "worker=%s type=%s not for a router, ignored", w->hello.name,
                 wire_type_name(m->head.type));
    }
}

/* Tells a worker about a peer of the other role. */
static void introduce(struct cluster *c, uint32_t to, const struct worker_entry *w)
{
    struct wire_peer *b = wire_begin(&c->out, WIRE_PEER, 0, 0);
    if (!b)
        return;
    b->worker_idx = w->idx;
    b->role = w->hello.role;
    b->instance = w->hello.instance;
    b->host = w->hello.host;
    b->transports = w->hello.transports;
    memcpy(b->name, w->hello.name, sizeof(b->name));
    memcpy(b->endpoint, w->hello.endpoint, sizeof(b->endpoint));
    if (wire_end(&c->out) == ERR_OK)
        (void)!cluster_send(c, to);
}

static void refuse(struct cluster *c, uint64_t peer, const struct wire_hello *h, const char *why)
{
    c->n_refused++;
    if (c->refused_instance != h->instance)
        log_warn("cluster", "worker=%s role=%s refused: %s", h->name, worker_role_name(h->role),
                 why);
    c->refused_instance = h->instance;
    struct wire_text *b = wire_begin(&c->out, WIRE_REFUSE, 0, 0);
    if (b) {
        snprintf(b->text, sizeof(b->text), "%s", why);
        if (wire_end(&c->out) == ERR_OK)
            (void)!link_hub_send(c->hub, peer, &c->out);
    }
    link_hub_forget(c->hub, peer);
}

/* Why this HELLO is not accepted, or NULL. */
static const char *objection(struct cluster *c, const struct wire_hello *h, char *text, size_t n)
{
    const char *field = c->has_agreed ? wire_fingerprint_differs(&c->agreed, &h->fingerprint)
                                      : workers_mismatch(&c->wanted, &h->fingerprint);
    if (field) {
        snprintf(text, n, "fingerprint differs in %s", field);
        return text;
    }
    struct worker_entry *same = workers_by_name(&c->workers, h->name);
    if (same && same->hello.instance != h->instance) {
        // Perhaps it has just died and this is its successor: a pulse shows it.
        if (wire_begin(&c->out, WIRE_PULSE, 0, 0) && wire_end(&c->out) == ERR_OK &&
            link_hub_send(c->hub, same->peer, &c->out) == ERR_PEER_LOST) {
            cluster_lose(c, same, true, err_text(ERR_PEER_LOST));
            return NULL;
        }
        snprintf(text, n, "the name %s belongs to another live worker (pid %" PRIu64 ")", h->name,
                 same->hello.pid);
        return text;
    }
    return NULL;
}

static void take_hello(struct cluster *c, uint64_t peer, const struct wire_hello *h)
{
    char text[WIRE_MAX_TEXT];
    if (!h->name[0] || !h->max_running || !h->total_pages || !h->max_total_tokens ||
        (h->role == WIRE_PREFILL && !h->chunk_tokens)) {
        refuse(c, peer, h,
               "HELLO needs a name, max_running, total_pages, max_total_tokens and chunk_tokens");
        return;
    }
    struct worker_entry *w = workers_by_instance(&c->workers, h->instance);
    if (w && (w->active || w->peer != peer)) { // it starts over: what it had is void
        if (w->peer == peer)
            w->peer = NO_PEER; // the link stays
        cluster_lose(c, w, false, "registered again");
        w = NULL;
    }
    if (!w) {
        const char *why = objection(c, h, text, sizeof(text));
        if (!why && !(w = workers_add(&c->workers, peer, h, clock_now_us())))
            why = "too many workers";
        if (why) {
            refuse(c, peer, h, why);
            return;
        }
        c->agreed = h->fingerprint;
        c->has_agreed = true;
        struct sched_worker_info info = {.role = h->role,
                                         .total_pages = h->total_pages,
                                         .max_running = h->max_running,
                                         .chunk_tokens = h->chunk_tokens,
                                         .max_total_tokens = h->max_total_tokens};
        sched_worker_add(c->sched, w->idx, &info);
        c->model.max_total_tokens = MIN(c->max_total_tokens, sched_max_total_tokens(c->sched));
        cluster_metrics_worker_joined(c, w);
        log_info("cluster", "worker=%s role=%s idx=%u pid=%" PRIu64 " pages=%u joined", h->name,
                 worker_role_name(h->role), w->idx, h->pid, h->total_pages);
    }
    struct wire_welcome *b = wire_begin(&c->out, WIRE_WELCOME, 0, 0);
    if (!b)
        return;
    b->worker_idx = w->idx;
    if (wire_end(&c->out) != ERR_OK || cluster_send(c, w->idx) != ERR_OK)
        return;
    for (uint32_t i = 0; i < c->workers.n && w->present; i++) {
        struct worker_entry *o = &c->workers.at[i];
        if (!o->present || o->hello.role == w->hello.role)
            continue;
        introduce(c, i, w);
        if (o->present && w->present)
            introduce(c, w->idx, o);
    }
}

void cluster_lose(struct cluster *c, struct worker_entry *w, bool died, const char *why)
{
    if (!w->present)
        return;
    char reason[WIRE_MAX_TEXT]; // why may be err_text, which the sends below overwrite
    snprintf(reason, sizeof(reason), "%s", why);
    struct sched_worker_stats held = sched_get_worker_stats(c->sched, w->idx);
    log_event(died ? LOG_WARN : LOG_INFO, "cluster", "worker=%s role=%s held=%u %s: %s",
              w->hello.name, worker_role_name(w->hello.role), held.n_held, died ? "lost" : "left",
              reason);
    c->n_lost += died;
    link_hub_forget(c->hub, w->peer);
    workers_remove(&c->workers, w);
    cluster_metrics_worker_left(c, w);
    sched_worker_remove(c->sched, w->idx, died, clock_now_us());
    c->model.max_total_tokens = MIN(c->max_total_tokens, sched_max_total_tokens(c->sched));
    if (c->workers.n == 0)
        c->has_agreed = false; // whoever comes next may be of another model
    for (uint32_t i = 0; i < c->workers.n; i++) {
        struct worker_entry *o = &c->workers.at[i];
        if (!o->present || o->hello.role == w->hello.role)
            continue;
        struct wire_gone *b = wire_begin(&c->out, WIRE_GONE, 0, 0);
        if (!b)
            continue;
        b->worker_idx = w->idx;
        b->instance = w->hello.instance;
        if (wire_end(&c->out) == ERR_OK)
            (void)!cluster_send(c, i);
    }
    cluster_kick(c);
}

static void take_beat(struct cluster *c, struct worker_entry *w, const struct wire_beat *b)
{
    uint64_t last_progress = w->beat.progress;
    bool first = w->beat_us == 0;
    if (workers_beat(w, b, seconds(c->config->step_timeout_s), clock_now_us())) {
        struct wire_text *t = wire_begin(&c->out, WIRE_REFUSE, 0, 0);
        if (t) {
            snprintf(t->text, sizeof(t->text), "no progress");
            if (wire_end(&c->out) == ERR_OK)
                (void)!link_hub_send(c->hub, w->peer, &c->out);
        }
        cluster_lose(c, w, true, "busy without progress");
        return;
    }
    if (!w->active) {
        // One that comes back while its engine is still stuck gets nothing until it moves.
        if (b->busy && (first || b->progress == last_progress))
            return;
        w->active = true;
        log_info("cluster", "worker=%s free_pages=%u ready", w->hello.name, b->free_pages);
    }
    sched_worker_beat(c->sched, w->idx, b, w->beat_us);
    cluster_kick(c);
}

void cluster_sent(struct cluster *c, size_t n, uint64_t sent_us)
{
    metric_observe_many(cluster_metric(c, METRIC_event_delay),
                        (double)(sent_us - c->woken_us) / 1e6, n);
}

static void flush_events(struct cluster *c, bool more)
{
    if (c->flush)
        c->flush(c->flush_user, more);
}

/* A step of hundreds of streams: the first clients do not wait for the last one's event, and what
 * a stream needs is still in the cache when its event is sent. Other threads may send while we go
 * on; all is sent when this returns, so that nothing of it is in the way of what comes next. */
static void take_tokens(struct cluster *c, struct worker_entry *w, const struct wire_msg *m)
{
    if (failpoint_pass("router.tokens") != FAILPOINT_NONE)
        return;
    struct wire_stream_view v;
    bool large = ((const struct wire_tokens *)m->body)->n_streams >= LARGE_STEP;
    size_t offset = 0, ahead = 0, n_tokens = 0;
    uint32_t idx = w->idx, n_unsent = 0;
    uint64_t peer = w->peer, now = clock_now_us();
    for (;;) {
        if (n_unsent == 0) {
            uint64_t ids[FLUSH_AT];
            uint32_t n = 0;
            while (n < FLUSH_AT && wire_tokens_next(m, &ahead, &v))
                ids[n++] = v.head->req_id;
            gens_warm(c, ids, n);
        }
        if (!wire_tokens_next(m, &offset, &v))
            break;
        n_tokens += v.head->n_tokens;
        if (gen_take(c, idx, &v, now) != ERR_OK) {
            if (w->present && w->peer == peer)
                cluster_lose(c, w, true, err_text(ERR_PROTO));
            flush_events(c, false);
            return;
        }
        if (++n_unsent == FLUSH_AT) {
            flush_events(c, large);
            now = clock_now_us();
            n_unsent = 0;
        }
    }
    if (n_unsent > 0 || large)
        flush_events(c, false);
    if (w->hello.role == WIRE_DECODE && n_tokens > 0)
        OBSERVE_N(c, iteration_tokens, n_tokens);
}
