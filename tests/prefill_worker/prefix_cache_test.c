/* prefix_cache_test.c: hits, sharing and eviction; random prompts against a naive model. */
#include "prefill_worker/prefix_cache.h"

#include "check.h"
#include "common/base/clock.h"
#include "common/base/hash.h"

#define PAGE 64u

static struct kv_pool *pool_of(uint32_t n_pages)
{
    struct kv_pool_config c = {.n_pages = n_pages, .n_layers = 1, .kv_width = 4, .dtype_bytes = 4};
    struct kv_pool *p = NULL;
    CHECK_OK(kv_pool_create(&c, &p));
    REQUIRE(p != NULL);
    return p;
}

static struct prefix_cache *cache_of(struct kv_pool *pool)
{
    struct prefix_cache *c = NULL;
    CHECK_OK(prefix_cache_create(pool, &c));
    REQUIRE(c != NULL);
    return c;
}

/* Page i of a prompt consists of token words[i]. */
static void prompt_of(const char *words, int32_t *ret)
{
    for (uint32_t i = 0; words[i]; i++)
        for (uint32_t j = 0; j < PAGE; j++)
            ret[i * PAGE + j] = words[i];
}

/* Computes and caches a prompt as a prefill worker would, and lets its pages go. */
static void prompt_run(struct kv_pool *pool, struct prefix_cache *c, uint64_t salt,
                       const char *words)
{
    int32_t ids[16 * PAGE];
    uint32_t pages[16], n = (uint32_t)strlen(words);
    prompt_of(words, ids);
    uint32_t n_hit = prefix_cache_lookup(c, salt, ids, n * PAGE, pages);
    CHECK_OK(kv_pool_alloc(pool, n - n_hit, pages + n_hit));
    prefix_cache_insert(c, salt, ids, n, pages);
    for (uint32_t i = 0; i < n; i++)
        kv_pool_unref(pool, pages[i]);
}

/* Pages found for a prompt with one token more than words. */
static uint32_t hits(struct kv_pool *pool, struct prefix_cache *c, uint64_t salt, const char *words)
{
    int32_t ids[16 * PAGE + 1] = {0};
    uint32_t pages[16];
    prompt_of(words, ids);
    uint32_t n = prefix_cache_lookup(c, salt, ids, (uint32_t)strlen(words) * PAGE + 1, pages);
    for (uint32_t i = 0; i < n; i++)
        kv_pool_unref(pool, pages[i]);
    return n;
}

static void a_prompt_is_found_again(void)
{
    OWNED(kv_pool) pool = pool_of(16);
    OWNED(prefix_cache) c = cache_of(pool);
    CHECK_INT(hits(pool, c, 1, "abc"), 0);
    prompt_run(pool, c, 1, "abc");
    CHECK_INT(kv_pool_counts(pool).cached, 3);
    CHECK_INT(hits(pool, c, 1, "abc"), 3);
    CHECK_INT(hits(pool, c, 1, "abcd"), 3);
    CHECK_INT(hits(pool, c, 1, "abx"), 2);
    CHECK_INT(hits(pool, c, 1, "bc"), 0);  // not at its beginning
    CHECK_INT(hits(pool, c, 2, "abc"), 0); // another tenant
    CHECK_INT(kv_pool_counts(pool).cached, 3);
}

static void one_token_is_always_left_to_compute(void)
{
    OWNED(kv_pool) pool = pool_of(8);
    OWNED(prefix_cache) c = cache_of(pool);
    prompt_run(pool, c, 0, "abc");
    int32_t ids[3 * PAGE];
    uint32_t pages[3];
    prompt_of("abc", ids);
    static const uint32_t n[] = {0, 1, 64, 65, 128, 129, 191, 192};
    static const uint32_t want[] = {0, 0, 0, 1, 1, 2, 2, 2};
    for (size_t i = 0; i < ARRAY_LEN(n); i++) {
        uint32_t got = prefix_cache_lookup(c, 0, ids, n[i], pages);
        CHECK_INT(got, want[i]);
        for (uint32_t j = 0; j < got; j++)
            kv_pool_unref(pool, pages[j]);
    }
}

