// sample.cu: the draw on the device, sample_ref.c's rule. A block takes one row.
//
// Passes over the row (620 KB, the first from memory, the others from L2): largest value; for each
// filter a histogram over buckets of log-probability, whose border bucket alone is sorted; then
// Gumbel-max, where most ids fail a bound and need no noise. Sums are integers (sample_math.h), so
// threads may add in any order and the kept set is the reference's.
//
// A border bucket with more candidates than fit here is left to the host: the row's id is -1.

#include "kernels/cuda.h"
#include "kernels/sample_math.h"

#include <float.h>

namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32, MAX_BORDER = 2048;
constexpr float INF = INFINITY;

struct best_t {
    double score;
    int32_t id;
};

struct candidate {
    float z;
    int32_t id;
};

struct shared_t {
    best_t best[WARPS];
    double sum[WARPS];
    unsigned long long mass[SAMPLE_BUCKETS];
    int count[SAMPLE_BUCKETS];
    candidate border[MAX_BORDER];
    candidate last; // the worst candidate that is kept so far
    int n_border, bucket, failed, before;
    unsigned long long before_mass;
    double want;
    uint32_t banned[CU_SAMPLE_BANNED];
};

__device__ bool better(candidate a, candidate b) { return a.z > b.z || (a.z == b.z && a.id < b.id); }

__device__ best_t better(best_t a, best_t b)
{
    return a.score > b.score || (a.score == b.score && (uint32_t)a.id < (uint32_t)b.id) ? a : b;
}

// The block's best, on all threads.
__device__ best_t reduce(shared_t &s, best_t x)
{
    for (int o = 16; o; o >>= 1) {
        best_t y = {__shfl_xor_sync(~0u, x.score, o), __shfl_xor_sync(~0u, x.id, o)};
        x = better(x, y);
    }
    __syncthreads(); // s.best may still be read
    if (threadIdx.x % 32 == 0)
        s.best[threadIdx.x / 32] = x;
    __syncthreads();
    x = s.best[0];
    for (int w = 1; w < WARPS; w++)
        x = better(x, s.best[w]);
    return x;
}

// A fixed tree, so that the sum does not depend on timing.
__device__ double reduce_sum(shared_t &s, double x)
{
    for (int o = 16; o; o >>= 1)
        x += __shfl_xor_sync(~0u, x, o);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        s.sum[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < WARPS; w++)
        x += s.sum[w];
    return x;
}

__device__ bool may_draw(const shared_t &s, int n_banned, float v, int32_t id)
{
    for (int i = 0; i < n_banned; i++)
        if (s.banned[i] == (uint32_t)id)
            return false;
    return v == v; // not NaN
}

// f(z, id) of every id that may be drawn, with z not yet relative.
template <class F>
__device__ void each(const shared_t &s, const float *x, int n_valid, int n_banned, F f)
{
    for (int i = threadIdx.x * 4; i < n_valid; i += THREADS * 4) {
        float4 v = *(const float4 *)(x + i);
        const float z[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j < n_valid && may_draw(s, n_banned, z[j], i + j))
                f(fminf(fmaxf(z[j], -FLT_MAX), FLT_MAX), i + j);
    }
}

__device__ void sort_border(shared_t &s)
{
    int n = 1;
    while (n < s.n_border)
        n *= 2;
    for (int i = threadIdx.x; i < n; i += THREADS)
        if (i >= s.n_border)
            s.border[i] = {-INF, INT32_MAX};
    __syncthreads();
    for (int size = 2; size <= n; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                int a = 2 * i - (i & (step - 1)), b = a + step;
                bool up = (a & size) == 0; // best first
                candidate p = s.border[a], q = s.border[b];
                if (better(q, p) == up) {
                    s.border[a] = q;
                    s.border[b] = p;
                }
            }
            __syncthreads();
        }
}

