/* main.c: wiring of baton-decode. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/log.h"
#include "common/engine/setup.h"
#include "common/engine/worker.h"
#include "decode_worker/decode.h"

static void decode_drop(struct decode **d) { decode_destroy(*d); }
static void worker_drop(struct worker **w) { worker_destroy(*w); }

static enum err run(const struct config *config, int *ret_exit)
{
    OWNED(device) device = NULL;
    OWNED(weights) weights = NULL;
    OWNED(kv_pool) pool = NULL;
    OWNED(engine) engine = NULL;
    __attribute__((cleanup(worker_drop))) struct worker *worker = NULL;
    __attribute__((cleanup(decode_drop))) struct decode *decode = NULL;

    struct setup setup;
    TRY(setup_model(config, &weights, &setup));
    device = setup.device;
    int n_streams = (int)config->running_max_req_size;
    int n_window = (int)config_mtp_max(config) + 1;
    int n_rows = n_streams * n_window;
    struct engine_config e = {
        .device = device,
        .mock = setup_mock(&setup),
        .n_threads = (int)config->threads,
        .max_rows = n_rows,
        .max_seqs = n_streams,
        .max_logits = n_rows,
        .max_imports = n_streams,
        .max_ctx = (int)setup.max_total_tokens,
        .max_seq_rows = n_window,
        .max_graph_rows = (int)config->graph_max_batch_size * n_window,
        .inner_norm_eps = (float)config->inner_norm_eps,
    };
    TRY(setup_pool(config, &setup, weights, &e, NULL, &pool));
    struct worker_config w = {.role = WIRE_DECODE, .config = config};
    setup_hello(config, &setup, pool, &w.hello);
    w.hello.max_running = (uint32_t)n_streams;
    w.hello.mtp_step = config_mtp_max(config);
    TRY(worker_create(&w, &worker));
    e.progress = worker_computing;
    e.progress_user = worker;
    TRY(engine_create(&e, weights, pool, &engine));
    struct decode_config d = {
        .config = config,
        .worker = worker,
        .engine = engine,
        .pool = pool,
        .fingerprint = setup.fingerprint,
        .transports = setup.transports,
        .max_total_tokens = setup.max_total_tokens,
    };
    TRY(decode_create(&d, &decode));
    *ret_exit = worker_run(worker, decode_run, decode);
    return ERR_OK;
}

int main(int argc, char **argv)
{
    struct config config;
    int exit_code = 0;
    if (setup_process(CONFIG_DECODE, "decode", argc, argv, &config) != ERR_OK)
        return 2;
    enum err err = run(&config, &exit_code);
    if (err != ERR_OK) {
        log_error("start", "%s", err_text(err));
        return err_exit_code(err);
    }
    return exit_code;
}
