/* kernels_bench.c: the CUDA kernels at GLM-4.7-Flash's real shapes: are they right, how fast are
 * they.
 *
 * Random data throughout (zeros run faster than real data). Experts: two layers' weights (2.4 GB)
 * in turn, so that L2 serves nothing; a few slots are compared with fp32 sums on the host.
 * Attention: the pages of every layer in turn. Times are medians of 20 event-timed runs of the loop
 * below.
 *
 * Draws: bell-shaped logits. Small operations: as they stand in a decode pass, many in one graph.
 *
 *   kernels_bench [moe] [decode] [prefill] [sample] [small]      no argument: all
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda.h"
#include "tests/bench/cuda/bench_data.h"

enum { H = 2048, F = 1536, E = 64, K = 4, HEADS = 20, LAYERS = 48, N_RUNS = 20 };
#define BLOCK (1u << 22) /* values of the random block that everything is filled with */

static uint16_t *block;
static cudaStream_t stream;
static int failures;

static float uniform(void) { return (float)random_u32() / 2147483648.f - 1.f; }

/* n values in [-scale, scale) (scale a power of two: only exponents change). The block's phase
 * differs from array to array. */
static uint16_t *filled(size_t n, float scale)
{
    uint16_t *p, *scaled = malloc(BLOCK * 2);
    CHECK(cudaMalloc((void **)&p, n * 2));
    for (size_t i = 0; i < BLOCK; i++)
        scaled[i] = to_bf16(from_bf16(block[i]) * scale);
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

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of fn(arg, run). */
static float time_us(void (*fn)(void *arg, int run), void *arg)
{
    float us[N_RUNS];
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 3; i++)
        fn(arg, i);
    for (int i = 0; i < N_RUNS; i++) {
        CHECK(cudaEventRecord(begin, stream));
        fn(arg, i);
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&us[i], begin, end));
        us[i] *= 1000;
    }
    qsort(us, N_RUNS, sizeof(us[0]), by_value);
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return us[N_RUNS / 2];
}

/* ---- experts --------------------------------------------------------------------------------- */

struct moe {
    struct cu_route_args route;
    struct cu_moe_args args[2];
    struct cu_moe_reduce_args reduce;
};

static void run_route(void *arg, int run)
{
    (void)run;
    CHECK(cu_route(&((struct moe *)arg)->route, stream));
}
static void run_gate_up(void *arg, int run)
{
    CHECK(cu_moe_gate_up(&((struct moe *)arg)->args[run & 1], stream));
}
static void run_down(void *arg, int run)
{
    CHECK(cu_moe_down(&((struct moe *)arg)->args[run & 1], stream));
}
static void run_reduce(void *arg, int run)
{
    (void)run;
    CHECK(cu_moe_reduce(&((struct moe *)arg)->reduce, stream));
}

