/* mla_decode.cu: attention of decode rows over paged latents, absorbed form.
 *
 * A sequence's rows (query positions x heads) share one key-value head, so up to 64 of them are one
 * tensor-core tile and its KV is read once for all: 1,152 bytes per slot and layer, which is the floor.
 *
 * Grid: (tiles of 64 rows, groups); mla_pages.cuh deals the pages to groups. Where many sequences have so few
 * rows that most of a tile would be for nobody, mla_narrow.cu does it. Tried: its way of adding parts up, in
 * registers. 256 x 3 rows of mixed contexts then take 75 us and not 84, but one row of 4096 slots 41 and not 29,
 * as few warps have rows, and whole steps are no faster.
 *
 * Block: one warp copies (a page's 64 x 576 layer slice is one tensor copy, 72 KB, two stages); two
 * warpgroups multiply. Each takes the scores of half the page's slots, they exchange row maxima, write
 * their half of the probabilities to shared memory, and each adds probabilities x values for half of
 * the 512 columns. Values are the first 512 columns of the keys' tile, read transposed.
 *
 * Slots past n_ctx in the last page may hold anything, NaN too: their scores are masked and their
 * values zeroed in shared memory. Rows of sequences with n_ctx 0 are left untouched; a row that sees no
 * slot (n_ctx < q_rows) becomes zero.
 */
#include "kernels/cuda.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/mla_pages.cuh"

using namespace hopper;
using namespace mla_pages;

#define ROWS        64
#define STAGES      2
#define CONSUMERS   256
#define THREADS     (CONSUMERS + 128) /* registers are dealt to warpgroups: a whole one for one copying warp */
#define MAX_TILES   8
#define NARROW_FROM 160 /* sequences: fewer are cut into more parts among twice as many groups */
#define BATCH       3   /* combine: groups of 8 rows at a time */
#define PART_FLOATS (ROWS * LATENT + 2 * ROWS)
static_assert(2 * NARROW_PART_FLOATS <= PART_FLOATS, "mla_narrow's parts, of twice as many groups");

namespace {

struct Smem {
    uint8_t q[TILE_BYTES];
    uint8_t kv[STAGES][TILE_BYTES];
    uint8_t p[ROWS * 128];
    float max_part[2][ROWS], sum_part[2][ROWS];
    uint64_t kv_full[STAGES], kv_empty[STAGES], q_full, q_empty;
    int last;
};

__device__ __forceinline__ void copy_pages(const CUtensorMap *q_map, const CUtensorMap *kv_map,
                                           const Params &p, Smem *sm, Stretch w)
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
            int stage = it % STAGES;
            if (lane == 0) {
                uint32_t full = smem_addr(&sm->kv_full[stage]);
                mbar_wait(smem_addr(&sm->kv_empty[stage]), (it / STAGES & 1) ^ 1);
                mbar_arrive_expect(full, TILE_BYTES);
                tma_load_3d(smem_addr(sm->kv[stage]), kv_map, full, 0, row, 0, policy);
                if (k == 0) { // after the first page, which need not wait for the last item's scores
                    uint32_t q_full = smem_addr(&sm->q_full);
                    mbar_wait(smem_addr(&sm->q_empty), (item & 1) ^ 1);
                    mbar_arrive_expect(q_full, TILE_BYTES);
                    tma_load_4d(smem_addr(sm->q), q_map, q_full, 0, blockIdx.x * ROWS, 0, w.s);
                }
            }
            __syncwarp();
        }
        item += stop > u - w.base;
        u = w.base + max(stop, u - w.base);
        w.base += n;
    }
}

__device__ __forceinline__ float *part_place(const Params &p, int group, int which)
{
    return p.part + (((int64_t)group * gridDim.x + blockIdx.x) * 2 + which) * PART_FLOATS;
}

/* Where a part keeps the sums of columns 256 half + 16 j + 2 (lane % 4) + {0, 1, 8, 9} of row r, in
 * quadruples: the order in which a warp holds them, so that it writes whole lines. */
__device__ __forceinline__ int part_at(int r, int half, int j, int lane)
{
    return ((r / 8 * 2 + half) * 16 + j) * 32 + lane;
}

