// plan_shard_rows: the checks and the entries that the CPU and the CUDA kernel share.
#pragma once
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "request_table.h"

namespace pcp_mla {

// Of one shard's cache and the rows of an exchange (python/pcp_mla/plan/shard_rows.py): a shard sends `fresh` rows of new tokens
// and `context` rows of context.
struct ShardRows {
  RequestTable table;
  const int32_t* starts;  // [R + 1] of each request's rows of context among those that a shard sends
  PagedCache cache;
  const int64_t* gathered_slots;    // [P * Np]
  int32_t padded, each;             // Np; shards that have a rank's new tokens
  int32_t fresh, context, kv_rows;  // the last: how many are written
  bool split;
  int32_t* context_slots;  // [context]
  int64_t* slots;          // [shards * (fresh + context)]
  int32_t* kv;

  PCP_HOST_DEVICE int32_t sent() const { return fresh + context; }
  PCP_HOST_DEVICE int32_t exchanged() const { return static_cast<int32_t>(cache.shards) * sent(); }
  PCP_HOST_DEVICE int64_t entries() const { return int64_t{context} + exchanged() + kv_rows; }

  PCP_HOST_DEVICE void fill(int64_t entry) const {
    if (entry < context) {
      const auto n = static_cast<int32_t>(entry);
      context_slots[n] = context_slot(n);
    } else if (entry - context < exchanged()) {
      const auto n = static_cast<int32_t>(entry - context);
      slots[n] = slot(n);
    } else {
      const auto n = static_cast<int32_t>(entry - context - exchanged());
      kv[n] = key_row(n);
    }
  }

 private:
  PCP_HOST_DEVICE int32_t context_slot(int32_t n) const {
    if (n >= starts[table.requests]) return -1;
    const int32_t i = table.find(n, [&](int32_t m) { return starts[m]; });
    const uint32_t local = n - starts[i], turn = local / cache.interleave;
    const int64_t position = (int64_t{turn} * cache.shards + cache.shard) * cache.interleave + local % cache.interleave;
    return position < table.context_len(i) ? static_cast<int32_t>(cache.slot(i, static_cast<int32_t>(position))) : -1;
  }

  PCP_HOST_DEVICE int64_t slot(int32_t n) const {
    const int32_t shard = n / sent(), row = n - shard * sent(), holder = shard / each;
    const int32_t local = (shard - holder * each) * fresh + row;
    return row < fresh && local < padded ? gathered_slots[int64_t{holder} * padded + local] : -1;
  }

  PCP_HOST_DEVICE int32_t key_row(int32_t n) const {
    if (n >= table.keys()[table.requests]) return -1;
    const auto [i, position] = key_place(table, n, split);
    const int32_t token = position - table.context_len(i);
    if (token >= table.query_len(i)) return -1;
    if (token < 0) {
      const uint32_t group = position / cache.interleave, turn = group / cache.shards;
      const uint32_t local = turn * cache.interleave + position % cache.interleave;
      return static_cast<int32_t>((group - turn * cache.shards) * sent() + fresh + starts[i] + local);
    }
    int32_t rank = table.owner()[i], local = token;
    if (rank < 0) {
      const int32_t chunk = table.chunk()[i], number = chunk > 0 ? token / chunk : 2 * table.world;
      if (number >= 2 * table.world) return -1;  // of a table that is none
      const bool tail = number >= table.world;
      rank = tail ? 2 * table.world - 1 - number : number;
      local = token - number * chunk + (tail ? table.head_len(i, rank) : 0);
    }
    local += table.local(rank)[i];
    const int32_t part = local / fresh;
    return (rank * each + part) * sent() + local - part * fresh;
  }
};

struct PlanShardRows : ShardRows {
  Kind kind;

  PlanShardRows(const Tensor& request_table, const Tensor& shard_starts, const Tensor& block_tables, const Tensor& slot_mapping,
                const Tensor& context_slots_out, const Tensor& shard_slots, const Tensor& kv_rows_out, int64_t num_requests,
                int64_t world_size, int64_t num_tokens_padded, int64_t num_context, int64_t num_kv_rows, bool split_in,
                int64_t block_size, int64_t dcp_world_size, int64_t dcp_rank, int64_t cp_interleave)
      : ShardRows{}, kind(kind_of(request_table)) {
    const auto in = [](int64_t low, int64_t value) { return low <= value && value <= INT32_MAX; };
    check(in(0, num_requests) && in(1, world_size) && in(0, num_tokens_padded) && in(0, world_size * num_tokens_padded) &&
              in(0, num_context) && in(0, num_kv_rows),
          "plan_shard_rows: counts must be 0 to 2**31 - 1, and world_size at least 1");
    check(in(1, block_size) && in(1, dcp_world_size) && dcp_world_size % world_size == 0 && in(0, dcp_rank) &&
              dcp_rank < dcp_world_size && in(1, cp_interleave),
          "plan_shard_rows: block_size, dcp_world_size and cp_interleave must be 1 to 2**31 - 1, dcp_world_size a multiple of "
          "world_size, dcp_rank in 0..dcp_world_size - 1");
    each = static_cast<int32_t>(dcp_world_size / world_size);
    padded = static_cast<int32_t>(num_tokens_padded);
    fresh = (padded + each - 1) / each;
    context = static_cast<int32_t>(num_context);
    const int64_t sent_rows = int64_t{fresh} + context;
    check(in(0, dcp_world_size * sent_rows), "plan_shard_rows: all shards must send less than 2**31 rows");
    table = {vector<int32_t>("request_table", request_table, (5 + world_size) * (num_requests + 1)),
             static_cast<int32_t>(num_requests), static_cast<int32_t>(world_size)};
    starts = vector<int32_t>("shard_starts", shard_starts, num_requests + 1);
    gathered_slots = vector<int64_t>("slot_mapping", slot_mapping, world_size * num_tokens_padded);
    context_slots = vector<int32_t>("context_slots", context_slots_out, num_context);
    slots = vector<int64_t>("shard_slots", shard_slots, dcp_world_size * sent_rows);
    kv = vector<int32_t>("kv_rows", kv_rows_out, num_kv_rows);
    const Kind k = kind_of(block_tables);
    check(k.same_device(kind) && k.dtype == aoti_torch_dtype_int32() && block_tables.dim() == 2 &&
              (block_tables.numel() == 0 || block_tables.size(1) == 1 || block_tables.stride(1) == 1),
          "plan_shard_rows: block_tables must be int32 [requests, blocks] with a contiguous last dimension on the device of the "
          "others");
    cache = {static_cast<const int32_t*>(block_tables.data_ptr()),
             block_tables.stride(0),
             block_tables.size(0),
             block_tables.size(1),
             static_cast<uint32_t>(block_size),
             static_cast<uint32_t>(dcp_world_size),
             static_cast<uint32_t>(dcp_rank),
             static_cast<uint32_t>(cp_interleave)};
    kv_rows = static_cast<int32_t>(num_kv_rows);
    split = split_in;
  }

 private:
  template <typename T>
  T* vector(const char* name, const Tensor& t, int64_t count) const {
    const Kind k = kind_of(t);
    const int32_t wanted = sizeof(T) == 4 ? aoti_torch_dtype_int32() : aoti_torch_dtype_int64();
    check(k.same_device(kind) && k.dtype == wanted && t.dim() == 1 && t.is_contiguous() && t.numel() >= count,
          "plan_shard_rows: ", name, " must be a contiguous ", sizeof(T) == 4 ? "int32" : "int64", " vector of at least ", count,
          " on the device of the others");
    return static_cast<T*>(t.data_ptr());
  }
};

}  // namespace pcp_mla
