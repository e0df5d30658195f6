/* moe_gemm.cu: the experts' matrix products over rows sorted by expert, sizes read on the device.
 *
 * Both products are out[slot, n] = sum_k w_e[n, k] x[row(slot), k]. The weights take the 64-row side
 * of the warpgroup product and the tokens the narrow one (8, 16, 32, 64 .. columns), so that an
 * expert with four rows costs four columns and not half a tile of zeros. A block multiplies two sets
 * of weight rows by the same tokens: gate and up of the same columns, which makes SwiGLU local to a
 * register, or two neighbouring row blocks of down.
 *
 * The grid is fixed and persistent: each block finds its tiles from expert_start. One warp fills a
 * ring of shared-memory stages (64 columns of K each) with tensor copies: weights in boxes, gathered
 * tokens one row a copy (wide tiles': by the threads of a warpgroup), contiguous ones eight. It runs ahead over tile boundaries, so the weights
 * never stop while a result is written. Rows beyond a tile's count are stale bytes: they feed only
 * columns that nobody stores.
 *
 * Launches overlap (launch.cuh). gate_up cannot know its tiles before routing has ended, but the
 * shared expert is always among them: at small T it is brought into L2 meanwhile. down starts with
 * tiles in hand, as gate_up lets it start only after routing has ended, and fills its ring with
 * weights before gate_up's results are there.
 *
 * Three shapes. Narrow: tiles of 64 tokens, one consumer warpgroup, nine stages with 144 KB of weights
 * in flight: bound by memory; each weight is read from it once. From 32 tokens on two warpgroups
 * share them (five stages, 160 KB): at 512 tokens x was a third of what came from L2. Wide: tiles of up to 192 tokens by
 * 256 weight rows, two consumer warpgroups, three stages: bound by the tensor cores. Tiles of
 * 128 x 256 read 48 KB from L2 for each 1024 cycles of product and keep shared memory busy for 1150,
 * those of 192 x 256 read 56 KB for 1536 and take 1470. An expert's tokens are cut evenly in steps of 16, so that little of a product is for
 * nobody.
 *
 * Measured on an H100 80GB (read ceiling 3.09 TB/s) by kernels_bench moe, microseconds of gate_up and
 * down at the real shapes (2048 x 1536, 64 + 1 experts, top 4):
 *   tokens                        8          64         256         512        8192
 *   tokens gathered by the copies 138/71   324/142    350/150     572/161    3849/638
 *   gathered in memory from 64 on 138/71   277/142    292/153     320/161    1675/664
 *   sums start as zeros, no branch        136/70    282/141    293/152     324/163     945/432
 * On an H200 (4.3 TB/s):
 *   tokens                        8          32         64         256         512        8192
 *   one warpgroup up to 640       107/56     215/100    209/106    219/114     236/121    783/387
 *   two, gathered, from 32 on                187/99     200/103    215/113     221/118
 * 277 us are 2.95 TB/s of weights; 8192 tokens run at 546 and 597 TFLOP/s. (A run-time "first step?"
 * flag in each product kept the compiler from leaving products in flight: half the speed when wide.)
 */
#include "kernels/cuda.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"

using namespace hopper;

#define MAX_EXPERTS 127 /* with the shared one */
#define PER_LANE    ((MAX_EXPERTS + 1) / 32)
#define TILE_K      64  /* columns of K per stage: 128 bytes, one swizzled row */
#define SET_BYTES   (64 * TILE_K * 2)
#define WIDE        192 /* tokens of a wide tile at most, */
#define WIDE_STEP   16  /* and cut to multiples of this */
#define WIDE_MIN    96  /* the shared expert's are not cut smaller than this */
#define WIDE_AHEAD  11  /* cuts of an expert that go through all weights before the next ones */

enum x_source {
    X_ROWS,   // row of a slot is its own: contiguous, eight a copy
    X_BOX,    // likewise, 32 a copy, rows of the next expert included
    X_GATHER, // slot_token says which row; one a copy
    X_FETCH,  // likewise, by the threads of a warpgroup, 16 bytes a copy
};

