/* mla_ref.c: latent attention over pages, absorbed; and the expanded form that the tests compare.
 *
 * An item is up to 8 rows x 4 heads. Per head the weights are widened once for its rows (the
 * absorbed query before, the value projection after); per row the heads share every load of a
 * token's latent, which is what the latent form is for. How rows and heads are grouped depends on
 * the number of threads, but each (row, head) goes through the same additions:
 *   q_abs    over the 192 nope dimensions, ascending;
 *   score    16 lanes over 576 values, then vec.h's tree;
 *   softmax  16 lanes over j, then the tree; latent sum over j ascending; one division at the end;
 *   out      dot_tile.
 */
#include "kernels/vec.h"

#include <math.h>

#define ROWS    8
#define HEADS   4
#define COLUMNS 64                           /* latent columns per pass of the absorption */
#define VECS    (VEC_MANY_REGISTERS ? 4 : 2) /* vectors of columns per pass of the latent sum */
#define HEAD_W  ((int64_t)(MLA_NOPE + MLA_V) * MLA_LATENT)

struct plan {
    const struct mla_args *a;
    int rows, heads; /* per item */
    int64_t head_groups, max_ctx;
};

static struct plan plan_make(const struct mla_args *a, struct par *par);
static void items(void *arg, int64_t begin, int64_t end);
static void absorb(const struct mla_args *a, int t, int n_rows, int h, float *query);
static void attend(const struct mla_args *a, int t, int n_heads, float *query, float *score,
                   int64_t score_stride);

static int64_t padded(int64_t n) { return (n + SUM_LANES - 1) / SUM_LANES * SUM_LANES; }

int64_t mla_work_floats(int64_t max_ctx)
{
    return ROWS * HEADS * KV_WIDTH + HEADS * padded(max_ctx);
}

void mla_ref(const struct mla_args *a, struct par *par)
{
    struct plan p = plan_make(a, par);
    par_for(par, (a->T + p.rows - 1) / p.rows * p.head_groups, 1, items, &p);
}

/* Large items use the weights better; but first every thread should have one. */
static struct plan plan_make(const struct mla_args *a, struct par *par)
{
    struct plan p = {.a = a, .rows = ROWS, .heads = HEADS};
    int64_t want = par_threads(par) == 1 ? 1 : 2 * par_threads(par);
    for (;;) {
        p.head_groups = (a->heads + p.heads - 1) / p.heads;
        int64_t n = (a->T + p.rows - 1) / p.rows * p.head_groups;
        if (n >= want || (p.rows == 1 && p.heads == 1))
            break;
        if (p.rows > 1)
            p.rows = a->T < p.rows ? a->T : p.rows / 2;
        else if (n < par_threads(par))
            p.heads /= 2;
        else
            break;
    }
    for (int t = 0; t < a->T; t++)
        p.max_ctx = a->n_ctx[t] > p.max_ctx ? a->n_ctx[t] : p.max_ctx;
    return p;
}

static void items(void *arg, int64_t begin, int64_t end)
{
    const struct plan *p = arg;
    const struct mla_args *a = p->a;
    float *query = a->work + par_self() * mla_work_floats(p->max_ctx); // [rows, heads, 576]
    float *score = query + ROWS * HEADS * KV_WIDTH;
    for (int64_t i = begin; i < end; i++) {
        int t = (int)(i / p->head_groups) * p->rows, h = (int)(i % p->head_groups) * p->heads;
        int n_rows = a->T - t < p->rows ? a->T - t : p->rows;
        int n_heads = a->heads - h < p->heads ? a->heads - h : p->heads;
        for (int k = 0; k < n_heads; k++)
            absorb(a, t, n_rows, h + k, query + k * KV_WIDTH);
        for (int r = 0; r < n_rows; r++)
            attend(a, t + r, n_heads, query + r * HEADS * KV_WIDTH, score, padded(p->max_ctx));
        for (int k = 0; k < n_heads; k++)
            dot_tile(&(struct dot_tile){
                .x = query + k * KV_WIDTH,
                .w = a->kv_b + (h + k) * HEAD_W + MLA_NOPE * MLA_LATENT,
                .y = a->out + ((int64_t)t * a->heads + h + k) * MLA_V,
                .x_stride = HEADS * KV_WIDTH,
                .y_stride = (int64_t)a->heads * MLA_V,
                .w_stride = MLA_LATENT,
                .n_rows = n_rows,
                .n_out = MLA_V,
                .n_in = MLA_LATENT,
            });
    }
}

/* q_abs of R rows for N vectors of columns. */
VEC_INLINE void absorb_rows(const int R, const int N, float (*w)[COLUMNS], const float *q,
                            int64_t q_stride, float *to)
{
    vec sum[ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < N; i++)
            sum[r][i] = (vec){0};
    for (int d = 0; d < MLA_NOPE; d++) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float x = q[r * q_stride + d];
#pragma GCC unroll 4
            for (int i = 0; i < N; i++)
                sum[r][i] += vec_load(w[d] + i * VEC_WIDTH) * x;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < N; i++)
            vec_store(to + r * HEADS * KV_WIDTH + i * VEC_WIDTH, sum[r][i]);
}

