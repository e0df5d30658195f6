/* setup.c: see setup.h. */
#include "common/engine/setup.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/curve.h"
#include "common/base/failpoint.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/engine/kv_transport.h"
#include "common/engine/worker.h"

#define CPU_TOKENS  32768   /* KV pool where nobody says how large */
#define MOCK_TOKENS 1048576 /* about what an H200 has left beside the weights */

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
    err = curve_load(ret->curve_key_file, ret->curve_allow_file, ret->insecure_tcp);
    if (err == ERR_OK)
        err = curve_check(ret->router_endpoint);
    if (err == ERR_OK)
        err = curve_check(ret->peer_endpoint);
    if (err != ERR_OK)
        log_error("start", "%s", err_text(err));
    return err;
}

static void on_progress(void *user, uint64_t done, uint64_t total)
{
    int *last = user;
    int percent = total ? (int)(done * 100 / total) : 100;
    if (percent / 10 != *last / 10 || done == total) {
        *last = percent;
        log_info("load", "percent=%d bytes=%llu weights", percent, (unsigned long long)done);
    }
}

static enum err setup_weights(const struct config *c, struct device *device,
                              const struct model_config *model, struct weights **ret)
{
    int last = -10;
    uint64_t start_us = clock_now_us();
    bool dummy = !strcmp(c->load_format, "dummy");
    struct weights_source source = {
        .dir = dummy ? NULL : c->model_dir,
        .dummy_seed = (uint64_t)c->load_seed,
        .n_threads = (int)c->load_workers,
        .device = device,
        .progress = on_progress,
        .user = &last,
    };
    // All workers of one GPU that want the same weights have them once.
    char share[64];
    if (device) {
        uint64_t key[] = {device->id,
                          model->hash,
                          dummy,
                          dummy ? source.dummy_seed : 0,
                          hash_bytes(1, c->model_dir, strlen(c->model_dir)),
                          geteuid()};
        snprintf(share, sizeof(share), "baton-weights-%016" PRIx64,
                 hash_bytes(1, key, sizeof(key)));
        source.share = share;
        log_info("load", "device=%s gpu=\"%s\"", c->device, device->name);
    }
    TRY(weights_open(model, &source, ret));
    log_info("load", "bytes=%" PRIu64 " seconds=%.2f weights %s", (*ret)->arena_bytes,
             (double)(clock_now_us() - start_us) / 1e6,
             (*ret)->is_imported ? "shared with another worker of this GPU"
             : dummy             ? "made up"
                                 : "read");
    return ERR_OK;
}

/* No weights, one layer of small pages, and a table of costs. */
static enum err mock_model(const struct config *c, struct model_config *model, struct setup *s,
                           struct weights **ret)
{
    s->mock = mock_costs_h100;
    enum err e = c->mock_costs[0] ? mock_costs_load(c->mock_costs, &s->mock) : ERR_OK;
    if (e != ERR_OK)
        return err_prefix(e, "--mock-costs");
    model->n_layers = 1;
    log_info("load", "costs=%s a mock: tokens are made up and no weights are read",
             c->mock_costs[0] ? c->mock_costs : "H100");
    return weights_none(model, ret);
}

/* With auto, a GPU worker does without NCCL where there is none: workers of one host need it not.
 */
static enum err load_nccl(const struct config *c)
{
    bool forced = !strcmp(c->kv_transport, "nccl"), is_gpu = !strncmp(c->device, "cuda:", 5);
    if (!is_gpu || (!forced && strcmp(c->kv_transport, "auto") != 0))
        return ERR_OK;
    enum err err = device_load_nccl(c->kv_host);
    if (err != ERR_OK && !forced) {
        log_info("kv", "without NCCL: %s", err_text(err));
        return ERR_OK;
    }
    return err;
}

