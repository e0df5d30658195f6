/* kv_nccl.c: the transport between two GPUs: a two-rank communicator per pair, pool to pool.
 *
 * A kv_stream over TCP is the control channel: token, geometry, heads, notes, and the peer's death
 * (a closed socket). Content goes by ncclSend and ncclRecv, one per page in one group per transfer,
 * so the pages may lie anywhere on either side. The receiver makes the communicator's id and passes
 * it over the control channel once; it is a bearer secret and never logged.
 *
 *   receive: READY ->  group of ncclRecv --\                     /-- stream done, SENT read -> DONE
 *   send:    READY <-  group of ncclSend ---> one kernel each --<--- stream done -> SENT
 *
 * 1. Neither end launches before both are ready: an unmatched kernel spins on its SMs.
 * 2. A kernel that was aborted runs to its end without moving data and without telling the other
 *    one, whose kernel then ends too, with garbage. So the sender confirms (SENT) after its stream
 *    was done without an error, and nothing received counts before.
 * 3. Whoever gives up closes the socket first and aborts the communicator after that. It is the
 *    receiver's own kernel that writes into the pool, out of NCCL's buffers: when kv_pair_abort
 *    returns, that kernel is over, and no late sender can write.
 * 4. ncclCommAbort may hang. It runs on a thread of its own, and if that is not through in END_US
 *    the process ends: pages that a kernel may still write cannot be given to anybody.
 *
 * Tried and left out: pools registered with ncclCommRegister, so that the sender writes straight
 * into them. H100 pair on NVLink, 4 CTAs, NCCL 2.28.9: 60 instead of 55 GB/s for 64 pages, little
 * for up to 4. It gives up 3, deregistering needs a live peer, and without it ncclCommAbort of that
 * version reads what it has freed (ncclRegCleanup after ncclProxyDestroy) and crashes.
 *
 * Posted pages must be complete: the engine has waited for its stream. The communicator works in
 * the background (blocking = 0); the pair's thread sleeps meanwhile, always with an eye on its
 * socket and on abort.
 */
#include "common/engine/kv_nccl.h"

#include <assert.h>
#include <cuda_runtime_api.h>
#include <errno.h>
#include <inttypes.h>
#include <nccl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/engine/kv_pair.h"

#define INIT_US    15000000u /* communicator, then first transfer */
#define END_US     5000000u  /* abort; freeing memory may wait for another pair that stalls */
#define LOOK_US    100000u   /* between two looks at a transfer's errors */
#define NAP_US     20u       /* while NCCL launches, */
#define N_NAPS     100       /* that often; then a millisecond */
#define WARM_BYTES 256u
#define MAX_CTAS   32
#define EXIT_STUCK 86
#define SELF       0 /* the only rank of a loopback */
#define DEFAULTS                                                                                   \
    {                                                                                              \
        .max_ctas = 4, .stall_us = 3000000                                                         \
    }

struct kv_nccl {
    struct kv_pair pair;
    int listen_fd, fd;
    struct sockaddr_storage address; // sender: whom to call
    socklen_t address_bytes;
    struct kv_nccl_options options;
    int peer;    // the other end's rank
    int done_fd; // readable: the stream got to the end of a transfer
    ncclComm_t comm;
    cudaStream_t stream;
    void *warm;                       // WARM_BYTES twice: of the first transfer
    uint32_t indexes[WIRE_MAX_PAGES]; // loopback: the sender's pages
};
static_assert(offsetof(struct kv_nccl, pair) == 0, "one is cast to the other");

/* From receiver to sender, once: what both must agree on. */
struct invite {
    ncclUniqueId id;
    uint32_t nccl_version;
    uint32_t max_ctas;
    uint32_t zero[2];
};
static_assert(sizeof(struct invite) == 144, "no padding on the wire");

static struct kv_nccl_options next_options = DEFAULTS;

/* ---- failures ---- */

static enum err cuda_check(cudaError_t e, const char *doing)
{
    return e == cudaSuccess ? ERR_OK : err_set(ERR_CUDA, "%s: %s", doing, cudaGetErrorString(e));
}

