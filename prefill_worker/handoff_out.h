/* handoff_out.h: the prefill side of the handoff: decode workers, transports, transfers.
 *
 *   decode worker:  INTRODUCED -connect, JOIN-> JOINING -JOINED-> UP -link or transfer failed->
 * DOWN
 *                        ^------------------ after a pause, if the router still knows it --------'
 *
 * A prompt's pages go out as transfers of consecutive pages, each announced with PAGES on the link
 * and posted to the pair under the same number. A page stays in flight until its transfer ended,
 * whatever happens to the prompt meanwhile.
 */
#ifndef BATON_HANDOFF_OUT_H
#define BATON_HANDOFF_OUT_H

#include <stdbool.h>

#include "common/engine/kv_transport.h"
#include "common/engine/worker.h"

struct handoff_out;

struct handoff_out_config {
    struct worker *worker;
    struct kv_pool *pool;
    struct wire_fingerprint fingerprint;
    uint32_t transports; /* WIRE_KV_* bits */
    const char *shm_name;
    /* A transfer of this prompt ended; err is not OK once and then for all of the peer. */
    void (*on_sent)(void *user, uint64_t owner, uint32_t n_pages, enum err err);
    /* The decode worker is gone or its pair broke: nothing can be handed to it until it is up
     * again. Transfers that were posted have ended (on_sent was called for each). */
    void (*on_down)(void *user, uint64_t instance, const char *why);
    void *user;
};

MUST_CHECK enum err handoff_out_create(const struct handoff_out_config *c,
                                       struct handoff_out **ret);
void handoff_out_destroy(struct handoff_out *h);

/* Mail: returns true if it was about peers or transfers and has been dealt with. GRANT is the
 * caller's (it belongs to a prompt). */
bool handoff_out_mail(struct handoff_out *h, const struct mail *m);
/* Reconnects what is down and due. Returns when it wants to be called again (us from now, 0:
 * never). */
uint64_t handoff_out_tick(struct handoff_out *h, uint64_t now_us);
/* A new router, or the end: forgets everyone; posted transfers are ended first. */
void handoff_out_reset(struct handoff_out *h, const char *why);

bool handoff_out_known(const struct handoff_out *h, uint64_t instance);
/* Up: pages may be pushed. */
bool handoff_out_up(const struct handoff_out *h, uint64_t instance);

/* Announces and posts pages src[0..n) of the own pool into pages dst[0..n) of the peer's, on behalf
 * of owner (comes back in on_sent). The pages are marked in flight. */
MUST_CHECK enum err handoff_out_push(struct handoff_out *h, uint64_t instance, uint64_t req_id,
                                     uint32_t attempt, uint64_t owner, const uint32_t *src,
                                     const uint32_t *dst, uint32_t n);
/* Sends a message to the decode worker (READY, RELEASE). */
void handoff_out_post(struct handoff_out *h, uint64_t instance, struct wire_buf *buf);

struct handoff_stats {
    uint64_t bytes, n_transfers, n_failures, us;
};
struct handoff_stats handoff_out_stats(const struct handoff_out *h);

#endif
