/* sched.c: placement, queues, retries and deadlines, as pure bookkeeping.
 *
 * P: least predicted time to first chunk = tokens ahead x measured time per token. Tokens ahead is
 * the smaller of two counts: prompts we placed whose first token has not come (too high when the
 * prefix cache hits), and what the worker last said plus what we placed since (late by a beat). The
 * worker that last saw the same prefix wins if waiting there costs no more than the hit can save.
 * A few chunks are queued at each P and no more: P never idles, and a cancel or a resumed stream
 * finds most of the queue still here.
 *
 * D: most free pages, counting for every request there its input, its output so far and a share of
 * what it may still write. Over-commitment is D's to solve: it preempts, we place again, and from
 * the second preemption on a request counts with its whole possible output.
 *
 * When a worker dies, the requests that it was computing are suspects: one of them may have killed
 * it. Suspects are resumed a few at a time per worker until each has proven itself with some
 * tokens; a second death under an unproven suspect ends it for good. So a poisonous request costs
 * at most max_deaths workers, and its neighbours go on.
 *
 * Workers also die together (a host, an operator). What was lost with one goes only to a worker
 * that has been heard from some time later: it would be blamed for the death of one that was dead
 * already. A decode worker may be the first to know that a prefill worker is gone; what it gives
 * back waits as long, and is a suspect if that worker turns out to have died.
 */
#include "router/sched.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/warm.h"

#define PROVEN_TOKENS  4u     /* new tokens after which a suspect is cleared */
#define SUSPECTS_SHARE 16u    /* one suspect at a time per worker, and one more per so many */
#define OUTPUT_SHARE   4u     /* of the output still allowed, one part in so many gets pages */
#define FULL_PREEMPTED 2u     /* preemptions after which all of it does */
#define BACKOFF_US     20000u /* before trying again what a worker refused; doubles */
#define ALIVE_US       50000u /* a beat so long after a death was not sent before it */
#define N_AFFINITY     4096u
#define START_US_TOKEN 100.0 /* until a worker's speed was measured */

const struct sched_config sched_config_default = {
    .max_queued = 2048,
    .max_attempts = 3,
    .max_preemptions = 64,
    .max_deaths = 2,
    .queue_chunks = 4,
    .page_tokens = 64,
    .queue_timeout_us = 30000000,
    .worker_wait_us = 30000000,
    .prefill_timeout_us = 120000000,
    .request_timeout_us = 600000000,
};

enum list_kind { IN_QUEUE, AT_P, AT_D, IN_TODO, N_LISTS };

struct list {
    uint32_t first, last, n;
};

struct link {
    uint32_t prev, next;
};

struct req {
    enum sched_state state;
    uint32_t attempt, n_tries, n_preempted, n_deaths;
    uint64_t id, seq; // seq: order of arrival
    void *user;
    uint32_t n_prompt, max_tokens, n_emitted;
    uint32_t n_emitted_before; // this attempt
    uint64_t prefix_hash;
    uint32_t p, d;    // holders, or SCHED_NONE
    uint32_t input;   // tokens counted at p; 0 once the first token is there
    uint64_t promise; // pages counted at d
    uint32_t avoid_d; // where the last attempt failed
    uint32_t lost_p;  // queued: the P that its D said is gone, while it may be, or SCHED_NONE
    bool preempted;   // the last attempt ended so
    uint64_t arrival_us, queued_us, attempt_us, first_us, not_before_us;
    uint64_t alive_us; // only workers that sent a beat since may have it

    uint32_t cancel_p, cancel_d, cancel_attempt; // still to be told, or SCHED_NONE
    bool fail;                                   // likewise
    enum err code;
    const char *text;

    struct link links[N_LISTS];
};

struct worker {
    bool present, usable, draining; // usable: its first beat came
    struct sched_worker_info info;
    struct list held;
    uint32_t n_prefill;  // P: of held, without first token
    uint32_t n_suspects; // of held
    uint64_t last_placed, last_beat_us;

    // P
    uint64_t tokens, beat_tokens, tokens_since;
    double us_per_token;
    uint64_t last_prompt_tokens, busy_us;

    // D
    uint64_t promised, beat_free, pages_since;
};

struct sched {
    struct sched_config config;
    struct req *reqs;
    uint32_t n_slots, free_slot, n_free;
    struct list fresh, resumed, todo;
    uint64_t next_seq, next_placed;
    uint32_t n_suspects;
    struct worker workers[SCHED_MAX_WORKERS];
    uint32_t n_workers; // highest index in use + 1
    struct {
        uint64_t hash;
        uint32_t p;
    } affinity[N_AFFINITY];
    struct sched_stats stats; // counters only
    uint64_t left_us[3];      // by role: when a worker left last
};