/* In progress is fine: what it comes to shows in comm_settle. */
static enum err nccl_check(const struct kv_nccl *n, ncclResult_t r, const char *doing)
{
    if (r == ncclSuccess || r == ncclInProgress)
        return ERR_OK;
    return err_set(r == ncclRemoteError ? ERR_PEER_LOST : ERR_CUDA, "%s: %s (%s)", doing,
                   ncclGetErrorString(r), ncclGetLastError(n->comm));
}

/* ---- waiting ---- */

/* Sleeps until the stream is done (*ret), or until_us. ERR_PEER_LOST: the socket was closed. */
static enum err peer_watch(struct kv_nccl *n, int fd, uint64_t until_us, bool *ret)
{
    struct pollfd fds[3] = {
        {0}, {.fd = fd, .events = POLLRDHUP}, {.fd = n->done_fd, .events = POLLIN}};
    TRY(kv_pair_poll(&n->pair, fds, 3, until_us));
    if (fds[1].revents)
        return err_set(ERR_PEER_LOST, "the peer closed during a transfer");
    *ret = fds[2].revents != 0;
    return ERR_OK;
}

/* Waits for what NCCL does in the background: creation, connections, a launch. */
static enum err comm_settle(struct kv_nccl *n, int fd, uint64_t deadline_us, const char *doing)
{
    for (int i = 0;; i++) {
        ncclResult_t state = ncclSuccess;
        TRY(nccl_check(n, ncclCommGetAsyncError(n->comm, &state), doing));
        if (state != ncclInProgress)
            return nccl_check(n, state, doing);
        if (clock_now_us() >= deadline_us)
            return err_set(ERR_PEER_LOST, "%s takes too long", doing);
        if (i < N_NAPS) {
            nanosleep(&(struct timespec){.tv_nsec = NAP_US * 1000}, NULL);
        } else {
            bool done;
            TRY(peer_watch(n, fd, clock_now_us() + 1000, &done));
        }
    }
}

/* On a thread of the CUDA driver. */
static void CUDART_CB stream_done(void *fd)
{
    uint64_t one = 1;
    if (write(*(int *)fd, &one, sizeof(one)) < 0)
        return; // cannot fail: the count is 0 or 1
}

/* Waits until the stream has done what was launched on it, without an error. */
static enum err stream_wait(struct kv_nccl *n, int fd, uint64_t deadline_us, const char *doing)
{
    TRY(cuda_check(cudaLaunchHostFunc(n->stream, stream_done, &n->done_fd), doing));
    for (bool done = false; !done;) {
        uint64_t now = clock_now_us();
        TRY(peer_watch(n, fd, MIN(deadline_us, now + LOOK_US), &done));
        ncclResult_t state = ncclSuccess;
        TRY(nccl_check(n, ncclCommGetAsyncError(n->comm, &state), doing));
        TRY(nccl_check(n, state, doing));
        cudaError_t e = cudaStreamQuery(n->stream); // after an error stream_done is never called
        if (e != cudaErrorNotReady)
            TRY(cuda_check(e, doing));
        if (!done && now >= deadline_us)
            return err_set(ERR_PEER_LOST, "%s takes too long", doing);
    }
    uint64_t count;
    if (read(n->done_fd, &count, sizeof(count)) != sizeof(count))
        return err_set(ERR_IO, "eventfd: %s", strerror(errno));
    return ERR_OK;
}

/* ---- a pair's communicator ---- */

static enum err stream_create(struct kv_nccl *n)
{
    const struct kv_pool_config *c = kv_pool_get_config(n->pair.config.pool);
    int lowest = 0, highest = 0;
    TRY(cuda_check(cudaSetDevice(c->device->ordinal), "choosing the GPU"));
    TRY(cuda_check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "stream priorities"));
    TRY(cuda_check(cudaStreamCreateWithPriority(&n->stream, cudaStreamNonBlocking,
                                                n->options.low_priority ? lowest : highest),
                   "stream for KV pages"));
    return cuda_check(cudaMalloc(&n->warm, 2 * WARM_BYTES), "memory of a KV pair");
}

