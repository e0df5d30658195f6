/* safetensors.h: headers of a checkpoint's shards, checked; tensors located, not read. */
#ifndef BATON_SAFETENSORS_H
#define BATON_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "common/base/err.h"
#include "common/base/own.h"

enum st_dtype { ST_BF16, ST_F32, ST_F16, ST_OTHER };

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    int n_dims;
    int64_t shape[4];
    int shard;       /* index into the file list */
    uint64_t offset; /* in the file */
    uint64_t n_bytes;
};

struct safetensors;

/* Opens DIR/model.safetensors.index.json and all shards it names, or DIR/model.safetensors.
 * Checks each header: length against the file, JSON limits, duplicate names, dtype, shape x dtype
 * == bytes, tiling without holes or overlaps, end == file size; each weight_map entry in the shard
 * it names. ERR_BAD_MODEL (damaged) or ERR_NOT_FOUND with file, tensor, expected and actual. */
MUST_CHECK enum err safetensors_open(const char *dir, struct safetensors **ret);
void safetensors_destroy(struct safetensors *s);
DEFINE_OWNED(safetensors)

size_t safetensors_n(const struct safetensors *s);
const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i);
const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name);
/* Reads a tensor's bytes with pread. ERR_IO / ERR_BAD_MODEL (short file). Thread-safe. */
MUST_CHECK enum err safetensors_read(const struct safetensors *s, const struct st_tensor *t,
                                     void *to);
/* The same for n bytes from byte `from` of the tensor on. */
MUST_CHECK enum err safetensors_read_part(const struct safetensors *s, const struct st_tensor *t,
                                          uint64_t from, uint64_t n, void *to);

/* Checks one header (the JSON text alone, n bytes) on its own, for tests and the fuzzer. file_bytes
 * is the size of the whole file: 8 bytes of length, the header, the data. */
MUST_CHECK enum err safetensors_check_header(const char *bytes, size_t n, uint64_t file_bytes);

#endif
