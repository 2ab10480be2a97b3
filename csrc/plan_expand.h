// plan_expand as an op: the checks that the CPU and the CUDA kernel share.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>

#include "checks.h"
#include "request_table.h"

namespace pcp_mla {

struct PlanExpand : ExpandJob {
  Kind kind;

  PlanExpand(const Tensor& request_table, const std::optional<Tensor>& block_tables, const Tensor& local_token_indices,
             const Tensor& positions_out, const Tensor& allgather_restore_idx, const Tensor& hidden_restore_idx,
             const Tensor& slot_mapping, const Tensor& kv_rows_out, int64_t num_requests, int64_t world_size, int64_t rank_in,
             int64_t num_tokens_padded, int64_t num_kv_rows, bool split_in, int64_t block_size, int64_t dcp_world_size,
             int64_t dcp_rank, int64_t cp_interleave)
      : ExpandJob{}, kind(kind_of(request_table)) {
    const auto in = [](int64_t low, int64_t value) { return low <= value && value <= INT32_MAX; };
    check(in(0, num_requests) && in(1, world_size) && in(0, rank_in) && rank_in < world_size && in(0, num_tokens_padded) &&
              in(0, num_kv_rows) && in(0, world_size * num_tokens_padded),
          "plan_expand: counts must be 0 to 2**31 - 1 and rank in 0..world_size - 1");
    check(in(1, block_size) && in(1, dcp_world_size) && in(0, dcp_rank) && dcp_rank < dcp_world_size && in(1, cp_interleave),
          "plan_expand: block_size, dcp_world_size and cp_interleave must be 1 to 2**31 - 1, dcp_rank in 0..dcp_world_size - 1");
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
             0,
             static_cast<uint32_t>(block_size),
             static_cast<uint32_t>(dcp_world_size),
             static_cast<uint32_t>(dcp_rank),
             static_cast<uint32_t>(cp_interleave)};
    if (block_tables) {
      const Tensor& t = *block_tables;
      const Kind k = kind_of(t);
      // Strides of a tensor without elements mean nothing.
      check(k.same_device(kind) && k.dtype == aoti_torch_dtype_int32() && t.dim() == 2 &&
                (t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1),
            "plan_expand: block_tables must be int32 [requests, blocks] with a contiguous last dimension on the device of the "
            "others");
      cache.blocks = static_cast<const int32_t*>(t.data_ptr());
      cache.row_stride = t.stride(0);
      cache.rows = t.size(0);
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
