/* kv_pool.c: see kv_pool.h.
 *
 * Every change goes through page_leave and page_enter, which keep the counters and the free list in
 * step with the pages; nothing else touches them. The free list is last in, first out: the page
 * that was freed last is the one most likely still in a cache.
 *
 * A shared pool's object is locked (flock) as long as its owner lives, and the kernel drops the
 * lock with the process. So what killed workers left behind is recognised: whoever makes a shared
 * pool removes it first, its own name's and that of others, who may never come back.
 */
#include "common/engine/kv_pool.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "common/base/fd_share.h"
#include "common/base/hash.h"

#define PAGE_TOKENS  64u
#define NO_PAGE      UINT32_MAX
#define SUMS_AT_ONCE 256u
#define CLAIM_TRIES  100

enum page_class { PAGE_FREE, PAGE_RESERVED, PAGE_IN_FLIGHT, PAGE_LIVE, PAGE_CACHED, N_CLASSES };

struct page {
    uint32_t n_refs; // without the cache's
    uint32_t n_transfers;
    uint32_t next_free;
    bool is_cached; // the prefix cache holds it
    bool is_live;
};

struct kv_pool {
    struct kv_pool_config config;
    char *shm_name;
    int shm_fd; // -1: private memory
    struct device_memory device_memory;
    struct fd_share *share; // of the device memory
    uint8_t *memory;
    uint64_t page_bytes, memory_bytes;
    struct page *pages;
    uint32_t first_free;
    uint32_t counts[N_CLASSES];
};

static enum err memory_map(struct kv_pool *p);
static enum err device_map(struct kv_pool *p, const char *share);
static enum err shm_claim(const char *name, int *ret);

enum err kv_pool_create(const struct kv_pool_config *c, struct kv_pool **ret)
{
    uint64_t page_bytes;
    if (c->n_pages == 0 || c->n_pages == NO_PAGE || c->n_layers == 0 || c->kv_width == 0 ||
        (c->dtype_bytes != 2 && c->dtype_bytes != 4) ||
        __builtin_mul_overflow((uint64_t)PAGE_TOKENS * c->dtype_bytes * c->n_layers,
                               (uint64_t)c->kv_width, &page_bytes) ||
        page_bytes > INT64_MAX / c->n_pages)
        return err_set(ERR_INVALID, "KV pool of %u pages x %u layers x %u values x %u bytes",
                       c->n_pages, c->n_layers, c->kv_width, c->dtype_bytes);
    OWNED(kv_pool) p = calloc(1, sizeof(*p));
    if (!p)
        return err_set(ERR_NOMEM, "no memory for a KV pool");
    p->shm_fd = -1;
    p->config = *c;
    p->config.shm_name = NULL;
    p->page_bytes = page_bytes;
    p->memory_bytes = page_bytes * c->n_pages;
    p->pages = calloc(c->n_pages, sizeof(p->pages[0]));
    if (!p->pages)
        return err_set(ERR_NOMEM, "no memory for %u KV pages' states", c->n_pages);
    if (c->device)
        TRY(device_map(p, c->shm_name));
    else if (c->shm_name) {
        OWNED_MEM char *name = strdup(c->shm_name);
        if (!name)
            return err_set(ERR_NOMEM, "no memory for a KV pool");
        TRY(shm_claim(name, &p->shm_fd));
        p->config.shm_name = p->shm_name = take(&name);
    }
    if (!c->device)
        TRY(memory_map(p));

    p->first_free = NO_PAGE;
    for (uint32_t i = c->n_pages; i-- > 0;) { // so that page 0 is taken first
        p->pages[i].next_free = p->first_free;
        p->first_free = i;
    }
    p->counts[PAGE_FREE] = c->n_pages;
    *ret = take(&p);
    return ERR_OK;
}

void kv_pool_destroy(struct kv_pool *p)
{
    if (!p)
        return;
    fd_share_destroy(p->share);
    if (p->config.device)
        device_release(p->config.device, &p->device_memory);
    else if (p->memory)
        munmap(p->memory, p->memory_bytes);
    if (p->shm_name)
        shm_unlink(p->shm_name);
    if (p->shm_fd >= 0)
        close(p->shm_fd);
    free(p->shm_name);
    free(p->pages);
    free(p);
}

static enum err device_map(struct kv_pool *p, const char *share)
{
    TRY(device_alloc(p->config.device, p->memory_bytes, &p->device_memory));
    p->memory = p->device_memory.base;
    if (!share)
        return ERR_OK;
    TRY(fd_share_claim(share, &p->share));
    return fd_share_serve(p->share, p->device_memory.fd, p->memory_bytes);
}

