/* sse.h: what all streams of server-sent events have in common; events with data are api.c's. Each
 * call is one event and one http_write, so proxies and clients see whole events. Errors are
 * http_write's: ERR_TOO_LARGE means the client was cut off and the handler's gone follows. */
#ifndef BATON_SSE_H
#define BATON_SSE_H

#include "common/base/err.h"

struct http_exchange;

/* Starts the stream with status 200. Call it at the first token: until then an error can still have
 * a status of its own. */
void sse_begin(struct http_exchange *x);

/* ": keep-alive\n\n", a comment: every SSE parser ignores it, every proxy sees traffic. */
MUST_CHECK enum err sse_keepalive(struct http_exchange *x);

/* "data: [DONE]\n\n", the last event of an OpenAI stream. http_end is still the caller's. */
MUST_CHECK enum err sse_done(struct http_exchange *x);

#endif
