/* tokenizer.h: byte-level BPE from a Hugging Face tokenizer.json.
 *
 * A text is cut at added-token literals (leftmost, longest first), the rest is split by the
 * pre-tokeniser's Unicode regex (PCRE2 JIT, no recursion), each piece is merged by rank in
 * O(n log n). Text from users can be encoded with added tokens off, so that "<|user|>" typed by a
 * person stays letters.
 */
#ifndef BATON_TOKENIZER_H
#define BATON_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"
#include "common/base/utf8.h"

struct tokenizer;

/* Reads path (at most 64 MiB). Accepts merges as "a b" strings or ["a","b"] pairs, ignore_merges
 * true or false, normalizer null, pre_tokenizer Sequence[Split(Regex, Isolated), ByteLevel].
 * ERR_BAD_MODEL names the file and the field that is missing or not supported. */
MUST_CHECK enum err tokenizer_load(const char *path, struct tokenizer **ret);
void tokenizer_destroy(struct tokenizer *t);
DEFINE_OWNED(tokenizer)

int32_t tokenizer_n_ids(const struct tokenizer *t); /* largest id + 1 */

/* Id of an added token by its exact text, or -1. */
int32_t tokenizer_added_id(const struct tokenizer *t, const char *text);

/* A token's bytes (not NUL-terminated; *ret_n gets their number), or NULL for an id without one. */
const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *ret_n);

/* Is id an added token; is it one marked special (left out when special tokens are skipped)? */
bool tokenizer_is_added(const struct tokenizer *t, int32_t id);
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

/* A growing array of ids. Zero-initialise; ids_finish frees. */
struct ids {
    int32_t *data;
    size_t len, cap;
};
MUST_CHECK enum err ids_push(struct ids *ids, int32_t id);
void ids_finish(struct ids *ids);

/* Appends the ids of text[0..n), which must be valid UTF-8 (ERR_INVALID names the byte offset).
 * added: look for added tokens. Thread-safe: t is not changed. Time is O(n log n) for any input. */
MUST_CHECK enum err tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                                     bool added, struct ids *ids);

#endif
