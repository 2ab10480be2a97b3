// pcp_fused_restore on the CPU: every local row is fetched from the heads or from the tails.
#include "../fused_restore.h"

#include "copy.h"

namespace pcp_mla::cpu {
namespace {

std::tuple<Tensor, Tensor> fused_restore(const Tensor& out_head, const Tensor& out_tail, const std::optional<Tensor>& lse_head,
                                         const std::optional<Tensor>& lse_tail, const Tensor& row_table) {
  const FusedRestore r(out_head, out_tail, lse_head, lse_tail, row_table);
  const RowTable& rows = r.rows;
  check_rows("pcp_fused_restore", "queries of heads", rows.q_head(), rows.requests, r.head.tokens);
  check_rows("pcp_fused_restore", "queries of tails", rows.q_tail(), rows.requests, r.tail.tokens);
  char* out = static_cast<char*>(r.out.data_ptr());
  float* lse = static_cast<float*>(r.lse.data_ptr());
  const int64_t heads = r.head.heads, row = heads * r.head.width;
  torch::stable::parallel_for(0, r.num_tokens(), grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Place place = rows.place_query(t);
      const bool from_head = place.head >= 0;
      const int64_t index = from_head ? place.head : place.tail;
      copy_token(out + t * row, from_head ? r.head : r.tail, index);
      if (!r.has_lse()) continue;
      const Lse& source = from_head ? r.lse_head : r.lse_tail;
      for (int64_t h = 0; h < heads; ++h) {
        lse[t * heads + h] = source.data[index * source.token_stride + h * source.head_stride];
      }
    }
  });
  return {r.out, r.lse};
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) { m.impl("fused_restore", TORCH_BOX(&pcp_mla::cpu::fused_restore)); }
