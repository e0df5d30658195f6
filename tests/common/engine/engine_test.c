/* engine_test.c: the demo model against its goldens, and every path against every other bit for
 * bit. */
#include "common/engine/engine.h"

#include <string.h>

#include "check.h"
#include "goldens.h"

#define MAX_ROWS  1024
#define MAX_SEQS  16
#define MAX_PAGES 16 /* per sequence */

struct sequence {
    int32_t pages[MAX_PAGES];
    int n; // slots in use
};

/* One sequence's part of a batch. */
struct part {
    struct sequence *s;
    const int32_t *token;
    int n;
};

struct bench { // an engine with its pool
    struct kv_pool *pool;
    struct engine *engine;
    int next_page;
};

static struct weights *weights;

/* ---- driving the engine ---------------------------------------------------------------------- */

static struct bench bench_open(const struct weights *w, int n_threads)
{
    struct bench b = {0};
    struct kv_pool_config p = {.n_pages = MAX_SEQS * 10,
                               .n_layers = (uint32_t)(w->config.n_layers + w->config.n_mtp_layers),
                               .kv_width = KV_WIDTH,
                               .dtype_bytes = 4};
    struct engine_config c = {.n_threads = n_threads,
                              .max_rows = MAX_ROWS,
                              .max_seqs = MAX_SEQS,
                              .max_logits = MAX_ROWS,
                              .max_imports = 2,
                              .max_ctx = MAX_PAGES * KV_PAGE_TOKENS};
    CHECK_OK(kv_pool_create(&p, &b.pool));
    CHECK_OK(engine_create(&c, w, b.pool, &b.engine));
    REQUIRE(b.engine);
    return b;
}

static void bench_close(struct bench *b)
{
    engine_destroy(b->engine);
    kv_pool_destroy(b->pool);
}

/* Pages are handed out from the top, so that page order is not slot order. */
static struct sequence sequence_new(struct bench *b, int max_slots)
{
    struct sequence s = {0};
    for (int i = 0; i * KV_PAGE_TOKENS < max_slots; i++)
        s.pages[i] = MAX_SEQS * 10 - 1 - b->next_page++;
    REQUIRE(b->next_page <= MAX_SEQS * 10);
    return s;
}

struct arrays {
    int32_t token[MAX_ROWS], position[MAX_ROWS], logit_row[MAX_ROWS];
    int32_t seq_start[MAX_SEQS + 1], ctx_len[MAX_SEQS], block_table[MAX_SEQS * MAX_PAGES];
};

static struct batch batch_make(struct arrays *a, const struct part *parts, int n)
{
    struct batch b = {.n_seqs = n, .max_pages = MAX_PAGES};
    memset(a, 0, sizeof(*a));
    for (int s = 0; s < n; s++) {
        for (int i = 0; i < parts[s].n; i++, b.n_rows++) {
            a->token[b.n_rows] = parts[s].token[i];
            a->position[b.n_rows] = parts[s].s->n + i;
            a->logit_row[b.n_logits++] = b.n_rows;
        }
        a->seq_start[s + 1] = b.n_rows;
        a->ctx_len[s] = parts[s].s->n + parts[s].n;
        memcpy(a->block_table + s * MAX_PAGES, parts[s].s->pages, sizeof(parts[s].s->pages));
    }
    b.token = a->token;
    b.position = a->position;
    b.logit_row = a->logit_row;
    b.seq_start = a->seq_start;
    b.ctx_len = a->ctx_len;
    b.block_table = a->block_table;
    return b;
}

/* Logits of every row. */
static void forward(struct bench *e, const struct part *parts, int n)
{
    static struct arrays a;
    struct batch b = batch_make(&a, parts, n);
    CHECK_OK(engine_forward(e->engine, &b));
    for (int s = 0; s < n; s++)
        parts[s].s->n += parts[s].n;
}

/* What a row left behind: hidden state, logits and the KV of all layers. */
struct trace {
    int n, width;
    float *values;
};

