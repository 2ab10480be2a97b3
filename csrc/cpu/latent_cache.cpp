// write_latent_cache and gather_latents on the CPU.
#include "../latent_cache.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "copy.h"

namespace pcp_mla::cpu {
namespace {

using Fp8 = c10::Float8_e4m3fn;

// Calls move(row of the cache, row outside) for every row; the former is null where a row has no slot.
template <typename Move>
void each_row(const LatentCache& c, const Move& move) {
  torch::stable::parallel_for(0, c.count, grain(c.width * c.outside_item), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = c.offset(n);
      move(at < 0 ? nullptr : c.cache + at, c.outside + n * c.outside_stride);
    }
  });
}

template <typename T>
void write_fp8(const LatentCache& c) {
  each_row(c, [&](char* cached, const char* outside) {
    if (cached == nullptr) return;
    for (int64_t d = 0; d < c.width; ++d) {
      const float x = static_cast<float>(reinterpret_cast<const T*>(outside)[d]) / *c.scale;
      reinterpret_cast<Fp8*>(cached)[d] = x != x ? x : std::clamp(x, -448.0f, 448.0f);  // torch's conversion does not saturate
    }
  });
}

template <typename T>
void gather_fp8(const LatentCache& c) {
  each_row(c, [&](const char* cached, char* outside) {
    T* to = reinterpret_cast<T*>(outside);
    for (int64_t d = 0; d < c.width; ++d) {
      to[d] = cached == nullptr ? 0.0f : static_cast<float>(reinterpret_cast<const Fp8*>(cached)[d]) * *c.scale;
    }
  });
}

void write(const LatentCache& c) {
  if (c.scale == nullptr) {
    each_row(c, [&](char* cached, const char* outside) {
      if (cached != nullptr) std::memcpy(cached, outside, c.width * c.cache_item);
    });
  } else if (c.kind.dtype == kBFloat16) {
    write_fp8<c10::BFloat16>(c);
  } else if (c.kind.dtype == kFloat16) {
    write_fp8<c10::Half>(c);
  } else {
    write_fp8<float>(c);
  }
}

void gather(const LatentCache& c) {
  if (c.scale == nullptr) {
    each_row(c, [&](const char* cached, char* outside) {
      cached == nullptr ? std::memset(outside, 0, c.width * c.outside_item) : std::memcpy(outside, cached, c.width * c.cache_item);
    });
  } else if (c.kind.dtype == kBFloat16) {
    gather_fp8<c10::BFloat16>(c);
  } else if (c.kind.dtype == kFloat16) {
    gather_fp8<c10::Half>(c);
  } else {
    gather_fp8<float>(c);
  }
}

using Ops = LatentCacheOps<write, gather>;

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) {
  m.impl("write_latent_cache", TORCH_BOX(&pcp_mla::cpu::Ops::write_latent_cache));
  m.impl("gather_latents", TORCH_BOX(&pcp_mla::cpu::Ops::gather_latents));
}
