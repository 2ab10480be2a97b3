// plan_rank_rows: one launch, a thread for each row.
#include <cuda_runtime.h>

#include "../plan_rank_rows.h"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) plan_rank_rows_kernel(const __grid_constant__ RankRows p) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n <= p.rows()) p.fill(static_cast<int32_t>(n));
}

void plan_rank_rows(const Tensor& request_table, const Tensor& out, int64_t num_requests, int64_t world_size,
                    int64_t num_tokens_padded, int64_t num_chunks, int64_t workspace_tokens) {
  const PlanRankRows p(request_table, out, num_requests, world_size, num_tokens_padded, num_chunks, workspace_tokens);
  const DeviceGuard guard(p.kind);
  const unsigned blocks = static_cast<unsigned>(p.rows() / kThreads + 1);
  plan_rank_rows_kernel<<<blocks, kThreads, 0, current_stream(p.kind)>>>(p);
  check_cuda(cudaGetLastError());
}

}  // namespace
}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) { m.impl("plan_rank_rows", TORCH_BOX(&pcp_mla::cuda::plan_rank_rows)); }
