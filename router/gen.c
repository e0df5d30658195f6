/* gen.c: the record of one output stream: ids in and out, text, attempts, measurements.
 *
 * The scheduler says where a gen runs; here is what it is. Tokens come as records that name their
 * position in the output, from P (the first one) and D (all, that first one included), over links
 * that do not keep order between each other. Hence the one rule of gen_take: a record that starts
 * behind what is there fails the attempt, what is there already is skipped.
 *
 * Text is made by three stages that survive a move to another worker, because ids feed them:
 *   ids -> detokenizer (keeps half characters) -> stop (keeps what may become a stop string) ->
 * chunk
 */
#include "router/gen.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "common/base/warm.h"
#include "router/cluster_impl.h"
#include "router/text/detokenizer.h"
#include "router/text/stop.h"

#define PREFIX_TOKENS                                                                              \
    256u /* whole pages; prompts that share them go to the same prefill worker                     \
          */

/* What a trace needs beyond the gen's own figures. */
struct origin {
    char request_id[132], trace_id[33], parent_id[17], span_id[17];
    char prefill[WIRE_MAX_NAME], decode[WIRE_MAX_NAME];
    uint32_t choice, n_choices;
};

struct gen {
    struct cluster *cluster;
    struct gen *next; // in its bucket
    uint64_t id;
    uint32_t slot; // the scheduler's
    uint32_t n_attempts;
    struct gen_callbacks cb;
    void *user;
    bool in_callback, cancelled;

    int32_t *ids; // prompt, then output
    size_t n_ids, cap_ids;
    bool ids_complete; // false: output outgrew the budget, so this gen cannot move
    uint32_t n_prompt, n_emitted;
    struct wire_sampling sampling;
    uint32_t n_bias;
    int32_t *bias_id; // [n_bias], and their values behind them
    char *grammar;    // [n_grammar], NULL: none
    uint32_t n_grammar;
    uint64_t cache_salt;

    struct detokenizer detokenizer;
    struct stop *stop;
    char **stop_strings; // one block: pointers, then bytes
    size_t *stop_lens;
    size_t n_stop;
    bool include_stop;

    uint64_t arrival_us, queued_us, placed_us, first_us, last_us;
    uint64_t prefill_start_us, prefill_end_us, handoff_us; // of the last attempt
    uint32_t n_steps, n_decoded;                           // decode steps, and tokens from them
    struct origin *origin;                                 // NULL: not traced
    bool measured;                                         // the first attempt's P said:
    uint32_t n_cached;
    uint64_t prefill_us;
    char *why; // the last worker's own words about a failure
};

static enum err gen_check(struct cluster *c, const struct gen_params *p);
static void gen_destroy(struct gen *g);
DEFINE_OWNED(gen)
static enum err table_add(struct cluster *c, struct gen *g);
static void table_remove(struct cluster *c, struct gen *g);
static struct gen **bucket(const struct cluster *c, uint64_t id);
static struct gen *table_find(const struct cluster *c, uint64_t id);
static bool ids_reserve(struct gen *g, size_t n);
static void gen_deliver(struct gen *g, const struct wire_stream_view *v, uint32_t skip,
                        uint32_t worker, uint64_t now_us);
static void gen_trace(struct gen *g, const char *finish, const char *error);
static void gen_end(struct gen *g, enum gen_finish finish, int32_t stop_id, int which);
static void attempt_failed(struct gen *g, uint32_t from, enum err code, const char *text);

/* -- start and cancel -- */

static enum err copy_stops(struct gen *g, const struct gen_params *p)
{
    if (!p->n_stop)
        return ERR_OK;
    TRY(stop_create(p->stop, p->stop_len, p->n_stop, &g->stop));
    size_t bytes = 0;
    for (size_t i = 0; i < p->n_stop; i++)
        bytes += p->stop_len[i] + 1;
    g->stop_strings = malloc(p->n_stop * sizeof(char *) + bytes);
    g->stop_lens = calloc(p->n_stop, sizeof(*g->stop_lens));
    if (!g->stop_strings || !g->stop_lens)
        return err_set(ERR_NOMEM, "no memory for stop strings");
    char *at = (char *)(g->stop_strings + p->n_stop);
    for (size_t i = 0; i < p->n_stop; i++) {
        g->stop_strings[i] = at;
        g->stop_lens[i] = p->stop_len[i];
        memcpy(at, p->stop[i], p->stop_len[i]);
        at[p->stop_len[i]] = 0;
        at += p->stop_len[i] + 1;
    }
    g->n_stop = p->n_stop;
    return ERR_OK;
}

