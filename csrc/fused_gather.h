// pcp_fused_gather: what the CPU and the CUDA kernel share: checks and allocation.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace pcp_mla {

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct GatherSide {  // one of q, k, v and its two outputs
  Ragged in;
  Tensor head, tail;
};

struct FusedGather {
  RowTable rows;
  GatherSide q, k, v;
  int64_t num_tokens;  // local rows of q that are read

  FusedGather(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& row_table, int64_t num_head_tokens,
              int64_t num_tail_tokens, int64_t num_head_kv, int64_t num_tail_kv)
      : q{side("q", q_in, num_head_tokens, num_tail_tokens)},
        k{side("k", k_in, num_head_kv, num_tail_kv)},
        v{side("v", v_in, num_head_kv, num_tail_kv)},
        num_tokens(num_head_tokens + num_tail_tokens) {
    const Kind &a = q.in.kind, &b = k.in.kind, &c = v.in.kind;
    check(a.same_device(b) && a.same_device(c), "pcp_fused_gather: q, k and v must be on one device");
    check(a.dtype == b.dtype && a.dtype == c.dtype, "pcp_fused_gather: q, k and v must have one dtype");
    check(k.in.tokens == v.in.tokens, "pcp_fused_gather: v must have the ", k.in.tokens, " rows of k, got ", v.in.tokens);
    check(q.in.tokens >= num_tokens, "pcp_fused_gather: q must have at least ", num_tokens, " rows, got ", q.in.tokens);
    check(k.in.tokens <= INT32_MAX && q.in.tokens <= INT32_MAX, "pcp_fused_gather: row counts must be less than 2**31");
    rows = row_table_of("pcp_fused_gather", row_table, a);
  }

  SixTensors outputs() const { return {q.head, k.head, v.head, q.tail, k.tail, v.tail}; }

 private:
  static GatherSide side(const char* name, const Tensor& t, int64_t head, int64_t tail) {
    const Ragged in = ragged("pcp_fused_gather", name, t);
    check(head >= 0 && tail >= 0, "pcp_fused_gather: row counts must not be negative");
    return {in, empty<3>({head, in.heads, in.dim}, in.kind), empty<3>({tail, in.heads, in.dim}, in.kind)};
  }
};

}  // namespace pcp_mla
