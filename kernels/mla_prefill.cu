/* mla_prefill.cu: causal attention of ragged prompt chunks, expanded form, head dimension 256.
 *
 * Block: 128 rows of one sequence and head. Two warpgroups own 64 rows each, with the 64 x 256 sums in
 * registers; one warp copies tiles of 64 keys and 64 values, two stages each. The next tile's scores
 * are in flight while a warpgroup still multiplies the last one's probabilities (kept in registers, as
 * that product's first operand) with its values, and while it does the softmax.
 *
 * Tiles are aligned to the last slot that the block's rows see and go backwards, so that only the
 * first tiles need the causal mask and no copy reaches beyond the sequence's end, whose address the
 * host does not know. The last tile may begin before the sequence does, in its neighbour's slots (or
 * before the array: zeros); those are masked and their values zeroed in shared memory.
 *
 * Keys are 192 columns of the head's own and 64 that all heads share; both land in one tile. A
 * warpgroup turns its queries (RoPE) in shared memory before it starts.
 *
 * Grid: (row blocks, heads). Row blocks are found on the device from q_start, the longest first within
 * a sequence; neighbours in the grid share a head's keys and values in L2.
 */
#include "kernels/cuda.h"
#include "kernels/hopper.cuh"

using namespace hopper;

#define DIM         256
#define NOPE        192
#define KV_HEAD     (NOPE + DIM) /* columns of a head in kv */
#define ROWS        128 /* per block */
#define KEYS        64  /* per tile */
#define STAGES      2
#define CONSUMERS   256
#define THREADS     (CONSUMERS + 128)
#define LINES_BYTES (64 * 128) /* 64 rows x 64 columns */
#define TILE_BYTES  (4 * LINES_BYTES)

