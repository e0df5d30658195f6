/* rmsnorm_ref.c: y = x * rsqrt(mean(x^2) + eps), then * w: transformers' order, all in fp32. */
#include "kernels/vec.h"

#include <math.h>

#define GRAIN_VALUES 16384

static void rows(void *arg, int64_t begin, int64_t end);

void rmsnorm_ref(const struct rmsnorm_args *a, struct par *par)
{
    par_for(par, a->T, GRAIN_VALUES / a->n + 1, rows, (void *)a);
}

static void row(const float *x, const bf16_t *w, float *y, int n, float eps)
{
    vec sum[VEC_STRIPS] = {0};
    float lanes[SUM_LANES] = {0};
    int i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
        for (int s = 0; s < VEC_STRIPS; s++) {
            vec v = vec_load(x + i + s * VEC_WIDTH);
            sum[s] += v * v;
        }
    if (i < n) {
        memcpy(lanes, x + i, sizeof(float) * (size_t)(n - i));
        for (int s = 0; s < VEC_STRIPS; s++) {
            vec v = vec_load(lanes + s * VEC_WIDTH);
            sum[s] += v * v;
        }
    }
    for (int s = 0; s < VEC_STRIPS; s++)
        vec_store(lanes + s * VEC_WIDTH, sum[s]);
    float scale = 1.0f / sqrtf(lanes_sum(lanes) / (float)n + eps);
    for (i = 0; i < n; i++)
        y[i] = x[i] * scale * bf16_to_f32(w[i]);
}

static void rows(void *arg, int64_t begin, int64_t end)
{
    const struct rmsnorm_args *a = arg;
    for (int64_t t = begin; t < end; t++)
        row(a->x + t * a->x_stride, a->w, a->y + t * a->y_stride, a->n, a->eps);
}
