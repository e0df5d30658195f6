/* kv_stream.c: pairs that talk over a stream socket: handshake, heads, acknowledgements.
 *
 *   sender                                          receiver
 *     |--- struct hello: token, geometry ------------->|   closes whoever has not the token
 *     |<-- struct welcome -----------------------------|
 *     |--- struct head: seq, pages; then payload ----->|   waits until seq is posted, then reads it
 *     |<-- struct note: seq, DONE ---------------------|
 *
 * The payload is the kind's: tcp sends the pages, shm the indexes of pages to copy. The sender runs
 * ahead of the acks as far as the socket takes it. Everything arrives in order, so a number that is
 * not the next one is a broken peer, never something to search for.
 *
 * A kind with `send` brings the content past the socket, when both ends are ready for it:
 *     |--- struct head ------------------------------->|   waits until seq is posted
 *     |<-- struct note: READY -------------------------|
 *     |    send ~~~~~~~~~~~~~ content ~~~~~~~~~ receive |
 *     |--- struct note: SENT ------------------------->|   only now the content counts: a sender
 *     |<-- struct note: DONE --------------------------|   that gave up may have let garbage out
 *
 * There is one connection per pair and it is never remade: both ends give up and the workers JOIN
 * again. A closed socket is how each end learns of the other's death; a silent peer (frozen host,
 * cut wire) is noticed by the workers' own link and deadlines, which abort the pair.
 *
 * Structs cross the wire as they are: little-endian, no padding, reserved fields zero.
 */
#include "common/engine/kv_pair.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"

#define STREAM_MAGIC   0x31564b42u /* "BKV1" */
#define STREAM_VERSION 1u
#define HANDSHAKE_US   5000000u
#define MAX_STRANGERS  16u
#define MAX_IOV        16

struct hello {
    uint32_t magic, version;
    uint64_t token[2];
    uint64_t page_bytes;
    uint32_t n_pages, n_layers, kv_width, dtype_bytes;
};
static_assert(sizeof(struct hello) == 48, "no padding on the wire");

struct welcome {
    uint32_t magic;
    uint32_t code; // enum err
};
static_assert(sizeof(struct welcome) == 8, "no padding on the wire");

struct head {
    uint64_t seq, page_bytes;
    uint32_t n_pages, zero;
};
static_assert(sizeof(struct head) == 24, "no padding on the wire");

enum note_kind { NOTE_DONE = 0, NOTE_READY = 1, NOTE_SENT = 2 };

struct note {
    uint64_t seq;
    uint32_t code; // enum err; not OK: the receiver gives up
    uint32_t kind; // enum note_kind
};
static_assert(sizeof(struct note) == 16, "no padding on the wire");

static enum err stream_connect(struct kv_pair *p, const struct kv_stream_kind *k,
                               const struct sockaddr *address, socklen_t address_bytes, int *fd);
static enum err stream_accept(struct kv_pair *p, const struct kv_stream_kind *k, int listen_fd,
                              int *fd, uint32_t *ret_peer_pages);

/* ---- bytes ---- */

static enum err lost(const char *doing, int e)
{
    return err_set(ERR_PEER_LOST, "%s: %s", doing, e ? strerror(e) : "the peer closed");
}

/* After a recv or send that returned -1. */
static bool would_wait(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

static enum err read_until(struct kv_pair *p, int fd, void *ret, size_t n, uint64_t deadline_us)
{
    for (uint8_t *at = ret; n > 0;) {
        if (kv_pair_stopping(p))
            return err_set(ERR_ABORTED, "the KV pair was aborted");
        ssize_t got = recv(fd, at, n, MSG_DONTWAIT);
        if (got == 0)
            return lost("read", 0);
        if (got < 0) {
            if (!would_wait())
                return lost("read", errno);
            short events;
            TRY(kv_pair_wait(p, fd, POLLIN, deadline_us, &events));
            continue;
        }
        at += got;
        n -= (size_t)got;
    }
    return ERR_OK;
}

enum err kv_stream_read(struct kv_pair *p, int fd, void *ret, size_t n)
{
    return read_until(p, fd, ret, n, 0);
}

static enum err write_until(struct kv_pair *p, int fd, const void *bytes, size_t n,
                            uint64_t deadline_us)
{
    for (const uint8_t *at = bytes; n > 0;) {
        ssize_t put = send(fd, at, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0) {
            if (!would_wait())
                return lost("write", errno);
            short events;
            TRY(kv_pair_wait(p, fd, POLLOUT, deadline_us, &events));
            continue;
        }
        at += put;
        n -= (size_t)put;
    }
    return ERR_OK;
}

enum err kv_stream_write(struct kv_pair *p, int fd, const void *bytes, size_t n)
{
    return write_until(p, fd, bytes, n, 0);
}

static bool is_same_user(int fd)
{
    struct ucred peer;
    socklen_t n = sizeof(peer);
    return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) && peer.uid == geteuid();
}