/* Rows per copy. */
template <enum x_source SOURCE>
constexpr int x_box = SOURCE == X_GATHER ? 1 : SOURCE == X_BOX ? 32 : 8;

/* From here on tokens are gathered into slot order first: one row a copy costs more than that.
 * Above, in wide tiles, the producer's threads fetch them. */
#define GATHER_FROM 32

/* From here on x is worth halving: two warpgroups multiply twice the weight rows by it. */
#define TWO_GROUPS_FROM 32

/* Up to here routing leaves memory idle for long enough to bring in the shared expert. */
#ifndef AHEAD_UP_TO
#define AHEAD_UP_TO 16
#endif

struct experts {
    const int32_t *expert_start;
    const int32_t *slot_token;
    const cu_bf16 *x;  // X_FETCH's rows
    cu_bf16 *out;      // [slots, n_out]
    int n_experts;     // with the shared one
    int n_out;         // outputs per row
    int per_cut;       // tiles that share tokens
    int w_rows;        // weight rows per expert
    int K;
    int second_row;    // weight rows from a tile's first set to its second (down), 0: other tensor
    const void *ahead[3]; // weights that this launch and the next read for sure, or NULL
    uint32_t ahead_bytes; // of each
};

template <int TOKENS, int GROUPS> struct shape {
    static constexpr int W_BYTES = 2 * GROUPS * SET_BYTES;
    static constexpr int X_BYTES = TOKENS * TILE_K * 2;
    static constexpr int STAGE_BYTES = W_BYTES + X_BYTES;
    static constexpr int OUT_BYTES = GROUPS * TOKENS * 128; // results on their way out
    static constexpr int N_STAGES = (224 * 1024 - OUT_BYTES) / STAGE_BYTES;
    static constexpr int THREADS = GROUPS == 1 ? 160 : 384; // whole warpgroups trade registers
};

struct tail { // behind the stages and the results
    uint64_t full[16], empty[16];
    int32_t start[MAX_EXPERTS + 1];
    int32_t tile[MAX_EXPERTS + 1]; // first tile of each expert
};

/* ---- tiles ---- */

struct tile {
    int expert, row, n_rows, m; // m: which weight rows
};

/* Tiles of an expert are adjacent, those that share weights first. Narrow tiles are cut to full
 * ones and a rest, wide ones to equal parts in steps of WIDE_STEP. */
template <int TOKENS>
static __device__ bool tile_find(const struct tail *s, int n_experts, int per_cut, int idx,
                                 struct tile *t)
{
    if (idx >= s->tile[n_experts])
        return false;
    if (idx >= s->tile[t->expert + 1]) { // the last expert whose first tile is not beyond idx
        int end = n_experts;
        t->expert++;
        while (end - t->expert > 1) {
            int mid = (t->expert + end) / 2;
            if (s->tile[mid] <= idx)
                t->expert = mid;
            else
                end = mid;
        }
    }
    int first = s->start[t->expert], rows = s->start[t->expert + 1] - first;
    int i = idx - s->tile[t->expert];
    if (TOKENS < WIDE) {
        int cuts = (rows + TOKENS - 1) / TOKENS;
        t->m = i / cuts;
        int cut = i - t->m * cuts;
        t->row = first + cut * TOKENS;
        t->n_rows = min(rows - cut * TOKENS, TOKENS);
    } else {
        int cuts = (s->tile[t->expert + 1] - s->tile[t->expert]) / per_cut;
        int before = i / (WIDE_AHEAD * per_cut) * WIDE_AHEAD, n = min(cuts - before, WIDE_AHEAD);
        i -= before * per_cut;
        t->m = i / n;
        int cut = before + i - t->m * n, steps = (rows + WIDE_STEP - 1) / WIDE_STEP;
        int begin = steps * cut / cuts * WIDE_STEP, end = steps * (cut + 1) / cuts * WIDE_STEP;
        t->row = first + begin;
        t->n_rows = min(rows, end) - begin;
    }
    return true;
}

