/* sample_cuda_test.c: draws on the GPU against the reference, id by id. Skips (77) without a GPU.
 */
#include <cuda_runtime_api.h>

#include "check.h"
#include "kernels/cuda.h"
#include "kernels/kernels.h"
#include "kernels/par.h"

enum { V = 154880, N_VALID = 154856, N = 96, TOP = 20, ROUNDS = 24 };

static uint64_t state = 1;
static double uniform(void) // in [0, 1)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}

static float *logits;
static struct sample_row rows[N];
static int32_t banned[CU_SAMPLE_BANNED];

/* Peaked, flat, coarse (many equal values), and one with few distinct large ones. */
static void fill_row(float *x, int kind)
{
    double width = kind == 0 ? 2.5 : kind == 1 ? 0.01 : kind == 2 ? 3 : 1;
    for (int i = 0; i < V; i++) {
        double g = (uniform() + uniform() + uniform() + uniform() - 2) * width * 1.7;
        x[i] = (float)(kind == 2 ? floor(g * 4) / 4 : g);
    }
    if (kind == 3)
        for (int i = 0; i < 40; i++)
            x[(int)(uniform() * N_VALID)] = (float)(8 + uniform() * 6);
}

static void make(int round)
{
    for (int i = 0; i < CU_SAMPLE_BANNED; i++)
        banned[i] = (int32_t)(uniform() * N_VALID);
    for (int i = 0; i < N; i++) {
        fill_row(logits + (size_t)i * V, (i + round) % 4);
        rows[i] = (struct sample_row){
            .seed = (uint64_t)(uniform() * 0x1p60),
            .position = (int32_t)(uniform() * 100000),
            .temperature = i % 7 == 0 ? 0 : (float)(0.2 + uniform() * 1.3),
            .top_p = i % 3 ? 1 : (float)uniform(),
            .min_p = i % 5 ? 0 : (float)(uniform() * 0.2),
            .repetition = 1,
            .top_k = i % 4 ? 0 : 1 + (int)(uniform() * (i % 8 ? 50 : 5000)),
            .n_banned = i % 6 ? 0 : (int)(uniform() * CU_SAMPLE_BANNED),
            .banned = banned,
            .n_logprobs = i % 9 ? -1 : (int)(uniform() * (TOP + 1)),
        };
        if (i % 6 == 0) // the favourite, so that a ban matters
            for (int v = 0, best = 0; v < N_VALID; v++)
                if (logits[(size_t)i * V + v] > logits[(size_t)i * V + best])
                    banned[0] = best = v;
    }
}

static struct {
    float *logits, *logprob, *top_logprob;
    struct cu_sample_row *rows;
    int32_t *id, *top_id;
} d;

static int32_t id[N], want_id[N], top_id[N * TOP], want_top_id[N * TOP];
static float logprob[N], want_logprob[N], top_logprob[N * TOP], want_top_logprob[N * TOP];

static void draw_both(struct par *par, float *work)
{
    static struct cu_sample_row r[N];
    for (int i = 0; i < N; i++) {
        r[i] = (struct cu_sample_row){
            .seed = rows[i].seed,
            .logits_row = i,
            .position = rows[i].position,
            .temperature = rows[i].temperature,
            .top_p = rows[i].top_p,
            .least = rows[i].min_p > 0 ? logf(rows[i].min_p) : -INFINITY,
            .top_k = rows[i].top_k,
            .n_logprobs = rows[i].n_logprobs,
            .n_banned = rows[i].n_banned,
        };
        memcpy(r[i].banned, rows[i].banned, sizeof(int32_t) * (size_t)rows[i].n_banned);
    }
    struct cu_sample_args a = {d.logits,      d.rows, d.id, d.logprob, d.top_id,
                               d.top_logprob, N,      V,    N_VALID,   TOP};
    size_t bytes = sizeof(float) * N * V;
    REQUIRE(!cudaMemcpy(d.logits, logits, bytes, cudaMemcpyHostToDevice));
    REQUIRE(!cudaMemcpy(d.rows, r, sizeof(r), cudaMemcpyHostToDevice));
    REQUIRE(!cu_sample(&a, 0));
    REQUIRE(!cudaMemcpy(id, d.id, sizeof(id), cudaMemcpyDeviceToHost));
    REQUIRE(!cudaMemcpy(logprob, d.logprob, sizeof(logprob), cudaMemcpyDeviceToHost));
    REQUIRE(!cudaMemcpy(top_id, d.top_id, sizeof(top_id), cudaMemcpyDeviceToHost));
    REQUIRE(!cudaMemcpy(top_logprob, d.top_logprob, sizeof(top_logprob), cudaMemcpyDeviceToHost));
    sample_ref(&(struct sample_args){.logits = logits,
                                     .rows = rows,
                                     .id = want_id,
                                     .logprob = want_logprob,
                                     .top_id = want_top_id,
                                     .top_logprob = want_top_logprob,
                                     .work = work,
                                     .T = N,
                                     .V = V,
                                     .n_valid = N_VALID,
                                     .max_top = TOP},
               par);
}

