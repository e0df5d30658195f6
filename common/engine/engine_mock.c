/* engine_mock.c: an engine that sleeps as long as a GPU would take, and computes nothing.
 *
 * Everything around it stays real: pages, handoff, checksums, hidden states, drafts, protocol. So a
 * router, a scheduler and a load generator meet the pace of a cluster of GPUs on a machine without
 * any.
 *
 * The token at a position is a function of (seed, position) alone: see mock_token, and
 * mock_outputs.h for outputs that are given. Its own page
 * layout is small: per layer and token the slot's number and the token. Each pass looks whether the
 * slots before its rows are there, and each draft whether its hidden state is that of its slot, so
 * that a page or a state that went to the wrong place is an error and no other text.
 *
 * Sleeps end at absolute times: what one of them overslept, the next one is shorter.
 */
#include "common/engine/engine_impl.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "common/base/hash.h"
#include "common/engine/mock_costs.h"
#include "common/engine/mock_outputs.h"

#define PROGRESS_NS 100000000 /* the longest wait without a sign of life */
#define MAX_LATE_NS 100000000 /* that is made up for; more was no oversleeping but a stop */
#define N_LAYERS    2         /* the model's one and the MTP layer */

struct cell {
    int32_t slot, token;
};

struct engine_mock {
    struct engine base;
    struct mock_costs costs;
    struct mock_outputs *outputs; // NULL: none are given
    struct cell *kv;              // [page][layer][64]
    int64_t due_ns;               // end of the pass under way
    int64_t late_ns;
    int32_t *slot, *draft_slot, *next_slot; // [max_rows] of the last forward, draft; scratch
    int32_t *import_slot;                   // [max_imports]
};

static void mock_destroy(struct engine *engine)
{
    struct engine_mock *e = (struct engine_mock *)engine;
    mock_outputs_destroy(e->outputs);
    free(e->slot);
    free(e->draft_slot);
    free(e->next_slot);
    free(e->import_slot);
    free(e);
}