static float *host_floats(const uint16_t *dev, size_t n)
{
    uint16_t *bits = malloc(n * 2);
    float *f = malloc(n * 4);
    CHECK(cudaMemcpy(bits, dev, n * 2, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++)
        f[i] = from_bf16(bits[i]);
    free(bits);
    return f;
}

/* Relative error of some slots' h and y against fp32 sums. NaN counts as infinite. */
static void moe_check(const struct cu_moe_args *a, double *ret_h, double *ret_y)
{
    int slots = a->T * (K + 1), start[E + 2];
    int32_t *token = malloc((size_t)slots * 4);
    CHECK(cudaMemcpy(start, a->expert_start, sizeof(start), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(token, a->slot_token, (size_t)slots * 4, cudaMemcpyDeviceToHost));
    double num_h = 0, den_h = 0, num_y = 0, den_y = 0;
    for (int n = 0; n < 6; n++) {
        int slot = n == 0 ? 0 : n == 1 ? slots - 1 : (int)(random_u32() % (uint32_t)slots), e = 0;
        while (slot >= start[e + 1])
            e++;
        float *x = host_floats(a->x + (size_t)token[slot] * H, H);
        float *gate = host_floats(a->gate + (size_t)e * F * H, (size_t)F * H);
        float *up = host_floats(a->up + (size_t)e * F * H, (size_t)F * H);
        float *down = host_floats(a->down + (size_t)e * F * H, (size_t)F * H);
        float *h = host_floats(a->h + (size_t)slot * F, F),
              *y = host_floats(a->y + (size_t)slot * H, H);
        for (int f = 0; f < F; f++) {
            double g = 0, u = 0;
            for (int i = 0; i < H; i++) {
                g += (double)gate[(size_t)f * H + i] * x[i];
                u += (double)up[(size_t)f * H + i] * x[i];
            }
            double want = g / (1 + exp(-g)) * u;
            num_h += (h[f] - want) * (h[f] - want);
            den_h += want * want;
        }
        for (int o = 0; o < H; o++) {
            double want = 0;
            for (int f = 0; f < F; f++)
                want += (double)down[(size_t)o * F + f] * h[f];
            num_y += (y[o] - want) * (y[o] - want);
            den_y += want * want;
        }
        float *all[] = {x, gate, up, down, h, y};
        for (int i = 0; i < 6; i++)
            free(all[i]);
    }
    free(token);
    *ret_h = sqrt(num_h / den_h);
    *ret_y = sqrt(num_y / den_y);
    if (!(*ret_h < 1e-2 && *ret_y < 1e-2))
        failures++;
}

static void bench_moe(void)
{
    const int sizes[] = {1, 8, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 2048, 8192},
              most = 8192;
    size_t slots = (size_t)most * (K + 1), w = (size_t)(E + 1) * F * H;
    struct moe m = {0};
    uint16_t *x = filled((size_t)most * H, 1), *router = filled((size_t)E * H, 1.f / 32);
    float *bias = device(E * 4);
    CHECK(cudaMemset(bias, 0, E * 4));
    m.route = (struct cu_route_args){.x = x,
                                     .router = router,
                                     .bias = bias,
                                     .slot_token = device(slots * 4),
                                     .slot_weight = device(slots * 4),
                                     .token_slot = device(slots * 4),
                                     .expert_start = device((E + 2) * 4),
                                     .work = device(cu_route_work_bytes(most, E, K)),
                                     .H = H,
                                     .E = E,
                                     .k = K,
                                     .scale = 1.8f};
    CHECK(cudaMemset(m.route.work, 0, cu_route_work_bytes(most, E, K)));
    uint16_t *h = device(slots * F * 2), *y = device(slots * H * 2);
    int32_t *work = device(cu_moe_work_bytes(most, E, K));
    CHECK(cudaMemset(work, 0, cu_moe_work_bytes(most, E, K)));
    for (int i = 0; i < 2; i++)
        m.args[i] = (struct cu_moe_args){.x = x,
                                         .gate = filled(w, 1.f / 32),
                                         .up = filled(w, 1.f / 32),
                                         .down = filled(w, 1.f / 32),
                                         .slot_token = m.route.slot_token,
                                         .expert_start = m.route.expert_start,
                                         .h = h,
                                         .y = y,
                                         .work = work,
                                         .H = H,
                                         .F = F,
                                         .E = E,
                                         .k = K};
    float *residual = device((size_t)most * H * 4);
    CHECK(cudaMemset(residual, 0, (size_t)most * H * 4));
    m.reduce = (struct cu_moe_reduce_args){.y = y,
                                           .token_slot = m.route.token_slot,
                                           .slot_weight = m.route.slot_weight,
                                           .residual = residual,
                                           .norm = router,
                                           .out = device((size_t)most * H * 2),
                                           .H = H,
                                           .k = K,
                                           .eps = 1e-5f};
    printf("experts: us (GB/s of weights that are hit; TFLOP/s), relative error\n");
    printf("%6s %9s %9s %26s %26s %8s  %s\n", "tokens", "hit", "route", "gate_up", "down", "reduce",
           "error h, y");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        int T = sizes[i], start[E + 2], hit = 0;
        m.route.T = m.args[0].T = m.args[1].T = m.reduce.T = T;
        float route = time_us(run_route, &m);
        CHECK(cudaMemcpy(start, m.route.expert_start, sizeof(start), cudaMemcpyDeviceToHost));
        if (start[E + 1] != T * (K + 1)) {
            printf("%6d route made %d slots\n", T, start[E + 1]);
            failures++;
            continue;
        }
        for (int e = 0; e <= E; e++)
            hit += start[e + 1] > start[e];
        float gate_up = time_us(run_gate_up, &m), down = time_us(run_down, &m);
        run_gate_up(&m, 0);
        run_down(&m, 0);
        float reduce = time_us(run_reduce, &m);
        CHECK(cudaStreamSynchronize(stream));
        double eh, ey, one = (double)F * H, rows = (double)T * (K + 1);
        moe_check(&m.args[0], &eh, &ey);
        printf("%6d %9d %9.1f %9.1f (%6.0f; %6.1f) %9.1f (%6.0f; %6.1f) %8.1f  %.1e %.1e\n", T, hit,
               route, gate_up, hit * 2 * one * 2 / gate_up / 1e3, rows * 4 * one / gate_up / 1e6,
               down, hit * one * 2 / down / 1e3, rows * 2 * one / down / 1e6, reduce, eh, ey);
    }
}

/* ---- decode attention ------------------------------------------------------------------------ */

static void run_decode(void *arg, int run)
{
    struct cu_mla_decode_args a = *(struct cu_mla_decode_args *)arg;
    a.layer = run % a.n_layers;
    CHECK(cu_mla_decode(&a, stream));
}

static void bench_decode(void)
{
    const struct {
        int S, q_rows, ctx;
    } cases[] = {{1, 1, 512},   {1, 1, 4096},  {8, 1, 4096},  {64, 1, 512}, {64, 3, 512},
                 {64, 1, 4096}, {64, 3, 4096}, {256, 1, 512}, {256, 3, 512}};
    printf("decode attention, %d heads: us (GB/s of pages)\n", HEADS);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int S = cases[i].S, ctx = cases[i].ctx, pages = (ctx + 63) / 64, layers = 8;
        struct cu_mla_decode_args a = {
            .q = filled((size_t)S * (size_t)cases[i].q_rows * HEADS * 576, 1),
            .pool = filled((size_t)S * (size_t)(pages * layers) * 64 * 576, 1),
            .S = S,
            .q_rows = cases[i].q_rows,
            .heads = HEADS,
            .n_pages = S * pages,
            .n_layers = layers,
            .max_pages = pages,
            .max_ctx = ctx,
            .scale = 1.f / 16};
        size_t work = cu_mla_decode_work_bytes(S, a.q_rows, HEADS, ctx);
        int32_t *table = malloc((size_t)(S * pages) * 4), *n_ctx = malloc((size_t)S * 4), *d;
        for (int p = 0; p < S * pages; p++)
            table[p] = p;
        for (int p = S * pages - 1; p > 0; p--) {
            int o = (int)(random_u32() % (uint32_t)(p + 1)), t = table[p];
            table[p] = table[o];
            table[o] = t;
        }
        for (int s = 0; s < S; s++)
            n_ctx[s] = ctx;
        d = device((size_t)(S * pages + S) * 4);
        CHECK(cudaMemcpy(d, table, (size_t)(S * pages) * 4, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(d + S * pages, n_ctx, (size_t)S * 4, cudaMemcpyHostToDevice));
        a.block_table = d;
        a.n_ctx = d + S * pages;
        a.out = device((size_t)S * (size_t)a.q_rows * HEADS * 512 * 2);
        a.work = device(work);
        CHECK(cudaMemset(a.work, 0, work));
        float us = time_us(run_decode, &a);
        printf("%4d sequences x %d rows, context %5d: %8.1f (%5.0f)\n", S, a.q_rows, ctx, us,
               (double)S * ctx * 1152 / us / 1e3);
        CHECK(cudaFree((void *)a.q));
        CHECK(cudaFree((void *)a.pool));
        CHECK(cudaFree(d));
        CHECK(cudaFree(a.out));
        CHECK(cudaFree(a.work));
        free(table);
        free(n_ctx);
    }
}

/* ---- prefill attention ----------------------------------------------------------------------- */

static void run_prefill(void *arg, int run)
{
    (void)run;
    CHECK(cu_mla_prefill(arg, stream));
}

static void bench_prefill(void)
{
    const int lengths[][2] = {{32, 256}, {4, 2048}, {1, 8192}};
    printf("prefill attention, %d heads: us (TFLOP/s, causal)\n", HEADS);
    for (int i = 0; i < 3; i++) {
        int S = lengths[i][0], n = lengths[i][1], T = S * n, start[33];
        for (int s = 0; s <= S; s++)
            start[s] = s * n;
        int32_t *d = device(sizeof(start));
        CHECK(cudaMemcpy(d, start, sizeof(start), cudaMemcpyHostToDevice));
        size_t size = (size_t)T * HEADS * 256;
        float *turn = device((size_t)T * 64 * 4);
        CHECK(cudaMemset(turn, 0, (size_t)T * 64 * 4)); // any angle costs the same
        struct cu_mla_prefill_args a = {.q = filled(size, 1),
                                        .turn = turn,
                                        .kv = filled((size_t)T * HEADS * 448, 1),
                                        .k_rope = filled((size_t)T * 64, 1),
                                        .q_start = d,
                                        .kv_start = d,
                                        .out = device(size * 2),
                                        .S = S,
                                        .T = T,
                                        .heads = HEADS,
                                        .max_q = n,
                                        .scale = 1.f / 16};
        float us = time_us(run_prefill, &a);
        double flop = (double)S * HEADS * n * (n + 1) / 2 * 256 * 4;
        printf("%4d x %5d: %9.1f (%6.1f)\n", S, n, us, flop / us / 1e6);
        CHECK(cudaFree((void *)a.q));
        CHECK(cudaFree((void *)a.kv));
        CHECK(cudaFree((void *)a.k_rope));
        CHECK(cudaFree(turn));
        CHECK(cudaFree(a.out));
        CHECK(cudaFree(d));
    }
}

/* ---- draws ----------------------------------------------------------------------------------- */

enum { VOCAB = 154880, N_IDS = 154856 };

static void run_argmax(void *arg, int run)
{
    (void)run;
    struct cu_sample_args *a = arg;
    CHECK(cu_argmax(a->logits, a->id, a->T, a->V, a->n_valid, stream));
}

static void run_sample(void *arg, int run)
{
    (void)run;
    CHECK(cu_sample(arg, stream));
}

/* Sums of uniform values, standard deviation about 3: the best of a row stands out by a few units.
 */
static float *bell_logits(size_t n)
{
    enum { CHUNK = 1 << 20 };
    float *d = device(n * 4), *chunk = malloc(CHUNK * 4);
    for (size_t i = 0; i < CHUNK; i++)
        chunk[i] = (uniform() + uniform() + uniform() + uniform()) * 2.6f;
    for (size_t at = 0; at < n;) {
        size_t from = random_u32() % (CHUNK / 2), m = CHUNK - from < n - at ? CHUNK - from : n - at;
        CHECK(cudaMemcpy(d + at, chunk + from, m * 4, cudaMemcpyHostToDevice));
        at += m;
    }
    free(chunk);
    return d;
}

static void bench_sample(void)
{
    enum { MOST = 512, SEEN = 1000 };
    const int sizes[] = {1, 8, 64, 256, 512};
    const struct {
        const char *name;
        struct sample_row row;
        int greedy, penalties;
    } kinds[] = {
        {"greedy, all rows", {.n_logprobs = -1}, 1, 0},
        {"greedy row", {.n_logprobs = -1}, 0, 0},
        {"temperature 1", {.temperature = 1, .top_p = 1, .n_logprobs = -1}, 0, 0},
        {"top-p 0.95", {.temperature = 1, .top_p = 0.95f, .n_logprobs = -1}, 0, 0},
        {"top-k 50, top-p 0.95",
         {.temperature = 1, .top_p = 0.95f, .top_k = 50, .n_logprobs = -1},
         0,
         0},
        {"min-p 0.05", {.temperature = 1, .top_p = 1, .min_p = 0.05f, .n_logprobs = -1}, 0, 0},
        {"penalties, 1000 ids",
         {.temperature = 1, .top_p = 1, .presence = 0.5f, .repetition = 1.1f, .n_logprobs = -1},
         0,
         1},
        {"logprobs 5", {.temperature = 1, .top_p = 1, .n_logprobs = 5}, 0, 0},
    };
    static struct sample_row rows[MOST];
    struct cu_sample_args a = {.logits = bell_logits((size_t)MOST * VOCAB),
                               .id = device(MOST * 4),
                               .logprob = device(MOST * 4),
                               .top_id = device(MOST * CU_SAMPLE_MAX_TOP * 4),
                               .top_logprob = device(MOST * CU_SAMPLE_MAX_TOP * 4),
                               .V = VOCAB,
                               .n_valid = N_IDS,
                               .max_top = CU_SAMPLE_MAX_TOP};
    struct sample_row *dev_rows = device(sizeof(rows));
    struct sample_seen seen[SEEN], *dev_seen = device(sizeof(seen));
    for (int i = 0; i < SEEN; i++)
        seen[i] = (struct sample_seen){i * (N_IDS / SEEN), i % 4};
    CHECK(cudaMemcpy(dev_seen, seen, sizeof(seen), cudaMemcpyHostToDevice));
    a.rows = dev_rows;
    printf("draws of %d ids: us (GB/s of logits) by rows\n%-22s", N_IDS, "");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        printf(" %14d", sizes[i]);
    for (int k = -1; k < (int)(sizeof(kinds) / sizeof(kinds[0])); k++) {
        printf("\n%-22s", k < 0 ? "argmax" : kinds[k].name);
        for (int t = 0; t < MOST && k >= 0; t++) {
            rows[t] = kinds[k].row;
            rows[t].seed = (uint64_t)t;
            rows[t].position = t;
            rows[t].seen = dev_seen;
            rows[t].n_seen = kinds[k].penalties ? SEEN : 0;
        }
        a.greedy = k >= 0 && kinds[k].greedy;
        CHECK(cudaMemcpy(dev_rows, rows, sizeof(rows), cudaMemcpyHostToDevice));
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            a.T = sizes[i];
            float us = time_us(k < 0 ? run_argmax : run_sample, &a);
            printf(" %7.1f (%4.0f)", us, (double)a.T * VOCAB * 4 / us / 1e3);
        }
    }
    printf("\n");
    void *all[] = {(void *)a.logits, a.id, a.logprob, a.top_id, a.top_logprob, dev_rows, dev_seen};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        CHECK(cudaFree(all[i]));
}

