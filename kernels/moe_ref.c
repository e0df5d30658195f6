/* moe_ref.c: routing, SwiGLU and the mixture of experts.
 *
 * Rows are sorted by expert, so that an expert's weights are read once for all its rows; the shared
 * expert is one more, which every row chose. Each (row, expert) result is kept, and a last pass
 * adds a row's own in ascending expert order: what else was in the batch cannot show.
 */
#include "kernels/vec.h"

#include <stdbool.h>

#define OUT_TILE 16 /* outputs per parallel item */
#define GRAIN    32768

/* ---- routing --------------------------------------------------------------------------------- */

static void route_row(const struct route_args *a, int t)
{
    float score[ROUTE_MAX_EXPERTS];
    uint8_t taken[ROUTE_MAX_EXPERTS] = {0};
    const float *logits = a->logits + (int64_t)t * a->E;
    for (int e = 0; e < a->E; e += VEC_WIDTH) {
        int n = a->E - e < VEC_WIDTH ? a->E - e : VEC_WIDTH;
        vec_store_part(score + e, vec_sigmoid(vec_load_part(logits + e, n)), n);
    }
    int32_t *expert = a->expert + (int64_t)t * a->k;
    float *weight = a->weight + (int64_t)t * a->k, sum = 1e-20f;
    for (int i = 0; i < a->k; i++) {
        int best = -1;
        for (int e = 0; e < a->E; e++)
            if (!taken[e] && (best < 0 || score[e] + a->bias[e] > score[best] + a->bias[best]))
                best = e;
        taken[best] = 1;
        expert[i] = best;
        weight[i] = score[best];
        sum += score[best];
    }
    for (int i = 0; i < a->k; i++)
        weight[i] = weight[i] / sum * a->scale;
}

void route_ref(const struct route_args *a)
{
    for (int t = 0; t < a->T; t++)
        route_row(a, t);
}

/* ---- SwiGLU ---------------------------------------------------------------------------------- */

void swiglu_ref(const struct swiglu_args *a)
{
    int64_t i = 0;
    for (; i + VEC_WIDTH <= a->n; i += VEC_WIDTH) {
        vec gate = vec_load(a->gate + i);
        vec_store(a->gate + i, gate * vec_sigmoid(gate) * vec_load(a->up + i));
    }
    if (i < a->n) {
        vec gate = vec_load_part(a->gate + i, a->n - i);
        vec up = vec_load_part(a->up + i, a->n - i);
        vec_store_part(a->gate + i, gate * vec_sigmoid(gate) * up, a->n - i);
    }
}

/* ---- the experts ----------------------------------------------------------------------------- */

/* One (row, expert) pair is an entry; entries are sorted by expert, the shared expert's last. */
struct moe {
    const struct moe_args *a;
    int64_t n_entries;
    float *gate, *up;    // [n_entries, F]; gate becomes silu(gate) * up
    float *down;         // [n_entries, H]
    int32_t *row;        // [n_entries] row of x
    int32_t *entry;      // [T, k] the entries of a row, ascending
    int32_t *from;       // [E + 2] first entry of each expert
    int64_t out_tiles;   // of the current pass
    int64_t *item_start; // [E + 2] first item of each expert in the current pass
};

static void sort_rows(struct moe *m);
static void pass(struct moe *m, struct par *par, int n_out, int n_in,
                 void (*fn)(void *, int64_t, int64_t));
static void up_items(void *arg, int64_t begin, int64_t end);
static void down_items(void *arg, int64_t begin, int64_t end);
static void add_rows(void *arg, int64_t begin, int64_t end);

int64_t moe_work_floats(int T, int H, int F, int E, int k)
{
    int64_t entries = (int64_t)T * (k + 1);
    return entries * (2 * (int64_t)F + H) + entries + (int64_t)T * k + 3 * ((int64_t)E + 2) + 4;
}

void moe_ref(const struct moe_args *a, struct par *par)
{
    struct moe m = {.a = a, .n_entries = (int64_t)a->T * (a->k + 1)};
    m.item_start = (int64_t *)(((uintptr_t)a->work + 7) & ~(uintptr_t)7);
    m.from = (int32_t *)(m.item_start + a->E + 2);
    m.row = m.from + a->E + 2;
    m.entry = m.row + m.n_entries;
    m.gate = (float *)(m.entry + (int64_t)a->T * a->k);
    m.up = m.gate + m.n_entries * a->F;
    m.down = m.up + m.n_entries * a->F;
    sort_rows(&m);
    pass(&m, par, a->F, 2 * a->H, up_items);
    pass(&m, par, a->H, a->F, down_items);
    par_for(par, a->T, GRAIN / a->H + 1, add_rows, &m);
}

/* A counting sort; rows of an expert stay in order, and a row's entries ascend with its experts. */
static void sort_rows(struct moe *m)
{
    const struct moe_args *a = m->a;
    int64_t n = (int64_t)a->T * a->k;
    memset(m->from, 0, sizeof(*m->from) * (size_t)(a->E + 2));
    for (int64_t i = 0; i < n; i++)
        m->from[a->expert[i] + 1]++;
    m->from[a->E + 1] = a->T;
    for (int e = 0; e <= a->E; e++)
        m->from[e + 1] += m->from[e];
    for (int64_t i = 0; i < n; i++) { // from[e] moves on to the expert's end ..
        int32_t at = m->from[a->expert[i]]++;
        m->row[at] = (int32_t)(i / a->k);
        int32_t *list = m->entry + i / a->k * a->k;
        int j = (int)(i % a->k);
        for (; j > 0 && list[j - 1] > at; j--)
            list[j] = list[j - 1];
        list[j] = at;
    }
    for (int e = a->E; e > 0; e--) // .. which is where the next one began
        m->from[e] = m->from[e - 1];
    m->from[0] = 0;
    for (int t = 0; t < a->T; t++)
        m->row[n + t] = t;
}

