/* step_bench.c: whole forward passes of GLM-4.7-Flash at full size on one GPU, with dummy weights.
 *
 *   step_bench [prefill | decode | mtp | long]
 *   step_bench pass SEQUENCES ROWS CONTEXT    one pass for a profiler: tests/device/profile
 *
 * Times are wall-clock medians of engine_forward and engine_draft as a worker calls them: upload of
 * the batch, all launches, wait. Draws are not part of it.
 *
 * H100 80GB, context 512, ms by batch      1     8    32    64   128   256   512   prefill 32 x 256
 *   launches one by one                  7.07  12.4  20.8  23.5  26.6  30.9           157
 *   replayed as graphs                   6.36  11.7  20.0  22.7  25.7  29.9           158
 *   WGMMA attention and experts          6.21  11.6  19.8  21.7  24.1  27.4  34.0     122
 *   few rows: dense.cu, mla_few.cu, one
 *   launch routes, launches overlap      4.56   9.5  18.3  20.4  22.9  26.2  33.5     123
 *   wide expert tiles of 192 tokens      4.15   9.5  18.3  20.5  22.9  26.2  33.5     114
 *   LightLLM's tuned engine              6.51  12.7  21.9  25.1  26.4  28.7  34.9     137
 *   every byte read once at 3.0 TB/s     2.40   8.8  17.8  20.3  21.4  23.0  26.8      70
 *
 * H200 (4.3 TB/s), the same              3.68   7.7  14.6  15.8  17.5  20.1  26.3           109
 *   two warpgroups share x in the expert
 *   products; keys and values by one
 *   product, queries turned in attention,
 *   o_proj and down add to the residual
 *   themselves; the head is cuBLAS's     3.44   7.8  13.8  15.9  17.2  19.8  24.9           106
 *   mla_narrow.cu from 160 sequences on  3.45   7.8  13.8  15.9  17.3  19.7  24.7           107
 *   every byte read once at 4.3 TB/s     1.68   6.1  12.4  14.2  14.9  16.0  18.7            70
 * The host's part is 0.02 to 0.15 ms of a step.
 */
#include <cuda_profiler_api.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/engine/engine.h"

#define MAX_ROWS   8192
#define MAX_SEQS   512
#define MAX_CTX    32768
#define CTX        512
#define MAX_LOGITS 1280
#define N_PAGES    3600
#define N_RUNS     9

static const struct model_config flash = {
    .hidden = 2048,
    .intermediate = 10240,
    .moe_intermediate = 1536,
    .n_layers = 47,
    .n_dense_layers = 1,
    .n_mtp_layers = 1,
    .n_heads = 20,
    .q_lora_rank = 768,
    .n_experts = 64,
    .n_experts_per_token = 4,
    .n_shared_experts = 1,
    .vocab = 154880,
    .n_token_ids = 154856,
    .max_positions = 202752,
    .routed_scale = 1.8f,
    .norm_eps = 1e-5f,
    .rope_theta = 1e6f,
    .eos = {154820, 154827, 154829},
    .n_eos = 3,
};

static struct engine *engine;
static int32_t token[MAX_ROWS], position[MAX_ROWS], logit_row[MAX_ROWS], ids[MAX_LOGITS];
static int32_t seq_start[MAX_SEQS + 1], ctx_len[MAX_SEQS];
static int32_t block_table[MAX_SEQS * (MAX_CTX / KV_PAGE_TOKENS)];
static struct hidden_ref hidden[MAX_ROWS];