/* ---- small operations ------------------------------------------------------------------------ */

struct small {
    struct cu_add_norm_args add;
    struct cu_qkv_args qkv;
    struct cu_rope_q_args rope;
    struct cu_route_args route[2];
    struct cu_moe_reduce_args reduce;
};

static void run_add(void *arg, int run)
{
    (void)run;
    CHECK(cu_add_norm(&((struct small *)arg)->add, stream));
}
static void run_qkv(void *arg, int run)
{
    (void)run;
    CHECK(cu_qkv_norm_write(&((struct small *)arg)->qkv, stream));
}
static void run_rope(void *arg, int run)
{
    (void)run;
    CHECK(cu_rope_q(&((struct small *)arg)->rope, stream));
}
static void run_small_route(void *arg, int run)
{
    CHECK(cu_route(&((struct small *)arg)->route[run & 1], stream));
}
static void run_small_reduce(void *arg, int run)
{
    (void)run;
    CHECK(cu_moe_reduce(&((struct small *)arg)->reduce, stream));
}
static void run_layer(void *arg, int run)
{
    run_qkv(arg, run);
    run_rope(arg, run);
    run_add(arg, run);
    run_small_route(arg, run);
    run_small_reduce(arg, run);
}

/* Microseconds of one of many calls of fn in a graph, the gaps between them included. */
static float graph_us(void (*fn)(void *arg, int run), void *arg)
{
    enum { CALLS = 40 };
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float us[N_RUNS];
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < CALLS; i++)
        fn(arg, i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphLaunch(exec, stream));
    for (int i = 0; i < N_RUNS; i++) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&us[i], begin, end));
        us[i] *= 1000.f / CALLS;
    }
    qsort(us, N_RUNS, sizeof(us[0]), by_value);
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return us[N_RUNS / 2];
}

