/* model_config.c: see model_config.h.
 *
 * The kernels are written for one head geometry and one kind of routing, so most of config.json is
 * not read but compared: a table says what each field must be. Fields that are absent have the
 * defaults of transformers' Glm4MoeLiteConfig, which are what we need.
 */
#include "common/engine/model_config.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/json.h"
#include "common/base/own.h"
#include "kernels/kernels.h"

#define MAX_CONFIG_BYTES    (1u << 20)
#define MAX_INDEX_BYTES     (64u << 20)
#define MAX_TOKENIZER_BYTES (256u << 20)
#define MAX_HEADER_BYTES    (16u << 20)

static enum err read_sizes(const json_t *root, struct model_config *m);
static enum err check_fixed(const json_t *root, const struct model_config *m);
static enum err check_rope(const json_t *root, struct model_config *m);
static enum err check_layer_types(const json_t *root, const struct model_config *m);
static enum err read_eos(const json_t *root, struct model_config *m);
static enum err read_generation(const char *dir, struct model_config *m);
static enum err read_tokenizer(const char *dir, struct model_config *m);
static enum err hash_weights(const char *dir, struct model_config *m);
static enum err parse(const char *path, const char *text, size_t n, json_t **ret);
static enum err path_make(const char *dir, const char *file, char ret[PATH_MAX]);

enum err model_config_load(const char *dir, struct model_config *ret)
{
    struct model_config m = {.rope_theta = 10000, .default_temperature = 1, .default_top_p = 1};
    char path[PATH_MAX];
    TRY(path_make(dir, "config.json", path));
    OWNED_MEM char *text = NULL;
    size_t n;
    TRY(file_read(path, MAX_CONFIG_BYTES, &text, &n));
    m.hash = hash_bytes(0, text, n);
    json_t *root = NULL;
    TRY(parse(path, text, n, &root));
    enum err err = read_sizes(root, &m);
    if (err == ERR_OK)
        err = check_fixed(root, &m);
    if (err == ERR_OK)
        err = check_rope(root, &m);
    if (err == ERR_OK)
        err = check_layer_types(root, &m);
    if (err == ERR_OK)
        err = read_eos(root, &m);
    json_decref(root);
    if (err != ERR_OK)
        return err_prefix(err, "%s", path);
    TRY(read_generation(dir, &m));
    TRY(read_tokenizer(dir, &m));
    TRY(hash_weights(dir, &m));
    *ret = m;
    return ERR_OK;
}

/* What is wrong with a file is wrong with the model, whatever json.h calls it. */
static enum err bad_model(enum err err)
{
    if (err == ERR_OK || err == ERR_NOMEM)
        return err;
    char text[400];
    snprintf(text, sizeof(text), "%s", err_text(err));
    return err_set(ERR_BAD_MODEL, "%s", text);
}

