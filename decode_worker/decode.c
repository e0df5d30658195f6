/* decode.c: reservations, the running batch, and one message per step to the router.
 *
 * States and rules of a stream: stream.h. Each turn of the loop reads the mail, grants pages to
 * waiting attempts in order of arrival, and runs one step over everything that is running
 * (speculate.h). Mail that comes while the step computes is dealt with then (attend): transfers
 * start and end beside it, and whoever is complete before its end is in the next one. When a
 * running stream needs a page and none is free, the youngest running one is preempted: its pages
 * are freed and the router is told PREEMPTED; it submits the request again with the tokens so far,
 * and the sampling rule makes the text go on as if nothing had happened.
 */
#include "decode_worker/decode.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "decode_worker/accept.h"
#include "decode_worker/depth.h"
#include "decode_worker/handoff_in.h"
#include "decode_worker/speculate.h"
#include "decode_worker/stream.h"

#define IDLE_WAIT_US 100000u
#define N_EARLY      4096u /* RELEASEs remembered that came before their SUBMIT */

struct early_release {
    uint64_t req_id;
    uint32_t attempt;
    bool used;
};

struct decode {
    struct decode_config config;
    const struct model_config *model;
    struct worker *worker;
    struct kv_pool *pool;
    struct handoff_in *handoff;
    struct speculate *speculate;
    struct constraints *constraints;
    struct stream *streams;
    uint32_t n_waiting, n_reserved, n_zombie, n_running; // by state
    uint32_t max_streams;
    uint32_t mtp_step;     // drafts of this step; unless it is chosen, always the same
    bool choose;           // --mtp-step auto
    struct depth depth;    // for that
    bool *slot_used;       // [max_streams]
    struct stream **batch; // [max_streams]
    struct early_release early[N_EARLY]; // a ring
    uint32_t early_at;
    bool stop, draining;
    uint64_t step_end_us; // of the step just before; 0: there was a pause
    struct wire_beat beat;
};

static void on_up(void *user, uint64_t instance);
static void on_received(void *user, uint64_t req_id, uint32_t attempt);
static void on_down(void *user, uint64_t instance, const char *why);
static void settle(struct decode *d, struct stream *st);

enum err decode_create(const struct decode_config *c, struct decode **ret)
{
    struct decode *d = calloc(1, sizeof(*d));
    if (!d)
        return err_set(ERR_NOMEM, "no memory for the decode loop");
    d->config = *c;
    d->model = engine_model(c->engine);
    d->worker = c->worker;
    d->pool = c->pool;
    d->max_streams = (uint32_t)c->config->running_max_req_size;
    d->mtp_step = config_mtp_max(c->config);
    d->choose = c->config->mtp_step == CONFIG_AUTO;
    depth_init(&d->depth, d->mtp_step);
    d->slot_used = calloc(d->max_streams, sizeof(*d->slot_used));
    d->batch = calloc(d->max_streams, sizeof(struct stream *));
    struct handoff_in_config h = {
        .worker = c->worker,
        .pool = c->pool,
        .fingerprint = c->fingerprint,
        .transports = c->transports,
        .host = c->config->kv_host,
        .on_up = on_up,
        .on_received = on_received,
        .on_down = on_down,
        .user = d,
    };
    struct speculate_config s = {
        .engine = c->engine,
        .max_streams = (int)d->max_streams,
        .max_pages = (int)((c->max_total_tokens + STREAM_MAX_WINDOW) / KV_PAGE_TOKENS + 1),
        .mtp_step = d->mtp_step,
        .eagle = !strcmp(c->config->mtp_mode, "eagle_with_att"),
        .has_mtp = c->fingerprint.n_mtp_layers > 0,
        .simulated = c->config->mtp_simulate_acceptance,
    };
    enum err err = d->slot_used && d->batch ? ERR_OK : err_set(ERR_NOMEM, "no memory for streams");
    if (err == ERR_OK)
        err = handoff_in_create(&h, &d->handoff);
    if (err == ERR_OK)
        err = speculate_create(&s, &d->speculate);
    if (err == ERR_OK)
        err = constraints_create(c->config->model_dir, d->model->vocab, d->model->eos,
                                 d->model->n_eos, &d->constraints);
    if (err != ERR_OK) {
        decode_destroy(d);
        return err;
    }
    *ret = d;
    return ERR_OK;
}

