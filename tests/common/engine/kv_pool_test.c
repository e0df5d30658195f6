/* kv_pool_test.c: states and counts of KV pages; random operations against a naive model. */
#include "common/engine/kv_pool.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/base/hash.h"

static struct kv_pool_config config_of(uint32_t n_pages)
{
    return (struct kv_pool_config){
        .n_pages = n_pages, .n_layers = 2, .kv_width = 4, .dtype_bytes = 4};
}

static struct kv_pool *pool_of(uint32_t n_pages)
{
    struct kv_pool_config c = config_of(n_pages);
    struct kv_pool *p = NULL;
    CHECK_OK(kv_pool_create(&c, &p));
    REQUIRE(p != NULL);
    return p;
}

static const char *shm_name(const char *what)
{
    static char name[64];
    snprintf(name, sizeof(name), "/baton-test-%s-%d", what, (int)getpid());
    return name;
}

#define CHECK_COUNTS(p, want_free, want_reserved, want_in_flight, want_live, want_cached)          \
    do {                                                                                           \
        struct kv_counts n_ = kv_pool_counts(p);                                                   \
        CHECK_INT(n_.free, want_free);                                                             \
        CHECK_INT(n_.reserved, want_reserved);                                                     \
        CHECK_INT(n_.in_flight, want_in_flight);                                                   \
        CHECK_INT(n_.live, want_live);                                                             \
        CHECK_INT(n_.cached, want_cached);                                                         \
        kv_pool_check(p);                                                                          \
    } while (0)

static void a_page_goes_through_its_states(void)
{
    OWNED(kv_pool) p = pool_of(4);
    uint32_t g;
    CHECK_COUNTS(p, 4, 0, 0, 0, 0);
    CHECK_OK(kv_pool_alloc(p, 1, &g));
    CHECK_COUNTS(p, 3, 1, 0, 0, 0);
    kv_pool_transfer_begin(p, g);
    CHECK_COUNTS(p, 3, 0, 1, 0, 0);
    kv_pool_transfer_end(p, g);
    CHECK_COUNTS(p, 3, 0, 0, 1, 0);
    kv_pool_cache_ref(p, g);
    CHECK_COUNTS(p, 3, 0, 0, 1, 0);
    kv_pool_unref(p, g);
    CHECK_COUNTS(p, 3, 0, 0, 0, 1);
    kv_pool_ref(p, g);
    CHECK_COUNTS(p, 3, 0, 0, 1, 0);
    kv_pool_unref(p, g);
    kv_pool_cache_unref(p, g);
    CHECK_COUNTS(p, 4, 0, 0, 0, 0);

    CHECK_OK(kv_pool_alloc(p, 1, &g)); // what it was before is forgotten
    CHECK_COUNTS(p, 3, 1, 0, 0, 0);
    kv_pool_set_live(p, g);
    CHECK_COUNTS(p, 3, 0, 0, 1, 0);
    kv_pool_unref(p, g);
}

static void a_page_in_flight_is_not_freed(void)
{
    OWNED(kv_pool) p = pool_of(1);
    uint32_t g, other;
    CHECK_OK(kv_pool_alloc(p, 1, &g));
    kv_pool_transfer_begin(p, g);
    kv_pool_transfer_begin(p, g);
    kv_pool_unref(p, g); // cancelled
    CHECK_COUNTS(p, 0, 0, 1, 0, 0);
    kv_pool_transfer_end(p, g);
    CHECK_COUNTS(p, 0, 0, 1, 0, 0);
    CHECK_INT(kv_pool_alloc(p, 1, &other), ERR_NO_PAGES);
    CHECK_INT(kv_pool_transfers(p, g), 1);
    kv_pool_transfer_end(p, g);
    CHECK_COUNTS(p, 1, 0, 0, 0, 0);
}

static void alloc_takes_all_or_nothing(void)
{
    OWNED(kv_pool) p = pool_of(5);
    uint32_t g[5] = {77, 77, 77, 77, 77}, more[3] = {77, 77, 77};
    CHECK_OK(kv_pool_alloc(p, 0, g));
    CHECK_INT(g[0], 77);
    CHECK_OK(kv_pool_alloc(p, 3, g));
    CHECK_INT(kv_pool_alloc(p, 3, more), ERR_NO_PAGES);
    CHECK_INT(more[0], 77);
    CHECK_COUNTS(p, 2, 3, 0, 0, 0);
    kv_pool_unref(p, g[1]);
    CHECK_OK(kv_pool_alloc(p, 1, more));
    CHECK_INT(more[0], g[1]); // last in, first out
}

static void impossible_pools_are_refused(void)
{
    struct kv_pool *p = NULL;
    struct kv_pool_config c = config_of(0);
    CHECK_INT(kv_pool_create(&c, &p), ERR_INVALID);
    c = config_of(1);
    c.dtype_bytes = 3;
    CHECK_INT(kv_pool_create(&c, &p), ERR_INVALID);
    c = config_of(UINT32_MAX - 1);
    c.n_layers = c.kv_width = UINT32_MAX;
    CHECK_INT(kv_pool_create(&c, &p), ERR_INVALID);
    c = config_of(1u << 20);
    c.kv_width = 1u << 31; // 2^60 bytes
    CHECK_INT(kv_pool_create(&c, &p), ERR_NOMEM);
    c = config_of(1);
    c.shm_name = "no-slash";
    CHECK_INT(kv_pool_create(&c, &p), ERR_INVALID);
    c.shm_name = "/a/b";
    CHECK_INT(kv_pool_create(&c, &p), ERR_INVALID);
    CHECK(p == NULL);
    kv_pool_destroy(NULL);
}

