/* pattern.c: a parser to a tree, and the tree to nodes from the back. */
#include "common/grammar/pattern.h"

#include <stdio.h>
#include <string.h>

#define MAX_PARTS  4000
#define MAX_RANGES 8000
#define MAX_DEPTH  50
#define MAX_COUNT  10000
#define LAST_CHAR  0x10ffff

enum { PART_EMPTY, PART_SET, PART_BOTH, PART_EITHER, PART_REPEAT };

struct range {
    uint32_t first, last;
};

/* SET: ranges [a, a + b). BOTH, EITHER: parts a and b. REPEAT: part a, min to max times. */
struct part {
    int kind;
    uint32_t a, b, min, max;
};

struct parser {
    const char *text, *at;
    struct part *parts;
    struct range *ranges;
    uint32_t n_parts, n_ranges;
    int depth;
    struct grammar *g;
    const struct pattern_chars *chars;
};

static enum err parse_either(struct parser *p, uint32_t *ret);

static enum err refuse(const struct parser *p, const char *what)
{
    return err_set(ERR_INVALID, "\"pattern\" %.60s: %s is not supported", p->text, what);
}

static enum err part_add(struct parser *p, struct part part, uint32_t *ret)
{
    if (p->n_parts == MAX_PARTS)
        return err_set(ERR_TOO_LARGE, "\"pattern\" has more than %d parts", MAX_PARTS);
    p->parts[p->n_parts] = part;
    *ret = p->n_parts++;
    return ERR_OK;
}

static enum err range_add(struct parser *p, uint32_t first, uint32_t last)
{
    if (p->n_ranges + 2 >= MAX_RANGES)
        return err_set(ERR_TOO_LARGE, "\"pattern\" has more than %d ranges", MAX_RANGES);
    if (first <= last)
        p->ranges[p->n_ranges++] = (struct range){first, last};
    return ERR_OK;
}

/* ---- parsing ---- */

static uint32_t next_char(struct parser *p)
{
    const uint8_t *c = (const uint8_t *)p->at;
    uint32_t n = c[0] < 0x80 ? 1 : c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : 4;
    uint32_t v = n == 1 ? c[0] : c[0] & (0xffu >> (n + 1));
    for (uint32_t i = 1; i < n && c[i]; i++)
        v = v << 6 | (c[i] & 0x3f);
    p->at += n;
    return v;
}

static enum err hex_char(struct parser *p, int n, uint32_t *ret)
{
    uint32_t v = 0;
    for (int i = 0; i < n; i++) {
        char c = *p->at;
        int d = c >= '0' && c <= '9'                 ? c - '0'
                : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                     : -1;
        if (d < 0)
            return refuse(p, "an unfinished \\x or \\u");
        v = v * 16 + (uint32_t)d;
        p->at++;
    }
    if (v >= 0xd800 && v < 0xe000)
        return refuse(p, "half a character by \\u");
    *ret = v;
    return ERR_OK;
}