__device__ __forceinline__ void out_write(const Params &p, int s, int row0, const float (&o)[128],
                                          const float (&l)[2])
{
    int tid = threadIdx.x, wg = tid / 128, rows = p.q_rows * p.heads;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = blockIdx.x * ROWS + row0 + half * 8;
        float f = l[half] > 0 ? 1.f / l[half] : 0.f;
        uint4 *to = (uint4 *)(p.out + ((int64_t)s * rows + r) * LATENT + wg * 256) + tid % 4;
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            uint32_t w[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int i = 4 * (j + k) + 2 * half;
                w[k] = bf16_pair(o[i] * f, o[i + 1] * f);
            }
            quad_transpose(w);
            if (r < rows)
                to[j] = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

/* Adds the parts of groups first..last, in this order, into the item's rows. */
__device__ __forceinline__ void combine(const Params &p, Smem *sm, int s, int item_begin, int first,
                                        int last, int share)
{
    int tid = threadIdx.x, all_rows = p.q_rows * p.heads;
    int rows = min(ROWS, all_rows - (int)blockIdx.x * ROWS);
    // only the first group can hold the item as its second
    int64_t stride = (int64_t)gridDim.x * 2 * PART_FLOATS;
    const float *parts = part_place(p, first, 0);
    int first_at = part_of(item_begin, first, share) * PART_FLOATS;

    // maximum and sum of each row, by 4 threads; the probabilities' place is free
    float2 *stat = (float2 *)sm->p; // [4][ROWS]
    if (tid % ROWS < rows) {
        float top = -INFINITY, sum = 0;
        for (int g = first + tid / ROWS; g <= last; g += CONSUMERS / ROWS) {
            const float *from = parts + (g - first) * stride + (g == first ? first_at : 0) +
                                ROWS * LATENT + tid % ROWS;
            float m = __ldcg(from), l = __ldcg(from + ROWS), now = fmaxf(top, m);
            if (now > -INFINITY)
                sum = sum * exp2f((top - now) * p.scale_log2) + l * exp2f((m - now) * p.scale_log2);
            top = now;
        }
        stat[tid] = make_float2(top, sum);
    }
    named_sync(1, CONSUMERS);
    // BATCH groups of 8 rows at a time, all their loads in flight; of each, a thread has 4 quadruples
    int warp = tid / 32, lane = tid % 32;
    for (int r0 = lane / 4; r0 - lane / 4 < rows; r0 += 8 * BATCH) {
        float shift[BATCH], f[BATCH];
        float4 o[BATCH][4];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int r = min(r0 + 8 * b, rows - 1);
            float top = -INFINITY, sum = 0;
#pragma unroll
            for (int k = 0; k < CONSUMERS / ROWS; k++)
                top = fmaxf(top, stat[k * ROWS + r].x);
            shift[b] = top == -INFINITY ? 0.f : top * p.scale_log2;
#pragma unroll
            for (int k = 0; k < CONSUMERS / ROWS; k++)
                sum += stat[k * ROWS + r].y * exp2f(stat[k * ROWS + r].x * p.scale_log2 - shift[b]);
            f[b] = sum > 0 ? 1.f / sum : 0.f;
#pragma unroll
            for (int k = 0; k < 4; k++)
                o[b][k] = make_float4(0, 0, 0, 0);
        }
        for (int g = first; g <= last; g++) {
            const float *from = parts + (g - first) * stride + (g == first ? first_at : 0);
            float w[BATCH];
            float4 v[BATCH][4];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                int r = r0 + 8 * b;
                if (r >= rows)
                    continue;
                w[b] = __ldcg(from + ROWS * LATENT + r);
#pragma unroll
                for (int k = 0; k < 4; k++)
                    v[b][k] = __ldcg((const float4 *)from + part_at(r, (warp + 8 * k) / 16,
                                                                    (warp + 8 * k) % 16, lane));
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                if (r0 + 8 * b >= rows)
                    continue;
                w[b] = exp2f(w[b] * p.scale_log2 - shift[b]);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    o[b][k].x += w[b] * v[b][k].x;
                    o[b][k].y += w[b] * v[b][k].y;
                    o[b][k].z += w[b] * v[b][k].z;
                    o[b][k].w += w[b] * v[b][k].w;
                }
            }
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int r = r0 + 8 * b;
            if (r >= rows)
                continue;
            uint32_t *to = (uint32_t *)(p.out + ((int64_t)s * all_rows + blockIdx.x * ROWS + r) * LATENT);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int at = (warp + 8 * k) * 8 + lane % 4; // in pairs of columns
                to[at] = bf16_pair(o[b][k].x * f[b], o[b][k].y * f[b]);
                to[at + 4] = bf16_pair(o[b][k].z * f[b], o[b][k].w * f[b]);
            }
        }
    }
}

