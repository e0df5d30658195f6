/* plain_device.h: a device for tests that need GPU memory and nothing else of the CUDA module. */
#ifndef BATON_TEST_PLAIN_DEVICE_H
#define BATON_TEST_PLAIN_DEVICE_H

#include <cuda_runtime_api.h>

#include "common/engine/device.h"

static enum err plain_alloc(struct device *d, uint64_t bytes, struct device_memory *ret)
{
    *ret = (struct device_memory){.bytes = bytes, .fd = -1};
    if (cudaSetDevice(d->ordinal) != cudaSuccess || cudaMalloc(&ret->base, bytes) != cudaSuccess ||
        cudaMemset(ret->base, 0, bytes) != cudaSuccess)
        return err_set(ERR_CUDA, "no %llu bytes on cuda:%d", (unsigned long long)bytes, d->ordinal);
    return ERR_OK;
}

static void plain_release(struct device *d, struct device_memory *m)
{
    (void)d;
    if (cudaFree(m->base) != cudaSuccess)
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