static void a_single_token_tells_prompts_apart(void)
{
    OWNED(kv_pool) pool = pool_of(8);
    OWNED(prefix_cache) c = cache_of(pool);
    prompt_run(pool, c, 0, "ab");
    int32_t ids[2 * PAGE + 1] = {0};
    uint32_t pages[2];
    prompt_of("ab", ids);
    for (uint32_t i = 0; i < 2 * PAGE; i++) {
        ids[i]++;
        uint32_t got = prefix_cache_lookup(c, 0, ids, 2 * PAGE + 1, pages);
        CHECK_INT(got, i / PAGE);
        for (uint32_t j = 0; j < got; j++)
            kv_pool_unref(pool, pages[j]);
        ids[i]--;
    }
}

static void of_equal_pages_the_first_stays(void)
{
    OWNED(kv_pool) pool = pool_of(8);
    OWNED(prefix_cache) c = cache_of(pool);
    int32_t ids[2 * PAGE];
    uint32_t a[2], b[2];
    prompt_of("xy", ids);
    CHECK_OK(kv_pool_alloc(pool, 2, a)); // two prompts computed at the same time
    CHECK_OK(kv_pool_alloc(pool, 2, b));
    prefix_cache_insert(c, 0, ids, 1, a);
    prefix_cache_insert(c, 0, ids, 2, b); // its second page follows a's first
    prefix_cache_insert(c, 0, ids, 2, a);
    for (int i = 0; i < 2; i++) {
        kv_pool_unref(pool, a[i]);
        kv_pool_unref(pool, b[i]);
    }
    CHECK_INT(kv_pool_counts(pool).cached, 2);
    CHECK_INT(kv_pool_counts(pool).free, 6);
    CHECK_INT(hits(pool, c, 0, "xy"), 2);
}

static void the_least_recently_used_goes_first(void)
{
    OWNED(kv_pool) pool = pool_of(16);
    OWNED(prefix_cache) c = cache_of(pool);
    prompt_run(pool, c, 0, "abc");
    prompt_run(pool, c, 0, "abd");
    prompt_run(pool, c, 0, "x");
    CHECK_INT(hits(pool, c, 0, "abc"), 3); // used again: d is now the oldest leaf
    CHECK_INT(prefix_cache_evict(c, 1), 1);
    CHECK_INT(hits(pool, c, 0, "x"), 1);
    CHECK_INT(hits(pool, c, 0, "abd"), 2);
    CHECK_INT(hits(pool, c, 0, "abc"), 3);
    CHECK_INT(prefix_cache_evict(c, 2), 2); // x, then c before its parents
    CHECK_INT(hits(pool, c, 0, "x"), 0);
    CHECK_INT(hits(pool, c, 0, "abc"), 2);
    CHECK_INT(prefix_cache_evict(c, 9), 2);
    CHECK_INT(kv_pool_counts(pool).free, 16);
}

static void what_somebody_holds_stays(void)
{
    OWNED(kv_pool) pool = pool_of(16);
    OWNED(prefix_cache) c = cache_of(pool);
    prompt_run(pool, c, 0, "abc");
    int32_t ids[3 * PAGE];
    uint32_t pages[2];
    prompt_of("abc", ids);
    CHECK_INT(prefix_cache_lookup(c, 0, ids, 2 * PAGE + 1, pages), 2); // holds a, b
    CHECK_INT(prefix_cache_evict(c, 9), 1);
    CHECK_INT(prefix_cache_evict(c, 9), 0);
    kv_pool_transfer_begin(pool, pages[1]);
    kv_pool_unref(pool, pages[0]);
    kv_pool_unref(pool, pages[1]);
    CHECK_INT(prefix_cache_evict(c, 9), 0); // b is in flight, and a is before b
    kv_pool_transfer_end(pool, pages[1]);
    CHECK_INT(prefix_cache_evict(c, 9), 2);
}