static void pages_are_zeroed_contiguous_blocks(void)
{
    OWNED(kv_pool) p = pool_of(3);
    CHECK_INT(kv_pool_page_bytes(p), 64 * 2 * 4 * 4);
    CHECK((uint8_t *)kv_pool_page(p, 2) == (uint8_t *)kv_pool_base(p) + 2 * kv_pool_page_bytes(p));
    const uint8_t *m = kv_pool_base(p);
    size_t n_set = 0;
    for (size_t i = 0; i < 3 * kv_pool_page_bytes(p); i++)
        n_set += m[i] != 0;
    CHECK_INT(n_set, 0);
}

static uint64_t sum_of(const struct kv_pool *p, uint32_t first, uint32_t second)
{
    uint64_t sum = 0, parts = 0;
    CHECK_OK(kv_pool_checksum(p, (uint32_t[]){first, second}, 2, 0, &sum));
    CHECK_OK(kv_pool_checksum(p, &first, 1, 0, &parts)); // page by page is the same
    CHECK_OK(kv_pool_checksum(p, &second, 1, 1, &parts));
    CHECK(sum == parts);
    return sum;
}

static void checksum_knows_content_and_order_only(void)
{
    OWNED(kv_pool) p = pool_of(4);
    memset(kv_pool_page(p, 0), 1, kv_pool_page_bytes(p));
    memset(kv_pool_page(p, 1), 2, kv_pool_page_bytes(p));
    memset(kv_pool_page(p, 2), 1, kv_pool_page_bytes(p));
    memset(kv_pool_page(p, 3), 2, kv_pool_page_bytes(p));
    uint64_t a = sum_of(p, 0, 1);
    uint64_t b = sum_of(p, 2, 3);
    uint64_t swapped = sum_of(p, 1, 0);
    CHECK(a == b);
    CHECK(a != swapped);
    ((uint8_t *)kv_pool_page(p, 3))[kv_pool_page_bytes(p) - 1] ^= 0x80;
    CHECK(a != sum_of(p, 2, 3));
}

static void a_shared_pool_is_seen_by_its_name(void)
{
    struct kv_pool_config c = config_of(2);
    char name[64];
    snprintf(name, sizeof(name), "%s", shm_name("shared"));
    c.shm_name = name;
    OWNED(kv_pool) p = NULL;
    CHECK_OK(kv_pool_create(&c, &p));
    memcpy(kv_pool_page(p, 1), "hello", 6);
    name[1] = 'x'; // the pool has its own copy
    CHECK_STR(kv_pool_get_config(p)->shm_name, shm_name("shared"));

    int fd = shm_open(shm_name("shared"), O_RDONLY, 0);
    CHECK(fd >= 0);
    struct stat st;
    CHECK_INT(fstat(fd, &st), 0);
    CHECK_INT(st.st_mode & 0777, 0600);
    CHECK_INT(st.st_size, 2 * kv_pool_page_bytes(p));
    char got[6] = "";
    CHECK_INT(pread(fd, got, 6, (off_t)kv_pool_page_bytes(p)), 6);
    CHECK_STR(got, "hello");
    close(fd);

    struct kv_pool *second = NULL;
    c.shm_name = shm_name("shared");
    CHECK_INT(kv_pool_create(&c, &second), ERR_IO); // ours, and we live
    kv_pool_destroy(take(&p));
    CHECK(shm_open(shm_name("shared"), O_RDONLY, 0) < 0 && errno == ENOENT);
}

static bool shm_is_there(const char *name)
{
    OWNED_FD fd = shm_open(name, O_RDONLY, 0);
    return fd >= 0;
}

static void leave_behind(const struct kv_pool_config *c)
{
    pid_t child = fork();
    if (child == 0) {
        struct kv_pool *p = NULL;
        if (kv_pool_create(c, &p) == ERR_OK)
            memset(kv_pool_base(p), 0xee, 2 * kv_pool_page_bytes(p));
        kill(getpid(), SIGKILL);
    }
    CHECK_INT(waitpid(child, NULL, 0), child);
    CHECK(shm_is_there(c->shm_name));
}

/* A worker that was killed leaves its object behind; the next one of that name takes over, and one
 * of another name removes it. */
