/* device.h: a GPU as the rest of the engine sees it: memory, copies, checksums, the forward pass.
 *
 * Nothing outside of the CUDA module includes a CUDA header or links its libraries. device_open
 * loads the module (baton_cuda.so, beside the executable) when a GPU is asked for, so that a worker
 * on the CPU starts without cuBLAS. A program that links the module's objects uses those instead.
 *
 * Memory comes from the driver's virtual memory interface: an allocation is a file descriptor that
 * other processes can map, and it lives until the last of them lets go, whoever dies first.
 */
#ifndef BATON_DEVICE_H
#define BATON_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"

struct device;
struct engine;
struct kv_pool;
struct weights_region;

struct device_memory {
    void *base; /* device address; NULL: none */
    uint64_t bytes, mapped_bytes;
    int fd;          /* names the allocation to other processes; -1 for an imported one */
    uint64_t handle; /* the driver's */
};

/* "cpu" and "mock" give NULL, which every caller understands as host memory. ERR_INVALID for
 * another name, a GPU that is not there or not a Hopper, or a build without CUDA. Callable once per
 * process. */
MUST_CHECK enum err device_open(const char *name, struct device **ret);
/* Makes KV transport nccl known (kv_transport.h), from a module beside the CUDA one. host: where
 * this worker listens. ERR_INVALID: no module, or no NCCL on this machine. */
MUST_CHECK enum err device_load_nccl(const char *host);
void device_destroy(struct device *d);
DEFINE_OWNED(device)

struct device_ops {
    void (*close)(struct device *d);
    enum err (*room)(struct device *d, uint64_t *ret_free, uint64_t *ret_total);
    enum err (*alloc)(struct device *d, uint64_t bytes, struct device_memory *ret);
    enum err (*import)(struct device *d, int fd, uint64_t bytes, struct device_memory *ret);
    void (*release)(struct device *d, struct device_memory *m);
    enum err (*stage)(struct device *d, uint64_t bytes, void **ret);
    void (*unstage)(struct device *d, void *stage);
    enum err (*put)(struct device *d, void *to, const void *from, uint64_t n);
    enum err (*copy_pages)(struct device *d, void *to, const uint32_t *to_pages, const void *from,
                           const uint32_t *from_pages, uint32_t n, uint64_t page_bytes);
    enum err (*fill)(struct device *d, void *arena, const struct weights_region *r);
    enum err (*flush)(struct device *d);
    enum err (*checksums)(struct device *d, const void *base, uint64_t page_bytes,
                          const uint32_t *pages, uint32_t n, uint64_t *ret);
    uint64_t (*engine_bytes)(const struct engine *base); /* beside weights and pages */
    enum err (*engine)(const struct engine *base, struct device *d, struct kv_pool *pool,
                       struct engine **ret);
};

/* What every device begins with. */
struct device {
    const struct device_ops *ops;
    int ordinal;
    uint64_t id; /* of the physical GPU, equal in all processes of a host */
    char name[64];
};

/* Free and total bytes, as the driver says now. */
static inline enum err device_room(struct device *d, uint64_t *ret_free, uint64_t *ret_total)
{
    return d->ops->room(d, ret_free, ret_total);
}
/* Zeroed memory. ERR_NOMEM names wanted and free bytes. */
static inline enum err device_alloc(struct device *d, uint64_t bytes, struct device_memory *ret)
{
    return d->ops->alloc(d, bytes, ret);
}
/* Maps memory that another process allocated (on this or, where peers are connected, another GPU of
 * the host). fd stays the caller's. */
static inline enum err device_import(struct device *d, int fd, uint64_t bytes,
                                     struct device_memory *ret)
{
    return d->ops->import(d, fd, bytes, ret);
}
void device_release(struct device *d, struct device_memory *m); /* also of an empty one */

/* Pinned host memory, from which copies are fast. */
static inline enum err device_stage(struct device *d, uint64_t bytes, void **ret)
{
    return d->ops->stage(d, bytes, ret);
}
static inline void device_unstage(struct device *d, void *stage) { d->ops->unstage(d, stage); }
/* Copies n bytes in; done when it returns. From any thread. */
static inline enum err device_put(struct device *d, void *to, const void *from, uint64_t n)
{
    return d->ops->put(d, to, from, n);
}
/* to[to_pages[i]] = from[from_pages[i]] within device memory; done when it returns. From any
 * thread. */
static inline enum err device_copy_pages(struct device *d, void *to, const uint32_t *to_pages,
                                         const void *from, const uint32_t *from_pages, uint32_t n,
                                         uint64_t page_bytes)
{
    return d->ops->copy_pages(d, to, to_pages, from, from_pages, n, page_bytes);
}
/* One tensor of a dummy model, asynchronously; device_flush waits for all. */
static inline enum err device_fill(struct device *d, void *arena, const struct weights_region *r)
{
    return d->ops->fill(d, arena, r);
}
static inline enum err device_flush(struct device *d) { return d->ops->flush(d); }
/* hash_sum64 of each of n pages (at most 4096 at once) of an array at base. */
static inline enum err device_checksums(struct device *d, const void *base, uint64_t page_bytes,
                                        const uint32_t *pages, uint32_t n, uint64_t *ret)
{
    return d->ops->checksums(d, base, page_bytes, pages, n, ret);
}

/* ---- the module ---- */

#define DEVICE_MODULE_VERSION 1

struct device_module {
    int version; /* first: DEVICE_MODULE_VERSION of the module's build */
    enum err (*open)(int ordinal, struct device **ret);
};
extern const struct device_module baton_cuda __attribute__((weak));

#endif
