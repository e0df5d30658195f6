/* bench_fuzz.c: an answer's bytes through the event stream of baton bench.
 *
 * The first byte says where to cut the rest; the events must not depend on it.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/hash.h"
#include "tests/bench/event.h"
#include "tests/bench/sse_reader.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void on_event(void *user, const char *data, size_t n)
{
    uint64_t *hash = user;
    struct event e;
    char *exact = malloc(n ? n : 1); /* reading past the end is seen */
    memcpy(exact, data, n);
    *hash = hash_bytes(*hash, data, n);
    if (event_parse(exact, n, &e) == ERR_OK &&
        (memchr(e.finish, '\0', sizeof(e.finish)) == NULL ||
         memchr(e.message, '\0', sizeof(e.message)) == NULL || e.output_tokens < -1))
        abort();
    free(exact);
}

static uint64_t read_stream(const char *bytes, size_t n, size_t cut)
{
    struct sse_reader r;
    uint64_t hash = 0;
    sse_reader_init(&r, on_event, &hash);
    if (sse_reader_push(&r, bytes, cut) != ERR_OK ||
        sse_reader_push(&r, bytes + cut, n - cut) != ERR_OK)
        hash = 1;
    sse_reader_finish(&r);
    return hash;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n == 0)
        return 0;
    const char *bytes = (const char *)data + 1;
    size_t cut = (size_t)data[0] % n;
    if (read_stream(bytes, n - 1, 0) != read_stream(bytes, n - 1, cut))
        abort();
    uint64_t hash = 0;
    on_event(&hash, bytes, n - 1);
    return 0;
}