static void what_dead_owners_left_is_removed(void)
{
    char name[64], other_name[64];
    struct kv_pool_config c = config_of(2), other = config_of(2);
    snprintf(name, sizeof(name), "/baton-test-dead%d-a",
             (int)getpid()); // a family of this process's own
    snprintf(other_name, sizeof(other_name), "/baton-test-dead%d-b", (int)getpid());
    c.shm_name = name;
    other.shm_name = other_name;
    leave_behind(&c);
    OWNED(kv_pool) p = NULL;
    OWNED(kv_pool) q = NULL;
    CHECK_OK(kv_pool_create(&c, &p));
    if (p)
        CHECK_INT(*(uint8_t *)kv_pool_base(p), 0);
    CHECK_OK(kv_pool_create(&other, &q)); // whose owner lives stays
    CHECK(shm_is_there(c.shm_name));
    CHECK(shm_is_there(other.shm_name));
    kv_pool_destroy(take(&p));
    leave_behind(&c);
    kv_pool_destroy(take(&q));
    CHECK_OK(kv_pool_create(&other, &q));
    CHECK(!shm_is_there(c.shm_name));
}

/* kv_pool_check ends the process on wrong books; an unref too many is a bug and does too. */
static void misuse_is_fatal(void)
{
    pid_t child = fork();
    if (child == 0) {
        close(STDERR_FILENO); // what it says when it ends is not for the log
        OWNED(kv_pool) p = pool_of(1);
        uint32_t g;
        if (kv_pool_alloc(p, 1, &g) == ERR_OK) {
            kv_pool_unref(p, g);
            kv_pool_unref(p, g);
        }
        _exit(0);
    }
    int status;
    CHECK_INT(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

/* ---- random operations against a model that recounts everything ---- */

struct model_page {
    uint32_t n_refs, n_transfers;
    bool is_cached, is_live;
};

static struct kv_counts model_counts(const struct model_page *m, uint32_t n)
{
    struct kv_counts c = {.total = n};
    for (uint32_t i = 0; i < n; i++)
        (*(m[i].n_transfers ? &c.in_flight
           : m[i].n_refs    ? (m[i].is_live ? &c.live : &c.reserved)
           : m[i].is_cached ? &c.cached
                            : &c.free))++;
    return c;
}

static uint64_t rng_state;
static uint32_t rng(uint32_t n)
{
    rng_state += 0x9e3779b97f4a7c15u;
    return (uint32_t)(hash_mix(rng_state) % n);
}

static void random_operations_agree_with_the_model(void)
{
    enum { N = 23 };
    OWNED(kv_pool) p = pool_of(N);
    struct model_page m[N] = {0};
    for (int step = 0; step < 100000; step++) {
        uint32_t g = rng(N), n = rng(6), got[6];
        struct model_page *x = &m[g];
        bool held = x->n_refs || x->n_transfers || x->is_cached;
        switch (rng(8)) {
        case 0: {
            struct kv_counts before = model_counts(m, N);
            enum err e = kv_pool_alloc(p, n, got);
            CHECK_INT(e, n <= before.free ? ERR_OK : ERR_NO_PAGES);
            for (uint32_t i = 0; e == ERR_OK && i < n; i++) {
                struct model_page *y = &m[got[i]];
                CHECK(!y->n_refs && !y->n_transfers && !y->is_cached);
                *y = (struct model_page){.n_refs = 1};
            }
            break;
        }
        case 1:
            if (held) {
                kv_pool_ref(p, g);
                x->n_refs++;
            }
            break;
        case 2:
        case 3:
            if (x->n_refs) {
                kv_pool_unref(p, g);
                x->n_refs--;
            }
            break;
        case 4:
            if (held) {
                kv_pool_set_live(p, g);
                x->is_live = true;
            }
            break;
        case 5:
            if (held && !x->is_cached) {
                kv_pool_cache_ref(p, g);
                x->is_cached = x->is_live = true;
            } else if (x->is_cached) {
                kv_pool_cache_unref(p, g);
                x->is_cached = false;
            }
            break;
        case 6:
            if (held) {
                kv_pool_transfer_begin(p, g);
                x->n_transfers++;
            }
            break;
        case 7:
            if (x->n_transfers) {
                kv_pool_transfer_end(p, g);
                x->n_transfers--;
                x->is_live = true;
            }
            break;
        }
        struct kv_counts want = model_counts(m, N), have = kv_pool_counts(p);
        if (memcmp(&want, &have, sizeof(want))) {
            CHECK_INT(step, -1); // says when
            CHECK_COUNTS(p, want.free, want.reserved, want.in_flight, want.live, want.cached);
            return;
        }
        CHECK_INT(kv_pool_refs(p, g), m[g].n_refs);
        kv_pool_check(p);
    }
}

int main(void)
{
    const char *seed = getenv("BATON_TEST_SEED");
    rng_state = seed ? strtoull(seed, NULL, 0) : clock_now_us();
    printf("BATON_TEST_SEED=%llu\n", (unsigned long long)rng_state);
    RUN(a_page_goes_through_its_states);
    RUN(a_page_in_flight_is_not_freed);
    RUN(alloc_takes_all_or_nothing);
    RUN(impossible_pools_are_refused);
    RUN(pages_are_zeroed_contiguous_blocks);
    RUN(checksum_knows_content_and_order_only);
    RUN(a_shared_pool_is_seen_by_its_name);
    RUN(what_dead_owners_left_is_removed);
    RUN(misuse_is_fatal);
    RUN(random_operations_agree_with_the_model);
    return check_done();
}
