/* launch.cuh: launches of small kernels, and what blocks of a cluster say to each other.
 *
 * Programmatic dependent launch: a kernel launched through here may start while the kernel before
 * it in the stream still runs, so that its launch, its prologue and its reads of weights hide
 * behind that one's tail. Two rules keep the stream's order:
 *   - every such kernel calls previous_done() in every thread, before it touches anything that
 *     another kernel writes or reads (weights and other constants may be read earlier). So when it
 *     ends, everything before it has ended too.
 *   - next_may_start() only lets the next kernel's blocks be scheduled; their previous_done() still
 *     waits for the end of this whole kernel.
 * What another kernel writes is never read with __ldg: such a load may move up past
 * previous_done(). Kernels launched the plain way see no difference. -DBATON_PDL=0 makes all
 * launches plain ones.
 */
#ifndef BATON_LAUNCH_CUH
#define BATON_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#ifndef BATON_PDL
#define BATON_PDL 1
#endif

namespace launch
{

__device__ __forceinline__ void previous_done()
{
#if BATON_PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void next_may_start()
{
#if BATON_PDL
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* kernel<<<grid, block, smem, stream>>>(args...) in clusters of `cluster` blocks along x. */
template <class... P, class... A>
static inline cudaError_t start(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
                                unsigned cluster, cudaStream_t stream, const A &...args)
{
    cudaLaunchAttribute attribute[2] = {};
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = cluster;
    attribute[0].val.clusterDim.y = 1;
    attribute[0].val.clusterDim.z = 1;
    attribute[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = cluster > 1 ? attribute : attribute + 1;
    config.numAttrs = (cluster > 1) + BATON_PDL;
    return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

/* ---- clusters ---- */

__device__ __forceinline__ unsigned cluster_rank()
{
    unsigned r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ unsigned cluster_size()
{
    unsigned n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}

__device__ __forceinline__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* All threads of all blocks; what they wrote to shared memory before is seen after. A kernel passes
 * one such barrier before it first touches a peer's memory (the peer must have started), and one
 * after it last did (the peer must not have ended). */
__device__ __forceinline__ void cluster_sync()
{
    cluster_arrive();
    cluster_wait();
}

/* Where block `rank` has what this block has at p, in shared memory. */
template <class T> __device__ __forceinline__ T *peer(T *p, unsigned rank)
{
    uint64_t at;
    asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"((uint64_t)p), "r"(rank));
    return (T *)at;
}

/* 16 bytes from global to shared memory, on their own; copies_done waits for this thread's. */
__device__ __forceinline__ void copy_16(void *to, const void *from)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(from)
        : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

} // namespace launch

#endif