static enum err copy_bias(struct gen *g, const struct gen_params *p)
{
    if (!p->n_bias)
        return ERR_OK;
    g->bias_id = malloc(p->n_bias * (sizeof(int32_t) + sizeof(float)));
    if (!g->bias_id)
        return err_set(ERR_NOMEM, "no memory for a bias");
    memcpy(g->bias_id, p->bias_id, p->n_bias * sizeof(int32_t));
    memcpy(g->bias_id + p->n_bias, p->bias_value, p->n_bias * sizeof(float));
    g->n_bias = p->n_bias;
    return ERR_OK;
}

static enum err copy_grammar(struct gen *g, const struct gen_params *p)
{
    if (!p->n_grammar)
        return ERR_OK;
    g->grammar = malloc(p->n_grammar);
    if (!g->grammar)
        return err_set(ERR_NOMEM, "no memory for a grammar");
    memcpy(g->grammar, p->grammar, p->n_grammar);
    g->n_grammar = (uint32_t)p->n_grammar;
    return ERR_OK;
}

static void copy_text(char *ret, size_t n, const char *text)
{
    snprintf(ret, n, "%s", text ? text : "");
}

static enum err copy_origin(struct gen *g, const struct gen_origin *o)
{
    if (!g->cluster->trace)
        return ERR_OK;
    struct origin *to = g->origin = calloc(1, sizeof(*to));
    if (!to)
        return err_set(ERR_NOMEM, "no memory for a trace");
    copy_text(to->request_id, sizeof(to->request_id), o->request_id);
    copy_text(to->trace_id, sizeof(to->trace_id), o->trace_id);
    copy_text(to->parent_id, sizeof(to->parent_id), o->parent_id);
    copy_text(to->span_id, sizeof(to->span_id), o->span_id);
    to->choice = o->choice;
    to->n_choices = o->n_choices;
    return ERR_OK;
}

static uint64_t prefix_hash(const struct gen_params *p)
{
    if (p->n_prompt < PREFIX_TOKENS)
        return 0;
    uint64_t h = hash_bytes(p->cache_salt, p->prompt, PREFIX_TOKENS * sizeof(*p->prompt));
    return h ? h : 1;
}

enum err gen_start(struct cluster *c, const struct gen_params *p, const struct gen_callbacks *cb,
                   void *user, struct gen **ret)
{
    TRY(gen_check(c, p));
    enum err e = sched_admits(c->sched, 1, clock_now_us());
    if (e != ERR_OK) {
        COUNT(c, refused, 1);
        return e;
    }
    TRY(sched_reserve(c->sched, 1));

    OWNED(gen) g = calloc(1, sizeof(*g));
    if (!g)
        return err_set(ERR_NOMEM, "no memory for a request");
    g->cluster = c;
    g->cb = *cb;
    g->user = user;
    g->n_prompt = p->n_prompt;
    g->sampling = p->sampling;
    g->cache_salt = p->cache_salt;
    g->include_stop = p->include_stop;
    g->arrival_us = p->arrival_us;
    g->ids_complete = true;
    if (!ids_reserve(g, (size_t)p->n_prompt + MIN(p->sampling.max_tokens, 64u)))
        return err_set(ERR_NOMEM, "no memory for %u prompt ids", p->n_prompt);
    memcpy(g->ids, p->prompt, p->n_prompt * sizeof(*g->ids));
    g->n_ids = p->n_prompt;
    detokenizer_init(&g->detokenizer, c->tokenizer, p->skip_special);
    TRY(copy_stops(g, p));
    TRY(copy_bias(g, p));
    TRY(copy_grammar(g, p));
    TRY(copy_origin(g, &p->origin));
    TRY(table_add(c, g));

    struct sched_request r = {.id = g->id,
                              .user = g,
                              .n_prompt = p->n_prompt,
                              .max_tokens = p->sampling.max_tokens,
                              .prefix_hash = prefix_hash(p)};
    g->queued_us = clock_now_us();
    g->slot = sched_add(c->sched, &r, g->queued_us);
    COUNT(c, admitted, 1);
    COUNT(c, prompt_tokens, p->n_prompt);
    OBSERVE_N(c, request_prompt_tokens, p->n_prompt);
    OBSERVE_N(c, request_max_tokens, p->sampling.max_tokens);
    if (p->origin.n_choices && p->origin.choice == 0)
        OBSERVE_N(c, request_n, p->origin.n_choices);
    log_debug("gen", "req=%" PRIx64 " prompt=%u max=%u queued", g->id, p->n_prompt,
              p->sampling.max_tokens);
    cluster_kick(c);
    *ret = take(&g);
    return ERR_OK;
}

