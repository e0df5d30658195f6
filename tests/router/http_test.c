/* http_test.c: a server on port 0 and raw clients, all on this thread: pump() runs the server's
 * loop without waiting, moves the clients' bytes, and sleeps only in poll. Waiting is always for an
 * event.
 *
 * The raw requests are the ones that were put to node, nginx and HAProxy (reliability notes,
 * appendix A), and the names of the common smuggling and malformed-request suites. Each is sent in
 * one piece and byte by byte; the parser alone also gets each one cut in two at every place.
 */
#include "router/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "common/base/clock.h"
#include "common/base/own.h"
#include "router/http_parse.h"
#include "router/sse.h"
#include "tests/check.h"

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif

/* ---- the fixture ---- */

enum { MAX_CLIENTS = 512 };

struct client {
    int fd;
    char *rx;
    size_t n_rx, rx_cap;
    const char *tx;
    size_t n_tx;
    bool eof, paused;
};

static uv_loop_t loop;
static struct http_server *server;
static struct client *clients[MAX_CLIENTS];
static int n_clients;
static struct http_exchange *held; /* the last one on /later or /stream */
static int n_headers_seen, n_requests_seen, n_gone, n_held;
static char last_body[4096], last_fields[4096];

/* Exchanges that the chaos test holds, and whose end it decides. */
enum { N_SLOTS = 128 };
static struct http_exchange *slots[N_SLOTS];
static bool slot_streams[N_SLOTS];
static int n_chaos_shown, n_chaos_ended, n_chaos_gone;

static void on_headers(void *user, struct http_exchange *x, const struct http_request *r)
{
    (void)user;
    n_headers_seen++;
    if (!strcmp(r->path, "/missing"))
        http_reply(x, 404, "application/json", "{}", 2);
}

static void on_request(void *user, struct http_exchange *x, const struct http_request *r)
{
    (void)user;
    n_requests_seen++;
    snprintf(last_body, sizeof(last_body), "%.*s", (int)MIN(r->n_body, (size_t)1000), r->body);
    snprintf(last_fields, sizeof(last_fields), "%s|%s|%s|%s|%s|%s|%s|%s|%s|%s", r->method, r->path,
             r->query, r->content_type, r->request_id, r->authorization, r->api_key, r->traceparent,
             r->origin, r->if_none_match);
    if (!strcmp(r->path, "/later") || !strcmp(r->path, "/stream")) {
        held = x;
        n_held++;
        http_set_data(x, &n_held);
        if (r->path[1] == 's')
            sse_begin(x);
    } else if (!strcmp(r->path, "/chaos")) {
        n_chaos_shown++;
        int free_slot = 0;
        while (free_slot < N_SLOTS && slots[free_slot])
            free_slot++;
        if (free_slot == N_SLOTS) {
            n_chaos_ended++;
            http_reply(x, 503, NULL, NULL, 0);
            return;
        }
        slots[free_slot] = x;
        slot_streams[free_slot] = false;
        http_set_data(x, &slots[free_slot]);
    } else if (!strcmp(r->path, "/echo")) {
        http_reply(x, 200, "application/octet-stream", r->body, r->n_body);
    } else if (!strcmp(r->path, "/query")) {
        http_reply(x, 200, "text/plain", r->query, strlen(r->query));
    } else if (!strcmp(r->path, "/none")) {
        http_reply(x, 204, NULL, NULL, 0);
    } else if (!strcmp(r->path, "/big")) {
        size_t n = 4u << 20;
        OWNED_MEM char *big = malloc(n);
        memset(big, 'x', n);
        http_reply(x, 200, "text/plain", big, n);
    } else {
        http_add_header(x, "X-Test", "yes");
        http_reply(x, 200, "text/plain", "ok", 2);
    }
}

static void on_gone(void *user, struct http_exchange *x)
{
    (void)user;
    n_gone++;
    struct http_exchange **slot = http_get_data(x);
    if (slot >= slots && slot < slots + N_SLOTS) {
        CHECK(*slot == x); /* neither ended nor gone before */
        *slot = NULL;
        n_chaos_gone++;
    }
    if (x == held)
        held = NULL;
}

static void on_refused(void *user, struct http_exchange *x, int status, const char *message,
                       const char *request_id)
{
    (void)user;
    OWNED_MEM char *text = NULL;
    int n = asprintf(&text, "{\"error\":{\"message\":\"%s\",\"code\":%d}}", message, status);
    CHECK(n > 0);
    http_add_header(x, "X-Request-Id", request_id[0] ? request_id : "none");
    http_reply(x, status, "application/json", text, (size_t)n);
}

static const struct http_handler handler = {on_headers, on_request, on_gone, on_refused};

static struct http_limits test_limits(void)
{
    struct http_limits l = http_limits_default;
    l.max_body_bytes = 1u << 20;
    return l;
}

static void server_start(struct http_limits limits)
{
    CHECK(uv_loop_init(&loop) == 0);
    CHECK_OK(http_server_create(&loop, "127.0.0.1", 0, &limits, &handler, NULL, &server));
    CHECK(server && http_server_port(server) > 0);
    held = NULL;
    n_headers_seen = n_requests_seen = n_gone = n_held = 0;
}

static void count_sent(void *user, size_t n, uint64_t sent_us)
{
    CHECK(sent_us <= clock_now_us());
    *(size_t *)user += n;
}

/* Returns how many connections had something to send. */
static size_t flush_all(void)
{
    size_t n = 0;
    http_server_flush(server, false, count_sent, &n);
    return n;
}

static void client_flush(struct client *c)
{
    while (c->n_tx) {
        ssize_t n = send(c->fd, c->tx, c->n_tx, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN)
            c->n_tx = 0; /* closed by the server: what it said is read all the same */
        if (n <= 0)
            return;
        c->tx += n;
        c->n_tx -= (size_t)n;
    }
}

static void client_fill(struct client *c)
{
    while (!c->eof && !c->paused) {
        if (c->rx_cap - c->n_rx < 4096) {
            c->rx_cap = c->rx_cap ? c->rx_cap * 2 : 8192;
            c->rx = realloc(c->rx, c->rx_cap);
        }
        ssize_t n = recv(c->fd, c->rx + c->n_rx, c->rx_cap - c->n_rx - 1, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN))
            c->eof = true;
        if (n <= 0)
            return;
        c->n_rx += (size_t)n;
        c->rx[c->n_rx] = '\0';
    }
}

static void pump(void)
{
    struct pollfd fds[MAX_CLIENTS + 1];
    int n = 0;
    uv_run(&loop, UV_RUN_NOWAIT);
    for (int i = 0; i < n_clients; i++)
        client_flush(clients[i]);
    int timeout_ms = uv_backend_timeout(&loop);
    fds[n++] = (struct pollfd){uv_backend_fd(&loop), POLLIN, 0};
    for (int i = 0; i < n_clients; i++) {
        struct client *c = clients[i];
        short events = (short)((c->eof || c->paused ? 0 : POLLIN) | (c->n_tx ? POLLOUT : 0));
        if (events)
            fds[n++] = (struct pollfd){c->fd, events, 0};
    }
    poll(fds, (nfds_t)n, timeout_ms < 0 || timeout_ms > 100 ? 100 : timeout_ms);
    uv_run(&loop, UV_RUN_NOWAIT);
    for (int i = 0; i < n_clients; i++)
        client_fill(clients[i]);
}

#define WAIT(cond)                                                                                 \
    do {                                                                                           \
        uint64_t end_us_ = clock_now_us() + 10000000u;                                             \
        while (!(cond) && clock_now_us() < end_us_)                                                \
            pump();                                                                                \
        CHECK(cond);                                                                               \
    } while (0)

static struct sockaddr_in server_address(void)
{
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)http_server_port(server)),
                                .sin_addr = {htonl(INADDR_LOOPBACK)}};
}

static struct client *client_socket(int rcvbuf)
{
    struct client *c = calloc(1, sizeof(*c));
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(c->fd >= 0);
    if (rcvbuf)
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &rcvbuf, sizeof(rcvbuf));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    clients[n_clients++] = c;
    return c;
}

static bool client_connect(struct client *c)
{
    struct sockaddr_in a = server_address();
    return connect(c->fd, (struct sockaddr *)&a, sizeof(a)) == 0;
}

static struct client *client_open(void)
{
    struct client *c = client_socket(0);
    CHECK(client_connect(c));
    return c;
}

static void client_close(struct client *c)
{
    for (int i = 0; i < n_clients; i++)
        if (clients[i] == c)
            clients[i--] = clients[--n_clients];
    close(c->fd);
    free(c->rx);
    free(c);
}

static void client_send(struct client *c, const char *data, size_t n)
{
    while (c->n_tx)
        pump();
    c->tx = data;
    c->n_tx = n;
    client_flush(c);
}

static void client_say(struct client *c, const char *text) { client_send(c, text, strlen(text)); }

static void server_stop(void)
{
    while (n_clients)
        client_close(clients[0]);
    WAIT(http_server_n_connections(server) == 0);
    CHECK_INT(http_server_n_exchanges(server), 0);
    http_server_destroy(server);
    server = NULL;
    uv_run(&loop, UV_RUN_DEFAULT);
    CHECK_INT(uv_loop_close(&loop), 0);
}

/* ---- a strict reader of answers ---- */

struct answer {
    int status;
    char head[2048];
    const char *body; /* as on the wire, chunked bodies included */
    size_t n_body;
    bool chunked, ended; /* ended: the last chunk was there, or the length was met */
};

