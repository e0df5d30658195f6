/* link.c: ROUTER and DEALER sockets pumped by a libuv loop.
 *
 * ZeroMQ's descriptor is a doorbell, not a queue: it rings once when the mailbox goes from empty to
 * full, and any call on the socket, a send included, may swallow the ring. So the descriptor only
 * wakes the loop. Before every sleep a prepare handle asks the socket itself, and starts an idle
 * handle (which keeps the loop from sleeping) if there is work. The work is done after the sleep,
 * in a check handle, so that uv_run(UV_RUN_ONCE) returns when something happened. One look handles
 * a bounded number of messages, so that a flooding peer cannot starve the timers.
 *
 * A link's life, seen from the line (the hub's side mirrors it per peer):
 *
 *   NEW -first message numbered 0-> SYNCED -gap, bad frames, silence, cut-> LOST -restart-> NEW
 *
 * 1. Nothing is delivered from a link that is not SYNCED, except WHO (and, on a hub, the message
 *    that makes a peer). What arrives in NEW was meant for the previous life of this line.
 * 2. LOST is reported once per life, always from the loop, never from inside a call.
 * 3. A callback may send, forget, restart or destroy: after each one, `closed` is looked at first
 *    and the peer is looked up again by handle.
 *
 * ZMQ_IMMEDIATE stays off: a line queues HELLO while the hub is still starting. What that would
 * replay to a restarted hub is numbered, so the hub drops it and asks WHO.
 */
#include "common/base/link.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "common/base/clock.h"
#include "common/base/curve.h"
#include "common/base/failpoint.h"
#include "common/base/own.h"

#define PUMP_MESSAGES     64         /* per look at a socket */
#define PUMP_BYTES        (4u << 20) /* likewise */
#define MAX_PEERS         1024u
#define MAX_BAD           10u
#define WHO_INTERVAL_US   100000u
#define N_WHO_SLOTS       64u
#define HEARTBEAT_MS      500
#define HEARTBEAT_DEAD_MS 1500
#define LINGER_MS         100     /* lets a queued BYE out */
#define KEY_MARK          "?key=" /* in an announced endpoint, before the hub's public key */

/* ---- the process's ZeroMQ context ------------------------------------------------------------ */

static pthread_mutex_t context_lock = PTHREAD_MUTEX_INITIALIZER;
static void *context;
static pid_t context_pid;
static int n_sockets; // open ones

/* Without this, exit would drop what lingers. With sockets still open it would wait for ever. */
static void context_flush(void)
{
    pthread_mutex_lock(&context_lock);
    if (context && n_sockets == 0 && context_pid == getpid()) {
        zmq_ctx_term(context);
        context = NULL;
    }
    pthread_mutex_unlock(&context_lock);
}

static void *socket_open(int type)
{
    pthread_mutex_lock(&context_lock);
    if (!context) {
        context = zmq_ctx_new();
        context_pid = getpid();
        static bool registered;
        if (context && !registered)
            registered = atexit(context_flush) == 0;
    }
    void *s = context ? zmq_socket(context, type) : NULL;
    n_sockets += s != NULL;
    pthread_mutex_unlock(&context_lock);
    return s;
}

static void socket_close(void *s, int linger_ms)
{
    if (!s)
        return;
    zmq_setsockopt(s, ZMQ_LINGER, &linger_ms, sizeof(linger_ms));
    zmq_close(s);
    pthread_mutex_lock(&context_lock);
    n_sockets--;
    pthread_mutex_unlock(&context_lock);
}

static int socket_option(void *s, int name, int value)
{
    return zmq_setsockopt(s, name, &value, sizeof(value));
}

static enum err socket_set_up(void *s, struct link_limits limits)
{
    int64_t max_bytes = WIRE_MAX_BYTES;
    int hwm = limits.send_hwm > 0 ? limits.send_hwm : 1000;
    int rc = zmq_setsockopt(s, ZMQ_MAXMSGSIZE, &max_bytes, sizeof(max_bytes));
    rc |= socket_option(s, ZMQ_LINGER, 0);
    rc |= socket_option(s, ZMQ_SNDHWM, hwm);
    rc |= socket_option(s, ZMQ_RCVHWM, hwm);
    rc |= socket_option(s, ZMQ_HEARTBEAT_IVL, HEARTBEAT_MS);
    rc |= socket_option(s, ZMQ_HEARTBEAT_TIMEOUT, HEARTBEAT_DEAD_MS);
    rc |= socket_option(s, ZMQ_HEARTBEAT_TTL, HEARTBEAT_DEAD_MS);
    rc |= socket_option(s, ZMQ_RECONNECT_IVL, 50);
    rc |= socket_option(s, ZMQ_RECONNECT_IVL_MAX, 500);
    if (rc)
        return err_set(ERR_IO, "ZeroMQ refused a socket option: %s", zmq_strerror(zmq_errno()));
    return ERR_OK;
}

