/* moe_route.cu: which experts a token goes to, pairs sorted by expert, and results back together.
 *
 * Routing is two launches. route_choose gives 16 tokens to a block: logits by m16n8k16 products (bf16
 * operands are exact there, sums fp32), K cut over eight warps and added in warp order, then one
 * warp per token picks. It leaves the choices and, per block, how many tokens chose each expert.
 * route_place gives 64 tokens to a block: every block adds up the counts before its own (at most 512
 * rows, from L2), which makes a counting sort without atomics on positions: an expert's tokens stay
 * in order and the result depends on nothing but the input.
 *
 * A token's results do not depend on what else is in the batch: no sum changes its order with T.
 */
#include "kernels/cuda.h"

#include <cuda_bf16.h>

#define MAX_E         64
#define MAX_K         8
#define CHOOSE_TOKENS 16 /* the 16 rows of one product */
#define CHOOSE_WARPS  8
#define PLACE_TOKENS  64 /* as many as bits in a mask */
#define PLACE_BLOCKS  (PLACE_TOKENS / CHOOSE_TOKENS)

/* In cu_route_args.work: what the first launch leaves for the second. */
struct choices {
    int32_t *expert; // [T, k] ascending
    float *weight;   // [T, k]
    int32_t *count;  // [ceil(T / 16), E]
};

static __host__ __device__ struct choices choices_at(int32_t *work, int T, int k)
{
    return {work, (float *)work + (int64_t)T * k, work + 2 * (int64_t)T * k};
}

size_t cu_route_work_bytes(int max_T, int E, int k)
{
    return (2 * (size_t)max_T * k + (size_t)(max_T + CHOOSE_TOKENS - 1) / CHOOSE_TOKENS * E) * 4;
}

/* ---- choose ---- */

static __device__ __forceinline__ void product_16x8(float (&d)[4], uint32_t a0, uint32_t a1,
                                                    uint32_t a2, uint32_t a3, uint32_t b0,
                                                    uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* This warp's share of the logits of 16 tokens. A thread reads 16 bytes of a row, eight neighbouring
 * columns, where the product wants pairs eight apart: the same columns of x and router meet, and
 * which comes first does not matter to the sum's definition. */
template <int N_TILES>
static __device__ __forceinline__ void logits_part(const struct cu_route_args *a, int first,
                                                   float (&d)[N_TILES][4])
{
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2, col = (lane & 3) * 8;
    const uint4 none = {0, 0, 0, 0};
    bool has_lo = first + row < a->T, has_hi = first + row + 8 < a->T;
    const cu_bf16 *x_lo = a->x + (int64_t)(first + row) * a->H + col;
    const cu_bf16 *x_hi = x_lo + 8 * (int64_t)a->H;
    const cu_bf16 *w = a->router + (int64_t)row * a->H + col;
#pragma unroll 2
    for (int h = warp * 32; h < a->H; h += CHOOSE_WARPS * 32) {
        uint4 lo = has_lo ? __ldg((const uint4 *)(x_lo + h)) : none;
        uint4 hi = has_hi ? __ldg((const uint4 *)(x_hi + h)) : none;
        uint4 b[N_TILES];
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
            b[n] = __ldg((const uint4 *)(w + n * 8 * (int64_t)a->H + h));
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            product_16x8(d[n], lo.x, hi.x, lo.y, hi.y, b[n].x, b[n].y);
            product_16x8(d[n], lo.z, hi.z, lo.w, hi.w, b[n].z, b[n].w);
        }
    }
}

/* Best of the warp's candidates, lowest index among equals; v is -inf where a lane has none. */
static __device__ __forceinline__ int warp_best(float v, int idx)
{
    for (int d = 16; d; d /= 2) {
        float other = __shfl_xor_sync(~0u, v, d);
        int other_idx = __shfl_xor_sync(~0u, idx, d);
        if (other > v || (other == v && other_idx < idx)) {
            v = other;
            idx = other_idx;
        }
    }
    return idx;
}