/* n_seqs sequences of rows rows each that end at ctx; the last row of each wants logits, or all. */
static struct batch batch_of(int n_seqs, int rows, int ctx, bool all_logits)
{
    struct batch b = {.n_seqs = n_seqs,
                      .max_pages = MAX_CTX / KV_PAGE_TOKENS,
                      .token = token,
                      .position = position,
                      .seq_start = seq_start,
                      .ctx_len = ctx_len,
                      .block_table = block_table,
                      .logit_row = logit_row};
    int pages = (ctx + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    for (int s = 0; s < n_seqs; s++) {
        for (int i = 0; i < rows; i++) {
            token[b.n_rows] = (int32_t)((unsigned)(s * 7919 + i * 104729 + ctx) % 150000u);
            position[b.n_rows] = ctx - rows + i;
            hidden[b.n_rows] = (struct hidden_ref){HIDDEN_MAIN, b.n_rows};
            if (all_logits || i == rows - 1)
                logit_row[b.n_logits++] = b.n_rows;
            b.n_rows++;
        }
        seq_start[s + 1] = b.n_rows;
        ctx_len[s] = ctx;
        for (int p = 0; p < pages; p++)
            block_table[s * b.max_pages + p] = (s * pages + p) % N_PAGES;
    }
    return b;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ret_device: of the same runs, the median of the device's part. */
static double median_ms(const struct batch *b, bool draft, double *ret_device)
{
    double ms[N_RUNS], device[N_RUNS];
    for (int i = -2; i < N_RUNS; i++) {
        uint64_t begin = clock_now_us();
        if (draft)
            CHECK_OK(engine_draft(engine, b, hidden, ids));
        else
            CHECK_OK(engine_forward(engine, b));
        if (i < 0)
            continue;
        ms[i] = (double)(clock_now_us() - begin) / 1000;
        device[i] = engine_device_us(engine) / 1000.0;
    }
    qsort(ms, N_RUNS, sizeof(ms[0]), by_value);
    qsort(device, N_RUNS, sizeof(device[0]), by_value);
    *ret_device = device[N_RUNS / 2];
    return ms[N_RUNS / 2];
}

static void draw(int n)
{
    static struct sample_row rows[MAX_LOGITS];
    static int32_t idx[MAX_LOGITS];
    for (int i = 0; i < n; i++) {
        idx[i] = i;
        rows[i] = (struct sample_row){.top_p = 1, .repetition = 1, .n_logprobs = -1};
    }
    CHECK_OK(engine_sample(engine, n, idx, rows, 0, ids, NULL, NULL, NULL));
}

/* A whole step with k drafts, all of them accepted (the most rows): the slots of the last step's
 * k + 1 tokens and the first draft, k - 1 more drafts, verification, greedy draws. */
static void mtp_step(int n_seqs, int k)
{
    enum { SLOTS, MORE, VERIFY, DRAW, ALL, N_PARTS };
    double ms[N_PARTS][N_RUNS], discard[N_PARTS];
    struct batch last = batch_of(n_seqs, k + 1, CTX, true); // whose hidden states drafts start from
    CHECK_OK(engine_forward(engine, &last));
    for (int i = -2; i < N_RUNS; i++) {
        uint64_t at[N_PARTS] = {clock_now_us()};
        struct batch b = batch_of(n_seqs, k + 1, CTX, false);
        CHECK_OK(engine_draft(engine, &b, hidden, ids));
        at[MORE] = clock_now_us();
        b = batch_of(n_seqs, 1, CTX, true);
        for (int j = 1; j < k; j++)
            CHECK_OK(engine_draft(engine, &b, hidden, ids));
        at[VERIFY] = clock_now_us();
        b = batch_of(n_seqs, k + 1, CTX, true);
        CHECK_OK(engine_forward(engine, &b));
        at[DRAW] = clock_now_us();
        draw(b.n_logits);
        at[ALL] = clock_now_us();
        for (int p = 0; p < N_PARTS; p++)
            *(i < 0 ? &discard[p] : &ms[p][i]) =
                (double)(p == ALL ? at[ALL] - at[0] : at[p + 1] - at[p]) / 1000;
    }
    for (int p = 0; p < N_PARTS; p++)
        qsort(ms[p], N_RUNS, sizeof(ms[p][0]), by_value);
    printf(
        "MTP step k = %d, batch %3d, context %d: %6.2f ms (slots and first draft %.2f, more drafts "
        "%.2f, verification %.2f, draws %.2f)\n",
        k, n_seqs, CTX, ms[ALL][N_RUNS / 2], ms[SLOTS][N_RUNS / 2], ms[MORE][N_RUNS / 2],
        ms[VERIFY][N_RUNS / 2], ms[DRAW][N_RUNS / 2]);
}

/* One prompt in chunks. */
static void long_prompt(int n)
{
    uint64_t begin = 0;
    for (int run = 0; run < 2; run++) { // the first warms up
        begin = clock_now_us();
        for (int at = MAX_ROWS; at <= n; at += MAX_ROWS) {
            struct batch b = batch_of(1, MAX_ROWS, at, false);
            CHECK_OK(engine_forward(engine, &b));
        }
    }
    double ms = (double)(clock_now_us() - begin) / 1000;
    printf("one prompt of %d tokens in chunks of %d: %8.2f ms, %8.0f tokens/s\n", n, MAX_ROWS, ms,
           n / ms * 1000);
}

static void logits_are_finite(int n)
{
    float *x = malloc((size_t)flash.vocab * sizeof(float));
    REQUIRE(x);
    for (int i = 0; i < n; i++) {
        double sum = 0;
        CHECK_OK(engine_read_logits(engine, false, i, x));
        for (int v = 0; v < flash.vocab; v++)
            sum += fabs((double)x[v]);
        CHECK(isfinite(sum) && sum > 0);
    }
    free(x);
}

static void prefill(void)
{
    const int prompts[][2] = {{1, 256}, {32, 256}, {4, 2048}};
    for (int i = 0; i < 3; i++) {
        struct batch b = batch_of(prompts[i][0], prompts[i][1], prompts[i][1], false);
        double device_ms, ms = median_ms(&b, false, &device_ms);
        printf("prefill %3d x %4d: %8.2f ms, %8.0f tokens/s, host %.2f ms\n", prompts[i][0],
               prompts[i][1], ms, b.n_rows / ms * 1000, ms - device_ms);
        logits_are_finite(1);
    }
}

static void decode(void)
{
    const int sizes[] = {1, 8, 32, 64, 128, 256, 512};
    for (int i = 0; i < 7; i++) {
        struct batch b = batch_of(sizes[i], 1, CTX, true);
        double of_device, of_draft;
        double ms = median_ms(&b, false, &of_device), draft = median_ms(&b, true, &of_draft);
        printf(
            "decode batch %3d, context %d: %6.2f ms, %6.0f tokens/s, host %.2f ms; one draft %5.2f "
            "ms\n",
            sizes[i], CTX, ms, sizes[i] / ms * 1000, ms - of_device, draft);
        logits_are_finite(1);
    }
}

static void mtp(void)
{
    const int sizes[] = {1, 64, 256};
    for (int i = 0; i < 3; i++)
        for (int k = 1; k <= 4; k++)
            if (sizes[i] * (k + 1) <= MAX_LOGITS)
                mtp_step(sizes[i], k);
}

/* One pass of n_seqs x rows behind context ctx between the profiler's marks, after the runs that
 * make its graph. */
static void profiled_pass(int n_seqs, int rows, int ctx)
{
    struct batch b = batch_of(n_seqs, rows, ctx, rows < 16);
    for (int i = 0; i < 3; i++)
        CHECK_OK(engine_forward(engine, &b));
    CHECK(cudaProfilerStart() == cudaSuccess);
    CHECK_OK(engine_forward(engine, &b));
    CHECK(cudaProfilerStop() == cudaSuccess);
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    struct weights *weights = NULL;
    struct kv_pool *pool = NULL;
    uint64_t begin = clock_now_us();
    struct device *device = NULL;
    CHECK_OK(device_open("cuda:0", &device));
    REQUIRE(device);
    CHECK_OK(weights_open(&flash, &(struct weights_source){.dummy_seed = 1, .device = device},
                          &weights));
    REQUIRE(weights);
    struct kv_pool_config p = {.n_pages = N_PAGES,
                               .n_layers = 48,
                               .kv_width = KV_WIDTH,
                               .dtype_bytes = 2,
                               .device = device};
    struct engine_config e = {.device = device,
                              .n_threads = 1,
                              .max_rows = MAX_ROWS,
                              .max_seqs = MAX_SEQS,
                              .max_logits = MAX_LOGITS,
                              .max_imports = 1,
                              .max_ctx = MAX_CTX,
                              .max_graph_rows = 2048};
    CHECK_OK(kv_pool_create(&p, &pool));
    CHECK_OK(engine_create(&e, weights, pool, &engine));
    REQUIRE(engine);
    printf("%.1f GB of weights made in %.1f s\n", (double)weights->arena_bytes / 1e9,
           (double)(clock_now_us() - begin) / 1e6);

    const char *part = argc > 1 ? argv[1] : "";
    if (!strcmp(part, "pass") && argc == 5) {
        profiled_pass(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    } else {
        if (!*part || !strcmp(part, "prefill"))
            prefill();
        if (!*part || !strcmp(part, "decode"))
            decode();
        if (!*part || !strcmp(part, "mtp"))
            mtp();
        if (!*part || !strcmp(part, "long"))
            long_prompt(32768);
    }
    engine_destroy(engine);
    kv_pool_destroy(pool);
    weights_destroy(weights);
    device_destroy(device);
    return check_failures > 0;
}
