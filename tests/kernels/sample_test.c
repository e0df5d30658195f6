/* sample_test.c: the generator's published vectors, the draw against a full sort without shortcuts,
 * and frequencies against probabilities. */
#include <float.h>

#include "check.h"
#include "data.h"
#include "kernels/sample_math.h"

#define MAX_V 5000

static const struct sample_row plain = {
    .seed = 1, .temperature = 1, .top_p = 1, .repetition = 1, .n_logprobs = -1};

static void philox_known_answers(void)
{
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } table[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        uint32_t got[4];
        philox4x32(table[i].counter, table[i].key, got);
        for (int k = 0; k < 4; k++)
            CHECK_INT(got[k], table[i].want[k]);
    }
}

static void arithmetic_is_accurate(void)
{
    double worst_log = 0, worst_weight = 0;
    for (int i = 0; i < 100000; i++) {
        double x = exp(data_float() * 80), near = 1 + data_float() * exp2(-data_below(40));
        worst_log = fmax(worst_log, fabs(sample_log(x) - log(x)) / fmax(fabs(log(x)), 1));
        if (near != 1 && near > 0)
            worst_log = fmax(worst_log, fabs(sample_log(near) / log(near) - 1));
        float z = (data_float() - 1) * 4;
        worst_weight = fmax(worst_weight, fabs((double)sample_weight(z) / exp(z) / 0x1p44 - 1));
    }
    CHECK_NEAR(worst_log, 0, 1e-15);
    CHECK_NEAR(worst_weight, 0, 3e-7);
    CHECK_INT(sample_log(1), 0);
    CHECK(sample_weight(0) == 1ull << 44);
    CHECK(sample_weight(-31.5f) == 0 && sample_weight(-FLT_MAX) == 0 && sample_weight(NAN) == 0);
    CHECK(sample_weight(-30) > 0);
    uint32_t ends[] = {0, 1, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
    for (int i = 0; i < 100000; i++) {
        uint32_t x = i < 6 ? ends[i] : data_u32() | (i % 2 ? ~(data_u32() >> data_below(32)) : 0);
        CHECK(sample_noise(x) <= sample_noise_bound(x));
        CHECK(sample_noise(x) <= SAMPLE_MAX_NOISE);
    }
}

static int32_t draw(const float *logits, int V, int n_valid, const struct sample_row *row)
{
    static float work[2 * MAX_V];
    int32_t id = -1;
    sample_ref(&(struct sample_args){.logits = logits,
                                     .rows = row,
                                     .id = &id,
                                     .work = work,
                                     .T = 1,
                                     .V = V,
                                     .n_valid = n_valid},
               NULL);
    return id;
}

/* ---- the definition, spelled out ------------------------------------------------------------- */

struct entry {
    double z;
    int32_t id;
};

static int by_rank(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return x->z != y->z ? (x->z > y->z ? -1 : 1) : (x->id > y->id) - (x->id < y->id);
}

static int32_t draw_by_definition(const float *logits, int n_valid, const struct sample_row *r)
{
    static struct entry list[MAX_V];
    int n = 0;
    for (int32_t id = 0; id < n_valid; id++) {
        float z = logits[id];
        bool banned = false;
        for (int i = 0; i < r->n_banned; i++)
            banned |= r->banned[i] == id;
        banned |= r->allowed && !(r->allowed[id / 32] & 1u << (id % 32));
        for (int i = 0; i < r->n_bias; i++)
            z += r->bias_id[i] == id ? r->bias_value[i] : 0;
        int count = 0;
        bool seen = false;
        for (int i = 0; i < r->n_seen; i++)
            if (r->seen[i].id == id) {
                seen = true;
                count = r->seen[i].count;
            }
        for (int i = 0; i < r->n_ahead; i++)
            count += r->ahead[i] == id;
        if (seen || count > 0)
            z = z > 0 ? z / r->repetition : z * r->repetition;
        if (count > 0)
            z -= r->frequency * (float)count + r->presence;
        if (!banned)
            list[n++] = (struct entry){z, id};
    }
    qsort(list, (size_t)n, sizeof(list[0]), by_rank);
    if (r->temperature == 0)
        return list[0].id;
    double top = list[0].z, total = 0, sum = 0;
    for (int i = 0; i < n; i++)
        list[i].z = (float)((float)(list[i].z - top) / r->temperature);
    if (r->top_k > 0 && r->top_k < n)
        n = r->top_k;
    for (int i = 0; i < n; i++)
        total += exp(list[i].z);
    int kept = 0;
    while (kept < n && (r->top_p >= 1 || kept == 0 || sum < r->top_p * total))
        sum += exp(list[kept++].z);
    n = kept;
    while (r->min_p > 0 && exp(list[n - 1].z) < r->min_p)
        n--;
    int32_t best = -1;
    double best_score = 0;
    for (int i = 0; i < n; i++) {
        uint32_t noise[4];
        philox4x32((const uint32_t[4]){(uint32_t)r->position, (uint32_t)list[i].id / 4, 0, 0},
                   (const uint32_t[2]){(uint32_t)r->seed, (uint32_t)(r->seed >> 32)}, noise);
        double u = (noise[list[i].id % 4] + 0.5) / 4294967296.0;
        double score = list[i].z - log(-log(u));
        if (best < 0 || score > best_score || (score == best_score && list[i].id < best)) {
            best = list[i].id;
            best_score = score;
        }
    }
    return best;
}

static void draws_follow_the_definition(void)
{
    const int sizes[] = {1, 2, 5, 64, 333, 3072};
    static float logits[MAX_V];
    static struct sample_seen seen[MAX_V];
    static uint32_t allowed[(MAX_V + 31) / 32];
    int wrong = 0, n = 0;
    for (int trial = 0; trial < 6000; trial++) {
        int V = sizes[trial % 6], n_valid = V - (V > 10 ? data_below(5) : 0);
        float spread = (float[]){0.1f, 3, 20, 100}[data_below(4)];
        for (int i = 0; i < V; i++) {
            logits[i] = data_float() * spread;
            if (trial % 5 == 0)
                logits[i] = roundf(logits[i]); // ties
        }
        int n_seen = 0, stride = 1 + data_below(1 + V / 10);
        for (int i = data_below(3); i < V && data_below(4); i += 1 + data_below(stride))
            seen[n_seen++] = (struct sample_seen){i, data_below(4)};
        int32_t banned[3] = {data_below(V), data_below(V), data_below(V)};
        int32_t bias_id[4] = {data_below(V), data_below(V), banned[0], -1};
        float bias_value[4] = {data_float() * 5, data_float() * spread, 100, 1};
        for (int i = 0; i < (V + 31) / 32; i++)
            allowed[i] = data_u32();
        allowed[0] |= 1u << (V > 10 ? 7 : 0); // never nothing
        struct sample_row r = {
            .seed = (uint64_t)data_u32() << 32 | data_u32(),
            .position = data_below(200000),
            .temperature = (float[]){0, 0.3f, 1, 1.7f, 5}[data_below(5)],
            .top_p = data_below(2) ? 1 : 0.5f + 0.5f * fabsf(data_float()),
            .min_p = data_below(3) ? 0 : 0.2f * fabsf(data_float()),
            .top_k = data_below(2) ? 0 : 1 + data_below(60),
            .presence = data_below(2) ? 0 : data_float(),
            .frequency = data_below(2) ? 0 : data_float(),
            .repetition = data_below(2) ? 1 : 1.0f + 0.5f * data_float(),
            .seen = seen,
            .n_seen = n_seen,
            .ahead = bias_id,
            .n_ahead = data_below(4),
            .banned = banned,
            .n_banned = V > 10 ? data_below(4) : 0,
            .bias_id = bias_id,
            .bias_value = bias_value,
            .n_bias = data_below(2) ? 0 : data_below(5),
            .allowed = data_below(3) ? NULL : allowed,
            .n_logprobs = -1,
        };
        for (int i = 0; i < r.n_banned; i++)
            r.allowed = r.banned[i] == 7 ? NULL : r.allowed;
        int32_t got = draw(logits, V, n_valid, &r), want = draw_by_definition(logits, n_valid, &r);
        if (got != want)
            fprintf(stderr, "trial %d: V %d T %g p %g k %d min_p %g: id %d, want %d\n", trial, V,
                    (double)r.temperature, (double)r.top_p, r.top_k, (double)r.min_p, got, want);
        wrong += got != want;
        n++;
    }
    printf("%d draws\n", n);
    CHECK_INT(wrong, 0);
}

/* ---- frequencies ----------------------------------------------------------------------------- */

/* Pearson's statistic of n draws at consecutive positions against the given probabilities. */
static double chi_square(const float *logits, int V, const struct sample_row *row, int n,
                         const double *p)
{
    static int seen[MAX_V];
    memset(seen, 0, sizeof(seen));
    struct sample_row r = *row;
    for (int i = 0; i < n; i++) {
        r.position = i;
        seen[draw(logits, V, V, &r)]++;
    }
    double sum = 0;
    for (int i = 0; i < V; i++) {
        if (p[i] == 0)
            CHECK_INT(seen[i], 0);
        else
            sum += pow(seen[i] - n * p[i], 2) / (n * p[i]);
    }
    return sum;
}

static void softmax_of(const float *logits, int V, double temperature, double *p)
{
    double total = 0;
    for (int i = 0; i < V; i++)
        total += p[i] = exp(logits[i] / temperature);
    for (int i = 0; i < V; i++)
        p[i] /= total;
}

static void frequencies_are_probabilities(void)
{
    enum { V = 16, N = 200000 };
    float logits[V];
    double p[V];
    for (int i = 0; i < V; i++)
        logits[i] = data_float() * 2;
    const double temperatures[] = {0.5, 1, 2};
    for (uint64_t seed = 0; seed < 3; seed++)
        for (int t = 0; t < 3; t++) {
            struct sample_row r = plain;
            r.seed = seed * 0x123456789abcdefu;
            r.temperature = (float)temperatures[t];
            softmax_of(logits, V, temperatures[t], p);
            double x = chi_square(logits, V, &r, N, p);
            if (!(x < 44.3)) // 15 degrees of freedom: exceeded once in 10,000
                CHECK_NEAR(x, 15, 29.3);
            CHECK(x > 1.5);
        }
    // Top-k 5 of the same: renormalised.
    struct sample_row r = plain;
    r.top_k = 5;
    softmax_of(logits, V, 1, p);
    double total = 0;
    for (int i = 0; i < V; i++) {
        int better = 0;
        for (int j = 0; j < V; j++)
            better += logits[j] > logits[i];
        p[i] = better < 5 ? p[i] : 0;
        total += p[i];
    }
    for (int i = 0; i < V; i++)
        p[i] /= total;
    CHECK(chi_square(logits, V, &r, N, p) < 23.5); // 4 degrees of freedom
}

/* Neighbouring positions and ids have independent noise: pairs of draws fill the square. */
static void positions_are_independent(void)
{
    enum { V = 4, N = 100000 };
    const float logits[V] = {0};
    int seen[V][V] = {0}, previous = 0;
    struct sample_row r = plain;
    for (int i = 0; i <= N; i++) {
        r.position = i;
        int id = draw(logits, V, V, &r);
        if (i > 0)
            seen[previous][id]++;
        previous = id;
    }
    double sum = 0, want = N / (double)(V * V);
    for (int i = 0; i < V * V; i++)
        sum += pow(seen[i / V][i % V] - want, 2) / want;
    CHECK(sum < 44.3);
    r.seed = 2;
    int same = 0;
    struct sample_row other = plain;
    for (int i = 0; i < 10000; i++) {
        r.position = other.position = i;
        same += draw(logits, V, V, &r) == draw(logits, V, V, &other);
    }
    CHECK_NEAR(same, 2500, 200);
}

/* ---- filters --------------------------------------------------------------------------------- */

static uint32_t drawn(const float *logits, int V, int n_valid, struct sample_row r)
{
    uint32_t set = 0;
    for (r.position = 0; r.position < 3000; r.position++)
        set |= 1u << draw(logits, V, n_valid, &r);
    return set;
}

static void filters_keep_what_they_say(void)
{
    //                        .4           .3          .2         .1 ; ids 1 2 4 7
    const float logits[8] = {-100, -0.9163f, -1.2040f, -100, -1.6094f, -100, -100, -2.3026f};
    struct sample_row r = plain;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1 | 1 << 2 | 1 << 4 | 1 << 7);
    CHECK_INT(drawn(logits, 8, 7, r), 1 << 1 | 1 << 2 | 1 << 4); // id 7 is no token
    r.top_k = 2;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1 | 1 << 2);
    r.top_k = 0;
    r.top_p = 0.39f;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1);
    r.top_p = 0.41f; // .4 does not reach it
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1 | 1 << 2);
    r.top_p = 0.71f;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1 | 1 << 2 | 1 << 4);
    r.top_p = 0; // never empty
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1);
    r.top_p = 1;
    r.min_p = 0.49f; // of the best one's probability
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1 | 1 << 2 | 1 << 4);
    r.min_p = 0.51f;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1 | 1 << 2);
    r.min_p = 1;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1);
    // top-p is of what top-k left: .4 of .7 reaches .5.
    r = plain;
    r.top_k = 2;
    r.top_p = 0.5f;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 1);
    const int32_t banned[] = {2, 1, 2, 99, -1};
    r = plain;
    r.banned = banned;
    r.n_banned = 5;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 4 | 1 << 7);
    r.temperature = 0;
    CHECK_INT(drawn(logits, 8, 8, r), 1 << 4);
}

