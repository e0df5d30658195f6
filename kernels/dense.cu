/* dense.cu: matrix products of at most 16 rows, bound by reading the weights.
 *
 * Weights take the 16-row side of m16n8k16 products, x the narrow one. A block owns some rows of w
 * and all their columns, so no sum crosses blocks: one producer thread streams the rows through a
 * ring of shared-memory stages (256 columns each) and eight warps take 32 columns of every stage,
 * then add up their sums in a fixed order. Tiles have as many rows (at most 16) as divide the output
 * evenly over the multiprocessors. A row's sum has the same order whatever T is.
 *
 * Both operands are read 16 bytes a thread, eight neighbouring columns, where the product wants
 * pairs eight apart: the same columns of w and x meet, and which come first does not matter to the
 * sum's definition.
 *
 * Blocks leave half of a multiprocessor's shared memory free, so the next such kernel of the stream
 * moves in while this one still runs (launch.cuh) and fills its ring, and L2, with its weights: only
 * x waits for the kernel before. That, not the loop, is what counts at batch 1, where a product
 * reads 4 to 21 MB in 1 to 7 us.
 *
 * Measured on an H100 80GB by dense_bench, microseconds per launch in a graph, cuBLAS (with the small
 * operations that cu_qkv_dense and cu_absorb include) and this file:
 *   rows                          1           8          16
 *   q_a + kv_a 2048 -> 1344    5.6  3.8    5.6  4.2    5.6  5.1
 *   q_b 768 -> 5120            6.8  5.3    6.9  5.3    6.9  6.7
 *   absorb 20 x 192 -> 512     5.0  2.9    5.1  3.5    5.2  4.6
 *   v up 20 x 512 -> 256       4.2  3.7    4.2  4.0    4.3  5.0
 *   o 5120 -> 2048            11.4  9.6   11.4 11.2   11.5 12.6
 *   head 2048 -> 154880        221  222    227  227    231  260
 * That was with a fence and an arrival after every stage; now only stages that are used again have
 * them. At 32 rows cuBLAS was ahead nearly everywhere (x no longer fits L1), hence the limit of 16.
 */
#include "kernels/cuda.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"

using namespace hopper;

#define TILE_ROWS    16
#define STAGE_COLS   256
#define ROW_BYTES    (STAGE_COLS * 2)
#define WARPS        8 /* consumers; the producer is one more */
#define THREADS      (WARPS * 32 + 32)
#define MAX_STAGES   32
#define SMEM_BYTES   (104 * 1024) /* two blocks fit a multiprocessor */
#define AHEAD_STAGES 16           /* of weights into L2, beyond the ring */
#define MAX_NORMED   1024         /* columns of x that a norm precedes */
#define RED_PITCH    20           /* floats per token: 16 rows, spread over the banks */

#define NOPE      192
#define ROPE      64
#define LATENT    512
#define HEAD_Q    (NOPE + ROPE)
#define HEAD_V    256
#define HEAD_KV   (LATENT + ROPE)
#define HEAD_ROWS (NOPE + HEAD_V) /* of kv_b */

