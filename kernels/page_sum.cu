// page_sum.cu: checksums of KV pages, the same sum as hash_sum64 makes on the host.
//
// Roofline: one read of the pages, 3.5 MB each. A page's words are cut over a few blocks; the sum
// has no order, so blocks add theirs with one atomic each.

#include "kernels/cuda.h"

namespace {

constexpr int THREADS = 256, BLOCKS_PER_PAGE = 16;

__device__ uint64_t mixed(uint64_t w, uint64_t i)
{
    w = (w ^ (i + 1) * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    return w ^ w >> 29;
}

__global__ void __launch_bounds__(THREADS)
    page_sum_kernel(const char *base, uint64_t page_bytes, const uint32_t *pages,
                    unsigned long long *sums)
{
    const ulonglong2 *x = (const ulonglong2 *)(base + pages[blockIdx.y] * page_bytes);
    uint64_t sum = 0;
    for (uint64_t i = blockIdx.x * THREADS + threadIdx.x; i < page_bytes / 16;
         i += BLOCKS_PER_PAGE * THREADS) {
        ulonglong2 w = x[i];
        sum += mixed(w.x, 2 * i) + mixed(w.y, 2 * i + 1);
    }
    for (int d = 16; d > 0; d >>= 1)
        sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0)
        atomicAdd(&sums[blockIdx.y], sum);
}

} // namespace

cudaError_t cu_page_sums(const void *base, uint64_t page_bytes, const uint32_t *pages, int n,
                         uint64_t *sums, cudaStream_t stream)
{
    if (n < 0 || n > 65535 || page_bytes % 16)
        return cudaErrorInvalidValue;
    if (n == 0)
        return cudaSuccess;
    cudaError_t e = cudaMemsetAsync(sums, 0, sizeof(*sums) * n, stream);
    if (e != cudaSuccess)
        return e;
    page_sum_kernel<<<dim3(BLOCKS_PER_PAGE, n), THREADS, 0, stream>>>(
        (const char *)base, page_bytes, pages, (unsigned long long *)sums);
    return cudaGetLastError();
}
