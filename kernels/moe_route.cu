/* moe_route.cu: which experts a token goes to, pairs sorted by expert, and results back together.
 *
 * Router logits are m16n8k16 products (bf16 operands are exact there, sums fp32) of 16 tokens, K
 * cut over eight warps and added in warp order; one warp per token picks. Sorting is by counting,
 * with no atomics on positions: an expert's tokens stay in order and the result depends on nothing
 * but the input.
 *
 * Up to 512 tokens it is one launch (route_small): what takes time there is not bytes (262 KB of
 * router) but one latency after another. A cluster of up to eight blocks shares 16 tokens, eight or
 * sixteen experts each, all loads of a warp in flight at once, the router's before the predecessor
 * in the stream has ended. The first block of a cluster picks; the last one to have picked, by a
 * counter, sorts all. More tokens are two launches: route_choose, 16 tokens to a block, leaves the
 * choices and how many tokens chose each expert; in route_place, 64 tokens to a block, every block
 * adds up the counts before its own (from L2).
 *
 * A token's results do not depend on what else is in the batch: no sum changes its order with T.
 */
#include "kernels/cuda.h"

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"

#include <cuda_bf16.h>
#include <float.h>

using hopper::product_16x8;
using namespace launch;

#define MAX_E         64
#define MAX_K         8
#define CHOOSE_TOKENS 16 /* the 16 rows of one product */
#define CHOOSE_WARPS  8
#define PLACE_TOKENS  64 /* as many as bits in a mask */
#define PLACE_BLOCKS  (PLACE_TOKENS / CHOOSE_TOKENS)
#define SMALL_TOKENS  512
#define SMALL_WORDS   (SMALL_TOKENS / 32) /* of a mask of tokens */
#define WORK_HEAD     4                   /* words before the choices: the counter of route_small */

/* In cu_route_args.work: what those that pick leave for those that sort. */
struct choices {
    int32_t *expert; // [T, k] ascending
    float *weight;   // [T, k]
    int32_t *count;  // [ceil(T / 16), E]
};

static __host__ __device__ struct choices choices_at(int32_t *work, int T, int k)
{
    work += WORK_HEAD;
    return {work, (float *)work + (int64_t)T * k, work + 2 * (int64_t)T * k};
}

size_t cu_route_work_bytes(int max_T, int E, int k)
{
    return (WORK_HEAD + 2 * (size_t)max_T * k +
            (size_t)(max_T + CHOOSE_TOKENS - 1) / CHOOSE_TOKENS * E) *
           4;
}

/* ---- choose ---- */

/* This warp's share of the logits of 16 tokens. A thread reads 16 bytes of a row, eight
 * neighbouring columns, where the product wants pairs eight apart: the same columns of x and router
 * meet, and which comes first does not matter to the sum's definition. */
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
        uint4 lo = has_lo ? *(const uint4 *)(x_lo + h) : none;
        uint4 hi = has_hi ? *(const uint4 *)(x_hi + h) : none;
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

