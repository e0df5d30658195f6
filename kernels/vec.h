/* vec.h: what the references compute with: 16 lanes of fp32, in as many registers as that takes.
 *
 * A sum over n values is 16 partial sums (value i goes to lane i % 16, i ascending) and then one
 * fixed tree over the lanes. That order is part of each result's definition and holds for any block
 * shape and register width, so AVX-512 and AVX2 machines agree bit for bit (a build without FMA
 * rounds differently). Code works on `vec`, one register's worth; sums walk the lanes in
 * VEC_STRIPS strips.
 *
 * Include this first: it gives the file's functions the suffix of the build (isa.h).
 */
#ifndef BATON_VEC_H
#define BATON_VEC_H

#ifndef ISA
#define ISA base
#endif
#define ISA_PASTE_(name, isa) name##_##isa
#define ISA_PASTE(name, isa)  ISA_PASTE_(name, isa)
#define embed_ref             ISA_PASTE(embed_ref, ISA)
#define rmsnorm_ref           ISA_PASTE(rmsnorm_ref, ISA)
#define gemm_ref              ISA_PASTE(gemm_ref, ISA)
#define rope_ref              ISA_PASTE(rope_ref, ISA)
#define mla_ref               ISA_PASTE(mla_ref, ISA)
#define mla_expanded_ref      ISA_PASTE(mla_expanded_ref, ISA)
#define mla_work_floats       ISA_PASTE(mla_work_floats, ISA)
#define route_ref             ISA_PASTE(route_ref, ISA)
#define swiglu_ref            ISA_PASTE(swiglu_ref, ISA)
#define moe_ref               ISA_PASTE(moe_ref, ISA)
#define moe_work_floats       ISA_PASTE(moe_work_floats, ISA)
#define argmax_ref            ISA_PASTE(argmax_ref, ISA)
#define dot_tile              ISA_PASTE(dot_tile, ISA)

#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/par.h"

#if defined(__AVX512F__)
#define VEC_WIDTH 16
#elif defined(__AVX__)
#define VEC_WIDTH 8
#else
#define VEC_WIDTH 4
#endif
#define SUM_LANES          16
#define VEC_STRIPS         (SUM_LANES / VEC_WIDTH)
#define VEC_BYTES          (4 * VEC_WIDTH)
#define VEC_MANY_REGISTERS (VEC_WIDTH == 16) /* 32 of them instead of 16 */

#define VEC_INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(VEC_BYTES)));
typedef float vec_mem __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));
typedef int32_t vec_int __attribute__((vector_size(VEC_BYTES)));
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_mem __attribute__((vector_size(16), aligned(4), may_alias));

VEC_INLINE vec vec_load(const float *p) { return *(const vec_mem *)p; }
VEC_INLINE void vec_store(float *p, vec v) { *(vec_mem *)p = v; }

/* The first n < VEC_WIDTH values, zeros behind them. */
VEC_INLINE vec vec_load_part(const float *p, int64_t n)
{
    float t[VEC_WIDTH] = {0};
    memcpy(t, p, (size_t)n * sizeof(float));
    return vec_load(t);
}

VEC_INLINE void vec_store_part(float *p, vec v, int64_t n)
{
    float t[VEC_WIDTH];
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

VEC_INLINE vec4 lanes_fold(const float lanes[SUM_LANES])
{
    const vec4_mem *l = (const vec4_mem *)lanes;
    return (l[0] + l[2]) + (l[1] + l[3]);
}

/* The tree over the lanes. */
VEC_INLINE float lanes_sum(const float lanes[SUM_LANES])
{
    vec4 t = lanes_fold(lanes);
    return (t[0] + t[2]) + (t[1] + t[3]);
}

/* The same for four sums at once. */
VEC_INLINE vec4 lanes_sum4(const float lanes[4][SUM_LANES])
{
    vec4 a = lanes_fold(lanes[0]), b = lanes_fold(lanes[1]), c = lanes_fold(lanes[2]),
         d = lanes_fold(lanes[3]);
    vec4 ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    vec4 cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) +
           __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

VEC_INLINE vec vec_select(vec_int mask, vec a, vec b)
{
    return (vec)((mask & (vec_int)a) | (~mask & (vec_int)b));
}

VEC_INLINE vec vec_max(vec a, vec b) { return vec_select(a > b, a, b); }

/* e^x to 1-2 ulp (Cephes' expf): x = n ln 2 + r, polynomial in r, exponent from n. Below -87.3 it
 * is 0, above 88 it is e^88; NaN stays NaN. */
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

/* y[r, o] = sum_i x[r, i] w[o, i] on the calling thread, for a tile of a larger product of at most
 * DOT_TILE_ROWS rows. x_row picks rows of x (NULL: 0, 1, ..). */
#define DOT_TILE_ROWS 32
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

#endif