/* ---- life of a stream ---- */

static uint32_t *state_count(struct decode *d, enum stream_state state)
{
    switch (state) {
    case STREAM_WAITING:
        return &d->n_waiting;
    case STREAM_RESERVED:
        return &d->n_reserved;
    case STREAM_ZOMBIE:
        return &d->n_zombie;
    case STREAM_RUNNING:
        break;
    }
    return &d->n_running;
}

static void set_state(struct decode *d, struct stream *st, enum stream_state state)
{
    (*state_count(d, st->state))--;
    st->state = state;
    (*state_count(d, state))++;
}

static struct stream *stream_find(struct decode *d, uint64_t req_id, uint32_t attempt)
{
    for (struct stream *st = d->streams; st; st = st->next)
        if (st->req_id == req_id && st->attempt == attempt)
            return st;
    return NULL;
}

static void stream_end(struct decode *d, struct stream *gone)
{
    for (struct stream **at = &d->streams; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            break;
        }
    (*state_count(d, gone->state))--;
    for (uint32_t i = 0; i < gone->n_pages; i++)
        kv_pool_unref(d->pool, gone->pages[i]);
    if (gone->slot >= 0)
        d->slot_used[gone->slot] = false;
    free(gone->pages);
    seen_finish(&gone->seen);
    free(gone->bias_id);
    constraint_destroy(gone->constraint);
    free(gone);
}

static void send_failed(struct decode *d, uint64_t req_id, uint32_t attempt, enum err code,
                        const char *text)
{
    struct wire_buf buf = {0};
    struct wire_failed *f = wire_begin(&buf, WIRE_FAILED, req_id, attempt);
    if (f) {
        f->code = code;
        snprintf(f->text, sizeof(f->text), "%s", text);
    }
    worker_post_router(d->worker, &buf);
}

static void stream_fail(struct decode *d, struct stream *st, enum err code, const char *text)
{
    log_debug("stream", "req=%016" PRIx64 " attempt=%u failed: %s", st->req_id, st->attempt, text);
    send_failed(d, st->req_id, st->attempt, code, text);
    stream_end(d, st);
}

/* The attempt is not wanted any more. Reserved pages stay until nothing can write them. */
static void stream_cancel(struct decode *d, struct stream *st)
{
    if (st->in_step) {
        st->cancelled = true;
    } else if (st->state == STREAM_RESERVED) {
        set_state(d, st, STREAM_ZOMBIE);
        settle(d, st);
    } else if (st->state != STREAM_ZOMBIE) {
        stream_end(d, st);
    }
}

static bool early_released(struct decode *d, uint64_t req_id, uint32_t attempt)
{
    for (uint32_t i = 0; i < N_EARLY; i++)
        if (d->early[i].used && d->early[i].req_id == req_id && d->early[i].attempt == attempt) {
            d->early[i].used = false;
            return true;
        }
    return false;
}

/* Counts for the penalties; ids are there iff the sampling parameters need them. */
static enum err count_ids(struct decode *d, struct stream *st, const struct wire_submit *s,
                          const int32_t *ids)
{
    TRY(seen_init(&st->seen, d->model->vocab));
    for (uint32_t i = 0; i < s->n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= d->model->n_token_ids)
            return err_set(ERR_INVALID, "token id %d at %u is outside [0, %d)", ids[i], i,
                           d->model->n_token_ids);
        if (i < s->n_prompt)
            seen_prompt(&st->seen, ids[i]);
        else
            seen_output(&st->seen, ids[i]);
    }
    return ERR_OK;
}

