/* curve_test.c: key files, and who gets through to a hub that has keys.
 *
 * Our own links use the process's pair, which is on the list as a decode worker and as the router.
 * Strangers are plain ZeroMQ sockets with keys of their own.
 */
#include "common/base/curve.h"

#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include "check.h"
#include "common/base/link.h"
#include "common/base/own.h"

static const struct link_limits calm = {.dead_us = 20000000, .send_hwm = 100};

static uv_loop_t loop;
static char dir[64];
static struct curve_pair own, prefill, stranger;

static const char *path(const char *name)
{
    static char ret[2][128];
    static int which;
    which = !which;
    snprintf(ret[which], sizeof ret[which], "%s/%s", dir, name);
    return ret[which];
}

static void put(const char *name, const char *text, mode_t mode)
{
    OWNED_FILE f = fopen(path(name), "w");
    REQUIRE(f);
    fputs(text, f);
    CHECK_INT(chmod(path(name), mode), 0);
}

static bool says(enum err e, const char *what) { return strstr(err_text(e), what) != NULL; }

/* ---- files ---- */

static void keygen_writes_private_files_that_load(void)
{
    struct stat st;
    struct curve_pair other;
    mode_t old = umask(0);
    CHECK_OK(curve_keygen(path("own"), &own));
    umask(old);
    CHECK_INT(stat(path("own"), &st), 0);
    CHECK_INT(st.st_mode & 0777, 0600);
    CHECK_INT(strlen(own.public_key), CURVE_KEY_CHARS);
    CHECK_INT(curve_keygen(path("own"), &other), ERR_IO); // never overwritten
    CHECK_OK(curve_keygen(path("other"), &other));
    CHECK(strcmp(own.secret_key, other.secret_key));
    char text[512];
    snprintf(text, sizeof text, "# who may\n\n decode  %s\r\nprefill\t%s\n", own.public_key,
             other.public_key);
    put("list", text, 0644);
    CHECK_OK(curve_load(path("own"), path("list"), false));
}

static void files_that_are_wrong_are_refused(void)
{
    CHECK_INT(curve_load(path("own"), "", false), ERR_INVALID);
    CHECK_INT(curve_load("", path("list"), false), ERR_INVALID);
    CHECK_INT(curve_load(path("none"), path("list"), false), ERR_NOT_FOUND);
    CHECK(says(ERR_NOT_FOUND, path("none")));
    CHECK_INT(chmod(path("own"), 0640), 0);
    CHECK_INT(curve_load(path("own"), path("list"), false), ERR_INVALID);
    CHECK(says(ERR_INVALID, "chmod 600"));
    CHECK_INT(chmod(path("own"), 0600), 0);
    put("bad", "decode short\n", 0644);
    CHECK_INT(curve_load(path("own"), path("bad"), false), ERR_INVALID);
    CHECK(says(ERR_INVALID, path("bad")) && says(ERR_INVALID, "line 1"));
    CHECK_INT(curve_load(dir, path("list"), false), ERR_INVALID); // a directory
}

/* As systemd and Kubernetes hand secrets to a service that is not root's. */
static void a_group_may_read_what_root_gave_it(void)
{
    const gid_t group = 65534;
    const uid_t nobody = 65534;
    if (geteuid() != 0)
        return;
    CHECK_INT(chown(path("own"), 0, group), 0);
    CHECK_INT(chmod(dir, 0755), 0);
    CHECK_INT(chmod(path("own"), 0440), 0);
    CHECK_INT(curve_load(path("own"), path("list"), false), ERR_INVALID); // we are root
    CHECK_INT(setegid(group), 0);
    CHECK_INT(seteuid(nobody), 0);
    CHECK_OK(curve_load(path("own"), path("list"), false));
    CHECK_INT(seteuid(0), 0);
    CHECK_INT(setegid(0), 0);
    CHECK_INT(chmod(path("own"), 0444), 0);
    CHECK_INT(seteuid(nobody), 0);
    CHECK_INT(curve_load(path("own"), path("list"), false), ERR_INVALID);
    CHECK_INT(seteuid(0), 0);
    CHECK_INT(chown(path("own"), 0, 0), 0);
    CHECK_INT(chmod(path("own"), 0600), 0);
}

