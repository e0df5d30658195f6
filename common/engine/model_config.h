/* model_config.h: config.json of a glm4_moe_lite checkpoint, checked. */
#ifndef BATON_MODEL_CONFIG_H
#define BATON_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "common/base/err.h"

#define MODEL_MAX_EOS 8

struct model_config {
    int hidden, intermediate, moe_intermediate;
    int n_layers, n_dense_layers, n_mtp_layers; /* n_layers without MTP */
    int n_heads, q_lora_rank;
    int n_experts, n_experts_per_token, n_shared_experts;
    int vocab;       /* rows of embedding and head, the logits' width */
    int n_token_ids; /* ids the tokenizer knows, from tokenizer.json (else vocab): the embedding's
                        further rows are padding and are never drawn */
    int n_text_ids;  /* ids below are text: the lowest added token's id (else n_token_ids) */
    int max_positions;
    float routed_scale, norm_eps, rope_theta;
    int32_t eos[MODEL_MAX_EOS];
    int n_eos;
    float default_temperature, default_top_p; /* generation_config.json, else 1 and 1 */
    int default_top_k;
    uint64_t hash; /* of config.json and model.safetensors.index.json (or the one file's header) */
    uint64_t tokenizer_hash;
};

/* Reads DIR/config.json (and generation_config.json where present). Everything the engine assumes
 * is checked: model_type, head geometry 192+64/256 latent 512, sigmoid noaux_tc routing without
 * groups, silu, no bias, no rope scaling, interleaved rope, untied head, one or no MTP layer. A
 * field outside is refused by name with its value: ERR_BAD_MODEL. */
MUST_CHECK enum err model_config_load(const char *dir, struct model_config *ret);

#endif