static enum err invite_make(struct kv_nccl *n, struct invite *ret)
{
    int version = 0;
    memset(ret, 0, sizeof(*ret));
    TRY(nccl_check(n, ncclGetVersion(&version), "NCCL's version"));
    TRY(nccl_check(n, ncclGetUniqueId(&ret->id), "id of a communicator"));
    ret->nccl_version = (uint32_t)version;
    ret->max_ctas = (uint32_t)n->options.max_ctas;
    return ERR_OK;
}

static enum err invite_accept(struct kv_nccl *n, const struct invite *i)
{
    int version = 0;
    TRY(nccl_check(n, ncclGetVersion(&version), "NCCL's version"));
    if (i->nccl_version != (uint32_t)version)
        return err_set(ERR_PROTO, "the receiver has NCCL %u, we have %d", i->nccl_version, version);
    if (i->max_ctas < 1 || i->max_ctas > MAX_CTAS || i->zero[0] || i->zero[1])
        return err_set(ERR_PROTO, "the receiver's invitation makes no sense");
    n->options.max_ctas = (int)i->max_ctas;
    return ERR_OK;
}

/* Rank 0 is the receiver. */
static enum err comm_create(struct kv_nccl *n, int fd, const ncclUniqueId *id, int rank)
{
    bool loopback = n->options.loopback_base != NULL;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.minCTAs = config.maxCTAs = n->options.max_ctas;
    config.commName = "baton-kv";
    n->peer = loopback ? SELF : 1 - rank;
    uint64_t deadline_us = clock_now_us() + INIT_US;
    TRY(nccl_check(n, ncclCommInitRankConfig(&n->comm, loopback ? 1 : 2, *id, rank, &config),
                   "creating a communicator"));
    return comm_settle(n, fd, deadline_us, "creating a communicator");
}

/* Sends or receives memory. from: a loopback's other end, or NULL. Within a group. */
static enum err bytes_launch(struct kv_nccl *n, const void *from, void *memory, uint64_t bytes,
                             bool is_sender)
{
    if (from)
        TRY(nccl_check(n, ncclSend(from, bytes, ncclUint8, SELF, n->comm, n->stream), "ncclSend"));
    if (is_sender)
        return nccl_check(n, ncclSend(memory, bytes, ncclUint8, n->peer, n->comm, n->stream),
                          "ncclSend");
    return nccl_check(n, ncclRecv(memory, bytes, ncclUint8, n->peer, n->comm, n->stream),
                      "ncclRecv");
}

/* The first transfer connects the two GPUs and loads NCCL's kernel: better now than for somebody's
 * prompt. */
static enum err comm_warm(struct kv_nccl *n, int fd, bool is_sender)
{
    const void *from = n->options.loopback_base ? (uint8_t *)n->warm + WARM_BYTES : NULL;
    uint64_t deadline_us = clock_now_us() + INIT_US;
    TRY(nccl_check(n, ncclGroupStart(), "first transfer"));
    enum err e = bytes_launch(n, from, n->warm, WARM_BYTES, is_sender);
    enum err end = nccl_check(n, ncclGroupEnd(), "first transfer");
    TRY(e);
    TRY(end);
    TRY(comm_settle(n, fd, deadline_us, "first transfer"));
    return stream_wait(n, fd, deadline_us, "first transfer");
}

static enum err nccl_open(struct kv_pair *p, int fd, bool is_sender)
{
    struct kv_nccl *n = (struct kv_nccl *)p;
    uint64_t start_us = clock_now_us();
    struct invite invite;
    prctl(PR_SET_TIMERSLACK, 1000ul); // for the naps; best effort
    TRY(stream_create(n));
    if (is_sender) {
        TRY(kv_stream_read(p, fd, &invite, sizeof(invite)));
        TRY(invite_accept(n, &invite));
    } else {
        TRY(invite_make(n, &invite));
        TRY(kv_stream_write(p, fd, &invite, sizeof(invite)));
    }
    if (!is_sender || !n->options.loopback_base) {
        enum err e = comm_create(n, fd, &invite.id, is_sender);
        explicit_bzero(&invite, sizeof(invite));
        TRY(e);
        TRY(comm_warm(n, fd, is_sender));
    }
    log_info("kv", "ctas=%d ms=%" PRIu64 " NCCL pair is up", n->options.max_ctas,
             (clock_now_us() - start_us) / 1000);
    return ERR_OK;
}

