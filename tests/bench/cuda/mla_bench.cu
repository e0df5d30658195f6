/* mla_bench.cu: checks the attention kernels against fp32 loops, then times them.
 *
 *   mla_bench [check|time|all]     exit status 1: a check failed
 *
 * Checks: random data in pages in shuffled order, everything around them NaN (other pages, slots past
 * n_ctx, outputs), two launches over one `work` that must agree to the bit. Times: median of graph
 * replays; launches walk through the layers of one pool, so that L2 holds nothing of use.
 */
#include "kernels/cuda.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <math.h>
#include <random>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#define CHECK(call)                                                                                \
    do {                                                                                           \
        cudaError_t e_ = (call);                                                                   \
        if (e_ != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)

#define WIDTH  576
#define LATENT 512
#define DIM    256
#define NOPE   192
#define ROPE   64
#define PAGE   64
#define SCALE  (1.f / 16.f)
#define POISON 0x7fff /* a NaN */

typedef __nv_bfloat16 bf16;

static std::mt19937_64 rng(20260914);
static int n_failed;

__device__ float noise(uint64_t i, uint64_t seed)
{
    uint64_t z = i * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull + 0x632be59bd9b4e019ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    float sum = 0;
    for (int k = 0; k < 4; k++)
        sum += (float)(z >> (16 * k) & 0xffff) / 65536.f - 0.5f;
    return sum * 1.7320508f; // variance 1
}

__global__ void fill_noise(uint16_t *to, size_t n, uint64_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        ((bf16 *)to)[i] = __float2bfloat16(noise(i, seed));
}

__global__ void fill_bits(uint16_t *to, size_t n, uint16_t bits)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        to[i] = bits;
}

/* Only the slots that a sequence has. Grid: sequences. */
__global__ void fill_slots(cu_mla_decode_args a, uint64_t seed)
{
    int s = blockIdx.x;
    for (int j = 0; j < a.n_ctx[s]; j++) {
        int64_t page = a.block_table[(int64_t)s * a.max_pages + j / PAGE];
        bf16 *slot = (bf16 *)a.pool + ((page * a.n_layers + a.layer) * PAGE + j % PAGE) * WIDTH;
        for (int c = threadIdx.x; c < WIDTH; c += blockDim.x)
            slot[c] = __float2bfloat16(noise(((uint64_t)s << 32) + (uint64_t)j * WIDTH + c, seed));
    }
}

__device__ float warp_sum(float v)
{
    for (int o = 16; o; o >>= 1)
        v += __shfl_xor_sync(~0u, v, o);
    return v;
}

/* softmax(score[0..n)) in place by one block, returns the sum of the unnormalised weights. */
__device__ float block_softmax(float *score, int n)
{
    __shared__ float part[32], result[2];
    float top = -INFINITY, sum = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x)
        top = fmaxf(top, score[j]);
    for (int o = 16; o; o >>= 1)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned i = 1; i < blockDim.x / 32; i++)
            top = fmaxf(top, part[i]);
        result[0] = top;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        score[j] = expf(score[j] - result[0]);
        sum += score[j];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned i = 1; i < blockDim.x / 32; i++)
            sum += part[i];
        result[1] = sum;
    }
    __syncthreads();
    return result[1];
}

