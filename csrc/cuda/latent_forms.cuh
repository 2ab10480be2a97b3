// What a latent cache holds, as accesses: of the cache and of the tensor outside of it.
#pragma once
#include "convert.cuh"
#include "vec.cuh"

namespace pcp_mla::cuda {

// Bytes as they are.
template <typename Vec>
struct Copy {
  static constexpr int blocks_per_sm = kBlocksPerSm;
  using Cached = Vec;
  using Outside = Vec;
  __device__ static Vec to_cache(const Vec& v, float) { return v; }
  __device__ static Vec from_cache(const Vec& v, float) { return v; }
};

// float8_e4m3fn with a scale in the cache, T outside.
template <typename T, int n>
struct Scaled {
  static constexpr int blocks_per_sm = 4;  // conversions want more registers than copies
  using Cached = Pack<__nv_fp8_e4m3, n>;
  using Outside = Pack<T, n>;
  __device__ static Cached to_cache(const Outside& v, float scale) {
    Cached to;
#pragma unroll
    for (int i = 0; i < n; ++i) to.values[i] = from_float<__nv_fp8_e4m3>(to_float(v.values[i]) / scale);
    return to;
  }
  __device__ static Outside from_cache(const Cached& v, float scale) {
    Outside to;
#pragma unroll
    for (int i = 0; i < n; ++i) to.values[i] = from_float<T>(to_float(v.values[i]) * scale);
    return to;
  }
};

}  // namespace pcp_mla::cuda
