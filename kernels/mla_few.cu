/* mla_few.cu: decode attention of few sequences with short contexts, where latency is all there is.
 *
 * mla_decode.cu fills the machine with many sequences; one sequence of 512 slots leaves it four
 * blocks with two pages each, a trip through memory for the parts and one block that adds them up.
 * Here eight blocks, a cluster, share a sequence, a page at a time each, and add up over the
 * cluster's shared memory: each block takes 64 of the 512 columns.
 *
 * At most 24 rows (heads) are the narrow side of m16n8k16 products: scores are pages times query,
 * 16 slots a warp and half of the 576 columns; results are values (transposed) times probabilities,
 * 64 columns a warp. Blocks are small enough to start beside the products that make the query, and
 * pages that no kernel of this step writes are copied before those have ended.
 *
 * Measured on an H100 80GB by dense_bench, context 512, microseconds per launch in a graph, with
 * mla_decode's: 1 sequence 9.2 (15.3), 8 10.3 (15.6), 16 18.3 (17.2), hence the limit of 8.
 */
#include "kernels/cuda.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/mla_pages.cuh"

using namespace hopper;

#define N_BLOCKS     (WIDTH / 64)
#define CLUSTER      8
#define MAX_HEADS    24
#define MAX_S        8  /* more clusters than that do not run at once */
#define NEW_SLOTS    16 /* at the end of a context that rows of this step may be writing */
#define MAX_CTX      (CLUSTER * PAGE * 2)
#define THREADS      256
#define GROUPS       (WIDTH / 32 / 2) /* of 32 columns that a warp multiplies */
#define QUERY_PITCH  608              /* these spread a warp's accesses over the banks */
#define SCORE_PITCH  68
#define PROB_PITCH   72
#define PART_PITCH   516

namespace {

struct smem {
    union {
        uint8_t kv[N_BLOCKS * BLOCK_BYTES];
        float part[MAX_HEADS][PART_PITCH]; // the block's sums, once its pages are done with
    };
    cu_bf16 q[MAX_HEADS][QUERY_PITCH];
    float score[2][MAX_HEADS][SCORE_PITCH];
    __nv_bfloat16 prob[MAX_HEADS][PROB_PITCH];
    float alpha[MAX_HEADS], top[MAX_HEADS], sum[MAX_HEADS];
    uint64_t full;
};

struct params {
    const cu_bf16 *q;
    const int32_t *block_table, *n_ctx;
    cu_bf16 *out;
    int heads, n_layers, layer, max_pages;
    float scale_log2;
};

/* One thread: a page of the layer, nine blocks under the swizzle. */
__device__ void page_load(smem *sm, const CUtensorMap *map, const params &p, int page)
{
    uint32_t bar = smem_addr(&sm->full);
    mbar_arrive_expect(bar, N_BLOCKS * BLOCK_BYTES);
    for (int b = 0; b < N_BLOCKS; b++)
        tma_load_2d(smem_addr(sm->kv) + b * BLOCK_BYTES, map, bar, b * 64,
                    (page * p.n_layers + p.layer) * PAGE);
}

/* Scores of 16 slots with all heads over half of the columns. Both operands in 16 bytes a thread;
 * that permutes columns the same way in both. */
__device__ __forceinline__ void scores(smem *sm)
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m = warp & 3, half = warp >> 2;
    int slot = m * 16 + (lane >> 2);
    float acc[3][4] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        int chunk = (half * GROUPS + g) * 4 + (lane & 3);
        const uint8_t *at = sm->kv + chunk / 8 * BLOCK_BYTES + slot * 128 +
                            (((chunk & 7) ^ (slot & 7)) << 4);
        uint4 lo = *(const uint4 *)at, hi = *(const uint4 *)(at + 8 * 128); // same slot & 7
#pragma unroll
        for (int n = 0; n < 3; n++) {
            uint4 q = *(const uint4 *)&sm->q[n * 8 + (lane >> 2)][chunk * 8];
            product_16x8(acc[n], lo.x, hi.x, lo.y, hi.y, q.x, q.y);
            product_16x8(acc[n], lo.z, hi.z, lo.w, hi.w, q.z, q.w);
        }
    }
#pragma unroll
    for (int n = 0; n < 3; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            sm->score[half][n * 8 + (lane & 3) * 2 + (j & 1)][slot + (j & 2) * 4] = acc[n][j];
}

/* Three heads a warp: maxima and sums so far, this page's probabilities. Slots from `left` on are
 * not the sequence's. */
