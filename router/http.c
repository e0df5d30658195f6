/* http.c: connections, deadlines and answers; what the bytes of a request mean is http_parse.c.
 *
 * One connection works on one request at a time, so answers leave in order without a queue. While a
 * request is in work we go on reading a little (PARSE_AHEAD), only to notice that the client left:
 * FIN counts as "cancel". What is read ahead is parsed when the answer has ended.
 *
 *          +------------------------- answer ended, keep alive <-----------------------+
 *          v                                                                           |
 *   o--> IDLE --byte--> HEAD --block ok--> BODY --all of it--> WORK --answer ended-----+
 *          |             |                  |                   |                      |
 *          |             +--- bad, late ----+                   |     will close       |
 *          |                        | (module answers)          |                      |
 *          |                        v                           |                      |
 *          |                      FLUSH <-----------------------)----------------------+
 *   idle   |                        | all written, FIN sent     | client left, cut off
 *   too    |                        v                           |
 *   long   +------> CLOSED <----- LINGER (<= 2 s)               |
 *                     ^-----------------------------------------+
 *
 * 1. An exchange exists from the end of a good header block until the answer ended or the
 * connection broke: in BODY and WORK, and in HEAD during the headers callback; and while a request
 * is refused. There is one per connection.
 * 2. gone is called at most once, only from the loop, only for an exchange that a callback has
 * shown to the handler and that has not ended; http_write and friends never call back.
 * 3. Whoever finds a connection broken outside the loop's own callbacks sets .broken and lets
 *    conn_service act on it.
 * 4. What is written to a connection leaves in one system call: writers mark it dirty; a prepare
 * and a check handle (before and after the loop polls) service the dirty ones, and
 * http_server_flush sends earlier.
 * 5. At most one uv_write is under way per connection; what is written meanwhile waits in .out.
 * Likewise what the sending threads were handed: .handed says so. They see the descriptor and the
 * bytes, so a connection is not closed until server_settle took these back.
 * 6. CLOSED is entered in conn_close only, and memory goes in the close callback only.
 *
 * An idle connection is this struct and nothing else: buffers, parser and exchange come with a
 * request, and a stream that has sent what it had holds no buffer. Deadlines are checked by one
 * coarse tick over all connections.
 */
#include "router/http.h"

#include <assert.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/own.h"
#include "common/base/warm.h"
#include "router/http_parse.h"
#include "router/senders.h"

enum {
    READ_BYTES = 64 * 1024,        /* one buffer for all connections */
    PARSE_AHEAD_BYTES = 16 * 1024, /* input kept while a request is in work */
    START_BELOW_BYTES = 16 * 1024, /* unsent output above which no pipelined request is begun */
    NOTSENT_BYTES = 128 * 1024,    /* unsent bytes the kernel may hold per connection */
    LINGER_MS = 2000,
    LINGER_BYTES = 16 << 20, /* many clients send all of a body before they read the 413 */
    MAX_REQUESTS_PER_CONNECTION = 1000,
    MAX_SPARE = 512, /* output buffers that go round among the connections */
    SPARE_BYTES = 2048,
    SMALL_BODY_BYTES = 64 * 1024, /* is read even if large ones hold all the memory */
    CHUNK_BYTES = 16 + 2 + 2,     /* at most, around a chunk's data */
    TICK_MS = 250,
    BACKLOG = 4096,
};

const struct http_limits http_limits_default = {
    .max_body_bytes = 4u << 20,
    .max_bodies_bytes = 512u << 20,
    .max_connections = 12000,
    .max_write_buffer = 256u << 10,
    .header_timeout_ms = 10000,
    .body_idle_ms = 10000,
    .body_total_ms = 60000,
    .keepalive_ms = 75000,
    .write_stall_ms = 60000,
};

/* What this module answers itself names what the server as a whole may accept. */
static const char *const allowed_methods = "GET, HEAD, POST, OPTIONS";

struct bytes {
    char *data;
    size_t len, cap;
};

struct list {
    struct list *prev, *next;
};

/* Output handed to libuv because the kernel did not take it at once. */
struct queued {
    uv_write_t req;
    char *data;
};

enum conn_state { IDLE, HEAD, BODY, WORK, FLUSH, LINGER, CLOSED };

struct http_conn {
    uv_tcp_t tcp;
    /* What every event of a stream needs, up to progress_ms, lies together. */
    int fd; /* tcp's */
    enum conn_state state;
    struct http_server *server;
    struct list dirty; /* in server->dirty or server->flushed (self-linked when clean) */
    struct bytes out;
    struct queued *sending;
    bool close_after; /* no request follows the one in work */
    bool reading;
    bool peer_done; /* FIN seen */
    bool broken;    /* rule 3 */
    bool handed;    /* rule 5 */
    bool in_handler;
    uint64_t progress_ms; /* when the client last took output */

    struct list all; /* in server->conns */
    uint32_t n_requests;
    uint64_t deadline_ms;     /* of IDLE, HEAD, LINGER; in BODY the total */
    uint64_t body_idle_ms;    /* the second one in BODY */
    size_t queue_seen;        /* libuv's queue at that time */
    size_t n_discarded;       /* in FLUSH and LINGER */
    struct http_parse *parse; /* in HEAD and BODY, and until the request callback returns */
    size_t n_body_bytes;      /* what its body takes */
    struct http_exchange *x;
    struct bytes in;
};

struct http_exchange {
    struct http_conn *conn;
    void *data;
    bool shown; /* the handler has seen it */
    bool http10, keep_alive, is_head;
    bool body_pending; /* the request is not read to its end */
    bool streaming, chunked, bodyless;
    struct bytes extra; /* added header lines */
};