/* ---- transfers ---- */

/* Puts x's pages on the stream. */
static enum err pages_launch(struct kv_nccl *n, const struct kv_post *x, bool is_sender)
{
    const struct kv_pool *pool = n->pair.config.pool;
    uint64_t bytes = kv_pool_page_bytes(pool);
    const uint8_t *from = n->options.loopback_base;
    TRY(nccl_check(n, ncclGroupStart(), "launching a transfer"));
    enum err e = ERR_OK;
    for (uint32_t i = 0; i < x->n_pages && e == ERR_OK; i++)
        e = bytes_launch(n, from ? from + n->indexes[i] * bytes : NULL,
                         kv_pool_page(pool, x->pages[i]), bytes, is_sender);
    enum err end = nccl_check(n, ncclGroupEnd(), "launching a transfer");
    return e != ERR_OK ? e : end;
}

static enum err pages_move(struct kv_nccl *n, int fd, const struct kv_post *x, bool is_sender)
{
    switch (failpoint_pass("kv.nccl")) {
    case FAILPOINT_ERROR:
        return err_set(ERR_PEER_LOST, "failpoint kv.nccl");
    case FAILPOINT_DROP: // the other end's kernel waits for ours
        for (bool done;;)
            TRY(peer_watch(n, fd, 0, &done));
    case FAILPOINT_NONE:
        break;
    }
    uint64_t bytes = x->n_pages * kv_pool_page_bytes(n->pair.config.pool);
    uint64_t deadline_us = clock_now_us() + n->options.stall_us + bytes / 1000;
    TRY(pages_launch(n, x, is_sender));
    TRY(comm_settle(n, fd, deadline_us, "launching a transfer"));
    return stream_wait(n, fd, deadline_us, "a transfer");
}

static enum err nccl_send(struct kv_pair *p, int fd, const struct kv_post *x)
{
    struct kv_nccl *n = (struct kv_nccl *)p;
    if (n->options.loopback_base)
        return kv_stream_write(p, fd, x->pages, x->n_pages * sizeof(x->pages[0]));
    return pages_move(n, fd, x, true);
}

static enum err nccl_receive(struct kv_pair *p, int fd, const struct kv_post *x,
                             uint32_t n_peer_pages)
{
    struct kv_nccl *n = (struct kv_nccl *)p;
    if (n->options.loopback_base) {
        TRY(kv_stream_read(p, fd, n->indexes, x->n_pages * sizeof(n->indexes[0])));
        for (uint32_t i = 0; i < x->n_pages; i++)
            if (n->indexes[i] >= n_peer_pages)
                return err_set(ERR_PROTO, "transfer %" PRIu64 " names page %u of %u", x->seq,
                               n->indexes[i], n_peer_pages);
    }
    return pages_move(n, fd, x, false);
}

static const struct kv_stream_kind nccl_kind = {
    .open = nccl_open,
    .send = nccl_send,
    .receive = nccl_receive,
    .tune = kv_tcp_tune,
};

/* ---- the end ---- */

static void *comm_abort(void *arg)
{
    struct kv_nccl *n = arg;
    const struct kv_pool_config *c = kv_pool_get_config(n->pair.config.pool);
    cudaSetDevice(c->device->ordinal);
    if (n->comm)
        ncclCommAbort(n->comm); // what it says is of no use: the stream shows whether it helped
    if (n->stream) {
        cudaStreamSynchronize(n->stream);
        cudaStreamDestroy(n->stream);
    }
    cudaFree(n->warm);
    return NULL;
}

/* Returns when the stream is empty and nothing of the pair is left on the GPU, or not at all. */
static void nccl_end(struct kv_nccl *n)
{
    if (!n->stream)
        return;
    uint64_t start_us = clock_now_us(), end_us = start_us + END_US;
    struct timespec end = {.tv_sec = (time_t)(end_us / 1000000),
                           .tv_nsec = (long)(end_us % 1000000) * 1000};
    pthread_t thread;
    int e = pthread_create(&thread, NULL, comm_abort, n);
    if (!e)
        e = pthread_clockjoin_np(thread, NULL, CLOCK_MONOTONIC, &end);
    if (e) {
        log_error("kv",
                  "a communicator's abort: %s; its kernel may still write KV pages, so this "
                  "process ends",
                  strerror(e));
        _exit(EXIT_STUCK);
    }
    n->comm = NULL;
    n->stream = NULL;
    n->warm = NULL;
    log_debug("kv", "ms=%" PRIu64 " communicator ended", (clock_now_us() - start_us) / 1000);
}

