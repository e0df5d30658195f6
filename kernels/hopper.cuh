/* hopper.cuh: what sm_90a has and C++ does not: mbarriers, tensor copies, warpgroup products.
 *
 * Thin wrappers, one instruction each, and the two things they need from the host: tensor maps
 * (encoded by the driver, found at run time so that nothing links libcuda) and matrix descriptors.
 *
 * Tiles in shared memory are rows of 128 bytes (64 bf16 along K) under the 128-byte swizzle: the
 * 16-byte chunk c of row r lies at r * 128 + ((c ^ (r & 7)) << 4), tile base aligned to 1024 bytes.
 * The swizzle goes by address, so a tile may be filled in pieces (rows, groups of rows) by copies
 * of their own.
 */
#ifndef BATON_HOPPER_CUH
#define BATON_HOPPER_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace hopper {

/* ---- host: tensor maps ---- */

/* A bf16 tensor of n_dims dimensions, the innermost first; strides in bytes, from dimension 1. False: the
 * driver has no encoder or refused the shape. */
static inline bool tensor_map(CUtensorMap *ret, const void *base, int n_dims, const cuuint64_t *dims,
                              const cuuint64_t *strides, const cuuint32_t *box,
                              CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B)
{
    typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                  const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                  const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static encode_fn encode = []() -> encode_fn {
        void *fn = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault,
                                             &found) != cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            return nullptr;
        return (encode_fn)fn;
    }();
    const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    return encode && encode(ret, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)n_dims, (void *)base,
                            dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* 2D bf16 tensor [rows, cols] with row_stride elements between rows, copied in boxes of box_rows x
 * box_cols (at most 256 each). */
static inline bool tensor_map_boxes(CUtensorMap *ret, const void *base, uint64_t rows,
                                    uint64_t cols, uint64_t row_stride, uint32_t box_rows,
                                    uint32_t box_cols, CUtensorMapSwizzle swizzle)
{
    const cuuint64_t dims[2] = {cols, rows}, strides[1] = {row_stride * 2};
    const cuuint32_t box[2] = {box_cols, box_rows};
    return tensor_map(ret, base, 2, dims, strides, box, swizzle);
}

/* The same in boxes of 64 columns under the 128-byte swizzle. */
static inline bool tensor_map_2d(CUtensorMap *ret, const void *base, uint64_t rows, uint64_t cols,
                                 uint64_t row_stride, uint32_t box_rows)
{
    return tensor_map_boxes(ret, base, rows, cols, row_stride, box_rows, 64,
                            CU_TENSOR_MAP_SWIZZLE_128B);
}

/* ---- shared memory, barriers ---- */

__device__ __forceinline__ uint32_t smem_addr(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void mbar_init(uint32_t bar, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(n_arrivals) : "memory");
}

/* After mbar_init, before the block's __syncthreads: makes the barriers visible to tensor copies. */
__device__ __forceinline__ void mbar_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbar_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/* One arrival that also announces bytes which tensor copies will deliver. */
__device__ __forceinline__ void mbar_arrive_expect(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

/* One arrival of this thread once its cp.async copies so far have landed; counts as one of the
 * barrier's n_arrivals. The reader needs fence_async before a tensor core reads the bytes. */
__device__ __forceinline__ void mbar_arrive_cp_async(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

/* Waits until the phase of this parity is complete (0 first). */
__device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\n"
                 "bra again;\n"
                 "over:\n"
                 "}\n" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}

/* Orders this thread's ordinary shared-memory accesses (and those it has seen through a barrier)
 * before later reads by tensor cores and tensor copies. */
__device__ __forceinline__ void fence_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Barrier of n_threads threads of the block; id 1..15, 0 is __syncthreads. */
__device__ __forceinline__ void named_sync(int id, int n_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

template <int REGS> __device__ __forceinline__ void regs_grow()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
}

template <int REGS> __device__ __forceinline__ void regs_shrink()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGS));
}

/* Programmatic dependent launch: wait for what the previous kernel of the stream wrote; let the
 * next one start its prologue. Without the launch attribute both do nothing. */
__device__ __forceinline__ void pdl_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void pdl_launch()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* ---- copies ---- */

__device__ __forceinline__ uint64_t policy_evict_first()
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t policy_evict_last()
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Box at (col, row) of a 2D tensor into shared memory; its bytes arrive at bar. */
__device__ __forceinline__ void tma_load_2d(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                            int col, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(col), "r"(row)
                 : "memory");
}

