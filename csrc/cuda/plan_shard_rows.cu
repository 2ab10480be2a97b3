// plan_shard_rows: one launch, a thread for each entry.
#include <cuda_runtime.h>

#include "../plan_shard_rows.h"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) plan_shard_rows_kernel(const __grid_constant__ ShardRows p) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < p.entries()) p.fill(n);
}

void plan_shard_rows(const Tensor& request_table, const Tensor& shard_starts, const Tensor& block_tables,
                     const Tensor& slot_mapping, const Tensor& context_slots, const Tensor& shard_slots, const Tensor& kv_rows,
                     int64_t num_requests, int64_t world_size, int64_t num_tokens_padded, int64_t num_context, int64_t num_kv_rows,
                     bool split, int64_t block_size, int64_t dcp_world_size, int64_t dcp_rank, int64_t cp_interleave) {
  const PlanShardRows p(request_table, shard_starts, block_tables, slot_mapping, context_slots, shard_slots, kv_rows, num_requests,
                        world_size, num_tokens_padded, num_context, num_kv_rows, split, block_size, dcp_world_size, dcp_rank,
                        cp_interleave);
  if (p.entries() == 0) return;
  const DeviceGuard guard(p.kind);
  const auto blocks = static_cast<unsigned>((p.entries() + kThreads - 1) / kThreads);
  plan_shard_rows_kernel<<<blocks, kThreads, 0, current_stream(p.kind)>>>(p);
  check_cuda(cudaGetLastError());
}

}  // namespace
}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) { m.impl("plan_shard_rows", TORCH_BOX(&pcp_mla::cuda::plan_shard_rows)); }
