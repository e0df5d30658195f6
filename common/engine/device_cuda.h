/* device_cuda.h: what the files of the CUDA module share. */
#ifndef BATON_DEVICE_CUDA_H
#define BATON_DEVICE_CUDA_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/engine/device.h"
#include "kernels/cuda.h"

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t cuda_ = (call);                                                                \
        if (cuda_ != cudaSuccess)                                                                  \
            return err_set(ERR_CUDA, "%s: %s", #call, cudaGetErrorString(cuda_));                  \
    } while (0)

uint64_t engine_cuda_bytes(const struct engine *base);
enum err engine_cuda_create(const struct engine *base, struct device *d, struct kv_pool *pool,
                            struct engine **ret);

#endif
