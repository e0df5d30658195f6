/* accept.h: how much of a verified window becomes output. Pure.
 *
 * Row j of the window was computed from the tokens before it as if drafts 0..j-1 were right, and
 * sampled[j] is what the target draws there. So sampled[0] is always output; sampled[j + 1] is
 * output iff sampled[j] equals draft[j]. Drafts only decide how many draws count, never what they
 * are: the text is the same with any drafts, or none.
 */
#ifndef BATON_ACCEPT_H
#define BATON_ACCEPT_H

#include "common/engine/worker.h"

/* sampled[n_draft + 1], draft[n_draft]. n_output: output tokens before the window. Stops at the
 * first token that ends the output. Returns the number of tokens (at least 1); the accepted drafts
 * are one fewer, or as many if the last one ended it. */
uint32_t accept_window(const struct wire_sampling *s, const struct model_config *m,
                       uint32_t n_output, const int32_t *sampled, const int32_t *draft,
                       uint32_t n_draft, enum wire_finish *ret_finish);

#endif
