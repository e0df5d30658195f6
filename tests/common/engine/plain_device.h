/* plain_device.h: a device for tests that need GPU memory and nothing else of the CUDA module. */
#ifndef BATON_TEST_PLAIN_DEVICE_H
#define BATON_TEST_PLAIN_DEVICE_H

#include <cuda_runtime_api.h>

#include "common/engine/device.h"

/* Where memory comes from; true: it worked. */
static bool plain_take(void **ret, size_t bytes) { return cudaMalloc(ret, bytes) == cudaSuccess; }
static bool plain_give(void *memory) { return cudaFree(memory) == cudaSuccess; }
static bool (*take_memory)(void **ret, size_t bytes) = plain_take;
static bool (*give_memory)(void *memory) = plain_give;

static enum err plain_alloc(struct device *d, uint64_t bytes, struct device_memory *ret)
{
    *ret = (struct device_memory){.bytes = bytes, .fd = -1};
    if (cudaSetDevice(d->ordinal) != cudaSuccess || !take_memory(&ret->base, bytes) ||
        cudaMemset(ret->base, 0, bytes) != cudaSuccess)
        return err_set(ERR_CUDA, "no %llu bytes on cuda:%d", (unsigned long long)bytes, d->ordinal);
    return ERR_OK;
}

static void plain_release(struct device *d, struct device_memory *m)
{
    (void)d;
    if (!give_memory(m->base))
        abort();
}

static struct device *plain_device(int ordinal)
{
    static const struct device_ops ops = {.alloc = plain_alloc, .release = plain_release};
    static struct device devices[8];
    devices[ordinal] = (struct device){.ops = &ops, .ordinal = ordinal};
    return &devices[ordinal];
}

#endif