struct http_server {
    uv_loop_t *loop;
    uv_tcp_t listener;
    uv_timer_t tick;
    uv_prepare_t before_poll;
    uv_check_t after_poll;
    struct http_limits limits;
    struct http_handler handler;
    void *user;
    struct list conns, dirty;
    struct list flushed;           /* dirty ones with nothing to send, but something to do */
    struct bytes spare[MAX_SPARE]; /* the last one is the one that the cache knows best */
    size_t n_spare;
    struct senders *senders; /* NULL: the loop's thread sends */
    http_sent_fn *sent;      /* from http_server_flush until one without more */
    void *sent_user;
    size_t n_conns; /* not CLOSED */
    size_t n_exchanges;
    size_t n_body_bytes; /* of all connections */
    size_t n_handles;    /* of the server and all connections: the last one's close frees */
    int port;
    bool draining, destroyed, listener_closed;
    bool accept_failed; /* out of memory at accept: the tick tries again */
    uint64_t shed_logged_ms;
    time_t date_s;
    char date[40];
    char read_buf[READ_BYTES];
};

static void conn_feed(struct http_conn *c, const char *data, size_t n);
static void conn_refuse(struct http_conn *c, int status, const char *why);
static void conn_service(struct http_conn *c);
static void conn_lost(struct http_conn *c);
static void conn_close(struct http_conn *c);
static void server_settle(struct http_server *s);
static void conn_parse_drop(struct http_conn *c);
static void exchange_end(struct http_exchange *x);

/* ---- small things ---- */

static void list_init(struct list *l) { l->prev = l->next = l; }

static bool list_is_empty(const struct list *l) { return l->next == l; }

static void list_remove(struct list *l)
{
    l->prev->next = l->next;
    l->next->prev = l->prev;
    list_init(l);
}

static void list_append(struct list *head, struct list *l)
{
    l->prev = head->prev;
    l->next = head;
    head->prev->next = l;
    head->prev = l;
}

#define list_entry(l, member)                                                                      \
    ((struct http_conn *)(void *)((char *)(l)-offsetof(struct http_conn, member)))

static bool bytes_reserve(struct bytes *b, size_t n)
{
    if (b->len + n <= b->cap)
        return true;
    size_t cap = b->cap ? b->cap : 512;
    while (cap < b->len + n)
        cap *= 2;
    char *grown = realloc(b->data, cap);
    if (!grown)
        return false;
    b->data = grown;
    b->cap = cap;
    return true;
}

static bool bytes_append(struct bytes *b, const char *data, size_t n)
{
    if (!bytes_reserve(b, n))
        return false;
    if (n)
        memcpy(b->data + b->len, data, n);
    b->len += n;
    return true;
}

static void bytes_finish(struct bytes *b)
{
    free(b->data);
    *b = (struct bytes){0};
}

