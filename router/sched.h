/* sched.h: decides which workers serve a request, in what order, and when to say no.
 *
 * A request is placed on a prefill worker (P) and a decode worker (D) at once. P is chosen by
 * predicted queueing time, D by free KV pages. What cannot be placed waits: attempts that follow a
 * failure first, in order of arrival, then new requests first come first served.
 *
 * Everything is a function of (state, event, now): events go in through the calls below, actions
 * come out of sched_next. No clock, no socket; tables grow in sched_create and sched_reserve only.
 * cluster.c feeds it real life, tests/sim a seed.
 *
 *   QUEUED -place-> PREFILL -first token-> DECODE -end-> OVER -cancels told-> FREE
 *      ^               |                     |
 *      +-- attempt failed or worker gone ----+-- no tries left, deadline --> OVER
 *
 * 1. A worker holds a request from SCHED_PLACE until it reported the end or a failure, or until its
 *    SCHED_CANCEL came out. P stops holding it when D's first record proves the handoff.
 * 2. Cancels of an attempt come out before the next attempt is placed.
 * 3. Actions name only workers that are present.
 */
#ifndef BATON_SCHED_H
#define BATON_SCHED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"
#include "common/base/wire.h"

#define SCHED_NONE        UINT32_MAX
#define SCHED_MAX_WORKERS 256u

struct sched_config {
    uint32_t max_queued;      // new requests waiting; resumed ones come on top
    uint32_t max_attempts;    // starts of a request, the first included; preemptions not counted
    uint32_t max_preemptions; // of one request
    uint32_t max_deaths;      // workers that died running it before it is thought to be the cause
    uint32_t queue_chunks;    // chunks queued at a P before requests wait here instead
    uint32_t page_tokens;
    uint64_t queue_timeout_us, prefill_timeout_us, request_timeout_us;
    uint64_t worker_wait_us; // with no worker of a role left: how long one is expected back
};
extern const struct sched_config sched_config_default;

struct sched_worker_info {
    enum wire_role role;
    uint32_t total_pages, max_running, chunk_tokens, max_total_tokens;
};

struct sched_request {
    uint64_t id;
    void *user;
    uint32_t n_prompt, max_tokens;
    uint64_t prefix_hash; // of what a prefix cache would share; 0 = nothing worth it
};

enum sched_what {
    SCHED_PLACE,  // submit `attempt` to p, and to d unless it is SCHED_NONE (one token is missing)
    SCHED_CANCEL, // cancel `attempt` at worker p
    SCHED_FAIL,   // the request is over: code and text are for the client
};

struct sched_action {
    enum sched_what what;
    uint32_t req; // slot; valid only for PLACE
    uint64_t id;
    uint32_t attempt;
    void *user; // PLACE, FAIL
    uint32_t p, d;
    enum err code;
    const char *text; // static
};

struct sched;

struct sched *sched_create(const struct sched_config *c); // NULL when out of memory
void sched_destroy(struct sched *s);
DEFINE_OWNED(sched)

/* Makes room for n more requests than there are. */
MUST_CHECK enum err sched_reserve(struct sched *s, uint32_t n);

/* idx < SCHED_MAX_WORKERS is free. The worker gets requests after its first beat. */
void sched_worker_add(struct sched *s, uint32_t idx, const struct sched_worker_info *info);
void sched_worker_beat(struct sched *s, uint32_t idx, const struct wire_beat *b, uint64_t now_us);
/* What it held is placed again. died: it did not say goodbye, so what it ran is under suspicion. */
void sched_worker_remove(struct sched *s, uint32_t idx, bool died, uint64_t now_us);

/* Would n new requests be queued? ERR_BUSY, ERR_UNAVAILABLE with a sentence. */
MUST_CHECK enum err sched_admits(const struct sched *s, uint32_t n, uint64_t now_us);
/* Longest prompt + output that some present worker of each role takes; UINT32_MAX if unknown. */
uint32_t sched_max_total_tokens(const struct sched *s);

/* Queues a request that sched_admits let in, after sched_reserve(1). Returns its slot, valid until
 * sched_end or SCHED_FAIL. */
uint32_t sched_add(struct sched *s, const struct sched_request *r, uint64_t now_us);
/* The output now has n_emitted tokens; worker told us (a record that brought nothing new counts).
 */
void sched_token(struct sched *s, uint32_t req, uint32_t worker, uint32_t n_emitted,
                 uint64_t now_us);
/* The attempt ended unfinished. from: the worker that said so and holds nothing any more, or
 * SCHED_NONE. text is static. */
void sched_failed(struct sched *s, uint32_t req, uint32_t from, enum err code, const char *text,
                  uint64_t now_us);
/* Finished (from: the worker that said so), or the client is gone (SCHED_NONE). */
void sched_end(struct sched *s, uint32_t req, uint32_t from);

/* Checks deadlines; their SCHED_FAIL comes out of sched_next. Call it every 50 ms or so. */
void sched_tick(struct sched *s, uint64_t now_us);
/* The next thing to do; false: nothing now. */
bool sched_next(struct sched *s, uint64_t now_us, struct sched_action *ret);

/* Where a request stands. */
enum sched_state { SCHED_FREE, SCHED_QUEUED, SCHED_PREFILL, SCHED_DECODE, SCHED_OVER };
enum sched_state sched_state(const struct sched *s, uint32_t req);
/* Does this worker hold this attempt? If not, what it says about it is stale. */
bool sched_holds(const struct sched *s, uint32_t req, uint32_t attempt, uint32_t worker);
/* sched_holds and sched_token come soon for this request. */
void sched_warm(const struct sched *s, uint32_t req);

struct sched_stats {
    uint32_t n_new, n_resume; // waiting
    uint32_t n_prefill, n_decode, n_over, n_slots, n_suspects;
    uint64_t n_placed, n_retries, n_preempted, n_timeouts, n_poisoned;
};
struct sched_stats sched_get_stats(const struct sched *s);

/* What the scheduler believes about a worker. */
struct sched_worker_stats {
    uint32_t n_prefill;      // P: prompts waiting for their first token
    uint32_t n_held;         // requests that it holds
    uint64_t tokens_ahead;   // P: not yet computed
    uint64_t promised_pages; // D
    double us_per_token;     // P
};
struct sched_worker_stats sched_get_worker_stats(const struct sched *s, uint32_t idx);

#endif
