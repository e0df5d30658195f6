/* engine_cpu.c: the forward pass of glm4_moe_lite and its MTP layer on the CPU.
 *
 * The residual stream of all rows stays in `x`; each layer walks it in blocks of BLOCK_ROWS, so
 * that the scratch memory does not grow with the batch. Blocks ascend, and a row attends only to
 * slots of its own sequence up to its own: those were written by earlier blocks or by this one. No
 * result depends on where blocks are cut (kernels.h), so a prompt may come in any pieces.
 *
 * All memory is taken at creation, as one piece cut up by `parts`.
 */
#include "common/engine/engine_impl.h"

#include <string.h>
#include <sys/mman.h>

#define BLOCK_ROWS 512
#define ALIGN      64

struct engine_cpu {
    struct engine base;
    struct par *par;
    float *kv; // the pool's memory
    int block_rows;

    void *memory;
    size_t memory_bytes;
    /* whole batch */
    float *x;                                    // [max_rows, H] residual stream
    float *hidden, *draft_hidden;                // [max_rows, H] after the final norm
    float *import;                               // [max_imports, H]
    float *logits, *draft_logits;                // [max_logits, V]
    int32_t *slot_page, *slot_row, *seq, *n_ctx; // [max_rows]
    /* one block of rows */
    float *norm;          // [block, H]
    float *q_a;           // [block, q_lora]
    float *q, *attention; // [block, heads, 256]
    float *kv_a;          // [block, 576]
    float *latent;        // [block, 512]
    float *gate, *up;     // [block, I] dense MLP
    float *router;        // [block, E]
    float *expert_weight; // [block, k]
    int32_t *expert;      // [block, k]
    float *joined;        // [block, 2H] input of the MTP layer
    float *moe_work, *mla_work, *sample_work;
};

static void slots_find(struct engine_cpu *e, const struct batch *b);
static void layer_run(struct engine_cpu *e, int layer, const struct batch *b);
static void attention(struct engine_cpu *e, int layer, const struct batch *b, int row, int n);
static void dense_mlp(struct engine_cpu *e, const struct layer_weights *l, int row, int n);
static void moe_mlp(struct engine_cpu *e, const struct layer_weights *l, int row, int n);
static void head(struct engine_cpu *e, const bf16_t *weights, const float *hidden,
                 const struct batch *b, float *logits);

/* ---- memory ---------------------------------------------------------------------------------- */

/* Lists every buffer; with base NULL it only adds up. */
static size_t parts(struct engine_cpu *e, char *base)
{
    const struct engine_config *c = &e->base.config;
    const struct model_config *m = e->base.m;
    size_t rows = (size_t)c->max_rows, block = (size_t)e->block_rows, H = (size_t)m->hidden;
    size_t threads = (size_t)par_threads(e->par), V = (size_t)m->vocab, at = 0;
    struct {
        void *to;
        size_t n; // values of 4 bytes
    } list[] = {
        {&e->x, rows * H},
        {&e->hidden, rows * H},
        {&e->draft_hidden, m->n_mtp_layers ? rows * H : 0},
        {&e->import, (size_t)c->max_imports * H},
        {&e->logits, (size_t)c->max_logits * V},
        {&e->draft_logits, m->n_mtp_layers ? (size_t)c->max_logits * V : 0},
        {&e->slot_page, rows},
        {&e->slot_row, rows},
        {&e->seq, rows},
        {&e->n_ctx, rows},
        {&e->norm, block * H},
        {&e->q_a, block * (size_t)m->q_lora_rank},
        {&e->q, block * (size_t)m->n_heads * MLA_QK},
        {&e->attention, block * (size_t)m->n_heads * MLA_V},
        {&e->kv_a, block * KV_WIDTH},
        {&e->latent, block * MLA_LATENT},
        {&e->gate, block * (size_t)m->intermediate},
        {&e->up, block * (size_t)m->intermediate},
        {&e->router, block * (size_t)m->n_experts},
        {&e->expert_weight, block * (size_t)m->n_experts_per_token},
        {&e->expert, block * (size_t)m->n_experts_per_token},
        {&e->joined, m->n_mtp_layers ? block * 2 * H : 0},
        {&e->moe_work, (size_t)moe_work_floats((int)block, m->hidden, m->moe_intermediate,
                                               m->n_experts, m->n_experts_per_token)},
        {&e->mla_work, threads * (size_t)mla_work_floats(c->max_ctx)},
        {&e->sample_work, threads * 2 * V},
    };
    for (size_t i = 0; i < ARRAY_LEN(list); i++) {
        if (base) {
            void *p = base + at;
            memcpy(list[i].to, &p, sizeof(p));
        }
        at += (list[i].n * 4 + ALIGN - 1) / ALIGN * ALIGN;
    }
    return at;
}

