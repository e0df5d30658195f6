/* setup.c: see setup.h. */
#include "common/engine/setup.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/engine/kv_transport.h"
#include "common/engine/worker.h"

enum err setup_process(enum config_proc proc, const char *default_name, int argc, char **argv,
                       struct config *ret)
{
    log_init(default_name, LOG_INFO);
    enum err err = config_parse(proc, argc, argv, ret);
    if (err != ERR_OK) {
        fprintf(stderr, "%s: %s\n", argv[0], err_text(err));
        return err;
    }
    static const char *const levels[] = {"error", "warn", "info", "debug"};
    enum log_level level = LOG_INFO;
    for (int i = 0; i < 4; i++)
        if (!strcmp(ret->log_level, levels[i]))
            level = (enum log_level)i;
    if (!ret->name[0])
        ret->name = default_name;
    log_init(ret->name, level);
    signal(SIGPIPE, SIG_IGN);
    const char *failpoints = getenv("BATON_FAILPOINTS");
    if (failpoints && failpoints[0]) {
        err = failpoint_set(failpoints);
        if (err != ERR_OK) {
            log_error("start", "%s", err_text(err));
            return err;
        }
    }
    config_log(proc, ret);
    return ERR_OK;
}

enum err setup_model(const struct config *c, struct weights **ret, struct setup *ret_setup)
{
    if (strncmp(c->device, "cpu", 3) != 0)
        return err_set(ERR_INVALID, "--device %s: the workers run on the CPU so far", c->device);
    if (!c->model_dir[0])
        return err_set(ERR_INVALID, "--model-dir is missing");
    if (c->mtp_draft_model_dir[0] && strcmp(c->mtp_draft_model_dir, c->model_dir) != 0)
        return err_set(
            ERR_INVALID,
            "--mtp-draft-model-dir %s: the MTP layer is read from --model-dir (%s); leave "
            "the flag out or give the same directory",
            c->mtp_draft_model_dir, c->model_dir);
    struct setup s = {0};
    TRY(kv_transports_parse(c->kv_transport, &s.transports));
    OWNED(weights) w = NULL;
    TRY(worker_load(c, &w));
    const struct model_config *m = &w->config;
    if (c->mtp_step > 0 && m->n_mtp_layers == 0)
        return err_set(ERR_INVALID, "--mtp-step %lld: the checkpoint has no MTP layer",
                       (long long)c->mtp_step);
    s.max_total_tokens = (uint32_t)m->max_positions;
    if (c->max_req_total_len > m->max_positions)
        return err_set(ERR_INVALID, "--max-req-total-len %lld: the model's context is %d",
                       (long long)c->max_req_total_len, m->max_positions);
    if (c->max_req_total_len > 0)
        s.max_total_tokens = (uint32_t)c->max_req_total_len;
    s.fingerprint = (struct wire_fingerprint){
        .protocol = WIRE_VERSION,
        .n_layers = (uint32_t)m->n_layers,
        .n_mtp_layers = c->mtp_step > 0 ? (uint32_t)m->n_mtp_layers : 0,
        .page_tokens = KV_PAGE_TOKENS,
        .kv_width = KV_WIDTH,
        .kv_dtype = WIRE_F32,
        .vocab = (uint32_t)m->vocab,
        .hidden = (uint32_t)m->hidden,
        .model_hash = m->hash,
        .tokenizer_hash = m->tokenizer_hash,
    };
    *ret_setup = s;
    *ret = take(&w);
    return ERR_OK;
}

enum err setup_pool(const struct config *c, const struct setup *s, const char *shm_name,
                    struct kv_pool **ret)
{
    struct kv_pool_config p = {
        .n_pages = (uint32_t)((c->max_total_token_num + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS),
        .n_layers = s->fingerprint.n_layers + s->fingerprint.n_mtp_layers,
        .kv_width = s->fingerprint.kv_width,
        .dtype_bytes = 4,
        .shm_name = shm_name,
    };
    TRY(kv_pool_create(&p, ret));
    log_info("kv", "pages=%u tokens=%u page_bytes=%llu pool_bytes=%llu KV pool", p.n_pages,
             p.n_pages * KV_PAGE_TOKENS, (unsigned long long)kv_pool_page_bytes(*ret),
             (unsigned long long)kv_pool_page_bytes(*ret) * p.n_pages);
    return ERR_OK;
}

void setup_hello(const struct config *c, const struct setup *s, const struct kv_pool *pool,
                 struct wire_hello *ret)
{
    *ret = (struct wire_hello){
        .transports = s->transports,
        .fingerprint = s->fingerprint,
        .total_pages = kv_pool_counts(pool).total,
        .max_total_tokens = s->max_total_tokens,
    };
    snprintf(ret->name, sizeof(ret->name), "%s", c->name);
}

int setup_exit_code(enum err err)
{
    return err == ERR_INVALID || err == ERR_BAD_MODEL || err == ERR_NOT_FOUND || err == ERR_MISMATCH
               ? 2
               : 1;
}
