/* engine_cuda_test.c: the demo model on the GPU against its goldens, in bf16's accuracy. Skips (77)
 * where there is no device.
 *
 *   engine_cuda_test [cuda:N]
 *   engine_cuda_test --short    two short cases, four tokens each: every kernel runs, for tools
 * that slow a GPU down a hundred times (tests/device/sanitize)
 */
#include "common/engine/engine.h"

#include <cuda_runtime_api.h>
#include <string.h>

#include "check.h"
#include "goldens.h"

#define MAX_ROWS  1024
#define MAX_SEQS  200 /* more than attention's kernel for many takes from */
#define MAX_PAGES 16
#define N_PAGES   (16 * MAX_PAGES)
#define MAX_TIES  8
#define MARGIN    0.3 /* smaller gaps between the two best logits are bf16 noise */
/* Of a logit, against fp32. Where two experts are closer than the noise of bf16, either is right: a
 * case may be near what the model says with the other one of one such tie. (In json, keys that are
 * bf16 in the pages and nothing else rounded turn a tie of 9e-5, worth 0.18; transformers in bf16
 * turns one in long, worth 0.79.) */
#define TOLERANCE 0.15

static struct weights *weights;
static struct kv_pool *pool;
static struct engine *engine;
static struct device *device;
static bool is_short;

/* Sequence q has pages q * MAX_PAGES .. in descending order. */
struct arrays {
    int32_t token[MAX_ROWS], position[MAX_ROWS], logit_row[MAX_ROWS];
    int32_t seq_start[MAX_SEQS + 1], ctx_len[MAX_SEQS], block_table[MAX_SEQS * MAX_PAGES];
    struct hidden_ref hidden[MAX_ROWS];
    struct batch b;
};
static struct arrays a;

static void batch_clear(void)
{
    memset(&a, 0, sizeof(a));
    a.b = (struct batch){.max_pages = MAX_PAGES,
                         .token = a.token,
                         .position = a.position,
                         .seq_start = a.seq_start,
                         .ctx_len = a.ctx_len,
                         .block_table = a.block_table,
                         .logit_row = a.logit_row};
}

/* Adds rows [slot, slot + n) of sequence q; all of them want logits. */
static void batch_add(int q, int slot, const int32_t *token, int n, struct hidden_ref first)
{
    for (int i = 0; i < n; i++) {
        int r = a.b.n_rows++;
        a.token[r] = token[i];
        a.position[r] = slot + i;
        a.logit_row[a.b.n_logits++] = r;
        a.hidden[r] = (struct hidden_ref){first.source, first.idx + i};
    }
    int s = a.b.n_seqs++;
    a.seq_start[s + 1] = a.b.n_rows;
    a.ctx_len[s] = slot + n;
    for (int p = 0; p < MAX_PAGES; p++)
        a.block_table[s * MAX_PAGES + p] = q * MAX_PAGES + MAX_PAGES - 1 - p;
}

static void forward_one(int q, int slot, const int32_t *token, int n)
{
    batch_clear();
    batch_add(q, slot, token, n, (struct hidden_ref){0});
    CHECK_OK(engine_forward(engine, &a.b));
}

static int32_t greedy_id(int logit)
{
    int32_t id = -1, idx = logit;
    struct sample_row row = {.top_p = 1, .repetition = 1, .n_logprobs = -1};
    CHECK_OK(engine_sample(engine, 1, &idx, &row, 0, &id, NULL, NULL, NULL));
    return id;
}

