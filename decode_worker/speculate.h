/* speculate.h: one decode step over the running streams: draft, verify, draw.
 *
 *   slots      ... n_ctx-1 | n_ctx   n_ctx+1 ... n_ctx+k
 *   main rows              | token   draft 0 ... draft k-1      window of k+1 rows, one forward
 *   MTP rows   pending ----| draft 0 ... (eagle: each at the next position)
 *
 * An output that is held to a grammar has drafts that fit it: the state runs ahead with them, and
 * its mask at each row serves the draft made there and the draw.
 *
 * The MTP layer first makes the pending slots from true hidden states (so no slot keeps one that
 * was made from a draft), its last row gives draft 0; further drafts recycle its own output. In
 * vanilla_with_att the further steps keep the position of the first, as separate layers would.
 */
#ifndef BATON_SPECULATE_H
#define BATON_SPECULATE_H

#include "decode_worker/stream.h"

struct speculate;

struct speculate_config {
    struct engine *engine;
    int max_streams, max_pages; /* pages of the longest sequence */
    uint32_t mtp_step;          /* most drafts of a step; n_draft of each stream may be fewer */
    bool eagle;
    bool has_mtp;     /* the MTP layer's KV is kept */
    double simulated; /* with dummy weights: probability that a draft is right; 0 = compare */
};

MUST_CHECK enum err speculate_create(const struct speculate_config *c, struct speculate **ret);
void speculate_destroy(struct speculate *s);

/* Drafts (n_draft of each stream says how many), verifies and draws: fills draft, sampled, logprob
 * and top of each stream. Pages must cover n_ctx + n_draft + 1 slots. Trouble with one stream's
 * grammar is left in its constraint_err: what was drawn for it must not become output. */
MUST_CHECK enum err speculate_step(struct speculate *s, struct stream **streams, int n);

/* After n_tokens of the window became output: moves the stream on and notes the pending MTP rows.
 * constraint_err is set if the grammar forbids one of them. */
void speculate_advance(struct speculate *s, struct stream *st, uint32_t n_tokens);

#endif
