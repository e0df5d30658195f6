/* cuda.h: the model's operations on a Hopper GPU, as a C ABI. The arithmetic is kernels.h's; here
 * activations and KV pages are bf16, sums fp32, logits and routing fp32.
 *
 * Every function is asynchronous on its stream, allocates nothing, never waits, works inside stream
 * capture, and returns cudaErrorInvalidValue for shapes that it does not do. All pointers are
 * device memory, 16-byte aligned. Row counts that change from step to step are read from the device
 * (`n_rows_dev`) where a CUDA graph must serve several batches: launches are sized for max_rows and
 * rows beyond the real count do nothing.
 */
#ifndef BATON_CUDA_H
#define BATON_CUDA_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef uint16_t cu_bf16; /* bits of a bfloat16, as in kernels.h */

/* ---- products of few rows (kernels/dense.cu) ---- */

/* These read weights before the kernels that precede them in the stream have ended: weights must
 * have been written before those kernels started. A row's results depend on nothing but the row.
 * T at most CU_DENSE_MAX_T, n_in a multiple of 8. */
#define CU_DENSE_MAX_T 16

/* y = x w^T. */
struct cu_dense_args {
    const cu_bf16 *x; // [T, n_in]
    const cu_bf16 *w; // [n_out, n_in]
    void *y;          // [T, n_out], fp32 or bf16
    int T, n_in, n_out, y_is_f32;
};
cudaError_t cu_dense(const struct cu_dense_args *a, cudaStream_t stream);

/* cu_qkv_norm_write (whose q_a is not written here) and q = normed q_a w^T in one launch. q_lora at
 * most 1024. */
struct cu_qkv_args;
cudaError_t cu_qkv_dense(const struct cu_qkv_args *a, const cu_bf16 *w, cu_bf16 *q, int n_out,
                         cudaStream_t stream);

/* absorbed[t, h] = [q_nope W_UK[h] | rope(q_rope)], where q[t, h] = [q_nope 192 | q_rope 64]. */
struct cu_absorb_args {
    const cu_bf16 *q;        // [T, heads, 256]
    const cu_bf16 *kv_b;     // [heads, 192 + 256, 512]: W_UK, then W_UV
    const int32_t *position; // [T]
    cu_bf16 *absorbed;       // [T, heads, 576]
    int T, heads;
    float theta;
};
cudaError_t cu_absorb(const struct cu_absorb_args *a, cudaStream_t stream);

/* out[t, h] = W_UV[h] latent[t, h]. */
struct cu_v_up_args {
    const cu_bf16 *latent; // [T, heads, 512]
    const cu_bf16 *kv_b;   // [heads, 192 + 256, 512]
    cu_bf16 *out;          // [T, heads, 256]
    int T, heads;
};
cudaError_t cu_v_up(const struct cu_v_up_args *a, cudaStream_t stream);

/* ---- mixture of experts (kernels/moe_route.cu, kernels/moe_gemm.cu) ---- */

/* Sorts token-expert pairs by expert and cuts them into tiles, on the device. The shared expert is
 * expert E with every token, weight 1. Slots: sorted position of a pair. */
struct cu_route_args {
    const cu_bf16 *x;      // [T, H] normed hidden state
    const cu_bf16 *router; // [E, H]
    const float *bias;     // [E]
    int32_t *slot_token;   // [T * (k + 1)] token of each slot, sorted by expert, then token
    float *slot_weight;    // [T * (k + 1)] routing weight of the slot (1 for the shared expert)
    int32_t *token_slot;   // [T, k + 1] where a token's pairs went, the shared expert's last
    int32_t *expert_start; // [E + 2] first slot of each expert; [E + 1] = number of slots
    int32_t *work;         // cu_route_work_bytes, zeroed once by the caller
    int T, H, E, k;
    float scale; // 1.8
};
cudaError_t cu_route(const struct cu_route_args *a, cudaStream_t stream);
size_t cu_route_work_bytes(int max_T, int E, int k);

/* h[slot] = silu(gate_e x[token]) * (up_e x[token]), then y[slot] = down_e h[slot]. Weights stream
 * through once; tiles come from expert_start on the device. cu_moe_down reads expert_start before
 * the launch that precedes it in the stream has ended: that must be cu_moe_gate_up or start after
 * cu_route has ended. */
struct cu_moe_args {
    const cu_bf16 *x;          // [T, H]
    const cu_bf16 *gate, *up;  // [E + 1, F, H], the shared expert last
    const cu_bf16 *down;       // [E + 1, H, F]
    const int32_t *slot_token; // as cu_route wrote them
    const int32_t *expert_start;
    cu_bf16 *h;        // [T * (k + 1), F]
    cu_bf16 *y;        // [T * (k + 1), H], not weighted; scratch of gate_up
    int32_t *work;     // cu_moe_work_bytes, zeroed once by the caller
    int T, H, F, E, k; // T: rows of this launch, chooses the tile shape
};
cudaError_t cu_moe_gate_up(const struct cu_moe_args *a, cudaStream_t stream);
cudaError_t cu_moe_down(const struct cu_moe_args *a, cudaStream_t stream);
size_t cu_moe_work_bytes(int max_T, int E, int k);

