/* packing.h: which prompt tokens the next chunk computes. Pure: arrays in, numbers out.
 *
 * First come, first served, with one exception: up to half of a chunk is offered to prompts that it
 * would finish, in order of arrival, before the oldest unfinished prompt takes the rest. So a short
 * prompt does not wait behind the many chunks of a long one, and the long one always gets at least
 * half of every chunk: nobody starves.
 */
#ifndef BATON_PACKING_H
#define BATON_PACKING_H

#include <stdint.h>

/* left[i]: tokens that prompt i (in order of arrival) still has to compute, > 0.
 * ret[i] gets how many of them this chunk takes; the sum is at most chunk_tokens, and at most
 * max_prompts of them are positive. Returns the sum. */
uint32_t packing_choose(const uint32_t *left, uint32_t n, uint32_t chunk_tokens,
                        uint32_t max_prompts, uint32_t *ret);

#endif