/* The kernel hands out zeroed memory in both cases. */
static enum err memory_map(struct kv_pool *p)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (p->shm_fd >= 0) {
        flags = MAP_SHARED;
        // Allocated now: a full /dev/shm is a message here and SIGBUS later.
        int e;
        do
            e = posix_fallocate(p->shm_fd, 0, (off_t)p->memory_bytes);
        while (e == EINTR);
        if (e)
            return err_set(e == ENOSPC || e == ENOMEM ? ERR_NOMEM : ERR_IO,
                           "shared memory %s: %" PRIu64 " bytes: %s", p->shm_name, p->memory_bytes,
                           strerror(e));
    }
    void *m = mmap(NULL, p->memory_bytes, PROT_READ | PROT_WRITE, flags, p->shm_fd, 0);
    if (m == MAP_FAILED)
        return err_set(ERR_NOMEM, "KV pool of %" PRIu64 " bytes: %s", p->memory_bytes,
                       strerror(errno));
    p->memory = m;
    madvise(m, p->memory_bytes, MADV_DONTDUMP); // prompts do not belong in core files
    return ERR_OK;
}

/* Removes objects of this family, '/x-y-' of '/x-y-z', whose owners died. */
static void shm_sweep(const char *name)
{
    const char *end = strrchr(name, '-');
    size_t n = end ? (size_t)(end - name) : strlen(name); // with the dash, without the slash
    DIR *d = opendir("/dev/shm");
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d));) {
        if (strncmp(e->d_name, name + 1, n))
            continue;
        OWNED_FD fd = openat(dirfd(d), e->d_name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        struct stat st;
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &st) == 0 && st.st_nlink > 0)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    closedir(d);
}

/* Creates the object and locks it. Others sweep, too: they may lock ours for a moment, or take it
 * for a left-over before we have locked it. */
static enum err shm_claim(const char *name, int *ret)
{
    if (name[0] != '/' || !name[1] || strchr(name + 1, '/'))
        return err_set(ERR_INVALID, "shared memory name '%s' is not of the form /name", name);
    for (int i = 0; i < CLAIM_TRIES; i++) {
        if (i > 0)
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        shm_sweep(name);
        OWNED_FD fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0 && errno != EEXIST)
            return err_set(ERR_IO, "shared memory %s: %s", name, strerror(errno));
        struct stat st;
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &st) == 0 &&
            st.st_nlink > 0) {
            *ret = fd;
            fd = -1;
            return ERR_OK;
        }
    }
    return err_set(ERR_IO, "shared memory %s belongs to a running process", name);
}

static enum page_class page_class(const struct page *g)
{
    if (g->n_transfers)
        return PAGE_IN_FLIGHT;
    if (g->n_refs)
        return g->is_live ? PAGE_LIVE : PAGE_RESERVED;
    return g->is_cached ? PAGE_CACHED : PAGE_FREE;
}

/* Takes a page out of its class; page_enter puts it back after the change. Only alloc may leave
 * FREE: a page in nobody's hands cannot be named by anybody. */
static struct page *page_leave(struct kv_pool *p, uint32_t page)
{
    assert(page < p->config.n_pages);
    struct page *g = &p->pages[page];
    enum page_class class = page_class(g);
    assert(class != PAGE_FREE);
    p->counts[class]--;
    return g;
}

static void page_enter(struct kv_pool *p, struct page *g)
{
    enum page_class class = page_class(g);
    p->counts[class]++;
    if (class == PAGE_FREE) {
        g->is_live = false;
        g->next_free = p->first_free;
        p->first_free = (uint32_t)(g - p->pages);
    }
}

enum err kv_pool_alloc(struct kv_pool *p, uint32_t n, uint32_t *ret)
{
    if (n > p->counts[PAGE_FREE])
        return err_set(ERR_NO_PAGES, "%u KV pages wanted, %u free", n, p->counts[PAGE_FREE]);
    for (uint32_t i = 0; i < n; i++) {
        ret[i] = p->first_free;
        struct page *g = &p->pages[ret[i]];
        p->first_free = g->next_free;
        g->n_refs = 1;
    }
    p->counts[PAGE_FREE] -= n;
    p->counts[PAGE_RESERVED] += n;
    return ERR_OK;
}

void kv_pool_ref(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    g->n_refs++;
    page_enter(p, g);
}

void kv_pool_unref(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    assert(g->n_refs > 0);
    g->n_refs--;
    page_enter(p, g);
}

void kv_pool_set_live(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    g->is_live = true;
    page_enter(p, g);
}