static void attempt_over(struct sched *s, uint32_t i, enum err code, const char *text, bool suspect,
                         uint64_t now_us);
static bool counts_death(struct sched *s, struct req *r);
static void fail_poisonous(struct sched *s, uint32_t i);
static void fail(struct sched *s, uint32_t i, enum err code, const char *text);
static void hold(struct sched *s, uint32_t i, uint32_t p, uint32_t d);
static void release_p(struct sched *s, struct req *r);
static void release_d(struct sched *s, struct req *r);
static void release_and_cancel(struct sched *s, uint32_t i, uint32_t from);
static void first_token_came(struct sched *s, struct req *r);
static void clear_suspicion(struct sched *s, struct req *r);
static void slot_free(struct sched *s, uint32_t i);
static uint64_t pages_for(const struct sched *s, uint64_t tokens);
static bool place(struct sched *s, uint64_t now_us, struct sched_action *ret);

/* -- lists of slots -- */

static struct list empty_list(void) { return (struct list){SCHED_NONE, SCHED_NONE, 0}; }

static void list_insert_after(struct sched *s, struct list *l, enum list_kind kind, uint32_t i,
                              uint32_t after)
{
    struct link *k = &s->reqs[i].links[kind];
    k->prev = after;
    k->next = after == SCHED_NONE ? l->first : s->reqs[after].links[kind].next;
    if (k->prev == SCHED_NONE)
        l->first = i;
    else
        s->reqs[k->prev].links[kind].next = i;
    if (k->next == SCHED_NONE)
        l->last = i;
    else
        s->reqs[k->next].links[kind].prev = i;
    l->n++;
}

static void list_append(struct sched *s, struct list *l, enum list_kind kind, uint32_t i)
{
    list_insert_after(s, l, kind, i, l->last);
}

static void list_remove(struct sched *s, struct list *l, enum list_kind kind, uint32_t i)
{
    struct link *k = &s->reqs[i].links[kind];
    if (k->prev == SCHED_NONE)
        l->first = k->next;
    else
        s->reqs[k->prev].links[kind].next = k->next;
    if (k->next == SCHED_NONE)
        l->last = k->prev;
    else
        s->reqs[k->next].links[kind].prev = k->prev;
    k->prev = k->next = SCHED_NONE;
    l->n--;
}

static struct list *queue_of(struct sched *s, const struct req *r)
{
    return r->attempt == 0 ? &s->fresh : &s->resumed;
}

/* -- life -- */

struct sched *sched_create(const struct sched_config *c)
{
    assert(c->max_attempts > 0 && c->page_tokens > 0 && c->queue_chunks > 0);
    struct sched *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->config = *c;
    s->free_slot = SCHED_NONE;
    s->fresh = s->resumed = s->todo = empty_list();
    return s;
}

void sched_destroy(struct sched *s)
{
    if (!s)
        return;
    free(s->reqs);
    free(s);
}

enum err sched_reserve(struct sched *s, uint32_t n)
{
    if (s->n_free >= n)
        return ERR_OK;
    uint32_t more = n - s->n_free;
    uint32_t n_slots = MAX(s->n_slots + more, s->n_slots * 2);
    struct req *reqs = realloc(s->reqs, (size_t)n_slots * sizeof(*reqs));
    if (!reqs)
        return err_set(ERR_NOMEM, "no memory for %u requests in the scheduler", n_slots);
    s->reqs = reqs;
    for (uint32_t i = n_slots; i-- > s->n_slots;) {
        reqs[i].state = SCHED_FREE;
        reqs[i].links[IN_QUEUE].next = s->free_slot;
        s->free_slot = i;
        s->n_free++;
    }
    s->n_slots = n_slots;
    return ERR_OK;
}

static void slot_free(struct sched *s, uint32_t i)
{
    s->reqs[i].state = SCHED_FREE;
    s->reqs[i].user = NULL;
    s->reqs[i].links[IN_QUEUE].next = s->free_slot;
    s->free_slot = i;
    s->n_free++;
}

/* -- workers -- */

