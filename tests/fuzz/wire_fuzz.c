/* wire_fuzz.c: whatever the decoder accepts must be safe to read in full. */
#include <stdlib.h>
#include <string.h>

#include "common/base/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* Touches what callers would, so that the sanitizer sees a view that leads outside. */
static uint64_t read_all(const void *bytes, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += ((const uint8_t *)bytes)[i];
    return sum;
}

static uint64_t read_tokens(const struct wire_msg *m)
{
    uint64_t sum = 0;
    size_t offset = 0, n_streams = 0;
    struct wire_stream_view v;
    while (wire_tokens_next(m, &offset, &v)) {
        n_streams++;
        sum += v.head->req_id + read_all(v.ids, v.head->n_tokens * sizeof(int32_t));
        if (v.logprobs)
            sum += read_all(v.logprobs, v.head->n_tokens * wire_logprob_bytes(v.head->n_logprobs));
    }
    if (offset != m->tail_bytes || n_streams != ((const struct wire_tokens *)m->body)->n_streams)
        abort();
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint8_t *frame = malloc(n ? n : 1); // aligned, and exactly as long as the input
    if (!frame)
        return 0;
    memcpy(frame, data, n);
    if (n >= sizeof(struct wire_head)) { // the fuzzer need not find these for itself
        struct wire_head *h = (struct wire_head *)frame;
        h->magic = WIRE_MAGIC;
        h->version = WIRE_VERSION;
        h->body_bytes = (uint32_t)(n - sizeof(*h));
    }

    struct wire_msg m;
    volatile uint64_t sink = 0;
    if (wire_decode(frame, n, &m) == ERR_OK) {
        sink += read_all(m.body, wire_body_bytes(m.head.type)) + read_all(m.tail, m.tail_bytes);
        if (m.head.type == WIRE_TOKENS)
            sink += read_tokens(&m);
    }
    (void)sink;
    free(frame);
    return 0;
}
