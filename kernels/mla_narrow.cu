/* mla_narrow.cu: cu_mla_decode where a sequence has at most 24 rows, one query position of 20 heads.
 *
 * mla_decode.cu gives the rows the 64-row side of the warpgroup product, so that 20 of them cost as much
 * as 64: a page took longer to multiply than to fetch. Here the page's slots are on that side, and the rows
 * are its 24 columns: scores^T = page x query^T, out^T += page^T x probabilities, both with the page read
 * from shared memory as it came. The sums of all 512 columns are 96 registers, so that one warpgroup does a
 * page by itself and the two of a block, each with a stretch, a query and a page of its own, need not wait
 * for one another: while one exponentiates, the other multiplies.
 *
 * A page comes in three parts of 192 columns. Scores begin with the first, and each is fetched anew as soon
 * as its values have been multiplied, while the next ones still are.
 *
 * Measured on an H200 (4.3 TB/s) by mla_bench, microseconds with mla_decode.cu's in brackets: 256 sequences of
 * 512 slots 45.7 (50.4), of 1 to 1024 59.4 (66.7), 512 of 512 86.3 (101.7), 512 of 1024 160 (no figure). Of an
 * earlier version: 64 of 4096 91.5 (93.0), 128 of 512 32.4 (28.3) and 64 of 512 25.9 (23.0), since twice as many
 * groups mean twice as many parts: cu_mla_decode comes here from 160 sequences on. Tried: stretches that differ by
 * a page, for balance, cut every sequence where equal ones fall on their ends (512 of 512: 104); a copy of
 * out_write for each way to a result: 84.6, with 85 KB of code and not 54; whole steps were not compared.
 *
 * Slots past n_ctx in the last page may hold anything, NaN too: their scores are masked and their values
 * zeroed in shared memory. Rows of sequences with n_ctx 0 are left untouched; a row that sees no slot
 * becomes zero.
 */
#include "kernels/cuda.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/mla_pages.cuh"

using namespace hopper;
using namespace mla_pages;

#define N            MAX_NARROW
#define GROUPS       2 /* of 128 threads, each with its own stretch */
#define CONSUMERS    (GROUPS * 128)
#define THREADS      (CONSUMERS + 128) /* registers are dealt to warpgroups: a whole one for two copying warps */
#define PARTS        3 /* of a page */
#define PART_BYTES   (TILE_BYTES / PARTS)
#define QUERY_BLOCK  (N * 128) /* N rows x 64 columns */
#define QUERY_BYTES  (WIDTH / 64 * QUERY_BLOCK)
#define VALUE_BLOCKS (LATENT / 64)