void sched_worker_add(struct sched *s, uint32_t idx, const struct sched_worker_info *info)
{
    assert(idx < SCHED_MAX_WORKERS && !s->workers[idx].present);
    s->workers[idx] = (struct worker){
        .present = true,
        .info = *info,
        .held = empty_list(),
        .us_per_token = START_US_TOKEN,
    };
    s->n_workers = MAX(s->n_workers, idx + 1);
}

void sched_worker_beat(struct sched *s, uint32_t idx, const struct wire_beat *b, uint64_t now_us)
{
    struct worker *w = &s->workers[idx];
    assert(idx < s->n_workers && w->present);
    w->draining = b->draining;
    if (w->info.role == WIRE_DECODE) {
        w->beat_free = (uint64_t)b->free_pages + b->cached_pages;
        w->pages_since = 0;
    } else {
        w->beat_tokens = b->waiting_tokens;
        w->tokens_since = 0;
        // A chunk takes several beats, so busy time adds up until tokens move.
        if (w->usable && b->busy)
            w->busy_us += now_us - w->last_beat_us;
        uint64_t done = b->prompt_tokens - w->last_prompt_tokens;
        if (w->usable && b->prompt_tokens > w->last_prompt_tokens) {
            if (w->busy_us > 0 && done >= 64)
                w->us_per_token += 0.2 * ((double)w->busy_us / (double)done - w->us_per_token);
            w->busy_us = 0;
        }
        w->last_prompt_tokens = b->prompt_tokens;
    }
    w->last_beat_us = now_us;
    w->usable = true;
}

void sched_worker_remove(struct sched *s, uint32_t idx, bool died, uint64_t now_us)
{
    struct worker *w = &s->workers[idx];
    assert(idx < s->n_workers && w->present);
    w->present = false;
    s->left_us[w->info.role] = now_us;

    for (uint32_t i = s->todo.first, next; i != SCHED_NONE; i = next) {
        struct req *r = &s->reqs[i];
        next = r->links[IN_TODO].next;
        if (r->cancel_p == idx)
            r->cancel_p = SCHED_NONE;
        if (r->cancel_d == idx)
            r->cancel_d = SCHED_NONE;
        if (r->cancel_p == SCHED_NONE && r->cancel_d == SCHED_NONE && !r->fail) {
            list_remove(s, &s->todo, IN_TODO, i);
            if (r->state == SCHED_OVER)
                slot_free(s, i);
        }
    }

    // Prompts are computed in order, so a P can only have died of those in its first chunks.
    uint64_t suspect_tokens = 2 * (uint64_t)w->info.chunk_tokens, tokens = 0;
    for (uint32_t i = s->resumed.first, next; i != SCHED_NONE; i = next) {
        struct req *r = &s->reqs[i];
        next = r->links[IN_QUEUE].next;
        if (r->lost_p != idx)
            continue;
        r->lost_p = SCHED_NONE;
        if (died && tokens < suspect_tokens && counts_death(s, r)) {
            list_remove(s, &s->resumed, IN_QUEUE, i);
            fail_poisonous(s, i);
        }
        tokens += r->n_prompt + r->n_emitted;
    }
    while (w->held.first != SCHED_NONE) {
        uint32_t i = w->held.first;
        struct req *r = &s->reqs[i];
        bool suspect = died && r->state == SCHED_DECODE;
        if (w->info.role == WIRE_PREFILL) {
            suspect = died && r->state == SCHED_PREFILL && tokens < suspect_tokens;
            tokens += r->input;
        }
        release_and_cancel(s, i, idx);
        attempt_over(s, i, ERR_PEER_LOST,
                     died ? "the worker that ran the request died"
                          : "the worker that ran the request left",
                     suspect, now_us);
        r->alive_us = died ? now_us + ALIVE_US : 0;
    }
    while (s->n_workers > 0 && !s->workers[s->n_workers - 1].present)
        s->n_workers--;
}

/* -- requests -- */

/* There is a worker of each role, or the last one left so recently that it is expected back: a
 * supervised worker is there again within seconds. */
static enum err roles_check(const struct sched *s, uint64_t now_us)
{
    bool role[3] = {false};
    for (uint32_t i = 0; i < s->n_workers; i++) {
        const struct worker *w = &s->workers[i];
        if (w->present && w->usable && !w->draining)
            role[w->info.role] = true;
    }
    for (int r = 0; r < 3; r++)
        role[r] |= s->left_us[r] && now_us - s->left_us[r] < s->config.worker_wait_us;
    if (!role[WIRE_PREFILL] || !role[WIRE_DECODE])
        return err_set(ERR_UNAVAILABLE, "no %s worker is there",
                       role[WIRE_PREFILL] ? "decode" : "prefill");
    return ERR_OK;
}

