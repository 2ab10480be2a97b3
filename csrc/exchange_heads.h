// exchange_heads: rows of this rank's tokens to the ranks that have their heads, or back, in one launch. What the kernel and the
// calls to it share; docs/peers.md says why nothing is overwritten that is still read.
#pragma once
#include <algorithm>

#include "publish_latents.h"

namespace pcp_mla {

struct HeadsCall {
  const View& x;               // [tokens, num_heads, width], or back [world * padded, heads of this rank, width]
  int64_t tokens, local_rows;  // how many tokens a rank may have: without pads, with those of a padded plan
  int64_t padded, step;        // rows of the fullest rank
  int64_t num_heads, width;    // of all ranks; elements
  int64_t offset;              // bytes in every rank's buffer: where what is stored begins
  bool to_tokens;              // back
};

// A rank's first head; that of `world` is the number of heads.
inline int64_t first_head(int64_t num_heads, int64_t world, int64_t rank) {
  return rank * (num_heads / world) + std::min(rank, num_heads % world);
}

// What one rank is sent: `padded` rows of so many heads, which lie side by side there. Bytes.
struct HeadBlock {
  int64_t from;        // in x, where the first row begins
  int64_t to, to_row;  // in that rank's buffer, and from a row to the next
  int64_t heads;
};

inline HeadBlock block_for(const HeadsCall& call, int64_t world, int64_t rank, int64_t other) {
  const View& x = call.x;
  const int64_t width = call.width * x.item;
  const auto first = [&](int64_t r) { return first_head(call.num_heads, world, r); };
  if (call.to_tokens) {
    const int64_t heads = first(rank + 1) - first(rank);
    return {other * call.padded * x.strides[0] * x.item, call.offset + first(rank) * width, call.num_heads * width, heads};
  }
  const int64_t heads = first(other + 1) - first(other), row = heads * width;
  return {first(other) * x.strides[1] * x.item, call.offset + rank * call.padded * row, row, heads};
}

// Bytes of every rank's buffer that a call may write to: the same on all ranks.
inline int64_t heads_end(const HeadsCall& call, int64_t world) {
  const int64_t most = (call.num_heads + world - 1) / world;
  return call.offset + call.padded * call.width * call.x.item * (call.to_tokens ? call.num_heads : world * most);
}

// Whether somebody may still read what this call overwrites, as far as the calls tell: not where the call before, of the same step
// and capture, wrote somewhere else. It has ended here, so all ranks have entered it, behind what they read.
inline bool must_wait(Mailbox& mailbox, const HeadsCall& call, uint64_t capture) {
  const char* written = mailbox.staging.of[mailbox.rank] + call.offset;
  const bool follows = call.step == mailbox.step && capture == mailbox.capture && mailbox.published.count(written) == 0;
  mailbox.step = call.step;
  mailbox.capture = capture;
  mailbox.published = {written};
  return !follows;
}

}  // namespace pcp_mla
