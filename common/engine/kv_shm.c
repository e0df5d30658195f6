/* kv_shm.c: the transports within one host: the receiver copies out of the sender's pool.
 *
 * The sender tells which of its pages, over a unix socket with a random abstract name; the receiver
 * reads them from the pool that JOIN named.
 *   shm: host memory, with pread from a shared memory object. We read rather than map: it is one
 *        copy either way, a shrunken object is a short read instead of SIGBUS, and nothing is
 *        faulted in twice.
 *   ipc: GPU memory, mapped through its share (fd_share.h); on one GPU or, where peers are
 *        connected, from GPU to GPU. A mapping outlives the sender, so a copy from a dead one reads
 *        old bytes and no more.
 *
 * The sender's pages are only its own as long as it lives and has not aborted; after that they may
 * be written again while the receiver still copies. So the receiver looks at the socket AFTER a
 * copy: an abort closes the socket first, hence an open socket proves that the copy is whole.
 */
#include "common/engine/kv_pair.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "common/base/fd_share.h"

#define COPY_BYTES ((size_t)1 << 20) /* between two looks at the abort flag */
#define SHARE_MS   1000              /* for the sender to answer which memory is its pool */

struct kv_shm {
    struct kv_pair pair;
    int listen_fd, fd;
    struct sockaddr_un address; // sender: whom to call
    socklen_t address_bytes;
    int peer_pool;                    // receiver: the sender's pool object
    struct device_memory peer_memory; // receiver: the sender's pool on a device
    uint32_t n_peer_pages;
    uint32_t indexes[WIRE_MAX_PAGES]; // receiver: of the transfer under way
};
static_assert(offsetof(struct kv_shm, pair) == 0, "one is cast to the other");

/* ---- payload: indexes of pages in the sender's pool ---- */

static uint64_t shm_payload_bytes(const struct kv_pair *p, const struct kv_post *x)
{
    return x->n_pages * sizeof(x->pages[0]);
}

static int shm_payload(const struct kv_pair *p, const struct kv_post *x, uint64_t offset,
                       struct iovec *iov, int max)
{
    iov[0] = (struct iovec){(uint8_t *)x->pages + offset, shm_payload_bytes(p, x) - offset};
    return 1;
}