// As keep_best of sample_ref.c: moves s.last to the worst of the best k that hold share p.
__device__ void keep_best(shared_t &s, const cu_sample_row &row, const float *x, int n_valid,
                          float top, int k, double p)
{
    for (int i = threadIdx.x; i < SAMPLE_BUCKETS; i += THREADS) {
        s.mass[i] = 0;
        s.count[i] = 0;
    }
    if (threadIdx.x == 0)
        s.n_border = 0;
    candidate last = s.last;
    __syncthreads();
    each(s, x, n_valid, row.n_banned, [&](float v, int32_t id) {
        candidate c = {fmaxf((v - top) / row.temperature, -FLT_MAX), id};
        if (better(last, c))
            return;
        int b = sample_bucket(c.z);
        atomicAdd(&s.count[b], 1);
        if (p <= 1)
            atomicAdd(&s.mass[b], (unsigned long long)sample_mass(c.z));
    });
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned long long total = 0, sum = 0;
        for (int b = 0; b < SAMPLE_BUCKETS; b++)
            total += s.mass[b];
        s.want = p <= 1 ? p * (double)total : INF;
        int border = 0, kept = 0;
        while (border < SAMPLE_BUCKETS - 1 && kept + s.count[border] < k &&
               (double)(sum + s.mass[border]) < s.want) {
            kept += s.count[border];
            sum += s.mass[border];
            border++;
        }
        s.bucket = border;
        s.before = kept;
        s.before_mass = sum;
    }
    __syncthreads();
    each(s, x, n_valid, row.n_banned, [&](float v, int32_t id) {
        candidate c = {fmaxf((v - top) / row.temperature, -FLT_MAX), id};
        if (better(last, c) || sample_bucket(c.z) != s.bucket)
            return;
        int at = atomicAdd(&s.n_border, 1);
        if (at < MAX_BORDER)
            s.border[at] = c;
    });
    __syncthreads();
    if (s.n_border > MAX_BORDER) {
        s.failed = 1;
        __syncthreads();
        return;
    }
    sort_border(s);
    if (threadIdx.x == 0 && s.n_border > 0) {
        unsigned long long sum = s.before_mass;
        int at = 0;
        while (at < s.n_border && s.before + at < k && (double)sum < s.want)
            sum += p <= 1 ? sample_mass(s.border[at].z) : 0, at++;
        // An empty share of the border: the last bucket before it ends the list. The reference keeps
        // the bucket's candidates in front, so the worst of those is what stands before the border.
        s.last = at > 0 ? s.border[at - 1] : s.before > 0 ? candidate{s.border[0].z, -1} : s.border[0];
    }
    __syncthreads();
}

