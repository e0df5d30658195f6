/* engine_oracle.c: an engine against transformers, on the checkpoint of real_geometry.py.
 *
 *   engine_oracle CHECKPOINT_DIR REFERENCE_DIR [cpu | cuda:N]
 *
 * Computes the same rows on every path there is (prefill, chunks, decode, windows, drafts) and
 * prints one line a path: largest and relative error (norm of the error over norm of the logits)
 * and the error that half of the rows stay below. Beside it is what transformers in bf16 has on the
 * very same rows. The CPU engine must agree in fp32's accuracy; the GPU's errors may be 1.5 times
 * those of transformers in bf16. Only rows with firm routing count (real_geometry.py, `margin`).
 */
#include <stdarg.h>

#include "check.h"
#include "common/base/json.h"
#include "common/engine/engine.h"
#include "common/engine/safetensors.h"
#ifdef BATON_CUDA
#include <cuda_runtime_api.h>
#endif

#define MAX_ROWS      4096
#define MAX_SEQS      64
#define MAX_LOGITS    1024
#define TAIL          8    /* tokens left for decode after a prefill */
#define CHUNK         100  /* tokens */
#define BF16_ALLOWED  1.5  /* times the error of transformers in bf16 */
#define FP32_RELATIVE 2e-3 /* one token of thousands sits on the fence between two experts */
#define FP32_MEDIAN   1e-5
#define FP32_LSE      1e-2
#define FP32_GAP      1e-2 /* of the two best logits: closer ones may swap in fp32 */
#define OTHER_PAST    1000 /* decided rows, one of which may have such a past, see path_end */
#define SIGMAS        6    /* a gap wider than so many standard errors is decided in bf16 too */

/* One kind of row, as real_geometry.py describes it. */
struct kind {
    const char *name;
    int n;
    float *logits, *bf16; /* [n, n_columns] */
    float *best, *gap, *lse, *margin;
    /* of transformers in bf16, firm rows only */
    double relative, median, rms, largest;
};

struct errors {
    double error2, want2, largest;
    double *row; /* relative error of each row */
    int n;
};

/* What one path has shown so far. */
struct tally {
    const struct kind *kind;
    struct errors engine, bf16;
    int n_rows, n_decided, n_best;
    int n_other_ids; // drafted ids that are not the best of their logits
    double lse;
};

struct seq {
    int32_t *token;
    int n, first_row;
};

static struct kind kind_main = {.name = "main"}, mtp = {.name = "mtp"},
                   recycled = {.name = "recycled"};
static struct seq seqs[MAX_SEQS];
static int n_seqs, n_columns, n_slots, n_steps, n_pages, seq_pages;
static int32_t *columns, (*slots)[2];
static bool on_cpu;
static struct weights *weights;
static struct kv_pool *pool;
static struct engine *engine;
static struct device *device;
static size_t pool_bytes;
static float *logits; /* [V] */
static struct tally tally;
static int n_failed; // paths

static struct {
    int32_t token[MAX_ROWS], position[MAX_ROWS], logit_row[MAX_LOGITS], ids[MAX_LOGITS];
    int32_t seq_start[MAX_SEQS + 1], ctx_len[MAX_SEQS], *block_table;
    int32_t target[MAX_LOGITS]; /* the kind's row that logits row i is compared with */
    struct hidden_ref hidden[MAX_ROWS];
    struct batch b;
} a;

/* ---- reference ------------------------------------------------------------------------------- */

static float *reference_tensor(const struct safetensors *st, const char *kind, const char *name,
                               int n_dims, int64_t *ret_n)
{
    char key[64];
    snprintf(key, sizeof(key), "%s.%s", kind, name);
    const struct st_tensor *t = safetensors_find(st, key);
    if (!t || t->dtype != ST_F32 || t->n_dims != n_dims ||
        (n_dims == 2 && t->shape[1] != n_columns)) {
        fprintf(stderr, "%s is missing in the reference or has another shape\n", key);
        exit(1);
    }
    float *x = malloc(t->n_bytes);
    REQUIRE(x);
    CHECK_OK(safetensors_read(st, t, x));
    *ret_n = t->shape[0];
    return x;
}