static bool answer_says(const struct answer *a, const char *line)
{
    char full[256];
    snprintf(full, sizeof(full), "\r\n%s\r\n", line);
    return strcasestr(a->head, full) != NULL;
}

/* Bytes used by one answer; 0 while it is incomplete. */
static size_t answer_read(const char *rx, size_t n, bool eof, bool to_head, struct answer *a)
{
    memset(a, 0, sizeof(*a));
    const char *end = n ? memmem(rx, n, "\r\n\r\n", 4) : NULL;
    if (!end || (size_t)(end - rx) + 4 >= sizeof(a->head))
        return 0;
    memcpy(a->head, rx, (size_t)(end - rx) + 4);
    CHECK(sscanf(a->head, "HTTP/1.1 %d ", &a->status) == 1);
    size_t at = (size_t)(end - rx) + 4;
    a->body = rx + at;
    const char *length = strcasestr(a->head, "\r\nContent-Length: ");
    a->chunked = answer_says(a, "Transfer-Encoding: chunked");
    CHECK(!(length && a->chunked));
    CHECK(a->status == 100 || strcasestr(a->head, "\r\nDate: ") != NULL);
    if (to_head || a->status == 100 || a->status == 204 || a->status == 304) {
        a->ended = true;
        return at;
    }
    if (length) {
        a->n_body = strtoul(length + 18, NULL, 10);
        a->ended = n - at >= a->n_body;
        return a->ended ? at + a->n_body : 0;
    }
    if (a->chunked) {
        size_t i = at;
        while (i < n) {
            char *stop;
            size_t size = strtoul(rx + i, &stop, 16);
            const char *line_end = memmem(rx + i, n - i, "\r\n", 2);
            if (!line_end || stop != line_end || (size_t)(line_end - rx) + 4 + size > n)
                break;
            i = (size_t)(line_end - rx) + 4 + size;
            CHECK(rx[i - 2] == '\r' && rx[i - 1] == '\n');
            a->n_body = i - at;
            if (size == 0) {
                a->ended = true;
                return i;
            }
        }
        return eof ? n : 0;
    }
    a->n_body = n - at;
    a->ended = eof;
    return eof ? n : 0;
}

/* The idx-th answer of a connection; false while it is not complete. */
static bool answer_get(const struct client *c, int idx, struct answer *ret)
{
    size_t at = 0;
    if (!c->rx)
        return false;
    for (int i = 0; i <= idx; i++) {
        size_t used = answer_read(c->rx + at, c->n_rx - at, c->eof, false, ret);
        if (!used)
            return false;
        at += used;
    }
    return true;
}

static void expect_ok(struct client *c, const char *request)
{
    struct answer a;
    c->n_rx = 0;
    client_say(c, request);
    WAIT(answer_get(c, 0, &a));
    CHECK_INT(a.status, 200);
}

/* ---- raw requests ---- */

struct raw_case {
    const char *name;
    const char *data;
    size_t n;
    int want[3]; /* final statuses in order */
    bool closes;
};

#define H "Host: a\r\n"
#define RAW(name, data, status, closes)                                                            \
    {                                                                                              \
        name, data, sizeof(data) - 1, {status}, closes                                             \
    }
#define BAD(name, data)  RAW(name, data, 400, true)
#define GOOD(name, data) RAW(name, data, 200, false)
#define POST_TE          "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n"

