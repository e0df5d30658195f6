/* link_test.c: hubs and lines over real sockets in one loop, waiting for events and never sleeping.
 *
 * A raw DEALER plays the peers that link.c itself would never be: one that skips numbers, sends
 * garbage, or starts in the middle.
 */
#include "common/base/link.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include "check.h"
#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/own.h"

#define EPOCH 77u

static const struct link_limits calm = {.dead_us = 20000000, .send_hwm = 100};

static uv_loop_t loop;
static char dir[64];
static int n_paths;

/* What a side heard. */
struct seen {
    int n_messages, n_lost;
    uint16_t type; // of the last message
    uint64_t seq, req_id;
    uint64_t peer, first_peer, lost_peer;
    int n_who;
    char why[64];
    struct link_hub *echo; // answers every message with PULSE
    struct link_hub *hub_to_destroy;
    struct link_line *line_to_destroy, *line_to_restart;
    bool in_order;
};

static void on_hub(void *user, uint64_t peer, enum link_event event, const struct wire_msg *m,
                   const char *text)
{
    struct seen *s = user;
    if (event == LINK_LOST) {
        s->n_lost++;
        s->lost_peer = peer;
        snprintf(s->why, sizeof(s->why), "%s", text);
        return;
    }
    if (s->n_messages && m->head.seq && m->head.seq != s->seq + 1)
        s->in_order = false;
    s->n_messages++;
    s->type = m->head.type;
    s->seq = m->head.seq;
    s->req_id = m->head.req_id;
    s->peer = peer;
    if (!s->first_peer)
        s->first_peer = peer;
    if (s->echo) {
        struct wire_buf b = {0};
        wire_begin(&b, WIRE_PULSE, 0, 0);
        CHECK_OK(wire_end(&b));
        CHECK_OK(link_hub_send(s->echo, peer, &b));
        wire_buf_finish(&b);
    }
    if (s->hub_to_destroy)
        link_hub_destroy(take(&s->hub_to_destroy));
}

static void on_line(void *user, enum link_event event, const struct wire_msg *m, const char *text)
{
    struct seen *s = user;
    if (event == LINK_LOST) {
        s->n_lost++;
        snprintf(s->why, sizeof(s->why), "%s", text);
    } else {
        s->n_messages++;
        s->type = m->head.type;
        s->seq = m->head.seq;
        s->n_who += m->head.type == WIRE_WHO;
    }
    if (s->line_to_destroy)
        link_line_destroy(take(&s->line_to_destroy));
    if (s->line_to_restart)
        CHECK_OK(link_line_restart(take(&s->line_to_restart)));
}

/* ---- the loop -------------------------------------------------------------------------------- */

static void on_watchdog(uv_timer_t *t) { *(bool *)t->data = true; }
static void on_nothing(uv_handle_t *h) {}

/* Runs the loop until cond; fails after a generous time. WAIT_RAW is for what a raw socket hears:
 * it is not in the loop, so the loop may not block. */
#define WAIT(cond)     WAIT_IN(cond, UV_RUN_ONCE)
#define WAIT_RAW(cond) WAIT_IN(cond, UV_RUN_NOWAIT)
#define WAIT_IN(cond, mode)                                                                        \
    do {                                                                                           \
        bool late_ = false;                                                                        \
        uv_timer_t t_;                                                                             \
        uv_timer_init(&loop, &t_);                                                                 \
        t_.data = &late_;                                                                          \
        uv_timer_start(&t_, on_watchdog, 15000, 0);                                                \
        while (!(cond) && !late_)                                                                  \
            uv_run(&loop, mode);                                                                   \
        if (late_)                                                                                 \
            fprintf(stderr, "%s:%d: waited in vain\n", __FILE__, __LINE__);                        \
        CHECK(!late_);                                                                             \
        uv_close((uv_handle_t *)&t_, on_nothing);                                                  \
        uv_run(&loop, UV_RUN_NOWAIT);                                                              \
    } while (0)

/* Until every handle has closed. */
static void drain_loop(void)
{
    while (uv_loop_alive(&loop))
        uv_run(&loop, UV_RUN_ONCE);
}

static const char *new_path(char ret[128])
{
    snprintf(ret, 128, "ipc://%s/%d", dir, n_paths++);
    return ret;
}

