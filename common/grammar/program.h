/* program.h: the automaton under construction and finished. Inside common/grammar only.
 *
 * Nodes are built backwards: every function takes the node that follows and returns the node that
 * begins. A rule ends in PROGRAM_RETURN and is entered by CALL or REPEAT, which push a frame.
 * A symbol is a byte, "an added token that is no tag", or a tag.
 */
#ifndef BATON_GRAMMAR_PROGRAM_H
#define BATON_GRAMMAR_PROGRAM_H

#include <assert.h>

#include "common/grammar/grammar.h"

#define SYMBOL_OTHER     256u
#define SYMBOL_TAG(t)    (257u + (uint32_t)(t))
#define N_SYMBOLS        (257u + GRAMMAR_N_TAGS)
#define PROGRAM_MAX      200000u /* nodes; edges twice that */
#define PROGRAM_MAX_SETS 2000u
#define REPEAT_UNLIMITED UINT32_MAX

struct symset {
    uint64_t bits[5];
};
static_assert(N_SYMBOLS <= 320, "a set holds every symbol");

static inline void symset_add(struct symset *s, uint32_t symbol)
{
    s->bits[symbol / 64] |= 1ull << symbol % 64;
}
static inline void symset_range(struct symset *s, uint32_t first, uint32_t last)
{
    for (uint32_t i = first; i <= last; i++)
        symset_add(s, i);
}
static inline bool symset_has(const struct symset *s, uint32_t symbol)
{
    return s->bits[symbol / 64] >> symbol % 64 & 1;
}

enum program_op {
    OP_SYMBOLS, /* one symbol of set `at` */
    OP_SPLIT,   /* one of edges[at .. at + n) */
    OP_CALL,    /* rule `at`, then next */
    OP_REPEAT,  /* rule `at`, min to max times, then next */
    OP_RETURN,  /* end of the rule */
};

struct program_node {
    uint8_t op;
    bool live; /* the end of the rule can be reached from here */
    uint32_t at, n, next, min, max;
};

struct grammar {
    struct program_node *nodes;
    uint32_t n_nodes, cap_nodes;
    uint32_t *edges;
    uint32_t n_edges, cap_edges;
    struct symset *sets;
    uint32_t n_sets, cap_sets;
    uint32_t single[N_SYMBOLS]; /* set of one symbol, + 1; 0: none yet */
    uint32_t start;
    enum err err; /* the first failure of a builder; its sentence is err_set's */

    uint16_t class_of[N_SYMBOLS]; /* symbols that no set tells apart */
    uint32_t n_classes;
    uint8_t *class_sets; /* [n_sets, n_classes] */
};

#define PROGRAM_RETURN 0u /* node 0 */
#define PROGRAM_FAIL   1u /* node 1: matches nothing */

MUST_CHECK enum err program_init(struct grammar *g);
/* Checks for left recursion and rules without end, numbers the classes. ERR_INVALID. */
MUST_CHECK enum err program_finish(struct grammar *g);

/* Builders. After a failure (g->err) they return PROGRAM_FAIL. */
uint32_t program_set(struct grammar *g, const struct symset *set, uint32_t next);
uint32_t program_range(struct grammar *g, uint32_t first, uint32_t last, uint32_t next);
uint32_t program_tag(struct grammar *g, enum grammar_tag tag, uint32_t next);
uint32_t program_text(struct grammar *g, const char *bytes, size_t n, uint32_t next);
uint32_t program_split(struct grammar *g, const uint32_t *edges, size_t n);
uint32_t program_either(struct grammar *g, uint32_t a, uint32_t b);
uint32_t program_call(struct grammar *g, uint32_t rule, uint32_t next);
/* rule must not be a forward one whose first symbol may be missing. */
uint32_t program_repeat(struct grammar *g, uint32_t rule, uint32_t min, uint32_t max,
                        uint32_t next);
/* A rule or loop head that is to be given later. */
uint32_t program_forward(struct grammar *g);
void program_resolve(struct grammar *g, uint32_t forward, uint32_t to);
/* One of n texts, prefixes shared. */
uint32_t program_texts(struct grammar *g, const char *const *texts, const size_t *lens, size_t n,
                       uint32_t next);
/* A UTF-8 character of two bytes or more. */
uint32_t program_wide_char(struct grammar *g, uint32_t next);
/* A character in [first, last], surrogates left out, as UTF-8. */
uint32_t program_code_points(struct grammar *g, uint32_t first, uint32_t last, uint32_t next);

#endif
