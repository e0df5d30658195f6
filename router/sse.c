/* sse.c: frames events. */
#include "router/sse.h"

#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"
#include "router/http.h"

void sse_begin(struct http_exchange *x) { http_stream(x, 200, "text/event-stream; charset=utf-8"); }

enum err sse_write(struct http_exchange *x, const char *text, size_t n)
{
    static const char prefix[6] = "data: ";
    size_t n_lines = 1;
    for (size_t i = 0; i < n; i++)
        n_lines += text[i] == '\n';
    size_t total = n + n_lines * sizeof(prefix) + 2;

    char small[2048]; /* token events fit */
    OWNED_MEM char *large = total > sizeof(small) ? malloc(total) : NULL;
    char *out = total > sizeof(small) ? large : small;
    if (!out)
        return err_set(ERR_NOMEM, "event of %zu bytes", n);

    size_t at = 0;
    while (n_lines--) {
        const char *end = n_lines ? memchr(text, '\n', n) : text + n;
        size_t n_line = (size_t)(end - text);
        memcpy(out + at, prefix, sizeof(prefix));
        memcpy(out + at + sizeof(prefix), text, n_line);
        at += sizeof(prefix) + n_line;
        out[at++] = '\n';
        if (n_lines) {
            text = end + 1;
            n -= n_line + 1;
        }
    }
    out[at++] = '\n';
    return http_write(x, out, at);
}

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
