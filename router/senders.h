/* senders.h: threads that do nothing but send(2), for a loop that has hundreds of sockets to write
 * to at once: that is one cold socket after the other, most of what an event costs.
 *
 * The loop's thread fills batches and posts them; whoever is free, a helper or the loop's thread in
 * senders_collect, sends one. Between post and collect a batch belongs to its sender, which sees
 * descriptors and bytes and nothing else: what a socket belongs to stays the loop's alone.
 */
#ifndef BATON_SENDERS_H
#define BATON_SENDERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "common/base/err.h"

#define SENDERS_BATCH 16u /* sends, at most, between two looks at whether there is more to do */

struct senders;

struct send_job {
    int fd;
    int error; /* errno, if n_sent is -1 */
    char *data;
    size_t n;
    ssize_t n_sent;
    size_t cap; /* the caller's, not touched: what data has room for, and whose it is */
    void *user;
};

struct send_batch {
    struct send_job jobs[SENDERS_BATCH];
    uint32_t n;
    uint64_t sent_us; /* clock_now_us after its last send */
};

/* Threads for this machine, the loop's own included: 1 on less than 4 cores, else 2. */
uint32_t senders_default(void);

/* Starts n_helpers threads, which sleep until there is something to send. */
MUST_CHECK enum err senders_create(uint32_t n_helpers, struct senders **ret);
void senders_destroy(struct senders *s); /* nothing may be out */

/* The batch to fill and post next; it is empty. NULL: all are out, collect one first. */
struct send_batch *senders_next(struct senders *s);
void senders_post(struct senders *s);
bool senders_out(const struct senders *s); /* Is any batch posted and not collected? */
/* The batch that was posted first, if it is sent: it can be read until the next call of
 * senders_next. NULL: it is not, or none is out. wait: sends what nobody has begun, and waits for
 * the rest, until it is. */
struct send_batch *senders_collect(struct senders *s, bool wait);

#endif
