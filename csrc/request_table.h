// plan_expand without torch: lookups in the request table, slots of the paged cache, and one call's pointers.
//
// The request table is int32 [5 + P, R + 1] (python/pcp_mla/planner/step_buffer.py): prefix sums over requests of new tokens, of
// cached ones and of rows in key order; the length of a chunk; the first rank that holds a decode, -1 for a prefill; and for each
// of P ranks prefix sums of its local tokens.
#pragma once
#include <cstdint>

#include "row_table.h"

namespace pcp_mla {

struct RequestTable {
  const int32_t* data;
  int32_t requests, world;

  PCP_HOST_DEVICE const int32_t* row(int i) const { return data + int64_t{i} * (requests + 1); }
  PCP_HOST_DEVICE const int32_t* natural() const { return row(0); }
  PCP_HOST_DEVICE const int32_t* context() const { return row(1); }
  PCP_HOST_DEVICE const int32_t* keys() const { return row(2); }
  PCP_HOST_DEVICE const int32_t* chunk() const { return row(3); }
  PCP_HOST_DEVICE const int32_t* owner() const { return row(4); }
  PCP_HOST_DEVICE const int32_t* local(int rank) const { return row(5 + rank); }

  PCP_HOST_DEVICE int32_t query_len(int32_t i) const { return natural()[i + 1] - natural()[i]; }
  PCP_HOST_DEVICE int32_t context_len(int32_t i) const { return context()[i + 1] - context()[i]; }
  PCP_HOST_DEVICE int32_t restored_start(int32_t i) const { return keys()[i] - context()[i]; }
  PCP_HOST_DEVICE int32_t restored_len(int32_t i) const { return restored_start(i + 1) - restored_start(i); }

  // Local tokens of a request's head on a rank, if it is a prefill: a rank has a tail only where its head is full.
  PCP_HOST_DEVICE int32_t head_len(int32_t i, int32_t rank) const {
    const int32_t rest = restored_len(i) - rank * chunk()[i];
    return rest < 0 ? 0 : rest < chunk()[i] ? rest : chunk()[i];
  }
  PCP_HOST_DEVICE int32_t head_start(int32_t i, int32_t rank) const { return owner()[i] < 0 ? rank * chunk()[i] : 0; }
  PCP_HOST_DEVICE int32_t tail_start(int32_t i, int32_t rank) const { return (2 * world - 1 - rank) * chunk()[i]; }

  // Where a rank's copies of a request's tokens belong in the restored order, counted from the request's start there. A decode's
  // copies lie one after another in the padded layout; in the unpadded one, all but the first fall outside.
  PCP_HOST_DEVICE int32_t restored_shift(int32_t i, int32_t rank) const {
    return owner()[i] < 0 ? 0 : (rank - owner()[i]) * query_len(i);
  }
  PCP_HOST_DEVICE bool is_first_copy(int32_t i, int32_t rank) const { return owner()[i] < 0 || owner()[i] == rank; }

  // Last request that starts at or before t: empty requests in front of it are passed over.
  template <typename Start>
  PCP_HOST_DEVICE int32_t find(int32_t t, const Start& start) const {
    int32_t low = 0, high = requests;
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (start(middle) <= t ? low : high) = middle;
    }
    return low;
  }
};

// Of row n of the keys, all of them in key order, or all cached ones before all new ones: whose it is, and which token.
struct KeyPlace {
  int32_t request, position;
};
PCP_HOST_DEVICE inline KeyPlace key_place(const RequestTable& table, int32_t n, bool split) {
  const int32_t contexts = table.context()[table.requests];
  if (!split) {
    const int32_t i = table.find(n, [&](int32_t m) { return table.keys()[m]; });
    return {i, n - table.keys()[i]};
  }
  if (n < contexts) {
    const int32_t i = table.find(n, [&](int32_t m) { return table.context()[m]; });
    return {i, n - table.context()[i]};
  }
  const int32_t i = table.find(n - contexts, [&](int32_t m) { return table.restored_start(m); });
  return {i, table.context_len(i) + n - contexts - table.restored_start(i)};
}

// The paged latent cache, seen as rows of one token, and this shard's part of it.
struct PagedCache {
  const int32_t* blocks;  // [rows, columns], null for none
  int64_t row_stride, rows, columns;
  uint32_t block_size, shards, shard, interleave;

  // -1 where this shard does not hold the token, and for a block without slots of 31 bits: those of another one are never met.
  PCP_HOST_DEVICE int64_t slot(int32_t request, int32_t position) const {
    uint32_t at = position;
    if (shards > 1) {
      const uint32_t group = at / interleave, within = at - group * interleave;
      const uint32_t round = group / shards;
      if (group - round * shards != shard) return -1;
      at = round * interleave + within;
    }
    const uint32_t block = at / block_size;
    if (request >= rows || block >= columns) return -1;
    const int64_t number = blocks[request * row_stride + block], slot = number * block_size + (at - block * block_size);
    return number < 0 || slot > INT32_MAX ? -1 : slot;
  }
};

// One call of plan_expand: what the kernels read and write.
struct ExpandJob {
  RequestTable table;
  PagedCache cache;
  int32_t rank, rows, kv_rows;  // rows: Np
  bool has_slots;               // an empty block table has no address, but its slots are wanted
  bool split;                   // kv_rows: all cached tokens, then all new ones
  int32_t *local, *positions, *restore, *hidden;
  int64_t* slots;
  int32_t* kv;
};

}  // namespace pcp_mla
