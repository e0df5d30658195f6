/* model_config_test.c: the demo's config.json, and every way in which one may not be ours. */
#include "common/engine/model_config.h"

#include "scratch.h"

static struct scratch dir;

/* The demo's config with one field replaced by a JSON text (NULL: removed). */
static enum err load_with(const char *key, const char *value, struct model_config *ret)
{
    json_t *config = demo_json("config.json");
    if (value)
        json_object_set_new(config, key, json_loads(value, JSON_DECODE_ANY, NULL));
    else
        json_object_del(config, key);
    scratch_json(&dir, "config.json", config);
    json_decref(config);
    return model_config_load(dir.dir, ret);
}

static void reads_the_demo(void)
{
    struct model_config m;
    CHECK_OK(model_config_load(getenv("BATON_DEMO_DIR"), &m));
    REQUIRE(!check_failures);
    const struct {
        int got, want;
    } fields[] = {
        {m.hidden, 256},
        {m.intermediate, 512},
        {m.moe_intermediate, 128},
        {m.n_layers, 3},
        {m.n_dense_layers, 1},
        {m.n_mtp_layers, 1},
        {m.n_heads, 4},
        {m.q_lora_rank, 128},
        {m.n_experts, 8},
        {m.n_experts_per_token, 2},
        {m.n_shared_experts, 1},
        {m.vocab, 3072},
        {m.n_token_ids, 3036},
        {m.max_positions, 4096},
        {m.n_eos, 3},
        {m.eos[0], 3000},
        {m.eos[1], 3007},
        {m.eos[2], 3009},
        {m.default_top_k, 0},
    };
    for (size_t i = 0; i < ARRAY_LEN(fields); i++)
        CHECK_INT(fields[i].got, fields[i].want);
    CHECK_NEAR(m.routed_scale, 1.8, 1e-6);
    CHECK_NEAR(m.norm_eps, 1e-5, 1e-12);
    CHECK_NEAR(m.rope_theta, 1e6, 0);
    CHECK_NEAR(m.default_temperature, 1, 0);
    CHECK_NEAR(m.default_top_p, 1, 0);
    CHECK(m.hash != 0 && m.tokenizer_hash != 0);
}

static void refuses_other_models_by_name(void)
{
    static const struct {
        const char *key, *value;
    } table[] = {
        {"model_type", "\"glm4_moe\""},
        {"model_type", NULL},
        {"hidden_size", NULL},
        {"hidden_size", "0"},
        {"hidden_size", "\"256\""},
        {"hidden_size", "256.5"},
        {"hidden_size", "1000000000"},
        {"intermediate_size", "-1"},
        {"moe_intermediate_size", NULL},
        {"num_hidden_layers", "0"},
        {"num_hidden_layers", "9223372036854775807"},
        {"first_k_dense_replace", "4"},
        {"num_nextn_predict_layers", "2"},
        {"num_attention_heads", "0"},
        {"num_key_value_heads", "2"},
        {"q_lora_rank", "null"},
        {"kv_lora_rank", "256"},
        {"kv_lora_rank", NULL},
        {"qk_nope_head_dim", "128"},
        {"qk_rope_head_dim", "32"},
        {"v_head_dim", "128"},
        {"n_routed_experts", "1000"},
        {"num_experts_per_tok", "9"},
        {"num_experts_per_tok", "0"},
        {"n_shared_experts", "2"},
        {"n_shared_experts", "0"},
        {"n_group", "2"},
        {"topk_group", "2"},
        {"topk_method", "\"greedy\""},
        {"scoring_func", "\"softmax\""},
        {"norm_topk_prob", "false"},
        {"moe_layer_freq", "2"},
        {"hidden_act", "\"gelu\""},
        {"attention_bias", "true"},
        {"tie_word_embeddings", "true"},
        {"partial_rotary_factor", "0.5"},
        {"rope_interleave", "false"},
        {"rope_scaling", "{\"type\": \"yarn\", \"factor\": 4}"},
        {"rope_scaling", "1"},
        {"rope_parameters", "{\"rope_type\": \"yarn\"}"},
        {"rope_theta", "0"},
        {"rms_norm_eps", "\"small\""},
        {"rms_norm_eps", "0"},
        {"routed_scaling_factor", "0"},
        {"vocab_size", "0"},
        {"max_position_embeddings", "0"},
        {"dtype", "\"float16\""},
        {"torch_dtype", "\"float32\""},
        {"quantization_config", "{\"quant_method\": \"fp8\"}"},
        {"mlp_layer_types", "[\"dense\", \"sparse\"]"},
        {"mlp_layer_types", "[\"dense\", \"dense\", \"sparse\"]"},
        {"mlp_layer_types", "[\"dense\", 1, \"sparse\"]"},
        {"eos_token_id", "[3072]"},
        {"eos_token_id", "-1"},
        {"eos_token_id", "\"end\""},
        {"eos_token_id", "[1,2,3,4,5,6,7,8,9]"},
    };
    struct model_config m;
    for (size_t i = 0; i < ARRAY_LEN(table); i++)
        CHECK_REFUSED(load_with(table[i].key, table[i].value, &m), ERR_BAD_MODEL, table[i].key);
}

