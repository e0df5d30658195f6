/* kv_nccl.h: settings of the transport between two GPUs (kv_nccl.c).
 *
 * All of it belongs to the CUDA module; the rest of the engine meets it only through
 * kv_transport_register.
 */
#ifndef BATON_KV_NCCL_H
#define BATON_KV_NCCL_H

#include "common/engine/kv_transport.h"

struct kv_nccl_options {
    int max_ctas;      /* SMs that a transfer may take at each end: 1 .. 32, rounded up to a
                          power of two by NCCL. The receiver's word counts for both ends. */
    bool low_priority; /* the transfer's stream: lowest priority instead of highest */
    uint32_t stall_us; /* a transfer that takes longer than this plus 1 ms per MB has failed */
    const void *loopback_base; /* for tests on one GPU, which NCCL gives only one rank: both ends
                                  are in this process and the receiver copies from the sender's
                                  pool at this address. NULL: two ranks */
};

/* Default: 4 CTAs, high priority, 3 s. */
struct kv_nccl_options kv_nccl_default(void);
/* For pairs made from now on. ERR_INVALID names the option that is out of range. */
MUST_CHECK enum err kv_nccl_configure(const struct kv_nccl_options *o);

/* As kv_pair_listen and kv_pair_connect. */
MUST_CHECK enum err kv_nccl_listen(const struct kv_pair_config *c, const char *host,
                                   char ret_address[WIRE_MAX_ADDRESS], struct kv_pair **ret);
MUST_CHECK enum err kv_nccl_connect(const struct kv_pair_config *c, const char *address,
                                    struct kv_pair **ret);
/* Makes the kind available. Sets NCCL's environment, so call it before the process has threads:
 * no NVLink multicast, no RAS listener, and the loopback interface when host is on it (host: as in
 * kv_pair_listen, or NULL). ERR_INVALID where NCCL_COMM_ID is set: communicators would share it. */
MUST_CHECK enum err kv_nccl_register(const char *host);

#endif
