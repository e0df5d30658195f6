/* warm.h: asks for memory before it is needed, where hundreds of cold objects are visited in turn:
 * their loads run side by side instead of one behind the other. */
#ifndef BATON_WARM_H
#define BATON_WARM_H

#include <stddef.h>
#include <stdint.h>

#define CACHE_LINE 64u

/* Starts to load the n bytes at p, and does not wait for them. p is not read: NULL does no harm. */
static inline void warm(const void *p, size_t n)
{
    uintptr_t at = (uintptr_t)p, end = at + n;
    for (at &= ~(uintptr_t)(CACHE_LINE - 1); at < end; at += CACHE_LINE)
        __builtin_prefetch((const void *)at);
}

#endif