static bool socket_readable(void *s)
{
    int events = 0;
    size_t n = sizeof(events);
    return zmq_getsockopt(s, ZMQ_EVENTS, &events, &n) == 0 && events & ZMQ_POLLIN;
}

/* ---- pump: what hub and line share ----------------------------------------------------------- */

struct pump {
    uv_loop_t *loop;
    void *socket;
    uv_poll_t *poll; // on the socket's doorbell; owns itself
    uv_prepare_t prepare;
    uv_idle_t idle;
    uv_check_t check;
    uv_timer_t timer;
    int n_handles; // of the four above, until their close callbacks ran
    bool closed;

    bool silence_due;    // the timer fired
    uint64_t checked_us; // when silence was last checked
    uint64_t dead_us;

    uint8_t *scratch; // 8-byte aligned copy of a frame that ZeroMQ placed elsewhere
    size_t scratch_bytes;

    bool (*pending)(struct pump *p); // is there something to look at?
    void (*look)(struct pump *p);
    void (*check_silence)(struct pump *p, uint64_t now, bool stalled);
};

static void on_self_owned_close(uv_handle_t *h) { free(h); }

static void on_ring(uv_poll_t *poll, int status, int events)
{
    // Waking the loop was all: check comes next.
}

static uv_poll_t *doorbell_open(uv_loop_t *loop, void *socket)
{
    int fd;
    size_t n = sizeof(fd);
    if (zmq_getsockopt(socket, ZMQ_FD, &fd, &n))
        return NULL;
    uv_poll_t *poll = calloc(1, sizeof(*poll));
    if (!poll)
        return NULL;
    if (uv_poll_init(loop, poll, fd)) {
        free(poll);
        return NULL;
    }
    uv_poll_start(poll, UV_READABLE, on_ring);
    return poll;
}

static void doorbell_close(uv_poll_t *poll)
{
    if (poll)
        uv_close((uv_handle_t *)poll, on_self_owned_close);
}

static void on_idle(uv_idle_t *idle)
{
    // Its being active keeps the loop from sleeping.
}

/* Also after a send that other code makes between our prepare and the sleep: it may have swallowed
 * a ring. */
static void pump_stay_awake(struct pump *p)
{
    if (!p->closed)
        uv_idle_start(&p->idle, on_idle);
}

static void on_prepare(uv_prepare_t *prepare)
{
    struct pump *p = prepare->data;
    if (p->silence_due || p->pending(p))
        pump_stay_awake(p);
    else
        uv_idle_stop(&p->idle);
}

static void on_check(uv_check_t *check)
{
    struct pump *p = check->data;
    p->look(p); // before calling anyone silent, hear what already arrived
    if (p->closed || !p->silence_due)
        return;
    p->silence_due = false;
    uint64_t now = clock_now_us();
    bool stalled = now - p->checked_us > p->dead_us / 2; // it was us who were away
    p->checked_us = now;
    p->check_silence(p, now, stalled);
}

static void on_timer(uv_timer_t *timer)
{
    struct pump *p = timer->data;
    p->silence_due = true;
}

static void pump_start(struct pump *p, uv_loop_t *loop, struct link_limits limits)
{
    p->loop = loop;
    p->dead_us = limits.dead_us;
    p->checked_us = clock_now_us();
    uv_prepare_init(loop, &p->prepare);
    uv_idle_init(loop, &p->idle);
    uv_check_init(loop, &p->check);
    uv_timer_init(loop, &p->timer);
    p->n_handles = 4;
    p->prepare.data = p->idle.data = p->check.data = p->timer.data = p;
    uv_prepare_start(&p->prepare, on_prepare);
    uv_check_start(&p->check, on_check);
    if (p->dead_us) {
        uint64_t ms = MAX(p->dead_us / 8000u, 5u);
        uv_timer_start(&p->timer, on_timer, ms, ms);
    }
}

static void on_pump_handle_close(uv_handle_t *h)
{
    struct pump *p = h->data;
    if (--p->n_handles)
        return;
    free(p->scratch);
    free(p); // hub and line have it as their first member
}

