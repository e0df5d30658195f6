/* device_cuda.c: device.h on a Hopper GPU; the root of the CUDA module. */
#include "common/engine/device_cuda.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/hash.h"
#include "common/engine/engine_impl.h"
#include "common/engine/weights.h"

#define MAX_SUMS 4096

struct device_cuda {
    struct device base;
    CUdevice driver;
    cudaStream_t stream; // fills, checksums: one caller at a time
    pthread_mutex_t lock;
    uint32_t *pages; // device, [MAX_SUMS]
    uint64_t *sums;  // device, [MAX_SUMS]
};

static struct device_cuda *of(struct device *d) { return (struct device_cuda *)d; }

/* The driver's own functions, found at run time: the module links the runtime only. */
static struct {
    CUresult (*create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *,
                       unsigned long long);
    CUresult (*release)(CUmemGenericAllocationHandle);
    CUresult (*reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
    CUresult (*unreserve)(CUdeviceptr, size_t);
    CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
    CUresult (*unmap)(CUdeviceptr, size_t);
    CUresult (*access)(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
    CUresult (*export)(void *, CUmemGenericAllocationHandle, CUmemAllocationHandleType,
                       unsigned long long);
    CUresult (*import)(CUmemGenericAllocationHandle *, void *, CUmemAllocationHandleType);
    CUresult (*granularity)(size_t *, const CUmemAllocationProp *,
                            CUmemAllocationGranularity_flags);
    CUresult (*attribute)(int *, CUdevice_attribute, CUdevice);
    CUresult (*error)(CUresult, const char **);
} driver;

static enum err driver_find(void)
{
    const struct {
        const char *name;
        void *to;
    } list[] = {
        {"cuMemCreate", &driver.create},
        {"cuMemRelease", &driver.release},
        {"cuMemAddressReserve", &driver.reserve},
        {"cuMemAddressFree", &driver.unreserve},
        {"cuMemMap", &driver.map},
        {"cuMemUnmap", &driver.unmap},
        {"cuMemSetAccess", &driver.access},
        {"cuMemExportToShareableHandle", &driver.export},
        {"cuMemImportFromShareableHandle", &driver.import},
        {"cuMemGetAllocationGranularity", &driver.granularity},
        {"cuDeviceGetAttribute", &driver.attribute},
        {"cuGetErrorString", &driver.error},
    };
    for (size_t i = 0; i < ARRAY_LEN(list); i++) {
        void *f = NULL;
        enum cudaDriverEntryPointQueryResult found;
        CUDA(cudaGetDriverEntryPointByVersion(list[i].name, &f, 12000, cudaEnableDefault, &found));
        if (!f || found != cudaDriverEntryPointSuccess)
            return err_set(ERR_CUDA, "the CUDA driver has no %s", list[i].name);
        memcpy(list[i].to, &f, sizeof(f));
    }
    return ERR_OK;
}

static const char *driver_text(CUresult e)
{
    const char *text = NULL;
    if (driver.error(e, &text) != CUDA_SUCCESS || !text)
        return "unknown error";
    return text;
}

#define DRIVER(call)                                                                               \
    do {                                                                                           \
        CUresult cu_ = (call);                                                                     \
        if (cu_ != CUDA_SUCCESS)                                                                   \
            return err_set(ERR_CUDA, "%s: %s", #call, driver_text(cu_));                           \
    } while (0)

/* ---- memory ---------------------------------------------------------------------------------- */

static enum err cuda_room(struct device *d, uint64_t *ret_free, uint64_t *ret_total)
{
    size_t available, total;
    CUDA(cudaSetDevice(d->ordinal));
    CUDA(cudaMemGetInfo(&available, &total));
    *ret_free = available;
    *ret_total = total;
    return ERR_OK;
}

static CUmemAllocationProp properties(struct device *d)
{
    CUmemAllocationProp p = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->ordinal},
    };
    int rdma = 0; // so that a network card can read pages in place
    if (driver.attribute(&rdma, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
                         of(d)->driver) == CUDA_SUCCESS &&
        rdma)
        p.allocFlags.gpuDirectRDMACapable = 1;
    return p;
}

static void cuda_release(struct device *d, struct device_memory *m)
{
    (void)d;
    driver.unmap((CUdeviceptr)m->base, m->mapped_bytes);
    driver.unreserve((CUdeviceptr)m->base, m->mapped_bytes);
    driver.release(m->handle);
    if (m->fd >= 0)
        close(m->fd);
}

/* Gives handle an address that this device may read and write. */
static enum err map(struct device *d, struct device_memory *m)
{
    CUdeviceptr at = 0;
    CUmemAccessDesc access = {
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->ordinal},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    DRIVER(driver.reserve(&at, m->mapped_bytes, 0, 0, 0));
    CUresult e = driver.map(at, m->mapped_bytes, 0, m->handle, 0);
    if (e == CUDA_SUCCESS) {
        e = driver.access(at, m->mapped_bytes, &access, 1);
        if (e != CUDA_SUCCESS)
            driver.unmap(at, m->mapped_bytes);
    }
    if (e != CUDA_SUCCESS) {
        driver.unreserve(at, m->mapped_bytes);
        return err_set(ERR_CUDA, "mapping %" PRIu64 " MiB of device memory: %s",
                       m->mapped_bytes >> 20, driver_text(e));
    }
    m->base = (void *)at;
    return ERR_OK;
}

static enum err mapped_bytes(struct device *d, uint64_t bytes, uint64_t *ret)
{
    CUmemAllocationProp p = properties(d);
    size_t unit = 0;
    DRIVER(driver.granularity(&unit, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
    *ret = (bytes + unit - 1) / unit * unit;
    return ERR_OK;
}

static enum err cuda_alloc(struct device *d, uint64_t bytes, struct device_memory *ret)
{
    uint64_t available, total;
    CUmemAllocationProp p = properties(d);
    struct device_memory m = {.bytes = bytes, .fd = -1};
    TRY(cuda_room(d, &available, &total));
    TRY(mapped_bytes(d, bytes, &m.mapped_bytes));
    CUmemGenericAllocationHandle handle;
    CUresult e = driver.create(&handle, m.mapped_bytes, &p, 0);
    if (e != CUDA_SUCCESS)
        return err_set(e == CUDA_ERROR_OUT_OF_MEMORY ? ERR_NOMEM : ERR_CUDA,
                       "%" PRIu64 " MiB of device memory wanted, %" PRIu64 " MiB free: %s",
                       m.mapped_bytes >> 20, available >> 20, driver_text(e));
    m.handle = handle;
    enum err err = map(d, &m);
    if (err != ERR_OK) {
        driver.release(handle);
        return err;
    }
    e = driver.export(&m.fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (e != CUDA_SUCCESS || cudaMemset(m.base, 0, bytes) != cudaSuccess) {
        cuda_release(d, &m);
        return err_set(ERR_CUDA, "%" PRIu64 " MiB of device memory cannot be shared or cleared: %s",
                       m.mapped_bytes >> 20, driver_text(e));
    }
    *ret = m;
    return ERR_OK;
}

static enum err cuda_import(struct device *d, int fd, uint64_t bytes, struct device_memory *ret)
{
    struct device_memory m = {.bytes = bytes, .fd = -1};
    CUDA(cudaSetDevice(d->ordinal));
    TRY(mapped_bytes(d, bytes, &m.mapped_bytes));
    CUmemGenericAllocationHandle handle;
    DRIVER(driver.import(&handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    m.handle = handle;
    enum err err = map(d, &m);
    if (err != ERR_OK) {
        driver.release(handle);
        return err;
    }
    *ret = m;
    return ERR_OK;
}

/* ---- copies ---------------------------------------------------------------------------------- */

static enum err cuda_stage(struct device *d, uint64_t bytes, void **ret)
{
    CUDA(cudaSetDevice(d->ordinal));
    CUDA(cudaMallocHost(ret, bytes));
    return ERR_OK;
}

static void cuda_unstage(struct device *d, void *stage)
{
    (void)d;
    cudaFreeHost(stage);
}

static enum err cuda_put(struct device *d, void *to, const void *from, uint64_t n)
{
    CUDA(cudaSetDevice(d->ordinal));
    CUDA(cudaMemcpyAsync(to, from, n, cudaMemcpyHostToDevice, cudaStreamPerThread));
    CUDA(cudaStreamSynchronize(cudaStreamPerThread));
    return ERR_OK;
}

static enum err cuda_copy_pages(struct device *d, void *to, const uint32_t *to_pages,
                                const void *from, const uint32_t *from_pages, uint32_t n,
                                uint64_t page_bytes)
{
    CUDA(cudaSetDevice(d->ordinal));
    for (uint32_t i = 0; i < n; i++)
        CUDA(cudaMemcpyAsync((char *)to + to_pages[i] * page_bytes,
                             (const char *)from + from_pages[i] * page_bytes, page_bytes,
                             cudaMemcpyDeviceToDevice, cudaStreamPerThread));
    CUDA(cudaStreamSynchronize(cudaStreamPerThread));
    return ERR_OK;
}

static enum err cuda_fill(struct device *d, void *arena, const struct weights_region *r)
{
    CUDA(cu_fill((char *)arena + r->offset, r->n, r->stream, r->scale, r->is_f32, of(d)->stream));
    return ERR_OK;
}

static enum err cuda_flush(struct device *d)
{
    CUDA(cudaStreamSynchronize(of(d)->stream));
    return ERR_OK;
}

static enum err checksums(struct device_cuda *c, const void *base, uint64_t page_bytes,
                          const uint32_t *pages, uint32_t n, uint64_t *ret)
{
    CUDA(cudaSetDevice(c->base.ordinal));
    CUDA(cudaMemcpyAsync(c->pages, pages, n * sizeof(*pages), cudaMemcpyHostToDevice, c->stream));
    CUDA(cu_page_sums(base, page_bytes, c->pages, (int)n, c->sums, c->stream));
    CUDA(cudaMemcpyAsync(ret, c->sums, n * sizeof(*ret), cudaMemcpyDeviceToHost, c->stream));
    CUDA(cudaStreamSynchronize(c->stream));
    return ERR_OK;
}

static enum err cuda_checksums(struct device *d, const void *base, uint64_t page_bytes,
                               const uint32_t *pages, uint32_t n, uint64_t *ret)
{
    struct device_cuda *c = of(d);
    if (n > MAX_SUMS)
        return err_set(ERR_INVALID, "checksums of %u pages at once", n);
    pthread_mutex_lock(&c->lock);
    enum err err = checksums(c, base, page_bytes, pages, n, ret);
    pthread_mutex_unlock(&c->lock);
    return err;
}

/* ---- life ------------------------------------------------------------------------------------ */

static void cuda_close(struct device *d)
{
    struct device_cuda *c = of(d);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    cudaFree(c->pages);
    cudaFree(c->sums);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static const struct device_ops cuda_ops = {
    .close = cuda_close,
    .room = cuda_room,
    .alloc = cuda_alloc,
    .import = cuda_import,
    .release = cuda_release,
    .stage = cuda_stage,
    .unstage = cuda_unstage,
    .put = cuda_put,
    .copy_pages = cuda_copy_pages,
    .fill = cuda_fill,
    .flush = cuda_flush,
    .checksums = cuda_checksums,
    .engine_bytes = engine_cuda_bytes,
    .engine = engine_cuda_create,
};

static enum err start(struct device_cuda *c)
{
    int n_devices = 0, ordinal = c->base.ordinal;
    cudaError_t e = cudaGetDeviceCount(&n_devices);
    if (e != cudaSuccess)
        return err_set(ERR_INVALID, "device cuda:%d: %s", ordinal, cudaGetErrorString(e));
    if (ordinal >= n_devices)
        return err_set(ERR_INVALID, "device cuda:%d: there are %d CUDA devices", ordinal,
                       n_devices);
    CUDA(cudaSetDevice(ordinal));
    struct cudaDeviceProp prop;
    CUDA(cudaGetDeviceProperties(&prop, ordinal));
    if (prop.major != 9)
        return err_set(ERR_INVALID,
                       "device cuda:%d: %s has compute capability %d.%d, the kernels need 9.0",
                       ordinal, prop.name, prop.major, prop.minor);
    snprintf(c->base.name, sizeof(c->base.name), "%.63s", prop.name);
    c->base.id = hash_bytes(1, prop.uuid.bytes, sizeof(prop.uuid.bytes));
    c->driver = ordinal; // the runtime's ordinals are the driver's
    TRY(driver_find());
    // Checksums are asked for while a pass runs, and are not to wait for its end.
    int lowest = 0, highest = 0;
    CUDA(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    CUDA(cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, highest));
    CUDA(cudaMalloc((void **)&c->pages, MAX_SUMS * sizeof(*c->pages)));
    CUDA(cudaMalloc((void **)&c->sums, MAX_SUMS * sizeof(*c->sums)));
    return ERR_OK;
}

static enum err cuda_open(int ordinal, struct device **ret)
{
    struct device_cuda *c = calloc(1, sizeof(*c));
    if (!c)
        return err_set(ERR_NOMEM, "no memory for a device");
    c->base = (struct device){.ops = &cuda_ops, .ordinal = ordinal};
    pthread_mutex_init(&c->lock, NULL);
    enum err err = start(c);
    if (err != ERR_OK) {
        cuda_close(&c->base);
        return err;
    }
    *ret = &c->base;
    return ERR_OK;
}

const struct device_module baton_cuda = {.version = DEVICE_MODULE_VERSION, .open = cuda_open};
