/* constraint.h: an output that is held to a grammar, as a worker sees it. One thread.
 *
 * Grammars of equal text share a matcher, so a batch of requests with one schema computes each mask
 * once; those that nobody uses are kept for a while.
 */
#ifndef BATON_GRAMMAR_CONSTRAINT_H
#define BATON_GRAMMAR_CONSTRAINT_H

#include "common/grammar/grammar.h"

struct constraints; /* all of a worker */
struct constraint;  /* one output's */

/* Reads the vocabulary of the checkpoint in dir. Without a tokenizer.json this succeeds, and
 * constraint_create says why there are no grammars. */
MUST_CHECK enum err constraints_create(const char *dir, int32_t n_logits, const int32_t *eos,
                                       int n_eos, struct constraints **ret);
void constraints_destroy(struct constraints *cs); /* after all of its constraints */
DEFINE_OWNED(constraints)

/* text: see grammar.h; ids[n_ids]: output so far. ERR_INVALID, ERR_TOO_LARGE: as grammar_compile,
 * or the output does not fit. */
MUST_CHECK enum err constraint_create(struct constraints *cs, const char *text, size_t n,
                                      const int32_t *ids, size_t n_ids, struct constraint **ret);
void constraint_destroy(struct constraint *c);
DEFINE_OWNED(constraint)

/* Where the output is. Copies of the state may run ahead along drafts until the next trim. */
struct grammar_state constraint_state(const struct constraint *c);
/* As matcher_mask and matcher_accept. */
MUST_CHECK enum err constraint_mask(struct constraint *c, struct grammar_state s,
                                    const uint32_t **ret);
MUST_CHECK enum err constraint_accept(struct constraint *c, struct grammar_state *s, int32_t id,
                                      bool *ret_fits);
/* id became output. ERR_INTERNAL if the mask forbids it. */
MUST_CHECK enum err constraint_advance(struct constraint *c, int32_t id);

/* Between steps: gives back memory over the bounds. Masks and copied states end here. */
void constraints_trim(struct constraints *cs);

#endif
