/* sched_sim.c: the router's scheduler against a seeded world of fake workers.
 *
 * Each seed builds a cluster and a load, and lets time pass in events: workers compute, die, come
 * back, hang, preempt, drain, refuse, lie about their load by being late; messages are lost;
 * clients leave. After every step the invariants are checked, at the end everything must be gone.
 *
 *   sched_sim [first seed [number of seeds]]     a failure prints the seed that shows it
 *
 * 1. Every accepted request ends exactly once: finished, failed or cancelled by its client.
 * 2. Placements stay within max_running, max_total_tokens and the pool.
 * 3. No action names a worker that is not there, or one that drains (placements).
 * 4. First attempts are placed in order of arrival (those that need no decode worker may pass).
 * 5. The queue of new requests never exceeds its bound.
 * 6. An attempt is never placed while an older one is held anywhere and was not cancelled.
 * 7. Nothing waits for long while nothing runs.
 * 8. When all has ended, the scheduler is empty.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "router/sched.h"

#define N_WORKERS 8
#define N_REQS    400
#define STEP_US   5000u
#define PAGE      64u

struct fake_worker {
    bool present, draining, hung;
    struct sched_worker_info info;
    uint64_t free_pages, prompt_tokens;
    uint64_t next_beat_us, back_us;
    double tokens_per_us;
    double budget; // P: tokens it may compute now
};

enum where { NOWHERE, WAITING, RUNNING };

/* What one worker knows of one request. */
struct copy {
    enum where where;
    uint32_t attempt;
    uint32_t todo;  // P: tokens to compute
    uint64_t pages; // D
    uint64_t order;
};

struct request {
    bool started, ended;
    uint32_t slot;
    uint64_t id, arrival_us, leaves_us;
    uint32_t n_prompt, max_tokens, n_target, n_emitted;
    bool poison;
    uint32_t p, d, attempt; // as placed last
    bool ready;             // P is done: D may run it
    int n_placed;
    struct copy at[N_WORKERS];
};

struct world {
    uint64_t seed, rng, now;
    struct sched *s;
    struct sched_config config;
    struct fake_worker w[N_WORKERS];
    struct request r[N_REQS];
    uint32_t n_reqs, n_started, n_ended, n_killed_by_poison;
    uint64_t order, last_first_placed, idle_since;
    uint32_t chaos; // 0: nothing fails
    int n_finished, n_failed, n_cancelled, n_refused;
};

static uint64_t failures;
static struct {
    uint64_t placed, finished, failed, cancelled, refused, deaths, preempted;
} totals;

#define MUST(w_, cond, ...)                                                                        \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "seed %" PRIu64 " at %" PRIu64 " us: %s: ", (w_)->seed, (w_)->now,     \
                    #cond);                                                                        \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
            failures++;                                                                            \
        }                                                                                          \
    } while (0)

