/* dense_bench.c: products of few rows at GLM-4.7-Flash's shapes: are they right, how fast are they
 * next to cuBLAS.
 *
 * Times are those of CUDA graphs of many launches in a row, per launch: what a decode step pays,
 * gaps included. Weights are random and take turns, so that L2 serves nothing. Results: sampled
 * elements against sums in double, and every row bit for bit against the same row in another batch.
 * The chain is a layer's attention block, the kernels that a decode step launches, next to the
 * same through cuBLAS; its results as a graph must be those of launches that wait for each other.
 *
 *   dense_bench [products] [chain]      no argument: all
 */
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda.h"
#include "tests/bench/cuda/bench_data.h"

enum {
    H = 2048,
    LORA = 768,
    HEADS = 20,
    NOPE = 192,
    LATENT = 512,
    HEAD_V = 256,
    HEAD_Q = 256,
    HEAD_KV = 576,
    QKV = LORA + HEAD_KV,
    HEAD_ROWS = NOPE + HEAD_V,
    N_RUNS = 11,
    CTX = 512,
    MAX_CTX = 1024,
    FEW = 8,    /* sequences that mla_few takes */
    LAYERS = 12 /* of the chain */
};
#define BLOCK (1u << 22) /* values of the random block that everything is filled with */
#define EPS   1e-5f
#define THETA 1e6f
#define MAX_T CU_DENSE_MAX_T

static uint16_t *block;
static cudaStream_t stream;
static cublasHandle_t blas;
static int failures;

#define BLAS(call)                                                                                 \
    do {                                                                                           \
        cublasStatus_t err_ = (call);                                                              \
        if (err_ != CUBLAS_STATUS_SUCCESS) {                                                       \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cublasGetStatusString(err_));     \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* ---- data ------------------------------------------------------------------------------------ */

/* n values in [-scale, scale), scale a power of two; the block's phase differs from array to array.
 */
static uint16_t *filled(size_t n, float scale)
{
    uint16_t *p = device(n * 2), *scaled = malloc(BLOCK * 2);
    for (size_t i = 0; i < BLOCK; i++)
        scaled[i] = to_bf16((float)from_bf16(block[i]) * scale);
    size_t at = 0, phase = random_u32() % (BLOCK / 2);
    while (at < n) {
        size_t m = BLOCK - phase < n - at ? BLOCK - phase : n - at;
        CHECK(cudaMemcpy(p + at, scaled + phase, m * 2, cudaMemcpyHostToDevice));
        at += m;
        phase = random_u32() % 4096;
    }
    free(scaled);
    return p;
}

static void *to_host(const void *dev, size_t bytes)
{
    void *p = malloc(bytes);
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(p, dev, bytes, cudaMemcpyDeviceToHost));
    return p;
}

static void *to_device(const void *host, size_t bytes)
{
    void *p = device(bytes);
    CHECK(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static cudaGraphExec_t captured(void (*fn)(void *arg, int run), void *arg, int n)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n; i++)
        fn(arg, i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return exec;
}

/* Microseconds of fn(arg, run) as one of n in a graph: median of the graph's runs. */
static double time_us(void (*fn)(void *arg, int run), void *arg, int n)
{
    float us[N_RUNS];
    cudaEvent_t begin, end;
    fn(arg, 0); // what loads at the first call
    CHECK(cudaStreamSynchronize(stream));
    cudaGraphExec_t exec = captured(fn, arg, n);
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = -2; i < N_RUNS; i++) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        if (i >= 0)
            CHECK(cudaEventElapsedTime(&us[i], begin, end));
    }
    qsort(us, N_RUNS, sizeof(us[0]), by_value);
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaGraphExecDestroy(exec));
    return (double)us[N_RUNS / 2] * 1000 / n;
}

static void verdict(const char *what, int T, int n_bad, double worst)
{
    if (n_bad)
        failures++;
    printf("  %-4s %s, T = %d: %d wrong, worst %.2g of what is allowed\n", n_bad ? "FAIL" : "ok",
           what, T, n_bad, worst);
}