static void ties_go_to_the_lowest_id(void)
{
    const float logits[6] = {1, 2, 2, 2, 2, 1};
    struct sample_row r = plain;
    r.top_k = 2;
    CHECK_INT(drawn(logits, 6, 6, r), 1 << 1 | 1 << 2);
    r.top_k = 0;
    r.top_p = 0.3f;
    CHECK_INT(drawn(logits, 6, 6, r), 1 << 1 | 1 << 2);
    r.temperature = 0;
    CHECK_INT(draw(logits, 6, 6, &r), 1);
    static float flat[MAX_V]; // all equal, many: the border bucket is everything
    r = plain;
    r.top_k = 3;
    CHECK_INT(drawn(flat, MAX_V, MAX_V, r), 7);
}

static void penalties_move_logits(void)
{
    const float logits[4] = {2, 1.5f, -1, -1.2f};
    struct sample_seen seen[] = {{0, 3}, {2, 0}, {-1, 9}, {4, 9}}; // the last two are no tokens
    struct sample_row r = plain;
    r.temperature = 0;
    r.seen = seen;
    r.n_seen = 1;
    CHECK_INT(draw(logits, 4, 4, &r), 0);
    r.presence = 0.6f;
    CHECK_INT(draw(logits, 4, 4, &r), 1);
    r.presence = 0;
    r.frequency = 0.17f; // three times
    CHECK_INT(draw(logits, 4, 4, &r), 1);
    r.frequency = 0;
    r.repetition = 1.4f; // divides the positive
    CHECK_INT(draw(logits, 4, 4, &r), 1);
    const int32_t banned[] = {0, 1};
    r.banned = banned;
    r.n_banned = 2;
    CHECK_INT(draw(logits, 4, 4, &r), 2);
    r.n_seen = 4; // id 2 is in the prompt: the negative is multiplied, -1.4 now
    CHECK_INT(draw(logits, 4, 4, &r), 3);
    const int32_t ahead[] = {3, 3}; // as if it had been drawn: -1.68
    r.ahead = ahead;
    r.n_ahead = 1;
    CHECK_INT(draw(logits, 4, 4, &r), 2);
    r.repetition = 1;
    r.frequency = 0.05f; // -1.25, or twice -1.3, against -1 - 0.3
    seen[1].count = 6;
    CHECK_INT(draw(logits, 4, 4, &r), 3);
    r.n_ahead = 2;
    seen[1].count = 5;
    CHECK_INT(draw(logits, 4, 4, &r), 2);
    const int32_t both[] = {2, 3}; // one more of each: -1.3 and -1.25
    r.ahead = both;
    CHECK_INT(draw(logits, 4, 4, &r), 3);
}

