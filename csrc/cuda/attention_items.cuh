// Which tile of which row a block of the attention kernel takes: the longest first, so that the last ones to start are the ones
// that end soon. Found by a warp from the rows' lengths, so that a captured graph can be replayed with others.
#pragma once
#include <cstdint>

namespace pcp_mla::cuda {

struct AttentionRows {
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  int32_t count;
  bool causal, skip_empty;  // skip_empty: rows without keys have no items
};

struct AttentionItem {
  int32_t row, tile;  // row -1: there are not so many items
};

// A row's items: under a causal mask `lowest`, lowest + 1, ... tiles long, else all `lowest`.
struct ItemLengths {
  int32_t lowest = 0, tiles = 0;

  __device__ int32_t at_least(int32_t level, bool causal) const {  // how many of them are `level` long
    if (causal) return max(tiles - max(level - lowest, 0), 0);
    return lowest >= level ? tiles : 0;
  }
};

template <int kQueries>
__device__ ItemLengths item_lengths(const AttentionRows& r, int32_t row) {
  if (row >= r.count) return {};
  const int32_t length = r.cu_seqlens_q[row + 1] - r.cu_seqlens_q[row], used = r.seqused_k[row];
  if (r.skip_empty && used == 0) return {};
  return {(r.causal ? max(used - length, 0) : used) / kQueries, (length + kQueries - 1) / kQueries};
}

// The number-th item, for all lanes of a warp.
template <int kQueries>
__device__ AttentionItem attention_item(const AttentionRows& r, int32_t number, uint32_t lane) {
  const ItemLengths first = item_lengths<kQueries>(r, lane);  // most calls have no more than 32 rows
  const auto count_from = [&](int32_t level) {
    int32_t count = first.at_least(level, r.causal);
    for (int32_t row = lane + 32; row < r.count; row += 32) count += item_lengths<kQueries>(r, row).at_least(level, r.causal);
    return __reduce_add_sync(~0u, count);
  };
  int32_t high = first.tiles > 0 ? first.lowest + first.tiles : 0;
  for (int32_t row = lane + 32; row < r.count; row += 32) {
    const ItemLengths lengths = item_lengths<kQueries>(r, row);
    if (lengths.tiles > 0) high = max(high, lengths.lowest + lengths.tiles);
  }
  high = __reduce_max_sync(~0u, high) + 1;
  if (number >= count_from(0)) return {-1, 0};
  int32_t low = 0;
  while (high - low > 1) {  // the longest level that has the item among those at or above it
    const int32_t middle = (low + high) / 2;
    (count_from(middle) > number ? low : high) = middle;
  }
  int32_t left = number - count_from(low + 1);
  for (int32_t from = 0;; from += 32) {
    const ItemLengths lengths = from == 0 ? first : item_lengths<kQueries>(r, from + lane);
    const int32_t here = lengths.at_least(low, r.causal) - lengths.at_least(low + 1, r.causal);
    int32_t end = here;
#pragma unroll
    for (int32_t step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(~0u, end, step);
      if (static_cast<int32_t>(lane) >= step) end += before;
    }
    const uint32_t reached = __ballot_sync(~0u, end > left);
    if (reached != 0) {
      const int32_t owner = __ffs(reached) - 1;
      const int32_t tile = r.causal ? low - lengths.lowest : left - (end - here);
      return {from + owner, __shfl_sync(~0u, tile, owner)};
    }
    left -= __shfl_sync(~0u, end, 31);
  }
}

}  // namespace pcp_mla::cuda
