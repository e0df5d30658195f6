/* client.h: HTTP requests to one server over kept-alive connections, on a libuv loop.
 *
 *   conn:  CONNECTING -> BUSY <-> IDLE -> CLOSING       (a new one goes to BUSY with its exchange)
 *
 * 1. A connection carries one exchange at a time; the one that was idle last is used first.
 * 2. A reused connection that breaks before the first byte of an answer was closed by the server
 *    meanwhile: the request is sent once more, on a new one.
 * 3. done is called exactly once per exchange, never from within client_send.
 */
#ifndef BATON_BENCH_CLIENT_H
#define BATON_BENCH_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

#include "common/base/err.h"

struct client;
struct conn;

struct exchange {
    // by the caller; bytes stay valid until done
    const char *bytes;
    size_t n_bytes;
    void (*on_body)(struct exchange *x, const char *bytes, size_t n); // status is known by then
    /* ERR_OK: a complete answer, see status. ERR_UNAVAILABLE: no connection. ERR_PROTO: not HTTP.
     * ERR_PEER_LOST: ended in the middle. */
    void (*done)(struct exchange *x, enum err why);
    // by the client
    int status; // 0 until the head of the answer is there
    struct conn *conn;
    bool retried;
};

/* url: http://HOST[:PORT][/PREFIX]. Resolves the host. ERR_INVALID names what is wrong. */
MUST_CHECK enum err client_create(uv_loop_t *loop, const char *url, struct client **ret);
void client_close(struct client *c); // starts closing all connections; then run the loop
void client_destroy(struct client *c);

const char *client_host(const struct client *c);   // for the Host header
const char *client_prefix(const struct client *c); // "" or "/PREFIX"

void client_send(struct client *c, struct exchange *x);
void client_cancel(struct client *c,
                   struct exchange *x); // closes its connection; done is not called

#endif
