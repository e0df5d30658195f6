/* sample_cuda_test.c: draws on the GPU against sample_ref, over made-up rows of every kind. Ids
 * must be equal, all of them: the arithmetic is the same (sample_math.h). Skips (77) without a
 * device.
 *
 *   sample_cuda_test [percent of the usual number of rows]
 */
#include <cuda_runtime_api.h>
#include <float.h>

#include "check.h"
#include "data.h"
#include "common/base/own.h"
#include "kernels/cuda.h"

#define MAX_T   300
#define MAX_TOP CU_SAMPLE_MAX_TOP
#define N_BIAS  12
#define ARENA   (64u << 20) /* logits and what rows point to, the same layout on both sides */

#define CUDA(call) REQUIRE((call) == cudaSuccess)

static char *host_arena, *dev_arena;
static size_t arena_used;
static cudaStream_t stream;
static int percent = 100;
static struct par *par;

static void *take_bytes(size_t bytes)
{
    arena_used = (arena_used + 255) / 256 * 256;
    REQUIRE(arena_used + bytes <= ARENA);
    void *p = host_arena + arena_used;
    arena_used += bytes;
    return p;
}

static void *on_device(const void *host)
{
    return host ? dev_arena + ((const char *)host - host_arena) : NULL;
}

static void upload(void)
{
    CUDA(cudaMemcpyAsync(dev_arena, host_arena, arena_used, cudaMemcpyHostToDevice, stream));
    CUDA(cudaStreamSynchronize(stream));
}

static struct sample_row row_on_device(struct sample_row r)
{
    r.banned = on_device(r.banned);
    r.bias_id = on_device(r.bias_id);
    r.bias_value = on_device(r.bias_value);
    r.allowed = on_device(r.allowed);
    r.ahead = on_device(r.ahead);
    r.seen = on_device(r.seen);
    return r;
}

/* ---- made-up rows ---------------------------------------------------------------------------- */

/* Bell-shaped, as logits are; kinds add ties, bf16 steps, a clear winner, equal values, extremes.
 */
static void make_logits(float *x, int V)
{
    float spread = (float[]){0.1f, 2, 6, 40}[data_below(4)];
    int kind = data_below(8);
    for (int i = 0; i < V; i++) {
        x[i] = (data_float() + data_float() + data_float()) * spread;
        if (kind == 0)
            x[i] = roundf(x[i]);
        if (kind == 1) {
            uint32_t bits;
            memcpy(&bits, &x[i], 4);
            bits &= 0xffff0000u;
            memcpy(&x[i], &bits, 4);
        }
        if (kind == 2)
            x[i] = 1.25f;
    }
    if (kind == 3)
        x[data_below(V)] += 30;
    if (kind == 4) {
        const float extreme[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 0.0f, -0.0f};
        for (int i = 0; i < 7; i++)
            x[data_below(V)] = extreme[i];
    }
}

static struct sample_row make_row(int V)
{
    int32_t *banned = take_bytes(3 * 4), *bias_id = take_bytes(N_BIAS * 4),
            *ahead = take_bytes(3 * 4);
    float *bias_value = take_bytes(N_BIAS * 4);
    struct sample_row r = {
        .seed = (uint64_t)data_u32() << 32 | data_u32(),
        .position = data_below(200000),
        .temperature = (float[]){0, 0.01f, 0.3f, 0.7f, 1, 1, 1.7f, 5, 1e30f}[data_below(9)],
        .top_p = (float[]){1, 1, 1, 0.95f, 0.5f, 0.999f, 0, 0.3f}[data_below(8)],
        .min_p = data_below(3) ? 0 : 0.2f * fabsf(data_float()),
        .top_k = (int[]){0, 0, 0, 1, 2, 20, 50, 1000, 1 << 20}[data_below(9)],
        .repetition = 1,
        .banned = banned,
        .bias_id = bias_id,
        .bias_value = bias_value,
        .ahead = ahead,
        .n_logprobs = (int[]){-1, -1, 0, 1, 5, MAX_TOP}[data_below(6)],
    };
    for (int i = 0; i < 3; i++) {
        banned[i] = data_below(V + 2) - 1;
        ahead[i] = data_below(V);
    }
    for (int i = 0; i < N_BIAS; i++) {
        bias_id[i] = data_below(3) ? data_below(V) : data_below(V + 2) - 1;
        bias_value[i] = data_float() * 20;
    }
    if (data_below(2) == 0)
        r.n_banned = data_below(4);
    if (data_below(3) == 0) {
        r.n_bias = data_below(N_BIAS + 1);
        bias_id[1] = bias_id[0];
        bias_value[2] = -INFINITY;
    }
    if (data_below(4) == 0) {
        uint32_t *allowed = take_bytes((size_t)(V + 31) / 32 * 4);
        for (int i = 0; i < (V + 31) / 32; i++)
            allowed[i] = data_u32() & data_u32();
        r.allowed = allowed;
    }
    if (data_below(3) == 0) {
        struct sample_seen *seen = take_bytes((size_t)V * sizeof(*seen));
        int one_in = 1 + data_below(4);
        for (int i = V - 1; i >= 0; i--)
            if (data_below(one_in) == 0)
                seen[r.n_seen++] = (struct sample_seen){i, data_below(4)};
        r.seen = seen;
        r.n_ahead = data_below(4);
        r.presence = data_float();
        r.frequency = data_float();
        r.repetition = data_below(4) ? 1.0f + 0.5f * data_float() : 1;
    }
    return r;
}