/* ---- time ------------------------------------------------------------------------------------ */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_until(int64_t ns)
{
    struct timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

static void spend(struct engine_mock *e, double ms)
{
    e->due_ns = now_ns() - e->late_ns + (int64_t)(ms * 1e6);
    engine_progress(&e->base);
}

static enum err mock_wait(struct engine *engine)
{
    struct engine_mock *e = (struct engine_mock *)engine;
    int64_t now = now_ns();
    while (now < e->due_ns) {
        int64_t until = MIN(e->due_ns, now + PROGRESS_NS);
        if (engine->meanwhile)
            engine_meanwhile(engine, (uint64_t)(until - now + 999) / 1000);
        else
            sleep_until(until);
        engine_progress(engine);
        now = now_ns();
    }
    e->late_ns = MIN(now - e->due_ns, MAX_LATE_NS);
    return ERR_OK;
}

/* ---- pages and states ------------------------------------------------------------------------ */

static struct cell *cell_at(const struct engine_mock *e, const struct batch *b, int seq, int layer,
                            int slot)
{
    int64_t page = b->block_table[(int64_t)seq * b->max_pages + slot / KV_PAGE_TOKENS];
    return e->kv + (page * e->base.kv_layers + layer) * KV_PAGE_TOKENS + slot % KV_PAGE_TOKENS;
}

static enum err cell_check(const struct engine_mock *e, const struct batch *b, int seq, int layer,
                           int slot)
{
    const struct cell *cell = cell_at(e, b, seq, layer, slot);
    if (cell->slot == slot + 1)
        return ERR_OK;
    return err_set(ERR_INTERNAL, "sequence %d, layer %d: the KV page of slot %d has slot %d there",
                   seq, layer, slot, cell->slot - 1);
}

/* Checks what the rows would attend to (the ends of each page), then writes theirs. Slots count
 * from 1 in a page: 0 was never written. */
static enum err kv_pass(struct engine_mock *e, const struct batch *b, int layer, int32_t *ret_slot)
{
    for (int s = 0; s < b->n_seqs; s++) {
        int begin = b->seq_start[s], n = b->seq_start[s + 1] - begin, first = b->ctx_len[s] - n;
        for (int slot = 0; slot < first; slot += KV_PAGE_TOKENS) {
            TRY(cell_check(e, b, s, layer, slot));
            TRY(cell_check(e, b, s, layer, MIN(slot + KV_PAGE_TOKENS, first) - 1));
        }
        for (int i = 0; i < n; i++) {
            *cell_at(e, b, s, layer, first + i) = (struct cell){first + i + 1, b->token[begin + i]};
            ret_slot[begin + i] = first + i;
        }
    }
    return ERR_OK;
}

/* Value i of the hidden state of a slot: the slot itself, then noise. Both survive bf16. */
static float hidden_value(int32_t slot, int i)
{
    if (i < 4)
        return (float)(slot >> 8 * i & 0xff);
    return (float)(int8_t)hash_mix((uint64_t)slot << 32 ^ (uint64_t)i);
}

static enum err mock_export_hidden(struct engine *engine, int row, float *ret)
{
    const struct engine_mock *e = (struct engine_mock *)engine;
    for (int i = 0; i < engine->m->hidden; i++)
        ret[i] = hidden_value(e->slot[row], i);
    return ERR_OK;
}

static enum err mock_import_hidden(struct engine *engine, int slot, const float *hidden)
{
    struct engine_mock *e = (struct engine_mock *)engine;
    int32_t of = 0;
    for (int i = 0; i < 4; i++)
        if (hidden[i] >= 0 && hidden[i] <= 255)
            of |= (int32_t)((uint32_t)hidden[i] << 8 * i);
    for (int i = 0; i < engine->m->hidden; i++)
        if (!(hidden[i] == hidden_value(of, i)))
            return err_set(ERR_INTERNAL, "value %d of the hidden state of slot %d is %g, not %g", i,
                           of, (double)hidden[i], (double)hidden_value(of, i));
    e->import_slot[slot] = of;
    return ERR_OK;
}

/* ---- passes ---------------------------------------------------------------------------------- */

static int32_t draw(const struct engine_mock *e, const struct sample_row *row);

/* Only a decode worker takes hidden states in. */
static bool decodes(const struct engine_mock *e) { return e->base.config.max_imports > 0; }

static enum err mock_start(struct engine *engine, const struct batch *b)
{
    struct engine_mock *e = (struct engine_mock *)engine;
    TRY(kv_pass(e, b, 0, e->slot));
    spend(e, decodes(e) ? mock_costs_step_ms(&e->costs, b->n_seqs, b->n_rows)
                        : mock_costs_chunk_ms(&e->costs, b->n_rows));
    return ERR_OK;
}

static enum err hidden_check(const struct engine_mock *e, const struct hidden_ref *hidden, int row)
{
    int32_t ref = hidden[row].idx, want = e->next_slot[row], got;
    if (hidden[row].source == HIDDEN_MAIN)
        got = e->slot[ref];
    else if (hidden[row].source == HIDDEN_IMPORT)
        got = e->import_slot[ref];
    else
        got = e->draft_slot[ref] + 1; // the layer's own output leads one further
    if (got == want)
        return ERR_OK;
    return err_set(ERR_INTERNAL, "draft row %d of slot %d has the hidden state of slot %d", row,
                   want, got);
}

/* A chunk's pass over the MTP layer is in its tokens per second. */
static enum err mock_draft(struct engine *engine, const struct batch *b,
                           const struct hidden_ref *hidden, int32_t *ret_ids)
{
    struct engine_mock *e = (struct engine_mock *)engine;
    TRY(kv_pass(e, b, 1, e->next_slot));
    for (int r = 0; r < b->n_rows; r++)
        TRY(hidden_check(e, hidden, r));
    int32_t *slot = e->draft_slot;
    e->draft_slot = e->next_slot;
    e->next_slot = slot;
    if (decodes(e)) {
        spend(e, mock_costs_draft_ms(&e->costs, b->n_seqs));
        TRY(mock_wait(engine));
    }
    for (int i = 0; ret_ids && i < b->n_logits; i++) {
        struct sample_row row = {.seed = ~0ull,
                                 .position = b->position[b->logit_row[i]],
                                 .allowed = batch_allowed(b, i)};
        ret_ids[i] = draw(e, &row);
    }
    return ERR_OK;
}

/* ---- draws ----------------------------------------------------------------------------------- */

int32_t mock_token(const struct model_config *m, uint64_t seed, uint32_t position)
{
    uint64_t h = hash_mix(seed + position * 0x9e3779b97f4a7c15u);
    return (int32_t)((h >> 32) * (uint64_t)m->n_text_ids >> 32);
}

static bool is_in(const int32_t *list, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (list[i] == id)
            return true;
    return false;
}

static bool may_draw(const struct sample_row *row, int32_t id)
{
    return !(row->allowed && !(row->allowed[id / 32] >> id % 32 & 1)) &&
           !is_in(row->banned, row->n_banned, id);
}

/* The given token, if it may be drawn. Else the next id from mock_token's on that may be; one that
 * ends the output only where a grammar leaves nothing else. */
static int32_t draw(const struct engine_mock *e, const struct sample_row *row)
{
    const struct model_config *m = e->base.m;
    int32_t given, first = mock_token(m, row->seed, (uint32_t)row->position), end = -1;
    if (mock_outputs_at(e->outputs, row->seed, (uint32_t)row->position, &given) &&
        may_draw(row, given))
        return given;
    for (int k = 0; k < m->n_token_ids; k++) {
        int32_t id = (int32_t)(((int64_t)first + k) % m->n_token_ids);
        if (!may_draw(row, id))
            continue;
        if (!is_in(m->eos, m->n_eos, id))
            return id;
        end = end < 0 ? id : end;
    }
    return end < 0 ? first : end;
}

static enum err mock_sample(struct engine *engine, int n, const int32_t *idx,
                            const struct sample_row *rows, int max_top, int32_t *ret_ids,
                            float *ret_logprob, int32_t *ret_top_id, float *ret_top_logprob)
{
    (void)idx;
    const struct model_config *m = engine->m;
    for (int i = 0; i < n; i++) {
        ret_ids[i] = draw((struct engine_mock *)engine, &rows[i]);
        if (rows[i].n_logprobs >= 0 && ret_logprob)
            ret_logprob[i] = -0.5f;
        for (int k = 0; k < rows[i].n_logprobs && k < max_top; k++) {
            ret_top_id[i * max_top + k] = (ret_ids[i] + k) % m->n_token_ids;
            ret_top_logprob[i * max_top + k] = -0.5f - (float)k;
        }
    }
    return ERR_OK;
}

static enum err mock_read_logits(struct engine *engine, bool draft, int row, float *ret)
{
    (void)engine, (void)draft, (void)row, (void)ret;
    return err_set(ERR_INVALID, "the mock engine has no logits");
}

static const struct engine_ops mock_ops = {
    .destroy = mock_destroy,
    .start = mock_start,
    .wait = mock_wait,
    .draft = mock_draft,
    .sample = mock_sample,
    .export_hidden = mock_export_hidden,
    .import_hidden = mock_import_hidden,
    .read_logits = mock_read_logits,
};

enum err engine_mock_create(const struct engine *base, struct kv_pool *pool, struct engine **ret)
{
    const struct engine_config *c = &base->config;
    if (base->kv_layers > N_LAYERS)
        return err_set(ERR_INVALID, "KV pages of %d layers, the mock engine has %d",
                       base->kv_layers, N_LAYERS);
    OWNED(engine) owner = NULL;
    struct engine_mock *e = calloc(1, sizeof(*e));
    if (!e)
        return err_set(ERR_NOMEM, "no memory for an engine");
    owner = &e->base;
    e->base = *base;
    e->base.ops = &mock_ops;
    e->costs = *c->mock;
    e->kv = kv_pool_base(pool);
    if (c->mock->outputs[0])
        TRY(mock_outputs_load(c->mock->outputs, base->m->n_token_ids, &e->outputs));
    e->slot = calloc((size_t)c->max_rows, sizeof(*e->slot));
    e->draft_slot = calloc((size_t)c->max_rows, sizeof(*e->draft_slot));
    e->next_slot = calloc((size_t)c->max_rows, sizeof(*e->next_slot));
    e->import_slot = calloc((size_t)c->max_imports + 1, sizeof(*e->import_slot));
    if (!e->slot || !e->draft_slot || !e->next_slot || !e->import_slot)
        return err_set(ERR_NOMEM, "no memory for an engine of %d rows", c->max_rows);
    *ret = take(&owner);
    return ERR_OK;
}
