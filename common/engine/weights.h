/* weights.h: all weights in one arena, with a table of where each is.
 *
 * One allocation means that another process on the same GPU shares it with one IPC handle, and that
 * the memory plan is one number. Offsets are 256-byte aligned.
 */
#ifndef BATON_WEIGHTS_H
#define BATON_WEIGHTS_H

#include <stdbool.h>

#include "common/base/fd_share.h"
#include "common/base/own.h"
#include "common/engine/device.h"
#include "common/engine/model_config.h"
#include "kernels/kernels.h"

struct layer_weights {
    const bf16_t *input_norm, *post_attention_norm; /* [H] */
    const bf16_t *q_a;                              /* [q_lora, H] */
    const bf16_t *q_a_norm;                         /* [q_lora] */
    const bf16_t *q_b;                              /* [heads * 256, q_lora] */
    const bf16_t *kv_a;                             /* [576, H] */
    const bf16_t *kv_a_norm;                        /* [512] */
    const bf16_t *kv_b;                             /* [heads * 448, 512] */
    const bf16_t *o;                                /* [H, heads * 256] */
    /* dense layers */
    const bf16_t *mlp_gate, *mlp_up, *mlp_down; /* [I, H], [I, H], [H, I]; NULL in sparse layers */
    /* sparse layers */
    const bf16_t *router;                                /* [E, H] */
    const float *router_bias;                            /* [E] */
    const bf16_t *expert_gate, *expert_up;               /* [E, F, H] */
    const bf16_t *expert_down;                           /* [E, H, F] */
    const bf16_t *shared_gate, *shared_up, *shared_down; /* [F, H], [F, H], [H, F] */
};

struct mtp_weights {
    const bf16_t *enorm, *hnorm; /* [H] */
    const bf16_t *eh_proj;       /* [H, 2H]: embedding half first */
    const bf16_t *head_norm;     /* shared_head.norm, [H] */
    const bf16_t *embed, *head;  /* [V, H]; the main model's where the checkpoint has no own ones or
                                    they are equal */
};

struct weights {
    struct model_config config;
    void *arena; /* with a device: addresses only, the content is in device_arena */
    uint64_t arena_bytes;
    struct device *device; /* NULL: host */
    struct device_memory device_arena;
    struct fd_share *share;            /* of the device's arena, or NULL */
    bool is_imported;                  /* another process of this GPU had it already */
    const bf16_t *embed, *norm, *head; /* [V, H], [H], [V, H] */
    struct layer_weights *layers;      /* [n_layers + n_mtp_layers] */
    struct mtp_weights mtp;
};

typedef void weights_progress_fn(void *user, uint64_t done_bytes, uint64_t total_bytes);

struct weights_source {
    const char *dir;       /* of the checkpoint; NULL: dummy weights */
    uint64_t dummy_seed;   /* of random weights, scaled so that activations stay finite */
    int n_threads;         /* that read the checkpoint */
    struct device *device; /* where the arena goes; NULL: host memory */
    const char *share;     /* name under which the processes of one GPU have one arena; NULL: own */
    weights_progress_fn *progress; /* on the caller's thread; NULL: none */
    void *user;
};

/* Makes the arena. Missing tensors, wrong shapes or dtypes and tensors that do not belong are all
 * listed in one sentence: ERR_BAD_MODEL. With a share this may wait for another process to load. */
MUST_CHECK enum err weights_open(const struct model_config *config, const struct weights_source *s,
                                 struct weights **ret);
/* The model's shape without any weights: for an engine that does not compute. */
MUST_CHECK enum err weights_none(const struct model_config *config, struct weights **ret);
/* weights_open into host memory. */
MUST_CHECK enum err weights_load(const char *dir, const struct model_config *config, int n_threads,
                                 weights_progress_fn *progress, void *user, struct weights **ret);
/* One tensor of a dummy model: n values at byte offset of the arena, fp32 or bf16. Value k is
 * scale * uniform(stream, k), see weights.c; scale 0 means that all are 1. */
struct weights_region {
    uint64_t offset, n, stream;
    float scale;
    bool is_f32;
};
/* Bytes of a checkpoint of this shape, without reading it (the MTP layer's own tables not counted).
 */
MUST_CHECK enum err weights_bytes(const struct model_config *config, uint64_t *ret);
void weights_destroy(struct weights *w);
DEFINE_OWNED(weights)

#endif
