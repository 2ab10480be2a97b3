// LSE merges: one launch. A warp takes a tile of (row, head) pairs. Its lanes issue the loads of their first outputs; while these
// are on their way a lane a pair weighs the partials and writes the merged LSE; then the outputs are summed, the next loads always
// ahead. So any number of heads fits, every exponential is computed once, nobody waits for another warp, and results may lie on top
// of inputs: one lane reads and writes a pair's LSEs, and one an output's elements.
#include "../merge_states.h"
#include "convert.cuh"
#include "direct.h"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

constexpr int kMergeThreads = 64;
constexpr int kLanes = 32;
constexpr int kWarps = kMergeThreads / kLanes;
constexpr int kMaxWeights = 512;  // of a tile

template <int kMax>
constexpr int kMergeTile = kMax == 2 ? 1 << 10 : 2 << 10;  // bytes of one partial that a tile has at most
template <int kMax>
constexpr int kGroup = kMax == 2 ? 2 : 4;  // partials whose loads are in flight together

struct Strides {  // of a partial's output, in bytes: 32 bits make an address in two multiplications
  const char* out;
  uint32_t token, head;
};

template <int kMax>
struct MergeParams {
  MergeJob job;
  uint32_t pairs, tile;
  int32_t read;   // read: partials whose outputs are read
  int32_t room;   // weights of a pair, a multiple of the group
  uint32_t vecs;  // accesses of a pair
  Divider per_pair, per_row;
  Partial partials[kMax];
  Strides outs[kMax];  // of those that are read
};

// What is not read: -0 changes no sum, not even one that is -0 itself.
template <typename In>
__device__ In nothing() {
  In in;
  for (auto& value : in.values) value = -0.0f;
  return in;
}

__device__ float exp2f_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float log2f_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Natural or base-2 numbers, by the hardware's base-2 functions: errors of some 1e-7, and of 1e-7 |x| in exp(x), where that is
// small.
__device__ float power(float x, bool base2) { return exp2f_fast(base2 ? x : x * 1.44269504f); }
__device__ float logarithm(float x, bool base2) { return log2f_fast(x) * (base2 ? 1.0f : 0.693147181f); }

// Weights of one pair's partials, only that of job.only if there is one; returns the merged LSE. `weights` has room for all. Of
// partials that are all empty they are -0, so that the sum of nothing is +0.
template <int kMax>
__device__ float weigh(const MergeParams<kMax>& p, int64_t row, int64_t head, int32_t bits, float* weights) {
  const MergeJob& job = p.job;
  const auto lse_of = [&](int n) {
    const Partial& part = p.partials[n];
    return part.lse[row * part.lse_token_stride + head * part.lse_head_stride];
  };
  const auto score = [&](int n, float lse) {
    const bool empty = kMax == 2 ? isinf(lse) : job.is_empty(n, row, lse);
    return empty ? -INFINITY : lse;
  };
  float highest = -INFINITY, total = 0;
  if constexpr (kMax == 2) {
    float a = lse_of(0), b = lse_of(1);  // both on their way before either is looked at
    a = bits & 1 ? score(0, a) : -INFINITY;
    b = bits & 2 ? score(1, b) : -INFINITY;
    highest = fmaxf(a, b);
    if (highest == -INFINITY) highest = 0;
    a = power(a - highest, job.base2);
    b = power(b - highest, job.base2);
    total = a + b;
    const float factor = total == 0 ? -1.0f : __frcp_rn(total);
    weights[0] = a * factor;
    weights[1] = b * factor;
  } else {
#pragma unroll 4
    for (int n = 0; n < job.count; ++n) {
      const float x = score(n, lse_of(n));
      weights[n] = x;
      highest = fmaxf(highest, x);
    }
    if (highest == -INFINITY) highest = 0;
    for (int n = 0; n < job.count; ++n) total += weights[n] = power(weights[n] - highest, job.base2);
    const float factor = total == 0 ? -1.0f : __frcp_rn(total);
    if (job.only >= 0) {
      const float weight = weights[job.only] * factor;
      weights[0] = weight == 0 ? -0.0f : weight;
    } else {
      for (int n = 0; n < job.count; ++n) weights[n] *= factor;
    }
    for (int n = p.read; n < p.room; ++n) weights[n] = 0;
  }
  return highest + logarithm(total, job.base2);
}

// Only corrections, which have a kernel for many partials, write shares.
template <int kMax>
__device__ int64_t offset(const ShareStrides& strides, int64_t row, int32_t head, int32_t heads) {
  return kMax == 2 ? row * strides.token + head * strides.head : strides.offset(row, head, heads);
}