namespace {

struct GroupSmem {
    uint8_t q[QUERY_BYTES];
    uint8_t turned[2][QUERY_BLOCK]; // [N rows][64 slots or columns]: probabilities, then results on their way out
};

struct Smem {
    uint8_t kv[GROUPS][TILE_BYTES];
    GroupSmem group[GROUPS];
    float stat[GROUPS][4][N]; // a warp's maximum or sum of each row
    uint64_t kv_full[GROUPS][PARTS], kv_empty[GROUPS][PARTS], q_full[GROUPS], q_empty[GROUPS];
    int last[GROUPS];
    int position[N]; // of each row among the query's
};

__device__ __forceinline__ void copy_pages(const CUtensorMap *q_map, const CUtensorMap *kv_map, const Params &p,
                                           Smem *sm, int g, Stretch w)
{
    int lane = threadIdx.x % 32, it = 0, item = 0;
    uint64_t policy = policy_evict_first();
    for (int u = w.begin; u < w.end; w.s++) {
        int n = pages_of(p.n_ctx[w.s]), stop = min(n, w.end - w.base);
        const int32_t *table = p.block_table + (int64_t)w.s * p.max_pages;
        int ids = 0;
#pragma unroll 1
        for (int i = u - w.base, k = 0; i < stop; i++, k++, it++) {
            if (k % 32 == 0)
                ids = i + lane < stop ? table[i + lane] : 0;
            int row = (__shfl_sync(~0u, ids, k % 32) * p.n_layers + p.layer) * PAGE;
            if (lane == 0) {
                if (k == 0) {
                    uint32_t full = smem_addr(&sm->q_full[g]);
                    mbar_wait(smem_addr(&sm->q_empty[g]), (item & 1) ^ 1);
                    mbar_arrive_expect(full, QUERY_BYTES);
                    tma_load_4d(smem_addr(sm->group[g].q), q_map, full, 0, 0, 0, w.s);
                }
#pragma unroll
                for (int t = 0; t < PARTS; t++) {
                    uint32_t full = smem_addr(&sm->kv_full[g][t]);
                    mbar_wait(smem_addr(&sm->kv_empty[g][t]), (it & 1) ^ 1);
                    mbar_arrive_expect(full, PART_BYTES);
                    tma_load_3d(smem_addr(sm->kv[g]) + t * PART_BYTES, kv_map, full, 0, row,
                                t * (WIDTH / 64 / PARTS), policy);
                }
            }
            __syncwarp();
        }
        item += stop > u - w.base;
        u = w.base + max(stop, u - w.base);
        w.base += n;
    }
}

/* Sums of 64 columns' blocks: o[b][4 j + i] is column 64 b + 16 warp + lane / 4 (+ 8 for i > 1) of row
 * 8 j + 2 (lane % 4) + i % 2. */
typedef float Sums[VALUE_BLOCKS][N / 2];

/* What a thread's rows (their maxima, factors ...) are: [2 j + i] is row 8 j + 2 (lane % 4) + i. */
typedef float PerRow[N / 4];

/* o over the rows' sums l, as the sequence's rows. A warpgroup's work. */
__device__ __forceinline__ void out_write(const Params &p, GroupSmem *gs, int g, int s, const Sums &o,
                                          const PerRow &l)
{
    int tid = threadIdx.x % 128, lane = tid % 32, warp = tid / 32, rows = p.q_rows * p.heads;
    PerRow f;
#pragma unroll
    for (int i = 0; i < N / 4; i++)
        f[i] = l[i] > 0 ? 1.f / l[i] : 0.f;
    uint4 *to = (uint4 *)(p.out + (int64_t)s * rows * LATENT) + tid % 8;
#pragma unroll
    for (int b = 0; b < VALUE_BLOCKS; b++) {
        uint32_t turned = smem_addr(gs->turned[b % 2]);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            int row = 8 * j + lane % 8, chunk = 2 * warp + lane / 8 % 2;
            stmatrix_x2_trans(turned + row * 128 + ((chunk ^ (row & 7)) << 4),
                              bf16_pair(o[b][4 * j] * f[2 * j], o[b][4 * j + 1] * f[2 * j + 1]),
                              bf16_pair(o[b][4 * j + 2] * f[2 * j], o[b][4 * j + 3] * f[2 * j + 1]));
        }
        named_sync(1 + g, 128);
#pragma unroll
        for (int row = tid / 8; row < N; row += 16)
            if (row < rows)
                to[row * (LATENT / 8) + b * 8] =
                    *(const uint4 *)(gs->turned[b % 2] + row * 128 + ((tid % 8 ^ (row & 7)) << 4));
    }
    named_sync(1 + g, 128); // the bytes may be overwritten
}

__device__ __forceinline__ float *part_place(const Params &p, int group, int which)
{
    return p.part + ((int64_t)group * 2 + which) * NARROW_PART_FLOATS;
}

/* o and l += the part at `from`, of whose rows the item's shifts are given. */
__device__ __forceinline__ void part_join(const Params &p, const float *from, const PerRow &shift, Sums &o, PerRow &l)
{
    int tid = threadIdx.x % 128;
    PerRow f;
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const float *stat = from + N * LATENT + tid % 4 * 2 + i / 2 * 8 + i % 2;
        f[i] = part_weight(__ldcg(stat), p.scale_log2, shift[i]);
        l[i] = part_sum(l[i], __ldcg(stat + N), f[i]);
    }
#pragma unroll
    for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            float4 v = __ldcg((const float4 *)from + (b * (N / 8) + j) * 128 + tid);
            o[b][4 * j] = part_sum(o[b][4 * j], v.x, f[2 * j]);
            o[b][4 * j + 1] = part_sum(o[b][4 * j + 1], v.y, f[2 * j + 1]);
            o[b][4 * j + 2] = part_sum(o[b][4 * j + 2], v.z, f[2 * j]);
            o[b][4 * j + 3] = part_sum(o[b][4 * j + 3], v.w, f[2 * j + 1]);
        }
}

