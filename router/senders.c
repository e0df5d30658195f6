/* senders.c: a ring of batches, which are posted, taken, sent and collected in that order.
 *
 *   n_collected <= n_taken <= n_posted <= n_collected + N_BATCHES
 *
 * 1. The loop's thread alone changes n_posted and n_collected. n_taken is counted up by whoever
 * takes a batch, which is then this thread's until it has set .sent.
 * 2. A helper that finds nothing to take looks again for SPIN_US, because a step's batches follow
 * each other closely and waking it costs more than that; then it sleeps.
 * 3. Who goes to sleep says so (n_asleep, waiting) before it looks for the last time; who has work
 * or a result for it publishes that before it looks whether anybody sleeps. All of these are
 * sequentially consistent, so one of the two sees the other.
 */
#include "router/senders.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/base/clock.h"
#include "common/base/relax.h"

#define N_BATCHES   64u
#define MAX_HELPERS 64u
#define SPIN_US     50u
#define SPIN_ROUNDS 32u /* between two looks at the clock */

struct slot {
    struct send_batch batch;
    atomic_bool sent;
};

struct senders {
    struct slot ring[N_BATCHES];
    _Alignas(64) _Atomic uint64_t n_posted;
    _Alignas(64) _Atomic uint64_t n_taken;
    _Alignas(64) uint64_t n_collected; /* the loop's */
    atomic_uint n_asleep;
    atomic_bool waiting; /* the loop, for a batch that a helper has */
    bool stopping;       /* under lock */
    pthread_mutex_t lock;
    pthread_cond_t posted, sent;
    uint32_t n_helpers;
    pthread_t helpers[MAX_HELPERS];
};

static void *helper(void *user);

uint32_t senders_default(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) >= 4 ? 2 : 1;
}

/* -- life -- */

enum err senders_create(uint32_t n_helpers, struct senders **ret)
{
    assert(n_helpers <= MAX_HELPERS);
    struct senders *s = aligned_alloc(64, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "no memory for sending threads");
    memset(s, 0, sizeof(*s));
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->posted, NULL);
    pthread_cond_init(&s->sent, NULL);
    sigset_t all, before; /* signals are the loop's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = 0;
    for (; rc == 0 && s->n_helpers < n_helpers; s->n_helpers += rc == 0) {
        rc = pthread_create(&s->helpers[s->n_helpers], NULL, helper, s);
        char name[16];
        snprintf(name, sizeof(name), "send/%u", s->n_helpers + 1);
        if (rc == 0)
            pthread_setname_np(s->helpers[s->n_helpers], name);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc) {
        senders_destroy(s);
        return err_set(ERR_NOMEM, "cannot start a sending thread: %s", strerror(rc));
    }
    *ret = s;
    return ERR_OK;
}

void senders_destroy(struct senders *s)
{
    if (!s)
        return;
    assert(!senders_out(s));
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    pthread_cond_broadcast(&s->posted);
    pthread_mutex_unlock(&s->lock);
    for (uint32_t i = 0; i < s->n_helpers; i++)
        pthread_join(s->helpers[i], NULL);
    pthread_cond_destroy(&s->sent);
    pthread_cond_destroy(&s->posted);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* -- all threads -- */

static struct slot *slot_take(struct senders *s)
{
    uint64_t i = atomic_load(&s->n_taken);
    while (i < atomic_load(&s->n_posted))
        if (atomic_compare_exchange_weak(&s->n_taken, &i, i + 1))
            return &s->ring[i % N_BATCHES];
    return NULL;
}

static void slot_send(struct slot *slot)
{
    struct send_batch *b = &slot->batch;
    for (struct send_job *j = b->jobs; j < b->jobs + b->n; j++) {
        j->n_sent = send(j->fd, j->data, j->n, MSG_DONTWAIT | MSG_NOSIGNAL);
        j->error = errno;
    }
    b->sent_us = clock_now_us();
    atomic_store(&slot->sent, true);
}

/* For whoever looks again and again: false when that has taken SPIN_US since *until was 0. */
static bool spin(uint64_t *until)
{
    uint64_t now = clock_now_us();
    if (!*until)
        *until = now + SPIN_US;
    for (uint32_t i = 0; i < SPIN_ROUNDS; i++)
        relax();
    return now < *until;
}

/* -- helpers -- */

/* Returns when there may be something to take; false: there never will. */
static bool helper_sleep(struct senders *s)
{
    pthread_mutex_lock(&s->lock);
    atomic_fetch_add(&s->n_asleep, 1);
    while (!s->stopping && atomic_load(&s->n_taken) == atomic_load(&s->n_posted))
        pthread_cond_wait(&s->posted, &s->lock);
    atomic_fetch_sub(&s->n_asleep, 1);
    bool go_on = !s->stopping;
    pthread_mutex_unlock(&s->lock);
    return go_on;
}

static void *helper(void *user)
{
    struct senders *s = user;
    uint64_t until = 0;
    for (;;) {
        struct slot *slot = slot_take(s);
        if (slot) {
            slot_send(slot);
            until = 0;
            if (atomic_load(&s->waiting)) {
                pthread_mutex_lock(&s->lock);
                pthread_cond_signal(&s->sent);
                pthread_mutex_unlock(&s->lock);
            }
        } else if (!spin(&until)) {
            until = 0;
            if (!helper_sleep(s))
                return NULL;
        }
    }
}

/* -- the loop's thread -- */

struct send_batch *senders_next(struct senders *s)
{
    uint64_t i = atomic_load(&s->n_posted);
    if (i - s->n_collected == N_BATCHES)
        return NULL;
    s->ring[i % N_BATCHES].batch.n = 0;
    return &s->ring[i % N_BATCHES].batch;
}

void senders_post(struct senders *s)
{
    uint64_t i = atomic_load(&s->n_posted);
    atomic_store(&s->ring[i % N_BATCHES].sent, false);
    atomic_store(&s->n_posted, i + 1);
    if (atomic_load(&s->n_asleep) > 0) {
        pthread_mutex_lock(&s->lock);
        pthread_cond_signal(&s->posted);
        pthread_mutex_unlock(&s->lock);
    }
}

bool senders_out(const struct senders *s) { return s->n_collected < atomic_load(&s->n_posted); }

static void wait_until_sent(struct senders *s, struct slot *slot)
{
    uint64_t until = 0;
    while (!atomic_load(&slot->sent) && spin(&until))
        ;
    if (atomic_load(&slot->sent))
        return;
    pthread_mutex_lock(&s->lock);
    atomic_store(&s->waiting, true);
    while (!atomic_load(&slot->sent))
        pthread_cond_wait(&s->sent, &s->lock);
    atomic_store(&s->waiting, false);
    pthread_mutex_unlock(&s->lock);
}

struct send_batch *senders_collect(struct senders *s, bool wait)
{
    if (!senders_out(s))
        return NULL;
    struct slot *oldest = &s->ring[s->n_collected % N_BATCHES], *mine;
    while (wait && !atomic_load(&oldest->sent) && (mine = slot_take(s)))
        slot_send(mine);
    if (wait)
        wait_until_sent(s, oldest);
    else if (!atomic_load(&oldest->sent))
        return NULL;
    s->n_collected++;
    return &oldest->batch;
}