/* Leaves this group's part; the last group to do so for the item writes the item's rows. */
__device__ __forceinline__ void part_add(const Params &p, Smem *sm, int s, int row0,
                                         const float (&o)[128], const float (&m)[2],
                                         const float (&l)[2], int item_begin, int item_end, int share)
{
    int tid = threadIdx.x, rows = p.q_rows * p.heads - blockIdx.x * ROWS, group = blockIdx.y;
    float *part = part_place(p, group, part_of(item_begin, group, share));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = row0 + 8 * half;
        if (r >= rows)
            continue;
        if (tid < 128 && tid % 4 == 0) {
            part[ROWS * LATENT + r] = m[half];
            part[ROWS * LATENT + ROWS + r] = l[half];
        }
#pragma unroll
        for (int j = 0; j < 16; j++) {
            int i = 8 * j + 2 * half;
            ((float4 *)part)[part_at(r, tid / 128, j, tid % 32)] =
                make_float4(o[i], o[i + 1], o[i + 4], o[i + 5]);
        }
    }
    int first = item_begin / share, last = (item_end - 1) / share;
    __threadfence();
    named_sync(1, CONSUMERS);
    if (tid == 0) {
        int32_t *counter = p.counter + s * gridDim.x + blockIdx.x;
        sm->last = atomicAdd(counter, 1) == last - first;
        if (sm->last)
            *counter = 0; // for the next launch
    }
    named_sync(1, CONSUMERS);
    if (!sm->last)
        return;
    __threadfence();
    combine(p, sm, s, item_begin, first, last, share);
}

__device__ __forceinline__ void attend(const Params &p, Smem *sm, Stretch w)
{
    int tid = threadIdx.x, wg = tid / 128, lane = tid % 32;
    int row0 = tid / 32 % 4 * 16 + lane / 4; // and row0 + 8
    int it = 0, item = 0;
    uint64_t q_desc = wgmma_desc(smem_addr(sm->q));
    uint64_t p_desc = wgmma_desc(smem_addr(sm->p));
    float o[128], s_acc[16];
    for (int u = w.begin; u < w.end; w.s++) {
        int n = p.n_ctx[w.s], n_pages = pages_of(n), stop = min(n_pages, w.end - w.base);
        int page0 = u - w.base;
        if (page0 >= stop) {
            w.base += n_pages;
            continue;
        }
        int seen[2]; // slots that this thread's two rows see
#pragma unroll
        for (int half = 0; half < 2; half++)
            seen[half] = n - p.q_rows + 1 + (int)(blockIdx.x * ROWS + row0 + 8 * half) / p.heads;
        float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 128; i++)
            o[i] = 0;
        mbar_wait(smem_addr(&sm->q_full), item & 1);
        for (int page = page0; page < stop; page++, it++) {
            int stage = it % STAGES;
            uint32_t kv = smem_addr(sm->kv[stage]);
            mbar_wait(smem_addr(&sm->kv_full[stage]), it / STAGES & 1);

            uint64_t k_desc = wgmma_desc(kv + wg * 32 * 128);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++) {
                int at = k / 4 * (BLOCK_BYTES / 16) + k % 4 * 2;
                wgmma<32>(s_acc, q_desc + at, k_desc + at, k > 0);
            }
            wgmma_commit();
            int left = n - page * PAGE; // slots in this page
            if (left < PAGE)
#pragma unroll 1
                for (int i = tid; i < (PAGE - left) * 64; i += CONSUMERS) {
                    int r = left + i / 64, c = i % 64;
                    *(uint4 *)(sm->kv[stage] + c / 8 * BLOCK_BYTES + r * 128 + c % 8 * 16) =
                        make_uint4(0, 0, 0, 0);
                }
            wgmma_wait<0>();
            if (page == stop - 1 && lane == 0)
                mbar_arrive(smem_addr(&sm->q_empty));

            int slot = page * PAGE + wg * 32 + lane % 4 * 2;
            if (left - PAGE < p.q_rows - 1) {
#pragma unroll
                for (int j = 0; j < 16; j++)
                    if (slot + j / 4 * 8 + j % 2 >= seen[j % 4 / 2])
                        s_acc[j] = -INFINITY;
            }
            float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int j = 0; j < 16; j++)
                top[j % 4 / 2] = fmaxf(top[j % 4 / 2], s_acc[j]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
                top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
                if (lane % 4 == 0)
                    sm->max_part[wg][row0 + 8 * half] = top[half];
            }
            named_sync(1, CONSUMERS);
            float alpha[2], shift[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float now = fmaxf(m[half], fmaxf(top[half], sm->max_part[wg ^ 1][row0 + 8 * half]));
                shift[half] = now == -INFINITY ? 0.f : now * p.scale_log2;
                alpha[half] = exp2f(m[half] * p.scale_log2 - shift[half]);
                m[half] = now;
                l[half] *= alpha[half];
            }
#pragma unroll
            for (int j = 0; j < 16; j++) {
                s_acc[j] = exp2f(s_acc[j] * p.scale_log2 - shift[j % 4 / 2]);
                l[j % 4 / 2] += s_acc[j];
            }
