/* stop.c: finds stop strings in text that arrives in chunks.
 *
 * One Knuth-Morris-Pratt matcher runs per string; there are few, and a byte costs each a step or
 * two. matched[i] is how much of string i the text so far ends with, so the text to hold back is
 * the longest of these, and never more than one string.
 *
 *   FLOWING -string complete-> FOUND -no earlier or longer one possible-> DONE
 *      ^ held text is released as soon as no string can begin in it
 *
 * FOUND waits because of two cases: with "b" and "abc", the text "ab" may still become the earlier
 * "abc"; with "a" and "ab" the longer wins. The answer is thus the same however the text was cut.
 */
#include "router/text/stop.h"

#include <string.h>

#include "common/base/own.h"

struct pattern {
    char *bytes;
    uint16_t *fail; /* fail[k]: longest proper border of the first k bytes */
    size_t n, matched;
};

struct stop {
    struct pattern patterns[STOP_MAX_STRINGS];
    size_t n_patterns;

    char held[STOP_MAX_BYTES];
    size_t n_held;

    int found;          /* best complete match so far, -1: none */
    size_t found_start; /* relative to the first held byte */
    bool done;
};

DEFINE_OWNED(stop)

static bool pattern_init(struct pattern *p, const char *bytes, size_t n)
{
    p->n = n;
    p->bytes = malloc(n);
    p->fail = calloc(n + 1, sizeof(*p->fail));
    if (!p->bytes || !p->fail)
        return false;
    memcpy(p->bytes, bytes, n);
    for (size_t k = 1, border = 0; k < n; k++) {
        while (border && bytes[k] != bytes[border])
            border = p->fail[border];
        border += bytes[k] == bytes[border];
        p->fail[k + 1] = (uint16_t)border;
    }
    return true;
}

enum err stop_create(const char *const *strings, const size_t *lens, size_t n, struct stop **ret)
{
    if (n > STOP_MAX_STRINGS)
        return err_set(ERR_INVALID, "%zu stop strings, at most %d are supported", n,
                       STOP_MAX_STRINGS);
    OWNED(stop) s = calloc(1, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "stop strings");
    s->found = -1;
    for (size_t i = 0; i < n; i++) {
        if (lens[i] == 0 || lens[i] > STOP_MAX_BYTES)
            return err_set(ERR_INVALID, "stop string %zu has %zu bytes, must have 1 to %d", i,
                           lens[i], STOP_MAX_BYTES);
        s->n_patterns = i + 1;
        if (!pattern_init(&s->patterns[i], strings[i], lens[i]))
            return err_set(ERR_NOMEM, "stop strings");
    }
    *ret = take(&s);
    return ERR_OK;
}

void stop_destroy(struct stop *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->n_patterns; i++) {
        free(s->patterns[i].bytes);
        free(s->patterns[i].fail);
    }
    free(s);
}

/* Steps every matcher over a byte; end is the number of bytes, held ones included, up to and with
 * this one. */
static void step(struct stop *s, char byte, size_t end)
{
    for (size_t i = 0; i < s->n_patterns; i++) {
        struct pattern *p = &s->patterns[i];
        size_t k = p->matched == p->n ? p->fail[p->n] : p->matched;
        while (k && p->bytes[k] != byte)
            k = p->fail[k];
        p->matched = k + (p->bytes[k] == byte);
        if (p->matched < p->n)
            continue;
        size_t start = end - p->n;
        if (s->found < 0 || start < s->found_start ||
            (start == s->found_start && p->n > s->patterns[s->found].n)) {
            s->found = (int)i;
            s->found_start = start;
        }
    }
}

/* Could more text bring a match that beats the one found? */
static bool is_open(const struct stop *s, size_t end)
{
    for (size_t i = 0; i < s->n_patterns; i++) {
        const struct pattern *p = &s->patterns[i];
        if (p->matched && p->matched < p->n && end - p->matched <= s->found_start)
            return true;
    }
    return false;
}

bool stop_push(struct stop *s, const char *text, size_t n, struct json_out *out, int *ret_which)
{
    size_t end = s->n_held;
    for (size_t i = 0; i < n && !s->done; i++) {
        step(s, text[i], ++end);
        s->done = s->found >= 0 && !is_open(s, end);
        if (s->done) { /* the match begins in the held bytes or in this text */
            json_out_raw(out, s->held, MIN(s->found_start, s->n_held));
            if (s->found_start > s->n_held)
                json_out_raw(out, text, s->found_start - s->n_held);
            s->n_held = 0;
        }
    }
    if (s->done) {
        *ret_which = s->found;
        return true;
    }

    size_t keep = 0;
    for (size_t i = 0; i < s->n_patterns; i++)
        keep = MAX(keep, s->patterns[i].matched == s->patterns[i].n
                             ? s->patterns[i].fail[s->patterns[i].n]
                             : s->patterns[i].matched);
    size_t release = end - keep;
    size_t from_held = MIN(release, s->n_held), from_text = release - from_held;
    json_out_raw(out, s->held, from_held);
    json_out_raw(out, text, from_text);
    memmove(s->held, s->held + from_held, s->n_held - from_held);
    s->n_held -= from_held;
    memcpy(s->held + s->n_held, text + from_text, n - from_text);
    s->n_held += n - from_text;
    if (s->found >= 0)
        s->found_start -= release; /* open: something reaches back to the match or before it */
    return false;
}

int stop_flush(struct stop *s, struct json_out *out)
{
    if (!s->done)
        json_out_raw(out, s->held, s->found >= 0 ? s->found_start : s->n_held);
    s->n_held = 0;
    s->done = true;
    return s->found;
}