/* Grid: (heads, rows). Shared: a score per slot. */
__global__ void decode_ref(cu_mla_decode_args a, float *out)
{
    extern __shared__ float score[];
    int h = blockIdx.x, row = blockIdx.y, s = row / a.q_rows, lane = threadIdx.x % 32;
    int n = a.n_ctx[s] - a.q_rows + 1 + row % a.q_rows;
    const bf16 *q = (const bf16 *)a.q + ((int64_t)row * a.heads + h) * WIDTH;
    const bf16 *pool = (const bf16 *)a.pool;
    const int32_t *table = a.block_table + (int64_t)s * a.max_pages;
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
        const bf16 *kv =
            pool + (((int64_t)table[j / PAGE] * a.n_layers + a.layer) * PAGE + j % PAGE) * WIDTH;
        float dot = 0;
        for (int c = lane; c < WIDTH; c += 32)
            dot += __bfloat162float(q[c]) * __bfloat162float(kv[c]);
        dot = warp_sum(dot);
        if (lane == 0)
            score[j] = dot * a.scale;
    }
    __syncthreads();
    float sum = n > 0 ? block_softmax(score, n) : 1;
    for (int c = threadIdx.x; c < LATENT; c += blockDim.x) {
        float v = 0;
        for (int j = 0; j < n; j++)
            v += score[j] *
                 __bfloat162float(pool[(((int64_t)table[j / PAGE] * a.n_layers + a.layer) * PAGE +
                                        j % PAGE) * WIDTH + c]);
        out[((int64_t)row * a.heads + h) * LATENT + c] = v / sum;
    }
}

/* Grid: (heads, T). */
__global__ void prefill_ref(cu_mla_prefill_args a, float *out)
{
    extern __shared__ float score[];
    int h = blockIdx.x, t = blockIdx.y, s = 0, lane = threadIdx.x % 32;
    while (t >= a.q_start[s + 1])
        s++;
    int n = a.kv_start[s + 1] - a.kv_start[s] - (a.q_start[s + 1] - 1 - t);
    const bf16 *q = (const bf16 *)a.q + ((int64_t)t * a.heads + h) * DIM;
    int64_t stride = (int64_t)a.heads * (NOPE + DIM);
    const bf16 *k = (const bf16 *)a.kv + a.kv_start[s] * stride + h * (NOPE + DIM), *v = k + NOPE;
    const bf16 *k_rope = (const bf16 *)a.k_rope + (int64_t)a.kv_start[s] * ROPE;
    float c = a.turn[((int64_t)t * 32 + lane) * 2], sine = a.turn[((int64_t)t * 32 + lane) * 2 + 1];
    float q0 = __bfloat162float(q[NOPE + 2 * lane]), q1 = __bfloat162float(q[NOPE + 2 * lane + 1]);
    float q_turned[2] = {q0 * c - q1 * sine, q1 * c + q0 * sine};
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
        float dot = 0;
        for (int c = lane; c < NOPE; c += 32)
            dot += __bfloat162float(q[c]) * __bfloat162float(k[j * stride + c]);
        for (int i = 0; i < 2; i++)
            dot += q_turned[i] * __bfloat162float(k_rope[(int64_t)j * ROPE + 2 * lane + i]);
        dot = warp_sum(dot);
        if (lane == 0)
            score[j] = dot * a.scale;
    }
    __syncthreads();
    float sum = block_softmax(score, n);
    for (int c = threadIdx.x; c < DIM; c += blockDim.x) {
        float x = 0;
        for (int j = 0; j < n; j++)
            x += score[j] * __bfloat162float(v[j * stride + c]);
        out[((int64_t)t * a.heads + h) * DIM + c] = x / sum;
    }
}

template <class T> static T *device_alloc(size_t n)
{
    void *p;
    CHECK(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T)));
    return (T *)p;
}

