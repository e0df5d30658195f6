/* elementwise.cu: the small operations between the matrix products.
 *
 * Each is one pass over its rows: 16-byte loads, fp32 arithmetic, one block per row (or per few
 * heads). At decode batches they are bound by launches and latency (a row is 4 KB), so what counts
 * is how few there are: the residual add rides on the norm, both inner norms, RoPE of the key and
 * the page write are one launch; and that each starts while its predecessor ends (launch.cuh), with
 * its weights already on their way.
 */
#include "kernels/cuda.h"

#include <cuda_bf16.h>

#include "kernels/launch.cuh"

#define THREADS 256

using namespace launch;

namespace
{

struct alignas(16) Bf8 {
    __nv_bfloat162 v[4];
};

__device__ __forceinline__ void unpack(const Bf8 &p, float *f)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 t = __bfloat1622float2(p.v[i]);
        f[2 * i] = t.x;
        f[2 * i + 1] = t.y;
    }
}

__device__ __forceinline__ Bf8 pack(const float *f)
{
    Bf8 p;
#pragma unroll
    for (int i = 0; i < 4; i++)
        p.v[i] = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
    return p;
}

__device__ __forceinline__ float block_sum(float v)
{
    __shared__ float part[THREADS / 32];
    __shared__ float total;
#pragma unroll
    for (int o = 16; o; o >>= 1)
        v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        float s = 0;
        for (unsigned i = 0; i < blockDim.x / 32; i++)
            s += part[i];
        total = s;
    }
    __syncthreads();
    float s = total;
    __syncthreads(); // part and total may be used again
    return s;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

/* theta^(-2i/64), by how much pair i turns from one position to the next. */
__device__ __forceinline__ float rope_step(int i, float log2_theta)
{
    return exp2f(-(float)i / 32.f * log2_theta);
}

/* (x0, x1) turned by position * step. */
__device__ __forceinline__ void rope_pair(float &x0, float &x1, int position, float step)
{
    float s, c;
    sincosf((float)position * step, &s, &c);
    float a = x0 * c - x1 * s, b = x1 * c + x0 * s;
    x0 = a;
    x1 = b;
}

__global__ void embed_kernel(const Bf8 *table, const int32_t *token, float *residual, int n8)
{
    next_may_start();
    previous_done();
    const Bf8 *from = table + (int64_t)token[blockIdx.x] * n8;
    float4 *to = (float4 *)residual + (int64_t)blockIdx.x * n8 * 2;
    for (int i = threadIdx.x; i < n8; i += blockDim.x) {
        float f[8];
        unpack(from[i], f);
        to[2 * i] = make_float4(f[0], f[1], f[2], f[3]);
        to[2 * i + 1] = make_float4(f[4], f[5], f[6], f[7]);
    }
}

__global__ void gather_kernel(const Bf8 *x, const int32_t *row, Bf8 *out, int n8)
{
    next_may_start();
    previous_done();
    const Bf8 *from = x + (int64_t)row[blockIdx.x] * n8;
    for (int i = threadIdx.x; i < n8; i += blockDim.x)
        out[(int64_t)blockIdx.x * n8 + i] = from[i];
}