static const char *reason_phrase(int status)
{
    static const struct {
        int status;
        const char *phrase;
    } phrases[] = {
        {200, "OK"},
        {201, "Created"},
        {202, "Accepted"},
        {204, "No Content"},
        {304, "Not Modified"},
        {400, "Bad Request"},
        {401, "Unauthorized"},
        {403, "Forbidden"},
        {404, "Not Found"},
        {405, "Method Not Allowed"},
        {406, "Not Acceptable"},
        {408, "Request Timeout"},
        {409, "Conflict"},
        {411, "Length Required"},
        {413, "Content Too Large"},
        {414, "URI Too Long"},
        {415, "Unsupported Media Type"},
        {417, "Expectation Failed"},
        {422, "Unprocessable Content"},
        {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"},
        {499, "Client Closed Request"},
        {500, "Internal Server Error"},
        {501, "Not Implemented"},
        {502, "Bad Gateway"},
        {503, "Service Unavailable"},
        {504, "Gateway Timeout"},
        {505, "HTTP Version Not Supported"},
        {529, "Overloaded"},
    };
    for (size_t i = 0; i < ARRAY_LEN(phrases); i++)
        if (phrases[i].status == status)
            return phrases[i].phrase;
    return "Unknown";
}

/* IMF-fixdate, built once a second. strftime would follow the locale. */
static const char *server_date(struct http_server *s)
{
    time_t now_s = (time_t)(clock_wall_us() / 1000000u);
    if (now_s != s->date_s) {
        struct tm tm;
        gmtime_r(&now_s, &tm);
        snprintf(s->date, sizeof(s->date), "%.3s, %02d %.3s %d %02d:%02d:%02d GMT",
                 &"SunMonTueWedThuFriSat"[tm.tm_wday * 3], tm.tm_mday,
                 &"JanFebMarAprMayJunJulAugSepOctNovDec"[tm.tm_mon * 3], tm.tm_year + 1900,
                 tm.tm_hour, tm.tm_min, tm.tm_sec);
        s->date_s = now_s;
    }
    return s->date;
}

/* ---- output ---- */

static void conn_mark_dirty(struct http_conn *c)
{
    if (c->state != CLOSED && list_is_empty(&c->dirty))
        list_append(&c->server->dirty, &c->dirty);
}

static size_t conn_unsent(const struct http_conn *c)
{
    size_t n_queued = c->sending ? uv_stream_get_write_queue_size((const uv_stream_t *)&c->tcp) : 0;
    return c->out.len + n_queued;
}

/* Makes room for n more bytes of output. false: there is none, and the connection is broken. */
static bool conn_reserve(struct http_conn *c, size_t n)
{
    if (!conn_unsent(c))
        c->progress_ms = uv_now(c->server->loop); /* nothing was owed until now */
    conn_mark_dirty(c);
    if (c->broken)
        return false;
    if (!c->out.data && c->server->n_spare)
        c->out = c->server->spare[--c->server->n_spare];
    if (!bytes_reserve(&c->out, n)) {
        log_error("http", "out of memory, connection cut");
        c->broken = true;
        return false;
    }
    return true;
}

static void conn_append(struct http_conn *c, const char *data, size_t n)
{
    if (conn_reserve(c, n))
        (void)bytes_append(&c->out, data, n);
}

static void conn_append_text(struct http_conn *c, const char *text)
{
    conn_append(c, text, strlen(text));
}

/* All of b is sent. A stream writes a line now and then: meanwhile its buffer serves others. */
static void conn_spare(struct http_conn *c, struct bytes b)
{
    struct http_server *s = c->server;
    b.len = 0;
    if (b.cap <= SPARE_BYTES && s->n_spare < MAX_SPARE)
        s->spare[s->n_spare++] = b;
    else if (!c->out.data)
        c->out = b;
    else
        free(b.data);
}

static void on_written(uv_write_t *req, int status)
{
    struct queued *queued = (struct queued *)req;
    struct http_conn *c = req->handle->data;
    free(queued->data);
    free(queued);
    c->sending = NULL;
    if (c->state == CLOSED)
        return;
    c->progress_ms = uv_now(c->server->loop);
    if (status < 0)
        c->broken = true;
    conn_mark_dirty(c);
}

/* send(2) said n, or error, about b, which was .out: what the kernel did not take goes to libuv. */
static void conn_sent(struct http_conn *c, struct bytes b, ssize_t n, int error)
{
    bool failed = n < 0 && error != EAGAIN && error != EINTR && error != ENOBUFS;
    size_t n_sent = n > 0 ? (size_t)n : 0;
    if (n_sent == b.len) {
        conn_spare(c, b);
        return;
    }
    struct queued *queued = failed ? NULL : malloc(sizeof(*queued));
    if (!queued) {
        c->broken = true;
        free(b.data);
        return;
    }
    queued->data = b.data;
    uv_buf_t buf = uv_buf_init(b.data + n_sent, (unsigned)(b.len - n_sent));
    if (uv_write(&queued->req, (uv_stream_t *)&c->tcp, &buf, 1, on_written)) {
        free(queued->data);
        free(queued);
        c->broken = true;
        return;
    }
    c->sending = queued;
    c->queue_seen = uv_stream_get_write_queue_size((uv_stream_t *)&c->tcp);
}

static bool conn_can_send(const struct http_conn *c)
{
    return !c->sending && !c->broken && c->out.len > 0;
}

/* Hands .out to the kernel, and to libuv what the kernel does not take. Calls nobody back. */
static void conn_flush(struct http_conn *c)
{
    if (c->handed)
        server_settle(c->server);
    if (!conn_can_send(c))
        return;
    c->progress_ms = uv_now(c->server->loop);
    struct bytes b = c->out;
    c->out = (struct bytes){0};
    /* libuv has nothing queued: as uv_try_write, with the cheaper system call. */
    ssize_t n = send(c->fd, b.data, b.len, MSG_DONTWAIT | MSG_NOSIGNAL);
    conn_sent(c, b, n, errno);
}

/* A connection that just streams on needs no service: those with more to do get it next to the
 * loop's poll. */
static void conn_flushed(struct http_conn *c)
{
    bool streams_on = c->state == WORK && c->reading && !c->sending && !c->broken;
    if (!streams_on && list_is_empty(&c->dirty))
        list_append(&c->server->flushed, &c->dirty);
}

/* Takes back a batch that is sent. */
static void server_take_back(struct http_server *s, const struct send_batch *batch)
{
    for (uint32_t i = 0; i < batch->n; i++) {
        const struct send_job *j = &batch->jobs[i];
        struct http_conn *c = j->user;
        c->handed = false;
        conn_sent(c, (struct bytes){j->data, j->n, j->cap}, j->n_sent, j->error);
        conn_flushed(c);
    }
    if (s->sent)
        s->sent(s->sent_user, batch->n, batch->sent_us);
}

/* Afterwards no connection is .handed. */
static void server_settle(struct http_server *s)
{
    const struct send_batch *batch;
    while (s->senders && (batch = senders_collect(s->senders, true)))
        server_take_back(s, batch);
}

/* ---- input ---- */

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
    (void)suggested;
    struct http_conn *c = handle->data;
    size_t n = READ_BYTES;
    if (c->state == WORK || c->in.len) /* bounds what conn_stash may get */
        n = PARSE_AHEAD_BYTES - MIN(c->in.len, (size_t)PARSE_AHEAD_BYTES - 1);
    else if (c->state == IDLE || c->state == HEAD)
        n = PARSE_AHEAD_BYTES;
    *buf = uv_buf_init(c->server->read_buf, (unsigned)n);
}

static void conn_stash(struct http_conn *c, const char *data, size_t n)
{
    if (!bytes_append(&c->in, data, n)) {
        log_error("http", "out of memory, connection cut");
        c->broken = true;
        conn_mark_dirty(c);
    }
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf);

/* Reads unless enough is waiting already. Without reading, a FIN stays unseen: see conn_peer_done.
 */
static void conn_read_update(struct http_conn *c)
{
    bool wants = c->state != CLOSED && !c->peer_done && c->in.len < PARSE_AHEAD_BYTES &&
                 c->n_discarded < LINGER_BYTES;
    if (wants == c->reading)
        return;
    c->reading = wants;
    if (!wants)
        uv_read_stop((uv_stream_t *)&c->tcp);
    else if (uv_read_start((uv_stream_t *)&c->tcp, on_alloc, on_read))
        c->broken = true; /* the caller is conn_service, or marks dirty */
}

