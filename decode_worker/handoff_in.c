/* handoff_in.c: see handoff_in.h. Everything here runs on the engine thread; the pairs' own threads
 * only turn completions into mail. */
#include "decode_worker/handoff_in.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/own.h"

struct transfer {
    struct transfer *next;
    uint64_t seq, req_id;
    uint64_t start_us;
    uint32_t attempt, n_pages;
    uint32_t pages[];
};

/* What a pair's thread needs to turn a completion into mail. */
struct pair_ref {
    struct worker *worker;
    uint64_t pair_id;
};

struct source { // a prefill worker that the router introduced
    struct source *next;
    struct handoff_in *handoff;
    uint64_t instance;
    char name[WIRE_MAX_NAME];
    uint64_t key; // peer key of its link, 0 while not joined
    struct kv_pair *pair;
    struct pair_ref ref;
    uint64_t next_seq;
    struct transfer *first, **last;
};

struct handoff_in {
    struct handoff_in_config config;
    struct source *sources;
    uint64_t next_pair_id;
    struct handoff_in_stats stats;
};

enum err handoff_in_create(const struct handoff_in_config *c, struct handoff_in **ret)
{
    struct handoff_in *h = calloc(1, sizeof(*h));
    if (!h)
        return err_set(ERR_NOMEM, "no memory for the handoff");
    h->config = *c;
    *ret = h;
    return ERR_OK;
}

static struct source *source_find(const struct handoff_in *h, uint64_t instance)
{
    for (struct source *s = h->sources; s; s = s->next)
        if (s->instance == instance)
            return s;
    return NULL;
}

static struct source *source_by_key(const struct handoff_in *h, uint64_t key)
{
    for (struct source *s = h->sources; s; s = s->next)
        if (s->pair && s->key == key)
            return s;
    return NULL;
}

bool handoff_in_up(const struct handoff_in *h, uint64_t instance)
{
    const struct source *s = source_find(h, instance);
    return s && s->pair;
}

uint64_t handoff_in_instance(const struct handoff_in *h, uint64_t peer)
{
    const struct source *s = source_by_key(h, peer);
    return s ? s->instance : 0;
}

/* Takes the oldest transfer off the list. */
static void transfer_end(struct source *s, enum err err)
{
    struct handoff_in *h = s->handoff;
    struct transfer *x = s->first;
    s->first = x->next;
    if (!s->first)
        s->last = &s->first;
    for (uint32_t i = 0; i < x->n_pages; i++)
        kv_pool_transfer_end(h->config.pool, x->pages[i]);
    if (err == ERR_OK) {
        h->stats.n_transfers++;
        h->stats.bytes += x->n_pages * kv_pool_page_bytes(h->config.pool);
        h->stats.us += clock_now_us() - x->start_us;
        h->config.on_received(h->config.user, x->req_id, x->attempt);
    } else {
        h->stats.n_failures++;
    }
    free(x);
}

static void source_down(struct source *s, const char *why)
{
    if (!s->pair)
        return;
    struct handoff_in *h = s->handoff;
    log_warn("handoff", "peer=%s down: %s", s->name, why);
    kv_pair_destroy(s->pair);
    s->pair = NULL;
    s->ref.pair_id = 0;
    while (s->first)
        transfer_end(s, ERR_PEER_LOST);
    s->key = 0;
    h->config.on_down(h->config.user, s->instance, why);
}

static void source_remove(struct source *gone, const char *why)
{
    struct handoff_in *h = gone->handoff;
    source_down(gone, why);
    for (struct source **at = &h->sources; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            free(gone);
            return;
        }
}

static void source_add(struct handoff_in *h, const struct wire_peer *p)
{
    if (p->role != WIRE_PREFILL || source_find(h, p->instance))
        return;
    struct source *s = calloc(1, sizeof(*s));
    if (!s) {
        log_error("handoff", "no memory for peer=%s", p->name);
        return;
    }
    s->handoff = h;
    s->instance = p->instance;
    memcpy(s->name, p->name, sizeof(s->name));
    s->last = &s->first;
    s->next = h->sources;
    h->sources = s;
}

/* On the pair's thread. */
static void on_done(void *user, uint64_t seq, enum err result)
{
    struct pair_ref *ref = user;
    worker_mail_transfer(ref->worker, ref->pair_id, seq, result);
}

