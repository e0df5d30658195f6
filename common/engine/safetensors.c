/* safetensors.c: see safetensors.h.
 *
 * A checkpoint comes from the network, so a header is taken for hostile: nothing in it is used
 * before it is checked against the size of the open file, and tensors must tile the data exactly
 * (holes hide data, overlaps make a small file claim any amount of memory).
 */
#include "common/engine/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

#include "common/base/json.h"

#define MAX_HEADER_BYTES (16u << 20)
#define MAX_INDEX_BYTES  (64u << 20)
#define MAX_SHARDS       4096
#define MAX_OFFSET       (INT64_C(1) << 53)
#define INDEX_NAME       "model.safetensors.index.json"
#define SINGLE_NAME      "model.safetensors"

static const struct json_limits header_limits = {
    .max_bytes = MAX_HEADER_BYTES, .max_depth = 8, .max_containers = 600000, .max_values = 2000000};

struct shard {
    char *name; // file name without directory, for sentences
    int fd;
    json_t *header; // owns the tensors' names
};

struct safetensors {
    struct shard *shards;
    size_t n_shards;
    struct st_tensor *tensors; // by name
    size_t n_tensors;
};

static enum err open_indexed(struct safetensors *s, const char *dir, const char *index_path);
static enum err shard_open(struct safetensors *s, const char *dir, const char *name, int *ret);
static enum err header_check(const json_t *header, uint64_t data_begin, uint64_t file_bytes,
                             int shard, struct st_tensor **ret, size_t *ret_n);
static enum err tensor_check(const char *name, const json_t *v, uint64_t data_bytes,
                             struct st_tensor *ret);
static enum err read_at(const struct shard *shard, uint64_t offset, void *to, uint64_t n);
static enum err bad_model(enum err err);
static int by_name(const void *a, const void *b);
static int by_offset(const void *a, const void *b);

/* ---- opening --------------------------------------------------------------------------------- */

enum err safetensors_open(const char *dir, struct safetensors **ret)
{
    OWNED(safetensors) s = calloc(1, sizeof(*s));
    if (!s)
        return err_set(ERR_NOMEM, "no memory for a checkpoint");
    char path[PATH_MAX];
    if (snprintf(path, sizeof(path), "%s/%s", dir, INDEX_NAME) >= (int)sizeof(path))
        return err_set(ERR_INVALID, "the path %.100s... is too long", dir);
    if (access(path, F_OK) == 0) {
        TRY(open_indexed(s, dir, path));
    } else {
        s->shards = calloc(1, sizeof(*s->shards));
        if (!s->shards)
            return err_set(ERR_NOMEM, "no memory for a checkpoint");
        int shard;
        enum err err = shard_open(s, dir, SINGLE_NAME, &shard);
        if (err == ERR_NOT_FOUND)
            return err_set(ERR_NOT_FOUND, "%s has neither %s nor %s", dir, INDEX_NAME, SINGLE_NAME);
        TRY(err);
        qsort(s->tensors, s->n_tensors, sizeof(*s->tensors), by_name);
    }
    *ret = take(&s);
    return ERR_OK;
}

static enum err open_shards(struct safetensors *s, const char *dir, const json_t *map)
{
    const char *name;
    json_t *v;
    json_object_foreach ((json_t *)map, name, v) {
        const char *file = json_string_value(v);
        if (!file || !file[0] || file[0] == '.' || strchr(file, '/'))
            return err_set(ERR_BAD_MODEL, "%s: weight_map: %.100s: '%.100s' is not a file name",
                           INDEX_NAME, name, file ? file : "(not a string)");
        size_t i = 0;
        while (i < s->n_shards && strcmp(s->shards[i].name, file) != 0)
            i++;
        if (i < s->n_shards)
            continue;
        if (s->n_shards == MAX_SHARDS)
            return err_set(ERR_BAD_MODEL, "%s names more than %d files", INDEX_NAME, MAX_SHARDS);
        int shard;
        TRY(shard_open(s, dir, file, &shard));
    }
    qsort(s->tensors, s->n_tensors, sizeof(*s->tensors), by_name);
    // The index and the shards must say the same, in both directions.
    json_object_foreach ((json_t *)map, name, v) {
        const struct st_tensor *t = safetensors_find(s, name);
        if (!t)
            return err_set(ERR_BAD_MODEL, "%s: %.100s should be in %.100s, which does not have it",
                           INDEX_NAME, name, json_string_value(v));
    }
    for (size_t i = 0; i < s->n_tensors; i++) {
        const struct st_tensor *t = &s->tensors[i];
        const char *file = s->shards[t->shard].name;
        const char *want = json_string_value(json_object_get(map, t->name));
        if (!want || strcmp(want, file) != 0)
            return err_set(ERR_BAD_MODEL, "%.100s contains %.100s, which %s places in %.100s", file,
                           t->name, INDEX_NAME, want ? want : "no file");
    }
    return ERR_OK;
}

