/* sse_reader.c: lines end in \n, \r or \r\n; an empty one ends an event. A line that lies whole in
 * the bytes at hand is read in place. */
#include "tests/bench/sse_reader.h"

#include <stdlib.h>
#include <string.h>

void sse_reader_init(struct sse_reader *r, void (*on_event)(void *, const char *, size_t),
                     void *user)
{
    *r = (struct sse_reader){.on_event = on_event, .user = user};
}

void sse_reader_finish(struct sse_reader *r)
{
    free(r->line);
    free(r->data);
    *r = (struct sse_reader){0};
}

void sse_reader_reset(struct sse_reader *r)
{
    r->n_line = r->n_data = 0;
    r->has_data = r->skip_lf = false;
}

static enum err append(char **buffer, size_t *len, size_t *cap, const char *bytes, size_t n)
{
    if (n == 0)
        return ERR_OK;
    if (*len + n > SSE_MAX_EVENT_BYTES)
        return err_set(ERR_TOO_LARGE, "an event is longer than %u bytes", SSE_MAX_EVENT_BYTES);
    if (*len + n > *cap) {
        size_t more = *cap ? *cap : 512;
        while (more < *len + n)
            more *= 2;
        char *p = realloc(*buffer, more);
        if (!p)
            return err_set(ERR_NOMEM, "no memory for an event");
        *buffer = p;
        *cap = more;
    }
    memcpy(*buffer + *len, bytes, n);
    *len += n;
    return ERR_OK;
}

static enum err take_line(struct sse_reader *r, const char *line, size_t n)
{
    static const char name[] = "data";
    const size_t n_name = sizeof(name) - 1;
    if (n == 0) {
        if (r->has_data)
            r->on_event(r->user, r->data ? r->data : "", r->n_data);
        r->n_data = 0;
        r->has_data = false;
        return ERR_OK;
    }
    if (n < n_name || memcmp(line, name, n_name) != 0 || (n > n_name && line[n_name] != ':'))
        return ERR_OK; // a comment or another field
    size_t from = n > n_name ? n_name + 1 : n;
    from += from < n && line[from] == ' ';
    if (r->has_data)
        TRY(append(&r->data, &r->n_data, &r->data_cap, "\n", 1));
    r->has_data = true;
    return append(&r->data, &r->n_data, &r->data_cap, line + from, n - from);
}

static const char *line_end(const char *p, const char *end)
{
    while (p < end && *p != '\n' && *p != '\r')
        p++;
    return p;
}

enum err sse_reader_push(struct sse_reader *r, const char *bytes, size_t n)
{
    const char *p = bytes, *end = bytes + n;
    while (p < end) {
        if (r->skip_lf && *p == '\n') {
            r->skip_lf = false;
            p++;
            continue;
        }
        r->skip_lf = false;
        const char *stop = line_end(p, end);
        if (stop == end)
            return append(&r->line, &r->n_line, &r->line_cap, p, (size_t)(end - p));
        r->skip_lf = *stop == '\r';
        if (r->n_line) {
            TRY(append(&r->line, &r->n_line, &r->line_cap, p, (size_t)(stop - p)));
            size_t whole = r->n_line;
            r->n_line = 0;
            TRY(take_line(r, r->line, whole));
        } else {
            TRY(take_line(r, p, (size_t)(stop - p)));
        }
        p = stop + 1;
    }
    return ERR_OK;
}