/* Ends in freeing the object that p is the first member of, at the latest when the loop ran. */
static void pump_close(struct pump *p)
{
    p->closed = true;
    doorbell_close(p->poll);
    p->poll = NULL;
    socket_close(p->socket, LINGER_MS);
    p->socket = NULL;
    if (!p->n_handles) { // creation failed half-way
        free(p->scratch);
        free(p);
        return;
    }
    uv_close((uv_handle_t *)&p->prepare, on_pump_handle_close);
    uv_close((uv_handle_t *)&p->idle, on_pump_handle_close);
    uv_close((uv_handle_t *)&p->check, on_pump_handle_close);
    uv_close((uv_handle_t *)&p->timer, on_pump_handle_close);
}

/* Decodes a received frame, from a copy if ZeroMQ left it unaligned. Valid until the next one. */
static enum err pump_decode(struct pump *p, zmq_msg_t *frame, struct wire_msg *ret)
{
    const void *data = zmq_msg_data(frame);
    size_t n = zmq_msg_size(frame);
    if ((uintptr_t)data & 7) {
        if (n > p->scratch_bytes) {
            uint8_t *bigger = realloc(p->scratch, n);
            if (!bigger)
                return err_set(ERR_NOMEM, "no memory for a frame of %zu bytes", n);
            p->scratch = bigger;
            p->scratch_bytes = n;
        }
        memcpy(p->scratch, data, n);
        data = p->scratch;
    }
    return wire_decode(data, n, ret);
}

static void stamp(struct wire_buf *buf, uint64_t epoch, uint64_t seq)
{
    struct wire_head *h = (struct wire_head *)buf->data;
    h->epoch = h->type == WIRE_HELLO ? 0 : epoch;
    h->seq = seq;
}

static bool epoch_matters(uint16_t type)
{
    switch (type) {
    case WIRE_HELLO:
    case WIRE_WELCOME:
    case WIRE_REFUSE:
    case WIRE_WHO:
    case WIRE_JOIN:
    case WIRE_PULSE:
        return false;
    default:
        return true;
    }
}

/* Sends one frame. errno EHOSTUNREACH, EAGAIN or worse. */
static int frame_send(void *socket, const void *bytes, size_t n, int flags)
{
    return zmq_send(socket, bytes, n, ZMQ_DONTWAIT | flags) < 0 ? -1 : 0;
}

/* Drops the frames after the first of a message nobody should have sent. */
static void drop_rest(void *socket, zmq_msg_t *frame)
{
    while (zmq_msg_more(frame))
        if (zmq_msg_recv(frame, socket, ZMQ_DONTWAIT) < 0)
            return;
}

/* ---- endpoints ------------------------------------------------------------------------------- */

/* The file of an ipc endpoint; NULL for tcp and for abstract names. */
static const char *ipc_path(const char *endpoint)
{
    return !strncmp(endpoint, "ipc://", 6) && endpoint[6] && endpoint[6] != '@' &&
                   endpoint[6] != '*'
               ? endpoint + 6
               : NULL;
}

/* ZeroMQ would quietly take a live socket's name away from its owner. */
static enum err ipc_clear(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a.sun_path))
        return err_set(ERR_IO, "ipc://%s: path longer than %zu bytes", path,
                       sizeof(a.sun_path) - 1);
    strcpy(a.sun_path, path);
    struct stat st;
    if (lstat(path, &st))
        return ERR_OK;
    if (!S_ISSOCK(st.st_mode))
        return err_set(ERR_IO, "ipc://%s: exists and is not a socket", path);
    OWNED_FD fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_set(ERR_IO, "ipc://%s: %s", path, strerror(errno));
    if (connect(fd, (struct sockaddr *)&a, sizeof(a)) == 0 || errno != ECONNREFUSED)
        return err_set(ERR_IO, "ipc://%s: another process listens there", path);
    if (unlink(path) && errno != ENOENT)
        return err_set(ERR_IO, "ipc://%s: stale socket: %s", path, strerror(errno));
    return ERR_OK;
}

static enum err socket_bind(void *s, const char *endpoint)
{
    const char *path = ipc_path(endpoint);
    if (path)
        TRY(ipc_clear(path));
    mode_t old = umask(077);
    int rc = zmq_bind(s, endpoint);
    int why = zmq_errno();
    umask(old);
    if (rc)
        return err_set(ERR_IO, "cannot bind %s: %s", endpoint, zmq_strerror(why));
    return ERR_OK;
}

/* ---- hub ------------------------------------------------------------------------------------- */

struct peer {
    uint8_t id[LINK_ID_BYTES];
    uint64_t handle;
    uint64_t send_seq, recv_seq;
    uint64_t heard_us;
    uint32_t n_bad;
    const char *doom; // why it is lost; reported by the next look
};

