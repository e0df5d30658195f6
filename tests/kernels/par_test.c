/* par_test.c: every index once, whatever the sizes; thread numbers in range; many short loops. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"
#include "kernels/kernels.h"
#include "kernels/par.h"

#define MAX_N 1000

struct loop {
    _Atomic int times[MAX_N];
    _Atomic int bad_self, small;
    int n_threads, grain, n;
};

static void mark(void *arg, int64_t begin, int64_t end)
{
    struct loop *l = arg;
    if (par_self() < 0 || par_self() >= l->n_threads)
        atomic_fetch_add(&l->bad_self, 1);
    if (end - begin < l->grain && end - begin < l->n)
        atomic_fetch_add(&l->small, 1);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add(&l->times[i], 1);
}

static void covers_every_index_once(void)
{
    for (int n_threads = 1; n_threads <= 7; n_threads += 2) {
        struct par *par = par_create(n_threads);
        REQUIRE(par);
        CHECK_INT(par_threads(par), n_threads);
        for (int n = 0; n <= MAX_N; n += n < 20 ? 1 : 97)
            for (int grain = 0; grain <= n + 1; grain += grain < 5 ? 1 : 113) {
                struct loop l = {.n_threads = n_threads, .grain = 1, .n = n};
                par_for(par, n, grain, mark, &l);
                int wrong = 0;
                for (int i = 0; i < MAX_N; i++)
                    wrong += l.times[i] != (i < n);
                CHECK_INT(wrong, 0);
                CHECK_INT(l.bad_self, 0);
                CHECK_INT(l.small, 0);
            }
        par_destroy(par);
    }
    struct loop l = {.n_threads = 1};
    par_for(NULL, 3, 1, mark, &l);
    CHECK(l.times[0] == 1 && l.times[2] == 1 && l.times[3] == 0);
    CHECK_INT(par_threads(NULL), 1);
    par_destroy(NULL);
}

static void keeps_the_grain(void)
{
    struct par *par = par_create(3);
    REQUIRE(par);
    for (int n = 1; n < 200; n++)
        for (int grain = 1; grain < 50; grain += 7) {
            struct loop l = {.n_threads = 3, .grain = (grain + 1) / 2, .n = n};
            par_for(par, n, grain, mark, &l);
            CHECK_INT(l.small, 0); // within a factor of two: chunks are equal, not multiples
        }
    par_destroy(par);
}

static void add(void *arg, int64_t begin, int64_t end)
{
    atomic_fetch_add((_Atomic int64_t *)arg, end - begin);
}

/* Late workers must never run a chunk of a loop that is over. */
static void short_loops_do_not_mix(void)
{
    struct par *par = par_create(4);
    REQUIRE(par);
    for (int i = 0; i < 30000; i++) {
        _Atomic int64_t sum = 0;
        int64_t n = 1 + i % 37;
        par_for(par, n, 1 + i % 3, add, &sum);
        if (sum != n)
            CHECK_INT(sum, n);
    }
    CHECK(true);
    par_destroy(par);
}

static void *own_pool(void *arg)
{
    (void)arg;
    struct par *par = par_create(2);
    for (int i = 0; par && i < 2000; i++) {
        _Atomic int64_t sum = 0;
        par_for(par, 10, 1, add, &sum);
        if (sum != 10)
            return (void *)1;
    }
    par_destroy(par);
    return par ? NULL : (void *)1;
}

static void pools_do_not_share(void)
{
    pthread_t t[3];
    for (int i = 0; i < 3; i++)
        REQUIRE(pthread_create(&t[i], NULL, own_pool, NULL) == 0);
    for (int i = 0; i < 3; i++) {
        void *bad = NULL;
        pthread_join(t[i], &bad);
        CHECK(bad == NULL);
    }
}

int main(void)
{
    RUN(covers_every_index_once);
    RUN(keeps_the_grain);
    RUN(short_loops_do_not_mix);
    RUN(pools_do_not_share);
    return check_done();
}
