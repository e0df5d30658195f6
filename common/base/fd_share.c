/* fd_share.c: see fd_share.h. One thread per share answers; the answer is one message. */
#include "common/base/fd_share.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "common/base/clock.h"
#include "common/base/log.h"

#define MAX_CLIENTS 64 /* that are told of our death; more are served and hung up on */
#define RETRY_MS    20

struct fd_share {
    char name[104];
    int wake;   // readable: stop
    int listen; // -1 while another process serves
    int server; // connection to that process, or -1
    int fd;
    uint64_t bytes;
    bool has_thread;
    pthread_t thread;
    int clients[MAX_CLIENTS];
    int n_clients;
};

static socklen_t address_of(const char *name, struct sockaddr_un *ret)
{
    *ret = (struct sockaddr_un){.sun_family = AF_UNIX};
    size_t n = strlen(name);
    memcpy(ret->sun_path + 1, name, n);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + n);
}

static enum err name_check(const char *name)
{
    size_t n = strlen(name);
    return n >= 1 && n <= 100 ? ERR_OK : err_set(ERR_INVALID, "share name '%s'", name);
}

/* ERR_BUSY: another process has the name. */
static enum err bind_name(const char *name, int *ret)
{
    struct sockaddr_un a;
    socklen_t n = address_of(name, &a);
    OWNED_FD fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return err_set(ERR_IO, "socket: %s", strerror(errno));
    if (bind(fd, (struct sockaddr *)&a, n) || listen(fd, MAX_CLIENTS))
        return err_set(errno == EADDRINUSE ? ERR_BUSY : ERR_IO, "share %s: %s", name,
                       strerror(errno));
    *ret = fd;
    fd = -1;
    return ERR_OK;
}

static bool is_same_user(int fd)
{
    struct ucred who;
    socklen_t n = sizeof(who);
    return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &n) && who.uid == geteuid();
}

