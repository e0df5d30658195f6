/* sample_math.h: the arithmetic of a draw, one definition for C and CUDA.
 *
 * Both sides must choose the same id, so nothing here depends on a math library, on contraction
 * into fused multiply-adds or on the order of a sum: products and sums are rounded one by one
 * (intrinsics on the device, -ffp-contract=off for C), and probability mass is counted in integers.
 */
#ifndef BATON_SAMPLE_MATH_H
#define BATON_SAMPLE_MATH_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SAMPLE_FN   static __device__ __forceinline__
#define MUL32(x, y) __fmul_rn(x, y)
#define ADD32(x, y) __fadd_rn(x, y)
#define MUL64(x, y) __dmul_rn(x, y)
#define ADD64(x, y) __dadd_rn(x, y)
#else
#define SAMPLE_FN   static inline
#define MUL32(x, y) ((x) * (y))
#define ADD32(x, y) ((x) + (y))
#define MUL64(x, y) ((x) * (y))
#define ADD64(x, y) ((x) + (y))
#endif

#define SAMPLE_MAX_V     (1 << 19) /* ids whose weights fit a sum of 64 bits */
#define SAMPLE_MAX_NOISE 22.9      /* above -log(-log(1 - 2^-33)) = 22.873 */
#define SAMPLE_PER_UNIT  16        /* buckets per unit of log-probability */
#define SAMPLE_N_BUCKETS 1024

/* Penalised logit of an id of prompt or output that occurs count times in the output. */
SAMPLE_FN float sample_penalise(float z, int32_t count, float repetition, float frequency,
                                float presence)
{
    if (repetition > 0 && repetition != 1)
        z = z > 0 ? z / repetition : MUL32(z, repetition);
    if (count > 0)
        z = ADD32(z, -ADD32(MUL32(frequency, (float)count), presence));
    return z;
}

/* exp(z) in units of 2^-44, rounded down, for z <= 0: by 2^n times the series of exp on +-ln(2)/2.
 * Below e^-31 it is 0, and NaN weighs nothing. */
SAMPLE_FN uint64_t sample_weight(float z)
{
    if (!(z > -31.0f))
        return 0;
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    float n = ADD32(ADD32(MUL32(z, 1.44269504f), round), -round);
    float r = ADD32(ADD32(z, -MUL32(n, 0.693359375f)), MUL32(n, 2.12194440e-4f));
    float p = 1.0f / 5040;
    p = ADD32(MUL32(p, r), 1.0f / 720);
    p = ADD32(MUL32(p, r), 1.0f / 120);
    p = ADD32(MUL32(p, r), 1.0f / 24);
    p = ADD32(MUL32(p, r), 1.0f / 6);
    p = ADD32(MUL32(p, r), 0.5f);
    p = ADD32(MUL32(p, r), 1.0f);
    p = ADD32(MUL32(p, r), 1.0f);
    float scaled;
    uint32_t bits = (uint32_t)((int32_t)n + 44 + 127) << 23;
    memcpy(&scaled, &bits, sizeof(scaled));
    return (uint64_t)MUL32(p, scaled);
}

/* log(x) for a positive normal x: exponent times ln 2, and 2 atanh((m - 1) / (m + 1)) by its series
 * for the mantissa in [sqrt(1/2), sqrt(2)]; 22 terms make 2^-55. Exact in the relative sense at 1.
 */
SAMPLE_FN double sample_log(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    double m;
    memcpy(&m, &bits, sizeof(m));
    if (m > 1.4142135623730951) {
        m = MUL64(m, 0.5);
        e++;
    }
    double s = ADD64(m, -1.0) / ADD64(m, 1.0), q = MUL64(s, s), p = 1.0 / 21;
    p = ADD64(MUL64(p, q), 1.0 / 19);
    p = ADD64(MUL64(p, q), 1.0 / 17);
    p = ADD64(MUL64(p, q), 1.0 / 15);
    p = ADD64(MUL64(p, q), 1.0 / 13);
    p = ADD64(MUL64(p, q), 1.0 / 11);
    p = ADD64(MUL64(p, q), 1.0 / 9);
    p = ADD64(MUL64(p, q), 1.0 / 7);
    p = ADD64(MUL64(p, q), 1.0 / 5);
    p = ADD64(MUL64(p, q), 1.0 / 3);
    s = MUL64(s, 2.0);
    s = ADD64(s, MUL64(s, MUL64(p, q)));
    return ADD64(MUL64((double)e, 0.69314718055994531), s);
}

/* Gumbel noise of a 32-bit random number: -log(-log(u)) at u = (x + 0.5) / 2^32. */
SAMPLE_FN double sample_noise(uint32_t x)
{
    double u = MUL64(ADD64((double)x, 0.5), 0x1p-32);
    return -sample_log(-sample_log(u));
}

/* At least sample_noise(x), cheaply: -log u >= 1 - u, and 1 - u >= 2^-(leading ones of x + 1). */
SAMPLE_FN double sample_noise_bound(uint32_t x)
{
#ifdef __CUDACC__
    int ones = __clz(~x);
#else
    int ones = ~x ? __builtin_clz(~x) : 32;
#endif
    return MUL64((double)(ones + 1), 0.69314719);
}

/* The mass that top-p asks for, of a total. Never 0: the best id always stays. */
SAMPLE_FN uint64_t sample_share(float p, uint64_t total)
{
    double want = p > 0 ? MUL64((double)p, (double)total) : 0;
    return want > 1 ? (uint64_t)want : 1;
}

/* Largest distance to the best id that min_p leaves, as a logarithm (<= 0). */
SAMPLE_FN float sample_least(float min_p)
{
    return min_p < 1 ? (float)sample_log((double)min_p) : 0.0f;
}

/* Philox4x32-10 (Salmon et al., SC'11). */
SAMPLE_FN void sample_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int i = 0; i < 10; i++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    ret[0] = c0;
    ret[1] = c1;
    ret[2] = c2;
    ret[3] = c3;
}

#endif