static enum err gen_check(struct cluster *c, const struct gen_params *p)
{
    const struct cluster_model *m = &c->model;
    uint64_t total = (uint64_t)p->n_prompt + p->sampling.max_tokens;
    if (!p->n_prompt)
        return err_set(ERR_INVALID, "the prompt is empty");
    if (!p->sampling.max_tokens)
        return err_set(ERR_INVALID, "max_tokens is 0");
    if (total > m->max_total_tokens || total > WIRE_MAX_PROMPT)
        return err_set(ERR_TOO_LONG,
                       "%u prompt tokens and %u output tokens are more than the %u tokens that fit",
                       p->n_prompt, p->sampling.max_tokens, m->max_total_tokens);
    for (uint32_t i = 0; i < p->n_prompt; i++)
        if (p->prompt[i] < 0 || p->prompt[i] >= m->n_token_ids)
            return err_set(ERR_INVALID, "prompt token %u is %d, not in 0 .. %d", i, p->prompt[i],
                           m->n_token_ids - 1);
    for (uint32_t i = 0; i < MIN(p->sampling.n_stop_ids, WIRE_MAX_STOP_IDS); i++)
        if (p->sampling.stop_ids[i] < 0 || p->sampling.stop_ids[i] >= m->n_token_ids)
            return err_set(ERR_INVALID, "stop token id %d is not in 0 .. %d",
                           p->sampling.stop_ids[i], m->n_token_ids - 1);

    for (uint32_t i = 0; i < p->n_bias; i++)
        if (p->bias_id[i] < 0 || p->bias_id[i] >= m->n_token_ids)
            return err_set(ERR_INVALID, "biased token id %d is not in 0 .. %d", p->bias_id[i],
                           m->n_token_ids - 1);

    if (p->n_grammar > WIRE_MAX_GRAMMAR)
        return err_set(ERR_TOO_LARGE, "a grammar of %zu bytes exceeds %u", p->n_grammar,
                       WIRE_MAX_GRAMMAR);

    // What the wire would refuse must not reach a worker: it would take the router for broken.
    struct wire_submit *b = wire_begin(&c->out, WIRE_SUBMIT, 1, 0);
    if (!b)
        return err_set(ERR_NOMEM, "no memory for a message");
    b->n_prompt = p->n_prompt;
    b->sampling = p->sampling;
    b->n_bias = p->n_bias;
    wire_put(&c->out, p->bias_id, p->n_bias * sizeof(*p->bias_id));
    wire_put(&c->out, p->bias_value, p->n_bias * sizeof(*p->bias_value));
    TRY(wire_end(&c->out));
    struct wire_msg m_ignored;
    if (wire_decode(c->out.data, c->out.len, &m_ignored) != ERR_OK)
        return err_prefix(ERR_INVALID, "sampling parameters");
    return ERR_OK;
}

void gen_cancel(struct gen *g)
{
    if (g->in_callback) {
        g->cancelled = true; // whoever called back ends it
        return;
    }
    struct cluster *c = g->cluster;
    log_debug("gen", "req=%" PRIx64 " tokens=%u cancelled", g->id, g->n_emitted);
    metric_add(cluster_metric(c, FINISHED_abort), 1);
    gen_trace(g, "abort", NULL);
    sched_end(c->sched, g->slot, SCHED_NONE);
    cluster_kick(c);
    table_remove(c, g);
    gen_destroy(g);
}

