// write_latent_cache and gather_latents: a block looks up the slots of a tile of rows, then all threads move their accesses.
#include "../latent_cache.h"
#include "direct.h"
#include "latent_forms.cuh"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

struct CacheParams {
  LatentCache cache;
  int32_t tile;
  uint32_t vecs;  // of a row
  Divider per_row;
};

template <typename Form, bool kWrite>
__global__ void __launch_bounds__(kThreads, Form::blocks_per_sm) latent_cache_kernel(const __grid_constant__ CacheParams p) {
  using In = std::conditional_t<kWrite, typename Form::Outside, typename Form::Cached>;
  using Out = std::conditional_t<kWrite, typename Form::Cached, typename Form::Outside>;
  __shared__ int64_t at[kMaxTileRows];  // of a row in the cache, -1 for none
  const LatentCache& c = p.cache;
  const int64_t first = int64_t{blockIdx.x} * p.tile;
  const int32_t rows = static_cast<int32_t>(min(int64_t{p.tile}, c.count - first));
  if (threadIdx.x < rows) at[threadIdx.x] = c.offset(first + threadIdx.x);
  __syncthreads();
  const float scale = c.scale == nullptr ? 1.0f : *c.scale;
  char* outside = c.outside + first * c.outside_stride;
  const auto load = [&](uint32_t e, In& value) {
    const uint32_t row = p.per_row.divide(e), n = e - row * p.vecs;
    if (at[row] < 0) return;
    const char* from = kWrite ? outside + row * c.outside_stride : c.cache + at[row];
    value = reinterpret_cast<const In*>(from)[n];
  };
  const auto store = [&](uint32_t e, const In& value) {
    const uint32_t row = p.per_row.divide(e), n = e - row * p.vecs;
    if constexpr (kWrite) {
      if (at[row] >= 0) reinterpret_cast<Out*>(c.cache + at[row])[n] = Form::to_cache(value, scale);
    } else {
      Out* to = reinterpret_cast<Out*>(outside + row * c.outside_stride) + n;
      if (at[row] >= 0) {
        *to = Form::from_cache(value, scale);
      } else {
        *to = Out{};
      }
    }
  };
  move_accesses<In>(rows * p.vecs, load, store);
}

template <typename Form, bool kWrite>
void move(const LatentCache& c, int64_t elements_of_access) {
  CacheParams p{c,
                tile_rows(c.width * std::max(c.cache_item, c.outside_item), c.count),
                static_cast<uint32_t>(c.width / elements_of_access),
                {}};
  check(p.vecs < (1u << 25), c.op, ": a row must be smaller than 2**25 accesses");
  p.per_row = Divider(p.vecs);
  launch(latent_cache_kernel<Form, kWrite>, blocks(c.count, p.tile), kThreads, c.kind, p);
}

// Whether the cache allows accesses of `cached` bytes at any slot, and the other tensor of `outside` bytes at any row.
bool is_aligned(const LatentCache& c, uint64_t cached, uint64_t outside) {
  const uint64_t in_cache =
      reinterpret_cast<uintptr_t>(c.cache) | c.slots.block_stride | c.slots.row_stride | c.width * c.cache_item;
  const uint64_t others = reinterpret_cast<uintptr_t>(c.outside) | c.outside_stride | c.width * c.outside_item;
  return in_cache % cached == 0 && others % outside == 0;
}

template <typename T, bool kWrite>
void scaled(const LatentCache& c) {
  constexpr int n = 8;
  if (is_aligned(c, n, std::min<uint64_t>(16, n * sizeof(T)))) return move<Scaled<T, n>, kWrite>(c, n);
  move<Scaled<T, 1>, kWrite>(c, 1);
}

template <bool kWrite>
void run(const LatentCache& c) {
  if (c.scale != nullptr) {
    if (c.kind.dtype == kBFloat16) return scaled<__nv_bfloat16, kWrite>(c);
    if (c.kind.dtype == kFloat16) return scaled<__half, kWrite>(c);
    return scaled<float, kWrite>(c);
  }
  int bytes = 16;
  while (!is_aligned(c, bytes, bytes)) bytes /= 2;
  with_access(bytes, [&](auto vec) { move<Copy<decltype(vec)>, kWrite>(c, std::max<int64_t>(bytes / c.cache_item, 1)); });
}

using Ops = LatentCacheOps<run<true>, run<false>>;

}  // namespace

void add_latent_cache(DirectOps& ops) { ops.write_latent_cache = directly<Ops::write>; }

}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) {
  m.impl("write_latent_cache", TORCH_BOX(&pcp_mla::cuda::Ops::write_latent_cache));
  m.impl("gather_latents", TORCH_BOX(&pcp_mla::cuda::Ops::gather_latents));
}
