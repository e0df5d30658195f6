/* engine.c: checks what callers ask, then lets the device's engine compute it. */
#include "common/engine/engine_impl.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static enum err batch_check(const struct engine *e, const struct batch *b);
static enum err hidden_check(const struct engine *e, const struct batch *b,
                             const struct hidden_ref *hidden);

static struct engine base_of(const struct engine_config *c, const struct weights *w)
{
    struct engine e = {.config = *c, .w = w, .m = &w->config};
    if (!c->max_seq_rows)
        e.config.max_seq_rows = c->max_rows;
    if (!(c->inner_norm_eps > 0))
        e.config.inner_norm_eps = w->config.norm_eps;
    return e;
}

uint64_t engine_device_bytes(const struct engine_config *c, const struct weights *w)
{
    struct engine base = base_of(c, w);
    return c->device ? c->device->ops->engine_bytes(&base) : 0;
}

enum err engine_create(const struct engine_config *c, const struct weights *w, struct kv_pool *pool,
                       struct engine **ret)
{
    const struct model_config *m = &w->config;
    const struct kv_pool_config *p = kv_pool_get_config(pool);
    if (c->device != p->device || c->device != w->device)
        return err_set(ERR_INVALID, "engine, weights and KV pages are not on the same device");
    if (c->max_rows < 1 || c->max_seqs < 1 || c->max_logits < 1 || c->max_imports < 0 ||
        c->max_ctx < 1)
        return err_set(ERR_INVALID,
                       "an engine for %d rows, %d sequences, %d logits, %d imports, %d tokens",
                       c->max_rows, c->max_seqs, c->max_logits, c->max_imports, c->max_ctx);
    uint32_t value_bytes = c->device ? 2 : 4, width = c->mock ? MOCK_KV_WIDTH : KV_WIDTH;
    if (p->kv_width != width || p->dtype_bytes != value_bytes ||
        p->n_layers < (uint32_t)m->n_layers ||
        p->n_layers > (uint32_t)(m->n_layers + m->n_mtp_layers))
        return err_set(ERR_INVALID,
                       "KV pages of %u layers x %u values x %u bytes, the model needs %d x %u x %u",
                       p->n_layers, p->kv_width, p->dtype_bytes, m->n_layers, width, value_bytes);
    struct engine base = base_of(c, w);
    base.kv_layers = (int)p->n_layers;
    base.n_pages = (int)p->n_pages;
    if (c->device)
        return c->device->ops->engine(&base, c->device, pool, ret);
    return c->mock ? engine_mock_create(&base, pool, ret) : engine_cpu_create(&base, pool, ret);
}

void engine_destroy(struct engine *e)
{
    if (e)
        e->ops->destroy(e);
}

const struct model_config *engine_model(const struct engine *e) { return e->m; }

void engine_set_meanwhile(struct engine *e, void (*meanwhile)(void *user, uint64_t wait_us),
                          void *user)
{
    e->meanwhile = meanwhile;
    e->meanwhile_user = user;
}

enum err engine_start(struct engine *e, const struct batch *b)
{
    assert(!e->started);
    TRY(batch_check(e, b));
    TRY(e->ops->start(e, b));
    e->n_rows = b->n_rows;
    e->n_logits = b->n_logits;
    e->started = true;
    return ERR_OK;
}

enum err engine_wait(struct engine *e)
{
    assert(e->started);
    e->started = false;
    return e->ops->wait ? e->ops->wait(e) : ERR_OK;
}

enum err engine_forward(struct engine *e, const struct batch *b)
{
    TRY(engine_start(e, b));
    return engine_wait(e);
}

enum err engine_draft(struct engine *e, const struct batch *b, const struct hidden_ref *hidden,
                      int32_t *ret_ids)
{
    if (e->kv_layers <= e->m->n_layers)
        return err_set(ERR_INVALID, "no MTP layer in %s",
                       e->m->n_mtp_layers ? "the KV pages" : "the model");
    assert(!e->started);
    TRY(batch_check(e, b));
    TRY(hidden_check(e, b, hidden));
    TRY(e->ops->draft(e, b, hidden, ret_ids));
    e->n_draft_rows = b->n_rows;
    e->n_draft_logits = ret_ids ? b->n_logits : 0;
    return ERR_OK;
}