static void logits_near_the_goldens(void)
{
    int V = weights->config.vocab;
    float *logits = calloc((size_t)V, sizeof(float));
    REQUIRE(logits);
    double worst = 0;
    for (int i = 0; i < n_cases; i++) {
        const struct golden_case *c = &cases[i];
        REQUIRE(c->n_ties < MAX_TIES);
        const float *want[1 + MAX_TIES] = {golden_tensor(c->name, "logits_last4")};
        for (int t = 0; t < c->n_ties; t++) {
            char what[32];
            snprintf(what, sizeof(what), "logits_last4_tie%d", t);
            want[1 + t] = golden_tensor(c->name, what);
        }
        for (int chunk = 100; chunk <= MAX_ROWS; chunk += MAX_ROWS - 100) {
            double d[1 + MAX_TIES] = {0};
            int last = 0, best = 0;
            for (int at = 0; at < c->n_prompt; at += chunk) {
                last = at;
                forward_one(0, at, c->seq + at, MIN(chunk, c->n_prompt - at));
            }
            for (int k = 0; k < 4; k++) {
                int row = c->n_prompt - 4 + k - last;
                if (row < 0)
                    continue;
                CHECK_OK(engine_read_logits(engine, false, row, logits));
                for (int w = 0; w <= c->n_ties; w++)
                    d[w] = fmax(d[w], largest_difference(logits, want[w] + k * V, V));
            }
            for (int w = 1; w <= c->n_ties; w++)
                best = d[w] < d[best] ? w : best;
            if (best || d[best] > TOLERANCE)
                printf("%s, chunks of %d: %.3f from the goldens, %.3f with the other expert of tie "
                       "%d\n",
                       c->name, chunk, d[0], d[best], best - 1);
            worst = fmax(worst, d[best]);
        }
    }
    printf("largest difference of a logit: %.3f\n", worst);
    CHECK_NEAR(worst, 0, TOLERANCE);
    free(logits);
}

/* One token at a time, all cases in one batch: decode over growing sequences of different lengths.
 */
static void greedy_text_is_the_goldens(void)
{
    int n_compared = 0, n_wrong = 0, alive[16], at[16];
    for (int i = 0; i < n_cases; i++) {
        forward_one(i, 0, cases[i].seq, cases[i].n_prompt);
        int32_t id = greedy_id(cases[i].n_prompt - 1);
        at[i] = 0;
        alive[i] = id == cases[i].seq[cases[i].n_prompt];
        if (cases[i].margin > MARGIN) {
            CHECK(alive[i]);
            n_compared++;
        }
    }
    for (;;) {
        int who[16];
        batch_clear();
        for (int i = 0; i < n_cases; i++) {
            const struct golden_case *c = &cases[i];
            if (!alive[i] || at[i] + 1 >= c->n_greedy)
                continue;
            who[a.b.n_seqs] = i;
            batch_add(i, c->n_prompt + at[i], c->seq + c->n_prompt + at[i], 1,
                      (struct hidden_ref){0});
        }
        if (a.b.n_seqs == 0)
            break;
        CHECK_OK(engine_forward(engine, &a.b));
        for (int s = 0, n = a.b.n_seqs; s < n; s++) {
            const struct golden_case *c = &cases[who[s]];
            int32_t id = greedy_id(s);
            at[who[s]]++;
            alive[who[s]] = id == c->seq[c->n_prompt + at[who[s]]];
            if (c->margin <= MARGIN)
                continue;
            n_compared++;
            if (!alive[who[s]]) {
                n_wrong++;
                fprintf(stderr, "%s: token %d is %d, want %d\n", c->name, at[who[s]], id,
                        c->seq[c->n_prompt + at[who[s]]]);
            }
        }
    }
    printf("%d tokens compared, %d wrong\n", n_compared, n_wrong);
    CHECK_INT(n_wrong, 0);
    CHECK(n_compared > (is_short ? 4 : 200));
}

/* Windows as verification makes them give what single rows give, up to noise. */
static void windows_agree_with_single_rows(void)
{
    int V = weights->config.vocab, most = 0;
    for (int i = 1; i < n_cases; i++)
        if (cases[i].n_greedy > cases[most].n_greedy)
            most = i;
    const struct golden_case *c = &cases[most];
    float *alone = calloc((size_t)V * 8, sizeof(float)), *window = calloc((size_t)V, sizeof(float));
    REQUIRE(alone && window);
    double worst = 0;
    forward_one(0, 0, c->seq, c->n_prompt);
    for (int n = 2; n <= MIN(8, c->n_greedy - 1); n++) {
        for (int i = 0; i < n; i++) {
            forward_one(0, c->n_prompt + i, c->seq + c->n_prompt + i, 1);
            CHECK_OK(engine_read_logits(engine, false, 0, alone + i * V));
        }
        forward_one(0, c->n_prompt, c->seq + c->n_prompt, n);
        for (int i = 0; i < n; i++) {
            CHECK_OK(engine_read_logits(engine, false, i, window));
            worst = fmax(worst, largest_difference(window, alone + i * V, V));
        }
    }
    printf("largest difference of a window's logit: %.3f\n", worst);
    CHECK_NEAR(worst, 0, TOLERANCE);
    free(alone);
    free(window);
}