__device__ __forceinline__ void softmax(smem *sm, const params &p, int left, float (&top)[3],
                                        float (&sum)[3])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        int h = warp * 3 + i;
        float s[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int slot = 2 * lane + k;
            s[k] = (sm->score[0][h][slot] + sm->score[1][h][slot]) * p.scale_log2;
            s[k] = slot < left ? s[k] : -INFINITY;
        }
        float now = fmaxf(s[0], s[1]);
#pragma unroll
        for (int o = 16; o; o >>= 1)
            now = fmaxf(now, __shfl_xor_sync(~0u, now, o));
        now = fmaxf(now, top[i]); // finite: a page has at least one slot
        float p0 = exp2f(s[0] - now), p1 = exp2f(s[1] - now), both = p0 + p1;
#pragma unroll
        for (int o = 16; o; o >>= 1)
            both += __shfl_xor_sync(~0u, both, o);
        float alpha = exp2f(top[i] - now);
        sum[i] = sum[i] * alpha + both;
        top[i] = now;
        *(__nv_bfloat162 *)&sm->prob[h][2 * lane] = __floats2bfloat162_rn(p0, p1);
        if (lane == 0)
            sm->alpha[h] = alpha;
    }
}

/* acc[m][n]: columns warp * 64 + m * 16 .. of heads n * 8 .. */
__device__ __forceinline__ void values(smem *sm, float (&acc)[4][3][4])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int n = 0; n < 3; n++) {
        float2 alpha = *(const float2 *)&sm->alpha[n * 8 + (lane & 3) * 2];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            acc[m][n][0] *= alpha.x;
            acc[m][n][1] *= alpha.y;
            acc[m][n][2] *= alpha.x;
            acc[m][n][3] *= alpha.y;
        }
    }
    uint32_t base = smem_addr(sm->kv) + warp * BLOCK_BYTES;
#pragma unroll
    for (int k0 = 0; k0 < PAGE; k0 += 16) {
        uint32_t b[3][2];
#pragma unroll
        for (int n = 0; n < 3; n++) {
            const uint32_t *at =
                (const uint32_t *)&sm->prob[n * 8 + (lane >> 2)][k0 + (lane & 3) * 2];
            b[n][0] = at[0];
            b[n][1] = at[4];
        }
        // four 8 x 8 matrices, rows are slots: the second is 8 columns on, the third 8 slots
        int slot = k0 + (lane & 7) + (lane >> 4) * 8;
#pragma unroll
        for (int m = 0; m < 4; m++) {
            int chunk = m * 2 + ((lane >> 3) & 1);
            uint32_t v0, v1, v2, v3;
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v0), "=r"(v1), "=r"(v2), "=r"(v3)
                         : "r"(base + slot * 128 + ((chunk ^ (slot & 7)) << 4))
                         : "memory");
#pragma unroll
            for (int n = 0; n < 3; n++)
                product_16x8(acc[m][n], v0, v1, v2, v3, b[n][0], b[n][1]);
        }
    }
}

