/* mock_costs.h: how long a GPU takes for a step, as a small table: what the mock engine sleeps. */
#ifndef BATON_MOCK_COSTS_H
#define BATON_MOCK_COSTS_H

#include "common/base/err.h"

#define MOCK_MAX_POINTS 32
#define MOCK_MAX_PATH   1024

/* Straight lines between points; flat before the first, the last line goes on behind the last. */
struct mock_curve {
    int n;
    struct {
        double batch, ms;
    } at[MOCK_MAX_POINTS]; /* batch ascending */
};

struct mock_costs {
    struct mock_curve decode;     /* a step of that many sequences, one row each */
    struct mock_curve verify_row; /* every further row of a step, by its sequences */
    struct mock_curve draft;      /* a pass of the MTP layer, by its sequences */
    double prefill_tokens_per_s;
    double prefill_chunk_ms;     /* the least that a chunk takes: all experts are read */
    char outputs[MOCK_MAX_PATH]; /* file of mock_outputs.h, or "": all tokens are made up */
};

/* An H100 with 80 GB, contexts of 512 tokens, measured; but verify_row below 64 and above 256
 * sequences is an estimate. Contexts of other lengths cost the same. */
extern const struct mock_costs mock_costs_h100;

/* Reads {"decode_ms": [[1, 4.5], ...], "verify_row_ms": ..., "draft_ms": ...,
 * "prefill_tokens_per_s": N, "prefill_chunk_ms": N, "outputs": PATH}. What is left out is the
 * H100's. ERR_INVALID names the file and the member; ERR_NOT_FOUND, ERR_IO, ERR_TOO_LARGE as
 * file_read. */
MUST_CHECK enum err mock_costs_load(const char *path, struct mock_costs *ret);

/* Milliseconds of a decode step or verification: n_rows rows of n_seqs sequences. */
double mock_costs_step_ms(const struct mock_costs *c, int n_seqs, int n_rows);
double mock_costs_draft_ms(const struct mock_costs *c, int n_seqs);
double mock_costs_chunk_ms(const struct mock_costs *c, int n_rows);

#endif
