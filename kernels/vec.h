/* vec.h: what the references compute with: 16 fp32 lanes, whatever the machine has.
 *
 * A sum over n values is 16 partial sums (value i goes to lane i % 16, i ascending) and then one
 * fixed tree over the lanes. That order is part of each result's definition: it holds for any block
 * shape and any vector width, so AVX-512 and AVX2 machines agree bit for bit (without FMA the
 * roundings differ). Functions marked VEC_CLONES are compiled once per instruction set.
 */
#ifndef BATON_VEC_H
#define BATON_VEC_H

#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 &&          \
    !defined(__SANITIZE_THREAD__)
#define VEC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VEC_CLONES
#endif
#define VEC_INLINE static inline __attribute__((always_inline))

/* Vectors never cross a call that is not inlined: their calling convention (-Wno-psabi) is no matter. */
#define VEC_LANES 16
typedef float vec __attribute__((vector_size(64)));
typedef float vec_mem __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vec_int __attribute__((vector_size(64)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_mem __attribute__((vector_size(16), aligned(4), may_alias));

/* Index of the calling thread in its pool, 0 for the one that called par_for. */
int par_self(void);

VEC_INLINE vec vec_load(const float *p) { return *(const vec_mem *)p; }
VEC_INLINE void vec_store(float *p, vec v) { *(vec_mem *)p = v; }

/* The first n < 16 values, zeros behind them. */
VEC_INLINE vec vec_load_part(const float *p, int64_t n)
{
    float t[VEC_LANES] = {0};
    memcpy(t, p, (size_t)n * sizeof(float));
    return vec_load(t);
}

VEC_INLINE void vec_store_part(float *p, vec v, int64_t n)
{
    float t[VEC_LANES];
    vec_store(t, v);
    memcpy(p, t, (size_t)n * sizeof(float));
}

VEC_INLINE float bf16_to_f32(bf16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

VEC_INLINE vec4 vec_fold(vec a)
{
    vec8 b = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
}

/* The tree over the lanes, for four sums at once. */
VEC_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d)
{
    vec4 a4 = vec_fold(a), b4 = vec_fold(b), c4 = vec_fold(c), d4 = vec_fold(d);
    vec4 ab = __builtin_shufflevector(a4, b4, 0, 1, 4, 5) +
              __builtin_shufflevector(a4, b4, 2, 3, 6, 7);
    vec4 cd = __builtin_shufflevector(c4, d4, 0, 1, 4, 5) +
              __builtin_shufflevector(c4, d4, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) +
           __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

VEC_INLINE float vec_sum(vec a)
{
    vec4 t = vec_fold(a);
    return (t[0] + t[2]) + (t[1] + t[3]);
}

VEC_INLINE vec vec_select(vec_int mask, vec a, vec b)
{
    return (vec)((mask & (vec_int)a) | (~mask & (vec_int)b));
}

VEC_INLINE vec vec_max(vec a, vec b) { return vec_select(a > b, a, b); }

/* e^x to 1-2 ulp (Cephes' expf): x = n ln 2 + r, polynomial in r, exponent from n. Below -87.3 it is
 * 0, above 88 it is e^88; NaN stays NaN. */
VEC_INLINE vec vec_exp(vec x)
{
    const vec zero = {0};
    const float round = 12582912.0f; // 1.5 * 2^23: adding it leaves an integer in the low bits
    vec t = vec_select(x > 88.0f, zero + 88.0f, x);
    t = vec_select(t < -87.3f, zero - 87.3f, t);
    vec shifted = t * 1.44269504f + round;
    vec n = shifted - round;
    vec r = t - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    p = p + 1.0f;
    vec_int bits = (vec_int)p + (((vec_int)shifted - (vec_int)(zero + round)) << 23);
    return vec_select(x < -87.3f, zero, vec_select(x == x, (vec)bits, x));
}

VEC_INLINE vec vec_sigmoid(vec x) { return 1.0f / (1.0f + vec_exp(-x)); }

/* y[r, o] = sum_i x[r, i] w[o, i] on the calling thread, for a tile of a larger product. x_row picks
 * rows of x (NULL: 0, 1, ..). */
struct dot_tile {
    const float *x;
    const int32_t *x_row;
    const bf16_t *w;
    float *y;
    int64_t x_stride, y_stride, w_stride;
    int n_rows, n_out, n_in;
    int accumulate;
};
void dot_tile(const struct dot_tile *t);

#define DOT_TILE_ROWS 32 /* rows that share one conversion of the weights */

#endif
