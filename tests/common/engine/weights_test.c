/* weights_test.c: what the arena holds, and checkpoints that do not fit their config.json. */
#include "common/engine/weights.h"

#include "common/engine/safetensors.h"
#include "scratch.h"

#define INDEX  "model.safetensors.index.json"
#define FIRST  "model-00001-of-00002.safetensors"
#define SECOND "model-00002-of-00002.safetensors"
#define THIRD  "extra.safetensors"

static struct scratch dir;
static struct model_config demo;

static enum err load(const struct model_config *m, struct weights **ret)
{
    return weights_load(dir.dir, m, 2, NULL, NULL, ret);
}

static enum err try_load(const struct model_config *m)
{
    OWNED(weights) w = NULL;
    return load(m, &w);
}

/* The demo's two shards and index, the named one as a copy to be changed. */
static void demo_place(const char *copied)
{
    const char *const names[] = {INDEX, FIRST, SECOND};
    scratch_clear(&dir);
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        if (copied && strcmp(copied, names[i]) == 0) {
            size_t n;
            OWNED_MEM char *bytes = demo_read(names[i], &n);
            scratch_write(&dir, names[i], bytes, n);
        } else {
            scratch_demo_link(&dir, names[i]);
        }
    }
}

/* Replaces a text of a shard's header, or of the index, by one of the same length. */
static void patch(const char *file, const char *from, const char *to)
{
    OWNED_MEM char *bytes = NULL;
    size_t n;
    REQUIRE(strlen(from) == strlen(to));
    CHECK_OK(file_read(scratch_path(&dir, file), 1 << 30, &bytes, &n));
    REQUIRE(bytes);
    char *at = memmem(bytes, MIN(n, (size_t)20000), from, strlen(from));
    REQUIRE(at);
    memcpy(at, to, strlen(to));
    scratch_remove(&dir, file);
    scratch_write(&dir, file, bytes, n);
}

struct progress {
    uint64_t last, total, calls;
    bool ordered;
};

static void on_progress(void *user, uint64_t done, uint64_t total)
{
    struct progress *p = user;
    p->ordered &= done >= p->last && done <= total;
    p->last = done;
    p->total = total;
    p->calls++;
}

static void compare(const struct safetensors *files, const char *name, const void *got)
{
    const struct st_tensor *t = safetensors_find(files, name);
    REQUIRE(t && got);
    OWNED_MEM char *want = malloc(t->n_bytes);
    REQUIRE(want);
    CHECK_OK(safetensors_read(files, t, want));
    if (memcmp(want, got, t->n_bytes) != 0) {
        CHECK(!"tensor is in its place");
        fprintf(stderr, "  %s\n", name);
    }
}