static void clear_forgets_pages_that_are_held(void)
{
    OWNED(kv_pool) pool = pool_of(4);
    OWNED(prefix_cache) c = cache_of(pool);
    prompt_run(pool, c, 0, "abc");
    int32_t ids[3 * PAGE];
    uint32_t pages[2];
    prompt_of("abc", ids);
    CHECK_INT(prefix_cache_lookup(c, 0, ids, 2 * PAGE + 1, pages), 2);
    prefix_cache_clear(c);
    CHECK_INT(kv_pool_counts(pool).live, 2);
    CHECK_INT(kv_pool_counts(pool).free, 2);
    CHECK_INT(hits(pool, c, 0, "abc"), 0);
    prefix_cache_insert(c, 0, ids, 2, pages); // and takes them again
    kv_pool_unref(pool, pages[0]);
    kv_pool_unref(pool, pages[1]);
    CHECK_INT(hits(pool, c, 0, "abc"), 2);
    prefix_cache_destroy(NULL);
}

/* ---- random prompts against a model that stores whole prefixes and searches all of them ---- */

static uint64_t rng_state;
static uint32_t rng(uint32_t n)
{
    rng_state += 0x9e3779b97f4a7c15u;
    return (uint32_t)(hash_mix(rng_state) % n);
}

#define MAX_WORDS 6

struct model_entry { // one cached page: the whole prompt up to its end
    bool is_used;
    char words[MAX_WORDS + 1];
    uint32_t page;
    uint64_t used_at; // of two pages used by one call, the later one in the prompt is older
};

struct model {
    struct model_entry e[64];
    uint64_t now;
};

static struct model_entry *model_find(struct model *m, const char *words, uint32_t n)
{
    for (size_t i = 0; i < ARRAY_LEN(m->e); i++)
        if (m->e[i].is_used && strlen(m->e[i].words) == n && !strncmp(m->e[i].words, words, n))
            return &m->e[i];
    return NULL;
}

static void model_use(struct model *m, const char *words, uint32_t n)
{
    for (; n > 0; n--)
        model_find(m, words, n)->used_at = ++m->now;
}

static void model_add(struct model *m, const char *words, uint32_t n, uint32_t page)
{
    struct model_entry *e = m->e;
    while (e->is_used)
        e++;
    *e = (struct model_entry){.is_used = true, .page = page};
    memcpy(e->words, words, n);
}

/* The page that must go next, or NULL. */
static struct model_entry *model_victim(struct model *m, struct kv_pool *pool)
{
    struct model_entry *victim = NULL;
    for (struct model_entry *e = m->e; e < m->e + ARRAY_LEN(m->e); e++) {
        if (!e->is_used || kv_pool_refs(pool, e->page))
            continue;
        bool is_leaf = true;
        size_t n = strlen(e->words);
        for (struct model_entry *x = m->e; x < m->e + ARRAY_LEN(m->e); x++)
            is_leaf &= !(x->is_used && strlen(x->words) > n && !strncmp(x->words, e->words, n));
        if (is_leaf && (!victim || e->used_at < victim->used_at))
            victim = e;
    }
    return victim;
}

struct holder { // a request under way
    uint32_t n;
    uint32_t pages[MAX_WORDS];
};

static bool is_held(const struct holder *holders, size_t n, uint32_t page)
{
    for (size_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < holders[i].n; j++)
            if (holders[i].pages[j] == page)
                return true;
    return false;
}