template <class T> static T *device_copy(const std::vector<T> &v)
{
    T *p = device_alloc<T>(v.size());
    CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static void noise_into(const uint16_t *p, size_t n)
{
    fill_noise<<<1024, 256>>>((uint16_t *)p, n, rng());
    CHECK(cudaGetLastError());
}

static void poison(uint16_t *p, size_t n)
{
    fill_bits<<<1024, 256>>>(p, n, POISON);
    CHECK(cudaGetLastError());
}

static float to_float(uint16_t bits)
{
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* Rows of `width`; rows with skip[row] must still be poison. */
static void compare(const char *what, const cu_bf16 *got_dev, const float *want_dev, size_t rows,
                    int width, const std::vector<char> &skip, bool same)
{
    std::vector<uint16_t> got(rows * width);
    std::vector<float> want(rows * width);
    CHECK(cudaMemcpy(got.data(), got_dev, got.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(want.data(), want_dev, want.size() * 4, cudaMemcpyDeviceToHost));
    double err = 0, norm = 0, worst_abs = 0, worst_row = 0;
    bool ok = same;
    for (size_t r = 0; r < rows; r++) {
        double row_err = 0, row_norm = 0;
        for (int c = 0; c < width; c++) {
            size_t i = r * width + c;
            if (!skip.empty() && skip[r]) {
                ok = ok && got[i] == POISON;
                continue;
            }
            double w = want[i], d = fabs(to_float(got[i]) - w);
            row_err += d * d;
            row_norm += w * w;
            if (!(d <= worst_abs))
                worst_abs = d;
        }
        err += row_err;
        norm += row_norm;
        double rel = row_norm > 0 ? sqrt(row_err / row_norm) : sqrt(row_err);
        if (!(rel <= worst_row))
            worst_row = rel;
    }
    double rel = norm > 0 ? sqrt(err / norm) : sqrt(err);
    if (!(rel <= 5e-3) || !(worst_row <= 1e-2) || !(worst_abs <= 0.05))
        ok = false;
    printf("%-4s %-44s rel %.2e  worst row %.2e  max abs %.2e%s\n", ok ? "ok" : "FAIL", what, rel,
           worst_row, worst_abs, same ? "" : "  two launches differ");
    n_failed += !ok;
}

static void check_decode(const std::vector<int32_t> &n_ctx, int q_rows, int heads, const char *name)
{
    cu_mla_decode_args a = {};
    int S = (int)n_ctx.size(), total = 0, max_ctx = 0;
    for (int n : n_ctx) {
        total += (n + PAGE - 1) / PAGE;
        max_ctx = std::max(max_ctx, n);
    }
    a.S = S;
    a.q_rows = q_rows;
    a.heads = heads;
    a.n_layers = 3;
    a.layer = 1;
    a.n_pages = total + 7;
    a.max_pages = (max_ctx + PAGE - 1) / PAGE + 1;
    a.max_ctx = max_ctx;
    a.scale = SCALE;
    std::vector<int32_t> ids(a.n_pages), table((size_t)S * a.max_pages, -1);
    for (int i = 0; i < a.n_pages; i++)
        ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), rng);
    for (int s = 0, at = 0; s < S; s++)
        for (int i = 0; i < (n_ctx[s] + PAGE - 1) / PAGE; i++)
            table[(size_t)s * a.max_pages + i] = ids[at++];
    size_t rows = (size_t)S * q_rows * heads, n_pool = (size_t)a.n_pages * a.n_layers * PAGE * WIDTH;
    size_t work_bytes = cu_mla_decode_work_bytes(S, q_rows, heads, max_ctx);
    uint16_t *pool = device_alloc<uint16_t>(n_pool), *q = device_alloc<uint16_t>(rows * WIDTH);
    a.block_table = device_copy(table);
    a.n_ctx = device_copy(n_ctx);
    a.pool = pool;
    a.q = q;
    a.out = device_alloc<uint16_t>(rows * LATENT);
    a.work = device_alloc<uint8_t>(work_bytes);
    float *want = device_alloc<float>(rows * LATENT);
    CHECK(cudaMemset(a.work, 0, work_bytes));
    poison(pool, n_pool);
    fill_slots<<<S, 192>>>(a, rng());
    noise_into(q, rows * WIDTH);
    size_t smem = (size_t)(max_ctx + 16) * 4; // loops unrolled by the compiler look a few ahead
    CHECK(cudaFuncSetAttribute(decode_ref, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    decode_ref<<<dim3(heads, S * q_rows), 256, smem>>>(a, want);
    CHECK(cudaGetLastError());
    std::vector<uint16_t> out[2];
    for (int i = 0; i < 2; i++) {
        poison(a.out, rows * LATENT);
        CHECK(cu_mla_decode(&a, 0));
        CHECK(cudaDeviceSynchronize());
        out[i].resize(rows * LATENT);
        CHECK(cudaMemcpy(out[i].data(), a.out, rows * LATENT * 2, cudaMemcpyDeviceToHost));
    }
    std::vector<char> skip(rows);
    for (size_t r = 0; r < rows; r++)
        skip[r] = n_ctx[r / (q_rows * heads)] == 0;
    char what[128];
    snprintf(what, sizeof what, "decode S %d ctx %s q_rows %d heads %d", S, name, q_rows, heads);
    compare(what, a.out, want, rows, LATENT, skip, out[0] == out[1]);
    for (const void *p : {(const void *)pool, (const void *)q, (const void *)a.block_table,
                          (const void *)a.n_ctx, (const void *)a.out, (const void *)a.work,
                          (const void *)want})
        CHECK(cudaFree((void *)p));
}

struct seq {
    int n, kv;
};

struct prefill_case {
    cu_mla_prefill_args a;
    size_t n_q, n_kv;
};

static prefill_case prefill_make(const std::vector<seq> &seqs, int heads)
{
    prefill_case c = {};
    std::vector<int32_t> q_start(1, 0), kv_start(1, 0);
    for (const seq &s : seqs) {
        q_start.push_back(q_start.back() + s.n);
        kv_start.push_back(kv_start.back() + s.kv);
        c.a.max_q = std::max(c.a.max_q, s.n);
    }
    c.a.S = (int)seqs.size();
    c.a.T = q_start.back();
    c.a.heads = heads;
    c.a.scale = SCALE;
    c.n_q = (size_t)c.a.T * heads * DIM;
    c.n_kv = (size_t)kv_start.back() * heads * (NOPE + DIM);
    std::vector<float> turn;
    for (int i = 0; i < c.a.T * ROPE / 2; i++) {
        double angle = (double)(rng() % 100000) / 1000;
        turn.push_back((float)cos(angle));
        turn.push_back((float)sin(angle));
    }
    c.a.q = device_alloc<uint16_t>(c.n_q);
    c.a.kv = device_alloc<uint16_t>(c.n_kv);
    c.a.k_rope = device_alloc<uint16_t>((size_t)kv_start.back() * ROPE);
    c.a.turn = device_copy(turn);
    c.a.out = device_alloc<uint16_t>(c.n_q);
    c.a.q_start = device_copy(q_start);
    c.a.kv_start = device_copy(kv_start);
    noise_into(c.a.q, c.n_q);
    noise_into(c.a.kv, c.n_kv);
    noise_into(c.a.k_rope, (size_t)kv_start.back() * ROPE);
    poison(c.a.out, c.n_q);
    return c;
}

static void prefill_free(const prefill_case &c)
{
    for (const void *p : {(const void *)c.a.q, (const void *)c.a.kv, (const void *)c.a.k_rope,
                          (const void *)c.a.turn, (const void *)c.a.out, (const void *)c.a.q_start, (const void *)c.a.kv_start})
        CHECK(cudaFree((void *)p));
}

static void check_prefill(const std::vector<seq> &seqs, int heads, const char *name)
{
    prefill_case c = prefill_make(seqs, heads);
    float *want = device_alloc<float>(c.n_q);
    int max_kv = 0;
    for (const seq &s : seqs)
        max_kv = std::max(max_kv, s.kv);
    size_t smem = (size_t)max_kv * 4;
    CHECK(cudaFuncSetAttribute(prefill_ref, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    prefill_ref<<<dim3(heads, c.a.T), 256, smem>>>(c.a, want);
    CHECK(cudaGetLastError());
    CHECK(cu_mla_prefill(&c.a, 0));
    CHECK(cudaDeviceSynchronize());
    char what[128];
    snprintf(what, sizeof what, "prefill %s heads %d", name, heads);
    compare(what, c.a.out, want, (size_t)c.a.T * heads, DIM, {}, true);
    CHECK(cudaFree(want));
    prefill_free(c);
}

static void check_all(void)
{
    const std::vector<int32_t> lengths = {1, 63, 64, 65, 200, 700, 4096};
    for (int heads : {4, 20})
        for (int q_rows : {1, 2, 3, 5}) {
            for (int n : lengths) {
                char name[16];
                snprintf(name, sizeof name, "%d", n);
                check_decode({n}, q_rows, heads, name);
            }
            check_decode({200, 65, 700}, q_rows, heads, "200 65 700");
            for (int S : {64, 256}) {
                std::vector<int32_t> n_ctx(S);
                for (int s = 0; s < S; s++) // every length, some absent, a few long ones
                    n_ctx[s] = s % 9 == 8 ? 0 : s % 9 == 7 ? (int)(rng() % 1500) + 1 : lengths[s % 7];
                std::shuffle(n_ctx.begin(), n_ctx.end(), rng);
                check_decode(n_ctx, q_rows, heads, "mixed");
            }
        }
    for (int heads : {4, 20}) {
        for (int n : {1, 63, 64, 65, 127, 128, 129, 200, 700, 2048}) {
            char name[16];
            snprintf(name, sizeof name, "%d", n);
            check_prefill({{n, n}}, heads, name);
        }
        check_prefill({{1, 700}, {5, 5}, {64, 129}, {300, 300}, {130, 1000}, {1, 1}, {257, 4096}}, heads,
                      "ragged with prefixes");
        std::vector<seq> many;
        for (int i = 0; i < 70; i++) {
            int n = (int)(rng() % 200) + 1;
            many.push_back({n, n + (i % 3 ? 0 : (int)(rng() % 300))});
        }
        check_prefill(many, heads, "70 short");
    }
}

/* Median microseconds of one of n_launches captured in a graph. */
template <class F> static double time_us(int n_launches, F launch)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n_launches; i++)
        launch(i, stream);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<double> us;
    for (int i = 0; i < 9; i++) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 2)
            us.push_back(ms * 1e3 / n_launches);
    }
    std::sort(us.begin(), us.end());
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(stream));
    return us[us.size() / 2];
}

