/* http_fuzz.c: any bytes through the request parser, three properties:
 *
 * 1. However the bytes are cut into reads, the same requests and the same refusal come out.
 * 2. What is accepted is clean: a known method, a plain path, no control characters, within limits.
 * 3. A refusal has one of the documented statuses and a sentence.
 *
 * The first two bytes choose the cuts, the rest is the input. The handler does nothing.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"
#include "router/http_parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

enum { MAX_BODY = 512 };

#define MUST(cond)                                                                                 \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                             \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* What came out, as a running hash and the last event. */
struct outcome {
    uint64_t hash;
    uint32_t n_requests;
    int status;
    const char *why;
};

static void outcome_add(struct outcome *o, const void *data, size_t n)
{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < n; i++)
        o->hash = (o->hash ^ bytes[i]) * 0x100000001b3u;
}

static void text_check(struct outcome *o, const char *text, size_t max)
{
    size_t n = strlen(text);
    MUST(n <= max);
    for (size_t i = 0; i < n; i++)
        MUST(text[i] == '\t' || ((unsigned char)text[i] >= 0x20 && text[i] != 0x7f));
    outcome_add(o, text, n + 1);
}

static void request_check(struct outcome *o, const struct http_parse *p)
{
    const struct http_request *r = &p->request;
    MUST(strlen(r->method) >= 3 && strlen(r->method) <= 7);
    MUST(p->for_server ? !strcmp(r->path, "*") : r->path[0] == '/');
    MUST(!strstr(r->path, "//") && !strstr(r->path, "/../") && !strchr(r->path, ' ') &&
         !strstr(r->path, "%00") && !strchr(r->path, '?'));
    MUST(strlen(r->request_id) <= 128);
    MUST(!p->expects_100 || (p->has_body && !p->http10));
    const char *texts[] = {r->method,     r->path,          r->query,   r->content_type,
                           r->request_id, r->authorization, r->api_key, r->traceparent,
                           r->origin,     r->if_none_match};
    for (size_t i = 0; i < ARRAY_LEN(texts); i++)
        text_check(o, texts[i], HTTP_MAX_HEADER_BYTES);
    uint8_t flags[] = {p->http10, p->keep_alive, p->has_body, p->expects_100, p->is_head};
    outcome_add(o, flags, sizeof(flags));
}

static void refusal_check(struct outcome *o, const struct http_parse *p)
{
    static const int documented[] = {400, 405, 413, 414, 415, 417, 431, 501, 505};
    bool known = false;
    for (size_t i = 0; i < ARRAY_LEN(documented); i++)
        known |= p->status == documented[i];
    MUST(known && p->why && *p->why);
    o->status = p->status;
    o->why = p->why;
}

/* cuts == 0: all at once; otherwise pieces of pseudo-random length, 1 byte if cuts == 1. */
static struct outcome run(const char *data, size_t n, uint32_t cuts)
{
    struct outcome o = {.hash = 0xcbf29ce484222325u};
    struct http_parse *p = http_parse_create(MAX_BODY);
    MUST(p && p->ll.lenient_flags == 0);
    uint32_t seed = cuts;
    for (size_t at = 0; at < n && !o.status;) {
        seed = seed * 1664525u + 1013904223u;
        size_t piece = cuts == 0 ? n : cuts == 1 ? 1 : 1 + (seed >> 24) % (1 + cuts % 61);
        size_t end = at + MIN(piece, n - at);
        enum http_parse_event e = HTTP_PARSE_HEADERS;
        while (e != HTTP_PARSE_MORE && !(e == HTTP_PARSE_DONE && at == end) && !o.status) {
            size_t used;
            /* A copy of its own size, so that the sanitizer sees reads past the piece. */
            OWNED_MEM char *copy = malloc(MAX(end - at, (size_t)1));
            MUST(copy);
            memcpy(copy, data + at, end - at);
            e = http_parse_feed(p, copy, end - at, &used);
            MUST(used <= end - at);
            at += used;
            if (e == HTTP_PARSE_HEADERS)
                request_check(&o, p);
            if (e == HTTP_PARSE_BAD)
                refusal_check(&o, p);
            if (e == HTTP_PARSE_DONE) {
                MUST(p->request.n_body <= MAX_BODY && !p->request.body[p->request.n_body]);
                outcome_add(&o, p->request.body, p->request.n_body + 1);
                o.n_requests++;
                http_parse_destroy(p);
                p = http_parse_create(MAX_BODY);
                MUST(p);
            }
        }
    }
    http_parse_destroy(p);
    return o;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 2)
        return 0;
    uint32_t cuts[] = {1, 2 + (uint32_t)data[0] + 256u * data[1]};
    const char *text = (const char *)data + 2;
    struct outcome whole = run(text, n - 2, 0);
    for (size_t i = 0; i < ARRAY_LEN(cuts); i++) {
        struct outcome cut = run(text, n - 2, cuts[i]);
        MUST(cut.hash == whole.hash && cut.n_requests == whole.n_requests);
        MUST(cut.status == whole.status && cut.why == whole.why);
    }
    return 0;
}