/* ---- the pair ---- */

static enum err nccl_run(struct kv_pair *p)
{
    struct kv_nccl *n = (struct kv_nccl *)p;
    if (n->listen_fd >= 0)
        return kv_stream_receive(p, &nccl_kind, &n->listen_fd, &n->fd);
    return kv_stream_send(p, &nccl_kind, (struct sockaddr *)&n->address, n->address_bytes, &n->fd);
}

static void nccl_hangup(struct kv_pair *p)
{
    struct kv_nccl *n = (struct kv_nccl *)p;
    kv_socket_close(&n->listen_fd);
    kv_socket_close(&n->fd); // before the abort: see 2 and 3 above
    nccl_end(n);
    if (n->done_fd >= 0)
        close(n->done_fd); // not earlier: stream_done writes to it
    n->done_fd = -1;
}

static const struct kv_pair_ops nccl_ops = {.run = nccl_run, .hangup = nccl_hangup};

static enum err nccl_create(const struct kv_pair_config *c, struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    TRY(kv_pair_create(sizeof(struct kv_nccl), &nccl_ops, c, &p));
    struct kv_nccl *n = (struct kv_nccl *)p;
    n->listen_fd = n->fd = -1;
    n->options = next_options;
    n->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (n->done_fd < 0)
        return err_set(ERR_IO, "eventfd: %s", strerror(errno));
    *ret = take(&p);
    return ERR_OK;
}

enum err kv_nccl_listen(const struct kv_pair_config *c, const char *host,
                        char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    char address[WIRE_MAX_ADDRESS];
    TRY(nccl_create(c, &p));
    TRY(kv_tcp_bind(host, address, &((struct kv_nccl *)p)->listen_fd));
    TRY(kv_pair_start(p));
    memcpy(ret_address, address, sizeof(address));
    *ret = take(&p);
    return ERR_OK;
}

enum err kv_nccl_connect(const struct kv_pair_config *c, const char *address, struct kv_pair **ret)
{
    OWNED(kv_pair) p = NULL;
    TRY(nccl_create(c, &p));
    struct kv_nccl *n = (struct kv_nccl *)p;
    TRY(kv_tcp_resolve(address, &n->address, &n->address_bytes));
    TRY(kv_pair_start(p));
    *ret = take(&p);
    return ERR_OK;
}

/* ---- settings ---- */

struct kv_nccl_options kv_nccl_default(void) { return (struct kv_nccl_options)DEFAULTS; }

enum err kv_nccl_configure(const struct kv_nccl_options *o)
{
    if (o->max_ctas < 1 || o->max_ctas > MAX_CTAS)
        return err_set(ERR_INVALID, "NCCL transfers with %d CTAs, must be 1 to %d", o->max_ctas,
                       MAX_CTAS);
    if (o->stall_us == 0)
        return err_set(ERR_INVALID, "NCCL transfers with no time to finish");
    next_options = *o;
    return ERR_OK;
}

enum err kv_nccl_register(const char *host)
{
    if (getenv("NCCL_COMM_ID"))
        return err_set(ERR_INVALID, "NCCL_COMM_ID is set: unset it, every pair of workers has a "
                                    "communicator of its own");
    bool is_local =
        host && (!strncmp(host, "127.", 4) || !strcmp(host, "::1") || !strcmp(host, "localhost"));
    if (setenv("NCCL_NVLS_ENABLE", "0", 1) || setenv("NCCL_RAS_ENABLE", "0", 0) ||
        (is_local && setenv("NCCL_SOCKET_IFNAME", "lo", 0)))
        return err_set(ERR_NOMEM, "no memory for NCCL's environment");
    kv_transport_register(WIRE_KV_NCCL, kv_nccl_listen, kv_nccl_connect);
    return ERR_OK;
}
