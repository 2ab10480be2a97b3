// plan_shard_rows on the CPU, entry by entry.
#include "../plan_shard_rows.h"

namespace pcp_mla::cpu {
namespace {

void plan_shard_rows(const Tensor& request_table, const Tensor& shard_starts, const Tensor& block_tables,
                     const Tensor& slot_mapping, const Tensor& context_slots, const Tensor& shard_slots, const Tensor& kv_rows,
                     int64_t num_requests, int64_t world_size, int64_t num_tokens_padded, int64_t num_context, int64_t num_kv_rows,
                     bool split, int64_t block_size, int64_t dcp_world_size, int64_t dcp_rank, int64_t cp_interleave) {
  const PlanShardRows p(request_table, shard_starts, block_tables, slot_mapping, context_slots, shard_slots, kv_rows, num_requests,
                        world_size, num_tokens_padded, num_context, num_kv_rows, split, block_size, dcp_world_size, dcp_rank,
                        cp_interleave);
  for (int64_t n = 0; n < p.entries(); ++n) p.fill(n);
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) { m.impl("plan_shard_rows", TORCH_BOX(&pcp_mla::cpu::plan_shard_rows)); }