struct link_hub {
    struct pump pump; // first: see pump_close
    link_hub_fn *fn;
    void *user;
    char endpoint[256];
    dev_t dev; // of an ipc endpoint's file, which ZeroMQ would leave behind
    ino_t ino;
    uint64_t epoch;
    uint64_t next_handle;
    struct peer *peers;
    size_t n_peers, cap_peers;
    size_t n_doomed;
    uint64_t n_stale, n_bad;
    uint64_t who_us[N_WHO_SLOTS]; // by hash of the id: when WHO was last sent
};

static struct peer *hub_find(struct link_hub *hub, uint64_t handle)
{
    for (size_t i = 0; i < hub->n_peers; i++)
        if (hub->peers[i].handle == handle)
            return &hub->peers[i];
    return NULL;
}

static struct peer *hub_find_id(struct link_hub *hub, const uint8_t *id)
{
    for (size_t i = 0; i < hub->n_peers; i++)
        if (!memcmp(hub->peers[i].id, id, LINK_ID_BYTES))
            return &hub->peers[i];
    return NULL;
}

static void hub_remove(struct link_hub *hub, struct peer *p)
{
    hub->n_doomed -= p->doom != NULL;
    *p = hub->peers[--hub->n_peers];
}

static void hub_doom(struct link_hub *hub, struct peer *p, const char *why)
{
    if (p->doom)
        return;
    p->doom = why;
    hub->n_doomed++;
    pump_stay_awake(&hub->pump);
}

static void hub_report_doomed(struct link_hub *hub)
{
    while (!hub->pump.closed && hub->n_doomed) {
        struct peer *p = hub->peers;
        while (!p->doom)
            p++;
        uint64_t handle = p->handle;
        const char *why = p->doom;
        hub_remove(hub, p);
        hub->fn(hub->user, handle, LINK_LOST, NULL, why);
    }
}

/* A new peer, or NULL when there are too many. */
static struct peer *hub_add(struct link_hub *hub, const uint8_t *id)
{
    if (hub->n_peers == MAX_PEERS)
        return NULL;
    if (hub->n_peers == hub->cap_peers) {
        size_t cap = hub->cap_peers ? hub->cap_peers * 2 : 16;
        struct peer *peers = realloc(hub->peers, cap * sizeof(*peers));
        if (!peers)
            return NULL;
        hub->peers = peers;
        hub->cap_peers = cap;
    }
    struct peer *p = &hub->peers[hub->n_peers++];
    *p = (struct peer){.handle = ++hub->next_handle};
    memcpy(p->id, id, LINK_ID_BYTES);
    return p;
}

/* WHO goes to ids without a peer, so it is numbered 0 and lines take it out of turn. */
static void hub_ask_who(struct link_hub *hub, const uint8_t *id)
{
    uint64_t h;
    memcpy(&h, id + LINK_ID_BYTES - sizeof(h), sizeof(h));
    uint64_t *last = &hub->who_us[(h ^ h >> 32) % N_WHO_SLOTS];
    uint64_t now = clock_now_us();
    if (*last && now - *last < WHO_INTERVAL_US)
        return;
    *last = now;

    struct wire_head who = {
        .magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = WIRE_WHO, .epoch = hub->epoch};
    if (frame_send(hub->pump.socket, id, LINK_ID_BYTES, ZMQ_SNDMORE) == 0)
        frame_send(hub->pump.socket, &who, sizeof(who), 0);
}

static void hub_take(struct link_hub *hub, const uint8_t *id, zmq_msg_t *frame)
{
    uint64_t role; // an id begins with it, see link_line_create
    memcpy(&role, id, sizeof(role));
    if (!curve_may(frame, role - 1)) {
        hub->n_bad++;
        return;
    }
    struct peer *p = hub_find_id(hub, id);
    struct wire_msg m;
    enum err e = pump_decode(&hub->pump, frame, &m);
    if (p)
        p->heard_us = clock_now_us();
    if (p && p->doom)
        return;
    if (e != ERR_OK) {
        hub->n_bad++;
        if (p) {
            p->recv_seq++; // it had a number, which cannot be trusted
            if (++p->n_bad == MAX_BAD)
                hub_doom(hub, p, "bad frames");
        }
        return;
    }
    if (m.head.type == WIRE_HELLO && !curve_may(frame, ((const struct wire_hello *)m.body)->role)) {
        hub->n_bad++;
        return;
    }

    bool starts_over = m.head.seq == 0 && (m.head.type == WIRE_HELLO || m.head.type == WIRE_JOIN);
    if (p && starts_over && p->recv_seq != 0) {
        hub_doom(hub, p, "started over");
        hub_report_doomed(hub);
        if (hub->pump.closed)
            return;
        p = hub_find_id(hub, id); // NULL
    }
    if (!p) {
        if (m.head.seq != 0) {
            hub_ask_who(hub, id);
            return;
        }
        p = hub_add(hub, id);
        if (!p)
            return;
        p->heard_us = clock_now_us();
    }
    if (m.head.seq != p->recv_seq) {
        hub_doom(hub, p, "sequence gap");
        return;
    }
    p->recv_seq++;
    if (m.head.epoch != hub->epoch && epoch_matters(m.head.type)) {
        hub->n_stale++;
        return;
    }
    if (failpoint_pass("link.recv") != FAILPOINT_NONE)
        return;
    hub->fn(hub->user, p->handle, LINK_MESSAGE, &m, NULL);
}

