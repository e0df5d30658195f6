/* mla_test.c: attention over pages against doubles, absorbed against expanded, and one row's bits
 * in any company, with any number of heads and threads. */
#include "check.h"
#include "data.h"

#define HEAD_W (448 * 512)

struct setup {
    struct mla_args a;
    float *q, *pool, *out, *work;
    bf16_t *kv_b;
    int32_t *block_table, *seq, *n_ctx;
};

/* n_seqs sequences of the given lengths; the last rows[s] slots of each are rows of the batch. */
static struct setup setup_make(int heads, const int *len, const int *rows, int n_seqs,
                               int n_threads)
{
    enum { LAYERS = 2 };
    struct setup s = {0};
    int T = 0, n_pages = 0, max_len = 0, max_pages;
    for (int i = 0; i < n_seqs; i++) {
        T += rows[i];
        n_pages += (len[i] + 63) / 64;
        max_len = len[i] > max_len ? len[i] : max_len;
    }
    max_pages = (max_len + 63) / 64 + 1;
    s.q = data_floats((int64_t)T * heads * MLA_QK);
    s.pool = data_floats((int64_t)n_pages * LAYERS * 64 * KV_WIDTH);
    s.kv_b = data_weights((int64_t)heads * HEAD_W);
    s.out = data_floats((int64_t)T * heads * MLA_V);
    s.work = data_floats(n_threads * mla_work_floats(max_len));
    s.block_table = data_alloc(n_seqs * max_pages, sizeof(int32_t));
    s.seq = data_alloc(T, sizeof(int32_t));
    s.n_ctx = data_alloc(T, sizeof(int32_t));
    memset(s.block_table, 0xff, sizeof(int32_t) * (size_t)(n_seqs * max_pages)); // unread past len
    for (int i = 0, page = n_pages, t = 0; i < n_seqs; i++) {
        for (int p = 0; p * 64 < len[i]; p++)
            s.block_table[i * max_pages + p] = --page;
        for (int r = 0; r < rows[i]; r++, t++) {
            s.seq[t] = i;
            s.n_ctx[t] = len[i] - rows[i] + r + 1;
        }
    }
    s.a = (struct mla_args){.q = s.q,
                            .kv_b = s.kv_b,
                            .pool = s.pool,
                            .block_table = s.block_table,
                            .seq = s.seq,
                            .n_ctx = s.n_ctx,
                            .out = s.out,
                            .work = s.work,
                            .T = T,
                            .heads = heads,
                            .n_layers = LAYERS,
                            .layer = 1,
                            .max_pages = max_pages,
                            .scale = 1.0f / 16};
    return s;
}

static void setup_free(struct setup *s)
{
    free(s->q);
    free(s->pool);
    free(s->kv_b);
    free(s->out);
    free(s->work);
    free(s->block_table);
    free(s->seq);
    free(s->n_ctx);
}

static const float *slot(const struct mla_args *a, int t, int j)
{
    int64_t page = a->block_table[a->seq[t] * a->max_pages + j / 64];
    return a->pool + ((page * a->n_layers + a->layer) * 64 + j % 64) * KV_WIDTH;
}

/* softmax(q k / 16) v with k and v expanded, in doubles. */
static void naive(const struct mla_args *a, int t, int h, double ret[MLA_V])
{
    int n = a->n_ctx[t];
    const bf16_t *w = a->kv_b + (int64_t)h * HEAD_W;
    const float *q = a->q + ((int64_t)t * a->heads + h) * MLA_QK;
    double *score = data_alloc(n, sizeof(double)), max = -INFINITY, total = 0, latent[512] = {0};
    double absorbed[512] = {0};
    for (int d = 0; d < MLA_NOPE; d++)
        for (int c = 0; c < 512; c++)
            absorbed[c] += q[d] * data_bf16(w[d * 512 + c]);
    for (int j = 0; j < n; j++) {
        const float *kv = slot(a, t, j);
        for (int c = 0; c < 512; c++)
            score[j] += absorbed[c] * kv[c];
        for (int d = 0; d < MLA_ROPE; d++)
            score[j] += (double)q[MLA_NOPE + d] * kv[512 + d];
        score[j] *= a->scale;
        max = fmax(max, score[j]);
    }
    for (int j = 0; j < n; j++) {
        double p = exp(score[j] - max);
        total += p;
        for (int c = 0; c < 512; c++)
            latent[c] += p * slot(a, t, j)[c];
    }
    for (int v = 0; v < MLA_V; v++) {
        ret[v] = 0;
        for (int c = 0; c < 512; c++)
            ret[v] += latent[c] / total * data_bf16(w[(MLA_NOPE + v) * 512 + c]);
    }
    free(score);
}

static void check_against_naive(const struct setup *s)
{
    double worst = 0, want[MLA_V];
    for (int t = 0; t < s->a.T; t++)
        for (int h = 0; h < s->a.heads; h++) {
            naive(&s->a, t, h, want);
            for (int v = 0; v < MLA_V; v++) {
                double e = fabs(s->out[((int64_t)t * s->a.heads + h) * MLA_V + v] - want[v]);
                worst = e <= worst ? worst : e;
            }
        }
    CHECK_NEAR(worst, 0, 2e-4); // on values up to about 30
}

static void page_edges(void)
{
    const int lens[] = {1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200};
    for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
        int rows = lens[i] < 3 ? lens[i] : 3;
        struct setup s = setup_make(1 + (int)i % 5, &lens[i], &rows, 1, 1);
        mla_ref(&s.a, NULL);
        check_against_naive(&s);
        setup_free(&s);
    }
}

static void expanded_form_is_equal(void)
{
    const int len[] = {70, 1, 33}, rows[] = {2, 1, 5};
    struct setup s = setup_make(3, len, rows, 3, 1);
    mla_expanded_ref(&s.a, NULL);
    check_against_naive(&s);
    setup_free(&s);
}

/* A prompt chunk, single decode rows and windows in one batch; then each row alone. */
static void company_does_not_matter(void)
{
    const int len[] = {90, 1, 130, 64, 65, 200, 12}, rows[] = {40, 1, 1, 1, 5, 3, 12};
    for (int heads = 1; heads <= 21; heads += heads < 5 ? 1 : 15) {
        struct par *par = par_create(3);
        REQUIRE(par);
        struct setup s = setup_make(heads, len, rows, 7, 3);
        int64_t row = (int64_t)heads * MLA_V, n = s.a.T * row;
        float *want = data_alloc(n, sizeof(float)), *alone = data_alloc(row, sizeof(float));
        mla_ref(&s.a, NULL);
        memcpy(want, s.out, sizeof(float) * (size_t)n);
        if (heads == 5)
            check_against_naive(&s);
        memset(s.out, 0, sizeof(float) * (size_t)n);
        mla_ref(&s.a, par);
        CHECK(data_same(want, s.out, n));
        struct mla_args one = s.a;
        one.T = 1;
        one.out = alone;
        int different = 0;
        for (int t = 0; t < s.a.T; t++) {
            one.q = s.q + (int64_t)t * heads * MLA_QK;
            one.seq = s.seq + t;
            one.n_ctx = s.n_ctx + t;
            mla_ref(&one, t % 2 ? par : NULL);
            different += !data_same(alone, want + t * row, row);
        }
        CHECK_INT(different, 0);
        free(want);
        free(alone);
        setup_free(&s);
        par_destroy(par);
    }
}

static void each(void)
{
    page_edges();
    expanded_form_is_equal();
    company_does_not_matter();
}

static void all_builds(void) { data_each_isa(each); }

int main(void)
{
    RUN(all_builds);
    return check_done();
}