/* One warp: the first tile of each expert, from their first slots. */
template <int TOKENS>
static __device__ void tiles_count(struct tail *s, int n_experts, int per_cut)
{
    int lane = threadIdx.x & 31, first = lane * PER_LANE, sum = 0, n[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int e = first + i;
        n[i] = e < n_experts ? (s->start[e + 1] - s->start[e] + TOKENS - 1) / TOKENS * per_cut : 0;
        sum += n[i];
    }
    int before = sum;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(~0u, before, d);
        before += lane >= d ? other : 0;
    }
    before -= sum;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (first + i <= n_experts)
            s->tile[first + i] = before;
        before += n[i];
    }
    __syncwarp();
    if (TOKENS == WIDE && lane == 0) {
        // The shared expert's tiles come last: smaller ones, so that no block idles in the last round
        int shared = s->tile[n_experts - 1], all = s->tile[n_experts], grid = gridDim.x;
        int rows = s->start[n_experts] - s->start[n_experts - 1];
        int cuts = ((all + grid - 1) / grid * grid - shared) / per_cut;
        s->tile[n_experts] = max(all, shared + min(cuts, rows / WIDE_MIN) * per_cut);
    }
}

/* ---- consumer ---- */

struct ring {
    uint32_t base, full, empty; // shared addresses
    int stage;
    uint32_t parity;
};

template <int N_STAGES> static __device__ __forceinline__ void ring_step(struct ring *r)
{
    if (++r->stage == N_STAGES) {
        r->stage = 0;
        r->parity ^= 1;
    }
}

static __device__ __forceinline__ float swiglu(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

/* One set of 64 outputs for the tile's tokens, from registers through shared memory (transposed:
 * a token's outputs become adjacent) to its rows. */
template <int N, typename VALUE>
static __device__ __forceinline__ void set_store(uint32_t out, int group, cu_bf16 *dst, int n_out,
                                                 int n_rows, VALUE value)
{
    int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        int row = 8 * j + (lane & 7), chunk = 2 * warp + ((lane >> 3) & 1);
        stmatrix_x2_trans(out + row * 128 + ((chunk ^ (row & 7)) << 4),
                          bf16_pair(value(4 * j), value(4 * j + 1)),
                          bf16_pair(value(4 * j + 2), value(4 * j + 3)));
    }
    named_sync(1 + group, 128);
    int chunk = thread & 7;
#pragma unroll
    for (int row = thread >> 3; row < N; row += 16) {
        if (row < n_rows) {
            uint4 v;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "r"(out + row * 128 + ((chunk ^ (row & 7)) << 4)));
            *(uint4 *)(dst + (int64_t)row * n_out + chunk * 8) = v;
        }
    }
    named_sync(1 + group, 128); // the bytes may be overwritten
}

/* All of K for one tile of at most N tokens, then its outputs. */
template <int N, int TOKENS, int GROUPS, enum x_source SOURCE, bool SWIGLU>
static __device__ __forceinline__ void tile_compute(struct ring *r, uint32_t out, int group,
                                                    const struct experts *a, const struct tile *t)
{
    using S = shape<TOKENS, GROUPS>;
    float acc0[N / 2] = {}, acc1[N / 2] = {};
    int n_steps = a->K / TILE_K;
    uint32_t last = 0;
    for (int step = 0; step < n_steps; step++) {
        mbar_wait(r->full + r->stage * 8, r->parity);
        if (SOURCE == X_FETCH)
            fence_async();
        uint32_t at = r->base + r->stage * S::STAGE_BYTES;
        uint64_t w0 = wgmma_desc(at + group * SET_BYTES);
        uint64_t w1 = wgmma_desc(at + (GROUPS + group) * SET_BYTES);
        uint64_t x = wgmma_desc(at + S::W_BYTES);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++) {
            wgmma<N>(acc0, w0 + 2 * k, x + 2 * k, 1);
            wgmma<N>(acc1, w1 + 2 * k, x + 2 * k, 1);
        }
        wgmma_commit();
        wgmma_wait<1>(); // the step before has been read
        if (step && (threadIdx.x & 31) == 0)
            mbar_arrive(last);
        last = r->empty + r->stage * 8;
        ring_step<S::N_STAGES>(r);
    }
    wgmma_wait<0>();
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(last);

    cu_bf16 *dst = a->out + (int64_t)t->row * a->n_out + group * 64;
    if (SWIGLU) {
        set_store<N>(out, group, dst + t->m * GROUPS * 64, a->n_out, t->n_rows,
                     [&](int i) { return swiglu(acc0[i], acc1[i]); });
    } else {
        dst += t->m * GROUPS * 128;
        set_store<N>(out, group, dst, a->n_out, t->n_rows, [&](int i) { return acc0[i]; });
        set_store<N>(out, group, dst + GROUPS * 64, a->n_out, t->n_rows,
                     [&](int i) { return acc1[i]; });
    }
}

