/* mla_decode.cu: attention of decode rows over paged latents, absorbed form.
 *
 * All heads of a sequence share one KV row of 576 values (K = all of it, V = its first 512), so the
 * (q_rows x heads) queries of a sequence form the rows of one matrix product: 60 of 64 rows for three
 * query positions of 20 heads. One block takes up to 64 of these rows and a range of the sequence's
 * pages; each page (64 tokens, 72 KB) is loaded once with cp.async into one of two buffers while the
 * other is used. Eight warps compute S = Q K^T (16 x 32 each), the softmax is online in fp32, and
 * each warp owns 64 columns of O += P V. Tensor cores through mma.sync: at 31 to 94 % fill this is
 * bound by memory, not by the matrix unit.
 *
 * Long contexts are split over several blocks. Each writes its unnormalised O, maximum and sum; the
 * last one to arrive at the tile's counter merges them, so no second launch is needed. The order of
 * merging is fixed: results do not depend on arrival.
 *
 * Measured on an H100 80GB by kernels_bench decode, 20 heads, microseconds (GB/s of pages): 64
 * sequences of 512: 54 (700); 64 of 4096: 214 (1410), with three rows each 235; 256 of 512: 124
 * (1220), with three rows 160. The floor is 13, 98 and 49: four barriers a page leave the loads
 * waiting, and one block fills an SM.
 */
#include "kernels/cuda.h"

#include <cuda_bf16.h>

namespace {

constexpr int ROWS = 64, TOKENS = 64, WIDTH = 576, V = 512, WARPS = 8, THREADS = WARPS * 32;
constexpr int CHUNKS = WIDTH / 8; // 16-byte pieces of a row
constexpr int MAX_SPLITS = 16;
constexpr size_t MAX_TILES = 16384; // counters, at the same place for every launch

struct alignas(128) Shared {
    uint4 q[ROWS * CHUNKS];
    uint4 kv[2][TOKENS * CHUNKS];
    __nv_bfloat16 p[ROWS][TOKENS + 8];
    float max_part[2][ROWS];
    float sum_part[2][ROWS];
    float m[ROWS], l[ROWS], scale[ROWS];
    int last;
};

/* Rows are 1152 bytes, a multiple of all banks: the piece's place in its group of eight turns with the
 * row, so that eight rows of one column lie in different banks. */
__device__ __forceinline__ int at(int row, int chunk) { return row * CHUNKS + (chunk ^ (row & 7)); }

__device__ __forceinline__ uint32_t smem(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void load16(void *to, const void *from, bool valid)
{
    int n = valid ? 16 : 0; // 0: fills with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem(to)), "l"(from), "r"(n));
}

__device__ __forceinline__ void ldmatrix4(uint32_t r[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem(p)));
}

__device__ __forceinline__ void ldmatrix4_trans(uint32_t r[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem(p)));
}

__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Params {
    cu_mla_decode_args a;
    int tiles, splits, pages_per_split;
    float *part_o;   // [S, tiles, splits, ROWS, V]
    float2 *part_ml; // [S, tiles, splits, ROWS]
    int *counter;    // [S, tiles], zero between launches
};

/* Slots that are not written yet may hold anything, NaN too: they become zeros. */
__device__ void page_load(const Params &p, uint4 *to, int s, int page_idx, int n_ctx)
{
    int n_slots = n_ctx - page_idx * TOKENS;
    int page = p.a.block_table[(int64_t)s * p.a.max_pages + page_idx];
    const uint4 *from = (const uint4 *)(p.a.pool + ((int64_t)page * p.a.n_layers + p.a.layer) * TOKENS * WIDTH);
    for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += THREADS)
        load16(&to[at(i / CHUNKS, i % CHUNKS)], from + i, i / CHUNKS < n_slots);
}