/* One row's norm from registers: up to QUADS quads of values a thread. */
template <int QUADS> __global__ void __launch_bounds__(THREADS) add_norm_kernel(cu_add_norm_args a)
{
    int t = blockIdx.x, n4 = a.H / 4;
    float4 *residual = (float4 *)a.residual + (int64_t)t * n4;
    const float4 *delta = a.delta ? (const float4 *)a.delta + (int64_t)t * n4 : nullptr;
    const uint2 *w = (const uint2 *)a.w;
    uint2 *out = (uint2 *)a.out + (int64_t)t * n4;
    float4 x[QUADS];
    uint2 g[QUADS];
    float sum = 0;
    next_may_start();
#pragma unroll
    for (int j = 0; j < QUADS; j++)
        if (threadIdx.x + j * THREADS < n4)
            g[j] = w[threadIdx.x + j * THREADS];
    previous_done();
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= n4)
            break;
        x[j] = residual[i];
        if (delta) {
            float4 d = delta[i];
            x[j].x += d.x;
            x[j].y += d.y;
            x[j].z += d.z;
            x[j].w += d.w;
            residual[i] = x[j];
        }
        sum += x[j].x * x[j].x + x[j].y * x[j].y + x[j].z * x[j].z + x[j].w * x[j].w;
    }
    float scale = rsqrtf(block_sum(sum) / (float)a.H + a.eps);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= n4)
            break;
        union {
            uint2 bits;
            __nv_bfloat162 v[2];
        } weight = {g[j]}, y;
        float2 g0 = __bfloat1622float2(weight.v[0]), g1 = __bfloat1622float2(weight.v[1]);
        y.v[0] = __floats2bfloat162_rn(x[j].x * scale * g0.x, x[j].y * scale * g0.y);
        y.v[1] = __floats2bfloat162_rn(x[j].z * scale * g1.x, x[j].w * scale * g1.y);
        out[i] = y.bits;
    }
}

/* Eight values a thread, loaded once: the first q_warps warps have q_a, two the latent, the last
 * one the key. */
__global__ void qkv_kernel(cu_qkv_args a, float log2_theta, int q_warps)
{
    __shared__ float part[32];
    int t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bool is_q = warp < q_warps, is_key = warp == q_warps + 2;
    int at = is_q ? threadIdx.x : threadIdx.x - q_warps * 32, n = is_q ? a.q_lora : 512;
    bool has = !is_key && at < n / 8;
    const Bf8 *from = (const Bf8 *)(a.qkv + (int64_t)t * (a.q_lora + 576) + (is_q ? 0 : a.q_lora));
    float w[8], v[8] = {}, sum = 0, step = rope_step(lane, log2_theta);
    next_may_start();
    if (has)
        unpack(((const Bf8 *)(is_q ? a.q_norm : a.kv_norm))[at], w);
    previous_done();
    cu_bf16 *slot =
        a.pool + (((int64_t)a.slot_page[t] * a.n_layers + a.layer) * 64 + a.slot_row[t]) * 576;
    if (is_key) {
        float2 x = __bfloat1622float2(((const __nv_bfloat162 *)(from + 64))[lane]);
        rope_pair(x.x, x.y, a.position[t], step);
        ((__nv_bfloat162 *)(slot + 512))[lane] = __floats2bfloat162_rn(x.x, x.y);
    }
    if (has)
        unpack(from[at], v);
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum += v[i] * v[i];
#pragma unroll
    for (int o = 16; o; o >>= 1)
        sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0)
        part[warp] = sum;
    __syncthreads();
    if (!has)
        return;
    sum = 0;
    for (int i = is_q ? 0 : q_warps; i < (is_q ? q_warps : q_warps + 2); i++)
        sum += part[i];
    float scale = rsqrtf(sum / (float)n + a.eps);
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] *= scale * w[i];
    Bf8 *to = (Bf8 *)(is_q ? a.q_a + (int64_t)t * a.q_lora : slot);
    to[at] = pack(v);
}

/* A warp per head: lane i has pair i. */
__global__ void rope_q_kernel(cu_rope_q_args a, float log2_theta)
{
    int t = blockIdx.x, h = blockIdx.y * blockDim.y + threadIdx.y, i = threadIdx.x;
    float step = rope_step(i, log2_theta);
    next_may_start();
    previous_done();
    if (h >= a.heads)
        return;
    int64_t at = (int64_t)t * a.heads + h;
    __nv_bfloat162 *q = (__nv_bfloat162 *)a.q + (at * 256 + 192) / 2 + i;
    float2 v = __bfloat1622float2(*q);
    rope_pair(v.x, v.y, a.position[t], step);
    __nv_bfloat162 r = __floats2bfloat162_rn(v.x, v.y);
    *q = r;
    if (a.absorbed)
        ((__nv_bfloat162 *)a.absorbed)[(at * 576 + 512) / 2 + i] = r;
}

