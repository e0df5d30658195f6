/* stream.h: what a decode worker knows of one attempt.
 *
 *              pages found: GRANT           READY, all transfers ended
 *   WAITING -----------------> RESERVED -----------------------------> RUNNING -> gone
 *      |                          | CANCEL                                | CANCEL, finish,
 *      | CANCEL, RELEASE          v                                       | preempted
 *      v                       ZOMBIE -RELEASE or READY, transfers ended-> gone
 *     gone
 *
 * 1. RESERVED and ZOMBIE pages may be written by a transfer at any moment: they are freed only
 * after the prefill worker said READY or RELEASE and every announced transfer ended, or after its
 * pair was aborted.
 * 2. Mail is read while a step computes, too. A stream of that step (in_step) stays as it is: what
 * would end it is remembered (cancelled) until the step is over.
 * 3. A RUNNING stream has n_ctx KV slots of the main model and n_ctx - n_pending of the MTP layer;
 *    `token` is drawn, sent, and not in the cache yet.
 */
#ifndef BATON_STREAM_H
#define BATON_STREAM_H

#include "common/engine/engine.h"
#include "common/engine/seen.h"
#include "common/engine/worker.h"
#include "common/grammar/constraint.h"

#define STREAM_MAX_WINDOW (WIRE_MAX_MTP_STEP + 1)

enum stream_state { STREAM_WAITING, STREAM_RESERVED, STREAM_ZOMBIE, STREAM_RUNNING };

struct stream {
    struct stream *next; // in order of arrival
    enum stream_state state;
    uint64_t req_id;
    uint32_t attempt;
    uint64_t instance; // prefill worker
    uint64_t arrival_us;
    struct wire_sampling sampling;
    uint32_t n_input;  // prompt and output of earlier attempts
    uint32_t n_output; // output so far, earlier attempts included
    int slot;          // of imported hidden rows; -1 while waiting

    uint32_t *pages; // [n_pages]
    uint32_t n_pages, pages_cap;

    uint32_t n_transfers, n_transfers_done; // announced, ended well
    bool ready, released;                   // which of the two came
    uint32_t want_transfers;                // as READY said
    uint64_t checksum;

    bool in_step, cancelled;
    uint32_t n_ctx;
    int32_t token;
    uint32_t n_pending; // MTP slots to make from true hidden states: n_ctx - n_pending .. n_ctx - 1
    struct hidden_ref pending_hidden[STREAM_MAX_WINDOW];
    int32_t pending_token[STREAM_MAX_WINDOW];

    uint32_t n_draft; // this step's
    int32_t draft[WIRE_MAX_MTP_STEP];
    int32_t draft_row; // of its last draft in engine_draft's output
    int window_row;    // first row (and logits row) of its verification window
    int32_t sampled[STREAM_MAX_WINDOW];
    float logprob[STREAM_MAX_WINDOW];
    struct wire_top top[STREAM_MAX_WINDOW][WIRE_MAX_TOP];

    bool first_unsent; // the first record repeats the prefill worker's token
    float first_logprob;
    struct wire_top first_top[WIRE_MAX_TOP];

    struct seen seen; // empty without penalties
    uint32_t n_bias;
    int32_t *bias_id;              // [n_bias], and their values behind them; NULL without
    struct constraint *constraint; // what the output is held to, or NULL
    struct grammar_state ahead;    // after the drafts so far
    enum err constraint_err;       // the grammar went wrong in this step
};

static inline const float *stream_bias_value(const struct stream *st)
{
    return (const float *)st->bias_id + st->n_bias;
}

static inline bool stream_penalised(const struct wire_sampling *s)
{
    return s->presence_penalty != 0 || s->frequency_penalty != 0 || s->repetition_penalty != 1;
}

#endif