static void bias_and_mask_come_first(void)
{
    const float logits[40] = {[0] = 3, [1] = 2, [2] = 1, [39] = -5};
    const int32_t id[] = {1, 39, 1, 40, -1}; // the last two are no tokens
    const float value[] = {0.75f, 7.5f, 0.75f, 100, 100};
    struct sample_row r = plain;
    r.temperature = 0;
    r.bias_id = id;
    r.bias_value = value;
    r.n_bias = 1;
    CHECK_INT(draw(logits, 40, 40, &r), 0);
    r.n_bias = 5; // 2 + 0.75 + 0.75
    CHECK_INT(draw(logits, 40, 40, &r), 1);
    const uint32_t allowed[2] = {~2u, ~0u};
    r.allowed = allowed;
    CHECK_INT(draw(logits, 40, 40, &r), 0);
    const uint32_t only_last[2] = {0, 1u << 7};
    r.allowed = only_last;
    CHECK_INT(draw(logits, 40, 40, &r), 39);
    r.temperature = 1; // the mask stands before every filter, whatever is drawn
    r.top_p = 0.01f;
    r.seed = 9;
    CHECK_INT(draw(logits, 40, 40, &r), 39);
    // A penalty divides the biased logit: 3.5 becomes 1.75.
    const struct sample_seen seen = {1, 1};
    r = plain;
    r.temperature = 0;
    r.bias_id = id;
    r.bias_value = value;
    r.n_bias = 3;
    r.seen = &seen;
    r.n_seen = 1;
    CHECK_INT(draw(logits, 40, 40, &r), 1);
    r.repetition = 2;
    CHECK_INT(draw(logits, 40, 40, &r), 0);
    const uint32_t nothing[2] = {0, 0};
    r.allowed = nothing; // an id all the same
    CHECK_INT(draw(logits, 40, 40, &r), 0);
}