/* ---- against the reference ------------------------------------------------------------------- */

struct result {
    int32_t id[MAX_T], top_id[MAX_T * MAX_TOP];
    float logprob[MAX_T], top_logprob[MAX_T * MAX_TOP];
};

static int n_rows, n_wrong_ids, n_wrong_tops;
static double worst_logprob;

static void describe(const struct sample_row *r, int V)
{
    fprintf(stderr,
            "  V %d T %g k %d p %g min_p %g presence %g frequency %g repetition %g bias %d "
            "banned %d seen %d ahead %d mask %d logprobs %d\n",
            V, (double)r->temperature, r->top_k, (double)r->top_p, (double)r->min_p,
            (double)r->presence, (double)r->frequency, (double)r->repetition, r->n_bias,
            r->n_banned, r->n_seen, r->n_ahead, r->allowed != NULL, r->n_logprobs);
}

static bool finite_pair(float a, float b) { return isfinite(a) && isfinite(b); }

static void compare_row(const struct sample_row *r, const struct result *got,
                        const struct result *want, int t, int V)
{
    n_rows++;
    if (got->id[t] != want->id[t]) {
        fprintf(stderr, "row %d: id %d, want %d\n", t, got->id[t], want->id[t]);
        describe(r, V);
        n_wrong_ids++;
        return;
    }
    if (finite_pair(got->logprob[t], want->logprob[t]))
        worst_logprob = fmax(worst_logprob, fabs((double)got->logprob[t] - want->logprob[t]));
    else if (isfinite(got->logprob[t]) != isfinite(want->logprob[t]))
        n_wrong_tops++;
    for (int i = 0; i < MAX_TOP && r->n_logprobs >= 0; i++) {
        int at = t * MAX_TOP + i;
        if (got->top_id[at] != want->top_id[at]) {
            fprintf(stderr, "row %d: alternative %d is %d, want %d\n", t, i, got->top_id[at],
                    want->top_id[at]);
            describe(r, V);
            n_wrong_tops++;
            return;
        }
        if (finite_pair(got->top_logprob[at], want->top_logprob[at]))
            worst_logprob =
                fmax(worst_logprob, fabs((double)got->top_logprob[at] - want->top_logprob[at]));
    }
}

