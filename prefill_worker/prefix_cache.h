/* prefix_cache.h: full KV pages of earlier prompts, found again by their tokens.
 *
 * A page is known by its salt, its 64 token ids and the page before it, all compared exactly;
 * hashes only say where to look. So a hit is never somebody else's prompt, and prompts with
 * different salts never share. The cached pages form a tree: a page stays as long as a page after
 * it is cached.
 *
 * The MTP layer's KV of a page's last position is computed from the token AFTER the page, which the
 * key does not cover. It only influences drafts, never text: a draft made from another next token
 * is accepted less often, that is all. But the slot must have been written: insert a page only once
 * the token after it was known and its MTP row computed.
 *
 * Pages in the cache are read-only for everybody. Not thread-safe.
 */
#ifndef BATON_PREFIX_CACHE_H
#define BATON_PREFIX_CACHE_H

#include <stdint.h>

#include "common/engine/kv_pool.h"

struct prefix_cache;

/* pool must outlive the cache. All memory is allocated here. */
MUST_CHECK enum err prefix_cache_create(struct kv_pool *pool, struct prefix_cache **ret);
void prefix_cache_destroy(struct prefix_cache *c); /* clears first */
DEFINE_OWNED(prefix_cache)

/* Finds the longest cached beginning of a prompt of n tokens, at most (n - 1) / 64 pages, so that
 * at least one token is left to compute. Returns their number; ret gets the pages, with one
 * reference (kv_pool_ref) each for the caller. */
uint32_t prefix_cache_lookup(struct prefix_cache *c, uint64_t salt, const int32_t *ids, uint32_t n,
                             uint32_t *ret);

/* Registers the first n_full_pages pages of a prompt, as far as their content is not cached yet; of
 * two pages with equal content the first stays. A prompt may come again with more pages. */
void prefix_cache_insert(struct prefix_cache *c, uint64_t salt, const int32_t *ids,
                         uint32_t n_full_pages, const uint32_t *pages);

/* Frees up to n_wanted pages that nobody else holds and no cached page follows, least recently used
 * first. Returns how many became free. */
uint32_t prefix_cache_evict(struct prefix_cache *c, uint32_t n_wanted);

/* Forgets everything; pages that somebody still holds become free when let go. */
void prefix_cache_clear(struct prefix_cache *c);

#endif