static bool hub_pending(struct pump *pump)
{
    return ((struct link_hub *)pump)->n_doomed || socket_readable(pump->socket);
}

static void hub_look(struct pump *pump)
{
    struct link_hub *hub = (struct link_hub *)pump;
    size_t bytes = 0;
    hub_report_doomed(hub);
    for (int i = 0; i < PUMP_MESSAGES && bytes < PUMP_BYTES; i++) {
        if (pump->closed)
            return;
        if (!socket_readable(pump->socket))
            break;
        zmq_msg_t id, frame;
        zmq_msg_init(&id);
        zmq_msg_init(&frame);
        if (zmq_msg_recv(&id, pump->socket, ZMQ_DONTWAIT) >= 0 && zmq_msg_more(&id) &&
            zmq_msg_recv(&frame, pump->socket, ZMQ_DONTWAIT) >= 0) {
            bytes += zmq_msg_size(&frame);
            if (zmq_msg_more(&frame)) {
                hub->n_bad++;
                drop_rest(pump->socket, &frame);
            } else if (zmq_msg_size(&id) == LINK_ID_BYTES) {
                // Another length: a stranger, or the rest of a connection that was superseded.
                hub_take(hub, zmq_msg_data(&id), &frame);
            }
        }
        zmq_msg_close(&id);
        zmq_msg_close(&frame);
    }
    hub_report_doomed(hub);
}

static void hub_check_silence(struct pump *pump, uint64_t now, bool stalled)
{
    struct link_hub *hub = (struct link_hub *)pump;
    for (size_t i = 0; i < hub->n_peers; i++) {
        struct peer *p = &hub->peers[i];
        if (stalled)
            p->heard_us = now;
        else if (now > p->heard_us && now - p->heard_us > pump->dead_us)
            hub_doom(hub, p, "silent");
    }
    hub_report_doomed(hub);
}

enum err link_hub_create(uv_loop_t *loop, const char *endpoint, struct link_limits limits,
                         link_hub_fn *fn, void *user, struct link_hub **ret)
{
    struct link_hub *hub = calloc(1, sizeof(*hub));
    if (!hub)
        return err_set(ERR_NOMEM, "no memory for a hub");
    struct pump *pump = &hub->pump;
    pump->pending = hub_pending;
    pump->look = hub_look;
    pump->check_silence = hub_check_silence;
    hub->fn = fn;
    hub->user = user;

    enum err e = ERR_OK;
    size_t n = sizeof(hub->endpoint);
    pump->socket = socket_open(ZMQ_ROUTER);
    if (!pump->socket)
        e = err_set(ERR_IO, "no ZeroMQ socket: %s", zmq_strerror(zmq_errno()));
    if (e == ERR_OK)
        e = socket_set_up(pump->socket, limits);
    if (e == ERR_OK && (socket_option(pump->socket, ZMQ_ROUTER_MANDATORY, 1) ||
                        socket_option(pump->socket, ZMQ_ROUTER_HANDOVER, 1)))
        e = err_set(ERR_IO, "ZeroMQ refused a router option: %s", zmq_strerror(zmq_errno()));
    char key[CURVE_KEY_CHARS + 1];
    if (e == ERR_OK)
        e = curve_guard_hub(context, pump->socket, endpoint, key);
    if (e == ERR_OK)
        e = socket_bind(pump->socket, endpoint);
    if (e == ERR_OK && zmq_getsockopt(pump->socket, ZMQ_LAST_ENDPOINT, hub->endpoint, &n))
        e = err_set(ERR_IO, "%s: no resolved endpoint", endpoint);
    if (e == ERR_OK && key[0])
        snprintf(hub->endpoint + n - 1, sizeof(hub->endpoint) - n + 1, KEY_MARK "%s", key);
    if (e == ERR_OK && !(pump->poll = doorbell_open(loop, pump->socket)))
        e = err_set(ERR_IO, "%s: cannot watch the socket", endpoint);
    if (e != ERR_OK) {
        pump_close(pump);
        return e;
    }
    struct stat st;
    if (ipc_path(endpoint) && !lstat(ipc_path(endpoint), &st)) {
        hub->dev = st.st_dev;
        hub->ino = st.st_ino;
    }
    pump_start(pump, loop, limits);
    *ret = hub;
    return ERR_OK;
}

