/* speculate.c: see speculate.h. */
#include "decode_worker/speculate.h"

#include <stdlib.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/base/own.h"

struct speculate {
    struct speculate_config config;
    const struct model_config *model;
    // arrays of one batch
    int32_t *token, *position, *seq_start, *ctx_len, *block_table, *logit_row;
    struct hidden_ref *hidden;
    int32_t *ids;
    // arrays of one draw
    int32_t *idx, *top_id;
    struct sample_row *rows;
    const uint32_t **allowed;       // by window row
    const uint32_t **draft_allowed; // by logits row of a draft
    struct stream **owner;
    float *logprob, *top_logprob;
    int32_t (*banned)[MODEL_MAX_EOS + WIRE_MAX_STOP_IDS];
};

enum err speculate_create(const struct speculate_config *c, struct speculate **ret)
{
    struct speculate *s = calloc(1, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "no memory for the decode step");
    s->config = *c;
    s->model = engine_model(c->engine);
    size_t seqs = (size_t)c->max_streams, rows = seqs * STREAM_MAX_WINDOW;
    s->token = calloc(rows, sizeof(int32_t));
    s->position = calloc(rows, sizeof(int32_t));
    s->seq_start = calloc(seqs + 1, sizeof(int32_t));
    s->ctx_len = calloc(seqs, sizeof(int32_t));
    s->block_table = calloc(seqs * (size_t)c->max_pages, sizeof(int32_t));
    s->logit_row = calloc(rows, sizeof(int32_t));
    s->hidden = calloc(rows, sizeof(*s->hidden));
    s->ids = calloc(rows, sizeof(int32_t));
    s->idx = calloc(rows, sizeof(int32_t));
    s->rows = calloc(rows, sizeof(*s->rows));
    s->allowed = calloc(rows, sizeof(*s->allowed));
    s->draft_allowed = calloc(seqs, sizeof(*s->draft_allowed));
    s->owner = calloc(rows, sizeof(*s->owner));
    s->logprob = calloc(rows, sizeof(float));
    s->top_id = calloc(rows * WIRE_MAX_TOP, sizeof(int32_t));
    s->top_logprob = calloc(rows * WIRE_MAX_TOP, sizeof(float));
    s->banned = calloc(seqs, sizeof(*s->banned));
    if (!s->token || !s->position || !s->seq_start || !s->ctx_len || !s->block_table ||
        !s->logit_row || !s->hidden || !s->ids || !s->idx || !s->rows || !s->allowed ||
        !s->draft_allowed || !s->owner || !s->logprob || !s->top_id || !s->top_logprob ||
        !s->banned) {
        speculate_destroy(s);
        return err_set(ERR_NOMEM, "no memory for a decode batch of %d streams", c->max_streams);
    }
    *ret = s;
    return ERR_OK;
}

void speculate_destroy(struct speculate *s)
{
    if (!s)
        return;
    void *all[] = {s->token,     s->position,     s->seq_start, s->ctx_len,     s->block_table,
                   s->logit_row, s->hidden,       s->ids,       s->idx,         s->rows,
                   s->owner,     s->logprob,      s->top_id,    s->top_logprob, s->banned,
                   s->allowed,   s->draft_allowed};
    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        free(all[i]);
    free(s);
}

static struct batch batch_begin(struct speculate *s, struct stream **streams, int n)
{
    struct batch b = {
        .token = s->token,
        .position = s->position,
        .seq_start = s->seq_start,
        .ctx_len = s->ctx_len,
        .block_table = s->block_table,
        .logit_row = s->logit_row,
        .allowed = s->draft_allowed,
    };
    for (int i = 0; i < n; i++)
        b.max_pages = MAX(b.max_pages, (int)streams[i]->n_pages);
    s->seq_start[0] = 0;
    return b;
}

static void batch_row(struct speculate *s, struct batch *b, int32_t token, uint32_t position,
                      struct hidden_ref hidden)
{
    s->token[b->n_rows] = token;
    s->position[b->n_rows] = (int32_t)position;
    s->hidden[b->n_rows] = hidden;
    b->n_rows++;
}

static void batch_end_seq(struct speculate *s, struct batch *b, const struct stream *st,
                          uint32_t ctx_len)
{
    memcpy(s->block_table + (size_t)b->n_seqs * (size_t)b->max_pages, st->pages,
           st->n_pages * sizeof(int32_t));
    s->ctx_len[b->n_seqs] = (int32_t)ctx_len;
    s->seq_start[++b->n_seqs] = b->n_rows;
}

