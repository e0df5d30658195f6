/* mock_outputs.h: outputs that the mock engine is told to make, token by token.
 *
 * A file is a list of outputs, each a list of token ids. A request's seed says which one it gets
 * and where in its sequence that begins, so that the token at a position stays a function of seed
 * and position, with or without drafts and after a worker died:
 *
 *   bits  0..15  position of the first output token: the prompt's length in tokens
 *   bits 16..31  number of the output, from 1; 0, or more than there are: made-up tokens
 *   bits 32..63  anything. With --mtp-simulate-acceptance they choose the tokens that share a step.
 */
#ifndef BATON_MOCK_OUTPUTS_H
#define BATON_MOCK_OUTPUTS_H

#include <stdbool.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"

struct mock_outputs;

/* ERR_INVALID names the file and the output if it is not [[id, ..], ..] with ids in [0, n_ids);
 * ERR_NOT_FOUND, ERR_IO, ERR_TOO_LARGE as file_read. */
MUST_CHECK enum err mock_outputs_load(const char *path, int32_t n_ids, struct mock_outputs **ret);
void mock_outputs_destroy(struct mock_outputs *o);
DEFINE_OWNED(mock_outputs)

/* False: position is in none of the outputs, *ret_id is not written. o may be NULL. */
bool mock_outputs_at(const struct mock_outputs *o, uint64_t seed, uint32_t position,
                     int32_t *ret_id);

#endif