static enum err keep_bias(struct decode *d, struct stream *st, const struct wire_submit *s,
                          const int32_t *ids)
{
    size_t n_bytes = s->n_bias * (sizeof(int32_t) + sizeof(float));
    for (uint32_t i = 0; i < s->n_bias; i++)
        if (ids[i] >= d->model->n_token_ids)
            return err_set(ERR_INVALID, "biased token id %d is outside [0, %d)", ids[i],
                           d->model->n_token_ids);
    st->bias_id = malloc(n_bytes);
    if (!st->bias_id)
        return err_set(ERR_NOMEM, "no memory for a bias");
    memcpy(st->bias_id, ids, n_bytes);
    st->n_bias = s->n_bias;
    return ERR_OK;
}

/* The grammar, moved on by the output of earlier attempts. */
static enum err keep_grammar(struct decode *d, struct stream *st, const struct wire_submit *s,
                             const int32_t *ids)
{
    if (s->n_ids != st->n_input)
        return err_set(ERR_PROTO, "SUBMIT lacks ids for a grammar");
    const char *text = (const char *)(ids + s->n_ids + 2 * (size_t)s->n_bias);
    return constraint_create(d->constraints, text, s->n_grammar, ids + s->n_prompt, s->n_emitted,
                             &st->constraint);
}

static void on_submit(struct decode *d, const struct wire_msg *m)
{
    const struct wire_submit *s = m->body;
    uint64_t req_id = m->head.req_id;
    uint32_t attempt = m->head.attempt;
    if (early_released(d, req_id, attempt))
        return; // the prefill worker is already done with it
    for (struct stream *old = d->streams, *next; old; old = next) {
        next = old->next;
        if (old->req_id != req_id)
            continue;
        if (old->attempt >= attempt) {
            d->beat.n_stale++;
            return;
        }
        stream_cancel(d, old);
    }

    uint32_t n_input = s->n_prompt + s->n_emitted;
    uint32_t pool_tokens = kv_pool_counts(d->pool).total * KV_PAGE_TOKENS;
    uint32_t left =
        s->sampling.max_tokens > s->n_emitted ? s->sampling.max_tokens - s->n_emitted : 0;
    char why[160];
    struct stream *st = calloc(1, sizeof(*st));
    if (!st) {
        send_failed(d, req_id, attempt, ERR_NOMEM, "no memory for a stream");
        return;
    }
    st->state = STREAM_WAITING;
    st->req_id = req_id;
    st->attempt = attempt;
    st->instance = s->peer_instance;
    st->arrival_us = clock_now_us();
    st->sampling = s->sampling;
    st->n_input = n_input;
    st->n_output = s->n_emitted;
    st->slot = -1;
    struct stream **at = &d->streams;
    while (*at)
        at = &(*at)->next;
    *at = st;
    d->n_waiting++;

    uint64_t longest = (uint64_t)n_input + left;
    if (n_input == 0 || left < 2 || longest > d->config.max_total_tokens || longest > pool_tokens) {
        snprintf(why, sizeof(why), "%u input and %u output tokens do not fit (limit %u, pool %u)",
                 n_input, left, d->config.max_total_tokens, pool_tokens);
        stream_fail(d, st, ERR_TOO_LONG, why);
        return;
    }
    enum err err = ERR_OK;
    if (stream_penalised(&s->sampling))
        err = s->n_ids == n_input ? count_ids(d, st, s, m->tail)
                                  : err_set(ERR_PROTO, "SUBMIT lacks ids for penalties");
    if (err == ERR_OK && s->n_bias > 0)
        err = keep_bias(d, st, s, (const int32_t *)m->tail + s->n_ids);
    if (err == ERR_OK && s->n_grammar > 0)
        err = keep_grammar(d, st, s, m->tail);
    if (err != ERR_OK)
        stream_fail(d, st, err, err_text(err));
}

/* Pages for waiting attempts, first come first served among those whose prefill worker has joined.
 */
