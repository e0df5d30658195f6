/* sse_reader.h: splits the bytes of an event stream into events, however they were cut. */
#ifndef BATON_BENCH_SSE_READER_H
#define BATON_BENCH_SSE_READER_H

#include <stdbool.h>
#include <stddef.h>

#include "common/base/err.h"

#define SSE_MAX_EVENT_BYTES (4u << 20)

struct sse_reader {
    void (*on_event)(void *user, const char *data, size_t n); // data lines joined by \n
    void *user;
    char *line, *data; // of the event under way
    size_t n_line, line_cap, n_data, data_cap;
    bool has_data, skip_lf;
};

void sse_reader_init(struct sse_reader *r, void (*on_event)(void *, const char *, size_t),
                     void *user);
void sse_reader_finish(struct sse_reader *r);
void sse_reader_reset(struct sse_reader *r); // for the next stream; keeps the buffers

/* Calls on_event for every complete event that has data. ERR_TOO_LARGE: an event or line is longer
 * than SSE_MAX_EVENT_BYTES; ERR_NOMEM. */
MUST_CHECK enum err sse_reader_push(struct sse_reader *r, const char *bytes, size_t n);

#endif