/* A warp per row. */
__global__ void rope_table_kernel(const int32_t *position, float2 *turn, int T, float log2_theta)
{
    int t = blockIdx.x * blockDim.y + threadIdx.y, i = threadIdx.x;
    next_may_start();
    previous_done();
    if (t >= T)
        return;
    float s, c;
    sincosf((float)position[t] * rope_step(i, log2_theta), &s, &c);
    turn[t * 32 + i] = make_float2(c, s);
}

__global__ void swiglu_kernel(const Bf8 *gate_up, Bf8 *out, int64_t total, int n8)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    next_may_start();
    previous_done();
    if (i >= total)
        return;
    int64_t t = i / n8, c = i % n8;
    float g[8], u[8];
    unpack(gate_up[t * 2 * n8 + c], g);
    unpack(gate_up[t * 2 * n8 + n8 + c], u);
#pragma unroll
    for (int e = 0; e < 8; e++)
        g[e] = silu(g[e]) * u[e];
    out[i] = pack(g);
}

__global__ void __launch_bounds__(THREADS) mtp_input_kernel(cu_mtp_input_args a)
{
    int t = blockIdx.x;
    bool hidden = blockIdx.y == 1;
    next_may_start();
    previous_done();
    const cu_bf16 *src = hidden ? a.hidden[a.source[t]] : a.table;
    const __nv_bfloat16 *x =
        (const __nv_bfloat16 *)src + (int64_t)(hidden ? a.idx[t] : a.token[t]) * a.H;
    const __nv_bfloat16 *w = (const __nv_bfloat16 *)(hidden ? a.hnorm : a.enorm);
    __nv_bfloat16 *out = (__nv_bfloat16 *)a.out + (int64_t)t * 2 * a.H + (hidden ? a.H : 0);
    float sum = 0;
    for (int i = threadIdx.x; i < a.H; i += THREADS) {
        float v = __bfloat162float(x[i]);
        sum += v * v;
    }
    float scale = rsqrtf(block_sum(sum) / (float)a.H + a.eps);
    for (int i = threadIdx.x; i < a.H; i += THREADS)
        out[i] = __float2bfloat16(__bfloat162float(x[i]) * scale * __bfloat162float(w[i]));
}

/* A block per packed slot: the latent and the key, 16 bytes a thread. */
__global__ void gather_kv_kernel(cu_gather_kv_args a)
{
    int row = blockIdx.x, s = 0;
    next_may_start();
    previous_done();
    while (row >= a.kv_start[s + 1])
        s++;
    int slot = row - a.kv_start[s];
    int page = a.block_table[(int64_t)s * a.max_pages + slot / 64];
    const Bf8 *src =
        (const Bf8 *)(a.pool + (((int64_t)page * a.n_layers + a.layer) * 64 + slot % 64) * 576);
    int i = threadIdx.x;
    Bf8 *to = i < 64 ? (Bf8 *)a.latent + (int64_t)row * 64 + i
                     : (Bf8 *)a.k_rope + (int64_t)row * 8 + i - 64;
    *to = src[i];
}

__device__ __forceinline__ uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

__global__ void fill_kernel(void *to, uint64_t n, uint64_t key, float scale, int is_f32)
{
    for (uint64_t k = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; k < n;
         k += (uint64_t)gridDim.x * blockDim.x) {
        float v = 1.f;
        if (scale > 0)
            v = scale * ((float)(int64_t)mix(key + (k + 1) * 0x9e3779b97f4a7c15u) * 0x1p-63f);
        if (is_f32)
            ((float *)to)[k] = v;
        else
            ((uint16_t *)to)[k] = (uint16_t)(__float_as_uint(v) >> 16);
    }
}

} // namespace

