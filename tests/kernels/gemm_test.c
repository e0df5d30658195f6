/* gemm_test.c: products of awkward shapes against doubles; one row's bits in every company. */
#include "check.h"
#include "data.h"

static void run(const float *x, const bf16_t *w, float *y, int T, int n_in, int n_out, int x_stride,
                int y_stride, int accumulate, struct par *par)
{
    gemm_ref(&(struct gemm_args){.x = x,
                                 .w = w,
                                 .y = y,
                                 .T = T,
                                 .n_in = n_in,
                                 .n_out = n_out,
                                 .x_stride = x_stride,
                                 .y_stride = y_stride,
                                 .accumulate = accumulate},
             par);
}

static void one_shape(int T, int n_in, int n_out, int accumulate, struct par *par)
{
    int x_stride = n_in + 3, y_stride = n_out + 5;
    float *x = data_floats((int64_t)T * x_stride), *y = data_floats((int64_t)T * y_stride);
    float *before = data_alloc((int64_t)T * y_stride, sizeof(float));
    float *alone = data_alloc(y_stride, sizeof(float));
    bf16_t *w = data_weights((int64_t)n_out * n_in);
    memcpy(before, y, sizeof(float) * (size_t)(T * y_stride));
    run(x, w, y, T, n_in, n_out, x_stride, y_stride, accumulate, par);
    double worst = 0;
    int touched = 0, different = 0;
    for (int t = 0; t < T; t++) {
        for (int o = 0; o < n_out; o++) {
            double sum = accumulate ? before[t * y_stride + o] : 0, size = 1;
            for (int i = 0; i < n_in; i++) {
                double p = (double)x[t * x_stride + i] * data_bf16(w[o * n_in + i]);
                sum += p;
                size += fabs(p);
            }
            double error = fabs(y[t * y_stride + o] - sum) / size;
            worst = error <= worst ? worst : error; // NaN wins
        }
        for (int o = n_out; o < y_stride; o++)
            touched += y[t * y_stride + o] != before[t * y_stride + o];
        memcpy(alone, before + t * y_stride, sizeof(float) * (size_t)y_stride);
        run(x + t * x_stride, w, alone, 1, n_in, n_out, x_stride, y_stride, accumulate, NULL);
        different += !data_same(alone, y + t * y_stride, y_stride);
    }
    CHECK_NEAR(worst, 0, 1e-6);
    CHECK_INT(touched, 0);
    CHECK_INT(different, 0);
    // Any run of rows gives the same bits as well.
    for (int from = 0; from < T; from += 7) {
        int n = T - from < 5 ? T - from : 5;
        float *part = data_alloc((int64_t)n * y_stride, sizeof(float));
        memcpy(part, before + from * y_stride, sizeof(float) * (size_t)(n * y_stride));
        run(x + from * x_stride, w, part, n, n_in, n_out, x_stride, y_stride, accumulate, par);
        CHECK(data_same(part, y + from * y_stride, (int64_t)n * y_stride));
        free(part);
    }
    free(x);
    free(y);
    free(before);
    free(alone);
    free(w);
}

static void awkward_shapes(void)
{
    struct par *par = par_create(3);
    REQUIRE(par);
    const int rows[] = {1, 2, 3, 4, 5, 31, 32, 33, 67},
              ins[] = {1, 15, 16, 17, 100, 512, 513, 1040};
    const int outs[] = {1, 3, 4, 5, 16, 17, 50};
    for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++)
        for (size_t i = 0; i < sizeof(ins) / sizeof(ins[0]); i++) {
            int o = outs[(r + i) % (sizeof(outs) / sizeof(outs[0]))];
            one_shape(rows[r], ins[i], o, (int)(r + i) % 2, (r + i) % 3 ? par : NULL);
        }
    run(NULL, NULL, NULL, 0, 16, 16, 16, 16, 0, par); // no rows, nothing to do
    par_destroy(par);
}

/* Wide and narrow registers give the same bits where both have FMA. */
static void avx2_and_avx512_agree(void)
{
    if (!isa_use("v3") || !isa_use("v4")) {
        printf("skipped: not both on this machine\n");
        return;
    }
    enum { T = 37, IN = 777, OUT = 45 };
    float *x = data_floats(T * IN), *a = data_floats(T * OUT), *b = data_floats(T * OUT);
    bf16_t *w = data_weights(OUT * IN);
    isa_use("v3");
    run(x, w, a, T, IN, OUT, IN, OUT, 0, NULL);
    isa_use("v4");
    run(x, w, b, T, IN, OUT, IN, OUT, 0, NULL);
    CHECK(data_same(a, b, T * OUT));
    free(x);
    free(a);
    free(b);
    free(w);
}

static void all_builds(void) { data_each_isa(awkward_shapes); }

int main(void)
{
    RUN(all_builds);
    RUN(avx2_and_avx512_agree);
    return check_done();
}