/* The mask of row j of a stream's window: what may follow the first j drafts. Called for j = 0, 1,
 * ... as the drafts are made, which the masks before hold to the grammar. */
static enum err stream_mask(struct speculate *s, struct stream *st, uint32_t j)
{
    bool fits = true;
    if (j == 0)
        st->ahead = constraint_state(st->constraint);
    else
        TRY(constraint_accept(st->constraint, &st->ahead, st->draft[j - 1], &fits));
    if (!fits)
        return err_set(ERR_INTERNAL, "draft %d does not fit the grammar", st->draft[j - 1]);
    return constraint_mask(st->constraint, st->ahead, &s->allowed[st->window_row + (int)j]);
}

static void mask_row(struct speculate *s, struct stream *st, uint32_t j)
{
    s->allowed[st->window_row + (int)j] = NULL;
    if (st->constraint && st->constraint_err == ERR_OK)
        st->constraint_err = stream_mask(s, st, j);
}

/* The batch's last row shall draft number j of the stream. */
static void want_draft(struct speculate *s, struct batch *b, const struct stream *st, uint32_t j)
{
    s->draft_allowed[b->n_logits] = s->allowed[st->window_row + (int)j];
    s->logit_row[b->n_logits++] = b->n_rows - 1;
}

/* Every stream's pending slots from true hidden states; the last row of each drafts first, if any
 * stream wants drafts in this step. */
static enum err draft_first(struct speculate *s, struct stream **streams, int n)
{
    bool any = false;
    for (int i = 0; i < n; i++)
        any |= streams[i]->n_draft > 0;
    struct batch b = batch_begin(s, streams, n);
    for (int i = 0; i < n; i++) {
        struct stream *st = streams[i];
        uint32_t slot = st->n_ctx - st->n_pending;
        for (uint32_t j = 0; j < st->n_pending; j++)
            batch_row(s, &b, st->pending_token[j], slot + j, st->pending_hidden[j]);
        batch_end_seq(s, &b, st, st->n_ctx);
        st->draft_row = b.n_rows - 1;
        if (!any)
            continue;
        mask_row(s, st, 0);
        want_draft(s, &b, st, 0);
    }
    TRY(engine_draft(s->config.engine, &b, s->hidden, any ? s->ids : NULL));
    for (int i = 0; i < n; i++) {
        if (any)
            streams[i]->draft[0] = s->ids[i];
        streams[i]->n_pending = 0;
    }
    return ERR_OK;
}

/* Draft number `step` (from 1) of the streams that want that many, out of the one before. */
static enum err draft_next(struct speculate *s, struct stream **streams, int n, uint32_t step,
                           bool *ret_any)
{
    struct batch b = batch_begin(s, streams, n);
    for (int i = 0; i < n; i++) {
        struct stream *st = streams[i];
        if (st->n_draft <= step)
            continue;
        uint32_t first = st->n_ctx - 1;
        batch_row(s, &b, st->draft[step - 1], s->config.eagle ? first + step : first,
                  (struct hidden_ref){HIDDEN_DRAFT, st->draft_row});
        batch_end_seq(s, &b, st, st->n_ctx + step);
        st->draft_row = b.n_rows - 1;
        mask_row(s, st, step);
        want_draft(s, &b, st, step);
    }
    *ret_any = b.n_rows > 0;
    if (b.n_rows == 0)
        return ERR_OK;
    TRY(engine_draft(s->config.engine, &b, s->hidden, s->ids));
    for (int i = 0; i < n; i++)
        if (streams[i]->n_draft > step)
            streams[i]->draft[step] = s->ids[streams[i]->draft_row];
    return ERR_OK;
}

static enum err verify_start(struct speculate *s, struct stream **streams, int n)
{
    struct batch b = batch_begin(s, streams, n);
    for (int i = 0; i < n; i++) {
        struct stream *st = streams[i];
        for (uint32_t j = 0; j <= st->n_draft; j++) {
            s->logit_row[b.n_logits++] = b.n_rows;
            batch_row(s, &b, j == 0 ? st->token : st->draft[j - 1], st->n_ctx + j,
                      (struct hidden_ref){0});
        }
        batch_end_seq(s, &b, st, st->n_ctx + st->n_draft + 1);
    }
    return engine_start(s->config.engine, &b);
}

static void keep_draw(struct stream *st, uint32_t j, int32_t id, float logprob,
                      const int32_t *top_id, const float *top_logprob)
{
    st->sampled[j] = id;
    st->logprob[j] = logprob;
    for (int t = 0; t < st->sampling.n_logprobs; t++)
        st->top[j][t] = (struct wire_top){top_id[t], top_logprob[t]};
}