static const struct raw_case raw_cases[] = {
    GOOD("plain", "GET /ok HTTP/1.1\r\n" H "\r\n"),
    /* Host */
    BAD("no Host", "GET /ok HTTP/1.1\r\n\r\n"),
    BAD("two Hosts", "GET /ok HTTP/1.1\r\n" H H "\r\n"),
    BAD("two different Hosts", "GET /ok HTTP/1.1\r\n" H "Host: b\r\n\r\n"),
    BAD("empty Host", "GET /ok HTTP/1.1\r\nHost:\r\n\r\n"),
    BAD("Host with a path", "GET /ok HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    BAD("Host with user", "GET /ok HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    BAD("Host list", "GET /ok HTTP/1.1\r\nHost: a, b\r\n\r\n"),
    BAD("Host with bad port", "GET /ok HTTP/1.1\r\nHost: a:8x\r\n\r\n"),
    GOOD("Host with port", "GET /ok HTTP/1.1\r\nHost: a-b.c_d:8080\r\n\r\n"),
    GOOD("IPv6 Host", "GET /ok HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"),
    /* versions and the request line */
    RAW("1.0 closes", "GET /ok HTTP/1.0\r\n\r\n", 200, true),
    RAW("1.0 keep-alive", "GET /ok HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", 200, false),
    BAD("HTTP/1.32", "GET /ok HTTP/1.32\r\n" H "\r\n"),
    BAD("HTTP/1.2", "GET /ok HTTP/1.2\r\n" H "\r\n"),
    RAW("HTTP/2.0", "GET /ok HTTP/2.0\r\n" H "\r\n", 505, true),
    RAW("HTTP/3.0", "GET /ok HTTP/3.0\r\n" H "\r\n", 505, true),
    BAD("HTTP/0.9", "GET /ok HTTP/0.9\r\n" H "\r\n"),
    BAD("HTTP/0.9 simple", "GET /ok\r\n"),
    BAD("lower-case version", "GET /ok http/1.1\r\n" H "\r\n"),
    BAD("two spaces", "GET  /ok HTTP/1.1\r\n" H "\r\n"),
    BAD("two spaces before version", "GET /ok  HTTP/1.1\r\n" H "\r\n"),
    BAD("space at end of line", "GET /ok HTTP/1.1 \r\n" H "\r\n"),
    BAD("tab as separator", "GET\t/ok HTTP/1.1\r\n" H "\r\n"),
    BAD("leading space", " GET /ok HTTP/1.1\r\n" H "\r\n"),
    GOOD("leading CRLF", "\r\nGET /ok HTTP/1.1\r\n" H "\r\n"),
    BAD("two leading CRLFs", "\r\n\r\nGET /ok HTTP/1.1\r\n" H "\r\n"),
    BAD("leading LF", "\nGET /ok HTTP/1.1\r\n" H "\r\n"),
    BAD("TLS hello", "\x16\x03\x01\x02"),
    BAD("NUL in line", "GET /o\0k HTTP/1.1\r\n" H "\r\n"),
    BAD("high byte in URL", "GET /\xc3\xa4 HTTP/1.1\r\n" H "\r\n"),
    BAD("fragment", "GET /ok#x HTTP/1.1\r\n" H "\r\n"),
    /* targets */
    GOOD("absolute form", "GET http://a/ok HTTP/1.1\r\n" H "\r\n"),
    BAD("absolute form, other scheme", "GET ftp://a/ok HTTP/1.1\r\n" H "\r\n"),
    BAD("absolute form, no host", "GET http:///ok HTTP/1.1\r\n" H "\r\n"),
    BAD("relative target", "GET ok HTTP/1.1\r\n" H "\r\n"),
    BAD("asterisk without OPTIONS", "GET * HTTP/1.1\r\n" H "\r\n"),
    BAD("dot dot", "GET /a/../ok HTTP/1.1\r\n" H "\r\n"),
    BAD("dot dot at the end", "GET /a/.. HTTP/1.1\r\n" H "\r\n"),
    BAD("encoded dot dot", "GET /a/%2e%2E/ok HTTP/1.1\r\n" H "\r\n"),
    BAD("encoded slash dot dot", "GET /a%2f..%2fok HTTP/1.1\r\n" H "\r\n"),
    BAD("double slash", "GET //ok HTTP/1.1\r\n" H "\r\n"),
    BAD("%00", "GET /ok%00 HTTP/1.1\r\n" H "\r\n"),
    GOOD("dots inside names", "GET /a..b/...c HTTP/1.1\r\n" H "\r\n"),
    GOOD("slashes in query", "GET /ok?u=http://x/../y HTTP/1.1\r\n" H "\r\n"),
    /* methods */
    RAW("CONNECT", "CONNECT a:443 HTTP/1.1\r\n" H "\r\nGET /ok HTTP/1.1\r\n" H "\r\n", 405, true),
    RAW("TRACE", "TRACE /ok HTTP/1.1\r\n" H "\r\n", 405, true),
    BAD("PRI", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    RAW("OPTIONS *", "OPTIONS * HTTP/1.1\r\n" H "\r\n", 204, false),
    RAW("OPTIONS * with body", "OPTIONS * HTTP/1.1\r\n" H "Content-Length: 3\r\n\r\nabc", 204,
        false),
    GOOD("OPTIONS of a path", "OPTIONS /ok HTTP/1.1\r\n" H "\r\n"),
    RAW("unknown method", "BREW /ok HTTP/1.1\r\n" H "\r\n", 405, true),
    RAW("lower-case method", "get /ok HTTP/1.1\r\n" H "\r\n", 405, true),
    RAW("RTSP method", "DESCRIBE /ok HTTP/1.1\r\n" H "\r\n", 405, true),
    BAD("method with bad character", "G@T /ok HTTP/1.1\r\n" H "\r\n"),
    /* framing */
    BAD("CL and TE", "POST /echo HTTP/1.1\r\n" H
                     "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    BAD("TE and CL", "POST /echo HTTP/1.1\r\n" H
                     "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    BAD("CL twice, different",
        "POST /echo HTTP/1.1\r\n" H "Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde"),
    BAD("CL twice, same",
        "POST /echo HTTP/1.1\r\n" H "Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde"),
    BAD("CL list", "POST /echo HTTP/1.1\r\n" H "Content-Length: 5, 5\r\n\r\nabcde"),
    BAD("CL +5", "POST /echo HTTP/1.1\r\n" H "Content-Length: +5\r\n\r\nabcde"),
    BAD("CL -5", "POST /echo HTTP/1.1\r\n" H "Content-Length: -5\r\n\r\nabcde"),
    BAD("CL empty", "POST /echo HTTP/1.1\r\n" H "Content-Length: \r\n\r\nabcde"),
    BAD("CL hex", "POST /echo HTTP/1.1\r\n" H "Content-Length: 0x5\r\n\r\nabcde"),
    BAD("CL with space inside", "POST /echo HTTP/1.1\r\n" H "Content-Length: 1 0\r\n\r\nabcde"),
    BAD("CL overflow",
        "POST /echo HTTP/1.1\r\n" H "Content-Length: 99999999999999999999\r\n\r\nabcde"),
    BAD("CL space colon", "POST /echo HTTP/1.1\r\n" H "Content-Length : 5\r\n\r\nabcde"),
    GOOD("CL 010", "POST /echo HTTP/1.1\r\n" H "Content-Length: 010\r\n\r\n0123456789"),
    GOOD("CL 0", "POST /echo HTTP/1.1\r\n" H "Content-Length: 0\r\n\r\n"),
    GOOD("CL with white space", "POST /echo HTTP/1.1\r\n" H "Content-Length:   2  \r\n\r\nab"),
    GOOD("GET with body", "GET /echo HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nab"),
    RAW("TE identity", "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: identity\r\n\r\n", 501,
        true),
    RAW("TE gzip, chunked",
        "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, true),
    RAW("TE ,chunked", "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
        501, true),
    RAW("TE xchunked", "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        501, true),
    RAW("TE chunked;q",
        "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", 501, true),
    BAD("TE chunked twice",
        "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    BAD("two TE fields", "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n"
                         "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    BAD("TE empty", "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding:\r\n\r\n0\r\n\r\n"),
    BAD("TE folded", "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    BAD("TE space colon",
        "POST /echo HTTP/1.1\r\n" H "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    BAD("TE after bare CR",
        "POST /echo HTTP/1.1\r\n" H "X:\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    BAD("TE on 1.0", "POST /echo HTTP/1.0\r\n" H "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    GOOD("TE upper case",
         "POST /echo HTTP/1.1\r\n" H "TRANSFER-ENCODING: CHUNKED\r\n\r\n0\r\n\r\n"),
    /* lines and fields */
    BAD("bare LF everywhere", "GET /ok HTTP/1.1\nHost: a\n\n"),
    BAD("bare LF in one header", "GET /ok HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"),
    BAD("bare CR", "GET /ok HTTP/1.1\r\n" H "X: a\rb\r\n\r\n"),
    BAD("CRLF CR X", "GET /ok HTTP/1.1\r\n" H "\r\rXGET /ok HTTP/1.1\r\n" H "\r\n"),
    BAD("CR CRLF", "GET /ok HTTP/1.1\r\r\n" H "\r\n"),
    BAD("NUL in value", "GET /ok HTTP/1.1\r\n" H "X: a\0b\r\n\r\n"),
    BAD("BEL in value", "GET /ok HTTP/1.1\r\n" H "X: a\x07"
                        "b\r\n\r\n"),
    BAD("DEL in value", "GET /ok HTTP/1.1\r\n" H "X: a\x7f\r\n\r\n"),
    BAD("NUL in name", "GET /ok HTTP/1.1\r\n" H "X\0Y: a\r\n\r\n"),
    BAD("obs-fold", "GET /ok HTTP/1.1\r\n" H "X: a\r\n b\r\n\r\n"),
    BAD("obs-fold with tab", "GET /ok HTTP/1.1\r\n" H "X: a\r\n\tb\r\n\r\n"),
    BAD("space before first header", "GET /ok HTTP/1.1\r\n Host: a\r\n\r\n"),
    BAD("empty name", "GET /ok HTTP/1.1\r\n" H ": x\r\n\r\n"),
    BAD("no colon", "GET /ok HTTP/1.1\r\n" H "nonsense\r\n\r\n"),
    BAD("space in name", "GET /ok HTTP/1.1\r\n" H "X Y: a\r\n\r\n"),
    BAD("two Authorizations",
        "GET /ok HTTP/1.1\r\n" H "Authorization: a\r\nAuthorization: b\r\n\r\n"),
    GOOD("high bytes in value", "GET /ok HTTP/1.1\r\n" H "X: \xc3\xa4\r\n\r\n"),
    GOOD("empty value", "GET /ok HTTP/1.1\r\n" H "X:\r\nY: \r\n\r\n"),
    /* chunked bodies */
    GOOD("chunked", POST_TE "5\r\nhello\r\n1;ext=\"v\"\r\n!\r\n0\r\n\r\n"),
    GOOD("chunked with trailer", POST_TE "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"),
    GOOD("CL in trailer is ignored", POST_TE "5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n"),
    GOOD("chunk size with leading zero", POST_TE "05\r\nhello\r\n00\r\n\r\n"),
    BAD("chunk 0x5", POST_TE "0x5\r\nhello\r\n0\r\n\r\n"),
    BAD("chunk +5", POST_TE "+5\r\nhello\r\n0\r\n\r\n"),
    BAD("chunk -1", POST_TE "-1\r\nhello\r\n0\r\n\r\n"),
    BAD("chunk 5_0", POST_TE "5_0\r\nhello\r\n0\r\n\r\n"),
    BAD("chunk size with space", POST_TE "5 \r\nhello\r\n0\r\n\r\n"),
    BAD("chunk size with leading space", POST_TE " 5\r\nhello\r\n0\r\n\r\n"),
    BAD("chunk size empty", POST_TE "\r\nhello\r\n0\r\n\r\n"),
    BAD("chunk size overflow", POST_TE "FFFFFFFFFFFFFFFF0\r\nhello\r\n0\r\n\r\n"),
    RAW("chunk size huge", POST_TE "FFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n", 413, true),
    BAD("missing CRLF after chunk", POST_TE "5\r\nhello0\r\n\r\n"),
    BAD("chunk too long", POST_TE "5\r\nhelloXX\r\n0\r\n\r\n"),
    BAD("chunk line ends in LF", POST_TE "5\nhello\r\n0\r\n\r\n"),
    BAD("chunk line ends in CR X", POST_TE "5\rXhello\r\n0\r\n\r\n"),
    BAD("chunk data ends in LF", POST_TE "5\r\nhello\n0\r\n\r\n"),
    BAD("extension with LF", POST_TE "5;a\nb\r\nhello\r\n0\r\n\r\n"),
    BAD("extension with bare CR", POST_TE "5;a\rb\r\nhello\r\n0\r\n\r\n"),
    BAD("extension with NUL", POST_TE "5;a\0b\r\nhello\r\n0\r\n\r\n"),
    BAD("last chunk with LF", POST_TE "5\r\nhello\r\n0\n\r\n"),
    BAD("end with LF", POST_TE "5\r\nhello\r\n0\r\n\n"),
    BAD("trailer with fold", POST_TE "0\r\nX: a\r\n b\r\n\r\n"),
    BAD("trailer without name", POST_TE "0\r\n: a\r\n\r\n"),
    BAD("trailer with space before colon", POST_TE "0\r\nX : a\r\n\r\n"),
    BAD("trailer with bare LF", POST_TE "0\r\nX: a\n\r\n"),
    /* what a connection does next */
    {"two pipelined",
     "GET /ok HTTP/1.1\r\n" H "\r\nGET /ok HTTP/1.1\r\n" H "\r\n",
     2 * sizeof("GET /ok HTTP/1.1\r\n" H "\r\n") - 2,
     {200, 200},
     false},
    {"good, then bad",
     "GET /ok HTTP/1.1\r\n" H "\r\nGET /ok HTTP/1.1\r\n\r\n",
     sizeof("GET /ok HTTP/1.1\r\n" H "\r\nGET /ok HTTP/1.1\r\n\r\n") - 1,
     {200, 400},
     true},
    RAW("bytes after close",
        "GET /ok HTTP/1.1\r\n" H "Connection: close\r\n\r\nGET /ok HTTP/1.1\r\n" H "\r\n", 200,
        true),
    RAW("close in a list", "GET /ok HTTP/1.1\r\n" H "Connection: x,\tclose\t\r\n\r\n", 200, true),
    GOOD("Upgrade h2c",
         "GET /ok HTTP/1.1\r\n" H "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"),
    {"Upgrade, then a request",
     "GET /ok HTTP/1.1\r\n" H "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
     "GET /ok HTTP/1.1\r\n" H "\r\n",
     sizeof("GET /ok HTTP/1.1\r\n" H "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            "GET /ok HTTP/1.1\r\n" H "\r\n") -
         1,
     {200, 200},
     false},
    GOOD("Upgrade with body", "POST /echo HTTP/1.1\r\n" H
                              "Connection: Upgrade\r\nUpgrade: x\r\nContent-Length: 2\r\n\r\nab"),
    /* expectations, codings */
    GOOD("Expect 100",
         "POST /echo HTTP/1.1\r\n" H "Expect: 100-Continue\r\nContent-Length: 2\r\n\r\nab"),
    RAW("Expect foo", "POST /echo HTTP/1.1\r\n" H "Expect: foo\r\nContent-Length: 2\r\n\r\nab", 417,
        true),
    RAW("Expect list",
        "POST /echo HTTP/1.1\r\n" H "Expect: 100-continue, foo\r\nContent-Length: 2\r\n\r\nab", 417,
        true),
    RAW("Expect, early answer",
        "POST /missing HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", 404,
        true),
    RAW("early answer, body pending", "POST /missing HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nab",
        404, true),
    RAW("early answer, no body", "GET /missing HTTP/1.1\r\n" H "\r\n", 404, false),
    RAW("Content-Encoding gzip",
        "POST /echo HTTP/1.1\r\n" H "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab", 415,
        true),
    RAW("body too large", "POST /echo HTTP/1.1\r\n" H "Content-Length: 1048577\r\n\r\n", 413, true),
    RAW("no content", "GET /none HTTP/1.1\r\n" H "\r\n", 204, false),
};

enum { N_MADE = 10 };
static struct raw_case made_cases[N_MADE];
static int n_made;

static char *repeat(char *at, const char *what, size_t n)
{
    for (size_t i = 0; i < n; i++)
        at = stpcpy(at, what);
    return at;
}

static void case_make(const char *name, int status, bool closes, const char *before,
                      const char *what, size_t n, const char *after)
{
    size_t total = strlen(before) + strlen(what) * n + strlen(after);
    char *data = malloc(total + 1);
    stpcpy(repeat(stpcpy(data, before), what, n), after);
    CHECK(n_made < N_MADE);
    made_cases[n_made++] = (struct raw_case){name, data, total, {status}, closes};
}

static void cases_make(void)
{
    const char *get = "GET /ok HTTP/1.1\r\n" H;
    case_make("URL 20 kB", 414, true, "GET /", "a", 20000, " HTTP/1.1\r\n" H "\r\n");
    case_make("URL 8 kB", 200, false, "GET /", "a", 8192 - 14, " HTTP/1.1\r\n" H "\r\n");
    case_make("URL 8 kB + 1", 414, true, "GET /", "a", 8192 - 13, " HTTP/1.1\r\n" H "\r\n");
    case_make("header 20 kB", 431, true, "GET /ok HTTP/1.1\r\n" H "X: ", "a", 20000, "\r\n\r\n");
    case_make("2000 headers", 431, true, get, "X: a\r\n", 2000, "\r\n");
    case_make("100 headers", 200, false, get, "X: a\r\n", 99, "\r\n");
    case_make("101 headers", 431, true, get, "X: a\r\n", 100, "\r\n");
    case_make("extensions over 1 KiB", 400, true, POST_TE, "1;aaaaaaaaaaaaaa\r\nx\r\n", 100,
              "0\r\n\r\n");
    case_make("trailers over 4 KiB", 400, true, POST_TE "0\r\n", "X: aaaaaaaaaaaaa\r\n", 400,
              "\r\n");
    case_make("chunk size of zeros", 400, true, POST_TE, "0", 17, "\r\n\r\n");
}

static const struct raw_case *case_at(size_t i)
{
    return i < ARRAY_LEN(raw_cases)                    ? &raw_cases[i]
           : i - ARRAY_LEN(raw_cases) < (size_t)n_made ? &made_cases[i - ARRAY_LEN(raw_cases)]
                                                       : NULL;
}

static void case_run(const struct raw_case *k, bool byte_by_byte)
{
    int before = check_failures;
    struct client *c = client_open();
    if (byte_by_byte) {
        for (size_t i = 0; i < k->n; i++) {
            client_send(c, k->data + i, 1);
            uv_run(&loop, UV_RUN_NOWAIT);
            client_fill(c);
        }
    } else {
        client_send(c, k->data, k->n);
    }
    struct answer a = {0};
    int idx = 0;
    for (int i = 0; i < 3 && k->want[i]; i++, idx++) {
        WAIT(answer_get(c, idx, &a) || c->eof);
        if (answer_get(c, idx, &a) && a.status == 100) {
            idx++;
            WAIT(answer_get(c, idx, &a) || c->eof);
        }
        CHECK(answer_get(c, idx, &a));
        CHECK_INT(a.status, k->want[i]);
    }
    CHECK_INT(answer_says(&a, "Connection: close"), k->closes);
    if (k->closes) {
        WAIT(c->eof);
        CHECK(!answer_get(c, idx, &a) || c->n_rx == 0); /* nothing was said after the refusal */
    } else {
        expect_ok(c, "GET /ok HTTP/1.1\r\n" H "\r\n");
    }
    client_close(c);
    if (check_failures != before)
        fprintf(stderr, "  in case '%s'%s\n", k->name, byte_by_byte ? ", byte by byte" : "");
}

static void raw_requests_get_their_verdict(void)
{
    server_start(test_limits());
    for (size_t i = 0; case_at(i); i++)
        case_run(case_at(i), false);
    server_stop();
}

static void raw_requests_byte_by_byte(void)
{
    server_start(test_limits());
    for (size_t i = 0; case_at(i); i++)
        case_run(case_at(i), true);
    server_stop();
}

static void refusals_know_the_id(void)
{
    static const struct {
        const char *request, *id;
    } rows[] = {
        {"POST /echo HTTP/1.1\r\n" H "X-Request-Id: a-1\r\nContent-Length: 9999999\r\n\r\n", "a-1"},
        {"POST /echo HTTP/1.1\r\n" H "Expect: x\r\nX-Request-Id: a-2\r\n\r\n", "a-2"},
        {"GET /ok HTTP/1.1\r\nX-Request-Id: a-3\r\n\r\n", "a-3"},
        {"GET /ok HTTP/1.1\r\nX-Request-Id: a 4\r\n\r\n", "none"},
        {POST_TE "x", "none"},
        {"BREW /ok HTTP/1.1\r\n" H "X-Request-Id: unread\r\n\r\n", "none"},
    };
    struct answer a;
    server_start(test_limits());
    for (size_t i = 0; i < ARRAY_LEN(rows); i++) {
        struct client *c = client_open();
        char line[64];
        snprintf(line, sizeof(line), "X-Request-Id: %s", rows[i].id);
        client_say(c, rows[i].request);
        WAIT(c->eof);
        CHECK(answer_get(c, 0, &a));
        CHECK(a.status >= 400);
        CHECK(answer_says(&a, line));
        client_close(c);
    }
    server_stop();
}

/* ---- the parser alone ---- */

struct transcript {
    char text[8192];
    size_t n;
};

__attribute__((format(printf, 2, 3))) static void note(struct transcript *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(t->text + t->n, sizeof(t->text) - t->n, fmt, ap);
    va_end(ap);
    t->n = MIN(t->n + (size_t)n, sizeof(t->text) - 1);
}

/* Feeds data cut at the given places, request after request, and notes what came out. */
static void parse_all(const char *data, size_t n, size_t cut, size_t step, struct transcript *t)
{
    struct http_parse *p = http_parse_create(1u << 20);
    t->n = 0;
    t->text[0] = '\0';
    for (size_t at = 0; at < n;) {
        size_t end = step ? MIN(at + step, n) : at < cut ? cut : n;
        while (true) {
            size_t used;
            enum http_parse_event e = http_parse_feed(p, data + at, end - at, &used);
            at += used;
            if (e == HTTP_PARSE_MORE)
                break;
            const struct http_request *r = &p->request;
            if (e == HTTP_PARSE_HEADERS)
                note(t, "%s %s?%s ct=%s keep=%d body=%d 100=%d\n", r->method, r->path, r->query,
                     r->content_type, p->keep_alive, p->has_body, p->expects_100);
            if (e == HTTP_PARSE_DONE) {
                note(t, "done %zu %.100s\n", r->n_body, r->body);
                http_parse_destroy(p);
                p = http_parse_create(1u << 20);
            }
            if (e == HTTP_PARSE_BAD) {
                note(t, "bad %d %s at %zu\n", p->status, p->why, at);
                http_parse_destroy(p);
                return;
            }
            if (e == HTTP_PARSE_DONE && at == end)
                break;
        }
    }
    http_parse_destroy(p);
}

static void cuts_do_not_change_the_verdict(void)
{
    static struct transcript whole, cut;
    for (size_t i = 0; case_at(i); i++) {
        const struct raw_case *k = case_at(i);
        parse_all(k->data, k->n, 0, 0, &whole);
        char *at = strstr(whole.text, " at "); /* the position differs only by what one feed used */
        if (at)
            *at = '\0';
        for (size_t at_byte = 0; at_byte<k->n; at_byte += k->n> 1000 ? 97 : 1) {
            parse_all(k->data, k->n, at_byte, at_byte == 0, &cut);
            char *at2 = strstr(cut.text, " at ");
            if (at2)
                *at2 = '\0';
            if (strcmp(whole.text, cut.text) != 0) {
                fprintf(stderr, "case '%s' cut at %zu\n", k->name, at_byte);
                CHECK_STR(cut.text, whole.text);
                break;
            }
            CHECK(true);
        }
    }
}

static void llhttp_is_strict(void)
{
    struct http_parse *p = http_parse_create(1);
    CHECK_INT(p->ll.lenient_flags, 0);
    http_parse_destroy(p);
    /* A build without strict mode takes this for two requests. */
    static const char smuggled[] = "GET / HTTP/1.1\r\nHost: a\r\n\r\rXGET / HTTP/1.1\r\n\r\n";
    static const llhttp_settings_t settings;
    llhttp_t ll;
    llhttp_init(&ll, HTTP_REQUEST, &settings);
    CHECK(llhttp_execute(&ll, smuggled, sizeof(smuggled) - 1) != HPE_OK);
}

/* ---- requests and answers ---- */

static void request_is_shown_whole(void)
{
    server_start(test_limits());
    struct client *c = client_open();
    expect_ok(c, "POST /x/y?a=b&c HTTP/1.1\r\n" H "Content-Type:  application/json \r\n"
                 "X-Request-Id: r-1\r\nX-Request-Id: r-2\r\nAuthorization: Bearer k\r\n"
                 "X-Api-Key: z\r\nTraceparent: 00-1\r\nOrigin: http://o\r\nIf-None-Match: \"e\"\r\n"
                 "Content-Length: 3\r\n\r\nabc");
    CHECK_STR(last_fields, "POST|/x/y|a=b&c|application/json|r-1|Bearer k|z|00-1|http://o|\"e\"");
    CHECK_STR(last_body, "abc");
    expect_ok(c, "GET http://a?q HTTP/1.1\r\n" H "X-Request-Id: with space\r\n\r\n");
    CHECK_STR(last_fields, "GET|/|q|||||||");
    expect_ok(c, "POST /ok HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n"
                 "3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nT: u\r\n\r\n");
    CHECK_STR(last_body, "abc0123456789");
    CHECK_INT(n_headers_seen, 3);
    CHECK_INT(n_requests_seen, 3);
    server_stop();
}

static void answers_are_framed(void)
{
    struct answer a;
    server_start(test_limits());
    struct client *c = client_open();
    client_say(c, "HEAD /ok HTTP/1.1\r\n" H "\r\n");
    WAIT(c->n_rx && answer_read(c->rx, c->n_rx, false, true, &a));
    CHECK(answer_says(&a, "Content-Length: 2"));
    CHECK(answer_says(&a, "X-Test: yes"));
    CHECK(answer_read(c->rx, c->n_rx, false, true, &a) == c->n_rx);
    int day, year, hour, min, sec;
    char week_day[4], month[4];
    CHECK_INT(sscanf(strstr(a.head, "\r\nDate: "), "\r\nDate: %3s, %2d %3s %4d %2d:%2d:%2d GMT",
                     week_day, &day, month, &year, &hour, &min, &sec),
              7);
    expect_ok(c, "GET /ok HTTP/1.1\r\n" H "\r\n");

    c->n_rx = 0;
    client_say(c, "OPTIONS * HTTP/1.1\r\n" H "\r\n");
    WAIT(answer_get(c, 0, &a));
    CHECK(answer_says(&a, "Allow: GET, HEAD, POST, OPTIONS"));
    CHECK(!strcasestr(a.head, "Content-Length"));
    c->n_rx = 0;
    client_say(c, "TRACE /ok HTTP/1.1\r\n" H "\r\n");
    WAIT(answer_get(c, 0, &a));
    CHECK_INT(a.status, 405);
    CHECK(answer_says(&a, "Allow: GET, HEAD, POST, OPTIONS"));
    CHECK(answer_says(&a, "Content-Type: application/json"));
    CHECK(strstr(a.body, "{\"error\":{") == a.body);

    struct client *old = client_open();
    client_say(old, "GET /ok HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    WAIT(answer_get(old, 0, &a));
    CHECK(answer_says(&a, "Connection: keep-alive"));

    struct client *refused_head = client_open(); /* no body, whatever the verdict */
    client_say(refused_head, "HEAD /ok HTTP/1.1\r\n\r\n");
    WAIT(refused_head->eof);
    CHECK_INT(answer_read(refused_head->rx, refused_head->n_rx, true, true, &a),
              refused_head->n_rx);
    CHECK_INT(a.status, 400);
    server_stop();
}

static void streams_are_framed(void)
{
    struct answer a;
    server_start(test_limits());
    struct client *c = client_open();
    client_say(c, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    pump();
    size_t n_head = c->n_rx;
    CHECK_OK(http_write(held, "data: {\"a\":1}\n\n", 15));
    CHECK_OK(http_write(held, "", 0));
    CHECK_OK(sse_keepalive(held));
    client_fill(c);
    CHECK_INT(c->n_rx, n_head); /* all of one iteration leaves together */
    CHECK_INT(flush_all(), 1);  /* unless it is to leave now */
    CHECK_INT(poll(&(struct pollfd){.fd = c->fd, .events = POLLIN}, 1, 1000), 1);
    client_fill(c);
    CHECK(c->n_rx > n_head);
    CHECK_INT(flush_all(), 0);
    CHECK_OK(sse_done(held));
    http_end(held);
    WAIT(answer_get(c, 0, &a));
    CHECK(a.ended && a.chunked);
    CHECK(answer_says(&a, "Content-Type: text/event-stream; charset=utf-8"));
    CHECK(answer_says(&a, "Cache-Control: no-cache"));
    CHECK(answer_says(&a, "X-Accel-Buffering: no"));
    static const char wire[] = "f\r\ndata: {\"a\":1}\n\n\r\n"
                               "e\r\n: keep-alive\n\n\r\n"
                               "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    CHECK_STR(a.body, wire);
    expect_ok(c, "GET /ok HTTP/1.1\r\n" H "\r\n"); /* and the connection goes on */

    held = NULL;
    struct client *old = client_open(); /* 1.0: no chunks, the end is the end */
    client_say(old, "GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    WAIT(held);
    CHECK_OK(sse_done(held));
    http_end(held);
    WAIT(old->eof);
    CHECK(answer_get(old, 0, &a));
    CHECK(!a.chunked && answer_says(&a, "Connection: close"));
    CHECK_STR(a.body, "data: [DONE]\n\n");

    held = NULL;
    struct client *broken = client_open(); /* abort: everything written, then no last chunk */
    client_say(broken, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    CHECK_OK(http_write(held, "data: {\"error\":1}\n\n", 19));
    http_abort(held);
    WAIT(broken->eof);
    CHECK(answer_get(broken, 0, &a));
    CHECK(!a.ended);
    CHECK_STR(a.body, "13\r\ndata: {\"error\":1}\n\n\r\n");

    held = NULL;
    struct client *head = client_open();
    client_say(head, "HEAD /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    CHECK_OK(sse_done(held));
    http_end(held);
    WAIT(head->n_rx);
    CHECK(head->n_rx > 4 && !strcmp(head->rx + head->n_rx - 4, "\r\n\r\n"));
    CHECK(strcasestr(head->rx, "Transfer-Encoding: chunked") != NULL);
    CHECK_INT(n_gone, 0);
    server_stop();
}

static void pipelined_answers_keep_order(void)
{
    struct answer a;
    server_start(test_limits());
    struct client *c = client_open();
    client_say(c, "GET /later HTTP/1.1\r\n" H "\r\nGET /later HTTP/1.1\r\n" H "\r\n"
                  "POST /query?3 HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nab");
    WAIT(held);
    for (int i = 0; i < 2; i++) {
        struct http_exchange *x = held;
        CHECK_INT(n_held, i + 1); /* one in work */
        CHECK(http_get_data(x) == &n_held);
        held = NULL;
        http_reply(x, 200, "text/plain", i ? "1" : "0", 1);
        CHECK(held == NULL); /* the next one comes from the loop, not from inside http_reply */
        if (i == 0)
            WAIT(held);
    }
    WAIT(answer_get(c, 2, &a));
    CHECK(answer_get(c, 0, &a) && a.body[0] == '0');
    CHECK(answer_get(c, 1, &a) && a.body[0] == '1');
    CHECK(answer_get(c, 2, &a) && a.body[0] == '3');

    static char flood[1000 * 64];
    size_t n = 0;
    for (int i = 0; i < 1000; i++)
        n += (size_t)sprintf(flood + n, "GET /query?%d HTTP/1.1\r\n" H "\r\n", i);
    struct client *f = client_open();
    client_send(f, flood, n);
    WAIT(f->eof); /* 1000 requests are all that one connection gets */
    size_t at = 0;
    for (int i = 0; i < 1000; i++) {
        size_t used = answer_read(f->rx + at, f->n_rx - at, true, false, &a);
        if (!used || atoi(a.body) != i) {
            CHECK_INT(used ? atoi(a.body) : -1, i);
            break;
        }
        at += used;
        if (answer_says(&a, "Connection: close") != (i == 999))
            CHECK_INT(i, 999);
    }
    CHECK_INT(at, f->n_rx);
    server_stop();
}

static void keep_alive_lasts_1000_requests(void)
{
    struct answer a;
    server_start(test_limits());
    struct client *c = client_open();
    for (int i = 0; i < 1000; i++) {
        c->n_rx = 0;
        client_say(c, "POST /echo HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nhi");
        while (!answer_get(c, 0, &a) && !c->eof)
            pump();
        if (c->eof || a.status != 200 || memcmp(a.body, "hi", 2) != 0)
            break;
        CHECK(answer_says(&a, "Connection: close") == (i == 999));
    }
    WAIT(c->eof);
    CHECK_INT(n_requests_seen, 1000);
    CHECK_INT(http_server_n_exchanges(server), 0);
    server_stop();
}

/* ---- bodies and expectations ---- */

static void body_limits_hold(void)
{
    struct answer a;
    struct http_limits limits = test_limits();
    limits.max_body_bytes = 1000;
    server_start(limits);
    char body[1001];
    memset(body, 'b', sizeof(body));

    struct client *c = client_open(); /* 413 instead of 100, before any body */
    client_say(c,
               "POST /echo HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n");
    WAIT(c->eof);
    CHECK(answer_get(c, 0, &a));
    CHECK_INT(a.status, 413);
    CHECK(!answer_get(c, 1, &a) || c->n_rx == 0);

    struct client *exact = client_open();
    client_say(exact, "POST /echo HTTP/1.1\r\n" H "Content-Length: 1000\r\n\r\n");
    client_send(exact, body, 1000);
    WAIT(answer_get(exact, 0, &a));
    CHECK_INT(a.status, 200);
    CHECK_INT(a.n_body, 1000);

    struct client *chunked = client_open(); /* at the limit, not at the end */
    client_say(chunked, POST_TE "3e8\r\n");
    client_send(chunked, body, 1000);
    client_say(chunked, "\r\n1\r\n");
    WAIT(answer_get(chunked, 0, &a));
    CHECK_INT(a.status, 413);
    CHECK_INT(n_requests_seen, 1);
    CHECK_INT(n_gone, 1); /* the headers callback had shown it */
    WAIT(chunked->eof);

    struct client *fits = client_open();
    client_say(fits, POST_TE "3e8\r\n");
    client_send(fits, body, 1000);
    client_say(fits, "\r\n0\r\n\r\n");
    WAIT(answer_get(fits, 0, &a));
    CHECK_INT(a.status, 200);
    server_stop();
}

static void expectations_are_met(void)
{
    struct answer a;
    server_start(test_limits());
    struct client *c = client_open();
    client_say(c, "POST /echo HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    WAIT(answer_get(c, 0, &a));
    CHECK_INT(a.status, 100);
    CHECK_INT(n_requests_seen, 0);
    client_say(c, "ab");
    WAIT(answer_get(c, 1, &a));
    CHECK_INT(a.status, 200);

    struct client *old = client_open(); /* no 100 to 1.0 */
    client_say(old, "POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab");
    WAIT(old->eof);
    CHECK(answer_get(old, 0, &a));
    CHECK_INT(a.status, 200);

    struct client *early = client_open(); /* the final answer comes instead of 100, then the end */
    client_say(early,
               "POST /missing HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    WAIT(answer_get(early, 0, &a));
    CHECK_INT(a.status, 404);
    CHECK(answer_says(&a, "Connection: close"));
    client_say(early, "GET /ok HTTP/1.1\r\n" H "\r\n"); /* a body, if anything: never a request */
    WAIT(early->eof);
    CHECK_INT(n_requests_seen, 2);
    CHECK_INT(n_gone, 0);
    server_stop();
}

static void refused_upload_reads_its_answer(void)
{
    struct answer a;
    server_start(test_limits());
    size_t n = 2u << 20;
    OWNED_MEM char *upload = malloc(n);
    memset(upload, 'u', n);
    memcpy(upload, "POST /echo HTTP/1.1\r\n" H "Content-Length: 2000000\r\n\r\n", 57);
    for (int i = 0; i < 50; i++) {
        struct client *c = client_open();
        client_send(c, upload, n);
        WAIT(answer_get(c, 0, &a) || c->eof);
        CHECK(answer_get(c, 0, &a));
        CHECK_INT(a.status, 413);
        client_close(c);
    }
    server_stop();
}

/* ---- deadlines ---- */

static void slow_clients_get_408(void)
{
    struct answer a;
    struct http_limits limits = test_limits();
    limits.header_timeout_ms = 60;
    limits.body_idle_ms = 60;
    limits.body_total_ms = 5000;
    server_start(limits);
    struct client *slow_head = client_open(), *slow_body = client_open(), *idle = client_open();
    client_say(slow_head, "GET /ok HTTP/1.1\r\nHos");
    client_say(slow_body,
               "POST /echo HTTP/1.1\r\n" H "X-Request-Id: late\r\nContent-Length: 10\r\n\r\nabc");
    WAIT(slow_head->eof && slow_body->eof);
    CHECK(answer_get(slow_head, 0, &a));
    CHECK_INT(a.status, 408);
    CHECK(answer_says(&a, "Connection: close"));
    CHECK(answer_get(slow_body, 0, &a));
    CHECK_INT(a.status, 408);
    CHECK(answer_says(&a, "X-Request-Id: late"));
    CHECK_INT(n_gone, 1);
    CHECK_INT(http_server_n_exchanges(server), 0);
    expect_ok(idle, "GET /ok HTTP/1.1\r\n" H "\r\n"); /* saying nothing is allowed for longer */
    server_stop();

    limits.body_idle_ms = 5000; /* a steady trickle meets the total deadline */
    limits.body_total_ms = 80;
    server_start(limits);
    struct client *trickle = client_open();
    client_say(trickle, "POST /echo HTTP/1.1\r\n" H "Content-Length: 1000000\r\n\r\n");
    while (!answer_get(trickle, 0, &a) && !trickle->eof) {
        client_say(trickle, "a");
        pump();
    }
    CHECK(answer_get(trickle, 0, &a));
    CHECK_INT(a.status, 408);
    server_stop();
}

static void idle_connections_are_closed(void)
{
    struct http_limits limits = test_limits();
    limits.keepalive_ms = 60;
    server_start(limits);
    struct client *used = client_open(), *fresh = client_open(), *busy = client_open();
    expect_ok(used, "GET /ok HTTP/1.1\r\n" H "\r\n");
    used->n_rx = 0;
    client_say(busy, "GET /later HTTP/1.1\r\n" H "\r\n");
    WAIT(used->eof && fresh->eof);
    CHECK_INT(used->n_rx, 0); /* silently */
    CHECK_INT(fresh->n_rx, 0);
    CHECK(!busy->eof && held);
    http_reply(held, 200, "text/plain", "late", 4);
    WAIT(busy->eof);
    server_stop();
}

/* ---- clients that leave ---- */

static void gone_is_called_once(void)
{
    server_start(test_limits());
    struct client *c = client_open(); /* closes while in work */
    client_say(c, "GET /later HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    client_close(c);
    WAIT(n_gone == 1);
    CHECK(!held);
    CHECK_INT(http_server_n_exchanges(server), 0);

    struct client *half = client_open(); /* FIN is cancel, also mid-stream */
    client_say(half, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    shutdown(half->fd, SHUT_WR);
    WAIT(n_gone == 2);
    WAIT(half->eof);

    struct client *reset = client_open();
    client_say(reset, "GET /later HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    struct linger hard = {1, 0};
    setsockopt(reset->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
    client_close(reset);
    WAIT(n_gone == 3);

    struct client *body = client_open(); /* in the body, after the headers callback */
    client_say(body, "POST /echo HTTP/1.1\r\n" H "Content-Length: 9\r\n\r\nabc");
    WAIT(http_server_n_exchanges(server) == 1);
    client_close(body);
    WAIT(n_gone == 4);

    static char ahead[20000]; /* FIN behind more bytes than are read ahead */
    memset(ahead, 'a', sizeof(ahead));
    struct client *full = client_open();
    client_say(full, "GET /later HTTP/1.1\r\n" H "\r\n");
    client_send(full, ahead, sizeof(ahead));
    WAIT(held && full->n_tx == 0);
    shutdown(full->fd, SHUT_WR);
    WAIT(n_gone == 5);

    struct client *ended = client_open(); /* not after the end */
    client_say(ended, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    http_end(held);
    client_close(ended);
    WAIT(http_server_n_connections(server) == 0);
    CHECK_INT(n_gone, 5);
    CHECK_INT(http_server_n_exchanges(server), 0);

    struct client *quick = client_open(); /* a complete answer still reaches a half-closed client */
    struct answer a;
    client_say(quick, "GET /big HTTP/1.1\r\n" H "\r\n");
    shutdown(quick->fd, SHUT_WR);
    WAIT(quick->eof);
    CHECK(answer_get(quick, 0, &a));
    CHECK_INT(a.n_body, 4 << 20);
    server_stop();
}

static void slow_reader_is_cut_off(void)
{
    struct http_limits limits = test_limits();
    limits.max_write_buffer = 64u << 10;
    server_start(limits);
    struct client *c = client_socket(4096), *other = client_open();
    CHECK(client_connect(c));
    c->paused = true;
    client_say(c, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    static char piece[16384];
    enum err err = ERR_OK;
    int n = 0;
    while (err == ERR_OK && n < 10000) {
        err = http_write(held, piece, sizeof(piece));
        n++;
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    CHECK_INT(err, ERR_TOO_LARGE);
    CHECK(n * (int)sizeof(piece) < 8 << 20); /* what the kernel and the limit hold */
    WAIT(n_gone == 1);
    CHECK_INT(http_server_n_exchanges(server), 0);
    expect_ok(other, "GET /ok HTTP/1.1\r\n" H "\r\n");

    struct client *fast = client_open(); /* much in one iteration is not slowness */
    client_say(fast, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    for (int i = 0; i < 5; i++)
        CHECK_OK(http_write(held, piece, sizeof(piece)));
    struct http_exchange *x = held;
    held = NULL;
    http_end(x);
    struct answer a;
    WAIT(answer_get(fast, 0, &a));
    CHECK(a.ended);

    struct client *cut = client_socket(4096); /* end instead of waiting for gone: no gone */
    CHECK(client_connect(cut));
    cut->paused = true;
    client_say(cut, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    while (http_write(held, piece, sizeof(piece)) == ERR_OK)
        uv_run(&loop, UV_RUN_NOWAIT);
    CHECK_INT(http_write(held, piece, 1), ERR_TOO_LARGE);
    http_end(held);
    CHECK_INT(http_server_n_exchanges(server), 0);
    WAIT(http_server_n_connections(server) <= 3);
    CHECK_INT(n_gone, 1);
    server_stop();
}

static void stalled_reader_is_cut_off(void)
{
    struct http_limits limits = test_limits();
    limits.write_stall_ms = 80;
    limits.max_write_buffer = 16u << 20;
    server_start(limits);
    struct client *reply = client_socket(4096), *stream = client_socket(4096);
    CHECK(client_connect(reply) && client_connect(stream));
    reply->paused = stream->paused = true;
    client_say(reply, "GET /big HTTP/1.1\r\n" H "\r\n");
    client_say(stream, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    size_t n = 8u << 20;
    OWNED_MEM char *big = calloc(1, n);
    CHECK_OK(http_write(held, big, n));
    WAIT(http_server_n_connections(server) == 0);
    CHECK_INT(n_gone, 1); /* the reply had ended */
    server_stop();
}

static void slow_but_steady_reader_gets_all(void)
{
    server_start(test_limits());
    struct client *c = client_socket(4096);
    CHECK(client_connect(c));
    client_say(c, "GET /big HTTP/1.1\r\n" H "\r\nGET /ok HTTP/1.1\r\n" H "\r\n");
    struct answer a;
    WAIT(answer_get(c, 1, &a));
    CHECK(answer_get(c, 0, &a));
    CHECK_INT(a.n_body, 4 << 20);
    server_stop();
}

/* ---- the server's own life ---- */

static void drain_finishes_what_runs(void)
{
    struct answer a;
    server_start(test_limits());
    struct client *idle = client_open(), *later = client_open(), *stream = client_open();
    struct client *partial = client_open();
    expect_ok(idle, "GET /ok HTTP/1.1\r\n" H "\r\n");
    client_say(later, "GET /later HTTP/1.1\r\n" H "\r\nGET /ok HTTP/1.1\r\n" H "\r\n");
    WAIT(held);
    struct http_exchange *reply = held;
    held = NULL;
    client_say(stream, "GET /stream HTTP/1.1\r\n" H "\r\n");
    client_say(partial, "GET /ok HTTP/1.1\r\n");
    WAIT(held);
    WAIT(http_server_n_connections(server) == 4);

    http_server_drain(server);
    WAIT(idle->eof);
    struct client *refused = client_socket(0);
    CHECK(!client_connect(refused));
    http_reply(reply, 200, "text/plain", "fin", 3);
    WAIT(later->eof);
    CHECK(answer_get(later, 0, &a));
    CHECK(answer_says(&a, "Connection: close"));
    CHECK(!answer_get(later, 1, &a)); /* the pipelined one may be sent again elsewhere */
    CHECK(!stream->eof);
    CHECK_OK(sse_done(held));
    http_end(held);
    WAIT(stream->eof);
    CHECK(answer_get(stream, 0, &a) && a.ended);
    client_say(partial, H "\r\n");
    WAIT(partial->eof);
    CHECK(answer_get(partial, 0, &a));
    CHECK_INT(a.status, 200);
    CHECK_INT(n_gone, 0);
    server_stop();
}

/* Clients that do anything at any time, a handler that ends exchanges in any way at any time: every
 * exchange that was shown ends exactly once. The sanitizers watch their memory. */
static void chaos(uint32_t n_threads)
{
    static const char *const pieces[] = {
        "GET /chaos HTTP/1.1\r\n" H "\r\n",
        "GET /chaos HTTP/1.1\r\n" H "\r\nGET /chaos HTTP/1.1\r\n" H "\r\n",
        "GET /chaos HTTP/1.0\r\n\r\n",
        "HEAD /chaos HTTP/1.1\r\n" H "\r\n",
        "POST /chaos HTTP/1.1\r\n" H "Content-Length: 5\r\n\r\nab",
        "POST /chaos HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        "0\r\n\r\n",
        "cde",
        "GET /missing HTTP/1.1\r\n" H "\r\n",
        "GET /big HTTP/1.1\r\n" H "\r\n",
        "GET /chaos HT",
        "POST /echo HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        "\r\n",
    };
    static char piece[8192];
    const char *given = getenv("BATON_TEST_SEED");
    unsigned seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)clock_now_us();
    printf("     BATON_TEST_SEED=%u\n", seed);
    struct http_limits limits = test_limits();
    limits.max_write_buffer = 64u << 10;
    limits.header_timeout_ms = limits.body_idle_ms = 40;
    limits.write_stall_ms = 60;
    server_start(limits);
    CHECK_OK(http_server_use_threads(server, n_threads));
    memset(slots, 0, sizeof(slots));
    n_chaos_shown = n_chaos_ended = n_chaos_gone = 0;
    size_t n_sent = 0;
    for (int step = 0; step < 20000; step++) {
        int dice = rand_r(&seed) % 100;
        struct client *c = n_clients ? clients[rand_r(&seed) % n_clients] : NULL;
        int i = rand_r(&seed) % N_SLOTS;
        struct http_exchange *x = slots[i];
        if (dice < 10 && n_clients < 50) {
            c = client_socket(rand_r(&seed) % 2 ? 4096 : 0);
            CHECK(client_connect(c));
        } else if (dice < 45 && c) {
            const char *text = pieces[(unsigned)rand_r(&seed) % ARRAY_LEN(pieces)];
            if (!c->n_tx)
                client_say(c, text);
        } else if (dice < 50 && c) {
            struct linger hard = {rand_r(&seed) % 2, 0};
            setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
            client_close(c);
        } else if (dice < 53 && c) {
            shutdown(c->fd, SHUT_WR);
        } else if (dice < 58 && c) {
            c->paused = !c->paused;
        } else if (dice < 70 && x) {
            if (!slot_streams[i])
                http_stream(x, 200, "text/event-stream");
            slot_streams[i] = true;
            for (int k = rand_r(&seed) % 4; k > 0; k--)
                (void)http_write(x, piece, (size_t)rand_r(&seed) % sizeof(piece));
            if (rand_r(&seed) % 2)
                http_server_flush(server, rand_r(&seed) % 4 != 0, count_sent, &n_sent);
        } else if (dice < 80 && x) {
            slots[i] = NULL;
            n_chaos_ended++;
            if (rand_r(&seed) % 3 == 0)
                http_abort(x);
            else if (slot_streams[i])
                http_end(x);
            else
                http_reply(x, 200, "text/plain", piece, (size_t)rand_r(&seed) % sizeof(piece));
        } else if (dice < 98) {
            if (rand_r(&seed) % 4)
                http_server_flush(server, false, count_sent, &n_sent);
            uv_run(&loop, UV_RUN_NOWAIT);
            for (int k = 0; k < n_clients; k++)
                client_fill(clients[k]);
        } else {
            pump();
        }
    }
    while (n_clients)
        client_close(clients[0]);
    WAIT(http_server_n_connections(server) == 0);
    CHECK(n_chaos_shown > 100 && n_chaos_gone > 10 && n_chaos_ended > 10);
    CHECK_INT(n_chaos_ended + n_chaos_gone, n_chaos_shown);
    CHECK(n_sent > 100);
    server_stop();
}

static void exchanges_end_once_in_chaos(void) { chaos(1); }
static void exchanges_end_once_in_chaos_with_threads(void) { chaos(3); }

/* Line number k of stream i, long where its client does not read. */
static size_t step_line(int i, int k, char *ret, size_t cap)
{
    size_t n = (size_t)snprintf(ret, cap, "stream %d line %d ", i, k),
           more = i % 8 == 1 ? 99000 : 200;
    memset(ret + n, '.', more);
    return n + more;
}

static void count_queued(uv_handle_t *h, void *user)
{
    *(int *)user += h->type == UV_TCP && uv_stream_get_write_queue_size((uv_stream_t *)h) > 0;
}

/* Steps of many streams, handed to threads while the next events are written. Of eight clients one
 * does not read for a while, one is closed and one reset in the middle, and one's stream ends. */
static void a_step_is_sent_by_threads(void)
{
    enum { N = 120, STEPS = 60, AT = 20 };
    static struct client *c[N];
    static struct http_exchange *x[N];
    static char line[100000], want[sizeof(line) + 32];
    struct http_limits limits = test_limits();
    limits.max_write_buffer = 8u << 20;
    for (uint32_t n_threads = 1; n_threads <= 4; n_threads++) {
        server_start(limits);
        CHECK_OK(http_server_use_threads(server, n_threads));
        memset(slots, 0, sizeof(slots));
        memset(x, 0, sizeof(x));
        n_chaos_shown = n_chaos_ended = n_chaos_gone = 0;
        for (int i = 0; i < N; i++) {
            c[i] = client_socket(i % 8 == 1 ? 4096 : 0);
            CHECK(client_connect(c[i]));
            client_say(c[i], "GET /chaos HTTP/1.1\r\n" H "\r\n");
            WAIT(slots[i]);
            x[i] = slots[i];
            http_stream(x[i], 200, "text/plain");
            c[i]->paused = i % 8 == 1;
        }
        pump();
        for (int k = 0; k < STEPS; k++) {
            size_t n_sent = 0, n_written = 0;
            for (int i = 0; i < N; i++) {
                if (k == AT && i % 8 == 3) {
                    setsockopt(c[i]->fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0},
                               sizeof(struct linger));
                    client_close(c[i]); /* the server learns it when it sends */
                }
                if (k == AT && i % 8 == 2)
                    client_close(c[i]);
                if (!slots[i])
                    continue;
                n_written++;
                bool twice = i % 8 == 4 && k % 3 == 0; /* also behind what is on its way */
                if (http_write(x[i], line, step_line(i, k, line, sizeof(line))) != ERR_OK)
                    CHECK(k >= AT && (i % 8 == 2 || i % 8 == 3));
                if (i % 16 == 15 || twice)
                    http_server_flush(server, true, count_sent, &n_sent);
                if (twice) {
                    n_written++;
                    CHECK_OK(http_write(x[i], "twice", 5));
                }
                if (k == AT && i % 8 == 5) {
                    slots[i] = NULL;
                    http_end(x[i]);
                }
            }
            http_server_flush(server, false, count_sent, &n_sent);
            if (k < AT)
                CHECK_INT(n_sent, n_written);
            CHECK_INT(http_server_n_connections(server), k <= AT ? N : N - N / 4);
            if (k == AT)
                WAIT(n_chaos_gone == N / 4);
            pump();
        }
        int n_queued = 0;
        uv_walk(&loop, count_queued, &n_queued);
        CHECK_INT(n_queued, N / 8); /* of what these got the kernel took a part */
        for (int i = 0; i < N; i++) {
            if (i % 8 == 2 || i % 8 == 3) {
                CHECK(!slots[i]);
                continue;
            }
            c[i]->paused = false;
            if (slots[i])
                http_end(x[i]);
            slots[i] = NULL;
            struct answer a;
            WAIT(answer_get(c[i], 0, &a) && a.ended);
            size_t at = 0;
            for (int k = 0; k < (i % 8 == 5 ? AT + 1 : STEPS); k++) {
                size_t n = step_line(i, k, line, sizeof(line));
                int n_want = snprintf(want, sizeof(want), "%zx\r\n%.*s\r\n%s", n, (int)n, line,
                                      i % 8 == 4 && k % 3 == 0 ? "5\r\ntwice\r\n" : "");
                CHECK(at + (size_t)n_want <= a.n_body &&
                      !memcmp(a.body + at, want, (size_t)n_want));
                at += (size_t)n_want;
            }
            CHECK_INT(a.n_body, at + 5);
        }
        CHECK_INT(n_chaos_gone, N / 4);
        server_stop();
    }
}

static void destroy_cuts_without_callbacks(void)
{
    server_start(test_limits());
    struct client *work = client_open(), *body = client_open(), *partial = client_open();
    client_say(body, "POST /echo HTTP/1.1\r\n" H "Content-Length: 9\r\n\r\nabc");
    client_say(partial, "GET /");
    client_say(work, "GET /stream HTTP/1.1\r\n" H "\r\n");
    WAIT(held && http_server_n_exchanges(server) == 2);
    CHECK_OK(http_write(held, "x", 1));
    http_server_destroy(server);
    uv_run(&loop, UV_RUN_DEFAULT);
    CHECK_INT(n_gone, 0);
    CHECK_INT(uv_loop_close(&loop), 0);
    while (n_clients)
        client_close(clients[0]);
    http_server_destroy(NULL);
}

static void address_in_use_is_told(void)
{
    struct http_server *second = NULL;
    struct http_limits limits = test_limits();
    server_start(limits);
    int port = http_server_port(server);
    enum err err = http_server_create(&loop, "127.0.0.1", port, &limits, &handler, NULL, &second);
    CHECK_INT(err, ERR_IO);
    CHECK(strstr(err_text(err), "127.0.0.1:") && strstr(err_text(err), "in use"));
    CHECK(second == NULL);
    err = http_server_create(&loop, "no such host", 0, &limits, &handler, NULL, &second);
    CHECK_INT(err, ERR_IO);
    server_stop();
}

static void connections_are_limited(void)
{
    struct http_limits limits = test_limits();
    limits.max_connections = 2;
    server_start(limits);
    struct client *a = client_open(), *b = client_open();
    WAIT(http_server_n_connections(server) == 2);
    struct client *third = client_open();
    WAIT(third->eof);
    CHECK_INT(third->n_rx, 0);
    expect_ok(a, "GET /ok HTTP/1.1\r\n" H "\r\n");
    client_close(b);
    WAIT(http_server_n_connections(server) == 1);
    expect_ok(client_open(), "GET /ok HTTP/1.1\r\n" H "\r\n");
    server_stop();
}

/* What clients have sent of their bodies is bounded for all of them together; small requests go
 * on. */
static void bodies_are_limited_together(void)
{
    enum { N = 300000 };
    static const char head[] = "POST /echo HTTP/1.1\r\n" H "Content-Length: 1000000\r\n\r\n";
    struct answer a;
    struct http_limits limits = test_limits();
    limits.max_bodies_bytes = 1u << 20;
    server_start(limits);
    OWNED_MEM char *part = calloc(1, sizeof(head) + N), *rest = calloc(1, 1000000);
    memcpy(part, head, strlen(head));
    struct client *c[3];
    for (int i = 0; i < 3; i++) {
        c[i] = client_open();
        client_send(c[i], part, strlen(head) + N); /* takes 512 KiB */
    }
    WAIT(c[0]->eof + c[1]->eof + c[2]->eof == 1); /* it depends on who is read first */
    int refused = c[0]->eof ? 0 : c[1]->eof ? 1 : 2;
    CHECK(answer_get(c[refused], 0, &a));
    CHECK_INT(a.status, 503);
    CHECK(answer_says(&a, "Retry-After: 1"));
    expect_ok(client_open(), "POST /ok HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nab");
    client_close(c[(refused + 1) % 3]);
    WAIT(http_server_n_exchanges(server) == 1);
    struct client *stays = c[(refused + 2) % 3];
    client_send(stays, rest, 1000000 - N);
    WAIT(answer_get(stays, 0, &a));
    CHECK_INT(a.status, 200);
    struct client *last = client_open(); /* all of it has been given back */
    client_send(last, part, strlen(head) + N);
    client_send(last, rest, 1000000 - N);
    WAIT(answer_get(last, 0, &a));
    CHECK_INT(a.status, 200);
    server_stop();
}

static void descriptors_running_out_is_survived(void)
{
    enum { N = 30 };
    struct answer a;
    struct client *c[N];
    struct rlimit before, tight;
    server_start(test_limits());
    for (int i = 0; i < N; i++)
        c[i] = client_socket(0);
    getrlimit(RLIMIT_NOFILE, &before);
    tight = before;
    tight.rlim_cur = (rlim_t)c[N - 1]->fd + 11;
    setrlimit(RLIMIT_NOFILE, &tight);
    for (int i = 0; i < N; i++) {
        CHECK(client_connect(c[i]));
        client_say(c[i], "GET /ok HTTP/1.1\r\n" H "\r\n");
    }
    int n_served = 0, n_closed = 0;
    for (int i = 0; i < N; i++) {
        WAIT(answer_get(c[i], 0, &a) || c[i]->eof);
        if (answer_get(c[i], 0, &a))
            n_served++;
        else
            n_closed++;
    }
    CHECK(n_served > 0 && n_closed > 0);
    setrlimit(RLIMIT_NOFILE, &before);
    expect_ok(client_open(), "GET /ok HTTP/1.1\r\n" H "\r\n");
    server_stop();
}

static long resident_bytes(void)
{
    long pages = 0;
    OWNED_FILE f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%*d %ld", &pages) != 1)
        return 0;
    return pages * sysconf(_SC_PAGESIZE);
}

static void idle_connections_are_small(void)
{
    enum { N = 400 };
    static struct client *c[N];
    server_start(test_limits());
    for (int i = 0; i < N; i++)
        c[i] = client_socket(0);
    long before = resident_bytes();
    for (int i = 0; i < N; i++) {
        CHECK(client_connect(c[i]));
        client_say(c[i], "POST /none HTTP/1.1\r\n" H "Content-Length: 2\r\n\r\nab");
        char answer[512]; /* not kept, so that only the server's memory counts */
        ssize_t n;
        do
            uv_run(&loop, UV_RUN_NOWAIT);
        while ((n = recv(c[i]->fd, answer, sizeof(answer), MSG_DONTWAIT)) < 0);
        CHECK(n > 12 && !memcmp(answer, "HTTP/1.1 204", 12));
    }
    CHECK_INT(http_server_n_connections(server), N);
    long each = (resident_bytes() - before) / N;
    printf("     idle connection: %ld bytes resident\n", each);
#ifndef WITH_ASAN
    CHECK(each <= 4096);
#endif
    server_stop();
}

int main(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = MIN(files.rlim_max, (rlim_t)4096);
    setrlimit(RLIMIT_NOFILE, &files);
    cases_make();
    RUN(idle_connections_are_small); /* first: later the heap has room that hides the cost */
    RUN(llhttp_is_strict);
    RUN(cuts_do_not_change_the_verdict);
    RUN(raw_requests_get_their_verdict);
    RUN(raw_requests_byte_by_byte);
    RUN(refusals_know_the_id);
    RUN(request_is_shown_whole);
    RUN(answers_are_framed);
    RUN(streams_are_framed);
    RUN(pipelined_answers_keep_order);
    RUN(keep_alive_lasts_1000_requests);
    RUN(body_limits_hold);
    RUN(expectations_are_met);
    RUN(refused_upload_reads_its_answer);
    RUN(slow_clients_get_408);
    RUN(idle_connections_are_closed);
    RUN(gone_is_called_once);
    RUN(slow_reader_is_cut_off);
    RUN(stalled_reader_is_cut_off);
    RUN(slow_but_steady_reader_gets_all);
    RUN(drain_finishes_what_runs);
    RUN(exchanges_end_once_in_chaos);
    RUN(exchanges_end_once_in_chaos_with_threads);
    RUN(a_step_is_sent_by_threads);
    RUN(destroy_cuts_without_callbacks);
    RUN(address_in_use_is_told);
    RUN(connections_are_limited);
    RUN(bodies_are_limited_together);
    RUN(descriptors_running_out_is_survived);
    for (int i = 0; i < n_made; i++)
        free((char *)made_cases[i].data);
    return check_done();
}
