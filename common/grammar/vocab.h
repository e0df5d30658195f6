/* vocab.h: the vocabulary as a walk over its bytes. Inside common/grammar only.
 *
 * Ids in the order of their bytes are a tree in preorder: a walk that steps an automaton along it
 * visits each shared prefix once and skips what lies below a dead byte.
 *
 * Most tokens are "plain": whole characters that a JSON string takes as they are. Where all plain
 * characters do the same (inside a string), one bit per token and length of a token says it all and
 * only the others, a small second tree, are walked.
 */
#ifndef BATON_GRAMMAR_VOCAB_H
#define BATON_GRAMMAR_VOCAB_H

#include "common/grammar/grammar.h"

#define VOCAB_PLAIN_CHARS 24u  /* longer tokens count as not plain */
#define VOCAB_MAX_BYTES   256u /* of a token; longer ones are never allowed */

struct trie_node {
    uint32_t end;   /* first node that is not below this one */
    int32_t token;  /* ends here, or -1; further ones of the same bytes: same[token] */
    uint16_t depth; /* bytes before this one */
    uint8_t byte;
};

struct trie {
    struct trie_node *nodes;
    uint32_t n, cap;
};

struct vocab_token {
    uint32_t at;     /* in bytes */
    uint16_t n;      /* 0: never allowed, unless added */
    uint16_t symbol; /* of an added token; 0: bytes */
};

struct grammar_vocab {
    int32_t n_ids;
    uint32_t n_words;
    struct vocab_token *tokens; /* [n_ids] */
    uint8_t *bytes;
    int32_t *same;         /* [n_ids] next id with the same bytes, or -1 */
    struct trie all, rest; /* rest: those that are not plain */
    uint32_t *plain; /* [VOCAB_PLAIN_CHARS + 1, n_words]: plain, with at most that many chars */
    int32_t *added;  /* [n_added] ids whose symbol is not 0 */
    uint32_t n_added;
    int32_t *eos;
    int n_eos;
};

bool vocab_is_eos(const struct grammar_vocab *v, int32_t id);

#endif
