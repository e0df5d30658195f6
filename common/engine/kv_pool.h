/* kv_pool.h: KV pages and who holds them.
 *
 * kv[page][layer][64][576], page-major: one page is one contiguous block, so handing a prompt over
 * is a few large copies straight from pool to pool. Layers include the MTP layer.
 *
 *   FREE -alloc-> RESERVED -first row written or transfer ended-> LIVE -release-> FREE
 *                    |  ^                                          |
 *              transfer posted / ended                     cached (prefix cache holds it)
 * 1. A page has one writer; sharers only read, and each holds one reference.
 * 2. A page is free only when it has no reference AND no transfer names it.
 * 3. Cancelling never frees a page in flight; the end of its last transfer does.
 * 4. free + reserved + in flight + live + cached == total, always.
 *
 * Not thread-safe, except that a transport's own threads may read and write page memory.
 */
#ifndef BATON_KV_POOL_H
#define BATON_KV_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"
#include "common/engine/device.h"

struct kv_pool;

struct kv_pool_config {
    uint32_t n_pages;
    uint32_t n_layers;     /* decoder and MTP layers */
    uint32_t kv_width;     /* values per token and layer: 576 */
    uint32_t dtype_bytes;  /* 4: fp32 on the CPU; 2: bf16 on the GPU */
    const char *shm_name;  /* "/name": other processes of this user may map the pages (on a device:
                              ask the share of that name for them); NULL: private */
    struct device *device; /* whose memory the pages are in; NULL: host memory */
};

struct kv_counts {
    uint32_t total, free, reserved, in_flight, live, cached;
};

/* All pages are free. c is copied; its device must outlive the pool. A name left by a dead process
 * is taken over. ERR_INVALID: no pages, a shape that no memory holds, a name that is none.
 * ERR_NOMEM (of a device ERR_CUDA too): the memory is not to be had. ERR_IO: the name is a living
 * process's. */
MUST_CHECK enum err kv_pool_create(const struct kv_pool_config *c, struct kv_pool **ret);
void kv_pool_destroy(struct kv_pool *p);
DEFINE_OWNED(kv_pool)

/* Takes n pages, all or nothing, with one reference each, state RESERVED. Never blocks or allocates
 * memory. ERR_NO_PAGES: nothing was taken; worth retrying after any release. */
MUST_CHECK enum err kv_pool_alloc(struct kv_pool *p, uint32_t n, uint32_t *ret);
void kv_pool_ref(struct kv_pool *p, uint32_t page);      /* one more sharer */
void kv_pool_unref(struct kv_pool *p, uint32_t page);    /* last one gone: free, unless in flight */
void kv_pool_set_live(struct kv_pool *p, uint32_t page); /* RESERVED -> LIVE */
/* The prefix cache's own reference: counted as cached while it is the only one. */
void kv_pool_cache_ref(struct kv_pool *p, uint32_t page);
void kv_pool_cache_unref(struct kv_pool *p, uint32_t page);
uint32_t kv_pool_refs(const struct kv_pool *p, uint32_t page);      /* without the cache's */
uint32_t kv_pool_transfers(const struct kv_pool *p, uint32_t page); /* that name it */
void kv_pool_transfer_begin(struct kv_pool *p, uint32_t page);
void kv_pool_transfer_end(struct kv_pool *p, uint32_t page);

struct kv_counts kv_pool_counts(const struct kv_pool *p);
/* Recounts from the pages and asserts rule 4 (also in release builds). */
void kv_pool_check(const struct kv_pool *p);

void *kv_pool_base(const struct kv_pool *p);
uint64_t kv_pool_page_bytes(const struct kv_pool *p);
void *kv_pool_page(const struct kv_pool *p, uint32_t page);
const struct kv_pool_config *kv_pool_get_config(const struct kv_pool *p);

/* Adds n pages' content and order (not their indexes) to *sum. nth: pages summed before. ERR_CUDA.
 */
MUST_CHECK enum err kv_pool_checksum(const struct kv_pool *p, const uint32_t *pages, uint32_t n,
                                     uint32_t nth, uint64_t *sum);

#endif
