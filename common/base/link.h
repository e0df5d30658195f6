/* link.h: ZeroMQ sockets in a libuv loop, with the delivery rules of wire.h.
 *
 * A hub is a bound ROUTER socket that several peers connect to; a line is a DEALER socket connected
 * to one hub. Both number what they send, check the numbers of what they receive, stamp and check
 * the epoch, decode with wire_decode, and hand good messages to one callback. All calls and
 * callbacks belong to the loop's thread. One ZeroMQ context per process, for its whole life.
 *
 * Links are quick to notice a dead process (a send to it fails at once) and a cut or frozen one
 * (nothing heard for dead_us); they cannot notice a stuck engine thread: that is what the progress
 * counter in BEAT is for.
 */
#ifndef BATON_LINK_H
#define BATON_LINK_H

#include <uv.h>

#include "common/base/wire.h"

#define LINK_ID_BYTES 16u /* a peer's routing id: role, instance */

enum link_event {
    LINK_MESSAGE, // m is set
    LINK_LOST,    // text says why: silent, unreachable, sequence gap, bad frames. Once per peer.
};

struct link_hub;
struct link_line;

struct link_limits {
    uint64_t dead_us; // a peer silent for that long is lost (0 = never)
    int send_hwm;     // messages queued per peer
};

/* peer: the hub's handle for a peer, stable until it is lost; never reused within a process. A peer
 * whose process or line starts over (HELLO or JOIN numbered 0) is LINK_LOST under its old handle,
 * then heard under a new one. The first message of an unknown peer must be numbered 0; anything
 * else is dropped and met with WHO, so that it starts over. m is valid during the call only. */
typedef void link_hub_fn(void *user, uint64_t peer, enum link_event event, const struct wire_msg *m,
                         const char *text);

/* endpoint: "tcp://127.0.0.1:0" and "ipc://path" work; a wildcard port is resolved, see
 * link_hub_endpoint, which with keys (curve.h) also tells the public one. ipc sockets are created
 * 0600 and stale ones replaced. ERR_IO names it; ERR_INVALID where keys are missing. */
MUST_CHECK enum err link_hub_create(uv_loop_t *loop, const char *endpoint,
                                    struct link_limits limits, link_hub_fn *fn, void *user,
                                    struct link_hub **ret);
const char *link_hub_endpoint(const struct link_hub *hub);

/* Epoch stamped on what is sent (HELLO always carries 0). Messages received with another epoch are
 * counted as stale and dropped, except those that establish it or do not depend on it: HELLO,
 * WELCOME, REFUSE, WHO, JOIN and PULSE. Hub and line alike. */
void link_hub_set_epoch(struct link_hub *hub, uint64_t epoch);

/* Sends buf (from wire_begin .. wire_end). ERR_PEER_LOST if the peer is gone (LINK_LOST follows
 * from the loop, never from inside this call), ERR_BUSY if its queue is full. buf is not consumed.
 */
MUST_CHECK enum err link_hub_send(struct link_hub *hub, uint64_t peer, struct wire_buf *buf);
/* Forgets a peer without a LINK_LOST; what it sends later is met with WHO. */
void link_hub_forget(struct link_hub *hub, uint64_t peer);
uint64_t link_hub_stale(const struct link_hub *hub); /* messages dropped for their epoch */
/* Bad frames dropped so far (decode errors). A peer with 10 of them is lost. */
uint64_t link_hub_bad(const struct link_hub *hub);
void link_hub_destroy(
    struct link_hub *hub); /* no callbacks afterwards; the loop must run once more */

typedef void link_line_fn(void *user, enum link_event event, const struct wire_msg *m,
                          const char *text);

/* role and instance make the routing id. Messages sent before the hub is up are queued. The line
 * reconnects by itself; after LINK_LOST (once until the next restart; also when the connection is
 * cut) it goes on, but what it hears is dropped, WHO excepted: sequence numbers start afresh with
 * the next link_line_restart. */
MUST_CHECK enum err link_line_create(uv_loop_t *loop, const char *endpoint, enum wire_role role,
                                     uint64_t instance, struct link_limits limits, link_line_fn *fn,
                                     void *user, struct link_line **ret);
void link_line_set_epoch(struct link_line *line, uint64_t epoch);
/* ERR_PEER_LOST while a once established connection is cut, ERR_BUSY if the queue is full. */
MUST_CHECK enum err link_line_send(struct link_line *line, struct wire_buf *buf);
/* Drops everything queued, closes and reopens the socket, sequence numbers from 0. */
MUST_CHECK enum err link_line_restart(struct link_line *line);
uint64_t link_line_stale(const struct link_line *line);
void link_line_destroy(struct link_line *line);

#endif
