/* sched_test.c: one rule of placement at a time. tests/sim shows that they hold together. */
#include "router/sched.h"

#include "check.h"
#include "common/base/own.h"

static struct sched *s;
static uint64_t now;
static uint64_t next_id;
static struct sched_action last; // what step saw
static struct sched_config config;
static bool present[4];

static void worker(uint32_t idx, enum wire_role role, uint32_t total_pages, uint32_t max_running,
                   uint32_t chunk)
{
    struct sched_worker_info i = {.role = role,
                                  .total_pages = total_pages,
                                  .max_running = max_running,
                                  .chunk_tokens = chunk,
                                  .max_total_tokens = 100000};
    sched_worker_add(s, idx, &i);
    present[idx] = true;
    struct wire_beat b = {.free_pages = total_pages};
    sched_worker_beat(s, idx, &b, now);
}

/* Workers 0 and 1 prefill, 2 and 3 decode. */
static void set_up(void)
{
    now = 1000000;
    next_id = 0;
    s = sched_create(&config);
    REQUIRE(s && sched_reserve(s, 1000) == ERR_OK);
    worker(0, WIRE_PREFILL, 1000, 100, 1000);
    worker(1, WIRE_PREFILL, 1000, 100, 1000);
    worker(2, WIRE_DECODE, 1000, 100, 0);
    worker(3, WIRE_DECODE, 1000, 100, 0);
}

static uint32_t add_like(uint32_t n_prompt, uint32_t max_tokens, uint64_t prefix)
{
    struct sched_request r = {
        .id = ++next_id, .n_prompt = n_prompt, .max_tokens = max_tokens, .prefix_hash = prefix};
    return sched_add(s, &r, now);
}

static uint32_t add(uint32_t n_prompt, uint32_t max_tokens)
{
    return add_like(n_prompt, max_tokens, 0);
}

/* The next action, or -1. */
static int step(void) { return sched_next(s, now, &last) ? (int)last.what : -1; }

static int place_all(void)
{
    int n = 0;
    while (step() >= 0)
        n++;
    return n;
}

static void beat_free(uint32_t idx, uint32_t free_pages)
{
    struct wire_beat b = {.free_pages = free_pages};
    sched_worker_beat(s, idx, &b, now);
}

/* 100 ms later. */
static void all_beat(void)
{
    struct wire_beat b = {.free_pages = 1000};
    now += 100000;
    for (uint32_t i = 0; i < 4; i++)
        if (present[i])
            sched_worker_beat(s, i, &b, now);
}

static void lose(uint32_t idx, bool died)
{
    present[idx] = false;
    sched_worker_remove(s, idx, died, now);
}

static void the_shorter_queue_wins(void)
{
    set_up();
    add(3000, 10);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t busy = last.p;
    for (int i = 0; i < 10; i++) { // sixty short ones are less than one long one
        add(100, 10);
        CHECK_INT(step(), SCHED_PLACE);
        CHECK_INT(last.p, 1 - busy);
    }
    sched_destroy(s);
}

static void measured_speed_counts(void)
{
    set_up();
    struct wire_beat slow = {.busy = 1}, fast = {.busy = 1};
    for (int i = 0; i < 60; i++) {
        now += 100000;
        slow.prompt_tokens += 100;
        fast.prompt_tokens += 10000;
        sched_worker_beat(s, 0, &slow, now);
        sched_worker_beat(s, 1, &fast, now);
    }
    CHECK_NEAR(sched_get_worker_stats(s, 0).us_per_token, 1000, 1);
    CHECK_NEAR(sched_get_worker_stats(s, 1).us_per_token, 10, 1);
    int at_fast = 0;
    for (int i = 0; i < 10; i++) {
        add(200, 10);
        CHECK_INT(step(), SCHED_PLACE);
        at_fast += last.p == 1;
    }
    CHECK(at_fast >= 9);
    sched_destroy(s);
}

static void a_known_prefix_is_worth_a_wait(void)
{
    set_up();
    add_like(1000, 10, 42);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t home = last.p;
    add_like(1000, 10, 42); // the other one is idle, but this one has the pages
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.p, home);
    add_like(1000, 10, 42); // now the queue is longer than the hit can save
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.p, 1 - home);
    add_like(100, 10, 43); // others go where it is shorter
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.p, 1 - home);
    sched_destroy(s);
}

static void most_free_pages_win(void)
{
    set_up();
    beat_free(2, 10);
    add(64 * 5, 10);
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.d, 3);
    beat_free(2, 1000);
    add(64 * 500, 10);
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.d, 2);
    add(64, 10);
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.d, 3);
    sched_destroy(s);
}

