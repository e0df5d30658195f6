/* weights.c: see weights.h.
 *
 * The model is described once, in plan_model: every tensor's name, type, shape and the pointer that
 * it ends up behind. Checking, placing, reading and making dummy weights all walk that plan.
 */
#include "common/engine/weights.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>

#include "common/base/hash.h"
#include "common/engine/safetensors.h"

#define ALIGN         256
#define NAMES_LISTED  4
#define COMPARE_BYTES (4u << 20)
#define MAX_READERS   64
#define STAGE_BYTES   (16u << 20) /* a reader's copy to the device */
#define SHARE_MS      600000      /* for another process to load the model */

struct entry {
    char name[96];
    enum st_dtype dtype;
    int n_dims;
    int64_t shape[2];
    const void **pointer; // set to the place in the arena; NULL for an expert after the first
    uint64_t offset, n_bytes;
    bool is_norm;
};

struct plan {
    struct entry *entries;
    size_t n, capacity;
    uint64_t bytes;
    bool failed; // out of memory
};

/* What is wrong with a checkpoint's list of tensors: the first few by name, the rest by number. */
struct complaints {
    char text[NAMES_LISTED][160];
    size_t n;
};

static enum err weights_create(const struct model_config *config, struct weights **ret);
static enum err plan_model(struct weights *w, bool mtp_embed, bool mtp_head, struct plan *p);
static enum err arena_map(struct weights *w, const struct plan *p);
static enum err check_tensors(const struct plan *p, const struct safetensors *files,
                              bool same_embed, bool same_head, const char *mtp_prefix);
static enum err tensors_equal(const struct safetensors *files, const char *a, const char *b,
                              bool *ret);
static enum err arena_fill(const struct weights *w, const struct plan *p, uint64_t seed);
static enum err read_all(const struct weights *w, const struct plan *p,
                         const struct safetensors *files, const struct weights_source *s);

static void plan_finish(struct plan *p) { free(p->entries); }

/* ---- the plan -------------------------------------------------------------------------------- */

/* Adds a tensor. Consecutive parts (pointer NULL) follow the one before without a gap. */
static void __attribute__((format(printf, 7, 8)))
plan_add(struct plan *p, const void **pointer, enum st_dtype dtype, bool is_norm, int64_t d0,
         int64_t d1, const char *fmt, ...)
{
    if (p->n == p->capacity) {
        size_t capacity = p->capacity ? 2 * p->capacity : 256;
        struct entry *more = realloc(p->entries, capacity * sizeof(*more));
        if (!more) {
            p->failed = true;
            return;
        }
        p->entries = more;
        p->capacity = capacity;
    }
    struct entry *e = &p->entries[p->n++];
    *e = (struct entry){.dtype = dtype,
                        .n_dims = d1 ? 2 : 1,
                        .shape = {d0, d1},
                        .pointer = pointer,
                        .n_bytes = (uint64_t)(d0 * (d1 ? d1 : 1)) * (dtype == ST_F32 ? 4 : 2),
                        .is_norm = is_norm};
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->name, sizeof(e->name), fmt, ap);
    va_end(ap);
    if (pointer)
        p->bytes = (p->bytes + ALIGN - 1) / ALIGN * ALIGN;
    e->offset = p->bytes;
    p->bytes += e->n_bytes;
}

#define NORM(to, n, ...) plan_add(p, (const void **)&(to), ST_BF16, true, n, 0, __VA_ARGS__)
#define MATRIX(to, out, in, ...)                                                                   \
    plan_add(p, (const void **)&(to), ST_BF16, false, out, in, __VA_ARGS__)

static void plan_experts(struct plan *p, const bf16_t **to, int n, int64_t out, int64_t in,
                         int layer, const char *which)
{
    for (int e = 0; e < n; e++)
        plan_add(p, e == 0 ? (const void **)to : NULL, ST_BF16, false, out, in,
                 "model.layers.%d.mlp.experts.%d.%s_proj.weight", layer, e, which);
}

