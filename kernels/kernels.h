/* kernels.h: every operation of the model, as a C ABI.
 *
 * Each operation has one argument struct and a plain C reference, name_ref: host pointers, fp32
 * arithmetic, a fixed order of summation per output element that does not depend on how many rows
 * are computed together. So a row has the same bits alone or in any batch, in a prompt or while
 * decoding, and for any number of threads. That is what makes "one text, whatever the path"
 * provable.
 *
 * Shapes are row-major. Weights are bf16 as in the checkpoint (uint16_t holds the bits),
 * activations and KV pages fp32 in the references. T rows of tokens, H hidden size, V vocabulary.
 * References split work over `par` (NULL = the calling thread) and allocate nothing.
 * They are compiled once per instruction set (isa.h); builds with FMA agree bit for bit.
 */
#ifndef BATON_KERNELS_H
#define BATON_KERNELS_H

#include <stdint.h>

#define KV_PAGE_TOKENS 64
#define MLA_LATENT     512                     /* kv_lora_rank */
#define MLA_ROPE       64                      /* qk_rope_head_dim */
#define MLA_NOPE       192                     /* qk_nope_head_dim */
#define MLA_V          256                     /* v_head_dim */
#define MLA_QK         (MLA_NOPE + MLA_ROPE)   /* 256 */
#define KV_WIDTH       (MLA_LATENT + MLA_ROPE) /* 576 values per token and layer */

typedef uint16_t bf16_t;

/* A pool of threads for the references. */
struct par;
struct par *par_create(int n_threads); /* 0 = one per core; NULL when out of memory */
void par_destroy(struct par *par);
/* Calls fn(arg, begin, end) on disjoint ranges that cover [0, n), grain at least, and waits. */
void par_for(struct par *par, int64_t n, int64_t grain,
             void (*fn)(void *arg, int64_t begin, int64_t end), void *arg);

/* out[t] = table[token[t]], bf16 -> fp32. Tokens must be in [0, n_rows). */
struct embed_args {
    const bf16_t *table;  // [n_rows, H]
    const int32_t *token; // [T]
    float *out;           // [T, H]
    int T, H;
};
void embed_ref(const struct embed_args *a);

/* y = x * rsqrt(mean(x^2) + eps) * w. x and y may alias. Strides in values. */
struct rmsnorm_args {
    const float *x;  // [T, n], row stride x_stride
    const bf16_t *w; // [n]
    float *y;        // [T, n], row stride y_stride
    int T, n, x_stride, y_stride;
    float eps;
};
void rmsnorm_ref(const struct rmsnorm_args *a, struct par *par);

/* y[t,o] = sum_i x[t,i] * w[o,i] (+ y[t,o] if accumulate). */
struct gemm_args {
    const float *x;  // [T, n_in], row stride x_stride
    const bf16_t *w; // [n_out, n_in]
    float *y;        // [T, n_out], row stride y_stride; may not alias x
    int T, n_in, n_out, x_stride, y_stride;
    int accumulate;
};
void gemm_ref(const struct gemm_args *a, struct par *par);

/* Interleaved RoPE in place: pairs (x[2i], x[2i+1]) turn by position * theta^(-2i/64). */
struct rope_args {
    float *x;                // [T, heads, 64], strides in values
    const int32_t *position; // [T]
    int T, heads, row_stride, head_stride;
    float theta;
};
void rope_ref(const struct rope_args *a);

/* Writes latent (already normed) and roped key of T rows into their KV slots. */
struct kv_write_args {
    const float *latent;      // [T, 512]
    const float *rope;        // [T, 64], row stride rope_stride
    const int32_t *slot_page; // [T] page index in the pool
    const int32_t *slot_row;  // [T] row in the page, 0..63
    float *pool;              // [n_pages, n_layers, 64, 576]
    int T, n_layers, layer, rope_stride;
};
void kv_write_ref(const struct kv_write_args *a);

/* MLA over pages in the absorbed form, for prompt and decode rows alike:
 *   q_abs[h] = W_UK[h]^T q_nope[h];  s_j = (q_abs[h].c_j + q_rope[h].k_j) * scale;
 *   out[h] = W_UV[h] sum_j softmax(s)_j c_j, over j = 0 .. n_ctx[t]-1 (row t sees itself). */
struct mla_args {
    const float *q;             // [T, heads, 256]: 192 nope, then 64 roped
    const bf16_t *kv_b;         // [heads, 192 + 256, 512]: W_UK rows, then W_UV rows, per head
    const float *pool;          // [n_pages, n_layers, 64, 576]
    const int32_t *block_table; // [n_seqs, max_pages]
    const int32_t *seq;         // [T] row's sequence
    const int32_t *n_ctx;       // [T] KV slots that the row sees
    float *out;                 // [T, heads, 256]
    float *work;                // [par_threads, mla_work_floats(max n_ctx)]
    int T, heads, n_layers, layer, max_pages;
    float scale; // 1/16
};
void mla_ref(const struct mla_args *a, struct par *par);
/* Floats of `work` per thread of par: absorbed queries and scores of a few rows and heads. */
int64_t mla_work_floats(int64_t max_ctx);
int par_threads(const struct par *par); /* 1 for NULL */

