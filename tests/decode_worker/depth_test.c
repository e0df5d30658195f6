/* depth_test.c: simulated workers, from a seed: what they would have generated in the same time
 * with the best fixed number of drafts, they nearly do with the chosen ones.
 */
#include "decode_worker/depth.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "common/base/hash.h"
#include "common/base/own.h"
#include "common/engine/mock_costs.h"

#define MAX_K 5

static uint64_t seed = 1, n_drawn;

static double uniform(void) { return (double)(hash_mix(seed << 40 ^ ++n_drawn) >> 11) * 0x1p-53; }

/* A machine and what it is given. */
struct world {
    const char *name;
    double row_ms;          /* 0: as an H100; else every row costs that, a CPU */
    double accepted[MAX_K]; /* of draft j, if those before it were right */
    uint32_t n_from, n_to;  /* batch size, on its way from one to the other over the run */
    double new_shape_ms;    /* what the first two steps of (n / 16, k) cost extra */
};

static double step_ms(const struct world *w, uint32_t n, uint32_t k)
{
    if (w->row_ms > 0)
        return w->row_ms * (1 + n * (k + 1) + 0.1 * n * MAX(k, 1u));
    const struct mock_costs *c = &mock_costs_h100;
    return mock_costs_step_ms(c, (int)n, (int)(n * (k + 1))) +
           MAX(k, 1u) * mock_costs_draft_ms(c, (int)n);
}

struct outcome {
    double tokens_per_s, mean_k;
};

/* fixed: that many drafts; < 0: as chosen. */
static struct outcome run(const struct world *w, int n_steps, int fixed)
{
    static struct depth d;
    static uint8_t seen[64][MAX_K + 1];
    depth_init(&d, MAX_K);
    memset(seen, 0, sizeof(seen));
    double ms = 0, tokens = 0, sum_k = 0;
    for (int i = 0; i < n_steps; i++) {
        uint32_t n = (uint32_t)(w->n_from + ((double)w->n_to - w->n_from) * i / n_steps);
        uint32_t k = fixed < 0 ? depth_choose(&d, n) : (uint32_t)fixed;
        CHECK(k <= MAX_K);
        double took = step_ms(w, n, k) * (0.95 + 0.1 * uniform());
        if (uniform() < 0.005)
            took *= 4; // somebody else had the machine
        uint8_t *times = &seen[MIN(n / 16, 63u)][k];
        if (*times < 2)
            took += w->new_shape_ms, (*times)++;
        for (uint32_t s = 0; s < n; s++) {
            uint32_t right = 0;
            while (right < k && uniform() < w->accepted[right])
                right++;
            tokens += right + 1;
            if (fixed < 0)
                depth_accepted(&d, k, right);
        }
        if (fixed < 0)
            depth_took(&d, n, k, (uint64_t)(took * 1000));
        ms += took;
        sum_k += k;
    }
    return (struct outcome){tokens / ms * 1000, sum_k / n_steps};
}

/* At least `share` of what the best fixed number makes. */
static void nearly_best(const struct world *w, int n_steps, double share)
{
    struct outcome best = {0};
    int best_k = 0;
    for (int k = 0; k <= MAX_K; k++) {
        struct outcome o = run(w, n_steps, k);
        if (o.tokens_per_s > best.tokens_per_s)
            best = o, best_k = k;
    }
    struct outcome got = run(w, n_steps, -1);
    printf("%-34s chosen %.1f tokens/s (k %.2f), best %.1f (k %d): %.3f\n", w->name,
           got.tokens_per_s, got.mean_k, best.tokens_per_s, best_k,
           got.tokens_per_s / best.tokens_per_s);
    CHECK(got.tokens_per_s >= share * best.tokens_per_s);
}

static void finds_the_best_on_steady_loads(void)
{
    static const uint32_t sizes[] = {1, 2, 8, 32, 100, 256, 500};
    static const double accepted[][MAX_K] = {{0.9, 0.88, 0.85, 0.8, 0.75},
                                             {0.75, 0.6, 0.5, 0.4, 0.3},
                                             {0.5, 0.3, 0.2, 0.1, 0.1},
                                             {0.05, 0.02, 0, 0, 0}};
    for (size_t a = 0; a < ARRAY_LEN(accepted); a++)
        for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
            char name[64];
            snprintf(name, sizeof(name), "GPU, %u sequences, a0 %.2f", sizes[i], accepted[a][0]);
            struct world w = {
                .name = name, .n_from = sizes[i], .n_to = sizes[i], .new_shape_ms = 30};
            memcpy(w.accepted, accepted[a], sizeof(w.accepted));
            nearly_best(&w, 3000, 0.94);
        }
}

static void learns_another_machine(void)
{
    struct world w = {"CPU, 1 sequence", 5, {0.9, 0.9, 0.9, 0.9, 0.9}, 1, 1, 0};
    nearly_best(&w, 3000, 0.94);
    w = (struct world){"CPU, 16 sequences, rows cost", 5, {0.6, 0.5, 0.5, 0.5, 0.5}, 16, 16, 0};
    nearly_best(&w, 3000, 0.94);
    w = (struct world){
        "CPU, 16 sequences, good drafts", 5, {0.98, 0.98, 0.97, 0.97, 0.97}, 16, 16, 0};
    nearly_best(&w, 3000, 0.94);
}

static void follows_the_load(void)
{
    struct world w = {"GPU, 1 to 512 sequences", 0, {0.75, 0.6, 0.5, 0.4, 0.3}, 1, 512, 30};
    nearly_best(&w, 6000, 0.94);
    w = (struct world){"GPU, 512 to 1 sequences", 0, {0.9, 0.88, 0.85, 0.8, 0.75}, 512, 1, 30};
    nearly_best(&w, 6000, 0.94);
}

/* The text's nature changes: acceptance is forgotten, drafts come back. */
static void forgets(void)
{
    struct depth d;
    depth_init(&d, MAX_K);
    for (int i = 0; i < 2000; i++) {
        uint32_t k = depth_choose(&d, 64);
        depth_accepted(&d, k, 0);
        depth_took(&d, 64, k, (uint64_t)(1000 * step_ms(&(struct world){0}, 64, k)));
    }
    CHECK(depth_choose(&d, 64) <= 1);
    CHECK_NEAR(depth_tokens(&d, 3), 1, 0.1);
    int n_high = 0;
    for (int i = 0; i < 4000; i++) {
        uint32_t k = depth_choose(&d, 64);
        for (int s = 0; s < 64; s++)
            depth_accepted(&d, k, k);
        depth_took(&d, 64, k, (uint64_t)(1000 * step_ms(&(struct world){0}, 64, k)));
        n_high += i >= 3000 && k >= 4;
    }
    CHECK(n_high > 900);
}

static void keeps_to_its_bound(void)
{
    struct depth d;
    depth_init(&d, 0);
    for (int i = 0; i < 200; i++) {
        CHECK_INT(depth_choose(&d, 1), 0);
        depth_took(&d, 1, 0, 1000);
    }
    CHECK_NEAR(depth_tokens(&d, 0), 1, 1e-9);
}

int main(void)
{
    if (getenv("SEED"))
        seed = strtoull(getenv("SEED"), NULL, 10);
    printf("seed %llu\n", (unsigned long long)seed);
    RUN(finds_the_best_on_steady_loads);
    RUN(learns_another_machine);
    RUN(follows_the_load);
    RUN(forgets);
    RUN(keeps_to_its_bound);
    return check_done();
}
