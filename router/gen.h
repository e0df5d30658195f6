/* gen.h: one generation: a prompt goes in, text and tokens come out, whatever happens in between.
 *
 * A gen is one output stream (a request with n=3 has three). It owns the request's record: ids,
 * seed, emitted ids, attempt number, deadline. It survives the death of workers: the next attempt
 * continues after the emitted ids, and the caller sees one unbroken stream. Detokenising and stop
 * strings happen here, so text deltas are always whole characters and never contain a stop string.
 *
 * Everything runs on the loop's thread. Callbacks come from the loop, never from inside gen_start
 * or gen_cancel. After on_end or on_error the gen is gone.
 *
 *   QUEUED -placed-> PREFILL -first token-> DECODE -finish-> (on_end)
 *      ^                |                     |
 *      +---- attempt failed, tries left ------+---- none left, deadline -> (on_error)
 */
#ifndef BATON_GEN_H
#define BATON_GEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/wire.h"

struct cluster; /* router/cluster.h: scheduler, workers and all gens */
struct gen;

enum gen_finish { GEN_STOP, GEN_LENGTH };

/* New output since the last call. Pointers are valid during the call. */
struct gen_chunk {
    const char
        *text; /* whole UTF-8 characters, may be empty (held back, or special tokens skipped) */
    size_t n_text;
    const int32_t *ids; /* new token ids, the ending eos or stop id included */
    int n_ids;
    int32_t n_logprobs;         /* -1: none */
    const float *logprob;       /* [n_ids] */
    const struct wire_top *top; /* [n_ids, n_logprobs] */
};

struct gen_usage {
    uint32_t n_prompt, n_output; /* n_output counts the eos token, as others do */
    uint32_t n_cached;           /* prompt tokens from the prefix cache */
    uint64_t queue_us, prefill_us, ttft_us, total_us;
    uint32_t n_attempts;
};

struct gen_end {
    enum gen_finish finish;
    int32_t stop_id;         /* the id that ended it, or -1 */
    const char *stop_string; /* the string that ended it, or NULL */
    struct gen_usage usage;
};

struct gen_callbacks {
    void (*on_chunk)(void *user, const struct gen_chunk *c);
    void (*on_end)(void *user, const struct gen_end *e);
    void (*on_error)(void *user, enum err code, const char *text);
    /* on_chunk comes soon: warm.h for what it reads. Called with depth 0 .. GEN_WARM_DEPTH - 1 for
     * many streams in turn, so that what was asked for at a depth can be read at the next one. May
     * be NULL. */
    void (*warm)(void *user, int depth);
};
#define GEN_WARM_DEPTH 4

/* Whose output it is, for traces: all of it may be left out. */
struct gen_origin {
    const char *request_id, *trace_id, *parent_id, *span_id; /* copied when traced */
    uint32_t choice, n_choices; /* of the request; n_choices 0: unknown */
};

struct gen_params {
    const int32_t *prompt; /* copied */
    uint32_t n_prompt;
    struct wire_sampling sampling; /* seed already drawn; max_tokens > 0 */
    const char *const *stop;       /* stop strings, copied */
    const size_t *stop_len;
    size_t n_stop;
    bool include_stop; /* the matched stop string stays in the text */
    bool skip_special; /* leave special tokens out of the text; the ending eos is always left out */
    const int32_t *bias_id; /* [n_bias] logit biases, copied */
    const float *bias_value;
    uint32_t n_bias;
    const char *grammar; /* [n_grammar] what the output is held to, copied; see
                            common/grammar/grammar.h, whose grammar_compile took it */
    size_t n_grammar;
    uint64_t cache_salt;
    uint64_t arrival_us; /* when the HTTP request was complete (clock_now_us) */
    struct gen_origin origin;
};

/* ERR_BUSY: the queue is full. ERR_UNAVAILABLE: no worker of a role is there. ERR_TOO_LONG /
 * ERR_INVALID: see cluster_check. On failure no callback will come. */
MUST_CHECK enum err gen_start(struct cluster *c, const struct gen_params *p,
                              const struct gen_callbacks *cb, void *user, struct gen **ret);
/* The client is gone: workers drop it within a step. No callbacks any more; gen is gone. */
void gen_cancel(struct gen *g);
uint64_t gen_id(const struct gen *g);

/* Would a request be queued right now? ERR_BUSY / ERR_UNAVAILABLE with a sentence; asked before
 * tokenising. *ret_retry_after_s gets 1..5 (jittered) on failure. */
MUST_CHECK enum err cluster_admits(struct cluster *c, uint32_t n, int *ret_retry_after_s);

struct cluster_model {
    const char *name;          /* served model name */
    uint32_t max_total_tokens; /* prompt + output */
    int32_t vocab;             /* ids in prompts and stop_ids must be below n_token_ids */
    int32_t n_token_ids;
    const int32_t *eos;
    int n_eos;
    double default_temperature, default_top_p;
    int default_top_k;
};
const struct cluster_model *cluster_get_model(const struct cluster *c);

/* Workers of both roles present and making progress. */
bool cluster_ready(const struct cluster *c);

#endif