static void extremes_stay_ids(void)
{
    float logits[8] = {NAN, FLT_MAX, -FLT_MAX, INFINITY, -INFINITY, 0, NAN, 1};
    const float temperatures[] = {0, 1e-38f, 1e-10f, 1, 1e30f, FLT_MAX};
    for (int i = 0; i < 6; i++)
        for (int filter = 0; filter < 4; filter++) {
            struct sample_row r = plain;
            r.temperature = temperatures[i];
            r.top_k = filter == 1 ? 3 : 0;
            r.top_p = filter == 2 ? 0.9f : 1;
            r.min_p = filter == 3 ? 0.1f : 0;
            int32_t id = draw(logits, 8, 8, &r);
            CHECK(id > 0 && id < 8 && id != 6); // and NaN is never drawn
        }
    for (int i = 0; i < 8; i++)
        logits[i] = NAN;
    CHECK_INT(draw(logits, 8, 8, &plain), 0);
    const int32_t banned[] = {0, 1, 2};
    struct sample_row r = plain;
    r.banned = banned;
    r.n_banned = 3;
    CHECK_INT(draw((const float[]){1, 2, 3}, 3, 3, &r), 0);
}

/* ---- logprobs and batches -------------------------------------------------------------------- */

static void logprobs_are_the_models_own(void)
{
    enum { V = 500, TOP = 20 };
    static float logits[V], work[2 * V];
    for (int trial = 0; trial < 50; trial++) {
        for (int i = 0; i < V; i++)
            logits[i] = roundf(data_float() * 40) / 4;
        const struct sample_seen seen = {data_below(V), 1};
        struct sample_row r = plain;
        r.temperature = 0.7f; // neither this nor penalties show in the logprobs
        r.presence = 3;
        r.seen = &seen;
        r.n_seen = 1;
        r.n_logprobs = trial % (TOP + 1);
        int32_t id, top_id[TOP];
        float logprob, top[TOP];
        sample_ref(&(struct sample_args){.logits = logits,
                                         .rows = &r,
                                         .id = &id,
                                         .logprob = &logprob,
                                         .top_id = top_id,
                                         .top_logprob = top,
                                         .work = work,
                                         .T = 1,
                                         .V = V,
                                         .n_valid = V - 3,
                                         .max_top = TOP},
                   NULL);
        double total = 0;
        for (int i = 0; i < V - 3; i++)
            total += exp(logits[i]);
        CHECK_NEAR(logprob, logits[id] - log(total), 1e-5);
        for (int i = 0; i < r.n_logprobs; i++) {
            CHECK_NEAR(top[i], logits[top_id[i]] - log(total), 1e-5);
            CHECK(top_id[i] >= 0 && top_id[i] < V - 3);
            if (i > 0)
                CHECK(logits[top_id[i]] < logits[top_id[i - 1]] ||
                      (logits[top_id[i]] == logits[top_id[i - 1]] && top_id[i] > top_id[i - 1]));
        }
        int better = 0;
        for (int i = 0; i < V - 3 && r.n_logprobs > 0; i++)
            better += logits[i] > logits[top_id[r.n_logprobs - 1]];
        CHECK(better < r.n_logprobs || r.n_logprobs == 0);
        for (int i = r.n_logprobs; i < TOP; i++)
            CHECK(top_id[i] == -1);
    }
}