/* ---- sending end ---- */

struct sender {
    struct kv_pair *p;
    const struct kv_stream_kind *k;
    int fd;
    struct kv_post *current; // being written
    struct head head;        // of current
    uint64_t offset, bytes;  // of current's head and payload
    struct kv_post *written; // the last one sent in full and not yet done
    uint64_t n_written;      // and how many of those there are
    struct note note;        // being read
    size_t note_bytes;
    bool mute; // a failpoint dropped a transfer: nothing is sent after it
};

static enum err sender_begin(struct sender *s);
static enum err sender_write(struct sender *s);
static enum err sender_read_notes(struct sender *s, short events);

static bool sender_has_bytes(const struct sender *s) { return s->current && s->offset < s->bytes; }

enum err kv_stream_send(struct kv_pair *p, const struct kv_stream_kind *k,
                        const struct sockaddr *address, socklen_t address_bytes, int *fd)
{
    TRY(stream_connect(p, k, address, address_bytes, fd));
    if (k->open)
        TRY(k->open(p, *fd, true));
    struct sender s = {.p = p, .k = k, .fd = *fd};
    for (;;) {
        if (!s.current && !s.mute)
            TRY(sender_begin(&s));
        short events;
        TRY(kv_pair_wait(p, s.fd, sender_has_bytes(&s) ? POLLIN | POLLOUT : POLLIN, 0, &events));
        if (events & ~POLLOUT)
            TRY(sender_read_notes(&s, events));
        if (events & POLLOUT && sender_has_bytes(&s))
            TRY(sender_write(&s));
    }
}

/* Starts on the next post, if there is one. */
static enum err sender_begin(struct sender *s)
{
    struct kv_post *x = kv_pair_next(s->p, s->n_written ? s->written : NULL);
    if (!x)
        return ERR_OK;
    switch (failpoint_pass("kv.send")) {
    case FAILPOINT_ERROR:
        return err_set(ERR_PEER_LOST, "failpoint kv.send");
    case FAILPOINT_DROP:
        s->mute = true;
        return ERR_OK;
    case FAILPOINT_NONE:
        break;
    }
    s->current = x;
    s->head = (struct head){
        .seq = x->seq, .page_bytes = kv_pool_page_bytes(s->p->config.pool), .n_pages = x->n_pages};
    s->offset = 0;
    s->bytes = sizeof(s->head) + (s->k->send ? 0 : s->k->payload_bytes(s->p, x));
    return ERR_OK;
}

/* current is on its way in full. */
static void sender_advance(struct sender *s)
{
    s->written = s->current;
    s->n_written++;
    s->current = NULL;
}

static enum err sender_write(struct sender *s)
{
    struct iovec iov[MAX_IOV];
    int n = 0;
    if (s->offset < sizeof(s->head))
        iov[n++] = (struct iovec){(uint8_t *)&s->head + s->offset, sizeof(s->head) - s->offset};
    uint64_t payload_offset = s->offset > sizeof(s->head) ? s->offset - sizeof(s->head) : 0;
    if (!s->k->send)
        n += s->k->payload(s->p, s->current, payload_offset, iov + n, MAX_IOV - n);
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = (size_t)n};
    ssize_t put = sendmsg(s->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (put < 0)
        return would_wait() ? ERR_OK : lost("write", errno);
    s->offset += (uint64_t)put;
    if (s->offset == s->bytes && !s->k->send)
        sender_advance(s);
    return ERR_OK;
}