static void grant(struct decode *d)
{
    for (struct stream *st = d->streams; st; st = st->next) {
        if (st->state != STREAM_WAITING || !handoff_in_up(d->handoff, st->instance))
            continue;
        if (d->n_running + d->n_reserved + d->n_zombie >= d->max_streams)
            return;
        uint32_t n = (st->n_input + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        // Room for every stream to grow by a page, so that admission is not undone by preemption.
        uint32_t headroom = d->n_running + d->n_reserved ? d->n_running + d->n_reserved + 1 : 0;
        if (kv_pool_counts(d->pool).free < n + headroom)
            return;
        st->pages_cap =
            (st->n_input + st->sampling.max_tokens + STREAM_MAX_WINDOW) / KV_PAGE_TOKENS + 1;
        st->pages = calloc(st->pages_cap, sizeof(st->pages[0]));
        if (!st->pages || kv_pool_alloc(d->pool, n, st->pages) != ERR_OK) {
            free(st->pages);
            st->pages = NULL;
            return;
        }
        st->n_pages = n;
        for (st->slot = 0; d->slot_used[st->slot]; st->slot++)
            ;
        d->slot_used[st->slot] = true;
        set_state(d, st, STREAM_RESERVED);
        d->beat.n_grants++;
        d->beat.grant_wait_us += clock_now_us() - st->arrival_us;
        struct wire_buf buf = {0};
        struct wire_grant *g = wire_begin(&buf, WIRE_GRANT, st->req_id, st->attempt);
        if (g)
            g->n_pages = n;
        wire_put(&buf, st->pages, n * sizeof(st->pages[0]));
        handoff_in_post(d->handoff, st->instance, &buf);
    }
}

/* A reserved or cancelled stream that has everything moves on. */
static void settle(struct decode *d, struct stream *st)
{
    bool quiet = st->n_transfers_done == st->n_transfers;
    if (st->state == STREAM_ZOMBIE || st->released) {
        if ((st->ready || st->released) && quiet)
            stream_end(d, st);
        return;
    }
    if (!st->ready || !quiet)
        return;
    if (st->n_transfers != st->want_transfers) {
        stream_fail(d, st, ERR_PROTO, "READY names another number of transfers");
        return;
    }
    if (st->checksum) {
        uint64_t sum = 0;
        enum err err = kv_pool_checksum(d->pool, st->pages, st->n_pages, 0, &sum);
        if (err != ERR_OK) {
            stream_fail(d, st, err, err_text(err));
            return;
        }
        if ((sum ? sum : 1) != st->checksum) {
            log_error("kv", "req=%016" PRIx64 " pages arrived damaged", st->req_id);
            stream_fail(d, st, ERR_CHECKSUM, "KV pages arrived damaged");
            return;
        }
    }
    enum err err = st->constraint ? constraint_advance(st->constraint, st->token) : ERR_OK;
    if (err != ERR_OK) {
        stream_fail(d, st, err, err_text(err));
        return;
    }
    for (uint32_t i = 0; i < st->n_pages; i++)
        kv_pool_set_live(d->pool, st->pages[i]);
    set_state(d, st, STREAM_RUNNING);
    st->n_ctx = st->n_input;
    st->n_output++;
    st->first_unsent = true;
    if (st->seen.list)
        seen_output(&st->seen, st->token);
}

/* ---- mail ---- */

static void on_up(void *user, uint64_t instance)
{
    (void)user;
    (void)instance; // pages are granted after every mail
}

static void on_received(void *user, uint64_t req_id, uint32_t attempt)
{
    struct decode *d = user;
    struct stream *st = stream_find(d, req_id, attempt);
    if (st) {
        st->n_transfers_done++;
        settle(d, st);
    }
}

static void on_down(void *user, uint64_t instance, const char *why)
{
    (void)why;
    struct decode *d = user;
    for (struct stream *st = d->streams, *next; st; st = next) {
        next = st->next;
        if (st->instance != instance || st->state == STREAM_RUNNING)
            continue;
        if (st->state == STREAM_ZOMBIE)
            stream_end(d, st);
        else
            stream_fail(d, st, ERR_PEER_LOST, "the prefill worker is gone");
    }
}

static void on_pages(struct decode *d, uint64_t instance, const struct wire_msg *m)
{
    const struct wire_pages *p = m->body;
    const uint32_t *pages = m->tail;
    struct stream *st = stream_find(d, m->head.req_id, m->head.attempt);
    const char *why = NULL;
    if (!st || st->instance != instance || st->ready || st->released ||
        (st->state != STREAM_RESERVED && st->state != STREAM_ZOMBIE)) {
        why = "PAGES for an attempt without a grant";
    } else {
        for (uint32_t i = 0; i < p->n_pages && !why; i++) {
            bool own = false;
            for (uint32_t j = 0; j < st->n_pages && !own; j++)
                own = st->pages[j] == pages[i];
            if (!own)
                why = "PAGES names a page that was not granted";
        }
    }
    if (!why) {
        st->n_transfers++;
        if (handoff_in_expect(d->handoff, instance, st->req_id, st->attempt, p->transfer_seq, pages,
                              p->n_pages) != ERR_OK)
            why = "transfer could not be posted";
    }
    if (why) {
        log_error("handoff", "req=%016" PRIx64 " %s", m->head.req_id, why);
        handoff_in_break(d->handoff, instance, why);
    }
}

static void on_ready(struct decode *d, uint64_t instance, const struct wire_msg *m)
{
    const struct wire_ready *r = m->body;
    struct stream *st = stream_find(d, m->head.req_id, m->head.attempt);
    if (!st || st->instance != instance || st->ready ||
        (st->state != STREAM_RESERVED && st->state != STREAM_ZOMBIE)) {
        d->beat.n_stale++;
        return;
    }
    st->ready = true;
    st->want_transfers = r->n_transfers;
    st->checksum = !strcmp(d->config.config->kv_checksum, "on") ? r->checksum : 0;
    uint32_t want_hidden = d->config.fingerprint.n_mtp_layers ? (uint32_t)d->model->hidden : 0;
    if (st->state == STREAM_RESERVED &&
        (r->n_pages != st->n_pages || r->n_hidden != want_hidden || r->token < 0 ||
         r->token >= d->model->n_token_ids || r->n_logprobs != st->sampling.n_logprobs)) {
        log_error("handoff", "req=%016" PRIx64 " READY does not fit the reservation", st->req_id);
        handoff_in_break(d->handoff, instance, "READY does not fit the reservation");
        return;
    }
    st->token = r->token;
    const float *tail = m->tail;
    if (want_hidden && st->state == STREAM_RESERVED) {
        if (engine_import_hidden(d->config.engine, st->slot, tail) != ERR_OK) {
            stream_cancel(d, st);
            return;
        }
        st->n_pending = 1;
        st->pending_token[0] = st->token;
        st->pending_hidden[0] = (struct hidden_ref){HIDDEN_IMPORT, st->slot};
        tail += want_hidden;
    }
    if (st->sampling.n_logprobs >= 0) {
        st->first_logprob = *tail++;
        memcpy(st->first_top, tail, (size_t)st->sampling.n_logprobs * sizeof(st->first_top[0]));
    }
    settle(d, st);
}

static void on_release(struct decode *d, uint64_t instance, const struct wire_msg *m)
{
    struct stream *st = stream_find(d, m->head.req_id, m->head.attempt);
    if (!st) { // perhaps its SUBMIT is still under way
        d->early[d->early_at++ % N_EARLY] =
            (struct early_release){m->head.req_id, m->head.attempt, true};
        return;
    }
    if (st->instance != instance || st->state == STREAM_RUNNING)
        return;
    if (st->state == STREAM_WAITING) {
        stream_end(d, st);
        return;
    }
    st->released = true;
    settle(d, st);
}

static void drop_all(struct decode *d, const char *why)
{
    handoff_in_reset(d->handoff, why); // nothing writes into the pool any more
    while (d->streams)
        stream_end(d, d->streams);
    memset(d->early, 0, sizeof(d->early));
}

static json_t *accounting(struct decode *d)
{
    kv_pool_check(d->pool);
    struct kv_counts c = kv_pool_counts(d->pool);
    uint32_t slots = 0;
    for (uint32_t i = 0; i < d->max_streams; i++)
        slots += d->slot_used[i];
    return json_pack("{s:s, s:{s:i,s:i,s:i,s:i,s:i,s:i}, s:{s:i,s:i,s:i,s:i}, s:i}", "role",
                     "decode", "pages", "total", c.total, "free", c.free, "reserved", c.reserved,
                     "in_flight", c.in_flight, "live", c.live, "cached", c.cached, "requests",
                     "waiting", d->n_waiting, "reserved", d->n_reserved, "zombie", d->n_zombie,
                     "running", d->n_running, "slots", slots);
}

static void on_mail(struct decode *d, const struct mail *m)
{
    if (handoff_in_mail(d->handoff, m))
        return;
    switch (m->type) {
    case MAIL_ROUTER:
        if (m->msg.head.type == WIRE_SUBMIT) {
            on_submit(d, &m->msg);
        } else if (m->msg.head.type == WIRE_CANCEL) {
            struct stream *st = stream_find(d, m->msg.head.req_id, m->msg.head.attempt);
            if (st)
                stream_cancel(d, st);
        }
        break;
    case MAIL_PEER: {
        uint64_t instance = handoff_in_instance(d->handoff, m->peer);
        if (!instance)
            break;
        if (m->msg.head.type == WIRE_PAGES)
            on_pages(d, instance, &m->msg);
        else if (m->msg.head.type == WIRE_READY)
            on_ready(d, instance, &m->msg);
        else if (m->msg.head.type == WIRE_RELEASE)
            on_release(d, instance, &m->msg);
        break;
    }
    case MAIL_EPOCH:
        drop_all(d, "the router is gone or new");
        break;
    case MAIL_DRAIN:
        d->draining = true;
        break;
    case MAIL_ADMIN:
        worker_admin_answer(d->worker, accounting(d));
        break;
    case MAIL_STOP:
        d->stop = true;
        break;
    default:
        break;
    }
}

/* ---- the step ---- */

static struct stream *youngest_running(struct decode *d)
{
    struct stream *found = NULL;
    for (struct stream *st = d->streams; st; st = st->next)
        if (st->state == STREAM_RUNNING)
            found = st;
    return found;
}

static void preempt(struct decode *d, struct stream *st)
{
    log_debug("kv", "req=%016" PRIx64 " preempted, pages=%u", st->req_id, st->n_pages);
    d->beat.n_preemptions++;
    stream_fail(d, st, ERR_PREEMPTED, "preempted for pages");
}

/* Chooses this step's window and takes the pages for it, preempting the youngest where it must. */
static void make_room(struct decode *d)
{
    if (d->n_running > 0 && failpoint_pass("decode.preempt") == FAILPOINT_ERROR)
        preempt(d, youngest_running(d));
    if (d->choose && d->n_running > 0)
        d->mtp_step = depth_choose(&d->depth, d->n_running);
    for (struct stream *st = d->streams, *next; st; st = next) {
        next = st->next;
        if (st->state != STREAM_RUNNING)
            continue;
        uint32_t left = st->sampling.max_tokens - st->n_output; // at least 1
        st->n_draft = MIN(d->mtp_step, left - 1);
        uint32_t slots = st->n_ctx + st->n_draft + 1;
        while (st->n_pages * KV_PAGE_TOKENS < slots) {
            uint32_t page;
            if (kv_pool_alloc(d->pool, 1, &page) == ERR_OK) {
                kv_pool_set_live(d->pool, page);
                assert(st->n_pages < st->pages_cap);
                st->pages[st->n_pages++] = page;
                continue;
            }
            struct stream *victim = youngest_running(d);
            bool self = victim == st;
            if (victim == next)
                next = victim->next;
            preempt(d, victim);
            if (self)
                break;
        }
    }
}

static void put_token(struct wire_buf *buf, const struct stream *st, float logprob,
                      const struct wire_top *top)
{
    if (st->sampling.n_logprobs < 0)
        return;
    wire_put(buf, &logprob, sizeof(logprob));
    wire_put(buf, top, (size_t)st->sampling.n_logprobs * sizeof(top[0]));
}

/* Appends a stream's record: n tokens of its window, the prefill worker's token before them if this
 * is the first record. */
static void put_record(struct wire_buf *buf, struct stream *st, uint32_t n, enum wire_finish finish)
{
    uint32_t n_first = st->first_unsent;
    struct wire_stream head = {
        .req_id = st->req_id,
        .attempt = st->attempt,
        .first_pos = st->n_output - n_first,
        .n_tokens = (uint16_t)(n + n_first),
        .finish = (uint16_t)finish,
        .n_logprobs = st->sampling.n_logprobs,
    };
    wire_put(buf, &head, sizeof(head));
    if (n_first)
        wire_put(buf, &st->token, sizeof(st->token));
    wire_put(buf, st->sampled, n * sizeof(st->sampled[0]));
    if (n_first)
        put_token(buf, st, st->first_logprob, st->first_top);
    for (uint32_t j = 0; j < n; j++)
        put_token(buf, st, st->logprob[j], st->top[j]);
    st->first_unsent = false;
}

static void count_drafts(struct decode *d, const struct stream *st)
{
    if (st->n_draft == 0)
        return;
    d->beat.n_drafts++;
    d->beat.n_draft_tokens += st->n_draft;
    uint32_t n = 0;
    for (; n < st->n_draft && st->sampled[n] == st->draft[n]; n++)
        d->beat.accepted_at[n]++;
    d->beat.n_accepted_tokens += n;
    depth_accepted(&d->depth, st->n_draft, n);
}

static void fail_grammar(struct decode *d, struct stream *st)
{
    log_warn("grammar", "req=%016" PRIx64 " output=%u code=%s the grammar was given up", st->req_id,
             st->n_output, err_name(st->constraint_err));
    stream_fail(d, st, st->constraint_err,
                "the output could not be held to its grammar any longer");
}

/* The step is over: what was put off for its sake is done, and streams whose grammar went wrong
 * leave. Returns how many are left in the batch. */
static int sift_batch(struct decode *d, int n)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        struct stream *st = d->batch[i];
        st->in_step = false;
        if (st->cancelled)
            stream_end(d, st);
        else if (st->constraint_err != ERR_OK)
            fail_grammar(d, st);
        else
            d->batch[kept++] = st;
    }
    return kept;
}

