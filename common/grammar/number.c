/* number.c: numbers digit by digit.
 *
 * A bounded number is compared with both bounds as it is written: as long as its digits equal a
 * bound's, it is "tight" to it and the next digit may not cross it; once they differ it is free.
 * Bounds are rounded inwards to the digits that can be written, so a number never needs more.
 */
#include "common/grammar/number.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define INTEGER_DIGITS 18
#define NUMBER_DIGITS  15
#define MAX_DIGITS     18

struct bound {
    bool none, exclusive;
    int n_int;                      /* digits before the point */
    char digit[2 * MAX_DIGITS + 8]; /* before and after it */
};

struct digits {
    struct grammar *g;
    int n_int, n_frac;
    struct bound lo, hi;
    uint32_t next;
    uint32_t memo[2 * MAX_DIGITS + 8][2][2]; /* what may follow that many digits; 0: not built */
};

/* x >= 0 with n_frac decimals, rounded up or down. */
static struct bound bound_make(double x, bool exclusive, int n_frac, bool up)
{
    struct bound b = {.none = isinf(x), .exclusive = exclusive};
    char text[400];
    if (b.none || x >= 1e19)
        return (struct bound){.none = true, .n_int = b.none ? 0 : MAX_DIGITS + 2};
    snprintf(text, sizeof(text), "%.*f", n_frac, x);
    double back = strtod(text, NULL);
    size_t n = strlen(text);
    if (up ? back < x : back > x) { /* one unit of the last digit, away from the outside */
        int delta = up ? 1 : -1;
        for (size_t i = n; i-- > 0;) {
            if (text[i] == '.')
                continue;
            int d = text[i] - '0' + delta;
            text[i] = (char)('0' + (d + 10) % 10);
            if (d >= 0 && d <= 9) {
                delta = 0;
                break;
            }
        }
        if (delta > 0) {
            memmove(text + 1, text, ++n);
            text[0] = '1';
        }
        while (text[0] == '0' && text[1] >= '0' && text[1] <= '9')
            memmove(text, text + 1, n--);
    }
    if (back != x)
        b.exclusive = false;
    char *point = strchr(text, '.');
    b.n_int = (int)(point ? (size_t)(point - text) : strlen(text));
    int at = 0;
    for (const char *c = text; *c && at < (int)sizeof(b.digit); c++)
        if (*c != '.')
            b.digit[at++] = *c;
    return b;
}

static bool rest_is_zero(const struct digits *d, const struct bound *b, int at)
{
    for (; at < d->n_int + d->n_frac; at++)
        if (b->digit[at] != '0')
            return false;
    return true;
}

static uint32_t after(struct digits *d, int at, bool lo, bool hi);

static uint32_t digit(struct digits *d, int at, bool lo, bool hi)
{
    int first = at == 0 && d->n_int > 1 ? 1 : 0, last = 9;
    int low = lo ? d->lo.digit[at] - '0' : -1, high = hi ? d->hi.digit[at] - '0' : 10;
    uint32_t edges[10], n = 0;
    for (int from = MAX(first, low); from <= MIN(last, high);) {
        int to = from; /* digits that leave both bounds are one */
        bool tight_lo = from == low, tight_hi = from == high;
        if (!tight_lo && !tight_hi)
            to = MIN(last, high - 1);
        uint32_t rest = after(d, at + 1, tight_lo, tight_hi);
        edges[n++] = program_range(d->g, '0' + (uint32_t)from, '0' + (uint32_t)to, rest);
        from = to + 1;
    }
    return program_split(d->g, edges, n);
}

/* What may follow the first `at` digits. */
static uint32_t after(struct digits *d, int at, bool lo, bool hi)
{
    uint32_t *memo = &d->memo[at][lo][hi];
    if (*memo)
        return *memo;
    uint32_t end = PROGRAM_FAIL, more = PROGRAM_FAIL;
    if (at < d->n_int)
        return *memo = digit(d, at, lo, hi);
    bool below = lo && (!rest_is_zero(d, &d->lo, at) || d->lo.exclusive);
    bool above = hi && rest_is_zero(d, &d->hi, at) && d->hi.exclusive;
    if (!below && !above)
        end = d->next;
    if (at < d->n_int + d->n_frac)
        more = digit(d, at, lo, hi);
    if (at == d->n_int)
        more = program_text(d->g, ".", 1, more);
    return *memo = program_either(d->g, end, more);
}

/* Magnitudes from lo to hi. */
static uint32_t magnitude(struct grammar *g, double lo, bool lo_exclusive, double hi,
                          bool hi_exclusive, bool integer, uint32_t next)
{
    int most = integer ? INTEGER_DIGITS : NUMBER_DIGITS;
    uint32_t edges[MAX_DIGITS];
    for (int n_int = 1; n_int <= most; n_int++) {
        struct digits d = {
            .g = g, .n_int = n_int, .n_frac = integer ? 0 : most - n_int, .next = next};
        d.lo = bound_make(lo, lo_exclusive, d.n_frac, true);
        d.hi = bound_make(hi, hi_exclusive, d.n_frac, false);
        bool lo_far = d.lo.n_int > n_int, hi_near = !d.hi.none && d.hi.n_int < n_int;
        edges[n_int - 1] = lo_far || hi_near ? PROGRAM_FAIL
                                             : after(&d, 0, !d.lo.none && d.lo.n_int == n_int,
                                                     !d.hi.none && d.hi.n_int == n_int);
    }
    return program_split(g, edges, (size_t)most);
}

static uint32_t digits(struct grammar *g, uint32_t min, uint32_t max, uint32_t next)
{
    return program_repeat(g, program_range(g, '0', '9', PROGRAM_RETURN), min, max, next);
}

static uint32_t unbounded(struct grammar *g, bool integer, uint32_t next)
{
    uint32_t end = next;
    if (!integer) {
        uint32_t power = digits(g, 1, 2, next), sign[3] = {power};
        sign[1] = program_text(g, "+", 1, power);
        sign[2] = program_text(g, "-", 1, power);
        struct symset e = {0};
        symset_add(&e, 'e');
        symset_add(&e, 'E');
        end = program_either(g, next, program_set(g, &e, program_split(g, sign, 3)));
        end = program_either(g, end, program_text(g, ".", 1, digits(g, 1, NUMBER_DIGITS, end)));
    }
    uint32_t most = integer ? INTEGER_DIGITS : NUMBER_DIGITS;
    uint32_t large = program_range(g, '1', '9', digits(g, 0, most - 1, end));
    uint32_t whole = program_either(g, program_text(g, "0", 1, end), large);
    return program_either(g, whole, program_text(g, "-", 1, whole));
}

uint32_t number_build(struct grammar *g, const struct number_range *r, bool integer, uint32_t next)
{
    if (isinf(r->min) && isinf(r->max))
        return unbounded(g, integer, next);
    uint32_t plus = PROGRAM_FAIL, minus = PROGRAM_FAIL;
    if (r->max >= 0)
        plus = magnitude(g, MAX(r->min, 0), r->min >= 0 && r->min_exclusive, r->max,
                         r->max_exclusive, integer, next);
    if (r->min < 0) /* zero has no sign here */
        minus = magnitude(g, MAX(-r->max, 0), r->max >= 0 || r->max_exclusive, -r->min,
                          r->min_exclusive, integer, next);
    return program_either(g, plus, program_text(g, "-", 1, minus));
}