static void ids_are_the_references(void)
{
    struct par *par = par_create(0);
    float *work = malloc((size_t)par_threads(par) * 2 * V * sizeof(float));
    REQUIRE(par && work);
    int n_left = 0;
    double worst = 0;
    for (int round = 0; round < ROUNDS; round++) {
        make(round);
        draw_both(par, work);
        for (int i = 0; i < N; i++) {
            if (id[i] < 0) { // left to the host
                n_left++;
                continue;
            }
            CHECK_INT(id[i], want_id[i]);
            if (rows[i].n_logprobs < 0)
                continue;
            worst = fmax(worst, fabs((double)logprob[i] - (double)want_logprob[i]));
            for (int t = 0; t < rows[i].n_logprobs; t++) {
                CHECK_INT(top_id[i * TOP + t], want_top_id[i * TOP + t]);
                worst = fmax(worst, fabs((double)top_logprob[i * TOP + t] -
                                         (double)want_top_logprob[i * TOP + t]));
            }
        }
    }
    printf("%d rows, %d left to the host, logprobs differ by at most %.1e\n", ROUNDS * N, n_left,
           worst);
    CHECK(worst < 1e-4);
    CHECK(n_left < ROUNDS * N / 4);
    free(work);
    par_destroy(par);
}

static void it_is_fast(void)
{
    cudaEvent_t from, to;
    REQUIRE(!cudaEventCreate(&from) && !cudaEventCreate(&to));
    static struct cu_sample_row r[N];
    for (int kind = 0; kind < 4; kind++) {
        for (int i = 0; i < N; i++)
            r[i] = (struct cu_sample_row){.seed = 5,
                                          .logits_row = i,
                                          .position = i,
                                          .temperature = kind ? 1 : 0,
                                          .top_p = kind == 2 ? 0.9f : 1,
                                          .least = -INFINITY,
                                          .top_k = kind == 3 ? 50 : 0,
                                          .n_logprobs = -1};
        REQUIRE(!cudaMemcpy(d.rows, r, sizeof(r), cudaMemcpyHostToDevice));
        struct cu_sample_args a = {d.logits,      d.rows, d.id, d.logprob, d.top_id,
                                   d.top_logprob, N,      V,    N_VALID,   TOP};
        for (int n = 1; n <= N; n += N - 1) {
            a.n = n;
            for (int i = 0; i < 12; i++) {
                if (i == 2)
                    cudaEventRecord(from, 0);
                REQUIRE(!cu_sample(&a, 0));
            }
            cudaEventRecord(to, 0);
            float ms = 0;
            REQUIRE(!cudaEventSynchronize(to) && !cudaEventElapsedTime(&ms, from, to));
            static const char *const names[] = {"greedy", "temperature", "top_p", "top_k"};
            printf("%3d rows, %-11s %7.1f us\n", n, names[kind], (double)ms * 100);
        }
    }
}

int main(void)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    logits = malloc(sizeof(float) * N * V);
    REQUIRE(logits && !cudaMalloc((void **)&d.logits, sizeof(float) * N * V));
    REQUIRE(!cudaMalloc((void **)&d.rows, N * sizeof(struct cu_sample_row)));
    REQUIRE(!cudaMalloc((void **)&d.id, N * 4) && !cudaMalloc((void **)&d.logprob, N * 4));
    REQUIRE(!cudaMalloc((void **)&d.top_id, N * TOP * 4));
    REQUIRE(!cudaMalloc((void **)&d.top_logprob, N * TOP * 4));
    RUN(ids_are_the_references);
    RUN(it_is_fast);
    free(logits);
    return check_done();
}
