/* vocab.h: the vocabulary as a walk over its bytes. Inside common/grammar only.
 *
 * Ids in the order of their bytes are a tree in preorder: a walk that steps an automaton along it
 * visits each shared prefix once and skips what lies below a dead byte.
 *
 * Most tokens are "plain": whole characters that a JSON string takes as they are. Where all plain
 * characters do the same (inside a string), one bit per token and length of a token says it all.
 * All others are some plain characters, the head, and a tail: from the first byte on that is not
 * one of a plain character. Tails are few, and a small tree.
 */
#ifndef BATON_GRAMMAR_VOCAB_H
#define BATON_GRAMMAR_VOCAB_H

#include "common/grammar/grammar.h"

#define VOCAB_MAX_BYTES 256u /* of a token; longer ones are never allowed */

struct trie_node {
    uint32_t end;   /* first node that is not below this one */
    int32_t value;  /* of all: the token that ends here; of tails: the tail. Or -1 */
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
    uint16_t plain;  /* characters of a plain token; 0: it is none */
};

/* A token that is not plain. */
struct vocab_tailed {
    int32_t id;
    uint32_t chars; /* of its head */
};

struct grammar_vocab {
    int32_t n_ids;
    uint32_t n_words;
    struct vocab_token *tokens; /* [n_ids] */
    uint8_t *bytes;
    int32_t *same;   /* [n_ids] next id with the same bytes, or -1 */
    struct trie all; /* tokens, without those that have the bytes of another */

    uint32_t max_way;    /* characters of the longest plain token or head */
    uint16_t *length_of; /* [max_way + 1] row of plain for tokens of at most that many chars */
    uint32_t *plain;     /* [rows, n_words] */

    struct trie tails;
    uint32_t n_tails, n_tail_words, max_head; /* max_head: characters of the longest head */
    uint32_t *tail_start;                     /* [n_tails + 1] in tailed */
    struct vocab_tailed *tailed;              /* by tail, chars ascending */

    int32_t *added; /* [n_added] ids whose symbol is not 0 */
    uint32_t n_added;
    int32_t *eos;
    int n_eos;
};

bool vocab_is_eos(const struct grammar_vocab *v, int32_t id);

#endif