/* Many sequences of one row, which share the pages of a few, give what each gives alone, up to
 * noise. */
static void many_agree_with_one(void)
{
    int V = weights->config.vocab;
    float *alone = calloc((size_t)V * 16, sizeof(float)), *many = calloc((size_t)V, sizeof(float));
    REQUIRE(alone && many && n_cases <= 16);
    for (int i = 0; i < n_cases; i++) {
        const struct golden_case *c = &cases[i];
        forward_one(i, 0, c->seq, c->n_prompt);
        forward_one(i, c->n_prompt, c->seq + c->n_prompt, 1);
        CHECK_OK(engine_read_logits(engine, false, 0, alone + i * V));
    }
    batch_clear();
    for (int s = 0; s < MAX_SEQS; s++)
        batch_add(s % n_cases, cases[s % n_cases].n_prompt,
                  cases[s % n_cases].seq + cases[s % n_cases].n_prompt, 1, (struct hidden_ref){0});
    CHECK_OK(engine_forward(engine, &a.b));
    double worst = 0;
    for (int s = 0; s < MAX_SEQS; s++) {
        CHECK_OK(engine_read_logits(engine, false, s, many));
        worst = fmax(worst, largest_difference(many, alone + s % n_cases * V, V));
    }
    printf("largest difference of a logit among %d sequences: %.3f\n", MAX_SEQS, worst);
    CHECK_NEAR(worst, 0, TOLERANCE);
    free(alone);
    free(many);
}

static void drafts_are_the_goldens(void)
{
    int n_drafts = 0, n_same = 0;
    for (int i = 0; i < n_cases; i++) {
        const struct golden_case *c = &cases[i];
        int n = c->n_prompt + c->n_greedy;
        forward_one(0, 0, c->seq, n);
        for (int p = c->n_prompt - 1; p < n - 2; p++) {
            int from = p == c->n_prompt - 1 ? 0 : p, prev_row = p - from;
            int32_t d[N_DRAFTS];
            for (int k = 0; k < N_DRAFTS; k++) {
                batch_clear();
                if (k == 0)
                    batch_add(0, from, c->seq + from + 1, p + 1 - from,
                              (struct hidden_ref){HIDDEN_MAIN, from});
                else
                    batch_add(0, p + k, &d[k - 1], 1,
                              (struct hidden_ref){HIDDEN_DRAFT, k == 1 ? prev_row : 0});
                a.logit_row[0] = a.b.n_rows - 1;
                a.b.n_logits = 1;
                CHECK_OK(engine_draft(engine, &a.b, a.hidden, &d[k]));
            }
            const json_t *want = json_array_get(c->drafts, (size_t)(p - c->n_prompt + 1));
            for (int k = 0; k < N_DRAFTS; k++) {
                n_drafts++;
                n_same += d[k] == json_integer_value(json_array_get(want, (size_t)k));
            }
        }
    }
    printf("%d of %d drafts equal\n", n_same, n_drafts);
    CHECK(n_same >= 0.97 * n_drafts);
}

/* Every second draft of a batch has a mask, and they share two: each is the best of what is left.
 */
static void drafts_keep_to_their_masks(void)
{
    enum { N = 20 };
    int V = weights->config.vocab, n_words = (V + 31) / 32;
    const struct golden_case *c = &cases[0];
    for (int i = 1; i < n_cases && c->n_prompt <= N; i++)
        c = &cases[i];
    float *logits = calloc((size_t)V, sizeof(float));
    uint32_t *mask[2] = {calloc((size_t)n_words, 4), calloc((size_t)n_words, 4)};
    const uint32_t *allowed[N];
    int32_t any[N], got[N];
    REQUIRE(logits && mask[0] && mask[1] && c->n_prompt > N);
    for (int32_t id = 0; id < V; id++)
        mask[id % 2][id / 32] |= 1u << id % 32;
    forward_one(0, 0, c->seq, c->n_prompt);
    batch_clear();
    batch_add(0, 0, c->seq + 1, N, (struct hidden_ref){HIDDEN_MAIN, 0});
    CHECK_OK(engine_draft(engine, &a.b, a.hidden, any));
    for (int i = 0; i < N; i++)
        allowed[i] = i % 2 ? NULL : mask[i / 2 % 2];
    a.b.allowed = allowed;
    CHECK_OK(engine_draft(engine, &a.b, a.hidden, got));
    for (int i = 0; i < N; i++) {
        int32_t best = -1;
        CHECK_OK(engine_read_logits(engine, true, i, logits));
        for (int32_t id = 0; id < weights->config.n_token_ids; id++)
            if ((!allowed[i] || allowed[i][id / 32] >> id % 32 & 1) &&
                (best < 0 || logits[id] > logits[best]))
                best = id;
        CHECK_INT(got[i], best);
        CHECK(allowed[i] || got[i] == any[i]);
    }
    free(logits);
    free(mask[0]);
    free(mask[1]);
}