__device__ __forceinline__ void tma_load_2d(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                            int col, int row, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(col), "r"(row), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void tma_load_3d(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0,
                                            int c1, int c2, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void tma_load_4d(uint32_t dst, const CUtensorMap *map, uint32_t bar, int c0,
                                            int c1, int c2, int c3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

/* The box's bytes into L2 only. */
__device__ __forceinline__ void tma_prefetch_2d(const CUtensorMap *map, int col, int row)
{
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map),
                 "r"(col), "r"(row)
                 : "memory");
}

/* bytes (a multiple of 16) at p into L2. */
__device__ __forceinline__ void bulk_prefetch(const void *p, uint32_t bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Two 8x8 bf16 matrices, transposed, into shared memory; lanes 0..15 give the 16 row addresses. */
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t dst, uint32_t m0, uint32_t m1)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(dst), "r"(m0),
                 "r"(m1)
                 : "memory");
}

/* Column maxima of an 8-row fragment's lanes that hold the same columns: l, l ^ 4, l ^ 8, l ^ 16. */
__device__ __forceinline__ float column_max(float v)
{
#pragma unroll
    for (int o = 4; o < 32; o *= 2)
        v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
    return v;
}

__device__ __forceinline__ float column_sum(float v)
{
#pragma unroll
    for (int o = 4; o < 32; o *= 2)
        v += __shfl_xor_sync(~0u, v, o);
    return v;
}

/* ---- pairs, quads ---- */

__device__ __forceinline__ uint32_t bf16_pair(float lo, float hi)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *(uint32_t *)&v;
}

/* The quad's 4 x 4 words transposed: lane q gets word q of each lane. */
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4])
{
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t x = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
        w[i] = odd ? x : w[i];
        w[i + 1] = odd ? w[i + 1] : x;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t x = __shfl_xor_sync(~0u, high ? w[i] : w[i + 2], 2);
        w[i] = high ? x : w[i];
        w[i + 2] = high ? w[i + 2] : x;
    }
}

/* ---- warp products ---- */

/* d[16, 8] += a[16, 16] b[16, 8], bf16 in, fp32 out, in mma.m16n8k16's fragments. */
__device__ __forceinline__ void product_16x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* ---- warpgroup products ---- */