static uint64_t draw(struct world *w)
{
    w->rng += 0x9e3779b97f4a7c15u;
    uint64_t x = w->rng;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint32_t below(struct world *w, uint32_t n) { return (uint32_t)(draw(w) % n); }
static bool chance(struct world *w, uint32_t per_100k) { return below(w, 100000) < per_100k; }
static uint32_t pages(uint64_t tokens) { return (uint32_t)((tokens + PAGE - 1) / PAGE); }

static struct request *by_id(struct world *w, uint64_t id) { return &w->r[id - 1]; }

/* -- workers -- */

static void worker_up(struct world *w, uint32_t i)
{
    struct fake_worker *f = &w->w[i];
    f->present = true;
    f->draining = f->hung = false;
    f->free_pages = f->info.total_pages;
    f->prompt_tokens = 0;
    f->budget = 0;
    f->next_beat_us = w->now + below(w, 100000);
    for (uint32_t k = 0; k < w->n_reqs; k++)
        w->r[k].at[i].where = NOWHERE;
    sched_worker_add(w->s, i, &f->info);
}

static void worker_down(struct world *w, uint32_t i, bool died)
{
    struct fake_worker *f = &w->w[i];
    f->present = false;
    f->back_us = w->now + 200000 + below(w, 2000000);
    for (uint32_t k = 0; k < w->n_reqs; k++)
        w->r[k].at[i].where = NOWHERE;
    totals.deaths += died;
    sched_worker_remove(w->s, i, died, w->now);
}

static void beat(struct world *w, uint32_t i)
{
    struct fake_worker *f = &w->w[i];
    struct wire_beat b = {.draining = f->draining,
                          .free_pages = (uint32_t)f->free_pages,
                          .prompt_tokens = f->prompt_tokens};
    for (uint32_t k = 0; k < w->n_reqs; k++) {
        if (w->r[k].at[i].where == NOWHERE)
            continue;
        b.busy = 1;
        b.waiting_tokens += w->r[k].at[i].todo;
    }
    sched_worker_beat(w->s, i, &b, w->now);
    f->next_beat_us = w->now + 100000;
}

static void drop_copy(struct world *w, struct request *r, uint32_t i)
{
    struct copy *c = &r->at[i];
    if (c->where == NOWHERE)
        return;
    w->w[i].free_pages += c->pages;
    *c = (struct copy){0};
}

static void tell_tokens(struct world *w, struct request *r, uint32_t worker, uint32_t attempt,
                        uint32_t n)
{
    if (r->ended || !sched_holds(w->s, r->slot, attempt, worker))
        return;
    if (n > r->n_emitted)
        r->n_emitted = n;
    sched_token(w->s, r->slot, worker, r->n_emitted, w->now);
    if (r->n_emitted < r->n_target)
        return;
    sched_end(w->s, r->slot, worker);
    r->ended = true;
    w->n_ended++;
    w->n_finished++;
}

static void tell_failed(struct world *w, struct request *r, uint32_t worker, uint32_t attempt,
                        enum err code)
{
    if (!r->ended && sched_holds(w->s, r->slot, attempt, worker))
        sched_failed(w->s, r->slot, worker, code, "as simulated", w->now);
}

/* The copy that a worker got first, of those in a state. */
static struct request *oldest(struct world *w, uint32_t i, enum where where)
{
    struct request *best = NULL;
    for (uint32_t k = 0; k < w->n_reqs; k++)
        if (w->r[k].at[i].where == where && (!best || w->r[k].at[i].order < best->at[i].order))
            best = &w->r[k];
    return best;
}

static struct request *youngest_running(struct world *w, uint32_t i)
{
    struct request *best = NULL;
    for (uint32_t k = 0; k < w->n_reqs; k++)
        if (w->r[k].at[i].where == RUNNING && (!best || w->r[k].at[i].order > best->at[i].order))
            best = &w->r[k];
    return best;
}

static void run_prefill(struct world *w, uint32_t i)
{
    struct fake_worker *f = &w->w[i];
    f->budget += f->tokens_per_us * STEP_US;
    struct request *r;
    while (f->budget >= 1 && (r = oldest(w, i, WAITING))) {
        struct copy *c = &r->at[i];
        if (r->poison && chance(w, 30000)) {
            w->n_killed_by_poison++;
            worker_down(w, i, true);
            return;
        }
        uint32_t n = (uint32_t)MIN(f->budget, (double)c->todo);
        f->budget -= n;
        f->prompt_tokens += n;
        c->todo -= n;
        if (c->todo > 0)
            return;
        uint32_t attempt = c->attempt;
        drop_copy(w, r, i);
        if (w->chaos && chance(w, 1000)) {
            tell_failed(w, r, i, attempt, below(w, 8) ? ERR_PEER_LOST : ERR_INTERNAL);
            continue;
        }
        if (r->attempt == attempt && !r->ended) {
            r->ready = true;
            tell_tokens(w, r, i, attempt, r->n_emitted + 1);
        }
    }
    if (!oldest(w, i, WAITING))
        f->budget = 0;
}

static void run_decode(struct world *w, uint32_t i)
{
    struct fake_worker *f = &w->w[i];
    // Reserve for what waits, oldest first.
    for (struct request *r; (r = oldest(w, i, WAITING)) != NULL;) {
        uint32_t need = pages((uint64_t)r->n_prompt + r->n_emitted + 1);
        if (need > f->free_pages)
            break;
        f->free_pages -= need;
        r->at[i].pages = need;
        r->at[i].where = RUNNING;
    }
    for (uint32_t k = 0; k < w->n_reqs; k++) {
        struct request *r = &w->r[k];
        struct copy *c = &r->at[i];
        if (c->where != RUNNING || !r->ready || r->d != i || r->attempt != c->attempt || r->ended)
            continue;
        if (r->poison && chance(w, 5000)) {
            w->n_killed_by_poison++;
            worker_down(w, i, true);
            return;
        }
        uint32_t step = 1 + below(w, 4);
        uint32_t n = MIN(r->n_emitted + step, r->n_target);
        uint32_t need = pages((uint64_t)r->n_prompt + n);
        while (need > c->pages && f->free_pages == 0 && c->where == RUNNING) {
            struct request *victim = youngest_running(w, i);
            uint32_t attempt = victim->at[i].attempt;
            drop_copy(w, victim, i);
            totals.preempted++;
            tell_failed(w, victim, i, attempt, ERR_PREEMPTED);
        }
        if (c->where != RUNNING)
            continue;
        if (need > c->pages) {
            f->free_pages -= need - c->pages;
            c->pages = need;
        }
        uint32_t attempt = c->attempt;
        if (w->chaos && chance(w, 30)) { // a record got lost: the next one shows a gap
            if (sched_holds(w->s, r->slot, attempt, i))
                sched_failed(w->s, r->slot, SCHED_NONE, ERR_PEER_LOST, "as simulated", w->now);
            continue;
        }
        if (n == r->n_target)
            drop_copy(w, r, i);
        tell_tokens(w, r, i, attempt, n);
    }
}

/* -- the router's side -- */

static void carry_out(struct world *w)
{
    struct sched_action a;
    uint64_t n = 0;
    while (sched_next(w->s, w->now, &a)) {
        struct request *r = by_id(w, a.id);
        MUST(w, n++ < 100000, "actions never end");
        if (n >= 100000)
            exit(1);
        if (a.what == SCHED_FAIL) {
            MUST(w, !r->ended, "request %" PRIu64 " ends twice", a.id);
            r->ended = true;
            w->n_ended++;
            w->n_failed++;
            continue;
        }
        struct fake_worker *p = &w->w[a.p];
        MUST(w, a.p < N_WORKERS && p->present, "action %d names worker %u", a.what, a.p);
        if (a.what == SCHED_CANCEL) {
            if (r->at[a.p].where != NOWHERE && r->at[a.p].attempt == a.attempt)
                drop_copy(w, r, a.p);
            continue;
        }

        totals.placed++;
        MUST(w, !r->ended, "request %" PRIu64 " is placed after its end", a.id);
        MUST(w, p->info.role == WIRE_PREFILL && !p->draining, "bad prefill worker %u", a.p);
        for (uint32_t i = 0; i < N_WORKERS; i++)
            MUST(w, r->at[i].where == NOWHERE, "attempt %u is still at %u", r->at[i].attempt, i);
        uint64_t total = (uint64_t)r->n_prompt + r->max_tokens;
        struct sched_worker_stats ps = sched_get_worker_stats(w->s, a.p);
        MUST(w, ps.n_prefill <= p->info.max_running, "%u prompts at %u", ps.n_prefill, a.p);
        MUST(w, total <= p->info.max_total_tokens, "%" PRIu64 " tokens at %u", total, a.p);
        if (a.attempt == 0 && r->max_tokens > 1) {
            MUST(w, a.id > w->last_first_placed, "request %" PRIu64 " overtaken by %" PRIu64, a.id,
                 w->last_first_placed);
            w->last_first_placed = a.id;
        }
        r->p = a.p;
        r->d = a.d;
        r->attempt = a.attempt;
        r->ready = false;
        r->n_placed++;
        r->at[a.p] = (struct copy){.where = WAITING,
                                   .attempt = a.attempt,
                                   .todo = r->n_prompt + r->n_emitted,
                                   .order = ++w->order};
        MUST(w, (a.d == SCHED_NONE) == (r->max_tokens - r->n_emitted == 1),
             "decode worker %d of %u", (int)a.d, r->max_tokens - r->n_emitted);
        if (a.d == SCHED_NONE)
            continue;
        struct fake_worker *d = &w->w[a.d];
        MUST(w, d->present && d->info.role == WIRE_DECODE && !d->draining, "bad decode worker %u",
             a.d);
        struct sched_worker_stats ds = sched_get_worker_stats(w->s, a.d);
        MUST(w, ds.n_held <= d->info.max_running, "%u streams at %u", ds.n_held, a.d);
        MUST(w, ds.promised_pages <= d->info.total_pages, "%" PRIu64 " pages promised of %u",
             ds.promised_pages, d->info.total_pages);
        MUST(w, total <= d->info.max_total_tokens, "%" PRIu64 " tokens at %u", total, a.d);
        r->at[a.d] = (struct copy){.where = WAITING, .attempt = a.attempt, .order = ++w->order};
    }
}

static void arrive(struct world *w)
{
    if (w->n_reqs == N_REQS)
        return;
    enum err e = sched_admits(w->s, 1, w->now);
    struct sched_stats s = sched_get_stats(w->s);
    if (e == ERR_BUSY)
        MUST(w, s.n_new == w->config.max_queued, "refused with %u waiting", s.n_new);
    if (e != ERR_OK) {
        w->n_refused++;
        totals.refused++;
        return;
    }
    struct request *r = &w->r[w->n_reqs++];
    *r = (struct request){.started = true,
                          .id = w->n_reqs,
                          .arrival_us = w->now,
                          .n_prompt = 1 + below(w, below(w, 4) ? 300 : 3000),
                          .max_tokens = 1 + below(w, below(w, 3) ? 60 : 900),
                          .poison = w->chaos && chance(w, 300)};
    r->n_target = below(w, 3) ? 1 + below(w, r->max_tokens) : r->max_tokens;
    if (chance(w, 10000))
        r->leaves_us = w->now + below(w, 5000000);
    if (sched_reserve(w->s, 1) != ERR_OK)
        abort();
    struct sched_request q = {.id = r->id,
                              .user = r,
                              .n_prompt = r->n_prompt,
                              .max_tokens = r->max_tokens,
                              .prefix_hash = below(w, 4)};
    r->slot = sched_add(w->s, &q, w->now);
    w->n_started++;
}

static void clients_leave(struct world *w)
{
    for (uint32_t k = 0; k < w->n_reqs; k++) {
        struct request *r = &w->r[k];
        if (r->ended || !r->leaves_us || w->now < r->leaves_us)
            continue;
        sched_end(w->s, r->slot, SCHED_NONE);
        r->ended = true;
        w->n_ended++;
        w->n_cancelled++;
    }
}

/* Nobody waits for long although both sides have nothing at all to do. */
static void check_idle(struct world *w)
{
    struct sched_stats s = sched_get_stats(w->s);
    bool p = false, d = false;
    for (uint32_t i = 0; i < N_WORKERS; i++) {
        struct fake_worker *f = &w->w[i];
        if (!f->present || f->draining)
            continue;
        p |= f->info.role == WIRE_PREFILL;
        d |= f->info.role == WIRE_DECODE;
    }
    // Back-off and first beats take a while.
    if (s.n_new + s.n_resume == 0 || s.n_prefill + s.n_decode > 0 || !p || !d)
        w->idle_since = w->now;
    MUST(w, w->now - w->idle_since < 2500000, "%u wait and nobody works", s.n_new + s.n_resume);
}

static void run(uint64_t seed)
{
    static struct world world;
    memset(&world, 0, sizeof(world));
    struct world *w = &world;
    w->seed = w->rng = seed;
    w->now = w->idle_since = 1000000;
    w->chaos = below(w, 4); // one world in four is quiet
    w->config = sched_config_default;
    w->config.max_queued = 1 + below(w, 64);
    w->config.queue_timeout_us = 20000000;
    w->s = sched_create(&w->config);
    if (!w->s)
        abort();
    uint32_t n_p = 1 + below(w, 3), n_d = 1 + below(w, 4);
    for (uint32_t i = 0; i < n_p + n_d; i++) {
        w->w[i].info = (struct sched_worker_info){
            .role = i < n_p ? WIRE_PREFILL : WIRE_DECODE,
            .total_pages = 64 + below(w, 200),
            .max_running = i < n_p ? 1 + below(w, 100) : 1 + below(w, 32),
            .chunk_tokens = 64u << below(w, 6),
            .max_total_tokens = 4096,
        };
        w->w[i].tokens_per_us = 0.005 * (1 + below(w, 10));
        worker_up(w, i);
    }
    uint32_t arrival = 200 + below(w, 40000); // per step and 100k
    uint64_t next_tick = 0, end_us = w->now + 400000000;
    while (w->now < end_us) {
        w->now += STEP_US;
        bool loading = w->n_reqs < N_REQS && w->now < 60000000;
        while (loading && chance(w, arrival))
            arrive(w);
        for (uint32_t i = 0; i < n_p + n_d; i++) {
            struct fake_worker *f = &w->w[i];
            if (!f->present) {
                if (w->now >= f->back_us)
                    worker_up(w, i);
                continue;
            }
            if (w->chaos && loading && chance(w, 20 * w->chaos)) {
                worker_down(w, i, below(w, 4));
                continue;
            }
            if (w->chaos && loading && chance(w, 10))
                f->hung = !f->hung;
            if (!loading)
                f->hung = false;
            f->draining = w->chaos && loading && (f->draining ? !chance(w, 500) : chance(w, 20));
            if (f->hung && chance(w, 100)) { // noticed
                worker_down(w, i, true);
                continue;
            }
            if (f->draining)
                f->next_beat_us = w->now; // say so at once, or placements race with it
            if (w->now >= f->next_beat_us)
                beat(w, i);
            if (f->hung)
                continue;
            if (f->info.role == WIRE_PREFILL)
                run_prefill(w, i);
            else
                run_decode(w, i);
        }
        clients_leave(w);
        if (w->now >= next_tick) {
            sched_tick(w->s, w->now);
            next_tick = w->now + 50000;
        }
        carry_out(w);
        struct sched_stats s = sched_get_stats(w->s);
        MUST(w, s.n_new <= w->config.max_queued, "%u waiting", s.n_new);
        MUST(w, s.n_over == 0, "%u slots not freed", s.n_over);
        check_idle(w);
        if (!loading && w->n_ended == w->n_started)
            break;
        if (failures > 20)
            exit(1);
    }

    struct sched_stats s = sched_get_stats(w->s);
    MUST(w, w->n_ended == w->n_started, "%u of %u requests ended", w->n_ended, w->n_started);
    MUST(w, s.n_new + s.n_resume + s.n_prefill + s.n_decode + s.n_over + s.n_suspects == 0,
         "left over: new %u resume %u prefill %u decode %u over %u suspects %u", s.n_new,
         s.n_resume, s.n_prefill, s.n_decode, s.n_over, s.n_suspects);
    for (uint32_t i = 0; i < n_p + n_d; i++) {
        if (!w->w[i].present)
            continue;
        struct sched_worker_stats t = sched_get_worker_stats(w->s, i);
        MUST(w, t.n_held == 0 && t.n_prefill == 0 && t.promised_pages == 0 && t.tokens_ahead == 0,
             "worker %u: held %u prefill %u promised %" PRIu64 " ahead %" PRIu64, i, t.n_held,
             t.n_prefill, t.promised_pages, t.tokens_ahead);
        MUST(w, w->w[i].free_pages == w->w[i].info.total_pages,
             "worker %u has %" PRIu64 " of %u pages", i, w->w[i].free_pages,
             w->w[i].info.total_pages);
    }
    if (!w->chaos)
        MUST(w, s.n_retries == 0 && s.n_poisoned == 0, "%" PRIu64 " retries in a quiet world",
             s.n_retries);
    totals.finished += (uint64_t)w->n_finished;
    totals.failed += (uint64_t)w->n_failed;
    totals.cancelled += (uint64_t)w->n_cancelled;
    sched_destroy(w->s);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    uint64_t n = argc > 2 ? strtoull(argv[2], NULL, 0) : UINT64_MAX;
    uint64_t until = clock_now_us() + 5000000, done = 0;
    for (; done < n && (argc > 2 || clock_now_us() < until) && failures == 0; done++)
        run(first + done);
    printf("seeds %" PRIu64 " .. %" PRIu64 ": placed %" PRIu64 " finished %" PRIu64
           " failed %" PRIu64 " cancelled %" PRIu64 " refused %" PRIu64 " deaths %" PRIu64
           " preempted %" PRIu64 ": %s\n",
           first, first + done - 1, totals.placed, totals.finished, totals.failed, totals.cancelled,
           totals.refused, totals.deaths, totals.preempted, failures ? "FAILED" : "ok");
    return failures ? 1 : 0;
}