struct other_work {
    int n_calls;
    const float *hidden;
};

/* What a worker does beside a pass: a state comes in, pages are summed. */
static void other_work(void *user, uint64_t wait_us)
{
    struct other_work *o = user;
    uint64_t sum = 0;
    CHECK_INT(wait_us, 0);
    if (o->n_calls++ % 8)
        return;
    CHECK_OK(engine_import_hidden(engine, 1, o->hidden));
    CHECK_OK(kv_pool_checksum(pool, (uint32_t[]){0}, 1, 0, &sum));
}

/* Passes give the same with somebody using their thread, through a capture and its replays. */
static void passes_lend_their_thread(void)
{
    int V = weights->config.vocab, H = weights->config.hidden, n_calls = 0;
    const struct golden_case *c = &cases[0];
    float *want = calloc((size_t)V, sizeof(float)), *got = calloc((size_t)V, sizeof(float));
    float *hidden = calloc((size_t)H, sizeof(float));
    REQUIRE(want && got && hidden);
    forward_one(0, 0, c->seq, c->n_prompt);
    CHECK_OK(engine_read_logits(engine, false, c->n_prompt - 1, want));
    struct other_work o = {.hidden = hidden};
    engine_set_meanwhile(engine, other_work, &o);
    for (int i = 0; i < 4; i++) {
        forward_one(0, 0, c->seq, c->n_prompt);
        CHECK_OK(engine_read_logits(engine, false, c->n_prompt - 1, got));
        CHECK(!memcmp(want, got, sizeof(float) * (size_t)V));
        int32_t id;
        batch_clear();
        batch_add(0, c->n_prompt - 1, c->seq + c->n_prompt, 1,
                  (struct hidden_ref){HIDDEN_MAIN, c->n_prompt - 1});
        CHECK_OK(engine_draft(engine, &a.b, a.hidden, &id));
    }
    n_calls = o.n_calls;
    engine_set_meanwhile(engine, NULL, NULL);
    printf("%d calls beside 8 passes\n", n_calls);
    CHECK(n_calls > 8);
    free(want);
    free(got);
    free(hidden);
}

/* Rows with everything that a row can have, more of them than one round on the device takes: the
 * same ids and log-probabilities as the reference makes of the same logits. */
