/* rows_test.c: the operations that treat each row on its own: embed, rmsnorm, rope, kv_write,
 * swiglu, route, argmax. */
#include "check.h"
#include "data.h"

static void embed_copies_rows(void)
{
    enum { V = 9, H = 37, T = 5 };
    bf16_t *table = data_weights(V * H);
    int32_t token[T] = {8, 0, 3, 3, 7};
    float out[T * H];
    embed_ref(&(struct embed_args){.table = table, .token = token, .out = out, .T = T, .H = H});
    int wrong = 0;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < H; i++)
            wrong += (double)out[t * H + i] != data_bf16(table[token[t] * H + i]);
    CHECK_INT(wrong, 0);
    free(table);
}

static void rmsnorm_is_the_formula(void)
{
    struct par *par = par_create(2);
    REQUIRE(par);
    for (int n = 1; n < 600; n += n < 40 ? 1 : 173) {
        enum { T = 11 };
        int xs = n + 2, ys = n + 4;
        float *x = data_floats(T * xs), *y = data_floats(T * ys), *alone = data_floats(n);
        bf16_t *w = data_weights(n);
        struct rmsnorm_args a = {
            .x = x, .w = w, .y = y, .T = T, .n = n, .x_stride = xs, .y_stride = ys, .eps = 1e-5f};
        rmsnorm_ref(&a, par);
        double worst = 0;
        for (int t = 0; t < T; t++) {
            double sum = 0;
            for (int i = 0; i < n; i++)
                sum += (double)x[t * xs + i] * x[t * xs + i];
            double scale = 1 / sqrt(sum / n + 1e-5);
            for (int i = 0; i < n; i++) {
                double e = fabs(y[t * ys + i] - x[t * xs + i] * scale * data_bf16(w[i]));
                worst = e <= worst ? worst : e;
            }
            a.x = x + t * xs;
            a.y = alone;
            a.T = 1;
            rmsnorm_ref(&a, NULL);
            CHECK(data_same(alone, y + t * ys, n));
        }
        CHECK_NEAR(worst, 0, 2e-6);
        // In place.
        a = (struct rmsnorm_args){
            .x = x, .w = w, .y = x, .T = T, .n = n, .x_stride = xs, .y_stride = xs, .eps = 1e-5f};
        rmsnorm_ref(&a, NULL);
        for (int t = 0; t < T; t++)
            CHECK(data_same(x + t * xs, y + t * ys, n));
        free(x);
        free(y);
        free(alone);
        free(w);
    }
    par_destroy(par);
}

static void rope_turns_pairs(void)
{
    enum { T = 5, HEADS = 3, HEAD = 70, ROW = HEADS * HEAD + 1 };
    const int32_t position[T] = {0, 1, 77, 4095, 202751};
    float *x = data_floats(T * ROW), before[T * ROW];
    memcpy(before, x, sizeof(before));
    rope_ref(&(struct rope_args){.x = x + 2,
                                 .position = position,
                                 .T = T,
                                 .heads = HEADS,
                                 .row_stride = ROW,
                                 .head_stride = HEAD,
                                 .theta = 1e6f});
    double worst = 0;
    int untouched = 0;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < 32; i++) {
                const float *b = before + t * ROW + h * HEAD + 2 + 2 * i;
                const float *g = x + t * ROW + h * HEAD + 2 + 2 * i;
                // The frequency is an fp32 number by definition, and so is the angle.
                float angle = (float)position[t] * (float)pow(1e6, -i / 32.0);
                double c = cos(angle), s = sin(angle);
                double e =
                    fmax(fabs(g[0] - (b[0] * c - b[1] * s)), fabs(g[1] - (b[1] * c + b[0] * s)));
                worst = e <= worst ? worst : e;
            }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < ROW; i++)
            if (i < 2 || (i - 2) % HEAD >= 64 || (i - 2) / HEAD >= HEADS)
                untouched += x[t * ROW + i] != before[t * ROW + i];
    CHECK_NEAR(worst, 0, 1e-6);
    CHECK_INT(untouched, 0);
    CHECK(data_same(x, before, 66)); // position 0 turns by nothing
    free(x);
}

static void kv_write_hits_one_slot_each(void)
{
    enum { T = 4, PAGES = 3, LAYERS = 2, FLOATS = PAGES * LAYERS * 64 * KV_WIDTH };
    float *pool = data_alloc(FLOATS, sizeof(float)), *latent = data_floats(T * 512);
    float *rope = data_floats(T * 100);
    const int32_t page[T] = {2, 0, 2, 1}, row[T] = {63, 0, 0, 17};
    kv_write_ref(&(struct kv_write_args){.latent = latent,
                                         .rope = rope,
                                         .slot_page = page,
                                         .slot_row = row,
                                         .pool = pool,
                                         .T = T,
                                         .n_layers = LAYERS,
                                         .layer = 1,
                                         .rope_stride = 100});
    int filled = 0;
    for (int i = 0; i < FLOATS; i++)
        filled += pool[i] != 0;
    CHECK_INT(filled, T * KV_WIDTH);
    for (int t = 0; t < T; t++) {
        const float *slot = pool + ((page[t] * LAYERS + 1) * 64 + row[t]) * KV_WIDTH;
        CHECK(data_same(slot, latent + t * 512, 512));
        CHECK(data_same(slot + 512, rope + t * 100, 64));
    }
    free(pool);
    free(latent);
    free(rope);
}

