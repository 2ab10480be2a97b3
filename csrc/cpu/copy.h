// Row copies and row-table checks of the CPU kernels.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "../checks.h"

namespace pcp_mla::cpu {

// One token's heads from a strided place to a contiguous one.
inline void copy_token(char* to, const Ragged& from, int64_t token) {
  const char* row = from.data + token * from.token_stride;
  if (from.head_stride == from.width) {
    std::memcpy(to, row, from.heads * from.width);
    return;
  }
  for (int64_t h = 0; h < from.heads; ++h) std::memcpy(to + h * from.width, row + h * from.head_stride, from.width);
}

// A table that does not fit would send rows outside of their tensors. On the CPU looking at it costs nothing.
inline void check_rows(const char* op, const char* what, const int32_t* prefix, int32_t requests, int64_t total) {
  bool ok = prefix[0] == 0 && prefix[requests] <= total;
  for (int32_t i = 0; i < requests; ++i) ok = ok && prefix[i] <= prefix[i + 1];
  check(ok, op, ": row_table must hold ", what, " that rise from 0 to at most ", total);
}

// About 64 KiB of rows to a thread at the least.
inline int64_t grain(int64_t row_bytes) { return 1 + 65536 / (row_bytes + 1); }

}  // namespace pcp_mla::cpu
