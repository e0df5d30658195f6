/* kv_transport.h: moves pages of a prefill worker's pool into a decode worker's.
 *
 * A pair is one prefill worker and one decode worker. Both ends number transfers from 0; the sender
 * announces each (PAGES on the control link) and posts it; the receiver posts only what was
 * announced. Completion is a local event on each side. Each pair has its own thread, so a stuck
 * peer holds up nobody else, and `abort` always ends everything that was posted.
 *
 *   kind  who copies                    where
 *   shm   the receiver, out of the sender's pool object (opened read-only: a late or mad sender
 *         cannot write into pages that meanwhile belong to somebody else)
 *   ipc   the same with GPU memory, which the receiver maps
 *   tcp   sender writes, receiver reads straight into the pool
 *   nccl  pools in memory of two GPUs: kernels of both ends (kv_nccl.c)
 * nccl comes with the CUDA module, which registers it.
 */
#ifndef BATON_KV_TRANSPORT_H
#define BATON_KV_TRANSPORT_H

#include <stdbool.h>

#include "common/base/wire.h"
#include "common/engine/kv_pool.h"

struct kv_pair;

/* Called on the pair's thread when a transfer ended: OK, or ERR_PEER_LOST, ERR_ABORTED, ERR_PROTO.
 * After an error every later transfer of the pair ends with an error too. */
typedef void kv_done_fn(void *user, uint64_t transfer_seq, enum err result);

struct kv_pair_config {
    struct kv_pool *pool;
    uint64_t token[2]; /* from JOIN; guards the transport's own connection */
    kv_done_fn *done;
    void *user;
};

/* Receiving end: prepares the chosen transport and writes the address for JOINED.
 *   peer_address: JOIN's (shm, ipc: the sender's pool); host: tcp address to listen on.
 * Does not wait for the sender. */
MUST_CHECK enum err kv_pair_listen(enum wire_transport kind, const struct kv_pair_config *c,
                                   const char *host, const char *peer_address,
                                   char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret);
/* Sending end: connects to JOINED's address. Returns at once; failure shows as a failed transfer.
 */
MUST_CHECK enum err kv_pair_connect(enum wire_transport kind, const struct kv_pair_config *c,
                                    const char *address, struct kv_pair **ret);

/* Posts transfer seq: n pages of the own pool (indexes copied). Sequence numbers must be
 * consecutive. The caller has marked the pages in flight (kv_pool_transfer_begin) and unmarks them
 * after done. ERR_ABORTED after an abort. Never blocks. */
MUST_CHECK enum err kv_pair_post(struct kv_pair *p, uint64_t seq, const uint32_t *pages,
                                 uint32_t n);

/* Ends everything posted with ERR_ABORTED and returns when no memory will be touched any more and
 * no callback runs. Not from inside a callback. */
void kv_pair_abort(struct kv_pair *p);
void kv_pair_destroy(struct kv_pair *p); /* aborts first; NULL is fine */
DEFINE_OWNED(kv_pair)

/* Makes a kind available that this library does not bring itself. Before the process has pairs or
 * threads that could make some.
 *   listen: as kv_pair_listen; where is the sender's address from JOIN for a kind that works within
 *   one host, else the host to listen on. */
typedef enum err kv_listen_fn(const struct kv_pair_config *c, const char *where,
                              char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret);
typedef enum err kv_connect_fn(const struct kv_pair_config *c, const char *address,
                               struct kv_pair **ret);
void kv_transport_register(enum wire_transport kind, kv_listen_fn *listen, kv_connect_fn *connect);

/* What this process can use, whose pages are on a device or not: WIRE_KV_* bits allowed by
 * --kv-transport ("auto" or a kind). ERR_INVALID for another name. */
MUST_CHECK enum err kv_transports_parse(const char *name, bool on_device, uint32_t *ret_bits);
/* The first both can use (shm and ipc only on the same host), or 0. */
enum wire_transport kv_transport_choose(uint32_t a, uint32_t b, bool same_host);
const char *kv_transport_name(enum wire_transport kind);
/* Hash of the kernel's boot id, IPC and network namespace: equal where shm works. */
uint64_t kv_host_id(void);

#endif