/* The expanded form (k = W_UK c, v = W_UV c per slot and head): mathematically equal, cheaper for
 * long prompts on a GPU. Same arguments; the tests compare the two. */
void mla_expanded_ref(const struct mla_args *a, struct par *par);

/* DeepSeek-V3 style router: s = sigmoid(logit); the k experts with largest s + bias (lowest index
 * wins ties); weight = s / (sum of chosen s + 1e-20) * scale. fp32 throughout.
 * E is at most ROUTE_MAX_EXPERTS. */
#define ROUTE_MAX_EXPERTS 512
struct route_args {
    const float *logits; // [T, E]
    const float *bias;   // [E]
    int32_t *expert;     // [T, k], in descending order of s + bias
    float *weight;       // [T, k]
    int T, E, k;
    float scale;
};
void route_ref(const struct route_args *a);

/* h = silu(gate) * up, in place over gate. */
struct swiglu_args {
    float *gate;     // [T, n]
    const float *up; // [T, n]
    int64_t n;       // T * n values in all
};
void swiglu_ref(const struct swiglu_args *a);

/* y[t] += sum over chosen experts of weight * down_e(silu(gate_e x) * up_e x), added in ascending
 * expert order for every row, then the shared expert unscaled. */
struct moe_args {
    const float *x;                                      // [T, H]
    const bf16_t *gate, *up;                             // [E, F, H]
    const bf16_t *down;                                  // [E, H, F]
    const bf16_t *shared_gate, *shared_up, *shared_down; // [F, H], [F, H], [H, F]
    const int32_t *expert;                               // [T, k]
    const float *weight;                                 // [T, k]
    float *y;                                            // [T, H], accumulated into
    float *work;                                         // moe_work_floats(T, ...)
    int T, H, F, E, k;
};
void moe_ref(const struct moe_args *a, struct par *par);
int64_t moe_work_floats(int T, int H, int F, int E, int k);

/* idx[t] = the largest of x[t, 0..n_valid), lowest index wins ties. */
struct argmax_args {
    const float *x; // [T, n]
    int32_t *idx;   // [T]
    int T, n, n_valid;
};
void argmax_ref(const struct argmax_args *a);

/* An id of a text, for the penalties. */
struct sample_seen {
    int32_t id, count; // how often in the output; 0: only in the prompt
};
#define SAMPLE_MAX_AHEAD 32

/* One draw per row: mask, bias, penalties, temperature, top-k, top-p, min-p, then Gumbel-max with
 * noise from Philox4x32-10 keyed by (seed), counter (position, id / 4, 0, 0). A pure function of
 * its row. Ids in the lists that are no tokens do nothing. */
struct sample_row {
    uint64_t seed;
    int32_t position;  // absolute position of the token that is drawn
    float temperature; // 0 = greedy: argmax of the penalised logits
    float top_p, min_p;
    float presence, frequency, repetition;
    int32_t top_k;
    int32_t n_banned;        // ids that may not be drawn (eos before min_tokens)
    const int32_t *banned;   // [n_banned]
    int32_t n_bias;          // before everything else but the mask: logit[id] += value,
    const int32_t *bias_id;  // [n_bias] in the list's order where an id comes twice
    const float *bias_value; // [n_bias]
    const uint32_t *allowed; // [ceil(V / 32)] bit id % 32 of word id / 32: may be drawn; or NULL
    int32_t n_seen;          // ids that penalties apply to: those of prompt and output, each
    const struct sample_seen *seen; // [n_seen] once
    int32_t n_ahead; // ids that also count as output: the drafts before this row in its window,
    const int32_t *ahead; // [n_ahead <= SAMPLE_MAX_AHEAD] since it only matters if all were right
    int32_t n_logprobs;   // -1 none, 0 the chosen id's, n: and the n best
};
struct sample_args {
    const float *logits;           // [T, V], not changed
    const struct sample_row *rows; // [T]
    int32_t *id;                   // [T]
    float *logprob;                // [T] log softmax of the unmodified logits, or NULL
    int32_t *top_id;               // [T, max_top] best first; lowest id first among equals
    float *top_logprob;            // [T, max_top]
    float *work;                   // [par_threads, 2 * V]
    int T, V, n_valid, max_top;    // ids >= n_valid are never drawn
};
void sample_ref(const struct sample_args *a, struct par *par);

/* Philox4x32-10 (Salmon et al., SC'11). */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4]);

#endif