static void set_bias(const struct stream *st, struct sample_row *row)
{
    if (!st->n_bias)
        return;
    row->n_bias = (int32_t)st->n_bias;
    row->bias_id = st->bias_id;
    row->bias_value = stream_bias_value(st);
}

/* A row's penalties count the drafts before it: it only becomes output if all of them were right.
 * So no row waits for another, and one call draws them all. */
static enum err draw(struct speculate *s, struct stream **streams, int n)
{
    int n_rows = 0, max_top = 0;
    for (int i = 0; i < n; i++) {
        struct stream *st = streams[i];
        int n_banned = worker_stop_ids(&st->sampling, s->model, s->banned[i]);
        max_top = MAX(max_top, st->sampling.n_logprobs);
        for (uint32_t j = 0; j <= st->n_draft; j++) {
            struct sample_row *row = &s->rows[n_rows];
            s->idx[n_rows] = st->window_row + (int)j;
            s->owner[n_rows] = st;
            worker_sample_row(&st->sampling, st->n_ctx + 1 + j, st->n_output + j, s->banned[i],
                              n_banned, row);
            row->seen = st->seen.list;
            row->n_seen = st->seen.n;
            row->ahead = st->draft;
            row->n_ahead = st->seen.list ? (int32_t)j : 0;
            set_bias(st, row);
            row->allowed = s->allowed[st->window_row + (int)j];
            n_rows++;
        }
    }
    TRY(engine_sample(s->config.engine, n_rows, s->idx, s->rows, max_top, s->ids, s->logprob,
                      s->top_id, s->top_logprob));
    for (int r = 0; r < n_rows; r++) {
        struct stream *st = s->owner[r];
        keep_draw(st, (uint32_t)(s->idx[r] - st->window_row), s->ids[r], s->logprob[r],
                  s->top_id + r * max_top, s->top_logprob + r * max_top);
    }
    return ERR_OK;
}

/* Random weights draft nothing right. For measurements of speed a coin decides instead, the same
 * for the same seed and position: the draft becomes what was drawn, or differs from it. */
static void simulate(const struct speculate *s, struct stream *st)
{
    for (uint32_t j = 0; j < st->n_draft; j++) {
        uint64_t h = hash_mix(st->sampling.seed ^ (st->n_ctx + j) * 0x9e3779b97f4a7c15u);
        if ((double)(h >> 11) * 0x1p-53 < s->config.simulated)
            st->draft[j] = st->sampled[j];
        else if (st->sampled[j] == st->draft[j])
            st->draft[j] ^= 1;
    }
}

enum err speculate_step(struct speculate *s, struct stream **streams, int n)
{
    int n_rows = 0;
    for (int i = 0; i < n; i++) {
        streams[i]->window_row = n_rows;
        n_rows += (int)streams[i]->n_draft + 1;
    }
    if (s->config.has_mtp && s->config.mtp_step > 0) {
        TRY(draft_first(s, streams, n));
        bool any = true;
        for (uint32_t step = 1; any && step < s->config.mtp_step; step++)
            TRY(draft_next(s, streams, n, step, &any));
    }
    TRY(verify_start(s, streams, n));
    for (int i = 0; i < n; i++) // while the device computes
        mask_row(s, streams[i], streams[i]->n_draft);
    TRY(engine_wait(s->config.engine));
    TRY(draw(s, streams, n));
    for (int i = 0; s->config.simulated > 0 && i < n; i++)
        if (!streams[i]->constraint) // other drafts would have had other masks behind them
            simulate(s, streams[i]);
    return ERR_OK;
}

void speculate_advance(struct speculate *s, struct stream *st, uint32_t n_tokens)
{
    for (uint32_t j = 0; j < n_tokens; j++) {
        if (st->constraint && st->constraint_err == ERR_OK)
            st->constraint_err = constraint_advance(st->constraint, st->sampled[j]);
        if (st->seen.list)
            seen_output(&st->seen, st->sampled[j]);
        st->pending_token[j] = st->sampled[j];
        st->pending_hidden[j] = (struct hidden_ref){HIDDEN_MAIN, st->window_row + (int)j};
    }
    st->n_pending = s->config.has_mtp ? n_tokens : 0;
    st->n_ctx += n_tokens;
    st->n_output += n_tokens;
    st->token = st->sampled[n_tokens - 1];
}