namespace {

/* Tiles are numbered through heads; w_rows etc. step from head to head. */
struct product {
    const cu_bf16 *x;
    void *y;
    int T, n_in, n_steps; // stages per tile
    int tile_rows, tiles_per_head, n_tiles, tiles_per_block, n_blocks, n_stages;
    int head_out; // outputs per head
    int w_rows;   // rows of w from head to head
    int x_row, x_head, y_row, y_head;
};

template <int N> struct red { // sums of the eight warps on their way together, two tiles
    static constexpr int WARP_FLOATS = N * 8 * RED_PITCH;
    static constexpr int BYTES = 2 * WARPS * WARP_FLOATS * 4;
};

struct ring {
    uint32_t base, full, empty; // shared addresses
    int stage, n_stages, stage_bytes;
    uint32_t parity;
};

__device__ __forceinline__ void ring_step(ring *r)
{
    if (++r->stage == r->n_stages) {
        r->stage = 0;
        r->parity ^= 1;
    }
}

__device__ __forceinline__ uint4 shared_16(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 unpack(uint32_t v)
{
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

__device__ __forceinline__ float warp_sum(float v)
{
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v += __shfl_xor_sync(~0u, v, o);
    return v;
}

__device__ __forceinline__ float squares(uint4 v)
{
    float2 a = unpack(v.x), b = unpack(v.y), c = unpack(v.z), d = unpack(v.w);
    return a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y + c.x * c.x + c.y * c.y + d.x * d.x +
           d.y * d.y;
}

__device__ __forceinline__ uint32_t normed(uint32_t v, float scale, uint32_t w)
{
    float2 x = unpack(v), g = unpack(w);
    return bf16_pair(x.x * scale * g.x, x.y * scale * g.y);
}

/* (x0, x1) turned by position * theta^(-2i/64), pair i of a key or query. */
__device__ __forceinline__ uint32_t rope_pair(uint32_t v, int position, int i, float log2_theta)
{
    float2 x = unpack(v);
    float angle = (float)position * exp2f(-(float)i / 32.f * log2_theta), s, c;
    sincosf(angle, &s, &c);
    return bf16_pair(x.x * c - x.y * s, x.y * c + x.x * s);
}

/* ---- producer ---- */

__device__ int tile_w_row(const product &p, int tile)
{
    int head = tile / p.tiles_per_head;
    return head * p.w_rows + (tile - head * p.tiles_per_head) * p.tile_rows;
}

/* One thread; never waits for the kernel before. */
__device__ void produce(ring r, const product &p, const CUtensorMap *w, int first, int last)
{
    uint64_t once = policy_evict_first();
    int n = (last - first) * p.n_steps, ahead = min(n, r.n_stages + AHEAD_STAGES);
    r.parity = 1; // a fresh stage is empty
    for (int i = 0, tile = first, step = 0, w_row = tile_w_row(p, first); i < n; i++) {
        if (i == r.n_stages) {
            launch::next_may_start(); // its weights queue behind these
            for (int j = i; j < ahead; j++)
                tma_prefetch_2d(w, j % p.n_steps * STAGE_COLS,
                                tile_w_row(p, first + j / p.n_steps));
        }
        mbar_wait(r.empty + r.stage * 8, r.parity);
        mbar_arrive_expect(r.full + r.stage * 8, r.stage_bytes);
        tma_load_2d(r.base + r.stage * r.stage_bytes, w, r.full + r.stage * 8, step * STAGE_COLS,
                    w_row, once);
        ring_step(&r);
        if (++step == p.n_steps) {
            step = 0;
            tile++;
            w_row = tile_w_row(p, tile);
        }
    }
    if (n <= r.n_stages)
        launch::next_may_start();
}

/* ---- consumers ---- */

/* This thread's columns of x for a stage, rows n * 8 + row. */
template <int N>
__device__ __forceinline__ void x_load(const product &p, const cu_bf16 *x, int row, int col, int step,
                                       uint4 (&ret)[N])
{
    int at = step * STAGE_COLS + col;
#pragma unroll
    for (int n = 0; n < N; n++) {
        ret[n] = make_uint4(0, 0, 0, 0);
        if (at < p.n_in && n * 8 + row < p.T)
            ret[n] = *(const uint4 *)(x + (int64_t)(n * 8 + row) * p.x_row + at);
    }
}

/* 1 / rms of rows n * 8 + row, from the parts of the rows that the warps hold. */
template <int N, int DEPTH>
__device__ __forceinline__ void row_scales(const product &p, float eps, const uint4 (&b)[DEPTH][N],
                                           float *part, float (&ret)[N])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < DEPTH; i++)
            if (i < p.n_steps)
                sum += squares(b[i][n]);
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if ((lane & 3) == 0)
            part[warp * CU_DENSE_MAX_T + n * 8 + row] = sum;
    }
    named_sync(1, WARPS * 32);
#pragma unroll
    for (int n = 0; n < N; n++) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            sum += part[w * CU_DENSE_MAX_T + n * 8 + row];
        ret[n] = rsqrtf(sum / (float)p.n_in + eps);
    }
}