static void draws_are_the_references(void)
{
    enum { N = 256, TOP = 5 };
    int V = weights->config.vocab, n_wrong = 0, n_rows = MIN(cases[0].n_prompt, N);
    double worst = 0;
    float *logits = calloc((size_t)V, sizeof(float)), *work = calloc((size_t)V * 2, sizeof(float));
    struct sample_seen *seen = calloc((size_t)V, sizeof(*seen));
    uint32_t *allowed = calloc((size_t)V, sizeof(uint32_t));
    REQUIRE(logits && work && seen && allowed);
    for (int i = 0; i < V; i++) {
        seen[i] = (struct sample_seen){V - 1 - i, i % 3};
        allowed[i] = 0xf0f3u * (uint32_t)(i + 1);
    }
    const int32_t banned[] = {3, 5}, bias_id[] = {7, 9, 7};
    const float bias_value[] = {2, 30, 1};
    static struct sample_row rows[N];
    static int32_t idx[N], id[N], top_id[N * TOP];
    static float logprob[N], top_logprob[N * TOP];
    for (int i = 0; i < N; i++) {
        idx[i] = (i * 7) % n_rows;
        rows[i] = (struct sample_row){.seed = (uint64_t)i * 77,
                                      .position = i,
                                      .temperature = i % 5 ? 1.3f : 0,
                                      .top_p = i % 3 ? 1 : 0.8f,
                                      .top_k = i % 4 ? 0 : 50,
                                      .min_p = i % 7 ? 0 : 0.05f,
                                      .presence = 0.5f,
                                      .frequency = 0.25f,
                                      .repetition = 1.1f,
                                      .banned = banned,
                                      .n_banned = i % 3,
                                      .bias_id = bias_id,
                                      .bias_value = bias_value,
                                      .n_bias = i % 4,
                                      .allowed = i % 6 ? NULL : allowed,
                                      .seen = seen,
                                      .n_seen = i % 2 ? V - i : 0,
                                      .ahead = bias_id,
                                      .n_ahead = i % 3,
                                      .n_logprobs = i % 8 ? TOP : -1};
    }
    forward_one(0, 0, cases[0].seq, n_rows);
    CHECK_OK(engine_sample(engine, N, idx, rows, TOP, id, logprob, top_id, top_logprob));
    for (int i = 0; i < N; i++) {
        int32_t want, want_top[TOP];
        float want_logprob, want_top_logprob[TOP];
        CHECK_OK(engine_read_logits(engine, false, idx[i], logits));
        sample_ref(&(struct sample_args){.logits = logits,
                                         .rows = &rows[i],
                                         .id = &want,
                                         .logprob = &want_logprob,
                                         .top_id = want_top,
                                         .top_logprob = want_top_logprob,
                                         .work = work,
                                         .T = 1,
                                         .V = V,
                                         .n_valid = weights->config.n_token_ids,
                                         .max_top = TOP},
                   NULL);
        n_wrong += id[i] != want;
        worst = fmax(worst, fabs((double)logprob[i] - (double)want_logprob));
        for (int t = 0; t < TOP && rows[i].n_logprobs > 0; t++) {
            n_wrong += top_id[i * TOP + t] != want_top[t];
            worst =
                fmax(worst, fabs((double)top_logprob[i * TOP + t] - (double)want_top_logprob[t]));
        }
    }
    printf("%d draws, logprobs within %.2g\n", N, worst);
    CHECK_INT(n_wrong, 0);
    CHECK_NEAR(worst, 0, 1e-4);
    void *all[] = {logits, work, seen, allowed};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
}

static void hidden_states_travel(void)
{
    int H = weights->config.hidden;
    float *out = calloc((size_t)H, sizeof(float));
    REQUIRE(out);
    const struct golden_case *c = &cases[0];
    forward_one(0, 0, c->seq, c->n_prompt);
    int last = c->n_prompt - 1;
    CHECK_OK(engine_export_hidden(engine, last, out));
    CHECK_OK(engine_import_hidden(engine, 1, out));
    int32_t direct, imported;
    for (int way = 0; way < 2; way++) {
        batch_clear();
        batch_add(0, last, c->seq + c->n_prompt, 1,
                  way ? (struct hidden_ref){HIDDEN_IMPORT, 1}
                      : (struct hidden_ref){HIDDEN_MAIN, last});
        CHECK_OK(engine_draft(engine, &a.b, a.hidden, way ? &imported : &direct));
    }
    CHECK_INT(imported, direct);
    free(out);
}

/* Last, since it writes over pages. */
static void page_checksums_are_the_hosts(void)
{
    struct kv_pool_config c = *kv_pool_get_config(pool);
    OWNED(kv_pool) host = NULL;
    c.device = NULL;
    c.n_pages = 3;
    CHECK_OK(kv_pool_create(&c, &host));
    uint64_t n = kv_pool_page_bytes(host), want = 5, got = 5;
    uint8_t *bytes = kv_pool_base(host);
    for (uint64_t i = 0; i < 3 * n; i++)
        bytes[i] = (uint8_t)(i * 2654435761u >> 13);
    for (uint32_t i = 0; i < 3; i++)
        CHECK_OK(device_put(device, kv_pool_page(pool, 7 - i), kv_pool_page(host, i), n));
    CHECK_OK(kv_pool_checksum(host, (uint32_t[]){0, 1, 2}, 3, 4, &want));
    CHECK_OK(kv_pool_checksum(pool, (uint32_t[]){7, 6, 5}, 3, 4, &got));
    CHECK(got == want);
}