static void cpu_destroy(struct engine *engine)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    par_destroy(e->par);
    if (e->memory)
        munmap(e->memory, e->memory_bytes);
    free(e);
}

/* ---- forward --------------------------------------------------------------------------------- */

static enum err cpu_start(struct engine *engine, const struct batch *b)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    slots_find(e, b);
    const int H = e->base.m->hidden;
    embed_ref(&(struct embed_args){
        .table = e->base.w->embed, .token = b->token, .out = e->x, .T = b->n_rows, .H = H});
    for (int layer = 0; layer < e->base.m->n_layers; layer++)
        layer_run(e, layer, b);
    rmsnorm_ref(&(struct rmsnorm_args){.x = e->x,
                                       .w = e->base.w->norm,
                                       .y = e->hidden,
                                       .T = b->n_rows,
                                       .n = H,
                                       .x_stride = H,
                                       .y_stride = H,
                                       .eps = e->base.m->norm_eps},
                e->par);
    head(e, e->base.w->head, e->hidden, b, e->logits);
    return ERR_OK;
}

static const float *hidden_find(const struct engine_cpu *e, struct hidden_ref ref)
{
    const float *base = ref.source == HIDDEN_MAIN     ? e->hidden
                        : ref.source == HIDDEN_IMPORT ? e->import
                                                      : e->draft_hidden;
    return base + (int64_t)ref.idx * e->base.m->hidden;
}

/* x = eh_proj [enorm(embedding), hnorm(hidden)] for n rows. */
static void mtp_input(struct engine_cpu *e, const struct batch *b, const struct hidden_ref *hidden,
                      int row, int n)
{
    const struct mtp_weights *w = &e->base.w->mtp;
    const int H = e->base.m->hidden;
    struct rmsnorm_args norm = {
        .x = e->norm, .T = n, .n = H, .x_stride = H, .y_stride = 2 * H, .eps = e->base.m->norm_eps};
    embed_ref(&(struct embed_args){
        .table = w->embed, .token = b->token + row, .out = e->norm, .T = n, .H = H});
    norm.w = w->enorm;
    norm.y = e->joined;
    rmsnorm_ref(&norm, e->par);
    for (int r = 0; r < n; r++)
        memcpy(e->norm + (int64_t)r * H, hidden_find(e, hidden[row + r]),
               sizeof(float) * (size_t)H);
    norm.w = w->hnorm;
    norm.y = e->joined + H;
    rmsnorm_ref(&norm, e->par);
    gemm_ref(&(struct gemm_args){.x = e->joined,
                                 .w = w->eh_proj,
                                 .y = e->x + (int64_t)row * H,
                                 .T = n,
                                 .n_in = 2 * H,
                                 .n_out = H,
                                 .x_stride = 2 * H,
                                 .y_stride = H},
             e->par);
}

/* The lowest of the best ids in the mask, which is not empty. */
static int32_t argmax_allowed(const float *x, const uint32_t *allowed, int n_valid)
{
    int32_t best = -1;
    for (int32_t id = 0; id < n_valid; id++)
        if (allowed[id / 32] >> id % 32 & 1 && (best < 0 || x[id] > x[best]))
            best = id;
    return MAX(best, 0);
}

