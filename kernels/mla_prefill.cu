/* mla_prefill.cu: causal attention of ragged prompts in the expanded form, head dimension 256.
 *
 * One block takes 64 rows of one sequence and head; four warps of 16 rows each. Keys and values of 64
 * slots (32 KB each) are double-buffered with cp.async; S and O stay in registers, softmax online in
 * fp32 (Flash-Attention). Rows of a chunk see the prefix before it: row i of n sees
 * kv_len - n + 1 + i slots. Tensor cores through mma.sync; WGMMA is the way to more.
 *
 * Measured on an H100 80GB by kernels_bench prefill, 20 heads, causal: 32 x 256 tokens 226 us (96
 * TFLOP/s), 4 x 2048 1045 us (164), 8192 3645 us (189).
 */
#include "kernels/cuda.h"

#include <cuda_bf16.h>

namespace {

constexpr int ROWS = 64, TOKENS = 64, D = 256, THREADS = 128, CHUNKS = D / 8;

struct alignas(128) Shared {
    uint4 q[ROWS * CHUNKS];
    uint4 k[2][TOKENS * CHUNKS];
    uint4 v[2][TOKENS * CHUNKS];
};

/* Rows are 512 bytes: turn the 16-byte pieces within groups of eight by the row. */
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

__device__ __forceinline__ uint32_t pack(float x, float y)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return *(uint32_t *)&v;
}

/* 64 rows of one head into a tile; rows from n_rows on become zeros. */
__device__ void tile_load(uint4 *to, const cu_bf16 *from, int heads, int n_rows)
{
    for (int i = threadIdx.x; i < 64 * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = row < n_rows;
        load16(&to[at(row, chunk)], from + (int64_t)(valid ? row : 0) * heads * D + chunk * 8, valid);
    }
}

__global__ void __launch_bounds__(THREADS, 1) mla_prefill_kernel(const __grid_constant__ cu_mla_prefill_args a)
{
    extern __shared__ char raw[];
    Shared &sh = *(Shared *)(((uintptr_t)raw + 127) & ~(uintptr_t)127);
    const int s = blockIdx.z, h = blockIdx.y;
    const int q0 = a.q_start[s], n_q = a.q_start[s + 1] - q0;
    const int kv0 = a.kv_start[s], n_kv = a.kv_start[s + 1] - kv0;
    const int tile = (gridDim.x - 1 - blockIdx.x) * ROWS; // the longest first
    if (tile >= n_q)
        return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n_rows = min(ROWS, n_q - tile);
    const int before = n_kv - n_q;                      // prefix
    const int n_sees = min(n_kv, before + tile + n_rows); // of the tile's last row
    const cu_bf16 *k = a.k + ((int64_t)kv0 * a.heads + h) * D;
    const cu_bf16 *v = a.v + ((int64_t)kv0 * a.heads + h) * D;
    const int64_t step = (int64_t)TOKENS * a.heads * D;

    tile_load(sh.q, a.q + ((int64_t)(q0 + tile) * a.heads + h) * D, a.heads, n_rows);
    tile_load(sh.k[0], k, a.heads, n_kv);
    tile_load(sh.v[0], v, a.heads, n_kv);
    asm volatile("cp.async.commit_group;");

    float o[32][4]; // 16 rows x 256 columns
#pragma unroll
    for (int j = 0; j < 32; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            o[j][e] = 0;
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
    const int n_blocks = (n_sees + TOKENS - 1) / TOKENS;
    for (int block = 0; block < n_blocks; block++) {
        int now = block & 1;
        if (block + 1 < n_blocks) {
            int left = n_kv - (block + 1) * TOKENS;
            tile_load(sh.k[now ^ 1], k + (block + 1) * step, a.heads, left);
            tile_load(sh.v[now ^ 1], v + (block + 1) * step, a.heads, left);
            asm volatile("cp.async.commit_group;");
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();

        float c[8][4] = {};
#pragma unroll 4
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t qa[4], b[4];
            ldmatrix4(qa, &sh.q[at(warp * 16 + lane % 16, 2 * kk + lane / 16)]);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                int token = n * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix4(b, &sh.k[now][at(token, 2 * kk + lane / 8 % 2)]);
                mma(c[2 * n], qa, b[0], b[1]);
                mma(c[2 * n + 1], qa, b[2], b[3]);
            }
        }
        uint32_t p[4][4]; // P as the A operand of four k-steps
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = tile + warp * 16 + lane / 4 + half * 8, sees = before + row + 1;
            float best = -INFINITY;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int token = block * TOKENS + n * 8 + lane % 4 * 2 + e;
                    float &x = c[n][half * 2 + e];
                    x = token < sees ? x * a.scale : -INFINITY;
                    best = fmaxf(best, x);
                }
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            float m_new = fmaxf(m[half], best), base = m_new == -INFINITY ? 0.f : m_new;
            float f = m[half] == -INFINITY ? 0.f : __expf(m[half] - base), sum = 0;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                uint32_t x = pack(__expf(c[n][half * 2] - base), __expf(c[n][half * 2 + 1] - base));
                float2 kept = __bfloat1622float2(*(__nv_bfloat162 *)&x);
                sum += kept.x + kept.y;
                p[n / 2][n % 2 * 2 + half] = x;
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            l[half] = l[half] * f + sum;
            m[half] = m_new;
#pragma unroll
            for (int j = 0; j < 32; j++) {
                o[j][half * 2] *= f;
                o[j][half * 2 + 1] *= f;
            }
        }
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
            for (int j = 0; j < 16; j++) {
                uint32_t b[4];
                ldmatrix4_trans(b, &sh.v[now][at(kk * 16 + lane % 16, j * 2 + lane / 16)]);
                mma(o[2 * j], p[kk], b[0], b[1]);
                mma(o[2 * j + 1], p[kk], b[2], b[3]);
            }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp * 16 + lane / 4 + half * 8;
        if (row >= n_rows)
            continue;
        float inv = 1.f / l[half];
        __nv_bfloat162 *out =
            (__nv_bfloat162 *)(a.out + ((int64_t)(q0 + tile + row) * a.heads + h) * D);
#pragma unroll
        for (int j = 0; j < 32; j++)
            out[j * 4 + lane % 4] =
                __floats2bfloat162_rn(o[j][half * 2] * inv, o[j][half * 2 + 1] * inv);
    }
}

} // namespace

cudaError_t cu_mla_prefill(const struct cu_mla_prefill_args *a, cudaStream_t stream)
{
    if (a->heads < 1 || a->S < 0 || a->max_q < 0 || a->S > 65535)
        return cudaErrorInvalidValue;
    if (a->S == 0 || a->max_q == 0)
        return cudaSuccess;
    static const cudaError_t raised = cudaFuncSetAttribute(
        mla_prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared) + 128);
    if (raised != cudaSuccess)
        return raised;
    mla_prefill_kernel<<<dim3((a->max_q + ROWS - 1) / ROWS, a->heads, a->S), THREADS,
                         sizeof(Shared) + 128, stream>>>(*a);
    return cudaGetLastError();
}