__device__ void philox(uint32_t position, uint32_t block, uint64_t seed, uint32_t c[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    c[0] = position;
    c[1] = block;
    c[2] = c[3] = 0;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[1] = (uint32_t)b;
        c[3] = (uint32_t)a;
        c[0] = n0;
        c[2] = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

__device__ double score_of(float z, uint32_t x)
{
    return z - log(-log(((double)x + 0.5) * 0x1p-32));
}

// One group of four ids shares a counter.
__device__ best_t gumbel_max(shared_t &s, const cu_sample_row &row, const float *x, int n_valid,
                             candidate top, float top_value)
{
    uint32_t c[4];
    philox(row.position, top.id / 4, row.seed, c);
    best_t best = {score_of(0, c[top.id % 4]), top.id};
    candidate last = s.last;
    for (int i = threadIdx.x * 4; i < n_valid; i += THREADS * 4) {
        float4 v = *(const float4 *)(x + i);
        const float values[4] = {v.x, v.y, v.z, v.w};
        bool have = false;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int32_t id = i + j;
            if (id >= n_valid || !may_draw(s, row.n_banned, values[j], id))
                continue;
            float value = fminf(fmaxf(values[j], -FLT_MAX), FLT_MAX);
            candidate a = {fmaxf((value - top_value) / row.temperature, -FLT_MAX), id};
            if (better(last, a) || a.z < row.least || a.z + SAMPLE_MAX_NOISE < best.score)
                continue;
            if (!have)
                philox(row.position, i / 4, row.seed, c);
            have = true;
            uint32_t n = c[j];
            int zeros = ~n ? __clz(~n) : 32;
            if (a.z + (zeros + 1) * 0.69314719 < best.score)
                continue;
            best = better(best, {score_of(a.z, n), id});
        }
    }
    return reduce(s, best);
}

// Of the model's own distribution.
__device__ void logprobs(shared_t &s, const cu_sample_args &a, const cu_sample_row &row, int r,
                         const float *x, int32_t id)
{
    best_t max = {-INF, -1};
    for (int i = threadIdx.x; i < a.n_valid; i += THREADS)
        max = better(max, {x[i] == x[i] ? x[i] : -INF, i});
    max = reduce(s, max);
    double sum = 0;
    for (int i = threadIdx.x; i < a.n_valid; i += THREADS)
        sum += exp((double)x[i] - max.score);
    double norm = max.score + log(reduce_sum(s, sum));
    if (threadIdx.x == 0)
        a.logprob[r] = (float)(x[id] - norm);
    int n_top = min(row.n_logprobs, a.max_top);
    best_t last = {INF, -1};
    for (int t = 0; t < n_top; t++) {
        best_t best = {-INF, -1};
        for (int i = threadIdx.x; i < a.n_valid; i += THREADS)
            if (x[i] < last.score || (x[i] == last.score && i > last.id))
                best = better(best, {x[i], i});
        last = reduce(s, best);
        if (threadIdx.x == 0) {
            a.top_id[r * a.max_top + t] = last.id;
            a.top_logprob[r * a.max_top + t] = (float)(last.score - norm);
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) sample_kernel(cu_sample_args a)
{
    extern __shared__ __align__(16) unsigned char space[];
    shared_t &s = *(shared_t *)space;
    int r = blockIdx.x;
    const cu_sample_row &row = a.rows[r];
    const float *x = a.logits + (int64_t)row.logits_row * a.V;
    if (threadIdx.x < CU_SAMPLE_BANNED)
        s.banned[threadIdx.x] = threadIdx.x < row.n_banned ? row.banned[threadIdx.x] : ~0u;
    if (threadIdx.x == 0) {
        s.failed = 0;
        s.last = {-INF, INT32_MAX};
    }
    __syncthreads();
    best_t top = {-INF, -1};
    each(s, x, a.n_valid, row.n_banned, [&](float v, int32_t id) { top = better(top, {v, id}); });
    top = reduce(s, top);
    best_t drawn = {0, max(top.id, 0)}; // nothing may be drawn: an answer that is at least an id
    if (top.id >= 0 && row.temperature > 0 && row.top_k != 1) {
        float value = (float)top.score;
        if (row.top_k > 0 && row.top_k < a.n_valid)
            keep_best(s, row, x, a.n_valid, value, row.top_k, 2.0);
        if (row.top_p < 1.0f && !s.failed)
            keep_best(s, row, x, a.n_valid, value, INT32_MAX, row.top_p);
        if (!s.failed)
            drawn = gumbel_max(s, row, x, a.n_valid, {0, top.id}, value);
    }
    if (threadIdx.x == 0)
        a.id[r] = s.failed ? -1 : drawn.id;
    if (row.n_logprobs >= 0 && !s.failed)
        logprobs(s, a, row, r, x, drawn.id);
}

} // namespace

cudaError_t cu_sample(const struct cu_sample_args *a, cudaStream_t stream)
{
    if (a->n < 0 || a->V % 4 || a->n_valid < 1 || a->n_valid > a->V)
        return cudaErrorInvalidValue;
    if (a->n == 0)
        return cudaSuccess;
    cudaError_t e = cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         sizeof(shared_t));
    if (e != cudaSuccess)
        return e;
    sample_kernel<<<a->n, THREADS, sizeof(shared_t), stream>>>(*a);
    return cudaGetLastError();
}
