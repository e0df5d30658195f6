/* cluster.h: the workers, who is alive and holding what; the gens; and the scheduler between them.
 *
 * sched.c decides (pure: no clock, socket or allocation of its own beyond its tables); workers.c
 * keeps the registry that HELLO, BEAT and LINK_LOST feed; gen.c keeps the requests' records;
 * cluster.c carries out what sched decided, over one link_hub.
 */
#ifndef BATON_CLUSTER_H
#define BATON_CLUSTER_H

#include <jansson.h>
#include <uv.h>

#include "common/base/config.h"
#include "common/base/metrics.h"
#include "router/gen.h"
#include "router/text/tokenizer.h"

struct cluster_config {
    uv_loop_t *loop;
    const struct config *config;
    const struct tokenizer *tokenizer;
    struct cluster_model model;
    struct wire_fingerprint fingerprint; /* expected; kv_dtype, n_* as the first worker says if 0 */
    struct metrics *metrics;
    /* Sends what callbacks of gens have written so far, and tells cluster_sent. more: it is called
     * again at once for others of a large step, so this need not be complete when it returns. NULL:
     * all is sent when the loop comes round. */
    void (*flush)(void *user, bool more);
    void *user;
};

/* Binds config->router_endpoint and draws the epoch. */
MUST_CHECK enum err cluster_create(const struct cluster_config *c, struct cluster **ret);
/* n events of the message in work left at sent_us (clock_now_us). From inside flush only. */
void cluster_sent(struct cluster *c, size_t n, uint64_t sent_us);
/* Brings gauges that mirror state (queue, workers, pages) up to date before metrics_write. */
void cluster_update_metrics(struct cluster *c);
/* For the admin socket: requests by state, workers with their pages, epoch, stale counts, timers.
 */
json_t *cluster_accounting(struct cluster *c);
/* For the status page: requests, totals, workers, links, and the last two minutes second by second.
 * NULL: out of memory. */
json_t *cluster_status(struct cluster *c);
/* Opens --trace-file again, if there is one. */
MUST_CHECK enum err cluster_reopen_trace(struct cluster *c);
void cluster_destroy(
    struct cluster *c); /* gens must have ended; memory goes when the loop has run */

#endif
