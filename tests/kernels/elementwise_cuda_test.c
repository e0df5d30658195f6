/* elementwise_cuda_test.c: the small operations on the GPU against double-precision sums, to bf16's
 * rounding. Skips (77) without a device. */
#include <cuda_runtime_api.h>

#include "check.h"
#include "common/base/own.h"
#include "data.h"
#include "kernels/cuda.h"

#define EPS   1e-5f
#define THETA 1e6f

#define CUDA(call) REQUIRE((call) == cudaSuccess)

static cudaStream_t stream;

/* Host arrays with a twin on the device, given back all at once. */
static void *host_of[32], *dev_of[32];
static size_t bytes_of[32];
static int n_arrays;

static void *array(size_t bytes)
{
    REQUIRE(n_arrays < 32);
    host_of[n_arrays] = data_alloc((int64_t)bytes, 1);
    CUDA(cudaMalloc(&dev_of[n_arrays], bytes));
    bytes_of[n_arrays] = bytes;
    return host_of[n_arrays++];
}

static void *dev(const void *host)
{
    for (int i = 0; i < n_arrays; i++)
        if (host_of[i] == host)
            return dev_of[i];
    REQUIRE(!"an array of array()");
    return NULL;
}

static void copy_arrays(enum cudaMemcpyKind kind)
{
    CUDA(cudaStreamSynchronize(stream));
    for (int i = 0; i < n_arrays; i++) {
        bool up = kind == cudaMemcpyHostToDevice;
        CUDA(cudaMemcpy(up ? dev_of[i] : host_of[i], up ? host_of[i] : dev_of[i], bytes_of[i],
                        kind));
    }
}

static void free_arrays(void)
{
    for (int i = 0; i < n_arrays; i++) {
        free(host_of[i]);
        CUDA(cudaFree(dev_of[i]));
    }
    n_arrays = 0;
}

static bf16_t *random_bf16(int64_t n)
{
    bf16_t *p = array((size_t)n * 2), *from = data_weights(n);
    memcpy(p, from, (size_t)n * 2);
    free(from);
    return p;
}

