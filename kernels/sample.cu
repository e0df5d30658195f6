/* sample.cu: the draw of sample_ref.c on the device, and the plain argmax.
 *
 * A row of 154,880 fp32 logits is 620 KB: memory-bound, 0.19 us a row at 3.3 TB/s if it is read
 * once. So a cluster of eight blocks takes a row, each keeps its slice (77 KB) in shared memory,
 * and every later pass (maximum, filters, noise) runs there; two blocks share an SM and cover each
 * other's loads. Blocks of a cluster exchange a few values through each other's shared memory.
 *
 * After the maximum is known, a logit is replaced by its key: the bits of its distance to the
 * maximum over the temperature. Distances are >= 0, so keys order like integers, best first, and
 * the kept set of any filter is "up to (key, id)". That limit is found without sorting: a histogram
 * over linear buckets of the distance, then over ever finer key ranges inside the border bucket, at
 * last over ids where keys tie; usually two rounds decide. A bucket's measure is a count for top-k,
 * and for top-p a mass in 44-bit integers: added in three parts of 15 bits with 32-bit atomics, so
 * the sum is exact in any order and equals the reference's.
 *
 * Gumbel-max reads keys four at a time (one Philox call) and skips what cannot win any more.
 */
#include "kernels/cuda.h"

#include <float.h>

#include "kernels/launch.cuh"
#include "kernels/sample_math.h"

using namespace launch;

