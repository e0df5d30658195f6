/* workers.h: the registry of workers: who is here, under which index, name and link, and whether
 * its engine makes progress. It keeps facts; cluster.c sends the messages and tells the scheduler.
 *
 *   (HELLO) -> JOINING -first BEAT-> ACTIVE -link lost, BYE, no progress-> (gone)
 *
 * A worker repeats HELLO until it hears WELCOME, so a HELLO in JOINING is a repetition, and one in
 * ACTIVE is a worker that forgot what it had.
 */
#ifndef BATON_WORKERS_H
#define BATON_WORKERS_H

#include "common/base/wire.h"
#include "router/sched.h"

struct metric;

#define WORKERS_MAX       SCHED_MAX_WORKERS
#define WORKERS_N_METRICS 56 /* series of one worker, at most */

struct worker_entry {
    bool present, active;
    uint32_t idx;
    uint64_t peer; // link_hub's handle
    struct wire_hello hello;
    struct wire_beat beat; // the last one; zeroes before the first
    uint64_t joined_us, beat_us;
    uint64_t stall_us; // busy without progress, as far as beats showed it
    struct metric *series[WORKERS_N_METRICS];
    uint64_t n_paired[WORKERS_MAX]; // prefill: attempts placed here and on that decode worker
};

struct workers {
    struct worker_entry at[WORKERS_MAX];
    uint32_t n; // highest index in use + 1
};

/* A free entry, marked present, or NULL when the table is full. */
struct worker_entry *workers_add(struct workers *ws, uint64_t peer, const struct wire_hello *hello,
                                 uint64_t now_us);
void workers_remove(struct workers *ws, struct worker_entry *w);

struct worker_entry *workers_by_peer(struct workers *ws, uint64_t peer);
struct worker_entry *workers_by_instance(struct workers *ws, uint64_t instance);
struct worker_entry *workers_by_name(struct workers *ws, const char *name);

/* Workers of a role that are present, active and not draining. */
uint32_t workers_usable(const struct workers *ws, enum wire_role role);

/* Takes a beat. Returns true if the worker has been busy without progress for longer than limit_us.
 * A gap between beats counts little: a paused host is no reason to distrust the worker. */
bool workers_beat(struct worker_entry *w, const struct wire_beat *b, uint64_t limit_us,
                  uint64_t now_us);

/* First field in which got differs from want, 0 in want matching anything (except protocol), or
 * NULL. */
const char *workers_mismatch(const struct wire_fingerprint *want,
                             const struct wire_fingerprint *got);

const char *worker_role_name(enum wire_role role);

#endif