static void errors_add(struct errors *e, const float *got, const int32_t *at, const float *want)
{
    double error2 = 0, want2 = 0;
    for (int i = 0; i < n_columns; i++) {
        double d = (double)got[at ? at[i] : i] - (double)want[i];
        error2 += d * d;
        want2 += (double)want[i] * (double)want[i];
        e->largest = isfinite(d) ? fmax(e->largest, fabs(d)) : INFINITY;
    }
    e->row[e->n++] = sqrt(error2 / want2);
    e->error2 += error2;
    e->want2 += want2;
}

static double errors_relative(const struct errors *e) { return sqrt(e->error2 / e->want2); }

static int by_value(const void *x, const void *y)
{
    double p = *(const double *)x, q = *(const double *)y;
    return (p > q) - (p < q);
}

static double errors_median(struct errors *e)
{
    qsort(e->row, (size_t)e->n, sizeof(*e->row), by_value);
    return e->n ? e->row[e->n / 2] : NAN;
}

static bool is_firm(const struct kind *k, int row) { return k->margin[row] > 1; }

static void kind_open(struct kind *k, const struct safetensors *st, int n)
{
    const struct {
        const char *name;
        float **to;
        int n_dims;
    } list[] = {{"logits", &k->logits, 2}, {"bf16", &k->bf16, 2}, {"best", &k->best, 1},
                {"gap", &k->gap, 1},       {"lse", &k->lse, 1},   {"margin", &k->margin, 1}};
    k->n = n;
    for (size_t i = 0; i < ARRAY_LEN(list); i++) {
        int64_t is;
        *list[i].to = reference_tensor(st, k->name, list[i].name, list[i].n_dims, &is);
        CHECK_INT(is, n);
    }
    struct errors e = {.row = calloc((size_t)n, sizeof(double))};
    REQUIRE(e.row);
    for (int r = 0; r < n; r++)
        if (is_firm(k, r))
            errors_add(&e, k->bf16 + (int64_t)r * n_columns, NULL,
                       k->logits + (int64_t)r * n_columns);
    k->relative = errors_relative(&e);
    k->median = errors_median(&e);
    k->largest = e.largest;
    k->rms = sqrt(e.error2 / ((double)e.n * n_columns));
    printf("%-9s %6d rows, %6d with firm routing\n", k->name, n, e.n);
    CHECK(e.n > 0);
    free(e.row);
}

static int32_t *int_array(const json_t *v, int *ret_n)
{
    *ret_n = (int)json_array_size(v);
    int32_t *x = calloc((size_t)*ret_n + 1, sizeof(*x));
    REQUIRE(x);
    for (int i = 0; i < *ret_n; i++)
        x[i] = (int32_t)json_integer_value(json_array_get(v, (size_t)i));
    return x;
}