template <int N_TILES>
static __global__ void __launch_bounds__(CHOOSE_WARPS * 32)
    route_choose(const __grid_constant__ struct cu_route_args a)
{
    constexpr int E = N_TILES * 8;
    __shared__ float part[CHOOSE_WARPS][CHOOSE_TOKENS][E + 2];
    __shared__ int count[E];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * CHOOSE_TOKENS;
    struct choices c = choices_at(a.work, a.T, a.k);
    float d[N_TILES][4] = {};
    logits_part<N_TILES>(&a, first, d);
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
        int e = n * 8 + (lane & 3) * 2;
        part[warp][lane >> 2][e] = d[n][0];
        part[warp][lane >> 2][e + 1] = d[n][1];
        part[warp][(lane >> 2) + 8][e] = d[n][2];
        part[warp][(lane >> 2) + 8][e + 1] = d[n][3];
    }
    if (threadIdx.x < E)
        count[threadIdx.x] = 0;
    __syncthreads();

    for (int row = warp; row < CHOOSE_TOKENS && first + row < a.T; row += CHOOSE_WARPS) {
        float score[2], choice[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int e = lane + 32 * i;
            score[i] = 0.0f;
            choice[i] = -INFINITY;
            if (e < E) {
                float logit = 0.0f;
                for (int w = 0; w < CHOOSE_WARPS; w++)
                    logit += part[w][row][e];
                score[i] = 1.0f / (1.0f + expf(-logit));
                choice[i] = score[i] + a.bias[e];
            }
        }
        float sum = 1e-20f, my_score = 0.0f;
        int my_expert = 0;
        uint64_t chosen = 0;
        for (int i = 0; i < a.k; i++) {
            bool second = choice[1] > choice[0];
            int best = warp_best(second ? choice[1] : choice[0], lane + 32 * second) & (MAX_E - 1);
            float s = __shfl_sync(~0u, best < 32 ? score[0] : score[1], best & 31);
            if (best == lane)
                choice[0] = -INFINITY;
            if (best == lane + 32)
                choice[1] = -INFINITY;
            if (lane == i) {
                my_expert = best;
                my_score = s;
            }
            sum += s;
            chosen |= 1ull << best;
        }
        if (lane < a.k) {
            int at = __popcll(chosen & ((1ull << my_expert) - 1)); // ascending
            int64_t i = (int64_t)(first + row) * a.k + at;
            c.expert[i] = my_expert;
            c.weight[i] = my_score / sum * a.scale;
            atomicAdd(&count[my_expert], 1);
        }
    }
    __syncthreads();
    if (threadIdx.x < E)
        c.count[blockIdx.x * E + threadIdx.x] = count[threadIdx.x];
}

/* ---- place ---- */

static __global__ void __launch_bounds__(256)
    route_place(const __grid_constant__ struct cu_route_args a)
{
    __shared__ int total[4][MAX_E], before[4][MAX_E], from[MAX_E + 1];
    __shared__ unsigned long long who[MAX_E]; // bit t: token t of this block chose the expert
    struct choices c = choices_at(a.work, a.T, a.k);
    int n_counts = (a.T + CHOOSE_TOKENS - 1) / CHOOSE_TOKENS;
    int first = blockIdx.x * PLACE_TOKENS, n = min(a.T - first, PLACE_TOKENS);
    int e = threadIdx.x % MAX_E, part = threadIdx.x / MAX_E, sum = 0, mine = 0;
    if (e < a.E) {
#pragma unroll 8
        for (int i = part; i < n_counts; i += 4) {
            int count = c.count[i * a.E + e];
            sum += count;
            mine += i < (int)blockIdx.x * PLACE_BLOCKS ? count : 0;
        }
    }
    total[part][e] = sum;
    before[part][e] = mine;
    if (part == 0)
        who[e] = 0;
    __syncthreads();

    if (threadIdx.x < 32) { // two experts a lane
        int lane = threadIdx.x, s0 = 0, s1 = 0, b0 = 0, b1 = 0;
        for (int i = 0; i < 4; i++) {
            s0 += total[i][2 * lane];
            s1 += total[i][2 * lane + 1];
            b0 += before[i][2 * lane];
            b1 += before[i][2 * lane + 1];
        }
        int end = s0 + s1;
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(~0u, end, d);
            end += lane >= d ? other : 0;
        }
        int start = end - s0 - s1;
        from[2 * lane] = start + b0;
        from[2 * lane + 1] = start + s0 + b1;
        if (blockIdx.x == 0) {
            if (2 * lane < a.E)
                a.expert_start[2 * lane] = start;
            if (2 * lane + 1 < a.E)
                a.expert_start[2 * lane + 1] = start + s0;
            if (lane == 0) {
                a.expert_start[a.E] = a.T * a.k;
                a.expert_start[a.E + 1] = a.T * (a.k + 1);
            }
        }
    }
    for (int i = threadIdx.x; i < n * a.k; i += blockDim.x)
        atomicOr(&who[c.expert[(int64_t)first * a.k + i]], 1ull << (i / a.k));
    __syncthreads();

    for (int i = threadIdx.x; i < n * a.k; i += blockDim.x) {
        int t = i / a.k, expert = c.expert[(int64_t)first * a.k + i];
        int slot = from[expert] + __popcll(who[expert] & ((1ull << t) - 1));
        a.slot_token[slot] = first + t;
        a.slot_weight[slot] = c.weight[(int64_t)first * a.k + i];
        a.token_slot[(int64_t)(first + t) * (a.k + 1) + i - t * a.k] = slot;
    }
    for (int t = threadIdx.x; t < n; t += blockDim.x) {
        int slot = a.T * a.k + first + t;
        a.slot_token[slot] = first + t;
        a.slot_weight[slot] = 1.0f;
        a.token_slot[(int64_t)(first + t) * (a.k + 1) + a.k] = slot;
    }
}