static struct trace trace_new(const struct weights *w, int n)
{
    struct trace t = {.n = n,
                      .width = w->config.hidden + w->config.vocab + w->config.n_layers * KV_WIDTH};
    t.values = calloc((size_t)n * (size_t)t.width, sizeof(float));
    REQUIRE(t.values);
    return t;
}

/* Records rows [row, row + n) of the last forward, which are slots [slot, slot + n) of s. */
static void trace_rows(struct trace *t, struct bench *e, const struct sequence *s, int row,
                       int slot, int n)
{
    const struct model_config *m = engine_model(e->engine);
    uint64_t layers = kv_pool_get_config(e->pool)->n_layers;
    for (int i = 0; i < n; i++) {
        float *to = t->values + (size_t)(slot + i) * (size_t)t->width;
        CHECK_OK(engine_export_hidden(e->engine, row + i, to));
        to += m->hidden;
        CHECK_OK(engine_read_logits(e->engine, false, row + i, to));
        to += m->vocab;
        const float *page = kv_pool_page(e->pool, (uint32_t)s->pages[(slot + i) / KV_PAGE_TOKENS]);
        for (int l = 0; l < m->n_layers; l++, to += KV_WIDTH)
            memcpy(to,
                   page + ((uint64_t)l * KV_PAGE_TOKENS + (uint64_t)(slot + i) % KV_PAGE_TOKENS) *
                              KV_WIDTH,
                   KV_WIDTH * sizeof(float));
        (void)layers;
    }
}

static struct trace trace_chunked(const struct weights *w, int n_threads, const int32_t *token,
                                  int n, int chunk)
{
    struct bench e = bench_open(w, n_threads);
    struct sequence s = sequence_new(&e, n);
    struct trace t = trace_new(w, n);
    for (int at = 0; at < n; at += chunk) {
        int k = MIN(chunk, n - at);
        forward(&e, &(struct part){&s, token + at, k}, 1);
        trace_rows(&t, &e, &s, 0, at, k);
    }
    bench_close(&e);
    return t;
}

/* Finite values only: equal NaNs would prove nothing. */
static bool same(const struct trace *a, const struct trace *b)
{
    size_t n = (size_t)a->n * (size_t)a->width;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(a->values[i]) || memcmp(&a->values[i], &b->values[i], sizeof(float)) != 0) {
            fprintf(stderr, "row %zu value %zu: %.9g and %.9g\n", i / (size_t)a->width,
                    i % (size_t)a->width, (double)a->values[i], (double)b->values[i]);
            return false;
        }
    return a->n == b->n && a->width == b->width;
}

/* ---- goldens --------------------------------------------------------------------------------- */

static void logits_and_greedy_text(void)
{
    struct bench e = bench_open(weights, 2);
    int V = weights->config.vocab;
    float *logits = calloc((size_t)V, sizeof(float));
    REQUIRE(logits);
    double worst = 0;
    for (int i = 0; i < n_cases; i++) {
        const struct golden_case *c = &cases[i];
        e.next_page = 0;
        struct sequence s = sequence_new(&e, c->n_prompt + c->n_greedy);
        forward(&e, &(struct part){&s, c->seq, c->n_prompt}, 1);
        const float *want = golden_tensor(c->name, "logits_last4");
        for (int k = 0; k < 4; k++) {
            CHECK_OK(engine_read_logits(e.engine, false, c->n_prompt - 4 + k, logits));
            worst = fmax(worst, largest_difference(logits, want + k * V, V));
        }
        if (!(c->margin > 0.02)) {
            printf("%s: margin %g, text not compared\n", c->name, c->margin);
            continue;
        }
        int32_t row = c->n_prompt - 1;
        for (int k = 0; k < c->n_greedy; k++) {
            int32_t id = -1;
            struct sample_row greedy = {.position = s.n, .top_p = 1, .n_logprobs = -1};
            CHECK_OK(engine_sample(e.engine, 1, &row, &greedy, 0, &id, NULL, NULL, NULL));
            CHECK_INT(id, c->seq[c->n_prompt + k]);
            if (id != c->seq[c->n_prompt + k])
                break;
            row = 0;
            forward(&e, &(struct part){&s, &id, 1}, 1);
        }
    }
    printf("largest difference of a logit: %.2e\n", worst);
    CHECK_NEAR(worst, 0, 5e-3);
    free(logits);
    bench_close(&e);
}