static void plan_layer(struct plan *p, const struct model_config *c, int layer,
                       struct layer_weights *l)
{
    char at[40];
    snprintf(at, sizeof(at), "model.layers.%d", layer);
    int64_t H = c->hidden, F = c->moe_intermediate, heads = c->n_heads;
    NORM(l->input_norm, H, "%s.input_layernorm.weight", at);
    NORM(l->post_attention_norm, H, "%s.post_attention_layernorm.weight", at);
    // One product on the GPU: [q_a | kv_a].
    MATRIX(l->q_a, c->q_lora_rank, H, "%s.self_attn.q_a_proj.weight", at);
    MATRIX(l->kv_a, KV_WIDTH, H, "%s.self_attn.kv_a_proj_with_mqa.weight", at);
    NORM(l->q_a_norm, c->q_lora_rank, "%s.self_attn.q_a_layernorm.weight", at);
    MATRIX(l->q_b, heads * MLA_QK, c->q_lora_rank, "%s.self_attn.q_b_proj.weight", at);
    NORM(l->kv_a_norm, MLA_LATENT, "%s.self_attn.kv_a_layernorm.weight", at);
    MATRIX(l->kv_b, heads * (MLA_NOPE + MLA_V), MLA_LATENT, "%s.self_attn.kv_b_proj.weight", at);
    MATRIX(l->o, H, heads * MLA_V, "%s.self_attn.o_proj.weight", at);
    if (layer < c->n_dense_layers) {
        MATRIX(l->mlp_gate, c->intermediate, H, "%s.mlp.gate_proj.weight", at);
        MATRIX(l->mlp_up, c->intermediate, H, "%s.mlp.up_proj.weight", at);
        MATRIX(l->mlp_down, H, c->intermediate, "%s.mlp.down_proj.weight", at);
        return;
    }
    MATRIX(l->router, c->n_experts, H, "%s.mlp.gate.weight", at);
    plan_add(p, (const void **)&l->router_bias, ST_F32, false, c->n_experts, 0,
             "%s.mlp.gate.e_score_correction_bias", at);
    // The shared expert follows the routed ones: the GPU takes it for expert number n_experts.
    plan_experts(p, &l->expert_gate, c->n_experts, F, H, layer, "gate");
    MATRIX(l->shared_gate, F, H, "%s.mlp.shared_experts.gate_proj.weight", at);
    plan_experts(p, &l->expert_up, c->n_experts, F, H, layer, "up");
    MATRIX(l->shared_up, F, H, "%s.mlp.shared_experts.up_proj.weight", at);
    plan_experts(p, &l->expert_down, c->n_experts, H, F, layer, "down");
    MATRIX(l->shared_down, H, F, "%s.mlp.shared_experts.down_proj.weight", at);
}

/* mtp_embed, mtp_head: the MTP layer has a table of its own that differs from the main one. */
static enum err plan_model(struct weights *w, bool mtp_embed, bool mtp_head, struct plan *p)
{
    const struct model_config *c = &w->config;
    int64_t V = c->vocab, H = c->hidden;
    MATRIX(w->embed, V, H, "model.embed_tokens.weight");
    NORM(w->norm, H, "model.norm.weight");
    MATRIX(w->head, V, H, "lm_head.weight");
    for (int i = 0; i < c->n_layers + c->n_mtp_layers; i++)
        plan_layer(p, c, i, &w->layers[i]);
    if (c->n_mtp_layers) {
        int n = c->n_layers;
        NORM(w->mtp.enorm, H, "model.layers.%d.enorm.weight", n);
        NORM(w->mtp.hnorm, H, "model.layers.%d.hnorm.weight", n);
        MATRIX(w->mtp.eh_proj, H, 2 * H, "model.layers.%d.eh_proj.weight", n);
        NORM(w->mtp.head_norm, H, "model.layers.%d.shared_head.norm.weight", n);
        if (mtp_embed)
            MATRIX(w->mtp.embed, V, H, "model.layers.%d.embed_tokens.weight", n);
        if (mtp_head)
            MATRIX(w->mtp.head, V, H, "model.layers.%d.shared_head.head.weight", n);
    }
    return p->failed ? err_set(ERR_NOMEM, "no memory for a list of %zu tensors", p->n) : ERR_OK;
}