static enum err cpu_draft(struct engine *engine, const struct batch *b,
                          const struct hidden_ref *hidden, int32_t *ret_ids)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    const int H = e->base.m->hidden, layer = e->base.m->n_layers;
    slots_find(e, b);
    for (int r = 0; r < b->n_rows; r += e->block_rows)
        mtp_input(e, b, hidden, r, MIN(e->block_rows, b->n_rows - r));
    layer_run(e, layer, b);
    rmsnorm_ref(&(struct rmsnorm_args){.x = e->x,
                                       .w = e->base.w->mtp.head_norm,
                                       .y = e->draft_hidden,
                                       .T = b->n_rows,
                                       .n = H,
                                       .x_stride = H,
                                       .y_stride = H,
                                       .eps = e->base.m->norm_eps},
                e->par);
    if (!ret_ids)
        return ERR_OK;
    head(e, e->base.w->mtp.head, e->draft_hidden, b, e->draft_logits);
    argmax_ref(&(struct argmax_args){.x = e->draft_logits,
                                     .idx = ret_ids,
                                     .T = b->n_logits,
                                     .n = e->base.m->vocab,
                                     .n_valid = e->base.m->n_token_ids});
    for (int i = 0; i < b->n_logits; i++)
        if (batch_allowed(b, i))
            ret_ids[i] = argmax_allowed(e->draft_logits + (int64_t)i * e->base.m->vocab,
                                        b->allowed[i], e->base.m->n_token_ids);
    return ERR_OK;
}

/* Where each row's KV goes and how far it sees: itself included. */
static void slots_find(struct engine_cpu *e, const struct batch *b)
{
    for (int s = 0; s < b->n_seqs; s++) {
        int begin = b->seq_start[s], end = b->seq_start[s + 1];
        for (int r = begin; r < end; r++) {
            int slot = b->ctx_len[s] - (end - r);
            e->slot_page[r] = b->block_table[(int64_t)s * b->max_pages + slot / KV_PAGE_TOKENS];
            e->slot_row[r] = slot % KV_PAGE_TOKENS;
            e->seq[r] = s;
            e->n_ctx[r] = slot + 1;
        }
    }
}

/* ---- one layer ------------------------------------------------------------------------------- */

static void layer_run(struct engine_cpu *e, int layer, const struct batch *b)
{
    const struct layer_weights *l = &e->base.w->layers[layer];
    for (int r = 0; r < b->n_rows; r += e->block_rows) {
        int n = MIN(e->block_rows, b->n_rows - r);
        engine_progress(&e->base);
        attention(e, layer, b, r, n);
        if (l->mlp_gate)
            dense_mlp(e, l, r, n);
        else
            moe_mlp(e, l, r, n);
    }
}

/* y = x w^T on tightly packed rows. */
static void product(struct engine_cpu *e, const float *x, const bf16_t *w, float *y, int n,
                    int n_in, int n_out, bool accumulate)
{
    gemm_ref(&(struct gemm_args){.x = x,
                                 .w = w,
                                 .y = y,
                                 .T = n,
                                 .n_in = n_in,
                                 .n_out = n_out,
                                 .x_stride = n_in,
                                 .y_stride = n_out,
                                 .accumulate = accumulate},
             e->par);
}

static void norm_rows(struct engine_cpu *e, const float *x, int x_stride, const bf16_t *w, float *y,
                      int n, int width, float eps)
{
    rmsnorm_ref(&(struct rmsnorm_args){.x = x,
                                       .w = w,
                                       .y = y,
                                       .T = n,
                                       .n = width,
                                       .x_stride = x_stride,
                                       .y_stride = width,
                                       .eps = eps},
                e->par);
}