enum err sched_admits(const struct sched *s, uint32_t n, uint64_t now_us)
{
    TRY(roles_check(s, now_us));
    if ((uint64_t)s->fresh.n + n > s->config.max_queued)
        return err_set(ERR_BUSY, "%u requests are waiting, the limit is %u", s->fresh.n,
                       s->config.max_queued);
    return ERR_OK;
}

static uint32_t worker_max_tokens(const struct sched *s, const struct worker *w)
{
    uint64_t pool = (uint64_t)w->info.total_pages * s->config.page_tokens;
    if (w->info.role == WIRE_DECODE && pool < w->info.max_total_tokens)
        return (uint32_t)pool;
    return w->info.max_total_tokens;
}

uint32_t sched_max_total_tokens(const struct sched *s)
{
    uint32_t max[3] = {0};
    for (uint32_t i = 0; i < s->n_workers; i++) {
        const struct worker *w = &s->workers[i];
        if (w->present)
            max[w->info.role] = MAX(max[w->info.role], worker_max_tokens(s, w));
    }
    uint32_t p = max[WIRE_PREFILL] ? max[WIRE_PREFILL] : UINT32_MAX;
    uint32_t d = max[WIRE_DECODE] ? max[WIRE_DECODE] : UINT32_MAX;
    return MIN(p, d);
}

uint32_t sched_add(struct sched *s, const struct sched_request *q, uint64_t now_us)
{
    assert(s->n_free > 0 && q->n_prompt > 0 && q->max_tokens > 0);
    uint32_t i = s->free_slot;
    struct req *r = &s->reqs[i];
    s->free_slot = r->links[IN_QUEUE].next;
    s->n_free--;
    *r = (struct req){
        .state = SCHED_QUEUED,
        .id = q->id,
        .seq = s->next_seq++,
        .user = q->user,
        .n_prompt = q->n_prompt,
        .max_tokens = q->max_tokens,
        .prefix_hash = q->prefix_hash,
        .p = SCHED_NONE,
        .d = SCHED_NONE,
        .avoid_d = SCHED_NONE,
        .lost_p = SCHED_NONE,
        .cancel_p = SCHED_NONE,
        .cancel_d = SCHED_NONE,
        .arrival_us = now_us,
        .queued_us = now_us,
    };
    list_append(s, &s->fresh, IN_QUEUE, i);
    return i;
}

static uint64_t pages_for(const struct sched *s, uint64_t tokens)
{
    return (tokens + s->config.page_tokens - 1) / s->config.page_tokens;
}

/* Pages that we count for r at its D: what it has, one token more, and a share of the rest. */
static uint64_t promise_of(const struct sched *s, const struct req *r)
{
    uint64_t have = (uint64_t)r->n_prompt + r->n_emitted;
    uint64_t rest = r->max_tokens - MIN(r->n_emitted, r->max_tokens);
    uint64_t share =
        r->n_preempted >= FULL_PREEMPTED ? rest : MAX(rest / OUTPUT_SHARE, MIN(rest, 1));
    return pages_for(s, have + share);
}

void sched_token(struct sched *s, uint32_t i, uint32_t worker, uint32_t n_emitted, uint64_t now_us)
{
    struct req *r = &s->reqs[i];
    assert(r->state == SCHED_PREFILL || r->state == SCHED_DECODE);
    assert(worker == r->p || worker == r->d);
    if (r->state == SCHED_PREFILL) {
        first_token_came(s, r);
        r->state = SCHED_DECODE;
        r->first_us = now_us;
    }
    if (worker == r->d && r->p != SCHED_NONE)
        release_p(s, r);
    r->n_emitted = n_emitted;
    if (r->d != SCHED_NONE) {
        uint64_t promise = promise_of(s, r);
        s->workers[r->d].promised += promise - r->promise;
        r->promise = promise;
    }
    if (r->n_deaths > 0 && n_emitted - r->n_emitted_before >= PROVEN_TOKENS)
        clear_suspicion(s, r);
}

