/* kv_transport.c: see kv_transport.h and, for the rules of the queue, kv_pair.h. */
#include "common/engine/kv_transport.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/engine/kv_pair.h"

static void *pair_thread(void *arg);

/* ---- kinds ---- */

static struct kind {
    enum wire_transport kind;
    const char *name;
    bool same_host;       // works between processes of one host only
    bool on_device;       // moves pages in GPU memory; the others, in host memory
    kv_listen_fn *listen; // NULL: not in this process
    kv_connect_fn *connect;
} kinds[] = {
    // in order of preference
    {WIRE_KV_IPC, "ipc", true, true, kv_shm_listen, kv_shm_connect},
    {WIRE_KV_NCCL, "nccl", false, true, NULL, NULL},
    {WIRE_KV_SHM, "shm", true, false, kv_shm_listen, kv_shm_connect},
    {WIRE_KV_TCP, "tcp", false, false, kv_tcp_listen, kv_tcp_connect},
};

static struct kind *kind_find(enum wire_transport kind)
{
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++)
        if (kinds[i].kind == kind)
            return &kinds[i];
    return NULL;
}

void kv_transport_register(enum wire_transport kind, kv_listen_fn *listen, kv_connect_fn *connect)
{
    struct kind *k = kind_find(kind);
    assert(k && listen && connect);
    k->listen = listen;
    k->connect = connect;
}

enum err kv_transports_parse(const char *name, bool on_device, uint32_t *ret_bits)
{
    uint32_t bits = 0;
    char names[64] = "auto";
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
        if (!kinds[i].listen || kinds[i].on_device != on_device)
            continue;
        if (!strcmp(name, "auto") || !strcmp(name, kinds[i].name))
            bits |= kinds[i].kind;
        size_t n = strlen(names);
        snprintf(names + n, sizeof(names) - n, ", %s", kinds[i].name);
    }
    if (!bits)
        return err_set(ERR_INVALID, "--kv-transport %s: with pages in %s memory it is one of %s",
                       name, on_device ? "GPU" : "host", names);
    *ret_bits = bits;
    return ERR_OK;
}

enum wire_transport kv_transport_choose(uint32_t a, uint32_t b, bool same_host)
{
    for (size_t i = 0; i < ARRAY_LEN(kinds); i++)
        if ((a & b & kinds[i].kind) && (same_host || !kinds[i].same_host))
            return kinds[i].kind;
    return (enum wire_transport)0;
}

const char *kv_transport_name(enum wire_transport kind)
{
    const struct kind *k = kind_find(kind);
    return k ? k->name : "?";
}

uint64_t kv_host_id(void)
{
    char boot[64] = "";
    OWNED_FILE f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (f && !fgets(boot, sizeof(boot), f))
        boot[0] = 0;
    uint64_t h = hash_bytes(1, boot, strlen(boot));
    // Abstract sockets live in the network namespace, shared memory goes with the IPC namespace.
    static const char *const spaces[] = {"/proc/self/ns/ipc", "/proc/self/ns/net"};
    for (size_t i = 0; i < ARRAY_LEN(spaces); i++) {
        struct stat st = {0};
        uint64_t id[2] = {0};
        if (!stat(spaces[i], &st)) {
            id[0] = st.st_dev;
            id[1] = st.st_ino;
        }
        h = hash_bytes(h, id, sizeof(id));
    }
    return h;
}

/* Whether this process can move c's pages by k (NULL: no such kind). */
static enum err kind_check(const struct kind *k, enum wire_transport kind,
                           const struct kv_pair_config *c)
{
    if (!k || !k->listen)
        return err_set(ERR_INVALID, "KV transport %d (%s) is not in this process", (int)kind,
                       kv_transport_name(kind));
    if (k->on_device != (kv_pool_get_config(c->pool)->device != NULL))
        return err_set(ERR_INVALID,
                       "KV transport %s moves pages in %s memory, ours are in %s memory", k->name,
                       k->on_device ? "GPU" : "host", k->on_device ? "host" : "GPU");
    return ERR_OK;
}

enum err kv_pair_listen(enum wire_transport kind, const struct kv_pair_config *c, const char *host,
                        const char *peer_address, char ret_address[WIRE_MAX_ADDRESS],
                        struct kv_pair **ret)
{
    const struct kind *k = kind_find(kind);
    TRY(kind_check(k, kind, c));
    return k->listen(c, k->same_host ? peer_address : host, ret_address, ret);
}

enum err kv_pair_connect(enum wire_transport kind, const struct kv_pair_config *c,
                         const char *address, struct kv_pair **ret)
{
    const struct kind *k = kind_find(kind);
    TRY(kind_check(k, kind, c));
    return k->connect(c, address, ret);
}

/* ---- the pair, from the owner's side ---- */

enum err kv_pair_create(size_t n_bytes, const struct kv_pair_ops *ops,
                        const struct kv_pair_config *c, struct kv_pair **ret)
{
    struct kv_pair *p = calloc(1, n_bytes);
    if (!p)
        return err_set(ERR_NOMEM, "no memory for a KV pair");
    p->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->wake_fd < 0) {
        free(p);
        return err_set(ERR_IO, "eventfd: %s", strerror(errno));
    }
    p->ops = ops;
    p->config = *c;
    p->last = &p->first;
    pthread_mutex_init(&p->lock, NULL);
    *ret = p;
    return ERR_OK;
}