static struct link_hub *hub_open(const char *endpoint, struct link_limits limits, struct seen *s)
{
    struct link_hub *hub = NULL;
    *s = (struct seen){.in_order = true};
    CHECK_OK(link_hub_create(&loop, endpoint, limits, on_hub, s, &hub));
    REQUIRE(hub);
    link_hub_set_epoch(hub, EPOCH);
    return hub;
}

static struct link_line *line_open(const char *endpoint, uint64_t instance,
                                   struct link_limits limits, struct seen *s)
{
    struct link_line *line = NULL;
    *s = (struct seen){.in_order = true};
    CHECK_OK(link_line_create(&loop, endpoint, WIRE_DECODE, instance, limits, on_line, s, &line));
    REQUIRE(line);
    link_line_set_epoch(line, EPOCH);
    return line;
}

static void build(struct wire_buf *b, enum wire_type type, uint64_t req_id)
{
    void *body = wire_begin(b, type, req_id, 0);
    REQUIRE(body);
    if (type == WIRE_HELLO)
        ((struct wire_hello *)body)->role = WIRE_DECODE;
    CHECK_OK(wire_end(b));
}

static void say(struct link_line *line, enum wire_type type, uint64_t req_id)
{
    struct wire_buf b = {0};
    build(&b, type, req_id);
    CHECK_OK(link_line_send(line, &b));
    wire_buf_finish(&b);
}

static void tell(struct link_hub *hub, uint64_t peer, enum wire_type type, uint64_t req_id)
{
    struct wire_buf b = {0};
    build(&b, type, req_id);
    CHECK_OK(link_hub_send(hub, peer, &b));
    wire_buf_finish(&b);
}

/* ---- a peer that does as it likes -------------------------------------------------------------
 */

struct raw {
    void *context, *socket;
};

static struct raw raw_open(const char *endpoint, uint64_t instance)
{
    struct raw r = {.context = zmq_ctx_new()};
    r.socket = zmq_socket(r.context, ZMQ_DEALER);
    uint64_t id[2] = {9, instance};
    zmq_setsockopt(r.socket, ZMQ_ROUTING_ID, id, sizeof(id));
    REQUIRE(zmq_connect(r.socket, endpoint) == 0);
    return r;
}

static void raw_close(struct raw *r)
{
    int linger = 0;
    zmq_setsockopt(r->socket, ZMQ_LINGER, &linger, sizeof(linger));
    zmq_close(r->socket);
    zmq_ctx_term(r->context);
}

static void raw_send(struct raw *r, enum wire_type type, uint64_t epoch, uint64_t seq)
{
    struct wire_buf b = {0};
    build(&b, type, 0);
    struct wire_head *h = (struct wire_head *)b.data;
    h->epoch = epoch;
    h->seq = seq;
    CHECK(zmq_send(r->socket, b.data, b.len, 0) >= 0);
    wire_buf_finish(&b);
}