namespace {

struct Smem {
    uint8_t q[2][TILE_BYTES];
    uint8_t k[STAGES][TILE_BYTES], v[STAGES][TILE_BYTES];
    uint64_t q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

struct Params {
    const int32_t *q_start, *kv_start;
    const float4 *turn;
    cu_bf16 *out;
    int S, heads;
    float scale_log2;
};

/* What a block works on. The rows [row0, row0 + n_rows) of the packed queries, the first of which sees
 * the slots [kv0, kv0 + seen0) of the packed keys; the last sees n_tiles * KEYS at most. */
struct Job {
    int row0, n_rows, kv0, seen0, seen_end, n_tiles;
};

/* One warp's work, same result in all lanes; n_rows 0: the grid has more blocks than there is work. */
__device__ __forceinline__ Job job_find(const Params &p, int block)
{
    int lane = threadIdx.x % 32;
    Job job = {};
    for (int s0 = 0; s0 < p.S; s0 += 32) {
        int s = s0 + lane, n = s < p.S ? p.q_start[s + 1] - p.q_start[s] : 0;
        int blocks = (n + ROWS - 1) / ROWS, sum = blocks;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            int below = __shfl_up_sync(~0u, sum, o);
            sum += lane >= o ? below : 0;
        }
        unsigned past = __ballot_sync(~0u, sum > block);
        if (!past) {
            block -= __shfl_sync(~0u, sum, 31);
            continue;
        }
        int found = __ffs(past) - 1;
        s = s0 + found;
        n = __shfl_sync(~0u, n, found);
        blocks = __shfl_sync(~0u, blocks, found);
        block -= __shfl_sync(~0u, sum, found) - blocks;
        int i0 = (blocks - 1 - block) * ROWS; // longest first
        job.row0 = p.q_start[s] + i0;
        job.n_rows = min(ROWS, n - i0);
        job.kv0 = p.kv_start[s];
        job.seen0 = p.kv_start[s + 1] - job.kv0 - n + 1 + i0;
        job.seen_end = job.seen0 + job.n_rows - 1;
        job.n_tiles = job.seen_end > 0 ? (job.seen_end + KEYS - 1) / KEYS : 0;
        break;
    }
    return job;
}

__device__ __forceinline__ void copy_tiles(const CUtensorMap *q_map, const CUtensorMap *k_map,
                                           const CUtensorMap *rope_map, const CUtensorMap *v_map,
                                           Smem *sm, const Job &job, int head)
{
    uint32_t q_full = smem_addr(&sm->q_full);
    mbar_arrive_expect(q_full, 2 * TILE_BYTES);
    for (int wg = 0; wg < 2; wg++)
        tma_load_4d(smem_addr(sm->q[wg]), q_map, q_full, 0, job.row0 + wg * 64, 0, head);
    for (int t = 0; t < job.n_tiles; t++) {
        int stage = t % STAGES, parity = (t / STAGES & 1) ^ 1;
        int row = job.kv0 + job.seen_end - (t + 1) * KEYS;
        uint32_t k_full = smem_addr(&sm->k_full[stage]), v_full = smem_addr(&sm->v_full[stage]);
        mbar_wait(smem_addr(&sm->k_empty[stage]), parity);
        mbar_arrive_expect(k_full, TILE_BYTES);
        tma_load_4d(smem_addr(sm->k[stage]), k_map, k_full, 0, row, 0, head);
        tma_load_2d(smem_addr(sm->k[stage]) + NOPE / 64 * LINES_BYTES, rope_map, k_full, 0, row);
        mbar_wait(smem_addr(&sm->v_empty[stage]), parity);
        mbar_arrive_expect(v_full, TILE_BYTES);
        tma_load_4d(smem_addr(sm->v[stage]), v_map, v_full, 0, row, 0, head);
    }
}

/* Gives a stage back; once per warp. */
__device__ __forceinline__ void give(uint64_t *empty)
{
    if (threadIdx.x % 32 == 0)
        mbar_arrive(smem_addr(empty));
}

struct Softmax {
    float m[2], l[2]; // row maximum, and this thread's part of the row sum
};

/* Scores to probabilities; alpha: what the sums so far must be multiplied with. */
__device__ __forceinline__ void softmax_step(float (&s)[32], Softmax &x, float (&alpha)[2],
                                             float scale_log2)
{
    float top[2] = {-INFINITY, -INFINITY}, shift[2];
#pragma unroll
    for (int j = 0; j < 32; j++)
        top[j % 4 / 2] = fmaxf(top[j % 4 / 2], s[j]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
        float now = fmaxf(x.m[half], top[half]);
        shift[half] = now == -INFINITY ? 0.f : now * scale_log2;
        alpha[half] = exp2f(x.m[half] * scale_log2 - shift[half]);
        x.m[half] = now;
        x.l[half] *= alpha[half];
    }
#pragma unroll
    for (int j = 0; j < 32; j++) {
        s[j] = exp2f(s[j] * scale_log2 - shift[j % 4 / 2]);
        x.l[j % 4 / 2] += s[j];
    }
}

/* Probabilities as the first operand of the next product: its fragments are the scores' own. */
__device__ __forceinline__ void pack(const float (&s)[32], uint32_t (&p)[16])
{
#pragma unroll
    for (int i = 0; i < 16; i++)
        p[i] = bf16_pair(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void scores(float (&s)[32], uint32_t q, uint32_t k)
{
    uint64_t q_desc = wgmma_desc(q), k_desc = wgmma_desc(k);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        int at = i / 4 * (LINES_BYTES / 16) + i % 4 * 2;
        wgmma<64>(s, q_desc + at, k_desc + at, i > 0);
    }
    wgmma_commit();
}

__device__ __forceinline__ void add_values(float (&o)[128], const uint32_t (&p)[16], uint32_t v)
{
    uint64_t v_desc = wgmma_desc_turned(v);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        wgmma_turned(o, p + 4 * i, v_desc + i * (2048 / 16));
    wgmma_commit();
}

/* Keeps the scores of slots that the row sees: slot in [0, seen). */
__device__ __forceinline__ void mask(float (&s)[32], int slot, int seen)
{
#pragma unroll
    for (int j = 0; j < 32; j++) {
        int at = slot + j / 4 * 8 + j % 2;
        if (at < 0 || at >= seen + j % 4 / 2 * 8)
            s[j] = -INFINITY;
    }
}

/* Values of the first n slots of the tile, which belong to another sequence, become zero. */
__device__ __forceinline__ void zero_values(uint8_t *v, int n, int wg)
{
    for (int i = threadIdx.x % 128; i < n * 32; i += 128)
        *(uint4 *)(v + i % 32 / 8 * LINES_BYTES + i / 32 * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    fence_async();
    named_sync(1 + wg, 128);
}

__device__ __forceinline__ uint32_t turned(uint32_t pair, float c, float s)
{
    __nv_bfloat162 x = *(__nv_bfloat162 *)&pair;
    float a = __low2float(x), b = __high2float(x);
    return bf16_pair(a * c - b * s, b * c + a * s);
}

/* The last 64 columns of a warpgroup's queries, of which t0 is the first row: half a row a thread. Waits
 * for the queries and the first keys while its angles are on their way. */
__device__ __forceinline__ void turn_queries(const Params &p, uint8_t *q, int t0, int n_rows, int wg,
                                             uint64_t *q_full, uint64_t *k_full, int k_parity)
{
    int row = threadIdx.x % 128 / 2, half = threadIdx.x % 2;
    const float4 *from = p.turn + (t0 + min(row, n_rows - 1)) * 16 + half * 8; // two pairs each
    float4 turn[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        turn[i] = __ldg(from + i);
    mbar_wait(smem_addr(q_full), 0);
    mbar_wait(smem_addr(k_full), k_parity);
    if (row < n_rows) {
        uint8_t *line = q + NOPE / 64 * LINES_BYTES + row * 128;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 *at = (uint4 *)(line + (((half * 4 + i) ^ (row & 7)) << 4)), v = *at;
            float4 a = turn[2 * i], b = turn[2 * i + 1];
            *at = make_uint4(turned(v.x, a.x, a.y), turned(v.y, a.z, a.w), turned(v.z, b.x, b.y),
                             turned(v.w, b.z, b.w));
        }
    }
    fence_async();
    named_sync(1 + wg, 128);
}

__device__ __forceinline__ void attend(const Params &p, Smem *sm, const Job &job, int head)
{
    int tid = threadIdx.x, wg = tid / 128, lane = tid % 32;
    int row = wg * 64 + tid / 32 % 4 * 16 + lane / 4; // of the block; and row + 8
    int n_rows = min(64, job.n_rows - wg * 64);
    int seen_min = job.seen0 + wg * 64, seen_max = seen_min + n_rows - 1;
    int t = 0;
    // tiles beyond what this warpgroup sees (all, if it has no rows)
    for (; t < job.n_tiles && (n_rows <= 0 || job.seen_end - (t + 1) * KEYS >= seen_max); t++) {
        mbar_wait(smem_addr(&sm->k_full[t % STAGES]), t / STAGES & 1);
        give(&sm->k_empty[t % STAGES]);
        mbar_wait(smem_addr(&sm->v_full[t % STAGES]), t / STAGES & 1);
        give(&sm->v_empty[t % STAGES]);
    }
    if (n_rows <= 0)
        return;

    float o[128], s[32], alpha[2];
    uint32_t prob[16];
    Softmax x = {{-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
    for (int i = 0; i < 128; i++)
        o[i] = 0;
    uint32_t q = smem_addr(sm->q[wg]);
    int seen = job.seen0 + row, column = lane % 4 * 2;
    if (t < job.n_tiles) {
        int base = job.seen_end - (t + 1) * KEYS;
        turn_queries(p, sm->q[wg], job.row0 + wg * 64, n_rows, wg, &sm->q_full,
                     &sm->k_full[t % STAGES], t / STAGES & 1);
        scores(s, q, smem_addr(sm->k[t % STAGES]));
        wgmma_wait<0>();
        give(&sm->k_empty[t % STAGES]);
        if (base < 0 || base + KEYS > seen_min)
            mask(s, base + column, seen);
        softmax_step(s, x, alpha, p.scale_log2);
        pack(s, prob);
        for (t++; t < job.n_tiles; t++) {
            int stage = t % STAGES, last = (t - 1) % STAGES;
            base = job.seen_end - (t + 1) * KEYS;
            mbar_wait(smem_addr(&sm->k_full[stage]), t / STAGES & 1);
            scores(s, q, smem_addr(sm->k[stage]));
            mbar_wait(smem_addr(&sm->v_full[last]), (t - 1) / STAGES & 1);
            add_values(o, prob, smem_addr(sm->v[last]));
            wgmma_wait<1>();
            give(&sm->k_empty[stage]);
            if (base < 0 || base + KEYS > seen_min)
                mask(s, base + column, seen);
            softmax_step(s, x, alpha, p.scale_log2);
            wgmma_wait<0>();
            give(&sm->v_empty[last]);
            if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < 128; i++)
                    o[i] *= alpha[i % 4 / 2];
            }
            pack(s, prob);
        }
        int last = (t - 1) % STAGES;
        mbar_wait(smem_addr(&sm->v_full[last]), (t - 1) / STAGES & 1);
        if (base < 0)
            zero_values(sm->v[last], -base, wg);
        add_values(o, prob, smem_addr(sm->v[last]));
        wgmma_wait<0>();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = x.l[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float f = sum > 0 ? 1.f / sum : 0.f;
        int r = row + 8 * half;
        uint4 *to = (uint4 *)(p.out + ((int64_t)(job.row0 + r) * p.heads + head) * DIM) + lane % 4;
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            uint32_t w[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int i = 4 * (j + k) + 2 * half;
                w[k] = bf16_pair(o[i] * f, o[i + 1] * f);
            }
            quad_transpose(w);
            if (r < job.n_rows)
                to[j] = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    mla_prefill_kernel(const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap rope_map,
                       const __grid_constant__ CUtensorMap v_map, const Params p)
{
    extern __shared__ uint8_t raw[];
    Smem *sm = (Smem *)(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
    Job job = job_find(p, blockIdx.x);
    if (job.n_rows == 0)
        return;
    if (threadIdx.x == CONSUMERS) {
        tma_prefetch_map(&q_map);
        tma_prefetch_map(&k_map);
        tma_prefetch_map(&rope_map);
        tma_prefetch_map(&v_map);
        mbar_init(smem_addr(&sm->q_full), 1);
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem_addr(&sm->k_full[i]), 1);
            mbar_init(smem_addr(&sm->v_full[i]), 1);
            mbar_init(smem_addr(&sm->k_empty[i]), CONSUMERS / 32);
            mbar_init(smem_addr(&sm->v_empty[i]), CONSUMERS / 32);
        }
        mbar_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        regs_shrink<24>();
        if (threadIdx.x == CONSUMERS)
            copy_tiles(&q_map, &k_map, &rope_map, &v_map, sm, job, blockIdx.y);
    } else {
        regs_grow<240>();
        attend(p, sm, job, blockIdx.y);
    }
}

/* columns of each head's `width` of a [rows, heads, width] array that begin at base, as (64 columns, row,
 * block of columns, head), in boxes of 64 rows of one head. */
bool encode_map(CUtensorMap *ret, const cu_bf16 *base, uint64_t rows, int heads, int width, int columns)
{
    const cuuint32_t blocks = (cuuint32_t)columns / 64;
    const cuuint64_t dims[4] = {64, rows, blocks, (cuuint64_t)heads};
    const cuuint64_t strides[3] = {(cuuint64_t)heads * width * 2, 128, (cuuint64_t)width * 2};
    const cuuint32_t box[4] = {64, 64, blocks, 1};
    return tensor_map(ret, base, 4, dims, strides, box);
}

} // namespace

cudaError_t cu_mla_prefill(const struct cu_mla_prefill_args *a, cudaStream_t stream)
{
    if (a->S == 0 || a->T == 0)
        return cudaSuccess;
    if (a->S < 0 || a->T < 0 || a->heads < 1 || a->heads > 65535)
        return cudaErrorInvalidValue;
    CUtensorMap q_map, k_map, rope_map, v_map;
    const uint64_t unbounded = 1u << 28; // no copy goes past a sequence's end
    if (!encode_map(&q_map, a->q, (uint64_t)a->T, a->heads, DIM, DIM) ||
        !encode_map(&k_map, a->kv, unbounded, a->heads, KV_HEAD, NOPE) ||
        !tensor_map_2d(&rope_map, a->k_rope, unbounded, 64, 64, KEYS) ||
        !encode_map(&v_map, a->kv + NOPE, unbounded, a->heads, KV_HEAD, DIM))
        return cudaErrorInvalidValue;
    Params p;
    p.q_start = a->q_start;
    p.kv_start = a->kv_start;
    p.turn = (const float4 *)a->turn;
    p.out = a->out;
    p.S = a->S;
    p.heads = a->heads;
    p.scale_log2 = a->scale * 1.44269504f;
    const int smem = sizeof(Smem) + 1024;
    cudaError_t e =
        cudaFuncSetAttribute(mla_prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (e != cudaSuccess)
        return e;
    // blocks of S sequences with T rows in all: at most this many
    int64_t blocks = (int64_t)a->T / ROWS + a->S;
    int64_t by_longest = (int64_t)a->S * ((a->max_q + ROWS - 1) / ROWS);
    if (by_longest < blocks)
        blocks = by_longest;
    if (blocks < 1)
        return cudaErrorInvalidValue;
    mla_prefill_kernel<<<dim3((unsigned)blocks, a->heads), THREADS, smem, stream>>>(
        q_map, k_map, rope_map, v_map, p);
    return cudaGetLastError();
}