template <int TOKENS, int GROUPS, enum x_source SOURCE, bool SWIGLU>
static __device__ void consume(struct ring r, uint32_t out, const struct tail *s,
                               const struct experts *a)
{
    int group = threadIdx.x / 128;
    out += group * TOKENS * 128;
    struct tile t = {};
    for (int idx = blockIdx.x; tile_find<TOKENS>(s, a->n_experts, a->per_cut, idx, &t);
         idx += gridDim.x) {
        if (TOKENS == 64) {
            if (t.n_rows <= 8)
                tile_compute<8, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
            else if (t.n_rows <= 16)
                tile_compute<16, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
            else if (t.n_rows <= 32)
                tile_compute<32, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
            else
                tile_compute<64, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
        } else {
            switch ((t.n_rows + WIDE_STEP - 1) / WIDE_STEP) {
            case 1:
            case 2:
                tile_compute<32, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 3:
            case 4:
                tile_compute<64, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 5:
            case 6:
                tile_compute<96, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 7:
                tile_compute<112, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 8:
                tile_compute<128, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 9:
                tile_compute<144, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 10:
                tile_compute<160, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            case 11:
                tile_compute<176, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
                break;
            default:
                tile_compute<TOKENS, TOKENS, GROUPS, SOURCE, SWIGLU>(&r, out, group, a, &t);
            }
        }
    }
}

/* ---- producer ---- */

/* Announces all that a stage gets and starts on its weights; x follows. */
template <int TOKENS, int GROUPS>
static __device__ __forceinline__ void weights_load(uint32_t at, uint32_t bar, int x_bytes,
                                                    const struct experts *a, const CUtensorMap *w0,
                                                    const CUtensorMap *w1, int col, int row,
                                                    uint64_t once)
{
    constexpr int W_BYTES = shape<TOKENS, GROUPS>::W_BYTES;
    mbar_arrive_expect(bar, W_BYTES + x_bytes);
    if (TOKENS == 64) {
        tma_load_2d(at, w0, bar, col, row, once);
        tma_load_2d(at + W_BYTES / 2, w1, bar, col, row + a->second_row, once);
    } else { // several tiles share these
        tma_load_2d(at, w0, bar, col, row);
        tma_load_2d(at + W_BYTES / 2, w1, bar, col, row + a->second_row);
    }
}

