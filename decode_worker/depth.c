/* depth.c: see depth.h. */
#include "decode_worker/depth.h"

#include <assert.h>
#include <math.h>

#include "common/base/own.h"
#include "common/engine/mock_costs.h"

#define MEMORY      512 /* drafts of a position that count */
#define GUESS       0.7 /* acceptance before there was any, worth so many drafts: */
#define GUESS_TRIES 8
#define BETTER      1.03 /* how much better another k must look to be chosen */
#define SPIKE       1.25 /* a step that took longer than so many times the usual counts as that */
#define HOPELESS    0.8  /* a neighbour that was that bad is not tried again */
#define N_TRIAL     4    /* steps of a trial: a GPU captures the first of a new shape */
#define TRIAL_EVERY 48   /* steps between trials */
#define FRESH       64   /* steps for which a neighbour's time is good, times those it comes from */
#define STALE       2048u /* at most */
#define SURE        16    /* steps after which it is believed that a neighbour is hopeless */

/* Microseconds of a step as guessed: without drafts the MTP layer still writes its KV. */
static double guess_us(uint32_t n, uint32_t k)
{
    const struct mock_costs *c = &mock_costs_h100;
    return 1000 * (mock_costs_step_ms(c, (int)n, (int)(n * (k + 1))) +
                   MAX(k, 1u) * mock_costs_draft_ms(c, (int)n));
}

/* Two classes per doubling. */
static uint32_t class_of(uint32_t n) { return MIN((uint32_t)(2 * log2(n)), DEPTH_CLASSES - 1u); }

void depth_init(struct depth *d, uint32_t max)
{
    assert(max <= DEPTH_MAX);
    *d = (struct depth){.max = max, .chosen = MIN(max, 2u)};
}

double depth_tokens(const struct depth *d, uint32_t k)
{
    double tokens = 1, p = 1, a = GUESS;
    for (uint32_t j = 0; j < k; j++) { // a position without drafts is like the one before it
        a = ((double)d->at[j].hits + a * GUESS_TRIES) / ((double)d->at[j].tries + GUESS_TRIES);
        p *= a;
        tokens += p;
    }
    return tokens;
}

/* Expected time: the guess, corrected by what was measured nearest to it. */
static double time_us(const struct depth *d, uint32_t n, uint32_t k)
{
    int class = (int)class_of(n), nearest = INT32_MAX;
    double factor = 1;
    for (int c = 0; c < DEPTH_CLASSES; c++)
        for (int other = 0; other <= (int)d->max; other++) {
            int far = abs(c - class) + 2 * abs(other - (int)k);
            if (d->time[c][other].n >= N_TRIAL && far < nearest) {
                nearest = far;
                factor = (double)d->time[c][other].factor;
            }
        }
    return factor * guess_us(n, k);
}

static double rate(const struct depth *d, uint32_t n, uint32_t k)
{
    return depth_tokens(d, k) / time_us(d, n, k);
}

/* Whether k deserves a trial beside the chosen one: the less is known of it, the sooner, and at
 * last only if there is hope. */
static bool is_due(const struct depth *d, uint32_t n, uint32_t k)
{
    const struct depth_time *t = &d->time[class_of(n)][k];
    if (t->n < N_TRIAL)
        return true;
    return d->n_steps - t->last > MIN(FRESH * t->n, STALE) &&
           (t->n < SURE || rate(d, n, k) > HOPELESS * rate(d, n, d->chosen));
}

uint32_t depth_choose(struct depth *d, uint32_t n_seqs)
{
    d->n_steps++;
    if (d->n_trial) {
        d->n_trial--;
        return d->trial;
    }
    uint32_t best = d->chosen;
    for (uint32_t k = 0; k <= d->max; k++)
        if (rate(d, n_seqs, k) > rate(d, n_seqs, best))
            best = k;
    if (rate(d, n_seqs, best) > BETTER * rate(d, n_seqs, d->chosen))
        d->chosen = best;
    if (d->n_steps - d->last_trial < TRIAL_EVERY)
        return d->chosen;
    uint32_t k = d->chosen;
    if (k < d->max && is_due(d, n_seqs, k + 1))
        d->trial = k + 1;
    else if (k > 0 && is_due(d, n_seqs, k - 1))
        d->trial = k - 1;
    else
        return k;
    d->last_trial = d->n_steps;
    d->n_trial = N_TRIAL - 1;
    return d->trial;
}

void depth_took(struct depth *d, uint32_t n_seqs, uint32_t n_draft, uint64_t us)
{
    struct depth_time *t = &d->time[class_of(n_seqs)][n_draft];
    float factor = (float)((double)us / guess_us(n_seqs, n_draft));
    if (t->n == 0 || (t->n < N_TRIAL && factor < t->factor))
        t->factor = factor; // the first ones may pay for being the first: the best of them
    else if (t->n >= N_TRIAL)
        t->factor += (MIN(factor, SPIKE * t->factor) - t->factor) / 12;
    t->n++;
    t->last = d->n_steps;
}

void depth_accepted(struct depth *d, uint32_t n_draft, uint32_t n_right)
{
    for (uint32_t j = 0; j < n_draft && j <= n_right; j++) {
        float keep = 1 - 1.f / MEMORY;
        d->at[j].tries = d->at[j].tries * keep + 1;
        d->at[j].hits = d->at[j].hits * keep + (j < n_right);
    }
}