static void every_tensor_is_in_its_place(void)
{
    for (int n_threads = 1; n_threads <= 4; n_threads += 3) {
        struct progress p = {.ordered = true};
        OWNED(weights) w = NULL;
        CHECK_OK(weights_load(getenv("BATON_DEMO_DIR"), &demo, n_threads, on_progress, &p, &w));
        REQUIRE(w);
        CHECK(p.ordered && p.calls > 0 && p.last == p.total && p.total <= w->arena_bytes);
        OWNED(safetensors) files = NULL;
        CHECK_OK(safetensors_open(getenv("BATON_DEMO_DIR"), &files));
        REQUIRE(files);
        int64_t expert = (int64_t)demo.hidden * demo.moe_intermediate;
        compare(files, "model.embed_tokens.weight", w->embed);
        compare(files, "model.norm.weight", w->norm);
        compare(files, "lm_head.weight", w->head);
        for (int i = 0; i < 4; i++) {
            const struct layer_weights *l = &w->layers[i];
            struct {
                const char *name;
                const void *at;
            } table[] = {
                {"input_layernorm.weight", l->input_norm},
                {"post_attention_layernorm.weight", l->post_attention_norm},
                {"self_attn.q_a_proj.weight", l->q_a},
                {"self_attn.q_a_layernorm.weight", l->q_a_norm},
                {"self_attn.q_b_proj.weight", l->q_b},
                {"self_attn.kv_a_proj_with_mqa.weight", l->kv_a},
                {"self_attn.kv_a_layernorm.weight", l->kv_a_norm},
                {"self_attn.kv_b_proj.weight", l->kv_b},
                {"self_attn.o_proj.weight", l->o},
                {i ? NULL : "mlp.gate_proj.weight", l->mlp_gate},
                {i ? NULL : "mlp.up_proj.weight", l->mlp_up},
                {i ? NULL : "mlp.down_proj.weight", l->mlp_down},
                {i ? "mlp.gate.weight" : NULL, l->router},
                {i ? "mlp.gate.e_score_correction_bias" : NULL, l->router_bias},
                {i ? "mlp.experts.0.gate_proj.weight" : NULL, l->expert_gate},
                {i ? "mlp.experts.7.gate_proj.weight" : NULL,
                 i ? l->expert_gate + 7 * expert : NULL},
                {i ? "mlp.experts.3.up_proj.weight" : NULL, i ? l->expert_up + 3 * expert : NULL},
                {i ? "mlp.experts.5.down_proj.weight" : NULL,
                 i ? l->expert_down + 5 * expert : NULL},
                {i ? "mlp.shared_experts.gate_proj.weight" : NULL, l->shared_gate},
                {i ? "mlp.shared_experts.up_proj.weight" : NULL, l->shared_up},
                {i ? "mlp.shared_experts.down_proj.weight" : NULL, l->shared_down},
            };
            for (size_t k = 0; k < ARRAY_LEN(table); k++) {
                char name[100];
                if (!table[k].name) {
                    CHECK(!table[k].at); // NULL says which kind of layer it is
                    continue;
                }
                snprintf(name, sizeof(name), "model.layers.%d.%s", i, table[k].name);
                compare(files, name, table[k].at);
                if (!strstr(name, ".experts.") || strstr(name, ".experts.0."))
                    CHECK_INT((uintptr_t)table[k].at % 256, 0);
            }
        }
        compare(files, "model.layers.3.enorm.weight", w->mtp.enorm);
        compare(files, "model.layers.3.hnorm.weight", w->mtp.hnorm);
        compare(files, "model.layers.3.eh_proj.weight", w->mtp.eh_proj);
        compare(files, "model.layers.3.shared_head.norm.weight", w->mtp.head_norm);
        CHECK(w->mtp.embed == w->embed && w->mtp.head == w->head);
    }
}

/* The real checkpoint repeats both tables in its MTP layer. */
static void mtp_tables_are_shared_if_equal(void)
{
    OWNED(weights) main = NULL;
    CHECK_OK(weights_load(getenv("BATON_DEMO_DIR"), &demo, 2, NULL, NULL, &main));
    REQUIRE(main);
    size_t table = (size_t)demo.vocab * (size_t)demo.hidden * 2;
    char header[400];
    snprintf(header, sizeof(header),
             "{\"model.layers.3.embed_tokens.weight\":{\"dtype\":\"BF16\",\"shape\":[%d,%d],"
             "\"data_offsets\":[0,%zu]},\"model.layers.3.shared_head.head.weight\":{\"dtype\":"
             "\"BF16\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}}",
             demo.vocab, demo.hidden, table, demo.vocab, demo.hidden, table, 2 * table);
    size_t n = strlen(header);
    OWNED_MEM char *file = calloc(1, 8 + n + 2 * table);
    REQUIRE(file);
    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    memcpy(file + 8 + n, main->embed, table);
    memcpy(file + 8 + n + table, main->head, table);
    for (int changed = 0; changed < 3; changed++) { // neither, the embedding, the head
        demo_place(INDEX);
        if (changed)
            file[8 + n + (size_t)changed * table - 1] ^= 1; // the very last byte
        scratch_write(&dir, THIRD, file, 8 + n + 2 * table);
        json_t *index = demo_json(INDEX), *map = json_object_get(index, "weight_map");
        json_object_set_new(map, "model.layers.3.embed_tokens.weight", json_string(THIRD));
        json_object_set_new(map, "model.layers.3.shared_head.head.weight", json_string(THIRD));
        scratch_json(&dir, INDEX, index);
        json_decref(index);
        OWNED(weights) w = NULL;
        CHECK_OK(load(&demo, &w));
        REQUIRE(w);
        CHECK_INT(w->mtp.embed == w->embed, changed != 1);
        CHECK_INT(w->mtp.head == w->head, changed != 2);
        CHECK(memcmp(w->mtp.embed, file + 8 + n, table) == 0);
        CHECK(memcmp(w->mtp.head, file + 8 + n + table, table) == 0);
        if (changed)
            file[8 + n + (size_t)changed * table - 1] ^= 1;
    }
}