static enum err read_sizes(const json_t *root, struct model_config *m)
{
    const struct {
        const char *key;
        int64_t min, max;
        int *to;
        bool optional;
    } fields[] = {
        {"hidden_size", 1, 1 << 16, &m->hidden, false},
        {"intermediate_size", 1, 1 << 18, &m->intermediate, false},
        {"moe_intermediate_size", 1, 1 << 18, &m->moe_intermediate, false},
        {"num_hidden_layers", 1, 1024, &m->n_layers, false},
        {"first_k_dense_replace", 0, 1024, &m->n_dense_layers, false},
        {"num_nextn_predict_layers", 0, 1, &m->n_mtp_layers, true},
        {"num_attention_heads", 1, 1024, &m->n_heads, false},
        {"q_lora_rank", 1, 1 << 16, &m->q_lora_rank, false},
        {"n_routed_experts", 1, ROUTE_MAX_EXPERTS, &m->n_experts, false},
        {"num_experts_per_tok", 1, 64, &m->n_experts_per_token, false},
        {"n_shared_experts", 1, 1, &m->n_shared_experts, false},
        {"vocab_size", 1, 1 << 24, &m->vocab, false},
        {"max_position_embeddings", 1, 1 << 24, &m->max_positions, false},
    };
    if (!json_is_object(root))
        return err_set(ERR_BAD_MODEL, "not a JSON object");
    for (size_t i = 0; i < ARRAY_LEN(fields); i++) {
        int64_t v = -1;
        TRY(bad_model(json_get_int(root, fields[i].key, fields[i].min, fields[i].max, &v)));
        if (v < 0 && !fields[i].optional)
            return err_set(ERR_BAD_MODEL, "%s is missing", fields[i].key);
        *fields[i].to = v < 0 ? 0 : (int)v;
    }
    if (m->n_dense_layers > m->n_layers)
        return err_set(ERR_BAD_MODEL, "first_k_dense_replace is %d, num_hidden_layers %d",
                       m->n_dense_layers, m->n_layers);
    if (m->n_experts_per_token > m->n_experts)
        return err_set(ERR_BAD_MODEL, "num_experts_per_tok is %d, n_routed_experts %d",
                       m->n_experts_per_token, m->n_experts);
    double scale = 1, eps = 1e-5;
    TRY(bad_model(json_get_double(root, "routed_scaling_factor", 1e-3, 1e3, &scale)));
    TRY(bad_model(json_get_double(root, "rms_norm_eps", 1e-12, 1e-1, &eps)));
    m->routed_scale = (float)scale;
    m->norm_eps = (float)eps;
    return ERR_OK;
}

/* What the kernels assume. Absent fields pass unless marked required. */
static enum err check_fixed(const json_t *root, const struct model_config *m)
{
    const struct {
        const char *key, *value; /* as JSON */
        bool required;
    } fields[] = {
        {"model_type", "\"glm4_moe_lite\"", true},
        {"kv_lora_rank", "512", true},
        {"qk_nope_head_dim", "192", true},
        {"qk_rope_head_dim", "64", true},
        {"v_head_dim", "256", true},
        {"hidden_act", "\"silu\"", false},
        {"attention_bias", "false", false},
        {"topk_method", "\"noaux_tc\"", false},
        {"scoring_func", "\"sigmoid\"", false},
        {"norm_topk_prob", "true", false},
        {"n_group", "1", false},
        {"topk_group", "1", false},
        {"moe_layer_freq", "1", false},
        {"rope_interleave", "true", false},
        {"tie_word_embeddings", "false", false},
        {"dtype", "\"bfloat16\"", false},
        {"torch_dtype", "\"bfloat16\"", false},
        {"quantization_config", "null", false},
    };
    for (size_t i = 0; i < ARRAY_LEN(fields); i++) {
        const json_t *v = json_object_get(root, fields[i].key);
        if (!v || json_is_null(v)) {
            if (fields[i].required)
                return err_set(ERR_BAD_MODEL, "%s is missing, this build needs %s", fields[i].key,
                               fields[i].value);
            continue;
        }
        OWNED_MEM char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT);
        if (!text)
            return err_set(ERR_NOMEM, "no memory for config.json");
        if (strcmp(text, fields[i].value) != 0)
            return err_set(ERR_BAD_MODEL, "%s is %.60s, this build runs only %s", fields[i].key,
                           text, fields[i].value);
    }
    int64_t kv_heads = m->n_heads;
    TRY(bad_model(json_get_int(root, "num_key_value_heads", 1, 1024, &kv_heads)));
    if (kv_heads != m->n_heads)
        return err_set(ERR_BAD_MODEL, "num_key_value_heads is %" PRId64 ", num_attention_heads %d",
                       kv_heads, m->n_heads);
    double rotary = 1;
    TRY(bad_model(json_get_double(root, "partial_rotary_factor", 0, 1, &rotary)));
    if (rotary != 1)
        return err_set(ERR_BAD_MODEL, "partial_rotary_factor is %g, this build runs only 1",
                       rotary);
    return ERR_OK;
}

