/* traceparent.h: W3C Trace Context, as far as a server in the middle needs it: who called, and what
 * this request is called in the same trace.
 */
#ifndef BATON_TRACEPARENT_H
#define BATON_TRACEPARENT_H

#include <stdbool.h>
#include <stdint.h>

#define TRACEPARENT_BYTES 56 /* with NUL */

struct traceparent {
    char trace_id[33], parent_id[17], span_id[17]; // lower-case hex; span: this request's own
    char flags[3];
};

/* Takes a traceparent header apart. False, and *ret untouched: it is none (bad ones are ignored, as
 * the recommendation says). span: random, not 0. */
bool traceparent_parse(const char *text, uint64_t span, struct traceparent *ret);
/* What is passed on: the same trace with this request as the parent. */
void traceparent_write(const struct traceparent *t, char ret[TRACEPARENT_BYTES]);

#endif
