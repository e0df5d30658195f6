/* model_info.c: a few fields of three files. Everything else in them is the workers' business. */
#include "router/model_info.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/base/hash.h"
#include "common/base/json.h"
#include "common/base/own.h"

#define MAX_TOKENIZER_BYTES (64u << 20)

/* One id or a list of them; absent leaves ret alone. */
static enum err get_eos(const json_t *config, struct model_info *ret)
{
    const json_t *e = json_object_get(config, "eos_token_id");
    if (!e || json_is_null(e))
        return ERR_OK;
    size_t n = json_is_array(e) ? json_array_size(e) : 1;
    if (n == 0 || n > MODEL_INFO_MAX_EOS)
        return err_set(ERR_BAD_MODEL, "eos_token_id has %zu ids, not 1 to %d", n,
                       MODEL_INFO_MAX_EOS);
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_is_array(e) ? json_array_get(e, i) : e;
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= ret->vocab)
            return err_set(ERR_BAD_MODEL, "eos_token_id: an id is not in 0 .. %d", ret->vocab - 1);
        ret->eos[i] = (int32_t)json_integer_value(id);
    }
    ret->n_eos = (int)n;
    return ERR_OK;
}

static enum err read_config(const json_t *c, struct model_info *ret)
{
    int64_t vocab = 0, positions = 0;
    TRY(json_get_int(c, "vocab_size", 1, INT32_MAX, &vocab));
    TRY(json_get_int(c, "max_position_embeddings", 1, 1 << 20, &positions));
    if (!vocab || !positions)
        return err_set(ERR_BAD_MODEL, "%s is missing",
                       vocab ? "max_position_embeddings" : "vocab_size");
    ret->vocab = (int32_t)vocab;
    ret->max_positions = (uint32_t)positions;
    return get_eos(c, ret);
}

static enum err read_generation_config(const json_t *c, struct model_info *ret)
{
    int64_t top_k = ret->top_k;
    TRY(json_get_double(c, "temperature", 0, 100, &ret->temperature));
    TRY(json_get_double(c, "top_p", 0, 1, &ret->top_p));
    TRY(json_get_int(c, "top_k", -1, INT32_MAX, &top_k));
    ret->top_k = (int)top_k;
    return ret->n_eos ? ERR_OK : get_eos(c, ret);
}

/* Runs read over DIR/file; every failure names the file. */
static enum err with_file(const char *dir, const char *file, bool optional,
                          enum err (*read)(const json_t *, struct model_info *),
                          struct model_info *ret)
{
    char path[4096];
    struct stat st;
    if ((size_t)snprintf(path, sizeof(path), "%s/%s", dir, file) >= sizeof(path))
        return err_set(ERR_INVALID, "model_dir is too long");
    if (optional && stat(path, &st) && errno == ENOENT)
        return ERR_OK;
    json_t *json = NULL;
    TRY(json_parse_file(path, &json_limits_file, &json));
    enum err e =
        json_is_object(json) ? read(json, ret) : err_set(ERR_BAD_MODEL, "not a JSON object");
    json_decref(json);
    return e == ERR_OK ? e : err_prefix(ERR_BAD_MODEL, "%s", path);
}

enum err model_info_load(const char *dir, struct model_info *ret)
{
    struct model_info m = {.temperature = 1, .top_p = 1};
    struct stat st;
    if (!dir || !dir[0])
        return err_set(ERR_INVALID, "--model_dir is needed: the checkpoint's directory");
    if (stat(dir, &st))
        return err_set(ERR_INVALID, "--model_dir %s: %s", dir, strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return err_set(ERR_INVALID, "--model_dir %s: not a directory", dir);

    OWNED_MEM char *real = realpath(dir, NULL);
    if (!real)
        return err_set(ERR_INVALID, "--model_dir %s: %s", dir, strerror(errno));
    const char *slash = strrchr(real, '/');
    snprintf(m.name, sizeof(m.name), "%s", slash && slash[1] ? slash + 1 : "model");

    TRY(with_file(dir, "config.json", false, read_config, &m));
    TRY(with_file(dir, "generation_config.json", true, read_generation_config, &m));
    if (!m.n_eos)
        return err_set(ERR_BAD_MODEL, "%s/config.json: eos_token_id is missing", dir);

    snprintf(m.tokenizer_path, sizeof(m.tokenizer_path), "%s/tokenizer.json", dir);
    OWNED_MEM char *bytes = NULL;
    size_t n = 0;
    TRY(file_read(m.tokenizer_path, MAX_TOKENIZER_BYTES, &bytes, &n));
    m.tokenizer_hash = hash_bytes(0, bytes, n);
    *ret = m;
    return ERR_OK;
}