/* o and l times the weights of their part, for which 0 will do where there is none yet. */
__device__ __forceinline__ void part_scale(const PerRow &f, Sums &o, PerRow &l)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++)
        l[i] *= f[i];
#pragma unroll
    for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            o[b][i] *= f[i / 4 * 2 + i % 2];
}

/* This group's part of an item, in o, m and l. True: it was the last, and o and l are the item's. Else it is
 * left for the group that will be. Of two parts, the usual case, the last one stays in registers: that of the group
 * whose stretch ends in the item, since the other one began with it. */
__device__ __forceinline__ bool part_add(const Params &p, Smem *sm, const Stretch &w, int g, int group, Sums &o,
                                         PerRow &m, PerRow &l, int item_end)
{
    int tid = threadIdx.x % 128, quad = tid % 4 * 2, rows = p.q_rows * p.heads;
    int first = w.base / w.share, last = (item_end - 1) / w.share;
    int32_t *counter = p.counter + w.s;
    bool are_two = last - first == 1;
    if (tid == 0)
        sm->last[g] = are_two && others_arrived(counter, 1);
    named_sync(1 + g, 128);
    bool is_kept = sm->last[g];
    if (!is_kept) {
        float *part = part_place(p, group, part_of(w.base, group, w.share));
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            if (8 * j + quad >= rows)
                continue;
            if (tid < 4)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    part[N * LATENT + 8 * j + quad + i] = m[2 * j + i];
                    part[N * LATENT + N + 8 * j + quad + i] = l[2 * j + i];
                }
#pragma unroll
            for (int b = 0; b < VALUE_BLOCKS; b++)
                ((float4 *)part)[(b * (N / 8) + j) * 128 + tid] =
                    make_float4(o[b][4 * j], o[b][4 * j + 1], o[b][4 * j + 2], o[b][4 * j + 3]);
        }
        __threadfence();
        named_sync(1 + g, 128);
        if (tid == 0)
            sm->last[g] = atomicAdd(counter, 1) == last - first;
        named_sync(1 + g, 128);
        if (!sm->last[g])
            return false;
    }
    if (tid == 0)
        *counter = 0; // for the next launch
    __threadfence();

    PerRow shift;
#pragma unroll
    for (int i = 0; i < N / 4; i++)
        shift[i] = is_kept ? m[i] : -INFINITY;
#pragma unroll 1
    for (int k = first; k <= last; k++) {
        const float *from = part_place(p, k, part_of(w.base, k, w.share)) + N * LATENT + quad;
        if (!is_kept || k != group)
#pragma unroll
            for (int i = 0; i < N / 4; i++)
                shift[i] = fmaxf(shift[i], __ldcg(from + i / 2 * 8 + i % 2));
    }
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        shift[i] = part_shift(shift[i], p.scale_log2);
        m[i] = is_kept ? part_weight(m[i], p.scale_log2, shift[i]) : 0.f;
    }
    part_scale(m, o, l);
#pragma unroll 1
    for (int k = first; k <= last; k++)
        if (!is_kept || k != group)
            part_join(p, part_place(p, k, part_of(w.base, k, w.share)), shift, o, l);
    return true;
}