static void pairs_are_parsed(void)
{
    char other[41], secret[41], text[512];
    struct curve_pair p;
    zmq_curve_keypair(other, secret);
    snprintf(text, sizeof text, "secret %s\npublic %s", own.secret_key, own.public_key);
    CHECK_OK(curve_parse_pair(text, strlen(text), &p));
    CHECK_STR(p.public_key, own.public_key);
    snprintf(text, sizeof text, "secret %s\npublic %s\n", own.secret_key, other);
    CHECK_INT(curve_parse_pair(text, strlen(text), &p), ERR_INVALID);
    CHECK(says(ERR_INVALID, "does not belong"));
    snprintf(text, sizeof text, "secret %s\nsecret %s\n", own.secret_key, secret);
    CHECK_INT(curve_parse_pair(text, strlen(text), &p), ERR_INVALID);
    CHECK(says(ERR_INVALID, "line 2"));
    static const char *const bad[] = {"", "\n#\n", "public", "private x", "secret ~~~~~~~~~~"};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        CHECK_INT(curve_parse_pair(bad[i], strlen(bad[i]), &p), ERR_INVALID);
}

static void lists_are_parsed(void)
{
    struct curve_list *l = NULL;
    char text[512];
    static const char *const bad[] = {"worker", "decode"};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        snprintf(text, sizeof text, "decode %s\n%s %s\n", own.public_key, bad[i], own.public_key);
        CHECK_INT(curve_parse_list(text, strlen(text), &l), ERR_INVALID); // no role; twice
        CHECK(says(ERR_INVALID, "line 2"));
    }
    CHECK_INT(curve_parse_list("# nobody\n", 9, &l), ERR_INVALID);
    CHECK(l == NULL);
}

/* ---- links ---- */

struct seen {
    int n_messages;
    uint64_t peer;
};

static void on_hub(void *user, uint64_t peer, enum link_event event, const struct wire_msg *m,
                   const char *text)
{
    struct seen *s = user;
    s->n_messages += event == LINK_MESSAGE;
    s->peer = peer;
}

static void on_line(void *user, enum link_event event, const struct wire_msg *m, const char *text)
{
    ((struct seen *)user)->n_messages += event == LINK_MESSAGE;
}

static void on_late(uv_timer_t *t) { *(bool *)t->data = true; }
static void on_nothing(uv_handle_t *h) {}

#define WAIT(cond)                                                                                 \
    do {                                                                                           \
        bool late_ = false;                                                                        \
        uv_timer_t t_;                                                                             \
        uv_timer_init(&loop, &t_);                                                                 \
        t_.data = &late_;                                                                          \
        uv_timer_start(&t_, on_late, 15000, 0);                                                    \
        while (!(cond) && !late_)                                                                  \
            uv_run(&loop, UV_RUN_NOWAIT);                                                          \
        CHECK(!late_);                                                                             \
        uv_close((uv_handle_t *)&t_, on_nothing);                                                  \
        uv_run(&loop, UV_RUN_NOWAIT);                                                              \
    } while (0)

static void hello(struct wire_buf *b, enum wire_role role)
{
    struct wire_hello *h = wire_begin(b, WIRE_HELLO, 0, 0);
    REQUIRE(h);
    h->role = role;
    CHECK_OK(wire_end(b));
}

/* A ZeroMQ peer with a pair of its own (NULL: in clear) that knows the hub's key, and its monitor.
 */
struct raw {
    void *context, *socket, *monitor;
};

static struct raw raw_open(const char *endpoint, const struct curve_pair *pair, uint64_t role)
{
    char plain[256];
    snprintf(plain, sizeof plain, "%.*s", (int)strcspn(endpoint, "?"), endpoint);
    struct raw r = {.context = zmq_ctx_new()};
    r.socket = zmq_socket(r.context, ZMQ_DEALER);
    r.monitor = zmq_socket(r.context, ZMQ_PAIR);
    uint64_t id[2] = {role + 1, role};
    int zero = 0;
    zmq_setsockopt(r.socket, ZMQ_LINGER, &zero, sizeof zero);
    zmq_setsockopt(r.socket, ZMQ_ROUTING_ID, id, sizeof id);
    if (pair) {
        zmq_setsockopt(r.socket, ZMQ_CURVE_SERVERKEY, own.public_key, 41);
        zmq_setsockopt(r.socket, ZMQ_CURVE_PUBLICKEY, pair->public_key, 41);
        zmq_setsockopt(r.socket, ZMQ_CURVE_SECRETKEY, pair->secret_key, 41);
    }
    zmq_socket_monitor(r.socket, "inproc://raw",
                       ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                           ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |
                           ZMQ_EVENT_DISCONNECTED);
    REQUIRE(zmq_connect(r.monitor, "inproc://raw") == 0 && zmq_connect(r.socket, plain) == 0);
    return r;
}