/* Cuts each expert's entries x outputs into tiles, one item each. */
static void pass(struct moe *m, struct par *par, int n_out, int n_in,
                 void (*fn)(void *, int64_t, int64_t))
{
    int E = m->a->E;
    m->out_tiles = (n_out + OUT_TILE - 1) / OUT_TILE;
    m->item_start[0] = 0;
    for (int e = 0; e <= E; e++) {
        int64_t row_tiles = (m->from[e + 1] - m->from[e] + DOT_TILE_ROWS - 1) / DOT_TILE_ROWS;
        m->item_start[e + 1] = m->item_start[e] + row_tiles * m->out_tiles;
    }
    int64_t n = m->item_start[E + 1];
    int64_t work = m->n_entries * n_out * n_in;
    par_for(par, n, work > 0 ? n * GRAIN / work + 1 : 1, fn, m);
}

struct tile {
    int expert;
    int64_t entry, n_rows, out, n_out;
};

/* Finds item i, given the tile of an earlier item. */
static void tile_seek(const struct moe *m, int64_t i, int n_out, struct tile *t)
{
    while (i >= m->item_start[t->expert + 1])
        t->expert++;
    int64_t n = m->from[t->expert + 1] - m->from[t->expert];
    int64_t row_tiles = (n + DOT_TILE_ROWS - 1) / DOT_TILE_ROWS, k = i - m->item_start[t->expert];
    int64_t first = k % row_tiles * DOT_TILE_ROWS;
    t->entry = m->from[t->expert] + first;
    t->n_rows = n - first < DOT_TILE_ROWS ? n - first : DOT_TILE_ROWS;
    t->out = k / row_tiles * OUT_TILE;
    t->n_out = n_out - t->out < OUT_TILE ? n_out - t->out : OUT_TILE;
}

static void up_items(void *arg, int64_t begin, int64_t end)
{
    struct moe *m = arg;
    const struct moe_args *a = m->a;
    struct tile at = {0};
    for (int64_t i = begin; i < end; i++) {
        tile_seek(m, i, a->F, &at);
        bool shared = at.expert == a->E;
        int64_t w = ((shared ? 0 : (int64_t)at.expert * a->F) + at.out) * a->H;
        int64_t y = at.entry * a->F + at.out;
        struct dot_tile d = {.x = a->x,
                             .x_row = m->row + at.entry,
                             .x_stride = a->H,
                             .y_stride = a->F,
                             .w_stride = a->H,
                             .n_rows = (int)at.n_rows,
                             .n_out = (int)at.n_out,
                             .n_in = a->H};
        d.w = (shared ? a->shared_gate : a->gate) + w;
        d.y = m->gate + y;
        dot_tile(&d);
        d.w = (shared ? a->shared_up : a->up) + w;
        d.y = m->up + y;
        dot_tile(&d);
        for (int64_t r = 0; r < at.n_rows; r++)
            swiglu_ref(
                &(struct swiglu_args){m->gate + y + r * a->F, m->up + y + r * a->F, at.n_out});
    }
}

static void down_items(void *arg, int64_t begin, int64_t end)
{
    struct moe *m = arg;
    const struct moe_args *a = m->a;
    struct tile at = {0};
    for (int64_t i = begin; i < end; i++) {
        tile_seek(m, i, a->H, &at);
        bool shared = at.expert == a->E;
        int64_t w = ((shared ? 0 : (int64_t)at.expert * a->H) + at.out) * a->F;
        dot_tile(&(struct dot_tile){
            .x = m->gate + at.entry * a->F,
            .w = (shared ? a->shared_down : a->down) + w,
            .y = m->down + at.entry * a->H + at.out,
            .x_stride = a->F,
            .y_stride = a->H,
            .w_stride = a->F,
            .n_rows = (int)at.n_rows,
            .n_out = (int)at.n_out,
            .n_in = a->F,
        });
    }
}

VEC_INLINE void add_scaled(float *y, const float *x, float scale, int n)
{
    int i = 0;
    for (; i + VEC_WIDTH <= n; i += VEC_WIDTH)
        vec_store(y + i, vec_load(y + i) + vec_load(x + i) * scale);
    if (i < n)
        vec_store_part(y + i, vec_load_part(y + i, n - i) + vec_load_part(x + i, n - i) * scale,
                       n - i);
}

static void add_row(const struct moe *m, int64_t t)
{
    const struct moe_args *a = m->a;
    const int32_t *expert = a->expert + t * a->k, *entry = m->entry + t * a->k;
    float *y = a->y + t * a->H;
    for (int i = 0; i < a->k; i++) {
        // The i-th entry in expert order; its weight stands where the router put the expert.
        int j = 0;
        while (j < a->k - 1 &&
               !(entry[i] >= m->from[expert[j]] && entry[i] < m->from[expert[j] + 1]))
            j++;
        add_scaled(y, m->down + (int64_t)entry[i] * a->H, a->weight[t * a->k + j], a->H);
    }
    add_scaled(y, m->down + ((int64_t)a->T * a->k + t) * a->H, 1.0f, a->H);
}

static void add_rows(void *arg, int64_t begin, int64_t end)
{
    for (int64_t t = begin; t < end; t++)
        add_row(arg, t);
}