enum err kv_pair_start(struct kv_pair *p)
{
    // Signals are for the process's own threads.
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int e = pthread_create(&p->thread, NULL, pair_thread, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (e)
        return err_set(ERR_IO, "thread for a KV pair: %s", strerror(e));
    p->has_thread = true;
    return ERR_OK;
}

static void pair_wake(struct kv_pair *p)
{
    uint64_t one = 1;
    // Only fails when the count is full, and then it is readable anyway.
    if (write(p->wake_fd, &one, sizeof(one)) < 0)
        return;
}

enum err kv_pair_post(struct kv_pair *p, uint64_t seq, const uint32_t *pages, uint32_t n)
{
    if (n == 0 || n > WIRE_MAX_PAGES)
        return err_set(ERR_INVALID, "a transfer of %u pages", n);
    uint32_t total = kv_pool_get_config(p->config.pool)->n_pages;
    for (uint32_t i = 0; i < n; i++)
        if (pages[i] >= total)
            return err_set(ERR_INVALID, "transfer of page %u of %u", pages[i], total);
    struct kv_post *x = malloc(sizeof(*x) + n * sizeof(x->pages[0]));
    if (!x)
        return err_set(ERR_NOMEM, "no memory for a transfer");
    x->next = NULL;
    x->seq = seq;
    x->n_pages = n;
    memcpy(x->pages, pages, n * sizeof(x->pages[0]));

    pthread_mutex_lock(&p->lock);
    bool stop = p->stop;
    uint64_t want = p->next_seq;
    if (!stop && seq == want) {
        *p->last = x;
        p->last = &x->next;
        p->next_seq++;
        x = NULL;
    }
    pthread_mutex_unlock(&p->lock);
    free(x);
    if (stop)
        return err_set(ERR_ABORTED, "the KV pair was aborted");
    if (seq != want)
        return err_set(ERR_INVALID, "transfer %" PRIu64 " posted, %" PRIu64 " is next", seq, want);
    pair_wake(p);
    return ERR_OK;
}

void kv_pair_abort(struct kv_pair *p)
{
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_mutex_unlock(&p->lock);
    if (!p->has_thread)
        return;
    assert(!pthread_equal(pthread_self(), p->thread));
    pair_wake(p);
    pthread_join(p->thread, NULL);
    p->has_thread = false;
}

void kv_pair_destroy(struct kv_pair *p)
{
    if (!p)
        return;
    kv_pair_abort(p);
    p->ops->hangup(p); // the thread did, if there was one
    close(p->wake_fd);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

/* ---- the pair's thread ---- */

static void *pair_thread(void *arg)
{
    struct kv_pair *p = arg;
    pthread_setname_np(pthread_self(), "kv_pair");
    enum err why = p->ops->run(p);
    // Callbacks carry a code only, so the sentence is told here.
    if (why != ERR_ABORTED)
        log_info("kv", "pair ended: %s", err_text(why));
    if (why != ERR_ABORTED && why != ERR_PROTO)
        why = ERR_PEER_LOST;
    p->ops->hangup(p);
    while (!kv_pair_stopping(p)) {
        while (kv_pair_next(p, NULL))
            kv_pair_finish(p, why);
        short events;
        if (kv_pair_wait(p, -1, 0, 0, &events) != ERR_OK)
            continue;
    }
    while (kv_pair_next(p, NULL)) // nothing can be posted any more
        kv_pair_finish(p, ERR_ABORTED);
    return NULL;
}

bool kv_pair_stopping(const struct kv_pair *p) { return p->stop; }

struct kv_post *kv_pair_next(struct kv_pair *p, const struct kv_post *x)
{
    pthread_mutex_lock(&p->lock);
    struct kv_post *next = x ? x->next : p->first;
    pthread_mutex_unlock(&p->lock);
    return next;
}

void kv_pair_finish(struct kv_pair *p, enum err result)
{
    pthread_mutex_lock(&p->lock);
    struct kv_post *x = p->first;
    p->first = x->next;
    if (!p->first)
        p->last = &p->first;
    pthread_mutex_unlock(&p->lock);
    p->config.done(p->config.user, x->seq, result);
    free(x);
}

enum err kv_pair_poll(struct kv_pair *p, struct pollfd *fds, nfds_t n, uint64_t deadline_us)
{
    fds[0] = (struct pollfd){.fd = p->wake_fd, .events = POLLIN};
    int timeout_ms = -1;
    if (deadline_us) {
        uint64_t now = clock_now_us();
        timeout_ms = now < deadline_us ? (int)((deadline_us - now + 999) / 1000) : 0;
    }
    int got = poll(fds, n, timeout_ms);
    if (got < 0 && errno != EINTR)
        return err_set(ERR_IO, "poll: %s", strerror(errno));
    if (got < 0)
        for (nfds_t i = 0; i < n; i++)
            fds[i].revents = 0;
    if (fds[0].revents) {
        uint64_t count;
        while (read(p->wake_fd, &count, sizeof(count)) > 0)
            ;
    }
    return kv_pair_stopping(p) ? err_set(ERR_ABORTED, "the KV pair was aborted") : ERR_OK;
}

enum err kv_pair_wait(struct kv_pair *p, int fd, short events, uint64_t deadline_us, short *ret)
{
    *ret = 0;
    struct pollfd fds[2] = {{0}, {.fd = fd, .events = events}}; // a negative fd is skipped
    TRY(kv_pair_poll(p, fds, 2, deadline_us));
    if (!fds[1].revents && deadline_us && clock_now_us() >= deadline_us)
        return err_set(ERR_PEER_LOST, "no answer from the peer in time");
    *ret = fds[1].revents;
    return ERR_OK;
}
