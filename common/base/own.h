/* own.h: scoped ownership.
 *
 * OWNED(kv_pool) p = kv_pool_create(..); destroys p when the scope ends, unless take(&p) moved it
 * out. The release is written beside the acquire, so every early return is safe.
 */
#ifndef BATON_OWN_H
#define BATON_OWN_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/param.h> /* MIN, MAX */
#include <unistd.h>

#define OWNED(type) __attribute__((cleanup(type##_drop))) struct type *
#define DEFINE_OWNED(type)                                                                         \
    static inline void type##_drop(struct type **p) { type##_destroy(*p); }

/* Moves the pointer out of an owner, leaving NULL behind. */
#define take(p)                                                                                    \
    __extension__({                                                                                \
        __typeof__(*(p)) t_ = *(p);                                                                \
        *(p) = NULL;                                                                               \
        t_;                                                                                        \
    })

static inline void own_free_drop(void *p) { free(*(void **)p); }
static inline void own_fd_drop(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}
static inline void own_file_drop(FILE **f)
{
    if (*f)
        fclose(*f);
}

#define OWNED_MEM  __attribute__((cleanup(own_free_drop)))
#define OWNED_FD   __attribute__((cleanup(own_fd_drop))) int
#define OWNED_FILE __attribute__((cleanup(own_file_drop))) FILE *

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

#endif