void kv_pool_cache_ref(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    assert(!g->is_cached);
    g->is_cached = true;
    g->is_live = true; // only what has been computed is cached
    page_enter(p, g);
}

void kv_pool_cache_unref(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    assert(g->is_cached);
    g->is_cached = false;
    page_enter(p, g);
}

uint32_t kv_pool_refs(const struct kv_pool *p, uint32_t page)
{
    assert(page < p->config.n_pages);
    return p->pages[page].n_refs;
}

uint32_t kv_pool_transfers(const struct kv_pool *p, uint32_t page)
{
    assert(page < p->config.n_pages);
    return p->pages[page].n_transfers;
}

void kv_pool_transfer_begin(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    g->n_transfers++;
    page_enter(p, g);
}

void kv_pool_transfer_end(struct kv_pool *p, uint32_t page)
{
    struct page *g = page_leave(p, page);
    assert(g->n_transfers > 0);
    g->n_transfers--;
    g->is_live = true;
    page_enter(p, g);
}

struct kv_counts kv_pool_counts(const struct kv_pool *p)
{
    return (struct kv_counts){
        .total = p->config.n_pages,
        .free = p->counts[PAGE_FREE],
        .reserved = p->counts[PAGE_RESERVED],
        .in_flight = p->counts[PAGE_IN_FLIGHT],
        .live = p->counts[PAGE_LIVE],
        .cached = p->counts[PAGE_CACHED],
    };
}

static void check_equal(const char *what, uint32_t counted, uint32_t kept)
{
    if (counted == kept)
        return;
    fprintf(stderr, "kv_pool_check: %u pages %s by recount, %u by the books\n", counted, what,
            kept);
    abort();
}

void kv_pool_check(const struct kv_pool *p)
{
    uint32_t counted[N_CLASSES] = {0}, n_listed = 0, n_booked = 0;
    for (uint32_t i = 0; i < p->config.n_pages; i++)
        counted[page_class(&p->pages[i])]++;
    check_equal("free", counted[PAGE_FREE], p->counts[PAGE_FREE]);
    check_equal("reserved", counted[PAGE_RESERVED], p->counts[PAGE_RESERVED]);
    check_equal("in flight", counted[PAGE_IN_FLIGHT], p->counts[PAGE_IN_FLIGHT]);
    check_equal("live", counted[PAGE_LIVE], p->counts[PAGE_LIVE]);
    check_equal("cached", counted[PAGE_CACHED], p->counts[PAGE_CACHED]);
    for (int i = 0; i < N_CLASSES; i++)
        n_booked += p->counts[i];
    check_equal("in all", p->config.n_pages, n_booked);

    // A list of the right length whose pages are all free: none twice, or it would never end.
    for (uint32_t i = p->first_free; i != NO_PAGE && n_listed <= p->config.n_pages; n_listed++) {
        check_equal("on the free list but not free", page_class(&p->pages[i]) != PAGE_FREE, 0);
        i = p->pages[i].next_free;
    }
    check_equal("on the free list", n_listed, p->counts[PAGE_FREE]);
}

void *kv_pool_base(const struct kv_pool *p) { return p->memory; }
uint64_t kv_pool_page_bytes(const struct kv_pool *p) { return p->page_bytes; }
const struct kv_pool_config *kv_pool_get_config(const struct kv_pool *p) { return &p->config; }

void *kv_pool_page(const struct kv_pool *p, uint32_t page)
{
    assert(page < p->config.n_pages);
    return p->memory + page * p->page_bytes;
}

/* A sum over pages of a word that mixes content and place, so that a GPU can add them in any order.
 */
static uint64_t placed(uint64_t content, uint32_t nth)
{
    return hash_mix(content ^ (nth + 1ull) * 0x9e3779b97f4a7c15u);
}

enum err kv_pool_checksum(const struct kv_pool *p, const uint32_t *pages, uint32_t n, uint32_t nth,
                          uint64_t *sum)
{
    uint64_t content[SUMS_AT_ONCE];
    for (uint32_t at = 0; at < n; at += SUMS_AT_ONCE) {
        uint32_t m = MIN(n - at, SUMS_AT_ONCE);
        if (p->config.device)
            TRY(device_checksums(p->config.device, p->memory, p->page_bytes, pages + at, m,
                                 content));
        else
            for (uint32_t i = 0; i < m; i++)
                content[i] = hash_sum64(kv_pool_page(p, pages[at + i]), p->page_bytes);
        for (uint32_t i = 0; i < m; i++)
            *sum += placed(content[i], nth + at + i);
    }
    return ERR_OK;
}
