// What sm_90 has and kernels here use, as functions: barriers in shared memory, tensor copies, asynchronous copies, matrix products
// of a warpgroup. Names and semantics: PTX ISA 8.7, chapters "mbarrier", "cp.async", "wgmma".
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Only the pass for sm_90a knows these instructions; the host's pass must see a kernel's calls.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define PCP_MLA_HOPPER
#endif

namespace pcp_mla::cuda {

constexpr int kGroupThreads = 128, kGroupWarps = 4;  // of a warpgroup

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Barriers. A phase is over when all arrivals and all announced bytes are there; waiting names the phase by its parity.

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A warp's one arrival, when its lanes have read what is to be overwritten.
__device__ inline void barrier_release(const uint64_t& barrier, uint32_t lane) {
  if (lane == 0) barrier_arrive(shared_address(&barrier));
}

// Announces bytes without arriving.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Copies. A tensor copy completes on a barrier.

__device__ inline void tensor_load_2d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(x), "r"(y)
               : "memory");
}

__device__ inline void tensor_load_3d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// 8 or 16 bytes, or as many zeros.
template <int kBytes>
__device__ void copy_async(uint32_t to, const void* from, bool zeros) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(zeros ? 0 : kBytes)
                 : "memory");
  }
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// An arrival, once all copies that the thread has begun are there.
__device__ inline void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What ordinary stores and cp.async wrote to shared memory, for tensor cores and copy engine.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// From here on, how many registers each thread of a warpgroup has.
template <int kRegisters>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Matrix products. Operands in shared memory have rows of 64 two-byte numbers (128 bytes), their 16-byte pieces swizzled: piece c
// of row r is at c ^ (r % 8). Eight rows make an atom of 1024 bytes, aligned to that. Rows lie along the reduction; those of an
// operand that is taken transposed are its numbers, side by side in slabs of 64 columns.

constexpr int kSlab = 64;  // numbers of such a row
constexpr uint32_t kRowBytes = kSlab * 2;
constexpr uint32_t kAtomBytes = 8 * kRowBytes;

// `slab`: bytes from one slab of a transposed operand to the next; of no meaning to others.
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t slab = 16) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, atom = uint64_t{kAtomBytes >> 4} << 32;
  return swizzle_128 | atom | uint64_t{slab >> 4} << 16 | ((address & 0x3FFFF) >> 4);
}

// The descriptor of what lies some bytes further on. Its upper half stays what it is: no carry to be worked out.
__device__ inline uint64_t further(uint64_t descriptor, uint32_t bytes) {
  return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// A number that all lanes of a warp have, such that the compiler knows it: descriptors are worked out once for the warp then.
__device__ inline int32_t uniform(int32_t x) { return __shfl_sync(~0u, x, 0); }

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Around products: the compiler knows of no connection between a fence or a wait and the registers of a product, and might read
// sums before the wait, or write an operand behind the fence.
template <int kCount>
__device__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ void settle(uint32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define PCP_SUMS_64                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PCP_SUMS_128                                                                 \
  PCP_SUMS_64                                                                        \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PCP_SUMS_256                                                                             \
  PCP_SUMS_128                                                                                   \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PCP_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PCP_D_64(i) PCP_D8(i), PCP_D8(i + 8), PCP_D8(i + 16), PCP_D8(i + 24)
#define PCP_D_128(i) PCP_D_64(i), PCP_D_64(i + 32)
#define PCP_D_256(i) PCP_D_128(i), PCP_D_128(i + 64)
#define PCP_WGMMA(n, types, a, b, more)                                                                                          \
  "{\n.reg .pred more;\nsetp.ne.b32 more, " more ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" PCP_SUMS_##n \
      "}, " a ", " b ", more, 1, 1"
#define PCP_ROWS ", 0, 0;\n}"
#define PCP_TRANSPOSED ", 1;\n}"
// The statement, of operands of type T: what a, b and `more` are called in it, how b lies, then the inputs themselves.
#define PCP_PRODUCT(T, n, a, b, more, layout, ...)                                           \
  if constexpr (__is_same(T, __half)) {                                                      \
    asm volatile(PCP_WGMMA(n, "f16.f16", a, b, more) layout : PCP_D_##n(0) : __VA_ARGS__);   \
  } else {                                                                                   \
    asm volatile(PCP_WGMMA(n, "bf16.bf16", a, b, more) layout : PCP_D_##n(0) : __VA_ARGS__); \
  }

// d [64, N] += a [64, 16] b [N, 16]^T, or = without `accumulate`. Lane l of warp w has, for every 8 columns, columns 2 (l % 4) and
// the next one of rows 16 w + l / 4 and 8 further down.
#define PCP_INPUTS "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
template <typename T>
__device__ void product(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  PCP_PRODUCT(T, 64, "%32", "%33", "%34", PCP_ROWS, PCP_INPUTS);
}
template <typename T>
__device__ void product(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  PCP_PRODUCT(T, 128, "%64", "%65", "%66", PCP_ROWS, PCP_INPUTS);
}
#undef PCP_INPUTS

// d [64, N] += a [64, 16] b [16, N], with `a` in registers: a pair of its numbers where a sum's pair of columns would be, of the
// first 8 columns and of the others, rows first.
#define PCP_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1)
template <typename T>
__device__ void product(float (&d)[32], const uint32_t* a, uint64_t b) {
  PCP_PRODUCT(T, 64, "{%32, %33, %34, %35}", "%36", "%37", PCP_TRANSPOSED, PCP_INPUTS);
}
template <typename T>
__device__ void product(float (&d)[64], const uint32_t* a, uint64_t b) {
  PCP_PRODUCT(T, 128, "{%64, %65, %66, %67}", "%68", "%69", PCP_TRANSPOSED, PCP_INPUTS);
}
template <typename T>
__device__ void product(float (&d)[128], const uint32_t* a, uint64_t b) {
  PCP_PRODUCT(T, 256, "{%128, %129, %130, %131}", "%132", "%133", PCP_TRANSPOSED, PCP_INPUTS);
}
#undef PCP_INPUTS
#undef PCP_PRODUCT
#undef PCP_TRANSPOSED
#undef PCP_ROWS
#undef PCP_WGMMA
#undef PCP_D_256
#undef PCP_D_128
#undef PCP_D_64
#undef PCP_D8
#undef PCP_SUMS_256
#undef PCP_SUMS_128
#undef PCP_SUMS_64

// Two numbers of an operand, the first one lower.
template <typename T>
__device__ uint32_t pack(float a, float b) {
  if constexpr (__is_same(T, __half)) {
    const __half2 both = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// Lane q of four has v[i], columns 2 q and 2 q + 1 of 8-column block i; returns all 8 columns of block q.
__device__ inline uint4 gather_block(const uint32_t (&v)[4], uint32_t lane) {
  const bool odd = lane & 1, high = lane & 2;
  const uint32_t r0 = __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1), r1 = __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
  const uint32_t x0 = odd ? r0 : v[0], x1 = odd ? v[1] : r0, y0 = odd ? r1 : v[2], y1 = odd ? v[3] : r1;
  const uint32_t s0 = __shfl_xor_sync(~0u, high ? x0 : y0, 2), s1 = __shfl_xor_sync(~0u, high ? x1 : y1, 2);
  return high ? make_uint4(s0, s1, y0, y1) : make_uint4(x0, x1, s0, s1);
}

}  // namespace pcp_mla::cuda
