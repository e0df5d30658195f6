/* kv_tcp.c: the transport between hosts: the sender writes pages, the receiver reads them in place.
 *
 * Nothing here is encrypted. The token keeps strangers from writing into a pool; who can read the
 * wire reads the cache. Links between workers' hosts are taken for private.
 */
#include "common/engine/kv_pair.h"

#include <assert.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>

struct kv_tcp {
    struct kv_pair pair;
    int listen_fd, fd;
    struct sockaddr_storage address; // sender: whom to call
    socklen_t address_bytes;
};
static_assert(offsetof(struct kv_tcp, pair) == 0, "one is cast to the other");

/* ---- payload: the pages themselves ---- */

static uint64_t tcp_payload_bytes(const struct kv_pair *p, const struct kv_post *x)
{
    return x->n_pages * kv_pool_page_bytes(p->config.pool);
}

static int tcp_payload(const struct kv_pair *p, const struct kv_post *x, uint64_t offset,
                       struct iovec *iov, int max)
{
    uint64_t page_bytes = kv_pool_page_bytes(p->config.pool), skip = offset % page_bytes;
    int n = 0;
    for (uint64_t i = offset / page_bytes; i < x->n_pages && n < max; i++, skip = 0) {
        uint8_t *page = kv_pool_page(p->config.pool, x->pages[i]);
        iov[n++] = (struct iovec){page + skip, page_bytes - skip};
    }
    return n;
}

static enum err tcp_receive(struct kv_pair *p, int fd, const struct kv_post *x,
                            uint32_t n_peer_pages)
{
    for (uint32_t i = 0; i < x->n_pages; i++)
        TRY(kv_stream_read(p, fd, kv_pool_page(p->config.pool, x->pages[i]),
                           kv_pool_page_bytes(p->config.pool)));
    return ERR_OK;
}

void kv_tcp_tune(int fd)
{
    // Best effort: a pair without these options is slower to act, not wrong.
    int on = 1, idle_s = 5, every_s = 2, times = 3;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof(every_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof(times));
}

static const struct kv_stream_kind tcp_kind = {
    .payload_bytes = tcp_payload_bytes,
    .payload = tcp_payload,
    .receive = tcp_receive,
    .tune = kv_tcp_tune,
};

/* ---- the pair ---- */

static enum err tcp_run(struct kv_pair *p)
{
    struct kv_tcp *t = (struct kv_tcp *)p;
    if (t->listen_fd >= 0)
        return kv_stream_receive(p, &tcp_kind, &t->listen_fd, &t->fd);
    return kv_stream_send(p, &tcp_kind, (struct sockaddr *)&t->address, t->address_bytes, &t->fd);
}

static void tcp_hangup(struct kv_pair *p)
{
    struct kv_tcp *t = (struct kv_tcp *)p;
    kv_socket_close(&t->listen_fd);
    kv_socket_close(&t->fd);
}

static const struct kv_pair_ops tcp_ops = {.run = tcp_run, .hangup = tcp_hangup};

static enum err tcp_create(const struct kv_pair_config *c, struct kv_pair **ret)
{
    TRY(kv_pair_create(sizeof(struct kv_tcp), &tcp_ops, c, ret));
    struct kv_tcp *t = (struct kv_tcp *)*ret;
    t->listen_fd = t->fd = -1;
    return ERR_OK;
}

/* "1.2.3.4:5" or "[::1]:5", numeric: the sender must not have to ask a name server. */
static enum err tcp_address(int listen_fd, char ret[WIRE_MAX_ADDRESS])
{
    struct sockaddr_storage own;
    socklen_t n = sizeof(own);
    char host[WIRE_MAX_ADDRESS - 16], port[8];
    if (getsockname(listen_fd, (struct sockaddr *)&own, &n) ||
        getnameinfo((struct sockaddr *)&own, n, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV))
        return err_set(ERR_IO, "no name for the KV socket");
    const char *form = own.ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s";
    snprintf(ret, WIRE_MAX_ADDRESS, form, host, port);
    return ERR_OK;
}

static bool is_wildcard(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET)
        return ((const struct sockaddr_in *)a)->sin_addr.s_addr == INADDR_ANY;
    return a->sa_family == AF_INET6 &&
           IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *)a)->sin6_addr);
}

static enum err tcp_listen_on(const struct addrinfo *to, int *ret_fd)
{
    OWNED_FD fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, to->ai_addr, to->ai_addrlen) || listen(fd, SOMAXCONN))
        return err_set(ERR_IO, "listening for KV pages: %s", strerror(errno));
    *ret_fd = fd;
    fd = -1;
    return ERR_OK;
}

enum err kv_tcp_bind(const char *host, char ret_address[WIRE_MAX_ADDRESS], int *ret_fd)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    int e = host ? getaddrinfo(host, "0", &hints, &found) : EAI_NONAME;
    if (e)
        return err_set(ERR_INVALID, "KV host '%s': %s", host ? host : "", gai_strerror(e));
    OWNED_FD fd = -1;
    enum err err = is_wildcard(found->ai_addr)
                       ? err_set(ERR_INVALID, "KV host '%s' is no address to call", host)
                       : tcp_listen_on(found, &fd);
    freeaddrinfo(found);
    TRY(err);
    TRY(tcp_address(fd, ret_address));
    *ret_fd = fd;
    fd = -1;
    return ERR_OK;
}

enum err kv_tcp_resolve(const char *address, struct sockaddr_storage *ret, socklen_t *ret_bytes)
{
    char host[WIRE_MAX_ADDRESS];
    const char *colon = strrchr(address, ':');
    bool brackets = address[0] == '[' && colon && colon[-1] == ']';
    size_t n = colon ? (size_t)(colon - address) - (brackets ? 2 : 0) : 0;
    if (!n || n >= sizeof(host) || !colon[1])
        return err_set(ERR_INVALID, "KV address '%s' is not host:port", address);
    memcpy(host, address + brackets, n);
    host[n] = 0;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV},
                    *found = NULL;
    int e = getaddrinfo(host, colon + 1, &hints, &found);
    if (e)
        return err_set(ERR_INVALID, "KV address '%s': %s", address, gai_strerror(e));
    memcpy(ret, found->ai_addr, found->ai_addrlen);
    *ret_bytes = found->ai_addrlen;
    freeaddrinfo(found);
    return ERR_OK;
}

enum err kv_tcp_listen(const struct kv_pair_config *c, const char *host,
                       char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    char address[WIRE_MAX_ADDRESS];
    TRY(tcp_create(c, &p));
    TRY(kv_tcp_bind(host, address, &((struct kv_tcp *)p)->listen_fd));
    TRY(kv_pair_start(p));
    memcpy(ret_address, address, sizeof(address));
    *ret = take(&p);
    return ERR_OK;
}

enum err kv_tcp_connect(const struct kv_pair_config *c, const char *address, struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    TRY(tcp_create(c, &p));
    struct kv_tcp *t = (struct kv_tcp *)p;
    TRY(kv_tcp_resolve(address, &t->address, &t->address_bytes));
    TRY(kv_pair_start(p));
    *ret = take(&p);
    return ERR_OK;
}