/* Orders like the float; 0 is below all. NaN counts as the least number. */
static __device__ __forceinline__ uint32_t ordered(float v)
{
    uint32_t bits = __float_as_uint(fmaxf(v, -FLT_MAX) + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* One warp picks a token's experts from its E logits. Lane i < k gets the i-th lowest chosen one,
 * its weight and (true) that it has one. */
static __device__ __forceinline__ bool pick(const float *logits, const struct cu_route_args *a,
                                            int *ret_expert, float *ret_weight, int *ret_at)
{
    int lane = threadIdx.x & 31;
    float score[2];
    uint32_t choice[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int e = lane + 32 * i;
        score[i] = 0.0f;
        choice[i] = 0;
        if (e < a->E) {
            score[i] = 1.0f / (1.0f + expf(-logits[e]));
            choice[i] = ordered(score[i] + a->bias[e]);
        }
    }
    float sum = 1e-20f, my_score = 0.0f;
    int my_expert = 0;
    uint64_t chosen = 0;
    for (int i = 0; i < a->k; i++) {
        uint32_t most = __reduce_max_sync(~0u, max(choice[0], choice[1]));
        uint32_t low = __ballot_sync(~0u, choice[0] == most);
        uint32_t high = __ballot_sync(~0u, choice[1] == most);
        int best = low ? __ffs(low) - 1 : 31 + __ffs(high);
        float s = __shfl_sync(~0u, best < 32 ? score[0] : score[1], best & 31);
        if (best == lane)
            choice[0] = 0;
        if (best == lane + 32)
            choice[1] = 0;
        if (lane == i) {
            my_expert = best;
            my_score = s;
        }
        sum += s;
        chosen |= 1ull << best;
    }
    *ret_expert = my_expert;
    *ret_weight = my_score / sum * a->scale;
    *ret_at = __popcll(chosen & ((1ull << my_expert) - 1)); // ascending
    return lane < a->k;
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
    next_may_start();
    previous_done();
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
        float *logit = part[0][row];
        for (int e = lane; e < E; e += 32) {
            float sum = 0.0f;
            for (int w = 0; w < CHOOSE_WARPS; w++)
                sum += part[w][row][e];
            logit[e] = sum;
        }
        __syncwarp();
        int expert, at;
        float weight;
        if (pick(logit, &a, &expert, &weight, &at)) {
            int64_t i = (int64_t)(first + row) * a.k + at;
            c.expert[i] = expert;
            c.weight[i] = weight;
            atomicAdd(&count[expert], 1);
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
    next_may_start();
    previous_done();
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

/* ---- both, for few tokens ---- */

struct small {
    float part[CHOOSE_WARPS][CHOOSE_TOKENS][16 + 2];
    float logit[CHOOSE_TOKENS][MAX_E]; // of the whole cluster, in its first block
    uint32_t who[MAX_E][SMALL_WORDS];  // bit t: token t chose the expert
    int from[MAX_E][SMALL_WORDS];      // slot of the first of these tokens
    int total[MAX_E];
    float weight[SMALL_TOKENS * MAX_K];
    uint8_t expert[SMALL_TOKENS * MAX_K];
    int last;
};

/* This warp's share of 16 tokens' logits for PER * 8 experts from the block's first on, router
 * first: that does not depend on the predecessor. The same products in the same order as
 * logits_part. */
template <int PER>
static __device__ __forceinline__ void logits_small(const struct cu_route_args *a, int first,
                                                    int first_expert, float (&d)[PER][4])
{
    constexpr int AT_ONCE = 8, STEP = CHOOSE_WARPS * 32;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2, col = (lane & 3) * 8;
    // No load is conditional: rows past the last token repeat it, columns past the last are unused.
    const cu_bf16 *x_lo = a->x + (int64_t)min(first + row, a->T - 1) * a->H + col;
    const cu_bf16 *x_hi = a->x + (int64_t)min(first + row + 8, a->T - 1) * a->H + col;
    const cu_bf16 *w = a->router + (int64_t)(first_expert + row) * a->H + col;
    for (int begin = warp * 32; begin < a->H; begin += AT_ONCE * STEP) {
        uint4 b[AT_ONCE][PER], lo[AT_ONCE], hi[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int n = 0; n < PER; n++)
                b[i][n] = __ldg(
                    (const uint4 *)(w + n * 8 * (int64_t)a->H + min(begin + i * STEP, a->H - 32)));
        if (begin == warp * 32)
            previous_done();
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int h = min(begin + i * STEP, a->H - 32);
            lo[i] = *(const uint4 *)(x_lo + h);
            hi[i] = *(const uint4 *)(x_hi + h);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i * STEP >= a->H)
                break;
#pragma unroll
            for (int n = 0; n < PER; n++) {
                product_16x8(d[n], lo[i].x, hi[i].x, lo[i].y, hi[i].y, b[i][n].x, b[i][n].y);
                product_16x8(d[n], lo[i].z, hi[i].z, lo[i].w, hi[i].w, b[i][n].z, b[i][n].w);
            }
        }
    }
    previous_done(); // also where a warp had nothing to multiply
}

/* Slots of all tokens from the choices in s, by one block. */
static __device__ __forceinline__ void place_all(const struct cu_route_args *a, struct small *s)
{
    int lane = threadIdx.x & 31, n = a->T * a->k;
    for (int i = threadIdx.x; i < MAX_E * SMALL_WORDS; i += blockDim.x)
        s->who[i / SMALL_WORDS][i % SMALL_WORDS] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int t = i / a->k;
        atomicOr(&s->who[s->expert[i]][t / 32], 1u << (t % 32));
    }
    __syncthreads();
    { // four threads per expert, four words each
        int e = threadIdx.x / 4, word = threadIdx.x % 4 * 4, count[4], sum = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            count[w] = sum;
            sum += __popc(s->who[e][word + w]);
        }
        int end = sum;
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            int other = __shfl_up_sync(~0u, end, d);
            end += lane % 4 >= d ? other : 0;
        }
#pragma unroll
        for (int w = 0; w < 4; w++)
            s->from[e][word + w] = end - sum + count[w];
        if (lane % 4 == 3)
            s->total[e] = end;
    }
    __syncthreads();
    if (threadIdx.x < 32) { // two experts a lane
        int t0 = s->total[2 * lane], t1 = s->total[2 * lane + 1], end = t0 + t1;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(~0u, end, d);
            end += lane >= d ? other : 0;
        }
        int start = end - t0 - t1;
        s->total[2 * lane] = start;
        s->total[2 * lane + 1] = start + t0;
        if (2 * lane < a->E)
            a->expert_start[2 * lane] = start;
        if (2 * lane + 1 < a->E)
            a->expert_start[2 * lane + 1] = start + t0;
        if (lane == 0) {
            a->expert_start[a->E] = n;
            a->expert_start[a->E + 1] = n + a->T;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int t = i / a->k, e = s->expert[i];
        int before = __popc(s->who[e][t / 32] & ((1u << (t % 32)) - 1));
        int slot = s->total[e] + s->from[e][t / 32] + before;
        a->slot_token[slot] = t;
        a->slot_weight[slot] = s->weight[i];
        a->token_slot[t * (a->k + 1) + i - t * a->k] = slot;
    }
    for (int t = threadIdx.x; t < a->T; t += blockDim.x) {
        a->slot_token[n + t] = t;
        a->slot_weight[n + t] = 1.0f;
        a->token_slot[t * (a->k + 1) + a->k] = n + t;
    }
}