uint64_t gen_id(const struct gen *g) { return g->id; }

static void gen_destroy(struct gen *g)
{
    if (!g)
        return;
    g->cluster->id_bytes -= g->cap_ids * sizeof(*g->ids);
    stop_destroy(g->stop);
    free(g->stop_strings);
    free(g->stop_lens);
    free(g->bias_id);
    free(g->grammar);
    free(g->origin);
    free(g->ids);
    free(g->why);
    free(g);
}

/* -- to the workers -- */

static bool needs_ids_at_d(const struct gen *g)
{
    const struct wire_sampling *s = &g->sampling;
    return g->n_grammar > 0 || s->repetition_penalty != 1 || s->presence_penalty != 0 ||
           s->frequency_penalty != 0;
}

static enum err submit_to(struct gen *g, uint32_t attempt, uint32_t worker, uint32_t peer, bool ids)
{
    struct cluster *c = g->cluster;
    struct wire_submit *b = wire_begin(&c->out, WIRE_SUBMIT, g->id, attempt);
    if (!b)
        return err_set(ERR_NOMEM, "no memory for a message");
    b->n_prompt = g->n_prompt;
    b->n_emitted = g->n_emitted;
    b->n_ids = ids ? g->n_prompt + g->n_emitted : 0;
    b->peer_idx = peer;
    b->peer_instance = peer == SCHED_NONE ? 0 : c->workers.at[peer].hello.instance;
    b->cache_salt = g->cache_salt;
    b->sampling = g->sampling;
    b->n_bias = g->n_bias;
    b->n_grammar = g->n_grammar;
    if (ids)
        wire_put(&c->out, g->ids, g->n_ids * sizeof(*g->ids));
    wire_put(&c->out, g->bias_id, g->n_bias * (sizeof(int32_t) + sizeof(float)));
    wire_put(&c->out, g->grammar, g->n_grammar);
    TRY(wire_end(&c->out));
    return cluster_send(c, worker);
}

/* Carries out SCHED_PLACE. A worker that cannot be reached is lost, which ends this attempt too. */
void gen_submit(struct cluster *c, const struct sched_action *a)
{
    struct gen *g = a->user;
    g->n_attempts = a->attempt + 1;
    COUNT(c, placed, 1);
    if (a->d != SCHED_NONE)
        c->workers.at[a->p].n_paired[a->d]++;
    g->placed_us = clock_now_us();
    g->prefill_start_us = g->prefill_end_us = g->handoff_us = 0;
    if (g->origin) {
        copy_text(g->origin->prefill, WIRE_MAX_NAME, c->workers.at[a->p].hello.name);
        copy_text(g->origin->decode, WIRE_MAX_NAME,
                  a->d == SCHED_NONE ? "" : c->workers.at[a->d].hello.name);
    }
    if (g->n_emitted > 0)
        COUNT(c, resumed, 1);
    if (!g->ids_complete) {
        attempt_failed(g, SCHED_NONE, ERR_PROTO,
                       "the stream is too long to be continued on another worker");
        return;
    }
    log_debug("gen", "req=%" PRIx64 " attempt=%u emitted=%u prefill=%u decode=%d placed", g->id,
              a->attempt, g->n_emitted, a->p, (int)a->d);
    enum err e = submit_to(g, a->attempt, a->p, a->d, true);
    if (e == ERR_OK && a->d != SCHED_NONE)
        e = submit_to(g, a->attempt, a->d, a->p, needs_ids_at_d(g));
    // A lost worker has taken the attempt with it; what is left is our own trouble.
    if (e != ERR_OK && sched_holds(c->sched, a->req, a->attempt, a->p))
        attempt_failed(g, SCHED_NONE, e, err_meaning(e));
}

/* -- from the workers -- */