static void send_fd(int to, int fd, uint64_t bytes)
{
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec iov = {&bytes, sizeof(bytes)};
    struct msghdr m = {.msg_iov = &iov,
                       .msg_iovlen = 1,
                       .msg_control = control.space,
                       .msg_controllen = sizeof(control.space)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    if (sendmsg(to, &m, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        log_warn("share", "sending a descriptor: %s", strerror(errno));
}

/* Waits for the message. ERR_PEER_LOST: the server went away without one. */
static enum err receive_fd(const char *name, int from, int timeout_ms, int *ret_fd,
                           uint64_t *ret_bytes)
{
    struct pollfd p = {.fd = from, .events = POLLIN};
    int ready = poll(&p, 1, timeout_ms);
    if (ready < 0 && errno == EINTR)
        return err_set(ERR_ABORTED, "interrupted");
    if (ready == 0)
        return err_set(ERR_TIMEOUT, "share %s was not there within %d ms", name, timeout_ms);
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec iov = {ret_bytes, sizeof(*ret_bytes)};
    struct msghdr m = {.msg_iov = &iov,
                       .msg_iovlen = 1,
                       .msg_control = control.space,
                       .msg_controllen = sizeof(control.space)};
    ssize_t got = recvmsg(from, &m, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = got == (ssize_t)sizeof(*ret_bytes) ? CMSG_FIRSTHDR(&m) : NULL;
    if (!c || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(sizeof(int)))
        return err_set(ERR_PEER_LOST, "share %s: its owner left", name);
    memcpy(ret_fd, CMSG_DATA(c), sizeof(*ret_fd));
    return ERR_OK;
}

static enum err connect_name(const char *name, int *ret)
{
    struct sockaddr_un a;
    socklen_t n = address_of(name, &a);
    OWNED_FD fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return err_set(ERR_IO, "socket: %s", strerror(errno));
    if (connect(fd, (struct sockaddr *)&a, n))
        return err_set(ERR_PEER_LOST, "share %s: %s", name, strerror(errno));
    if (!is_same_user(fd))
        return err_set(ERR_INVALID, "share %s belongs to another user", name);
    *ret = fd;
    fd = -1;
    return ERR_OK;
}

/* ---- the thread ---- */

static void client_accept(struct fd_share *s)
{
    int fd = accept4(s->listen, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    bool keep = is_same_user(fd);
    if (keep)
        send_fd(fd, s->fd, s->bytes);
    if (keep && s->n_clients < MAX_CLIENTS)
        s->clients[s->n_clients++] = fd;
    else
        close(fd);
}

static void *share_thread(void *arg)
{
    struct fd_share *s = arg;
    pthread_setname_np(pthread_self(), "fd_share");
    for (;;) {
        struct pollfd p[3 + MAX_CLIENTS] = {{.fd = s->wake, .events = POLLIN},
                                            {.fd = s->listen, .events = POLLIN},
                                            {.fd = s->server, .events = POLLIN}};
        int n = s->n_clients;
        for (int i = 0; i < n; i++)
            p[3 + i] = (struct pollfd){.fd = s->clients[i], .events = POLLIN};
        bool orphaned = s->listen < 0 && s->server < 0;
        if (poll(p, (nfds_t)(3 + n), orphaned ? RETRY_MS : -1) < 0 && errno != EINTR)
            return NULL;
        if (p[0].revents)
            return NULL;
        for (int i = n; i-- > 0;)
            if (p[3 + i].revents) { // nobody says anything: it left
                close(s->clients[i]);
                s->clients[i] = s->clients[--s->n_clients];
            }
        if (s->server >= 0 && p[2].revents) {
            close(s->server);
            s->server = -1;
        }
        // Of several heirs one gets the name; the others watch that one.
        if (s->listen < 0 && s->server < 0 && bind_name(s->name, &s->listen) != ERR_OK &&
            connect_name(s->name, &s->server) != ERR_OK)
            continue;
        if (s->listen >= 0 && p[1].revents)
            client_accept(s);
    }
}

static enum err thread_start(struct fd_share *s)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int e = pthread_create(&s->thread, NULL, share_thread, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (e)
        return err_set(ERR_IO, "thread for a share: %s", strerror(e));
    s->has_thread = true;
    return ERR_OK;
}

/* ---- the owner's side ---- */

static enum err share_create(const char *name, struct fd_share **ret)
{
    TRY(name_check(name));
    struct fd_share *s = calloc(1, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "no memory for a share");
    s->listen = s->server = s->fd = -1;
    snprintf(s->name, sizeof(s->name), "%s", name);
    s->wake = eventfd(0, EFD_CLOEXEC);
    if (s->wake < 0) {
        free(s);
        return err_set(ERR_IO, "eventfd: %s", strerror(errno));
    }
    *ret = s;
    return ERR_OK;
}

enum err fd_share_claim(const char *name, struct fd_share **ret)
{
    OWNED(fd_share) s = NULL;
    TRY(share_create(name, &s));
    TRY(bind_name(name, &s->listen));
    *ret = take(&s);
    return ERR_OK;
}

enum err fd_share_serve(struct fd_share *s, int fd, uint64_t bytes)
{
    s->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (s->fd < 0)
        return err_set(ERR_IO, "share %s: %s", s->name, strerror(errno));
    s->bytes = bytes;
    return thread_start(s);
}

/* We have it: watch who serves it, to go on when that one dies. */
static enum err follow(struct fd_share *s, int *fd, uint64_t bytes, int *ret_fd,
                       uint64_t *ret_bytes)
{
    enum err err = fd_share_serve(s, *fd, bytes);
    if (err != ERR_OK) {
        close(*fd);
        return err;
    }
    *ret_fd = *fd;
    *ret_bytes = bytes;
    return ERR_OK;
}

enum err fd_share_open(const char *name, int timeout_ms, struct fd_share **ret, int *ret_fd,
                       uint64_t *ret_bytes)
{
    OWNED(fd_share) s = NULL;
    TRY(share_create(name, &s));
    uint64_t deadline_us = clock_now_us() + (uint64_t)timeout_ms * 1000;
    for (;;) {
        enum err err = bind_name(name, &s->listen);
        if (err == ERR_OK) {
            *ret_fd = -1;
            *ret_bytes = 0;
            *ret = take(&s);
            return ERR_OK;
        }
        if (err != ERR_BUSY)
            return err;
        uint64_t now_us = clock_now_us();
        int left_ms = now_us < deadline_us ? (int)((deadline_us - now_us + 999) / 1000) : 0;
        int fd = -1;
        uint64_t bytes = 0;
        err = connect_name(name, &s->server);
        if (err == ERR_OK)
            err = receive_fd(name, s->server, left_ms, &fd, &bytes);
        if (err == ERR_OK) {
            TRY(follow(s, &fd, bytes, ret_fd, ret_bytes));
            *ret = take(&s);
            return ERR_OK;
        }
        if (err != ERR_PEER_LOST && err != ERR_ABORTED)
            return err;
        if (s->server >= 0)
            close(s->server);
        s->server = -1; // it died: perhaps the name is ours now
    }
}

enum err fd_share_fetch(const char *name, int timeout_ms, int *ret_fd, uint64_t *ret_bytes)
{
    TRY(name_check(name));
    OWNED_FD server = -1;
    TRY(connect_name(name, &server));
    return receive_fd(name, server, timeout_ms, ret_fd, ret_bytes);
}

void fd_share_destroy(struct fd_share *s)
{
    if (!s)
        return;
    if (s->has_thread) {
        uint64_t one = 1;
        if (write(s->wake, &one, sizeof(one)) == (ssize_t)sizeof(one))
            pthread_join(s->thread, NULL);
    }
    const int fds[] = {s->wake, s->listen, s->server, s->fd};
    for (size_t i = 0; i < ARRAY_LEN(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    for (int i = 0; i < s->n_clients; i++)
        close(s->clients[i]);
    free(s);
}
