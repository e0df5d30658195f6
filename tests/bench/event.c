/* event.c: see event.h. */
#include "tests/bench/event.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

#define MAX_DEPTH 64

/* Where in the event a value stands; only these are looked into. */
enum place { ROOT, CHOICES, CHOICE, DELTA, USAGE, DETAILS, TOKEN, ERROR, ELSEWHERE };

struct scan {
    const char *p, *end;
    struct event *e;
    bool empty_text; // a choice has "text": ""
};

static bool scan_value(struct scan *s, enum place place, int depth);

static void skip_space(struct scan *s)
{
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\t' || *s->p == '\r'))
        s->p++;
}

static bool next_is(struct scan *s, char c)
{
    skip_space(s);
    if (s->p == s->end || *s->p != c)
        return false;
    s->p++;
    return true;
}

/* The bytes between the quotes, escapes untouched. */
static bool scan_string(struct scan *s, const char **ret, size_t *ret_n)
{
    if (!next_is(s, '"'))
        return false;
    *ret = s->p;
    for (; s->p < s->end; s->p++) {
        if (*s->p == '"') {
            *ret_n = (size_t)(s->p - *ret);
            s->p++;
            return true;
        }
        if ((unsigned char)*s->p < 0x20)
            return false;
        if (*s->p == '\\' && ++s->p == s->end)
            return false;
    }
    return false;
}

static bool scan_word(struct scan *s, const char *word)
{
    size_t n = strlen(word);
    if ((size_t)(s->end - s->p) < n || memcmp(s->p, word, n) != 0)
        return false;
    s->p += n;
    return true;
}

static bool scan_number(struct scan *s, double *ret)
{
    char digits[64];
    size_t n = 0;
    while (s->p < s->end && n + 1 < sizeof(digits) && *s->p && strchr("+-.0123456789eE", *s->p))
        digits[n++] = *s->p++;
    digits[n] = '\0';
    char *end;
    *ret = strtod(digits, &end);
    return n > 0 && end == digits + n;
}

static bool is(const char *key, size_t n, const char *name)
{
    return strlen(name) == n && !memcmp(key, name, n);
}

static void keep(char *to, size_t room, const char *text, size_t n)
{
    n = MIN(n, room - 1);
    memcpy(to, text, n);
    to[n] = '\0';
}

static enum place place_below(enum place place, const char *key, size_t n)
{
    switch (place) {
    case ROOT:
        return is(key, n, "choices") ? CHOICES
               : is(key, n, "usage") ? USAGE
               : is(key, n, "token") ? TOKEN
               : is(key, n, "error") ? ERROR
                                     : ELSEWHERE;
    case CHOICE:
        return is(key, n, "delta") ? DELTA : ELSEWHERE;
    case USAGE:
        return is(key, n, "prompt_tokens_details") ? DETAILS : ELSEWHERE;
    default:
        return ELSEWHERE;
    }
}

static void take_string(struct scan *s, enum place place, const char *key, size_t n_key,
                        const char *text, size_t n)
{
    struct event *e = s->e;
    if (place == CHOICE && is(key, n_key, "text")) {
        e->has_output |= n > 0;
        s->empty_text |= n == 0;
    } else if (place == DELTA && (is(key, n_key, "content") || is(key, n_key, "reasoning") ||
                                  is(key, n_key, "reasoning_content"))) {
        e->has_output |= n > 0;
    } else if ((place == CHOICE || place == ROOT) && is(key, n_key, "finish_reason")) {
        keep(e->finish, sizeof(e->finish), text, n);
    } else if (place == ERROR ? is(key, n_key, "message")
                              : place == ROOT && is(key, n_key, "error")) {
        e->is_error = true;
        keep(e->message, sizeof(e->message), text, n);
    }
}

static void take_number(struct scan *s, enum place place, const char *key, size_t n, double v)
{
    struct event *e = s->e;
    if (!(v >= 0 && v <= 1e12))
        return;
    if ((place == USAGE || place == TOKEN) && is(key, n, "prompt_tokens"))
        e->prompt_tokens = (int64_t)v;
    else if (place == USAGE ? is(key, n, "completion_tokens")
                            : place == TOKEN && is(key, n, "count_output_tokens"))
        e->output_tokens = (int64_t)v;
    else if (place == DETAILS && is(key, n, "cached_tokens"))
        e->cached_tokens = (int64_t)v;
}

static bool scan_member(struct scan *s, enum place place, const char *key, size_t n_key, int depth)
{
    skip_space(s);
    if (s->p == s->end)
        return false;
    char c = *s->p;
    if (c == '"') {
        const char *text;
        size_t n;
        if (!scan_string(s, &text, &n))
            return false;
        take_string(s, place, key, n_key, text, n);
        return true;
    }
    if (c == '-' || isdigit((unsigned char)c)) {
        double v;
        if (!scan_number(s, &v))
            return false;
        take_number(s, place, key, n_key, v);
        return true;
    }
    const char *from = s->p;
    enum place below = place_below(place, key, n_key);
    if (!scan_value(s, below, depth))
        return false;
    if (c == '{' && below == ERROR)
        s->e->is_error = true;
    if (c == '{' && below == TOKEN)
        s->e->has_choice = s->e->has_output = true;
    if (c == '[' && place == DELTA && is(key, n_key, "tool_calls") &&
        memchr(from, '{', (size_t)(s->p - from)))
        s->e->has_output = true;
    return true;
}

static bool scan_object(struct scan *s, enum place place, int depth)
{
    if (place == CHOICE)
        s->e->has_choice = true;
    if (next_is(s, '}'))
        return true;
    do {
        const char *key;
        size_t n;
        if (!scan_string(s, &key, &n) || !next_is(s, ':') || !scan_member(s, place, key, n, depth))
            return false;
    } while (next_is(s, ','));
    return next_is(s, '}');
}

static bool scan_array(struct scan *s, enum place place, int depth)
{
    if (next_is(s, ']'))
        return true;
    do {
        if (!scan_value(s, place == CHOICES ? CHOICE : ELSEWHERE, depth))
            return false;
    } while (next_is(s, ','));
    return next_is(s, ']');
}

static bool scan_value(struct scan *s, enum place place, int depth)
{
    const char *text;
    size_t n;
    double v;
    skip_space(s);
    if (s->p == s->end || depth > MAX_DEPTH)
        return false;
    switch (*s->p) {
    case '{':
        s->p++;
        return scan_object(s, place, depth + 1);
    case '[':
        s->p++;
        return scan_array(s, place, depth + 1);
    case '"':
        return scan_string(s, &text, &n);
    case 't':
        return scan_word(s, "true");
    case 'f':
        return scan_word(s, "false");
    case 'n':
        return scan_word(s, "null");
    default:
        return scan_number(s, &v);
    }
}

enum err event_parse(const char *text, size_t n, struct event *ret)
{
    struct event e = {.prompt_tokens = -1, .output_tokens = -1, .cached_tokens = -1};
    struct scan s = {.p = text, .end = text + n, .e = &e};
    bool good = scan_value(&s, ROOT, 0);
    skip_space(&s);
    if (!good || s.p != s.end)
        return err_set(ERR_INVALID, "not JSON at byte %zu: %.*s", (size_t)(s.p - text),
                       (int)MIN(n, (size_t)80), text);
    if (s.empty_text && !e.finish[0])
        e.has_output = true;
    *ret = e;
    return ERR_OK;
}