template <int TOKENS, int GROUPS, enum x_source SOURCE>
static __device__ void produce(struct ring r, const struct tail *s, const struct experts *a,
                               const CUtensorMap *w0, const CUtensorMap *w1, const CUtensorMap *x)
{
    using S = shape<TOKENS, GROUPS>;
    constexpr int BOX = x_box<SOURCE>;
    int lane = threadIdx.x & 31, n_steps = a->K / TILE_K;
    uint64_t once = policy_evict_first();
    r.parity = 1; // a fresh stage is empty
    struct tile t = {};
    bool is_first = true;
    for (int idx = blockIdx.x; tile_find<TOKENS>(s, a->n_experts, a->per_cut, idx, &t);
         idx += gridDim.x) {
        int w_row = t.expert * a->w_rows + t.m * GROUPS * (a->second_row ? 128 : 64);
        int token[TOKENS / 32];
        if (SOURCE == X_GATHER) {
#pragma unroll
            for (int i = 0; i < TOKENS / 32; i++)
                token[i] = lane + 32 * i < t.n_rows ? a->slot_token[t.row + lane + 32 * i] : -1;
        }
        int x_rows = (t.n_rows + BOX - 1) / BOX * BOX, x_bytes = x_rows * TILE_K * 2;
        int n_early = 0; // stages whose weights are on their way already
        if (is_first) {
            n_early = min(n_steps, S::N_STAGES);
            if (lane == 0)
                for (int step = 0; step < n_early; step++)
                    weights_load<TOKENS, GROUPS>(r.base + step * S::STAGE_BYTES, r.full + step * 8,
                                                 x_bytes, a, w0, w1, step * TILE_K, w_row, once);
            if (SOURCE != X_GATHER)
                launch::previous_done(); // for x
            is_first = false;
        }
        for (int step = 0; step < n_steps; step++) {
            mbar_wait(r.empty + r.stage * 8, r.parity);
            uint32_t at = r.base + r.stage * S::STAGE_BYTES, bar = r.full + r.stage * 8;
            if (lane == 0 && step >= n_early)
                weights_load<TOKENS, GROUPS>(at, bar, x_bytes, a, w0, w1, step * TILE_K, w_row, once);
            __syncwarp();
            at += S::W_BYTES;
            if (SOURCE == X_GATHER) {
#pragma unroll
                for (int i = 0; i < TOKENS / 32; i++)
                    if (token[i] >= 0)
                        tma_load_2d(at + (lane + 32 * i) * 128, x, bar, step * TILE_K, token[i]);
            } else if (lane * BOX < t.n_rows) {
                tma_load_2d(at + lane * BOX * 128, x, bar, step * TILE_K, t.row + lane * BOX);
            }
            ring_step<S::N_STAGES>(&r);
        }
    }
}

/* The same for X_FETCH, a warpgroup's work: eight threads a row, 16 rows at a time. */
template <int TOKENS, int GROUPS>
static __device__ void produce_fetched(struct ring r, const struct tail *s, const struct experts *a,
                                       const CUtensorMap *w0, const CUtensorMap *w1)
{
    using S = shape<TOKENS, GROUPS>;
    int thread = threadIdx.x & 127, chunk = thread & 7, row = thread >> 3, n_steps = a->K / TILE_K;
    uint32_t to = S::W_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4);
    r.parity = 1; // a fresh stage is empty
    struct tile t = {};
    for (int idx = blockIdx.x; tile_find<TOKENS>(s, a->n_experts, a->per_cut, idx, &t);
         idx += gridDim.x) {
        int w_row = t.expert * a->w_rows + t.m * GROUPS * (a->second_row ? 128 : 64);
        uint32_t from[TOKENS / 16]; // in chunks
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++)
            from[i] = row + 16 * i < t.n_rows
                          ? a->slot_token[t.row + row + 16 * i] * (uint32_t)(a->K / 8) + chunk
                          : 0;
        for (int step = 0; step < n_steps; step++) {
            mbar_wait(r.empty + r.stage * 8, r.parity);
            uint32_t at = r.base + r.stage * S::STAGE_BYTES, bar = r.full + r.stage * 8;
            if (thread == 0)
                weights_load<TOKENS, GROUPS>(at, bar, 0, a, w0, w1, step * TILE_K, w_row, 0);
            __syncwarp();
            const uint4 *x = (const uint4 *)a->x + step * (TILE_K / 8);
#pragma unroll
            for (int i = 0; i < TOKENS / 16; i++)
                if (row + 16 * i < t.n_rows)
                    cp_async_16(at + to + i * 2048, x + from[i]);
            mbar_arrive_cp_async(bar);
            ring_step<S::N_STAGES>(&r);
        }
    }
}

/* ---- kernel and launch ---- */

/* This block's share of what comes in handy while routing has not ended; a warp. */
static __device__ void ahead_prefetch(const struct experts *a)
{
    uint32_t n = gridDim.x * 32, piece = ((a->ahead_bytes + n - 1) / n + 127) & ~127u;
    uint64_t at = (uint64_t)(blockIdx.x * 32 + (threadIdx.x & 31)) * piece;
    if (at >= a->ahead_bytes)
        return;
    uint32_t bytes = min(piece, a->ahead_bytes - (uint32_t)at);
#pragma unroll
    for (int i = 0; i < 3; i++)
        bulk_prefetch((const uint8_t *)a->ahead[i] + at, bytes);
}

