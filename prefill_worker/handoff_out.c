/* handoff_out.c: see handoff_out.h. Everything here runs on the engine thread; the pairs' own
 * threads only turn completions into mail. */
#include "prefill_worker/handoff_out.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/own.h"

#define RETRY_US     300000u
#define JOIN_WAIT_US 1000000u

enum peer_state { PEER_CONNECT, PEER_JOINING, PEER_UP, PEER_DOWN };

struct transfer {
    struct transfer *next;
    uint64_t seq, owner;
    uint64_t start_us;
    uint32_t n_pages;
    uint32_t pages[];
};

/* What a pair's thread needs to turn a completion into mail. */
struct pair_ref {
    struct worker *worker;
    uint64_t pair_id; // owner in MAIL_TRANSFER: completions of an earlier pair are recognised
};

struct target { // a decode worker
    struct target *next;
    struct handoff_out *handoff;
    enum peer_state state;
    uint64_t instance, host;
    uint32_t transports;
    char name[WIRE_MAX_NAME], endpoint[WIRE_MAX_ADDRESS];
    struct kv_pair *pair;
    struct pair_ref ref; // of pair; reused only after the pair is destroyed
    uint64_t token[2];
    uint64_t next_seq;
    uint64_t retry_us;              // when to try again, in state DOWN
    struct transfer *first, **last; // posted, in order of seq
};

struct handoff_out {
    struct handoff_out_config config;
    struct target *targets;
    uint64_t next_pair_id;
    struct handoff_stats stats;
};

static void target_down(struct target *t, const char *why);

enum err handoff_out_create(const struct handoff_out_config *c, struct handoff_out **ret)
{
    struct handoff_out *h = calloc(1, sizeof(*h));
    if (!h)
        return err_set(ERR_NOMEM, "no memory for the handoff");
    h->config = *c;
    *ret = h;
    return ERR_OK;
}

static struct target *target_find(const struct handoff_out *h, uint64_t instance)
{
    for (struct target *t = h->targets; t; t = t->next)
        if (t->instance == instance)
            return t;
    return NULL;
}

bool handoff_out_known(const struct handoff_out *h, uint64_t instance)
{
    return target_find(h, instance) != NULL;
}

bool handoff_out_up(const struct handoff_out *h, uint64_t instance)
{
    const struct target *t = target_find(h, instance);
    return t && t->state == PEER_UP;
}

static void target_join(struct target *t)
{
    struct handoff_out *h = t->handoff;
    while (getrandom(t->token, sizeof(t->token), 0) != sizeof(t->token))
        ;
    struct wire_buf buf = {0};
    struct wire_join *j = wire_begin(&buf, WIRE_JOIN, 0, 0);
    if (j) {
        j->instance = worker_instance(h->config.worker);
        j->host = worker_host(h->config.worker);
        memcpy(j->token, t->token, sizeof(j->token));
        j->transports = h->config.transports;
        j->fingerprint = h->config.fingerprint;
        snprintf(j->address, sizeof(j->address), "%s",
                 h->config.shm_name ? h->config.shm_name : "");
    }
    worker_peer_connect(h->config.worker, t->instance, t->endpoint);
    worker_post_peer(h->config.worker, t->instance, &buf);
    t->state = PEER_JOINING;
    t->retry_us = clock_now_us() + JOIN_WAIT_US;
}

/* On the pair's thread. */
static void on_done(void *user, uint64_t seq, enum err result)
{
    struct pair_ref *ref = user;
    worker_mail_transfer(ref->worker, ref->pair_id, seq, result);
}

static void target_joined(struct target *t, const struct wire_joined *j)
{
    struct handoff_out *h = t->handoff;
    if (t->state != PEER_JOINING)
        return;
    if (j->code != ERR_OK) {
        log_warn("handoff", "peer=%s refused to join: %s", t->name, j->text);
        target_down(t, j->text);
        return;
    }
    t->ref = (struct pair_ref){h->config.worker, ++h->next_pair_id};
    struct kv_pair_config c = {.pool = h->config.pool, .done = on_done, .user = &t->ref};
    memcpy(c.token, t->token, sizeof(c.token));
    enum err err = kv_pair_connect((enum wire_transport)j->transport, &c, j->address, &t->pair);
    if (err != ERR_OK) {
        log_error("handoff", "peer=%s %s", t->name, err_text(err));
        target_down(t, err_text(err));
        return;
    }
    t->next_seq = 0;
    t->state = PEER_UP;
    log_info("handoff", "peer=%s transport=%s up", t->name,
             kv_transport_name((enum wire_transport)j->transport));
}

/* Takes the oldest transfer off the list and tells its owner. */
static void transfer_end(struct target *t, enum err err)
{
    struct handoff_out *h = t->handoff;
    struct transfer *x = t->first;
    t->first = x->next;
    if (!t->first)
        t->last = &t->first;
    for (uint32_t i = 0; i < x->n_pages; i++)
        kv_pool_transfer_end(h->config.pool, x->pages[i]);
    if (err == ERR_OK) {
        h->stats.n_transfers++;
        h->stats.bytes += x->n_pages * kv_pool_page_bytes(h->config.pool);
        h->stats.us += clock_now_us() - x->start_us;
    } else {
        h->stats.n_failures++;
    }
    h->config.on_sent(h->config.user, x->owner, x->n_pages, err);
    free(x);
}