/* How far got is off, 1 = as far as rounding explains. mass: sum of the terms' absolute values. */
static double off_by(double got, double want, double mass, int bf16)
{
    double allowed = 1e-5 * mass + (bf16 ? fabs(want) / 256 : 0) + 1e-30;
    double off = fabs(got - want) / allowed;
    return isfinite(off) ? off : INFINITY;
}

/* ---- one product ----------------------------------------------------------------------------- */

enum kind { DENSE, DENSE_F32, QKV_DENSE, ABSORB, V_UP };

struct dense_case {
    const char *name;
    enum kind kind;
    int n_in, n_out; // per head
};

struct job {
    const struct dense_case *c;
    int T, n_copies;
    size_t w_values;
    uint16_t *w, *x, *q_norm, *kv_norm, *pool;
    int32_t *position, *page, *row;
    void *y;
    int by_blas;
};

static void gemm(const uint16_t *x, const uint16_t *w, void *y, int T, int n_in, int n_out,
                 cudaDataType_t type)
{
    const float one = 1, zero = 0;
    BLAS(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, n_out, T, n_in, &one, w, CUDA_R_16BF, n_in, x,
                      CUDA_R_16BF, n_in, &zero, y, type, n_out, CUBLAS_COMPUTE_32F,
                      CUBLAS_GEMM_DEFAULT));
}