/* The receiver is ready for current. */
static enum err sender_send(struct sender *s)
{
    struct kv_post *x = s->current;
    if (!s->k->send || !x || sender_has_bytes(s) || s->note.seq != x->seq)
        return err_set(ERR_PROTO, "the receiver is ready for transfer %" PRIu64 " out of turn",
                       s->note.seq);
    TRY(s->k->send(s->p, s->fd, x));
    struct note sent = {.seq = x->seq, .kind = NOTE_SENT};
    TRY(kv_stream_write(s->p, s->fd, &sent, sizeof(sent)));
    sender_advance(s);
    return ERR_OK;
}

static enum err sender_read_notes(struct sender *s, short events)
{
    for (;;) {
        ssize_t got = recv(s->fd, (uint8_t *)&s->note + s->note_bytes,
                           sizeof(s->note) - s->note_bytes, MSG_DONTWAIT);
        if (got == 0)
            return lost("waiting for acknowledgements", 0);
        if (got < 0) {
            if (!would_wait() || events & (POLLERR | POLLNVAL))
                return lost("waiting for acknowledgements", errno);
            return ERR_OK;
        }
        s->note_bytes += (size_t)got;
        if (s->note_bytes < sizeof(s->note))
            continue;
        s->note_bytes = 0;
        if (s->note.code != ERR_OK)
            return err_set(ERR_PROTO, "the receiver refused transfer %" PRIu64, s->note.seq);
        if (s->note.kind == NOTE_READY) {
            TRY(sender_send(s));
            continue;
        }
        if (!s->n_written || s->note.seq != kv_pair_next(s->p, NULL)->seq ||
            s->note.kind != NOTE_DONE)
            return err_set(ERR_PROTO, "acknowledgement of transfer %" PRIu64 " out of turn",
                           s->note.seq);
        s->n_written--;
        kv_pair_finish(s->p, ERR_OK);
    }
}

static enum err stream_connect(struct kv_pair *p, const struct kv_stream_kind *k,
                               const struct sockaddr *address, socklen_t address_bytes, int *fd)
{
    uint64_t deadline_us = clock_now_us() + HANDSHAKE_US;
    *fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd < 0)
        return err_set(ERR_IO, "socket: %s", strerror(errno));
    if (k->tune)
        k->tune(*fd);
    if (connect(*fd, address, address_bytes)) {
        if (errno != EINPROGRESS && errno != EINTR)
            return lost("connect", errno);
        short events = 0;
        while (!events)
            TRY(kv_pair_wait(p, *fd, POLLOUT, deadline_us, &events));
        int e = 0;
        socklen_t n = sizeof(e);
        if (getsockopt(*fd, SOL_SOCKET, SO_ERROR, &e, &n) || e)
            return lost("connect", e ? e : errno);
    }
    if (k->same_user && !is_same_user(*fd))
        return err_set(ERR_PROTO, "the listener runs as another user");

    const struct kv_pool_config *c = kv_pool_get_config(p->config.pool);
    struct hello hello = {
        .magic = STREAM_MAGIC,
        .version = STREAM_VERSION,
        .token = {p->config.token[0], p->config.token[1]},
        .page_bytes = kv_pool_page_bytes(p->config.pool),
        .n_pages = c->n_pages,
        .n_layers = c->n_layers,
        .kv_width = c->kv_width,
        .dtype_bytes = c->dtype_bytes,
    };
    TRY(write_until(p, *fd, &hello, sizeof(hello), deadline_us));
    struct welcome welcome;
    TRY(read_until(p, *fd, &welcome, sizeof(welcome), deadline_us));
    if (welcome.magic != STREAM_MAGIC || welcome.code != ERR_OK)
        return err_set(ERR_PROTO, "the receiver refused our KV geometry");
    return ERR_OK;
}

/* ---- receiving end ---- */

static enum err receive_one(struct kv_pair *p, const struct kv_stream_kind *k, int fd,
                            const struct head *h, uint64_t seq, uint32_t n_peer_pages);
static enum err receive_aside(struct kv_pair *p, const struct kv_stream_kind *k, int fd,
                              const struct kv_post *x, uint32_t n_peer_pages);

