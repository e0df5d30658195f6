/* prefill.c: the queue of prompts and the loop that computes them in chunks.
 *
 *   QUEUED -pages found-> COMPUTING -last chunk-> HANDOFF -all pages sent-> gone
 *      |                      |                      |
 *      +------- CANCEL, peer down, shutdown: end(), RELEASE unless READY went out
 *
 * Each turn of the loop reads the mail, starts what fits the pool, packs one chunk out of several
 * prompts (packing.h), computes it, and pushes the pages it completed while the next one computes.
 * Mail that comes while a chunk computes is dealt with then (attend): whoever was waiting for a
 * grant or a peer is pushed at once.
 *
 * 1. The first token leaves for the router before the MTP layer runs: TTFT does not wait for it.
 * 2. For every SUBMIT that names a decode worker, exactly one of READY and RELEASE goes to it (as
 *    long as the link lives): the decode side frees pages only on one of them.
 * 3. GRANT and SUBMIT travel on different links: a grant may come first and is kept for a while.
 * 4. A prompt of the chunk that computes (in_chunk) is not ended before that chunk: cancelled and
 *    failed are looked at afterwards.
 * 5. Pages are immutable once their rows are computed, so checksums and transfers need no copy.
 */
#include "prefill_worker/prefill.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "common/engine/seen.h"
#include "common/grammar/constraint.h"
#include "prefill_worker/handoff_out.h"
#include "prefill_worker/packing.h"
#include "prefill_worker/prefix_cache.h"

#define EARLY_GRANT_US 10000000u
#define MAX_EARLY      4096u
#define IDLE_WAIT_US   100000u

enum prompt_state { PROMPT_QUEUED, PROMPT_COMPUTING, PROMPT_HANDOFF };

struct prompt {
    struct prompt *next; // in order of arrival
    enum prompt_state state;
    uint64_t id; // owner of transfers
    uint64_t req_id;
    uint32_t attempt;
    uint64_t peer; // decode worker's instance; 0: no handoff
    uint64_t cache_salt;
    struct wire_sampling sampling;
    uint32_t n_prompt, n_emitted, n_ids;
    uint32_t n_done, n_cached;
    uint32_t n_pages;  // of the whole input
    uint32_t n_pushed; // pages announced
    uint32_t n_sent;   // pages whose transfer ended
    uint32_t n_transfers;
    uint32_t n_grant; // 0: none yet
    bool ready_sent;  // READY went out: RELEASE must not follow
    bool in_chunk;    // the chunk that computes has rows of it
    bool cancelled;   // nobody wants it any more: swept without a word
    bool failed;      // swept after mail and chunks
    enum err fail_code;
    uint64_t checksum;
    uint64_t arrival_us, start_us;
    uint32_t *pages; // [n_pages], NULL while queued
    uint32_t *grant; // [n_grant]
    // once the last chunk is computed
    int32_t token;
    enum wire_finish finish;
    int hidden_row; // of its last input token, in the chunk
    float *hidden;
    float logprob;
    struct wire_top top[WIRE_MAX_TOP];
    uint32_t n_bias;
    struct constraint *constraint; // what the output is held to, or NULL
    int32_t ids[];                 // [n_ids], then bias_id[n_bias] and their values
};

/* A prompt whose first token is about to be drawn. */
struct first_draw {
    struct prompt *prompt;
    int32_t banned[MODEL_MAX_EOS + WIRE_MAX_STOP_IDS];
};

struct early_grant {
    struct early_grant *next;
    uint64_t req_id, peer, expires_us;
    uint32_t attempt, n_pages;
    uint32_t pages[];
};

struct prefill {
    struct prefill_config config;
    const struct model_config *model;
    struct worker *worker;
    struct engine *engine;
    struct kv_pool *pool;
    struct prefix_cache *cache; // NULL when off
    struct handoff_out *handoff;
    struct constraints *constraints;
    struct prompt *prompts;
    uint32_t n_prompts;
    struct early_grant *early;
    uint32_t n_early;
    uint64_t next_id;
    bool stop, draining, starved; // starved: the oldest queued prompt found no pages
    bool mtp, checksum;
    uint64_t chunk_end_us; // of the chunk just before; 0: there was a pause
    struct wire_beat beat;

    // arrays of one chunk
    uint32_t chunk_tokens, max_pages;
    struct prompt **part;      // [max_prompts] prompts of the chunk
    uint32_t *part_tokens;     // [max_prompts] tokens of each
    uint32_t *left;            // [max_prompts]
    struct prompt **candidate; // [max_prompts]
    int32_t *token, *position, *seq_start, *ctx_len, *block_table, *logit_row;
    struct hidden_ref *hidden_ref;
    // arrays of one draw, [max_prompts]
    struct first_draw *draws;
    uint32_t n_draws;
    struct sample_row *rows;
    int32_t *idx, *ids, *top_id; // top_*: [max_prompts * WIRE_MAX_TOP]
    float *logprob, *top_logprob;
    struct seen seen; // of a prompt with penalties, which is drawn alone
};