__global__ void __launch_bounds__(THREADS, 1) mla_decode_kernel(const __grid_constant__ Params p)
{
    extern __shared__ char raw[];
    Shared &sh = *(Shared *)(((uintptr_t)raw + 127) & ~(uintptr_t)127);
    const int split = blockIdx.x, tile = blockIdx.y, s = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n_ctx = p.a.n_ctx[s];
    if (n_ctx == 0)
        return;
    const int n_pages = (n_ctx + TOKENS - 1) / TOKENS;
    const int first = split * p.pages_per_split, end = min(n_pages, first + p.pages_per_split);
    const int n_used = (n_pages + p.pages_per_split - 1) / p.pages_per_split; // splits that have pages
    if (first >= end)
        return;
    const int n_rows = min(ROWS, p.a.q_rows * p.a.heads - tile * ROWS);
    const int64_t row0 = (int64_t)s * p.a.q_rows * p.a.heads + tile * ROWS;

    const uint4 *q = (const uint4 *)(p.a.q + row0 * WIDTH);
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        if (i / CHUNKS < n_rows)
            load16(&sh.q[at(i / CHUNKS, i % CHUNKS)], q + i, true);
        else
            sh.q[at(i / CHUNKS, i % CHUNKS)] = make_uint4(0, 0, 0, 0);
    }
    page_load(p, sh.kv[0], s, first, n_ctx);
    asm volatile("cp.async.commit_group;");
    if (threadIdx.x < ROWS) {
        sh.m[threadIdx.x] = -INFINITY;
        sh.l[threadIdx.x] = 0;
    }

    float o[4][8][4]; // 64 rows x this warp's 64 columns
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[i][j][e] = 0;

    const int sr = warp % 4 * 16, sc = warp / 4 * 32; // this warp's part of S
    for (int page = first; page < end; page++) {
        const uint4 *kv = sh.kv[(page - first) & 1];
        if (page + 1 < end) {
            page_load(p, sh.kv[(page - first + 1) & 1], s, page + 1, n_ctx);
            asm volatile("cp.async.commit_group;");
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();

        float c[4][4] = {};
#pragma unroll 4
        for (int k = 0; k < WIDTH / 16; k++) {
            uint32_t a[4], b[4];
            ldmatrix4(a, &sh.q[at(sr + lane % 16, 2 * k + lane / 16)]);
#pragma unroll
            for (int n = 0; n < 2; n++) { // 16 tokens at a time
                int token = sc + n * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix4(b, &kv[at(token, 2 * k + lane / 8 % 2)]);
                mma(c[2 * n], a, b[0], b[1]);
                mma(c[2 * n + 1], a, b[2], b[3]);
            }
        }
        // Row r of the tile is query position r / heads: the last one sees n_ctx slots.
        float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = tile * ROWS + sr + lane / 4 + h * 8;
            int sees = n_ctx - (p.a.q_rows - 1 - row / p.a.heads);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int token = page * TOKENS + sc + n * 8 + lane % 4 * 2 + e;
                    float &x = c[n][h * 2 + e];
                    x = token < sees ? x * p.a.scale : -INFINITY;
                    best[h] = fmaxf(best[h], x);
                }
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2));
            if (lane % 4 == 0)
                sh.max_part[warp / 4][sr + lane / 4 + h * 8] = best[h];
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = sr + lane / 4 + h * 8;
            float m_old = sh.m[row];
            float m_new = fmaxf(m_old, fmaxf(sh.max_part[0][row], sh.max_part[1][row]));
            float base = m_new == -INFINITY ? 0.f : m_new, sum = 0;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float x0 = __expf(c[n][h * 2] - base), x1 = __expf(c[n][h * 2 + 1] - base);
                __nv_bfloat162 packed = __floats2bfloat162_rn(x0, x1);
                float2 kept = __bfloat1622float2(packed); // the sum is over what P V uses
                sum += kept.x + kept.y;
                *(__nv_bfloat162 *)&sh.p[row][sc + n * 8 + lane % 4 * 2] = packed;
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (lane % 4 == 0)
                sh.sum_part[warp / 4][row] = sum;
        }
        __syncthreads();
        if (threadIdx.x < ROWS) {
            int row = threadIdx.x;
            float m_old = sh.m[row];
            float m_new = fmaxf(m_old, fmaxf(sh.max_part[0][row], sh.max_part[1][row]));
            float f = m_old == -INFINITY ? 0.f : __expf(m_old - m_new);
            sh.scale[row] = f;
            sh.l[row] = sh.l[row] * f + sh.sum_part[0][row] + sh.sum_part[1][row];
            sh.m[row] = m_new;
        }
        __syncthreads();

#pragma unroll
        for (int i = 0; i < 4; i++) {
            float f0 = sh.scale[i * 16 + lane / 4], f1 = sh.scale[i * 16 + lane / 4 + 8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                o[i][j][0] *= f0;
                o[i][j][1] *= f0;
                o[i][j][2] *= f1;
                o[i][j][3] *= f1;
            }
        }
