// pcp_fused_restore on the CPU: every local row is fetched from the heads or from the tails.
#include "../fused_restore.h"

#include "copy.h"

namespace pcp_mla::cpu {
namespace {

void run(const FusedRestore& r) {
  const RowTable& rows = r.rows;
  check_rows(r.op, "queries of heads", rows.q_head(), rows.requests, r.head.tokens);
  check_rows(r.op, "queries of tails", rows.q_tail(), rows.requests, r.tail.tokens);
  const int64_t heads = r.head.heads, row = heads * r.head.width;
  const int64_t tokens = int64_t{rows.q_head()[rows.requests]} + rows.q_tail()[rows.requests];  // what follows are pads
  torch::stable::parallel_for(0, tokens, grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Place place = rows.place_query(t);
      const bool from_head = place.head >= 0;
      const int64_t index = from_head ? place.head : place.tail;
      copy_token(r.out + t * row, from_head ? r.head : r.tail, index);
      if (!r.has_lse) continue;
      const Lse& source = from_head ? r.lse_head : r.lse_tail;
      for (int64_t h = 0; h < heads; ++h) {
        r.lse[t * heads + h] = source.data[index * source.token_stride + h * source.head_stride];
      }
    }
  });
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) {
  m.impl("fused_restore", TORCH_BOX(&pcp_mla::FusedRestoreOp<pcp_mla::cpu::run>::allocate));
  m.impl("fused_restore_out", TORCH_BOX(&pcp_mla::FusedRestoreOp<pcp_mla::cpu::run>::write));
}
