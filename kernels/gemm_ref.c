/* gemm_ref.c: y = x w^T with bf16 weights, by tiles of rows and outputs.
 *
 * Four weight rows are widened to fp32 into a buffer that stays in the first-level cache, and used
 * for up to 32 rows of x; the inner loop keeps as many sums in registers as there are (4 rows x 4
 * outputs x 16 lanes with AVX-512). Long inputs are cut into pieces: between them the lanes rest in
 * memory unchanged, so the order of additions (vec.h) does not know about tiles or pieces.
 */
#include "kernels/vec.h"

#define OUT   4                            /* outputs per block */
#define ROWS  (VEC_MANY_REGISTERS ? 4 : 2) /* rows per block, at most */
#define PIECE 512                          /* inputs per piece */
#define GROUP 16                           /* outputs per parallel item */
#define GRAIN 32768                        /* multiplications worth handing to a thread */

struct weights_piece {
    float w[OUT][PIECE];
};
typedef float lanes[OUT][SUM_LANES];

static void items(void *arg, int64_t begin, int64_t end);

void gemm_ref(const struct gemm_args *a, struct par *par)
{
    int64_t row_tiles = (a->T + DOT_TILE_ROWS - 1) / DOT_TILE_ROWS;
    int64_t groups = (a->n_out + GROUP - 1) / GROUP;
    int64_t per_item = (int64_t)GROUP * a->n_in * (a->T < DOT_TILE_ROWS ? a->T : DOT_TILE_ROWS);
    par_for(par, row_tiles * groups, per_item > 0 ? GRAIN / per_item + 1 : 1, items, (void *)a);
}

/* Items run through the row tiles of one group of outputs, then of the next: a group's weights are
 * small enough to stay in the cache meanwhile. */
static void items(void *arg, int64_t begin, int64_t end)
{
    const struct gemm_args *a = arg;
    int64_t row_tiles = (a->T + DOT_TILE_ROWS - 1) / DOT_TILE_ROWS;
    for (int64_t i = begin; i < end; i++) {
        int64_t o = i / row_tiles * GROUP, t = i % row_tiles * DOT_TILE_ROWS;
        dot_tile(&(struct dot_tile){
            .x = a->x + t * a->x_stride,
            .w = a->w + o * a->n_in,
            .y = a->y + t * a->y_stride + o,
            .x_stride = a->x_stride,
            .y_stride = a->y_stride,
            .w_stride = a->n_in,
            .n_rows = (int)(a->T - t < DOT_TILE_ROWS ? a->T - t : DOT_TILE_ROWS),
            .n_out = (int)(a->n_out - o < GROUP ? a->n_out - o : GROUP),
            .n_in = a->n_in,
            .accumulate = a->accumulate,
        });
    }
}

/* Widens n inputs of up to OUT weight rows; missing rows and the last lanes' rest become zeros. */
VEC_INLINE void piece_load(struct weights_piece *p, const bf16_t *w, int64_t stride, int n_out,
                           int n)
{
    for (int o = 0; o < OUT; o++) {
        int padded = (n + SUM_LANES - 1) / SUM_LANES * SUM_LANES, i = 0;
        if (o < n_out)
            for (; i < n; i++)
                p->w[o][i] = bf16_to_f32(w[o * stride + i]);
        for (; i < padded; i++)
            p->w[o][i] = 0.0f;
    }
}

/* Adds one piece to the lanes of R rows, a strip of lanes at a time. */
VEC_INLINE void block(const int R, const float *const *x, const struct weights_piece *p, int n,
                      lanes *sums)
{
    for (int strip = 0; strip < SUM_LANES; strip += VEC_WIDTH) {
        vec sum[4][OUT];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int o = 0; o < OUT; o++)
                sum[r][o] = vec_load(sums[r][o] + strip);
        int i = strip;
        for (; i + VEC_WIDTH <= n; i += SUM_LANES) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                vec v = vec_load(x[r] + i);
#pragma GCC unroll 4
                for (int o = 0; o < OUT; o++)
                    sum[r][o] += v * vec_load(p->w[o] + i);
            }
        }
        if (i < n) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                vec v = vec_load_part(x[r] + i, n - i);
#pragma GCC unroll 4
                for (int o = 0; o < OUT; o++)
                    sum[r][o] += v * vec_load(p->w[o] + i);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int o = 0; o < OUT; o++)
                vec_store(sums[r][o] + strip, sum[r][o]);
    }
}

void dot_tile(const struct dot_tile *t)
{
    struct weights_piece piece;
    lanes sums[DOT_TILE_ROWS];
    for (int o = 0; o < t->n_out; o += OUT) {
        int n_out = t->n_out - o < OUT ? t->n_out - o : OUT;
        memset(sums, 0, sizeof(sums[0]) * (size_t)t->n_rows);
        for (int k = 0; k < t->n_in; k += PIECE) {
            int n = t->n_in - k < PIECE ? t->n_in - k : PIECE;
            piece_load(&piece, t->w + o * t->w_stride + k, t->w_stride, n_out, n);
            for (int r = 0; r < t->n_rows; r += ROWS) {
                const float *x[4];
                int n_rows = t->n_rows - r < ROWS ? t->n_rows - r : ROWS;
                for (int i = 0; i < n_rows; i++)
                    x[i] = t->x + (t->x_row ? t->x_row[r + i] : r + i) * t->x_stride + k;
                if (n_rows == 4)
                    block(4, x, &piece, n, sums + r);
                else if (n_rows == 3)
                    block(3, x, &piece, n, sums + r);
                else if (n_rows == 2)
                    block(2, x, &piece, n, sums + r);
                else
                    block(1, x, &piece, n, sums + r);
            }
        }
        for (int r = 0; r < t->n_rows; r++) {
            float *y = t->y + r * t->y_stride + o;
            vec4 sum = lanes_sum4(sums[r]);
            for (int i = 0; i < n_out; i++)
                y[i] = t->accumulate ? y[i] + sum[i] : sum[i];
        }
    }
}