static float *zeros(size_t n)
{
    float *p = device(n * 4);
    CHECK(cudaMemset(p, 0, n * 4));
    return p;
}

static void bench_small(void)
{
    enum { MOST = 512, LORA = 768 };
    const int sizes[] = {1, 8, 16, 64, 128, 256, 512};
    struct small s = {0};
    int32_t *token_slot = device(MOST * (K + 1) * 4), *at = (int32_t *)zeros(MOST);
    float *slot_weight = device(MOST * (K + 1) * 4), *residual = zeros((size_t)MOST * H);
    uint16_t *norm = filled(8192, 1), *out = device((size_t)MOST * H * 2);
    s.add = (struct cu_add_norm_args){.residual = residual,
                                      .delta = zeros((size_t)MOST * H),
                                      .w = norm,
                                      .out = out,
                                      .H = H,
                                      .eps = 1e-5f};
    s.qkv = (struct cu_qkv_args){.qkv = filled((size_t)MOST * (LORA + 576), 1),
                                 .q_norm = norm,
                                 .kv_norm = norm,
                                 .position = at,
                                 .slot_page = at,
                                 .slot_row = at,
                                 .q_a = device((size_t)MOST * LORA * 2),
                                 .pool = device(64 * 576 * 2),
                                 .q_lora = LORA,
                                 .n_layers = 1,
                                 .eps = 1e-5f,
                                 .theta = 1e6f};
    s.rope = (struct cu_rope_q_args){.q = filled((size_t)MOST * HEADS * 256, 1),
                                     .absorbed = device((size_t)MOST * HEADS * 576 * 2),
                                     .position = at,
                                     .heads = HEADS,
                                     .theta = 1e6f};
    size_t work = cu_route_work_bytes(MOST, E, K);
    for (int i = 0; i < 2; i++)
        s.route[i] = (struct cu_route_args){.x = filled((size_t)MOST * H, 1),
                                            .router = filled((size_t)E * H, 1.f / 32),
                                            .bias = zeros(E),
                                            .slot_token = device(MOST * (K + 1) * 4),
                                            .slot_weight = slot_weight,
                                            .token_slot = token_slot,
                                            .expert_start = device((E + 2) * 4),
                                            .work = (int32_t *)zeros(work / 4 + 1),
                                            .H = H,
                                            .E = E,
                                            .k = K,
                                            .scale = 1.8f};
    s.reduce = (struct cu_moe_reduce_args){.y = filled((size_t)MOST * (K + 1) * H, 1.f / 1024),
                                           .token_slot = token_slot,
                                           .slot_weight = slot_weight,
                                           .residual = residual,
                                           .norm = norm,
                                           .out = out,
                                           .H = H,
                                           .k = K,
                                           .eps = 1e-5f};
    printf("small operations in a graph: us each, and the five of a layer behind one another\n");
    printf("%6s %9s %9s %9s %9s %9s %9s\n", "rows", "qkv", "rope_q", "add_norm", "route", "reduce",
           "five");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        int T = sizes[i];
        s.add.T = s.qkv.T = s.rope.T = s.route[0].T = s.route[1].T = s.reduce.T = T;
        run_small_route(&s, 0); // places for reduce
        printf("%6d %9.2f %9.2f %9.2f %9.2f %9.2f %9.2f\n", T, graph_us(run_qkv, &s),
               graph_us(run_rope, &s), graph_us(run_add, &s), graph_us(run_small_route, &s),
               graph_us(run_small_reduce, &s), graph_us(run_layer, &s));
    }
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
        block[i] = to_bf16(uniform());
    CHECK(cudaStreamCreate(&stream));
    const struct {
        const char *name;
        void (*run)(void);
    } parts[] = {{"moe", bench_moe},
                 {"decode", bench_decode},
                 {"prefill", bench_prefill},
                 {"sample", bench_sample},
                 {"small", bench_small}};
    for (size_t p = 0; p < sizeof(parts) / sizeof(parts[0]); p++) {
        int wanted = argc < 2;
        for (int i = 1; i < argc; i++)
            wanted |= !strcmp(argv[i], parts[p].name);
        if (wanted)
            parts[p].run();
    }
    return failures > 0;
}