/* One step over the running streams. Returns false if there are none. */
static bool step(struct decode *d)
{
    make_room(d);
    int n = 0;
    for (struct stream *st = d->streams; st; st = st->next)
        if (st->state == STREAM_RUNNING) {
            st->in_step = true;
            d->batch[n++] = st;
        }
    if (n == 0) {
        d->step_end_us = 0;
        return false;
    }

    worker_progress(d->worker, true); // from here until the turn ends a standstill is a hang
    uint64_t start_us = clock_now_us();
    uint32_t n_seqs = (uint32_t)n;
    constraints_trim(d->constraints);
    d->beat.gap_us += d->step_end_us ? start_us - d->step_end_us : 0;
    d->step_end_us = 0;
    enum err err = failpoint_pass("decode.step") == FAILPOINT_ERROR
                       ? err_set(ERR_INTERNAL, "failpoint decode.step")
                       : speculate_step(d->speculate, d->batch, n);
    if (err != ERR_OK) {
        log_error("engine", "decode step failed: %s", err_text(err));
        if (err == ERR_CUDA) { // nothing works on the device any more: others take the streams
            worker_quit(d->worker, 1, err_text(err));
            return false;
        }
        n = sift_batch(d, n);
        for (int i = 0; i < n; i++)
            stream_fail(d, d->batch[i], err, err_meaning(err));
        return true;
    }
    n = sift_batch(d, n);
    struct wire_buf buf = {0};
    struct wire_tokens *t = wire_begin(&buf, WIRE_TOKENS, 0, 0);
    if (t)
        t->n_streams = (uint32_t)n;
    for (int i = 0; i < n; i++) {
        struct stream *st = d->batch[i];
        enum wire_finish finish;
        uint32_t n_tokens = accept_window(&st->sampling, d->model, st->n_output, st->sampled,
                                          st->draft, st->n_draft, &finish);
        count_drafts(d, st);
        d->beat.generated_tokens += n_tokens;
        put_record(&buf, st, n_tokens, finish);
        speculate_advance(d->speculate, st, n_tokens);
        if (finish != WIRE_RUNNING)
            stream_end(d, st);
    }
    if (failpoint_pass("decode.emit") == FAILPOINT_DROP)
        wire_buf_finish(&buf);
    else
        worker_post_router(d->worker, &buf);
    for (struct stream *st = d->streams, *next; st; st = next) {
        next = st->next;
        if (st->constraint_err != ERR_OK)
            fail_grammar(d, st);
    }
    d->beat.n_steps++;
    d->step_end_us = clock_now_us();
    uint32_t took_us = (uint32_t)(d->step_end_us - start_us);
    depth_took(&d->depth, n_seqs, d->mtp_step, took_us);
    d->beat.mtp_step = d->mtp_step;
    d->beat.step_total_us += took_us;
    d->beat.step_us = d->beat.step_us ? (d->beat.step_us * 7 + took_us) / 8 : took_us;
    return true;
}

