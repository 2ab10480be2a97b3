// pcp_fused_restore: what the CPU and the CUDA kernel share: checks and allocation.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks.h"

namespace pcp_mla {

struct Lse {  // [tokens, heads] float32, strides in elements; data is null where no LSE is wanted
  const float* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
};

struct FusedRestore {
  RowTable rows;
  Ragged head, tail;
  Lse lse_head, lse_tail;
  Tensor out, lse;

  FusedRestore(const Tensor& out_head, const Tensor& out_tail, const std::optional<Tensor>& lse_head_in,
               const std::optional<Tensor>& lse_tail_in, const Tensor& row_table)
      : head(ragged("pcp_fused_restore", "out_head", out_head)), tail(ragged("pcp_fused_restore", "out_tail", out_tail)) {
    check(head.kind.same_device(tail.kind), "pcp_fused_restore: out_head and out_tail must be on one device");
    check(head.kind.dtype == tail.kind.dtype && head.heads == tail.heads && head.dim == tail.dim,
          "pcp_fused_restore: out_head and out_tail must have one dtype, head count and width");
    check(lse_head_in.has_value() == lse_tail_in.has_value(),
          "pcp_fused_restore: lse_head and lse_tail must both be given or neither");
    check(num_tokens() <= INT32_MAX, "pcp_fused_restore: row counts must be less than 2**31");
    rows = row_table_of("pcp_fused_restore", row_table, head.kind);
    Kind lse_kind = head.kind;
    lse_kind.dtype = aoti_torch_dtype_float32();
    if (lse_head_in) {
      lse_head = lse_of("lse_head", *lse_head_in, head);
      lse_tail = lse_of("lse_tail", *lse_tail_in, tail);
      lse = empty<2>({num_tokens(), head.heads}, lse_kind);
    } else {
      lse = empty<1>({0}, lse_kind);
    }
    out = empty<3>({num_tokens(), head.heads, head.dim}, head.kind);
  }

  int64_t num_tokens() const { return head.tokens + tail.tokens; }
  bool has_lse() const { return lse.dim() == 2; }

 private:
  static Lse lse_of(const char* name, const Tensor& t, const Ragged& of) {
    const Kind k = kind_of(t);
    check(k.same_device(of.kind) && k.dtype == aoti_torch_dtype_float32() && t.dim() == 2 && t.size(0) == of.tokens &&
              t.size(1) == of.heads,
          "pcp_fused_restore: ", name, " must be float32 [", of.tokens, ", ", of.heads, "] on the device of the outputs");
    return {static_cast<const float*>(t.data_ptr()), t.stride(0), t.stride(1)};
  }
};

}  // namespace pcp_mla
