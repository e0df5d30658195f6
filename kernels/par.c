/* par.c: threads that are there when a step needs them and asleep when nobody does.
 *
 * A step of a small model is a few hundred loops of some microseconds, so waking a thread for each
 * would cost more than it brings: workers spin for a moment after each loop, then sleep. The caller
 * takes part, and waits only for chunks that a worker has really started; on a busy machine, where
 * the workers do not get a core, it simply does everything itself.
 *
 * `ticket` holds the loop's number and how many of its chunks nobody has claimed. A claim is a
 * compare-and-swap on it, which fails if the loop has changed meanwhile: so whatever a late worker
 * read of the loop's description belongs to the chunk it claimed.
 */
#include "kernels/par.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "common/base/relax.h"
#include "kernels/kernels.h"

#define SPIN_TURNS        1000
#define CHUNKS_PER_THREAD 4
#define MAX_THREADS       256

typedef void par_fn(void *arg, int64_t begin, int64_t end);

struct par {
    int n_threads;
    _Atomic uint64_t ticket; // loop << 32 | unclaimed chunks
    _Atomic(par_fn *) fn;
    _Atomic(void *) arg;
    _Atomic int64_t n, n_chunks;
    _Atomic int64_t done;
    _Atomic int sleepers;
    _Atomic bool stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t threads[];
};

struct start {
    struct par *par;
    int self;
};

static _Thread_local int self;

static void *thread_main(void *arg);
static bool work(struct par *par);

int par_self(void) { return self; }
int par_threads(const struct par *par) { return par ? par->n_threads : 1; }

struct par *par_create(int n_threads)
{
    if (n_threads <= 0) {
        cpu_set_t set;
        n_threads = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
    }
    if (n_threads > MAX_THREADS)
        n_threads = MAX_THREADS;
    struct par *par = calloc(1, sizeof(*par) + (size_t)n_threads * sizeof(par->threads[0]));
    if (!par)
        return NULL;
    par->n_threads = 1;
    pthread_mutex_init(&par->mutex, NULL);
    pthread_cond_init(&par->wake, NULL);
    // Signals are for the thread that owns the process's loop.
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 1; i < n_threads; i++) {
        struct start *start = malloc(sizeof(*start));
        if (start)
            *start = (struct start){par, i};
        if (!start || pthread_create(&par->threads[i], NULL, thread_main, start)) {
            free(start);
            break;
        }
        par->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (par->n_threads < n_threads) {
        par_destroy(par);
        return NULL;
    }
    return par;
}

void par_destroy(struct par *par)
{
    if (!par)
        return;
    pthread_mutex_lock(&par->mutex);
    atomic_store(&par->stop, true);
    pthread_cond_broadcast(&par->wake);
    pthread_mutex_unlock(&par->mutex);
    for (int i = 1; i < par->n_threads; i++)
        pthread_join(par->threads[i], NULL);
    pthread_cond_destroy(&par->wake);
    pthread_mutex_destroy(&par->mutex);
    free(par);
}

void par_for(struct par *par, int64_t n, int64_t grain, par_fn *fn, void *arg)
{
    if (n <= 0)
        return;
    if (grain < 1)
        grain = 1;
    int64_t n_chunks = (n + grain - 1) / grain;
    if (par_threads(par) == 1 || n_chunks == 1) {
        fn(arg, 0, n);
        return;
    }
    if (n_chunks > (int64_t)par->n_threads * CHUNKS_PER_THREAD)
        n_chunks = (int64_t)par->n_threads * CHUNKS_PER_THREAD;
    atomic_store_explicit(&par->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&par->arg, arg, memory_order_relaxed);
    atomic_store_explicit(&par->n, n, memory_order_relaxed);
    atomic_store_explicit(&par->n_chunks, n_chunks, memory_order_relaxed);
    atomic_store_explicit(&par->done, 0, memory_order_relaxed);
    uint64_t loop = (atomic_load_explicit(&par->ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&par->ticket, loop << 32 | (uint64_t)n_chunks);
    // Either we see the sleeper here or it sees the ticket before it sleeps (both are seq_cst).
    if (atomic_load(&par->sleepers) > 0) {
        pthread_mutex_lock(&par->mutex);
        pthread_cond_broadcast(&par->wake);
        pthread_mutex_unlock(&par->mutex);
    }
    while (work(par))
        ;
    for (int i = 0; atomic_load_explicit(&par->done, memory_order_acquire) < n_chunks; i++) {
        if (i < SPIN_TURNS)
            relax();
        else
            sched_yield();
    }
}

/* Claims and runs one chunk; false if there is none. */
static bool work(struct par *par)
{
    uint64_t t = atomic_load_explicit(&par->ticket, memory_order_acquire);
    while ((uint32_t)t) {
        par_fn *fn = atomic_load_explicit(&par->fn, memory_order_relaxed);
        void *arg = atomic_load_explicit(&par->arg, memory_order_relaxed);
        int64_t n = atomic_load_explicit(&par->n, memory_order_relaxed);
        int64_t n_chunks = atomic_load_explicit(&par->n_chunks, memory_order_relaxed);
        if (!atomic_compare_exchange_weak_explicit(&par->ticket, &t, t - 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        int64_t i = n_chunks - (int64_t)(uint32_t)t; // 0 first
        fn(arg, n * i / n_chunks, n * (i + 1) / n_chunks);
        atomic_fetch_add_explicit(&par->done, 1, memory_order_release);
        return true;
    }
    return false;
}

static void *thread_main(void *arg)
{
    struct start start = *(struct start *)arg;
    free(arg);
    struct par *par = start.par;
    self = start.self;
    while (!atomic_load(&par->stop)) {
        for (int i = 0; i < SPIN_TURNS; i++) {
            if (work(par))
                i = 0;
            relax();
        }
        pthread_mutex_lock(&par->mutex);
        atomic_fetch_add(&par->sleepers, 1);
        while (!(uint32_t)atomic_load(&par->ticket) && !atomic_load(&par->stop))
            pthread_cond_wait(&par->wake, &par->mutex);
        atomic_fetch_sub(&par->sleepers, 1);
        pthread_mutex_unlock(&par->mutex);
    }
    return NULL;
}