template <int TOKENS, int GROUPS, enum x_source SOURCE, bool SWIGLU>
static __global__ void __launch_bounds__(shape<TOKENS, GROUPS>::THREADS, 1)
    moe_gemm(const __grid_constant__ CUtensorMap w0, const __grid_constant__ CUtensorMap w1,
             const __grid_constant__ CUtensorMap x, const __grid_constant__ struct experts a)
{
    using S = shape<TOKENS, GROUPS>;
    extern __shared__ __align__(1024) uint8_t smem[];
    struct tail *s = (struct tail *)(smem + S::N_STAGES * S::STAGE_BYTES + S::OUT_BYTES);
    struct ring r = {smem_addr(smem), smem_addr(s->full), smem_addr(s->empty), 0, 0};
    int warp = threadIdx.x / 32;
    if (warp == GROUPS * 4) {
        if ((threadIdx.x & 31) == 0) {
            tma_prefetch_map(&w0);
            tma_prefetch_map(&w1);
            tma_prefetch_map(&x);
            for (int i = 0; i < S::N_STAGES; i++) {
                mbar_init(r.full + i * 8, SOURCE == X_FETCH ? 1 + 128 : 1);
                mbar_init(r.empty + i * 8, GROUPS * 4);
            }
            mbar_init_fence();
        }
    } else if (warp == 0 && a.ahead_bytes) {
        ahead_prefetch(&a);
    }
    if (SOURCE == X_GATHER || SOURCE == X_FETCH)
        launch::previous_done();
    for (int i = threadIdx.x; i <= a.n_experts; i += S::THREADS)
        s->start[i] = a.expert_start[i];
    __syncthreads();
    if (warp == 0)
        tiles_count<TOKENS>(s, a.n_experts, a.per_cut);
    __syncthreads();
    if (threadIdx.x == 0)
        launch::next_may_start();
    if (warp >= GROUPS * 4) {
        if (GROUPS > 1)
            regs_shrink<40>();
        if constexpr (SOURCE == X_FETCH)
            produce_fetched<TOKENS, GROUPS>(r, s, &a, &w0, &w1);
        else if (warp == GROUPS * 4)
            produce<TOKENS, GROUPS, SOURCE>(r, s, &a, &w0, &w1, &x);
    } else {
        if (GROUPS > 1)
            regs_grow<232>();
        consume<TOKENS, GROUPS, SOURCE, SWIGLU>(r, r.base + S::N_STAGES * S::STAGE_BYTES, s, &a);
    }
}

template <int TOKENS, int GROUPS, enum x_source SOURCE, bool SWIGLU>
static cudaError_t launch_experts(const struct experts *a, const cu_bf16 *first, const cu_bf16 *second,
                          const cu_bf16 *x, int x_rows, cudaStream_t stream)
{
    using S = shape<TOKENS, GROUPS>;
    constexpr int smem = S::N_STAGES * S::STAGE_BYTES + S::OUT_BYTES + (int)sizeof(struct tail);
    static_assert(smem <= 227 * 1024, "shared memory of a block");
    auto kernel = moe_gemm<TOKENS, GROUPS, SOURCE, SWIGLU>;
    int device, n_sm;
    cudaError_t err = cudaGetDevice(&device);
    if (!err)
        err = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (!err)
        err = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (err)
        return err;
    CUtensorMap w0, w1, xs;
    uint64_t w_rows = (uint64_t)a->n_experts * a->w_rows;
    if (!tensor_map_2d(&w0, first, w_rows, a->K, a->K, GROUPS * 64) ||
        !tensor_map_2d(&w1, second, w_rows, a->K, a->K, GROUPS * 64) ||
        !tensor_map_2d(&xs, x, x_rows, a->K, a->K, x_box<SOURCE>))
        return cudaErrorInvalidValue;
    return launch::start(kernel, n_sm, S::THREADS, smem, 1, stream, w0, w1, xs, *a);
}