namespace
{

constexpr int CLUSTER = 8, THREADS = 512, WARPS = THREADS / 32;
constexpr int N_BINS = SAMPLE_N_BUCKETS, SHARE = N_BINS / CLUSTER;
constexpr int PART_BITS = 15; // 2^15 times a slice's ids fits 32 bits up to slices of 2^17
constexpr uint32_t NO_KEY = 0xffffffff, LAST_KEY = 0x7f7fffff, ANY_ID = 0xffffffff;
constexpr int NO_ID = 0x7fffffff; // loses every tie
static_assert(N_BINS == 2 * THREADS, "the scan gives a thread two bins");

struct best {
    double value;
    int id;
};

struct shared {
    uint32_t hist[3 * N_BINS]; // this block's slice, part after part
    uint64_t total[N_BINS];    // the cluster's
    uint64_t warp_sum[WARPS], sum[2][CLUSTER];
    struct best warp_best[WARPS], best[2][CLUSTER], top[CLUSTER * CU_SAMPLE_MAX_TOP];
    struct {
        uint64_t before, measure;
        int bin;
    } border;
    uint32_t known; // of a row's ids ahead: has an entry in seen
    uint4 slice[1]; // as long as it takes
};

/* Keys up to and including this one are kept. */
struct limit {
    uint32_t key, id;
};

/* This block's part of a row. */
struct slice {
    struct shared *s;
    unsigned rank;
    int first, n; // ids [first, first + n)
    int turn;     // which of two exchange buffers is next
    __device__ float *logits() const { return (float *)s->slice; }
    __device__ uint32_t *keys() const { return (uint32_t *)s->slice; }
};

__device__ __forceinline__ bool beats(struct best a, struct best b)
{
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

__device__ __forceinline__ bool keeps(struct limit limit, uint32_t key, uint32_t id)
{
    return key < limit.key || (key == limit.key && id <= limit.id);
}

/* ---- across the block and the cluster ---- */

__device__ __forceinline__ struct best warp_best(struct best b)
{
#pragma unroll
    for (int d = 16; d; d /= 2) {
        struct best other = {__shfl_xor_sync(~0u, b.value, d), __shfl_xor_sync(~0u, b.id, d)};
        if (beats(other, b))
            b = other;
    }
    return b;
}

/* In warp 0 the block's best; other warps get nothing of use. */
__device__ __forceinline__ struct best block_best(struct shared *s, struct best b)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    b = warp_best(b);
    if (lane == 0)
        s->warp_best[warp] = b;
    __syncthreads();
    if (warp == 0) {
        b = lane < WARPS ? s->warp_best[lane] : (struct best){-INFINITY, NO_ID};
        b = warp_best(b);
    }
    return b;
}

/* Everyone gets the cluster's best. A buffer is written again two exchanges later, when all have
 * passed the barrier between. */
__device__ struct best cluster_best(struct slice *c, struct best b)
{
    struct best *slots = c->s->best[c->turn ^= 1];
    b = block_best(c->s, b);
    if (threadIdx.x < CLUSTER)
        *peer(&slots[c->rank], threadIdx.x) = b;
    cluster_sync();
    b = slots[0];
    for (int r = 1; r < CLUSTER; r++)
        if (beats(slots[r], b))
            b = slots[r];
    return b;
}

__device__ uint64_t cluster_sum(struct slice *c, uint64_t v)
{
    struct shared *s = c->s;
    uint64_t *slots = s->sum[c->turn ^= 1];
#pragma unroll
    for (int d = 16; d; d /= 2)
        v += __shfl_xor_sync(~0u, (unsigned long long)v, d);
    if (threadIdx.x % 32 == 0)
        s->warp_sum[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < CLUSTER) {
        v = 0;
        for (int w = 0; w < WARPS; w++)
            v += s->warp_sum[w];
        *peer(&slots[c->rank], threadIdx.x) = v;
    }
    cluster_sync();
    v = 0;
    for (int r = 0; r < CLUSTER; r++)
        v += slots[r];
    return v;
}

/* ---- the logits ---- */

/* The row's slice into shared memory. */
__device__ void load(const struct slice *c, const float *row, int V)
{
    int n_quads = V % 4 == 0 ? c->n / 4 : 0;
    row += c->first;
    for (int q = threadIdx.x; q < n_quads; q += THREADS)
        copy_16(&c->s->slice[q], row + 4 * q);
    for (int i = 4 * n_quads + threadIdx.x; i < c->n; i += THREADS)
        c->logits()[i] = row[i];
    copies_done();
    __syncthreads();
}

__device__ __forceinline__ void penalise(const struct slice *c, const struct sample_row *r, int id,
                                         int count)
{
    int at = id - c->first;
    if (at >= 0 && at < c->n)
        c->logits()[at] =
            sample_penalise(c->logits()[at], count, r->repetition, r->frequency, r->presence);
}

/* Bias, penalties, mask, bans; what may not be drawn becomes NaN. An id that comes twice in the
 * bias list belongs to its first entry's thread, which adds in the list's order. */
__device__ void adjust(const struct slice *c, const struct sample_row *r)
{
    float *z = c->logits();
    if (threadIdx.x == 0)
        c->s->known = 0;
    for (int i = threadIdx.x; i < r->n_bias; i += THREADS) {
        int id = r->bias_id[i], at = id - c->first;
        if (at < 0 || at >= c->n)
            continue;
        bool again = false;
        for (int j = 0; j < i && !again; j++)
            again = r->bias_id[j] == id;
        for (int j = i; j < r->n_bias && !again; j++)
            if (r->bias_id[j] == id)
                z[at] = ADD32(z[at], r->bias_value[j]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < r->n_seen; i += THREADS) {
        struct sample_seen seen = r->seen[i];
        uint32_t known = 0;
        for (int k = 0; k < r->n_ahead; k++)
            if (r->ahead[k] == seen.id) {
                seen.count++;
                known |= 1u << k;
            }
        if (known)
            atomicOr(&c->s->known, known);
        penalise(c, r, seen.id, seen.count);
    }
    __syncthreads();
    if (threadIdx.x < r->n_ahead && !(c->s->known >> threadIdx.x & 1)) {
        int id = r->ahead[threadIdx.x], before = 0, count = 0;
        for (int k = 0; k < r->n_ahead; k++) {
            before += k < threadIdx.x && r->ahead[k] == id;
            count += r->ahead[k] == id;
        }
        if (before == 0)
            penalise(c, r, id, count);
    }
    __syncthreads();
    if (r->allowed)
        for (int i = threadIdx.x; i < c->n; i += THREADS) {
            uint32_t id = (uint32_t)(c->first + i);
            if (!(r->allowed[id / 32] >> (id % 32) & 1))
                z[i] = NAN;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < r->n_banned; i += THREADS) {
        int at = r->banned[i] - c->first;
        if (at >= 0 && at < c->n)
            z[at] = NAN;
    }
    __syncthreads();
}

__device__ __forceinline__ float finite(float z) { return fminf(fmaxf(z, -FLT_MAX), FLT_MAX); }

__device__ struct best largest(struct slice *c)
{
    struct best b = {-INFINITY, NO_ID};
    const float *z = c->logits();
    float most = -INFINITY;
#pragma unroll 4
    for (int i = threadIdx.x; i < c->n; i += THREADS)
        if (z[i] == z[i] && finite(z[i]) > most) {
            most = finite(z[i]);
            b.id = c->first + i;
        }
    b.value = most;
    return cluster_best(c, b);
}

/* Logits to keys: bits of the distance to the largest over the temperature (a zero of any sign is
 * key 0). */
__device__ void make_keys(const struct slice *c, float top, float temperature)
{
#pragma unroll 4
    for (int i = threadIdx.x; i < c->n; i += THREADS) {
        float z = c->logits()[i];
        float d = fabsf(fmaxf((finite(z) - top) / temperature, -FLT_MAX));
        c->keys()[i] = z == z ? __float_as_uint(d) : NO_KEY;
    }
    int padded = (c->n + 3) / 4 * 4;
    if (threadIdx.x < padded - c->n)
        c->keys()[c->n + threadIdx.x] = NO_KEY;
    __syncthreads();
}

/* ---- filters ---- */

__device__ __forceinline__ int bucket(uint32_t key)
{
    return (int)fminf(__uint_as_float(key) * SAMPLE_PER_UNIT, N_BINS - 1);
}

/* What a histogram counts, and by what. */
struct level {
    enum { BUCKETS, KEYS, IDS } by;
    uint32_t first, size; // keys or ids [first, first + size)
    int shift;            // of which 2^shift share a bin
    uint32_t key;         // IDS: of the ids with this key
};

__device__ __forceinline__ int bin_of(const struct level &l, uint32_t key, uint32_t id)
{
    if (l.by == level::BUCKETS)
        return bucket(key);
    if (l.by == level::IDS && key != l.key)
        return -1;
    uint32_t at = (l.by == level::IDS ? id : key) - l.first;
    return at < l.size ? (int)(at >> l.shift) : -1;
}

/* Finer, inside bin b. */
__device__ __forceinline__ struct level refine(struct level l, int b)
{
    if (l.by == level::BUCKETS) {
        uint32_t first = __float_as_uint((float)b / SAMPLE_PER_UNIT);
        uint32_t end = __float_as_uint((float)(b + 1) / SAMPLE_PER_UNIT);
        uint32_t size = (b == N_BINS - 1 ? LAST_KEY + 1 : end) - first;
        return {level::KEYS, first, size, max(22 - __clz(size - 1), 0), 0};
    }
    if (l.by == level::KEYS && l.shift == 0)
        return {level::IDS, 0, SAMPLE_MAX_V, 9, l.first + b};
    return {l.by, l.first + ((uint32_t)b << l.shift), 1u << l.shift, max(l.shift - 10, 0), l.key};
}

/* Measures of the kept ids by bin, over the whole cluster, into total. */
template <bool MASS>
__device__ void histogram(const struct slice *c, const struct level &l, struct limit limit)
{
    struct shared *s = c->s;
    constexpr int PARTS = MASS ? 3 : 1;
    for (int i = threadIdx.x; i < PARTS * N_BINS; i += THREADS)
        s->hist[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < c->n; i += THREADS) {
        uint32_t key = c->keys()[i], id = (uint32_t)(c->first + i);
        int b = keeps(limit, key, id) ? bin_of(l, key, id) : -1;
        if (b < 0)
            continue;
        uint64_t w = MASS ? sample_weight(-__uint_as_float(key)) : 1;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            uint32_t bits = (uint32_t)(w >> (part * PART_BITS)) & ((1u << PART_BITS) - 1);
            if (bits)
                atomicAdd(&s->hist[part * N_BINS + b], bits);
        }
    }
    cluster_sync();
    if (threadIdx.x < SHARE) {
        int b = (int)c->rank * SHARE + threadIdx.x;
        uint64_t sum = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                sum += (uint64_t)*peer(&s->hist[part * N_BINS + b], r) << (part * PART_BITS);
#pragma unroll
        for (int r = 0; r < CLUSTER; r++)
            *peer(&s->total[b], r) = sum;
    }
    cluster_sync();
}

/* Inclusive sum of total up to each thread's second bin; *ret_all gets the sum of all. */
__device__ __forceinline__ uint64_t scan(struct shared *s, uint64_t pair, uint64_t *ret_all)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        uint64_t other = __shfl_up_sync(~0u, (unsigned long long)pair, d);
        pair += lane >= d ? other : 0;
    }
    if (lane == 31)
        s->warp_sum[warp] = pair;
    __syncthreads();
    uint64_t all = 0;
    for (int w = 0; w < WARPS; w++) {
        pair += w < warp ? s->warp_sum[w] : 0;
        all += s->warp_sum[w];
    }
    *ret_all = all;
    return pair;
}

