/* mock_outputs.c: see mock_outputs.h. */
#include "common/engine/mock_outputs.h"

#include <stdlib.h>

#include "common/base/json.h"

#define MAX_OUTPUTS 65535u /* what a seed can name */

struct mock_outputs {
    size_t n;
    size_t *end; /* [n] behind the last id of each */
    int32_t *ids;
};

void mock_outputs_destroy(struct mock_outputs *o)
{
    if (!o)
        return;
    free(o->end);
    free(o->ids);
    free(o);
}

static enum err outputs_read(const json_t *root, int32_t n_ids, struct mock_outputs **ret)
{
    size_t n = json_array_size(root), total = 0, i, k;
    json_t *output, *id;
    if (!json_is_array(root) || n > MAX_OUTPUTS)
        return err_set(ERR_INVALID, "must be a list of at most %u outputs", MAX_OUTPUTS);
    json_array_foreach (root, i, output)
        total += json_array_size(output);
    OWNED(mock_outputs) o = calloc(1, sizeof(*o));
    if (!o)
        return err_set(ERR_NOMEM, "no memory for outputs");
    o->n = n;
    o->end = malloc((n + 1) * sizeof(*o->end));
    o->ids = malloc((total + 1) * sizeof(*o->ids));
    if (!o->end || !o->ids)
        return err_set(ERR_NOMEM, "no memory for outputs of %zu tokens", total);
    total = 0;
    json_array_foreach (root, i, output) {
        if (!json_is_array(output))
            return err_set(ERR_INVALID, "output %zu must be a list of token ids", i);
        json_array_foreach (output, k, id) {
            if (!json_is_integer(id) || json_integer_value(id) < 0 ||
                json_integer_value(id) >= n_ids)
                return err_set(ERR_INVALID, "output %zu: [%zu] must be a token id, 0 to %d", i, k,
                               n_ids - 1);
            o->ids[total++] = (int32_t)json_integer_value(id);
        }
        o->end[i] = total;
    }
    *ret = take(&o);
    return ERR_OK;
}

enum err mock_outputs_load(const char *path, int32_t n_ids, struct mock_outputs **ret)
{
    json_t *root = NULL;
    TRY(json_parse_file(path, &json_limits_file, &root));
    enum err err = outputs_read(root, n_ids, ret);
    json_decref(root);
    return err == ERR_OK ? ERR_OK : err_prefix(err, "%s", path);
}

bool mock_outputs_at(const struct mock_outputs *o, uint64_t seed, uint32_t position,
                     int32_t *ret_id)
{
    size_t first = seed & 0xffff, number = seed >> 16 & 0xffff;
    if (!o || number == 0 || number > o->n || position < first)
        return false;
    size_t at = (number > 1 ? o->end[number - 2] : 0) + (position - first);
    if (at >= o->end[number - 1])
        return false;
    *ret_id = o->ids[at];
    return true;
}