/* x += o_proj MLA(norm(x)); the rows' latents and keys go into the pages first. */
static void attention(struct engine_cpu *e, int layer, const struct batch *b, int row, int n)
{
    const struct layer_weights *l = &e->base.w->layers[layer];
    const int H = e->base.m->hidden, heads = e->base.m->n_heads, rank = e->base.m->q_lora_rank;
    const float inner_eps = e->base.config.inner_norm_eps;
    float *x = e->x + (int64_t)row * H;

    norm_rows(e, x, H, l->input_norm, e->norm, n, H, e->base.m->norm_eps);
    product(e, e->norm, l->q_a, e->q_a, n, H, rank, false);
    norm_rows(e, e->q_a, rank, l->q_a_norm, e->q_a, n, rank, inner_eps);
    product(e, e->q_a, l->q_b, e->q, n, rank, heads * MLA_QK, false);
    product(e, e->norm, l->kv_a, e->kv_a, n, H, KV_WIDTH, false);
    norm_rows(e, e->kv_a, KV_WIDTH, l->kv_a_norm, e->latent, n, MLA_LATENT, inner_eps);

    struct rope_args rope = {.x = e->q + MLA_NOPE,
                             .position = b->position + row,
                             .T = n,
                             .heads = heads,
                             .row_stride = heads * MLA_QK,
                             .head_stride = MLA_QK,
                             .theta = e->base.m->rope_theta};
    rope_ref(&rope);
    rope.x = e->kv_a + MLA_LATENT; // one key for all heads, not normed
    rope.heads = 1;
    rope.row_stride = KV_WIDTH;
    rope_ref(&rope);

    kv_write_ref(&(struct kv_write_args){.latent = e->latent,
                                         .rope = e->kv_a + MLA_LATENT,
                                         .slot_page = e->slot_page + row,
                                         .slot_row = e->slot_row + row,
                                         .pool = e->kv,
                                         .T = n,
                                         .n_layers = e->base.kv_layers,
                                         .layer = layer,
                                         .rope_stride = KV_WIDTH});
    mla_ref(&(struct mla_args){.q = e->q,
                               .kv_b = l->kv_b,
                               .pool = e->kv,
                               .block_table = b->block_table,
                               .seq = e->seq + row,
                               .n_ctx = e->n_ctx + row,
                               .out = e->attention,
                               .work = e->mla_work,
                               .T = n,
                               .heads = heads,
                               .n_layers = e->base.kv_layers,
                               .layer = layer,
                               .max_pages = b->max_pages,
                               .scale = 1.0f / 16.0f},
            e->par);
    product(e, e->attention, l->o, x, n, heads * MLA_V, H, true);
}

/* x += down(silu(gate norm(x)) * up norm(x)) */
static void dense_mlp(struct engine_cpu *e, const struct layer_weights *l, int row, int n)
{
    const int H = e->base.m->hidden, I = e->base.m->intermediate;
    float *x = e->x + (int64_t)row * H;
    norm_rows(e, x, H, l->post_attention_norm, e->norm, n, H, e->base.m->norm_eps);
    product(e, e->norm, l->mlp_gate, e->gate, n, H, I, false);
    product(e, e->norm, l->mlp_up, e->up, n, H, I, false);
    swiglu_ref(&(struct swiglu_args){.gate = e->gate, .up = e->up, .n = (int64_t)n * I});
    product(e, e->gate, l->mlp_down, x, n, I, H, true);
}

/* x += the chosen experts' and the shared expert's share of norm(x) */
static void moe_mlp(struct engine_cpu *e, const struct layer_weights *l, int row, int n)
{
    const struct model_config *m = e->base.m;
    const int H = m->hidden;
    float *x = e->x + (int64_t)row * H;
    norm_rows(e, x, H, l->post_attention_norm, e->norm, n, H, m->norm_eps);
    product(e, e->norm, l->router, e->router, n, H, m->n_experts, false);
    route_ref(&(struct route_args){.logits = e->router,
                                   .bias = l->router_bias,
                                   .expert = e->expert,
                                   .weight = e->expert_weight,
                                   .T = n,
                                   .E = m->n_experts,
                                   .k = m->n_experts_per_token,
                                   .scale = m->routed_scale});
    moe_ref(&(struct moe_args){.x = e->norm,
                               .gate = l->expert_gate,
                               .up = l->expert_up,
                               .down = l->expert_down,
                               .shared_gate = l->shared_gate,
                               .shared_up = l->shared_up,
                               .shared_down = l->shared_down,
                               .expert = e->expert,
                               .weight = e->expert_weight,
                               .y = x,
                               .work = e->moe_work,
                               .T = n,
                               .H = H,
                               .F = m->moe_intermediate,
                               .E = m->n_experts,
                               .k = m->n_experts_per_token},
            e->par);
}

