/* lengths.c: see lengths.h. */
#include "tests/bench/lengths.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

#define MAX_TOKENS 1e8

static const struct {
    const char *name;
    int kind;
    int n_values;
} kinds[] = {
    {"", LENGTHS_FIXED, 1},
    {"uniform:", LENGTHS_UNIFORM, 2},
    {"normal:", LENGTHS_NORMAL, 4},
    {"lognormal:", LENGTHS_LOGNORMAL, 4},
};

/* Exactly n numbers separated by colons. */
static bool read_numbers(const char *text, int n, double *ret)
{
    for (int i = 0; i < n; i++) {
        char *end;
        ret[i] = strtod(text, &end);
        if (end == text || *end != (i + 1 < n ? ':' : '\0') ||
            !(ret[i] >= 0 && ret[i] <= MAX_TOKENS))
            return false;
        text = end + 1;
    }
    return true;
}

enum err lengths_parse(const char *flag, const char *text, struct lengths *ret)
{
    for (size_t i = ARRAY_LEN(kinds); i-- > 0;) {
        size_t n_name = strlen(kinds[i].name);
        double v[4] = {0};
        if (strncmp(text, kinds[i].name, n_name) != 0)
            continue;
        if (!read_numbers(text + n_name, kinds[i].n_values, v))
            break;
        struct lengths l = {.kind = kinds[i].kind, .a = v[0], .b = v[1], .min = v[2], .max = v[3]};
        if (kinds[i].n_values < 4)
            l.min = v[0], l.max = kinds[i].n_values == 1 ? v[0] : v[1];
        if (l.min < 1 || l.max < l.min || (l.kind == LENGTHS_LOGNORMAL && l.a <= 0))
            break;
        *ret = l;
        return ERR_OK;
    }
    return err_set(ERR_INVALID,
                   "--%s is '%s', must be N, uniform:A:B, normal:MEAN:SD:MIN:MAX or "
                   "lognormal:MEAN:SIGMA:MIN:MAX, with 1 <= MIN <= MAX tokens",
                   flag, text);
}

uint32_t lengths_draw(const struct lengths *l, struct rng *r)
{
    double v = l->a;
    if (l->kind == LENGTHS_UNIFORM)
        v = floor(l->a + rng_unit(r) * (floor(l->b) - floor(l->a) + 1));
    else if (l->kind == LENGTHS_NORMAL)
        v = l->a + l->b * rng_normal(r);
    else if (l->kind == LENGTHS_LOGNORMAL)
        v = exp(log(l->a) - l->b * l->b / 2 + l->b * rng_normal(r));
    return (uint32_t)round(fmax(l->min, fmin(l->max, v)));
}
