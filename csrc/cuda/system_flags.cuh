// Flags that GPUs set for one another, and waits for them that end. Semantics: PTX ISA 8.7, "Memory Consistency Model".
#pragma once
#include "../publish_latents.h"

namespace pcp_mla::cuda {

// What this thread knows to be written, the writes of its block before the last barrier among it, is seen by whoever sees the flag.
__device__ inline void set_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline uint32_t read_flag(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// For a whole block: waits until `flag(i)` is at least `epoch` for all i < count, which may wrap. flag gives an address, rank(i)
// whose it is. After `deadline` it tells the host who was missing and ends all work of the process on this GPU: nothing may go on
// with rows that are not there.
template <typename Flag, typename Rank>
__device__ void wait_for_flags(uint32_t count, uint32_t epoch, uint64_t deadline, PeerStatus* status, const Flag& flag,
                               const Rank& rank) {
  bool late = false;
  for (uint32_t i = threadIdx.x; i < count && !late; i += blockDim.x) {
    uint32_t seen = read_flag(flag(i));
    while (static_cast<int32_t>(seen - epoch) < 0 && !late) {
      late = nanoseconds() > deadline;
      seen = read_flag(flag(i));
    }
    late = static_cast<int32_t>(seen - epoch) < 0;
    if (late) {
      status->seen[rank(i)] = seen;
      status->missing[rank(i)] = 1;
      __threadfence_system();
    }
  }
  if (__syncthreads_or(late) == 0) return;
  if (threadIdx.x == 0) {
    status->epoch = epoch;
    __threadfence_system();
    *const_cast<volatile uint32_t*>(&status->failed) = 1;
    __threadfence_system();
  }
  __syncthreads();
  __trap();
}

}  // namespace pcp_mla::cuda