__device__ __forceinline__ void attend(const Params &p, Smem *sm, int g, int group, Stretch w)
{
    int tid = threadIdx.x % 128, warp = tid / 32, lane = tid % 32, quad = lane % 4 * 2;
    int it = 0, item = 0;
    GroupSmem *gs = &sm->group[g];
    uint32_t kv = smem_addr(sm->kv[g]), turned = smem_addr(gs->turned[0]);
    uint64_t k_desc = wgmma_desc(kv), q_desc = wgmma_desc(smem_addr(gs->q));
    uint64_t v_desc = wgmma_desc_turned(kv), p_desc = wgmma_desc(turned);
    Sums o;
    float s_acc[N / 2];
    for (int u = w.begin; u < w.end; w.s++) {
        int n = p.n_ctx[w.s], n_pages = pages_of(n), stop = min(n_pages, w.end - w.base);
        int page0 = u - w.base;
        if (page0 >= stop) {
            w.base += n_pages;
            continue;
        }
        PerRow m, l;
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            m[i] = -INFINITY;
            l[i] = 0;
        }
#pragma unroll
        for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                o[b][i] = 0;
        mbar_wait(smem_addr(&sm->q_full[g]), item & 1);
        for (int page = page0; page < stop; page++, it++) {
#pragma unroll
            for (int t = 0; t < PARTS; t++) {
                mbar_wait(smem_addr(&sm->kv_full[g][t]), it & 1);
                wgmma_begin();
#pragma unroll
                for (int k = t * 12; k < t * 12 + 12; k++)
                    wgmma<N>(s_acc, k_desc + k / 4 * (BLOCK_BYTES / 16) + k % 4 * 2,
                             q_desc + k / 4 * (QUERY_BLOCK / 16) + k % 4 * 2, k > 0);
                wgmma_commit();
            }
            int left = n - page * PAGE; // slots in this page
            if (left < PAGE)
#pragma unroll 1
                for (int i = tid; i < (PAGE - left) * 64; i += 128) {
                    int r = left + i / 64, c = i % 64;
                    *(uint4 *)(sm->kv[g] + c / 8 * BLOCK_BYTES + r * 128 + c % 8 * 16) = make_uint4(0, 0, 0, 0);
                }
            wgmma_wait<0>();
            if (page == stop - 1 && lane == 0)
                mbar_arrive(smem_addr(&sm->q_empty[g]));

            if (left - PAGE < p.q_rows - 1) {
                int slot = page * PAGE + 16 * warp + lane / 4;
#pragma unroll
                for (int i = 0; i < N / 2; i++)
                    if (slot + i % 4 / 2 * 8 >= n - p.q_rows + 1 + sm->position[i / 4 * 8 + quad + i % 2])
                        s_acc[i] = -INFINITY;
            }
            PerRow alpha;
#pragma unroll
            for (int i = 0; i < N / 4; i++)
                alpha[i] = column_max(fmaxf(s_acc[i / 2 * 4 + i % 2], s_acc[i / 2 * 4 + i % 2 + 2]));
            if (lane < 4)
#pragma unroll
                for (int j = 0; j < N / 8; j++)
                    *(float2 *)&sm->stat[g][warp][8 * j + quad] = make_float2(alpha[2 * j], alpha[2 * j + 1]);
            named_sync(1 + g, 128);
            bool rescale = false;
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                float2 top = *(const float2 *)&sm->stat[g][0][8 * j + quad];
#pragma unroll
                for (int k = 1; k < 4; k++) {
                    float2 t = *(const float2 *)&sm->stat[g][k][8 * j + quad];
                    top = make_float2(fmaxf(top.x, t.x), fmaxf(top.y, t.y));
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float now = fmaxf(m[2 * j + i], i ? top.y : top.x);
                    float shift = now == -INFINITY ? 0.f : now * p.scale_log2;
                    alpha[2 * j + i] = exp2f(m[2 * j + i] * p.scale_log2 - shift);
                    m[2 * j + i] = now;
                    float a = exp2f(s_acc[4 * j + i] * p.scale_log2 - shift);
                    float b = exp2f(s_acc[4 * j + i + 2] * p.scale_log2 - shift);
                    l[2 * j + i] = l[2 * j + i] * alpha[2 * j + i] + a + b;
                    s_acc[4 * j + i] = a;
                    s_acc[4 * j + i + 2] = b;
                    rescale |= alpha[2 * j + i] != 1.f;
                }
                int row = 8 * j + lane % 8, chunk = 2 * warp + lane / 8 % 2;
                stmatrix_x2_trans(turned + row * 128 + ((chunk ^ (row & 7)) << 4),
                                  bf16_pair(s_acc[4 * j], s_acc[4 * j + 1]),
                                  bf16_pair(s_acc[4 * j + 2], s_acc[4 * j + 3]));
            }
            if (__any_sync(~0u, rescale)) {
#pragma unroll
                for (int b = 0; b < VALUE_BLOCKS; b++)
#pragma unroll
                    for (int i = 0; i < N / 2; i++)
                        o[b][i] *= alpha[i / 4 * 2 + i % 2];
            }
            fence_async();
            named_sync(1 + g, 128);

            wgmma_begin();
#pragma unroll
            for (int t = 0; t < PARTS; t++) {
#pragma unroll
                for (int b = 3 * t; b < 3 * t + 3 && b < VALUE_BLOCKS; b++)
#pragma unroll
                    for (int k = 0; k < PAGE / 16; k++)
                        wgmma_turned_a(o[b], v_desc + b * (BLOCK_BYTES / 16) + k * (2048 / 16), p_desc + k * 2);
                wgmma_commit();
            }
            wgmma_wait<2>();
            if (lane == 0)
                mbar_arrive(smem_addr(&sm->kv_empty[g][0]));
            wgmma_wait<1>();
            if (lane == 0)
                mbar_arrive(smem_addr(&sm->kv_empty[g][1]));
            wgmma_wait<0>();
            if (lane == 0)
                mbar_arrive(smem_addr(&sm->kv_empty[g][2]));
        }
        item++;

        // each thread has the sums of its slots
        named_sync(1 + g, 128); // maxima have been read