#pragma unroll
        for (int k = 0; k < TOKENS / 16; k++) {
            uint32_t a[4][4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                ldmatrix4(a[i], &sh.p[i * 16 + lane % 16][k * 16 + lane / 16 * 8]);
#pragma unroll
            for (int j = 0; j < 4; j++) { // 16 columns at a time
                int token = k * 16 + lane % 16, chunk = warp * 8 + j * 2 + lane / 16;
                ldmatrix4_trans(b, &kv[at(token, chunk)]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    mma(o[i][2 * j], a[i], b[0], b[1]);
                    mma(o[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }
        __syncthreads(); // this buffer is loaded again in the next turn
    }

    if (n_used == 1) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = i * 16 + lane / 4 + h * 8;
                if (row >= n_rows)
                    continue;
                float inv = 1.f / sh.l[row];
                __nv_bfloat162 *out = (__nv_bfloat162 *)(p.a.out + (row0 + row) * V + warp * 64);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    out[j * 4 + lane % 4] =
                        __floats2bfloat162_rn(o[i][j][h * 2] * inv, o[i][j][h * 2 + 1] * inv);
            }
        return;
    }

    const int64_t tile_idx = (int64_t)s * p.tiles + tile;
    float *mine = p.part_o + (tile_idx * p.splits + split) * ROWS * V;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = i * 16 + lane / 4 + h * 8;
            if (row >= n_rows)
                continue;
            float2 *out = (float2 *)(mine + row * V + warp * 64);
#pragma unroll
            for (int j = 0; j < 8; j++)
                out[j * 4 + lane % 4] = make_float2(o[i][j][h * 2], o[i][j][h * 2 + 1]);
        }
    if (threadIdx.x < ROWS)
        p.part_ml[(tile_idx * p.splits + split) * ROWS + threadIdx.x] =
            make_float2(sh.m[threadIdx.x], sh.l[threadIdx.x]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int arrived = atomicAdd(&p.counter[tile_idx], 1);
        sh.last = arrived == n_used - 1;
        if (sh.last)
            p.counter[tile_idx] = 0; // for the next launch
    }
    __syncthreads();
    if (!sh.last)
        return;
    __threadfence();
    // Warps take rows; lanes take columns.
    for (int row = warp; row < n_rows; row += WARPS) {
        const float2 *ml = p.part_ml + tile_idx * p.splits * ROWS + row;
        float m = -INFINITY, l = 0;
        for (int i = 0; i < n_used; i++)
            m = fmaxf(m, __ldcg(&ml[i * ROWS]).x);
        float acc[V / 32] = {};
        for (int i = 0; i < n_used; i++) {
            float2 x = __ldcg(&ml[i * ROWS]);
            float f = x.x == -INFINITY ? 0.f : __expf(x.x - m);
            l += x.y * f;
            const float *part = p.part_o + ((tile_idx * p.splits + i) * ROWS + row) * V;
#pragma unroll
            for (int j = 0; j < V / 32; j++)
                acc[j] += f * __ldcg(&part[j * 32 + lane]);
        }
        __nv_bfloat16 *out = (__nv_bfloat16 *)p.a.out + (row0 + row) * V;
#pragma unroll
        for (int j = 0; j < V / 32; j++)
            out[j * 32 + lane] = __float2bfloat16(acc[j] / l);
    }
}

int tiles_of(int q_rows, int heads) { return (q_rows * heads + ROWS - 1) / ROWS; }

int sm_count()
{
    static int n = 0;
    if (n == 0) {
        int device = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    }
    return n > 0 ? n : 132;
}

/* Enough blocks for two rounds over the chip, at least two pages each. */
int splits_of(int S, int tiles, int max_ctx)
{
    int pages = (max_ctx + TOKENS - 1) / TOKENS;
    int want = (2 * sm_count() + S * tiles - 1) / (S * tiles);
    int most = (pages + 1) / 2;
    int n = want < most ? want : most;
    return n < 1 ? 1 : n > MAX_SPLITS ? MAX_SPLITS : n;
}

} // namespace

size_t cu_mla_decode_work_bytes(int max_S, int max_q_rows, int heads, int max_ctx)
{
    (void)max_ctx;
    // Splits only happen while S x tiles leaves the chip idle: at most two rounds of blocks and one
    // more split for each tile.
    size_t tiles = (size_t)max_S * (size_t)tiles_of(max_q_rows, heads);
    size_t blocks = 2 * (size_t)sm_count() + tiles;
    return MAX_TILES * sizeof(int) + blocks * ROWS * sizeof(float2) +
           blocks * ROWS * V * sizeof(float);
}

cudaError_t cu_mla_decode(const struct cu_mla_decode_args *a, cudaStream_t stream)
{
    if (a->heads < 1 || a->q_rows < 1 || a->S < 0 || a->max_ctx < 0)
        return cudaErrorInvalidValue;
    if (a->S == 0 || a->max_ctx == 0)
        return cudaSuccess;
    Params p = {*a, tiles_of(a->q_rows, a->heads), 1, 0, nullptr, nullptr, nullptr};
    int pages = (a->max_ctx + TOKENS - 1) / TOKENS;
    p.splits = splits_of(a->S, p.tiles, a->max_ctx);
    p.pages_per_split = (pages + p.splits - 1) / p.splits;
    p.splits = (pages + p.pages_per_split - 1) / p.pages_per_split;
    size_t tiles = (size_t)a->S * (size_t)p.tiles, blocks = tiles * (size_t)p.splits;
    if (tiles > MAX_TILES)
        return cudaErrorInvalidValue;
    p.counter = (int *)a->work;
    p.part_ml = (float2 *)((char *)a->work + MAX_TILES * sizeof(int));
    p.part_o = (float *)(p.part_ml + blocks * ROWS);
    static const cudaError_t raised = cudaFuncSetAttribute(
        mla_decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared) + 128);
    if (raised != cudaSuccess)
        return raised;
    mla_decode_kernel<<<dim3(p.splits, p.tiles, a->S), THREADS, sizeof(Shared) + 128, stream>>>(p);
    return cudaGetLastError();
}
