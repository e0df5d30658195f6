/* relax.h: for a thread that looks at a variable again and again until another one has changed it.
 */
#ifndef BATON_RELAX_H
#define BATON_RELAX_H

/* Tells the processor so: the other thread of its core gets more of it. */
static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