static enum err join(struct handoff_in *h, uint64_t key, const struct wire_join *j,
                     struct wire_joined *ret)
{
    struct source *s = source_find(h, j->instance);
    if (!s)
        return err_set(ERR_UNAVAILABLE, "the router has not introduced this prefill worker yet");
    const char *field = wire_fingerprint_differs(&h->config.fingerprint, &j->fingerprint);
    if (field)
        return err_set(ERR_MISMATCH, "%s differs", field);
    enum wire_transport kind = kv_transport_choose(h->config.transports, j->transports,
                                                   worker_host(h->config.worker) == j->host);
    if (!kind)
        return err_set(ERR_MISMATCH, "no KV transport that both can use");
    source_down(s, "it joins again");
    s->ref = (struct pair_ref){h->config.worker, ++h->next_pair_id};
    struct kv_pair_config c = {.pool = h->config.pool, .done = on_done, .user = &s->ref};
    memcpy(c.token, j->token, sizeof(c.token));
    TRY(kv_pair_listen(kind, &c, h->config.host, j->address, ret->address, &s->pair));
    s->key = key;
    s->next_seq = 0;
    ret->transport = kind;
    log_info("handoff", "peer=%s transport=%s joined", s->name, kv_transport_name(kind));
    return ERR_OK;
}

static void on_join(struct handoff_in *h, uint64_t key, const struct wire_join *j)
{
    struct wire_joined joined = {.instance = worker_instance(h->config.worker)};
    enum err err = join(h, key, j, &joined);
    joined.code = err;
    if (err != ERR_OK)
        snprintf(joined.text, sizeof(joined.text), "%s", err_text(err));
    struct wire_buf buf = {0};
    struct wire_joined *body = wire_begin(&buf, WIRE_JOINED, 0, 0);
    if (body)
        *body = joined;
    worker_post_peer(h->config.worker, key, &buf);
    if (err == ERR_OK)
        h->config.on_up(h->config.user, j->instance);
}

bool handoff_in_mail(struct handoff_in *h, const struct mail *m)
{
    struct source *s;
    switch (m->type) {
    case MAIL_ROUTER:
        if (m->msg.head.type == WIRE_PEER) {
            source_add(h, m->msg.body);
            return true;
        }
        if (m->msg.head.type == WIRE_GONE) {
            const struct wire_gone *g = m->msg.body;
            s = source_find(h, g->instance);
            if (s)
                source_remove(s, "the router says it is gone");
            return true;
        }
        return false;
    case MAIL_PEER:
        if (m->msg.head.type != WIRE_JOIN)
            return false;
        on_join(h, m->peer, m->msg.body);
        return true;
    case MAIL_PEER_LOST:
        s = source_by_key(h, m->peer);
        if (s)
            source_down(s, "link lost");
        return true;
    case MAIL_TRANSFER:
        for (s = h->sources; s; s = s->next)
            if (s->pair && s->ref.pair_id == m->owner) {
                if (m->err != ERR_OK)
                    source_down(s, err_meaning(m->err));
                else if (s->first && s->first->seq == m->seq)
                    transfer_end(s, ERR_OK);
                break;
            }
        return true;
    default:
        return false;
    }
}

void handoff_in_reset(struct handoff_in *h, const char *why)
{
    while (h->sources)
        source_remove(h->sources, why);
}

void handoff_in_destroy(struct handoff_in *h)
{
    if (!h)
        return;
    handoff_in_reset(h, "this worker stops");
    free(h);
}

enum err handoff_in_expect(struct handoff_in *h, uint64_t instance, uint64_t req_id,
                           uint32_t attempt, uint64_t seq, const uint32_t *pages, uint32_t n)
{
    struct source *s = source_find(h, instance);
    if (!s || !s->pair)
        return err_set(ERR_PEER_LOST, "prefill worker %016" PRIx64 " has not joined", instance);
    if (seq != s->next_seq)
        return err_set(ERR_PROTO, "PAGES has transfer %" PRIu64 ", want %" PRIu64, seq,
                       s->next_seq);
    struct transfer *x = malloc(sizeof(*x) + n * sizeof(x->pages[0]));
    if (!x)
        return err_set(ERR_NOMEM, "no memory for a transfer");
    *x = (struct transfer){
        .seq = seq, .req_id = req_id, .attempt = attempt, .start_us = clock_now_us(), .n_pages = n};
    memcpy(x->pages, pages, n * sizeof(x->pages[0]));
    for (uint32_t i = 0; i < n; i++)
        kv_pool_transfer_begin(h->config.pool, pages[i]);
    *s->last = x;
    s->last = &x->next;
    s->next_seq++;
    return kv_pair_post(s->pair, seq, pages, n);
}

void handoff_in_post(struct handoff_in *h, uint64_t instance, struct wire_buf *buf)
{
    struct source *s = source_find(h, instance);
    if (s && s->pair)
        worker_post_peer(h->config.worker, s->key, buf);
    else
        wire_buf_finish(buf);
}

void handoff_in_break(struct handoff_in *h, uint64_t instance, const char *why)
{
    struct source *s = source_find(h, instance);
    if (!s || !s->pair)
        return;
    worker_peer_disconnect(h->config.worker, s->key); // it will meet WHO and join again
    source_down(s, why);
}

struct handoff_in_stats handoff_in_stats(const struct handoff_in *h) { return h->stats; }