template <int PER>
static __global__ void __launch_bounds__(CHOOSE_WARPS * 32)
    route_small(const __grid_constant__ struct cu_route_args a)
{
    __shared__ struct small s;
    cluster_arrive();
    next_may_start();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int n_clusters = gridDim.x / cluster_size(),
        first = blockIdx.x / cluster_size() * CHOOSE_TOKENS;
    int first_expert = (int)cluster_rank() * PER * 8, n_tokens = min(a.T - first, CHOOSE_TOKENS);
    struct choices c = choices_at(a.work, a.T, a.k);
    float d[PER][4] = {};
    logits_small<PER>(&a, first, first_expert, d);
#pragma unroll
    for (int n = 0; n < PER; n++) {
        int e = n * 8 + (lane & 3) * 2;
        s.part[warp][lane >> 2][e] = d[n][0];
        s.part[warp][lane >> 2][e + 1] = d[n][1];
        s.part[warp][(lane >> 2) + 8][e] = d[n][2];
        s.part[warp][(lane >> 2) + 8][e + 1] = d[n][3];
    }
    __syncthreads();
    cluster_wait();
    for (int i = threadIdx.x; i < CHOOSE_TOKENS * PER * 8; i += blockDim.x) {
        int row = i / (PER * 8), e = i % (PER * 8);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < CHOOSE_WARPS; w++)
            sum += s.part[w][row][e];
        *peer(&s.logit[row][first_expert + e], 0) = sum;
    }
    cluster_sync();
    if (cluster_rank() != 0)
        return;

    for (int row = warp; row < n_tokens; row += CHOOSE_WARPS) {
        int expert, at;
        float weight;
        if (pick(s.logit[row], &a, &expert, &weight, &at)) {
            int i = (first + row) * a.k + at;
            s.expert[i] = (uint8_t)expert;
            s.weight[i] = weight;
            if (n_clusters > 1) {
                c.expert[i] = expert;
                c.weight[i] = weight;
            }
        }
    }
    if (n_clusters > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            s.last = atomicAdd(a.work, 1) == n_clusters - 1;
            if (s.last)
                *a.work = 0; // for the next launch
            __threadfence();
        }
        __syncthreads();
        if (!s.last)
            return;
        for (int i = threadIdx.x; i < a.T * a.k; i += blockDim.x) {
            s.expert[i] = (uint8_t)__ldcg(&c.expert[i]);
            s.weight[i] = __ldcg(&c.weight[i]);
        }
    }
    __syncthreads();
    place_all(&a, &s);
}

/* ---- launches ---- */

template <int N_TILES> static cudaError_t route(const struct cu_route_args *a, cudaStream_t stream)
{
    int n_choose = (a->T + CHOOSE_TOKENS - 1) / CHOOSE_TOKENS, threads = CHOOSE_WARPS * 32;
    if (a->T <= SMALL_TOKENS / 4)
        return start(route_small<1>, dim3(n_choose * N_TILES), dim3(threads), 0, N_TILES, stream,
                     *a);
    if (a->T <= SMALL_TOKENS) {
        constexpr int PER = N_TILES > 1 ? 2 : 1;
        return start(route_small<PER>, dim3(n_choose * (N_TILES / PER)), dim3(threads), 0,
                     N_TILES / PER, stream, *a);
    }
    cudaError_t err = start(route_choose<N_TILES>, dim3(n_choose), dim3(threads), 0, 1, stream, *a);
    if (err)
        return err;
    return start(route_place, dim3((a->T + PLACE_TOKENS - 1) / PLACE_TOKENS), dim3(256), 0, 1,
                 stream, *a);
}

cudaError_t cu_route(const struct cu_route_args *a, cudaStream_t stream)
{
    if (a->T <= 0 || a->H <= 0 || a->H % 32 || a->k <= 0 || a->k > MAX_K || a->k > a->E)
        return cudaErrorInvalidValue;
    switch (a->E) {
    case 8:
        return route<1>(a, stream);
    case 16:
        return route<2>(a, stream);
    case 32:
        return route<4>(a, stream);
    case 64:
        return route<8>(a, stream);
    default:
        return cudaErrorInvalidValue;
    }
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
    next_may_start();
    if (has)
        g = __ldg((const uint4 *)(a.norm + col));
    previous_done();
    if (has) {
        float4 r0 = residual[0], r1 = residual[1];
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
    return start(a->k == 4 ? moe_reduce<4> : moe_reduce<0>, dim3(a->T), dim3(threads), 0, 1, stream,
                 *a);
}