static enum err open_indexed(struct safetensors *s, const char *dir, const char *index_path)
{
    struct json_limits limits = header_limits;
    limits.max_bytes = MAX_INDEX_BYTES;
    s->shards = calloc(MAX_SHARDS, sizeof(*s->shards));
    if (!s->shards)
        return err_set(ERR_NOMEM, "no memory for a checkpoint");
    json_t *root = NULL;
    enum err err = json_parse_file(index_path, &limits, &root);
    if (err != ERR_OK)
        return bad_model(err);
    const json_t *map = json_object_get(root, "weight_map");
    if (!json_is_object(map))
        err = err_set(ERR_BAD_MODEL, "%s: weight_map is missing", index_path);
    else
        err = open_shards(s, dir, map);
    json_decref(root);
    return err;
}

void safetensors_destroy(struct safetensors *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->n_shards; i++) {
        free(s->shards[i].name);
        json_decref(s->shards[i].header);
        if (s->shards[i].fd >= 0)
            close(s->shards[i].fd);
    }
    free(s->shards);
    free(s->tensors);
    free(s);
}

/* Opens a file, checks its header and adds its tensors. */
static enum err shard_open(struct safetensors *s, const char *dir, const char *name, int *ret)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof(path), "%s/%s", dir, name) >= (int)sizeof(path))
        return err_set(ERR_INVALID, "the path %.100s... is too long", dir);
    OWNED_FD fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        return err_set(errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return err_set(ERR_BAD_MODEL, "%s: not a regular file", path);
    struct shard *shard = &s->shards[s->n_shards];
    shard->name = strdup(name);
    if (!shard->name)
        return err_set(ERR_NOMEM, "no memory for a checkpoint");
    shard->fd = fd;
    fd = -1; // the shard owns it now
    *ret = (int)s->n_shards++;

    uint64_t file_bytes = (uint64_t)st.st_size, header_bytes = 0;
    uint8_t prefix[8];
    if (file_bytes < sizeof(prefix))
        return err_set(ERR_BAD_MODEL, "%s: %" PRIu64 " bytes are no safetensors file", path,
                       file_bytes);
    TRY(read_at(shard, 0, prefix, sizeof(prefix)));
    for (int i = 0; i < 8; i++)
        header_bytes |= (uint64_t)prefix[i] << (8 * i);
    if (header_bytes > file_bytes - sizeof(prefix))
        return err_set(ERR_BAD_MODEL, "%s: header of %" PRIu64 " bytes in a file of %" PRIu64, path,
                       header_bytes, file_bytes);
    if (header_bytes < 2 || header_bytes > MAX_HEADER_BYTES)
        return err_set(ERR_BAD_MODEL, "%s: header of %" PRIu64 " bytes, allowed are 2 to %u", path,
                       header_bytes, MAX_HEADER_BYTES);
    OWNED_MEM char *text = malloc(header_bytes);
    if (!text)
        return err_set(ERR_NOMEM, "no memory for the header of %s", path);
    TRY(read_at(shard, sizeof(prefix), text, header_bytes));
    OWNED_MEM struct st_tensor *tensors = NULL;
    size_t n = 0;
    enum err err = json_parse(text, header_bytes, &header_limits, &shard->header);
    if (err == ERR_OK)
        err = header_check(shard->header, sizeof(prefix) + header_bytes, file_bytes, *ret, &tensors,
                           &n);
    if (err != ERR_OK)
        return err_prefix(bad_model(err), "%s", path);
    struct st_tensor *all = realloc(s->tensors, (s->n_tensors + n + 1) * sizeof(*all));
    if (!all)
        return err_set(ERR_NOMEM, "no memory for a checkpoint");
    s->tensors = all;
    if (n)
        memcpy(all + s->n_tensors, tensors, n * sizeof(*all));
    s->n_tensors += n;
    return ERR_OK;
}

