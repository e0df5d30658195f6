/* kv_pair.h: what the transports share. Private to kv_transport.c, kv_stream.c and the kv_<kind>.c.
 *
 * A kind embeds struct kv_pair as its first member and brings two functions; the queue of posted
 * transfers, the thread, abort and the callbacks are here (kv_transport.c).
 *
 *   post -> [first .. last] -run() moves the oldest, kv_pair_finish-> done(OK)
 *                \--- run() returned why: the rest, and whatever is posted later -> done(why)
 *                \--- abort: the rest -> done(ERR_ABORTED), thread joined
 * 1. Only the pair's thread takes posts off the queue, frees them and calls done.
 * 2. run() returns soon after kv_pair_stopping; all its waiting goes through kv_pair_wait.
 * 3. A transfer's done(OK) is final: content and order of the pages were right at that moment.
 */
#ifndef BATON_KV_PAIR_H
#define BATON_KV_PAIR_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "common/engine/kv_transport.h"

struct kv_post {
    struct kv_post *next;
    uint64_t seq;
    uint32_t n_pages;
    uint32_t pages[];
};

struct kv_pair_ops {
    /* Moves transfers until the pair ends, and returns why. On the pair's thread. */
    enum err (*run)(struct kv_pair *p);
    /* Lets the peer know: closes sockets. On the pair's thread after run, and before destroy. */
    void (*hangup)(struct kv_pair *p);
};

struct kv_pair {
    const struct kv_pair_ops *ops;
    struct kv_pair_config config;
    int wake_fd;      // readable: something was posted, or stop
    atomic_bool stop; // set with lock held
    bool has_thread;
    pthread_t thread;
    pthread_mutex_t lock; // guards the queue's links and next_seq
    struct kv_post *first, **last;
    uint64_t next_seq; // to be posted
};

/* Allocates n_bytes, zeroed, that begin with a struct kv_pair. */
MUST_CHECK enum err kv_pair_create(size_t n_bytes, const struct kv_pair_ops *ops,
                                   const struct kv_pair_config *c, struct kv_pair **ret);
MUST_CHECK enum err kv_pair_start(struct kv_pair *p); /* starts the thread */

/* ---- the rest: on the pair's thread, from run ---- */

bool kv_pair_stopping(const struct kv_pair *p);
/* The post after x (NULL: the oldest), or NULL: nothing yet. */
struct kv_post *kv_pair_next(struct kv_pair *p, const struct kv_post *x);
/* Ends the oldest post. */
void kv_pair_finish(struct kv_pair *p, enum err result);
/* poll() until deadline_us (0: none) with the pair's own descriptor in fds[0] (filled in here):
 * also returns for a post. ERR_ABORTED when stopping; a passed deadline is ERR_OK without events.
 */
MUST_CHECK enum err kv_pair_poll(struct kv_pair *p, struct pollfd *fds, nfds_t n,
                                 uint64_t deadline_us);
/* Waits for events on fd, for a post, or until deadline_us (0: none). ret gets the poll events, 0
 * when it was something else. ERR_ABORTED when stopping, ERR_PEER_LOST past the deadline. */
MUST_CHECK enum err kv_pair_wait(struct kv_pair *p, int fd, short events, uint64_t deadline_us,
                                 short *ret);

/* ---- kv_stream.c: pairs that talk over a stream socket ---- */

struct kv_stream_kind {
    /* Sender: what follows a transfer's head. Fills iov from byte offset on; returns their number.
     */
    uint64_t (*payload_bytes)(const struct kv_pair *p, const struct kv_post *x);
    int (*payload)(const struct kv_pair *p, const struct kv_post *x, uint64_t offset,
                   struct iovec *iov, int max);
    /* Receiver: reads the payload and brings the content into x's pages. */
    enum err (*receive)(struct kv_pair *p, int fd, const struct kv_post *x, uint32_t n_peer_pages);
    /* Both ends, after the handshake: prepares what transfers need. May be NULL. */
    enum err (*open)(struct kv_pair *p, int fd, bool is_sender);
    /* Sender, for content that takes another way than the socket: there is no payload; brings x's
     * content to the receiver, who is in `receive` by now, and returns when its pages will not be
     * read any more. NULL: the payload is all. */
    enum err (*send)(struct kv_pair *p, int fd, const struct kv_post *x);
    void (*tune)(int fd); // sets socket options; may be NULL
    bool same_user;       // the peer must be a process of our own user
};

/* Sending end: connects, shows the token, then moves transfers. *fd stays the caller's to close. */
enum err kv_stream_send(struct kv_pair *p, const struct kv_stream_kind *k,
                        const struct sockaddr *address, socklen_t address_bytes, int *fd);
/* Receiving end: waits for the one who has the token, closes the listening socket, then moves
 * transfers. */
enum err kv_stream_receive(struct kv_pair *p, const struct kv_stream_kind *k, int *listen_fd,
                           int *fd);
/* Reads or writes exactly n bytes. */
MUST_CHECK enum err kv_stream_read(struct kv_pair *p, int fd, void *ret, size_t n);
MUST_CHECK enum err kv_stream_write(struct kv_pair *p, int fd, const void *bytes, size_t n);

/* ---- the kinds: kv_pair_listen and kv_pair_connect of each, whose promises are theirs ---- */

MUST_CHECK enum err kv_shm_listen(const struct kv_pair_config *c, const char *peer_pool,
                                  char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret);
MUST_CHECK enum err kv_shm_connect(const struct kv_pair_config *c, const char *address,
                                   struct kv_pair **ret);
MUST_CHECK enum err kv_tcp_listen(const struct kv_pair_config *c, const char *host,
                                  char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret);
MUST_CHECK enum err kv_tcp_connect(const struct kv_pair_config *c, const char *address,
                                   struct kv_pair **ret);

/* kv_tcp.c, for kinds that talk over TCP too. */
/* Listens on a free port of host; ret_address is what to call. */
MUST_CHECK enum err kv_tcp_bind(const char *host, char ret_address[WIRE_MAX_ADDRESS], int *ret_fd);
/* Parses such an address. */
MUST_CHECK enum err kv_tcp_resolve(const char *address, struct sockaddr_storage *ret,
                                   socklen_t *ret_bytes);
void kv_tcp_tune(int fd);

static inline void kv_socket_close(int *fd)
{
    if (*fd >= 0) {
        shutdown(*fd, SHUT_RDWR); // also past copies of the descriptor in a forked child
        close(*fd);
    }
    *fd = -1;
}

#endif