__device__ __forceinline__ struct limit tighter(struct limit a, struct limit b)
{
    return keeps(a, b.key, b.id) ? b : a;
}

/* The shortest prefix, in the order (key, id), of what `limit` keeps that measures up to the
 * target: top_k ids, or the share top_p of the mass. */
template <bool MASS>
__device__ struct limit select(const struct slice *c, struct limit limit, int top_k, float top_p)
{
    struct shared *s = c->s;
    struct level l = {level::BUCKETS, 0, 0, 0, 0};
    uint64_t target = 0, before = 0;
    for (;;) {
        histogram<MASS>(c, l, limit);
        uint64_t second = s->total[2 * threadIdx.x + 1], pair = s->total[2 * threadIdx.x] + second;
        uint64_t all, to = before + scan(s, pair, &all);
        if (l.by == level::BUCKETS) {
            target = MASS ? sample_share(top_p, all) : (uint64_t)top_k;
            if (all < target)
                return limit;
        }
        if (to - pair < target && to >= target) {
            bool is_second = to - second < target;
            s->border.bin = 2 * threadIdx.x + is_second;
            s->border.measure = is_second ? second : pair - second;
            s->border.before = is_second ? to - second : to - pair;
        }
        __syncthreads();
        int b = s->border.bin;
        uint64_t measure = s->border.measure;
        before = s->border.before;
        if (l.by == level::IDS && l.shift == 0)
            return tighter(limit, {l.key, l.first + b});
        struct level finer = refine(l, b);
        if (l.by == level::IDS) {
            l = finer;
            continue;
        }
        // The whole bin, if it ends at the target or is a single id: every weight in it is near the
        // least one's, so one and a half times that is one id.
        uint32_t last = finer.by == level::IDS ? finer.key : finer.first + finer.size - 1;
        uint64_t least = MASS ? sample_weight(-__uint_as_float(last)) : 0;
        if (MASS ? measure < least + least / 2 : before + measure == target)
            return tighter(limit, {last, ANY_ID});
        l = finer;
    }
}