// kPlain: every row is merged, to the row of its number. Less code: a kernel as short as this waits for its instructions, too.
template <typename T, typename Out, int kVec, int kMax, bool kPlain>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ MergeParams<kMax> p) {
  using In = Pack<T, kVec>;
  constexpr int group = kGroup<kMax>;
  __shared__ float weights_of[kWarps][kMax == 2 ? 2 * kLanes : kMaxWeights];
  __shared__ int64_t out_of[kWarps][kLanes];  // -1: not written
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float* weights = weights_of[warp];
  int64_t* out_at = out_of[warp];
  const MergeJob& job = p.job;
  const uint32_t first = (blockIdx.x * kWarps + warp) * p.tile;
  if (first >= p.pairs) return;
  const uint32_t pairs = min(p.tile, p.pairs - first), total = pairs * p.vecs;
  const int read = kMax == 2 ? 2 : p.read, room = kMax == 2 ? 2 : p.room;

  // The loads that are on their way: a group of partials, from n0 on, of an access.
  In next[group];
  uint32_t next_e = lane, next_pair = 0, next_c = 0;
  int next_n = 0;
  const auto load = [&](bool weighed) {
    next_pair = p.per_pair.divide(next_e);
    next_c = next_e - next_pair * p.vecs;
    const uint32_t row = p.per_row.divide(first + next_pair), head = first + next_pair - row * job.heads;
#pragma unroll
    for (int g = 0; g < group; ++g) {
      const int n = next_n + g;
      const Strides& from = p.outs[n];
      const bool wanted = weighed ? weights[next_pair * room + n] != 0 : n < read;
      const auto* at = reinterpret_cast<const In*>(from.out + uint64_t{row} * from.token + uint64_t{head} * from.head) + next_c;
      next[g] = wanted ? *at : nothing<In>();
    }
  };

  const bool early = kPlain || (!job.has_ops && !job.has_rows);  // else some rows may not be wanted
  if (early && next_e < total) load(false);
  if (lane < pairs) {
    const uint32_t row = p.per_row.divide(first + lane), head = first + lane - row * job.heads;
    const int32_t bits = kPlain ? 3 : job.row_bits(row);
    const int64_t to = kPlain ? row : bits == 0 ? -1 : job.target_row(row);
    float* weight = weights + lane * room;
    out_at[lane] = to < 0 ? -1 : offset<kMax>(job.out_strides, to, head, job.out_heads);
    if (to >= 0) {
      const float lse = weigh(p, row, head, bits, weight);
      if (job.has_lse) job.lse[offset<kMax>(job.lse_strides, to, head, job.lse_heads)] = lse;
    } else {
      for (int n = 0; n < room; ++n) weight[n] = 0;
    }
  }
  __syncwarp();
  if (next_e >= total) return;
  if (early) {
    // Whatever the output of an empty partial holds, NaN included, does not count.
#pragma unroll
    for (int g = 0; g < group; ++g) next[g] = weights[next_pair * room + g] == 0 ? nothing<In>() : next[g];
  } else {
    load(true);
  }

  const float scale = sizeof(Out) == 1 ? *job.scale : 1.0f;
  float sum[kVec];  // from -0 on: a copied row's -0 stays
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] = -0.0f;
  for (bool more = true; more;) {
    In values[group];
#pragma unroll
    for (int g = 0; g < group; ++g) values[g] = next[g];
    const uint32_t pair = next_pair, c = next_c;
    const float* weight = weights + pair * room + next_n;
    next_n += group;
    const bool last = next_n >= read;
    if (last) {
      next_n = 0;
      next_e += kLanes;
    }
    more = next_e < total;
    if (more) load(true);
#pragma unroll
    for (int g = 0; g < group; ++g) {
      const float w = weight[g];
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += w * to_float(values[g].values[i]);
    }
    if (!last) continue;
    Pack<Out, kVec> result;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      result.values[i] = from_float<Out>(sizeof(Out) == 1 ? sum[i] / scale : sum[i]);
      sum[i] = -0.0f;
    }
    const int64_t to = out_at[pair];
    if (to >= 0) reinterpret_cast<Pack<Out, kVec>*>(job.out + to)[c] = result;
  }
}