static void swiglu_is_the_formula(void)
{
    enum { N = 1000 };
    float *gate = data_floats(N), *up = data_floats(N), *in = data_alloc(N, sizeof(float));
    for (int i = 0; i < N; i++)
        in[i] = gate[i] *= i % 3 ? 8 : 120; // far outside exp's range too
    struct swiglu_args a = {gate, up, N};
    swiglu_ref(&a);
    double worst = 0;
    for (int i = 0; i < N; i++) {
        double want = in[i] / (1 + exp(-(double)in[i])) * up[i];
        double e = fabs(gate[i] - want) / (1e-30 + fabs(want) + 1e-6);
        worst = e <= worst ? worst : e;
    }
    CHECK_NEAR(worst, 0, 1e-6);
    // Any cut gives the same bits.
    for (int from = 0; from < N; from += 83) {
        float part[83];
        int n = N - from < 83 ? N - from : 83;
        memcpy(part, in + from, sizeof(float) * (size_t)n);
        a = (struct swiglu_args){part, up + from, n};
        swiglu_ref(&a);
        CHECK(data_same(part, gate + from, n));
    }
    free(gate);
    free(up);
    free(in);
}

static void route_takes_the_best(void)
{
    const int experts[] = {1, 2, 8, 17, 64, 512};
    for (int n = 0; n < 6; n++) {
        enum { T = 20 };
        int E = experts[n], k = E < 4 ? E : 4;
        float *logits = data_floats(T * E), *bias = data_floats(E), weight[T * 4];
        int32_t expert[T * 4];
        for (int i = 0; i < E; i++)
            bias[i] *= 0.1f;
        for (int i = 0; i < T * E; i++) // many equal values: the lowest index must win
            logits[i] = roundf(logits[i] * 8);
        for (int i = 0; i < E; i += 2)
            bias[i] = 0;
        route_ref(&(struct route_args){.logits = logits,
                                       .bias = bias,
                                       .expert = expert,
                                       .weight = weight,
                                       .T = T,
                                       .E = E,
                                       .k = k,
                                       .scale = 1.8f});
        for (int t = 0; t < T; t++) {
            double sum = 0, total = 0;
            for (int i = 0; i < k; i++) {
                int e = expert[t * k + i];
                REQUIRE(e >= 0 && e < E);
                double s = 1 / (1 + exp(-(double)logits[t * E + e]));
                sum += s;
                total += weight[t * k + i];
                for (int o = 0; o < E; o++) { // nothing better was left out
                    bool before = false;
                    for (int j = 0; j <= i; j++)
                        before |= expert[t * k + j] == o;
                    double so = 1 / (1 + exp(-(double)logits[t * E + o])) + bias[o];
                    CHECK(before || so < s + bias[e] + 1e-6);
                    if (!before && logits[t * E + o] == logits[t * E + e] && bias[o] == bias[e])
                        CHECK(o > e);
                }
            }
            for (int i = 0; i < k; i++)
                CHECK_NEAR(weight[t * k + i],
                           1.8 / sum / (1 + exp(-(double)logits[t * E + expert[t * k + i]])), 1e-6);
            CHECK_NEAR(total, 1.8, 1e-5);
        }
        free(logits);
        free(bias);
    }
}

/* NaN must not become an index: the pool behind it belongs to others. */
static void route_survives_nan(void)
{
    float logits[8], bias[8] = {0}, weight[2];
    int32_t expert[2];
    for (int i = 0; i < 8; i++)
        logits[i] = NAN;
    route_ref(&(struct route_args){.logits = logits,
                                   .bias = bias,
                                   .expert = expert,
                                   .weight = weight,
                                   .T = 1,
                                   .E = 8,
                                   .k = 2,
                                   .scale = 1});
    CHECK(expert[0] >= 0 && expert[0] < 8 && expert[1] >= 0 && expert[1] < 8);
    CHECK(expert[0] != expert[1]);
}

static void argmax_takes_the_first_best(void)
{
    for (int n = 1; n < 200; n++) {
        float *x = data_floats(3 * n);
        int32_t idx[3];
        for (int i = 0; i < 3 * n; i++)
            x[i] = roundf(x[i] * 5);
        int n_valid = n - data_below(n);
        argmax_ref(&(struct argmax_args){.x = x, .idx = idx, .T = 3, .n = n, .n_valid = n_valid});
        for (int t = 0; t < 3; t++) {
            int want = 0;
            for (int i = 1; i < n_valid; i++)
                if (x[t * n + i] > x[t * n + want])
                    want = i;
            CHECK_INT(idx[t], want);
        }
        free(x);
    }
    float nan[20];
    int32_t idx = -1;
    for (int i = 0; i < 20; i++)
        nan[i] = NAN;
    argmax_ref(&(struct argmax_args){.x = nan, .idx = &idx, .T = 1, .n = 20, .n_valid = 20});
    CHECK(idx >= 0 && idx < 20);
}

static void each(void)
{
    embed_copies_rows();
    rmsnorm_is_the_formula();
    rope_turns_pairs();
    swiglu_is_the_formula();
    route_takes_the_best();
    route_survives_nan();
    argmax_takes_the_first_best();
}

static void all_builds(void) { data_each_isa(each); }

int main(void)
{
    RUN(all_builds);
    RUN(kv_write_hits_one_slot_each);
    return check_done();
}
