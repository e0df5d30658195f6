/* handoff_in.h: the decode side of the handoff: prefill workers, transports, transfers.
 *
 * A prefill worker may JOIN once the router has introduced it. Its pair lives until the link or a
 * transfer fails, the router says GONE, or it JOINs again; then the pair is aborted (after which
 * nothing writes into the pool any more) and on_down is called.
 */
#ifndef BATON_HANDOFF_IN_H
#define BATON_HANDOFF_IN_H

#include <stdbool.h>

#include "common/engine/kv_transport.h"
#include "common/engine/worker.h"

struct handoff_in;

struct handoff_in_config {
    struct worker *worker;
    struct kv_pool *pool;
    struct wire_fingerprint fingerprint;
    uint32_t transports;
    const char *host; /* where the tcp transport listens */
    void (*on_up)(void *user, uint64_t instance);
    /* A transfer for this attempt ended well. */
    void (*on_received)(void *user, uint64_t req_id, uint32_t attempt);
    /* No transfer of this prefill worker is under way any more, and none will come. */
    void (*on_down)(void *user, uint64_t instance, const char *why);
    void *user;
};

MUST_CHECK enum err handoff_in_create(const struct handoff_in_config *c, struct handoff_in **ret);
void handoff_in_destroy(struct handoff_in *h);
/* Returns true if the mail was about peers or transfers and has been dealt with. */
bool handoff_in_mail(struct handoff_in *h, const struct mail *m);
void handoff_in_reset(struct handoff_in *h, const char *why);
bool handoff_in_up(const struct handoff_in *h, uint64_t instance);
/* The prefill worker behind a peer key of MAIL_PEER; 0 if it has not joined. */
uint64_t handoff_in_instance(const struct handoff_in *h, uint64_t peer);

/* PAGES arrived for these pages, which the caller has checked to belong to the attempt. */
MUST_CHECK enum err handoff_in_expect(struct handoff_in *h, uint64_t instance, uint64_t req_id,
                                      uint32_t attempt, uint64_t seq, const uint32_t *pages,
                                      uint32_t n);
/* Sends GRANT. Consumes buf. */
void handoff_in_post(struct handoff_in *h, uint64_t instance, struct wire_buf *buf);
/* The prefill worker broke the protocol: aborts the pair; it may join again. */
void handoff_in_break(struct handoff_in *h, uint64_t instance, const char *why);

struct handoff_in_stats {
    uint64_t bytes, n_transfers, n_failures, us;
};
struct handoff_in_stats handoff_in_stats(const struct handoff_in *h);

#endif
