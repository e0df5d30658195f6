/* http.h: HTTP/1.1 server on libuv and llhttp: bytes in, complete requests out, answers back.
 *
 * llhttp parses; this module adds what makes it a server that can face strangers: semantic checks,
 * limits on everything, deadlines, one request in work per connection (the rest waits unread),
 * lingering close after errors, and back-pressure towards slow readers. It knows nothing of OpenAI.
 */
#ifndef BATON_HTTP_H
#define BATON_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#include "common/base/err.h"

struct http_server;
struct http_exchange; /* one request and its answer */

struct http_limits {
    size_t max_body_bytes;                /* 413 */
    size_t max_bodies_bytes;              /* of all bodies on their way: 503 for large ones */
    size_t max_connections;               /* beyond it new ones are closed at accept */
    size_t max_write_buffer;              /* unread output per connection before it is cut off */
    uint64_t header_timeout_ms;           /* whole header block, 10 s: 408 */
    uint64_t body_idle_ms, body_total_ms; /* 10 s, 60 s: 408 */
    uint64_t keepalive_ms;                /* 75 s idle between requests */
    uint64_t write_stall_ms;              /* 60 s without the client reading anything */
};
extern const struct http_limits http_limits_default;

struct http_request {
    const char *method; /* "GET"; HEAD is shown as "HEAD" and its body is left out by this module */
    const char *path;   /* without query, exact bytes; "" never */
    const char *query;  /* after '?', or "" */
    const char *body;
    size_t n_body;
    const char *content_type; /* or "" */
    const char *request_id;   /* X-Request-Id if it is 1..128 printable characters, else "" */
    const char *authorization, *api_key, *traceparent, *origin; /* or "" */
    const char *cors_headers;  /* Access-Control-Request-Headers, or "" */
    const char *if_none_match; /* or "" */
};

struct http_handler {
    /* A complete header block: may answer early (404, 405, 413, 415) by http_reply; return. Called
     * before the body is read and before 100 Continue. May be NULL. */
    void (*headers)(void *user, struct http_exchange *x, const struct http_request *r);
    /* A complete request. r is valid only during the call. The handler answers now or later. */
    void (*request)(void *user, struct http_exchange *x, const struct http_request *r);
    /* The client left (FIN, RST, timeout, cut off as too slow) before the answer ended. The
     * exchange is invalid after this call. Not called after http_end or http_reply. */
    void (*gone)(void *user, struct http_exchange *x);
    /* A request that this module refuses itself (400, 408, 413, ...): answers by http_reply, now.
     * Allow and Retry-After are added already; the connection ends with the answer. request_id as
     * in http_request, "" also where it was not read. */
    void (*refused)(void *user, struct http_exchange *x, int status, const char *message,
                    const char *request_id);
};

/* Listens on host:port (0 = any; see http_server_port). ERR_IO names the address and reason. */
MUST_CHECK enum err http_server_create(uv_loop_t *loop, const char *host, int port,
                                       const struct http_limits *limits,
                                       const struct http_handler *handler, void *user,
                                       struct http_server **ret);
int http_server_port(const struct http_server *s);
size_t http_server_n_connections(const struct http_server *s);
size_t http_server_n_exchanges(const struct http_server *s);
/* From now on n threads send, the loop's own included. Once, before anything is written. */
MUST_CHECK enum err http_server_use_threads(struct http_server *s, uint32_t n);
/* The output of n connections is with the kernel, or in the queue of a client that does not read;
 * sent_us is when that was (clock_now_us). */
typedef void http_sent_fn(void *user, size_t n, uint64_t sent_us);
/* Sends what was written since. more: the caller goes on writing and calls again before it returns
 * to the loop, so where several threads send, what was written may still be on its way when this
 * returns. Without more it is not. sent (or NULL) is told from in here; nobody else is called back.
 * Not from inside a handler. */
void http_server_flush(struct http_server *s, bool more, http_sent_fn *sent, void *user);
/* Stops accepting, closes idle connections, answers the rest with Connection: close. */
void http_server_drain(struct http_server *s);
/* Cuts everything. No callbacks afterwards. Memory goes when the loop has run. */
void http_server_destroy(struct http_server *s);

/* The handler's own pointer for this exchange. */
void http_set_data(struct http_exchange *x, void *data);
void *http_get_data(const struct http_exchange *x);

/* Extra response header, before http_reply or http_stream. CR, LF in value are refused (assert). */
void http_add_header(struct http_exchange *x, const char *name, const char *value);

/* A whole answer. body is copied. The exchange is finished. */
void http_reply(struct http_exchange *x, int status, const char *content_type, const char *body,
                size_t n);

/* Starts a streamed answer (chunked on 1.1, close-delimited on 1.0), then any number of writes,
 * then an end. http_write returns ERR_TOO_LARGE if the client is so far behind that it was cut off
 * (gone follows from the loop). Data is copied, and leaves when the loop comes round or at
 * http_server_flush, whichever is first. */
void http_stream(struct http_exchange *x, int status, const char *content_type);
enum err http_write(struct http_exchange *x, const char *data, size_t n);
/* http_write comes soon: what it needs of the connection is asked for, the exchange is read now. */
void http_warm(const struct http_exchange *x);
void http_end(struct http_exchange *x);   /* proper end */
void http_abort(struct http_exchange *x); /* flushes what was written, then closes without the last
                                             chunk: the client sees a broken stream */
#endif
