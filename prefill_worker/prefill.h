/* prefill.h: prompts in, KV pages and first tokens out. The engine thread of a prefill worker. */
#ifndef BATON_PREFILL_H
#define BATON_PREFILL_H

#include "common/engine/engine.h"
#include "common/engine/worker.h"

struct prefill;

struct prefill_config {
    const struct config *config;
    struct worker *worker;
    struct engine *engine;
    struct kv_pool *pool;
    struct wire_fingerprint fingerprint;
    uint32_t transports;
    const char *shm_name;
    uint32_t max_total_tokens;
    uint32_t max_prompts; /* prompts computed in one chunk, as the engine was created for */
};

MUST_CHECK enum err prefill_create(const struct prefill_config *c, struct prefill **ret);
void prefill_run(void *prefill); /* the engine thread: returns after MAIL_STOP */
void prefill_destroy(struct prefill *p);

#endif