#pragma unroll
        for (int i = 0; i < N / 4; i++)
            l[i] = column_sum(l[i]);
        if (lane < 4)
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                *(float2 *)&sm->stat[g][warp][8 * j + quad] = make_float2(l[2 * j], l[2 * j + 1]);
        named_sync(1 + g, 128);
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            int row = i / 2 * 8 + quad + i % 2;
            l[i] = sm->stat[g][0][row] + sm->stat[g][1][row] + sm->stat[g][2][row] + sm->stat[g][3][row];
        }
        if ((page0 == 0 && stop == n_pages) || part_add(p, sm, w, g, group, o, m, l, w.base + n_pages))
            out_write(p, gs, g, w.s, o, l);
        u = w.base + stop;
        w.base += n_pages;
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    mla_narrow_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap kv_map,
                      const Params p)
{
    extern __shared__ uint8_t raw[];
    Smem *sm = (Smem *)(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
    if (threadIdx.x == CONSUMERS) {
        tma_prefetch_map(&q_map);
        tma_prefetch_map(&kv_map);
        for (int g = 0; g < GROUPS; g++) {
            for (int t = 0; t < PARTS; t++) {
                mbar_init(smem_addr(&sm->kv_full[g][t]), 1);
                mbar_init(smem_addr(&sm->kv_empty[g][t]), 4);
            }
            mbar_init(smem_addr(&sm->q_full[g]), 1);
            mbar_init(smem_addr(&sm->q_empty[g]), 4);
        }
        mbar_init_fence();
    }
    if (threadIdx.x < N)
        sm->position[threadIdx.x] = threadIdx.x / p.heads;
    launch::next_may_start();
    launch::previous_done();
    // a block's two are far apart, so that few groups are on as many multiprocessors
    int g = threadIdx.x < CONSUMERS ? threadIdx.x / 128 : (threadIdx.x - CONSUMERS) / 32 % GROUPS;
    int group = blockIdx.x + g * gridDim.x;
    Stretch w = stretch_find(p.n_ctx, p.S, group, p.n_groups);
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        regs_shrink<40>();
        if (threadIdx.x < CONSUMERS + GROUPS * 32)
            copy_pages(&q_map, &kv_map, p, sm, g, w);
    } else {
        regs_grow<232>();
        attend(p, sm, g, group, w);
    }
}

} // namespace

cudaError_t mla_narrow(const struct cu_mla_decode_args *a, Params p, int n_sm, cudaStream_t stream)
{
    CUtensorMap q_map, kv_map;
    if (!maps_of(a, N, WIDTH / 64 / PARTS, &q_map, &kv_map))
        return cudaErrorInvalidValue;
    p.n_groups = groups_for((int64_t)a->S * ((a->max_ctx + PAGE - 1) / PAGE), GROUPS * n_sm);
    const int smem = sizeof(Smem) + 1024;
    cudaError_t e = cudaFuncSetAttribute(mla_narrow_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (e != cudaSuccess)
        return e;
    return launch::start(mla_narrow_kernel, dim3(p.n_groups < n_sm ? p.n_groups : n_sm), THREADS, smem, 1, stream,
                         q_map, kv_map, p);
}