static void what_does_not_fit_waits_and_is_not_overtaken(void)
{
    set_up();
    lose(3, false);
    uint32_t big = add(64 * 700, 64);
    CHECK_INT(step(), SCHED_PLACE);
    add(64 * 400, 64);
    add(64, 64); // would fit, but then the large one could wait for ever
    CHECK_INT(step(), -1);
    sched_token(s, big, last.p == 0 ? 0 : 1, 1, now);
    sched_end(s, big, 2);
    while (step() == SCHED_CANCEL)
        ;
    CHECK_INT(last.what, SCHED_PLACE);
    CHECK_INT(last.id, 2);
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.id, 3);
    // What nobody here can ever take lets others pass.
    add(64 * 1100, 64);
    add(64, 64);
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.id, 5);
    sched_destroy(s);
}

static void only_some_chunks_are_queued_at_a_worker(void)
{
    set_up();
    for (int i = 0; i < 40; i++)
        add(500, 10);
    // 4 chunks of 1000 at each of two, plus the one that crosses the line.
    CHECK_INT(place_all(), 16);
    struct wire_beat b = {.waiting_tokens = 0}; // it says that it is through (prefix hits)
    sched_worker_beat(s, 0, &b, now);
    CHECK_INT(place_all(), 8);
    CHECK_INT(last.p, 0);
    sched_destroy(s);
}

static void limits_of_workers_hold(void)
{
    set_up();
    lose(0, false);
    lose(1, false);
    lose(2, false);
    lose(3, false);
    now += config.worker_wait_us;
    CHECK_INT(sched_admits(s, 1, now), ERR_UNAVAILABLE);
    worker(0, WIRE_PREFILL, 1000, 2, 1000);
    CHECK_INT(sched_admits(s, 1, now), ERR_UNAVAILABLE);
    worker(1, WIRE_DECODE, 1000, 3, 0);
    CHECK_INT(sched_admits(s, 1, now), ERR_OK);
    CHECK_INT(sched_max_total_tokens(s), 64000);
    uint32_t r[5];
    for (int i = 0; i < 5; i++)
        r[i] = add(10, 10);
    CHECK_INT(place_all(), 2);
    sched_token(s, r[0], 0, 1, now);
    CHECK_INT(place_all(), 1);
    sched_token(s, r[1], 0, 1, now);
    CHECK_INT(place_all(), 0); // three streams are at D
    sched_token(s, r[0], 1, 2, now);
    sched_end(s, r[0], 1);
    CHECK_INT(place_all(), 1);
    sched_destroy(s);
}

static void p_is_released_by_ds_first_record(void)
{
    set_up();
    uint32_t r = add(10, 10);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t p = last.p, d = last.d;
    sched_token(s, r, p, 1, now);
    CHECK(sched_holds(s, r, 0, p));
    sched_token(s, r, d, 2, now);
    CHECK(!sched_holds(s, r, 0, p) && sched_holds(s, r, 0, d));
    sched_end(s, r, SCHED_NONE);
    CHECK_INT(step(), SCHED_CANCEL);
    CHECK_INT(last.p, d);
    CHECK_INT(step(), -1);
    sched_destroy(s);
}

static void cancels_come_before_the_next_attempt(void)
{
    set_up();
    uint32_t r = add(10, 10);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t p = last.p, d = last.d;
    sched_failed(s, r, d, ERR_NO_PAGES, "x", now);
    CHECK_INT(step(), SCHED_CANCEL);
    CHECK_INT(last.p, p);
    CHECK_INT(last.attempt, 0);
    CHECK_INT(step(), -1); // backs off
    now += 100000;
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.attempt, 1);
    CHECK(last.d != d); // another one, since there is one
    sched_failed(s, r, last.d, ERR_INVALID, "y", now);
    CHECK_INT(step(), SCHED_CANCEL);
    CHECK_INT(step(), SCHED_FAIL);
    CHECK_INT(last.code, ERR_INVALID);
    CHECK_STR(last.text, "y");
    sched_destroy(s);
}

static void resumed_streams_go_first(void)
{
    set_up();
    uint32_t r[6];
    for (int i = 0; i < 6; i++)
        r[i] = add(10, 100);
    CHECK_INT(place_all(), 6);
    for (int i = 0; i < 6; i++)
        for (uint32_t d = 2; d < 4; d++)
            if (sched_holds(s, r[i], 0, d))
                sched_token(s, r[i], d, 3, now);
    add(10, 100);
    lose(2, false); // said goodbye: nobody is suspected
    int n = 0;
    while (step() >= 0) {
        if (last.id == 7)
            break;
        CHECK_INT(last.what, SCHED_PLACE);
        CHECK_INT(last.attempt, 1);
        n++;
    }
    CHECK_INT(n, 3);
    sched_destroy(s);
}