void gens_warm(const struct cluster *c, const uint64_t *ids, uint32_t n)
{
    struct gen *g[GENS_WARM_MAX];
    uint32_t n_found = 0;
    assert(n <= GENS_WARM_MAX);
    if (!c->n_buckets)
        return;
    for (uint32_t i = 0; i < n; i++)
        __builtin_prefetch(bucket(c, ids[i]));
    for (uint32_t i = 0; i < n; i++)
        __builtin_prefetch(*bucket(c, ids[i]));
    for (uint32_t i = 0; i < n; i++)
        if ((g[n_found] = table_find(c, ids[i])))
            warm(g[n_found++], sizeof(struct gen));
    for (uint32_t i = 0; i < n_found; i++) {
        sched_warm(c->sched, g[i]->slot);
        warm(g[i]->ids + g[i]->n_ids, sizeof(*g[i]->ids));
    }
    for (int depth = 0; depth < GEN_WARM_DEPTH; depth++)
        for (uint32_t i = 0; i < n_found; i++)
            if (g[i]->cb.warm)
                g[i]->cb.warm(g[i]->user, depth);
}

enum err gen_take(struct cluster *c, uint32_t worker, const struct wire_stream_view *v,
                  uint64_t now_us)
{
    const struct wire_stream *h = v->head;
    struct gen *g = table_find(c, h->req_id);
    if (g && h->attempt == 0 && c->workers.at[worker].hello.role == WIRE_PREFILL && !g->measured) {
        g->measured = true; // even if D was faster and P is no longer needed
        g->n_cached = MIN(h->n_cached, g->n_prompt);
        g->prefill_us = h->prefill_us;
        COUNT(c, cached_tokens, g->n_cached);
    }
    if (!g || !sched_holds(c->sched, g->slot, h->attempt, worker)) {
        c->n_stale++;
        return ERR_OK;
    }

    uint64_t end = (uint64_t)h->first_pos + h->n_tokens;
    if (end > g->sampling.max_tokens)
        return err_set(ERR_PROTO, "a record ends at %" PRIu64 " of %u tokens", end,
                       g->sampling.max_tokens);
    if (h->n_tokens > 0 && h->n_logprobs != g->sampling.n_logprobs)
        return err_set(ERR_PROTO, "a record has %d logprobs, asked were %d", h->n_logprobs,
                       g->sampling.n_logprobs);
    for (uint32_t i = 0; i < h->n_tokens; i++)
        if (v->ids[i] < 0 || v->ids[i] >= c->model.vocab)
            return err_set(ERR_PROTO, "token id %d is not in 0 .. %d", v->ids[i],
                           c->model.vocab - 1);
    if (h->finish != WIRE_RUNNING && end < g->n_emitted)
        return err_set(ERR_PROTO, "a record ends the stream behind what was sent");

    if (h->first_pos > g->n_emitted) {
        log_warn("gen", "req=%" PRIx64 " attempt=%u have=%u got=%u tokens are missing", g->id,
                 h->attempt, g->n_emitted, h->first_pos);
        attempt_failed(g, SCHED_NONE, ERR_PEER_LOST, "tokens were lost on the way");
        return ERR_OK;
    }
    gen_deliver(g, v, g->n_emitted - h->first_pos, worker, now_us);
    return ERR_OK;
}

void gen_attempt_failed(struct cluster *c, uint32_t worker, const struct wire_msg *m)
{
    const struct wire_failed *b = m->body;
    struct gen *g = table_find(c, m->head.req_id);
    if (!g || !sched_holds(c->sched, g->slot, m->head.attempt, worker)) {
        c->n_stale++;
        return;
    }
    log_event(b->code == ERR_PREEMPTED ? LOG_DEBUG : LOG_WARN, "gen",
              "req=%" PRIx64 " attempt=%u worker=%s code=%s attempt failed: %s", g->id,
              m->head.attempt, c->workers.at[worker].hello.name, err_name(b->code), b->text);
    free(g->why);
    g->why = strdup(b->text);
    attempt_failed(g, worker, b->code, NULL);
}

static void attempt_failed(struct gen *g, uint32_t from, enum err code, const char *text)
{
    sched_failed(g->cluster->sched, g->slot, from, code, text, clock_now_us());
    cluster_kick(g->cluster);
}

