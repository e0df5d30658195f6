/* engine_cuda.c: the forward pass on one Hopper GPU.
 *
 * The same batch, the same order of operations as engine_cpu.c, on bf16 activations. Matrix
 * products of many rows are cuBLAS's (fp32 accumulation); those of few, experts, attention and the
 * small operations are kernels/cuda.h. Attention has two forms: rows of a decode step read the
 * pages as they are (absorbed form, one tile per sequence); long ragged prompts expand keys and
 * values first.
 *
 *   residual, norm -> [q_a | kv_a] -> norms, RoPE, page write -> q_b -> MLA -> o_proj
 *        -> add + norm -> router, experts -> reduce + add + next norm
 *
 * What a call needs from the host goes over in one copy from pinned memory. Decode-shaped passes
 * are some 650 launches of a few microseconds: a shape that comes a second time is captured as a
 * CUDA graph and replayed from then on (batch 1: see step_bench).
 */
#include "common/engine/device_cuda.h"

#include <cublas_v2.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"
#include "common/engine/engine_impl.h"

#define ALIGN 256
#define ROWS_AS_DECODE                                                                             \
    2048                 /* ragged batches up to here use the decode kernel, a row a sequence      \
                          */
#define SHORT_ROWS    16 /* sequences with fewer rows are never worth expanding keys for */
#define WORKSPACE     (32u << 20)
#define MAX_GRAPHS    256
#define DRAW_BYTES    (16u << 20) /* rows of a draw and what they point to; one row always fits */
#define GRAPH_BYTES   (512ull << 20) /* kept free for them */
#define LIBRARY_BYTES (256ull << 20) /* kept free for code that the libraries load later */

enum attention_form {
    FORM_DECODE,   // sequences of q_rows rows each
    FORM_ROWS,     // every row as a sequence of its own
    FORM_EXPANDED, // long ragged sequences
};

/* What the launches of a pass depend on, apart from what the host block carries. n_seqs: of the
 * attention; max_ctx: whole pages, bounds every context. */
struct shape {
    int draft, want_ids, form, n_rows, n_seqs, n_logits, q_rows, max_ctx;
};

struct graph {
    struct shape shape;
    cudaGraphExec_t exec; // NULL: seen once, not captured yet
    uint64_t used;
};

struct engine_cuda {
    struct engine base;
    int device;
    cudaStream_t stream;
    cublasHandle_t blas;
    cu_bf16 *pool;
    int max_pages; // of one sequence

    const char *arena; // the weights
    char *memory;
    size_t memory_bytes;
    /* rows */
    float *residual, *delta;                 // [R, H]
    cu_bf16 *norm;                           // [R, H]
    cu_bf16 *hidden, *draft_hidden, *import; // [R, H], [R, H], [imports, H]
    cu_bf16 *qkv, *q_a, *q, *absorbed;       // [R, lora + 576], [R, lora], [R, h, 256], [R, h, 576]
    cu_bf16 *latent_out, *attention;         // [R, h, 512], [R, h, 256]
    cu_bf16 *gate_up, *mlp;                  // [R, 2I], [R, I]
    cu_bf16 *expert_h, *expert_y;            // [R(k+1), F], [R(k+1), H]
    cu_bf16 *joined;                         // [R, 2H]
    cu_bf16 *logit_rows;                     // [max_logits, H]
    cu_bf16 *kv_latent, *k_rope, *kv_up;     // [expanded, 512], [expanded, 64], [expanded, h, 448]
    float *turn;                             // [R, 32, 2]
    float *logits, *draft_logits, *router_weight;
    int32_t *slot_token, *token_slot, *expert_start, *ids;
    int32_t *host_ids;         // pinned: [2, max_logits] of a draft: of all, of those with masks
    struct sample_row *masked; // [max_logits]
    int32_t *masked_idx;       // [max_logits]
    int32_t *route_work, *moe_work;
    void *blas_work, *mla_work;
    int n_expanded;
    /* what a batch brings from the host, one block: see block_lay_out */
    int32_t *host, *dev;
    int32_t *token, *position, *slot_page, *slot_row, *logit_row, *block_table, *n_ctx, *q_start,
        *kv_start, *source, *idx;
    /* draws */
    char *draw_host, *draw_dev;   // pinned, device: see draw_pack
    float *logprob, *top_logprob; // [max_logits], [max_logits, CU_SAMPLE_MAX_TOP]
    int32_t *top_id;              // [max_logits, CU_SAMPLE_MAX_TOP]
    cudaEvent_t begun, ended;     // of a pass's launches
    struct graph graphs[MAX_GRAPHS];
    uint64_t n_passes;
};

static struct engine_cuda *of(struct engine *e) { return (struct engine_cuda *)e; }

