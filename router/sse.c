/* sse.c: see sse.h. */
#include "router/sse.h"

#include "router/http.h"

void sse_begin(struct http_exchange *x) { http_stream(x, 200, "text/event-stream; charset=utf-8"); }

enum err sse_keepalive(struct http_exchange *x)
{
    static const char event[] = ": keep-alive\n\n";
    return http_write(x, event, sizeof(event) - 1);
}

enum err sse_done(struct http_exchange *x)
{
    static const char event[] = "data: [DONE]\n\n";
    return http_write(x, event, sizeof(event) - 1);
}
