/* schema_json.c: what JSON is made of, each as a rule where it comes often. */
#include <math.h>

#include "common/grammar/schema_impl.h"

#define MAX_INDENT 20

/* Nothing, a space, or a new line and its indentation. */
uint32_t schema_space(struct schema_compiler *c, uint32_t next)
{
    struct grammar *g = c->g;
    if (!c->space) {
        struct symset blank = {0};
        symset_add(&blank, ' ');
        symset_add(&blank, '\t');
        uint32_t indent = program_set(g, &blank, PROGRAM_RETURN);
        indent = program_repeat(g, indent, 0, MAX_INDENT, PROGRAM_RETURN);
        uint32_t edges[] = {PROGRAM_RETURN, program_text(g, " ", 1, PROGRAM_RETURN),
                            program_text(g, "\n", 1, indent)};
        c->space = program_split(g, edges, 3);
    }
    return program_call(g, c->space, next);
}

uint32_t schema_wide_char(struct schema_compiler *c)
{
    if (!c->wide_char)
        c->wide_char = program_wide_char(c->g, PROGRAM_RETURN);
    return c->wide_char;
}

static uint32_t hex_digits(struct grammar *g, const char *const *sets, size_t n, uint32_t next)
{
    while (n-- > 0) {
        struct symset set = {0};
        for (const char *c = sets[n]; *c; c++)
            symset_add(&set, (uint8_t)*c);
        next = program_set(g, &set, next);
    }
    return next;
}

/* \uXXXX: neither NUL, which many programs cannot hold, nor half a character. */
static uint32_t escape_u(struct grammar *g, uint32_t next)
{
#define HEX "0123456789abcdefABCDEF"
    static const char *const any4[] = {"123456789abcefABCEF", HEX, HEX, HEX};
    static const char *const zero[] = {"0", "123456789abcdefABCDEF", HEX, HEX};
    static const char *const zeros[] = {"0", "0", "123456789abcdefABCDEF", HEX};
    static const char *const ascii[] = {"0", "0", "0", "123456789abcdefABCDEF"};
    static const char *const d[] = {"dD", "01234567", HEX, HEX};
    static const char *const high[] = {"dD", "89abAB", HEX, HEX};
    static const char *const low[] = {"dD", "cdefCDEF", HEX, HEX};
#undef HEX
    uint32_t second = program_text(g, "\\u", 2, hex_digits(g, low, 4, next));
    uint32_t edges[] = {hex_digits(g, any4, 4, next),  hex_digits(g, zero, 4, next),
                        hex_digits(g, zeros, 4, next), hex_digits(g, ascii, 4, next),
                        hex_digits(g, d, 4, next),     hex_digits(g, high, 4, second)};
    return program_text(g, "u", 1, program_split(g, edges, ARRAY_LEN(edges)));
}

/* A character of a JSON string, escapes included. */
uint32_t schema_quoted_char(struct schema_compiler *c)
{
    struct grammar *g = c->g;
    if (!c->quoted_char) {
        struct symset direct = {0}, escaped = {0};
        for (uint32_t b = 0x20; b < 0x80; b++)
            if (b != '"' && b != '\\')
                symset_add(&direct, b);
        for (const char *e = "\"\\/bfnrt"; *e; e++)
            symset_add(&escaped, (uint8_t)*e);
        uint32_t escape = program_either(g, program_set(g, &escaped, PROGRAM_RETURN),
                                         escape_u(g, PROGRAM_RETURN));
        uint32_t edges[] = {program_set(g, &direct, PROGRAM_RETURN), schema_wide_char(c),
                            program_text(g, "\\", 1, escape)};
        c->quoted_char = program_split(g, edges, 3);
    }
    return c->quoted_char;
}

/* A character of a verbatim string. */
uint32_t schema_verbatim_char(struct schema_compiler *c)
{
    if (!c->verbatim_char)
        c->verbatim_char = program_either(c->g, program_range(c->g, 0x01, 0x7f, PROGRAM_RETURN),
                                          schema_wide_char(c));
    return c->verbatim_char;
}

uint32_t schema_quote(struct schema_compiler *c, uint32_t next)
{
    return program_text(c->g, "\"", 1, next);
}

/* A quoted string of any content. */
uint32_t schema_any_string(struct schema_compiler *c, uint32_t next)
{
    return schema_quote(
        c, program_repeat(c->g, schema_quoted_char(c), 0, REPEAT_UNLIMITED, schema_quote(c, next)));
}

uint32_t schema_comma(struct schema_compiler *c, uint32_t next)
{
    return program_text(c->g, ",", 1, schema_space(c, next));
}

uint32_t schema_colon(struct schema_compiler *c, uint32_t next)
{
    return program_text(c->g, ":", 1, schema_space(c, next));
}

/* open (item (, item)*)? close, where item is a rule; more: n further items from min to max. */
uint32_t schema_list(struct schema_compiler *c, const char *brackets, uint32_t item, uint32_t min,
                     uint32_t max, uint32_t next)
{
    struct grammar *g = c->g;
    uint32_t close = program_text(g, brackets + 1, 1, next), end = schema_space(c, close);
    uint32_t empty = min == 0 ? close : PROGRAM_FAIL, full = PROGRAM_FAIL;
    if (max > 0) {
        uint32_t more = schema_comma(c, program_call(g, item, PROGRAM_RETURN));
        uint32_t most = max == REPEAT_UNLIMITED ? max : max - 1;
        full = program_call(g, item, program_repeat(g, more, min ? min - 1 : 0, most, end));
    }
    return program_text(g, brackets, 1, schema_space(c, program_either(g, empty, full)));
}

static uint32_t words(struct grammar *g, uint32_t next)
{
    uint32_t edges[] = {program_text(g, "true", 4, next), program_text(g, "false", 5, next),
                        program_text(g, "null", 4, next)};
    return program_split(g, edges, 3);
}

/* A rule: any JSON, `depth` levels of arrays and objects at most. */
uint32_t schema_any(struct schema_compiler *c, int depth)
{
    if (!c->any[depth]) {
        static const struct number_range all = {-INFINITY, INFINITY, false, false};
        struct grammar *g = c->g;
        uint32_t end = PROGRAM_RETURN, edges[5] = {0};
        uint32_t inner = depth > 0 ? schema_any(c, depth - 1) : PROGRAM_FAIL;
        uint32_t pair = schema_any_string(c, schema_colon(c, program_call(g, inner, end)));
        uint32_t most = depth > 0 ? REPEAT_UNLIMITED : 0;
        edges[0] = schema_any_string(c, end);
        edges[1] = number_build(g, &all, false, end);
        edges[2] = words(g, end);
        edges[3] = schema_list(c, "[]", inner, 0, most, end);
        edges[4] = schema_list(c, "{}", pair, 0, most, end);
        c->any[depth] = program_split(g, edges, 5);
    }
    return c->any[depth];
}