__device__ struct limit filter(const struct slice *c, const struct sample_row *r)
{
    struct limit limit = {LAST_KEY, ANY_ID};
    if (r->top_k > 0)
        limit = select<false>(c, limit, r->top_k, 0);
    if (r->top_p < 1.0f)
        limit = select<true>(c, limit, 0, r->top_p);
    if (r->min_p > 0)
        limit = tighter(limit, {__float_as_uint(fabsf(sample_least(r->min_p))), ANY_ID});
    return limit;
}

/* ---- noise ---- */

__device__ __forceinline__ void noise(const struct sample_row *r, int id, uint32_t (&x)[4])
{
    const uint32_t key[2] = {(uint32_t)r->seed, (uint32_t)(r->seed >> 32)};
    const uint32_t counter[4] = {(uint32_t)r->position, (uint32_t)id / 4, 0, 0};
    sample_philox(counter, key, x);
}

/* The best score of the kept ids. All threads start from the likeliest id's, a good score early.
 * Bounds are compared in fp32, rounded so that they err towards looking closer. */
__device__ int gumbel_max(struct slice *c, const struct sample_row *r, struct limit limit, int top)
{
    uint32_t x[4];
    struct best best = {-INFINITY, NO_ID};
    if (keeps(limit, 0, (uint32_t)top)) { // it may have ties before it, at a huge temperature
        noise(r, top, x);
        best = {sample_noise(top % 4 == 0   ? x[0]
                             : top % 4 == 1 ? x[1]
                             : top % 4 == 2 ? x[2]
                                            : x[3]),
                top};
    }
    float at_least = __double2float_rd(best.value);
    for (int q = threadIdx.x; 4 * q < c->n; q += THREADS) {
        uint4 quad = c->s->slice[q];
        uint32_t key[4] = {quad.x, quad.y, quad.z, quad.w};
        uint32_t nearest = min(min(key[0], key[1]), min(key[2], key[3]));
        if (nearest > limit.key ||
            __fadd_ru(-__uint_as_float(nearest), (float)SAMPLE_MAX_NOISE) < at_least)
            continue;
        int id = c->first + 4 * q;
        noise(r, id, x);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!keeps(limit, key[i], (uint32_t)(id + i)))
                continue;
            float z = -__uint_as_float(key[i]);
            if (__fadd_ru(z, __fmul_ru((float)(__clz(~x[i]) + 1), 0.6931473f)) < at_least)
                continue;
            struct best other = {ADD64((double)z, sample_noise(x[i])), id + i};
            if (beats(other, best)) {
                best = other;
                at_least = __double2float_rd(best.value);
            }
        }
    }
    return cluster_best(c, best).id;
}