const char *link_hub_endpoint(const struct link_hub *hub) { return hub->endpoint; }
void link_hub_set_epoch(struct link_hub *hub, uint64_t epoch) { hub->epoch = epoch; }
uint64_t link_hub_stale(const struct link_hub *hub) { return hub->n_stale; }
uint64_t link_hub_bad(const struct link_hub *hub) { return hub->n_bad; }

enum err link_hub_send(struct link_hub *hub, uint64_t peer, struct wire_buf *buf)
{
    struct peer *p = hub_find(hub, peer);
    if (!p || p->doom)
        return err_set(ERR_PEER_LOST, "the peer is gone%s%s", p ? ": " : "", p ? p->doom : "");
    switch (failpoint_pass("link.send")) {
    case FAILPOINT_ERROR:
        hub_doom(hub, p, "failpoint");
        return err_set(ERR_PEER_LOST, "the peer is gone: failpoint");
    case FAILPOINT_DROP:
        p->send_seq++;
        return ERR_OK;
    case FAILPOINT_NONE:
        break;
    }
    stamp(buf, hub->epoch, p->send_seq);
    pump_stay_awake(&hub->pump);
    if (frame_send(hub->pump.socket, p->id, LINK_ID_BYTES, ZMQ_SNDMORE) == 0 &&
        frame_send(hub->pump.socket, buf->data, buf->len, 0) == 0) {
        p->send_seq++;
        return ERR_OK;
    }
    int why = zmq_errno();
    if (why == EAGAIN)
        return err_set(ERR_BUSY, "the peer's send queue is full");
    hub_doom(hub, p, "unreachable");
    return err_set(ERR_PEER_LOST, "the peer is unreachable: %s", zmq_strerror(why));
}

void link_hub_forget(struct link_hub *hub, uint64_t peer)
{
    struct peer *p = hub_find(hub, peer);
    if (p)
        hub_remove(hub, p);
}

void link_hub_destroy(struct link_hub *hub)
{
    if (!hub)
        return;
    free(hub->peers);
    hub->peers = NULL;
    hub->n_peers = hub->n_doomed = 0;
    const char *path = ipc_path(hub->endpoint);
    struct stat st;
    if (path && !lstat(path, &st) && st.st_dev == hub->dev && st.st_ino == hub->ino)
        unlink(path);
    pump_close(&hub->pump);
}

/* ---- line ------------------------------------------------------------------------------------ */

struct link_line {
    struct pump pump; // first: see pump_close
    link_line_fn *fn;
    void *user;
    char endpoint[256];
    char key[CURVE_KEY_CHARS + 1]; // of the hub, where the endpoint brought it along
    uint8_t id[LINK_ID_BYTES];
    struct link_limits limits;
    void *monitor; // tells when the connection is made and cut
    uv_poll_t *monitor_poll;
    uint64_t epoch;
    uint64_t send_seq, recv_seq;
    uint64_t heard_us;
    uint64_t life; // counts restarts, so that a look knows that a callback restarted
    uint32_t n_bad;
    bool synced;       // heard number 0 in this life
    bool was_up, down; // connected before in this life; cut now
    const char *doom;  // LOST is due
    bool lost;         // LOST was reported in this life
    uint64_t n_stale;
};

static void line_doom(struct link_line *line, const char *why)
{
    if (line->lost || line->doom)
        return;
    line->doom = why;
    pump_stay_awake(&line->pump);
}

static void line_report_doom(struct link_line *line)
{
    if (line->pump.closed || !line->doom)
        return;
    const char *why = take(&line->doom);
    line->lost = true;
    line->fn(line->user, LINK_LOST, NULL, why);
}

