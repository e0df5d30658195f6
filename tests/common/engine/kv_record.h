/* kv_record.h: what a pair said about its transfers, for tests and benches to wait on. */
#ifndef BATON_KV_RECORD_H
#define BATON_KV_RECORD_H

#include <pthread.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/engine/kv_transport.h"

#define PATIENCE_US 20000000u /* a test that waits longer has failed */
#define MAX_DONE    4096

struct record {
    pthread_mutex_t lock;
    pthread_cond_t more;
    uint64_t n_done;
    bool out_of_order;
    enum err results[MAX_DONE];
};

static inline void record_init(struct record *r)
{
    memset(r, 0, sizeof(*r));
    pthread_mutex_init(&r->lock, NULL);
    pthread_condattr_t a;
    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_cond_init(&r->more, &a);
    pthread_condattr_destroy(&a);
}

static inline void on_done(void *user, uint64_t seq, enum err result)
{
    struct record *r = user;
    pthread_mutex_lock(&r->lock);
    if (seq != r->n_done || seq >= MAX_DONE)
        r->out_of_order = true;
    else
        r->results[seq] = result;
    r->n_done++;
    pthread_cond_broadcast(&r->more);
    pthread_mutex_unlock(&r->lock);
}

static inline uint64_t record_count(struct record *r)
{
    pthread_mutex_lock(&r->lock);
    uint64_t n = r->n_done;
    pthread_mutex_unlock(&r->lock);
    return n;
}

/* Waits until n transfers have ended; the n-th one's result. */
static inline enum err record_wait(struct record *r, uint64_t n)
{
    uint64_t end_us = clock_now_us() + PATIENCE_US;
    struct timespec end = {.tv_sec = (time_t)(end_us / 1000000),
                           .tv_nsec = (long)(end_us % 1000000) * 1000};
    pthread_mutex_lock(&r->lock);
    int e = 0;
    while (r->n_done < n && !e)
        e = pthread_cond_timedwait(&r->more, &r->lock, &end);
    enum err result = r->n_done >= n ? r->results[n - 1] : ERR_TIMEOUT;
    pthread_mutex_unlock(&r->lock);
    return result;
}

#endif