static void on_sent(void *user, uint64_t owner, uint32_t n_pages, enum err err);
static void on_down(void *user, uint64_t instance, const char *why);

static void *alloc_array(size_t n, size_t size) { return calloc(n ? n : 1, size); }

enum err prefill_create(const struct prefill_config *c, struct prefill **ret)
{
    struct prefill *p = calloc(1, sizeof(*p));
    if (!p)
        return err_set(ERR_NOMEM, "no memory for the prefill loop");
    p->config = *c;
    p->worker = c->worker;
    p->engine = c->engine;
    p->pool = c->pool;
    p->model = engine_model(c->engine);
    p->mtp = c->config->mtp_step != 0;
    p->checksum = !strcmp(c->config->kv_checksum, "on");
    p->chunk_tokens = (uint32_t)c->config->chunked_prefill_size;
    p->max_pages = (c->max_total_tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    size_t rows = p->chunk_tokens, seqs = c->max_prompts;
    p->part = alloc_array(seqs, sizeof(*p->part));
    p->part_tokens = alloc_array(seqs, sizeof(*p->part_tokens));
    p->left = alloc_array(seqs, sizeof(*p->left));
    p->candidate = alloc_array(seqs, sizeof(*p->candidate));
    p->token = alloc_array(rows, sizeof(int32_t));
    p->position = alloc_array(rows, sizeof(int32_t));
    p->seq_start = alloc_array(seqs + 1, sizeof(int32_t));
    p->ctx_len = alloc_array(seqs, sizeof(int32_t));
    p->block_table = alloc_array(seqs * p->max_pages, sizeof(int32_t));
    p->logit_row = alloc_array(seqs, sizeof(int32_t));
    p->hidden_ref = alloc_array(rows, sizeof(*p->hidden_ref));
    p->draws = alloc_array(seqs, sizeof(*p->draws));
    p->rows = alloc_array(seqs, sizeof(*p->rows));
    p->idx = alloc_array(seqs, sizeof(int32_t));
    p->ids = alloc_array(seqs, sizeof(int32_t));
    p->top_id = alloc_array(seqs * WIRE_MAX_TOP, sizeof(int32_t));
    p->logprob = alloc_array(seqs, sizeof(float));
    p->top_logprob = alloc_array(seqs * WIRE_MAX_TOP, sizeof(float));
    enum err err = seen_init(&p->seen, p->model->vocab);
    if (!p->part || !p->part_tokens || !p->left || !p->candidate || !p->token || !p->position ||
        !p->seq_start || !p->ctx_len || !p->block_table || !p->logit_row || !p->hidden_ref ||
        !p->draws || !p->rows || !p->idx || !p->ids || !p->top_id || !p->logprob || !p->top_logprob)
        err = err_set(ERR_NOMEM, "no memory for a chunk of %u tokens", p->chunk_tokens);
    if (err == ERR_OK && !strcmp(c->config->prefix_cache, "on"))
        err = prefix_cache_create(c->pool, &p->cache);
    struct handoff_out_config h = {
        .worker = c->worker,
        .pool = c->pool,
        .fingerprint = c->fingerprint,
        .transports = c->transports,
        .shm_name = c->shm_name,
        .on_sent = on_sent,
        .on_down = on_down,
        .user = p,
    };
    if (err == ERR_OK)
        err = handoff_out_create(&h, &p->handoff);
    if (err == ERR_OK)
        err = constraints_create(c->config->model_dir, p->model->vocab, p->model->eos,
                                 p->model->n_eos, &p->constraints);
    if (err != ERR_OK) {
        prefill_destroy(p);
        return err;
    }
    *ret = p;
    return ERR_OK;
}

/* ---- life of a prompt ---- */

static struct prompt *prompt_find(struct prefill *p, uint64_t req_id)
{
    for (struct prompt *q = p->prompts; q; q = q->next)
        if (q->req_id == req_id && !q->cancelled)
            return q;
    return NULL;
}

static void send_release(struct prefill *p, uint64_t peer, uint64_t req_id, uint32_t attempt,
                         uint32_t n_transfers)
{
    struct wire_buf buf = {0};
    struct wire_release *r = wire_begin(&buf, WIRE_RELEASE, req_id, attempt);
    if (r)
        r->n_transfers = n_transfers;
    handoff_out_post(p->handoff, peer, &buf);
}

static void send_failed(struct prefill *p, uint64_t req_id, uint32_t attempt, enum err code,
                        const char *text)
{
    struct wire_buf buf = {0};
    struct wire_failed *f = wire_begin(&buf, WIRE_FAILED, req_id, attempt);
    if (f) {
        f->code = code;
        snprintf(f->text, sizeof(f->text), "%s", text);
    }
    worker_post_router(p->worker, &buf);
}

/* Lets go of everything. Pages in flight stay so until their transfer ends. */
static void prompt_end(struct prefill *p, struct prompt *gone)
{
    for (struct prompt **at = &p->prompts; *at; at = &(*at)->next)
        if (*at == gone) {
            *at = gone->next;
            break;
        }
    p->n_prompts--;
    if (gone->peer && !gone->ready_sent)
        send_release(p, gone->peer, gone->req_id, gone->attempt, gone->n_transfers);
    if (gone->pages)
        for (uint32_t i = 0; i < gone->n_pages; i++)
            kv_pool_unref(p->pool, gone->pages[i]);
    free(gone->pages);
    free(gone->grant);
    free(gone->hidden);
    constraint_destroy(gone->constraint);
    free(gone);
    p->starved = false;
}

/* The attempt is not wanted any more. */
static void prompt_cancel(struct prefill *p, struct prompt *q)
{
    if (q->in_chunk)
        q->cancelled = true;
    else
        prompt_end(p, q);
}

static void prompt_fail(struct prompt *q, enum err code)
{
    q->failed = true;
    q->fail_code = code;
}

/* Ends the prompts that failed, and tells the router, and those that were cancelled; but none of
 * the chunk that computes. */
static void sweep(struct prefill *p)
{
    for (struct prompt *q = p->prompts, *next; q; q = next) {
        next = q->next;
        if (q->in_chunk || (!q->failed && !q->cancelled))
            continue;
        if (!q->cancelled)
            send_failed(p, q->req_id, q->attempt, q->fail_code, err_meaning(q->fail_code));
        prompt_end(p, q);
    }
}

static void on_sent(void *user, uint64_t owner, uint32_t n_pages, enum err err)
{
    struct prefill *p = user;
    for (struct prompt *q = p->prompts; q; q = q->next)
        if (q->id == owner && err == ERR_OK)
            q->n_sent += n_pages;
    p->starved = false; // pages may have become free
}

static void on_down(void *user, uint64_t instance, const char *why)
{
    (void)why;
    struct prefill *p = user;
    for (struct prompt *q = p->prompts; q; q = q->next)
        if (q->peer == instance)
            prompt_fail(q, ERR_PEER_LOST);
    for (struct early_grant **at = &p->early; *at;) {
        struct early_grant *g = *at;
        if (g->peer == instance) {
            *at = g->next;
            p->n_early--;
            free(g);
        } else {
            at = &g->next;
        }
    }
}

static void prompt_take_grant(struct prompt *q, const uint32_t *pages, uint32_t n)
{
    q->grant = malloc(n * sizeof(pages[0]));
    if (!q->grant) {
        prompt_fail(q, ERR_NOMEM);
        return;
    }
    memcpy(q->grant, pages, n * sizeof(pages[0]));
    q->n_grant = n;
}

static void on_submit(struct prefill *p, const struct wire_msg *m)
{
    const struct wire_submit *s = m->body;
    uint64_t req_id = m->head.req_id;
    uint32_t attempt = m->head.attempt;
    uint64_t peer = s->peer_idx == UINT32_MAX ? 0 : s->peer_instance;
    struct prompt *old = prompt_find(p, req_id);
    if (old && old->attempt >= attempt) {
        p->beat.n_stale++;
        return;
    }
    if (old)
        prompt_cancel(p, old);

    const int32_t *ids = m->tail;
    enum err code = ERR_OK;
    char why[160] = "";
    uint32_t n_pages = (s->n_ids + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    if (s->n_ids == 0 || s->n_ids != s->n_prompt + s->n_emitted) {
        code = ERR_PROTO;
        snprintf(why, sizeof(why), "SUBMIT has %u ids for %u + %u tokens", s->n_ids, s->n_prompt,
                 s->n_emitted);
    } else if (s->n_ids + 1 > p->config.max_total_tokens ||
               n_pages > kv_pool_counts(p->pool).total) {
        code = ERR_TOO_LONG;
        snprintf(why, sizeof(why), "%u tokens do not fit this prefill worker (%u, pool %u)",
                 s->n_ids, p->config.max_total_tokens,
                 kv_pool_counts(p->pool).total * KV_PAGE_TOKENS);
    } else if (p->n_prompts >= p->config.config->max_prefill_queue) {
        code = ERR_BUSY;
        snprintf(why, sizeof(why), "%u prompts are waiting at this prefill worker", p->n_prompts);
    } else if (peer && !handoff_out_known(p->handoff, peer)) {
        code = ERR_PEER_LOST;
        snprintf(why, sizeof(why), "decode worker %016" PRIx64 " is unknown here", peer);
    }
    for (uint32_t i = 0; code == ERR_OK && i < s->n_ids + s->n_bias; i++)
        if (ids[i] < 0 || ids[i] >= p->model->n_token_ids) {
            code = ERR_INVALID;
            snprintf(why, sizeof(why), "token id %d at %u is outside [0, %d)", ids[i], i,
                     p->model->n_token_ids);
        }
    size_t n_bytes = (s->n_ids + 2 * (size_t)s->n_bias) * sizeof(ids[0]);
    OWNED(constraint) constraint = NULL;
    if (code == ERR_OK && s->n_grammar > 0) {
        code = constraint_create(p->constraints, (const char *)ids + n_bytes, s->n_grammar,
                                 ids + s->n_prompt, s->n_emitted, &constraint);
        snprintf(why, sizeof(why), "%s", err_text(code));
    }
    struct prompt *q = code == ERR_OK ? calloc(1, sizeof(*q) + n_bytes) : NULL;
    if (!q) {
        if (peer)
            send_release(p, peer, req_id, attempt, 0);
        send_failed(p, req_id, attempt, code == ERR_OK ? ERR_NOMEM : code, why);
        return;
    }
    q->id = ++p->next_id;
    q->req_id = req_id;
    q->attempt = attempt;
    q->peer = peer;
    q->cache_salt = s->cache_salt;
    q->sampling = s->sampling;
    q->n_prompt = s->n_prompt;
    q->n_emitted = s->n_emitted;
    q->n_ids = s->n_ids;
    q->n_bias = s->n_bias;
    q->constraint = take(&constraint);
    q->n_pages = n_pages;
    q->arrival_us = clock_now_us();
    memcpy(q->ids, ids, n_bytes);
    struct prompt **at = &p->prompts;
    while (*at)
        at = &(*at)->next;
    *at = q;
    p->n_prompts++;
    log_debug("queue", "req=%016" PRIx64 " attempt=%u tokens=%u queued", req_id, attempt, q->n_ids);

    for (struct early_grant **e = &p->early; *e; e = &(*e)->next) {
        struct early_grant *g = *e;
        if (g->req_id != req_id || g->attempt != attempt || g->peer != peer)
            continue;
        prompt_take_grant(q, g->pages, g->n_pages);
        *e = g->next;
        p->n_early--;
        free(g);
        break;
    }
}

static void on_grant(struct prefill *p, uint64_t peer, const struct wire_msg *m)
{
    const struct wire_grant *g = m->body;
    const uint32_t *pages = m->tail;
    struct prompt *q = prompt_find(p, m->head.req_id);
    if (q && q->attempt == m->head.attempt && q->peer == peer) {
        if (!q->n_grant)
            prompt_take_grant(q, pages, g->n_pages);
        return;
    }
    if (p->n_early >= MAX_EARLY) {
        send_release(p, peer, m->head.req_id, m->head.attempt, 0);
        return;
    }
    struct early_grant *e = malloc(sizeof(*e) + g->n_pages * sizeof(e->pages[0]));
    if (!e) {
        send_release(p, peer, m->head.req_id, m->head.attempt, 0);
        return;
    }
    *e = (struct early_grant){.req_id = m->head.req_id,
                              .attempt = m->head.attempt,
                              .peer = peer,
                              .n_pages = g->n_pages,
                              .expires_us = clock_now_us() + EARLY_GRANT_US};
    memcpy(e->pages, pages, g->n_pages * sizeof(e->pages[0]));
    struct early_grant **at = &p->early;
    while (*at)
        at = &(*at)->next;
    *at = e;
    p->n_early++;
}

/* ---- computing ---- */

/* Gives queued prompts their pages, in order, as long as they fit. */
static void start_prompts(struct prefill *p)
{
    if (p->starved)
        return;
    uint32_t n_computing = 0;
    for (struct prompt *q = p->prompts; q; q = q->next)
        n_computing += q->state == PROMPT_COMPUTING;
    for (struct prompt *q = p->prompts; q && n_computing < p->config.max_prompts; q = q->next) {
        if (q->state != PROMPT_QUEUED || q->failed)
            continue;
        failpoint_pass("prefill.dequeue");
        uint32_t *pages = malloc(q->n_pages * sizeof(pages[0]));
        if (!pages) {
            prompt_fail(q, ERR_NOMEM);
            continue;
        }
        uint32_t n_hit = 0;
        if (p->cache)
            n_hit = prefix_cache_lookup(p->cache, q->cache_salt, q->ids, q->n_ids, pages);
        uint32_t n_new = q->n_pages - n_hit;
        if (kv_pool_counts(p->pool).free < n_new && p->cache)
            prefix_cache_evict(p->cache, n_new - kv_pool_counts(p->pool).free);
        if (kv_pool_alloc(p->pool, n_new, pages + n_hit) != ERR_OK) {
            for (uint32_t i = 0; i < n_hit; i++)
                kv_pool_unref(p->pool, pages[i]);
            free(pages);
            p->starved = true; // until something is released
            return;
        }
        for (uint32_t i = n_hit; i < q->n_pages; i++)
            kv_pool_set_live(p->pool, pages[i]);
        q->pages = pages;
        q->n_done = n_hit * KV_PAGE_TOKENS;
        q->n_cached = MIN(q->n_done, q->n_prompt);
        q->start_us = clock_now_us();
        q->state = PROMPT_COMPUTING;
        p->beat.prefix_queried_tokens += q->n_ids;
        p->beat.prefix_hit_tokens += q->n_done;
        n_computing++;
    }
}

/* Announces the pages that are complete and granted; READY after the last. */
static void push(struct prefill *p, struct prompt *q)
{
    if (!q->peer || q->failed || q->cancelled || q->ready_sent || !q->n_grant ||
        !handoff_out_up(p->handoff, q->peer))
        return;
    if (q->n_grant != q->n_pages) {
        log_error("handoff", "req=%016" PRIx64 " grant of %u pages, want %u", q->req_id, q->n_grant,
                  q->n_pages);
        prompt_fail(q, ERR_PROTO);
        return;
    }
    // Between chunks the MTP slot of the last computed row is there too: its token is in the
    // prompt.
    bool computed = q->state == PROMPT_HANDOFF;
    uint32_t n_complete = computed ? q->n_pages : q->n_done / KV_PAGE_TOKENS;
    while (q->n_pushed < n_complete) {
        uint32_t n = MIN(n_complete - q->n_pushed, WIRE_MAX_PAGES);
        if (p->checksum && kv_pool_checksum(p->pool, q->pages + q->n_pushed, n, q->n_pushed,
                                            &q->checksum) != ERR_OK) {
            prompt_fail(q, ERR_CUDA);
            return;
        }
        if (handoff_out_push(p->handoff, q->peer, q->req_id, q->attempt, q->id,
                             q->pages + q->n_pushed, q->grant + q->n_pushed, n) != ERR_OK) {
            prompt_fail(q, ERR_PEER_LOST);
            return;
        }
        q->n_pushed += n;
        q->n_transfers++;
    }
    if (!computed || failpoint_pass("prefill.ready") != FAILPOINT_NONE)
        return;
    struct wire_buf buf = {0};
    struct wire_ready *r = wire_begin(&buf, WIRE_READY, q->req_id, q->attempt);
    if (r)
        *r = (struct wire_ready){
            .checksum = p->checksum ? (q->checksum ? q->checksum : 1) : 0,
            .n_pages = q->n_pages,
            .n_hidden = p->mtp ? (uint32_t)p->model->hidden : 0,
            .token = q->token,
            .n_logprobs = q->sampling.n_logprobs,
            .n_transfers = q->n_transfers,
            .n_cached = q->n_cached,
        };
    if (p->mtp)
        wire_put(&buf, q->hidden, (size_t)p->model->hidden * sizeof(float));
    if (q->sampling.n_logprobs >= 0) {
        wire_put(&buf, &q->logprob, sizeof(float));
        wire_put(&buf, q->top, (size_t)q->sampling.n_logprobs * sizeof(q->top[0]));
    }
    handoff_out_post(p->handoff, q->peer, &buf);
    q->ready_sent = true;
}

static bool is_penalised(const struct wire_sampling *s)
{
    return s->presence_penalty != 0 || s->frequency_penalty != 0 || s->repetition_penalty != 1;
}

static void send_first_token(struct prefill *p, struct prompt *q)
{
    uint64_t now_us = clock_now_us();
    struct wire_buf buf = {0};
    struct wire_tokens *t = wire_begin(&buf, WIRE_TOKENS, 0, 0);
    if (t)
        t->n_streams = 1;
    struct wire_stream s = {
        .req_id = q->req_id,
        .attempt = q->attempt,
        .first_pos = q->n_emitted,
        .n_tokens = 1,
        .finish = (uint16_t)q->finish,
        .n_logprobs = q->sampling.n_logprobs,
        .n_cached = q->n_cached,
        .prefill_us = (uint32_t)(now_us - q->start_us),
        .queue_us = (uint32_t)(q->start_us - q->arrival_us),
    };
    wire_put(&buf, &s, sizeof(s));
    wire_put(&buf, &q->token, sizeof(q->token));
    if (s.n_logprobs >= 0) {
        wire_put(&buf, &q->logprob, sizeof(float));
        wire_put(&buf, q->top, (size_t)s.n_logprobs * sizeof(q->top[0]));
    }
    worker_post_router(p->worker, &buf);
    p->beat.generated_tokens++;
}

/* How the first token of a prompt is drawn. Penalties count in p->seen, which serves one row of a
 * draw. */
static enum err first_row(struct prefill *p, struct prompt *q, struct first_draw *draw,
                          struct sample_row *ret)
{
    const struct wire_sampling *s = &q->sampling;
    int n_banned = worker_stop_ids(s, p->model, draw->banned);
    worker_sample_row(s, q->n_ids, q->n_emitted, draw->banned, n_banned, ret);
    if (is_penalised(s)) {
        seen_clear(&p->seen);
        for (uint32_t i = 0; i < q->n_ids; i++)
            (i < q->n_prompt ? seen_prompt : seen_output)(&p->seen, q->ids[i]);
        ret->seen = p->seen.list;
        ret->n_seen = p->seen.n;
    }
    ret->n_bias = (int32_t)q->n_bias;
    ret->bias_id = q->ids + q->n_ids;
    ret->bias_value = (const float *)(q->ids + q->n_ids + q->n_bias);
    enum err err = ERR_OK;
    if (q->constraint)
        err = constraint_mask(q->constraint, constraint_state(q->constraint), &ret->allowed);
    if (err != ERR_OK)
        log_warn("grammar", "req=%016" PRIx64 " code=%s the grammar was given up: %s", q->req_id,
                 err_name(err), err_text(err));
    return err;
}

/* Draws the first tokens that have been prepared, in one call, and sends them. */
static void draw_first(struct prefill *p)
{
    int n = (int)p->n_draws, max_top = 0;
    p->n_draws = 0;
    if (n == 0)
        return;
    for (int i = 0; i < n; i++)
        max_top = MAX(max_top, p->rows[i].n_logprobs);
    enum err err = engine_sample(p->engine, n, p->idx, p->rows, max_top, p->ids, p->logprob,
                                 p->top_id, p->top_logprob);
    for (int i = 0; i < n; i++) {
        struct prompt *q = p->draws[i].prompt;
        if (err != ERR_OK) {
            prompt_fail(q, err);
            continue;
        }
        q->token = p->ids[i];
        q->logprob = p->logprob[i];
        for (int t = 0; t < q->sampling.n_logprobs; t++)
            q->top[t] =
                (struct wire_top){p->top_id[i * max_top + t], p->top_logprob[i * max_top + t]};
        q->finish = worker_finish(&q->sampling, p->model, q->token, q->n_emitted + 1);
        send_first_token(p, q);
    }
}

/* Fills the batch arrays with part_tokens[i] rows of part[i]. shift: MTP rows, which carry the next
 * token and leave out a prompt's very last row (its token is not drawn yet; the decode worker makes
 * that slot). Returns the number of rows; logit rows are only listed for the main model. */
static struct batch build_batch(struct prefill *p, uint32_t n_parts, bool shift)
{
    struct batch b = {
        .token = p->token,
        .position = p->position,
        .seq_start = p->seq_start,
        .ctx_len = p->ctx_len,
        .block_table = p->block_table,
        .logit_row = p->logit_row,
    };
    for (uint32_t i = 0; i < n_parts; i++)
        b.max_pages = MAX(b.max_pages, (int)p->part[i]->n_pages);
    int main_row = 0;
    p->seq_start[0] = 0;
    for (uint32_t i = 0; i < n_parts; i++) {
        struct prompt *q = p->part[i];
        uint32_t n = p->part_tokens[i], end = q->n_done + n;
        bool last = end == q->n_ids;
        uint32_t n_rows = shift && last ? n - 1 : n;
        for (uint32_t j = 0; j < n_rows; j++) {
            p->token[b.n_rows] = q->ids[q->n_done + j + (shift ? 1 : 0)];
            p->position[b.n_rows] = (int32_t)(q->n_done + j);
            p->hidden_ref[b.n_rows] = (struct hidden_ref){HIDDEN_MAIN, main_row + (int)j};
            b.n_rows++;
        }
        main_row += (int)n;
        if (n_rows == 0)
            continue;
        memcpy(p->block_table + (size_t)b.n_seqs * (size_t)b.max_pages, q->pages,
               q->n_pages * sizeof(int32_t));
        p->ctx_len[b.n_seqs] = (int32_t)(q->n_done + n_rows);
        p->seq_start[++b.n_seqs] = b.n_rows;
        if (last && !shift)
            p->logit_row[b.n_logits++] = b.n_rows - 1;
    }
    return b;
}

/* A prompt's whole input is computed and its first token drawn. */
static void prompt_computed(struct prefill *p, struct prompt *q)
{
    if (p->cache)
        prefix_cache_insert(p->cache, q->cache_salt, q->ids, (q->n_ids - 1) / KV_PAGE_TOKENS,
                            q->pages);
    q->state = PROMPT_HANDOFF;
    if (q->finish != WIRE_RUNNING || !q->peer)
        prompt_end(p, q);
    else
        push(p, q);
}

static void fail_parts(struct prefill *p, uint32_t n_parts, enum err err)
{
    log_error("engine", "chunk failed: %s", err_text(err));
    if (err == ERR_CUDA) { // nothing works on the device any more: others take the prompts
        worker_quit(p->worker, 1, err_text(err));
        return;
    }
    for (uint32_t i = 0; i < n_parts; i++)
        prompt_fail(p->part[i], err);
}

/* First tokens of the prompts that the chunk completes. */
static void sample_parts(struct prefill *p, uint32_t n_parts)
{
    int logit = 0;
    for (uint32_t i = 0; i < n_parts; i++) {
        struct prompt *q = p->part[i];
        if (q->n_done + p->part_tokens[i] < q->n_ids)
            continue;
        int row = logit++;
        q->hidden_row = p->logit_row[row];
        if (q->failed || q->cancelled)
            continue;
        bool alone = is_penalised(&q->sampling);
        if (alone)
            draw_first(p);
        struct first_draw *draw = &p->draws[p->n_draws];
        draw->prompt = q;
        p->idx[p->n_draws] = row;
        enum err err = first_row(p, q, draw, &p->rows[p->n_draws]);
        if (err != ERR_OK)
            prompt_fail(q, err);
        else
            p->n_draws++;
        if (alone)
            draw_first(p);
    }
    draw_first(p);
}

/* What the decode worker drafts from: it is there as long as no other chunk begins. */
static void export_hidden(struct prefill *p, uint32_t n_parts)
{
    for (uint32_t i = 0; i < n_parts; i++) {
        struct prompt *q = p->part[i];
        if (q->n_done + p->part_tokens[i] < q->n_ids || !q->peer || q->finish != WIRE_RUNNING ||
            q->failed || q->cancelled)
            continue;
        q->hidden = malloc((size_t)p->model->hidden * sizeof(float));
        enum err err = q->hidden ? engine_export_hidden(p->engine, q->hidden_row, q->hidden)
                                 : err_set(ERR_NOMEM, "no memory for a hidden state");
        if (err != ERR_OK)
            prompt_fail(q, err);
    }
}

/* The chunk's passes; first tokens leave between them. */
static enum err compute_parts(struct prefill *p, uint32_t n_parts)
{
    struct batch b = build_batch(p, n_parts, false);
    TRY(engine_forward(p->engine, &b));
    sample_parts(p, n_parts);
    if (!p->mtp)
        return ERR_OK;
    b = build_batch(p, n_parts, true);
    if (b.n_rows > 0)
        TRY(engine_draft(p->engine, &b, p->hidden_ref, NULL));
    export_hidden(p, n_parts);
    return ERR_OK;
}

/* Computes one chunk. Returns false if there was nothing to compute. */
static bool compute_chunk(struct prefill *p)
{
    uint32_t n = 0;
    for (struct prompt *q = p->prompts; q && n < p->config.max_prompts; q = q->next)
        if (q->state == PROMPT_COMPUTING && !q->failed && !q->cancelled) {
            p->candidate[n] = q;
            p->left[n++] = q->n_ids - q->n_done;
        }
    uint32_t *take_tokens = p->part_tokens;
    uint32_t total =
        packing_choose(p->left, n, p->chunk_tokens, p->config.max_prompts, take_tokens);
    if (total == 0) {
        p->chunk_end_us = 0;
        return false;
    }
    uint32_t n_parts = 0;
    for (uint32_t i = 0; i < n; i++)
        if (take_tokens[i]) {
            p->candidate[i]->in_chunk = true;
            p->part[n_parts] = p->candidate[i];
            p->part_tokens[n_parts++] = take_tokens[i];
        }

    worker_progress(p->worker, true); // from here until the turn ends a standstill is a hang
    constraints_trim(p->constraints);
    failpoint_pass("prefill.chunk");
    uint64_t start_us = clock_now_us();
    p->beat.gap_us += p->chunk_end_us ? start_us - p->chunk_end_us : 0;
    p->chunk_end_us = 0;
    enum err err = compute_parts(p, n_parts);
    for (uint32_t i = 0; i < n_parts; i++)
        p->part[i]->in_chunk = false;
    if (err != ERR_OK) {
        fail_parts(p, n_parts, err);
        return err != ERR_CUDA;
    }
    p->beat.n_steps++;
    p->chunk_end_us = clock_now_us();
    uint32_t took_us = (uint32_t)(p->chunk_end_us - start_us);
    p->beat.step_total_us += took_us;
    p->beat.step_us = p->beat.step_us ? (p->beat.step_us * 7 + took_us) / 8 : took_us;
    p->beat.prompt_tokens += total;
    for (uint32_t i = 0; i < n_parts; i++) {
        struct prompt *q = p->part[i];
        q->n_done += p->part_tokens[i];
        if (q->failed || q->cancelled)
            continue;
        if (q->n_done == q->n_ids)
            prompt_computed(p, q);
        else
            push(p, q);
    }
    return true;
}

/* ---- the loop ---- */

static void drop_all(struct prefill *p, const char *why)
{
    handoff_out_reset(p->handoff, why); // fails the prompts of every peer, ends transfers
    while (p->prompts)
        prompt_end(p, p->prompts);
    for (struct early_grant *g = p->early, *next; g; g = next) {
        next = g->next;
        free(g);
    }
    p->early = NULL;
    p->n_early = 0;
}

static json_t *accounting(struct prefill *p)
{
    kv_pool_check(p->pool);
    struct kv_counts c = kv_pool_counts(p->pool);
    uint32_t n[3] = {0};
    for (struct prompt *q = p->prompts; q; q = q->next)
        n[q->state]++;
    return json_pack("{s:s, s:{s:i,s:i,s:i,s:i,s:i,s:i}, s:{s:i,s:i,s:i}, s:i}", "role", "prefill",
                     "pages", "total", c.total, "free", c.free, "reserved", c.reserved, "in_flight",
                     c.in_flight, "live", c.live, "cached", c.cached, "requests", "queued", n[0],
                     "computing", n[1], "handoff", n[2], "early_grants", p->n_early);
}

static void on_mail(struct prefill *p, const struct mail *m)
{
    if (handoff_out_mail(p->handoff, m))
        return;
    switch (m->type) {
    case MAIL_ROUTER:
        if (m->msg.head.type == WIRE_SUBMIT) {
            on_submit(p, &m->msg);
        } else if (m->msg.head.type == WIRE_CANCEL) {
            struct prompt *q = prompt_find(p, m->msg.head.req_id);
            if (q && q->attempt <= m->msg.head.attempt)
                prompt_cancel(p, q);
        }
        break;
    case MAIL_PEER:
        if (m->msg.head.type == WIRE_GRANT)
            on_grant(p, m->peer, &m->msg);
        break;
    case MAIL_EPOCH:
        drop_all(p, "the router is gone or new");
        break;
    case MAIL_DRAIN:
        p->draining = true;
        break;
    case MAIL_ADMIN:
        worker_admin_answer(p->worker, accounting(p));
        break;
    case MAIL_STOP:
        p->stop = true;
        break;
    default:
        break;
    }
}

static void expire_early(struct prefill *p, uint64_t now_us)
{
    while (p->early && p->early->expires_us <= now_us) { // in order of arrival
        struct early_grant *g = p->early;
        send_release(p, g->peer, g->req_id, g->attempt, 0);
        p->early = g->next;
        p->n_early--;
        free(g);
    }
}

static void update_beat(struct prefill *p)
{
    struct kv_counts c = kv_pool_counts(p->pool);
    struct wire_beat *b = &p->beat;
    b->draining = p->draining;
    b->free_pages = c.free;
    b->reserved_pages = c.reserved;
    b->in_flight_pages = c.in_flight;
    b->live_pages = c.live;
    b->cached_pages = c.cached;
    b->n_running = b->n_waiting = 0;
    b->waiting_tokens = 0;
    for (struct prompt *q = p->prompts; q; q = q->next) {
        b->n_running += q->state == PROMPT_COMPUTING;
        b->n_waiting += q->state == PROMPT_QUEUED;
        b->waiting_tokens += q->n_ids - q->n_done;
    }
    struct handoff_stats s = handoff_out_stats(p->handoff);
    b->handoff_bytes = s.bytes;
    b->n_handoffs = s.n_transfers;
    b->n_handoff_failures = s.n_failures;
    b->handoff_us = s.us;
    worker_set_beat(p->worker, b);
}

/* After mail: pushes what grants and peers make possible, ends prompts whose pages have arrived. */
static void hand_over(struct prefill *p)
{
    for (struct prompt *q = p->prompts, *next; q; q = next) {
        next = q->next;
        push(p, q);
        if (q->state == PROMPT_HANDOFF && q->ready_sent && q->n_sent == q->n_pages && !q->failed)
            prompt_end(p, q);
    }
    sweep(p);
}

/* While the device computes. One mail at a time, so that the end of the pass is noticed. */
static void attend(void *prefill, uint64_t wait_us)
{
    struct prefill *p = prefill;
    struct mail *m = worker_mail_meanwhile(p->worker, wait_us);
    if (!m)
        return;
    on_mail(p, m);
    free(m);
    hand_over(p);
}

void prefill_run(void *prefill)
{
    struct prefill *p = prefill;
    engine_set_meanwhile(p->engine, attend, p);
    bool busy = false;
    uint64_t wait_us = 0;
    while (!p->stop) {
        struct mail *m;
        while ((m = worker_mail_next(p->worker, wait_us))) {
            wait_us = 0;
            on_mail(p, m);
            free(m);
            if (p->stop)
                break;
        }
        uint64_t now_us = clock_now_us();
        uint64_t due_us = handoff_out_tick(p->handoff, now_us);
        expire_early(p, now_us);
        hand_over(p);
        start_prompts(p);
        busy = compute_chunk(p);
        sweep(p);
        update_beat(p);
        worker_progress(p->worker, busy);
        wait_us = busy ? 0 : due_us ? MIN(due_us, IDLE_WAIT_US) : IDLE_WAIT_US;
    }
    drop_all(p, "this worker stops");
}

void prefill_destroy(struct prefill *p)
{
    if (!p)
        return;
    if (p->handoff)
        drop_all(p, "this worker stops");
    handoff_out_destroy(p->handoff);
    prefix_cache_destroy(p->cache);
    constraints_destroy(p->constraints);
    free(p->part);
    free(p->part_tokens);
    free(p->left);
    free(p->candidate);
    free(p->token);
    free(p->position);
    free(p->seq_start);
    free(p->ctx_len);
    free(p->block_table);
    free(p->logit_row);
    free(p->hidden_ref);
    free(p->draws);
    free(p->rows);
    free(p->idx);
    free(p->ids);
    free(p->top_id);
    free(p->logprob);
    free(p->top_logprob);
    seen_finish(&p->seen);
    free(p);
}