/* The eight warps' sums of a tile together, and out. */
template <int N, typename OUT>
__device__ __forceinline__ void tile_store(const product &p, float *red_base, int tile,
                                           const float (&acc)[N][4])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2;
    int head = tile / p.tiles_per_head, out = (tile - head * p.tiles_per_head) * p.tile_rows;
    // two buffers: a warp that is a tile ahead writes to the other one
    float *all = red_base + (tile & 1) * WARPS * red<N>::WARP_FLOATS;
    float *mine = all + warp * red<N>::WARP_FLOATS;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            mine[(n * 8 + (lane & 3) * 2 + (j & 1)) * RED_PITCH + row + (j & 2) * 4] = acc[n][j];
    named_sync(1, WARPS * 32);
    int t = threadIdx.x / TILE_ROWS, o = threadIdx.x % TILE_ROWS;
    if (t >= p.T || o >= p.tile_rows || out + o >= p.head_out)
        return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        sum += all[w * red<N>::WARP_FLOATS + t * RED_PITCH + o];
    OUT *y = (OUT *)p.y + (int64_t)t * p.y_row + (int64_t)head * p.y_head + out + o;
    if constexpr (sizeof(OUT) == 4)
        *y = sum;
    else
        *y = __float2bfloat16(sum);
}

/* N: groups of eight rows of x. */
template <int N, bool NORM, typename OUT>
__device__ void consume(ring r, const product &p, float eps, const uint4 *norm_w, float *part,
                        float *red_base, int first, int last)
{
    constexpr int DEPTH = 8 / N; // stages whose x is on its way
    static_assert(N * 8 * TILE_ROWS <= WARPS * 32, "a thread an output");
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2;
    int col = warp * 32 + (lane & 3) * 8, left = (last - first) * p.n_steps;
    const cu_bf16 *x = p.x + (int64_t)(first / p.tiles_per_head) * p.x_head;
    uint4 b[DEPTH][N];
    float scale[N];
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        x_load<N>(p, x, row, col, i, b[i]);
    if (NORM)
        row_scales<N, DEPTH>(p, eps, b, part, scale);
    // Rows beyond a tile's repeat its last one: they feed outputs that nobody stores.
    int w_row = min(row, p.tile_rows - 1), to_hi = (min(row + 8, p.tile_rows - 1) - w_row) * ROW_BYTES;
    int w_at = w_row * ROW_BYTES + col * 2;
    bool is_kept = p.n_steps <= DEPTH && p.x_head == 0; // every tile has the same x
    for (int tile = first; tile < last; tile++) {
        const cu_bf16 *next_x = p.x + (int64_t)((tile + 1) / p.tiles_per_head) * p.x_head;
        float acc[N][4] = {};
        for (int group = 0; group < p.n_steps; group += DEPTH) {
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                int step = group + i;
                if (step >= p.n_steps)
                    break;
                mbar_wait(r.full + r.stage * 8, r.parity);
                uint32_t w = r.base + r.stage * r.stage_bytes + w_at;
                uint4 lo = shared_16(w), hi = shared_16(w + to_hi), g;
                if (NORM)
                    g = norm_w[(step * STAGE_COLS + col) / 8];
#pragma unroll
                for (int n = 0; n < N; n++) {
                    uint4 v = b[i][n];
                    if (NORM)
                        v = make_uint4(normed(v.x, scale[n], g.x), normed(v.y, scale[n], g.y),
                                       normed(v.z, scale[n], g.z), normed(v.w, scale[n], g.w));
                    product_16x8(acc[n], lo.x, hi.x, lo.y, hi.y, v.x, v.y);
                    product_16x8(acc[n], lo.z, hi.z, lo.w, hi.w, v.z, v.w);
                }
                if (left > r.n_stages) { // the stage gets another
                    // the reads may still queue behind those of x when the arrival is seen: the copy
                    // into the stage must not overtake them
                    fence_async();
                    __syncwarp();
                    if (lane == 0)
                        mbar_arrive(r.empty + r.stage * 8);
                }
                left--;
                if (step + DEPTH < p.n_steps)
                    x_load<N>(p, x, row, col, step + DEPTH, b[i]);
                else if (!is_kept && tile + 1 < last)
                    x_load<N>(p, next_x, row, col, i, b[i]);
                ring_step(&r);
            }
        }
        x = next_x;
        tile_store<N, OUT>(p, red_base, tile, acc);
    }
}

/* ---- the key's half of the joint projection ---- */