static void raw_close(struct raw *r)
{
    zmq_close(r->socket);
    zmq_close(r->monitor);
    zmq_ctx_term(r->context);
}

/* The first thing that its handshake came to; 0 = nothing yet. */
static uint16_t raw_event(struct raw *r)
{
    struct {
        uint16_t event;
        uint32_t value;
    } __attribute__((packed)) frame;
    if (zmq_recv(r->monitor, &frame, sizeof frame, ZMQ_DONTWAIT) < 0)
        return 0;
    char address[256];
    zmq_recv(r->monitor, address, sizeof address, 0);
    return frame.event;
}

static void raw_hello(struct raw *r, enum wire_role role)
{
    struct wire_buf b = {0};
    hello(&b, role);
    ((struct wire_head *)b.data)->seq = 0;
    CHECK(zmq_send(r->socket, b.data, b.len, 0) >= 0);
    wire_buf_finish(&b);
}

static void load_everybody(void)
{
    char text[1024];
    CHECK_OK(curve_keygen(path("prefill"), &prefill));
    CHECK_OK(curve_keygen(path("stranger"), &stranger));
    snprintf(text, sizeof text, "decode %s\nprefill %s\n", own.public_key, prefill.public_key);
    put("everybody", text, 0644);
    CHECK_OK(curve_load(path("own"), path("everybody"), false));
}

static struct link_hub *hub_open(struct seen *s)
{
    struct link_hub *hub = NULL;
    *s = (struct seen){0};
    CHECK_OK(link_hub_create(&loop, "tcp://127.0.0.1:0", calm, on_hub, s, &hub));
    REQUIRE(hub);
    return hub;
}

static void links_with_keys_talk(void)
{
    struct seen hs, ls = {0};
    struct link_hub *hub = hub_open(&hs);
    struct link_line *line = NULL;
    struct wire_buf b = {0};
    const char *key = strstr(link_hub_endpoint(hub), "?key=");
    CHECK_STR(key ? key + 5 : "", own.public_key);
    CHECK_OK(
        link_line_create(&loop, link_hub_endpoint(hub), WIRE_DECODE, 1, calm, on_line, &ls, &line));
    REQUIRE(line);
    hello(&b, WIRE_DECODE);
    CHECK_OK(link_line_send(line, &b));
    WAIT(hs.n_messages == 1);
    REQUIRE(wire_begin(&b, WIRE_WELCOME, 0, 0));
    CHECK_OK(wire_end(&b));
    CHECK_OK(link_hub_send(hub, hs.peer, &b));
    WAIT(ls.n_messages == 1);
    CHECK_OK(link_line_restart(line)); // keys survive it
    hello(&b, WIRE_DECODE);
    CHECK_OK(link_line_send(line, &b));
    WAIT(hs.n_messages == 2);
    wire_buf_finish(&b);
    link_line_destroy(line);
    link_hub_destroy(hub);
}

static void strangers_do_not_get_through(void)
{
    struct seen hs;
    struct link_hub *hub = hub_open(&hs);
    const struct curve_pair *const pairs[] = {NULL, &stranger};
    for (size_t i = 0; i < ARRAY_LEN(pairs); i++) {
        struct raw r = raw_open(link_hub_endpoint(hub), pairs[i], WIRE_DECODE);
        raw_hello(&r, WIRE_DECODE);
        uint16_t event = 0;
        WAIT((event = raw_event(&r)));
        CHECK(event != ZMQ_EVENT_HANDSHAKE_SUCCEEDED);
        raw_close(&r);
    }
    // Somebody who is on the list does, past the same hub.
    struct raw r = raw_open(link_hub_endpoint(hub), &prefill, WIRE_PREFILL);
    raw_hello(&r, WIRE_PREFILL);
    WAIT(hs.n_messages == 1);
    CHECK_INT(raw_event(&r), ZMQ_EVENT_HANDSHAKE_SUCCEEDED);
    CHECK_INT(link_hub_bad(hub), 0);
    raw_close(&r);
    link_hub_destroy(hub);
}

