/* setup.h: start-up steps that both workers take: settings, weights, pool, fingerprint. */
#ifndef BATON_SETUP_H
#define BATON_SETUP_H

#include "common/base/config.h"
#include "common/base/wire.h"
#include "common/engine/engine.h"
#include "common/engine/mock_costs.h"

struct setup {
    struct device *device; /* NULL: the CPU; the caller's to destroy */
    struct wire_fingerprint fingerprint;
    uint32_t transports;
    bool is_mock;
    struct mock_costs mock;    /* if is_mock */
    uint32_t max_total_tokens; /* longest sequence: the flag, the model's context */
};

/* Parses settings and starts the log. Failures are printed; the process should exit with 2. */
MUST_CHECK enum err setup_process(enum config_proc proc, const char *default_name, int argc,
                                  char **argv, struct config *ret);
/* Opens the device, loads the model and derives what the cluster must agree on. ERR_INVALID for
 * settings that do not go together (MTP without an MTP layer, another draft model, an unknown
 * device). */
MUST_CHECK enum err setup_model(const struct config *c, struct weights **ret,
                                struct setup *ret_setup);
/* engine: what the pool must leave memory for. Logs the memory plan. ERR_NOMEM names needed and
 * free bytes. */
MUST_CHECK enum err setup_pool(const struct config *c, const struct setup *s,
                               const struct weights *w, const struct engine_config *engine,
                               const char *shm_name, struct kv_pool **ret);
/* For engine_config: NULL unless --device mock. */
const struct mock_costs *setup_mock(const struct setup *s);
void setup_hello(const struct config *c, const struct setup *s, const struct kv_pool *pool,
                 struct wire_hello *ret);

#endif
