/* mock_costs.c: see mock_costs.h. */
#include "common/engine/mock_costs.h"

#include <string.h>

#include "common/base/json.h"
#include "common/base/own.h"

#define MAX_BATCH 1e6
#define MAX_MS    60000.0

/* verify_row: 64 windows of three rows took 25.4 ms with two drafts, 256 of them 34.9 ms. */
const struct mock_costs mock_costs_h100 = {
    .decode =
        {7, {{1, 4.50}, {8, 9.62}, {32, 18.3}, {64, 20.5}, {128, 22.9}, {256, 26.2}, {512, 33.5}}},
    .verify_row = {6,
                   {{1, 0.73}, {8, 0.36}, {32, 0.053}, {64, 0.0264}, {256, 0.0130}, {512, 0.0130}}},
    .draft =
        {7, {{1, 0.40}, {8, 0.47}, {32, 0.69}, {64, 0.76}, {128, 0.85}, {256, 1.01}, {512, 1.48}}},
    .prefill_tokens_per_s = 66000,
    .prefill_chunk_ms = 20,
};

static double curve_at(const struct mock_curve *c, double batch)
{
    if (batch <= c->at[0].batch || c->n == 1)
        return c->at[0].ms;
    int i = 1;
    while (i + 1 < c->n && batch > c->at[i].batch)
        i++;
    double slope = (c->at[i].ms - c->at[i - 1].ms) / (c->at[i].batch - c->at[i - 1].batch);
    double ms = c->at[i - 1].ms + slope * (batch - c->at[i - 1].batch);
    return MAX(ms, 0); // a falling line behind its last point
}

double mock_costs_step_ms(const struct mock_costs *c, int n_seqs, int n_rows)
{
    return curve_at(&c->decode, n_seqs) + (n_rows - n_seqs) * curve_at(&c->verify_row, n_seqs);
}

double mock_costs_draft_ms(const struct mock_costs *c, int n_seqs)
{
    return curve_at(&c->draft, n_seqs);
}

double mock_costs_chunk_ms(const struct mock_costs *c, int n_rows)
{
    return MAX(c->prefill_chunk_ms, n_rows / c->prefill_tokens_per_s * 1e3);
}

static enum err curve_read(const json_t *root, const char *name, struct mock_curve *ret)
{
    const json_t *list = json_object_get(root, name);
    if (!list)
        return ERR_OK;
    struct mock_curve c = {.n = (int)MIN(json_array_size(list), MOCK_MAX_POINTS + 1u)};
    if (!json_is_array(list) || c.n < 1 || c.n > MOCK_MAX_POINTS)
        return err_set(ERR_INVALID, "%s must be a list of 1 to %d [batch, ms]", name,
                       MOCK_MAX_POINTS);
    for (int i = 0; i < c.n; i++) {
        const json_t *pair = json_array_get(list, (size_t)i);
        const json_t *batch = json_array_get(pair, 0), *ms = json_array_get(pair, 1);
        if (json_array_size(pair) != 2 || !json_is_number(batch) || !json_is_number(ms))
            return err_set(ERR_INVALID, "%s[%d] must be [batch, ms]", name, i);
        c.at[i].batch = json_number_value(batch);
        c.at[i].ms = json_number_value(ms);
        if (!(c.at[i].batch >= 1 && c.at[i].batch <= MAX_BATCH) ||
            !(c.at[i].ms >= 0 && c.at[i].ms <= MAX_MS))
            return err_set(ERR_INVALID, "%s[%d] is [%g, %g], must be 1 to %g and 0 to %g ms", name,
                           i, c.at[i].batch, c.at[i].ms, MAX_BATCH, MAX_MS);
        if (i > 0 && c.at[i].batch <= c.at[i - 1].batch)
            return err_set(ERR_INVALID, "%s[%d]: batch %g does not ascend", name, i, c.at[i].batch);
    }
    *ret = c;
    return ERR_OK;
}

static enum err path_read(const json_t *v, char ret[MOCK_MAX_PATH])
{
    if (!v)
        return ERR_OK;
    if (!json_is_string(v) || json_string_length(v) >= MOCK_MAX_PATH)
        return err_set(ERR_INVALID, "outputs must be a path of less than %d bytes", MOCK_MAX_PATH);
    memcpy(ret, json_string_value(v), json_string_length(v) + 1);
    return ERR_OK;
}

static enum err costs_read(const json_t *root, struct mock_costs *c)
{
    static const char *const members[] = {"decode_ms",        "verify_row_ms",
                                          "draft_ms",         "prefill_tokens_per_s",
                                          "prefill_chunk_ms", "outputs"};
    if (!json_is_object(root))
        return err_set(ERR_INVALID, "not an object");
    const char *key;
    json_t *v;
    json_object_foreach ((json_t *)root, key, v) {
        size_t i = 0;
        while (i < ARRAY_LEN(members) && strcmp(key, members[i]) != 0)
            i++;
        if (i == ARRAY_LEN(members))
            return err_set(ERR_INVALID, "unknown member %.40s", key);
    }
    TRY(curve_read(root, "decode_ms", &c->decode));
    TRY(curve_read(root, "verify_row_ms", &c->verify_row));
    TRY(curve_read(root, "draft_ms", &c->draft));
    TRY(json_get_double(root, "prefill_tokens_per_s", 1, 1e9, &c->prefill_tokens_per_s));
    TRY(json_get_double(root, "prefill_chunk_ms", 0, MAX_MS, &c->prefill_chunk_ms));
    return path_read(json_object_get(root, "outputs"), c->outputs);
}

enum err mock_costs_load(const char *path, struct mock_costs *ret)
{
    json_t *root = NULL;
    TRY(json_parse_file(path, &json_limits_file, &root));
    struct mock_costs c = mock_costs_h100;
    enum err err = costs_read(root, &c);
    json_decref(root);
    if (err != ERR_OK)
        return err_prefix(err, "%s", path);
    *ret = c;
    return ERR_OK;
}
