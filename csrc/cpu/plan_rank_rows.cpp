// plan_rank_rows on the CPU, row by row.
#include "../plan_rank_rows.h"

namespace pcp_mla::cpu {
namespace {

void plan_rank_rows(const Tensor& request_table, const Tensor& out, int64_t num_requests, int64_t world_size,
                    int64_t num_tokens_padded, int64_t num_chunks, int64_t workspace_tokens) {
  const PlanRankRows p(request_table, out, num_requests, world_size, num_tokens_padded, num_chunks, workspace_tokens);
  for (int32_t n = 0; n <= p.rows(); ++n) p.fill(n);
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) { m.impl("plan_rank_rows", TORCH_BOX(&pcp_mla::cpu::plan_rank_rows)); }