enum err setup_model(const struct config *c, struct weights **ret, struct setup *ret_setup)
{
    if (!c->model_dir[0])
        return err_set(ERR_INVALID, "--model-dir is missing");
    if (c->mtp_draft_model_dir[0] && strcmp(c->mtp_draft_model_dir, c->model_dir) != 0)
        return err_set(
            ERR_INVALID,
            "--mtp-draft-model-dir %s: the MTP layer is read from --model-dir (%s); leave "
            "the flag out or give the same directory",
            c->mtp_draft_model_dir, c->model_dir);
    struct setup s = {.is_mock = !strcmp(c->device, "mock")};
    if (c->mtp_simulate_acceptance > 0 && !s.is_mock && strcmp(c->load_format, "dummy") != 0)
        return err_set(ERR_INVALID, "--mtp-simulate-acceptance needs --load-format dummy or "
                                    "--device mock: it makes up what the model would say");
    if (c->mock_costs[0] && !s.is_mock)
        return err_set(ERR_INVALID, "--mock-costs %s is for --device mock", c->mock_costs);
    OWNED(device) device = NULL;
    OWNED(weights) w = NULL; // before the device, in the order of destruction
    struct model_config model;
    TRY(model_config_load(c->model_dir, &model));
    TRY(load_nccl(c));
    TRY(device_open(c->device, &device));
    TRY(kv_transports_parse(c->kv_transport, device != NULL, &s.transports));
    TRY(s.is_mock ? mock_model(c, &model, &s, &w) : setup_weights(c, device, &model, &w));
    const struct model_config *m = &w->config;
    if (c->mtp_step && m->n_mtp_layers == 0)
        return err_set(ERR_INVALID, "--mtp-step is not 0, but the checkpoint has no MTP layer");
    s.max_total_tokens = (uint32_t)m->max_positions;
    if (c->max_req_total_len > m->max_positions)
        return err_set(ERR_INVALID, "--max-req-total-len %lld: the model's context is %d",
                       (long long)c->max_req_total_len, m->max_positions);
    if (c->max_req_total_len > 0)
        s.max_total_tokens = (uint32_t)c->max_req_total_len;
    s.fingerprint = (struct wire_fingerprint){
        .protocol = WIRE_VERSION,
        .n_layers = (uint32_t)m->n_layers,
        .n_mtp_layers = c->mtp_step ? (uint32_t)m->n_mtp_layers : 0,
        .page_tokens = KV_PAGE_TOKENS,
        .kv_width = s.is_mock ? MOCK_KV_WIDTH : KV_WIDTH,
        .kv_dtype = device ? WIRE_BF16 : WIRE_F32,
        .vocab = (uint32_t)m->vocab,
        .hidden = (uint32_t)m->hidden,
        .model_hash = m->hash,
        .tokenizer_hash = m->tokenizer_hash,
    };
    s.device = take(&device);
    *ret_setup = s;
    *ret = take(&w);
    return ERR_OK;
}

/* Pages for a GPU's pool when nobody says how many: what --mem-fraction leaves. */
static enum err pages_that_fit(const struct config *c, struct device *d, uint64_t page_bytes,
                               uint64_t engine_bytes, uint64_t *ret)
{
    uint64_t available, total;
    TRY(device_room(d, &available, &total));
    uint64_t keep = (uint64_t)((double)total * (1 - c->mem_fraction));
    uint64_t need = keep + engine_bytes + page_bytes;
    if (available < need)
        return err_set(ERR_NOMEM,
                       "no room for KV pages: %" PRIu64 " MiB are free on %s, the engine needs "
                       "%" PRIu64 " MiB and --mem-fraction %.2f keeps %" PRIu64 " MiB",
                       available >> 20, c->device, engine_bytes >> 20, c->mem_fraction, keep >> 20);
    *ret = (available - keep - engine_bytes) / page_bytes;
    return ERR_OK;
}

enum err setup_pool(const struct config *c, const struct setup *s, const struct weights *w,
                    const struct engine_config *engine, const char *shm_name, struct kv_pool **ret)
{
    struct kv_pool_config p = {
        .n_layers = s->fingerprint.n_layers + s->fingerprint.n_mtp_layers,
        .kv_width = s->fingerprint.kv_width,
        .dtype_bytes = s->device ? 2 : 4,
        .shm_name = shm_name,
        .device = s->device,
    };
    uint64_t page_bytes = (uint64_t)KV_PAGE_TOKENS * p.n_layers * p.kv_width * p.dtype_bytes;
    uint64_t engine_bytes = engine_device_bytes(engine, w), pages = 0;
    uint64_t tokens = (uint64_t)c->max_total_token_num;
    if (!tokens && !s->device)
        tokens = s->is_mock ? MOCK_TOKENS : CPU_TOKENS;
    if (tokens > 0)
        pages = (tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    else
        TRY(pages_that_fit(c, s->device, page_bytes, engine_bytes, &pages));
    if (s->device) {
        uint64_t available, total, need = pages * page_bytes + engine_bytes;
        TRY(device_room(s->device, &available, &total));
        if (need > available)
            return err_set(ERR_NOMEM,
                           "%s: %" PRIu64 " tokens of KV pages and the workspaces need %" PRIu64
                           " MiB, %" PRIu64 " MiB are free",
                           c->device, pages * KV_PAGE_TOKENS, need >> 20, available >> 20);
        log_info("memory",
                 "total_mib=%" PRIu64 " weights_mib=%" PRIu64 " pool_mib=%" PRIu64
                 " workspaces_mib=%" PRIu64 " left_mib=%" PRIu64 " plan of %s",
                 total >> 20, w->arena_bytes >> 20, (pages * page_bytes) >> 20, engine_bytes >> 20,
                 (available - need) >> 20, c->device);
    }
    p.n_pages = (uint32_t)MIN(pages, UINT32_MAX - 1);
    TRY(kv_pool_create(&p, ret));
    log_info("kv",
             "pages=%u tokens=%" PRIu64 " page_bytes=%" PRIu64 " pool_bytes=%" PRIu64 " KV pool",
             p.n_pages, (uint64_t)p.n_pages * KV_PAGE_TOKENS, page_bytes, page_bytes * p.n_pages);
    return ERR_OK;
}

const struct mock_costs *setup_mock(const struct setup *s) { return s->is_mock ? &s->mock : NULL; }

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