static void a_key_speaks_for_its_role_only(void)
{
    struct seen hs;
    struct link_hub *hub = hub_open(&hs);
    struct raw as_decode = raw_open(link_hub_endpoint(hub), &prefill, WIRE_DECODE);
    raw_hello(&as_decode, WIRE_DECODE); // by its id
    WAIT(link_hub_bad(hub) == 1);
    struct raw claims = raw_open(link_hub_endpoint(hub), &prefill, WIRE_PREFILL);
    raw_hello(&claims, WIRE_DECODE); // by what it says
    WAIT(link_hub_bad(hub) == 2);
    CHECK_INT(hs.n_messages, 0);
    raw_close(&as_decode);
    raw_close(&claims);
    link_hub_destroy(hub);
}

static void lines_know_whom_they_talk_to(void)
{
    struct seen s = {0};
    struct link_line *line = NULL;
    char endpoint[128];
    CHECK_INT(
        link_line_create(&loop, "tcp://127.0.0.1:9", WIRE_DECODE, 1, calm, on_line, &s, &line),
        ERR_INVALID); // the list has no router
    CHECK(says(ERR_INVALID, "key of the router"));
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:9?key=%s", stranger.public_key);
    CHECK_INT(link_line_create(&loop, endpoint, WIRE_PREFILL, 1, calm, on_line, &s, &line),
              ERR_INVALID);
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:9?key=%s", prefill.public_key);
    CHECK_INT(link_line_create(&loop, endpoint, WIRE_PREFILL, 1, calm, on_line, &s, &line),
              ERR_INVALID);
    CHECK(!line);
}

/* Without a list, which only a process that loaded none has. */
static void other_hosts_need_keys(void)
{
    struct seen s = {0};
    struct link_hub *hub = NULL;
    struct link_line *line = NULL;
    static const char *const beyond[] = {"tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.1:9"};
    for (size_t i = 0; i < ARRAY_LEN(beyond); i++) {
        CHECK_INT(link_hub_create(&loop, beyond[i], calm, on_hub, &s, &hub), ERR_INVALID);
        CHECK(says(ERR_INVALID, "--curve-key-file"));
        CHECK_INT(link_line_create(&loop, beyond[i], WIRE_DECODE, 1, calm, on_line, &s, &line),
                  ERR_INVALID);
    }
    char endpoint[128];
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:9?key=%040d", 1);
    CHECK_INT(link_line_create(&loop, endpoint, WIRE_PREFILL, 1, calm, on_line, &s, &line),
              ERR_INVALID);
    CHECK(says(ERR_INVALID, "wants keys"));
    CHECK_OK(curve_load("", "", true));
    CHECK_OK(link_hub_create(&loop, beyond[0], calm, on_hub, &s, &hub));
    CHECK(hub && !strchr(link_hub_endpoint(hub), '?'));
    link_hub_destroy(hub);
    CHECK_OK(curve_load("", "", false));
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/baton-curve-XXXXXX");
    REQUIRE(mkdtemp(dir));
    REQUIRE(uv_loop_init(&loop) == 0);
    RUN(other_hosts_need_keys);
    RUN(keygen_writes_private_files_that_load);
    RUN(files_that_are_wrong_are_refused);
    RUN(a_group_may_read_what_root_gave_it);
    RUN(pairs_are_parsed);
    RUN(lists_are_parsed);
    RUN(load_everybody);
    RUN(links_with_keys_talk);
    RUN(strangers_do_not_get_through);
    RUN(a_key_speaks_for_its_role_only);
    RUN(lines_know_whom_they_talk_to);
    while (uv_loop_alive(&loop))
        uv_run(&loop, UV_RUN_ONCE);
    CHECK_INT(uv_loop_close(&loop), 0);
    char command[96];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    CHECK_INT(system(command), 0);
    return check_done();
}
