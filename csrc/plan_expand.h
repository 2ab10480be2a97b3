// plan_expand: what the CPU and the CUDA kernel share: lookups in the request table, slots of the paged cache, checks.
//
// The request table is int32 [5 + P, R + 1] (python/pcp_mla/step_buffer.py): prefix sums over requests of new tokens, of cached
// ones and of rows in key order; the length of a chunk; the first rank that holds a decode, -1 for a prefill; and for each of P
// ranks prefix sums of its local tokens.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>

#include "checks.h"

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

// The paged latent cache, seen as rows of one token, and this shard's part of it.
struct PagedCache {
  const int32_t* blocks;  // [requests, columns], null for none
  int64_t row_stride, columns;
  uint32_t block_size, shards, shard, interleave;

  // -1 where this shard does not hold the token.
  PCP_HOST_DEVICE int64_t slot(int32_t request, int32_t position) const {
    uint32_t at = position;
    if (shards > 1) {
      const uint32_t group = at / interleave, within = at - group * interleave;
      const uint32_t round = group / shards;
      if (group - round * shards != shard) return -1;
      at = round * interleave + within;
    }
    const uint32_t block = at / block_size;
    if (block >= columns) return -1;
    return int64_t{blocks[request * row_stride + block]} * block_size + (at - block * block_size);
  }
};

struct PlanExpand {
  RequestTable table;
  PagedCache cache;
  int32_t rank, rows, kv_rows;  // rows: Np
  bool has_slots;               // an empty block table has no address, but its slots are wanted
  bool split;                   // kv_rows: all cached tokens, then all new ones
  int32_t *local, *positions, *restore, *hidden;
  int64_t* slots;
  int32_t* kv;
  Kind kind;

  PlanExpand(const Tensor& request_table, const std::optional<Tensor>& block_tables, const Tensor& local_token_indices,
             const Tensor& positions_out, const Tensor& allgather_restore_idx, const Tensor& hidden_restore_idx,
             const Tensor& slot_mapping, const Tensor& kv_rows_out, int64_t num_requests, int64_t world_size, int64_t rank_in,
             int64_t num_tokens_padded, int64_t num_kv_rows, bool split_in, int64_t block_size, int64_t dcp_world_size,
             int64_t dcp_rank, int64_t cp_interleave)
      : kind(kind_of(request_table)) {
    check(num_requests >= 0 && world_size >= 1 && rank_in >= 0 && rank_in < world_size && num_tokens_padded >= 0 &&
              num_kv_rows >= 0 && world_size * num_tokens_padded <= INT32_MAX && num_kv_rows <= INT32_MAX,
          "plan_expand: counts must not be negative and rank must be in 0..world_size - 1");
    check(block_size >= 1 && dcp_world_size >= 1 && dcp_rank >= 0 && dcp_rank < dcp_world_size && cp_interleave >= 1,
          "plan_expand: block_size, dcp_world_size and cp_interleave must be at least 1, dcp_rank in 0..dcp_world_size - 1");
    const int64_t gathered = world_size * num_tokens_padded;
    table = {output<int32_t>("request_table", request_table, (5 + world_size) * (num_requests + 1)),
             static_cast<int32_t>(num_requests), static_cast<int32_t>(world_size)};
    local = output<int32_t>("local_token_indices", local_token_indices, num_tokens_padded);
    positions = output<int32_t>("positions", positions_out, num_tokens_padded);
    restore = output<int32_t>("allgather_restore_idx", allgather_restore_idx, gathered);
    hidden = output<int32_t>("hidden_restore_idx", hidden_restore_idx, gathered);
    slots = output<int64_t>("slot_mapping", slot_mapping, block_tables ? gathered : 0);
    kv = output<int32_t>("kv_rows", kv_rows_out, num_kv_rows);
    check(num_kv_rows == 0 || block_tables, "plan_expand: kv_rows need block_tables");
    cache = {nullptr,
             0,
             0,
             static_cast<uint32_t>(block_size),
             static_cast<uint32_t>(dcp_world_size),
             static_cast<uint32_t>(dcp_rank),
             static_cast<uint32_t>(cp_interleave)};
    if (block_tables) {
      const Tensor& t = *block_tables;
      const Kind k = kind_of(t);
      check(k.same_device(kind) && k.dtype == aoti_torch_dtype_int32() && t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1),
            "plan_expand: block_tables must be int32 [requests, blocks] with a contiguous last dimension on the device of the "
            "others");
      cache.blocks = static_cast<const int32_t*>(t.data_ptr());
      cache.row_stride = t.stride(0);
      cache.columns = t.size(1);
    }
    rank = static_cast<int32_t>(rank_in);
    rows = static_cast<int32_t>(num_tokens_padded);
    kv_rows = static_cast<int32_t>(num_kv_rows);
    split = split_in;
    has_slots = block_tables.has_value();
  }

 private:
  template <typename T>
  T* output(const char* name, const Tensor& t, int64_t count) const {
    const Kind k = kind_of(t);
    const int32_t wanted = sizeof(T) == 4 ? aoti_torch_dtype_int32() : aoti_torch_dtype_int64();
    check(k.same_device(kind) && k.dtype == wanted && t.dim() == 1 && t.is_contiguous() && t.numel() >= count,
          "plan_expand: ", name, " must be a contiguous ", sizeof(T) == 4 ? "int32" : "int64", " vector of at least ", count,
          " on the device of the others");
    return static_cast<T*>(t.data_ptr());
  }
};

}  // namespace pcp_mla