void sched_failed(struct sched *s, uint32_t i, uint32_t from, enum err code, const char *text,
                  uint64_t now_us)
{
    struct req *r = &s->reqs[i];
    assert(r->state == SCHED_PREFILL || r->state == SCHED_DECODE);
    uint32_t d = r->d, p = r->p;
    bool p_is_lost =
        code == ERR_PEER_LOST && r->state == SCHED_PREFILL && from == d && p != SCHED_NONE;
    release_and_cancel(s, i, from);
    attempt_over(s, i, code, text, false, now_us);
    if (code != ERR_PREEMPTED && r->state == SCHED_QUEUED) {
        r->avoid_d = d;
        if (p_is_lost) {
            r->lost_p = p;
            r->alive_us = now_us + ALIVE_US;
        }
        r->not_before_us = now_us + ((uint64_t)BACKOFF_US << MIN(r->n_tries, 6));
    }
}

void sched_end(struct sched *s, uint32_t i, uint32_t from)
{
    struct req *r = &s->reqs[i];
    assert(r->state != SCHED_FREE);
    if (r->state == SCHED_QUEUED)
        list_remove(s, queue_of(s, r), IN_QUEUE, i);
    release_and_cancel(s, i, from);
    clear_suspicion(s, r);
    r->state = SCHED_OVER;
    r->user = NULL;
    if (r->fail) { // nobody is left to be told
        r->fail = false;
        if (r->cancel_p == SCHED_NONE && r->cancel_d == SCHED_NONE)
            list_remove(s, &s->todo, IN_TODO, i);
    }
    if (r->cancel_p == SCHED_NONE && r->cancel_d == SCHED_NONE)
        slot_free(s, i);
}

/* A worker may have died of it. True: as one too many did. */
static bool counts_death(struct sched *s, struct req *r)
{
    if (r->n_deaths++ == 0)
        s->n_suspects++;
    return r->n_deaths >= s->config.max_deaths;
}

static void fail_poisonous(struct sched *s, uint32_t i)
{
    s->stats.n_poisoned++;
    fail(s, i, ERR_INTERNAL, "workers died each time they ran this request; it is not tried again");
}

/* Decides what follows an attempt that ended early. Nobody holds the request any more. */
static void attempt_over(struct sched *s, uint32_t i, enum err code, const char *text, bool suspect,
                         uint64_t now_us)
{
    struct req *r = &s->reqs[i];
    assert(r->p == SCHED_NONE && r->d == SCHED_NONE);
    if (suspect && counts_death(s, r)) {
        fail_poisonous(s, i);
        return;
    }
    r->preempted = code == ERR_PREEMPTED;
    if (r->preempted) {
        s->stats.n_preempted++;
        if (++r->n_preempted > s->config.max_preemptions) {
            fail(s, i, ERR_UNAVAILABLE, "preempted too often");
            return;
        }
    } else if (!err_retryable(code) || r->n_tries >= s->config.max_attempts) {
        fail(s, i, code, text);
        return;
    } else {
        s->stats.n_retries++;
    }
    r->attempt++;
    r->state = SCHED_QUEUED;
    r->queued_us = now_us;
    r->not_before_us = 0;
    r->avoid_d = r->lost_p = SCHED_NONE;
    uint32_t after = s->resumed.last;
    while (after != SCHED_NONE && s->reqs[after].seq > r->seq)
        after = s->reqs[after].links[IN_QUEUE].prev;
    list_insert_after(s, &s->resumed, IN_QUEUE, i, after);
}

static void todo(struct sched *s, uint32_t i)
{
    struct req *r = &s->reqs[i];
    if (r->cancel_p == SCHED_NONE && r->cancel_d == SCHED_NONE && !r->fail)
        list_append(s, &s->todo, IN_TODO, i);
}

static void fail(struct sched *s, uint32_t i, enum err code, const char *text)
{
    struct req *r = &s->reqs[i];
    todo(s, i);
    clear_suspicion(s, r);
    r->state = SCHED_OVER;
    r->fail = true;
    r->code = code;
    r->text = text;
}

/* -- who holds what -- */

static void hold(struct sched *s, uint32_t i, uint32_t p, uint32_t d)
{
    struct req *r = &s->reqs[i];
    struct worker *wp = &s->workers[p];
    r->p = p;
    r->input = r->n_prompt + r->n_emitted;
    list_append(s, &wp->held, AT_P, i);
    wp->n_prefill++;
    wp->tokens += r->input;
    wp->tokens_since += r->input;
    wp->n_suspects += r->n_deaths > 0;
    wp->last_placed = ++s->next_placed;
    r->d = d;
    if (d == SCHED_NONE)
        return;
    struct worker *wd = &s->workers[d];
    list_append(s, &wd->held, AT_D, i);
    r->promise = promise_of(s, r);
    wd->promised += r->promise;
    wd->pages_since += pages_for(s, (uint64_t)r->input + 1);
    wd->n_suspects += r->n_deaths > 0;
    wd->last_placed = s->next_placed;
}

