/* kv_aside.h: a transport whose content does not travel over its stream, as NCCL's, but on a CPU:
 * each transfer opens a TCP connection of its own. For the tests of kv_stream.c's half of such
 * kinds. */
#ifndef BATON_KV_ASIDE_H
#define BATON_KV_ASIDE_H

#include "common/engine/kv_pair.h"

struct kv_aside {
    struct kv_pair pair;
    int listen_fd, fd;
    struct sockaddr_storage address;
    socklen_t address_bytes;
};

static const char aside_greeting[4] = {'o', 'p', 'e', 'n'};

static enum err aside_open(struct kv_pair *p, int fd, bool is_sender)
{
    char got[sizeof(aside_greeting)];
    if (!is_sender)
        return kv_stream_write(p, fd, aside_greeting, sizeof(aside_greeting));
    TRY(kv_stream_read(p, fd, got, sizeof(got)));
    return memcmp(got, aside_greeting, sizeof(got)) ? err_set(ERR_PROTO, "greeting") : ERR_OK;
}

static int aside_connect_to(const char *address)
{
    struct sockaddr_storage to;
    socklen_t n = 0;
    if (kv_tcp_resolve(address, &to, &n) != ERR_OK)
        return -1;
    OWNED_FD fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, n))
        return -1;
    int connected = fd;
    fd = -1;
    return connected;
}

static enum err aside_send(struct kv_pair *p, int fd, const struct kv_post *x)
{
    char address[WIRE_MAX_ADDRESS];
    TRY(kv_stream_read(p, fd, address, sizeof(address)));
    OWNED_FD side = aside_connect_to(address);
    if (side < 0)
        return err_set(ERR_PEER_LOST, "no way to %s", address);
    for (uint32_t i = 0; i < x->n_pages; i++)
        TRY(kv_stream_write(p, side, kv_pool_page(p->config.pool, x->pages[i]),
                            kv_pool_page_bytes(p->config.pool)));
    return ERR_OK;
}

static enum err aside_receive(struct kv_pair *p, int fd, const struct kv_post *x,
                              uint32_t n_peer_pages)
{
    char address[WIRE_MAX_ADDRESS] = "";
    OWNED_FD listener = -1;
    TRY(kv_tcp_bind("127.0.0.1", address, &listener));
    TRY(kv_stream_write(p, fd, address, sizeof(address)));
    struct pollfd fds[3] = {
        {0}, {.fd = listener, .events = POLLIN}, {.fd = fd, .events = POLLRDHUP}};
    while (!fds[1].revents) {
        TRY(kv_pair_poll(p, fds, 3, 0));
        if (fds[2].revents)
            return err_set(ERR_PEER_LOST, "the sender left");
    }
    OWNED_FD side = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    for (uint32_t i = 0; i < x->n_pages; i++)
        TRY(kv_stream_read(p, side, kv_pool_page(p->config.pool, x->pages[i]),
                           kv_pool_page_bytes(p->config.pool)));
    return ERR_OK;
}

static const struct kv_stream_kind aside_kind = {
    .open = aside_open, .send = aside_send, .receive = aside_receive, .tune = kv_tcp_tune};

static enum err aside_run(struct kv_pair *p)
{
    struct kv_aside *a = (struct kv_aside *)p;
    if (a->listen_fd >= 0)
        return kv_stream_receive(p, &aside_kind, &a->listen_fd, &a->fd);
    return kv_stream_send(p, &aside_kind, (struct sockaddr *)&a->address, a->address_bytes, &a->fd);
}

static void aside_hangup(struct kv_pair *p)
{
    struct kv_aside *a = (struct kv_aside *)p;
    kv_socket_close(&a->listen_fd);
    kv_socket_close(&a->fd);
}

static const struct kv_pair_ops aside_ops = {.run = aside_run, .hangup = aside_hangup};

static enum err aside_create(const struct kv_pair_config *c, struct kv_pair **ret)
{
    TRY(kv_pair_create(sizeof(struct kv_aside), &aside_ops, c, ret));
    struct kv_aside *a = (struct kv_aside *)*ret;
    a->listen_fd = a->fd = -1;
    return ERR_OK;
}

static enum err aside_listen(const struct kv_pair_config *c, const char *host,
                             char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    TRY(aside_create(c, &p));
    TRY(kv_tcp_bind(host, ret_address, &((struct kv_aside *)p)->listen_fd));
    TRY(kv_pair_start(p));
    *ret = take(&p);
    return ERR_OK;
}

static enum err aside_connect(const struct kv_pair_config *c, const char *address,
                              struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    TRY(aside_create(c, &p));
    struct kv_aside *a = (struct kv_aside *)p;
    TRY(kv_tcp_resolve(address, &a->address, &a->address_bytes));
    TRY(kv_pair_start(p));
    *ret = take(&p);
    return ERR_OK;
}

#endif