static void suspects_are_taken_one_by_one(void)
{
    set_up();
    uint32_t r[10];
    for (int i = 0; i < 10; i++)
        r[i] = add(10, 100);
    CHECK_INT(place_all(), 10);
    int n_at_2 = 0;
    for (int i = 0; i < 10; i++) {
        uint32_t d = sched_holds(s, r[i], 0, 2) ? 2 : 3;
        n_at_2 += d == 2;
        sched_token(s, r[i], d, 3, now);
    }
    CHECK_INT(n_at_2, 5);
    lose(2, true);
    CHECK_INT(sched_get_stats(s).n_suspects, 5);
    all_beat();
    CHECK_INT(place_all(), 1);
    uint32_t first = last.req;
    add(10, 100); // others pass
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.id, 11);
    sched_token(s, first, 3, 7, now); // four tokens: cleared
    CHECK_INT(sched_get_stats(s).n_suspects, 4);
    CHECK_INT(place_all(), 1);
    uint32_t poison = last.req;
    uint64_t poison_id = last.id;
    sched_token(s, poison, 3, 4, now);
    lose(3, true);
    while (step() == SCHED_CANCEL)
        ;
    CHECK_INT(last.what, SCHED_FAIL); // only the one that was there both times
    CHECK_INT(last.id, poison_id);
    CHECK_INT(last.code, ERR_INTERNAL);
    CHECK_INT(step(), -1);
    all_beat();
    worker(2, WIRE_DECODE, 1000, 100, 0);
    CHECK(place_all() > 0);
    sched_destroy(s);
}

/* The decode worker knows first that the prefill worker is gone, each time: the request counts as
 * suspect. */
static void deaths_that_another_worker_reports_count(void)
{
    set_up();
    uint32_t r = add(10, 100);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t p = last.p;
    sched_failed(s, r, last.d, ERR_PEER_LOST, "gone", now);
    CHECK_INT(step(), SCHED_CANCEL); // at P, which may be there after all
    CHECK_INT(step(), -1);           // nor is it placed before that is known
    lose(p, true);
    CHECK_INT(sched_get_stats(s).n_suspects, 1);
    all_beat();
    CHECK_INT(place_all(), 1);
    CHECK_INT(last.p, 1 - p);
    sched_failed(s, r, last.d, ERR_PEER_LOST, "gone", now);
    CHECK_INT(step(), SCHED_CANCEL);
    lose(1 - p, true);
    CHECK_INT(step(), SCHED_FAIL);
    CHECK_INT(last.code, ERR_INTERNAL);
    CHECK_INT(step(), -1);
    sched_destroy(s);

    // A broken connection kills nobody: it is tried again, and nobody is a suspect.
    set_up();
    r = add(10, 100);
    CHECK_INT(step(), SCHED_PLACE);
    p = last.p;
    sched_failed(s, r, last.d, ERR_PEER_LOST, "gone", now);
    CHECK_INT(step(), SCHED_CANCEL);
    all_beat();
    CHECK_INT(place_all(), 1);
    lose(p, true);
    CHECK_INT(sched_get_stats(s).n_suspects, last.p == p);
    sched_destroy(s);
}

/* All of a kind are killed at once, and the router hears of one after the other: nobody's fault. */
static void workers_that_die_together_blame_nobody(void)
{
    set_up();
    uint32_t r = add(10, 100);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t p = last.p;
    lose(p, true);
    beat_free(2, 1000); // sent before the death, read behind it
    beat_free(3, 1000);
    beat_free(1 - p, 0);
    CHECK_INT(step(), SCHED_CANCEL); // at D
    CHECK_INT(step(), -1);
    add(10, 100); // no try of others is wasted on waiting
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.p, 1 - p);
    lose(1 - p, true);
    CHECK_INT(step(), SCHED_CANCEL);
    CHECK_INT(step(), -1);
    worker(0, WIRE_PREFILL, 1000, 100, 1000);
    worker(1, WIRE_PREFILL, 1000, 100, 1000);
    all_beat();
    CHECK_INT(place_all(), 2);
    CHECK_INT(sched_state(s, r), SCHED_PREFILL);

    // As for decode workers, with streams that have begun.
    sched_destroy(s);
    set_up();
    r = add(10, 100);
    CHECK_INT(step(), SCHED_PLACE);
    uint32_t d = last.d;
    sched_token(s, r, d, 3, now);
    lose(d, true);
    CHECK_INT(step(), -1);
    lose(5 - d, true);
    worker(d, WIRE_DECODE, 1000, 100, 0);
    all_beat();
    CHECK_INT(step(), SCHED_PLACE);
    CHECK_INT(last.d, d);
    sched_token(s, r, d, 4, now);
    lose(d, true); // this one had been heard from since
    while (step() == SCHED_CANCEL)
        ;
    CHECK_INT(last.what, SCHED_FAIL);
    CHECK_INT(last.code, ERR_INTERNAL);
    sched_destroy(s);
}

