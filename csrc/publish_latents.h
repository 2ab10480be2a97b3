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
constexpr int kCallBits = 16;  // of a flag: what the call was, below its number

// Of each rank, written by all: the number of a rank's last call that was entered, and for each of its blocks the last one whose
// rows have been stored, with what it was. `epoch` is the rank's own: calls that are done.
struct Flags {
  uint64_t entered[kMaxPeers];
  uint64_t published[kMaxPeers][kMaxPublishBlocks];
  uint64_t epoch;
};

// In memory of the host that the GPU writes to before it gives up.
struct PeerStatus {
  uint32_t failed;
  uint32_t how[kMaxPeers];          // by rank: 0 if it was there, kMissing, kOther
  uint64_t epoch, seen[kMaxPeers];  // and its last call
  static constexpr uint32_t kMissing = 1, kOther = 2;
};

// Where the same tensor lies on each rank, as this process sees it.
struct Everywhere {
  char* of[kMaxPeers];
};

// A cache that all ranks have opened, which must be of one form everywhere.
struct AttachedCache {
  Everywhere at;
  int32_t number, dtype, dims;
  int64_t sizes[3], strides[3];
};

// One rank's end of an exchange.
struct Mailbox {
  int32_t device, rank, world, max_blocks;
  int32_t dtype, kv_lora_rank, rope;  // of latents
  uint64_t timeout_ns;
  Flags* flags[kMaxPeers];
  Everywhere staging;
  int64_t staging_bytes;
  PeerStatus* status;
  std::unordered_map<const char*, AttachedCache> caches;  // by where this rank's begins
  int32_t attached = 0;                                   // how many, also of those that are there no more
  std::unordered_set<const char*> published;              // what was written to since all ranks were last waited for
  int64_t step = -1;
  uint64_t capture = 0;
  void *stream = nullptr, *event = nullptr;  // of the last call; to order streams by
};

enum class Published : int32_t { kCache = 1, kStaging = 2 };

struct PublishCall {
  const View &kv_c, &k_pe;
  const View *slot_mapping, *cache, *scale;  // null for none
  int64_t tokens, local_rows;                // how many rows there may be: without pads, with those of a padded plan
  int64_t first, padded, step;               // the rank's first row among those of all, rows of the fullest rank
  bool alone;                                // every rank has these rows: nothing is sent
};

// Whether somebody may still read what this call overwrites, as far as the calls tell, which every rank makes alike: a cache that
// was written to since all ranks were last waited for, also by each rank alone, may be read until a rank's next call.
inline bool must_wait(Mailbox& mailbox, const char* written, const PublishCall& call, uint64_t capture) {
  if (call.alone) {
    mailbox.published.insert(written);
    return false;
  }
  const bool first = call.step != mailbox.step || capture != mailbox.capture;
  mailbox.step = call.step;
  mailbox.capture = capture;
  if (!first && mailbox.published.insert(written).second) return false;
  mailbox.published = {written};
  return true;
}

}  // namespace pcp_mla
