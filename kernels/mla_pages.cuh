/* mla_pages.cuh: the shape of a page, and how attention of many rows deals the pages of all sequences to
 * groups of threads (mla_decode.cu, mla_narrow.cu).
 *
 * The pages of all sequences, laid end to end, are cut into one equal stretch per group, so any mix of
 * contexts fills the machine. A stretch may begin or end inside a sequence (an item); then each group that
 * holds a part of it leaves an unnormalised sum with its row maxima and row sums, and the last to arrive,
 * found by a counter, adds the parts in order.
 */
#ifndef BATON_MLA_PAGES_CUH
#define BATON_MLA_PAGES_CUH

#include "kernels/cuda.h"
#include "kernels/hopper.cuh"

#define WIDTH       576
#define LATENT      512
#define PAGE        64
#define BLOCK_BYTES (64 * 128) /* 64 rows x 64 columns */
#define TILE_BYTES  (WIDTH / 64 * BLOCK_BYTES)
#define MAX_NARROW  24 /* rows of a sequence that mla_narrow takes at most */
#ifndef PARTS_PER_PAGE
#define PARTS_PER_PAGE 6
#endif
#ifndef MIN_PAGES
#define MIN_PAGES 2 /* shortest stretch worth a group of its own */
#endif

namespace mla_pages {

struct Params {
    const int32_t *block_table, *n_ctx;
    cu_bf16 *out;
    float *part;      // two for each group and tile
    int32_t *counter; // [S, tiles] of parts that have arrived
    int S, q_rows, heads, n_layers, layer, max_pages, n_groups;
    float scale_log2;
};

/* part and counter are in a->work, part_bytes apart; the caller fills in n_groups. */
static inline Params params_of(const struct cu_mla_decode_args *a, size_t part_bytes)
{
    Params p = {};
    p.block_table = a->block_table;
    p.n_ctx = a->n_ctx;
    p.out = a->out;
    p.part = (float *)a->work;
    p.counter = (int32_t *)((uint8_t *)a->work + part_bytes);
    p.S = a->S;
    p.q_rows = a->q_rows;
    p.heads = a->heads;
    p.n_layers = a->n_layers;
    p.layer = a->layer;
    p.max_pages = a->max_pages;
    p.scale_log2 = a->scale * 1.44269504f;
    return p;
}

/* Of the queries in boxes of box_rows of a sequence's rows (those past the last come as zeros), and of the pool in
 * boxes of a page's slots by box_blocks x 64 columns. */
static inline bool maps_of(const struct cu_mla_decode_args *a, int box_rows, int box_blocks, CUtensorMap *ret_q,
                           CUtensorMap *ret_kv)
{
    const cuuint64_t rows = (cuuint64_t)a->q_rows * a->heads;
    const cuuint64_t kv_dims[3] = {64, (cuuint64_t)a->n_pages * a->n_layers * PAGE, WIDTH / 64};
    const cuuint64_t kv_strides[2] = {WIDTH * 2, 128};
    const cuuint32_t kv_box[3] = {64, PAGE, (cuuint32_t)box_blocks};
    const cuuint64_t q_dims[4] = {64, rows, WIDTH / 64, (cuuint64_t)a->S};
    const cuuint64_t q_strides[3] = {WIDTH * 2, 128, rows * WIDTH * 2};
    const cuuint32_t q_box[4] = {64, (cuuint32_t)box_rows, WIDTH / 64, 1};
    return hopper::tensor_map(ret_kv, a->pool, 3, kv_dims, kv_strides, kv_box) &&
           hopper::tensor_map(ret_q, a->q, 4, q_dims, q_strides, q_box);
}

__device__ __forceinline__ int pages_of(int n) { return n > 0 ? (n + PAGE - 1) / PAGE : 0; }

/* A group's stretch [begin, end) of the pages of all sequences, and the sequence that holds `begin` with
 * the number of pages before it. */
struct Stretch {
    int begin, end, s, base;
    int share; // pages of a group
};

/* A group holds at most two parts: 0 of an item that begins before its stretch or with it, 1 of the item that
 * its stretch ends in. */
__device__ __forceinline__ int part_of(int item_begin, int group, int share)
{
    return item_begin <= group * share ? 0 : 1;
}

/* One warp's work, same result in all lanes. */
__device__ __forceinline__ Stretch stretch_find(const int32_t *n_ctx, int S, int group, int n_groups)
{
    int lane = threadIdx.x % 32, total = 0, longest = 0;
#pragma unroll 1 // once per launch: unrolled, it was 10 KB of code
    for (int s = lane; s < S; s += 32) {
        int n = pages_of(n_ctx[s]);
        total += n;
        longest = max(longest, n);
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        total += __shfl_xor_sync(~0u, total, o);
        longest = max(longest, __shfl_xor_sync(~0u, longest, o));
    }
    Stretch r;
    // adding up one part costs about a sixth of a page, and one group adds all of an item
    int worth = max((int)ceilf(sqrtf((float)longest / PARTS_PER_PAGE)), MIN_PAGES);
    r.share = max((total + n_groups - 1) / n_groups, worth);
    r.begin = min(group * r.share, total);
    r.end = min(r.begin + r.share, total);
    r.s = S;
    r.base = 0;
#pragma unroll 1
    for (int s0 = 0; s0 < S && r.begin < r.end; s0 += 32) {
        int n = s0 + lane < S ? pages_of(n_ctx[s0 + lane]) : 0, sum = n;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            int below = __shfl_up_sync(~0u, sum, o);
            sum += lane >= o ? below : 0;
        }
        unsigned past = __ballot_sync(~0u, r.base + sum > r.begin);
        if (past) {
            int found = __ffs(past) - 1;
            r.s = s0 + found;
            r.base += __shfl_sync(~0u, sum - n, found);
            return r;
        }
        r.base += __shfl_sync(~0u, sum, 31);
    }
    return r;
}

/* Before a part is left: whether all others of its item are there. One thread's work. */
__device__ __forceinline__ bool others_arrived(const int32_t *counter, int n_others)
{
    int32_t n;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(n) : "l"(counter) : "memory");
    return n == n_others;
}

/* A part's weight: its row's maximum is m, the item's gives shift, which is 0 where no slot is seen. What is
 * added up with it is rounded first, as by part_sum: an item's result must not depend on which part came last. */
__device__ __forceinline__ float part_weight(float m, float scale_log2, float shift)
{
    return exp2f(fmaf(m, scale_log2, -shift));
}

__device__ __forceinline__ float part_shift(float top, float scale_log2)
{
    return top == -INFINITY ? 0.f : top * scale_log2;
}

__device__ __forceinline__ float part_sum(float sum, float v, float weight)
{
    return __fadd_rn(sum, __fmul_rn(v, weight));
}

/* Groups that this many pages can keep busy. */
static inline int groups_for(int64_t pages, int most)
{
    int64_t n = (pages + MIN_PAGES - 1) / MIN_PAGES;
    return n < 1 ? 1 : n < most ? (int)n : most;
}

} // namespace mla_pages

/* cu_mla_decode for q_rows x heads of at most MAX_NARROW (mla_narrow.cu): p is params_of, parts are smaller than
 * cu_mla_decode's own. */
cudaError_t mla_narrow(const struct cu_mla_decode_args *a, mla_pages::Params p, int n_sm, cudaStream_t stream);
#define NARROW_PART_FLOATS (MAX_NARROW * LATENT + 2 * MAX_NARROW)

#endif