/* ---- the header ------------------------------------------------------------------------------ */

enum err safetensors_check_header(const char *bytes, size_t n, uint64_t file_bytes)
{
    if (n > MAX_HEADER_BYTES || file_bytes < 8 || n > file_bytes - 8)
        return err_set(ERR_BAD_MODEL, "header of %zu bytes in a file of %" PRIu64, n, file_bytes);
    json_t *header = NULL;
    enum err err = json_parse(bytes, n, &header_limits, &header);
    OWNED_MEM struct st_tensor *tensors = NULL;
    if (err == ERR_OK)
        err = header_check(header, 8 + n, file_bytes, 0, &tensors, &(size_t){0});
    else
        err = bad_model(err);
    json_decref(header);
    return err;
}

/* Returns the header's tensors, in the order of their data; the caller frees. */
static enum err header_check(const json_t *header, uint64_t data_begin, uint64_t file_bytes,
                             int shard, struct st_tensor **ret, size_t *ret_n)
{
    if (!json_is_object(header))
        return err_set(ERR_BAD_MODEL, "the header is not a JSON object");
    uint64_t data_bytes = file_bytes - data_begin, at = 0;
    size_t n = 0;
    OWNED_MEM struct st_tensor *tensors = calloc(json_object_size(header) + 1, sizeof(*tensors));
    if (!tensors)
        return err_set(ERR_NOMEM, "no memory for %zu tensors", json_object_size(header));
    const char *name;
    json_t *v;
    json_object_foreach ((json_t *)header, name, v) {
        if (strcmp(name, "__metadata__") == 0) {
            const char *key;
            json_t *value;
            if (!json_is_object(v))
                return err_set(ERR_BAD_MODEL, "__metadata__ is not an object");
            json_object_foreach (v, key, value) {
                if (!json_is_string(value))
                    return err_set(ERR_BAD_MODEL, "__metadata__: %.100s is not a string", key);
            }
            continue;
        }
        TRY(tensor_check(name, v, data_bytes, &tensors[n]));
        tensors[n++].shard = shard;
    }
    qsort(tensors, n, sizeof(*tensors), by_offset);
    for (size_t i = 0; i < n; i++) {
        if (tensors[i].offset != at)
            return err_set(ERR_BAD_MODEL,
                           "%.100s begins at byte %" PRIu64 " of the data, where the one before "
                           "ends at %" PRIu64,
                           tensors[i].name, tensors[i].offset, at);
        at += tensors[i].n_bytes;
        tensors[i].offset += data_begin;
    }
    if (at != data_bytes)
        return err_set(ERR_BAD_MODEL, "tensors cover %" PRIu64 " bytes, the file has %" PRIu64, at,
                       data_bytes);
    *ret = take(&tensors);
    *ret_n = n;
    return ERR_OK;
}

static bool dtype_find(const char *name, enum st_dtype *ret, unsigned *ret_bytes)
{
    static const struct {
        const char *name;
        enum st_dtype dtype;
        unsigned bytes;
    } table[] = {
        {"BF16", ST_BF16, 2},  {"F32", ST_F32, 4},       {"F16", ST_F16, 2},
        {"F64", ST_OTHER, 8},  {"I64", ST_OTHER, 8},     {"U64", ST_OTHER, 8},
        {"I32", ST_OTHER, 4},  {"U32", ST_OTHER, 4},     {"I16", ST_OTHER, 2},
        {"U16", ST_OTHER, 2},  {"I8", ST_OTHER, 1},      {"U8", ST_OTHER, 1},
        {"BOOL", ST_OTHER, 1}, {"F8_E4M3", ST_OTHER, 1}, {"F8_E5M2", ST_OTHER, 1},
    };
    for (size_t i = 0; i < ARRAY_LEN(table); i++)
        if (strcmp(name, table[i].name) == 0) {
            *ret = table[i].dtype;
            *ret_bytes = table[i].bytes;
            return true;
        }
    return false;
}