/* Remembers ids for the next attempt. */
static void remember(struct gen *g, int32_t id)
{
    if (g->ids_complete && !ids_reserve(g, g->n_ids + 1)) {
        log_warn("gen", "req=%" PRIx64 " tokens=%u no memory for ids: cannot move any more", g->id,
                 g->n_emitted);
        g->ids_complete = false;
    }
    if (g->ids_complete)
        g->ids[g->n_ids++] = id;
    g->n_emitted++;
}

/* Sends text through the stop strings. Returns true when one matched. */
static bool pass_text(struct gen *g, const struct json_out *piece, int *which)
{
    struct json_out *out = &g->cluster->text;
    // No stop before min_tokens, neither by id (the workers see to that) nor by string.
    if (!g->stop || g->n_emitted < g->sampling.min_tokens) {
        json_out_raw(out, piece->data, piece->len);
        return false;
    }
    if (!stop_push(g->stop, piece->data, piece->len, out, which))
        return false;
    if (g->include_stop)
        json_out_raw(out, g->stop_strings[*which], g->stop_lens[*which]);
    return true;
}

static void measure(struct gen *g, uint32_t n_new, const struct wire_stream *h, uint32_t worker,
                    uint64_t now)
{
    struct cluster *c = g->cluster;
    if (c->workers.at[worker].hello.role == WIRE_PREFILL) {
        g->prefill_end_us = now;
        g->prefill_start_us = MAX(now - MIN(h->prefill_us, now), g->placed_us);
    } else if (n_new > 0) {
        g->n_steps++;
        g->n_decoded += n_new;
        if (!g->handoff_us)
            g->handoff_us = now;
    }
    COUNT(c, generation_tokens, n_new);
    for (uint32_t i = 0; i < n_new; i++) {
        if (!g->first_us) {
            g->first_us = g->last_us = now;
            OBSERVE(c, ttft, now - g->arrival_us);
        } else {
            OBSERVE(c, itl, now - g->last_us);
            g->last_us = now;
        }
    }
}

/* Takes the record's tokens from `skip` on: text, callbacks, and the end if it is one. */
static void gen_deliver(struct gen *g, const struct wire_stream_view *v, uint32_t skip,
                        uint32_t worker, uint64_t now_us)
{
    struct cluster *c = g->cluster;
    const struct wire_stream *h = v->head;
    uint32_t n_new = h->n_tokens > skip ? h->n_tokens - skip : 0;
    uint32_t n_used = 0;
    int which = -1;
    c->text.len = 0;
    for (uint32_t i = skip; i < h->n_tokens && which < 0; i++) {
        n_used++;
        remember(g, v->ids[i]);
        if (h->finish == WIRE_STOP && i + 1 == h->n_tokens)
            break; // the eos or stop id is no text
        c->piece.len = 0;
        detokenizer_push(&g->detokenizer, v->ids[i], &c->piece);
        pass_text(g, &c->piece, &which);
    }
    bool matched = which >= 0;
    // A worker that does not stop at the limit is stopped here.
    bool ended = h->finish != WIRE_RUNNING || g->n_emitted >= g->sampling.max_tokens;
    if (ended && !matched) {
        c->piece.len = 0;
        detokenizer_flush(&g->detokenizer, &c->piece);
        matched = pass_text(g, &c->piece, &which);
        if (!matched && g->stop)
            stop_flush(g->stop, &c->text);
    }
    sched_token(c->sched, g->slot, worker, g->n_emitted, now_us);
    measure(g, n_used, h, worker, now_us);

    if (c->text.failed || c->piece.failed) {
        json_out_finish(&c->text);
        json_out_finish(&c->piece);
        c->text = c->piece = (struct json_out){0};
        attempt_failed(g, SCHED_NONE, ERR_INTERNAL, "out of memory for text");
        return;
    }
    if (n_used > 0 || c->text.len > 0) {
        float logprob[WIRE_MAX_STEP];
        struct wire_top top[WIRE_MAX_STEP * WIRE_MAX_TOP];
        uint32_t n_top = h->n_logprobs > 0 ? (uint32_t)h->n_logprobs : 0;
        for (uint32_t i = 0; i < n_used && v->logprobs && h->n_logprobs >= 0; i++) {
            const uint8_t *at = v->logprobs + (skip + i) * wire_logprob_bytes(h->n_logprobs);
            memcpy(&logprob[i], at, sizeof(float));
            memcpy(&top[i * n_top], at + sizeof(float), n_top * sizeof(*top));
        }
        struct gen_chunk chunk = {
            .text = c->text.len ? c->text.data : "",
            .n_text = c->text.len,
            .ids = v->ids + (n_new ? skip : 0),
            .n_ids = (int)n_used,
            .n_logprobs = g->sampling.n_logprobs,
            .logprob = logprob,
            .top = top,
        };
        g->in_callback = true;
        g->cb.on_chunk(g->user, &chunk);
        g->in_callback = false;
        if (g->cancelled) {
            gen_cancel(g);
            return;
        }
    }
    if (!matched && !ended)
        return;
    // The worker that ended the stream knows; whoever else holds it is told.
    sched_end(c->sched, g->slot, h->finish != WIRE_RUNNING ? worker : SCHED_NONE);
    cluster_kick(c);
    if (matched)
        gen_end(g, GEN_STOP, -1, which);
    else if (h->finish == WIRE_STOP)
        gen_end(g, GEN_STOP, v->ids[h->n_tokens - 1], -1);
    else
        gen_end(g, GEN_LENGTH, -1, -1);
}

