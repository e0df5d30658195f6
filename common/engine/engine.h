/* engine.h: one forward for every caller, and the draws that follow it.
 *
 * A batch is ragged: sequences with any number of rows each. Prefill chunks, decode steps and MTP
 * verification differ only in its arrays. The engine keeps hidden states and logits of the last
 * forward in its own buffers (device memory on a GPU); callers name rows, they do not copy them.
 *
 * The order of a decode step: engine_draft (k times) -> engine_forward over the windows ->
 * engine_sample -> accept. The hidden rows of a forward stay valid until the next engine_forward,
 * so that the next step's engine_draft starts from them; rows that come from another worker are
 * imported into slots of their own.
 *
 * A pass takes milliseconds in which a GPU needs nobody. Whoever has other things to do on the
 * calling thread gets it back meanwhile: see engine_set_meanwhile.
 */
#ifndef BATON_ENGINE_H
#define BATON_ENGINE_H

#include <stdbool.h>

#include "common/engine/kv_pool.h"
#include "common/engine/weights.h"
#include "kernels/kernels.h"

struct engine;
struct mock_costs;

#define MOCK_KV_WIDTH                                                                              \
    2 /* values of 4 bytes per layer and token in the pages of the mock engine                     \
       */

struct engine_config {
    struct device *device;         /* the pool's and the weights'; NULL: the CPU */
    const struct mock_costs *mock; /* compute nothing, only take that time; NULL: compute */
    int n_threads;                 /* of the CPU; 0 = one per core */
    int max_rows;                  /* largest batch, in rows */
    int max_seqs;                  /* largest batch, in sequences */
    int max_logits;                /* most rows whose logits are wanted at once */
    int max_imports;               /* slots for imported hidden rows */
    int max_ctx;                   /* longest sequence in tokens */
    int max_seq_rows;              /* most rows of one sequence in a batch; 0 = max_rows */
    int max_graph_rows;            /* largest batch replayed as a CUDA graph; 0 = none */
    float inner_norm_eps;          /* 0 = norm_eps */
    void (*progress)(void *user);  /* called between layers on the caller's thread, or NULL */
    void *progress_user;
};

/* All arrays are host memory, valid during the call. */
struct batch {
    int n_rows, n_seqs, n_logits, max_pages;
    const int32_t *token;     /* [n_rows], in [0, vocab) */
    const int32_t *position;  /* [n_rows] RoPE position */
    const int32_t *seq_start; /* [n_seqs + 1] first row of each sequence */
    const int32_t *ctx_len; /* [n_seqs] KV slots in use once the batch's rows are written: row i of
                               the sequence (n of them) gets slot ctx_len - n + i */
    const int32_t *block_table;     /* [n_seqs, max_pages] page indexes */
    const int32_t *logit_row;       /* [n_logits] ascending rows whose logits are wanted */
    const uint32_t *const *allowed; /* engine_draft: [n_logits] the ids that each may draft, as
                                       sample_row's allowed; or NULL, as may be each of them */
};

/* weights and pool must outlive the engine. ERR_INVALID for a device this build cannot use. */
MUST_CHECK enum err engine_create(const struct engine_config *c, const struct weights *w,
                                  struct kv_pool *pool, struct engine **ret);
/* What an engine will take of its device's memory beside weights and pages; 0 on the CPU. */
uint64_t engine_device_bytes(const struct engine_config *c, const struct weights *w);
void engine_destroy(struct engine *e);
DEFINE_OWNED(engine)

/* Main model. Afterwards hidden rows [0, n_rows) are the states after the final norm and logits
 * [0, n_logits) belong to logit_row. ERR_INVALID if the batch exceeds the configuration or an index
 * is out of range (nothing was written). */
MUST_CHECK enum err engine_forward(struct engine *e, const struct batch *b);

/* The same in two calls: what the caller does in between, the device computes under. The batch
 * keeps its arrays until engine_wait, and no other pass, draw or export comes before it. */
MUST_CHECK enum err engine_start(struct engine *e, const struct batch *b);
MUST_CHECK enum err engine_wait(struct engine *e);

/* While a pass is computed, meanwhile is called on the thread that waits for it, again and again:
 * it may use about wait_us (0: it looks whether there is something to do, and returns). Until the
 * pass has ended, nothing may free or write what the pass knows: its sequences' pages and import
 * slots. Of the engine it may only call engine_import_hidden. */
void engine_set_meanwhile(struct engine *e, void (*meanwhile)(void *user, uint64_t wait_us),
                          void *user);

/* Where an MTP row takes its hidden state from. */
enum hidden_source {
    HIDDEN_MAIN,   /* row of the last engine_forward */
    HIDDEN_IMPORT, /* slot of engine_import_hidden */
    HIDDEN_DRAFT,  /* row of the last engine_draft (after shared_head.norm) */
};
struct hidden_ref {
    int32_t source, idx;
};

/* MTP layer (its KV is layer n_layers of the pages). Row r takes embedding of token[r] and
 * hidden[r]. For each of logit_row: ret_ids = argmax of what is allowed (lowest id wins), unless
 * ret_ids is NULL (prefill only wants the KV). HIDDEN_DRAFT rows are read before this call's own
 * rows replace them.
 */
MUST_CHECK enum err engine_draft(struct engine *e, const struct batch *b,
                                 const struct hidden_ref *hidden, int32_t *ret_ids);

/* Draws from the logits of the last engine_forward. rows[i] says how for logits row idx[i].
 * logprob, top_* as in sample_args; may be NULL when no row wants any. */
MUST_CHECK enum err engine_sample(struct engine *e, int n, const int32_t *idx,
                                  const struct sample_row *rows, int max_top, int32_t *ret_ids,
                                  float *ret_logprob, int32_t *ret_top_id, float *ret_top_logprob);

/* Copies a main hidden row out (H floats), or one from another worker in. */
MUST_CHECK enum err engine_export_hidden(struct engine *e, int row, float *ret);
MUST_CHECK enum err engine_import_hidden(struct engine *e, int slot, const float *hidden);

/* For tests: logits of the last forward or draft ([n_logits, vocab], host copy). */
MUST_CHECK enum err engine_read_logits(struct engine *e, bool draft, int row, float *ret);

/* Microseconds that the device worked on the last forward or draft; the rest of the call's time was
 * the host's. 0 on the CPU, whose call is all work. */
uint32_t engine_device_us(const struct engine *e);

const struct model_config *engine_model(const struct engine *e);

/* What the mock engine draws for an absolute position, in [0, n_text_ids) (unless it is banned or
 * outside of a grammar's mask: then the next one that is not; or given, see mock_outputs.h): with
 * splitmix64's finaliser,
 * mix(seed + position * 0x9e3779b97f4a7c15) >> 32, times n_text_ids, >> 32. */
int32_t mock_token(const struct model_config *m, uint64_t seed, uint32_t position);

#endif