#pragma unroll
            for (int j = 0; j < 8; j++) { // two neighbours of one row
                int r = row0 + j % 2 * 8, c = wg * 4 + j / 2;
                *(__nv_bfloat162 *)(sm->p + r * 128 + ((c ^ (r & 7)) << 4) + lane % 4 * 4) =
                    __floats2bfloat162_rn(s_acc[2 * j], s_acc[2 * j + 1]);
            }
            if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < 128; i++)
                    o[i] *= alpha[i % 4 / 2];
            }
            fence_async();
            named_sync(1, CONSUMERS);

            uint64_t v_desc = wgmma_desc_turned(kv + wg * 4 * BLOCK_BYTES);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < PAGE / 16; k++)
                wgmma_turned(o, p_desc + k * 2, v_desc + k * (2048 / 16));
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0)
                mbar_arrive(smem_addr(&sm->kv_empty[stage]));
        }
        item++;

        // each warpgroup has the sums of its half of the slots
#pragma unroll
        for (int half = 0; half < 2; half++) {
            l[half] += __shfl_xor_sync(~0u, l[half], 1);
            l[half] += __shfl_xor_sync(~0u, l[half], 2);
            if (lane % 4 == 0)
                sm->sum_part[wg][row0 + 8 * half] = l[half];
        }
        named_sync(1, CONSUMERS);
#pragma unroll
        for (int half = 0; half < 2; half++)
            l[half] = sm->sum_part[0][row0 + 8 * half] + sm->sum_part[1][row0 + 8 * half];
        if (page0 == 0 && stop == n_pages)
            out_write(p, w.s, row0, o, l);
        else
            part_add(p, sm, w.s, row0, o, m, l, w.base, w.base + n_pages, w.share);
        u = w.base + stop;
        w.base += n_pages;
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    mla_decode_kernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap kv_map, const Params p)
{
    extern __shared__ uint8_t raw[];
    Smem *sm = (Smem *)(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
    if (threadIdx.x == CONSUMERS) {
        tma_prefetch_map(&q_map);
        tma_prefetch_map(&kv_map);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem_addr(&sm->kv_full[i]), 1);
            mbar_init(smem_addr(&sm->kv_empty[i]), CONSUMERS / 32);
        }
        mbar_init(smem_addr(&sm->q_full), 1);
        mbar_init(smem_addr(&sm->q_empty), CONSUMERS / 32);
        mbar_init_fence();
    }
    launch::next_may_start();
    launch::previous_done();
    Stretch w = stretch_find(p.n_ctx, p.S, blockIdx.y, gridDim.y);
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        regs_shrink<40>();
        if (threadIdx.x < CONSUMERS + 32)
            copy_pages(&q_map, &kv_map, p, sm, w);
    } else {
        regs_grow<232>();
        attend(p, sm, w);
    }
}

int sm_count()
{
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 0;
    return n;
}

int tile_count(int q_rows, int heads) { return (q_rows * heads + ROWS - 1) / ROWS; }

size_t part_bytes(int n_sm) { return (size_t)n_sm * 2 * PART_FLOATS * sizeof(float); }

} // namespace

size_t cu_mla_decode_work_bytes(int max_S, int max_q_rows, int heads, int max_ctx)
{
    (void)max_ctx; // parts go by multiprocessor, not by context
    return part_bytes(sm_count()) + (size_t)max_S * tile_count(max_q_rows, heads) * sizeof(int32_t);
}

cudaError_t cu_mla_decode(const struct cu_mla_decode_args *a, cudaStream_t stream)
{
    if (a->S == 0)
        return cudaSuccess;
    int n_sm = sm_count();
    if (a->S < 0 || a->q_rows < 1 || a->heads < 1 || a->n_pages < 1 || a->n_layers < 1 ||
        a->layer < 0 || a->layer >= a->n_layers || a->max_pages < 1 || n_sm < MAX_TILES ||
        tile_count(a->q_rows, a->heads) > MAX_TILES ||
        (int64_t)a->n_pages * a->n_layers * PAGE > INT32_MAX)
        return cudaErrorInvalidValue;
    int tiles = tile_count(a->q_rows, a->heads), rows = a->q_rows * a->heads;

    Params p = params_of(a, part_bytes(n_sm));
    if (rows <= MAX_NARROW && a->S >= NARROW_FROM)
        return mla_narrow(a, p, n_sm, stream);

    CUtensorMap q_map, kv_map;
    if (!maps_of(a, ROWS, WIDTH / 64, &q_map, &kv_map))
        return cudaErrorInvalidValue;
    p.n_groups = groups_for((int64_t)a->S * ((a->max_ctx + PAGE - 1) / PAGE), n_sm / tiles);
    const int smem = sizeof(Smem) + 1024;
    cudaError_t e =
        cudaFuncSetAttribute(mla_decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (e != cudaSuccess)
        return e;
    return launch::start(mla_decode_kernel, dim3(tiles, p.n_groups), THREADS, smem, 1, stream, q_map, kv_map, p);
}