#undef NORM
#undef MATRIX

/* ---- creation -------------------------------------------------------------------------------- */

/* The arena's content, from the checkpoint or made up. */
static enum err arena_make(struct weights *w, const struct plan *p, const struct safetensors *files,
                           const struct weights_source *s)
{
    if (files)
        return read_all(w, p, files, s);
    TRY(arena_fill(w, p, s->dummy_seed));
    return w->device ? device_flush(w->device) : ERR_OK;
}

/* The arena of a GPU: one for all processes that name the same share. */
static enum err device_arena(struct weights *w, const struct plan *p,
                             const struct safetensors *files, const struct weights_source *s)
{
    OWNED_FD fd = -1;
    uint64_t bytes = 0;
    if (s->share) {
        TRY(fd_share_open(s->share, SHARE_MS, &w->share, &fd, &bytes));
        if (fd >= 0) {
            if (bytes != p->bytes)
                return err_set(ERR_MISMATCH,
                               "the GPU holds %" PRIu64
                               " bytes of weights, this model has %" PRIu64,
                               bytes, p->bytes);
            w->is_imported = true;
            return device_import(w->device, fd, bytes, &w->device_arena);
        }
    }
    TRY(device_alloc(w->device, p->bytes, &w->device_arena));
    TRY(arena_make(w, p, files, s));
    return s->share ? fd_share_serve(w->share, w->device_arena.fd, p->bytes) : ERR_OK;
}

enum err weights_open(const struct model_config *config, const struct weights_source *s,
                      struct weights **ret)
{
    OWNED(safetensors) files = NULL;
    if (s->dir)
        TRY(safetensors_open(s->dir, &files));
    OWNED(weights) w = NULL;
    TRY(weights_create(config, &w));
    w->device = s->device;

    // The real checkpoint repeats both tables in its MTP layer. Equal ones are not read again.
    char prefix[40], embed[80], head[80];
    snprintf(prefix, sizeof(prefix), "model.layers.%d.", config->n_layers);
    snprintf(embed, sizeof(embed), "%sembed_tokens.weight", prefix);
    snprintf(head, sizeof(head), "%sshared_head.head.weight", prefix);
    bool same_embed = true, same_head = true;
    if (files && config->n_mtp_layers) {
        TRY(tensors_equal(files, "model.embed_tokens.weight", embed, &same_embed));
        TRY(tensors_equal(files, "lm_head.weight", head, &same_head));
    }
    __attribute__((cleanup(plan_finish))) struct plan plan = {0};
    TRY(plan_model(w, !same_embed, !same_head, &plan));
    if (files)
        TRY(check_tensors(&plan, files, same_embed, same_head,
                          config->n_mtp_layers ? prefix : NULL));
    TRY(arena_map(w, &plan));
    if (w->device)
        TRY(device_arena(w, &plan, files, s));
    else
        TRY(arena_make(w, &plan, files, s));
    *ret = take(&w);
    return ERR_OK;
}

enum err weights_load(const char *dir, const struct model_config *config, int n_threads,
                      weights_progress_fn *progress, void *user, struct weights **ret)
{
    struct weights_source s = {
        .dir = dir, .n_threads = n_threads, .progress = progress, .user = user};
    return weights_open(config, &s, ret);
}