/* query[r] = (W_UK[h]^T q_nope, q_rope) for rows t .. t + n_rows. */
static void absorb(const struct mla_args *a, int t, int n_rows, int h, float *query)
{
    float w[MLA_NOPE][COLUMNS];
    const bf16_t *from = a->kv_b + h * HEAD_W;
    const float *q = a->q + ((int64_t)t * a->heads + h) * MLA_QK;
    const int64_t q_stride = (int64_t)a->heads * MLA_QK, stride = HEADS * KV_WIDTH;
    for (int c = 0; c < MLA_LATENT; c += COLUMNS) {
        for (int d = 0; d < MLA_NOPE; d++)
            for (int i = 0; i < COLUMNS; i++)
                w[d][i] = bf16_to_f32(from[d * MLA_LATENT + c + i]);
        int r = 0;
        for (; VEC_MANY_REGISTERS && r + 8 <= n_rows; r += 8)
            for (int i = 0; i < COLUMNS; i += 2 * VEC_WIDTH)
                absorb_rows(8, 2, (float(*)[COLUMNS])(w[0] + i), q + r * q_stride, q_stride,
                            query + r * stride + c + i);
        for (; r + 4 <= n_rows; r += 4)
            for (int i = 0; i < COLUMNS; i += 2 * VEC_WIDTH)
                absorb_rows(4, 2, (float(*)[COLUMNS])(w[0] + i), q + r * q_stride, q_stride,
                            query + r * stride + c + i);
        for (; r < n_rows; r++)
            for (int i = 0; i < COLUMNS; i += 4 * VEC_WIDTH)
                absorb_rows(1, 4, (float(*)[COLUMNS])(w[0] + i), q + r * q_stride, q_stride,
                            query + r * stride + c + i);
    }
    for (int r = 0; r < n_rows; r++)
        memcpy(query + r * stride + MLA_LATENT, q + r * q_stride + MLA_NOPE,
               MLA_ROPE * sizeof(float));
}