static enum err shm_copy(const struct kv_shm *s, uint32_t from, void *to)
{
    uint64_t left = kv_pool_page_bytes(s->pair.config.pool), at = from * left;
    for (uint8_t *out = to; left > 0;) {
        if (kv_pair_stopping(&s->pair))
            return err_set(ERR_ABORTED, "the KV pair was aborted");
        ssize_t got = pread(s->peer_pool, out, MIN(left, COPY_BYTES), (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return err_set(ERR_PEER_LOST, "page %u of the sender's pool: %s", from,
                           got ? strerror(errno) : "no longer there");
        out += got;
        at += (uint64_t)got;
        left -= (uint64_t)got;
    }
    return ERR_OK;
}

static enum err shm_receive(struct kv_pair *p, int fd, const struct kv_post *x,
                            uint32_t n_peer_pages)
{
    struct kv_shm *s = (struct kv_shm *)p;
    TRY(kv_stream_read(p, fd, s->indexes, x->n_pages * sizeof(s->indexes[0])));
    if (n_peer_pages != s->n_peer_pages)
        return err_set(ERR_PROTO, "the sender has %u pages, its pool object %u", n_peer_pages,
                       s->n_peer_pages);
    for (uint32_t i = 0; i < x->n_pages; i++)
        if (s->indexes[i] >= s->n_peer_pages)
            return err_set(ERR_PROTO, "transfer %" PRIu64 " names page %u of %u", x->seq,
                           s->indexes[i], s->n_peer_pages);
    struct device *device = kv_pool_get_config(p->config.pool)->device;
    if (device)
        TRY(device_copy_pages(device, kv_pool_base(p->config.pool), x->pages, s->peer_memory.base,
                              s->indexes, x->n_pages, kv_pool_page_bytes(p->config.pool)));
    for (uint32_t i = 0; !device && i < x->n_pages; i++)
        TRY(shm_copy(s, s->indexes[i], kv_pool_page(p->config.pool, x->pages[i])));
    struct pollfd look = {.fd = fd, .events = POLLRDHUP};
    if (poll(&look, 1, 0) != 0)
        return err_set(ERR_PEER_LOST, "the sender left during transfer %" PRIu64, x->seq);
    return ERR_OK;
}

static const struct kv_stream_kind shm_kind = {
    .payload_bytes = shm_payload_bytes,
    .payload = shm_payload,
    .receive = shm_receive,
    .same_user = true,
};

/* ---- the pair ---- */

static enum err shm_run(struct kv_pair *p)
{
    struct kv_shm *s = (struct kv_shm *)p;
    if (s->listen_fd >= 0)
        return kv_stream_receive(p, &shm_kind, &s->listen_fd, &s->fd);
    return kv_stream_send(p, &shm_kind, (struct sockaddr *)&s->address, s->address_bytes, &s->fd);
}

static void shm_hangup(struct kv_pair *p)
{
    struct kv_shm *s = (struct kv_shm *)p;
    kv_socket_close(&s->listen_fd);
    kv_socket_close(&s->fd);
    if (s->peer_pool >= 0)
        close(s->peer_pool);
    s->peer_pool = -1;
    struct device *device = kv_pool_get_config(p->config.pool)->device;
    if (device)
        device_release(device, &s->peer_memory);
}

static const struct kv_pair_ops shm_ops = {.run = shm_run, .hangup = shm_hangup};

/* address: "@name". */
static enum err shm_create(const struct kv_pair_config *c, const char *address,
                           struct kv_pair **ret)
{
    size_t n = strlen(address);
    if (n < 2 || address[0] != '@' || n > sizeof(((struct sockaddr_un *)0)->sun_path))
        return err_set(ERR_INVALID, "KV address '%s' is not of the form @name", address);
    TRY(kv_pair_create(sizeof(struct kv_shm), &shm_ops, c, ret));
    struct kv_shm *s = (struct kv_shm *)*ret;
    s->listen_fd = s->fd = s->peer_pool = -1;
    s->address.sun_family = AF_UNIX;
    memcpy(s->address.sun_path + 1, address + 1, n - 1);
    s->address_bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n);
    return ERR_OK;
}

/* Opens the sender's pool: whole pages of our size, or it is not a pool like ours. */
static enum err shm_open_peer(struct kv_shm *s, const char *name)
{
    if (!name || name[0] != '/' || !name[1] || strchr(name + 1, '/'))
        return err_set(ERR_INVALID, "the sender names no pool object ('%s')", name ? name : "");
    struct device *device = kv_pool_get_config(s->pair.config.pool)->device;
    uint64_t bytes = 0, page_bytes = kv_pool_page_bytes(s->pair.config.pool);
    OWNED_FD memory = -1;
    if (device) {
        TRY(fd_share_fetch(name, SHARE_MS, &memory, &bytes));
    } else {
        struct stat st;
        s->peer_pool = shm_open(name, O_RDONLY | O_CLOEXEC, 0);
        if (s->peer_pool < 0 || fstat(s->peer_pool, &st))
            return err_set(ERR_IO, "the sender's pool %s: %s", name, strerror(errno));
        bytes = (uint64_t)st.st_size;
    }
    if (!bytes || bytes % page_bytes || bytes / page_bytes > UINT32_MAX)
        return err_set(ERR_MISMATCH,
                       "the sender's pool %s of %" PRIu64 " bytes is no pool of %" PRIu64
                       "-byte pages",
                       name, bytes, page_bytes);
    s->n_peer_pages = (uint32_t)(bytes / page_bytes);
    return device ? device_import(device, memory, bytes, &s->peer_memory) : ERR_OK;
}

enum err kv_shm_listen(const struct kv_pair_config *c, const char *peer_pool,
                       char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret)
{
    uint64_t random[2];
    if (getrandom(random, sizeof(random), 0) != sizeof(random))
        return err_set(ERR_IO, "getrandom: %s", strerror(errno));
    char address[WIRE_MAX_ADDRESS] = "";
    snprintf(address, sizeof(address), "@baton-kv-%016" PRIx64 "%016" PRIx64, random[0], random[1]);
    OWNED(kv_pair) p = NULL;
    TRY(shm_create(c, address, &p));
    struct kv_shm *s = (struct kv_shm *)p;
    TRY(shm_open_peer(s, peer_pool));
    s->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->listen_fd < 0 || bind(s->listen_fd, (struct sockaddr *)&s->address, s->address_bytes) ||
        listen(s->listen_fd, SOMAXCONN))
        return err_set(ERR_IO, "listening on %s: %s", address, strerror(errno));
    TRY(kv_pair_start(p));
    memcpy(ret_address, address, sizeof(address));
    *ret = take(&p);
    return ERR_OK;
}

enum err kv_shm_connect(const struct kv_pair_config *c, const char *address, struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    TRY(shm_create(c, address, &p));
    TRY(kv_pair_start(p));
    *ret = take(&p);
    return ERR_OK;
}
