/* client.c: see client.h. */
#include "tests/bench/client.h"

#include <llhttp.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/own.h"

#define READ_BYTES 65536

struct conn {
    uv_tcp_t tcp;
    uv_connect_t connect;
    uv_write_t write;
    llhttp_t parser;
    struct client *client;
    struct exchange *x;
    struct conn *next, *prev; // of all
    struct conn *next_idle;
    bool reused, answered, complete, closing, idle;
};

struct client {
    uv_loop_t *loop;
    struct sockaddr_storage address;
    char *host, *prefix;
    llhttp_settings_t settings;
    struct conn *all, *idle;
    char buffer[READ_BYTES]; // libuv reads one connection at a time
};

static void conn_open(struct client *c, struct exchange *x);
static void conn_close(struct conn *k);
static void conn_failed(struct conn *k, enum err why);
static void conn_write(struct conn *k);
static void conn_idle(struct conn *k);

/* ---- HTTP ---- */

static int on_headers(llhttp_t *p)
{
    struct conn *k = p->data;
    if (k->x)
        k->x->status = p->status_code;
    return 0;
}

static int on_body(llhttp_t *p, const char *bytes, size_t n)
{
    struct conn *k = p->data;
    if (k->x)
        k->x->on_body(k->x, bytes, n);
    return 0;
}

/* Interim answers (100, 103) are messages to llhttp, but not the answer. */
static int on_complete(llhttp_t *p)
{
    struct conn *k = p->data;
    k->complete = p->status_code >= 200;
    return 0;
}

/* ---- life of a connection ---- */

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *ret)
{
    struct conn *k = h->data;
    *ret = uv_buf_init(k->client->buffer, READ_BYTES);
}

static void answer_complete(struct conn *k)
{
    struct exchange *x = k->x;
    bool keep = llhttp_should_keep_alive(&k->parser);
    k->x = NULL;
    x->conn = NULL;
    if (keep)
        conn_idle(k);
    else
        conn_close(k);
    x->done(x, ERR_OK);
}

static void on_read(uv_stream_t *s, ssize_t n, const uv_buf_t *buf)
{
    struct conn *k = s->data;
    if (n == 0 || k->closing)
        return;
    if (n < 0) {
        if (k->x && k->answered && llhttp_finish(&k->parser) == HPE_OK && k->complete)
            answer_complete(k); // the end of the connection was the end of the body
        else
            conn_failed(k, ERR_PEER_LOST);
        return;
    }
    if (!k->x) {
        conn_close(k); // nobody asked
        return;
    }
    k->answered = true;
    if (llhttp_execute(&k->parser, buf->base, (size_t)n) != HPE_OK)
        conn_failed(k, ERR_PROTO);
    else if (k->complete)
        answer_complete(k);
}

static void on_connect(uv_connect_t *req, int status)
{
    struct conn *k = req->data;
    if (k->closing)
        return;
    if (status < 0) {
        (void)err_set(ERR_UNAVAILABLE, "%s", uv_strerror(status));
        conn_failed(k, ERR_UNAVAILABLE);
        return;
    }
    uv_tcp_nodelay(&k->tcp, 1);
    uv_read_start((uv_stream_t *)&k->tcp, on_alloc, on_read);
    conn_write(k);
}

static void on_written(uv_write_t *req, int status)
{
    struct conn *k = req->data;
    if (status < 0 && !k->closing)
        conn_failed(k, ERR_PEER_LOST);
}

static void conn_write(struct conn *k)
{
    uv_buf_t b = uv_buf_init((char *)k->x->bytes, (unsigned)k->x->n_bytes);
    k->write.data = k;
    if (uv_write(&k->write, (uv_stream_t *)&k->tcp, &b, 1, on_written) < 0)
        conn_failed(k, ERR_PEER_LOST);
}

static void conn_failed(struct conn *k, enum err why)
{
    struct exchange *x = k->x;
    bool stale = why == ERR_PEER_LOST && k->reused && !k->answered;
    k->x = NULL;
    conn_close(k);
    if (!x)
        return;
    x->conn = NULL;
    if (stale && !x->retried) {
        x->retried = true;
        conn_open(k->client, x);
    } else {
        x->done(x, why);
    }
}

static void on_closed(uv_handle_t *h)
{
    struct conn *k = h->data;
    *(k->prev ? &k->prev->next : &k->client->all) = k->next;
    if (k->next)
        k->next->prev = k->prev;
    free(k);
}

static void leave_idle(struct conn *k)
{
    for (struct conn **at = &k->client->idle; *at; at = &(*at)->next_idle) {
        if (*at == k) {
            *at = k->next_idle;
            break;
        }
    }
    k->idle = false;
}