/* residual[t] += sum of the token's slots, each times its weight (fp32, in a fixed order), then
 * out[t] = rmsnorm(residual[t]) * norm (the next layer's input norm, or the final norm). */
struct cu_moe_reduce_args {
    const cu_bf16 *y;          // [T * (k + 1), H]
    const int32_t *token_slot; // [T, k + 1]
    const float *slot_weight;  // [T * (k + 1)]
    float *residual;           // [T, H]
    const cu_bf16 *norm;       // [H]
    cu_bf16 *out;              // [T, H]
    int T, H, k;
    float eps;
};
cudaError_t cu_moe_reduce(const struct cu_moe_reduce_args *a, cudaStream_t stream);

/* ---- attention over pages (kernels/mla_decode.cu, mla_few.cu, mla_prefill.cu) ---- */

/* Absorbed form: out[r, h] = sum_j softmax((q[r,h] . kv[j]) * scale)_j * kv[j][0..512). A sequence
 * has q_rows rows (1 + drafts), row i sees n_ctx[s] - q_rows + 1 + i slots. */
struct cu_mla_decode_args {
    const cu_bf16 *q;           // [S * q_rows, heads, 576]: absorbed 512, then roped 64
    const cu_bf16 *pool;        // [n_pages, n_layers, 64, 576]
    const int32_t *block_table; // [S, max_pages]
    const int32_t *n_ctx;       // [S] slots that the last row sees; 0: rows are skipped
    cu_bf16 *out;               // [S * q_rows, heads, 512]
    void *work;                 // cu_mla_decode_work_bytes, zeroed once by the caller
    int S, q_rows, heads, n_pages, n_layers, layer, max_pages;
    int max_ctx; // bound on n_ctx, sizes the split
    float scale;
};
cudaError_t cu_mla_decode(const struct cu_mla_decode_args *a, cudaStream_t stream);
size_t cu_mla_decode_work_bytes(int max_S, int max_q_rows, int heads, int max_ctx);

/* The same for few sequences with short contexts. Reads n_ctx, block_table and all slots of a
 * sequence but the last 16 before the kernels that precede it in the stream have ended. Needs no
 * work. */
int cu_mla_few_fits(const struct cu_mla_decode_args *a);
cudaError_t cu_mla_few(const struct cu_mla_decode_args *a, cudaStream_t stream);

/* Ragged rows, expanded form: W_UK c and W_UV c are given for each sequence's slots, packed, and
 * the roped keys, which all heads share. Queries are turned on the way. Row i of sequence s (n of
 * them) sees kv_len[s] - n + 1 + i slots. */
struct cu_mla_prefill_args {
    const cu_bf16 *q;        // [T, heads, 256]: 192 nope, 64 not turned yet
    const float *turn;       // [T, 32, 2]: cu_rope_table of the rows
    const cu_bf16 *kv;       // [T_kv, heads, 448]: 192 of the key, 256 of the value
    const cu_bf16 *k_rope;   // [T_kv, 64]
    const int32_t *q_start;  // [S + 1] first row of each sequence
    const int32_t *kv_start; // [S + 1] first packed slot of each sequence
    cu_bf16 *out;            // [T, heads, 256]
    int S, T, heads, max_q;  // max_q: longest sequence in rows
    float scale;
};
cudaError_t cu_mla_prefill(const struct cu_mla_prefill_args *a, cudaStream_t stream);

/* ---- small operations (kernels/elementwise.cu) ---- */

/* residual[t] = table[token[t]], the start of the residual stream. */
cudaError_t cu_embed(const cu_bf16 *table, const int32_t *token, float *residual, int T, int H,
                     cudaStream_t stream);

/* residual[t] += delta[t] (delta NULL: nothing); out[t] = rmsnorm(residual[t]) * w. The residual
 * stream is fp32: rounding it to bf16 at every add cost the demo model up to 0.2 of a logit. H a
 * multiple of 8, at most 8192. */
struct cu_add_norm_args {
    float *residual;    // [T, H]
    const float *delta; // [T, H] or NULL
    const cu_bf16 *w;   // [H]
    cu_bf16 *out;       // [T, H]
    int T, H;
    float eps;
};
cudaError_t cu_add_norm(const struct cu_add_norm_args *a, cudaStream_t stream);

/* From the joint projection [q_a | kv_a]: norms q_a; norms the latent, turns the key (interleaved
 * RoPE) and writes both into the row's KV slot. */