/* Memory that was named by its descriptor, and pages copied out of it. */
static void memory_is_shared(void)
{
    struct device_memory one = {0}, two = {0};
    uint8_t in[2][4096], out[4096];
    for (int i = 0; i < 4096; i++) {
        in[0][i] = (uint8_t)i;
        in[1][i] = (uint8_t)(i * 7 + 1);
    }
    CHECK_OK(device_alloc(device, sizeof(in), &one));
    CHECK_OK(device_import(device, one.fd, sizeof(in), &two));
    CHECK(one.base != two.base);
    CHECK_OK(device_put(device, one.base, in, sizeof(in)));
    CHECK_OK(
        device_copy_pages(device, one.base, (uint32_t[]){0}, two.base, (uint32_t[]){1}, 1, 4096));
    CHECK(cudaMemcpy(out, two.base, 4096, cudaMemcpyDeviceToHost) == cudaSuccess);
    CHECK(!memcmp(out, in[1], 4096));
    device_release(device, &one); // the mapping stays good
    CHECK(cudaMemcpy(out, (char *)two.base + 4096, 4096, cudaMemcpyDeviceToHost) == cudaSuccess);
    CHECK(!memcmp(out, in[1], 4096));
    device_release(device, &two);
    CHECK_INT(device_alloc(device, 1ull << 45, &one), ERR_NOMEM);
}

/* Keeps two cases, one long enough for the expanded form of attention, each with the first tokens
 * of its text. */
static void shorten(void)
{
    int n = 0;
    for (int i = 0; i < n_cases && n < 2; i++)
        if (n == 0 ? cases[i].n_prompt >= 20 && cases[i].n_prompt <= 40 : cases[i].n_prompt < 16)
            cases[n++] = cases[i];
    REQUIRE(n == 2);
    n_cases = n;
    for (int i = 0; i < n_cases; i++)
        cases[i].n_greedy = MIN(cases[i].n_greedy, 4);
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    struct model_config model;
    const char *dir = getenv("BATON_DEMO_DIR");
    REQUIRE(dir);
    goldens_open();
    if (argc > 1 && !strcmp(argv[1], "--short")) {
        is_short = true;
        argc = 1;
        shorten();
    }
    CHECK_OK(model_config_load(dir, &model));
    CHECK_OK(device_open(argc > 1 ? argv[1] : "cuda:0", &device));
    REQUIRE(device);
    struct weights_source source = {.dir = dir, .n_threads = 2, .device = device};
    CHECK_OK(weights_open(&model, &source, &weights));
    REQUIRE(weights);
    struct kv_pool_config p = {.n_pages = N_PAGES,
                               .n_layers = (uint32_t)(model.n_layers + model.n_mtp_layers),
                               .kv_width = KV_WIDTH,
                               .dtype_bytes = 2,
                               .device = device};
    struct engine_config e = {.device = device,
                              .n_threads = 4,
                              .max_rows = MAX_ROWS,
                              .max_seqs = MAX_SEQS,
                              .max_logits = MAX_ROWS,
                              .max_imports = 2,
                              .max_ctx = MAX_PAGES * KV_PAGE_TOKENS,
                              .max_graph_rows = 512};
    CHECK_OK(kv_pool_create(&p, &pool));
    REQUIRE(pool);
    // NaN: unwritten slots must not count.
    REQUIRE(cudaMemset(kv_pool_base(pool), 0xff, N_PAGES * kv_pool_page_bytes(pool)) ==
            cudaSuccess);
    CHECK_OK(engine_create(&e, weights, pool, &engine));
    REQUIRE(engine);
    RUN(logits_near_the_goldens);
    RUN(greedy_text_is_the_goldens);
    RUN(windows_agree_with_single_rows);
    RUN(many_agree_with_one);
    RUN(drafts_are_the_goldens);
    RUN(drafts_keep_to_their_masks);
    RUN(passes_lend_their_thread);
    RUN(draws_are_the_references);
    RUN(hidden_states_travel);
    RUN(page_checksums_are_the_hosts);
    RUN(memory_is_shared);
    engine_destroy(engine);
    kv_pool_destroy(pool);
    weights_destroy(weights);
    device_destroy(device);
    return check_done();
}