/* The client will send nothing more. */
static void conn_peer_left(struct http_conn *c)
{
    c->peer_done = true;
    if (c->state == FLUSH || (!c->x && conn_unsent(c))) {
        /* It may still be reading answers, which are complete. */
        c->state = FLUSH;
        conn_parse_drop(c);
        c->close_after = true;
        bytes_finish(&c->in);
        conn_mark_dirty(c);
    } else {
        conn_lost(c);
    }
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct http_conn *c = stream->data;
    if (c->state == CLOSED || n == 0)
        return;
    if (n == UV_EOF) {
        conn_peer_left(c);
    } else if (n < 0) {
        conn_lost(c);
    } else if (c->state == FLUSH || c->state == LINGER) {
        c->n_discarded += (size_t)n;
    } else if (c->state == WORK || c->in.len) {
        conn_stash(c, buf->base, (size_t)n);
    } else {
        if (c->state == BODY)
            c->body_idle_ms = uv_now(c->server->loop) + c->server->limits.body_idle_ms;
        conn_feed(c, buf->base, (size_t)n);
    }
    conn_read_update(c);
    if (c->broken)
        conn_mark_dirty(c);
}

/* Whether a client that we are not reading from has sent FIN behind its unread bytes. */
static bool conn_has_fin(struct http_conn *c)
{
    struct tcp_info info;
    socklen_t n = sizeof(info);
    return !c->reading && !c->peer_done && !getsockopt(c->fd, IPPROTO_TCP, TCP_INFO, &info, &n) &&
           (info.tcpi_state == TCP_CLOSE_WAIT || info.tcpi_state == TCP_CLOSE);
}

/* ---- requests ---- */

static bool exchange_create(struct http_conn *c)
{
    struct http_exchange *x = calloc(1, sizeof(*x));
    if (!x)
        return false;
    x->conn = c;
    x->http10 = c->parse->http10;
    x->keep_alive = c->parse->keep_alive;
    x->is_head = c->parse->is_head;
    x->body_pending = c->parse->has_body;
    c->x = x;
    c->server->n_exchanges++;
    return true;
}

static void exchange_free(struct http_exchange *x)
{
    x->conn->x = NULL;
    x->conn->server->n_exchanges--;
    bytes_finish(&x->extra);
    free(x);
}

/* Ends an exchange whose client will not get an answer from the handler. */
static void exchange_lose(struct http_conn *c)
{
    struct http_exchange *x = c->x;
    if (!x)
        return;
    struct http_server *s = c->server;
    if (x->shown && s->handler.gone && !s->destroyed)
        s->handler.gone(s->user, x);
    if (c->x == x) /* a handler that answers inside gone is wrong, but not fatal */
        exchange_free(x);
}

static void conn_head_done(struct http_conn *c)
{
    struct http_server *s = c->server;
    if (c->parse->for_server) { /* OPTIONS *: about the server, answered when it is complete */
        c->state = BODY;
    } else {
        if (!exchange_create(c)) {
            conn_refuse(c, 503, "Out of memory.");
            return;
        }
        if (s->handler.headers) {
            c->x->shown = true;
            c->in_handler = true;
            s->handler.headers(s->user, c->x, &c->parse->request);
            c->in_handler = false;
            if (!c->x || c->state == CLOSED)
                return; /* answered; the state says how it goes on */
        }
        c->state = c->x->streaming ? WORK : BODY;
        if (c->state == WORK)
            return;
    }
    if (c->parse->expects_100)
        conn_append_text(c, "HTTP/1.1 100 Continue\r\n\r\n");
    uint64_t now_ms = uv_now(s->loop);
    c->deadline_ms = now_ms + s->limits.body_total_ms;
    c->body_idle_ms = now_ms + s->limits.body_idle_ms;
}

static void conn_request_done(struct http_conn *c)
{
    struct http_server *s = c->server;
    if (c->parse->for_server && !exchange_create(c)) {
        conn_refuse(c, 503, "Out of memory.");
        return;
    }
    struct http_exchange *x = c->x;
    c->state = WORK;
    x->body_pending = false;
    if (c->parse->for_server) {
        http_add_header(x, "Allow", allowed_methods);
        http_reply(x, 204, NULL, NULL, 0);
        return;
    }
    x->shown = true;
    c->in_handler = true;
    s->handler.request(s->user, x, &c->parse->request);
    c->in_handler = false;
}

static void conn_count_body(struct http_conn *c)
{
    size_t n = c->parse ? c->parse->body_cap : 0;
    c->server->n_body_bytes += n - c->n_body_bytes;
    c->n_body_bytes = n;
}

static void conn_parse_drop(struct http_conn *c)
{
    http_parse_destroy(c->parse);
    c->parse = NULL;
    conn_count_body(c);
}

/* Thousands of clients that each send a large body, slowly, must not take all memory. */
static bool conn_body_fits(const struct http_conn *c)
{
    return c->n_body_bytes <= SMALL_BODY_BYTES ||
           c->server->n_body_bytes <= c->server->limits.max_bodies_bytes;
}