#define BLAS(call)                                                                                 \
    do {                                                                                           \
        cublasStatus_t blas_ = (call);                                                             \
        if (blas_ != CUBLAS_STATUS_SUCCESS)                                                        \
            return err_set(ERR_CUDA, "%s: %s", #call, cublasGetStatusString(blas_));               \
    } while (0)

/* ---- memory ---------------------------------------------------------------------------------- */

static size_t mla_work_bytes(const struct engine_cuda *c)
{
    const struct engine_config *g = &c->base.config;
    int heads = c->base.m->n_heads, rows = MIN(g->max_rows, ROWS_AS_DECODE);
    return MAX(cu_mla_decode_work_bytes(g->max_seqs, 8, heads, g->max_ctx),
               cu_mla_decode_work_bytes(rows, 1, heads, g->max_ctx));
}

/* Cuts base into the engine's arrays (base NULL: only adds up). Returns the bytes. */
static size_t parts(struct engine_cuda *c, char *base)
{
    const struct model_config *m = c->base.m;
    const struct engine_config *g = &c->base.config;
    size_t R = (size_t)g->max_rows, H = (size_t)m->hidden, V = (size_t)m->vocab, at = 0;
    size_t heads = (size_t)m->n_heads, E = (size_t)m->n_experts, k = (size_t)m->n_experts_per_token;
    size_t F = (size_t)m->moe_intermediate, I = (size_t)m->intermediate;
    size_t slots = R * (k + 1), X = (size_t)c->n_expanded, L = (size_t)g->max_logits;
    const struct {
        void *to;
        size_t bytes;
    } list[] = {
        {&c->residual, R * H * 4},
        {&c->norm, R * H * 2},
        {&c->delta, R * H * 4},
        {&c->hidden, R * H * 2},
        {&c->draft_hidden, R * H * 2},
        {&c->import, (size_t)g->max_imports * H * 2},
        {&c->qkv, R * ((size_t)m->q_lora_rank + KV_WIDTH) * 2},
        {&c->q_a, R * (size_t)m->q_lora_rank * 2},
        {&c->q, R * heads * MLA_QK * 2},
        {&c->absorbed, R * heads * KV_WIDTH * 2},
        {&c->latent_out, R * heads * MLA_LATENT * 2},
        {&c->attention, R * heads * MLA_V * 2},
        {&c->gate_up, R * 2 * I * 2},
        {&c->mlp, R * I * 2},
        {&c->expert_h, slots * F * 2},
        {&c->expert_y, slots * H * 2},
        {&c->joined, R * 2 * H * 2},
        {&c->logit_rows, L * H * 2},
        {&c->kv_latent, X * MLA_LATENT * 2},
        {&c->k_rope, X * MLA_ROPE * 2},
        {&c->kv_up, X * heads * (MLA_NOPE + MLA_V) * 2},
        {&c->turn, R * MLA_ROPE * 4},
        {&c->logits, L * V * 4},
        {&c->draft_logits, L * V * 4},
        {&c->router_weight, slots * 4},
        {&c->slot_token, slots * 4},
        {&c->token_slot, slots * 4},
        {&c->expert_start, (E + 2) * 4},
        {&c->ids, 2 * L * 4},
        {&c->draw_dev, DRAW_BYTES},
        {&c->logprob, L * 4},
        {&c->top_id, L * CU_SAMPLE_MAX_TOP * 4},
        {&c->top_logprob, L * CU_SAMPLE_MAX_TOP * 4},
        {&c->route_work, cu_route_work_bytes(g->max_rows, m->n_experts, m->n_experts_per_token)},
        {&c->moe_work, cu_moe_work_bytes(g->max_rows, m->n_experts, m->n_experts_per_token)},
        {&c->blas_work, WORKSPACE},
        {&c->mla_work, mla_work_bytes(c)},
    };
    for (size_t i = 0; i < ARRAY_LEN(list); i++) {
        if (base) {
            void *p = base + at;
            memcpy(list[i].to, &p, sizeof(p));
        }
        at += (list[i].bytes + ALIGN - 1) / ALIGN * ALIGN;
    }
    return at;
}

/* Cuts the host block into arrays for a pass; the device block has the same layout. The places
 * depend on the pass's shape only, as those of a captured graph must. Returns the values. */
static size_t block_lay_out(struct engine_cuda *c, int32_t *base, const struct shape *s)
{
    size_t R = (size_t)s->n_rows, S = (size_t)s->n_seqs, at = 0;
    const struct {
        int32_t **to;
        size_t n;
    } list[] = {
        {&c->token, R},
        {&c->position, R},
        {&c->slot_page, R},
        {&c->slot_row, R},
        {&c->source, R},
        {&c->idx, R},
        {&c->logit_row, (size_t)s->n_logits},
        {&c->n_ctx, S},
        {&c->q_start, s->form == FORM_EXPANDED ? 2 * S + 1 : 0},
        {&c->kv_start, s->form == FORM_EXPANDED ? 2 * S + 1 : 0},
        {&c->block_table, S * (size_t)(s->max_ctx / KV_PAGE_TOKENS)},
    };
    for (size_t i = 0; i < ARRAY_LEN(list); i++) {
        *list[i].to = base + at;
        at += (list[i].n + 63) / 64 * 64;
    }
    return at;
}

/* The most that any pass needs. */
static size_t block_values(struct engine_cuda *c)
{
    const struct engine_config *g = &c->base.config;
    return block_lay_out(
        c, NULL,
        &(struct shape){.form = FORM_EXPANDED,
                        .n_rows = g->max_rows,
                        .n_seqs = MAX(g->max_seqs, MIN(g->max_rows, ROWS_AS_DECODE)),
                        .n_logits = g->max_logits,
                        .max_ctx = c->max_pages * KV_PAGE_TOKENS});
}

static int32_t *on_device(const struct engine_cuda *c, const int32_t *host)
{
    return c->dev + (host - c->host);
}

/* A weight's place in the device's copy of the arena. */
static const cu_bf16 *weight(const struct engine_cuda *c, const void *host)
{
    return (const cu_bf16 *)(c->arena + ((const char *)host - (const char *)c->base.w->arena));
}

static void cuda_destroy(struct engine *e)
{
    struct engine_cuda *c = of(e);
    if (c->stream)
        cudaStreamSynchronize(c->stream);
    for (int i = 0; i < MAX_GRAPHS; i++)
        if (c->graphs[i].exec)
            cudaGraphExecDestroy(c->graphs[i].exec);
    if (c->blas)
        cublasDestroy(c->blas);
    if (c->begun)
        cudaEventDestroy(c->begun);
    if (c->ended)
        cudaEventDestroy(c->ended);
    cudaFree(c->memory);
    cudaFree(c->dev);
    cudaFreeHost(c->host);
    cudaFreeHost(c->host_ids);
    cudaFreeHost(c->draw_host);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    free(c->masked);
    free(c->masked_idx);
    free(c);
}

static enum err take_memory(struct engine_cuda *c)
{
    const struct engine_config *g = &c->base.config;
    size_t need = parts(c, NULL), host_bytes = block_values(c) * 4;
    size_t have = 0, total = 0;
    CUDA(cudaMemGetInfo(&have, &total));
    if (need + host_bytes > have)
        return err_set(ERR_NOMEM,
                       "the engine's workspaces need %zu MiB of device memory, %zu MiB are free",
                       (need + host_bytes) >> 20, have >> 20);
    c->memory_bytes = parts(c, NULL);
    CUDA(cudaMalloc((void **)&c->memory, c->memory_bytes));
    parts(c, c->memory);
    CUDA(cudaMemset(
        c->moe_work, 0,
        cu_moe_work_bytes(g->max_rows, c->base.m->n_experts, c->base.m->n_experts_per_token)));
    CUDA(cudaMemset(
        c->route_work, 0,
        cu_route_work_bytes(g->max_rows, c->base.m->n_experts, c->base.m->n_experts_per_token)));
    CUDA(cudaMemset(c->mla_work, 0, mla_work_bytes(c)));
    CUDA(cudaMallocHost((void **)&c->host, host_bytes));
    CUDA(cudaMalloc((void **)&c->dev, host_bytes));
    CUDA(cudaMallocHost((void **)&c->draw_host, DRAW_BYTES));
    CUDA(cudaMallocHost((void **)&c->host_ids, 2 * sizeof(int32_t) * (size_t)g->max_logits));
    c->masked = calloc((size_t)g->max_logits, sizeof(*c->masked));
    c->masked_idx = calloc((size_t)g->max_logits, sizeof(*c->masked_idx));
    if (!c->masked || !c->masked_idx)
        return err_set(ERR_NOMEM, "no memory for an engine's drafts");
    CUDA(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking));
    CUDA(cudaEventCreate(&c->begun));
    CUDA(cudaEventCreate(&c->ended));
    BLAS(cublasCreate(&c->blas));
    BLAS(cublasSetStream(c->blas, c->stream));
    BLAS(cublasSetWorkspace(c->blas, c->blas_work, WORKSPACE));
    // parts of a split sum stay fp32 where the output is bf16
    BLAS(cublasSetMathMode(c->blas,
                           CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    return ERR_OK;
}

/* ---- products -------------------------------------------------------------------------------- */

/* Whether the kernels for few rows do a product. */
static bool is_few(int T, int n_in) { return T <= 8 && n_in % 8 == 0; }

/* y[T, n_out] = x[T, n_in] w[n_out, n_in]^T + beta y, rows packed; y bf16 or fp32. cuBLAS. */
static enum err product_many(struct engine_cuda *c, const cu_bf16 *x, const cu_bf16 *w, void *y,
                             int T, int n_in, int n_out, cudaDataType_t type, float beta)
{
    const float one = 1;
    if (T == 0)
        return ERR_OK;
    BLAS(cublasGemmEx(c->blas, CUBLAS_OP_T, CUBLAS_OP_N, n_out, T, n_in, &one, w, CUDA_R_16BF, n_in,
                      x, CUDA_R_16BF, n_in, &beta, y, type, n_out, CUBLAS_COMPUTE_32F,
                      CUBLAS_GEMM_DEFAULT));
    return ERR_OK;
}

/* y[T, n_out] = x[T, n_in] w[n_out, n_in]^T, rows packed; y bf16 or fp32. */
static enum err product(struct engine_cuda *c, const cu_bf16 *x, const cu_bf16 *w, void *y, int T,
                        int n_in, int n_out, cudaDataType_t type)
{
    if (T == 0 || !is_few(T, n_in))
        return product_many(c, x, w, y, T, n_in, n_out, type, 0);
    struct cu_dense_args a = {x, w, y, T, n_in, n_out, type == CUDA_R_32F};
    CUDA(cu_dense(&a, c->stream));
    return ERR_OK;
}

/* The residual stream plus x[T, n_in] w[H, n_in]^T: added to it at once, or left in delta for the
 * norm that follows to add; returns which. */
static enum err product_add(struct engine_cuda *c, const cu_bf16 *x, const cu_bf16 *w, int T,
                            int n_in, const float **ret_delta)
{
    int H = c->base.m->hidden;
    *ret_delta = is_few(T, n_in) ? c->delta : NULL;
    return *ret_delta ? product(c, x, w, c->delta, T, n_in, H, CUDA_R_32F)
                      : product_many(c, x, w, c->residual, T, n_in, H, CUDA_R_32F, 1);
}

/* Per head h: y[t, h, 0..n_out) = x[t, h, 0..n_in) times w[h], which is [n_out, n_in] (turned) or
 * [n_in, n_out]. Strides in values. x_head 0: all heads share x. */
static enum err head_product(struct engine_cuda *c, const cu_bf16 *x, int x_row, int x_head,
                             const cu_bf16 *w, bool turned, cu_bf16 *y, int y_row, int y_head,
                             int T, int n_in, int n_out)
{
    const float one = 1, zero = 0;
    if (T == 0)
        return ERR_OK;
    BLAS(cublasGemmStridedBatchedEx(c->blas, turned ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, n_out,
                                    T, n_in, &one, w, CUDA_R_16BF, turned ? n_in : n_out,
                                    (MLA_NOPE + MLA_V) * MLA_LATENT, x, CUDA_R_16BF, x_row, x_head,
                                    &zero, y, CUDA_R_16BF, y_row, y_head, c->base.m->n_heads,
                                    CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return ERR_OK;
}

/* ---- a batch --------------------------------------------------------------------------------- */

/* Rounds a count up, so that batches of similar size are one shape and share a graph. */
static int bucket(int n, int most)
{
    int step = n <= 16 ? 1 : n <= 64 ? 4 : n <= 256 ? 16 : 32;
    return MIN((n + step - 1) / step * step, MAX(n, most));
}

/* How this batch's attention runs. */
static enum err shape_of(const struct engine_cuda *c, const struct batch *b, struct shape *ret)
{
    struct shape s = {.form = FORM_DECODE,
                      .n_rows = b->n_rows,
                      .n_seqs = b->n_seqs,
                      .n_logits = b->n_logits,
                      .q_rows = b->n_seqs ? b->seq_start[1] : 0,
                      .max_ctx = 1};
    for (int i = 0; i < b->n_seqs; i++) {
        s.max_ctx = MAX(s.max_ctx, b->ctx_len[i]);
        if (b->seq_start[i + 1] - b->seq_start[i] != s.q_rows || s.q_rows > 8)
            s.form = FORM_ROWS;
    }
    if (s.form == FORM_ROWS && c->n_expanded > 0 &&
        (b->n_rows > ROWS_AS_DECODE || b->n_rows >= SHORT_ROWS * b->n_seqs))
        s.form = FORM_EXPANDED;
    if (s.form == FORM_ROWS && b->n_rows > ROWS_AS_DECODE)
        return err_set(ERR_INVALID, "a ragged batch of %d rows, at most %d are supported",
                       b->n_rows, ROWS_AS_DECODE);
    int max_pages = (s.max_ctx + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    *ret = s;
    ret->max_ctx = max_pages * KV_PAGE_TOKENS;
    if (s.form == FORM_EXPANDED)
        return ERR_OK;
    // The context only sizes how attention is split: rounded, growing by a token is the same shape.
    const struct engine_config *g = &c->base.config;
    int pages = 1;
    while (pages < max_pages)
        pages *= 2;
    ret->max_ctx = MIN(pages, c->max_pages) * KV_PAGE_TOKENS;
    if (s.form == FORM_ROWS) {
        ret->q_rows = 1;
        ret->n_seqs = ret->n_rows = bucket(s.n_rows, MIN(g->max_rows, ROWS_AS_DECODE));
        ret->n_logits = bucket(s.n_logits, g->max_logits);
        return ERR_OK;
    }
    int fits = MIN(g->max_seqs, g->max_rows / MAX(s.q_rows, 1));
    ret->n_seqs = bucket(s.n_seqs, fits);
    ret->n_rows = ret->n_seqs * s.q_rows;
    ret->n_logits = bucket(s.n_logits, g->max_logits);
    return ERR_OK;
}

static void block_row(struct engine_cuda *c, const struct batch *b, const struct hidden_ref *hidden,
                      int to, int seq, int row)
{
    int slot = b->ctx_len[seq] - (b->seq_start[seq + 1] - row);
    c->token[to] = b->token[row];
    c->position[to] = b->position[row];
    c->slot_page[to] = b->block_table[(int64_t)seq * b->max_pages + slot / KV_PAGE_TOKENS];
    c->slot_row[to] = slot % KV_PAGE_TOKENS;
    c->source[to] = hidden ? hidden[row].source : 0;
    c->idx[to] = hidden ? hidden[row].idx : 0;
}

static void block_seq(struct engine_cuda *c, const struct batch *b, const struct shape *s, int to,
                      int seq, int n_ctx)
{
    c->n_ctx[to] = n_ctx;
    memcpy(c->block_table + (int64_t)to * (s->max_ctx / KV_PAGE_TOKENS),
           b->block_table + (int64_t)seq * b->max_pages,
           sizeof(int32_t) * (size_t)((n_ctx + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS));
}

/* Sequences from s on whose slots fit the scratch of the expanded form together: how many, with how
 * many slots. */
static int expanded_group(const struct engine_cuda *c, const struct batch *b, int s, int *ret_slots)
{
    int n = 0, slots = 0;
    while (s + n < b->n_seqs && slots + b->ctx_len[s + n] <= c->n_expanded)
        slots += b->ctx_len[s + n++];
    *ret_slots = slots;
    return n;
}

/* Where each group's sequences start, in rows and in slots: n + 1 values from 2 s on, s its first.
 */
static void block_starts(struct engine_cuda *c, const struct batch *b)
{
    for (int s = 0, n, slots; s < b->n_seqs; s += n) {
        n = expanded_group(c, b, s, &slots);
        int32_t *q_start = c->q_start + 2 * s, *kv_start = c->kv_start + 2 * s;
        q_start[0] = kv_start[0] = 0;
        for (int i = 0; i < n; i++) {
            q_start[i + 1] = b->seq_start[s + i + 1] - b->seq_start[s];
            kv_start[i + 1] = kv_start[i] + b->ctx_len[s + i];
        }
    }
}

/* Fills the host block and sends it. Rows beyond the batch's own repeat its first sequence (its
 * first row): they compute and write what that one does, and read what the caches hold anyway. */
static enum err batch_upload(struct engine_cuda *c, const struct batch *b,
                             const struct hidden_ref *hidden, const struct shape *s)
{
    size_t values = block_lay_out(c, c->host, s);
    int n_rows = 0;
    for (int seq = 0; seq < b->n_seqs; seq++)
        for (int r = b->seq_start[seq]; r < b->seq_start[seq + 1]; r++) {
            if (s->form == FORM_ROWS)
                block_seq(c, b, s, n_rows, seq, b->ctx_len[seq] - (b->seq_start[seq + 1] - 1 - r));
            block_row(c, b, hidden, n_rows++, seq, r);
        }
    int first = 0; // that has rows
    while (n_rows < s->n_rows && b->seq_start[first + 1] == 0)
        first++;
    for (int i = 0; n_rows < s->n_rows; i++, n_rows++) {
        int row = s->form == FORM_ROWS ? 0 : i % s->q_rows;
        if (s->form == FORM_ROWS)
            block_seq(c, b, s, n_rows, first, b->ctx_len[first] - (b->seq_start[first + 1] - 1));
        block_row(c, b, hidden, n_rows, first, row);
    }
    for (int i = 0; s->form != FORM_ROWS && i < s->n_seqs; i++) {
        int seq = i < b->n_seqs ? i : 0;
        block_seq(c, b, s, i, seq, b->ctx_len[seq]);
    }
    if (s->form == FORM_EXPANDED)
        block_starts(c, b);
    for (int i = 0; i < s->n_logits; i++)
        c->logit_row[i] = b->logit_row[i < b->n_logits ? i : 0];
    CUDA(cudaMemcpyAsync(c->dev, c->host, values * 4, cudaMemcpyHostToDevice, c->stream));
    return ERR_OK;
}

/* Expanded attention, several sequences at a time as far as the scratch holds their slots. */
static enum err attention_expanded(struct engine_cuda *c, const struct batch *b,
                                   const struct shape *shape, int layer)
{
    const struct model_config *m = c->base.m;
    const struct layer_weights *l = &c->base.w->layers[layer];
    int heads = m->n_heads, max_pages = shape->max_ctx / KV_PAGE_TOKENS;
    for (int s = 0, n, slots; s < b->n_seqs; s += n) {
        n = expanded_group(c, b, s, &slots);
        int max_q = 0;
        for (int i = s; i < s + n; i++)
            max_q = MAX(max_q, b->seq_start[i + 1] - b->seq_start[i]);
        const int32_t *kv_start = on_device(c, c->kv_start + 2 * s);
        struct cu_gather_kv_args g = {
            .pool = c->pool,
            .block_table = on_device(c, c->block_table + (int64_t)s * max_pages),
            .kv_start = kv_start,
            .latent = c->kv_latent,
            .k_rope = c->k_rope,
            .S = n,
            .T_kv = slots,
            .max_pages = max_pages,
            .n_layers = c->base.kv_layers,
            .layer = layer,
        };
        CUDA(cu_gather_kv(&g, c->stream));
        TRY(product(c, c->kv_latent, weight(c, l->kv_b), c->kv_up, slots, MLA_LATENT,
                    heads * (MLA_NOPE + MLA_V), CUDA_R_16BF));
        struct cu_mla_prefill_args a = {
            .q = c->q + (int64_t)b->seq_start[s] * heads * MLA_QK,
            .turn = c->turn + (int64_t)b->seq_start[s] * MLA_ROPE,
            .kv = c->kv_up,
            .k_rope = c->k_rope,
            .q_start = on_device(c, c->q_start + 2 * s),
            .kv_start = kv_start,
            .out = c->attention + (int64_t)b->seq_start[s] * heads * MLA_V,
            .S = n,
            .T = b->seq_start[s + n] - b->seq_start[s],
            .heads = heads,
            .max_q = max_q,
            .scale = 1.f / 16,
        };
        CUDA(cu_mla_prefill(&a, c->stream));
    }
    return ERR_OK;
}

static enum err attention_absorbed(struct engine_cuda *c, const struct shape *s, int layer)
{
    const struct layer_weights *l = &c->base.w->layers[layer];
    const cu_bf16 *kv_b = weight(c, l->kv_b);
    int heads = c->base.m->n_heads, T = s->n_rows;
    if (is_few(T, MLA_LATENT)) {
        struct cu_absorb_args absorb = {.q = c->q,
                                        .kv_b = kv_b,
                                        .position = on_device(c, c->position),
                                        .absorbed = c->absorbed,
                                        .T = T,
                                        .heads = heads,
                                        .theta = c->base.m->rope_theta};
        CUDA(cu_absorb(&absorb, c->stream));
    } else {
        struct cu_rope_q_args rope = {.q = c->q,
                                      .absorbed = c->absorbed,
                                      .position = on_device(c, c->position),
                                      .T = T,
                                      .heads = heads,
                                      .theta = c->base.m->rope_theta};
        CUDA(cu_rope_q(&rope, c->stream));
        TRY(head_product(c, c->q, heads * MLA_QK, MLA_QK, kv_b, false, c->absorbed,
                         heads * KV_WIDTH, KV_WIDTH, T, MLA_NOPE, MLA_LATENT));
    }
    struct cu_mla_decode_args a = {
        .q = c->absorbed,
        .pool = c->pool,
        .block_table = on_device(c, c->block_table),
        .n_ctx = on_device(c, c->n_ctx),
        .out = c->latent_out,
        .work = c->mla_work,
        .S = s->n_seqs,
        .q_rows = s->q_rows,
        .heads = heads,
        .n_pages = c->base.n_pages,
        .n_layers = c->base.kv_layers,
        .layer = layer,
        .max_pages = s->max_ctx / KV_PAGE_TOKENS,
        .max_ctx = s->max_ctx,
        .scale = 1.f / 16,
    };
    if (cu_mla_few_fits(&a))
        CUDA(cu_mla_few(&a, c->stream));
    else
        CUDA(cu_mla_decode(&a, c->stream));
    if (is_few(T, MLA_LATENT)) {
        struct cu_v_up_args v_up = {c->latent_out, kv_b, c->attention, T, heads};
        CUDA(cu_v_up(&v_up, c->stream));
        return ERR_OK;
    }
    return head_product(c, c->latent_out, heads * MLA_LATENT, MLA_LATENT,
                        kv_b + MLA_NOPE * MLA_LATENT, true, c->attention, heads * MLA_V, MLA_V, T,
                        MLA_LATENT, MLA_V);
}

/* One layer. In: residual, and norm = input norm of it. Out: residual, and next = next_norm of it.
 */
static enum err layer_run(struct engine_cuda *c, const struct batch *b, const struct shape *s,
                          int layer, const bf16_t *next_norm, cu_bf16 *next)
{
    const struct model_config *m = c->base.m;
    const struct layer_weights *l = &c->base.w->layers[layer];
    const int T = s->n_rows, H = m->hidden, lora = m->q_lora_rank, heads = m->n_heads;

    TRY(product(c, c->norm, weight(c, l->q_a), c->qkv, T, H, lora + KV_WIDTH, CUDA_R_16BF));
    struct cu_qkv_args qkv = {
        .qkv = c->qkv,
        .q_norm = weight(c, l->q_a_norm),
        .kv_norm = weight(c, l->kv_a_norm),
        .position = on_device(c, c->position),
        .slot_page = on_device(c, c->slot_page),
        .slot_row = on_device(c, c->slot_row),
        .q_a = c->q_a,
        .pool = c->pool,
        .T = T,
        .q_lora = lora,
        .n_layers = c->base.kv_layers,
        .layer = layer,
        .eps = c->base.config.inner_norm_eps,
        .theta = m->rope_theta,
    };
    if (is_few(T, lora)) {
        CUDA(cu_qkv_dense(&qkv, weight(c, l->q_b), c->q, heads * MLA_QK, c->stream));
    } else {
        CUDA(cu_qkv_norm_write(&qkv, c->stream));
        TRY(product(c, c->q_a, weight(c, l->q_b), c->q, T, lora, heads * MLA_QK, CUDA_R_16BF));
    }
    if (s->form == FORM_EXPANDED)
        TRY(attention_expanded(c, b, s, layer));
    else
        TRY(attention_absorbed(c, s, layer));
    struct cu_add_norm_args add = {.residual = c->residual,
                                   .w = weight(c, l->post_attention_norm),
                                   .out = c->norm,
                                   .T = T,
                                   .H = H,
                                   .eps = m->norm_eps};
    TRY(product_add(c, c->attention, weight(c, l->o), T, heads * MLA_V, &add.delta));
    CUDA(cu_add_norm(&add, c->stream));
    if (l->mlp_gate) {
        TRY(product(c, c->norm, weight(c, l->mlp_gate), c->gate_up, T, H, 2 * m->intermediate,
                    CUDA_R_16BF));
        CUDA(cu_swiglu(c->gate_up, c->mlp, T, m->intermediate, c->stream));
        TRY(product_add(c, c->mlp, weight(c, l->mlp_down), T, m->intermediate, &add.delta));
        add.w = weight(c, next_norm);
        add.out = next;
        CUDA(cu_add_norm(&add, c->stream));
        return ERR_OK;
    }
    struct cu_route_args route = {
        .x = c->norm,
        .router = weight(c, l->router),
        .bias = (const float *)weight(c, l->router_bias),
        .slot_token = c->slot_token,
        .slot_weight = c->router_weight,
        .token_slot = c->token_slot,
        .expert_start = c->expert_start,
        .work = c->route_work,
        .T = T,
        .H = H,
        .E = m->n_experts,
        .k = m->n_experts_per_token,
        .scale = m->routed_scale,
    };
    CUDA(cu_route(&route, c->stream));
    struct cu_moe_args moe = {
        .x = c->norm,
        .gate = weight(c, l->expert_gate),
        .up = weight(c, l->expert_up),
        .down = weight(c, l->expert_down),
        .slot_token = c->slot_token,
        .expert_start = c->expert_start,
        .h = c->expert_h,
        .y = c->expert_y,
        .work = c->moe_work,
        .T = T,
        .H = H,
        .F = m->moe_intermediate,
        .E = m->n_experts,
        .k = m->n_experts_per_token,
    };
    CUDA(cu_moe_gate_up(&moe, c->stream));
    CUDA(cu_moe_down(&moe, c->stream));
    struct cu_moe_reduce_args reduce = {
        .y = c->expert_y,
        .token_slot = c->token_slot,
        .slot_weight = c->router_weight,
        .residual = c->residual,
        .norm = weight(c, next_norm),
        .out = next,
        .T = T,
        .H = H,
        .k = m->n_experts_per_token,
        .eps = m->norm_eps,
    };
    CUDA(cu_moe_reduce(&reduce, c->stream));
    return ERR_OK;
}

/* Logits of the batch's logit rows of `hidden`. */
static enum err head(struct engine_cuda *c, const struct shape *s, const bf16_t *w,
                     const cu_bf16 *hidden, float *logits)
{
    const struct model_config *m = c->base.m;
    CUDA(cu_gather_rows(hidden, on_device(c, c->logit_row), c->logit_rows, s->n_logits, m->hidden,
                        c->stream));
    // long enough for cuBLAS to be at the memory's rate with few rows, too
    return product_many(c, c->logit_rows, weight(c, w), logits, s->n_logits, m->hidden, m->vocab,
                        CUDA_R_32F, 0);
}

/* All launches of a main pass. */
static enum err launch_forward(struct engine_cuda *c, const struct batch *b, const struct shape *s)
{
    const struct model_config *m = c->base.m;
    const struct weights *w = c->base.w;
    CUDA(cu_embed(weight(c, w->embed), on_device(c, c->token), c->residual, s->n_rows, m->hidden,
                  c->stream));
    struct cu_add_norm_args first = {.residual = c->residual,
                                     .w = weight(c, w->layers[0].input_norm),
                                     .out = c->norm,
                                     .T = s->n_rows,
                                     .H = m->hidden,
                                     .eps = m->norm_eps};
    CUDA(cu_add_norm(&first, c->stream));
    for (int i = 0; i < m->n_layers; i++) {
        bool last = i + 1 == m->n_layers;
        TRY(layer_run(c, b, s, i, last ? w->norm : w->layers[i + 1].input_norm,
                      last ? c->hidden : c->norm));
    }
    return head(c, s, w->head, c->hidden, c->logits);
}

/* All launches of an MTP pass. */
static enum err launch_draft(struct engine_cuda *c, const struct batch *b, const struct shape *s)
{
    const struct model_config *m = c->base.m;
    const struct mtp_weights *mtp = &c->base.w->mtp;
    const struct layer_weights *l = &c->base.w->layers[m->n_layers];
    struct cu_mtp_input_args in = {
        .table = weight(c, mtp->embed),
        .token = on_device(c, c->token),
        .hidden = {[HIDDEN_MAIN] = c->hidden,
                   [HIDDEN_IMPORT] = c->import,
                   [HIDDEN_DRAFT] = c->draft_hidden},
        .source = on_device(c, c->source),
        .idx = on_device(c, c->idx),
        .enorm = weight(c, mtp->enorm),
        .hnorm = weight(c, mtp->hnorm),
        .out = c->joined,
        .T = s->n_rows,
        .H = m->hidden,
        .eps = m->norm_eps,
    };
    CUDA(cu_mtp_input(&in, c->stream));
    TRY(product(c, c->joined, weight(c, mtp->eh_proj), c->residual, s->n_rows, 2 * m->hidden,
                m->hidden, CUDA_R_32F));
    struct cu_add_norm_args first = {.residual = c->residual,
                                     .w = weight(c, l->input_norm),
                                     .out = c->norm,
                                     .T = s->n_rows,
                                     .H = m->hidden,
                                     .eps = m->norm_eps};
    CUDA(cu_add_norm(&first, c->stream));
    TRY(layer_run(c, b, s, m->n_layers, mtp->head_norm, c->draft_hidden));
    if (!s->want_ids)
        return ERR_OK;
    TRY(head(c, s, mtp->head, c->draft_hidden, c->draft_logits));
    CUDA(cu_argmax(c->draft_logits, c->ids, s->n_logits, m->vocab, m->n_token_ids, c->stream));
    return ERR_OK;
}

static enum err launch(struct engine_cuda *c, const struct batch *b, const struct shape *s)
{
    if (s->form == FORM_EXPANDED)
        CUDA(cu_rope_table(on_device(c, c->position), c->turn, s->n_rows, c->base.m->rope_theta,
                           c->stream));
    return s->draft ? launch_draft(c, b, s) : launch_forward(c, b, s);
}

/* The slot of this shape, or the least recently used one, emptied. */
static struct graph *graph_find(struct engine_cuda *c, const struct shape *s, bool *ret_known)
{
    struct graph *oldest = &c->graphs[0];
    for (int i = 0; i < MAX_GRAPHS; i++) {
        struct graph *g = &c->graphs[i];
        if (g->used && !memcmp(&g->shape, s, sizeof(*s))) {
            *ret_known = true;
            return g;
        }
        if (g->used < oldest->used)
            oldest = g;
    }
    if (oldest->exec)
        cudaGraphExecDestroy(oldest->exec);
    *oldest = (struct graph){.shape = *s};
    *ret_known = false;
    return oldest;
}

static enum err graph_capture(struct engine_cuda *c, const struct batch *b, struct graph *g)
{
    cudaGraph_t graph = NULL;
    CUDA(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal));
    enum err err = launch(c, b, &g->shape);
    cudaError_t ended = cudaStreamEndCapture(c->stream, &graph);
    if (err == ERR_OK && ended != cudaSuccess)
        err = err_set(ERR_CUDA, "capture of a decode pass: %s", cudaGetErrorString(ended));
    if (err == ERR_OK && cudaGraphInstantiate(&g->exec, graph, 0) != cudaSuccess)
        err = err_set(ERR_CUDA, "a decode pass of %d rows makes no graph", b->n_rows);
    if (graph)
        cudaGraphDestroy(graph);
    return err;
}

/* The launches of a pass, or the graph of a shape that was seen before. */
static enum err work(struct engine_cuda *c, const struct batch *b, const struct shape *s)
{
    if (s->form == FORM_EXPANDED || s->n_rows > c->base.config.max_graph_rows)
        return launch(c, b, s);
    bool known;
    struct graph *g = graph_find(c, s, &known);
    g->used = ++c->n_passes;
    if (!known)
        return launch(c, b, s);
    if (!g->exec)
        TRY(graph_capture(c, b, g));
    CUDA(cudaGraphLaunch(g->exec, c->stream));
    return ERR_OK;
}

/* Starts a pass. */
static enum err run(struct engine_cuda *c, const struct batch *b, const struct hidden_ref *hidden,
                    bool draft, bool want_ids)
{
    struct shape s = {0};
    CUDA(cudaSetDevice(c->device));
    engine_progress(&c->base);
    TRY(shape_of(c, b, &s));
    s.draft = draft;
    s.want_ids = want_ids;
    TRY(batch_upload(c, b, hidden, &s));
    CUDA(cudaEventRecord(c->begun, c->stream));
    TRY(work(c, b, &s));
    CUDA(cudaEventRecord(c->ended, c->stream));
    return ERR_OK;
}

/* Waits for all that was launched; like cudaStreamSynchronize, which polls too, but lends the
 * thread out. */
static enum err stream_wait(struct engine_cuda *c)
{
    cudaError_t at = cudaSuccess;
    while (c->base.meanwhile && (at = cudaStreamQuery(c->stream)) == cudaErrorNotReady) {
        (void)cudaGetLastError(); // "not ready" is no failure of whatever is launched next
        engine_meanwhile(&c->base, 0);
    }
    CUDA(at);
    CUDA(cudaStreamSynchronize(c->stream));
    return ERR_OK;
}

/* Waits for a pass and takes its time. */
static enum err cuda_wait(struct engine *e)
{
    struct engine_cuda *c = of(e);
    float ms = 0;
    TRY(stream_wait(c));
    CUDA(cudaEventElapsedTime(&ms, c->begun, c->ended));
    e->device_us = (uint32_t)(ms * 1000);
    return ERR_OK;
}

static enum err cuda_start(struct engine *e, const struct batch *b)
{
    return run(of(e), b, NULL, false, false);
}

/* ---- draws ----------------------------------------------------------------------------------- */

static bool is_plain_greedy(const struct sample_row *r)
{
    return !(r->temperature > 0) && !r->n_banned && !r->n_bias && !r->allowed && !r->n_seen &&
           !r->n_ahead && r->n_logprobs < 0;
}

/* Where the arrays of a draw go: one block of pinned memory and its twin on the device. */
struct draw_block {
    size_t used; // bytes
    bool full;
};

/* Puts n bytes into the block; returns their place on the device. */
static const void *draw_put(struct engine_cuda *c, struct draw_block *b, const void *from, size_t n)
{
    if (!from || n == 0)
        return NULL;
    if (b->used + n > DRAW_BYTES) {
        b->full = true;
        return NULL;
    }
    const void *place = c->draw_dev + b->used;
    memcpy(c->draw_host + b->used, from, n);
    b->used += (n + 15) / 16 * 16;
    return place;
}

/* As many rows as the block holds, with what they point to; at least one fits. Rows of one stream
 * name the same lists one after the other, rows of one grammar the same masks: those go over once.
 * Returns the number of rows. */
static int draw_pack(struct engine_cuda *c, int n, const int32_t *idx,
                     const struct sample_row *rows, size_t *ret_bytes)
{
    const size_t V = (size_t)c->base.m->vocab;
    struct draw_block b = {.used = (size_t)n * (sizeof(*rows) + sizeof(*idx)) + 64};
    struct sample_row *to = (struct sample_row *)c->draw_host;
    int32_t *to_idx = (int32_t *)(c->draw_host + (size_t)n * sizeof(*rows));
    b.used = (b.used + 15) / 16 * 16;
    struct mask {
        const void *host, *dev;
    } masks[64] = {0}; // sent lately, by address
    int i = 0;
    for (; i < n; i++) {
        const struct sample_row *r = &rows[i], *last = i ? &rows[i - 1] : NULL;
        struct sample_row d = *r;
        bool same = last && last->banned == r->banned && last->n_banned == r->n_banned;
        d.banned = same ? to[i - 1].banned
                        : draw_put(c, &b, r->banned, (size_t)r->n_banned * sizeof(*r->banned));
        same = last && last->bias_id == r->bias_id && last->n_bias == r->n_bias;
        d.bias_id = same ? to[i - 1].bias_id
                         : draw_put(c, &b, r->bias_id, (size_t)r->n_bias * sizeof(*r->bias_id));
        d.bias_value = same ? to[i - 1].bias_value
                            : draw_put(c, &b, r->bias_value, (size_t)r->n_bias * sizeof(float));
        struct mask *m = &masks[(uintptr_t)r->allowed / 64 % ARRAY_LEN(masks)];
        if (m->host != r->allowed)
            *m = (struct mask){r->allowed, draw_put(c, &b, r->allowed, (V + 31) / 32 * 4)};
        d.allowed = m->dev;
        d.ahead = draw_put(c, &b, r->ahead, (size_t)r->n_ahead * sizeof(*r->ahead));
        same = last && last->seen == r->seen && last->n_seen == r->n_seen;
        d.seen =
            same ? to[i - 1].seen : draw_put(c, &b, r->seen, (size_t)r->n_seen * sizeof(*r->seen));
        if (b.full)
            break;
        to[i] = d;
        to_idx[i] = idx[i];
    }
    *ret_bytes = b.used;
    return i;
}

/* Draws the drafts that have masks again, from the same logits. What does not fit into the block
 * keeps its argmax: a draft may be anything. Returns how many of masked_idx are drawn. */
static enum err draft_masked(struct engine_cuda *c, const struct batch *b, int *ret_n)
{
    int n = 0;
    for (int i = 0; i < b->n_logits; i++)
        if (batch_allowed(b, i)) {
            c->masked[n] = (struct sample_row){
                .top_p = 1, .repetition = 1, .n_logprobs = -1, .allowed = b->allowed[i]};
            c->masked_idx[n++] = i;
        }
    *ret_n = 0;
    if (n == 0)
        return ERR_OK;
    size_t n_bytes;
    struct cu_sample_args a = {
        .logits = c->draft_logits,
        .rows = (const struct sample_row *)c->draw_dev,
        .logit_row = (const int32_t *)(c->draw_dev + (size_t)n * sizeof(*c->masked)),
        .id = c->ids + c->base.config.max_logits,
        .T = draw_pack(c, n, c->masked_idx, c->masked, &n_bytes),
        .V = c->base.m->vocab,
        .n_valid = c->base.m->n_token_ids,
    };
    CUDA(cudaMemcpyAsync(c->draw_dev, c->draw_host, n_bytes, cudaMemcpyHostToDevice, c->stream));
    CUDA(cu_sample(&a, c->stream));
    CUDA(cudaMemcpyAsync(c->host_ids + c->base.config.max_logits, a.id,
                         sizeof(int32_t) * (size_t)a.T, cudaMemcpyDeviceToHost, c->stream));
    *ret_n = a.T;
    return ERR_OK;
}

static enum err cuda_draft(struct engine *e, const struct batch *b, const struct hidden_ref *hidden,
                           int32_t *ret_ids)
{
    struct engine_cuda *c = of(e);
    size_t n_bytes = ret_ids ? sizeof(int32_t) * (size_t)b->n_logits : 0;
    int n_masked = 0;
    TRY(run(c, b, hidden, true, ret_ids != NULL));
    if (n_bytes) { // a copy to memory that is not pinned would wait for the pass itself
        CUDA(cudaMemcpyAsync(c->host_ids, c->ids, n_bytes, cudaMemcpyDeviceToHost, c->stream));
        TRY(draft_masked(c, b, &n_masked));
    }
    TRY(cuda_wait(e));
    if (n_bytes)
        memcpy(ret_ids, c->host_ids, n_bytes);
    for (int i = 0; i < n_masked; i++)
        ret_ids[c->masked_idx[i]] = c->host_ids[e->config.max_logits + i];
    return ERR_OK;
}

/* Brings the draws of n rows back. */
static enum err draw_fetch(struct engine_cuda *c, int n, int max_top, int32_t *ret_ids,
                           float *ret_logprob, int32_t *ret_top_id, float *ret_top_logprob)
{
    size_t N = (size_t)n, n_top = N * (size_t)max_top;
    CUDA(cudaMemcpyAsync(ret_ids, c->ids, N * sizeof(int32_t), cudaMemcpyDeviceToHost, c->stream));
    if (ret_logprob)
        CUDA(cudaMemcpyAsync(ret_logprob, c->logprob, N * sizeof(float), cudaMemcpyDeviceToHost,
                             c->stream));
    if (ret_logprob && n_top) {
        CUDA(cudaMemcpyAsync(ret_top_id, c->top_id, n_top * sizeof(int32_t), cudaMemcpyDeviceToHost,
                             c->stream));
        CUDA(cudaMemcpyAsync(ret_top_logprob, c->top_logprob, n_top * sizeof(float),
                             cudaMemcpyDeviceToHost, c->stream));
    }
    CUDA(cudaStreamSynchronize(c->stream));
    return ERR_OK;
}

/* Rows [0, n) of the caller's. */
static enum err draw_some(struct engine_cuda *c, int n, const int32_t *idx,
                          const struct sample_row *rows, int max_top, bool logprobs, int *ret_n)
{
    bool greedy = true, in_order = true;
    for (int i = 0; i < n; i++) {
        greedy &= is_plain_greedy(&rows[i]);
        in_order &= idx[i] == idx[0] + i;
    }
    struct cu_sample_args a = {
        .logits = c->logits,
        .id = c->ids,
        .T = n,
        .V = c->base.m->vocab,
        .n_valid = c->base.m->n_token_ids,
        .greedy = greedy,
    };
    if (greedy && in_order) {
        a.logits += (size_t)idx[0] * (size_t)a.V;
    } else {
        size_t bytes;
        int all = n;
        a.T = draw_pack(c, n, idx, rows, &bytes);
        CUDA(cudaMemcpyAsync(c->draw_dev, c->draw_host, bytes, cudaMemcpyHostToDevice, c->stream));
        a.rows = (const struct sample_row *)c->draw_dev;
        a.logit_row = (const int32_t *)(c->draw_dev + (size_t)all * sizeof(*rows));
    }
    if (logprobs && !greedy) {
        a.max_top = max_top;
        a.logprob = c->logprob;
        a.top_id = c->top_id;
        a.top_logprob = c->top_logprob;
    }
    CUDA(cu_sample(&a, c->stream));
    *ret_n = a.T;
    return ERR_OK;
}

static enum err cuda_sample(struct engine *e, int n, const int32_t *idx,
                            const struct sample_row *rows, int max_top, int32_t *ret_ids,
                            float *ret_logprob, int32_t *ret_top_id, float *ret_top_logprob)
{
    struct engine_cuda *c = of(e);
    if (max_top > CU_SAMPLE_MAX_TOP)
        return err_set(ERR_INVALID, "%d best ids, at most %d are told", max_top, CU_SAMPLE_MAX_TOP);
    for (int at = 0, m = 0; at < n; at += m) {
        int64_t top = (int64_t)at * max_top;
        TRY(draw_some(c, n - at, idx + at, rows + at, max_top, ret_logprob != NULL, &m));
        TRY(draw_fetch(c, m, max_top, ret_ids + at, ret_logprob ? ret_logprob + at : NULL,
                       ret_top_id ? ret_top_id + top : NULL,
                       ret_top_logprob ? ret_top_logprob + top : NULL));
    }
    return ERR_OK;
}

static enum err cuda_export_hidden(struct engine *e, int row, float *ret)
{
    struct engine_cuda *c = of(e);
    int H = e->m->hidden;
    OWNED_MEM uint16_t *bits = malloc((size_t)H * 2);
    if (!bits)
        return err_set(ERR_NOMEM, "no memory for a hidden state");
    CUDA(cudaMemcpyAsync(bits, c->hidden + (size_t)row * (size_t)H, (size_t)H * 2,
                         cudaMemcpyDeviceToHost, c->stream));
    CUDA(cudaStreamSynchronize(c->stream));
    for (int i = 0; i < H; i++) {
        uint32_t word = (uint32_t)bits[i] << 16;
        memcpy(&ret[i], &word, sizeof(word));
    }
    return ERR_OK;
}

static enum err cuda_import_hidden(struct engine *e, int slot, const float *hidden)
{
    struct engine_cuda *c = of(e);
    int H = e->m->hidden;
    OWNED_MEM uint16_t *bits = malloc((size_t)H * 2);
    if (!bits)
        return err_set(ERR_NOMEM, "no memory for a hidden state");
    for (int i = 0; i < H; i++) { // exported values are bf16 already, so this is exact
        uint32_t word;
        memcpy(&word, &hidden[i], sizeof(word));
        bits[i] = (uint16_t)(word >> 16);
    }
    // Beside a pass that may be under way: it knows other slots.
    return device_put(c->base.config.device, c->import + (size_t)slot * (size_t)H, bits,
                      (size_t)H * 2);
}

static enum err cuda_read_logits(struct engine *e, bool draft, int row, float *ret)
{
    struct engine_cuda *c = of(e);
    size_t V = (size_t)e->m->vocab;
    CUDA(cudaMemcpy(ret, (draft ? c->draft_logits : c->logits) + (size_t)row * V, V * sizeof(float),
                    cudaMemcpyDeviceToHost));
    return ERR_OK;
}

static const struct engine_ops cuda_ops = {
    .destroy = cuda_destroy,
    .start = cuda_start,
    .wait = cuda_wait,
    .draft = cuda_draft,
    .sample = cuda_sample,
    .export_hidden = cuda_export_hidden,
    .import_hidden = cuda_import_hidden,
    .read_logits = cuda_read_logits,
};

static void size_up(struct engine_cuda *c)
{
    const struct engine_config *g = &c->base.config;
    c->max_pages = (g->max_ctx + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    c->n_expanded = g->max_seq_rows < SHORT_ROWS ? 0 : MAX(g->max_ctx, g->max_rows);
}

uint64_t engine_cuda_bytes(const struct engine *base)
{
    struct engine_cuda c = {.base = *base};
    size_up(&c);
    uint64_t graphs = base->config.max_graph_rows ? GRAPH_BYTES : 0;
    return parts(&c, NULL) + block_values(&c) * 4 + LIBRARY_BYTES + graphs;
}

static enum err set_up(struct engine_cuda *c, struct kv_pool *pool)
{
    CUDA(cudaSetDevice(c->device));
    c->pool = kv_pool_base(pool);
    size_up(c);
    c->arena = c->base.w->device_arena.base;
    return take_memory(c);
}

enum err engine_cuda_create(const struct engine *base, struct device *d, struct kv_pool *pool,
                            struct engine **ret)
{
    struct engine_cuda *c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for an engine");
    c->base = *base;
    c->base.ops = &cuda_ops;
    c->device = d->ordinal;
    enum err err = set_up(c, pool);
    if (err != ERR_OK) {
        cuda_destroy(&c->base);
        return err;
    }
    *ret = &c->base;
    return ERR_OK;
}