enum err weights_bytes(const struct model_config *config, uint64_t *ret)
{
    OWNED(weights) w = NULL;
    TRY(weights_create(config, &w));
    __attribute__((cleanup(plan_finish))) struct plan plan = {0};
    TRY(plan_model(w, false, false, &plan));
    *ret = plan.bytes;
    return ERR_OK;
}

enum err weights_none(const struct model_config *config, struct weights **ret)
{
    return weights_create(config, ret);
}

static float uniform(uint64_t seed, uint64_t i) // in [-1, 1)
{
    return (float)(int64_t)hash_mix(seed + (i + 1) * 0x9e3779b97f4a7c15u) * 0x1p-63f;
}

static void fill_host(const struct weights *w, const struct weights_region *r)
{
    float *floats = (float *)((char *)w->arena + r->offset);
    bf16_t *halves = (bf16_t *)((char *)w->arena + r->offset);
    for (uint64_t k = 0; k < r->n; k++) {
        float v = r->scale > 0 ? r->scale * uniform(r->stream, k) : 1.0f;
        uint32_t bits;
        memcpy(&bits, &v, sizeof(bits));
        if (r->is_f32)
            floats[k] = v;
        else
            halves[k] = (bf16_t)(bits >> 16);
    }
}

static enum err arena_fill(const struct weights *w, const struct plan *p, uint64_t seed)
{
    for (size_t i = 0; i < p->n; i++) {
        const struct entry *e = &p->entries[i];
        struct weights_region r = {
            .offset = e->offset,
            .n = e->n_bytes / (e->dtype == ST_F32 ? 4 : 2),
            .stream = hash_mix(seed ^ (i + 1) * 0xd1342543de82ef95u),
            .scale = e->is_norm       ? 0
                     : e->n_dims == 2 ? sqrtf(3.0f / (float)e->shape[1])
                                      : 0.1f,
            .is_f32 = e->dtype == ST_F32,
        };
        if (w->device)
            TRY(device_fill(w->device, w->device_arena.base, &r));
        else
            fill_host(w, &r);
    }
    return ERR_OK;
}

void weights_destroy(struct weights *w)
{
    if (!w)
        return;
    fd_share_destroy(w->share);
    if (w->device)
        device_release(w->device, &w->device_arena);
    if (w->arena)
        munmap(w->arena, w->arena_bytes);
    free(w->layers);
    free(w);
}

static enum err weights_create(const struct model_config *config, struct weights **ret)
{
    OWNED(weights) w = calloc(1, sizeof(*w));
    if (!w)
        return err_set(ERR_NOMEM, "no memory for weights");
    w->config = *config;
    w->layers = calloc((size_t)(config->n_layers + config->n_mtp_layers), sizeof(*w->layers));
    if (!w->layers)
        return err_set(ERR_NOMEM, "no memory for weights");
    *ret = take(&w);
    return ERR_OK;
}

static enum err arena_map(struct weights *w, const struct plan *p)
{
    int access = w->device ? PROT_NONE : PROT_READ | PROT_WRITE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (w->device ? MAP_NORESERVE : 0);
    void *arena = mmap(NULL, p->bytes, access, flags, -1, 0);
    if (arena == MAP_FAILED)
        return err_set(ERR_NOMEM, "no memory for %" PRIu64 " bytes of weights", p->bytes);
    if (!w->device)
        madvise(arena, p->bytes, MADV_HUGEPAGE);
    w->arena = arena;
    w->arena_bytes = p->bytes;
    for (size_t i = 0; i < p->n; i++)
        if (p->entries[i].pointer)
            *p->entries[i].pointer = (char *)arena + p->entries[i].offset;
    if (!w->mtp.embed)
        w->mtp.embed = w->embed;
    if (!w->mtp.head)
        w->mtp.head = w->head;
    return ERR_OK;
}

/* ---- checking -------------------------------------------------------------------------------- */

static void __attribute__((format(printf, 2, 3)))
complain(struct complaints *c, const char *fmt, ...)
{
    if (c->n < NAMES_LISTED) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(c->text[c->n], sizeof(c->text[0]), fmt, ap);
        va_end(ap);
    }
    c->n++;
}

