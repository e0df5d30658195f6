/* event.h: what one streamed event says, in any of the three shapes.
 *
 * Reads the JSON in one pass without building a tree: at 50,000 events a second that is the
 * difference between a tenth of a core and half of one.
 */
#ifndef BATON_BENCH_EVENT_H
#define BATON_BENCH_EVENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"

struct event {
    bool has_choice; // belongs to the answer: moves its end
    bool has_output; // carries output: counts for TTFT and ITL
    bool is_error;
    char finish[16];                                     // finish_reason, or ""
    char message[160];                                   // of the error, cut to fit
    int64_t prompt_tokens, output_tokens, cached_tokens; // -1: not said
};

/* text: the JSON of an event or of an error body. A choice counts as output if it has text,
 * content, reasoning or tool calls, or an empty `text` without finish_reason (a token that is no
 * text); a token of /generate_stream always does. ERR_INVALID: not JSON, or nested deeper than 64.
 */
MUST_CHECK enum err event_parse(const char *text, size_t n, struct event *ret);

#endif