static float *random_floats(int64_t n)
{
    float *p = array((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        p[i] = data_float();
    return p;
}

/* Of a result in bf16, relative to its size and the row's. */
static double error(bf16_t got, double want)
{
    return fabs(data_bf16(got) - want) / (fabs(want) + 0.1);
}

static double rms_scale(const double *x, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += x[i] * x[i];
    return 1 / sqrt(sum / n + (double)EPS);
}

static void adds_and_norms(void)
{
    const int widths[] = {8, 64, 2048, 2056, 8192};
    double worst = 0;
    for (size_t w = 0; w < ARRAY_LEN(widths); w++)
        for (int has_delta = 0; has_delta < 2; has_delta++) {
            int T = 3, H = widths[w];
            float *residual = random_floats(T * H), *delta = random_floats(T * H);
            bf16_t *weight = random_bf16(H), *out = array((size_t)(T * H) * 2);
            double *x = data_alloc((int64_t)T * H, sizeof(*x));
            for (int i = 0; i < T * H; i++)
                x[i] = (double)residual[i] + (has_delta ? (double)delta[i] : 0);
            copy_arrays(cudaMemcpyHostToDevice);
            struct cu_add_norm_args a = {.residual = dev(residual),
                                         .delta = has_delta ? dev(delta) : NULL,
                                         .w = dev(weight),
                                         .out = dev(out),
                                         .T = T,
                                         .H = H,
                                         .eps = EPS};
            CUDA(cu_add_norm(&a, stream));
            copy_arrays(cudaMemcpyDeviceToHost);
            for (int t = 0; t < T; t++) {
                double scale = rms_scale(x + t * H, H);
                for (int i = 0; i < H; i++) {
                    int at = t * H + i;
                    worst = fmax(worst, error(out[at], x[at] * scale * data_bf16(weight[i])));
                    CHECK_NEAR((double)residual[at], x[at], 1e-6);
                }
            }
            free(x);
            free_arrays();
        }
    printf("largest error %.2g\n", worst);
    CHECK_NEAR(worst, 0, 5e-3);
}

static void turn(double *x, int position)
{
    for (int i = 0; i < 32; i++) {
        double angle = position * pow((double)THETA, -i / 32.0), a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos(angle) - b * sin(angle);
        x[2 * i + 1] = b * cos(angle) + a * sin(angle);
    }
}

static void norms_and_writes_slots(void)
{
    enum { T = 5, PAGES = 4, LAYERS = 3, LAYER = 1 };
    const int ranks[] = {8, 64, 768, 1536, 7424};
    double worst = 0;
    for (size_t r = 0; r < ARRAY_LEN(ranks); r++) {
        int lora = ranks[r], width = lora + KV_WIDTH;
        bf16_t *qkv = random_bf16(T * width), *q_norm = random_bf16(lora);
        bf16_t *kv_norm = random_bf16(MLA_LATENT), *q_a = array((size_t)(T * lora) * 2);
        bf16_t *pool = array((size_t)PAGES * LAYERS * 64 * KV_WIDTH * 2);
        int32_t *position = array(T * 4), *page = array(T * 4), *row = array(T * 4);
        for (int t = 0; t < T; t++) {
            position[t] = t * 157;
            page[t] = (t * 3 + 1) % PAGES;
            row[t] = (t * 13 + 63) % 64;
        }
        copy_arrays(cudaMemcpyHostToDevice);
        struct cu_qkv_args a = {.qkv = dev(qkv),
                                .q_norm = dev(q_norm),
                                .kv_norm = dev(kv_norm),
                                .position = dev(position),
                                .slot_page = dev(page),
                                .slot_row = dev(row),
                                .q_a = dev(q_a),
                                .pool = dev(pool),
                                .T = T,
                                .q_lora = lora,
                                .n_layers = LAYERS,
                                .layer = LAYER,
                                .eps = EPS,
                                .theta = THETA};
        CUDA(cu_qkv_norm_write(&a, stream));
        copy_arrays(cudaMemcpyDeviceToHost);
        int64_t n_written = 0;
        for (int t = 0; t < T; t++) {
            double x[8192 + KV_WIDTH];
            for (int i = 0; i < width; i++)
                x[i] = data_bf16(qkv[t * width + i]);
            double scale_q = rms_scale(x, lora), scale_c = rms_scale(x + lora, MLA_LATENT);
            turn(x + lora + MLA_LATENT, position[t]);
            const bf16_t *slot =
                pool + (((int64_t)page[t] * LAYERS + LAYER) * 64 + row[t]) * KV_WIDTH;
            for (int i = 0; i < lora; i++)
                worst =
                    fmax(worst, error(q_a[t * lora + i], x[i] * scale_q * data_bf16(q_norm[i])));
            for (int i = 0; i < MLA_LATENT; i++)
                worst = fmax(worst, error(slot[i], x[lora + i] * scale_c * data_bf16(kv_norm[i])));
            for (int i = MLA_LATENT; i < KV_WIDTH; i++)
                worst = fmax(worst, error(slot[i], x[lora + i]));
        }
        for (int64_t i = 0; i < (int64_t)PAGES * LAYERS * 64 * KV_WIDTH; i++)
            n_written += pool[i] != 0;
        CHECK(n_written > T * KV_WIDTH - 100 && n_written <= T * KV_WIDTH);
        free_arrays();
    }
    printf("largest error %.2g\n", worst);
    CHECK_NEAR(worst, 0, 5e-3);
    struct cu_qkv_args a = {.T = 1, .q_lora = 12};
    CHECK_INT(cu_qkv_norm_write(&a, stream), cudaErrorInvalidValue);
}

static void queries_turn(void)
{
    enum { T = 4, HEADS = 6 };
    bf16_t *q = random_bf16(T * HEADS * MLA_QK), *was = random_bf16(T * HEADS * MLA_QK);
    bf16_t *absorbed = array(T * HEADS * KV_WIDTH * 2);
    int32_t *position = array(T * 4);
    memcpy(was, q, T * HEADS * MLA_QK * 2);
    for (int t = 0; t < T; t++)
        position[t] = t * 1001;
    copy_arrays(cudaMemcpyHostToDevice);
    struct cu_rope_q_args a = {.q = dev(q),
                               .absorbed = dev(absorbed),
                               .position = dev(position),
                               .T = T,
                               .heads = HEADS,
                               .theta = THETA};
    CUDA(cu_rope_q(&a, stream));
    copy_arrays(cudaMemcpyDeviceToHost);
    double worst = 0;
    for (int i = 0; i < T * HEADS; i++) {
        double x[MLA_ROPE];
        CHECK(!memcmp(q + i * MLA_QK, was + i * MLA_QK, MLA_NOPE * 2));
        for (int j = 0; j < MLA_ROPE; j++)
            x[j] = data_bf16(was[i * MLA_QK + MLA_NOPE + j]);
        turn(x, position[i / HEADS]);
        for (int j = 0; j < MLA_ROPE; j++) {
            bf16_t got = q[i * MLA_QK + MLA_NOPE + j];
            worst = fmax(worst, error(got, x[j]));
            CHECK_INT(absorbed[i * KV_WIDTH + MLA_LATENT + j], got);
        }
    }
    printf("largest error %.2g\n", worst);
    CHECK_NEAR(worst, 0, 5e-3);
    free_arrays();
}

static void angles_are_tabled(void)
{
    enum { T = 13 };
    int32_t *position = array(T * 4);
    float *table = array(T * MLA_ROPE * 4);
    for (int t = 0; t < T; t++)
        position[t] = t * t * 1300;
    copy_arrays(cudaMemcpyHostToDevice);
    CUDA(cu_rope_table(dev(position), dev(table), T, THETA, stream));
    copy_arrays(cudaMemcpyDeviceToHost);
    double worst = 0;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < MLA_ROPE / 2; i++) {
            double x[MLA_ROPE] = {0};
            x[2 * i] = 1;
            turn(x, position[t]);
            worst = fmax(worst, fabs(table[t * MLA_ROPE + 2 * i] - x[2 * i]));
            worst = fmax(worst, fabs(table[t * MLA_ROPE + 2 * i + 1] - x[2 * i + 1]));
        }
    printf("largest error %.2g\n", worst);
    CHECK_NEAR(worst, 0, 0.02); // a fp32 angle of 187,200 is right within 2^-7
    free_arrays();
}

/* Sequences of 70 and 3 slots in shuffled pages, packed. */
static void latents_are_gathered(void)
{
    enum { PAGES = 3, LAYERS = 2, LAYER = 1, N = 73, MAX_P = 2 };
    bf16_t *pool = random_bf16(PAGES * LAYERS * KV_PAGE_TOKENS * KV_WIDTH);
    bf16_t *latent = array(N * MLA_LATENT * 2), *k_rope = array(N * MLA_ROPE * 2);
    int32_t *table = array(4 * 4), *start = array(3 * 4);
    memcpy(table, (int32_t[]){2, 0, 1, -1}, 16);
    memcpy(start, (int32_t[]){0, 70, N}, 12);
    copy_arrays(cudaMemcpyHostToDevice);
    struct cu_gather_kv_args a = {.pool = dev(pool),
                                  .block_table = dev(table),
                                  .kv_start = dev(start),
                                  .latent = dev(latent),
                                  .k_rope = dev(k_rope),
                                  .S = 2,
                                  .T_kv = N,
                                  .max_pages = MAX_P,
                                  .n_layers = LAYERS,
                                  .layer = LAYER};
    CUDA(cu_gather_kv(&a, stream));
    copy_arrays(cudaMemcpyDeviceToHost);
    for (int i = 0; i < N; i++) {
        int s = i >= 70, slot = i - start[s], page = table[s * MAX_P + slot / KV_PAGE_TOKENS];
        const bf16_t *want =
            pool + ((page * LAYERS + LAYER) * KV_PAGE_TOKENS + slot % KV_PAGE_TOKENS) * KV_WIDTH;
        CHECK(!memcmp(latent + i * MLA_LATENT, want, MLA_LATENT * 2));
        CHECK(!memcmp(k_rope + i * MLA_ROPE, want + MLA_LATENT, MLA_ROPE * 2));
    }
    free_arrays();
}

static void experts_add_up(void)
{
    const int shapes[][2] = {{2048, 4}, {264, 3}, {8192, 4}, {64, 1}}; // H, k
    double worst = 0;
    for (size_t s = 0; s < ARRAY_LEN(shapes); s++) {
        int T = 7, H = shapes[s][0], k = shapes[s][1], slots = T * (k + 1);
        bf16_t *y = random_bf16(slots * H), *norm = random_bf16(H);
        bf16_t *out = array((size_t)(T * H) * 2);
        float *weight = random_floats(slots), *residual = random_floats(T * H);
        int32_t *slot = array((size_t)slots * 4);
        double *x = data_alloc((int64_t)T * H, sizeof(*x));
        for (int i = 0; i < slots; i++)
            slot[i] = (i * 5 + 2) % slots; // T * (k + 1) is no multiple of 5 unless k is 4
        for (int i = 0; i < slots && k == 4; i++)
            slot[i] = slots - 1 - i;
        for (int t = 0; t < T; t++)
            for (int h = 0; h < H; h++) {
                x[t * H + h] = (double)residual[t * H + h];
                for (int i = 0; i <= k; i++) {
                    int at = slot[t * (k + 1) + i];
                    x[t * H + h] += (double)weight[at] * data_bf16(y[at * H + h]);
                }
            }
        copy_arrays(cudaMemcpyHostToDevice);
        struct cu_moe_reduce_args a = {.y = dev(y),
                                       .token_slot = dev(slot),
                                       .slot_weight = dev(weight),
                                       .residual = dev(residual),
                                       .norm = dev(norm),
                                       .out = dev(out),
                                       .T = T,
                                       .H = H,
                                       .k = k,
                                       .eps = EPS};
        CUDA(cu_moe_reduce(&a, stream));
        copy_arrays(cudaMemcpyDeviceToHost);
        for (int t = 0; t < T; t++) {
            double scale = rms_scale(x + t * H, H);
            for (int h = 0; h < H; h++) {
                int at = t * H + h;
                worst = fmax(worst, error(out[at], x[at] * scale * data_bf16(norm[h])));
                CHECK_NEAR((double)residual[at], x[at], 1e-5);
            }
        }
        free(x);
        free_arrays();
    }
    printf("largest error %.2g\n", worst);
    CHECK_NEAR(worst, 0, 5e-3);
}

int main(void)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    CUDA(cudaStreamCreate(&stream));
    RUN(adds_and_norms);
    RUN(norms_and_writes_slots);
    RUN(queries_turn);
    RUN(angles_are_tabled);
    RUN(latents_are_gathered);
    RUN(experts_add_up);
    return check_done();
}