/* The type of the next message it got, 0 when there is none yet. */
static uint16_t raw_heard(struct raw *r)
{
    struct wire_head h;
    int n = zmq_recv(r->socket, &h, sizeof(h), ZMQ_DONTWAIT);
    return n >= (int)sizeof(h) ? h.type : 0;
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void exchange(const char *endpoint)
{
    struct seen hs, ls;
    struct link_hub *hub = hub_open(endpoint, calm, &hs);
    struct link_line *line = line_open(link_hub_endpoint(hub), 1, calm, &ls);
    say(line, WIRE_HELLO, 0); // queued: the connection is not made yet
    WAIT(hs.n_messages == 1);
    CHECK_INT(hs.type, WIRE_HELLO);
    tell(hub, hs.peer, WIRE_WELCOME, 0);
    WAIT(ls.n_messages == 1);
    CHECK_INT(ls.type, WIRE_WELCOME);

    for (int i = 0; i < 90; i++)
        say(line, WIRE_BEAT, 0);
    for (int i = 0; i < 90; i++)
        tell(hub, hs.peer, WIRE_CANCEL, 5);
    WAIT(hs.n_messages == 91 && ls.n_messages == 91);
    CHECK(hs.in_order);
    CHECK_INT(hs.seq, 90);
    CHECK_INT(ls.seq, 90);
    CHECK_INT(hs.n_lost + ls.n_lost, 0);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void exchanges_over_ipc(void)
{
    char path[128];
    exchange(new_path(path));
}

static void exchanges_over_tcp_with_a_wildcard_port(void) { exchange("tcp://127.0.0.1:0"); }

static void ipc_sockets_are_private_and_live_ones_refused(void)
{
    char path[128];
    struct seen hs, other;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs), *second = NULL;
    struct stat st;
    REQUIRE(stat(path + 6, &st) == 0);
    CHECK_INT(st.st_mode & 077, 0);
    other = (struct seen){0};
    CHECK_INT(link_hub_create(&loop, path, calm, on_hub, &other, &second), ERR_IO);
    CHECK(strstr(err_text(ERR_IO), "another process"));
    link_hub_destroy(hub);
    drain_loop();
}

static void stale_ipc_sockets_are_replaced_and_files_kept(void)
{
    char path[128];
    new_path(path);
    uv_pipe_t p; // bound and not listening: connections are refused, as after a kill
    uv_pipe_init(&loop, &p, 0);
    REQUIRE(uv_pipe_bind(&p, path + 6) == 0);
    struct seen hs;
    struct link_hub *hub = hub_open(path, calm, &hs);
    struct link_line *line;
    struct seen ls;
    line = line_open(path, 3, calm, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    link_line_destroy(line);
    link_hub_destroy(hub);
    uv_close((uv_handle_t *)&p, NULL);
    drain_loop();

    new_path(path);
    int fd = open(path + 6, O_CREAT | O_WRONLY, 0600);
    close(fd);
    hub = NULL;
    CHECK_INT(link_hub_create(&loop, path, calm, on_hub, &hs, &hub), ERR_IO);
    CHECK(access(path + 6, F_OK) == 0);
    CHECK_INT(link_hub_create(&loop, "smoke://signals", calm, on_hub, &hs, &hub), ERR_IO);
    CHECK(!hub);
    drain_loop();
}

static void sending_to_a_closed_peer_fails_and_reports_once(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 4, calm, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    uint64_t peer = hs.peer;
    link_line_destroy(line);

    struct wire_buf b = {0};
    enum err e = ERR_OK;
    WAIT((build(&b, WIRE_PULSE, 0), e = link_hub_send(hub, peer, &b), e == ERR_PEER_LOST));
    WAIT(hs.n_lost == 1);
    CHECK(hs.lost_peer == peer);
    CHECK_STR(hs.why, "unreachable");
    CHECK_INT(link_hub_send(hub, peer, &b), ERR_PEER_LOST);
    CHECK_INT(link_hub_send(hub, 123456, &b), ERR_PEER_LOST);
    wire_buf_finish(&b);
    CHECK_INT(hs.n_lost, 1);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_closed_hub_is_noticed_by_its_lines(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 5, calm, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    tell(hub, hs.peer, WIRE_REFUSE, 0); // last words come before the loss
    link_hub_destroy(hub);
    WAIT(ls.n_lost == 1);
    CHECK_INT(ls.n_messages, 1);
    CHECK_INT(ls.type, WIRE_REFUSE);
    CHECK_STR(ls.why, "disconnected");
    struct wire_buf b = {0};
    build(&b, WIRE_PULSE, 0);
    CHECK_INT(link_line_send(line, &b), ERR_PEER_LOST);
    wire_buf_finish(&b);

    // A new hub of the same name: the line restarts and is a new peer there.
    CHECK(access(path + 6, F_OK) != 0);
    hub = hub_open(path, calm, &hs);
    CHECK_OK(link_line_restart(line));
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    CHECK_INT(hs.type, WIRE_HELLO);
    tell(hub, hs.peer, WIRE_WELCOME, 0);
    WAIT(ls.n_messages == 2);
    CHECK_INT(ls.type, WIRE_WELCOME);
    CHECK_INT(ls.n_lost, 1);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_line_that_keeps_talking_is_asked_who_by_a_new_hub(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 6, calm, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    link_hub_destroy(hub);
    WAIT(ls.n_lost == 1);
    hub = hub_open(path, calm, &hs);
    ls.line_to_restart = line; // as a worker does when asked
    struct wire_buf b = {0};
    WAIT((build(&b, WIRE_BEAT, 0), link_line_send(line, &b) == ERR_OK)); // reconnected by itself
    wire_buf_finish(&b);
    WAIT(ls.n_who == 1);
    CHECK_INT(hs.n_messages, 0);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    CHECK_INT(hs.type, WIRE_HELLO);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void silence_is_noticed_on_both_sides(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_limits brief = {.dead_us = 100000, .send_hwm = 100};
    struct link_hub *hub = hub_open(new_path(path), brief, &hs);
    struct link_line *line = line_open(path, 7, brief, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_lost == 1 && ls.n_lost == 1);
    CHECK_STR(hs.why, "silent");
    CHECK_STR(ls.why, "silent");
    CHECK(hs.lost_peer == hs.first_peer);
    CHECK_OK(link_line_restart(line));
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 2);
    CHECK(hs.peer != hs.first_peer); // handles are never used again
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_sequence_gap_loses_the_peer(void)
{
    char path[128];
    struct seen hs;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct raw raw = raw_open(path, 8);
    raw_send(&raw, WIRE_HELLO, 0, 0);
    raw_send(&raw, WIRE_BEAT, EPOCH, 1);
    raw_send(&raw, WIRE_BEAT, EPOCH, 3);
    raw_send(&raw, WIRE_BEAT, EPOCH, 4);
    WAIT(hs.n_lost == 1);
    CHECK_STR(hs.why, "sequence gap");
    CHECK_INT(hs.n_messages, 2);
    raw_send(&raw, WIRE_BEAT, EPOCH, 5);
    uint16_t heard = 0;
    WAIT_RAW((heard = raw_heard(&raw)) != 0);
    CHECK_INT(heard, WIRE_WHO);
    raw_send(&raw, WIRE_HELLO, 0, 0); // it starts over, and is somebody new
    WAIT(hs.n_messages == 3);
    CHECK(hs.peer != hs.first_peer);
    CHECK_INT(hs.n_lost, 1);
    raw_close(&raw);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_dropped_message_is_a_gap_for_the_line_too(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 9, calm, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    tell(hub, hs.peer, WIRE_WELCOME, 0);
    CHECK_OK(failpoint_set("link.send=drop"));
    tell(hub, hs.peer, WIRE_PULSE, 0);
    CHECK_OK(failpoint_set("link.send=off"));
    tell(hub, hs.peer, WIRE_PULSE, 0);
    WAIT(ls.n_lost == 1);
    CHECK_STR(ls.why, "sequence gap");
    CHECK_INT(ls.n_messages, 1);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void stale_epochs_are_counted_and_dropped(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 10, calm, &ls);
    link_line_set_epoch(line, EPOCH - 1);
    say(line, WIRE_HELLO, 0);
    say(line, WIRE_BEAT, 0);  // stale
    say(line, WIRE_PULSE, 0); // has no use for an epoch
    WAIT(hs.n_messages == 2);
    CHECK_INT(hs.type, WIRE_PULSE);
    CHECK_INT(link_hub_stale(hub), 1);
    tell(hub, hs.peer, WIRE_CANCEL, 4);
    tell(hub, hs.peer, WIRE_WELCOME, 0); // it is what brings the epoch
    WAIT(ls.n_messages == 1);
    CHECK_INT(ls.type, WIRE_WELCOME);
    CHECK_INT(link_line_stale(line), 1);
    CHECK_INT(hs.n_lost + ls.n_lost, 0);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void strangers_in_mid_sentence_are_asked_who_at_a_bounded_rate(void)
{
    char path[128];
    struct seen hs;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct raw raw = raw_open(path, 11);
    uint64_t began = clock_now_us();
    for (uint64_t i = 0; i < 200; i++)
        raw_send(&raw, WIRE_BEAT, EPOCH, 40 + i);
    raw_send(&raw, WIRE_HELLO, 0, 0);
    WAIT(hs.n_messages == 1);
    uint64_t took = clock_now_us() - began;
    CHECK_INT(hs.type, WIRE_HELLO);
    tell(hub, hs.peer, WIRE_PULSE, 0);
    int n_who = 0;
    for (uint16_t heard = 0; heard != WIRE_PULSE; n_who += heard == WIRE_WHO)
        WAIT_RAW((heard = raw_heard(&raw)) != 0);
    CHECK(n_who >= 1);
    CHECK(n_who <= 1 + (int)(took / 100000));
    raw_close(&raw);
    link_hub_destroy(hub);
    drain_loop();
}

static void ten_bad_frames_lose_a_peer_and_strangers_are_only_counted(void)
{
    char path[128];
    struct seen hs;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct raw raw = raw_open(path, 12);
    zmq_send(raw.socket, "hello?", 6, 0);
    raw_send(&raw, WIRE_HELLO, 0, 0);
    WAIT(hs.n_messages == 1);
    CHECK_INT(link_hub_bad(hub), 1);
    for (int i = 0; i < 9; i++)
        zmq_send(raw.socket, "junk", 4, 0);
    raw_send(&raw, WIRE_BEAT, EPOCH, 10); // each bad frame took a number
    WAIT(hs.n_messages == 2);
    CHECK_INT(hs.n_lost, 0);
    zmq_send(raw.socket, "junk", 4, ZMQ_SNDMORE); // more frames than one: bad, belongs to nobody
    zmq_send(raw.socket, "junk", 4, 0);
    zmq_send(raw.socket, "junk", 4, 0);
    WAIT(hs.n_lost == 1);
    CHECK_STR(hs.why, "bad frames");
    CHECK_INT(link_hub_bad(hub), 12);
    raw_close(&raw);
    link_hub_destroy(hub);
    drain_loop();
}

static void oversize_messages_are_refused(void)
{
    char path[128];
    struct seen hs;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct raw raw = raw_open(path, 13);
    raw_send(&raw, WIRE_HELLO, 0, 0);
    WAIT(hs.n_messages == 1);
    size_t n = WIRE_MAX_BYTES + 1;
    OWNED_MEM char *big = calloc(1, n);
    CHECK(zmq_send(raw.socket, big, n, 0) >= 0);
    raw_send(&raw, WIRE_BEAT, EPOCH, 2); // arrives after the reconnect, or is asked who it is
    WAIT(hs.n_lost == 1);
    CHECK_STR(hs.why, "sequence gap");
    CHECK_INT(hs.n_messages, 1);
    raw_close(&raw);

    struct link_line *line; // our own side cannot even build one
    struct seen ls;
    line = line_open(path, 14, calm, &ls);
    struct wire_buf b = {0};
    wire_begin(&b, WIRE_GRANT, 1, 0);
    wire_put(&b, big, WIRE_MAX_BYTES);
    CHECK_INT(wire_end(&b), ERR_TOO_LARGE);
    wire_buf_finish(&b);

    // The largest that is allowed passes, though nobody would send it: the decoder says so.
    OWNED_MEM int32_t *ids = calloc(WIRE_MAX_PROMPT, sizeof(*ids));
    struct wire_submit *body = wire_begin(&b, WIRE_SUBMIT, 1, 0);
    body->n_prompt = body->n_ids = WIRE_MAX_PROMPT;
    body->sampling = (struct wire_sampling){
        .top_p = 1, .repetition_penalty = 1, .n_logprobs = -1, .max_tokens = 1};
    wire_put(&b, ids, WIRE_MAX_PROMPT * sizeof(*ids));
    CHECK_OK(wire_end(&b));
    say(line, WIRE_HELLO, 0);
    CHECK_OK(link_line_send(line, &b));
    wire_buf_finish(&b);
    WAIT(hs.n_messages == 3);
    CHECK_INT(hs.type, WIRE_SUBMIT);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_restarted_line_supersedes_its_old_self(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 15, calm, &ls);
    for (int round = 1; round <= 20; round++) {
        uint64_t before = hs.peer;
        int heard = ls.n_messages;
        say(line, WIRE_HELLO, 0);
        WAIT(hs.n_messages == 2 * round - 1);
        CHECK_INT(hs.seq, 0);
        CHECK(hs.peer != before);
        CHECK_INT(hs.n_lost, round - 1);
        tell(hub, hs.peer, WIRE_WELCOME, 0);
        say(line, WIRE_PULSE, 0);
        WAIT(ls.n_messages == heard + 1 && hs.n_messages == 2 * round);
        CHECK_INT(ls.type, WIRE_WELCOME);
        CHECK_INT(ls.seq, 0);
        tell(hub, hs.peer, WIRE_PULSE, 0); // may arrive, or die with the old socket
        heard = ls.n_messages;
        CHECK_OK(link_line_restart(line));
    }
    CHECK_STR(hs.why, "started over");
    CHECK_INT(ls.n_lost, 0);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_forgotten_peer_is_not_lost_but_asked_who(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 16, calm, &ls);
    say(line, WIRE_HELLO, 0);
    WAIT(hs.n_messages == 1);
    link_hub_forget(hub, hs.peer);
    link_hub_forget(hub, hs.peer);
    say(line, WIRE_PULSE, 0);
    WAIT(ls.n_who == 1);
    CHECK_INT(hs.n_lost, 0);
    CHECK_INT(hs.n_messages, 1);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void a_flood_starves_neither_timers_nor_other_peers(void)
{
    char path[128];
    struct seen hs, ls;
    struct link_limits deep = {.dead_us = 20000000, .send_hwm = 100000};
    struct link_hub *hub = hub_open(new_path(path), deep, &hs);
    struct link_line *line = line_open(path, 17, deep, &ls);
    say(line, WIRE_HELLO, 0);
    for (int i = 0; i < 20000; i++)
        say(line, WIRE_BEAT, 0);
    int turns = 0;
    while (hs.n_messages < 20001 && turns < 2000000) {
        int before = hs.n_messages;
        uv_run(&loop, UV_RUN_ONCE);
        CHECK(hs.n_messages - before <= 128); // a turn is bounded: prepare, and a timer's look
        turns++;
    }
    CHECK_INT(hs.n_messages, 20001);
    CHECK(turns > 100);
    CHECK(hs.in_order);
    link_line_destroy(line);
    link_hub_destroy(hub);
    drain_loop();
}

static void callbacks_may_send_restart_and_destroy(void)
{
    char path[128];
    struct seen hs, ls, ls2;
    struct link_hub *hub = hub_open(new_path(path), calm, &hs);
    struct link_line *line = line_open(path, 18, calm, &ls);
    struct link_line *second = line_open(path, 19, calm, &ls2);
    hs.echo = hub;
    ls.line_to_restart = line;
    say(line, WIRE_HELLO, 0);
    WAIT(ls.n_messages == 1);
    CHECK(!ls.line_to_restart);
    ls.line_to_destroy = line;
    say(line, WIRE_HELLO, 0);
    WAIT(!ls.line_to_destroy);
    hs.echo = NULL;
    hs.hub_to_destroy = hub;
    for (int i = 0; i < 5; i++)
        say(second, i ? WIRE_PULSE : WIRE_HELLO, 0);
    int before = hs.n_messages;
    WAIT(!hs.hub_to_destroy);
    WAIT(ls2.n_lost == 1);
    CHECK_INT(hs.n_messages, before + 1);
    link_line_destroy(second);
    drain_loop();
}

static void a_full_queue_is_busy(void)
{
    char path[128];
    struct seen ls;
    struct link_limits small = {.dead_us = 0, .send_hwm = 4};
    struct link_line *line = line_open(new_path(path), 20, small, &ls); // nobody is there
    struct wire_buf b = {0};
    build(&b, WIRE_PULSE, 0);
    enum err e = ERR_OK;
    int n = 0;
    while (n < 100 && (e = link_line_send(line, &b)) == ERR_OK)
        n++;
    CHECK_INT(e, ERR_BUSY);
    CHECK_INT(n, 4);
    wire_buf_finish(&b);
    link_line_destroy(line);
    link_line_destroy(NULL);
    link_hub_destroy(NULL);
    drain_loop();
}

int main(void)
{
    snprintf(dir, sizeof(dir), "/tmp/baton-link-XXXXXX");
    REQUIRE(mkdtemp(dir));
    REQUIRE(uv_loop_init(&loop) == 0);
    RUN(exchanges_over_ipc);
    RUN(exchanges_over_tcp_with_a_wildcard_port);
    RUN(ipc_sockets_are_private_and_live_ones_refused);
    RUN(stale_ipc_sockets_are_replaced_and_files_kept);
    RUN(sending_to_a_closed_peer_fails_and_reports_once);
    RUN(a_closed_hub_is_noticed_by_its_lines);
    RUN(a_line_that_keeps_talking_is_asked_who_by_a_new_hub);
    RUN(silence_is_noticed_on_both_sides);
    RUN(a_sequence_gap_loses_the_peer);
    RUN(a_dropped_message_is_a_gap_for_the_line_too);
    RUN(stale_epochs_are_counted_and_dropped);
    RUN(strangers_in_mid_sentence_are_asked_who_at_a_bounded_rate);
    RUN(ten_bad_frames_lose_a_peer_and_strangers_are_only_counted);
    RUN(oversize_messages_are_refused);
    RUN(a_restarted_line_supersedes_its_old_self);
    RUN(a_forgotten_peer_is_not_lost_but_asked_who);
    RUN(a_flood_starves_neither_timers_nor_other_peers);
    RUN(callbacks_may_send_restart_and_destroy);
    RUN(a_full_queue_is_busy);
    CHECK_INT(uv_loop_close(&loop), 0);
    char command[96];
    snprintf(command, sizeof(command), "rm -rf %s", dir);
    CHECK_INT(system(command), 0);
    return check_done();
}