static void batches_and_threads_do_not_matter(void)
{
    enum { T = 33, V = 700 };
    struct par *par = par_create(3);
    REQUIRE(par);
    float *logits = data_floats(T * V), *work = data_floats(3 * 2 * V);
    struct sample_row rows[T];
    int32_t together[T];
    for (int t = 0; t < T; t++) {
        rows[t] = plain;
        rows[t].position = t / 2;
        rows[t].seed = (uint64_t)t * 77;
        rows[t].top_k = t % 3 ? 0 : 40;
        rows[t].top_p = t % 4 ? 1 : 0.8f;
    }
    sample_ref(&(struct sample_args){.logits = logits,
                                     .rows = rows,
                                     .id = together,
                                     .work = work,
                                     .T = T,
                                     .V = V,
                                     .n_valid = V},
               par);
    for (int t = 0; t < T; t++)
        CHECK_INT(together[t], draw(logits + t * V, V, V, &rows[t]));
    free(logits);
    free(work);
    par_destroy(par);
}

int main(void)
{
    RUN(philox_known_answers);
    RUN(arithmetic_is_accurate);
    RUN(draws_follow_the_definition);
    RUN(frequencies_are_probabilities);
    RUN(positions_are_independent);
    RUN(filters_keep_what_they_say);
    RUN(ties_go_to_the_lowest_id);
    RUN(penalties_move_logits);
    RUN(bias_and_mask_come_first);
    RUN(extremes_stay_ids);
    RUN(logprobs_are_the_models_own);
    RUN(batches_and_threads_do_not_matter);
    return check_done();
}