/* One row: the latent normed, the key turned, both into the row's slot. */
__device__ void kv_write(const cu_qkv_args &a, int t, float log2_theta)
{
    __shared__ float part[WARPS];
    int i = threadIdx.x;
    const uint32_t *from = (const uint32_t *)(a.qkv + (int64_t)t * (a.q_lora + HEAD_KV) + a.q_lora);
    uint32_t w = i < LATENT / 2 ? ((const uint32_t *)a.kv_norm)[i] : 0;
    launch::previous_done();
    uint32_t v = from[i]; // 256 pairs of the latent, 32 of the key
    uint32_t *slot = (uint32_t *)(a.pool + (((int64_t)a.slot_page[t] * a.n_layers + a.layer) * 64 +
                                            a.slot_row[t]) *
                                               HEAD_KV);
    if (i < LATENT / 2) {
        float2 f = unpack(v);
        float sum = warp_sum(f.x * f.x + f.y * f.y);
        if ((i & 31) == 0)
            part[i >> 5] = sum;
    }
    __syncthreads();
    if (i >= LATENT / 2) {
        slot[i] = rope_pair(v, a.position[t], i - LATENT / 2, log2_theta);
        return;
    }
    float sum = 0;
    for (int w = 0; w < WARPS; w++)
        sum += part[w];
    float scale = rsqrtf(sum / (float)LATENT + a.eps);
    slot[i] = normed(v, scale, w);
}

/* ---- kernels ---- */

template <int N, bool NORM, typename OUT>
__global__ void __launch_bounds__(THREADS, 2)
    dense_kernel(const __grid_constant__ CUtensorMap w, const __grid_constant__ product p,
                 const __grid_constant__ cu_qkv_args kv, float log2_theta)
{
    extern __shared__ __align__(1024) uint8_t smem[];
    __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
    __shared__ float part[NORM ? WARPS * CU_DENSE_MAX_T : 1];
    __shared__ uint4 norm_w[NORM ? MAX_NORMED / 8 : 1];
    if (NORM && (int)blockIdx.x >= p.n_blocks) {
        kv_write(kv, blockIdx.x - p.n_blocks, log2_theta);
        return;
    }
    int stage_bytes = p.tile_rows * ROW_BYTES;
    ring r = {smem_addr(smem), smem_addr(full), smem_addr(empty), 0, p.n_stages, stage_bytes, 0};
    int first = blockIdx.x * p.tiles_per_block, last = min(first + p.tiles_per_block, p.n_tiles);
    if (threadIdx.x == WARPS * 32) {
        tma_prefetch_map(&w);
        for (int i = 0; i < p.n_stages; i++) {
            mbar_init(r.full + i * 8, 1);
            mbar_init(r.empty + i * 8, WARPS);
        }
        mbar_init_fence();
    }
    if (NORM)
        for (int i = threadIdx.x; i < p.n_steps * STAGE_COLS / 8; i += THREADS)
            norm_w[i] = i < p.n_in / 8 ? ((const uint4 *)kv.q_norm)[i] : make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (threadIdx.x >= WARPS * 32) {
        if (threadIdx.x == WARPS * 32)
            produce(r, p, &w, first, last);
        return;
    }
    launch::previous_done();
    float *red_base = (float *)(smem + p.n_stages * stage_bytes);
    consume<N, NORM, OUT>(r, p, kv.eps, norm_w, part, red_base, first, last);
}

/* 64 columns of W_UK[h] a block, one tensor copy; warps are four sets of 16 columns by two halves
 * of the 192 rows. The last block of a head turns its query instead. */