/* Descriptor of a K-major tile (see the top of the file). The next 16 columns: + 2. */
__device__ __forceinline__ uint64_t wgmma_desc(uint32_t tile)
{
    return (uint64_t)((tile & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

/* Descriptor of a tile of 64 rows read as [K, N] with N contiguous: blocks of 64 columns, 8 KB each. The
 * next 16 rows: + 2048 / 16. */
__device__ __forceinline__ uint64_t wgmma_desc_turned(uint32_t tile)
{
    return (uint64_t)((tile & 0x3ffff) >> 4) | (uint64_t)(64 * 128 >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* d[64, N] (+)= a[64, 16] b[N, 16]^T, bf16 in, fp32 out; a and b are K-major tiles in shared memory.
 * Warp w, lane l hold rows 16 w + l / 4 (+ 8), columns 8 j + 2 (l % 4) (+ 1):
 * d[4 j] d[4 j + 1] are the first row's, d[4 j + 2] d[4 j + 3] the second's. */
template <int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define R4(a, b, c, e) "%" #a ", %" #b ", %" #c ", %" #e
#define R16_0  R4(0, 1, 2, 3) ", " R4(4, 5, 6, 7) ", " R4(8, 9, 10, 11) ", " R4(12, 13, 14, 15)
#define R16_1  R4(16, 17, 18, 19) ", " R4(20, 21, 22, 23) ", " R4(24, 25, 26, 27) ", " R4(28, 29, 30, 31)
#define R16_2  R4(32, 33, 34, 35) ", " R4(36, 37, 38, 39) ", " R4(40, 41, 42, 43) ", " R4(44, 45, 46, 47)
#define R16_3  R4(48, 49, 50, 51) ", " R4(52, 53, 54, 55) ", " R4(56, 57, 58, 59) ", " R4(60, 61, 62, 63)
#define R16_4  R4(64, 65, 66, 67) ", " R4(68, 69, 70, 71) ", " R4(72, 73, 74, 75) ", " R4(76, 77, 78, 79)
#define R16_5  R4(80, 81, 82, 83) ", " R4(84, 85, 86, 87) ", " R4(88, 89, 90, 91) ", " R4(92, 93, 94, 95)
#define R16_01 R16_0 ", " R16_1
#define R16_03 R16_01 ", " R16_2 ", " R16_3

/* N columns: sums %0 .. in registers SUMS, then a, b, accumulate as operands A, B, P. */
#define WGMMA(N, SUMS, A, B, P, ...)                                                               \
    template <>                                                                                    \
    __device__ __forceinline__ void wgmma<N>(float (&d)[N / 2], uint64_t a, uint64_t b,            \
                                             int accumulate)                                       \
    {                                                                                              \
        asm volatile("{\n"                                                                         \
                     ".reg .pred p;\n"                                                             \
                     "setp.ne.b32 p, %" #P ", 0;\n"                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SUMS             \
                     "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n"                                       \
                     "}\n"                                                                         \
                     : __VA_ARGS__                                                                 \
                     : "l"(a), "l"(b), "r"(accumulate));                                           \
    }

WGMMA(8, R4(0, 1, 2, 3), 4, 5, 6, D4(0))
WGMMA(16, R4(0, 1, 2, 3) ", " R4(4, 5, 6, 7), 8, 9, 10, D8(0))
WGMMA(24, R4(0, 1, 2, 3) ", " R4(4, 5, 6, 7) ", " R4(8, 9, 10, 11), 12, 13, 14, D8(0), D4(8))
WGMMA(32, R16_0, 16, 17, 18, D16(0))
WGMMA(64, R16_01, 32, 33, 34, D16(0), D16(16))
WGMMA(96, R16_01 ", " R16_2, 48, 49, 50, D16(0), D16(16), D16(32))
WGMMA(112, R16_01 ", " R16_2 ", " R4(48, 49, 50, 51) ", " R4(52, 53, 54, 55), 56, 57, 58, D16(0),
      D16(16), D16(32), D8(48))
WGMMA(128, R16_03, 64, 65, 66, D16(0), D16(16), D16(32), D16(48))
WGMMA(144, R16_03 ", " R4(64, 65, 66, 67) ", " R4(68, 69, 70, 71), 72, 73, 74, D16(0), D16(16),
      D16(32), D16(48), D8(64))
WGMMA(160, R16_03 ", " R16_4, 80, 81, 82, D16(0), D16(16), D16(32), D16(48), D16(64))
WGMMA(176, R16_03 ", " R16_4 ", " R4(80, 81, 82, 83) ", " R4(84, 85, 86, 87), 88, 89, 90, D16(0),
      D16(16), D16(32), D16(48), D16(64), D8(80))
WGMMA(192, R16_03 ", " R16_4 ", " R16_5, 96, 97, 98, D16(0), D16(16), D16(32), D16(48), D16(64),
      D16(80))

#undef WGMMA

#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)
#define SUMS_256                                                                                     \
    R16_03 ", " R16_4 ", " R16_5 ", "                                                                \
    R4(96, 97, 98, 99) ", " R4(100, 101, 102, 103) ", " R4(104, 105, 106, 107) ", "                  \
    R4(108, 109, 110, 111) ", " R4(112, 113, 114, 115) ", " R4(116, 117, 118, 119) ", "              \
    R4(120, 121, 122, 123) ", " R4(124, 125, 126, 127)

/* d[64, 256] += a[64, 16] b[16, 256], b with its columns contiguous: wgmma_desc_turned. */
__device__ __forceinline__ void wgmma_turned(float (&d)[128], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" SUMS_256
                 "}, %128, %129, 1, 1, 1, 0, 1;\n"
                 : D64(0), D64(64)
                 : "l"(a), "l"(b));
}

/* The same with a in registers: the fragments of a product's sums, packed. */
__device__ __forceinline__ void wgmma_turned(float (&d)[128], const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" SUMS_256
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"
                 : D64(0), D64(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* d[64, 24] (+)= a[16, 64]^T b[24, 16]^T, a with its 64 columns contiguous (wgmma_desc_turned), b K-major. */
__device__ __forceinline__ void wgmma_turned_a(float (&d)[12], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {" R4(0, 1, 2, 3) ", "
                 R4(4, 5, 6, 7) ", " R4(8, 9, 10, 11) "}, %12, %13, 1, 1, 1, 1, 0;\n"
                 : D8(0), D4(8)
                 : "l"(a), "l"(b));
}

#undef SUMS_256
#undef D64
#undef R4
#undef R16_0
#undef R16_1
#undef R16_2
#undef R16_3
#undef R16_4
#undef R16_5
#undef R16_01
#undef R16_03
#undef D16
#undef D4
#undef D8

} // namespace hopper

#endif