static void misfits_are_named(void)
{
    demo_place(NULL);
    CHECK_OK(try_load(&demo));

    struct model_config m = demo;
    m.hidden = 128;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL,
                  "model.embed_tokens.weight is [3072, 256] instead of [3072, 128]");
    m = demo;
    m.n_layers = 4;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL, "model.layers.4.input_layernorm.weight is missing");
    m = demo;
    m.n_layers = 2;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL, "model.layers.2.enorm.weight is missing");
    m = demo;
    m.n_mtp_layers = 0;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL, "does not belong");
    m = demo;
    m.n_experts = 9;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL, "mlp.experts.8.gate_proj.weight is missing");
    m = demo;
    m.n_experts = 7;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL, "tensors are not");

    demo_place(SECOND);
    patch(SECOND, "\"BF16\"", "\"F16\" "); // the first one is lm_head, the largest
    CHECK_REFUSED(try_load(&demo), ERR_BAD_MODEL, "is F16 instead of BF16");
    demo_place(SECOND);
    patch(SECOND, "\"F32\"", "\"I32\"");
    CHECK_REFUSED(try_load(&demo), ERR_BAD_MODEL,
                  "e_score_correction_bias is another type instead of F32");
}

static void patched_headers_are_refused(void)
{
    demo_place(FIRST);
    patch(FIRST, "[3072,256]", "[256,3072]");
    CHECK_REFUSED(try_load(&demo), ERR_BAD_MODEL,
                  "model.embed_tokens.weight is [256, 3072] instead of [3072, 256]");
    demo_place(INDEX);
    scratch_remove(&dir, SECOND);
    CHECK_REFUSED(try_load(&demo), ERR_NOT_FOUND, SECOND);
    // Renamed: one is missing and one is too many, in one sentence.
    demo_place(SECOND);
    patch(SECOND, "model.norm.weight", "model.nurm.weight");
    json_t *index = demo_json(INDEX), *map = json_object_get(index, "weight_map");
    json_object_del(map, "model.norm.weight");
    json_object_set_new(map, "model.nurm.weight", json_string(SECOND));
    scratch_remove(&dir, INDEX);
    scratch_json(&dir, INDEX, index);
    json_decref(index);
    CHECK_REFUSED(try_load(&demo), ERR_BAD_MODEL, "2 tensors");
    CHECK_REFUSED(try_load(&demo), ERR_BAD_MODEL, "model.norm.weight is missing");
    CHECK_REFUSED(try_load(&demo), ERR_BAD_MODEL, "model.nurm.weight does not belong");
    // Many: some by name, all by number.
    struct model_config m = demo;
    m.moe_intermediate = 64;
    CHECK_REFUSED(try_load(&m), ERR_BAD_MODEL, "83 tensors"); // 3 layers x 27 and the two above
}

static void dummy_weights_are_reproducible(void)
{
    OWNED(weights) a = NULL;
    OWNED(weights) b = NULL;
    OWNED(weights) c = NULL;
    CHECK_OK(weights_open(&demo, &(struct weights_source){.dummy_seed = 1}, &a));
    CHECK_OK(weights_open(&demo, &(struct weights_source){.dummy_seed = 1}, &b));
    CHECK_OK(weights_open(&demo, &(struct weights_source){.dummy_seed = 2}, &c));
    REQUIRE(a && b && c);
    CHECK_INT(a->arena_bytes, b->arena_bytes);
    CHECK(memcmp(a->arena, b->arena, a->arena_bytes) == 0);
    CHECK(memcmp(a->arena, c->arena, a->arena_bytes) != 0);
    CHECK(a->mtp.head == a->head && a->layers[1].expert_gate && a->layers[0].mlp_gate);
    CHECK_INT(a->norm[0], 0x3f80); // 1.0
    int odd = 0, positive = 0;
    for (int i = 0; i < 3072 * 256; i++) {
        odd += (a->embed[i] & 0x7f80) == 0x7f80; // infinite or NaN
        positive += !(a->embed[i] >> 15);
    }
    CHECK_INT(odd, 0);
    CHECK_NEAR(positive, 3072 * 128, 3072);
}

int main(void)
{
    CHECK_OK(model_config_load(getenv("BATON_DEMO_DIR"), &demo));
    REQUIRE(!check_failures);
    dir = scratch_open();
    RUN(every_tensor_is_in_its_place);
    RUN(mtp_tables_are_shared_if_equal);
    RUN(misfits_are_named);
    RUN(patched_headers_are_refused);
    RUN(dummy_weights_are_reproducible);
    scratch_close(&dir);
    return check_done();
}