static void first_token_came(struct sched *s, struct req *r)
{
    if (r->p == SCHED_NONE || r->input == 0)
        return;
    s->workers[r->p].n_prefill--;
    s->workers[r->p].tokens -= r->input;
    r->input = 0;
}

static void release_p(struct sched *s, struct req *r)
{
    if (r->p == SCHED_NONE)
        return;
    first_token_came(s, r);
    struct worker *w = &s->workers[r->p];
    list_remove(s, &w->held, AT_P, (uint32_t)(r - s->reqs));
    w->n_suspects -= r->n_deaths > 0;
    r->p = SCHED_NONE;
}

static void release_d(struct sched *s, struct req *r)
{
    if (r->d == SCHED_NONE)
        return;
    struct worker *w = &s->workers[r->d];
    list_remove(s, &w->held, AT_D, (uint32_t)(r - s->reqs));
    w->promised -= r->promise;
    w->n_suspects -= r->n_deaths > 0;
    r->d = SCHED_NONE;
    r->promise = 0;
}

/* Nobody holds the request afterwards; those that do not know yet (all but from) will be told. */
static void release_and_cancel(struct sched *s, uint32_t i, uint32_t from)
{
    struct req *r = &s->reqs[i];
    uint32_t p = r->p != from && r->p != SCHED_NONE && s->workers[r->p].present ? r->p : SCHED_NONE;
    uint32_t d = r->d != from && r->d != SCHED_NONE && s->workers[r->d].present ? r->d : SCHED_NONE;
    if (r->d != SCHED_NONE && r->d == from) { // it has freed them; its next beat will say so
        struct worker *w = &s->workers[r->d];
        uint64_t n = pages_for(s, (uint64_t)r->n_prompt + r->n_emitted);
        uint64_t since = MIN(n, w->pages_since);
        w->pages_since -= since;
        w->beat_free = MIN(w->beat_free + n - since, w->info.total_pages);
    }
    release_p(s, r);
    release_d(s, r);
    if (p == SCHED_NONE && d == SCHED_NONE)
        return;
    assert(r->cancel_p == SCHED_NONE && r->cancel_d == SCHED_NONE);
    todo(s, i);
    r->cancel_p = p;
    r->cancel_d = d;
    r->cancel_attempt = r->attempt;
}

static void clear_suspicion(struct sched *s, struct req *r)
{
    if (r->n_deaths == 0)
        return;
    if (r->p != SCHED_NONE)
        s->workers[r->p].n_suspects--;
    if (r->d != SCHED_NONE)
        s->workers[r->d].n_suspects--;
    s->n_suspects--;
    r->n_deaths = 0;
}

/* -- deadlines -- */

void sched_tick(struct sched *s, uint64_t now_us)
{
    const struct sched_config *c = &s->config;
    bool deserted = roles_check(s, now_us) != ERR_OK;
    for (uint32_t i = 0; i < s->n_slots; i++) {
        struct req *r = &s->reqs[i];
        const char *text = NULL;
        enum err code = ERR_TIMEOUT;
        if (r->state == SCHED_FREE || r->state == SCHED_OVER)
            continue;
        if (now_us - r->arrival_us > c->request_timeout_us)
            text = "the request took longer than request_timeout_s";
        else if (r->state == SCHED_QUEUED && deserted &&
                 now_us - r->queued_us > c->worker_wait_us) {
            text = "no worker came back within worker_wait_s";
            code = ERR_UNAVAILABLE;
        } else if (r->state == SCHED_QUEUED && !r->preempted &&
                   now_us - r->queued_us > c->queue_timeout_us)
            text = "no worker had room for the request within queue_timeout_s";
        else if (r->state == SCHED_PREFILL && now_us - r->attempt_us > c->prefill_timeout_us)
            text = "no token came within prefill_timeout_s";
        else if (r->state == SCHED_DECODE && r->p != SCHED_NONE && r->d != SCHED_NONE &&
                 now_us - r->first_us > c->prefill_timeout_us)
            sched_failed(s, i, SCHED_NONE, ERR_PEER_LOST,
                         "the KV pages did not reach the decode worker", now_us);

        if (!text)
            continue;
        s->stats.n_timeouts += code == ERR_TIMEOUT;
        if (r->state == SCHED_QUEUED)
            list_remove(s, queue_of(s, r), IN_QUEUE, i);
        release_and_cancel(s, i, SCHED_NONE);
        fail(s, i, code, text);
    }
}