/* ---- log-probabilities ---- */

/* Best of this thread's ids that come after `last` in order. */
__device__ struct best next_best(const struct slice *c, struct best last)
{
    struct best b = {-INFINITY, NO_ID};
    for (int i = threadIdx.x; i < c->n; i += THREADS) {
        struct best x = {c->logits()[i], c->first + i};
        if (beats(last, x) && beats(x, b))
            b = x;
    }
    return b;
}

/* Every block finds its n best, one a round; the first block ranks all of them. */
__device__ void top_logprobs(struct slice *c, int n, double norm, int max_top, int32_t *id,
                             float *logprob)
{
    struct shared *s = c->s;
    struct best mine = next_best(c, {INFINITY, -1});
    for (int i = 0; i < n; i++) {
        struct best b = block_best(s, mine);
        if (threadIdx.x == 0) {
            *peer(&s->top[c->rank * n + i], 0) = b;
            s->border.bin = b.id;
        }
        __syncthreads();
        if (mine.id == s->border.bin && mine.id != NO_ID)
            mine = next_best(c, mine);
        __syncthreads();
    }
    cluster_sync();
    if (c->rank != 0)
        return;
    for (int i = threadIdx.x; i < max_top; i += THREADS) {
        id[i] = -1;
        logprob[i] = -INFINITY;
    }
    __syncthreads();
    struct best b = {0, NO_ID};
    int place = 0;
    if (threadIdx.x < CLUSTER * n)
        b = s->top[threadIdx.x];
    for (int i = 0; i < CLUSTER * n; i++)
        place += beats(s->top[i], b);
    if (b.id != NO_ID && place < n) {
        id[place] = b.id;
        logprob[place] = (float)ADD64(b.value, -norm);
    }
}

