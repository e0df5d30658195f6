/* data.h: made-up inputs for kernel tests, the same on every run. */
#ifndef BATON_TEST_DATA_H
#define BATON_TEST_DATA_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/isa.h"
#include "kernels/kernels.h"

static uint64_t data_seed = 20;

static inline uint32_t data_u32(void)
{
    data_seed = data_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(data_seed >> 33) << 1 ^ (uint32_t)(data_seed >> 40);
}
static inline int data_below(int n) { return (int)(data_u32() % (uint32_t)n); }
static inline float data_float(void) { return (float)(int32_t)data_u32() * 0x1p-31f; } // [-1, 1)

static inline void *data_alloc(int64_t n, size_t size)
{
    void *p = calloc((size_t)(n > 0 ? n : 1), size);
    if (!p)
        abort();
    return p;
}

static inline float *data_floats(int64_t n)
{
    float *p = data_alloc(n, sizeof(*p));
    for (int64_t i = 0; i < n; i++)
        p[i] = data_float();
    return p;
}

static inline bf16_t *data_weights(int64_t n)
{
    bf16_t *p = data_alloc(n, sizeof(*p));
    for (int64_t i = 0; i < n; i++) {
        float f = data_float();
        uint32_t bits;
        memcpy(&bits, &f, sizeof(bits));
        p[i] = (bf16_t)(bits >> 16);
    }
    return p;
}

static inline double data_bf16(bf16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static inline bool data_same(const void *a, const void *b, int64_t n_floats)
{
    return memcmp(a, b, (size_t)n_floats * sizeof(float)) == 0;
}

/* Runs a test with each build of the kernels that this machine can run. */
static inline void data_each_isa(void (*test)(void))
{
    static const char *const names[] = {"base", "v3", "v4"};
    for (int i = 0; i < 3; i++)
        if (isa_use(names[i]))
            test();
}

#endif