/* One MTP batch of one sequence; returns the last row's draft. */
static int32_t draft(struct bench *e, const struct sequence *s, int slot, const int32_t *token,
                     int n, struct hidden_ref first)
{
    static struct arrays a;
    static struct hidden_ref hidden[MAX_ROWS];
    struct sequence at = *s;
    at.n = slot;
    struct batch b = batch_make(&a, &(struct part){&at, token, n}, 1);
    for (int i = 0; i < n; i++)
        hidden[i] = (struct hidden_ref){first.source, first.idx + i};
    a.logit_row[0] = n - 1;
    b.n_logits = 1;
    int32_t id = -1;
    CHECK_OK(engine_draft(e->engine, &b, hidden, &id));
    return id;
}

static void drafts_and_acceptance(void)
{
    struct bench e = bench_open(weights, 2);
    int V = weights->config.vocab;
    float *logits = calloc((size_t)V, sizeof(float));
    REQUIRE(logits);
    double worst = 0;
    for (int i = 0; i < n_cases; i++) {
        const struct golden_case *c = &cases[i];
        int n = c->n_prompt + c->n_greedy, n_positions = c->n_greedy - 1;
        double accepted[N_DRAFTS] = {0};
        e.next_page = 0;
        struct sequence s = sequence_new(&e, n + N_DRAFTS);
        forward(&e, &(struct part){&s, c->seq, n}, 1);
        CHECK_INT(json_array_size(c->drafts), n_positions);
        for (int p = c->n_prompt - 1; p < n - 2; p++) {
            // True hidden states up to slot p (the first call fills the prompt's), then its own.
            int from = p == c->n_prompt - 1 ? 0 : p;
            int32_t d[N_DRAFTS];
            d[0] = draft(&e, &s, from, c->seq + from + 1, p + 1 - from,
                         (struct hidden_ref){HIDDEN_MAIN, from});
            if (from == 0) {
                CHECK_OK(engine_read_logits(e.engine, true, 0, logits));
                worst =
                    fmax(worst,
                         largest_difference(logits, golden_tensor(c->name, "mtp_logits_first"), V));
            }
            for (int k = 1; k < N_DRAFTS; k++)
                d[k] = draft(&e, &s, p + k, &d[k - 1], 1,
                             (struct hidden_ref){HIDDEN_DRAFT, k == 1 ? p - from : 0});
            const json_t *want = json_array_get(c->drafts, (size_t)(p - c->n_prompt + 1));
            for (int k = 0; k < N_DRAFTS; k++)
                CHECK_INT(d[k], json_integer_value(json_array_get(want, (size_t)k)));
            int good = 0;
            while (good < N_DRAFTS && p + 2 + good < n && d[good] == c->seq[p + 2 + good])
                good++;
            for (int k = 0; k < N_DRAFTS; k++)
                accepted[k] += MIN(good, k + 1);
        }
        for (int k = 0; k < N_DRAFTS; k++)
            CHECK_NEAR(accepted[k] / n_positions, c->mean_accepted[k], 1e-9);
    }
    printf("largest difference of an MTP logit: %.2e\n", worst);
    CHECK_NEAR(worst, 0, 5e-3);
    free(logits);
    bench_close(&e);
}

/* ---- one text, whatever the path ------------------------------------------------------------- */

static const struct golden_case *longest(void)
{
    int best = 0;
    for (int i = 1; i < n_cases; i++)
        if (cases[i].n_prompt > cases[best].n_prompt)
            best = i;
    return &cases[best];
}