template <int N>
__global__ void __launch_bounds__(WARPS * 32)
    absorb_kernel(const __grid_constant__ CUtensorMap w, const __grid_constant__ cu_absorb_args a,
                  float log2_theta)
{
    constexpr int STEPS = NOPE / 32 / 2; // of a warp
    __shared__ __align__(1024) uint8_t tile[NOPE * 128];
    __shared__ float half_sum[4][N * 8][RED_PITCH];
    __shared__ uint64_t full;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
    uint32_t bar = smem_addr(&full), base = smem_addr(tile);
    if (blockIdx.x == LATENT / 64) {
        launch::next_may_start();
        launch::previous_done();
        for (int t = warp; t < a.T; t += WARPS) {
            int64_t at = (int64_t)t * a.heads + head;
            uint32_t v = ((const uint32_t *)(a.q + at * HEAD_Q + NOPE))[lane];
            ((uint32_t *)(a.absorbed + at * HEAD_KV + LATENT))[lane] =
                rope_pair(v, a.position[t], lane, log2_theta);
        }
        return;
    }
    if (threadIdx.x == 0) {
        mbar_init(bar, 1);
        mbar_init_fence();
        mbar_arrive_expect(bar, sizeof(tile));
        tma_load_2d(base, &w, bar, blockIdx.x * 64, head * HEAD_ROWS);
        launch::next_may_start();
    }
    __syncthreads();
    launch::previous_done();

    int m = warp & 3, k0 = (warp >> 2) * (NOPE / 2);
    uint4 b[STEPS][N];
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            int t = n * 8 + (lane >> 2);
            b[s][n] = make_uint4(0, 0, 0, 0);
            if (t < a.T)
                b[s][n] = *(const uint4 *)(a.q + ((int64_t)t * a.heads + head) * HEAD_Q + k0 + s * 32 +
                                           (lane & 3) * 8);
        }
    mbar_wait(bar, 0);
    float acc[N][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // four 8 x 8 matrices whose rows are those k that b has in the product's places 0..7
            // (8..15 for the third and fourth); the second and fourth are 8 columns on
            int k = k0 + s * 32 + ((lane >> 1) & 3) * 8 + (lane & 1) + (lane >> 4) * 2 + j * 4;
            int chunk = m * 2 + ((lane >> 3) & 1);
            uint32_t w0, w1, w2, w3;
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w0), "=r"(w1), "=r"(w2), "=r"(w3)
                         : "r"(base + k * 128 + ((chunk ^ (k & 7)) << 4))
                         : "memory");
#pragma unroll
            for (int n = 0; n < N; n++)
                product_16x8(acc[n], w0, w1, w2, w3, j ? b[s][n].z : b[s][n].x,
                             j ? b[s][n].w : b[s][n].y);
        }
    int row = lane >> 2;
    if (k0) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                half_sum[m][n * 8 + (lane & 3) * 2 + (j & 1)][row + (j & 2) * 4] = acc[n][j];
    }
    __syncthreads();
    if (k0)
        return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int t = n * 8 + (lane & 3) * 2 + (j & 1), o = row + (j & 2) * 4;
            if (t < a.T)
                ((__nv_bfloat16 *)a.absorbed)[((int64_t)t * a.heads + head) * HEAD_KV +
                                              blockIdx.x * 64 + m * 16 + o] =
                    __float2bfloat16(acc[n][j] + half_sum[m][t][o]);
        }
}

/* ---- launches ---- */

int sm_count()
{
    static int n = []() {
        int device, count = 0;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
            return 0;
        return count;
    }();
    return n;
}

/* Cuts `heads` times head_out outputs into tiles and blocks. */
bool cut(product *p, int heads)
{
    int n_sm = sm_count();
    if (n_sm == 0 || p->T < 1 || p->T > CU_DENSE_MAX_T || heads < 1 || p->head_out < 1 ||
        p->n_in < 8 || p->n_in % 8 || p->x_row % 8 || p->x_head % 8)
        return false;
    int per_block = (p->head_out + n_sm - 1) / n_sm;
    p->tiles_per_block = (per_block + TILE_ROWS - 1) / TILE_ROWS;
    p->tile_rows = (per_block + p->tiles_per_block - 1) / p->tiles_per_block;
    if (heads > 1)
        p->tile_rows = TILE_ROWS;
    p->tiles_per_head = (p->head_out + p->tile_rows - 1) / p->tile_rows;
    p->n_tiles = heads * p->tiles_per_head;
    if (heads > 1)
        p->tiles_per_block = (p->n_tiles + n_sm - 1) / n_sm;
    p->n_blocks = (p->n_tiles + p->tiles_per_block - 1) / p->tiles_per_block;
    p->n_steps = (p->n_in + STAGE_COLS - 1) / STAGE_COLS;
    return true;
}