template <typename T, typename Out, int kVec, int kMax, bool kPlain>
void launch_merge(const MergeStates& m) {
  MergeParams<kMax> p;
  p.job = m.job;
  p.pairs = static_cast<uint32_t>(m.job.tokens * m.job.heads);
  p.read = m.job.only < 0 ? m.job.count : 1;
  p.room = (m.job.count + kGroup<kMax> - 1) / kGroup<kMax> * kGroup<kMax>;
  p.vecs = m.job.dim / kVec;
  p.per_pair = Divider(p.vecs);
  p.per_row = Divider(m.job.heads);
  std::copy(m.partials, m.partials + m.job.count, p.partials);
  for (int n = 0; n < p.read; ++n) {
    const Partial& part = m.partials[m.job.only < 0 ? n : m.job.only];
    check(part.token_stride >= 0 && part.token_stride <= UINT32_MAX && part.head_stride >= 0 && part.head_stride <= UINT32_MAX,
          m.op, ": strides of a partial must be from 0 to less than 2**32 bytes");
    p.outs[n] = {part.out, static_cast<uint32_t>(part.token_stride), static_cast<uint32_t>(part.head_stride)};
  }
  // Full tiles for bandwidth, but warps for every SM first, of at least one access a lane.
  const int by_size = kMergeTile<kMax> / static_cast<int>(m.job.dim * sizeof(T));
  const int by_count = std::max<int>(p.pairs / 4096, kLanes / p.vecs);
  p.tile = std::clamp(std::min(by_size, by_count), 1, std::min(kLanes, kMaxWeights / p.room));
  launch(merge_kernel<T, Out, kVec, kMax, kPlain>, blocks(p.pairs, p.tile * kWarps), kMergeThreads, m.kind, p);
}

// Whether rows can be read and written in accesses of 16 bytes of T.
template <typename T, typename Out>
bool is_aligned(const MergeStates& m) {
  constexpr int vec = 16 / sizeof(T);
  uint64_t bits = m.job.dim % vec == 0 ? 0 : 1;
  for (int n = 0; n < m.job.count; ++n) {
    const Partial& p = m.partials[n];
    if (m.job.only >= 0 && n != m.job.only) continue;
    bits |= reinterpret_cast<uintptr_t>(p.out);
    if (m.job.tokens > 1) bits |= p.token_stride;
    if (m.job.heads > 1) bits |= p.head_stride;
  }
  const ShareStrides& s = m.job.out_strides;
  const uint64_t out_bits = reinterpret_cast<uintptr_t>(m.job.out) | s.share | s.token | s.head;
  return bits % 16 == 0 && out_bits % alignof(Pack<Out, vec>) == 0;
}

template <typename T, typename Out>
void merge(const MergeStates& m) {
  constexpr int vec = 16 / sizeof(T);
  const bool two = m.job.count == 2 && m.job.only < 0;
  if (!is_aligned<T, Out>(m)) return two ? launch_merge<T, Out, 1, 2, false>(m) : launch_merge<T, Out, 1, kMaxPartials, false>(m);
  if (!two) return launch_merge<T, Out, vec, kMaxPartials, false>(m);
  if constexpr (std::is_same_v<T, Out>) {
    if (!m.job.has_ops && !m.job.has_rows) return launch_merge<T, Out, vec, 2, true>(m);
  }
  launch_merge<T, Out, vec, 2, false>(m);
}

template <typename T>
void merge_to(const MergeStates& m) {
  if (m.job.scale != nullptr) return merge<T, __nv_fp8_e4m3>(m);
  if (m.out_dtype == m.kind.dtype) return merge<T, T>(m);
  merge<T, float>(m);
}

void run(const MergeStates& m) {
  if (m.job.tokens == 0) return;
  if (m.kind.dtype == kBFloat16) return merge_to<__nv_bfloat16>(m);
  if (m.kind.dtype == kFloat16) return merge_to<__half>(m);
  merge_to<float>(m);
}

using Ops = MergeOps<run>;

}  // namespace

void add_merges(DirectOps& ops) {
  ops.merge_attn_states = directly<Ops::Views::merge>;
  ops.merge_n_attn_states = directly<Ops::Views::merge_n>;
  ops.cp_correct_out = directly<Ops::Views::correct>;
}

}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) {
  m.impl("merge_attn_states", TORCH_BOX(&pcp_mla::cuda::Ops::merge));
  m.impl("merge_attn_states_out", TORCH_BOX(&pcp_mla::cuda::Ops::merge_out));
  m.impl("merge_n_attn_states", TORCH_BOX(&pcp_mla::cuda::Ops::merge_n));
  m.impl("merge_n_attn_states_out", TORCH_BOX(&pcp_mla::cuda::Ops::merge_n_out));
  m.impl("cp_correct_out", TORCH_BOX(&pcp_mla::cuda::Ops::correct_out));
}