static void chunks_threads_and_decode_agree(void)
{
    const struct golden_case *c = longest();
    const int sizes[] = {16, 100, 63, 1};
    struct trace whole = trace_chunked(weights, 1, c->seq, c->n_prompt, c->n_prompt);
    for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
        struct trace t = trace_chunked(weights, 2, c->seq, c->n_prompt, sizes[i]);
        CHECK(same(&whole, &t));
        free(t.values);
    }
    for (int n_threads = 2; n_threads <= 5; n_threads += 3) {
        struct trace t = trace_chunked(weights, n_threads, c->seq, c->n_prompt, c->n_prompt);
        CHECK(same(&whole, &t));
        free(t.values);
    }
    free(whole.values);
}

static void batch_of_many_equals_alone(void)
{
    struct bench e = bench_open(weights, 2);
    struct sequence s[MAX_SEQS] = {0};
    struct trace t[MAX_SEQS] = {0};
    struct part parts[MAX_SEQS] = {0};
    int at = 0, n_parts = 0, n_rows = 0;
    for (int i = 0; i < n_cases; i++)
        if (n_rows + cases[i].n_prompt <= MAX_ROWS) {
            s[n_parts] = sequence_new(&e, cases[i].n_prompt + 3);
            parts[n_parts] = (struct part){&s[n_parts], cases[i].seq, cases[i].n_prompt};
            t[n_parts] = trace_new(weights, cases[i].n_prompt + 3);
            n_rows += cases[i].n_prompt;
            n_parts++;
        }
    CHECK(n_parts > 8);
    // The prompts together, then windows of three rows each as one verification step.
    forward(&e, parts, n_parts);
    for (int i = 0; i < n_parts; at += parts[i++].n)
        trace_rows(&t[i], &e, &s[i], at, 0, parts[i].n);
    for (int i = 0; i < n_parts; i++) {
        parts[i].token += parts[i].n;
        parts[i].n = 3;
    }
    forward(&e, parts, n_parts);
    for (int i = 0; i < n_parts; i++)
        trace_rows(&t[i], &e, &s[i], 3 * i, s[i].n - 3, 3);
    // Alone: the prompt, then one token at a time.
    for (int i = 0; i < n_parts; i++) {
        int n = s[i].n;
        const int32_t *token = parts[i].token - (n - 3);
        struct bench f = bench_open(weights, 1);
        struct sequence alone = sequence_new(&f, n);
        struct trace u = trace_new(weights, n);
        forward(&f, &(struct part){&alone, token, n - 3}, 1);
        trace_rows(&u, &f, &alone, 0, 0, n - 3);
        for (int k = n - 3; k < n; k++) {
            forward(&f, &(struct part){&alone, token + k, 1}, 1);
            trace_rows(&u, &f, &alone, 0, k, 1);
        }
        CHECK(same(&t[i], &u));
        free(u.values);
        free(t[i].values);
        bench_close(&f);
    }
    bench_close(&e);
}