static void line_take(struct link_line *line, zmq_msg_t *frame)
{
    struct wire_msg m;
    if (pump_decode(&line->pump, frame, &m) != ERR_OK) {
        line->recv_seq += line->synced;
        if (++line->n_bad >= MAX_BAD)
            line_doom(line, "bad frames");
        return;
    }
    if (m.head.type == WIRE_WHO) {
        if (line->synced && m.head.seq == line->recv_seq)
            line->recv_seq++;
        line->heard_us = clock_now_us();
        line->fn(line->user, LINK_MESSAGE, &m, NULL);
        return;
    }
    if (line->lost || line->doom)
        return;
    if (!line->synced && m.head.seq != 0)
        return; // meant for the previous life
    line->synced = true;
    line->heard_us = clock_now_us();
    if (m.head.seq != line->recv_seq) {
        line_doom(line, "sequence gap");
        return;
    }
    line->recv_seq++;
    if (m.head.epoch != line->epoch && epoch_matters(m.head.type)) {
        line->n_stale++;
        return;
    }
    if (failpoint_pass("link.recv") != FAILPOINT_NONE)
        return;
    line->fn(line->user, LINK_MESSAGE, &m, NULL);
}

/* Reads the monitor: 16-bit event and 32-bit value, then the address. */
static void line_look_at_monitor(struct link_line *line)
{
    while (socket_readable(line->monitor)) {
        zmq_msg_t frame;
        zmq_msg_init(&frame);
        uint16_t event = 0;
        if (zmq_msg_recv(&frame, line->monitor, ZMQ_DONTWAIT) >= 0) {
            if (zmq_msg_size(&frame) >= sizeof(event))
                memcpy(&event, zmq_msg_data(&frame), sizeof(event));
            drop_rest(line->monitor, &frame);
        }
        zmq_msg_close(&frame);
        if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
            line->was_up = true;
            line->down = false;
        } else if (event == ZMQ_EVENT_DISCONNECTED && line->was_up) {
            line->down = true;
            line_doom(line, "disconnected");
        }
    }
}

static bool line_pending(struct pump *pump)
{
    struct link_line *line = (struct link_line *)pump;
    return line->doom || socket_readable(pump->socket) || socket_readable(line->monitor);
}

static void line_look(struct pump *pump)
{
    struct link_line *line = (struct link_line *)pump;
    uint64_t life = line->life;
    size_t bytes = 0;
    for (int i = 0; i < PUMP_MESSAGES && bytes < PUMP_BYTES; i++) {
        if (!socket_readable(pump->socket))
            break;
        zmq_msg_t frame;
        zmq_msg_init(&frame);
        if (zmq_msg_recv(&frame, pump->socket, ZMQ_DONTWAIT) >= 0) {
            bytes += zmq_msg_size(&frame);
            if (zmq_msg_more(&frame)) {
                line->n_bad++;
                drop_rest(pump->socket, &frame);
            } else {
                line_take(line, &frame);
            }
        }
        zmq_msg_close(&frame);
        if (pump->closed || line->life != life)
            return;
    }
    if (socket_readable(pump->socket))
        return;
    // Only now the monitor: the hub's last words come before the news that it hung up.
    line_look_at_monitor(line);
    if (!socket_readable(pump->socket))
        line_report_doom(line);
}

static void line_check_silence(struct pump *pump, uint64_t now, bool stalled)
{
    struct link_line *line = (struct link_line *)pump;
    if (stalled)
        line->heard_us = now;
    else if (now > line->heard_us && now - line->heard_us > pump->dead_us)
        line_doom(line, "silent");
    line_report_doom(line);
}

static void line_close_sockets(struct link_line *line, int linger_ms)
{
    doorbell_close(line->pump.poll);
    doorbell_close(line->monitor_poll);
    line->pump.poll = line->monitor_poll = NULL;
    if (line->pump.socket && line->monitor)
        zmq_socket_monitor(line->pump.socket, NULL, 0);
    socket_close(line->pump.socket, linger_ms);
    socket_close(line->monitor, 0);
    line->pump.socket = line->monitor = NULL;
}

static enum err line_open_sockets(struct link_line *line)
{
    struct pump *pump = &line->pump;
    static uint64_t n_monitors; // names within the context
    char name[64];
    snprintf(name, sizeof(name), "inproc://line-monitor-%" PRIu64,
             __atomic_fetch_add(&n_monitors, 1, __ATOMIC_RELAXED));