cudaError_t cu_embed(const cu_bf16 *table, const int32_t *token, float *residual, int T, int H,
                     cudaStream_t stream)
{
    if (H % 8)
        return cudaErrorInvalidValue;
    if (T <= 0)
        return cudaSuccess;
    return start(embed_kernel, dim3(T), dim3(THREADS), 0, 1, stream, (const Bf8 *)table, token,
                 residual, H / 8);
}

cudaError_t cu_add_norm(const struct cu_add_norm_args *a, cudaStream_t stream)
{
    if (a->H % 8 || a->H > 32 * THREADS)
        return cudaErrorInvalidValue;
    if (a->T <= 0)
        return cudaSuccess;
    return start(a->H <= 8 * THREADS ? add_norm_kernel<2> : add_norm_kernel<8>, dim3(a->T),
                 dim3(THREADS), 0, 1, stream, *a);
}

cudaError_t cu_qkv_norm_write(const struct cu_qkv_args *a, cudaStream_t stream)
{
    int q_warps = (a->q_lora / 8 + 31) / 32;
    if (a->q_lora <= 0 || a->q_lora % 8 || q_warps > 29)
        return cudaErrorInvalidValue;
    if (a->T <= 0)
        return cudaSuccess;
    return start(qkv_kernel, dim3(a->T), dim3((q_warps + 3) * 32), 0, 1, stream, *a,
                 log2f(a->theta), q_warps);
}

cudaError_t cu_rope_q(const struct cu_rope_q_args *a, cudaStream_t stream)
{
    if (a->T <= 0)
        return cudaSuccess;
    return start(rope_q_kernel, dim3(a->T, (a->heads + 3) / 4), dim3(32, 4), 0, 1, stream, *a,
                 log2f(a->theta));
}

cudaError_t cu_swiglu(const cu_bf16 *gate_up, cu_bf16 *out, int T, int n, cudaStream_t stream)
{
    if (n % 8)
        return cudaErrorInvalidValue;
    int64_t total = (int64_t)T * n / 8;
    if (total <= 0)
        return cudaSuccess;
    return start(swiglu_kernel, dim3((unsigned)((total + THREADS - 1) / THREADS)), dim3(THREADS), 0,
                 1, stream, (const Bf8 *)gate_up, (Bf8 *)out, total, n / 8);
}

cudaError_t cu_mtp_input(const struct cu_mtp_input_args *a, cudaStream_t stream)
{
    if (a->T <= 0)
        return cudaSuccess;
    return start(mtp_input_kernel, dim3(a->T, 2), dim3(THREADS), 0, 1, stream, *a);
}

cudaError_t cu_gather_rows(const cu_bf16 *x, const int32_t *row, cu_bf16 *out, int n, int H,
                           cudaStream_t stream)
{
    if (H % 8)
        return cudaErrorInvalidValue;
    if (n <= 0)
        return cudaSuccess;
    return start(gather_kernel, dim3(n), dim3(THREADS), 0, 1, stream, (const Bf8 *)x, row,
                 (Bf8 *)out, H / 8);
}

cudaError_t cu_rope_table(const int32_t *position, float *turn, int T, float theta,
                          cudaStream_t stream)
{
    if (T <= 0)
        return cudaSuccess;
    return start(rope_table_kernel, dim3((T + 7) / 8), dim3(32, 8), 0, 1, stream, position,
                 (float2 *)turn, T, log2f(theta));
}

cudaError_t cu_gather_kv(const struct cu_gather_kv_args *a, cudaStream_t stream)
{
    if (a->T_kv <= 0)
        return cudaSuccess;
    return start(gather_kv_kernel, dim3(a->T_kv), dim3(64 + 8), 0, 1, stream, *a);
}

cudaError_t cu_fill(void *to, uint64_t n, uint64_t stream_key, float scale, int is_f32,
                    cudaStream_t stream)
{
    if (n > 0)
        fill_kernel<<<132 * 8, THREADS, 0, stream>>>(to, n, stream_key, scale, is_f32);
    return cudaGetLastError();
}