static void shape_text(char ret[64], int n_dims, const int64_t *shape)
{
    int at = snprintf(ret, 64, "[");
    for (int i = 0; i < n_dims && at < 48; i++)
        at += snprintf(ret + at, 64 - (size_t)at, "%s%" PRId64, i ? ", " : "", shape[i]);
    snprintf(ret + at, 64 - (size_t)at, "]");
}

static bool is_planned(const struct plan *p, const char *name)
{
    // Only asked for tensors that nobody claimed, so a linear search costs nothing on good files.
    for (size_t i = 0; i < p->n; i++)
        if (strcmp(p->entries[i].name, name) == 0)
            return true;
    return false;
}

static enum err check_tensors(const struct plan *p, const struct safetensors *files,
                              bool same_embed, bool same_head, const char *mtp_prefix)
{
    static const char *const dtypes[] = {"BF16", "F32", "F16", "another type"};
    struct complaints bad = {0};
    size_t n_found = 0;
    for (size_t i = 0; i < p->n; i++) {
        const struct entry *e = &p->entries[i];
        const struct st_tensor *t = safetensors_find(files, e->name);
        if (!t) {
            complain(&bad, "%s is missing", e->name);
            continue;
        }
        n_found++;
        char is[64], want[64];
        shape_text(is, t->n_dims, t->shape);
        shape_text(want, e->n_dims, e->shape);
        if (t->dtype != e->dtype)
            complain(&bad, "%s is %s instead of %s", e->name, dtypes[t->dtype], dtypes[e->dtype]);
        else if (strcmp(is, want) != 0)
            complain(&bad, "%s is %s instead of %s", e->name, is, want);
    }
    // Copies of the main tables in the MTP layer belong to the model, though nobody reads them.
    char copy[2][80] = {"", ""};
    if (mtp_prefix && same_embed)
        snprintf(copy[0], sizeof(copy[0]), "%sembed_tokens.weight", mtp_prefix);
    if (mtp_prefix && same_head)
        snprintf(copy[1], sizeof(copy[1]), "%sshared_head.head.weight", mtp_prefix);
    for (int i = 0; i < 2; i++)
        n_found += copy[i][0] && safetensors_find(files, copy[i]);
    if (n_found < safetensors_n(files))
        for (size_t i = 0; i < safetensors_n(files); i++) {
            const char *name = safetensors_at(files, i)->name;
            if (strcmp(name, copy[0]) != 0 && strcmp(name, copy[1]) != 0 && !is_planned(p, name))
                complain(&bad, "%.100s does not belong to the model", name);
        }
    if (!bad.n)
        return ERR_OK;
    char all[NAMES_LISTED * 170] = "";
    size_t at = 0;
    for (size_t i = 0; i < bad.n && i < NAMES_LISTED && at < sizeof(all); i++)
        at += (size_t)snprintf(all + at, sizeof(all) - at, "%s%s", i ? ", " : "", bad.text[i]);
    return err_set(ERR_BAD_MODEL, "%zu tensors are not as config.json says: %.400s%s", bad.n, all,
                   bad.n > NAMES_LISTED ? ", .." : "");
}

/* True also where b does not exist or has another shape (the check after this one complains). */
static enum err tensors_equal(const struct safetensors *files, const char *a, const char *b,
                              bool *ret)
{
    const struct st_tensor *x = safetensors_find(files, a), *y = safetensors_find(files, b);
    *ret = true;
    if (!x || !y)
        return ERR_OK;
    *ret = false;
    if (x->dtype != y->dtype || x->n_bytes != y->n_bytes)
        return ERR_OK;
    OWNED_MEM char *buffer = malloc(2 * (size_t)COMPARE_BYTES);
    if (!buffer)
        return err_set(ERR_NOMEM, "no memory to compare %s and %s", a, b);
    for (uint64_t at = 0; at < x->n_bytes; at += COMPARE_BYTES) {
        uint64_t n = MIN(x->n_bytes - at, (uint64_t)COMPARE_BYTES);
        TRY(safetensors_read_part(files, x, at, n, buffer));
        TRY(safetensors_read_part(files, y, at, n, buffer + COMPARE_BYTES));
        if (memcmp(buffer, buffer + COMPARE_BYTES, n) != 0)
            return ERR_OK;
    }
    *ret = true;
    return ERR_OK;
}