template <int N, bool NORM, typename OUT>
cudaError_t launch_rows(product *p, int heads, const cu_bf16 *w, const cu_qkv_args *kv, cudaStream_t stream)
{
    CUtensorMap map;
    uint64_t w_rows = (uint64_t)(heads - 1) * p->w_rows + p->head_out;
    if (!tensor_map_boxes(&map, w, w_rows, p->n_in, p->n_in, p->tile_rows, STAGE_COLS,
                          CU_TENSOR_MAP_SWIZZLE_NONE))
        return cudaErrorInvalidValue;
    int stage_bytes = p->tile_rows * ROW_BYTES, total = p->tiles_per_block * p->n_steps;
    p->n_stages = (SMEM_BYTES - red<N>::BYTES) / stage_bytes;
    if (p->n_stages > MAX_STAGES)
        p->n_stages = MAX_STAGES;
    if (p->n_stages > total)
        p->n_stages = total;
    static_assert(red<N>::BYTES >= TILE_ROWS * ROW_BYTES, "what short tiles read beyond the ring");
    auto kernel = dense_kernel<N, NORM, OUT>;
    cudaError_t err =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (err)
        return err;
    return launch::start(kernel, p->n_blocks + (NORM ? p->T : 0), THREADS,
                         (size_t)(p->n_stages * stage_bytes + red<N>::BYTES), 1, stream, map, *p,
                         *kv, NORM ? log2f(kv->theta) : 0.f);
}

template <bool NORM, typename OUT>
cudaError_t launch_product(product *p, int heads, const cu_bf16 *w, const cu_qkv_args *kv,
                           cudaStream_t stream)
{
    if (!cut(p, heads))
        return cudaErrorInvalidValue;
    if (p->T <= 8)
        return launch_rows<1, NORM, OUT>(p, heads, w, kv, stream);
    return launch_rows<2, NORM, OUT>(p, heads, w, kv, stream);
}

} // namespace

cudaError_t cu_dense(const struct cu_dense_args *a, cudaStream_t stream)
{
    if (a->T == 0)
        return cudaSuccess;
    product p = {};
    p.x = a->x;
    p.y = a->y;
    p.T = a->T;
    p.n_in = p.x_row = a->n_in;
    p.head_out = p.y_row = a->n_out;
    cu_qkv_args no_kv = {};
    return a->y_is_f32 ? launch_product<false, float>(&p, 1, a->w, &no_kv, stream)
                       : launch_product<false, __nv_bfloat16>(&p, 1, a->w, &no_kv, stream);
}

cudaError_t cu_qkv_dense(const struct cu_qkv_args *a, const cu_bf16 *w, cu_bf16 *q, int n_out,
                         cudaStream_t stream)
{
    if (a->T == 0)
        return cudaSuccess;
    if (a->q_lora > MAX_NORMED)
        return cudaErrorInvalidValue;
    product p = {};
    p.x = a->qkv;
    p.y = q;
    p.T = a->T;
    p.n_in = a->q_lora;
    p.x_row = a->q_lora + HEAD_KV;
    p.head_out = p.y_row = n_out;
    return launch_product<true, __nv_bfloat16>(&p, 1, w, a, stream);
}

cudaError_t cu_v_up(const struct cu_v_up_args *a, cudaStream_t stream)
{
    if (a->T == 0)
        return cudaSuccess;
    product p = {};
    p.x = a->latent;
    p.y = a->out;
    p.T = a->T;
    p.n_in = p.x_head = LATENT;
    p.head_out = p.y_head = HEAD_V;
    p.w_rows = HEAD_ROWS;
    p.x_row = a->heads * LATENT;
    p.y_row = a->heads * HEAD_V;
    cu_qkv_args no_kv = {};
    return launch_product<false, __nv_bfloat16>(&p, a->heads, a->kv_b + NOPE * LATENT, &no_kv, stream);
}

cudaError_t cu_absorb(const struct cu_absorb_args *a, cudaStream_t stream)
{
    if (a->T == 0)
        return cudaSuccess;
    CUtensorMap map;
    if (a->T < 0 || a->T > CU_DENSE_MAX_T || a->heads < 1 ||
        !tensor_map_2d(&map, a->kv_b, (uint64_t)a->heads * HEAD_ROWS, LATENT, LATENT, NOPE))
        return cudaErrorInvalidValue;
    auto kernel = a->T <= 8 ? absorb_kernel<1> : absorb_kernel<2>;
    return launch::start(kernel, dim3(LATENT / 64 + 1, (unsigned)a->heads), WARPS * 32, 0, 1, stream,
                         map, *a, log2f(a->theta));
}