/* After a backslash: a class (ranges are added, *is_class) or one character. */
static enum err escape(struct parser *p, bool *is_class, uint32_t *ret)
{
    static const struct range digit[] = {{'0', '9'}};
    static const struct range not_digit[] = {{1, '0' - 1}, {'9' + 1, 0x7e}};
    static const struct range word[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
    static const struct range not_word[] = {
        {1, '0' - 1}, {'9' + 1, 'A' - 1}, {'Z' + 1, '_' - 1}, {'`', '`'}, {'z' + 1, 0x7e}};
    static const struct range blank[] = {{'\t', '\r'}, {' ', ' '}};
    static const struct range not_blank[] = {{'!', 0x7e}};
    static const struct {
        char name;
        const struct range *ranges;
        size_t n;
    } classes[] = {{'d', digit, 1},    {'D', not_digit, 2}, {'w', word, 4},
                   {'W', not_word, 5}, {'s', blank, 2},     {'S', not_blank, 1}};
    char c = *p->at;
    *is_class = false;
    for (size_t i = 0; i < ARRAY_LEN(classes); i++) {
        if (c != classes[i].name)
            continue;
        *is_class = true;
        p->at++;
        for (size_t k = 0; k < classes[i].n; k++)
            TRY(range_add(p, classes[i].ranges[k].first, classes[i].ranges[k].last));
        return ERR_OK;
    }
    static const char controls[] = "tnrfv", values[] = "\t\n\r\f\v";
    const char *control = c ? strchr(controls, c) : NULL;
    if (control) {
        p->at++;
        *ret = (uint8_t)values[control - controls];
        return ERR_OK;
    }
    if (c == 'x' || c == 'u') {
        p->at++;
        return hex_char(p, c == 'x' ? 2 : 4, ret);
    }
    if (!c || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z')) {
        char what[] = "\\?";
        what[1] = c ? c : '?';
        return refuse(p, what);
    }
    *ret = next_char(p);
    return ERR_OK;
}

static int range_order(const void *a, const void *b)
{
    const struct range *x = a, *y = b;
    return (x->first > y->first) - (x->first < y->first);
}

/* The ranges from `from` on, turned into what they leave out up to `last`. */
static enum err complement(struct parser *p, uint32_t from, uint32_t last)
{
    struct range old[256];
    uint32_t n = p->n_ranges - from, at = 1;
    if (n > ARRAY_LEN(old))
        return refuse(p, "a class of more than 256 ranges");
    memcpy(old, p->ranges + from, n * sizeof(*old));
    qsort(old, n, sizeof(*old), range_order);
    p->n_ranges = from;
    for (uint32_t i = 0; i < n; i++) {
        if (old[i].first > at)
            TRY(range_add(p, at, MIN(old[i].first - 1, last)));
        at = MAX(at, old[i].last + 1);
    }
    return at <= last ? range_add(p, at, last) : ERR_OK;
}

static enum err parse_class(struct parser *p, uint32_t *ret)
{
    bool negated = *p->at == '^', named = false, is_class;
    uint32_t from = p->n_ranges;
    p->at += negated;
    while (*p->at != ']') {
        uint32_t first = 0, last;
        if (!*p->at)
            return refuse(p, "an unfinished class");
        is_class = false;
        if (*p->at == '\\' && p->at[1] == 'b') {
            p->at += 2;
            first = '\b';
        } else if (*p->at == '\\') {
            p->at++;
            TRY(escape(p, &is_class, &first));
        } else if (*p->at == '[' && (p->at[1] == ':' || p->at[1] == '=')) {
            return refuse(p, "[[:class:]]");
        } else {
            first = next_char(p);
        }
        named |= is_class;
        if (is_class)
            continue;
        last = first;
        if (p->at[0] == '-' && p->at[1] && p->at[1] != ']') {
            p->at++;
            if (*p->at == '\\') {
                p->at++;
                TRY(escape(p, &is_class, &last));
            } else {
                last = next_char(p);
            }
            if (is_class || last < first)
                return refuse(p, "a range that ends before it begins");
        }
        TRY(range_add(p, first, last));
    }
    p->at++;
    if (negated)
        TRY(complement(p, from, named ? 0x7e : LAST_CHAR));
    return part_add(p, (struct part){.kind = PART_SET, .a = from, .b = p->n_ranges - from}, ret);
}

static enum err parse_group(struct parser *p, uint32_t *ret)
{
    if (*p->at == '?') {
        const char *c = p->at + 1;
        if (c[0] == ':') {
            p->at += 2;
        } else if ((c[0] == '<' && c[1] != '=' && c[1] != '!') || (c[0] == 'P' && c[1] == '<')) {
            const char *end = strchr(c, '>');
            if (!end)
                return refuse(p, "an unfinished group");
            p->at = end + 1;
        } else {
            return refuse(p, "look-around or a flag");
        }
    }
    if (++p->depth > MAX_DEPTH)
        return refuse(p, "such deep nesting");
    TRY(parse_either(p, ret));
    p->depth--;
    if (*p->at++ != ')')
        return refuse(p, "an unfinished group");
    return ERR_OK;
}

static enum err parse_atom(struct parser *p, uint32_t *ret)
{
    uint32_t from = p->n_ranges, c;
    bool is_class = false;
    switch (*p->at) {
    case '(':
        p->at++;
        return parse_group(p, ret);
    case '[':
        p->at++;
        return parse_class(p, ret);
    case '^':
    case '$':
        return refuse(p, "an anchor inside");
    case '*':
    case '+':
    case '?':
        return refuse(p, "a quantifier without anything before it");
    case '.':
        p->at++;
        TRY(range_add(p, 1, '\n' - 1));
        TRY(range_add(p, '\n' + 1, '\r' - 1));
        TRY(range_add(p, '\r' + 1, 0x2027));
        TRY(range_add(p, 0x202a, LAST_CHAR));
        break;
    case '\\':
        p->at++;
        TRY(escape(p, &is_class, &c));
        if (!is_class)
            TRY(range_add(p, c, c));
        break;
    default:
        c = next_char(p);
        TRY(range_add(p, c, c));
    }
    return part_add(p, (struct part){.kind = PART_SET, .a = from, .b = p->n_ranges - from}, ret);
}

static bool number(struct parser *p, uint32_t *ret)
{
    uint32_t v = 0;
    if (*p->at < '0' || *p->at > '9')
        return false;
    for (; *p->at >= '0' && *p->at <= '9'; p->at++)
        v = MIN(v * 10 + (uint32_t)(*p->at - '0'), MAX_COUNT + 1u);
    *ret = v;
    return true;
}

static enum err parse_repeat(struct parser *p, uint32_t *ret)
{
    TRY(parse_atom(p, ret));
    for (;;) {
        uint32_t min = 0, max = REPEAT_UNLIMITED;
        const char *start = p->at;
        if (*p->at == '*') {
            p->at++;
        } else if (*p->at == '+') {
            p->at++;
            min = 1;
        } else if (*p->at == '?') {
            p->at++;
            max = 1;
        } else if (*p->at == '{') {
            p->at++;
            bool ok = number(p, &min);
            max = min;
            if (ok && *p->at == ',') {
                p->at++;
                max = REPEAT_UNLIMITED;
                number(p, &max);
            }
            if (!ok || *p->at++ != '}' || max < min || min > MAX_COUNT ||
                (max > MAX_COUNT && max != REPEAT_UNLIMITED)) {
                p->at = start;
                return refuse(p, "this {..}");
            }
        } else {
            return ERR_OK;
        }
        if (*p->at == '?')
            p->at++; /* lazy: finds the same strings */
        TRY(part_add(p, (struct part){.kind = PART_REPEAT, .a = *ret, .min = min, .max = max},
                     ret));
    }
}

/* Up to | ) $ or the end. */
static enum err parse_sequence(struct parser *p, uint32_t *ret)
{
    uint32_t part;
    TRY(part_add(p, (struct part){.kind = PART_EMPTY}, ret));
    while (*p->at && *p->at != '|' && *p->at != ')' && !(*p->at == '$' && p->depth == 0)) {
        TRY(parse_repeat(p, &part));
        TRY(part_add(p, (struct part){.kind = PART_BOTH, .a = *ret, .b = part}, ret));
    }
    return ERR_OK;
}

static enum err parse_either(struct parser *p, uint32_t *ret)
{
    TRY(parse_sequence(p, ret));
    while (*p->at == '|') {
        uint32_t part;
        p->at++;
        TRY(parse_sequence(p, &part));
        TRY(part_add(p, (struct part){.kind = PART_EITHER, .a = *ret, .b = part}, ret));
    }
    return ERR_OK;
}

/* ---- nodes ---- */

static uint32_t build_set(struct parser *p, const struct part *part, uint32_t next)
{
    struct grammar *g = p->g;
    static const char escaped[] = "\"\\\n\t\r\f\b", letters[] = "\"\\ntrfb";
    uint32_t node = PROGRAM_FAIL;
    struct symset direct = {0};
    bool any_direct = false;
    for (uint32_t i = part->a; i < part->a + part->b; i++) {
        struct range r = p->ranges[i];
        for (uint32_t c = MAX(r.first, 1u); c <= MIN(r.last, 0x7fu); c++) {
            const char *e = strchr(escaped, (int)c);
            if (p->chars->json && e) {
                char text[2] = {'\\', letters[e - escaped]};
                node = program_either(g, node, program_text(g, text, 2, next));
            } else if (!p->chars->json || c >= 0x20) {
                symset_add(&direct, c);
                any_direct = true;
            }
        }
        if (r.last >= 0x80)
            node =
                program_either(g, node, program_code_points(g, MAX(r.first, 0x80u), r.last, next));
    }
    return program_either(g, node, any_direct ? program_set(g, &direct, next) : PROGRAM_FAIL);
}

static uint32_t build_part(struct parser *p, uint32_t at, uint32_t next)
{
    const struct part *part = &p->parts[at];
    switch (part->kind) {
    case PART_SET:
        return build_set(p, part, next);
    case PART_BOTH: /* long sequences lean to the left */
        while (part->kind == PART_BOTH) {
            next = build_part(p, part->b, next);
            part = &p->parts[at = part->a];
        }
        return build_part(p, at, next);
    case PART_EITHER: {
        uint32_t node = PROGRAM_FAIL;
        while (part->kind == PART_EITHER) {
            node = program_either(p->g, node, build_part(p, part->b, next));
            part = &p->parts[at = part->a];
        }
        return program_either(p->g, node, build_part(p, at, next));
    }
    case PART_REPEAT:
        return program_repeat(p->g, build_part(p, part->a, PROGRAM_RETURN), part->min, part->max,
                              next);
    default:
        return next;
    }
}

/* ---- lengths ---- */

#define UNLIMITED UINT64_MAX

struct span {
    uint64_t min, max; /* characters */
};

static uint64_t add(uint64_t a, uint64_t b)
{
    return a == UNLIMITED || b == UNLIMITED ? UNLIMITED : MIN(a + b, UNLIMITED - 1);
}

static uint64_t times(uint64_t a, uint32_t n)
{
    if (a == 0 || n == 0)
        return 0;
    return a == UNLIMITED || n == REPEAT_UNLIMITED ? UNLIMITED : MIN(a, UINT32_MAX) * n;
}

static struct span length(const struct parser *p, uint32_t at)
{
    const struct part *part = &p->parts[at];
    struct span a, b;
    switch (part->kind) {
    case PART_SET:
        return (struct span){1, 1};
    case PART_BOTH:
        a = length(p, part->a), b = length(p, part->b);
        return (struct span){add(a.min, b.min), add(a.max, b.max)};
    case PART_EITHER:
        a = length(p, part->a), b = length(p, part->b);
        return (struct span){MIN(a.min, b.min), MAX(a.max, b.max)};
    case PART_REPEAT:
        a = length(p, part->a);
        return (struct span){times(a.min, part->min), times(a.max, part->max)};
    default:
        return (struct span){0, 0};
    }
}

/* Makes {*min, *max} copies of one character beside `fixed` others be as many as wanted. False: it
 * cannot be. */
static bool give_way(const struct pattern_chars *want, uint64_t fixed, uint32_t *min, uint32_t *max)
{
    if (want->max != REPEAT_UNLIMITED && fixed > want->max)
        return false;
    if (want->min > fixed)
        *min = (uint32_t)MAX(*min, want->min - fixed);
    if (want->max != REPEAT_UNLIMITED)
        *max = (uint32_t)MIN(*max, want->max - fixed);
    return *min <= *max;
}

/* Bounds the one repeated character of a sequence whose other parts have one length. Reports in
 * *ret whether there is such a one; if it cannot give way, the sequence matches nothing. */
static bool bound_repeat(struct parser *p, uint32_t root, bool *ret_possible)
{
    struct part *found = NULL;
    uint64_t fixed = 0;
    for (uint32_t at = root; p->parts[at].kind == PART_BOTH; at = p->parts[at].a) {
        struct part *part = &p->parts[p->parts[at].b];
        struct span l = length(p, p->parts[at].b);
        if (l.min == l.max) {
            fixed = add(fixed, l.min);
        } else if (!found && part->kind == PART_REPEAT && p->parts[part->a].kind == PART_SET) {
            found = part;
        } else {
            return false;
        }
    }
    if (found)
        *ret_possible = give_way(p->chars, fixed, &found->min, &found->max);
    return found != NULL;
}

/* One alternative, as long as wanted. loose: ends that are not anchored, where anything may stand:
 * its number is bounded if there is one such end. */
static enum err fit_length(struct parser *p, uint32_t root, int loose, uint32_t *min, uint32_t *max,
                           bool *ret_possible)
{
    const struct pattern_chars *want = p->chars;
    struct span l = length(p, root);
    *min = 0;
    *max = REPEAT_UNLIMITED;
    *ret_possible = true;
    bool open = want->max == REPEAT_UNLIMITED;
    if (l.min >= want->min && (open || (loose == 0 && l.max <= want->max)))
        return ERR_OK;
    if (loose == 1 && l.min == l.max) {
        *ret_possible = give_way(want, l.min, min, max);
        return ERR_OK;
    }
    if (loose == 0 && bound_repeat(p, root, ret_possible))
        return ERR_OK;
    return err_set(ERR_INVALID,
                   "\"pattern\" %.60s beside this \"minLength\" or \"maxLength\" is not "
                   "supported",
                   p->text);
}

/* Each alternative at the top may be anchored; where it is not, anything goes. */
static enum err build_all(struct parser *p, uint32_t next, uint32_t *ret)
{
    struct grammar *g = p->g;
    uint32_t node = PROGRAM_FAIL;
    for (;;) {
        uint32_t part, min, max;
        bool start = *p->at == '^', possible;
        p->at += start;
        TRY(parse_sequence(p, &part));
        bool end = *p->at == '$';
        p->at += end;
        TRY(fit_length(p, part, !start + !end, &min, &max, &possible));
        uint32_t one = end ? next : program_repeat(g, p->chars->any, min, max, next);
        one = build_part(p, part, one);
        if (!start)
            one =
                program_repeat(g, p->chars->any, end ? min : 0, end ? max : REPEAT_UNLIMITED, one);
        if (possible)
            node = program_either(g, node, one);
        if (!*p->at)
            break;
        if (*p->at != '|')
            return refuse(p, *p->at == ')' ? "a ) without (" : "an anchor inside");
        p->at++;
    }
    *ret = node;
    return g->err;
}

enum err pattern_build(struct grammar *g, const char *text, const struct pattern_chars *chars,
                       uint32_t next, uint32_t *ret)
{
    OWNED_MEM struct part *parts = malloc(MAX_PARTS * sizeof(*parts));
    OWNED_MEM struct range *ranges = malloc(MAX_RANGES * sizeof(*ranges));
    if (!parts || !ranges)
        return err_set(ERR_NOMEM, "no memory for a pattern");
    struct parser p = {
        .text = text, .at = text, .parts = parts, .ranges = ranges, .g = g, .chars = chars};
    return build_all(&p, next, ret);
}

#define DATE                                                                                       \
    "[1-9]\\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|"  \
    "30)|"                                                                                         \
    "02-(?:0[1-9]|1\\d|2[0-8]))"
#define TIME                                                                                       \
    "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,6})?(?:Z|[+-](?:0\\d|1[0-4]):[0-5]\\d)"
#define BYTE "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define NAME "[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"

enum err format_build(struct grammar *g, const char *name, const struct pattern_chars *chars,
                      uint32_t next, uint32_t *ret)
{
    static const struct {
        const char *name, *pattern;
    } formats[] = {
        {"date", "^" DATE "$"},
        {"time", "^" TIME "$"},
        {"date-time", "^" DATE "T" TIME "$"},
        {"uuid", "^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"},
        {"ipv4", "^" BYTE "(?:\\." BYTE "){3}$"},
        {"email",
         "^[A-Za-z0-9_+-]{1,32}(?:\\.[A-Za-z0-9_+-]{1,32}){0,3}@" NAME "(?:\\." NAME "){1,4}$"},
        {"uri", "^[a-z][a-z0-9+.-]{1,15}://" NAME "(?:\\." NAME "){0,6}(?::[1-9]\\d{0,3})?"
                "(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*"
                "(?:\\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?(?:#[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?$"},
    };
    for (size_t i = 0; i < ARRAY_LEN(formats); i++)
        if (!strcmp(name, formats[i].name))
            return pattern_build(g, formats[i].pattern, chars, next, ret);
    return err_set(ERR_INVALID, "\"format\" \"%.40s\" is not supported", name);
}