/* Drafts of several sequences in one call, from every kind of source, equal those made alone. */
static void drafts_do_not_depend_on_the_batch(void)
{
    struct bench e = bench_open(weights, 2);
    int H = weights->config.hidden, V = weights->config.vocab;
    float *hidden = calloc((size_t)H, sizeof(float)), *alone = calloc((size_t)V, sizeof(float)),
          *together = calloc((size_t)V, sizeof(float));
    REQUIRE(hidden && alone && together);
    struct sequence a = sequence_new(&e, 200), b = sequence_new(&e, 200);
    const struct golden_case *x = &cases[0], *y = &cases[1];
    struct part parts[] = {{&a, x->seq, x->n_prompt}, {&b, y->seq, y->n_prompt}};
    forward(&e, parts, 2);
    // Alone, hidden states straight from the forward ..
    int32_t want =
        draft(&e, &b, 0, y->seq + 1, y->n_prompt, (struct hidden_ref){HIDDEN_MAIN, x->n_prompt});
    CHECK_OK(engine_read_logits(e.engine, true, 0, alone));
    // .. and with the other sequence before it, the last one imported.
    static struct arrays arrays;
    struct hidden_ref ref[MAX_ROWS];
    CHECK_OK(engine_export_hidden(e.engine, x->n_prompt + y->n_prompt - 1, hidden));
    CHECK_OK(engine_import_hidden(e.engine, 1, hidden));
    a.n = b.n = 0;
    parts[0].token++;
    parts[1].token++;
    struct batch batch = batch_make(&arrays, parts, 2);
    for (int i = 0; i < batch.n_rows; i++)
        ref[i] = (struct hidden_ref){HIDDEN_MAIN, i};
    ref[batch.n_rows - 1] = (struct hidden_ref){HIDDEN_IMPORT, 1};
    arrays.logit_row[0] = x->n_prompt - 1;
    arrays.logit_row[1] = batch.n_rows - 1;
    batch.n_logits = 2;
    int32_t got[2];
    CHECK_OK(engine_draft(e.engine, &batch, ref, got));
    CHECK_INT(got[1], want);
    CHECK_OK(engine_read_logits(e.engine, true, 1, together));
    CHECK(memcmp(alone, together, sizeof(float) * (size_t)V) == 0);
    // Rows that draft from each other's places: all are read before any is replaced.
    float *u0 = calloc((size_t)V, sizeof(float)), *u1 = calloc((size_t)V, sizeof(float));
    REQUIRE(u0 && u1);
    int32_t next[2] = {got[0], got[1]}, id;
    a.n = x->n_prompt;
    b.n = y->n_prompt;
    struct part steps[] = {{&a, &next[0], 1}, {&b, &next[1], 1}};
    batch = batch_make(&arrays, steps, 2);
    ref[0] = (struct hidden_ref){HIDDEN_DRAFT, x->n_prompt + y->n_prompt - 1};
    ref[1] = (struct hidden_ref){HIDDEN_DRAFT, x->n_prompt - 1};
    CHECK_OK(engine_draft(e.engine, &batch, ref, got));
    CHECK_OK(engine_read_logits(e.engine, true, 1, u1));
    // The same once more: batch of two again from prompts, then b's step alone.
    a.n = b.n = 0;
    batch = batch_make(&arrays, parts, 2);
    for (int i = 0; i < batch.n_rows; i++)
        ref[i] = (struct hidden_ref){HIDDEN_MAIN, i};
    CHECK_OK(engine_draft(e.engine, &batch, ref, NULL));
    b.n = y->n_prompt;
    batch = batch_make(&arrays, &steps[1], 1);
    ref[0] = (struct hidden_ref){HIDDEN_DRAFT, x->n_prompt - 1};
    CHECK_OK(engine_draft(e.engine, &batch, ref, &id));
    CHECK_INT(id, got[1]);
    CHECK_OK(engine_read_logits(e.engine, true, 0, u0));
    CHECK(memcmp(u0, u1, sizeof(float) * (size_t)V) == 0);
    free(hidden);
    free(alone);
    free(together);
    free(u0);
    free(u1);
    bench_close(&e);
}

/* A draft is the best of what its mask leaves, whatever the others' masks are. */
static void drafts_keep_to_their_masks(void)
{
    struct bench e = bench_open(weights, 2);
    int V = weights->config.vocab;
    float *logits = calloc((size_t)V, sizeof(float));
    uint32_t *mask = calloc((size_t)(V + 31) / 32, sizeof(*mask));
    REQUIRE(logits && mask);
    struct sequence a = sequence_new(&e, 200), b = sequence_new(&e, 200);
    const struct golden_case *x = &cases[0], *y = &cases[1];
    struct part parts[] = {{&a, x->seq, x->n_prompt}, {&b, y->seq, y->n_prompt}};
    forward(&e, parts, 2);
    static struct arrays arrays;
    struct hidden_ref ref[MAX_ROWS];
    a.n = b.n = 0;
    struct batch batch = batch_make(&arrays, parts, 2);
    for (int i = 0; i < batch.n_rows; i++)
        ref[i] = (struct hidden_ref){HIDDEN_MAIN, i};
    arrays.logit_row[0] = x->n_prompt - 1;
    arrays.logit_row[1] = batch.n_rows - 1;
    batch.n_logits = 2;
    int32_t any[2], got[2];
    CHECK_OK(engine_draft(e.engine, &batch, ref, any));
    CHECK_OK(engine_read_logits(e.engine, true, 1, logits));
    int32_t best = -1;
    for (int32_t id = 0; id < weights->config.n_token_ids; id++)
        if (id % 3 && id != any[1]) {
            mask[id / 32] |= 1u << id % 32;
            best = best < 0 || logits[id] > logits[best] ? id : best;
        }
    batch.allowed = (const uint32_t *const[]){NULL, mask};
    CHECK_OK(engine_draft(e.engine, &batch, ref, got));
    CHECK_INT(got[0], any[0]);
    CHECK_INT(got[1], best);
    free(logits);
    free(mask);
    bench_close(&e);
}

