/* grammar_fuzz.c: whatever compiles can be walked: every state has a way on, and the mask says
 * which. The input is a grammar's text, a zero byte, and bytes that choose among what is allowed.
 */
#include <stdlib.h>
#include <string.h>

#include "common/grammar/words.h"

#define MAX_STEPS 64

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static int32_t pick(const uint32_t *mask, uint32_t which)
{
    int32_t found = -1;
    for (int32_t id = 0; id < (int32_t)(WORDS_OTHER + 1 + ARRAY_LEN(words_more)); id++)
        if (mask[id / 32] >> id % 32 & 1) {
            found = id;
            if (which-- == 0)
                break;
        }
    return found;
}

static void follow(struct matcher *m, const uint8_t *choices, size_t n)
{
    struct grammar_state s = matcher_start(m);
    for (size_t i = 0; i < n && i < MAX_STEPS; i++) {
        const uint32_t *mask;
        bool fits;
        if (matcher_mask(m, s, &mask) != ERR_OK)
            return;
        int32_t id = pick(mask, choices[i]);
        if (id < 0)
            abort();
        if (matcher_accept(m, &s, id, &fits) != ERR_OK)
            return;
        if (!fits)
            abort();
        struct grammar_state *live = &s;
        if (i % 16 == 15 && matcher_trim(m, 1024, &live, 1) != ERR_OK)
            return;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct grammar_vocab *vocab;
    if (!vocab && words_vocab(&vocab) != ERR_OK)
        abort();
    const uint8_t *zero = n ? memchr(data, 0, n) : NULL;
    size_t n_text = zero ? (size_t)(zero - data) : n;
    struct grammar *g = NULL;
    struct matcher *m = NULL;
    if (grammar_compile((const char *)data, n_text, &g) == ERR_OK &&
        matcher_create(g, vocab, &m) == ERR_OK && zero)
        follow(m, zero + 1, n - n_text - 1);
    matcher_destroy(m);
    grammar_destroy(g);
    return 0;
}