/* Plain RoPE: transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters. */
static enum err check_rope(const json_t *root, struct model_config *m)
{
    static const char *const objects[] = {"rope_scaling", "rope_parameters"};
    double theta = m->rope_theta;
    TRY(bad_model(json_get_double(root, "rope_theta", 1, 1e12, &theta)));
    for (size_t i = 0; i < ARRAY_LEN(objects); i++) {
        const json_t *o = json_object_get(root, objects[i]);
        if (!o || json_is_null(o))
            continue;
        if (!json_is_object(o))
            return err_set(ERR_BAD_MODEL, "%s is not an object", objects[i]);
        const char *type = "default";
        TRY(bad_model(json_get_string(o, "type", &type)));
        TRY(bad_model(json_get_string(o, "rope_type", &type)));
        if (strcmp(type, "default") != 0)
            return err_set(ERR_BAD_MODEL, "%s is of type %.40s, this build runs only default",
                           objects[i], type);
        TRY(bad_model(json_get_double(o, "rope_theta", 1, 1e12, &theta)));
    }
    m->rope_theta = (float)theta;
    return ERR_OK;
}

static enum err check_layer_types(const json_t *root, const struct model_config *m)
{
    const json_t *types = json_object_get(root, "mlp_layer_types");
    if (!types || json_is_null(types))
        return ERR_OK;
    if (json_array_size(types) != (size_t)m->n_layers)
        return err_set(ERR_BAD_MODEL, "mlp_layer_types has %zu entries, num_hidden_layers is %d",
                       json_array_size(types), m->n_layers);
    for (int i = 0; i < m->n_layers; i++) {
        const char *want = i < m->n_dense_layers ? "dense" : "sparse";
        const char *is = json_string_value(json_array_get(types, (size_t)i));
        if (!is || strcmp(is, want) != 0)
            return err_set(ERR_BAD_MODEL, "mlp_layer_types[%d] is %.20s, this build runs only %s",
                           i, is ? is : "no string", want);
    }
    return ERR_OK;
}

static enum err add_eos(const json_t *v, struct model_config *m)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= m->vocab)
        return err_set(ERR_BAD_MODEL, "eos_token_id is not an id in [0, %d)", m->vocab);
    int32_t id = (int32_t)json_integer_value(v);
    for (int i = 0; i < m->n_eos; i++)
        if (m->eos[i] == id)
            return ERR_OK;
    if (m->n_eos == MODEL_MAX_EOS)
        return err_set(ERR_BAD_MODEL, "more than %d ids in eos_token_id", MODEL_MAX_EOS);
    m->eos[m->n_eos++] = id;
    return ERR_OK;
}

/* One id or a list; config.json's and generation_config.json's are put together. */
static enum err read_eos(const json_t *root, struct model_config *m)
{
    const json_t *eos = json_object_get(root, "eos_token_id");
    if (!eos || json_is_null(eos))
        return ERR_OK;
    if (!json_is_array(eos))
        return add_eos(eos, m);
    for (size_t i = 0; i < json_array_size(eos); i++)
        TRY(add_eos(json_array_get(eos, i), m));
    return ERR_OK;
}

static enum err read_generation(const char *dir, struct model_config *m)
{
    char path[PATH_MAX];
    TRY(path_make(dir, "generation_config.json", path));
    OWNED_MEM char *text = NULL;
    size_t n;
    enum err err = file_read(path, MAX_CONFIG_BYTES, &text, &n);
    if (err == ERR_NOT_FOUND)
        return ERR_OK;
    TRY(err);
    json_t *root = NULL;
    TRY(parse(path, text, n, &root));
    double temperature = 1, top_p = 1;
    int64_t top_k = 0;
    err = json_get_double(root, "temperature", 0, 100, &temperature);
    if (err == ERR_OK)
        err = json_get_double(root, "top_p", 0, 1, &top_p);
    if (err == ERR_OK)
        err = json_get_int(root, "top_k", 0, INT32_MAX, &top_k);
    if (err == ERR_OK)
        err = read_eos(root, m);
    json_decref(root);
    if (err != ERR_OK)
        return err_prefix(bad_model(err), "%s", path);
    m->default_temperature = (float)temperature;
    m->default_top_p = (float)top_p;
    m->default_top_k = (int)top_k;
    return ERR_OK;
}

