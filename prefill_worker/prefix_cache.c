/* prefix_cache.c: see prefix_cache.h.
 *
 * One entry per page of the pool, found by the page's index, so nothing is allocated later. Entries
 * hang in a hash table and in one list by age.
 *
 * 1. In the list by age every entry stands before (is older than) the entry it follows in its
 *    prompt: whoever uses a page uses all before it, and we renew them from the last to the first.
 * 2. So one walk from the oldest on meets children before parents, and can free whole branches.
 */
#include "prefill_worker/prefix_cache.h"

#include <assert.h>
#include <stdbool.h>
#include <string.h>

#include "common/base/hash.h"

#define PAGE_TOKENS 64u
#define NONE        UINT32_MAX

struct entry {
    bool is_cached;
    uint64_t salt;
    uint64_t key;        // hash of the parent's key, salt and ids
    uint32_t parent;     // page before this one in its prompts; NONE: this is the first
    uint32_t n_children; // cached pages that follow this one
    uint32_t next_in_bucket;
    uint32_t older, newer;
    int32_t ids[PAGE_TOKENS];
};

struct prefix_cache {
    struct kv_pool *pool;
    struct entry *entries; // by page index
    uint32_t *buckets;
    uint32_t bucket_mask;
    uint32_t oldest, newest;
};

static uint32_t entry_find(const struct prefix_cache *c, uint64_t key, uint64_t salt,
                           uint32_t parent, const int32_t *ids);
static void entry_add(struct prefix_cache *c, uint32_t page, uint64_t key, uint64_t salt,
                      uint32_t parent, const int32_t *ids);
static void entry_remove(struct prefix_cache *c, uint32_t page);
static void entry_renew(struct prefix_cache *c, uint32_t page);
static void branch_renew(struct prefix_cache *c, uint32_t page);

enum err prefix_cache_create(struct kv_pool *pool, struct prefix_cache **ret)
{
    uint32_t n = kv_pool_get_config(pool)->n_pages;
    OWNED(prefix_cache) c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for a prefix cache");
    uint32_t n_buckets = 1;
    while (n_buckets < n && n_buckets < 1u << 30)
        n_buckets *= 2;
    c->pool = pool;
    c->bucket_mask = n_buckets - 1;
    c->oldest = c->newest = NONE;
    c->entries = calloc(n, sizeof(c->entries[0]));
    c->buckets = malloc(n_buckets * sizeof(c->buckets[0]));
    if (!c->entries || !c->buckets)
        return err_set(ERR_NOMEM, "no memory for a prefix cache of %u pages", n);
    memset(c->buckets, 0xff, n_buckets * sizeof(c->buckets[0])); // NONE
    *ret = take(&c);
    return ERR_OK;
}

void prefix_cache_destroy(struct prefix_cache *c)
{
    if (!c)
        return;
    if (c->entries && c->buckets)
        prefix_cache_clear(c);
    free(c->entries);
    free(c->buckets);
    free(c);
}

static uint64_t page_key(uint64_t parent_key, uint64_t salt, const int32_t *ids)
{
    return hash_bytes(hash_mix(parent_key ^ salt), ids, PAGE_TOKENS * sizeof(ids[0]));
}

uint32_t prefix_cache_lookup(struct prefix_cache *c, uint64_t salt, const int32_t *ids, uint32_t n,
                             uint32_t *ret)
{
    uint32_t n_found = 0, parent = NONE;
    uint64_t key = 0;
    while (n && n_found < (n - 1) / PAGE_TOKENS) {
        const int32_t *page_ids = ids + (size_t)n_found * PAGE_TOKENS;
        key = page_key(key, salt, page_ids);
        uint32_t page = entry_find(c, key, salt, parent, page_ids);
        if (page == NONE)
            break;
        kv_pool_ref(c->pool, page);
        ret[n_found++] = parent = page;
    }
    branch_renew(c, parent);
    return n_found;
}