/* -- ends -- */

static void gen_trace(struct gen *g, const char *finish, const char *error)
{
    const struct origin *o = g->origin;
    if (!o)
        return;
    trace_write(g->cluster->trace, &(struct trace_record){
                                       .request_id = o->request_id,
                                       .trace_id = o->trace_id,
                                       .parent_id = o->parent_id,
                                       .span_id = o->span_id,
                                       .prefill = o->prefill,
                                       .decode = o->decode,
                                       .finish = finish,
                                       .error = error,
                                       .gen_id = g->id,
                                       .choice = o->choice,
                                       .n_choices = o->n_choices,
                                       .n_attempts = g->n_attempts,
                                       .n_prompt = g->n_prompt,
                                       .n_cached = g->n_cached,
                                       .n_output = g->n_emitted,
                                       .n_steps = g->n_steps,
                                       .n_accepted = g->n_decoded - g->n_steps,
                                       .received_us = g->arrival_us,
                                       .queued_us = g->queued_us,
                                       .placed_us = g->placed_us,
                                       .prefill_start_us = g->prefill_start_us,
                                       .prefill_end_us = g->prefill_end_us,
                                       .first_token_us = g->first_us,
                                       .handoff_us = g->handoff_us,
                                       .last_token_us = g->last_us,
                                       .end_us = clock_now_us(),
                                   });
}

/* The scheduler has already let go of it. */
static void gen_end(struct gen *g, enum gen_finish finish, int32_t stop_id, int which)
{
    struct cluster *c = g->cluster;
    uint64_t now = clock_now_us();
    uint64_t first = g->first_us ? g->first_us : now, last = g->last_us ? g->last_us : now;
    uint64_t prefill = MIN(g->prefill_us, first - g->arrival_us);
    uint64_t queue = first - g->arrival_us - prefill; // router, worker, and the way between
    struct gen_end e = {
        .finish = finish,
        .stop_id = stop_id,
        .stop_string = which >= 0 ? g->stop_strings[which] : NULL,
        .usage = {.n_prompt = g->n_prompt,
                  .n_output = g->n_emitted,
                  .n_cached = g->n_cached,
                  .queue_us = queue,
                  .prefill_us = prefill,
                  .ttft_us = first - g->arrival_us,
                  .total_us = now - g->arrival_us,
                  .n_attempts = g->n_attempts},
    };
    OBSERVE(c, e2e, last - g->arrival_us);
    OBSERVE(c, queue_time, queue);
    OBSERVE(c, prefill_time, prefill);
    OBSERVE(c, decode_time, last - first);
    OBSERVE(c, inference_time, last - first + prefill);
    if (g->n_emitted > 1)
        OBSERVE(c, tpot, (last - first) / (g->n_emitted - 1));
    if (g->handoff_us && g->n_attempts == 1)
        OBSERVE(c, handoff_gap, g->handoff_us - first);
    OBSERVE_N(c, request_generation_tokens, g->n_emitted);
    OBSERVE_N(c, request_max_generation_tokens, g->n_emitted);
    metric_add(cluster_metric(c, finish == GEN_STOP ? FINISHED_stop : FINISHED_length), 1);
    gen_trace(g, finish == GEN_STOP ? "stop" : "length", NULL);
    log_debug("gen",
              "req=%" PRIx64 " tokens=%u attempts=%u ttft_us=%" PRIu64 " us=%" PRIu64 " done",
              g->id, g->n_emitted, e.usage.n_attempts, e.usage.ttft_us, e.usage.total_us);
    table_remove(c, g);
    g->in_callback = true;
    g->cb.on_end(g->user, &e);
    gen_destroy(g);
}

