// pcp_fused_gather: what the CPU and the CUDA kernel share: checks and allocation.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "checks.h"

namespace pcp_mla {

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // q, k, v of the heads, then of the tails

struct GatherSide {  // one of q, k, v and its two contiguous outputs
  Ragged in;
  char *head, *tail;
  int64_t head_rows, tail_rows;
};

struct FusedGather {
  static constexpr const char* op = "pcp_fused_gather";
  RowTable rows;
  GatherSide q, k, v;
  int64_t num_tokens;  // local rows of q that may be read; the counts may be larger than the table's, for a captured graph

  FusedGather(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& row_table, int64_t num_head_tokens,
              int64_t num_tail_tokens, int64_t num_head_kv, int64_t num_tail_kv, const Tensor& q_head, const Tensor& k_head,
              const Tensor& v_head, const Tensor& q_tail, const Tensor& k_tail, const Tensor& v_tail)
      : q(side("q", q_in, q_head, num_head_tokens, q_tail, num_tail_tokens)),
        k(side("k", k_in, k_head, num_head_kv, k_tail, num_tail_kv)),
        v(side("v", v_in, v_head, num_head_kv, v_tail, num_tail_kv)),
        num_tokens(std::min(num_head_tokens + num_tail_tokens, q.in.tokens)) {
    const Kind &a = q.in.kind, &b = k.in.kind, &c = v.in.kind;
    check(a.same_device(b) && a.same_device(c), op, ": q, k and v must be on one device");
    check(a.dtype == b.dtype && a.dtype == c.dtype, op, ": q, k and v must have one dtype");
    check(k.in.tokens == v.in.tokens, op, ": v must have the ", k.in.tokens, " rows of k, got ", v.in.tokens);
    for (const GatherSide* side : {&q, &k, &v}) {
      check(side->in.tokens <= INT32_MAX && side->head_rows <= INT32_MAX && side->tail_rows <= INT32_MAX, op,
            ": row counts must be less than 2**31");
    }
    rows = row_table_of(op, row_table, a);
    check_outputs(span_of(view_of(row_table)));
  }

  static SixTensors allocate(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_head_tokens, int64_t num_tail_tokens,
                             int64_t num_head_kv, int64_t num_tail_kv) {
    check(num_head_tokens >= 0 && num_tail_tokens >= 0 && num_head_kv >= 0 && num_tail_kv >= 0, op,
          ": row counts must not be negative");
    const Ragged a = ragged(op, "q", q), b = ragged(op, "k", k), c = ragged(op, "v", v);
    return {rows_like(a, num_head_tokens), rows_like(b, num_head_kv), rows_like(c, num_head_kv),
            rows_like(a, num_tail_tokens), rows_like(b, num_tail_kv), rows_like(c, num_tail_kv)};
  }

 private:
  void check_outputs(const Span& table) const {
    Span outputs[6];
    const GatherSide* sides[] = {&q, &k, &v};
    int count = 0;
    for (const GatherSide* side : sides) {
      for (const auto& [to, to_rows] : {std::pair{side->head, side->head_rows}, std::pair{side->tail, side->tail_rows}}) {
        outputs[count] = Span(to, side->in.heads * side->in.width).repeat(to_rows, side->in.heads * side->in.width);
        for (const GatherSide* other : sides) check_apart(op, "an output", outputs[count], "the inputs", other->in.span());
        for (int n = 0; n < count; ++n) check_apart(op, "an output", outputs[count], "another", outputs[n]);
        check_apart(op, "an output", outputs[count++], "row_table", table);
      }
    }
  }

  static Tensor rows_like(const Ragged& of, int64_t rows) { return empty<3>({rows, of.heads, of.dim}, of.kind); }

  static GatherSide side(const char* name, const Tensor& t, const Tensor& head, int64_t head_rows, const Tensor& tail,
                         int64_t tail_rows) {
    const Ragged in = ragged(op, name, t);
    check_output(op, name, head, head_rows, in);
    check_output(op, name, tail, tail_rows, in);
    return {in, static_cast<char*>(head.data_ptr()), static_cast<char*>(tail.data_ptr()), head_rows, tail_rows};
  }
};

// Both forms of the op around a device's kernel.
template <void (*run)(const FusedGather&)>
struct FusedGatherOp {
  static void write(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_table, int64_t num_head_tokens,
                    int64_t num_tail_tokens, int64_t num_head_kv, int64_t num_tail_kv, const Tensor& q_head, const Tensor& k_head,
                    const Tensor& v_head, const Tensor& q_tail, const Tensor& k_tail, const Tensor& v_tail) {
    run(FusedGather(q, k, v, row_table, num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv, q_head, k_head, v_head, q_tail,
                    k_tail, v_tail));
  }

  static SixTensors allocate(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_table, int64_t num_head_tokens,
                             int64_t num_tail_tokens, int64_t num_head_kv, int64_t num_tail_kv) {
    SixTensors out = FusedGather::allocate(q, k, v, num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv);
    std::apply(
        [&](const auto&... to) { write(q, k, v, row_table, num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv, to...); },
        out);
    return out;
  }
};

}  // namespace pcp_mla
