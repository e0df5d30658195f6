/* seen.h: the ids of a text for the penalties, each once, with how often it is in the output.
 *
 * A list, since a draw takes it as it is (sample_row.seen) and a text has few of the vocabulary's
 * ids; and each id's place in it. Both have room for the whole vocabulary in memory that is only
 * touched where it is used.
 */
#ifndef BATON_SEEN_H
#define BATON_SEEN_H

#include "common/base/err.h"
#include "kernels/kernels.h"

struct seen {
    struct sample_seen *list; /* NULL: nothing is kept */
    int32_t n;
    int32_t *place; /* [vocab] 1 + index in list, 0: not there */
};

MUST_CHECK enum err seen_init(struct seen *s, int vocab);
void seen_finish(struct seen *s); /* also of a zeroed one */

/* ids in [0, vocab). */
void seen_prompt(struct seen *s, int32_t id);
void seen_output(struct seen *s, int32_t id);
void seen_clear(struct seen *s);

#endif