/* T rows with logits in a shuffled order; the device may be told that only n_real are real. */
static void compare_batch(int T, int V, int n_valid, int n_real)
{
    static struct result got, want, untouched;
    static struct sample_row rows[MAX_T];
    static float *work;
    if (!work)
        work = data_alloc((int64_t)par_threads(par) * 2 * 160000, 4);
    arena_used = 0;
    float *logits = take_bytes((size_t)T * (size_t)V * 4);
    struct sample_row *dev_rows = take_bytes(sizeof(rows[0]) * (size_t)T);
    int32_t *which = take_bytes((size_t)T * 4), *real = take_bytes(4);
    struct result *result = take_bytes(sizeof(*result));
    *real = n_real;
    for (int t = 0; t < T; t++) {
        make_logits(logits + (int64_t)t * V, V);
        rows[t] = make_row(V);
        dev_rows[t] = row_on_device(rows[t]);
        which[t] = (t + 3) % T;
    }
    memset(&untouched, 0x5a, sizeof(untouched));
    *result = got = want = untouched;
    upload();
    struct result *dev = on_device(result);
    struct cu_sample_args a = {.logits = on_device(logits),
                               .logit_row = on_device(which),
                               .rows = on_device(dev_rows),
                               .n_rows_dev = n_real < T ? on_device(real) : NULL,
                               .id = dev->id,
                               .logprob = dev->logprob,
                               .top_id = dev->top_id,
                               .top_logprob = dev->top_logprob,
                               .T = T,
                               .V = V,
                               .n_valid = n_valid,
                               .max_top = MAX_TOP};
    CUDA(cu_sample(&a, stream));
    CUDA(cudaMemcpyAsync(&got, dev, sizeof(got), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
    for (int t = 0; t < n_real; t++) {
        sample_ref(&(struct sample_args){.logits = logits + (int64_t)which[t] * V,
                                         .rows = &rows[t],
                                         .id = &want.id[t],
                                         .logprob = &want.logprob[t],
                                         .top_id = &want.top_id[t * MAX_TOP],
                                         .top_logprob = &want.top_logprob[t * MAX_TOP],
                                         .work = work,
                                         .T = 1,
                                         .V = V,
                                         .n_valid = n_valid,
                                         .max_top = MAX_TOP},
                   par);
        compare_row(&rows[t], &got, &want, t, V);
    }
    for (int t = n_real; t < T; t++)
        CHECK_INT(got.id[t], untouched.id[t]);
}

static void draws_are_the_references(void)
{
    const struct {
        int V, T, rounds;
    } sizes[] = {{1, 4, 20},     {5, 40, 50},     {64, 40, 50},   {333, 40, 50},
                 {3072, 40, 60}, {20001, 20, 20}, {154880, 8, 80}};
    for (size_t s = 0; s < ARRAY_LEN(sizes); s++) {
        int rounds = (sizes[s].rounds * percent + 99) / 100, before = n_rows;
        if (percent < 100 && sizes[s].V > 4000)
            continue;
        n_wrong_ids = n_wrong_tops = 0;
        worst_logprob = 0;
        for (int i = 0; i < rounds; i++) {
            int V = sizes[s].V, T = 1 + data_below(sizes[s].T);
            compare_batch(T, V, V > 40 ? V - data_below(30) : V, i % 4 ? T : data_below(T + 1));
        }
        printf("V %6d: %5d rows, %d ids differ, %d alternatives differ, logprobs within %.2g\n",
               sizes[s].V, n_rows - before, n_wrong_ids, n_wrong_tops, worst_logprob);
        CHECK_INT(n_wrong_ids, 0);
        CHECK_INT(n_wrong_tops, 0);
        CHECK_NEAR(worst_logprob, 0, 1e-4);
    }
    CHECK(n_rows > 10 * percent);
}

/* ---- argmax ---------------------------------------------------------------------------------- */

static void greedy_is_argmax(void)
{
    const int sizes[][2] = {{1, 154880}, {8, 154880},  {64, 154880}, {65, 30001},
                            {130, 3072}, {257, 20480}, {300, 333},   {3, 1}};
    static int32_t got[MAX_T], sampled[MAX_T], want[MAX_T];
    int n = 0;
    for (size_t s = 0; s < ARRAY_LEN(sizes); s++) {
        int T = sizes[s][0], V = sizes[s][1], n_valid = V > 40 ? V - data_below(30) : V;
        if (percent < 100 && (int64_t)T * V > 200000)
            continue;
        arena_used = 0;
        float *logits = take_bytes((size_t)T * (size_t)V * 4);
        int32_t *ids = take_bytes(sizeof(got));
        for (int t = 0; t < T; t++)
            for (int i = 0; i < V; i++) // few values: many ties
                logits[(int64_t)t * V + i] =
                    t % 3 ? data_float() : (float)data_below(t % 2 ? 20 : 20000);
        upload();
        CUDA(cu_argmax(on_device(logits), on_device(ids), T, V, n_valid, stream));
        CUDA(cudaMemcpyAsync(got, on_device(ids), (size_t)T * 4, cudaMemcpyDeviceToHost, stream));
        struct cu_sample_args a = {.logits = on_device(logits),
                                   .id = on_device(ids),
                                   .T = T,
                                   .V = V,
                                   .n_valid = n_valid,
                                   .greedy = 1};
        CUDA(cu_sample(&a, stream));
        CUDA(cudaMemcpyAsync(sampled, on_device(ids), (size_t)T * 4, cudaMemcpyDeviceToHost,
                             stream));
        CUDA(cudaStreamSynchronize(stream));
        argmax_ref(
            &(struct argmax_args){.x = logits, .idx = want, .T = T, .n = V, .n_valid = n_valid});
        for (int t = 0; t < T; t++) {
            CHECK_INT(got[t], want[t]);
            CHECK_INT(sampled[t], want[t]);
            n++;
        }
    }
    printf("%d rows\n", n);
    CHECK(n > 300);
}

/* ---- graphs ---------------------------------------------------------------------------------- */

/* A captured draw reads its rows anew at every replay. */
static void graphs_replay_draws(void)
{
    enum { T = 6, V = 3072, N = 50 };
    static float work[2 * V];
    arena_used = 0;
    float *logits = take_bytes((size_t)T * V * 4);
    struct sample_row *rows = take_bytes(sizeof(*rows) * T);
    int32_t *id = take_bytes(T * 4), got[T], want;
    for (int t = 0; t < T; t++) {
        make_logits(logits + t * V, V);
        rows[t] = (struct sample_row){.seed = data_u32(),
                                      .temperature = 1.5f,
                                      .top_p = t % 2 ? 0.9f : 1,
                                      .top_k = t % 3 ? 0 : 30,
                                      .repetition = 1,
                                      .n_logprobs = -1};
    }
    upload();
    struct cu_sample_args a = {.logits = on_device(logits),
                               .rows = on_device(rows),
                               .id = on_device(id),
                               .T = T,
                               .V = V,
                               .n_valid = V};
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CUDA(cu_sample(&a, stream));
    CUDA(cu_sample(&a, stream)); // right behind one another, as kernels of a step are
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    int wrong = 0, n = percent < 100 ? 5 : N;
    for (int i = 0; i < n; i++) {
        for (int t = 0; t < T; t++)
            rows[t].position = i;
        upload();
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaMemcpyAsync(got, on_device(id), sizeof(got), cudaMemcpyDeviceToHost, stream));
        CUDA(cudaStreamSynchronize(stream));
        for (int t = 0; t < T; t++) {
            sample_ref(&(struct sample_args){.logits = logits + t * V,
                                             .rows = &rows[t],
                                             .id = &want,
                                             .work = work,
                                             .T = 1,
                                             .V = V,
                                             .n_valid = V},
                       NULL);
            wrong += got[t] != want;
        }
    }
    printf("%d draws\n", n * T);
    CHECK_INT(wrong, 0);
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
}

static void shapes_are_checked(void)
{
    struct cu_sample_args a = {.T = 1, .V = 100, .n_valid = 101};
    CHECK_INT(cu_sample(&a, stream), cudaErrorInvalidValue);
    a.n_valid = 0;
    CHECK_INT(cu_sample(&a, stream), cudaErrorInvalidValue);
    a.n_valid = 100;
    a.max_top = CU_SAMPLE_MAX_TOP + 1;
    CHECK_INT(cu_sample(&a, stream), cudaErrorInvalidValue);
    a.max_top = 0;
    a.V = a.n_valid = (1 << 19) + 1;
    CHECK_INT(cu_sample(&a, stream), cudaErrorInvalidValue);
    a.T = 0;
    a.V = a.n_valid = 100;
    CHECK_INT(cu_sample(&a, stream), cudaSuccess);
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    percent = argc > 1 ? atoi(argv[1]) : 100;
    par = par_create(1);
    host_arena = data_alloc(ARENA, 1);
    CUDA(cudaMalloc((void **)&dev_arena, ARENA));
    CUDA(cudaStreamCreate(&stream));
    RUN(shapes_are_checked);
    RUN(draws_are_the_references);
    RUN(greedy_is_argmax);
    RUN(graphs_replay_draws);
    cudaFree(dev_arena);
    free(host_arena);
    par_destroy(par);
    return check_done();
}
