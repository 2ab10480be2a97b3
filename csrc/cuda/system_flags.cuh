// Flags that GPUs set for one another, and waits for them that end. Semantics: PTX ISA 8.7, "Memory Consistency Model".
#pragma once
#include "../publish_latents.h"

namespace pcp_mla::cuda {

// What this thread knows to be written, the writes of its block before the last barrier among it, is seen by whoever sees the flag.
__device__ inline void set_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ inline uint64_t read_flag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// For a whole block: waits until all flags i < count are those of call `epoch` or a later one; `flag(i)` gives an address,
// `rank(i)` whose it is. `what` is the call, below its number, where flags have that. After `deadline`, or if a rank made another
// call, it tells the host and ends all work of the process on this GPU: nothing may go on with rows that are not there.
template <typename Flag, typename Rank>
__device__ void wait_for_flags(uint32_t count, uint64_t epoch, uint64_t what, uint64_t deadline, const Flags& own,
                               PeerStatus* status, const Flag& flag, const Rank& rank) {
  uint32_t wrong = 0;
  for (uint32_t i = threadIdx.x; i < count && wrong == 0; i += blockDim.x) {
    uint64_t seen = read_flag(flag(i));
    while (seen >> kCallBits < epoch && wrong == 0) {
      if (nanoseconds() > deadline) wrong = PeerStatus::kMissing;
      seen = read_flag(flag(i));
    }
    if (seen >> kCallBits >= epoch)
      wrong = seen >> kCallBits == epoch && seen != (epoch << kCallBits | what) ? PeerStatus::kOther : 0;
    if (wrong != 0) {
      status->seen[rank(i)] = read_flag(&own.entered[rank(i)]) >> kCallBits;
      status->how[rank(i)] = wrong;
      __threadfence_system();
    }
  }
  if (__syncthreads_or(wrong != 0) == 0) return;
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
