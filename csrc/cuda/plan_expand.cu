// plan_expand: one launch, a thread for each gathered row and for each row of K and V.
#include <cuda_runtime.h>

#include <exception>
#include <string>

#include "../plan_expand.h"
#include "../plan_transport.h"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

__device__ void expand_gathered(const ExpandJob& p, int32_t g) {
  const RequestTable& table = p.table;
  if (g >= table.restored_start(table.requests)) p.restore[g] = -1;
  if (g >= table.natural()[table.requests]) p.hidden[g] = -1;
  const int32_t rank = g / p.rows, t = g - rank * p.rows;
  const int32_t* local = table.local(rank);
  int32_t index = -1, position = 0;
  int64_t slot = -1;
  if (t < local[table.requests]) {
    const int32_t i = table.find(t, [=](int32_t n) { return local[n]; });
    const int32_t offset = t - local[i];
    const bool prefill = table.owner()[i] < 0;
    const int32_t head = table.head_len(i, rank);
    const bool in_head = !prefill || offset < head;
    const int32_t token = in_head ? table.head_start(i, rank) + offset : table.tail_start(i, rank) + offset - head;
    position = table.context_len(i) + token;
    const bool real = token < table.query_len(i);
    if (real) index = table.natural()[i] + token;
    const int32_t shifted = table.restored_shift(i, rank) + token;
    if (shifted >= 0 && shifted < table.restored_len(i)) p.restore[table.restored_start(i) + shifted] = g;
    if (real && table.is_first_copy(i, rank)) {
      p.hidden[index] = g;
      if (p.has_slots) slot = p.cache.slot(i, position);
    }
  }
  if (p.has_slots) p.slots[g] = slot;
  if (rank == p.rank) {
    p.local[t] = index;
    p.positions[t] = position;
  }
}

__device__ int32_t kv_row(const ExpandJob& p, int32_t n) {
  const RequestTable& table = p.table;
  if (n >= table.keys()[table.requests]) return -1;
  const auto [i, position] = key_place(table, n, p.split);
  const bool real = position < table.context_len(i) + table.query_len(i);
  return real ? static_cast<int32_t>(p.cache.slot(i, position)) : -1;
}

__global__ void __launch_bounds__(kThreads) plan_expand_kernel(const __grid_constant__ ExpandJob p) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int32_t gathered = p.table.world * p.rows;
  if (n < gathered) {
    expand_gathered(p, static_cast<int32_t>(n));
  } else if (n - gathered < p.kv_rows) {
    p.kv[n - gathered] = kv_row(p, static_cast<int32_t>(n - gathered));
  }
}

cudaError_t launch(const ExpandJob& job, cudaStream_t stream) {
  const int64_t total = int64_t{job.table.world} * job.rows + job.kv_rows;
  if (total == 0) return cudaSuccess;
  plan_expand_kernel<<<static_cast<unsigned>((total + kThreads - 1) / kThreads), kThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

void plan_expand(const Tensor& request_table, const std::optional<Tensor>& block_tables, const Tensor& local_token_indices,
                 const Tensor& positions, const Tensor& allgather_restore_idx, const Tensor& hidden_restore_idx,
                 const Tensor& slot_mapping, const Tensor& kv_rows, int64_t num_requests, int64_t world_size, int64_t rank,
                 int64_t num_tokens_padded, int64_t num_kv_rows, bool split, int64_t block_size, int64_t dcp_world_size,
                 int64_t dcp_rank, int64_t cp_interleave) {
  const PlanExpand e(request_table, block_tables, local_token_indices, positions, allgather_restore_idx, hidden_restore_idx,
                     slot_mapping, kv_rows, num_requests, world_size, rank, num_tokens_padded, num_kv_rows, split, block_size,
                     dcp_world_size, dcp_rank, cp_interleave);
  const DeviceGuard guard(e.kind);
  check_cuda(launch(e, current_stream(e.kind)));
}

const char* wait(void* copied) { return text_of(cudaEventSynchronize(static_cast<cudaEvent_t>(copied))); }

// Nothing may be thrown from one library into another.
const char* submit(const PlanSubmission& s) noexcept {
  static thread_local std::string text;
  try {
    const Kind kind{0, kCudaDevice, s.device_index};
    const DeviceGuard guard(kind);
    const cudaStream_t on = current_stream(kind);
    cudaError_t error = cudaMemcpyAsync(s.device, s.host, s.bytes, cudaMemcpyHostToDevice, on);
    if (error == cudaSuccess) error = cudaEventRecord(static_cast<cudaEvent_t>(s.copied), on);
    if (error == cudaSuccess) error = launch(s.job, on);
    return text_of(error);
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace
}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) { m.impl("plan_expand", TORCH_BOX(&pcp_mla::cuda::plan_expand)); }

extern "C" __attribute__((visibility("default"))) const pcp_mla::PlanTransport* pcp_mla_plan_transport() {
  static const pcp_mla::PlanTransport transport{sizeof(pcp_mla::PlanSubmission), pcp_mla::cuda::wait, pcp_mla::cuda::submit};
  return &transport;
}