/* Carries out SCHED_FAIL. text NULL: the worker's own words. */
void gen_fail(struct gen *g, enum err code, const char *text)
{
    struct cluster *c = g->cluster;
    if (!text)
        text = g->why && g->why[0] ? g->why : err_meaning(code);
    log_event(code == ERR_TIMEOUT ? LOG_INFO : LOG_WARN, "gen",
              "req=%" PRIx64 " tokens=%u code=%s failed: %s", g->id, g->n_emitted, err_name(code),
              text);
    metric_add(cluster_metric(c, FINISHED_error), 1);
    gen_trace(g, "error", err_name(code));
    table_remove(c, g);
    g->in_callback = true;
    g->cb.on_error(g->user, code, text);
    gen_destroy(g);
}

/* -- memory and the table -- */

static bool ids_reserve(struct gen *g, size_t n)
{
    if (n <= g->cap_ids)
        return true;
    struct cluster *c = g->cluster;
    size_t total = (size_t)g->n_prompt + g->sampling.max_tokens;
    size_t cap = MIN(MAX(n, g->cap_ids + g->cap_ids / 2), MAX(total, n));
    size_t more = (cap - g->cap_ids) * sizeof(*g->ids);
    if (c->id_bytes + more > CLUSTER_MAX_ID_BYTES)
        return false;
    int32_t *ids = realloc(g->ids, cap * sizeof(*ids));
    if (!ids)
        return false;
    g->ids = ids;
    g->cap_ids = cap;
    c->id_bytes += more;
    return true;
}

static struct gen **bucket(const struct cluster *c, uint64_t id)
{
    return &c->buckets[id & (c->n_buckets - 1)];
}

static enum err table_add(struct cluster *c, struct gen *g)
{
    if (c->n_gens >= c->n_buckets) {
        uint32_t n = c->n_buckets ? c->n_buckets * 2 : 256;
        struct gen **old = c->buckets, **grown = calloc(n, sizeof(*grown));
        if (!grown)
            return err_set(ERR_NOMEM, "no memory for %u requests", n);
        uint32_t n_old = c->n_buckets;
        c->buckets = grown;
        c->n_buckets = n;
        for (uint32_t i = 0; i < n_old; i++)
            for (struct gen *o = old[i], *next; o; o = next) {
                next = o->next;
                o->next = *bucket(c, o->id);
                *bucket(c, o->id) = o;
            }
        free(old);
    }
    do
        g->id = hash_mix(c->epoch + ++c->next_id); // one to one, so never twice
    while (!g->id);
    g->next = *bucket(c, g->id);
    *bucket(c, g->id) = g;
    c->n_gens++;
    return ERR_OK;
}

static void table_remove(struct cluster *c, struct gen *g)
{
    struct gen **at = bucket(c, g->id);
    while (*at != g)
        at = &(*at)->next;
    *at = g->next;
    c->n_gens--;
}

static struct gen *table_find(const struct cluster *c, uint64_t id)
{
    if (!c->n_buckets)
        return NULL;
    struct gen *g = *bucket(c, id);
    while (g && g->id != id)
        g = g->next;
    return g;
}

void gen_table_finish(struct cluster *c)
{
    assert(c->n_gens == 0);
    free(c->buckets);
    json_out_finish(&c->text);
    json_out_finish(&c->piece);
}