enum err kv_stream_receive(struct kv_pair *p, const struct kv_stream_kind *k, int *listen_fd,
                           int *fd)
{
    uint32_t n_peer_pages = 0;
    enum err e = stream_accept(p, k, *listen_fd, fd, &n_peer_pages);
    kv_socket_close(listen_fd); // nobody else is expected
    if (e == ERR_OK && k->open)
        e = k->open(p, *fd, false);
    for (uint64_t seq = 0; e == ERR_OK; seq++) {
        struct head h;
        TRY(kv_stream_read(p, *fd, &h, sizeof(h)));
        e = receive_one(p, k, *fd, &h, seq, n_peer_pages);
        struct note done = {.seq = h.seq, .code = e, .kind = NOTE_DONE};
        if (e == ERR_OK) {
            kv_pair_finish(p, ERR_OK);
            e = kv_stream_write(p, *fd, &done, sizeof(done));
        } else if (e == ERR_PROTO) { // tell the sender if it still listens; we part anyway
            (void)!send(*fd, &done, sizeof(done), MSG_DONTWAIT | MSG_NOSIGNAL);
        }
    }
    return e;
}

/* Waits until seq is posted and brings its pages in. */
static enum err receive_one(struct kv_pair *p, const struct kv_stream_kind *k, int fd,
                            const struct head *h, uint64_t seq, uint32_t n_peer_pages)
{
    if (h->seq != seq || h->n_pages == 0 || h->n_pages > WIRE_MAX_PAGES || h->zero ||
        h->page_bytes != kv_pool_page_bytes(p->config.pool))
        return err_set(ERR_PROTO,
                       "transfer %" PRIu64 " of %u pages of %" PRIu64 " bytes where %" PRIu64
                       " was due",
                       h->seq, h->n_pages, h->page_bytes, seq);
    struct kv_post *x;
    while (!(x = kv_pair_next(p, NULL))) {
        short events; // POLLIN would be on all the time: the payload is waiting
        TRY(kv_pair_wait(p, fd, POLLRDHUP, 0, &events));
        if (events)
            return lost("waiting for a transfer to be posted", 0);
    }
    if (x->n_pages != h->n_pages)
        return err_set(ERR_PROTO, "transfer %" PRIu64 " has %u pages, %u were announced", seq,
                       h->n_pages, x->n_pages);
    switch (failpoint_pass("kv.recv")) {
    case FAILPOINT_ERROR:
        return err_set(ERR_PEER_LOST, "failpoint kv.recv");
    case FAILPOINT_DROP: // never acked, never done: until somebody loses patience
        for (short events = 0; !events;)
            TRY(kv_pair_wait(p, fd, POLLRDHUP, 0, &events));
        return lost("failpoint kv.recv", 0);
    case FAILPOINT_NONE:
        break;
    }
    return k->send ? receive_aside(p, k, fd, x, n_peer_pages) : k->receive(p, fd, x, n_peer_pages);
}

/* The content does not come over the socket: tells the sender that we are ready for it, and waits
 * for its word that everything was sent. */
static enum err receive_aside(struct kv_pair *p, const struct kv_stream_kind *k, int fd,
                              const struct kv_post *x, uint32_t n_peer_pages)
{
    struct note ready = {.seq = x->seq, .kind = NOTE_READY}, sent;
    TRY(kv_stream_write(p, fd, &ready, sizeof(ready)));
    TRY(k->receive(p, fd, x, n_peer_pages));
    TRY(kv_stream_read(p, fd, &sent, sizeof(sent)));
    if (sent.seq != x->seq || sent.code != ERR_OK || sent.kind != NOTE_SENT)
        return err_set(ERR_PROTO, "the sender speaks of transfer %" PRIu64 " during %" PRIu64,
                       sent.seq, x->seq);
    return ERR_OK;
}

/* Somebody who connected and has not shown the token yet. */
struct stranger {
    int fd;
    uint64_t deadline_us;
    size_t n_bytes;
    struct hello hello;
};

struct strangers {
    struct stranger s[MAX_STRANGERS]; // oldest first
    uint32_t n;
};

static void stranger_forget(struct strangers *all, uint32_t i)
{
    kv_socket_close(&all->s[i].fd);
    all->n--;
    memmove(&all->s[i], &all->s[i + 1], (all->n - i) * sizeof(all->s[0]));
}

/* Takes one connection in; the oldest stranger makes room. */
static enum err stranger_accept(struct strangers *all, const struct kv_stream_kind *k,
                                int listen_fd)
{
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        bool is_full = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
        if (!is_full)
            return ERR_OK; // it was gone again
        if (!all->n)
            return err_set(ERR_IO, "accept: %s", strerror(errno));
        stranger_forget(all, 0);
        return ERR_OK;
    }
    if (k->same_user && !is_same_user(fd)) {
        close(fd);
        return ERR_OK;
    }
    if (all->n == MAX_STRANGERS)
        stranger_forget(all, 0);
    all->s[all->n++] = (struct stranger){.fd = fd, .deadline_us = clock_now_us() + HANDSHAKE_US};
    return ERR_OK;
}