/* -- actions -- */

bool sched_next(struct sched *s, uint64_t now_us, struct sched_action *ret)
{
    uint32_t i = s->todo.first;
    if (i == SCHED_NONE)
        return place(s, now_us, ret);

    struct req *r = &s->reqs[i];
    struct sched_action a = {
        .req = SCHED_NONE, .id = r->id, .attempt = r->attempt, .p = SCHED_NONE, .d = SCHED_NONE};
    uint32_t *cancel = r->cancel_p != SCHED_NONE ? &r->cancel_p : &r->cancel_d;
    if (*cancel != SCHED_NONE) {
        a.what = SCHED_CANCEL;
        a.attempt = r->cancel_attempt;
        a.p = *cancel;
        *cancel = SCHED_NONE;
    } else {
        a.what = SCHED_FAIL;
        a.user = r->user;
        a.code = r->code;
        a.text = r->text;
        r->fail = false;
    }
    if (r->cancel_p == SCHED_NONE && r->cancel_d == SCHED_NONE && !r->fail) {
        list_remove(s, &s->todo, IN_TODO, i);
        if (r->state == SCHED_OVER)
            slot_free(s, i);
    }
    *ret = a;
    return true;
}

static uint64_t tokens_ahead(const struct worker *w)
{
    return MIN(w->tokens, w->beat_tokens + w->tokens_since);
}

static bool takes(const struct sched *s, const struct worker *w, enum wire_role role,
                  const struct req *r)
{
    return w->present && w->usable && !w->draining && w->info.role == role &&
           (uint64_t)r->n_prompt + r->max_tokens <= worker_max_tokens(s, w);
}

static bool needs_d(const struct req *r) { return r->max_tokens - r->n_emitted > 1; }

/* Not now, if a death has something to do with it. */
static bool may_join(const struct sched *s, const struct worker *w, const struct req *r)
{
    return w->last_beat_us >= r->alive_us &&
           (r->n_deaths == 0 || w->n_suspects < 1 + s->n_suspects / SUSPECTS_SHARE);
}

static uint64_t free_pages(const struct worker *w)
{
    uint64_t said = w->beat_free > w->pages_since ? w->beat_free - w->pages_since : 0;
    uint64_t kept = w->info.total_pages > w->promised ? w->info.total_pages - w->promised : 0;
    return MIN(said, kept);
}

/* Most free pages, then fewest requests; not where the last attempt failed if there is a choice. */
static uint32_t choose_d(const struct sched *s, const struct req *r, bool *held_back)
{
    uint64_t promise = promise_of(s, r);
    uint64_t input = pages_for(s, (uint64_t)r->n_prompt + r->n_emitted + 1);
    uint32_t best = SCHED_NONE;
    for (uint32_t i = 0; i < s->n_workers; i++) {
        const struct worker *w = &s->workers[i];
        if (!takes(s, w, WIRE_DECODE, r) || w->held.n >= w->info.max_running ||
            w->promised + promise > w->info.total_pages || input + w->pages_since > w->beat_free)
            continue;
        if (!may_join(s, w, r)) {
            *held_back = true;
            continue;
        }

        if (best != SCHED_NONE && best != r->avoid_d) {
            const struct worker *b = &s->workers[best];
            if (i == r->avoid_d || free_pages(w) < free_pages(b))
                continue;
            if (free_pages(w) == free_pages(b) &&
                (w->held.n > b->held.n ||
                 (w->held.n == b->held.n && w->last_placed >= b->last_placed)))
                continue;
        }
        best = i;
    }
    return best;
}

/* Least predicted wait; the worker with the same prefix if the hit outweighs the longer wait. */
static uint32_t choose_p(const struct sched *s, const struct req *r, bool *held_back)
{
    uint32_t known = SCHED_NONE;
    if (r->prefix_hash && s->affinity[r->prefix_hash % N_AFFINITY].hash == r->prefix_hash)
        known = s->affinity[r->prefix_hash % N_AFFINITY].p;
    uint32_t best = SCHED_NONE;
    double best_us = 0;
    for (uint32_t i = 0; i < s->n_workers; i++) {
        const struct worker *w = &s->workers[i];
        uint64_t ahead = tokens_ahead(w);
        if (!takes(s, w, WIRE_PREFILL, r) || w->n_prefill >= w->info.max_running ||
            (w->n_prefill > 0 && ahead >= (uint64_t)s->config.queue_chunks * w->info.chunk_tokens))
            continue;
        if (!may_join(s, w, r)) {
            *held_back = true;
            continue;
        }

        double us = (double)ahead * w->us_per_token;
        if (i == known) // and it wins ties
            us -= (double)(r->n_prompt + r->n_emitted + 1) * w->us_per_token;
        if (best == SCHED_NONE || us < best_us ||
            (us == best_us && w->last_placed < s->workers[best].last_placed)) {
            best = i;
            best_us = us;
        }
    }
    return best;
}