/* Parses, and works on what is complete, until the input ends or a request stays in work. */
static void conn_feed(struct http_conn *c, const char *data, size_t n)
{
    struct http_server *s = c->server;
    while (c->state != CLOSED && !c->broken) {
        if (c->state == IDLE) {
            if (n == 0 || s->draining || conn_unsent(c) > START_BELOW_BYTES)
                break;
            c->parse = http_parse_create(s->limits.max_body_bytes);
            if (!c->parse) {
                c->broken = true;
                conn_mark_dirty(c);
                break;
            }
            c->state = HEAD;
            c->n_requests++;
            c->deadline_ms = uv_now(s->loop) + s->limits.header_timeout_ms;
        }
        if (c->state != HEAD && c->state != BODY)
            break;
        size_t used;
        enum http_parse_event event = http_parse_feed(c->parse, data, n, &used);
        data += used;
        n -= used;
        conn_count_body(c);
        if (event == HTTP_PARSE_MORE && conn_body_fits(c))
            break;
        if (event == HTTP_PARSE_MORE)
            conn_refuse(c, 503, "Too many large requests are being received.");
        else if (event == HTTP_PARSE_HEADERS)
            conn_head_done(c);
        else if (event == HTTP_PARSE_DONE)
            conn_request_done(c);
        else
            conn_refuse(c, c->parse->status, c->parse->why);
        if (c->state != BODY)
            conn_parse_drop(c);
    }
    if (n && (c->state == IDLE || (c->state == WORK && !(c->x && c->x->body_pending))))
        conn_stash(c, data, n); /* otherwise nothing after this point may be parsed */
}

/* ---- answers ---- */

static bool status_has_body(int status) { return status >= 200 && status != 204 && status != 304; }

/* Appends a final answer's head, and settles whether the connection ends with it. body_bytes < 0:
 * length unknown. */
static void conn_head_append(struct http_conn *c, int status, const char *content_type,
                             int64_t body_bytes, bool chunked, const struct bytes *extra)
{
    char line[256];
    struct http_server *s = c->server;
    int n = snprintf(line, sizeof(line), "HTTP/1.1 %d %s\r\nDate: %s\r\n", status,
                     reason_phrase(status), server_date(s));
    conn_append(c, line, (size_t)n);
    if (content_type && *content_type) {
        conn_append_text(c, "Content-Type: ");
        conn_append_text(c, content_type);
        conn_append_text(c, "\r\n");
        if (!strncasecmp(content_type, "text/event-stream", 17))
            conn_append_text(c, "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n");
    }
    if (chunked) {
        conn_append_text(c, "Transfer-Encoding: chunked\r\n");
    } else if (body_bytes >= 0 && status_has_body(status)) {
        n = snprintf(line, sizeof(line), "Content-Length: %lld\r\n", (long long)body_bytes);
        conn_append(c, line, (size_t)n);
    }
    if (c->close_after)
        conn_append_text(c, "Connection: close\r\n");
    else if (c->x && c->x->http10)
        conn_append_text(c, "Connection: keep-alive\r\n");
    if (extra)
        conn_append(c, extra->data, extra->len);
    conn_append_text(c, "\r\n");
}

static void conn_settle_close(struct http_conn *c, const struct http_exchange *x)
{
    if (!x->keep_alive || x->body_pending || c->server->draining || c->peer_done ||
        c->n_requests >= MAX_REQUESTS_PER_CONNECTION)
        c->close_after = true;
}

/* This module's own answer to a request that cannot go on; the connection ends with it. */
static void conn_refuse(struct http_conn *c, int status, const char *why)
{
    struct http_server *s = c->server;
    bool streaming = c->x && c->x->streaming;
    log_debug("http", "status=%d %s", status, why);
    exchange_lose(c);
    if (c->state == CLOSED)
        return;
    c->close_after = true;
    /* Too late for a status: leave the stream without its end. Without memory: no answer. */
    if (streaming || !exchange_create(c)) {
        c->state = FLUSH;
        conn_mark_dirty(c);
        return;
    }
    struct http_exchange *x = c->x;
    const char *request_id = c->parse->request.request_id;
    if (status == 405)
        http_add_header(x, "Allow", allowed_methods);
    else if (status == 503)
        http_add_header(x, "Retry-After", "1");
    c->in_handler = true;
    s->handler.refused(s->user, x, status, why, request_id ? request_id : "");
    c->in_handler = false;
}

/* The answer is complete in .out. */
static void exchange_end(struct http_exchange *x)
{
    struct http_conn *c = x->conn;
    struct http_server *s = c->server;
    conn_settle_close(c, x);
    exchange_free(x);
    if (c->state == CLOSED)
        return;
    if (c->parse && !c->in_handler) /* answered from elsewhere before the body was read */
        conn_parse_drop(c);
    c->state = c->close_after ? FLUSH : IDLE;
    c->deadline_ms = uv_now(s->loop) + s->limits.keepalive_ms;
    if (c->close_after)
        bytes_finish(&c->in);
    conn_mark_dirty(c);
}

void http_set_data(struct http_exchange *x, void *data) { x->data = data; }

void *http_get_data(const struct http_exchange *x) { return x->data; }

static bool header_is_clean(const char *name, const char *value)
{
    return *name && !strpbrk(name, " :\r\n") && !strpbrk(value, "\r\n");
}

void http_add_header(struct http_exchange *x, const char *name, const char *value)
{
    assert(!x->streaming && header_is_clean(name, value));
    if (!header_is_clean(name, value)) /* also without asserts: never split an answer */
        return;
    if (!bytes_append(&x->extra, name, strlen(name)) || !bytes_append(&x->extra, ": ", 2) ||
        !bytes_append(&x->extra, value, strlen(value)) || !bytes_append(&x->extra, "\r\n", 2)) {
        x->conn->broken = true;
        conn_mark_dirty(x->conn);
    }
}

void http_reply(struct http_exchange *x, int status, const char *content_type, const char *body,
                size_t n)
{
    struct http_conn *c = x->conn;
    assert(!x->streaming && status >= 200 && status <= 599);
    conn_settle_close(c, x);
    conn_head_append(c, status, content_type, (int64_t)n, false, &x->extra);
    if (status_has_body(status) && !x->is_head)
        conn_append(c, body, n);
    exchange_end(x);
}

