/* load.h: sends the requests when they are due and writes down what comes back. */
#ifndef BATON_BENCH_LOAD_H
#define BATON_BENCH_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#include "tests/bench/record.h"
#include "tests/bench/request.h"

struct load_state;

struct load {
    const struct request_form *form;
    struct client *client;
    const struct prompt *prompts;
    const uint64_t *due_us; // [len] ascending
    size_t len;
    size_t max_concurrency; // 0 = no limit
    uint64_t timeout_us;
    /* Called every half second; NULL: not. */
    void (*on_progress)(void *user, const struct load_state *s);
    void *user;
};

struct load_state {
    const struct record *records;
    size_t len, n_sent, n_in_flight, n_ok, n_failed;
    uint64_t now_us, n_events; // events of all requests so far
    uint64_t ok_tokens, ok_events;
    bool over;
};

/* Runs the load to its end, or until SIGINT: what was in flight then stays PENDING, a second one
 * kills as usual. ret_records[len] is filled; free each with record_finish. Duration: from the
 * start to the end of the last request. */
MUST_CHECK enum err load_run(uv_loop_t *loop, const struct load *l, struct record *ret_records,
                             uint64_t *ret_duration_us);

/* One small request, waited for. ret_body: NUL-terminated, the caller frees it. Any status but 200
 * is ERR_UNAVAILABLE with status and message. */
MUST_CHECK enum err load_fetch(uv_loop_t *loop, struct client *c, const char *bytes, size_t n,
                               char **ret_body, size_t *ret_n);

#endif