/* Odd numbers of heads, experts and everything else. */
static void other_shapes_agree(void)
{
    struct model_config m = weights->config;
    m.hidden = 84;
    m.intermediate = 100;
    m.moe_intermediate = 36;
    m.n_layers = 2;
    m.n_heads = 5;
    m.q_lora_rank = 50;
    m.n_experts = 13;
    m.n_experts_per_token = 3;
    m.vocab = 203;
    m.n_token_ids = 199;
    OWNED(weights) w = NULL;
    CHECK_OK(weights_open(&m, &(struct weights_source){.dummy_seed = 7}, &w));
    REQUIRE(w);
    int32_t token[150];
    for (int i = 0; i < 150; i++)
        token[i] = (i * 37 + 11) % m.n_token_ids;
    struct trace whole = trace_chunked(w, 1, token, 150, 150);
    const int sizes[] = {1, 7, 64};
    for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
        struct trace t = trace_chunked(w, 3, token, 150, sizes[i]);
        CHECK(same(&whole, &t));
        free(t.values);
    }
    free(whole.values);
}

/* ---- refusals -------------------------------------------------------------------------------- */

static void bad_batches_are_refused(void)
{
    struct bench e = bench_open(weights, 1);
    struct sequence s = sequence_new(&e, 70);
    static struct arrays a;
    int32_t token[70] = {0};
    const struct part part = {&s, token, 70};
    struct batch good = batch_make(&a, &part, 1), b;
    struct hidden_ref ref[70] = {{HIDDEN_MAIN, 0}};
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        b = good = batch_make(&a, &part, 1);                                                       \
        change;                                                                                    \
        CHECK_INT(engine_forward(e.engine, &b), ERR_INVALID);                                      \
    } while (0)
    REFUSED(a.token[3] = -1);
    REFUSED(a.token[3] = weights->config.vocab);
    REFUSED(a.position[0] = -1);
    REFUSED(a.block_table[1] = -1);
    REFUSED(a.block_table[1] = MAX_SEQS * 10);
    REFUSED(a.ctx_len[0] = 69);
    REFUSED(a.ctx_len[0] = MAX_PAGES * KV_PAGE_TOKENS + 1);
    REFUSED(b.max_pages = 1);
    REFUSED(a.seq_start[1] = 69);
    REFUSED(a.seq_start[0] = 1);
    REFUSED(b.n_rows = MAX_ROWS + 1);
    REFUSED(b.n_seqs = MAX_SEQS + 1);
    REFUSED(b.n_logits = MAX_ROWS + 1);
    REFUSED(a.logit_row[0] = 70);
    REFUSED(a.logit_row[5] = 4);
    // Nothing ran yet, so there is no hidden state and there are no logits.
    good = batch_make(&a, &part, 1);
    CHECK_INT(engine_draft(e.engine, &good, ref, NULL), ERR_INVALID);
    int32_t id, idx = 0;
    struct sample_row row = {.n_logprobs = -1};
    CHECK_INT(engine_sample(e.engine, 1, &idx, &row, 0, &id, NULL, NULL, NULL), ERR_INVALID);
    float value[4];
    CHECK_INT(engine_export_hidden(e.engine, 0, value), ERR_INVALID);
    CHECK_INT(engine_import_hidden(e.engine, 2, value), ERR_INVALID);
    CHECK_INT(engine_read_logits(e.engine, false, 0, value), ERR_INVALID);
    // An empty batch is nothing to do.
    CHECK_OK(engine_forward(e.engine, &(struct batch){.seq_start = a.seq_start}));
    bench_close(&e);

    struct device elsewhere = {0};
    struct engine_config c = {.device = &elsewhere,
                              .n_threads = 1,
                              .max_rows = 1,
                              .max_seqs = 1,
                              .max_logits = 1,
                              .max_ctx = 64};
    struct kv_pool_config p = {.n_pages = 1, .n_layers = 3, .kv_width = KV_WIDTH, .dtype_bytes = 4};
    OWNED(kv_pool) pool = NULL;
    OWNED(engine) engine = NULL;
    CHECK_OK(kv_pool_create(&p, &pool));
    CHECK_INT(engine_create(&c, weights, pool, &engine), ERR_INVALID);
    c.device = NULL;
    CHECK_OK(engine_create(&c, weights, pool, &engine)); // without the MTP layer's pages
    REQUIRE(engine);
    good = batch_make(&a, &(struct part){&s, token, 1}, 1);
    CHECK_INT(engine_draft(engine, &good, ref, NULL), ERR_INVALID);
}