void http_stream(struct http_exchange *x, int status, const char *content_type)
{
    struct http_conn *c = x->conn;
    assert(!x->streaming && status >= 200 && status <= 599);
    x->streaming = true;
    x->bodyless = x->is_head || !status_has_body(status);
    x->chunked = !x->http10 && status_has_body(status);
    conn_settle_close(c, x);
    if (x->http10 && !x->bodyless)
        c->close_after = true; /* the end of the connection is the end of the body */
    conn_head_append(c, status, content_type, -1, x->chunked, &x->extra);
    if (c->state == BODY) { /* not from a callback: the rest of the body is not wanted */
        c->state = WORK;
        if (!c->in_handler)
            conn_parse_drop(c);
    }
}

/* "1f4\r\n", and returns its end. */
static char *chunk_size_write(char *at, size_t n)
{
    int shift = 0;
    while (n >> shift >> 4)
        shift += 4;
    for (; shift >= 0; shift -= 4)
        *at++ = "0123456789abcdef"[n >> shift & 15];
    *at++ = '\r';
    *at++ = '\n';
    return at;
}

enum err http_write(struct http_exchange *x, const char *data, size_t n)
{
    struct http_conn *c = x->conn;
    assert(x->streaming);
    if (!c->broken && n && !x->bodyless) {
        size_t limit = c->server->limits.max_write_buffer;
        if (conn_unsent(c) + n > limit)
            conn_flush(c); /* the client may be fast and this iteration long */
        if (conn_unsent(c) && conn_unsent(c) + n > limit) {
            log_warn("http", "unsent=%zu limit=%zu client reads too slowly, cut off",
                     conn_unsent(c), limit);
            c->broken = true;
        }
    }
    if (c->broken) {
        conn_mark_dirty(c);
        return err_set(ERR_TOO_LARGE, "the client does not read its answer");
    }
    if (n == 0 || x->bodyless) /* an empty chunk would be the end */
        return ERR_OK;
    if (!conn_reserve(c, n + CHUNK_BYTES))
        return err_set(ERR_NOMEM, "output buffer");
    char *at = c->out.data + c->out.len;
    if (x->chunked)
        at = chunk_size_write(at, n);
    memcpy(at, data, n);
    at += n;
    if (x->chunked) {
        *at++ = '\r';
        *at++ = '\n';
    }
    c->out.len = (size_t)(at - c->out.data);
    return ERR_OK;
}

void http_warm(const struct http_exchange *x)
{
    warm(&x->conn->fd, offsetof(struct http_conn, all) - offsetof(struct http_conn, fd));
}

void http_end(struct http_exchange *x)
{
    assert(x->streaming);
    if (x->chunked && !x->bodyless)
        conn_append(x->conn, "0\r\n\r\n", 5);
    exchange_end(x);
}

void http_abort(struct http_exchange *x)
{
    x->conn->close_after = true;
    exchange_end(x);
}

/* ---- the life of a connection ---- */

static void on_closed(uv_handle_t *handle);

static void conn_close(struct http_conn *c)
{
    if (c->state == CLOSED)
        return;
    if (c->handed)
        server_settle(c->server);
    c->state = CLOSED;
    c->server->n_conns--;
    c->fd = -1;
    list_remove(&c->dirty);
    uv_close((uv_handle_t *)&c->tcp, on_closed);
}

/* From the loop only (rule 2). */
static void conn_lost(struct http_conn *c)
{
    exchange_lose(c);
    conn_close(c);
}

/* Everything is sent: say so, then let the client read it before a RST could destroy it. */
static void conn_linger(struct http_conn *c)
{
    if (c->peer_done || shutdown(c->fd, SHUT_WR)) {
        conn_close(c);
        return;
    }
    c->state = LINGER;
    c->deadline_ms = uv_now(c->server->loop) + LINGER_MS;
}

/* Brings a dirty connection up to date. Runs next to the loop's poll. */
static void conn_service(struct http_conn *c)
{
    conn_flush(c);
    if (c->state == IDLE && c->server->draining) {
        bytes_finish(&c->in);
        c->state = FLUSH;
    }
    if (c->state == IDLE && c->in.len && !c->broken && conn_unsent(c) <= START_BELOW_BYTES) {
        struct bytes in = c->in;
        c->in = (struct bytes){0};
        conn_feed(c, in.data, in.len);
        bytes_finish(&in);
    }
    if (c->state == CLOSED)
        return;
    if (!c->broken && c->state == FLUSH && !c->sending && c->out.len == 0)
        conn_linger(c);
    if (c->state != CLOSED && !c->broken)
        conn_read_update(c);
    if (c->broken) {
        conn_lost(c);
        return;
    }
    if (c->state == IDLE && c->out.len == 0)
        bytes_finish(&c->out); /* idle connections own nothing */
}

static void server_service(struct http_server *s)
{
    server_settle(s);
    while (!list_is_empty(&s->flushed) || !list_is_empty(&s->dirty)) {
        struct list *from = list_is_empty(&s->flushed) ? &s->dirty : &s->flushed;
        struct http_conn *c = list_entry(from->next, dirty);
        list_remove(&c->dirty);
        conn_service(c);
    }
}

static void flush_here(struct http_server *s)
{
    size_t n = 0;
    while (!list_is_empty(&s->dirty)) {
        struct http_conn *c = list_entry(s->dirty.next, dirty);
        list_remove(&c->dirty);
        n += c->out.len > 0;
        conn_flush(c);
        conn_flushed(c);
    }
    if (n && s->sent)
        s->sent(s->sent_user, n, clock_now_us());
}

/* An empty batch to hand over. Those that are sent are taken back meanwhile: their buffers are
 * still in a cache. */
