/* main.c: wiring of baton-prefill. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/engine/kv_transport.h"
#include "common/engine/setup.h"
#include "common/engine/worker.h"
#include "prefill_worker/prefill.h"

#define MAX_PROMPTS 64 /* computed in one chunk */

static void prefill_drop(struct prefill **p) { prefill_destroy(*p); }
static void worker_drop(struct worker **w) { worker_destroy(*w); }

static enum err run(struct config *config, int *ret_exit)
{
    OWNED(device) device = NULL;
    OWNED(weights) weights = NULL;
    OWNED(kv_pool) pool = NULL;
    OWNED(engine) engine = NULL;
    __attribute__((cleanup(worker_drop))) struct worker *worker = NULL;
    __attribute__((cleanup(prefill_drop))) struct prefill *prefill = NULL;

    struct setup setup;
    char shm_name[64];
    // Stable over restarts, so that a killed worker's memory is taken over and not left behind.
    uint64_t id = hash_bytes(0, config->router_endpoint, strlen(config->router_endpoint));
    id = hash_bytes(id, config->name, strlen(config->name));
    snprintf(shm_name, sizeof(shm_name), "/baton-kv-%016" PRIx64, id);
    TRY(setup_model(config, &weights, &setup));
    device = setup.device;
    const char *shm = setup.transports & (WIRE_KV_SHM | WIRE_KV_IPC) ? shm_name : NULL;
    int64_t chunk = MIN(config->chunked_prefill_size, (int64_t)setup.max_total_tokens);
    config->chunked_prefill_size = chunk;
    struct engine_config e = {
        .device = device,
        .mock = setup_mock(&setup),
        .n_threads = (int)config->threads,
        .max_rows = (int)chunk,
        .max_seqs = MAX_PROMPTS,
        .max_logits = MAX_PROMPTS,
        .max_imports = 0,
        .max_ctx = (int)setup.max_total_tokens,
        .inner_norm_eps = (float)config->inner_norm_eps,
    };
    TRY(setup_pool(config, &setup, weights, &e, shm, &pool));
    struct worker_config w = {.role = WIRE_PREFILL, .config = config};
    setup_hello(config, &setup, pool, &w.hello);
    w.hello.max_running = (uint32_t)config->max_prefill_queue;
    w.hello.chunk_tokens = (uint32_t)chunk;
    w.hello.mtp_step = config->mtp_step != 0;
    TRY(worker_create(&w, &worker));
    e.progress = worker_computing;
    e.progress_user = worker;
    TRY(engine_create(&e, weights, pool, &engine));
    struct prefill_config p = {
        .config = config,
        .worker = worker,
        .engine = engine,
        .pool = pool,
        .fingerprint = setup.fingerprint,
        .transports = setup.transports,
        .shm_name = shm,
        .max_total_tokens = setup.max_total_tokens,
        .max_prompts = MAX_PROMPTS,
    };
    TRY(prefill_create(&p, &prefill));
    *ret_exit = worker_run(worker, prefill_run, prefill);
    return ERR_OK;
}

int main(int argc, char **argv)
{
    struct config config;
    int exit_code = 0;
    if (setup_process(CONFIG_PREFILL, "prefill", argc, argv, &config) != ERR_OK)
        return 2;
    enum err err = run(&config, &exit_code);
    if (err != ERR_OK) {
        log_error("start", "%s", err_text(err));
        return err_exit_code(err);
    }
    return exit_code;
}