/* out[slot] = x[slot_token[slot]], a block a row. */
static __global__ void gather_rows(const uint4 *x, const int32_t *slot_token, uint4 *out, int n)
{
    const uint4 *from = x + (int64_t)slot_token[blockIdx.x] * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        out[(int64_t)blockIdx.x * n + i] = from[i];
}


/* Consumer warpgroups of a block. */
static int groups(const struct cu_moe_args *a)
{
    return a->T >= TWO_GROUPS_FROM && a->F % 128 == 0 && a->H % 256 == 0 ? 2 : 1;
}

/* Above 40 rows per expert most tiles of 64 would be two. */
static bool is_wide(const struct cu_moe_args *a)
{
    return (int64_t)a->T * a->k > 40 * (int64_t)a->E && groups(a) == 2;
}

static bool is_done_here(const struct cu_moe_args *a)
{
    return a->T > 0 && a->k > 0 && a->E > 0 && a->E < MAX_EXPERTS && a->H > 0 && a->F > 0 &&
           a->H % 128 == 0 && a->F % 64 == 0;
}

cudaError_t cu_moe_gate_up(const struct cu_moe_args *a, cudaStream_t stream)
{
    if (!is_done_here(a))
        return cudaErrorInvalidValue;
    struct experts g = {.expert_start = a->expert_start,
                        .slot_token = a->slot_token,
                        .x = a->x,
                        .out = a->h,
                        .n_experts = a->E + 1,
                        .n_out = a->F,
                        .per_cut = a->F / (64 * groups(a)),
                        .w_rows = a->F,
                        .K = a->H};
    int64_t shared = (int64_t)a->E * a->F * a->H;
    if (a->T <= AHEAD_UP_TO) {
        g.ahead[0] = a->gate + shared;
        g.ahead[1] = a->up + shared;
        g.ahead[2] = a->down + shared;
        g.ahead_bytes = (uint32_t)(a->F * a->H * 2);
    }
    if (is_wide(a))
        return launch_experts<WIDE, 2, X_FETCH, true>(&g, a->gate, a->up, a->x, a->T, stream);
    if (a->T < GATHER_FROM)
        return launch_experts<64, 1, X_GATHER, true>(&g, a->gate, a->up, a->x, a->T, stream);
    int n_slots = a->T * (a->k + 1);
    gather_rows<<<n_slots, 128, 0, stream>>>((const uint4 *)a->x, a->slot_token, (uint4 *)a->y,
                                             a->H / 8);
    cudaError_t err = cudaGetLastError();
    if (err)
        return err;
    if (groups(a) == 2)
        return launch_experts<64, 2, X_ROWS, true>(&g, a->gate, a->up, a->y, n_slots, stream);
    return launch_experts<64, 1, X_ROWS, true>(&g, a->gate, a->up, a->y, n_slots, stream);
}

cudaError_t cu_moe_down(const struct cu_moe_args *a, cudaStream_t stream)
{
    if (!is_done_here(a))
        return cudaErrorInvalidValue;
    struct experts d = {.expert_start = a->expert_start,
                        .slot_token = a->slot_token,
                        .out = a->y,
                        .n_experts = a->E + 1,
                        .n_out = a->H,
                        .per_cut = a->H / (128 * groups(a)),
                        .w_rows = a->H,
                        .K = a->F,
                        .second_row = 64 * groups(a)};
    int n_slots = a->T * (a->k + 1);
    if (!is_wide(a) && groups(a) == 2)
        return launch_experts<64, 2, X_ROWS, false>(&d, a->down, a->down, a->h, n_slots, stream);
    return is_wide(a) ? launch_experts<WIDE, 2, X_BOX, false>(&d, a->down, a->down, a->h, n_slots, stream)
                : launch_experts<64, 1, X_ROWS, false>(&d, a->down, a->down, a->h, n_slots, stream);
}

size_t cu_moe_work_bytes(int max_T, int E, int k)
{
    (void)max_T, (void)E, (void)k;
    return 256; // nothing is kept between launches
}