/* While the device computes. One mail at a time, so that the end of the pass is noticed. */
static void attend(void *decode, uint64_t wait_us)
{
    struct decode *d = decode;
    struct mail *m = worker_mail_meanwhile(d->worker, wait_us);
    if (!m)
        return;
    on_mail(d, m);
    free(m);
    grant(d);
}

static void update_beat(struct decode *d)
{
    struct kv_counts c = kv_pool_counts(d->pool);
    struct wire_beat *b = &d->beat;
    b->draining = d->draining;
    b->free_pages = c.free;
    b->reserved_pages = c.reserved;
    b->in_flight_pages = c.in_flight;
    b->live_pages = c.live;
    b->cached_pages = c.cached;
    b->n_running = d->n_running;
    b->n_waiting = d->n_waiting + d->n_reserved;
    struct handoff_in_stats s = handoff_in_stats(d->handoff);
    b->handoff_bytes = s.bytes;
    b->n_handoffs = s.n_transfers;
    b->n_handoff_failures = s.n_failures;
    b->handoff_us = s.us;
    worker_set_beat(d->worker, b);
}

void decode_run(void *decode)
{
    struct decode *d = decode;
    uint64_t wait_us = 0;
    engine_set_meanwhile(d->config.engine, attend, d);
    while (!d->stop) {
        struct mail *m;
        while ((m = worker_mail_next(d->worker, wait_us))) {
            wait_us = 0;
            on_mail(d, m);
            free(m);
            if (d->stop)
                break;
        }
        grant(d);
        bool busy = step(d);
        update_beat(d);
        worker_progress(d->worker, busy);
        wait_us = busy ? 0 : IDLE_WAIT_US;
    }
    drop_all(d, "this worker stops");
}

void decode_destroy(struct decode *d)
{
    if (!d)
        return;
    if (d->handoff)
        drop_all(d, "this worker stops");
    handoff_in_destroy(d->handoff);
    speculate_destroy(d->speculate);
    constraints_destroy(d->constraints);
    free(d->slot_used);
    free(d->batch);
    free(d);
}
