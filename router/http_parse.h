/* http_parse.h: bytes -> one HTTP request, or the status that refuses it. Internal to http.c.
 *
 * Pure: no sockets, no clock. The verdict depends only on the bytes, never on how they were cut
 * into reads; tests and the fuzzer hold it to that.
 */
#ifndef BATON_HTTP_PARSE_H
#define BATON_HTTP_PARSE_H

#include <llhttp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "router/http.h"

enum {
    HTTP_MAX_REQUEST_LINE = 8 * 1024,  /* without its CRLF; more: 414 */
    HTTP_MAX_HEADER_BYTES = 16 * 1024, /* all fields with their CRLFs; more: 431 */
    HTTP_MAX_FIELDS = 100,             /* more: 431 */
    HTTP_MAX_CHUNK_EXT_BYTES = 1024,   /* of all chunks of a body together; more: 400 */
    HTTP_MAX_TRAILER_BYTES = 4 * 1024, /* more: 400 */
};

enum http_parse_event {
    HTTP_PARSE_MORE,    /* everything was used, the request is not complete */
    HTTP_PARSE_HEADERS, /* the header block is complete and acceptable: request is filled in, no
                           body */
    HTTP_PARSE_DONE,    /* the request is complete; what was not used belongs to the next one */
    HTTP_PARSE_BAD,     /* refused with .status and .why; what follows cannot be framed any more */
};

struct http_parse {
    /* Filled in at HTTP_PARSE_HEADERS; body at HTTP_PARSE_DONE (NUL-terminated, as all strings).
     * At HTTP_PARSE_BAD request_id may be there, all else may be NULL. */
    struct http_request request;
    bool http10;
    bool keep_alive; /* what the client's version and Connection header ask for */
    bool has_body;
    bool expects_100;
    bool for_server; /* OPTIONS * */
    /* Known from the end of the request line on, so that a refusal can honour it. */
    bool is_head;
    /* Filled in at HTTP_PARSE_BAD. why is a constant sentence. */
    int status;
    const char *why;

    /* The rest belongs to http_parse.c. */
    int state;
    size_t max_body;
    bool skipped_crlf;
    char *head;
    size_t n_head, head_cap, n_line;
    int n_fields;
    bool chunked;
    uint64_t declared; /* Content-Length, or 0 */
    uint64_t left;     /* of the declared body, or of this chunk */
    uint64_t n_framed; /* body bytes by our own count */
    int n_size_digits;
    size_t n_ext, n_trailer;
    char *body;
    size_t n_body, body_cap;
    bool ll_headers, ll_complete, ll_nomem;
    llhttp_t ll;
};

/* NULL when out of memory. */
struct http_parse *http_parse_create(size_t max_body_bytes);
void http_parse_destroy(struct http_parse *p);

/* Uses up to n bytes of data. After DONE or BAD the parser is spent. */
enum http_parse_event http_parse_feed(struct http_parse *p, const char *data, size_t n,
                                      size_t *ret_used);

#endif
