/* sample_ref.c: the draw, a pure function of one row.
 *
 * mask -> bias -> penalties -> temperature -> top-k -> top-p -> min-p -> Gumbel-max. Every filter
 * keeps a prefix of the candidates in the order (value descending, id ascending), so none needs a
 * full sort: values go into buckets by their distance to the largest, whole buckets are kept or
 * dropped, and only the one in which the border falls is sorted.
 *
 * The noise of id i is lane i % 4 of Philox(seed; position, i / 4): u = (x + 0.5) / 2^32,
 * g = -log(-log u) in double precision (u rounds to 1 in fp32). It does not depend on what
 * survived, so only survivors need it; and most of them cannot win, which two cheap bounds show.
 *
 * Mass is counted in integers (sample_math.h), so top-p's border does not depend on the order of
 * the sum: sample.cu finds the same one.
 */
#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/par.h"
#include "kernels/sample_math.h"

struct candidate {
    float z;
    int32_t id;
};

static void items(void *arg, int64_t begin, int64_t end);
static void draw(const struct sample_args *a, int t, struct candidate *list);
static int gather(const struct sample_args *a, int t, struct candidate *list);
static int keep_best(struct candidate *list, int n, int k, float p);
static int32_t gumbel_max(const struct candidate *list, int n, const struct sample_row *row);
static void logprobs(const struct sample_args *a, int t);

void sample_ref(const struct sample_args *a, struct par *par)
{
    par_for(par, a->T, 1, items, (void *)a);
}

static void items(void *arg, int64_t begin, int64_t end)
{
    const struct sample_args *a = arg;
    struct candidate *list = (struct candidate *)(a->work + 2 * (int64_t)a->V * par_self());
    for (int64_t t = begin; t < end; t++) {
        draw(a, (int)t, list);
        logprobs(a, (int)t);
    }
}

static bool better(struct candidate a, struct candidate b)
{
    return a.z > b.z || (a.z == b.z && a.id < b.id);
}

static void draw(const struct sample_args *a, int t, struct candidate *list)
{
    const struct sample_row *row = &a->rows[t];
    int n = gather(a, t, list);
    if (n == 0) { // everything is banned or NaN: an answer that is at least an id
        a->id[t] = 0;
        return;
    }
    int best = 0;
    for (int i = 1; i < n; i++)
        if (list[i].z > list[best].z)
            best = i;
    a->id[t] = list[best].id;
    if (!(row->temperature > 0) || row->top_k == 1)
        return;

    float top = list[best].z;
    for (int i = 0; i < n; i++) // relative to the best, so that nothing overflows
        list[i].z = fmaxf((list[i].z - top) / row->temperature, -FLT_MAX);
    if (row->top_k > 0 && row->top_k < n)
        n = keep_best(list, n, row->top_k, 1);
    if (row->top_p < 1.0f)
        n = keep_best(list, n, n, row->top_p);
    if (row->min_p > 0) {
        float least = sample_least(row->min_p);
        int kept = 0;
        for (int i = 0; i < n; i++)
            if (list[i].z >= least)
                list[kept++] = list[i];
        n = kept;
    }
    a->id[t] = gumbel_max(list, n, row);
}

static int32_t count_ahead(const struct sample_row *row, int32_t id, int n)
{
    int32_t count = 0;
    for (int i = 0; i < n; i++)
        count += row->ahead[i] == id;
    return count;
}

static void penalise(const struct sample_row *row, int32_t id, int32_t count, int n_valid,
                     struct candidate *list)
{
    if (id >= 0 && id < n_valid)
        list[id].z =
            sample_penalise(list[id].z, count, row->repetition, row->frequency, row->presence);
}

/* list[id] is every id's. */
static void adjust(const struct sample_row *row, int n_valid, struct candidate *list)
{
    for (int i = 0; i < row->n_bias; i++)
        if (row->bias_id[i] >= 0 && row->bias_id[i] < n_valid)
            list[row->bias_id[i]].z += row->bias_value[i];
    uint32_t known = 0; // of ahead: has an entry in seen
    for (int i = 0; i < row->n_seen; i++) {
        struct sample_seen seen = row->seen[i];
        for (int k = 0; k < row->n_ahead; k++)
            if (row->ahead[k] == seen.id) {
                seen.count++;
                known |= 1u << k;
            }
        penalise(row, seen.id, seen.count, n_valid, list);
    }
    for (int k = 0; k < row->n_ahead; k++) {
        int32_t id = row->ahead[k];
        if (!(known >> k & 1) && count_ahead(row, id, k) == 0)
            penalise(row, id, count_ahead(row, id, row->n_ahead), n_valid, list);
    }
}

/* Ids that may be drawn with biased and penalised logits, ascending. */
static int gather(const struct sample_args *a, int t, struct candidate *list)
{
    const struct sample_row *row = &a->rows[t];
    const float *logits = a->logits + (int64_t)t * a->V;
    int n = 0;
    for (int32_t id = 0; id < a->n_valid; id++)
        list[id].z = logits[id];
    adjust(row, a->n_valid, list);
    for (int32_t id = 0; id < a->n_valid; id++) {
        float z = list[id].z;
        bool may = z == z && (!row->allowed || row->allowed[id / 32] >> (id % 32) & 1);
        list[n] = (struct candidate){fminf(fmaxf(z, -FLT_MAX), FLT_MAX), id};
        n += may;
    }
    for (int i = 0; i < row->n_banned; i++) {
        for (int lo = 0, hi = n - 1; lo <= hi;) {
            int mid = (lo + hi) / 2;
            if (list[mid].id == row->banned[i]) {
                memmove(list + mid, list + mid + 1, sizeof(*list) * (size_t)(--n - mid));
                break;
            }
            if (list[mid].id < row->banned[i])
                lo = mid + 1;
            else
                hi = mid - 1;
        }
    }
    return n;
}