/* This block's 64 columns of all heads, from the eight blocks' sums in their order. */
__device__ void combine(smem *sm, const params &p, int s, int rank)
{
    int head = threadIdx.x / 8, col = rank * 64 + threadIdx.x % 8 * 8;
    if (head >= p.heads)
        return;
    float top[CLUSTER], sum[CLUSTER], most = -INFINITY, total = 0, out[8] = {};
    float4 v[CLUSTER][2];
#pragma unroll
    for (int g = 0; g < CLUSTER; g++) {
        const smem *other = launch::peer(sm, (unsigned)g);
        top[g] = other->top[head];
        sum[g] = other->sum[head];
        v[g][0] = *(const float4 *)&other->part[head][col];
        v[g][1] = *(const float4 *)&other->part[head][col + 4];
    }
#pragma unroll
    for (int g = 0; g < CLUSTER; g++)
        most = fmaxf(most, top[g]);
#pragma unroll
    for (int g = 0; g < CLUSTER; g++) {
        if (top[g] == -INFINITY)
            continue; // had no page, its part is anything
        float w = exp2f(top[g] - most);
        total += w * sum[g];
        const float f[8] = {v[g][0].x, v[g][0].y, v[g][0].z, v[g][0].w,
                            v[g][1].x, v[g][1].y, v[g][1].z, v[g][1].w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            out[i] += w * f[i];
    }
    __nv_bfloat162 o[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        o[i] = __floats2bfloat162_rn(out[2 * i] / total, out[2 * i + 1] / total);
    *(uint4 *)(p.out + ((int64_t)s * p.heads + head) * LATENT + col) = *(const uint4 *)o;
}

__global__ void __launch_bounds__(THREADS, 2)
    mla_few_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ params p)
{
    extern __shared__ __align__(1024) uint8_t raw[];
    smem *sm = (smem *)raw;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int s = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    int n = p.n_ctx[s], n_pages = (n + PAGE - 1) / PAGE;
    const int32_t *table = p.block_table + (int64_t)s * p.max_pages;
    launch::next_may_start();
    bool is_old = (rank + 1) * PAGE + NEW_SLOTS <= n;
    if (threadIdx.x == 0) {
        tma_prefetch_map(&map);
        mbar_init(smem_addr(&sm->full), 1);
        mbar_init_fence();
        if (rank < n_pages && is_old)
            page_load(sm, &map, p, table[rank]);
    }
    launch::previous_done();
    if (threadIdx.x == 0 && rank < n_pages && !is_old)
        page_load(sm, &map, p, table[rank]);
    __syncthreads();
    if (n <= 0)
        return; // all of the cluster

    // rows beyond the heads stay as they are: whatever comes of them is not stored
    for (int i = threadIdx.x; i < p.heads * (WIDTH / 8); i += THREADS) {
        int head = i / (WIDTH / 8), col = i % (WIDTH / 8) * 8;
        cp_async_16(smem_addr(&sm->q[head][col]), p.q + ((int64_t)s * p.heads + head) * WIDTH + col);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float acc[4][3][4] = {}, top[3], sum[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        top[i] = -INFINITY;
        sum[i] = 0;
    }
    for (int page = rank, it = 0; page < n_pages; page += CLUSTER, it++) {
        if (it) {
            fence_async();
            __syncthreads();
            if (threadIdx.x == 0)
                page_load(sm, &map, p, table[page]);
        }
        mbar_wait(smem_addr(&sm->full), it & 1);
        int left = n - page * PAGE;
        scores(sm);
        __syncthreads();
        for (int i = threadIdx.x; i < (PAGE - left) * (LATENT / 8); i += THREADS) {
            int slot = left + i / (LATENT / 8), c = i % (LATENT / 8); // a swizzled row of zeros
            *(uint4 *)(sm->kv + c / 8 * BLOCK_BYTES + slot * 128 + c % 8 * 16) =
                make_uint4(0, 0, 0, 0);
        }
        softmax(sm, p, left, top, sum);
        __syncthreads();
        values(sm, acc);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < 3; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                sm->part[i * 8 + (lane & 3) * 2 + (j & 1)]
                        [warp * 64 + m * 16 + (lane >> 2) + (j & 2) * 4] = acc[m][i][j];
    if (lane < 3) {
        sm->top[warp * 3 + lane] = lane == 0 ? top[0] : lane == 1 ? top[1] : top[2];
        sm->sum[warp * 3 + lane] = lane == 0 ? sum[0] : lane == 1 ? sum[1] : sum[2];
    }
    launch::cluster_sync();
    combine(sm, p, s, rank);
    launch::cluster_sync(); // others may still read this block's sums
}

} // namespace

int cu_mla_few_fits(const struct cu_mla_decode_args *a)
{
    return a->q_rows == 1 && a->heads >= 1 && a->heads <= MAX_HEADS && a->S <= MAX_S &&
           a->max_ctx <= MAX_CTX;
}

cudaError_t cu_mla_few(const struct cu_mla_decode_args *a, cudaStream_t stream)
{
    if (a->S == 0)
        return cudaSuccess;
    CUtensorMap map;
    if (!cu_mla_few_fits(a) || a->S < 0 || a->n_pages < 1 || a->n_layers < 1 || a->layer < 0 ||
        a->layer >= a->n_layers || a->max_pages < 1 ||
        (int64_t)a->n_pages * a->n_layers * PAGE > INT32_MAX ||
        !tensor_map_2d(&map, a->pool, (uint64_t)a->n_pages * a->n_layers * PAGE, WIDTH, WIDTH, PAGE))
        return cudaErrorInvalidValue;
    params p = {a->q,     a->block_table, a->n_ctx, a->out,
                a->heads, a->n_layers,    a->layer, a->max_pages, a->scale * 1.44269504f};
    cudaError_t err = cudaFuncSetAttribute(
        mla_few_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(smem));
    if (err)
        return err;
    return launch::start(mla_few_kernel, a->S * CLUSTER, THREADS, sizeof(smem), CLUSTER, stream, map,
                         p);
}