static struct send_batch *server_next_batch(struct http_server *s)
{
    const struct send_batch *sent;
    struct send_batch *next = NULL;
    while ((sent = senders_collect(s->senders, !(next = senders_next(s->senders)))))
        server_take_back(s, sent);
    return next;
}

static void flush_apart(struct http_server *s)
{
    size_t n_waiting = 0; /* behind what libuv has */
    while (!list_is_empty(&s->dirty)) {
        struct send_batch *batch = server_next_batch(s);
        while (batch->n < SENDERS_BATCH && !list_is_empty(&s->dirty)) {
            struct http_conn *c = list_entry(s->dirty.next, dirty);
            if (c->handed)
                break;
            list_remove(&c->dirty);
            if (!conn_can_send(c)) {
                n_waiting += c->out.len > 0;
                conn_flushed(c);
                continue;
            }
            c->progress_ms = uv_now(s->loop);
            c->handed = true;
            batch->jobs[batch->n++] = (struct send_job){
                .fd = c->fd, .data = c->out.data, .n = c->out.len, .cap = c->out.cap, .user = c};
            c->out = (struct bytes){0};
        }
        if (batch->n > 0)
            senders_post(s->senders);
        else if (!list_is_empty(&s->dirty))
            server_settle(s);
    }
    if (n_waiting && s->sent)
        s->sent(s->sent_user, n_waiting, clock_now_us());
}

void http_server_flush(struct http_server *s, bool more, http_sent_fn *sent, void *user)
{
    s->sent = sent;
    s->sent_user = user;
    if (s->senders && (more || senders_out(s->senders))) {
        flush_apart(s);
        if (!more)
            server_settle(s);
    } else {
        flush_here(s);
    }
    if (!more)
        s->sent = NULL;
}

enum err http_server_use_threads(struct http_server *s, uint32_t n)
{
    return n > 1 ? senders_create(n - 1, &s->senders) : ERR_OK;
}

static void on_before_poll(uv_prepare_t *handle) { server_service(handle->data); }
static void on_after_poll(uv_check_t *handle) { server_service(handle->data); }

static void conn_tick(struct http_conn *c, uint64_t now_ms)
{
    struct http_limits *limits = &c->server->limits;
    if (conn_unsent(c)) {
        size_t queue = uv_stream_get_write_queue_size((uv_stream_t *)&c->tcp);
        if (queue != c->queue_seen) {
            c->queue_seen = queue;
            c->progress_ms = now_ms;
        } else if (now_ms - c->progress_ms >= limits->write_stall_ms) {
            log_debug("http", "unsent=%zu client stopped reading, cut off", conn_unsent(c));
            conn_lost(c);
            return;
        }
    }
    if (conn_has_fin(c)) {
        conn_peer_left(c);
        return;
    }
    switch (c->state) {
    case IDLE:
        if (now_ms >= c->deadline_ms && !conn_unsent(c))
            conn_close(c);
        break;
    case HEAD:
        if (now_ms >= c->deadline_ms) {
            conn_refuse(c, 408, "The request headers took too long.");
            conn_parse_drop(c);
        }
        break;
    case BODY:
        if (now_ms >= c->deadline_ms || now_ms >= c->body_idle_ms) {
            conn_refuse(c, 408, "The request body took too long.");
            conn_parse_drop(c);
        }
        break;
    case LINGER:
        if (now_ms >= c->deadline_ms)
            conn_close(c);
        break;
    case WORK:
    case FLUSH:
    case CLOSED:
        break;
    }
}

static void on_connection(uv_stream_t *listener, int status);

static void on_tick(uv_timer_t *handle)
{
    struct http_server *s = handle->data;
    uint64_t now_ms = uv_now(s->loop);
    for (struct list *l = s->conns.next, *next; l != &s->conns && !s->destroyed; l = next) {
        next = l->next; /* ticks close connections, but only the loop unlinks them */
        struct http_conn *c = list_entry(l, all);
        if (c->state != CLOSED)
            conn_tick(c, now_ms);
    }
    if (s->accept_failed && !s->listener_closed) {
        s->accept_failed = false;
        on_connection((uv_stream_t *)&s->listener, 0);
    }
}

/* ---- the server ---- */

static void server_unref(struct http_server *s)
{
    if (--s->n_handles)
        return;
    while (s->n_spare)
        bytes_finish(&s->spare[--s->n_spare]);
    free(s);
}

static void on_server_handle_closed(uv_handle_t *handle) { server_unref(handle->data); }

static void on_closed(uv_handle_t *handle)
{
    struct http_conn *c = handle->data;
    struct http_server *s = c->server;
    if (c->x)
        exchange_free(c->x);
    list_remove(&c->all);
    conn_parse_drop(c);
    bytes_finish(&c->in);
    bytes_finish(&c->out);
    free(c);
    server_unref(s);
}

static void conn_tune(struct http_conn *c)
{
    int notsent = NOTSENT_BYTES;
    unsigned dead_ms = (unsigned)MIN(c->server->limits.write_stall_ms, (uint64_t)INT32_MAX);
    uv_tcp_nodelay(&c->tcp, 1);
    if (uv_fileno((uv_handle_t *)&c->tcp, &c->fd))
        return;
    /* Both are improvements, not needs: back-pressure reaches us before the kernel holds megabytes,
     * and a client that lost its network is found without a write of ours piling up. */
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &notsent, sizeof(notsent));
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &dead_ms, sizeof(dead_ms));
}