/* Could any worker that is here take r when it has room? */
static bool has_a_home(const struct sched *s, const struct req *r)
{
    bool p = false, d = !needs_d(r);
    for (uint32_t i = 0; i < s->n_workers && !(p && d); i++) {
        p |= takes(s, &s->workers[i], WIRE_PREFILL, r);
        d |= takes(s, &s->workers[i], WIRE_DECODE, r);
    }
    return p && d;
}

/* Places one request of q, in order. What must wait for reasons of its own (back-off, suspicion, no
 * worker that is large enough) lets others pass; what waits for room does not, or large requests
 * would starve: then *blocked is set. */
static bool place_from(struct sched *s, struct list *q, uint64_t now_us, bool *blocked,
                       struct sched_action *ret)
{
    for (uint32_t i = q->first, next; i != SCHED_NONE; i = next) {
        struct req *r = &s->reqs[i];
        next = r->links[IN_QUEUE].next;
        if (r->not_before_us > now_us)
            continue;
        bool held_back = false;
        uint32_t d = needs_d(r) ? choose_d(s, r, &held_back) : SCHED_NONE;
        uint32_t p = d != SCHED_NONE || !needs_d(r) ? choose_p(s, r, &held_back) : SCHED_NONE;
        if (p == SCHED_NONE) {
            if (held_back || !has_a_home(s, r))

                continue;
            *blocked = true;
            return false;
        }
        list_remove(s, q, IN_QUEUE, i);
        hold(s, i, p, d);
        r->state = SCHED_PREFILL;
        r->attempt_us = now_us;
        r->n_emitted_before = r->n_emitted;
        if (!r->preempted)
            r->n_tries++;
        if (r->prefix_hash) {
            s->affinity[r->prefix_hash % N_AFFINITY].hash = r->prefix_hash;
            s->affinity[r->prefix_hash % N_AFFINITY].p = p;
        }
        s->stats.n_placed++;
        *ret = (struct sched_action){.what = SCHED_PLACE,
                                     .req = i,
                                     .id = r->id,
                                     .attempt = r->attempt,
                                     .user = r->user,
                                     .p = p,
                                     .d = d};
        return true;
    }
    return false;
}

static bool place(struct sched *s, uint64_t now_us, struct sched_action *ret)
{
    bool blocked = false;
    return place_from(s, &s->resumed, now_us, &blocked, ret) ||
           (!blocked && place_from(s, &s->fresh, now_us, &blocked, ret));
}

/* -- questions -- */

enum sched_state sched_state(const struct sched *s, uint32_t i) { return s->reqs[i].state; }

bool sched_holds(const struct sched *s, uint32_t i, uint32_t attempt, uint32_t worker)
{
    const struct req *r = &s->reqs[i];
    return r->attempt == attempt && worker != SCHED_NONE && (r->p == worker || r->d == worker);
}

void sched_warm(const struct sched *s, uint32_t i) { warm(&s->reqs[i], sizeof(s->reqs[i])); }

struct sched_stats sched_get_stats(const struct sched *s)
{
    struct sched_stats t = s->stats;
    t.n_new = s->fresh.n;
    t.n_resume = s->resumed.n;
    t.n_slots = s->n_slots;
    t.n_suspects = s->n_suspects;
    for (uint32_t i = 0; i < s->n_slots; i++) {
        t.n_prefill += s->reqs[i].state == SCHED_PREFILL;
        t.n_decode += s->reqs[i].state == SCHED_DECODE;
        t.n_over += s->reqs[i].state == SCHED_OVER;
    }
    return t;
}

struct sched_worker_stats sched_get_worker_stats(const struct sched *s, uint32_t idx)
{
    const struct worker *w = &s->workers[idx];
    return (struct sched_worker_stats){
        .n_prefill = w->n_prefill,
        .n_held = w->held.n,
        .tokens_ahead = tokens_ahead(w),
        .promised_pages = w->promised,
        .us_per_token = w->us_per_token,
    };
}
