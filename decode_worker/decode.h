/* decode.h: pages and first tokens in, tokens out. The engine thread of a decode worker. */
#ifndef BATON_DECODE_H
#define BATON_DECODE_H

#include "common/engine/engine.h"
#include "common/engine/worker.h"

struct decode;

struct decode_config {
    const struct config *config;
    struct worker *worker;
    struct engine *engine; /* created for max_streams windows and max_streams imports */
    struct kv_pool *pool;
    struct wire_fingerprint fingerprint;
    uint32_t transports;
    uint32_t max_total_tokens;
};

MUST_CHECK enum err decode_create(const struct decode_config *c, struct decode **ret);
void decode_run(void *decode); /* the engine thread: returns after MAIL_STOP */
void decode_destroy(struct decode *d);

#endif