/* The pair is over: nothing touches the pool any more once this returns. */
static void target_down(struct target *t, const char *why)
{
    struct handoff_out *h = t->handoff;
    bool was_up = t->state == PEER_UP;
    kv_pair_destroy(t->pair);
    t->pair = NULL;
    t->ref.pair_id = 0;
    while (t->first)
        transfer_end(t, ERR_PEER_LOST);
    worker_peer_disconnect(h->config.worker, t->instance);
    t->state = PEER_DOWN;
    t->retry_us = clock_now_us() + RETRY_US;
    if (was_up)
        log_warn("handoff", "peer=%s down: %s", t->name, why);
    h->config.on_down(h->config.user, t->instance, why);
}

static void target_remove(struct target *gone, const char *why)
{
    struct handoff_out *h = gone->handoff;
    target_down(gone, why);
    for (struct target **at = &h->targets; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            free(gone);
            return;
        }
}

static void target_add(struct handoff_out *h, const struct wire_peer *p)
{
    if (p->role != WIRE_DECODE || target_find(h, p->instance))
        return;
    struct target *t = calloc(1, sizeof(*t));
    if (!t) {
        log_error("handoff", "no memory for peer=%s", p->name);
        return;
    }
    t->handoff = h;
    t->instance = p->instance;
    t->host = p->host;
    t->transports = p->transports;
    t->last = &t->first;
    memcpy(t->name, p->name, sizeof(t->name));
    memcpy(t->endpoint, p->endpoint, sizeof(t->endpoint));
    t->next = h->targets;
    h->targets = t;
    target_join(t);
}

bool handoff_out_mail(struct handoff_out *h, const struct mail *m)
{
    switch (m->type) {
    case MAIL_ROUTER:
        if (m->msg.head.type == WIRE_PEER) {
            target_add(h, m->msg.body);
            return true;
        }
        if (m->msg.head.type == WIRE_GONE) {
            const struct wire_gone *g = m->msg.body;
            struct target *t = target_find(h, g->instance);
            if (t)
                target_remove(t, "the router says it is gone");
            return true;
        }
        return false;
    case MAIL_PEER:
        if (m->msg.head.type != WIRE_JOINED)
            return false;
        struct target *t = target_find(h, m->peer);
        if (t)
            target_joined(t, m->msg.body);
        return true;
    case MAIL_PEER_LOST:
        t = target_find(h, m->peer);
        if (t && t->state != PEER_DOWN)
            target_down(t, "link lost");
        return true;
    case MAIL_TRANSFER:
        for (t = h->targets; t; t = t->next)
            if (t->pair && t->ref.pair_id == m->owner) {
                if (m->err != ERR_OK)
                    target_down(t, err_meaning(m->err));
                else if (t->first && t->first->seq == m->seq)
                    transfer_end(t, ERR_OK);
                break;
            }
        return true;
    default:
        return false;
    }
}

uint64_t handoff_out_tick(struct handoff_out *h, uint64_t now_us)
{
    uint64_t next = 0;
    for (struct target *t = h->targets; t; t = t->next) {
        if (t->state == PEER_JOINING && now_us >= t->retry_us)
            target_down(t, "no answer to JOIN");
        if (t->state == PEER_DOWN && now_us >= t->retry_us)
            target_join(t);
        if (t->state != PEER_UP) {
            uint64_t in = t->retry_us > now_us ? t->retry_us - now_us : 1000;
            next = next && next < in ? next : in;
        }
    }
    return next;
}

void handoff_out_reset(struct handoff_out *h, const char *why)
{
    while (h->targets)
        target_remove(h->targets, why);
}

void handoff_out_destroy(struct handoff_out *h)
{
    if (!h)
        return;
    handoff_out_reset(h, "this worker stops");
    free(h);
}

enum err handoff_out_push(struct handoff_out *h, uint64_t instance, uint64_t req_id,
                          uint32_t attempt, uint64_t owner, const uint32_t *src,
                          const uint32_t *dst, uint32_t n)
{
    struct target *t = target_find(h, instance);
    if (!t || t->state != PEER_UP)
        return err_set(ERR_PEER_LOST, "decode worker %016" PRIx64 " is not up", instance);
    assert(n > 0 && n <= WIRE_MAX_PAGES);
    struct transfer *x = malloc(sizeof(*x) + n * sizeof(x->pages[0]));
    if (!x)
        return err_set(ERR_NOMEM, "no memory for a transfer");
    *x = (struct transfer){
        .seq = t->next_seq, .owner = owner, .start_us = clock_now_us(), .n_pages = n};
    memcpy(x->pages, src, n * sizeof(x->pages[0]));

    struct wire_buf buf = {0};
    struct wire_pages *p = wire_begin(&buf, WIRE_PAGES, req_id, attempt);
    if (p) {
        p->transfer_seq = x->seq;
        p->n_pages = n;
    }
    wire_put(&buf, dst, n * sizeof(dst[0]));
    worker_post_peer(h->config.worker, instance, &buf);

    for (uint32_t i = 0; i < n; i++)
        kv_pool_transfer_begin(h->config.pool, src[i]);
    *t->last = x;
    t->last = &x->next;
    t->next_seq++;
    enum err err = kv_pair_post(t->pair, x->seq, src, n);
    if (err != ERR_OK)
        target_down(t, err_text(err));
    return err;
}

void handoff_out_post(struct handoff_out *h, uint64_t instance, struct wire_buf *buf)
{
    if (target_find(h, instance))
        worker_post_peer(h->config.worker, instance, buf);
    else
        wire_buf_finish(buf);
}

struct handoff_stats handoff_out_stats(const struct handoff_out *h) { return h->stats; }