static void conn_close(struct conn *k)
{
    if (k->closing)
        return;
    if (k->idle)
        leave_idle(k);
    k->closing = true;
    uv_close((uv_handle_t *)&k->tcp, on_closed);
}

static void conn_idle(struct conn *k)
{
    k->idle = k->reused = true;
    k->next_idle = k->client->idle;
    k->client->idle = k;
}

/* done must not be called before client_send has returned: the loop reports it. */
static void refuse(uv_handle_t *h)
{
    struct exchange *x = h->data;
    free(h);
    (void)err_set(ERR_UNAVAILABLE, "no socket: too many open files?");
    x->done(x, ERR_UNAVAILABLE);
}

static void refuse_later(struct client *c, struct exchange *x)
{
    uv_timer_t *t = calloc(1, sizeof(*t));
    if (!t)
        abort();
    uv_timer_init(c->loop, t);
    t->data = x;
    uv_close((uv_handle_t *)t, refuse);
}

static void conn_open(struct client *c, struct exchange *x)
{
    struct conn *k = calloc(1, sizeof(*k));
    if (!k) {
        refuse_later(c, x);
        return;
    }
    k->client = c;
    llhttp_init(&k->parser, HTTP_RESPONSE, &c->settings);
    k->parser.data = k;
    uv_tcp_init(c->loop, &k->tcp);
    k->tcp.data = k->connect.data = k;
    k->next = c->all;
    if (c->all)
        c->all->prev = k;
    c->all = k;
    if (uv_tcp_connect(&k->connect, &k->tcp, (struct sockaddr *)&c->address, on_connect) < 0) {
        conn_close(k);
        refuse_later(c, x);
        return;
    }
    k->x = x;
    x->conn = k;
}

void client_send(struct client *c, struct exchange *x)
{
    x->status = 0;
    x->retried = false;
    struct conn *k = c->idle;
    if (!k) {
        conn_open(c, x);
        return;
    }
    leave_idle(k);
    k->answered = k->complete = false;
    k->x = x;
    x->conn = k;
    conn_write(k);
}

void client_cancel(struct client *c, struct exchange *x)
{
    if (!x->conn)
        return;
    x->conn->x = NULL;
    conn_close(x->conn);
    x->conn = NULL;
}

/* ---- the server ---- */

static enum err resolve(struct client *c, const char *url)
{
    static const char scheme[] = "http://";
    if (strncmp(url, scheme, sizeof(scheme) - 1) != 0)
        return err_set(ERR_INVALID, "--url is '%s', must begin with http://", url);
    const char *host = url + sizeof(scheme) - 1;
    size_t n = strcspn(host, "/");
    c->host = strndup(host, n);
    c->prefix = strdup(host + n);
    OWNED_MEM char *name = strndup(host, n);
    if (!c->host || !c->prefix || !name)
        return err_set(ERR_NOMEM, "no memory for the client");
    while (c->prefix[0] && c->prefix[strlen(c->prefix) - 1] == '/')
        c->prefix[strlen(c->prefix) - 1] = '\0';
    char *port = strrchr(name, ':'), *bare = name;
    if (port && strchr(port, ']'))
        port = NULL;
    if (port)
        *port++ = '\0';
    if (name[0] == '[' && name[strlen(name) - 1] == ']') {
        bare = name + 1;
        name[strlen(name) - 1] = '\0';
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    int code = getaddrinfo(bare, port ? port : "80", &hints, &found);
    if (code)
        return err_set(ERR_INVALID, "--url %s: %s", url, gai_strerror(code));
    memcpy(&c->address, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return ERR_OK;
}

enum err client_create(uv_loop_t *loop, const char *url, struct client **ret)
{
    struct client *c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for the client");
    c->loop = loop;
    llhttp_settings_init(&c->settings);
    c->settings.on_headers_complete = on_headers;
    c->settings.on_body = on_body;
    c->settings.on_message_complete = on_complete;
    enum err e = resolve(c, url);
    if (e) {
        client_destroy(c);
        return e;
    }
    *ret = c;
    return ERR_OK;
}

void client_close(struct client *c)
{
    for (struct conn *k = c->all, *next; k; k = next) {
        next = k->next;
        conn_close(k);
    }
}

void client_destroy(struct client *c)
{
    if (!c)
        return;
    free(c->host);
    free(c->prefix);
    free(c);
}

const char *client_host(const struct client *c) { return c->host; }
const char *client_prefix(const struct client *c) { return c->prefix; }