static void a_preempted_request_counts_in_full(void)
{
    set_up();
    lose(3, false);
    uint32_t r = add(640, 6400);
    CHECK_INT(step(), SCHED_PLACE);
    uint64_t at_first = sched_get_worker_stats(s, 2).promised_pages;
    CHECK_INT(at_first, 10 + 25);
    for (int i = 0; i < 2; i++) {
        sched_token(s, r, 2, (uint32_t)i + 1, now);
        sched_failed(s, r, 2, ERR_PREEMPTED, NULL, now);
        CHECK_INT(step(), SCHED_PLACE);
    }
    CHECK_INT(sched_get_worker_stats(s, 2).promised_pages, 110);
    for (int i = 2; i < 65; i++) {
        sched_token(s, r, 2, (uint32_t)i + 1, now);
        sched_failed(s, r, 2, ERR_PREEMPTED, NULL, now);
        CHECK_INT(step(), i < 64 ? SCHED_PLACE : SCHED_FAIL);
    }
    sched_destroy(s);
}

static void attempts_are_bounded(void)
{
    set_up();
    uint32_t r = add(10, 10);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(step(), SCHED_PLACE);
        sched_failed(s, r, SCHED_NONE, ERR_PEER_LOST, "z", now);
        CHECK_INT(step(), SCHED_CANCEL);
        CHECK_INT(step(), SCHED_CANCEL);
        now += 1000000;
    }
    CHECK_INT(step(), SCHED_FAIL);
    CHECK_INT(last.code, ERR_PEER_LOST);
    CHECK_INT(step(), -1);
    sched_destroy(s);
}

/* A supervised worker is there again soon: requests wait for it, but not for ever. */
static void the_last_worker_is_expected_back(void)
{
    set_up();
    lose(2, true);
    CHECK_OK(sched_admits(s, 1, now)); // another decode worker is there
    lose(3, true);
    CHECK_OK(sched_admits(s, 1, now));
    uint32_t r = add(10, 10);
    CHECK_INT(place_all(), 0);
    now += config.worker_wait_us / 2;
    sched_tick(s, now);
    CHECK_INT(step(), -1);
    worker(2, WIRE_DECODE, 1000, 3, 0);
    CHECK_INT(place_all(), 1);
    CHECK_INT(last.req, r);

    lose(2, false);
    add(10, 10);
    now += config.worker_wait_us;
    CHECK_INT(sched_admits(s, 1, now), ERR_UNAVAILABLE);
    now++;
    sched_tick(s, now);
    int failed = 0;
    for (int what; (what = step()) != -1;)
        failed += what == SCHED_FAIL && last.code == ERR_UNAVAILABLE;
    CHECK_INT(failed, 2); // the one that was lost with its worker too
    sched_destroy(s);
}

static void the_queue_is_bounded(void)
{
    config.max_queued = 3;
    set_up();
    for (int i = 0; i < 3; i++)
        add(10, 10);
    CHECK_INT(sched_admits(s, 1, now), ERR_BUSY);
    CHECK_INT(place_all(), 3);
    CHECK_INT(sched_admits(s, 3, now), ERR_OK);
    CHECK_INT(sched_admits(s, 4, now), ERR_BUSY);
    sched_destroy(s);
    config = sched_config_default;
}

static void an_end_before_the_failure_was_told_silences_it(void)
{
    set_up();
    uint32_t r = add(10, 10);
    CHECK_INT(step(), SCHED_PLACE);
    sched_failed(s, r, SCHED_NONE, ERR_INVALID, "z", now);
    sched_end(s, r, SCHED_NONE); // the client left in between
    CHECK_INT(step(), SCHED_CANCEL);
    CHECK_INT(step(), SCHED_CANCEL);
    CHECK_INT(step(), -1);
    CHECK_INT(sched_get_stats(s).n_over, 0);
    sched_destroy(s);
}

int main(void)
{
    config = sched_config_default;
    RUN(the_shorter_queue_wins);
    RUN(measured_speed_counts);
    RUN(a_known_prefix_is_worth_a_wait);
    RUN(most_free_pages_win);
    RUN(what_does_not_fit_waits_and_is_not_overtaken);
    RUN(only_some_chunks_are_queued_at_a_worker);
    RUN(limits_of_workers_hold);
    RUN(p_is_released_by_ds_first_record);
    RUN(cancels_come_before_the_next_attempt);
    RUN(resumed_streams_go_first);
    RUN(suspects_are_taken_one_by_one);
    RUN(deaths_that_another_worker_reports_count);
    RUN(workers_that_die_together_blame_nobody);
    RUN(a_preempted_request_counts_in_full);
    RUN(attempts_are_bounded);
    RUN(the_last_worker_is_expected_back);
    RUN(the_queue_is_bounded);
    RUN(an_end_before_the_failure_was_told_silences_it);
    return check_done();
}