static void head_gemm(const uint16_t *x, int x_row, int x_head, const uint16_t *w, int turned,
                      uint16_t *y, int y_row, int y_head, int T, int n_in, int n_out)
{
    const float one = 1, zero = 0;
    BLAS(cublasGemmStridedBatchedEx(
        blas, turned ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, n_out, T, n_in, &one, w, CUDA_R_16BF,
        turned ? n_in : n_out, HEAD_ROWS * LATENT, x, CUDA_R_16BF, x_row, x_head, &zero, y,
        CUDA_R_16BF, y_row, y_head, HEADS, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

static void blas_absorb(uint16_t *q, const uint16_t *kv_b, uint16_t *absorbed,
                        const int32_t *position, int T)
{
    struct cu_rope_q_args rope = {q, absorbed, position, T, HEADS, THETA};
    CHECK(cu_rope_q(&rope, stream));
    head_gemm(q, HEADS * HEAD_Q, HEAD_Q, kv_b, 0, absorbed, HEADS * HEAD_KV, HEAD_KV, T, NOPE,
              LATENT);
}

static void blas_v_up(const uint16_t *latent, const uint16_t *kv_b, uint16_t *out, int T)
{
    head_gemm(latent, HEADS * LATENT, LATENT, kv_b + NOPE * LATENT, 1, out, HEADS * HEAD_V, HEAD_V,
              T, LATENT, HEAD_V);
}

static void run_job(void *arg, int run)
{
    struct job *j = arg;
    const struct dense_case *c = j->c;
    const uint16_t *w = j->w + (size_t)(run % j->n_copies) * j->w_values;
    struct cu_qkv_args qkv = {.qkv = j->x,
                              .q_norm = j->q_norm,
                              .kv_norm = j->kv_norm,
                              .position = j->position,
                              .slot_page = j->page,
                              .slot_row = j->row,
                              .q_a = (uint16_t *)j->y + (size_t)MAX_T * HEADS * HEAD_Q,
                              .pool = j->pool,
                              .T = j->T,
                              .q_lora = LORA,
                              .n_layers = 1,
                              .eps = EPS,
                              .theta = THETA};
    switch (c->kind) {
    case DENSE:
    case DENSE_F32:
        if (j->by_blas) {
            gemm(j->x, w, j->y, j->T, c->n_in, c->n_out,
                 c->kind == DENSE ? CUDA_R_16BF : CUDA_R_32F);
        } else {
            struct cu_dense_args a = {j->x, w, j->y, j->T, c->n_in, c->n_out, c->kind == DENSE_F32};
            CHECK(cu_dense(&a, stream));
        }
        break;
    case QKV_DENSE:
        if (j->by_blas) {
            CHECK(cu_qkv_norm_write(&qkv, stream));
            gemm(qkv.q_a, w, j->y, j->T, c->n_in, c->n_out, CUDA_R_16BF);
        } else {
            CHECK(cu_qkv_dense(&qkv, w, j->y, c->n_out, stream));
        }
        break;
    case ABSORB:
        if (j->by_blas) {
            blas_absorb(j->x, w, j->y, j->position, j->T);
        } else {
            struct cu_absorb_args a = {j->x, w, j->position, j->y, j->T, HEADS, THETA};
            CHECK(cu_absorb(&a, stream));
        }
        break;
    case V_UP:
        if (j->by_blas) {
            blas_v_up(j->x, w, j->y, j->T);
        } else {
            struct cu_v_up_args a = {j->x, w, j->y, j->T, HEADS};
            CHECK(cu_v_up(&a, stream));
        }
        break;
    }
}

static size_t out_width(const struct dense_case *c)
{
    return c->kind == ABSORB ? HEADS * HEAD_KV : c->kind == V_UP ? HEADS * HEAD_V : c->n_out;
}

/* Rounded to bf16, as a kernel hands it on. */
static double rounded(double v) { return from_bf16(to_bf16((float)v)); }

static void turned(const uint16_t *pair, int i, int position, double *ret0, double *ret1)
{
    double angle = position * pow((double)THETA, -2.0 * i / 64);
    double x0 = from_bf16(pair[0]), x1 = from_bf16(pair[1]);
    *ret0 = x0 * cos(angle) - x1 * sin(angle);
    *ret1 = x1 * cos(angle) + x0 * sin(angle);
}

static double inverse_rms(const uint16_t *x, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += from_bf16(x[i]) * from_bf16(x[i]);
    return 1 / sqrt(sum / n + (double)EPS);
}

/* Output o of row t by the definition, from the first copy of the weights; *ret_mass as off_by
 * wants it: 100 where RoPE turns, fp32 angles being off by 1e-7 of the position. */
static double wanted(const struct job *j, const uint16_t *x, const uint16_t *w,
                     const uint16_t *q_norm, const int32_t *position, int t, int o,
                     double *ret_mass)
{
    const struct dense_case *c = j->c;
    double sum = 0, mass = 0, scale = 1;
    const uint16_t *row = x + (size_t)t * (size_t)c->n_in,
                   *column = w + (size_t)o * (size_t)c->n_in;
    int w_step = 1;
    if (c->kind == QKV_DENSE) {
        row = x + (size_t)t * QKV;
        scale = inverse_rms(row, LORA);
    } else if (c->kind == ABSORB) {
        int h = o / HEAD_KV, i = o % HEAD_KV;
        row = x + ((size_t)t * HEADS + (size_t)h) * HEAD_Q;
        if (i >= LATENT) {
            double r[2];
            turned(row + NOPE + (i - LATENT) / 2 * 2, (i - LATENT) / 2, position[t], &r[0], &r[1]);
            *ret_mass = 100;
            return r[i & 1];
        }
        column = w + (size_t)h * HEAD_ROWS * LATENT + i;
        w_step = LATENT;
    } else if (c->kind == V_UP) {
        int h = o / HEAD_V;
        row = x + ((size_t)t * HEADS + (size_t)h) * LATENT;
        column = w + ((size_t)h * HEAD_ROWS + NOPE + (size_t)(o % HEAD_V)) * LATENT;
    }
    for (int i = 0; i < c->n_in; i++) {
        double v = from_bf16(row[i]);
        if (c->kind == QKV_DENSE)
            v = rounded(v * scale * from_bf16(q_norm[i]));
        v *= from_bf16(column[(size_t)i * (size_t)w_step]);
        sum += v;
        mass += fabs(v);
    }
    // a norm's factor a hair to the other side rounds some values to the next bf16
    *ret_mass = mass * (c->kind == QKV_DENSE ? 20 : 1);
    return sum;
}

static double value_at(const void *y, size_t i, int f32)
{
    return f32 ? (double)((const float *)y)[i] : from_bf16(((const uint16_t *)y)[i]);
}

static void check_values(const struct job *j, const uint16_t *x, const uint16_t *w)
{
    const struct dense_case *c = j->c;
    size_t width = out_width(c);
    int f32 = c->kind == DENSE_F32, n_bad = 0, n = c->n_in > 4000 ? 1500 : 4000;
    void *y = to_host(j->y, (size_t)j->T * width * (f32 ? 4 : 2));
    uint16_t *q_norm = to_host(j->q_norm, LORA * 2);
    int32_t *position = to_host(j->position, MAX_T * 4);
    double worst = 0;
    for (int i = 0; i < n; i++) {
        int t = (int)(random_u32() % (uint32_t)j->T), o = (int)(random_u32() % (uint32_t)width);
        if (i < 64) // both ends
            o = i < 32 ? i % (int)width : (int)width - 1 - (i - 32) % (int)width;
        double mass, want = wanted(j, x, w, q_norm, position, t, o, &mass);
        double off = off_by(value_at(y, (size_t)t * width + (size_t)o, f32), want, mass, !f32);
        n_bad += !(off <= 1);
        worst = fmax(worst, off);
    }
    for (size_t i = 0; i < (size_t)j->T * width; i++)
        n_bad += !isfinite(value_at(y, i, f32));
    verdict(c->name, j->T, n_bad, worst);
    free(y);
    free(q_norm);
    free(position);
}

/* Row t went to page t, row t: its 576 values. */
static void check_pool(const struct job *j, const uint16_t *x)
{
    uint16_t *pool = to_host(j->pool, (size_t)MAX_T * 64 * HEAD_KV * 2);
    uint16_t *kv_norm = to_host(j->kv_norm, LATENT * 2);
    int32_t *position = to_host(j->position, MAX_T * 4);
    int n_bad = 0;
    double worst = 0;
    for (int t = 0; t < j->T; t++) {
        const uint16_t *from = x + (size_t)t * QKV + LORA;
        const uint16_t *got = pool + ((size_t)t * 64 + (size_t)t) * HEAD_KV;
        double scale = inverse_rms(from, LATENT);
        for (int i = 0; i < HEAD_KV; i++) {
            double want[2] = {from_bf16(from[i]) * scale * from_bf16(kv_norm[i % LATENT])};
            want[1] = want[0];
            if (i >= LATENT)
                turned(from + i / 2 * 2, (i - LATENT) / 2, position[t], &want[0], &want[1]);
            double off = off_by(from_bf16(got[i]), want[i & 1], i < LATENT ? 4 : 100, 1);
            n_bad += !(off <= 1);
            worst = fmax(worst, off);
        }
    }
    verdict("its page write", j->T, n_bad, worst);
    free(pool);
    free(kv_norm);
    free(position);
}

/* The first rows of the largest batch, alone or fewer together. */
static void check_rows(struct job *j)
{
    size_t row_bytes = out_width(j->c) * (j->c->kind == DENSE_F32 ? 4 : 2);
    j->T = MAX_T;
    run_job(j, 0);
    char *all = to_host(j->y, MAX_T * row_bytes);
    int n_bad = 0;
    for (int T = 1; T < MAX_T; T++) {
        CHECK(cudaMemset(j->y, 0xff, MAX_T * row_bytes));
        CHECK(cudaDeviceSynchronize());
        j->T = T;
        run_job(j, 0);
        char *some = to_host(j->y, MAX_T * row_bytes);
        n_bad += memcmp(all, some, (size_t)T * row_bytes) != 0;
        for (size_t i = (size_t)T * row_bytes; i < MAX_T * row_bytes; i++)
            n_bad += some[i] != (char)0xff; // beyond the batch
        free(some);
    }
    verdict("rows alone and together, batches of 1 to 16", MAX_T, n_bad, 0);
    free(all);
}

static void bench_products(void)
{
    static const struct dense_case cases[] = {
        {"q_a + kv_a 2048 -> 1344", DENSE, 2048, QKV},
        {"norms, page write, q_b 768 -> 5120", QKV_DENSE, LORA, HEADS * HEAD_Q},
        {"RoPE, absorb 20 x 192 -> 512", ABSORB, NOPE, LATENT},
        {"v up 20 x 512 -> 256", V_UP, LATENT, HEAD_V},
        {"o 5120 -> 2048", DENSE_F32, HEADS * HEAD_V, H},
        {"MTP input 4096 -> 2048", DENSE_F32, 2 * H, H},
        {"gate_up of layer 0 2048 -> 20480", DENSE, H, 20480},
        {"down of layer 0 10240 -> 2048", DENSE_F32, 10240, H},
        {"head 2048 -> 154880", DENSE_F32, H, 154880},
        {"the demo model's 128 -> 1000", DENSE, 128, 1000},
        {"awkward 264 -> 17", DENSE_F32, 264, 17},
    };
    static const int rows[] = {1, 2, 4, 8, 16};
    printf("products: us, GB/s of weights\n");
    for (size_t k = 0; k < sizeof(cases) / sizeof(cases[0]); k++) {
        const struct dense_case *c = &cases[k];
        int is_head = c->kind == ABSORB || c->kind == V_UP;
        struct job j = {.c = c,
                        .w_values = is_head ? HEADS * HEAD_ROWS * LATENT
                                            : (size_t)c->n_in * (size_t)c->n_out};
        size_t read_bytes = (size_t)c->n_in * (size_t)c->n_out * (is_head ? HEADS : 1) * 2;
        j.n_copies = (int)((400u << 20) / (j.w_values * 2)) + 2;
        if (j.n_copies > 64)
            j.n_copies = 64;
        size_t x_values =
            MAX_T * (c->kind == ABSORB ? HEADS * HEAD_Q
                     : c->kind == V_UP ? HEADS * LATENT
                                       : (size_t)(c->kind == QKV_DENSE ? QKV : c->n_in));
        int32_t position[MAX_T], page[MAX_T];
        for (int t = 0; t < MAX_T; t++) {
            position[t] = t * 61;
            page[t] = t;
        }
        j.w = filled(j.w_values * (size_t)j.n_copies, 1.f / 32);
        j.x = filled(x_values, 1);
        j.q_norm = filled(LORA, 1);
        j.kv_norm = filled(LATENT, 1);
        j.pool = device((size_t)MAX_T * 64 * HEAD_KV * 2);
        j.position = to_device(position, sizeof(position));
        j.page = j.row = to_device(page, sizeof(page));
        size_t y_bytes = MAX_T * out_width(c) * 4 + (size_t)MAX_T * LORA * 2;
        j.y = device(y_bytes);
        uint16_t *x = to_host(j.x, x_values * 2), *w = to_host(j.w, j.w_values * 2);
        for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
            double us[2];
            j.T = rows[i];
            for (j.by_blas = 1; j.by_blas >= 0; j.by_blas--)
                us[j.by_blas] = time_us(run_job, &j, j.n_copies > 24 ? j.n_copies : 24);
            j.by_blas = 0;
            printf("%-36s T = %2d: cuBLAS %7.1f (%4.0f)  ours %7.1f (%4.0f)\n", c->name, j.T, us[1],
                   (double)read_bytes / us[1] / 1e3, us[0], (double)read_bytes / us[0] / 1e3);
            if (c->kind == ABSORB) // cu_rope_q turns in place
                CHECK(cudaMemcpy(j.x, x, x_values * 2, cudaMemcpyHostToDevice));
            CHECK(cudaMemset(j.y, 0xff, y_bytes));
            CHECK(cudaMemset(j.pool, 0xff, (size_t)MAX_T * 64 * HEAD_KV * 2));
            CHECK(cudaDeviceSynchronize());
            run_job(&j, 0);
            check_values(&j, x, w);
            if (c->kind == QKV_DENSE)
                check_pool(&j, x);
        }
        check_rows(&j);
        void *all[] = {j.w, j.x, j.q_norm, j.kv_norm, j.pool, j.position, j.page, j.y};
        for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
            CHECK(cudaFree(all[i]));
        free(x);
        free(w);
    }
}

/* ---- a layer's attention block ----------------------------------------------------------------
 */

struct chain {
    int T, by_blas, waits;
    uint16_t *q_a[LAYERS], *q_b[LAYERS], *kv_b[LAYERS], *o[LAYERS], *norm_w;
    uint16_t *norm, *qkv, *q_lora, *q, *absorbed, *latent, *attention, *pool;
    float *delta, *residual;
    int32_t *position, *page, *row, *table, *n_ctx;
    void *work;
};

static void wait_if(const struct chain *c)
{
    if (c->waits)
        CHECK(cudaStreamSynchronize(stream));
}

static struct cu_mla_decode_args attention_of(const struct chain *c)
{
    return (struct cu_mla_decode_args){.q = c->absorbed,
                                       .pool = c->pool,
                                       .block_table = c->table,
                                       .n_ctx = c->n_ctx,
                                       .out = c->latent,
                                       .work = c->work,
                                       .S = c->T,
                                       .q_rows = 1,
                                       .heads = HEADS,
                                       .n_pages = MAX_T * MAX_CTX / 64,
                                       .n_layers = 1,
                                       .max_pages = MAX_CTX / 64,
                                       .max_ctx = MAX_CTX,
                                       .scale = 1.f / 16};
}

static void run_chain(void *arg, int run)
{
    struct chain *c = arg;
    int l = run % LAYERS, T = c->T;
    struct cu_qkv_args qkv = {.qkv = c->qkv,
                              .q_norm = c->norm_w,
                              .kv_norm = c->norm_w,
                              .position = c->position,
                              .slot_page = c->page,
                              .slot_row = c->row,
                              .q_a = c->q_lora,
                              .pool = c->pool,
                              .T = T,
                              .q_lora = LORA,
                              .n_layers = 1,
                              .eps = EPS,
                              .theta = THETA};
    struct cu_mla_decode_args mla = attention_of(c);
    struct cu_add_norm_args add = {c->residual, c->delta, c->norm_w, c->norm, T, H, EPS};
    if (c->by_blas) {
        gemm(c->norm, c->q_a[l], c->qkv, T, H, QKV, CUDA_R_16BF);
        CHECK(cu_qkv_norm_write(&qkv, stream));
        gemm(c->q_lora, c->q_b[l], c->q, T, LORA, HEADS * HEAD_Q, CUDA_R_16BF);
        blas_absorb(c->q, c->kv_b[l], c->absorbed, c->position, T);
        CHECK(cu_mla_decode(&mla, stream));
        blas_v_up(c->latent, c->kv_b[l], c->attention, T);
        gemm(c->attention, c->o[l], c->delta, T, HEADS * HEAD_V, H, CUDA_R_32F);
    } else {
        struct cu_dense_args q_a = {c->norm, c->q_a[l], c->qkv, T, H, QKV, 0};
        struct cu_absorb_args absorb = {c->q, c->kv_b[l], c->position, c->absorbed,
                                        T,    HEADS,      THETA};
        struct cu_v_up_args v_up = {c->latent, c->kv_b[l], c->attention, T, HEADS};
        struct cu_dense_args o = {c->attention, c->o[l], c->delta, T, HEADS * HEAD_V, H, 1};
        CHECK(cu_dense(&q_a, stream));
        wait_if(c);
        CHECK(cu_qkv_dense(&qkv, c->q_b[l], c->q, HEADS * HEAD_Q, stream));
        wait_if(c);
        CHECK(cu_absorb(&absorb, stream));
        wait_if(c);
        CHECK(cu_mla_few_fits(&mla) ? cu_mla_few(&mla, stream) : cu_mla_decode(&mla, stream));
        wait_if(c);
        CHECK(cu_v_up(&v_up, stream));
        wait_if(c);
        CHECK(cu_dense(&o, stream));
        wait_if(c);
    }
    CHECK(cu_add_norm(&add, stream));
    wait_if(c);
}

static void run_attention(void *arg, int run)
{
    struct chain *c = arg;
    struct cu_mla_decode_args mla = attention_of(c);
    (void)run;
    CHECK(c->by_blas || !cu_mla_few_fits(&mla) ? cu_mla_decode(&mla, stream)
                                               : cu_mla_few(&mla, stream));
}

static void run_add_norm(void *arg, int run)
{
    struct chain *c = arg;
    struct cu_add_norm_args add = {c->residual, c->delta, c->norm_w, c->norm, c->T, H, EPS};
    (void)run;
    CHECK(cu_add_norm(&add, stream));
}

static void chain_reset(struct chain *c, const uint16_t *x)
{
    CHECK(cudaMemcpy(c->norm, x, (size_t)c->T * H * 2, cudaMemcpyHostToDevice));
    CHECK(cudaMemset(c->residual, 0, (size_t)MAX_T * H * 4));
    CHECK(cudaMemset(c->delta, 0xff, (size_t)MAX_T * H * 4));
    CHECK(cudaDeviceSynchronize());
}

/* Twenty runs of the graph against launches one by one. */
static void check_chain(struct chain *c, const uint16_t *x)
{
    size_t bytes = (size_t)c->T * H * 4;
    int n_bad = 0;
    chain_reset(c, x);
    c->waits = 1;
    for (int l = 0; l < 2 * LAYERS; l++)
        run_chain(c, l);
    c->waits = 0;
    float *want = to_host(c->residual, bytes);
    cudaGraphExec_t exec = captured(run_chain, c, 2 * LAYERS);
    for (int i = 0; i < 20; i++) {
        chain_reset(c, x);
        CHECK(cudaGraphLaunch(exec, stream));
        float *got = to_host(c->residual, bytes);
        n_bad += memcmp(want, got, bytes) != 0;
        free(got);
    }
    for (size_t i = 0; i < bytes / 4; i++)
        n_bad += !isfinite(want[i]);
    CHECK(cudaGraphExecDestroy(exec));
    verdict("chain as a graph and one by one", c->T, n_bad, 0);
    free(want);
}

/* Alone, the kernel of large batches and that of small ones. */
static void attention_times(struct chain *c)
{
    c->by_blas = 1;
    double many = time_us(run_attention, c, 48);
    c->by_blas = 0;
    printf("T = %2d: attention alone, mla_decode %.1f, mla_few %.1f, add and norm %.1f\n", c->T,
           many, time_us(run_attention, c, 48), time_us(run_add_norm, c, 48));
}

/* mla_few against mla_decode, at contexts from one slot to the most it does. Both round their
 * probabilities to bf16, about different maxima. */
static void check_attention(struct chain *c)
{
    static const int lengths[] = {1, 2, 63, 64, 65, 127, 128, 511, 512, 513, 640, 1000, 1023, 1024};
    size_t values = (size_t)FEW * HEADS * LATENT;
    int32_t *n_ctx = to_host(c->n_ctx, FEW * 4), was[FEW], n_bad = 0;
    memcpy(was, n_ctx, sizeof(was));
    double worst = 0;
    uint16_t *q = filled(FEW * HEADS * HEAD_KV, 1);
    for (int first = 0; first < 14; first += 7) {
        for (int t = 0; t < FEW; t++)
            n_ctx[t] = lengths[(first + t) % 14];
        CHECK(cudaMemcpy(c->n_ctx, n_ctx, sizeof(was), cudaMemcpyHostToDevice));
        uint16_t *pool = filled((size_t)FEW * MAX_CTX * HEAD_KV, 1);
        for (int t = 0; t < FEW; t++) // what a sequence does not see is NaN
            CHECK(cudaMemset(pool + ((size_t)t * MAX_CTX + (size_t)n_ctx[t]) * HEAD_KV, 0xff,
                             (size_t)(MAX_CTX - n_ctx[t]) * HEAD_KV * 2));
        c->T = FEW;
        struct cu_mla_decode_args mla = attention_of(c);
        mla.q = q;
        mla.pool = pool;
        CHECK(cudaMemset(c->latent, 0xff, values * 2));
        CHECK(cudaDeviceSynchronize());
        CHECK(cu_mla_decode(&mla, stream));
        uint16_t *want = to_host(c->latent, values * 2);
        CHECK(cudaMemset(c->latent, 0xff, values * 2));
        CHECK(cudaDeviceSynchronize());
        CHECK(cu_mla_few(&mla, stream));
        uint16_t *got = to_host(c->latent, values * 2);
        for (size_t i = 0; i < values; i++) {
            double off = fabs(from_bf16(got[i]) - from_bf16(want[i])) /
                         (0.003 + fabs(from_bf16(want[i])) / 128);
            n_bad += !(off <= 1);
            worst = fmax(worst, isfinite(off) ? off : INFINITY);
        }
        free(want);
        free(got);
        CHECK(cudaFree(pool));
    }
    CHECK(cudaMemcpy(c->n_ctx, was, sizeof(was), cudaMemcpyHostToDevice));
    CHECK(cudaFree(q));
    free(n_ctx);
    verdict("mla_few against mla_decode", FEW, n_bad, worst);
}

static void bench_chain(void)
{
    struct chain c = {.norm_w = filled(H, 1)};
    for (int l = 0; l < LAYERS; l++) {
        c.q_a[l] = filled((size_t)H * QKV, 1.f / 32);
        c.q_b[l] = filled((size_t)LORA * HEADS * HEAD_Q, 1.f / 32);
        c.kv_b[l] = filled((size_t)HEADS * HEAD_ROWS * LATENT, 1.f / 32);
        c.o[l] = filled((size_t)HEADS * HEAD_V * H, 1.f / 32);
    }
    int32_t position[MAX_T], page[MAX_T], row[MAX_T], n_ctx[MAX_T], table[MAX_T * MAX_CTX / 64];
    for (int t = 0; t < MAX_T; t++) {
        position[t] = CTX - 1;
        page[t] = t * MAX_CTX / 64 + CTX / 64 - 1;
        row[t] = 63;
        n_ctx[t] = CTX;
    }
    for (int i = 0; i < MAX_T * MAX_CTX / 64; i++)
        table[i] = i;
    c.position = to_device(position, sizeof(position));
    c.page = to_device(page, sizeof(page));
    c.row = to_device(row, sizeof(row));
    c.n_ctx = to_device(n_ctx, sizeof(n_ctx));
    c.table = to_device(table, sizeof(table));
    c.norm = device((size_t)MAX_T * H * 2);
    c.qkv = device((size_t)MAX_T * QKV * 2);
    c.q_lora = device((size_t)MAX_T * LORA * 2);
    c.q = device((size_t)MAX_T * HEADS * HEAD_Q * 2);
    c.absorbed = device((size_t)MAX_T * HEADS * HEAD_KV * 2);
    c.latent = device((size_t)MAX_T * HEADS * LATENT * 2);
    c.attention = device((size_t)MAX_T * HEADS * HEAD_V * 2);
    c.pool = filled((size_t)MAX_T * MAX_CTX * HEAD_KV, 1);
    c.delta = device((size_t)MAX_T * H * 4);
    c.residual = device((size_t)MAX_T * H * 4);
    size_t work = cu_mla_decode_work_bytes(MAX_T, 1, HEADS, MAX_CTX);
    c.work = device(work);
    CHECK(cudaMemset(c.work, 0, work));
    uint16_t *x = malloc((size_t)MAX_T * H * 2);
    memcpy(x, block, (size_t)MAX_T * H * 2);
    const double bytes =
        2.0 * (H * QKV + LORA * HEADS * HEAD_Q + HEADS * HEAD_ROWS * LATENT + HEADS * HEAD_V * H);
    static const int rows[] = {1, 4, 8, 16};
    printf("attention block, context %d: us, GB/s of weights\n", CTX);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        double us[2];
        c.T = rows[i];
        for (c.by_blas = 1; c.by_blas >= 0; c.by_blas--) {
            chain_reset(&c, x);
            us[c.by_blas] = time_us(run_chain, &c, 4 * LAYERS);
        }
        c.by_blas = 0;
        attention_times(&c);
        printf("T = %2d: cuBLAS %7.1f (%4.0f)  ours %7.1f (%4.0f)\n", c.T, us[1],
               bytes / us[1] / 1e3, us[0], bytes / us[0] / 1e3);
        check_chain(&c, x);
    }
    check_attention(&c);
    free(x);
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    block = malloc(BLOCK * 2);
    for (size_t i = 0; i < BLOCK; i++)
        block[i] = to_bf16((float)random_u32() / 2147483648.f - 1.f);
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    BLAS(cublasCreate(&blas));
    BLAS(cublasSetStream(blas, stream));
    void *blas_work = device(32u << 20);
    BLAS(cublasSetWorkspace(blas, blas_work, 32u << 20));
    const struct {
        const char *name;
        void (*run)(void);
    } parts[] = {{"products", bench_products}, {"chain", bench_chain}};
    for (int p = 0; p < 2; p++) {
        int wanted_here = argc < 2;
        for (int i = 1; i < argc; i++)
            wanted_here |= !strcmp(argv[i], parts[p].name);
        if (wanted_here)
            parts[p].run();
    }
    printf(failures ? "FAILED: %d\n" : "all right\n", failures);
    return failures > 0;
}