static void random_prompts_agree_with_the_model(void)
{
    OWNED(kv_pool) pool = pool_of(40);
    OWNED(prefix_cache) c = cache_of(pool);
    struct model m = {0};
    struct holder holders[4] = {0};
    uint32_t n_all = 0, n_all_hit = 0, n_all_evicted = 0; // pages
    for (int step = 0; step < 30000; step++) {
        struct holder *h = &holders[rng(ARRAY_LEN(holders))];
        for (uint32_t i = 0; i < h->n; i++)
            kv_pool_unref(pool, h->pages[i]);
        h->n = 0;

        char words[MAX_WORDS + 1] = "";
        uint32_t n_words = 1 + rng(MAX_WORDS);
        for (uint32_t i = 0; i < n_words; i++)
            words[i] = (char)('a' + rng(i < 2 ? 2 : 3));
        int32_t ids[MAX_WORDS * PAGE];
        prompt_of(words, ids);
        uint32_t n_tokens = n_words * PAGE - rng(PAGE);
        uint32_t n_full = n_tokens / PAGE, n_max = (n_tokens - 1) / PAGE;

        uint32_t n_hit = prefix_cache_lookup(c, 0, ids, n_tokens, h->pages), n_want = 0;
        while (n_want < n_max && model_find(&m, words, n_want + 1))
            n_want++;
        model_use(&m, words, n_want);
        CHECK_INT(n_hit, n_want);
        for (uint32_t i = 0; i < n_hit; i++)
            CHECK_INT(h->pages[i], model_find(&m, words, i + 1)->page);
        h->n = n_hit;
        n_all += n_words;
        n_all_hit += n_hit;

        uint32_t n_new = n_words - n_hit, n_free = kv_pool_counts(pool).free;
        if (n_new > n_free) {
            uint32_t n_evict = n_new - n_free + rng(3), n_gone = 0;
            for (struct model_entry *e; n_gone < n_evict; n_gone++) {
                if (!(e = model_victim(&m, pool)))
                    break;
                e->is_used = false;
            }
            CHECK_INT(prefix_cache_evict(c, n_evict), n_gone);
            n_all_evicted += n_gone;
        }
        if (kv_pool_alloc(pool, n_new, h->pages + n_hit) == ERR_OK) {
            h->n = n_words;
            prefix_cache_insert(c, 0, ids, n_full, h->pages);
            for (uint32_t i = n_hit; i < n_full; i++)
                if (!model_find(&m, words, i + 1))
                    model_add(&m, words, i + 1, h->pages[i]);
            model_use(&m, words, n_full);
        }
        uint32_t n_cached = 0; // the pool counts what is also held as live
        for (size_t i = 0; i < ARRAY_LEN(m.e); i++)
            n_cached += m.e[i].is_used && !is_held(holders, ARRAY_LEN(holders), m.e[i].page);
        CHECK_INT(kv_pool_counts(pool).cached, n_cached);
        kv_pool_check(pool);
        if (check_failures) {
            printf("at step %d\n", step);
            break;
        }
    }
    for (size_t i = 0; i < ARRAY_LEN(holders); i++)
        for (uint32_t j = 0; j < holders[i].n; j++)
            kv_pool_unref(pool, holders[i].pages[j]);
    prefix_cache_clear(c);
    CHECK_INT(kv_pool_counts(pool).free, 40);
    printf("hit %.0f%% of %u pages, %u pages evicted\n", 100.0 * n_all_hit / n_all, n_all,
           n_all_evicted);
    CHECK(n_all_hit > n_all / 4 && n_all_evicted > 1000); // the paths were taken
}

int main(void)
{
    const char *seed = getenv("BATON_TEST_SEED");
    rng_state = seed ? strtoull(seed, NULL, 0) : clock_now_us();
    printf("BATON_TEST_SEED=%llu\n", (unsigned long long)rng_state);
    RUN(a_prompt_is_found_again);
    RUN(one_token_is_always_left_to_compute);
    RUN(a_single_token_tells_prompts_apart);
    RUN(of_equal_pages_the_first_stays);
    RUN(the_least_recently_used_goes_first);
    RUN(what_somebody_holds_stays);
    RUN(clear_forgets_pages_that_are_held);
    RUN(random_prompts_agree_with_the_model);
    return check_done();
}
