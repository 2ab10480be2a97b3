// publish_latents: this rank's latents stored at their slots in the caches of all ranks, in one launch. What the kernel and the
// calls to it share; docs/peers.md says why nothing is overwritten that is still read.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>

#include "view.h"

namespace pcp_mla {

constexpr int kMaxPeers = 16, kMaxPublishBlocks = 132;

// Of each rank, written by all: the number of a rank's last call that was entered, and for each of its blocks the last one whose
// rows have been stored. `epoch` is the rank's own: calls that are done.
struct Flags {
  uint32_t entered[kMaxPeers];
  uint32_t published[kMaxPeers][kMaxPublishBlocks];
  uint32_t epoch;
};

// In memory of the host that the GPU writes to before it gives up.
struct PeerStatus {
  uint32_t failed, epoch;
  uint32_t missing[kMaxPeers], seen[kMaxPeers];  // by rank: whether it was missing, and its last call
};

// One rank's end of an exchange.
struct Mailbox {
  struct Everywhere {
    char* of[kMaxPeers];  // by rank, as this process sees it
  };

  int32_t device, rank, world, max_blocks;
  int32_t dtype, kv_lora_rank, rope;  // of latents
  uint64_t timeout_ns;
  Flags* flags[kMaxPeers];
  Everywhere staging;
  int64_t staging_bytes;
  PeerStatus* status;
  std::unordered_map<const char*, Everywhere> caches;  // by where this rank's begins
  std::unordered_set<const char*> published;           // what was written to since all ranks were last waited for
  int64_t step = -1;
  uint64_t capture = 0;
};

enum class Published : int32_t { kCache = 1, kStaging = 2 };

struct PublishCall {
  const View &kv_c, &k_pe;
  const View *slot_mapping, *cache, *scale;  // null for none
  int64_t first, padded, step;               // the rank's first row among those of all, rows of the fullest rank
  bool alone;                                // every rank has these rows: nothing is sent
};

}  // namespace pcp_mla
