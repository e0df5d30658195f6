/* trace.h: --trace-file, a JSON line for every output stream that ended: where it was when. `baton
 * trace` (deploy/trace.c) makes a picture of it. Nothing of a prompt or an answer is in it.
 */
#ifndef BATON_TRACE_H
#define BATON_TRACE_H

#include <stdint.h>

#include "common/base/err.h"

struct trace;

/* Times are clock_now_us, 0: it did not come to that. placed to handoff are of the last attempt;
 * all are the router's clock, so what happened in a worker is seen when its message arrives. */
struct trace_record {
    const char *request_id, *trace_id, *parent_id, *span_id; // NULL or "": none
    const char *prefill, *decode;                            // workers' names, or ""
    const char *finish;                                      // stop, length, abort or error
    const char *error;                                       // an error's name, or NULL
    uint64_t gen_id;                                         // req= in the workers' logs
    uint32_t choice, n_choices, n_attempts;
    uint32_t n_prompt, n_cached, n_output;
    uint32_t n_steps, n_accepted; // decode steps; tokens that they gave beyond one each
    uint64_t received_us;         // the HTTP request was complete
    uint64_t queued_us;           // parsed and tokenised
    uint64_t placed_us;           // sent to its workers
    uint64_t prefill_start_us, prefill_end_us;
    uint64_t first_token_us, handoff_us, last_token_us; // handoff: the decode worker's first token
    uint64_t end_us;
};

/* Appends to path. ERR_IO names it. */
MUST_CHECK enum err trace_open(const char *path, struct trace **ret);
/* Opens the path again, for those who rotate files; on failure the old file stays. */
MUST_CHECK enum err trace_reopen(struct trace *t);
/* Lines are buffered until trace_flush. What cannot be written is logged once and dropped. */
void trace_write(struct trace *t, const struct trace_record *r);
void trace_flush(struct trace *t);
void trace_close(struct trace *t);

#endif