/* Draws by index, in any order, with logprobs: the same as each alone. */
static void draws_are_by_row(void)
{
    struct bench e = bench_open(weights, 2);
    const struct golden_case *c = longest();
    struct sequence s = sequence_new(&e, c->n_prompt);
    forward(&e, &(struct part){&s, c->seq, c->n_prompt}, 1);
    enum { N = 9, TOP = 3 };
    int32_t idx[N], id[N], top_id[N * TOP];
    float logprob[N], top_logprob[N * TOP];
    struct sample_row rows[N];
    for (int i = 0; i < N; i++) {
        idx[i] = (i * 7 + 3) % c->n_prompt;
        rows[i] = (struct sample_row){.seed = 5,
                                      .position = idx[i],
                                      .temperature = 1.5f,
                                      .top_p = 1,
                                      .repetition = 1,
                                      .n_logprobs = i % 2 ? TOP : -1};
    }
    CHECK_OK(engine_sample(e.engine, N, idx, rows, TOP, id, logprob, top_id, top_logprob));
    struct sample_row far = rows[0];
    far.n_ahead = SAMPLE_MAX_AHEAD + 1;
    CHECK_INT(engine_sample(e.engine, 1, idx, &far, 0, id, NULL, NULL, NULL), ERR_INVALID);
    for (int i = 0; i < N; i++) {
        int32_t one, tops[TOP];
        float lp, top_lp[TOP];
        CHECK_OK(engine_sample(e.engine, 1, &idx[i], &rows[i], TOP, &one, &lp, tops, top_lp));
        CHECK_INT(id[i], one);
        if (i % 2) {
            CHECK(memcmp(&logprob[i], &lp, sizeof(lp)) == 0);
            CHECK(memcmp(top_id + i * TOP, tops, sizeof(tops)) == 0);
            CHECK(memcmp(top_logprob + i * TOP, top_lp, sizeof(top_lp)) == 0);
            CHECK(top_logprob[i * TOP] >= logprob[i] && logprob[i] <= 0);
        }
    }
    bench_close(&e);
}

int main(void)
{
    const char *dir = getenv("BATON_DEMO_DIR");
    REQUIRE(dir);
    struct model_config m;
    CHECK_OK(model_config_load(dir, &m));
    REQUIRE(!check_failures);
    CHECK_OK(weights_load(dir, &m, 2, NULL, NULL, &weights));
    REQUIRE(weights);
    goldens_open();

    RUN(logits_and_greedy_text);
    RUN(drafts_and_acceptance);
    RUN(chunks_threads_and_decode_agree);
    RUN(batch_of_many_equals_alone);
    RUN(drafts_do_not_depend_on_the_batch);
    RUN(drafts_keep_to_their_masks);
    RUN(other_shapes_agree);
    RUN(bad_batches_are_refused);
    RUN(draws_are_by_row);

    for (int i = 0; i < n_cases; i++)
        free(cases[i].seq);
    json_decref(golden);
    json_decref(tensor_header);
    free(tensors);
    weights_destroy(weights);
    return check_done();
}