enum err engine_sample(struct engine *e, int n, const int32_t *idx, const struct sample_row *rows,
                       int max_top, int32_t *ret_ids, float *ret_logprob, int32_t *ret_top_id,
                       float *ret_top_logprob)
{
    assert(!e->started);
    if (n > e->config.max_logits)
        return err_set(ERR_INVALID, "%d draws, the engine makes %d", n, e->config.max_logits);
    for (int i = 0; i < n; i++) {
        if (idx[i] < 0 || idx[i] >= e->n_logits)
            return err_set(ERR_INVALID, "logits row %d of %d", idx[i], e->n_logits);
        if (rows[i].n_ahead < 0 || rows[i].n_ahead > SAMPLE_MAX_AHEAD)
            return err_set(ERR_INVALID, "a draw %d drafts into its window, at most %d",
                           rows[i].n_ahead, SAMPLE_MAX_AHEAD);
    }
    return e->ops->sample(e, n, idx, rows, max_top, ret_ids, ret_logprob, ret_top_id,
                          ret_top_logprob);
}

enum err engine_export_hidden(struct engine *e, int row, float *ret)
{
    if (row < 0 || row >= e->n_rows)
        return err_set(ERR_INVALID, "hidden row %d of %d", row, e->n_rows);
    return e->ops->export_hidden(e, row, ret);
}

enum err engine_import_hidden(struct engine *e, int slot, const float *hidden)
{
    if (slot < 0 || slot >= e->config.max_imports)
        return err_set(ERR_INVALID, "import slot %d of %d", slot, e->config.max_imports);
    return e->ops->import_hidden(e, slot, hidden);
}

enum err engine_read_logits(struct engine *e, bool draft, int row, float *ret)
{
    int n = draft ? e->n_draft_logits : e->n_logits;
    if (row < 0 || row >= n)
        return err_set(ERR_INVALID, "logits row %d of %d", row, n);
    return e->ops->read_logits(e, draft, row, ret);
}

uint32_t engine_device_us(const struct engine *e) { return e->device_us; }

static enum err batch_check(const struct engine *e, const struct batch *b)
{
    const struct engine_config *c = &e->config;
    if (b->n_rows < 0 || b->n_rows > c->max_rows || b->n_seqs < 0 || b->n_seqs > c->max_seqs ||
        b->n_logits < 0 || b->n_logits > c->max_logits)
        return err_set(
            ERR_INVALID,
            "a batch of %d rows, %d sequences, %d logits exceeds the engine's %d, %d, %d",
            b->n_rows, b->n_seqs, b->n_logits, c->max_rows, c->max_seqs, c->max_logits);
    if (b->n_seqs > 0 ? b->seq_start[0] != 0 || b->seq_start[b->n_seqs] != b->n_rows
                      : b->n_rows > 0)
        return err_set(ERR_INVALID, "the batch's sequences do not cover its %d rows", b->n_rows);
    for (int s = 0; s < b->n_seqs; s++) {
        int n = b->seq_start[s + 1] - b->seq_start[s], ctx = b->ctx_len[s];
        if (n < 0 || ctx < n || ctx > c->max_ctx)
            return err_set(ERR_INVALID, "sequence %d: %d rows end at slot %d of at most %d", s, n,
                           ctx, c->max_ctx);
        int pages = (ctx + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        if (pages > b->max_pages)
            return err_set(ERR_INVALID, "sequence %d: %d slots, but at most %d pages", s, ctx,
                           b->max_pages);
        for (int p = 0; p < pages; p++) {
            int32_t page = b->block_table[(int64_t)s * b->max_pages + p];
            if (page < 0 || page >= e->n_pages)
                return err_set(ERR_INVALID, "sequence %d: page %d of a pool of %d", s, page,
                               e->n_pages);
        }
    }
    for (int r = 0; r < b->n_rows; r++)
        if (b->token[r] < 0 || b->token[r] >= e->m->vocab || b->position[r] < 0)
            return err_set(ERR_INVALID, "row %d: token %d of %d at position %d", r, b->token[r],
                           e->m->vocab, b->position[r]);
    for (int i = 0; i < b->n_logits; i++)
        if (b->logit_row[i] < 0 || b->logit_row[i] >= b->n_rows ||
            (i > 0 && b->logit_row[i] <= b->logit_row[i - 1]))
            return err_set(ERR_INVALID, "logit_row[%d] is %d in a batch of %d rows", i,
                           b->logit_row[i], b->n_rows);
    return ERR_OK;
}

static enum err hidden_check(const struct engine *e, const struct batch *b,
                             const struct hidden_ref *hidden)
{
    for (int r = 0; r < b->n_rows; r++) {
        int n = hidden[r].source == HIDDEN_MAIN     ? e->n_rows
                : hidden[r].source == HIDDEN_IMPORT ? e->config.max_imports
                : hidden[r].source == HIDDEN_DRAFT  ? e->n_draft_rows
                                                    : 0;
        if (hidden[r].idx < 0 || hidden[r].idx >= n)
            return err_set(ERR_INVALID, "row %d wants hidden state %d of source %d, which has %d",
                           r, hidden[r].idx, hidden[r].source, n);
    }
    return ERR_OK;
}
