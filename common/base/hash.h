/* hash.h: 64-bit hashing for fingerprints, page keys and checksums. Not for secrets. */
#ifndef BATON_HASH_H
#define BATON_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* SplitMix64's finaliser. */
static inline uint64_t hash_mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Chains n bytes onto a running hash. */
static inline uint64_t hash_bytes(uint64_t h, const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    h ^= n * 0x9e3779b97f4a7c15u;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        h = hash_mix(h ^ w) + 0x9e3779b97f4a7c15u;
    }
    uint64_t w = 0;
    memcpy(&w, p, n);
    return hash_mix(h ^ w ^ (uint64_t)n << 56);
}

/* Order-free sum of mixed words: a GPU computes it with one pass and atomics. n a multiple of 8. */
static inline uint64_t hash_sum64(const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    uint64_t sum = 0;
    for (size_t i = 0; i < n / 8; i++) {
        uint64_t w;
        memcpy(&w, p + i * 8, 8);
        w = (w ^ (i + 1) * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
        sum += w ^ w >> 29;
    }
    return sum;
}

#endif