/* Takes as long for a wrong first byte as for a wrong last one. */
static bool is_token(const struct kv_pair *p, const struct hello *h)
{
    volatile uint64_t difference = h->token[0] ^ p->config.token[0];
    difference |= h->token[1] ^ p->config.token[1];
    return difference == 0;
}

/* Reads what a stranger says. False: not worth listening to any longer. */
static bool stranger_read(struct stranger *s)
{
    ssize_t got =
        recv(s->fd, (uint8_t *)&s->hello + s->n_bytes, sizeof(s->hello) - s->n_bytes, MSG_DONTWAIT);
    if (got <= 0)
        return got < 0 && would_wait();
    s->n_bytes += (size_t)got;
    return true;
}

static enum err geometry_check(const struct kv_pair *p, const struct hello *h)
{
    const struct kv_pool_config *c = kv_pool_get_config(p->config.pool);
    if (h->page_bytes != kv_pool_page_bytes(p->config.pool) || h->n_layers != c->n_layers ||
        h->kv_width != c->kv_width || h->dtype_bytes != c->dtype_bytes || h->n_pages == 0)
        return err_set(
            ERR_PROTO,
            "the sender's pages have %u layers x %u values x %u bytes, ours %u x %u x %u",
            h->n_layers, h->kv_width, h->dtype_bytes, c->n_layers, c->kv_width, c->dtype_bytes);
    return ERR_OK;
}

/* Finds the sender among the strangers; its descriptor moves to *fd. ERR_OK with *fd < 0: not yet.
 */
static enum err strangers_turn(struct strangers *all, struct kv_pair *p,
                               const struct kv_stream_kind *k, int listen_fd, int *fd,
                               uint32_t *ret_peer_pages)
{
    struct pollfd fds[2 + MAX_STRANGERS] = {{0}, {.fd = listen_fd, .events = POLLIN}};
    for (uint32_t i = 0; i < all->n; i++)
        fds[2 + i] = (struct pollfd){.fd = all->s[i].fd, .events = POLLIN};
    TRY(kv_pair_poll(p, fds, 2 + all->n, all->n ? all->s[0].deadline_us : 0));
    uint64_t now_us = clock_now_us();
    for (uint32_t i = all->n; i-- > 0;) { // downwards: forgetting moves only later ones
        struct stranger *s = &all->s[i];
        bool keep = now_us < s->deadline_us && (!fds[2 + i].revents || stranger_read(s));
        if (keep && s->n_bytes < sizeof(s->hello))
            continue;
        if (keep && s->hello.magic == STREAM_MAGIC && s->hello.version == STREAM_VERSION &&
            is_token(p, &s->hello)) {
            enum err e = geometry_check(p, &s->hello);
            struct welcome welcome = {.magic = STREAM_MAGIC, .code = e};
            // A fresh socket takes eight bytes at once or is broken.
            if (send(s->fd, &welcome, sizeof(welcome), MSG_DONTWAIT | MSG_NOSIGNAL) !=
                (ssize_t)sizeof(welcome))
                return lost("welcome", errno);
            TRY(e);
            *ret_peer_pages = s->hello.n_pages;
            *fd = s->fd;
            s->fd = -1;
        } else {
            log_warn("kv", "connection without the pair's token refused");
        }
        stranger_forget(all, i);
        if (*fd >= 0)
            return ERR_OK;
    }
    return fds[1].revents ? stranger_accept(all, k, listen_fd) : ERR_OK;
}

static enum err stream_accept(struct kv_pair *p, const struct kv_stream_kind *k, int listen_fd,
                              int *fd, uint32_t *ret_peer_pages)
{
    struct strangers all = {.n = 0};
    enum err e = ERR_OK;
    while (e == ERR_OK && *fd < 0)
        e = strangers_turn(&all, p, k, listen_fd, fd, ret_peer_pages);
    while (all.n)
        stranger_forget(&all, all.n - 1);
    if (e == ERR_OK && k->tune)
        k->tune(*fd);
    return e;
}