/* Heapsort, best first: it needs no memory and has no bad cases. */
static void sort(struct candidate *list, int n)
{
    for (int size = n, root = n / 2; size > 1;) {
        struct candidate c;
        if (root > 0) {
            c = list[--root];
        } else {
            c = list[--size];
            list[size] = list[0];
        }
        int at = root;
        for (int child; (child = 2 * at + 1) < size; at = child) { // the worst is on top
            if (child + 1 < size && better(list[child], list[child + 1]))
                child++;
            if (!better(c, list[child]))
                break;
            list[at] = list[child];
        }
        list[at] = c;
    }
}

static int bucket(float z)
{
    return z > -(float)(SAMPLE_N_BUCKETS - 1) / SAMPLE_PER_UNIT ? (int)(z * -SAMPLE_PER_UNIT)
                                                                : SAMPLE_N_BUCKETS - 1;
}

/* Keeps the best k candidates, or fewer if those hold the share p of the list's mass (the one that
 * reaches it included). Values are relative to the largest, 0. Returns how many. */
static int keep_best(struct candidate *list, int n, int k, float p)
{
    uint64_t mass[SAMPLE_N_BUCKETS] = {0}, total = 0;
    int count[SAMPLE_N_BUCKETS] = {0};
    for (int i = 0; i < n; i++) {
        int b = bucket(list[i].z);
        count[b]++;
        if (p < 1)
            mass[b] += sample_weight(list[i].z);
    }
    for (int b = 0; b < SAMPLE_N_BUCKETS; b++)
        total += mass[b];
    uint64_t want = p < 1 ? sample_share(p, total) : UINT64_MAX, sum = 0;
    int border = 0, kept = 0;
    while (border < SAMPLE_N_BUCKETS - 1 && kept + count[border] < k && sum + mass[border] < want) {
        kept += count[border];
        sum += mass[border];
        border++;
    }
    // The kept ones go to the front, the border's behind them; only those are sorted.
    int at = 0;
    for (int i = 0; i < n; i++)
        if (bucket(list[i].z) < border) {
            struct candidate c = list[i];
            list[i] = list[at];
            list[at++] = c;
        }
    int end = at;
    for (int i = at; i < n; i++)
        if (bucket(list[i].z) == border) {
            struct candidate c = list[i];
            list[i] = list[end];
            list[end++] = c;
        }
    sort(list + at, end - at);
    while (at < end && at < k && sum < want)
        sum += p < 1 ? sample_weight(list[at].z) : 0, at++;
    return at;
}

static int32_t gumbel_max(const struct candidate *list, int n, const struct sample_row *row)
{
    const uint32_t key[2] = {(uint32_t)row->seed, (uint32_t)(row->seed >> 32)};
    uint32_t noise[4];
    int32_t block = -1, id = -1;
    double best = -INFINITY;
    int first = 0; // the likeliest goes first: a high score early makes the bounds bite
    for (int i = 1; i < n; i++)
        first = list[i].z > list[first].z ? i : first;
    for (int i = -1; i < n; i++) {
        struct candidate c = list[i < 0 ? first : i];
        if (c.z + SAMPLE_MAX_NOISE < best)
            continue;
        if (c.id / 4 != block) {
            block = c.id / 4;
            sample_philox((const uint32_t[4]){(uint32_t)row->position, (uint32_t)block, 0, 0}, key,
                          noise);
        }
        uint32_t x = noise[c.id % 4];
        if (c.z + sample_noise_bound(x) < best)
            continue;
        double score = c.z + sample_noise(x);
        if (score > best || (score == best && c.id < id)) {
            best = score;
            id = c.id;
        }
    }
    return id;
}

/* Of the model's own distribution: neither penalties nor temperature. */
static void logprobs(const struct sample_args *a, int t)
{
    int n_top = a->rows[t].n_logprobs;
    if (!a->logprob)
        return;
    a->logprob[t] = 0;
    if (n_top < 0)
        return;
    const float *logits = a->logits + (int64_t)t * a->V;
    float max = -INFINITY;
    for (int i = 0; i < a->n_valid; i++)
        max = logits[i] > max ? logits[i] : max;
    uint64_t sum = 0;
    for (int i = 0; i < a->n_valid; i++)
        sum += sample_weight(logits[i] - max);
    double norm = max + sample_log((double)sum * 0x1p-44);
    a->logprob[t] = (float)(logits[a->id[t]] - norm);
    if (!a->top_id || !a->top_logprob || a->max_top == 0)
        return;

    int32_t *id = a->top_id + (int64_t)t * a->max_top;
    float *value = a->top_logprob + (int64_t)t * a->max_top;
    for (int i = 0; i < a->max_top; i++) {
        id[i] = -1;
        value[i] = -INFINITY;
    }
    n_top = n_top < a->max_top ? n_top : a->max_top;
    int n = 0;
    for (int32_t i = 0; i < a->n_valid; i++) {
        if (n_top == 0 || !(logits[i] == logits[i]) || (n == n_top && !(logits[i] > value[n - 1])))
            continue;
        int at = n < n_top ? n++ : n - 1;
        for (; at > 0 && logits[i] > value[at - 1]; at--) {
            value[at] = value[at - 1];
            id[at] = id[at - 1];
        }
        value[at] = logits[i];
        id[at] = i;
    }
    for (int i = 0; i < n; i++)
        value[i] = (float)(value[i] - norm);
}

void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4])
{
    sample_philox(counter, key, ret);
}