/* Leaves the offset relative to the data. */
static enum err tensor_check(const char *name, const json_t *v, uint64_t data_bytes,
                             struct st_tensor *ret)
{
    const json_t *shape = json_object_get(v, "shape");
    const json_t *offsets = json_object_get(v, "data_offsets");
    const char *dtype = json_string_value(json_object_get(v, "dtype"));
    if (!dtype || !json_is_array(shape) || json_array_size(offsets) != 2 ||
        json_object_size(v) != 3)
        return err_set(ERR_BAD_MODEL, "%.100s: not {dtype, shape, data_offsets}", name);
    struct st_tensor t = {.name = name, .n_dims = (int)json_array_size(shape)};
    unsigned value_bytes;
    if (!dtype_find(dtype, &t.dtype, &value_bytes))
        return err_set(ERR_BAD_MODEL, "%.100s: unknown dtype %.20s", name, dtype);
    if (json_array_size(shape) > ARRAY_LEN(t.shape))
        return err_set(ERR_BAD_MODEL, "%.100s has %zu dimensions, allowed are %zu", name,
                       json_array_size(shape), ARRAY_LEN(t.shape));
    uint64_t want = value_bytes;
    for (int i = 0; i < t.n_dims; i++) {
        const json_t *d = json_array_get(shape, (size_t)i);
        if (!json_is_integer(d) || json_integer_value(d) < 0 ||
            json_integer_value(d) > MAX_OFFSET ||
            __builtin_mul_overflow(want, (uint64_t)json_integer_value(d), &want))
            return err_set(ERR_BAD_MODEL, "%.100s: impossible shape", name);
        t.shape[i] = json_integer_value(d);
    }
    uint64_t range[2];
    for (size_t i = 0; i < 2; i++) {
        const json_t *o = json_array_get(offsets, i);
        if (!json_is_integer(o) || json_integer_value(o) < 0 || json_integer_value(o) > MAX_OFFSET)
            return err_set(ERR_BAD_MODEL, "%.100s: data_offsets are no offsets", name);
        range[i] = (uint64_t)json_integer_value(o);
    }
    if (range[1] < range[0] || range[1] > data_bytes)
        return err_set(ERR_BAD_MODEL,
                       "%.100s: data_offsets [%" PRIu64 ", %" PRIu64 "] in %" PRIu64
                       " bytes of data",
                       name, range[0], range[1], data_bytes);
    if (range[1] - range[0] != want)
        return err_set(ERR_BAD_MODEL,
                       "%.100s: %" PRIu64 " bytes, but its shape in %s needs %" PRIu64, name,
                       range[1] - range[0], dtype, want);
    t.offset = range[0];
    t.n_bytes = want;
    *ret = t;
    return ERR_OK;
}

/* ---- using it -------------------------------------------------------------------------------- */

size_t safetensors_n(const struct safetensors *s) { return s->n_tensors; }
const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i)
{
    return &s->tensors[i];
}

const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct st_tensor key = {.name = name};
    return s->n_tensors ? bsearch(&key, s->tensors, s->n_tensors, sizeof(key), by_name) : NULL;
}

enum err safetensors_read(const struct safetensors *s, const struct st_tensor *t, void *to)
{
    return safetensors_read_part(s, t, 0, t->n_bytes, to);
}

enum err safetensors_read_part(const struct safetensors *s, const struct st_tensor *t,
                               uint64_t from, uint64_t n, void *to)
{
    return read_at(&s->shards[t->shard], t->offset + from, to, n);
}

/* pread, not mmap: a file that shrinks is a message here and SIGBUS there. */
static enum err read_at(const struct shard *shard, uint64_t offset, void *to, uint64_t n)
{
    for (uint64_t done = 0; done < n;) {
        size_t part = (size_t)MIN(n - done, (uint64_t)1 << 30);
        ssize_t got = pread(shard->fd, (char *)to + done, part, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return err_set(ERR_IO, "%s: %s", shard->name, strerror(errno));
        if (got == 0)
            return err_set(ERR_BAD_MODEL, "%s: ends at byte %" PRIu64 ", it was longer before",
                           shard->name, offset + done);
        done += (uint64_t)got;
    }
    return ERR_OK;
}

/* What is wrong with a file is wrong with the model, whatever json.h calls it. */
static enum err bad_model(enum err err)
{
    if (err == ERR_OK || err == ERR_NOMEM || err == ERR_IO)
        return err;
    char text[400];
    snprintf(text, sizeof(text), "%s", err_text(err));
    return err_set(ERR_BAD_MODEL, "%s", text);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

/* Empty tensors come before the one that begins at the same place. */
static int by_offset(const void *a, const void *b)
{
    const struct st_tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->n_bytes < y->n_bytes ? -1 : x->n_bytes > y->n_bytes;
}