static void accepts_what_means_the_same(void)
{
    static const struct {
        const char *key, *value;
    } table[] = {
        {"rope_interleave", "true"},
        {"rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 1000000.0}"},
        {"rope_scaling", "{\"type\": \"default\"}"},
        {"mlp_layer_types", "[\"dense\", \"sparse\", \"sparse\"]"},
        {"scoring_func", "\"sigmoid\""},
        {"topk_method", NULL},
        {"n_group", NULL},
        {"num_key_value_heads", NULL},
        {"partial_rotary_factor", "1"},
        {"torch_dtype", "\"bfloat16\""},
        {"some_new_field", "{\"a\": [1, 2]}"},
        {"eos_token_id", "3000"},
    };
    struct model_config m;
    for (size_t i = 0; i < ARRAY_LEN(table); i++) {
        CHECK_OK(load_with(table[i].key, table[i].value, &m));
        CHECK_NEAR(m.rope_theta, 1e6, 0);
    }
    CHECK_OK(load_with("num_nextn_predict_layers", NULL, &m));
    CHECK_INT(m.n_mtp_layers, 0);
    CHECK_OK(load_with("rope_theta", "10000", &m));
    CHECK_NEAR(m.rope_theta, 10000, 0);
}

static void reads_generation_config(void)
{
    struct model_config m;
    CHECK_OK(load_with("eos_token_id", "[3000]", &m));
    scratch_text(
        &dir, "generation_config.json",
        "{\"temperature\": 0.6, \"top_p\": 0.95, \"top_k\": 20, \"eos_token_id\": [3000, 5]}");
    CHECK_OK(model_config_load(dir.dir, &m));
    CHECK_NEAR(m.default_temperature, 0.6, 1e-6);
    CHECK_NEAR(m.default_top_p, 0.95, 1e-6);
    CHECK_INT(m.default_top_k, 20);
    CHECK_INT(m.n_eos, 2);
    CHECK_INT(m.eos[1], 5);
    scratch_text(&dir, "generation_config.json", "{\"temperature\": \"hot\"}");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "temperature");
    scratch_text(&dir, "generation_config.json", "{\"temperature\": ");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "generation_config.json");
    scratch_remove(&dir, "generation_config.json");
}

static void counts_token_ids(void)
{
    struct model_config m;
    CHECK_OK(load_with("dtype", NULL, &m)); // no tokenizer.json: every row may be drawn
    CHECK_INT(m.n_token_ids, 3072);
    CHECK_INT(m.tokenizer_hash, 0);
    scratch_text(
        &dir, "tokenizer.json",
        "{\"model\": {\"vocab\": {\"a\": 0, \"b\": 41}}, \"added_tokens\": [{\"id\": 99}]}");
    CHECK_OK(model_config_load(dir.dir, &m));
    CHECK_INT(m.n_token_ids, 100);
    uint64_t hash = m.tokenizer_hash;
    scratch_text(&dir, "tokenizer.json", "{\"model\": {\"vocab\": {\"a\": 0, \"b\": 42}}}");
    CHECK_OK(model_config_load(dir.dir, &m));
    CHECK_INT(m.n_token_ids, 43);
    CHECK(hash != 0 && hash != m.tokenizer_hash);
    scratch_text(&dir, "tokenizer.json", "{\"model\": {\"vocab\": {\"a\": 3072}}}");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "3072");
    scratch_text(&dir, "tokenizer.json", "{\"model\": {}}");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "tokenizer.json");
    scratch_text(&dir, "tokenizer.json", "[");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "tokenizer.json");
    scratch_remove(&dir, "tokenizer.json");
}

static void hash_follows_config_and_index(void)
{
    struct model_config a, b;
    CHECK_OK(load_with("rms_norm_eps", "1e-5", &a));
    CHECK_OK(load_with("rms_norm_eps", "1e-6", &b));
    CHECK(a.hash != b.hash);
    scratch_text(&dir, "model.safetensors.index.json", "{\"weight_map\": {}}");
    CHECK_OK(model_config_load(dir.dir, &a));
    CHECK(a.hash != b.hash);
    scratch_text(&dir, "model.safetensors.index.json", "{\"weight_map\": {} }");
    CHECK_OK(model_config_load(dir.dir, &b));
    CHECK(a.hash != b.hash);
    scratch_remove(&dir, "model.safetensors.index.json");
    scratch_write(&dir, "model.safetensors", "\2\0\0\0\0\0\0\0{}data", 14);
    CHECK_OK(model_config_load(dir.dir, &a));
    scratch_write(&dir, "model.safetensors", "\2\0\0\0\0\0\0\0[]data", 14);
    CHECK_OK(model_config_load(dir.dir, &b));
    CHECK(a.hash != b.hash);
    scratch_write(&dir, "model.safetensors", "\377\377\377\377\377\377\377\377", 8);
    CHECK_OK(model_config_load(dir.dir, &b)); // the weights' loader complains about it
    scratch_remove(&dir, "model.safetensors");
}

static void broken_files_are_refused(void)
{
    struct model_config m;
    size_t n;
    OWNED_MEM char *text = demo_read("config.json", &n);
    for (size_t i = 0; i < 64; i++) {
        scratch_write(&dir, "config.json", text, n * i / 64);
        CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "config.json");
    }
    scratch_text(&dir, "config.json", "{\"model_type\": \"glm4_moe_lite\", \"model_type\": \"x\"}");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "config.json");
    scratch_text(&dir, "config.json", "[]");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_BAD_MODEL, "not a JSON object");
    scratch_remove(&dir, "config.json");
    CHECK_REFUSED(model_config_load(dir.dir, &m), ERR_NOT_FOUND, "config.json");
}

int main(void)
{
    dir = scratch_open();
    RUN(reads_the_demo);
    RUN(refuses_other_models_by_name);
    RUN(accepts_what_means_the_same);
    RUN(reads_generation_config);
    RUN(counts_token_ids);
    RUN(hash_follows_config_and_index);
    RUN(broken_files_are_refused);
    scratch_close(&dir);
    return check_done();
}