/* Logits of the wanted rows, packed together first. */
static void head(struct engine_cpu *e, const bf16_t *weights, const float *hidden,
                 const struct batch *b, float *logits)
{
    const int H = e->base.m->hidden, V = e->base.m->vocab;
    for (int i = 0; i < b->n_logits; i += e->block_rows) {
        int n = MIN(e->block_rows, b->n_logits - i);
        for (int k = 0; k < n; k++)
            memcpy(e->norm + (int64_t)k * H, hidden + (int64_t)b->logit_row[i + k] * H,
                   sizeof(float) * (size_t)H);
        product(e, e->norm, weights, logits + (int64_t)i * V, n, H, V, false);
    }
}

/* ---- draws and copies ------------------------------------------------------------------------ */

struct draws {
    const int32_t *idx;
    struct sample_args args; // of all rows; T unused
};

static void draw_items(void *arg, int64_t begin, int64_t end)
{
    const struct draws *d = arg;
    for (int64_t i = begin; i < end; i++) {
        struct sample_args a = d->args;
        a.logits += (int64_t)d->idx[i] * a.V;
        a.rows += i;
        a.id += i;
        a.logprob = a.logprob ? a.logprob + i : NULL;
        a.top_id = a.top_id ? a.top_id + i * a.max_top : NULL;
        a.top_logprob = a.top_logprob ? a.top_logprob + i * a.max_top : NULL;
        a.T = 1;
        sample_ref(&a, NULL);
    }
}

static enum err cpu_sample(struct engine *engine, int n, const int32_t *idx,
                           const struct sample_row *rows, int max_top, int32_t *ret_ids,
                           float *ret_logprob, int32_t *ret_top_id, float *ret_top_logprob)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    struct draws d = {.idx = idx,
                      .args = {.logits = e->logits,
                               .rows = rows,
                               .id = ret_ids,
                               .logprob = ret_logprob,
                               .top_id = ret_top_id,
                               .top_logprob = ret_top_logprob,
                               .work = e->sample_work,
                               .V = e->base.m->vocab,
                               .n_valid = e->base.m->n_token_ids,
                               .max_top = max_top}};
    par_for(e->par, n, 1, draw_items, &d);
    return ERR_OK;
}

static enum err cpu_export_hidden(struct engine *engine, int row, float *ret)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    int64_t H = engine->m->hidden;
    memcpy(ret, e->hidden + row * H, sizeof(float) * (size_t)H);
    return ERR_OK;
}

static enum err cpu_import_hidden(struct engine *engine, int slot, const float *hidden)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    int64_t H = engine->m->hidden;
    memcpy(e->import + slot * H, hidden, sizeof(float) * (size_t)H);
    return ERR_OK;
}

static enum err cpu_read_logits(struct engine *engine, bool draft, int row, float *ret)
{
    struct engine_cpu *e = (struct engine_cpu *)engine;
    int64_t V = engine->m->vocab;
    memcpy(ret, (draft ? e->draft_logits : e->logits) + row * V, sizeof(float) * (size_t)V);
    return ERR_OK;
}

static const struct engine_ops cpu_ops = {
    .destroy = cpu_destroy,
    .start = cpu_start,
    .draft = cpu_draft,
    .sample = cpu_sample,
    .export_hidden = cpu_export_hidden,
    .import_hidden = cpu_import_hidden,
    .read_logits = cpu_read_logits,
};

enum err engine_cpu_create(const struct engine *base, struct kv_pool *pool, struct engine **ret)
{
    const struct engine_config *c = &base->config;
    OWNED(engine) owner = NULL;
    struct engine_cpu *e = calloc(1, sizeof(*e));
    if (!e)
        return err_set(ERR_NOMEM, "no memory for an engine");
    owner = &e->base;
    e->base = *base;
    e->base.ops = &cpu_ops;
    e->kv = kv_pool_base(pool);
    e->block_rows = MIN(c->max_rows, BLOCK_ROWS);
    e->par = par_create(c->n_threads);
    if (!e->par)
        return err_set(ERR_NOMEM, "cannot start %d threads", c->n_threads);
    size_t bytes = parts(e, NULL);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return err_set(ERR_NOMEM, "no memory for %zu bytes of activations", bytes);
    madvise(memory, bytes, MADV_DONTDUMP); // prompts do not belong in core files
    e->memory = memory;
    e->memory_bytes = bytes;
    parts(e, memory);
    *ret = take(&owner);
    return ERR_OK;
}