static void time_decode(void)
{
    const int n_layers = 48, heads = 20;
    const struct {
        int S, ctx, q_rows, spread;
    } cases[] = {{1, 512, 1, 0},    {8, 512, 1, 0},    {32, 512, 1, 0},   {64, 512, 1, 0},
                 {64, 512, 1, 1},   {128, 512, 1, 0},  {256, 512, 1, 0},  {256, 512, 1, 1},
                 {256, 512, 3, 0},  {256, 512, 3, 1},  {256, 512, 5, 0},  {512, 512, 1, 0},
                 {1, 4096, 1, 0},   {8, 4096, 1, 0},   {64, 4096, 1, 0},  {64, 4096, 3, 0},
                 {64, 4096, 5, 0},  {512, 512, 1, 1},  {512, 1024, 1, 0}};
    cu_mla_decode_args a = {};
    a.n_pages = 9000;
    a.n_layers = n_layers;
    a.heads = heads;
    a.scale = SCALE;
    size_t n_pool = (size_t)a.n_pages * n_layers * PAGE * WIDTH;
    uint16_t *pool = device_alloc<uint16_t>(n_pool);
    noise_into(pool, n_pool);
    a.pool = pool;
    const int max_S = 512, max_q = 5, max_pages = 64;
    uint16_t *q = device_alloc<uint16_t>((size_t)max_S * max_q * heads * WIDTH);
    noise_into(q, (size_t)max_S * max_q * heads * WIDTH);
    a.q = q;
    a.out = device_alloc<uint16_t>((size_t)max_S * max_q * heads * LATENT);
    size_t work_bytes = cu_mla_decode_work_bytes(max_S, max_q, heads, 4096);
    a.work = device_alloc<uint8_t>(work_bytes);
    CHECK(cudaMemset(a.work, 0, work_bytes));
    a.max_pages = max_pages;
    int32_t *table_dev = device_alloc<int32_t>(max_S * max_pages), *ctx_dev = device_alloc<int32_t>(max_S);
    a.block_table = table_dev;
    a.n_ctx = ctx_dev;
    printf("\ndecode, 20 heads, page-major pool of 48 layers (work %.1f MB)\n", work_bytes / 1e6);
    printf("%5s %12s %6s %9s %8s %9s\n", "S", "ctx", "q_rows", "us", "GB/s", "TFLOP/s");
    for (const auto &c : cases) {
        std::vector<int32_t> ids(a.n_pages), table((size_t)max_S * max_pages), n_ctx(max_S);
        for (int i = 0; i < a.n_pages; i++)
            ids[i] = i;
        std::shuffle(ids.begin(), ids.end(), rng);
        double slots = 0;
        int max_ctx = 0, at = 0;
        for (int s = 0; s < c.S; s++) {
            n_ctx[s] = c.spread ? (int)(rng() % (2 * c.ctx)) + 1 : c.ctx;
            slots += n_ctx[s];
            max_ctx = std::max(max_ctx, n_ctx[s]);
            for (int i = 0; i < (n_ctx[s] + PAGE - 1) / PAGE; i++)
                table[(size_t)s * max_pages + i] = ids[at++];
        }
        CHECK(cudaMemcpy(table_dev, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(ctx_dev, n_ctx.data(), n_ctx.size() * 4, cudaMemcpyHostToDevice));
        a.S = c.S;
        a.q_rows = c.q_rows;
        a.max_ctx = max_ctx;
        double us = time_us(n_layers, [&](int i, cudaStream_t stream) {
            a.layer = i;
            CHECK(cu_mla_decode(&a, stream));
        });
        char name[32];
        snprintf(name, sizeof name, c.spread ? "1..%d" : "%d", c.spread ? 2 * c.ctx : c.ctx);
        double rows = (double)c.S * c.q_rows * heads;
        printf("%5d %12s %6d %9.1f %8.0f %9.1f\n", c.S, name, c.q_rows, us,
               (slots * WIDTH * 2 + rows * (WIDTH + LATENT) * 2) / us * 1e-3,
               slots * c.q_rows * heads * (WIDTH + LATENT) * 2 / us * 1e-6);
    }
    for (const void *p : {(const void *)pool, (const void *)q, (const void *)a.out, (const void *)a.work,
                          (const void *)table_dev, (const void *)ctx_dev})
        CHECK(cudaFree((void *)p));
}

static void time_prefill(void)
{
    const struct {
        int S, n, kv;
    } cases[] = {{32, 256, 256},   {27, 300, 300},    {16, 512, 512},      {8, 1024, 1024},
                 {4, 2048, 2048},  {2, 4096, 4096},   {1, 8192, 8192},     {4, 512, 4096},
                 {1, 2048, 2048},  {1, 8192, 32768}};
    printf("\nprefill, 20 heads, causal\n");
    printf("%5s %7s %7s %9s %9s\n", "S", "rows", "kv", "us", "TFLOP/s");
    for (const auto &c : cases) {
        prefill_case p = prefill_make(std::vector<seq>(c.S, seq{c.n, c.kv}), 20);
        double pairs = (double)c.S * ((double)c.n * (c.kv - c.n) + 0.5 * c.n * (c.n + 1.0));
        double us = time_us(4, [&](int, cudaStream_t stream) { CHECK(cu_mla_prefill(&p.a, stream)); });
        printf("%5d %7d %7d %9.1f %9.1f\n", c.S, c.n, c.kv, us, pairs * 20 * 4 * DIM / us * 1e-6);
        prefill_free(p);
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "all";
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    printf("%s, %d multiprocessors, L2 %d MB\n", prop.name, prop.multiProcessorCount,
           prop.l2CacheSize >> 20);
    if (strcmp(what, "time") != 0)
        check_all();
    if (strcmp(what, "check") != 0 && n_failed == 0) {
        time_decode();
        time_prefill();
    }
    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
