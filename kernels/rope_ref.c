/* rope_ref.c: rotary positions on interleaved pairs. The frequencies are rounded to fp32 and the
 * angle is an fp32 product, as in transformers; at position 200,000 that matters. */
#include "kernels/vec.h"

#include <math.h>

void rope_ref(const struct rope_args *a)
{
    enum { PAIRS = MLA_ROPE / 2 };
    float frequency[PAIRS], cosine[PAIRS], sine[PAIRS];
    double ratio = pow((double)a->theta, -1.0 / PAIRS), f = 1.0;
    for (int i = 0; i < PAIRS; i++, f *= ratio)
        frequency[i] = (float)f;
    for (int t = 0; t < a->T; t++) {
        for (int i = 0; i < PAIRS; i++) {
            float angle = (float)a->position[t] * frequency[i];
            sincosf(angle, &sine[i], &cosine[i]);
        }
        for (int h = 0; h < a->heads; h++) {
            float *x = a->x + (int64_t)t * a->row_stride + (int64_t)h * a->head_stride;
            for (int i = 0; i < PAIRS; i++) {
                float even = x[2 * i], odd = x[2 * i + 1];
                x[2 * i] = even * cosine[i] - odd * sine[i];
                x[2 * i + 1] = odd * cosine[i] + even * sine[i];
            }
        }
    }
}