/* Of the model's own distribution: neither penalties nor temperature. */
__device__ void logprobs(struct slice *c, const struct cu_sample_args &a, const float *row, int t,
                         int n_top, int id)
{
    load(c, row, a.V);
    float max = -INFINITY;
    for (int i = threadIdx.x; i < c->n; i += THREADS)
        max = fmaxf(max, c->logits()[i]);
    max = (float)cluster_best(c, {max, 0}).value;
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < c->n; i += THREADS)
        sum += sample_weight(ADD32(c->logits()[i], -max));
    sum = cluster_sum(c, sum);
    double norm = ADD64((double)max, sample_log(MUL64((double)sum, 0x1p-44)));
    if (c->rank == 0 && threadIdx.x == 0)
        a.logprob[t] = (float)ADD64((double)row[id], -norm);
    if (a.top_id && a.top_logprob && a.max_top > 0)
        top_logprobs(c, min(n_top, a.max_top), norm, a.max_top, a.top_id + (int64_t)t * a.max_top,
                     a.top_logprob + (int64_t)t * a.max_top);
}

/* ---- a row ---- */

__device__ int draw(struct slice *c, const struct sample_row *r)
{
    struct best top = largest(c);
    if (top.id == NO_ID) // everything is out: an answer that is at least an id
        return 0;
    if (!(r->temperature > 0) || r->top_k == 1)
        return top.id;
    make_keys(c, (float)top.value, r->temperature);
    return gumbel_max(c, r, filter(c, r), top.id);
}

__global__ void __launch_bounds__(THREADS, 2)
    sample_kernel(const __grid_constant__ struct cu_sample_args a, int width)
{
    extern __shared__ __align__(16) unsigned char memory[];
    cluster_arrive();
    next_may_start();
    previous_done();
    int t = blockIdx.x / CLUSTER;
    if (a.n_rows_dev && t >= *a.n_rows_dev) {
        cluster_wait();
        return;
    }
    const struct sample_row *r = &a.rows[t];
    const float *row = a.logits + (int64_t)(a.logit_row ? a.logit_row[t] : t) * a.V;
    struct slice c = {(struct shared *)memory, cluster_rank(), 0, 0, 0};
    c.first = (int)c.rank * width;
    c.n = max(min(a.n_valid - c.first, width), 0);
    load(&c, row, a.V);
    if (r->n_bias > 0 || r->allowed || r->n_seen > 0 || r->n_ahead > 0 || r->n_banned > 0)
        adjust(&c, r);
    cluster_wait();
    int id = draw(&c, r);
    if (c.rank == 0 && threadIdx.x == 0) {
        a.id[t] = id;
        if (a.logprob && r->n_logprobs < 0)
            a.logprob[t] = 0;
    }
    if (a.logprob && r->n_logprobs >= 0)
        logprobs(&c, a, row, t, r->n_logprobs, id);
}

/* ---- argmax ---- */

/* What a thread looks at in one go: GO units (a value, or four) of its block's slice, THREADS
 * apart. */
constexpr int GO = 4;

template <int N> struct unit {
    float v[N];
};

template <int N> __device__ __forceinline__ struct unit<N> unit_at(const float *x, int i);
template <> __device__ __forceinline__ struct unit<1> unit_at<1>(const float *x, int i) {
    return {{x[i]}};
} template <> __device__ __forceinline__ struct unit<4> unit_at<4>(const float *x, int i) {
    float4 v = ((const float4 *)x)[i];
    return {{v.x, v.y, v.z, v.w}};
}

/* Only the largest value of a go is looked for; where it was is found at the end, in the one go
 * that held a thread's best. */