static void on_connection(uv_stream_t *listener, int status)
{
    struct http_server *s = listener->data;
    if (status < 0) { /* out of descriptors: libuv has shed the waiting clients and goes on */
        uint64_t now_ms = uv_now(s->loop);
        if (now_ms - s->shed_logged_ms >= 1000)
            log_warn("http", "connections=%zu accept failed: %s", s->n_conns, uv_strerror(status));
        s->shed_logged_ms = now_ms;
        return;
    }
    struct http_conn *c = calloc(1, sizeof(*c));
    if (!c) {
        s->accept_failed = true;
        return;
    }
    if (uv_tcp_init(s->loop, &c->tcp)) {
        free(c);
        s->accept_failed = true;
        return;
    }
    s->n_handles++;
    s->n_conns++;
    c->server = s;
    c->tcp.data = c;
    c->fd = -1;
    list_init(&c->dirty);
    list_append(&s->conns, &c->all);
    c->deadline_ms = uv_now(s->loop) + s->limits.keepalive_ms;
    if (uv_accept(listener, (uv_stream_t *)&c->tcp) || s->n_conns > s->limits.max_connections) {
        conn_close(c);
        return;
    }
    conn_tune(c);
    conn_read_update(c);
    if (c->broken)
        conn_close(c);
}

static void server_stop_listening(struct http_server *s)
{
    if (s->listener_closed)
        return;
    s->listener_closed = true;
    uv_close((uv_handle_t *)&s->listener, on_server_handle_closed);
}

static enum err server_listen(struct http_server *s, const char *host, int port)
{
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    char service[16];
    snprintf(service, sizeof(service), "%d", port);
    int rc = getaddrinfo(host, service, &hints, &found);
    if (rc)
        return err_set(ERR_IO, "cannot resolve %s:%d: %s", host, port, gai_strerror(rc));
    rc = uv_tcp_bind(&s->listener, found->ai_addr, 0);
    freeaddrinfo(found);
    if (!rc)
        rc = uv_listen((uv_stream_t *)&s->listener, BACKLOG, on_connection);
    struct sockaddr_storage bound = {0};
    int n_bound = sizeof(bound);
    if (!rc)
        rc = uv_tcp_getsockname(&s->listener, (struct sockaddr *)&bound, &n_bound);
    if (rc)
        return err_set(ERR_IO, "cannot listen on %s:%d: %s", host, port, uv_strerror(rc));
    s->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    return ERR_OK;
}

static uint64_t tick_period(const struct http_limits *l)
{
    uint64_t shortest = MIN(MIN(l->header_timeout_ms, l->body_idle_ms),
                            MIN(MIN(l->body_total_ms, l->keepalive_ms), l->write_stall_ms));
    return MAX(MIN(shortest / 4, (uint64_t)TICK_MS), (uint64_t)1);
}

enum err http_server_create(uv_loop_t *loop, const char *host, int port,
                            const struct http_limits *limits, const struct http_handler *handler,
                            void *user, struct http_server **ret)
{
    assert(handler->request && handler->refused);
    signal(SIGPIPE, SIG_IGN); /* libuv writes without MSG_NOSIGNAL: a client's RST would kill us */
    struct http_server *s = calloc(1, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "http server");
    s->loop = loop;
    s->limits = *limits;
    s->handler = *handler;
    s->user = user;
    list_init(&s->conns);
    list_init(&s->dirty);
    list_init(&s->flushed);
    s->listener.data = s->tick.data = s->before_poll.data = s->after_poll.data = s;
    int rc = uv_tcp_init(loop, &s->listener);
    if (rc) {
        free(s);
        return err_set(ERR_IO, "http server: %s", uv_strerror(rc));
    }
    uv_timer_init(loop, &s->tick);
    uv_prepare_init(loop, &s->before_poll);
    uv_check_init(loop, &s->after_poll);
    s->n_handles = 4;
    enum err err = server_listen(s, host, port);
    if (err != ERR_OK) {
        http_server_destroy(s);
        return err;
    }
    uint64_t period_ms = tick_period(limits);
    uv_timer_start(&s->tick, on_tick, period_ms, period_ms);
    uv_prepare_start(&s->before_poll, on_before_poll);
    uv_check_start(&s->after_poll, on_after_poll);
    /* Only the listener and the connections keep the loop alive. */
    uv_unref((uv_handle_t *)&s->tick);
    uv_unref((uv_handle_t *)&s->before_poll);
    uv_unref((uv_handle_t *)&s->after_poll);
    *ret = s;
    return ERR_OK;
}

int http_server_port(const struct http_server *s) { return s->port; }

size_t http_server_n_connections(const struct http_server *s) { return s->n_conns; }

size_t http_server_n_exchanges(const struct http_server *s) { return s->n_exchanges; }

void http_server_drain(struct http_server *s)
{
    s->draining = true;
    server_stop_listening(s);
    for (struct list *l = s->conns.next; l != &s->conns; l = l->next) {
        struct http_conn *c = list_entry(l, all);
        if (c->state != IDLE || c->in_handler)
            continue;
        bytes_finish(&c->in);
        c->close_after = true;
        if (conn_unsent(c)) {
            c->state = FLUSH;
            conn_mark_dirty(c);
        } else {
            conn_close(c);
        }
    }
}

void http_server_destroy(struct http_server *s)
{
    if (!s || s->destroyed)
        return;
    s->destroyed = true;
    for (struct list *l = s->conns.next; l != &s->conns; l = l->next)
        conn_close(list_entry(l, all));
    server_settle(s);
    senders_destroy(take(&s->senders));
    server_stop_listening(s);
    uv_close((uv_handle_t *)&s->tick, on_server_handle_closed);
    uv_close((uv_handle_t *)&s->before_poll, on_server_handle_closed);
    uv_close((uv_handle_t *)&s->after_poll, on_server_handle_closed);
}
