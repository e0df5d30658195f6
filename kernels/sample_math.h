/* sample_math.h: the arithmetic of the filters, the same on the host and on the device.
 *
 * Sums of probabilities are integers, so they do not depend on the order of their terms; the
 * exponential is one polynomial with explicit roundings, so both sides add the same terms. Included
 * by C and CUDA.
 */
#ifndef BATON_SAMPLE_MATH_H
#define BATON_SAMPLE_MATH_H

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SAMPLE_FN static __host__ __device__ inline
#else
#define SAMPLE_FN static inline
#endif

#define SAMPLE_BUCKETS   1024
#define SAMPLE_PER_UNIT  16   /* buckets per unit of log-probability */
#define SAMPLE_MAX_NOISE 22.9 /* above -log(-log(1 - 2^-33)) = 22.873 */
#define SAMPLE_ONE       0x1p40f

/* Bucket of a value that is relative to the largest, so at most 0. */
SAMPLE_FN int sample_bucket(float z)
{
    return z > -(float)(SAMPLE_BUCKETS - 1) / SAMPLE_PER_UNIT ? (int)(z * -SAMPLE_PER_UNIT)
                                                              : SAMPLE_BUCKETS - 1;
}

/* exp(z) * 2^40 for z <= 0, rounded down; relative error below 1e-6. */
SAMPLE_FN uint64_t sample_mass(float z)
{
    if (!(z > -27.0f)) // below half of a unit: 2^40 * e^-28 = 0.76
        return 0;
    float n = floorf(fmaf(z, 1.44269504f, 0.5f)); // explicit, so that nobody contracts
    float r = fmaf(n, -0.693359375f, z);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f; // Cephes' coefficients of exp
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r);
    return (uint64_t)ldexpf((p + 1.0f) * SAMPLE_ONE, (int)n);
}

#endif
