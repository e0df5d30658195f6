/* route_cuda_test.c: routing on the GPU against route_ref, and the sorted lists against their
 * definition. Operands are small multiples of powers of two, so that logits are exact on both
 * sides. Skips (77) without a device.
 *
 *   route_cuda_test [most tokens]
 */
#include <cuda_runtime_api.h>

#include "check.h"
#include "common/base/own.h"
#include "data.h"
#include "kernels/cuda.h"

#define MAX_T 8192
#define MAX_H 2080
#define MAX_E 64
#define MAX_K 8

#define CUDA(call) REQUIRE((call) == cudaSuccess)

static cudaStream_t stream;
static int most_tokens = MAX_T;
static bf16_t *x, *router;
static float *bias, *logits;

/* Results of cu_route on the host, and its arrays on the device. */
struct lists {
    int32_t token[MAX_T * (MAX_K + 1)], token_slot[MAX_T * (MAX_K + 1)], start[MAX_E + 2];
    float weight[MAX_T * (MAX_K + 1)];
};
static struct lists got, other;
static struct {
    void *x, *router, *bias, *work;
    struct lists *lists;
} dev;

static bf16_t bf16_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bf16_t)(bits >> 16);
}

/* Of T tokens' logits, exactly: sums of multiples of 2^-8 below 2^8. */
static void make_inputs(int T, int H, int E)
{
    for (int64_t i = 0; i < (int64_t)T * H; i++)
        x[i] = bf16_of((float)(data_below(5) - 2) / 4);
    for (int64_t i = 0; i < (int64_t)E * H; i++)
        router[i] = bf16_of((float)(data_below(9) - 4) / 64);
    for (int e = 0; e < E; e++)
        bias[e] = (float)(data_below(5) - 2) / 16;
    CUDA(cudaMemcpy(dev.x, x, (size_t)T * (size_t)H * 2, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(dev.router, router, (size_t)E * (size_t)H * 2, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(dev.bias, bias, (size_t)E * 4, cudaMemcpyHostToDevice));
}

static void route(int T, int H, int E, int k, struct lists *ret)
{
    struct cu_route_args a = {.x = dev.x,
                              .router = dev.router,
                              .bias = dev.bias,
                              .slot_token = dev.lists->token,
                              .slot_weight = dev.lists->weight,
                              .token_slot = dev.lists->token_slot,
                              .expert_start = dev.lists->start,
                              .work = dev.work,
                              .T = T,
                              .H = H,
                              .E = E,
                              .k = k,
                              .scale = 1.8f};
    CUDA(cudaMemset(dev.lists, 0xff, sizeof(*dev.lists)));
    CUDA(cu_route(&a, stream));
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpy(ret, dev.lists, sizeof(*ret), cudaMemcpyDeviceToHost));
}

static float logit_of(int t, int e, int H)
{
    double sum = 0;
    for (int h = 0; h < H; h++)
        sum += data_bf16(x[(int64_t)t * H + h]) * data_bf16(router[(int64_t)e * H + h]);
    return (float)sum;
}

/* Experts that route_ref prefers by less than rounding of the sigmoid may trade places. */
static bool as_good(const float *logit, int mine, int reference)
{
    double a = 1 / (1 + exp(-(double)logit[mine])) + bias[mine];
    double b = 1 / (1 + exp(-(double)logit[reference])) + bias[reference];
    bool same = logit[mine] == logit[reference] && bias[mine] == bias[reference];
    return mine == reference || (!same && fabs(a - b) < 1e-6);
}

static int by_index(const void *a, const void *b)
{
    return *(const int32_t *)a - *(const int32_t *)b;
}

/* Returns how many tokens went wrong: experts, weights, places. */
static int wrong_tokens(const struct lists *l, int T, int H, int E, int k)
{
    int n_wrong = 0;
    for (int t = 0; t < T; t++) {
        int32_t expert[MAX_K];
        float weight[MAX_K], *logit = logits;
        for (int e = 0; e < E; e++)
            logit[e] = logit_of(t, e, H);
        route_ref(&(struct route_args){.logits = logit,
                                       .bias = bias,
                                       .expert = expert,
                                       .weight = weight,
                                       .T = 1,
                                       .E = E,
                                       .k = k,
                                       .scale = 1.8f});
        float of_expert[MAX_E] = {0};
        for (int i = 0; i < k; i++)
            of_expert[expert[i]] = weight[i];
        qsort(expert, (size_t)k, sizeof(expert[0]), by_index);
        bool wrong = false;
        for (int i = 0; i < k; i++) {
            int slot = l->token_slot[t * (k + 1) + i];
            if (slot < 0 || slot >= T * k || l->token[slot] != t) {
                wrong = true;
                break;
            }
            int e = 0;
            while (slot >= l->start[e + 1])
                e++;
            wrong |= !as_good(logit, e, expert[i]);
            if (e == expert[i])
                wrong |= !(fabs((double)l->weight[slot] - (double)of_expert[e]) < 1e-5);
        }
        int shared = l->token_slot[t * (k + 1) + k];
        wrong |= shared != T * k + t || l->token[shared] != t || l->weight[shared] != 1;
        n_wrong += wrong;
    }
    return n_wrong;
}

/* Every slot is used, by ascending tokens within an expert. */
static int wrong_slots(const struct lists *l, int T, int E, int k)
{
    int n_wrong = l->start[0] != 0 || l->start[E] != T * k || l->start[E + 1] != T * (k + 1);
    for (int e = 0; e < E && !n_wrong; e++) {
        n_wrong += l->start[e + 1] < l->start[e];
        for (int i = l->start[e] + 1; i < l->start[e + 1]; i++)
            n_wrong += l->token[i] <= l->token[i - 1];
    }
    return n_wrong;
}

static void lists_follow_the_reference(void)
{
    const int tokens[] = {1, 2, 15, 16, 17, 33, 64, 127, 128, 129, 300, 511, 512, 513, 1000};
    const int shapes[][3] = {{2048, 64, 4}, {256, 8, 2},   {96, 16, 4},
                             {2080, 32, 8}, {2048, 64, 1}, {512, 16, 3}}; // H, E, k
    int n = 0;
    for (size_t s = 0; s < ARRAY_LEN(shapes); s++) {
        int n_wrong = 0, H = shapes[s][0], E = shapes[s][1], k = shapes[s][2];
        for (size_t i = 0; i < ARRAY_LEN(tokens); i++) {
            int T = tokens[i];
            if (T > most_tokens || (T > 512 && H == 2080))
                continue;
            make_inputs(T, H, E);
            for (int again = 0; again < 2; again++) { // and with what the first left in work
                route(T, H, E, k, &got);
                int wrong = wrong_slots(&got, T, E, k);
                wrong += wrong ? 0 : wrong_tokens(&got, T, H, E, k);
                if (wrong)
                    fprintf(stderr, "T %d H %d E %d k %d: %d wrong\n", T, H, E, k, wrong);
                n_wrong += wrong;
                n += T;
            }
        }
        CHECK_INT(n_wrong, 0);
    }
    printf("%d tokens\n", n);
}

/* A token's experts and weights have the same bits in a batch of any size, hence by any kernel. */
static void batches_do_not_matter(void)
{
    enum { H = 2048, E = 64, K = 4 };
    const int tokens[] = {1, 16, 40, 128, 200, 512, 513, 2000, MAX_T};
    for (int64_t i = 0; i < (int64_t)MIN(most_tokens, MAX_T) * H; i++)
        x[i] = bf16_of(data_float());
    for (int64_t i = 0; i < (int64_t)E * H; i++)
        router[i] = bf16_of(data_float() / 16);
    for (int e = 0; e < E; e++)
        bias[e] = data_float() / 8;
    CUDA(cudaMemcpy(dev.x, x, (size_t)MIN(most_tokens, MAX_T) * H * 2, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(dev.router, router, (size_t)E * H * 2, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(dev.bias, bias, E * 4, cudaMemcpyHostToDevice));
    int n_wrong = 0, before = 0, n = 0;
    for (size_t i = 0; i < ARRAY_LEN(tokens) && tokens[i] <= most_tokens; i++) {
        int T = tokens[i];
        route(T, H, E, K, &got);
        CHECK_INT(wrong_slots(&got, T, E, K), 0);
        for (int t = 0; t < before; t++)
            for (int j = 0; j <= K; j++) {
                int a = got.token_slot[t * (K + 1) + j], b = other.token_slot[t * (K + 1) + j];
                int ea = 0, eb = 0;
                while (a >= got.start[ea + 1])
                    ea++;
                while (b >= other.start[eb + 1])
                    eb++;
                n_wrong += ea != eb || memcmp(&got.weight[a], &other.weight[b], 4) != 0;
                n++;
            }
        other = got;
        before = T;
    }
    printf("%d pairs\n", n);
    CHECK_INT(n_wrong, 0);
}

static void shapes_are_checked(void)
{
    struct cu_route_args a = {.T = 1, .H = 2048, .E = 48, .k = 4};
    CHECK_INT(cu_route(&a, stream), cudaErrorInvalidValue);
    a.E = 64;
    a.H = 2050;
    CHECK_INT(cu_route(&a, stream), cudaErrorInvalidValue);
    a.H = 2048;
    a.k = MAX_K + 1;
    CHECK_INT(cu_route(&a, stream), cudaErrorInvalidValue);
    a.k = 4;
    a.T = 0;
    CHECK_INT(cu_route(&a, stream), cudaErrorInvalidValue);
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    most_tokens = argc > 1 ? MIN(atoi(argv[1]), MAX_T) : MAX_T;
    x = data_alloc((int64_t)MAX_T * MAX_H, 2);
    router = data_alloc((int64_t)MAX_E * MAX_H, 2);
    bias = data_alloc(MAX_E, 4);
    logits = data_alloc(MAX_E, 4);
    size_t work = cu_route_work_bytes(MAX_T, MAX_E, MAX_K);
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaMalloc(&dev.x, (size_t)MAX_T * MAX_H * 2));
    CUDA(cudaMalloc(&dev.router, (size_t)MAX_E * MAX_H * 2));
    CUDA(cudaMalloc(&dev.bias, MAX_E * 4));
    CUDA(cudaMalloc((void **)&dev.lists, sizeof(struct lists)));
    CUDA(cudaMalloc(&dev.work, work));
    CUDA(cudaMemset(dev.work, 0, work));
    RUN(shapes_are_checked);
    RUN(lists_follow_the_reference);
    RUN(batches_do_not_matter);
    void *host[] = {x, router, bias, logits};
    for (size_t i = 0; i < ARRAY_LEN(host); i++)
        free(host[i]);
    return check_done();
}
