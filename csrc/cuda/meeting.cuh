// What launches that store to all ranks have in common: how they tell one another that they have come and that they are done.
#pragma once
#include <algorithm>
#include <utility>

#include "system_flags.cuh"
#include "vec.cuh"

namespace pcp_mla::cuda {

constexpr int kMeetingThreads = 512, kMeetingWarps = kMeetingThreads / 32;

struct Meeting {
  Flags* flags[kMaxPeers];
  PeerStatus* status;
  uint64_t timeout_ns, what;
  int32_t rank, world;  // a world of one: nothing is sent or waited for
  bool wait_first;      // until all ranks have done with what they read before
};

// A kernel: store() stores this block's part. When the kernel has ended, what all ranks stored is here. The grid is the same on all
// ranks.
template <typename Store>
__device__ __forceinline__ void meet(const Meeting& p, const Store& store) {
  Flags& own = *p.flags[p.rank];
  const uint64_t epoch = *const_cast<volatile uint64_t*>(&own.epoch) + 1, call = epoch << kCallBits;
  const uint64_t deadline = nanoseconds() + p.timeout_ns;
  if (blockIdx.x == 0 && threadIdx.x < p.world) set_flag(&p.flags[threadIdx.x]->entered[p.rank], call);
  if (p.wait_first) {
    wait_for_flags(
        p.world, epoch, 0, deadline, own, p.status, [&](uint32_t i) { return &own.entered[i]; }, [](uint32_t i) { return i; });
  }
  store();
  __syncthreads();
  if (threadIdx.x < p.world) set_flag(&p.flags[threadIdx.x]->published[p.rank][blockIdx.x], call | p.what);
  if (blockIdx.x != 0) return;
  const uint32_t blocks = gridDim.x;
  wait_for_flags(
      p.world * blocks, epoch, p.what, deadline, own, p.status, [&](uint32_t i) { return &own.published[i / blocks][i % blocks]; },
      [&](uint32_t i) { return i / blocks; });
  // The flags of this rank's own blocks were among them: all have read the epoch.
  if (threadIdx.x == 0) own.epoch = epoch;
}

inline void check_alive(const char* op, const Mailbox& mailbox) {
  check(mailbox.status == nullptr || mailbox.status->failed == 0, op, ": a rank was missing");
}

inline void set_meeting(Meeting& p, const Mailbox& mailbox) {
  p.rank = mailbox.rank;
  p.world = mailbox.world;
  p.timeout_ns = mailbox.timeout_ns;
  p.status = mailbox.status;
  std::copy(mailbox.flags, mailbox.flags + mailbox.world, p.flags);
}

// The part of a flag that says what a call was: ranks that pair different calls must not go on.
inline uint64_t words_of(int64_t number, int64_t padded) {
  constexpr uint64_t mask = (uint64_t{1} << kCallBits) - 1;
  return ((number + 1) * 0x9E37 + padded * 0x79B9 + (padded >> kCallBits)) & mask;
}

// Which graph is captured on the current stream, 0 for none. Calls are done one after the other, also on several streams: they
// count in the same memory.
inline uint64_t follow(Mailbox& mailbox, const Kind& kind) {
  const cudaStream_t stream = current_stream(kind);
  cudaStreamCaptureStatus status{};
  unsigned long long capture = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture));
  const auto before = static_cast<cudaStream_t>(std::exchange(mailbox.stream, stream));
  if (before == stream || mailbox.step < 0 || mailbox.capture != capture) return capture;
  if (mailbox.event == nullptr) {
    check_cuda(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&mailbox.event), cudaEventDisableTiming));
  }
  check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(mailbox.event), before));
  check_cuda(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(mailbox.event)));
  return capture;
}

}  // namespace pcp_mla::cuda