struct cu_qkv_args {
    const cu_bf16 *qkv;       // [T, q_lora + 576]
    const cu_bf16 *q_norm;    // [q_lora]
    const cu_bf16 *kv_norm;   // [512]
    const int32_t *position;  // [T]
    const int32_t *slot_page; // [T]
    const int32_t *slot_row;  // [T]
    cu_bf16 *q_a;             // [T, q_lora]
    cu_bf16 *pool;            // [n_pages, n_layers, 64, 576]
    int T, q_lora, n_layers, layer;
    float eps, theta;
};
cudaError_t cu_qkv_norm_write(const struct cu_qkv_args *a, cudaStream_t stream);

/* Turns the last 64 of each head of q in place and, if absorbed is given, copies them to columns
 * 512..575 of its heads. */
struct cu_rope_q_args {
    cu_bf16 *q;              // [T, heads, 256]
    cu_bf16 *absorbed;       // [T, heads, 576] or NULL
    const int32_t *position; // [T]
    int T, heads;
    float theta;
};
cudaError_t cu_rope_q(const struct cu_rope_q_args *a, cudaStream_t stream);

/* turn[t, i] = cosine and sine of position[t] * theta^(-2i/64), for pairs i < 32. */
cudaError_t cu_rope_table(const int32_t *position, float *turn, int T, float theta,
                          cudaStream_t stream);

/* out = silu(gate_up[:, 0..n)) * gate_up[:, n..2n). */
cudaError_t cu_swiglu(const cu_bf16 *gate_up, cu_bf16 *out, int T, int n, cudaStream_t stream);

/* Rows of the MTP layer's input: [norm(embedding of token) | norm(hidden row)]. source[t] chooses
 * one of three arrays of hidden rows. */
struct cu_mtp_input_args {
    const cu_bf16 *table;         // [V, H]
    const int32_t *token;         // [T]
    const cu_bf16 *hidden[3];     // by enum hidden_source: [*, H]
    const int32_t *source, *idx;  // [T]
    const cu_bf16 *enorm, *hnorm; // [H]
    cu_bf16 *out;                 // [T, 2H]
    int T, H;
    float eps;
};
cudaError_t cu_mtp_input(const struct cu_mtp_input_args *a, cudaStream_t stream);

/* out[i] = x[row[i]], bf16 rows of H values. */
cudaError_t cu_gather_rows(const cu_bf16 *x, const int32_t *row, cu_bf16 *out, int n, int H,
                           cudaStream_t stream);

/* Dummy weights: value k = scale * uniform(stream, k) as common/engine/weights.c defines it, or 1
 * where scale is 0. bf16 values are truncated. */
cudaError_t cu_fill(void *to, uint64_t n, uint64_t stream_key, float scale, int is_f32,
                    cudaStream_t stream);

/* sums[i] = hash_sum64 of the page_bytes (a multiple of 16) at base + pages[i] * page_bytes. */
cudaError_t cu_page_sums(const void *base, uint64_t page_bytes, const uint32_t *pages, int n,
                         uint64_t *sums, cudaStream_t stream);

/* Latents of a sequence's slots [0, n), packed, and its roped keys: what the expanded form of
 * prefill starts from. row = position in the packed arrays. */
struct cu_gather_kv_args {
    const cu_bf16 *pool;        // [n_pages, n_layers, 64, 576]
    const int32_t *block_table; // [S, max_pages]
    const int32_t *kv_start;    // [S + 1]
    cu_bf16 *latent;            // [T_kv, 512]
    cu_bf16 *k_rope;            // [T_kv, 64]
    int S, T_kv, max_pages, n_layers, layer;
};
cudaError_t cu_gather_kv(const struct cu_gather_kv_args *a, cudaStream_t stream);

/* ---- draws (kernels/sample.cu) ---- */

/* id[i] = largest of logits[i, 0..n_valid), lowest index wins ties. Row stride V. */
cudaError_t cu_argmax(const float *logits, int32_t *id, int n, int V, int n_valid,
                      cudaStream_t stream);

/* sample_ref on the device: the same ids and the same log-probabilities from the same logits. A
 * row's result depends on nothing but the row.
 *
 * What a row points to is short: a few ids, or a bit per id for a mask. `ahead` may be where an
 * earlier draw left its ids (and -1 after them), so that a step can be launched before the last one
 * has been read. V at most 2^19 and what fits shared memory (417,000). */
#define CU_SAMPLE_MAX_TOP 20
struct cu_sample_args {
    const float *logits;           // [*, V]
    const int32_t *logit_row;      // [T] which row of logits, or NULL: row t
    const struct sample_row *rows; // [T] on the device, and so are the arrays they point to
    const int32_t *n_rows_dev;     // how many of the T rows are real, or NULL: all
    int32_t *id;                   // [T]
    float *logprob;                // [T] or NULL: none for any row
    int32_t *top_id;               // [T, max_top], or NULL
    float *top_logprob;            // [T, max_top], or NULL
    int T, V, n_valid, max_top;    // max_top <= CU_SAMPLE_MAX_TOP
    int greedy; // promise about all rows: temperature 0, no mask, bias, bans, penalties, logprobs;
                // then rows is not read and may be NULL, and only id is written
};
cudaError_t cu_sample(const struct cu_sample_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