static void reference_open(const char *dir)
{
    char path[4096];
    json_t *root = NULL;
    struct safetensors *st = NULL;
    snprintf(path, sizeof(path), "%s/cases.json", dir);
    CHECK_OK(json_parse_file(path, &json_limits_file, &root));
    CHECK_OK(safetensors_open(dir, &st));
    REQUIRE(root && st);
    columns = int_array(json_object_get(root, "columns"), &n_columns);
    n_steps = (int)json_integer_value(json_object_get(root, "steps"));
    const json_t *list = json_object_get(root, "sequences"),
                 *pairs = json_object_get(root, "slots");
    n_seqs = (int)json_array_size(list);
    REQUIRE(n_seqs > 0 && n_seqs <= MAX_SEQS && n_columns > 0 && n_steps > 0);
    int n_rows = 0;
    for (int s = 0; s < n_seqs; s++) {
        seqs[s].token = int_array(json_array_get(list, (size_t)s), &seqs[s].n);
        REQUIRE(seqs[s].n > TAIL && seqs[s].n <= MAX_LOGITS);
        seqs[s].first_row = n_rows;
        n_rows += seqs[s].n;
        seq_pages = MAX(seq_pages, (seqs[s].n + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
    }
    n_pages = n_seqs * seq_pages;
    n_slots = (int)json_array_size(pairs);
    slots = calloc((size_t)n_slots + 1, sizeof(*slots));
    REQUIRE(slots);
    for (int i = 0; i < n_slots; i++)
        for (int k = 0; k < 2; k++)
            slots[i][k] = (int32_t)json_integer_value(
                json_array_get(json_array_get(pairs, (size_t)i), (size_t)k));
    kind_open(&kind_main, st, n_rows);
    kind_open(&mtp, st, n_rows);
    kind_open(&recycled, st, n_slots * n_steps);
    safetensors_destroy(st);
    json_decref(root);
}

/* ---- one path: begin, compare rows, end ------------------------------------------------------ */

/* Pages become NaN: a slot that nobody wrote must not count. */
static void path_begin(const struct kind *k)
{
    double *rows[2] = {tally.engine.row, tally.bf16.row};
    tally = (struct tally){.kind = k, .engine.row = rows[0], .bf16.row = rows[1]};
    if (on_cpu)
        memset(kv_pool_base(pool), 0xff, pool_bytes);
#ifdef BATON_CUDA
    else
        REQUIRE(cudaMemset(kv_pool_base(pool), 0xff, pool_bytes) == cudaSuccess);
#endif
}

static int best_id(const float *x, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

static double log_sum_exp(const float *x, int n, float max)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += exp((double)x[i] - (double)max);
    return (double)max + log(sum);
}

/* Compares the logits at hand; returns the best id of them. */
static int compare(int row)
{
    const struct kind *k = tally.kind;
    int V = weights->config.vocab, best = best_id(logits, V);
    tally.n_rows++;
    if (!is_firm(k, row))
        return best;
    const float *want = k->logits + (int64_t)row * n_columns;
    errors_add(&tally.engine, logits, columns, want);
    errors_add(&tally.bf16, k->bf16 + (int64_t)row * n_columns, NULL, want);
    double lse = fabs(log_sum_exp(logits, V, logits[best]) - (double)k->lse[row]);
    tally.lse = isfinite(lse) ? fmax(tally.lse, lse) : INFINITY;
    if ((double)k->gap[row] > (on_cpu ? FP32_GAP : SIGMAS * k->rms)) {
        tally.n_decided++;
        tally.n_best += best == (int)k->best[row];
    }
    return best;
}

static void path_end(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void path_end(const char *fmt, ...)
{
    char name[64];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(name, sizeof(name), fmt, ap);
    va_end(ap);
    struct tally *t = &tally;
    const struct kind *k = t->kind;
    double relative = errors_relative(&t->engine), median = errors_median(&t->engine);
    double bf16 = errors_relative(&t->bf16), bf16_median = errors_median(&t->bf16);
    // A few rows may have been lucky in bf16: all rows of the kind speak for them.
    double most = on_cpu ? FP32_RELATIVE : BF16_ALLOWED * fmax(bf16, k->relative);
    double most_median = on_cpu ? FP32_MEDIAN : BF16_ALLOWED * fmax(bf16_median, k->median);
    double most_lse = on_cpu ? FP32_LSE : BF16_ALLOWED * k->largest;
    // A firm row may follow a token of its sequence that bf16 sent to other experts, and then sees
    // other keys: one row in some thousands, in transformers as well.
    int may_differ = on_cpu ? 0 : (t->n_decided + OTHER_PAST - 1) / OTHER_PAST;
    bool ok = t->engine.n > 0 && relative <= most && median <= most_median && t->lse <= most_lse &&
              t->n_best + may_differ >= t->n_decided && t->n_other_ids == 0;
    printf("%-30s %5d %5d  %8.2e %8.2e %8.2e  %8.2e %8.2e %8.2e  %5.2f  %8.2e %4d/%-4d %s\n", name,
           t->n_rows, t->engine.n, t->engine.largest, relative, median, t->bf16.largest, bf16,
           bf16_median, relative / bf16, t->lse, t->n_best, t->n_decided, ok ? "ok" : "FAIL");
    if (t->n_other_ids)
        printf("%d drafted ids are not the best of their logits\n", t->n_other_ids);
    fflush(stdout);
    n_failed += !ok;
}

static void table_head(void)
{
    printf("%-30s %5s %5s  %-26s  %-26s  %5s  %-8s %s\n", "", "", "", "engine",
           "transformers in bf16", "", "", "");
    printf("%-30s %5s %5s  %-8s %-8s %-8s  %-8s %-8s %-8s  %5s  %-8s %s\n", "path", "rows", "firm",
           "largest", "relative", "median", "largest", "relative", "median", "ratio", "lse",
           "best ids");
}

/* ---- batches --------------------------------------------------------------------------------- */

static void batch_clear(void)
{
    a.b = (struct batch){.max_pages = seq_pages,
                         .token = a.token,
                         .position = a.position,
                         .seq_start = a.seq_start,
                         .ctx_len = a.ctx_len,
                         .block_table = a.block_table,
                         .logit_row = a.logit_row};
}

/* Adds slots [slot, slot + n) of sequence s; the last n_want rows want logits, to be compared with
 * rows of the kind that end at last_target. Drafts: token of the next position, hidden states from
 * `from` on. */
static void batch_add(int s, int slot, int n, int n_want, int last_target,
                      const struct hidden_ref *from)
{
    REQUIRE(a.b.n_rows + n <= MAX_ROWS && a.b.n_logits + n_want <= MAX_LOGITS);
    for (int i = 0; i < n; i++) {
        int r = a.b.n_rows++;
        a.token[r] = seqs[s].token[slot + i + (from ? 1 : 0)];
        a.position[r] = slot + i;
        if (from)
            a.hidden[r] = (struct hidden_ref){from->source, from->idx + i};
        if (i >= n - n_want) {
            a.target[a.b.n_logits] = last_target - (n - 1 - i);
            a.logit_row[a.b.n_logits++] = r;
        }
    }
    int q = a.b.n_seqs++;
    a.seq_start[q + 1] = a.b.n_rows;
    a.ctx_len[q] = slot + n;
    for (int p = 0; p < seq_pages; p++) // descending: a page's number says nothing about its place
        a.block_table[q * seq_pages + p] = (s + 1) * seq_pages - 1 - p;
}

/* The kinds main and mtp have a row for each position. */
static void batch_add_rows(int s, int slot, int n, int n_want, const struct hidden_ref *from)
{
    batch_add(s, slot, n, n_want, seqs[s].first_row + slot + n - 1, from);
}

static void forward(bool compared)
{
    CHECK_OK(engine_forward(engine, &a.b));
    for (int i = 0; compared && i < a.b.n_logits; i++) {
        CHECK_OK(engine_read_logits(engine, false, i, logits));
        compare(a.target[i]);
    }
}

static void draft(bool compared)
{
    CHECK_OK(engine_draft(engine, &a.b, a.hidden, compared ? a.ids : NULL));
    for (int i = 0; compared && i < a.b.n_logits; i++) {
        CHECK_OK(engine_read_logits(engine, true, i, logits));
        tally.n_other_ids += a.ids[i] != compare(a.target[i]);
    }
}

/* Brings sequences [0, n) to `left` tokens before their ends, packed into as few batches as fit,
 * the MTP layer's slots too if with_mtp. Compares the last n_want rows of each. */
static void prefill(int n, const int *left, int n_want, bool with_mtp)
{
    for (int s = 0, end; s < n; s = end) {
        batch_clear();
        for (end = s; end < n; end++) {
            int rows = seqs[end].n - left[end];
            if (a.b.n_rows + rows > MAX_ROWS)
                break;
            batch_add_rows(end, 0, rows, MIN(n_want, rows), NULL);
        }
        forward(n_want > 0);
        if (!with_mtp)
            continue;
        batch_clear();
        for (int q = s, row = 0; q < end; row += seqs[q].n - left[q], q++)
            batch_add_rows(q, 0, seqs[q].n - left[q], 0, &(struct hidden_ref){HIDDEN_MAIN, row});
        draft(false);
    }
}

static const int *same_left(int left)
{
    static int of[MAX_SEQS];
    for (int s = 0; s < MAX_SEQS; s++)
        of[s] = left;
    return of;
}

/* ---- paths ----------------------------------------------------------------------------------- */

static void prefills(void)
{
    path_begin(&kind_main);
    prefill(1, same_left(0), seqs[0].n, false);
    path_end("prefill, one");
    path_begin(&kind_main);
    prefill(n_seqs, same_left(0), TAIL, false);
    path_end("prefill, %d packed", n_seqs);
}

static void chunks(int n, int n_want)
{
    path_begin(&kind_main);
    for (int at = 0, more = 1; more; at += CHUNK) {
        batch_clear();
        more = 0;
        for (int s = 0; s < n; s++) {
            int rows = MIN(seqs[s].n - at, CHUNK);
            if (rows <= 0)
                continue;
            if (a.b.n_rows + rows > MAX_ROWS) {
                forward(true);
                batch_clear();
            }
            batch_add_rows(s, at, rows, MIN(n_want, rows), NULL);
            more += seqs[s].n > at + CHUNK;
        }
        forward(true);
    }
    path_end("chunks of %d, batch %d", CHUNK, n);
}

static void decode_from_nothing(void)
{
    path_begin(&kind_main);
    for (int p = 0; p < seqs[0].n; p++) {
        batch_clear();
        batch_add_rows(0, p, 1, 1, NULL);
        forward(true);
    }
    path_end("decode, positions 1 to %d", seqs[0].n);
}

/* The last TAIL tokens of n sequences in windows of `rows` (0: of 1 to 4, by sequence). */
static void windows(int n, int rows)
{
    path_begin(&kind_main);
    prefill(n, same_left(TAIL), 0, false);
    for (int at[MAX_SEQS] = {0}, more = 1; more;) {
        batch_clear();
        more = 0;
        for (int s = 0; s < n; s++) {
            int w = MIN(rows ? rows : 1 + s % 4, TAIL - at[s]);
            if (w == 0)
                continue;
            batch_add_rows(s, seqs[s].n - TAIL + at[s], w, w, NULL);
            at[s] += w;
            more += at[s] < TAIL;
        }
        forward(true);
    }
    if (rows == 1)
        path_end("decode, batch %d", n);
    else if (rows)
        path_end("windows of %d, batch %d", rows, n);
    else
        path_end("windows of 1 to 4, batch %d", n);
}

static void drafts_of_a_prompt(void)
{
    path_begin(&mtp);
    batch_clear();
    batch_add_rows(0, 0, seqs[0].n, 0, NULL);
    forward(false);
    batch_clear();
    batch_add_rows(0, 0, seqs[0].n - 1, seqs[0].n - 1, &(struct hidden_ref){HIDDEN_MAIN, 0});
    draft(true);
    path_end("MTP over a prompt");
}

/* Verification windows of `rows`, then the MTP layer over the same positions. */
static void drafts(int n, int rows)
{
    path_begin(&mtp);
    prefill(n, same_left(TAIL), 0, true);
    for (int at = 0; at + rows < TAIL; at += rows) {
        batch_clear();
        for (int s = 0; s < n; s++)
            batch_add_rows(s, seqs[s].n - TAIL + at, rows, 0, NULL);
        forward(false);
        batch_clear();
        for (int s = 0; s < n; s++)
            batch_add_rows(s, seqs[s].n - TAIL + at, rows, rows,
                           &(struct hidden_ref){HIDDEN_MAIN, s * rows});
        draft(true);
    }
    path_end("MTP after %d row%s, batch %d", rows, rows > 1 ? "s" : "", n);
}

/* Drafts that go on from their own states, from slots `which`, which + 2, .. of the list: a
 * sequence has two. */
static void drafts_of_drafts(int which)
{
    int left[MAX_SEQS] = {0}, n = n_slots / 2;
    path_begin(&recycled);
    for (int s = 0; s < n; s++) {
        REQUIRE(slots[2 * s + which][0] == s);
        left[s] = seqs[s].n - slots[2 * s + which][1];
    }
    prefill(n, left, 0, true);
    batch_clear();
    for (int s = 0; s < n; s++)
        batch_add(s, slots[2 * s + which][1], 1, 0, 0, NULL);
    forward(false);
    for (int step = 0; step <= n_steps; step++) {
        batch_clear();
        for (int s = 0; s < n; s++)
            batch_add(s, slots[2 * s + which][1] + step, 1, step > 0,
                      (2 * s + which) * n_steps + step - 1,
                      &(struct hidden_ref){step ? HIDDEN_DRAFT : HIDDEN_MAIN, s});
        draft(step > 0);
    }
    path_end("MTP drafts 2 to %d, batch %d", n_steps + 1, n);
}

/* ---- main ------------------------------------------------------------------------------------ */

static void engine_open(const char *dir, const char *device_name)
{
    CHECK_OK(device_open(device_name, &device));
    struct model_config model;
    CHECK_OK(model_config_load(dir, &model));
    struct weights_source source = {.dir = dir, .n_threads = 8, .device = device};
    CHECK_OK(weights_open(&model, &source, &weights));
    REQUIRE(weights && model.n_mtp_layers == 1);
    struct kv_pool_config p = {.n_pages = (uint32_t)n_pages,
                               .n_layers = (uint32_t)(model.n_layers + model.n_mtp_layers),
                               .kv_width = KV_WIDTH,
                               .dtype_bytes = on_cpu ? 4 : 2,
                               .device = device};
    pool_bytes = (size_t)p.n_pages * p.n_layers * KV_PAGE_TOKENS * KV_WIDTH * p.dtype_bytes;
    struct engine_config e = {.device = device,
                              .max_rows = MAX_ROWS,
                              .max_seqs = MAX_SEQS,
                              .max_logits = MAX_LOGITS,
                              .max_ctx = seq_pages * KV_PAGE_TOKENS,
                              .max_graph_rows = 512};
    CHECK_OK(kv_pool_create(&p, &pool));
    REQUIRE(pool);
    CHECK_OK(engine_create(&e, weights, pool, &engine));
    a.block_table = calloc((size_t)MAX_SEQS * (size_t)seq_pages, sizeof(int32_t));
    logits = calloc((size_t)model.vocab, sizeof(float));
    tally.engine.row = calloc((size_t)kind_main.n, sizeof(double));
    tally.bf16.row = calloc((size_t)kind_main.n, sizeof(double));
    REQUIRE(engine && a.block_table && logits && tally.engine.row && tally.bf16.row);
}

int main(int argc, char **argv)
{
    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: engine_oracle CHECKPOINT_DIR REFERENCE_DIR [cpu | cuda:N]\n");
        return 2;
    }
    const char *device_name = argc > 3 ? argv[3] : "cuda:0";
    on_cpu = !strcmp(device_name, "cpu");
    reference_open(argv[2]);
    engine_open(argv[1], device_name);
    table_head();
    prefills();
    chunks(1, CHUNK);
    chunks(n_seqs, TAIL);
    decode_from_nothing();
    for (int n = 1; n <= n_seqs; n *= 2)
        windows(n, 1);
    for (int rows = 2; rows <= 4; rows++)
        for (int n = 1; n <= n_seqs; n *= 8)
            windows(n, rows);
    windows(n_seqs, 0);
    drafts_of_a_prompt();
    for (int n = 1; n <= n_seqs; n *= 8)
        drafts(n, 1);
    drafts(n_seqs, 3);
    drafts_of_drafts(0);
    drafts_of_drafts(1);
    CHECK_INT(n_failed, 0);
    engine_destroy(engine);
    kv_pool_destroy(pool);
    weights_destroy(weights);
    device_destroy(device);
    return check_done();
}