/* ---- reading --------------------------------------------------------------------------------- */

struct reading {
    const struct weights *w;
    const struct plan *plan;
    const struct safetensors *files;
    weights_progress_fn *progress;
    void *user;
    pthread_t caller;
    _Atomic size_t next;
    _Atomic uint64_t done_bytes;
    pthread_mutex_t mutex; // guards the failure: the first one counts
    enum err err;
    char text[256];
};

/* Brings one tensor to its place; stage is the reader's pinned buffer, NULL: the place is in host
 * memory. */
static enum err read_one(const struct reading *r, const struct entry *e, void *stage)
{
    const struct st_tensor *t = safetensors_find(r->files, e->name);
    if (!stage)
        return safetensors_read(r->files, t, (char *)r->w->arena + e->offset);
    char *to = (char *)r->w->device_arena.base + e->offset;
    for (uint64_t at = 0; at < e->n_bytes; at += STAGE_BYTES) {
        uint64_t n = MIN(e->n_bytes - at, (uint64_t)STAGE_BYTES);
        TRY(safetensors_read_part(r->files, t, at, n, stage));
        TRY(device_put(r->w->device, to + at, stage, n));
    }
    return ERR_OK;
}

static void reading_fail(struct reading *r, enum err err, const char *what)
{
    pthread_mutex_lock(&r->mutex);
    if (r->err == ERR_OK) {
        r->err = err;
        snprintf(r->text, sizeof(r->text), "%s: %s", what, err_text(err));
    }
    pthread_mutex_unlock(&r->mutex);
    atomic_store(&r->next, r->plan->n);
}

static void *reader(void *arg)
{
    struct reading *r = arg;
    bool is_caller = pthread_equal(pthread_self(), r->caller);
    void *stage = NULL;
    enum err err = r->w->device ? device_stage(r->w->device, STAGE_BYTES, &stage) : ERR_OK;
    if (err != ERR_OK)
        reading_fail(r, err, "pinned memory");
    for (size_t i; (i = atomic_fetch_add(&r->next, 1)) < r->plan->n;) {
        const struct entry *e = &r->plan->entries[i];
        err = read_one(r, e, stage);
        if (err != ERR_OK) {
            reading_fail(r, err, e->name);
            break;
        }
        atomic_fetch_add(&r->done_bytes, e->n_bytes);
        if (is_caller && r->progress)
            r->progress(r->user, atomic_load(&r->done_bytes), r->plan->bytes);
    }
    if (stage)
        device_unstage(r->w->device, stage);
    return NULL;
}

static enum err read_all(const struct weights *w, const struct plan *p,
                         const struct safetensors *files, const struct weights_source *s)
{
    struct reading r = {.w = w,
                        .plan = p,
                        .files = files,
                        .progress = s->progress,
                        .user = s->user,
                        .caller = pthread_self(),
                        .mutex = PTHREAD_MUTEX_INITIALIZER};
    pthread_t threads[MAX_READERS];
    int n = 0;
    while (n < MIN(s->n_threads, MAX_READERS) - 1 &&
           pthread_create(&threads[n], NULL, reader, &r) == 0)
        n++;
    reader(&r);
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    if (r.err != ERR_OK)
        return err_set(r.err, "%s", r.text);
    if (s->progress)
        s->progress(s->user, p->bytes, p->bytes);
    return ERR_OK;
}
