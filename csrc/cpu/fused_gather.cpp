// pcp_fused_gather on the CPU: every row of q, k and v is read once and written to the heads, to the tails, or to both.
#include "../fused_gather.h"

#include "copy.h"

namespace pcp_mla::cpu {
namespace {

template <typename Find>
void scatter(const GatherSide& side, int64_t tokens, const Find& find) {
  const int64_t row = side.in.heads * side.in.width;
  torch::stable::parallel_for(0, tokens, grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Place place = find(t);
      if (place.head >= 0) copy_token(side.head + place.head * row, side.in, t);
      if (place.tail >= 0) copy_token(side.tail + place.tail * row, side.in, t);
    }
  });
}

void run(const FusedGather& g) {
  const RowTable& rows = g.rows;
  check_rows(g.op, "queries of heads", rows.q_head(), rows.requests, g.q.head_rows);
  check_rows(g.op, "queries of tails", rows.q_tail(), rows.requests, g.q.tail_rows);
  check_rows(g.op, "keys of heads", rows.k_head(), rows.requests, g.k.head_rows);
  check_rows(g.op, "keys of tails", rows.k_tail(), rows.requests, g.k.tail_rows);
  check_rows(g.op, "request starts", rows.keys(), rows.requests, g.k.in.tokens);
  for (int32_t i = 0; i < rows.requests; ++i) {
    const int32_t here = rows.keys()[i + 1] - rows.keys()[i];
    check(rows.k_head()[i + 1] - rows.k_head()[i] <= here && rows.k_tail()[i + 1] - rows.k_tail()[i] <= here, g.op,
          ": row_table must not give request ", i, " more than its ", here, " keys");
  }
  const int64_t tokens = int64_t{rows.q_head()[rows.requests]} + rows.q_tail()[rows.requests];
  check(g.q.in.tokens >= tokens, g.op, ": q must have at least ", tokens, " rows, got ", g.q.in.tokens);
  const int64_t keys = rows.keys()[rows.requests];
  scatter(g.q, tokens, [&](int64_t t) { return rows.place_query(t); });
  scatter(g.k, keys, [&](int64_t n) { return rows.place_key(n); });
  scatter(g.v, keys, [&](int64_t n) { return rows.place_key(n); });
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) {
  m.impl("fused_gather", TORCH_BOX(&pcp_mla::FusedGatherOp<pcp_mla::cpu::run>::allocate));
  m.impl("fused_gather_out", TORCH_BOX(&pcp_mla::FusedGatherOp<pcp_mla::cpu::run>::write));
}
