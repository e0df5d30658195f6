/* depth.h: how many drafts the next step makes (--mtp-step auto). Pure.
 *
 * A draft pays when the tokens that it is expected to add outweigh the time that it adds. Chosen is
 * the k with the best E(k) / T(n, k):
 *
 *   E(k) = 1 + a0 + a0 a1 + ...   tokens per sequence; k terms of drafts
 *   aj                            how often draft j is right if those before it were
 *   T(n, k)                       time of a step of n sequences
 *
 * Few sequences leave the device idle, so rows are dear (each brings new experts) but a step is
 * short; from some 32 on rows are nearly free; at some hundred they cost again. Nothing of this is
 * built in but a first guess, the measured costs of an H100: both a and T are learnt from the steps
 * that this worker makes, T as a factor on the guess, per k and class of batch sizes. A neighbour
 * of k that was not tried lately is tried for a few steps now and then.
 *
 * Drafts decide how many draws count, never what they are: no choice here changes a text.
 */
#ifndef BATON_DEPTH_H
#define BATON_DEPTH_H

#include <stdint.h>

#define DEPTH_MAX     7
#define DEPTH_CLASSES 32

struct depth {
    uint32_t max, chosen;
    struct {
        float tries, hits; /* of late; older ones count less */
    } at[DEPTH_MAX];       /* by draft position */
    struct depth_time {
        float factor; /* measured time over the guess */
        uint32_t n;   /* steps that it was learnt from; a few make it known */
        uint32_t last;
    } time[DEPTH_CLASSES][DEPTH_MAX + 1];
    uint32_t n_steps, last_trial;
    uint32_t trial, n_trial; /* k on trial, for that many more steps */
};

/* max: most drafts of a step, at most DEPTH_MAX. */
void depth_init(struct depth *d, uint32_t max);

/* Drafts for each sequence of the next step, which has n_seqs (at least 1) of them. */
uint32_t depth_choose(struct depth *d, uint32_t n_seqs);

/* That step took us microseconds. */
void depth_took(struct depth *d, uint32_t n_seqs, uint32_t n_draft, uint64_t us);

/* Of one sequence's n_draft drafts the first n_right were right. */
void depth_accepted(struct depth *d, uint32_t n_draft, uint32_t n_right);

/* Expected tokens of a sequence's step with k drafts. */
double depth_tokens(const struct depth *d, uint32_t k);

#endif