void prefix_cache_insert(struct prefix_cache *c, uint64_t salt, const int32_t *ids,
                         uint32_t n_full_pages, const uint32_t *pages)
{
    uint32_t parent = NONE;
    uint64_t key = 0;
    for (uint32_t i = 0; i < n_full_pages; i++) {
        const int32_t *page_ids = ids + (size_t)i * PAGE_TOKENS;
        key = page_key(key, salt, page_ids);
        uint32_t page = entry_find(c, key, salt, parent, page_ids);
        if (page == NONE) {
            page = pages[i];
            entry_add(c, page, key, salt, parent, page_ids);
        }
        parent = page;
    }
    branch_renew(c, parent);
}

uint32_t prefix_cache_evict(struct prefix_cache *c, uint32_t n_wanted)
{
    uint32_t n_freed = 0;
    for (uint32_t page = c->oldest, newer; page != NONE && n_freed < n_wanted; page = newer) {
        newer = c->entries[page].newer;
        if (c->entries[page].n_children || kv_pool_refs(c->pool, page) ||
            kv_pool_transfers(c->pool, page))
            continue;
        entry_remove(c, page);
        n_freed++;
    }
    return n_freed;
}

void prefix_cache_clear(struct prefix_cache *c)
{
    while (c->oldest != NONE) // children before parents
        entry_remove(c, c->oldest);
}

/* ---- entries ---- */

/* The parent is compared by identity: it was compared by content when it was found, and so on up to
 * the first page. The hash decides nothing. */
static uint32_t entry_find(const struct prefix_cache *c, uint64_t key, uint64_t salt,
                           uint32_t parent, const int32_t *ids)
{
    uint32_t page = c->buckets[key & c->bucket_mask];
    for (; page != NONE; page = c->entries[page].next_in_bucket) {
        const struct entry *e = &c->entries[page];
        if (e->key == key && e->salt == salt && e->parent == parent &&
            !memcmp(e->ids, ids, sizeof(e->ids)))
            break;
    }
    return page;
}

static void entry_add(struct prefix_cache *c, uint32_t page, uint64_t key, uint64_t salt,
                      uint32_t parent, const int32_t *ids)
{
    assert(page < kv_pool_get_config(c->pool)->n_pages);
    struct entry *e = &c->entries[page];
    assert(!e->is_cached); // else its content would have changed under the cache
    kv_pool_cache_ref(c->pool, page);
    uint32_t *bucket = &c->buckets[key & c->bucket_mask];
    *e = (struct entry){
        .is_cached = true,
        .salt = salt,
        .key = key,
        .parent = parent,
        .next_in_bucket = *bucket,
        .older = c->newest,
        .newer = NONE,
    };
    memcpy(e->ids, ids, sizeof(e->ids));
    *bucket = page;
    *(c->newest != NONE ? &c->entries[c->newest].newer : &c->oldest) = page;
    c->newest = page;
    if (parent != NONE)
        c->entries[parent].n_children++;
}

static void age_unlink(struct prefix_cache *c, struct entry *e)
{
    *(e->older != NONE ? &c->entries[e->older].newer : &c->oldest) = e->newer;
    *(e->newer != NONE ? &c->entries[e->newer].older : &c->newest) = e->older;
}

static void entry_remove(struct prefix_cache *c, uint32_t page)
{
    struct entry *e = &c->entries[page];
    assert(e->is_cached && !e->n_children);
    uint32_t *at = &c->buckets[e->key & c->bucket_mask];
    while (*at != page)
        at = &c->entries[*at].next_in_bucket;
    *at = e->next_in_bucket;
    age_unlink(c, e);
    if (e->parent != NONE)
        c->entries[e->parent].n_children--;
    e->is_cached = false;
    kv_pool_cache_unref(c->pool, page);
}

static void entry_renew(struct prefix_cache *c, uint32_t page)
{
    struct entry *e = &c->entries[page];
    age_unlink(c, e);
    e->older = c->newest;
    e->newer = NONE;
    *(c->newest != NONE ? &c->entries[c->newest].newer : &c->oldest) = page;
    c->newest = page;
}

/* Makes page and all before it the newest, in the order of rule 1. */
static void branch_renew(struct prefix_cache *c, uint32_t page)
{
    for (; page != NONE; page = c->entries[page].parent)
        entry_renew(c, page);
}
