// What sm_90 has and kernels here use, as functions: barriers in shared memory, tensor copies, asynchronous copies, matrix products
// of a warpgroup. Names and semantics: PTX ISA 8.7, chapters "mbarrier", "cp.async", "wgmma".
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pcp_mla::cuda {

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

// Copies. A tensor copy completes on a barrier.

__device__ inline void tensor_load_2d(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(map), "r"(barrier), "r"(x), "r"(y)
               : "memory");
}

// 16 bytes, or 16 zeros.
__device__ inline void copy_async_16(uint32_t to, const void* from, bool zeros) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What ordinary stores and cp.async wrote to shared memory, for tensor cores and copy engine.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Matrix products. Both operands lie in shared memory, rows of 64 two-byte numbers (128 bytes) along the reduction, their 16-byte
// pieces swizzled: piece c of row r is at c ^ (r % 8). Eight rows make an atom of 1024 bytes, aligned to that.

constexpr int kSlab = 64;  // numbers of such a row

__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, atom = uint64_t{1024 >> 4} << 32, leading = uint64_t{1} << 16;
  return swizzle_128 | atom | leading | ((address & 0x3FFFF) >> 4);
}

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After the last wait: the compiler knows of no connection between it and the sums, and might read these before.
template <int kCount>
__device__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define PCP_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PCP_D16(i) PCP_D4(i), PCP_D4(i + 4), PCP_D4(i + 8), PCP_D4(i + 12)
#define PCP_PRODUCT_64(type)                                                                                   \
  asm volatile(                                                                                                \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %34, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type                                                       \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, more, 1, 1, 0, 0;\n}"                      \
      : PCP_D16(0), PCP_D16(16)                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define PCP_PRODUCT_128(type)                                                                                      \
  asm volatile(                                                                                                    \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type                                                          \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "     \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "  \
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, more, 1, 1, 0, 0;\n}"                                                                             \
      : PCP_D16(0), PCP_D16(16), PCP_D16(32), PCP_D16(48)                                                          \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// d [64, N] += a [64, 16] b [N, 16]^T, or = without `accumulate`. Lane l of warp w has, for every 8 columns, columns 2 (l % 4) and
// the next one of rows 16 w + l / 4 and 8 further down.
template <typename T>
__device__ void product(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    PCP_PRODUCT_64("f16.f16");
  } else {
    PCP_PRODUCT_64("bf16.bf16");
  }
}
template <typename T>
__device__ void product(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (__is_same(T, __half)) {
    PCP_PRODUCT_128("f16.f16");
  } else {
    PCP_PRODUCT_128("bf16.bf16");
  }
}
#undef PCP_PRODUCT_128
#undef PCP_PRODUCT_64
#undef PCP_D16
#undef PCP_D4

}  // namespace pcp_mla::cuda