template <int N>
__global__ void __launch_bounds__(THREADS)
    argmax_kernel(const float *logits, const int32_t *logit_row, const int32_t *n_rows_dev,
                  int32_t *ret, int V, int n_valid, int width)
{
    __shared__ struct best part[WARPS], slots[CLUSTER];
    cluster_arrive();
    next_may_start();
    previous_done();
    unsigned rank = cluster_rank(), size = cluster_size();
    int t = blockIdx.x / size, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (n_rows_dev && t >= *n_rows_dev) {
        cluster_wait();
        return;
    }
    int first = (int)rank * width, n = max(min(n_valid - first, width), 0), n_units = n / N;
    const float *x = logits + (int64_t)(logit_row ? logit_row[t] : t) * V + first;
    float most = -INFINITY;
    int go = -1;
    for (int i = threadIdx.x; i < n_units; i += GO * THREADS) {
        struct unit<N> u[GO];
        float m = -INFINITY;
#pragma unroll
        for (int g = 0; g < GO; g++)
            if (i + g * THREADS < n_units)
                u[g] = unit_at<N>(x, i + g * THREADS);
            else
                for (int k = 0; k < N; k++)
                    u[g].v[k] = NAN;
#pragma unroll
        for (int g = 0; g < GO; g++)
#pragma unroll
            for (int k = 0; k < N; k++)
                m = fmaxf(m, u[g].v[k]); // NaN is passed over
        if (m > most) {
            most = m;
            go = i;
        }
    }
    struct best b = {most, NO_ID};
    for (int g = 0; go >= 0 && g < GO && b.id == NO_ID; g++) {
        if (go + g * THREADS >= n_units)
            break;
        struct unit<N> u = unit_at<N>(x, go + g * THREADS);
        for (int k = N - 1; k >= 0; k--)
            if (u.v[k] == most)
                b.id = first + (go + g * THREADS) * N + k;
    }
    if (threadIdx.x < n - n_units * N) { // a few ids at the end of the row
        struct best last = {x[n_units * N + threadIdx.x], first + n_units * N + (int)threadIdx.x};
        if (beats(last, b))
            b = last;
    }
    b = warp_best(b);
    if (lane == 0)
        part[warp] = b;
    __syncthreads();
    cluster_wait();
    if (warp == 0) {
        b = warp_best(lane < WARPS ? part[lane] : (struct best){-INFINITY, NO_ID});
        if (lane == 0)
            *peer(&slots[rank], 0) = b;
    }
    cluster_sync();
    if (rank == 0 && threadIdx.x == 0) {
        b = slots[0];
        for (unsigned r = 1; r < size; r++)
            if (beats(slots[r], b))
                b = slots[r];
        ret[t] = b.id == NO_ID ? 0 : b.id;
    }
}

int round_up(int n, int to) { return (n + to - 1) / to * to; }

/* A row over as many blocks as keep one wave of blocks full. */
cudaError_t argmax(const float *logits, const int32_t *logit_row, const int32_t *n_rows_dev,
                   int32_t *id, int T, int V, int n_valid, cudaStream_t stream)
{
    int cluster = T <= 64 ? CLUSTER : T <= 128 ? 4 : T <= 256 ? 2 : 1;
    int width = round_up((n_valid + cluster - 1) / cluster, 32);
    auto kernel = V % 4 ? argmax_kernel<1> : argmax_kernel<4>;
    return start(kernel, dim3(T * cluster), dim3(THREADS), 0, cluster, stream, logits, logit_row,
                 n_rows_dev, id, V, n_valid, width);
}

} // namespace

cudaError_t cu_argmax(const float *logits, int32_t *id, int n, int V, int n_valid,
                      cudaStream_t stream)
{
    if (n_valid <= 0 || n_valid > V)
        return cudaErrorInvalidValue;
    return n > 0 ? argmax(logits, nullptr, nullptr, id, n, V, n_valid, stream) : cudaSuccess;
}

cudaError_t cu_sample(const struct cu_sample_args *a, cudaStream_t stream)
{
    if (a->V <= 0 || a->V > SAMPLE_MAX_V || a->n_valid <= 0 || a->n_valid > a->V ||
        a->max_top < 0 || a->max_top > CU_SAMPLE_MAX_TOP)
        return cudaErrorInvalidValue;
    if (a->T <= 0)
        return cudaSuccess;
    if (a->greedy)
        return argmax(a->logits, a->logit_row, a->n_rows_dev, a->id, a->T, a->V, a->n_valid,
                      stream);
    int width = round_up((a->n_valid + CLUSTER - 1) / CLUSTER, 32);
    int smem = (int)offsetof(struct shared, slice) + width * 4;
    cudaError_t err =
        cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (err) // more than an SM has
        return err;
    return start(sample_kernel, dim3(a->T * CLUSTER), dim3(THREADS), smem, CLUSTER, stream, *a,
                 width);
}
