/* embed_ref.c: rows of the embedding table, bf16 -> fp32; and argmax, its counterpart at the end.
 */
#include "kernels/vec.h"

void embed_ref(const struct embed_args *a)
{
    for (int t = 0; t < a->T; t++) {
        const bf16_t *row = a->table + (int64_t)a->token[t] * a->H;
        float *out = a->out + (int64_t)t * a->H;
        for (int i = 0; i < a->H; i++)
            out[i] = bf16_to_f32(row[i]);
    }
}

void argmax_ref(const struct argmax_args *a)
{
    for (int t = 0; t < a->T; t++) {
        const float *x = a->x + (int64_t)t * a->n;
        // The largest value first, then where it is.
        float best = x[0];
        int i = 0;
        if (a->n_valid >= VEC_WIDTH) {
            vec m = vec_load(x);
            for (i = VEC_WIDTH; i + VEC_WIDTH <= a->n_valid; i += VEC_WIDTH)
                m = vec_max(vec_load(x + i), m);
            for (int lane = 0; lane < VEC_WIDTH; lane++)
                best = m[lane] > best ? m[lane] : best;
        }
        for (; i < a->n_valid; i++)
            best = x[i] > best ? x[i] : best;
        int32_t idx = 0;
        while (idx < a->n_valid - 1 && !(x[idx] == best))
            idx++;
        a->idx[t] = best == best ? idx : 0;
    }
}
