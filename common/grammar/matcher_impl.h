/* matcher_impl.h: between matcher.c, which makes states, and mask.c, which makes their masks.
 * Private to both. */
#ifndef BATON_GRAMMAR_MATCHER_IMPL_H
#define BATON_GRAMMAR_MATCHER_IMPL_H

#include "common/grammar/program.h"
#include "common/grammar/vocab.h"

#define DEAD        0u
#define UNKNOWN     UINT32_MAX
#define NOT_UNIFORM (UINT32_MAX - 1)
#define NO_FRAME    UINT32_MAX
#define MAX_MASKS   (1u << 19)
#define MAX_WORK    2048u /* threads under way in one step of the automaton */

struct frame {
    uint32_t node, count, parent;
};

struct thread {
    uint32_t node, frame;
};

struct work {
    uint32_t node, count, frame;
};

struct state {
    uint32_t first, n;    /* in threads */
    uint32_t plain;       /* where every plain character leads, if to one state */
    uint32_t returned;    /* it is where this frame's return leads, or NO_FRAME: not known of any */
    uint32_t tails;       /* list: the vocabulary's tails that fit from here */
    const uint32_t *mask; /* one of masks */
    bool accept;
};

/* Some words, each sequence once: a set of tails, or what a mask or a loop is known by. */
struct list {
    uint32_t first, n; /* in words */
    uint32_t tails;    /* of a loop: see tails_of_loop */
    uint32_t reach;
    const uint32_t *mask; /* of what a mask is known by */
};

/* A hash table of indexes; the keys are where the indexes lead. */
struct index {
    uint32_t *slots; /* UNKNOWN: empty */
    uint32_t mask, n;
};

struct matcher {
    const struct grammar *g;
    const struct grammar_vocab *v;
    struct frame *frames;
    uint32_t n_frames, cap_frames;
    struct thread *threads;
    uint32_t n_threads, cap_threads;
    struct state *states;
    uint32_t n_states, cap_states;
    uint32_t *next; /* [cap_states, n_classes] */
    struct list *lists;
    uint32_t n_lists, cap_lists;
    uint32_t *words;
    uint32_t n_words, cap_words;
    struct index frame_index, state_index, list_index;
    uint32_t **masks;
    uint32_t n_masks, cap_masks;
    uint32_t start;

    struct work work[MAX_WORK];
    struct thread found[MAX_WORK];
    uint32_t n_work, n_found, effort;
    bool found_accept;
    uint32_t *stamp; /* [n_nodes] round in which the node was last added to work */
    uint32_t round;

    uint16_t plain_classes[N_SYMBOLS]; /* of the plain ASCII characters */
    uint32_t n_plain_classes;
    bool *begins_plain;  /* [n_sets] takes the first byte of some plain character */
    uint32_t *way, *key; /* scratch of a mask: states along plain characters; what it is known by */
    uint32_t *tail_bits; /* [n_tail_words] scratch */
};

/* Makes room for n items. ERR_TOO_LARGE over max, ERR_NOMEM. */
MUST_CHECK enum err matcher_grow(void *array, uint32_t *cap, uint32_t n, size_t item, uint32_t max);

/* A state out of threads: begin, then add, then end. add follows what takes no symbol. */
void state_begin(struct matcher *m);
MUST_CHECK enum err state_add(struct matcher *m, uint32_t node, uint32_t count, uint32_t frame);
MUST_CHECK enum err state_end(struct matcher *m, uint32_t *ret);
/* The state of the threads in m->found, as they are. */
MUST_CHECK enum err state_of_found(struct matcher *m, uint32_t *ret);
/* Where a class of symbols leads from s; DEAD: nowhere. */
MUST_CHECK enum err state_step(struct matcher *m, uint32_t s, uint32_t class, uint32_t *ret);
/* Does it lead anywhere? Makes no state. */
bool state_takes(const struct matcher *m, uint32_t s, uint32_t class);

/* The list of these words. */
MUST_CHECK enum err list_get(struct matcher *m, const uint32_t *words, uint32_t n, uint32_t *ret);

/* mask.c: what it needs of a new matcher. */
MUST_CHECK enum err masks_init(struct matcher *m);
void masks_finish(struct matcher *m);
/* Where every plain character (vocab.h) leads from s, or DEAD, or NOT_UNIFORM. */
MUST_CHECK enum err plain_next(struct matcher *m, uint32_t s, uint32_t *ret);

#endif
