/* record.h: what happened to one request. Times are µs since the measurement began. */
#ifndef BATON_BENCH_RECORD_H
#define BATON_BENCH_RECORD_H

#include <stdint.h>

#include "common/base/err.h"

// clang-format off
#define OUTCOME_TABLE(X)                                                                           \
    X(PENDING,     "not finished")                                                                 \
    X(OK,          "ok")                                                                           \
    X(CONNECT,     "could not connect")                                                            \
    X(HTTP_STATUS, "HTTP status")                                                                  \
    X(ERROR_EVENT, "error event")                                                                  \
    X(BAD_STREAM,  "broken stream")                                                                \
    X(CUT,         "connection lost")                                                              \
    X(NO_OUTPUT,   "no output")                                                                    \
    X(TIMEOUT,     "timeout")
// clang-format on

enum outcome {
#define X(name, text) OUTCOME_##name,
    OUTCOME_TABLE(X) N_OUTCOMES
#undef X
};

struct record {
    uint64_t due_us;    // when the load wanted it
    uint64_t sent_us;   // when it was sent: TTFT and E2E count from here
    uint64_t end_us;    // last event of the answer; of a failed one: when it failed
    uint32_t *event_us; // since sent_us, of each event with output
    uint32_t n_events, cap_events;
    int64_t prompt_tokens; // by the server, else by the data; -1 unknown
    int64_t output_tokens; // by the server, else the number of events
    int64_t cached_tokens; // -1 unknown
    uint32_t wanted_tokens;
    enum outcome outcome;
    int http_status;
    char finish[16];
    char message[160]; // why it failed
};

const char *outcome_text(enum outcome o);
void record_finish(struct record *r);
MUST_CHECK enum err record_add_event(struct record *r, uint64_t now_us);

/* In ms; of requests that are OK. TPOT: NAN with fewer than two tokens. */
double record_ttft_ms(const struct record *r);
double record_tpot_ms(const struct record *r);
double record_e2el_ms(const struct record *r);

#endif