cudaError_t cu_route(const struct cu_route_args *a, cudaStream_t stream)
{
    if (a->T <= 0 || a->H <= 0 || a->H % 32 || a->k <= 0 || a->k > MAX_K || a->k > a->E)
        return cudaErrorInvalidValue;
    int n_choose = (a->T + CHOOSE_TOKENS - 1) / CHOOSE_TOKENS;
    switch (a->E) {
    case 8:
        route_choose<1><<<n_choose, CHOOSE_WARPS * 32, 0, stream>>>(*a);
        break;
    case 16:
        route_choose<2><<<n_choose, CHOOSE_WARPS * 32, 0, stream>>>(*a);
        break;
    case 32:
        route_choose<4><<<n_choose, CHOOSE_WARPS * 32, 0, stream>>>(*a);
        break;
    case 64:
        route_choose<8><<<n_choose, CHOOSE_WARPS * 32, 0, stream>>>(*a);
        break;
    default:
        return cudaErrorInvalidValue;
    }
    cudaError_t err = cudaGetLastError();
    if (err)
        return err;
    route_place<<<(a->T + PLACE_TOKENS - 1) / PLACE_TOKENS, 256, 0, stream>>>(*a);
    return cudaGetLastError();
}

/* ---- reduce ---- */

static __device__ __forceinline__ void unpack8(uint4 v, float (&f)[8])
{
    uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f[2 * i] = __uint_as_float(w[i] << 16);
        f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}

static __device__ __forceinline__ uint4 pack8(const float (&f)[8])
{
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __nv_bfloat162 v = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
        w[i] = *(uint32_t *)&v;
    }
    return {w[0], w[1], w[2], w[3]};
}

/* A token a block, eight columns a thread. */
template <int K>
static __global__ void __launch_bounds__(1024)
    moe_reduce(const __grid_constant__ struct cu_moe_reduce_args a)
{
    __shared__ float warp_sum[32];
    int t = blockIdx.x, col = threadIdx.x * 8, k = K ? K : a.k;
    float sum[8] = {}, v[8];
    bool has = col < a.H;
    float4 *residual = (float4 *)(a.residual + (int64_t)t * a.H + col);
    const int32_t *slots = a.token_slot + (int64_t)t * (k + 1);
    uint4 g = {0, 0, 0, 0};
    if (has) {
        float4 r0 = residual[0], r1 = residual[1];
        g = __ldg((const uint4 *)(a.norm + col));
#pragma unroll
        for (int i = 0; i <= k; i++) {
            int slot = slots[i];
            float w = a.slot_weight[slot];
            unpack8(*(const uint4 *)(a.y + (int64_t)slot * a.H + col), v);
#pragma unroll
            for (int j = 0; j < 8; j++)
                sum[j] += w * v[j];
        }
        float r[8] = {r0.x, r0.y, r0.z, r0.w, r1.x, r1.y, r1.z, r1.w};
#pragma unroll
        for (int j = 0; j < 8; j++)
            sum[j] += r[j];
        residual[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        residual[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++)
        squares += sum[j] * sum[j];
    for (int d = 16; d; d /= 2)
        squares += __shfl_xor_sync(~0u, squares, d);
    if ((threadIdx.x & 31) == 0)
        warp_sum[threadIdx.x >> 5] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int i = 0; i < (int)blockDim.x / 32; i++)
        squares += warp_sum[i];
    if (has) {
        float scale = rsqrtf(squares / (float)a.H + a.eps), n[8];
        unpack8(g, n);
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = sum[j] * scale * n[j];
        *(uint4 *)(a.out + (int64_t)t * a.H + col) = pack8(v);
    }
}

cudaError_t cu_moe_reduce(const struct cu_moe_reduce_args *a, cudaStream_t stream)
{
    if (a->T <= 0 || a->k <= 0 || a->H <= 0 || a->H % 8 || a->H > 8192)
        return cudaErrorInvalidValue;
    int threads = (a->H / 8 + 31) / 32 * 32;
    if (a->k == 4)
        moe_reduce<4><<<a->T, threads, 0, stream>>>(*a);
    else
        moe_reduce<0><<<a->T, threads, 0, stream>>>(*a);
    return cudaGetLastError();
}