/* Counts ids only: what they mean is the router's business. */
static enum err read_tokenizer(const char *dir, struct model_config *m)
{
    m->n_token_ids = m->n_text_ids = m->vocab;
    char path[PATH_MAX];
    TRY(path_make(dir, "tokenizer.json", path));
    OWNED_MEM char *text = NULL;
    size_t n;
    enum err err = file_read(path, MAX_TOKENIZER_BYTES, &text, &n);
    if (err == ERR_NOT_FOUND)
        return ERR_OK;
    TRY(err);
    m->tokenizer_hash = hash_bytes(0, text, n);
    json_t *root = NULL;
    TRY(parse(path, text, n, &root));
    int64_t max = -1, added = INT64_MAX;
    const char *name;
    json_t *v, *vocab = json_object_get(json_object_get(root, "model"), "vocab");
    json_object_foreach (vocab, name, v)
        max = MAX(max, (int64_t)json_integer_value(v));
    size_t i;
    json_array_foreach (json_object_get(root, "added_tokens"), i, v) {
        int64_t id = (int64_t)json_integer_value(json_object_get(v, "id"));
        max = MAX(max, id);
        added = MIN(added, id);
    }
    json_decref(root);
    if (max < 0)
        return err_set(ERR_BAD_MODEL, "%s: no ids in model.vocab and added_tokens", path);
    if (max >= m->vocab)
        return err_set(ERR_BAD_MODEL, "%s: id %" PRId64 ", but vocab_size is %d", path, max,
                       m->vocab);
    m->n_token_ids = (int)max + 1;
    m->n_text_ids = added > 0 && added <= max ? (int)added : m->n_token_ids;
    return ERR_OK;
}

/* The names, shapes and places of all tensors stand for the checkpoint. */
static enum err hash_weights(const char *dir, struct model_config *m)
{
    char path[PATH_MAX];
    TRY(path_make(dir, "model.safetensors.index.json", path));
    OWNED_MEM char *text = NULL;
    size_t n;
    enum err err = file_read(path, MAX_INDEX_BYTES, &text, &n);
    if (err == ERR_OK) {
        m->hash = hash_bytes(m->hash, text, n);
        return ERR_OK;
    }
    if (err != ERR_NOT_FOUND)
        return err;
    TRY(path_make(dir, "model.safetensors", path));
    OWNED_FILE f = fopen(path, "rbe");
    if (!f)
        return ERR_OK; // weights_load will say what is missing
    uint64_t bytes;
    if (fread(&bytes, sizeof(bytes), 1, f) != 1 || bytes > MAX_HEADER_BYTES)
        return ERR_OK;
    text = malloc(bytes + 1);
    if (!text)
        return err_set(ERR_NOMEM, "no memory for the header of %s", path);
    m->hash = hash_bytes(m->hash, text, fread(text, 1, bytes, f));
    return ERR_OK;
}

static enum err parse(const char *path, const char *text, size_t n, json_t **ret)
{
    enum err err = json_parse(text, n, &json_limits_file, ret);
    return err == ERR_OK ? ERR_OK : err_prefix(bad_model(err), "%s", path);
}

static enum err path_make(const char *dir, const char *file, char ret[PATH_MAX])
{
    if (snprintf(ret, PATH_MAX, "%s/%s", dir, file) >= PATH_MAX)
        return err_set(ERR_INVALID, "the path %.100s... is too long", dir);
    return ERR_OK;
}