/* Scores of N heads against four neighbouring slots. */
VEC_INLINE void scores(const int N, const float *query, const float *kv, float scale, float *to,
                       int64_t stride)
{
    float lanes[HEADS][4][SUM_LANES];
    for (int strip = 0; strip < SUM_LANES; strip += VEC_WIDTH) {
        vec sum[HEADS][4];
#pragma GCC unroll 4
        for (int k = 0; k < N; k++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[k][j] = (vec){0};
        for (int i = strip; i < KV_WIDTH; i += SUM_LANES) {
            vec c[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                c[j] = vec_load(kv + j * KV_WIDTH + i);
#pragma GCC unroll 4
            for (int k = 0; k < N; k++) {
                vec q = vec_load(query + k * KV_WIDTH + i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sum[k][j] += q * c[j];
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < N; k++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                vec_store(lanes[k][j] + strip, sum[k][j]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < N; k++)
        *(vec4_mem *)(to + k * stride) = lanes_sum4(lanes[k]) * scale;
}

/* Adds n slots' latents, weighted, to VECS vectors of columns of N heads' sums. */
VEC_INLINE void weighted(const int N, const float *p, int64_t stride, const float *kv, int n,
                         float *to)
{
    vec sum[HEADS][VECS];
#pragma GCC unroll 4
    for (int k = 0; k < N; k++)
#pragma GCC unroll 4
        for (int i = 0; i < VECS; i++)
            sum[k][i] = vec_load(to + k * KV_WIDTH + i * VEC_WIDTH);
    for (int j = 0; j < n; j++) {
        vec c[VECS];
#pragma GCC unroll 4
        for (int i = 0; i < VECS; i++)
            c[i] = vec_load(kv + j * KV_WIDTH + i * VEC_WIDTH);
#pragma GCC unroll 4
        for (int k = 0; k < N; k++) {
            float x = p[k * stride + j];
#pragma GCC unroll 4
            for (int i = 0; i < VECS; i++)
                sum[k][i] += c[i] * x;
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < N; k++)
#pragma GCC unroll 4
        for (int i = 0; i < VECS; i++)
            vec_store(to + k * KV_WIDTH + i * VEC_WIDTH, sum[k][i]);
}

/* Replaces n scores by e^(score - max) and returns their sum. Room up to a multiple of 16. */
VEC_INLINE float softmax(float *score, int64_t n)
{
    float max = score[0], lanes[SUM_LANES];
    vec most = {0}, sum[VEC_STRIPS] = {0};
    for (int64_t j = n; j < padded(n); j++)
        score[j] = -INFINITY;
    most += max;
    for (int64_t j = 0; j < n; j += VEC_WIDTH)
        most = vec_max(vec_load(score + j), most);
    for (int i = 0; i < VEC_WIDTH; i++)
        max = most[i] > max ? most[i] : max;
    for (int64_t j = 0; j < n; j += SUM_LANES)
        for (int s = 0; s < VEC_STRIPS; s++) {
            float *at = score + j + s * VEC_WIDTH;
            vec p = vec_exp(vec_load(at) - max);
            vec_store(at, p);
            sum[s] += p;
        }
    for (int s = 0; s < VEC_STRIPS; s++)
        vec_store(lanes + s * VEC_WIDTH, sum[s]);
    return lanes_sum(lanes);
}

VEC_INLINE const float *page_find(const struct mla_args *a, int t, int64_t j)
{
    int64_t page = a->block_table[(int64_t)a->seq[t] * a->max_pages + j / KV_PAGE_TOKENS];
    return a->pool + (page * a->n_layers + a->layer) * KV_PAGE_TOKENS * KV_WIDTH;
}

VEC_INLINE void attend_heads(const int N, const struct mla_args *a, int t, float *query,
                             float *score, int64_t stride)
{
    int n_ctx = a->n_ctx[t];
    for (int j = 0; j < n_ctx; j += KV_PAGE_TOKENS) {
        const float *kv = page_find(a, t, j);
        int n = n_ctx - j < KV_PAGE_TOKENS ? n_ctx - j : KV_PAGE_TOKENS;
        for (int i = 0; i < n; i += 4) // the last four may reach past n_ctx, not past the page
            scores(N, query, kv + i * KV_WIDTH, a->scale, score + j + i, stride);
    }
    float total[HEADS];
    for (int k = 0; k < N; k++) {
        total[k] = n_ctx ? softmax(score + k * stride, n_ctx) : 1.0f;
        memset(query + k * KV_WIDTH, 0, MLA_LATENT * sizeof(float));
    }
    for (int j = 0; j < n_ctx; j += KV_PAGE_TOKENS) {
        const float *kv = page_find(a, t, j);
        int n = n_ctx - j < KV_PAGE_TOKENS ? n_ctx - j : KV_PAGE_TOKENS;
        for (int c = 0; c < MLA_LATENT; c += VECS * VEC_WIDTH)
            weighted(N, score + j, stride, kv + c, n, query + c);
    }
    for (int k = 0; k < N; k++) {
        float scale = 1.0f / total[k];
        for (int c = 0; c < MLA_LATENT; c += VEC_WIDTH)
            vec_store(query + k * KV_WIDTH + c, vec_load(query + k * KV_WIDTH + c) * scale);
    }
}

/* Attention of row t; the latent sums replace the absorbed queries. */
static void attend(const struct mla_args *a, int t, int n_heads, float *query, float *score,
                   int64_t score_stride)
{
    if (n_heads == 4)
        attend_heads(4, a, t, query, score, score_stride);
    else if (n_heads == 3)
        attend_heads(3, a, t, query, score, score_stride);
    else if (n_heads == 2)
        attend_heads(2, a, t, query, score, score_stride);
    else
        attend_heads(1, a, t, query, score, score_stride);
}

/* ---- the expanded form: definition only, a weight product per slot and head -------------------
 */

static void expanded_items(void *arg, int64_t begin, int64_t end);

void mla_expanded_ref(const struct mla_args *a, struct par *par)
{
    struct plan p = plan_make(a, par);
    par_for(par, (int64_t)a->T * a->heads, 1, expanded_items, &p);
}

static void expanded_items(void *arg, int64_t begin, int64_t end)
{
    const struct plan *p = arg;
    const struct mla_args *a = p->a;
    float *key = a->work + par_self() * mla_work_floats(p->max_ctx), *value = key + MLA_NOPE;
    float *score = key + ROWS * HEADS * KV_WIDTH;
    for (int64_t i = begin; i < end; i++) {
        int t = (int)(i / a->heads);
        const bf16_t *w = a->kv_b + i % a->heads * HEAD_W;
        const float *q = a->q + i * MLA_QK;
        float *out = a->out + i * MLA_V, max = -INFINITY, total = 0;
        struct dot_tile expand = {
            .y = key, .w_stride = MLA_LATENT, .n_rows = 1, .n_in = MLA_LATENT};
        for (int j = 0; j < a->n_ctx[t]; j++) {
            const float *kv = page_find(a, t, j) + j % KV_PAGE_TOKENS * KV_WIDTH;
            expand.x = kv;
            expand.w = w;
            expand.n_out = MLA_NOPE;
            dot_tile(&expand);
            float sum = 0;
            for (int d = 0; d < MLA_NOPE; d++)
                sum += q[d] * key[d];
            for (int d = 0; d < MLA_ROPE; d++)
                sum += q[MLA_NOPE + d] * kv[MLA_LATENT + d];
            score[j] = sum * a->scale;
            max = fmaxf(max, score[j]);
        }
        memset(out, 0, MLA_V * sizeof(float));
        expand.y = value;
        expand.w = w + MLA_NOPE * MLA_LATENT;
        expand.n_out = MLA_V;
        for (int j = 0; j < a->n_ctx[t]; j++) {
            expand.x = page_find(a, t, j) + j % KV_PAGE_TOKENS * KV_WIDTH;
            dot_tile(&expand);
            float weight = expf(score[j] - max);
            total += weight;
            for (int d = 0; d < MLA_V; d++)
                out[d] += weight * value[d];
        }
        for (int d = 0; d < MLA_V && total > 0; d++)
            out[d] /= total;
    }
}
