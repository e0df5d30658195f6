/* moe_test.c: the mixture of experts against doubles, and one row's bits in any company. */
#include "check.h"
#include "data.h"

struct setup {
    struct moe_args a;
    float *x, *y, *weight, *work;
    bf16_t *w[6];
    int32_t *expert;
};

static struct setup setup_make(int T, int H, int F, int E, int k)
{
    struct setup s = {.x = data_floats((int64_t)T * H),
                      .y = data_floats((int64_t)T * H),
                      .weight = data_floats((int64_t)T * k),
                      .expert = data_alloc((int64_t)T * k, sizeof(int32_t)),
                      .work = data_floats(moe_work_floats(T, H, F, E, k))};
    for (int i = 0; i < 6; i++)
        s.w[i] = data_weights((int64_t)(i < 3 ? E : 1) * F * H);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < k;) {
            int e = data_below(E), j = 0;
            while (j < i && s.expert[t * k + j] != e)
                j++;
            if (j == i)
                s.expert[t * k + i++] = e;
        }
    s.a = (struct moe_args){.x = s.x,
                            .gate = s.w[0],
                            .up = s.w[1],
                            .down = s.w[2],
                            .shared_gate = s.w[3],
                            .shared_up = s.w[4],
                            .shared_down = s.w[5],
                            .expert = s.expert,
                            .weight = s.weight,
                            .y = s.y,
                            .work = s.work,
                            .T = T,
                            .H = H,
                            .F = F,
                            .E = E,
                            .k = k};
    return s;
}

static void setup_free(struct setup *s)
{
    free(s->x);
    free(s->y);
    free(s->weight);
    free(s->expert);
    free(s->work);
    for (int i = 0; i < 6; i++)
        free(s->w[i]);
}

static void add_expert(const struct moe_args *a, const float *x, const bf16_t *gate,
                       const bf16_t *up, const bf16_t *down, double weight, double *y)
{
    double *h = data_alloc(a->F, sizeof(double));
    for (int f = 0; f < a->F; f++) {
        double g = 0, u = 0;
        for (int i = 0; i < a->H; i++) {
            g += x[i] * data_bf16(gate[f * a->H + i]);
            u += x[i] * data_bf16(up[f * a->H + i]);
        }
        h[f] = g / (1 + exp(-g)) * u;
    }
    for (int i = 0; i < a->H; i++)
        for (int f = 0; f < a->F; f++)
            y[i] += weight * h[f] * data_bf16(down[i * a->F + f]);
    free(h);
}

static void one_shape(int T, int H, int F, int E, int k)
{
    struct par *par = par_create(3);
    REQUIRE(par);
    struct setup s = setup_make(T, H, F, E, k);
    int64_t n = (int64_t)T * H, FH = (int64_t)F * H;
    float *before = data_alloc(n, sizeof(float)), *want = data_alloc(n, sizeof(float));
    float *small = data_floats(moe_work_floats(1, H, F, E, k));
    memcpy(before, s.y, sizeof(float) * (size_t)n);
    moe_ref(&s.a, NULL);
    memcpy(want, s.y, sizeof(float) * (size_t)n);
    double worst = 0;
    for (int t = 0; t < T; t++) {
        double *y = data_alloc(H, sizeof(double));
        for (int i = 0; i < H; i++)
            y[i] = before[t * H + i];
        for (int j = 0; j < k; j++) {
            int64_t e = s.expert[t * k + j];
            add_expert(&s.a, s.x + t * H, s.w[0] + e * FH, s.w[1] + e * FH, s.w[2] + e * FH,
                       s.weight[t * k + j], y);
        }
        add_expert(&s.a, s.x + t * H, s.w[3], s.w[4], s.w[5], 1, y);
        for (int i = 0; i < H; i++) {
            double e = fabs(want[t * H + i] - y[i]) / (1 + fabs(y[i]));
            worst = e <= worst ? worst : e;
        }
        free(y);
    }
    CHECK_NEAR(worst, 0, 2e-4);
    memcpy(s.y, before, sizeof(float) * (size_t)n);
    moe_ref(&s.a, par);
    CHECK(data_same(want, s.y, n));
    // Each row alone, its experts listed the other way round.
    int different = 0;
    for (int t = 0; t < T; t++) {
        int32_t expert[8];
        float weight[8], *y = data_alloc(H, sizeof(float));
        for (int j = 0; j < k; j++) {
            expert[j] = s.expert[t * k + k - 1 - j];
            weight[j] = s.weight[t * k + k - 1 - j];
        }
        memcpy(y, before + t * H, sizeof(float) * (size_t)H);
        struct moe_args one = s.a;
        one.x = s.x + t * H;
        one.y = y;
        one.expert = expert;
        one.weight = weight;
        one.work = small + t % 2; // not aligned to 8 bytes
        one.T = 1;
        if (t % 2)
            one.work = small;
        moe_ref(&one, t % 3 ? par : NULL);
        different += !data_same(y, want + t * H, H);
        free(y);
    }
    CHECK_INT(different, 0);
    free(before);
    free(want);
    free(small);
    setup_free(&s);
    par_destroy(par);
}

static void each(void)
{
    one_shape(1, 16, 16, 1, 1);
    one_shape(1, 256, 128, 8, 2);
    one_shape(7, 33, 17, 5, 3);
    one_shape(40, 50, 36, 3, 3);
    one_shape(100, 64, 32, 13, 4);
    struct setup s = setup_make(0, 16, 16, 4, 2); // no rows, nothing to do
    moe_ref(&s.a, NULL);
    setup_free(&s);
}

static void all_builds(void) { data_each_isa(each); }

int main(void)
{
    RUN(all_builds);
    return check_done();
}
