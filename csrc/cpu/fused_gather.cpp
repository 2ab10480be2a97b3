// pcp_fused_gather on the CPU: every row of q, k and v is read once and written to the heads, to the tails, or to both.
#include "../fused_gather.h"

#include "copy.h"

namespace pcp_mla::cpu {
namespace {

template <typename Find>
void scatter(const GatherSide& side, int64_t tokens, const Find& find) {
  char* head = static_cast<char*>(side.head.data_ptr());
  char* tail = static_cast<char*>(side.tail.data_ptr());
  const int64_t row = side.in.heads * side.in.width;
  torch::stable::parallel_for(0, tokens, grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Place place = find(t);
      if (place.head >= 0) copy_token(head + place.head * row, side.in, t);
      if (place.tail >= 0) copy_token(tail + place.tail * row, side.in, t);
    }
  });
}

SixTensors fused_gather(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_table, int64_t num_head_tokens,
                        int64_t num_tail_tokens, int64_t num_head_kv, int64_t num_tail_kv) {
  const FusedGather g(q, k, v, row_table, num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv);
  const RowTable& rows = g.rows;
  const char* op = "pcp_fused_gather";
  check_rows(op, "queries of heads", rows.q_head(), rows.requests, num_head_tokens);
  check_rows(op, "queries of tails", rows.q_tail(), rows.requests, num_tail_tokens);
  check_rows(op, "keys of heads", rows.k_head(), rows.requests, num_head_kv);
  check_rows(op, "keys of tails", rows.k_tail(), rows.requests, num_tail_kv);
  check_rows(op, "request starts", rows.keys(), rows.requests, g.k.in.tokens);
  for (int32_t i = 0; i < rows.requests; ++i) {
    const int32_t here = rows.keys()[i + 1] - rows.keys()[i];
    check(rows.k_head()[i + 1] - rows.k_head()[i] <= here && rows.k_tail()[i + 1] - rows.k_tail()[i] <= here, op,
          ": row_table must not give request ", i, " more than its ", here, " keys");
  }
  scatter(g.q, g.num_tokens, [&](int64_t t) { return rows.place_query(t); });
  scatter(g.k, g.k.in.tokens, [&](int64_t n) { return rows.place_key(n); });
  scatter(g.v, g.v.in.tokens, [&](int64_t n) { return rows.place_key(n); });
  return g.outputs();
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) { m.impl("fused_gather", TORCH_BOX(&pcp_mla::cpu::fused_gather)); }
