/* engine_impl.h: between engine.c, which checks, and the engines, which compute. Private to both.
 *
 * engine.c validates every call against the configuration and the last forward; an engine's
 * operations are only called with arguments that fit.
 */
#ifndef BATON_ENGINE_IMPL_H
#define BATON_ENGINE_IMPL_H

#include "common/engine/engine.h"

struct engine_ops {
    void (*destroy)(struct engine *e); /* also of a half-built one */
    enum err (*start)(struct engine *e, const struct batch *b);
    enum err (*wait)(struct engine *e); /* NULL: start has computed it all */
    enum err (*draft)(struct engine *e, const struct batch *b, const struct hidden_ref *hidden,
                      int32_t *ret_ids);
    enum err (*sample)(struct engine *e, int n, const int32_t *idx, const struct sample_row *rows,
                       int max_top, int32_t *ret_ids, float *ret_logprob, int32_t *ret_top_id,
                       float *ret_top_logprob);
    enum err (*export_hidden)(struct engine *e, int row, float *ret);
    enum err (*import_hidden)(struct engine *e, int slot, const float *hidden);
    enum err (*read_logits)(struct engine *e, bool draft, int row, float *ret);
};

/* What every engine begins with. */
struct engine {
    const struct engine_ops *ops;
    struct engine_config config; /* inner_norm_eps resolved */
    const struct weights *w;
    const struct model_config *m;
    int kv_layers, n_pages;
    int n_rows, n_draft_rows;     /* of the last forward and draft */
    int n_logits, n_draft_logits; /* likewise */
    uint32_t device_us;           /* of the last forward or draft */
    void (*meanwhile)(void *user, uint64_t wait_us);
    void *meanwhile_user;
    bool started; /* engine_wait is due */
};

/* Copies base, sets ops and takes its memory, as a device's engine does (device.h). */
MUST_CHECK enum err engine_cpu_create(const struct engine *base, struct kv_pool *pool,
                                      struct engine **ret);
MUST_CHECK enum err engine_mock_create(const struct engine *base, struct kv_pool *pool,
                                       struct engine **ret);
/* The mask of logit row i of a draft, or NULL. */
static inline const uint32_t *batch_allowed(const struct batch *b, int i)
{
    return b->allowed ? b->allowed[i] : NULL;
}

/* Called while a pass is computed; wait_us as in engine_set_meanwhile. No sign of life: a GPU that
 * hangs is waited for too. */
static inline void engine_meanwhile(const struct engine *e, uint64_t wait_us)
{
    if (e->meanwhile)
        e->meanwhile(e->meanwhile_user, wait_us);
}

/* Called between layers: the pass is getting on. */
static inline void engine_progress(const struct engine *e)
{
    if (e->config.progress)
        e->config.progress(e->config.progress_user);
    engine_meanwhile(e, 0);
}

#endif
