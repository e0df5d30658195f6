/* traceparent.c: see traceparent.h. 00-<32 hex>-<16 hex>-<2 hex>; later versions may add to it. */
#include "router/traceparent.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* n digits of lower-case hex; some: not all of them 0. */
static bool is_hex(const char *text, size_t n, bool some)
{
    return strspn(text, "0123456789abcdef") >= n && (!some || strspn(text, "0") < n);
}

bool traceparent_parse(const char *text, uint64_t span, struct traceparent *ret)
{
    enum { TRACE = 3, PARENT = 36, FLAGS = 53, END = 55 };
    size_t n = strlen(text);
    if (n < END || text[TRACE - 1] != '-' || text[PARENT - 1] != '-' || text[FLAGS - 1] != '-')
        return false;
    if (!is_hex(text, 2, false) || !strncmp(text, "ff", 2) || !is_hex(text + TRACE, 32, true) ||
        !is_hex(text + PARENT, 16, true) || !is_hex(text + FLAGS, 2, false))
        return false;
    if (n > END && (!strncmp(text, "00", 2) || text[END] != '-'))
        return false;
    snprintf(ret->trace_id, sizeof(ret->trace_id), "%.32s", text + TRACE);
    snprintf(ret->parent_id, sizeof(ret->parent_id), "%.16s", text + PARENT);
    snprintf(ret->flags, sizeof(ret->flags), "%.2s", text + FLAGS);
    snprintf(ret->span_id, sizeof(ret->span_id), "%016" PRIx64, span ? span : 1);
    return true;
}

void traceparent_write(const struct traceparent *t, char ret[TRACEPARENT_BYTES])
{
    snprintf(ret, TRACEPARENT_BYTES, "00-%s-%s-%s", t->trace_id, t->span_id, t->flags);
}
