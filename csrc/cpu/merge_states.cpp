// LSE merges on the CPU: a head of a row at a time, summed in float32.
#include "../merge_states.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace pcp_mla::cpu {
namespace {

// Each partial's factor; returns the merged LSE.
float weigh(const MergeStates& m, int64_t row, int32_t head, std::array<float, kMaxPartials>& weights) {
  const MergeJob& job = m.job;
  const int32_t bits = job.row_bits(row);
  float highest = -INFINITY, total = 0;
  for (int32_t n = 0; n < job.count; ++n) {
    const Partial& p = m.partials[n];
    const float lse = p.lse[row * p.lse_token_stride + head * p.lse_head_stride];
    const bool counts = (!job.has_ops || (bits >> n & 1)) && !job.is_empty(n, row, lse);
    weights[n] = counts ? lse : -INFINITY;
    highest = std::fmax(highest, weights[n]);
  }
  if (highest == -INFINITY) highest = 0;
  for (int32_t n = 0; n < job.count; ++n) {
    weights[n] = job.base2 ? std::exp2(weights[n] - highest) : std::exp(weights[n] - highest);
    total += weights[n];
  }
  for (int32_t n = 0; n < job.count; ++n) weights[n] /= total == 0 ? 1 : total;
  return highest + (job.base2 ? std::log2(total) : std::log(total));
}

template <typename Out>
Out rounded(float x, const float* scale) {
  if (scale == nullptr) return static_cast<Out>(x);
  x /= *scale;
  return static_cast<Out>(x != x ? x : std::clamp(x, -448.0f, 448.0f));  // torch's conversion makes NaN of what is larger
}

template <typename T, typename Out>
void merge(const MergeStates& m) {
  const MergeJob& job = m.job;
  const int64_t pairs = job.tokens * job.heads;
  torch::stable::parallel_for(0, pairs, 1 + 16384 / (int64_t{job.dim} * job.count), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(job.dim);
    std::array<float, kMaxPartials> weights;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t row = pair / job.heads, to = job.target_row(row);
      const int32_t head = static_cast<int32_t>(pair % job.heads);
      if (to < 0 || job.row_bits(row) == 0) continue;
      const float lse = weigh(m, row, head, weights);
      std::fill(sum.begin(), sum.end(), 0.0f);
      bool started = false;
      for (int32_t n = job.only < 0 ? 0 : job.only; n < (job.only < 0 ? job.count : job.only + 1); ++n) {
        if (weights[n] == 0) continue;
        const Partial& p = m.partials[n];
        const T* from = reinterpret_cast<const T*>(p.out + row * p.token_stride + head * p.head_stride);
        // Not added to zeros: that would make the -0 of a copied row 0.
        for (int32_t d = 0; d < job.dim; ++d) {
          const float term = weights[n] * static_cast<float>(from[d]);
          sum[d] = started ? sum[d] + term : term;
        }
        started = true;
      }
      Out* out = reinterpret_cast<Out*>(job.out + job.out_strides.offset(to, head, job.out_heads));
      for (int32_t d = 0; d < job.dim; ++d) out[d] = rounded<Out>(sum[d], job.scale);
      if (job.has_lse) job.lse[job.lse_strides.offset(to, head, job.lse_heads)] = lse;
    }
  });
}

template <typename T>
void merge_to(const MergeStates& m) {
  if (m.job.scale != nullptr) return merge<T, c10::Float8_e4m3fn>(m);
  if (m.out_dtype == m.kind.dtype) return merge<T, T>(m);
  merge<T, float>(m);
}

void run(const MergeStates& m) {
  if (m.kind.dtype == kBFloat16) return merge_to<c10::BFloat16>(m);
  if (m.kind.dtype == kFloat16) return merge_to<c10::Half>(m);
  merge_to<float>(m);
}

using Ops = MergeOps<run>;

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) {
  m.impl("merge_attn_states", TORCH_BOX(&pcp_mla::cpu::Ops::merge));
  m.impl("merge_attn_states_out", TORCH_BOX(&pcp_mla::cpu::Ops::merge_out));
  m.impl("merge_n_attn_states", TORCH_BOX(&pcp_mla::cpu::Ops::merge_n));
  m.impl("merge_n_attn_states_out", TORCH_BOX(&pcp_mla::cpu::Ops::merge_n_out));
  m.impl("cp_correct_out", TORCH_BOX(&pcp_mla::cpu::Ops::correct_out));
}
