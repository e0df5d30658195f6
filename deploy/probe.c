/* probe.c: see probe.h.
 *
 *   WAITING -timer-> CONNECTING -> ASKED -200-> IDLE (on_ready)
 *      ^                 |           |
 *      +---- refused, not 200, 2 s --+
 *
 * One attempt has one socket, which owns itself and dies in its close callback; a probe that has
 * moved on (its attempt number differs) ignores what an older socket still says.
 */
#include "deploy/probe.h"

#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

#define EVERY_MS   15
#define ATTEMPT_MS 2000

struct probe {
    uv_loop_t *loop;
    uv_timer_t timer;
    char *port_file;
    char url_host[80];
    struct sockaddr_storage address;
    void (*on_ready)(void *user, int port);
    void *user;
    int port;
    uint64_t attempt;      // of the current one; sockets of older ones are ignored
    uint64_t attempt_ends; // loop time; 0 = no attempt under way
};

struct attempt {
    uv_tcp_t tcp;
    uv_connect_t connect;
    uv_write_t write;
    struct probe *probe;
    uint64_t number;
    char answer[64];
    size_t n;
};

static void tick(uv_timer_t *timer);
static void connected(uv_connect_t *req, int status);
static void got_bytes(uv_stream_t *s, ssize_t n, const uv_buf_t *buf);
static void finish(struct attempt *a);

static enum err resolve(struct probe *p, const char *host)
{
    if (!strcmp(host, "0.0.0.0"))
        host = "127.0.0.1";
    if (!strcmp(host, "::"))
        host = "::1";
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int rc = getaddrinfo(host, NULL, &hints, &found);
    if (rc)
        return err_set(ERR_INVALID, "--host %s: %s", host, gai_strerror(rc));
    memcpy(&p->address, found->ai_addr, found->ai_addrlen);
    snprintf(p->url_host, sizeof p->url_host, strchr(host, ':') ? "[%s]" : "%s", host);
    freeaddrinfo(found);
    return ERR_OK;
}

enum err probe_create(uv_loop_t *loop, const char *host, const char *port_file,
                      void (*on_ready)(void *user, int port), void *user, struct probe **ret)
{
    struct probe *p = calloc(1, sizeof *p);
    char *file = strdup(port_file);
    enum err e = p && file ? resolve(p, host) : err_set(ERR_NOMEM, "out of memory");
    if (e) {
        free(p);
        free(file);
        return e;
    }
    p->loop = loop;
    p->port_file = file;
    p->on_ready = on_ready;
    p->user = user;
    uv_timer_init(loop, &p->timer);
    p->timer.data = p;
    *ret = p;
    return ERR_OK;
}

void probe_start(struct probe *p)
{
    p->attempt++;
    p->attempt_ends = 0;
    uv_timer_start(&p->timer, tick, 0, EVERY_MS);
}

void probe_stop(struct probe *p)
{
    p->attempt++;
    uv_timer_stop(&p->timer);
}

int probe_port(const struct probe *p) { return p->port; }
const char *probe_url_host(const struct probe *p) { return p->url_host; }

static void probe_closed(uv_handle_t *h)
{
    struct probe *p = h->data;
    free(p->port_file);
    free(p);
}

void probe_destroy(struct probe *p)
{
    if (p)
        uv_close((uv_handle_t *)&p->timer, probe_closed);
}

static int read_port(const char *path)
{
    OWNED_FILE f = fopen(path, "re");
    int port;
    return f && fscanf(f, "%d", &port) == 1 && port > 0 && port < 65536 ? port : 0;
}

static void tick(uv_timer_t *timer)
{
    struct probe *p = timer->data;
    if (p->attempt_ends && uv_now(p->loop) < p->attempt_ends)
        return;
    int port = read_port(p->port_file);
    if (!port)
        return;
    p->port = port;
    struct attempt *a = calloc(1, sizeof *a);
    if (!a)
        return;
    a->probe = p;
    a->number = ++p->attempt;
    p->attempt_ends = uv_now(p->loop) + ATTEMPT_MS;
    uv_tcp_init(p->loop, &a->tcp);
    a->tcp.data = a;
    if (p->address.ss_family == AF_INET6)
        ((struct sockaddr_in6 *)&p->address)->sin6_port = htons((uint16_t)port);
    else
        ((struct sockaddr_in *)&p->address)->sin_port = htons((uint16_t)port);
    if (uv_tcp_connect(&a->connect, &a->tcp, (struct sockaddr *)&p->address, connected))
        finish(a);
}

static void buffer(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    static char bytes[4096]; // one loop, consumed inside got_bytes
    *buf = uv_buf_init(bytes, sizeof bytes);
}

static void connected(uv_connect_t *req, int status)
{
    struct attempt *a = req->handle->data;
    static char ask[] = "GET /ready HTTP/1.1\r\nHost: baton\r\nConnection: close\r\n\r\n";
    uv_buf_t buf = uv_buf_init(ask, sizeof ask - 1);
    if (status < 0 || uv_read_start((uv_stream_t *)&a->tcp, buffer, got_bytes) ||
        uv_write(&a->write, (uv_stream_t *)&a->tcp, &buf, 1, NULL))
        finish(a);
}

static void got_bytes(uv_stream_t *s, ssize_t n, const uv_buf_t *buf)
{
    static const char yes[] = " 200"; // after "HTTP/1.1"
    const size_t at = 8;
    struct attempt *a = s->data;
    if (n > 0) {
        size_t take_n = MIN((size_t)n, sizeof a->answer - a->n);
        memcpy(a->answer + a->n, buf->base, take_n);
        a->n += take_n;
        if (a->n < at + sizeof yes - 1)
            return;
    }
    struct probe *p = a->probe;
    bool ready = a->number == p->attempt && a->n >= at + sizeof yes - 1 &&
                 !memcmp(a->answer + at, yes, sizeof yes - 1);
    finish(a);
    if (ready) {
        probe_stop(p);
        p->on_ready(p->user, p->port);
    }
}

static void attempt_closed(uv_handle_t *h) { free(h->data); }

static void finish(struct attempt *a)
{
    if (uv_is_closing((uv_handle_t *)&a->tcp))
        return;
    if (a->number == a->probe->attempt)
        a->probe->attempt_ends = 0;
    uv_close((uv_handle_t *)&a->tcp, attempt_closed);
}
