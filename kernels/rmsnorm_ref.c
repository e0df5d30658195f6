/* rmsnorm_ref.c: y = x * rsqrt(mean(x^2) + eps), then * w: transformers' order, all in fp32. */
#include "kernels/kernels.h"

#include <math.h>

#include "kernels/vec.h"

#define GRAIN_VALUES 16384

static void rows(void *arg, int64_t begin, int64_t end);

void rmsnorm_ref(const struct rmsnorm_args *a, struct par *par)
{
    par_for(par, a->T, GRAIN_VALUES / a->n + 1, rows, (void *)a);
}

VEC_CLONES static void row(const float *x, const bf16_t *w, float *y, int n, float eps)
{
    vec sum = {0};
    int i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES)
        sum += vec_load(x + i) * vec_load(x + i);
    if (i < n) {
        vec tail = vec_load_part(x + i, n - i);
        sum += tail * tail;
    }
    float scale = 1.0f / sqrtf(vec_sum(sum) / (float)n + eps);
    for (i = 0; i < n; i++)
        y[i] = x[i] * scale * bf16_to_f32(w[i]);
}

static void rows(void *arg, int64_t begin, int64_t end)
{
    const struct rmsnorm_args *a = arg;
    for (int64_t t = begin; t < end; t++)
        row(a->x + t * a->x_stride, a->w, a->y + t * a->y_stride, a->n, a->eps);
}
