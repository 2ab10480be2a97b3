// plan_rank_rows: the checks and the row that the CPU and the CUDA kernel share.
#pragma once
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "request_table.h"

namespace pcp_mla {

// Tables of all ranks' rows, int32 [3 + 2 * chunks, rows() + 1]: query starts, then key starts and numbers of keys, of all keys
// and of each chunk. The last entry of each is the end.
struct RankRows {
  RequestTable table;
  int32_t padded, chunks, window;  // padded: Np
  int32_t* out;

  PCP_HOST_DEVICE int32_t rows() const { return table.world * (2 * table.requests + 1); }

  PCP_HOST_DEVICE void put(int table_number, int32_t n, int32_t start, int32_t used) const {
    const int64_t stride = int64_t{rows()} + 1;
    int32_t* to = out + (1 + 2 * table_number) * stride + n;
    to[0] = start;
    to[stride] = used;
  }

  // Of a row n in 0..rows(). Only reads of the table can be out of place, and these are of its own size.
  PCP_HOST_DEVICE void fill(int32_t n) const {
    const int32_t each = 2 * table.requests + 1;
    const bool behind = n == rows();
    const int32_t rank = behind ? 0 : n / each, row = n - rank * each;
    const bool pads = behind || row == each - 1, tail = !pads && row % 2 == 1;
    const int32_t i = pads ? table.requests : row / 2, after = pads ? i : i + 1;
    const int32_t* local = table.local(rank);
    const int32_t context = table.context()[i], context_end = table.context()[after];
    int32_t head = 0, count = 0, used = 0;
    if (!pads) {
      const int32_t held = local[after] - local[i];
      head = table.owner()[i] < 0 ? table.head_len(i, rank) : held;
      count = tail ? held - head : head;
      if (count > 0) used = (tail ? table.tail_start(i, rank) : table.head_start(i, rank)) + count;
    }
    out[n] = behind ? table.world * padded : rank * padded + local[i] + (tail ? head : 0);
    put(0, n, table.keys()[i], count > 0 ? context_end - context + used : 0);
    for (int32_t c = 0; c + 1 < chunks; ++c) {
      const int32_t start = within(context - c * window), end = within(context_end - c * window);
      put(1 + c, n, start, count > 0 ? end - start : 0);
    }
    if (chunks > 0) put(chunks, n, table.keys()[i] - context, used);
  }

 private:
  PCP_HOST_DEVICE int32_t within(int32_t at) const { return at < 0 ? 0 : at < window ? at : window; }
};

struct PlanRankRows : RankRows {
  Kind kind;

  PlanRankRows(const Tensor& request_table, const Tensor& out_in, int64_t num_requests, int64_t world_size,
               int64_t num_tokens_padded, int64_t num_chunks, int64_t workspace_tokens)
      : RankRows{}, kind(kind_of(request_table)) {
    const auto in = [](int64_t low, int64_t value) { return low <= value && value <= INT32_MAX; };
    check(in(0, num_requests) && in(1, world_size) && in(0, num_tokens_padded) && in(0, world_size * num_tokens_padded) &&
              in(0, num_chunks) && in(0, workspace_tokens) && in(0, (num_chunks - 1) * workspace_tokens * (num_chunks > 0)) &&
              in(0, world_size * (2 * num_requests + 1) + 1),
          "plan_rank_rows: counts must be 0 to 2**31 - 1, and world_size at least 1");
    table = {vector("request_table", request_table, (5 + world_size) * (num_requests + 1)), static_cast<int32_t>(num_requests),
             static_cast<int32_t>(world_size)};
    out = vector("out", out_in, (3 + 2 * num_chunks) * (world_size * (2 * num_requests + 1) + 1));
    padded = static_cast<int32_t>(num_tokens_padded);
    chunks = static_cast<int32_t>(num_chunks);
    window = static_cast<int32_t>(workspace_tokens);
  }

 private:
  int32_t* vector(const char* name, const Tensor& t, int64_t count) const {
    const Kind k = kind_of(t);
    check(k.same_device(kind) && k.dtype == aoti_torch_dtype_int32() && t.dim() == 1 && t.is_contiguous() && t.numel() >= count,
          "plan_rank_rows: ", name, " must be a contiguous int32 vector of at least ", count, " on the device of the other");
    return static_cast<int32_t*>(t.data_ptr());
  }
};

}  // namespace pcp_mla