    pump->socket = socket_open(ZMQ_DEALER);
    line->monitor = socket_open(ZMQ_PAIR);
    if (!pump->socket || !line->monitor)
        return err_set(ERR_IO, "no ZeroMQ socket: %s", zmq_strerror(zmq_errno()));
    TRY(socket_set_up(pump->socket, line->limits));
    TRY(curve_guard_line(pump->socket, line->endpoint, line->key));
    if (zmq_setsockopt(pump->socket, ZMQ_ROUTING_ID, line->id, LINK_ID_BYTES) ||
        zmq_socket_monitor(pump->socket, name,
                           ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED) ||
        zmq_connect(line->monitor, name) || zmq_connect(pump->socket, line->endpoint))
        return err_set(ERR_IO, "cannot connect to %s: %s", line->endpoint,
                       zmq_strerror(zmq_errno()));
    pump->poll = doorbell_open(pump->loop, pump->socket);
    line->monitor_poll = doorbell_open(pump->loop, line->monitor);
    if (!pump->poll || !line->monitor_poll)
        return err_set(ERR_IO, "%s: cannot watch the socket", line->endpoint);
    return ERR_OK;
}

/* A new life. Without sockets the line stays lost, and the next restart tries again. */
static enum err line_begin(struct link_line *line)
{
    line->life++;
    line->send_seq = line->recv_seq = 0;
    line->n_bad = 0;
    line->synced = line->was_up = line->down = line->lost = false;
    line->doom = NULL;
    line->heard_us = clock_now_us();
    return line_open_sockets(line);
}

enum err link_line_create(uv_loop_t *loop, const char *endpoint, enum wire_role role,
                          uint64_t instance, struct link_limits limits, link_line_fn *fn,
                          void *user, struct link_line **ret)
{
    struct link_line *line = calloc(1, sizeof(*line));
    if (!line)
        return err_set(ERR_NOMEM, "no memory for a line");
    line->pump.pending = line_pending;
    line->pump.look = line_look;
    line->pump.check_silence = line_check_silence;
    line->pump.loop = loop;
    line->fn = fn;
    line->user = user;
    line->limits = limits;
    // The role comes first and is never 0: ZeroMQ keeps ids that start with 0 for itself.
    uint64_t id[2] = {(uint64_t)role + 1, instance};
    memcpy(line->id, id, sizeof(line->id));

    enum err e = ERR_OK;
    if ((size_t)snprintf(line->endpoint, sizeof(line->endpoint), "%s", endpoint) >=
        sizeof(line->endpoint))
        e = err_set(ERR_INVALID, "endpoint longer than %zu bytes", sizeof(line->endpoint) - 1);
    char *mark = strstr(line->endpoint, KEY_MARK);
    if (mark) {
        snprintf(line->key, sizeof(line->key), "%s", mark + strlen(KEY_MARK));
        *mark = 0;
    }
    if (e == ERR_OK)
        e = line_begin(line);
    if (e != ERR_OK) {
        line_close_sockets(line, 0);
        pump_close(&line->pump);
        return e;
    }
    pump_start(&line->pump, loop, limits);
    *ret = line;
    return ERR_OK;
}

void link_line_set_epoch(struct link_line *line, uint64_t epoch) { line->epoch = epoch; }
uint64_t link_line_stale(const struct link_line *line) { return line->n_stale; }

enum err link_line_send(struct link_line *line, struct wire_buf *buf)
{
    if (line->down || !line->pump.socket)
        return err_set(ERR_PEER_LOST, "%s: disconnected", line->endpoint);
    switch (failpoint_pass("link.send")) {
    case FAILPOINT_ERROR:
        line_doom(line, "failpoint");
        return err_set(ERR_PEER_LOST, "%s: failpoint", line->endpoint);
    case FAILPOINT_DROP:
        line->send_seq++;
        return ERR_OK;
    case FAILPOINT_NONE:
        break;
    }
    stamp(buf, line->epoch, line->send_seq);
    pump_stay_awake(&line->pump);
    if (frame_send(line->pump.socket, buf->data, buf->len, 0) == 0) {
        line->send_seq++;
        return ERR_OK;
    }
    int why = zmq_errno();
    if (why == EAGAIN)
        return err_set(ERR_BUSY, "%s: the send queue is full", line->endpoint);
    line_doom(line, "unreachable");
    return err_set(ERR_PEER_LOST, "%s: %s", line->endpoint, zmq_strerror(why));
}

enum err link_line_restart(struct link_line *line)
{
    line_close_sockets(line, 0);
    pump_stay_awake(&line->pump);
    enum err e = line_begin(line);
    if (e != ERR_OK)
        line_close_sockets(line, 0);
    return e;
}

void link_line_destroy(struct link_line *line)
{
    if (!line)
        return;
    line_close_sockets(line, LINGER_MS);
    pump_close(&line->pump);
}
