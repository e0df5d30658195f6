/* admin.c: lines in, JSON lines out, over a unix socket that only the owner can open.
 *
 * A client may send several commands; each is answered in turn. What a client can make us hold is
 * bounded: clients, bytes of a line, bytes of unread answers. Whoever exceeds a bound is closed.
 *
 * The server and every client free themselves in close callbacks: a client when its pipe closed,
 * the server when its pipe closed and the last client is gone. After admin_destroy nothing calls
 * fn.
 */
#include "common/base/admin.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/base/failpoint.h"
#include "common/base/own.h"

#define MAX_CLIENTS 16u
#define MAX_LINE    4096u
#define MAX_UNREAD  (4u << 20)

struct admin {
    uv_pipe_t pipe;
    admin_fn *fn; // NULL once destroyed
    void *user;
    struct client *clients;
    unsigned n_clients;
    bool pipe_closed;
};

struct client {
    uv_pipe_t pipe;
    struct admin *admin;
    struct client *next;
    size_t len;
    char line[MAX_LINE];
};

struct answer {
    uv_write_t write;
    char *text;
};

static void on_connection(uv_stream_t *server, int status);

static void admin_free_if_done(struct admin *a)
{
    if (a->pipe_closed && !a->clients)
        free(a);
}

static void on_server_close(uv_handle_t *h)
{
    struct admin *a = h->data;
    a->pipe_closed = true;
    admin_free_if_done(a);
}

/* A live socket belongs to somebody; a stale one is what a killed process left. */
static enum err clear_path(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (!*path || strlen(path) >= sizeof(addr.sun_path))
        return err_set(ERR_IO, "admin socket '%s': path must have 1 .. %zu bytes", path,
                       sizeof(addr.sun_path) - 1);
    strcpy(addr.sun_path, path);
    struct stat st;
    if (lstat(path, &st))
        return ERR_OK;
    if (!S_ISSOCK(st.st_mode))
        return err_set(ERR_IO, "admin socket %s: exists and is not a socket", path);
    OWNED_FD fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_set(ERR_IO, "admin socket %s: %s", path, strerror(errno));
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 || errno != ECONNREFUSED)
        return err_set(ERR_IO, "admin socket %s: another process listens there", path);
    if (unlink(path) && errno != ENOENT)
        return err_set(ERR_IO, "admin socket %s: stale: %s", path, strerror(errno));
    return ERR_OK;
}

enum err admin_create(uv_loop_t *loop, const char *path, admin_fn *fn, void *user,
                      struct admin **ret)
{
    TRY(clear_path(path));
    struct admin *a = calloc(1, sizeof(*a));
    if (!a)
        return err_set(ERR_NOMEM, "no memory for the admin socket");
    a->fn = fn;
    a->user = user;
    uv_pipe_init(loop, &a->pipe, 0);
    a->pipe.data = a;

    mode_t old = umask(0177);
    int rc = uv_pipe_bind(&a->pipe, path);
    umask(old);
    if (!rc)
        rc = uv_listen((uv_stream_t *)&a->pipe, 8, on_connection);
    if (rc) {
        uv_close((uv_handle_t *)&a->pipe, on_server_close);
        return err_set(ERR_IO, "admin socket %s: %s", path, uv_strerror(rc));
    }
    *ret = a;
    return ERR_OK;
}

/* ---- clients --------------------------------------------------------------------------------- */

static void on_client_close(uv_handle_t *h)
{
    struct client *c = h->data;
    struct admin *a = c->admin;
    for (struct client **at = &a->clients; *at; at = &(*at)->next) {
        if (*at == c) {
            *at = c->next;
            break;
        }
    }
    a->n_clients--;
    free(c);
    admin_free_if_done(a);
}

static void client_close(struct client *c)
{
    if (!uv_is_closing((uv_handle_t *)&c->pipe))
        uv_close((uv_handle_t *)&c->pipe, on_client_close);
}

static void on_written(uv_write_t *write, int status)
{
    struct answer *w = write->data;
    struct client *c = write->handle->data;
    free(w->text);
    free(w);
    if (status < 0)
        client_close(c);
}

/* Dumps and frees object. */
static void client_answer(struct client *c, json_t *object)
{
    char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;
    json_decref(object);
    struct answer *w = text ? calloc(1, sizeof(*w)) : NULL;
    size_t n = text ? strlen(text) : 0;
    if (!w || uv_stream_get_write_queue_size((uv_stream_t *)&c->pipe) + n > MAX_UNREAD) {
        free(text);
        free(w);
        client_close(c);
        return;
    }
    text[n] = '\n'; // in the NUL's place
    w->text = text;
    w->write.data = w;
    uv_buf_t buf = uv_buf_init(text, (unsigned)(n + 1));
    if (uv_write(&w->write, (uv_stream_t *)&c->pipe, &buf, 1, on_written)) {
        free(text);
        free(w);
        client_close(c);
    }
}

static json_t *failpoint_answer(const char *spec)
{
    enum err e = failpoint_set(spec);
    return e == ERR_OK ? json_pack("{s:b}", "ok", 1) : json_pack("{s:s}", "error", err_text(e));
}

static void client_command(struct client *c, char *line)
{
    char *command = line + strspn(line, " \t\r");
    size_t n = strlen(command);
    while (n && strchr(" \t\r", command[n - 1]))
        command[--n] = 0;
    if (!n)
        return;
    char *argument = command + strcspn(command, " \t");
    if (*argument) {
        *argument++ = 0;
        argument += strspn(argument, " \t");
    }

    struct admin *a = c->admin;
    json_t *answer = !strcmp(command, "failpoint") ? failpoint_answer(argument)
                                                   : a->fn(a->user, command, argument);
    if (uv_is_closing((uv_handle_t *)&c->pipe)) { // fn destroyed the server
        json_decref(answer);
        return;
    }
    client_answer(c, answer ? answer : json_pack("{s:s}", "error", "unknown command"));
}

static void on_alloc(uv_handle_t *h, size_t hint, uv_buf_t *buf)
{
    struct client *c = h->data;
    *buf = uv_buf_init(c->line + c->len, (unsigned)(sizeof(c->line) - c->len));
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct client *c = stream->data;
    if (n < 0) {
        client_close(c);
        return;
    }
    c->len += (size_t)n;
    char *at = c->line, *end = c->line + c->len, *newline;
    while (!uv_is_closing((uv_handle_t *)stream) &&
           (newline = memchr(at, '\n', (size_t)(end - at)))) {
        *newline = 0;
        client_command(c, at);
        at = newline + 1;
    }
    c->len = (size_t)(end - at);
    memmove(c->line, at, c->len);
    if (c->len == sizeof(c->line))
        client_close(c); // no command is that long
}

static void on_connection(uv_stream_t *server, int status)
{
    struct admin *a = server->data;
    if (status < 0)
        return;
    struct client *c = calloc(1, sizeof(*c));
    if (!c)
        return;
    uv_pipe_init(server->loop, &c->pipe, 0);
    c->pipe.data = c;
    c->admin = a;
    c->next = a->clients;
    a->clients = c;
    a->n_clients++;
    if (uv_accept(server, (uv_stream_t *)&c->pipe) || a->n_clients > MAX_CLIENTS ||
        uv_read_start((uv_stream_t *)&c->pipe, on_alloc, on_read))
        client_close(c);
}

void admin_destroy(struct admin *a)
{
    if (!a || !a->fn)
        return;
    a->fn = NULL;
    for (struct client *c = a->clients; c; c = c->next)
        client_close(c);
    uv_close((uv_handle_t *)&a->pipe, on_server_close);
}
