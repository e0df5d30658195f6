/* detokenizer.h: ids to text, one at a time, never half a character.
 *
 * Bytes that do not complete a UTF-8 character are kept (three at most) until the next token; bytes
 * that can never complete one become U+FFFD, as does a tail that generation ends in.
 */
#ifndef BATON_DETOKENIZER_H
#define BATON_DETOKENIZER_H

#include "common/base/json.h" /* struct json_out as text buffer */
#include "router/text/tokenizer.h"

struct detokenizer {
    const struct tokenizer *tokenizer;
    bool skip_special; /* leave tokens marked special out of the text */
    uint8_t tail[4];
    uint8_t n_tail;
};

void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special);
/* Appends to out the text that id completes (perhaps nothing). */
void detokenizer_push(struct detokenizer *d, int32_t id, struct json_out *out);
/* Appends U+FFFD for an incomplete tail and forgets it. */
void detokenizer_flush(struct detokenizer *d, struct json_out *out);

#endif
