// pcp_attention on sm_90: a block takes 128 queries of a row in one head through all keys that they see, then the next ones.
//
// One warpgroup brings queries, K and V into shared memory, by tensor copies, or row by row where rows are listed. Two warpgroups
// have 64 queries each: scores of the next keys are multiplied while the softmax of the last ones goes on, and these then weigh V
// from registers. Rows share K and V in any way; K may end in columns that all heads share.
#pragma once
#include "attention_loads.cuh"

namespace pcp_mla::cuda {
namespace {

#ifdef PCP_MLA_HOPPER

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T>
__device__ void unpack(uint32_t both, float& first, float& second) {
  if constexpr (__is_same(T, __half)) {
    const float2 x = __half22float2(reinterpret_cast<const __half2&>(both));
    first = x.x, second = x.y;
  } else {
    first = __uint_as_float(both << 16), second = __uint_as_float(both & 0xFFFF0000);
  }
}

// A thread's part of the softmax: of its two rows, 8 apart, a quarter of the columns, with three neighbours.
template <typename T, typename Shape>
struct Softmax {
  float scale;
  float highest[2], total[2];  // highest score, times scale; this thread's part of the sum

  // Scores to weights, in place; returns what earlier results are to be multiplied with.
  __device__ void take(float (&s)[Shape::keys / 2], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = s[2 * r], b = s[2 * r + 1];
#pragma unroll
      for (int i = 1; i < Shape::keys / 8; ++i) {
        a = fmaxf(a, s[4 * i + 2 * r]);
        b = fmaxf(b, s[4 * i + 2 * r + 1]);
      }
      a = fmaxf(a, b);
      a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
      a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
      const float most = fmaxf(highest[r], a * scale);
      const float base = most == -INFINITY ? 0.0f : most;
      factor[r] = exp2_of(highest[r] - base);
      highest[r] = most;
      float sums[2] = {};
#pragma unroll
      for (int i = 0; i < Shape::keys / 8; ++i) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float& x = s[4 * i + 2 * r + n];
          x = exp2_of(fmaf(x, scale, -base));
          sums[n] += x;
        }
      }
      total[r] = fmaf(total[r], factor[r], sums[0] + sums[1]);
    }
  }
};

// One warpgroup's 64 queries, of the block's number-th tile, before which it had `before` tiles of K and V.
template <typename T, typename Shape>
__device__ void attend(const AttentionCall& c, const AttentionTile& t, uint32_t q_tile, uint32_t k_tiles, uint32_t v_tiles,
                       const AttentionBarriers& b, uint32_t tiles, uint32_t before, uint32_t number, uint32_t group) {
  constexpr int kS = Shape::keys / 2, kO = Shape::v_width / 2, kP = Shape::keys / 4;  // registers of scores, output, weights
  const uint32_t thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  const int32_t query = group * kGroupQueries + warp * 16 + lane / 4;  // of the tile; the other one is 8 further down
  Softmax<T, Shape> softmax{c.scale, {-INFINITY, -INFINITY}, {}};
  uint32_t prev[kO / 2] = {};
  if (c.prev_out != nullptr) {
    // An earlier result is a softmax under way: its greatest score may be any number, so take the LSE and a sum of 1.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t token = t.first_token + min(query + 8 * r, t.tokens - 1);
      const float lse = c.prev_lse.data[token * c.prev_lse.token_stride + t.head * c.prev_lse.head_stride];
      const char* from = c.prev_out + token * c.prev_token + t.head * c.prev_head + lane % 4 * 4;
#pragma unroll
      for (int i = 0; i < kO / 4; ++i) prev[2 * i + r] = *reinterpret_cast<const uint32_t*>(from + i * 16);
      if (fabsf(lse) == INFINITY) continue;
      softmax.highest[r] = lse * 1.4426950408889634f;
      softmax.total[r] = lane % 4 == 0 ? 1.0f : 0.0f;
    }
  }
  float o[kO];
  const auto begin_output = [&] {  // behind the first product, for which the loads need not be there
#pragma unroll
    for (int i = 0; i < kO / 2; ++i) {
      unpack<T>(prev[i], o[2 * i], o[2 * i + 1]);
      if (softmax.highest[i % 2] == -INFINITY) o[2 * i] = o[2 * i + 1] = 0.0f;
    }
  };

  barrier_wait(shared_address(&b.q_full), number & 1);
  if (tiles > 0) {
    const int32_t first_query = group * kGroupQueries;
    const int32_t step = c.rows.causal ? 1 : 0;
    // Tiles that all queries see.
    const uint32_t unmasked =
        min(uniform(max(min(t.first_limit + step * first_query, t.used), 0) / Shape::keys), static_cast<int32_t>(tiles));
    const int32_t limits[2] = {min(t.first_limit + step * query, t.used), min(t.first_limit + step * (query + 8), t.used)};
    const uint64_t q = matrix_descriptor(q_tile + group * kGroupQueries * kRowBytes);
    float s[kS], factor[2];
    uint32_t p[kP];

    const auto wait_for = [&](const uint64_t& full, uint32_t parity) {
      barrier_wait(shared_address(&full), parity);
      if (c.listed.rows != nullptr) proxy_fence();  // whoever copied row by row did not wait for it to arrive
    };
    const auto start_scores = [&](uint32_t j) {
      wait_for(b.k_full[stage_of(before + j)], parity_of(before + j));
      const uint64_t k = matrix_descriptor(k_tiles + stage_of(before + j) * Shape::k_bytes);
      product_fence();
#pragma unroll
      for (int slab = 0; slab < Shape::slabs; ++slab) {
#pragma unroll
        for (int i = 0; i < kSlab / 16 && slab * kSlab + 16 * i < Shape::q_width; ++i) {
          product<T>(s, further(q, slab * Shape::q_slab_bytes + 32 * i), further(k, slab * Shape::slab_bytes + 32 * i),
                     slab > 0 || i > 0);
        }
      }
      product_commit();
    };
    const auto start_output = [&](uint32_t j) {
      wait_for(b.v_full[stage_of(before + j)], parity_of(before + j));
      const uint64_t v = matrix_descriptor(v_tiles + stage_of(before + j) * Shape::v_bytes, Shape::slab_bytes);
      product_fence();
#pragma unroll
      for (int i = 0; i < Shape::keys / 16; ++i) product<T>(o, p + 4 * i, further(v, i * 16 * kRowBytes));
      product_commit();
    };
    const auto mask = [&](uint32_t j) {
#pragma unroll
      for (int i = 0; i < kS; ++i) {
        const int32_t key = j * Shape::keys + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key >= limits[i / 2 % 2]) s[i] = -INFINITY;
      }
    };
    const auto scale_output = [&] {
#pragma unroll
      for (int i = 0; i < kO; ++i) o[i] *= factor[i / 2 % 2];
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int i = 0; i < kP; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    };

    settle(s);
    start_scores(0);
    begin_output();
    product_wait<0>();
    settle(s);
    barrier_release(b.k_empty[stage_of(before)], lane);
    if (unmasked < 1) mask(0);
    softmax.take(s, factor);
    pack_weights();
    scale_output();

    const auto next = [&](uint32_t j, bool masked) {
      settle(o);
      settle(p);
      settle(s);
      start_scores(j);
      start_output(j - 1);
      product_wait<1>();
      settle(s);
      barrier_release(b.k_empty[stage_of(before + j)], lane);
      if (masked) mask(j);
      softmax.take(s, factor);
      // The assembler moves the wait before the work that is to go on meanwhile, but not over a barrier, nor that over the sum
      // which it takes its lanes from: all of them, as a sum of weights is never negative.
      __syncwarp(softmax.total[0] + softmax.total[1] < 0.0f ? 1 : ~0u);
      product_wait<0>();
      settle(o);
      settle(p);
      barrier_release(b.v_empty[stage_of(before + j - 1)], lane);
      pack_weights();
      if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) scale_output();
    };
    uint32_t j = 1;
    for (; j < unmasked; ++j) next(j, false);
    for (; j < tiles; ++j) next(j, true);
    barrier_release(b.q_empty, lane);

    // Past the row's last key there may be anything, and 0 * NaN is NaN.
    const uint32_t last = tiles - 1, end = tiles * Shape::keys;
    if (c.listed.rows == nullptr && end > static_cast<uint32_t>(t.used)) {
      barrier_wait(shared_address(&b.v_full[stage_of(before + last)]), parity_of(before + last));
      const uint32_t cut = t.used - last * Shape::keys, tile = v_tiles + stage_of(before + last) * Shape::v_bytes;
      for (uint32_t slab = 0; slab < Shape::v_slabs; ++slab) {
        for (uint32_t at = cut * kRowBytes + thread * 16; at < Shape::slab_bytes; at += kGroupThreads * 16) {
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tile + slab * Shape::slab_bytes + at), "r"(0) : "memory");
        }
      }
      proxy_fence();
      asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
    }
    settle(o);
    settle(p);
    start_output(last);
    product_wait<0>();
    settle(o);
    barrier_release(b.v_empty[stage_of(before + last)], lane);
  } else {
    barrier_release(b.q_empty, lane);
    begin_output();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t m = query + 8 * r;
    float total = softmax.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const float by = total > 0.0f ? 1.0f / total : total == 0.0f ? 0.0f : total;
    const int64_t token = t.first_token + m;
    char* to = c.out + token * c.out_token + t.head * c.out_head + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < kO / 16; ++i) {
      uint32_t v[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) v[n] = pack<T>(o[16 * i + 4 * n + 2 * r] * by, o[16 * i + 4 * n + 2 * r + 1] * by);
      const uint4 value = gather_block(v, lane);
      if (m < t.tokens) *reinterpret_cast<uint4*>(to + i * 64) = value;
    }
    if (c.lse.data != nullptr && lane % 4 == 0 && m < t.tokens) {
      const float lse = total == 0.0f ? -INFINITY : (softmax.highest[r] + log2f(total)) * 0.6931471805599453f;
      c.lse.data[token * c.lse.token_stride + t.head * c.lse.head_stride] = lse;
    }
  }
}

#endif

template <typename T, typename Shape>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_kernel(const __grid_constant__ AttentionCall c, const __grid_constant__ AttentionMaps maps) {
#ifdef PCP_MLA_HOPPER
  __shared__ AttentionBarriers b;
  __shared__ AttentionTile found[2];  // in turns
  extern __shared__ char memory[];
  const uint32_t q_tile = (shared_address(memory) + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
  const uint32_t k_tiles = q_tile + Shape::q_bytes, v_tiles = k_tiles + kStages * Shape::k_bytes;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = uniform(warp / kGroupWarps);
  if (threadIdx.x == 0) init_barriers(b, c.listed.rows != nullptr);
  __syncthreads();
  const auto tile = [&](uint32_t number) {
    barrier_wait(shared_address(&b.found[number % 2]), number / 2 & 1);
    return found[number % 2];
  };
  const auto tiles_of = [](const AttentionTile& t) { return uniform((t.seen + Shape::keys - 1) / Shape::keys); };
  if (group == 0) {
    give_registers<72>();
    if (warp == 1) find_tiles(c, found, b, lane);
    if (c.listed.rows != nullptr) {
      tile(0);
      const AttentionTile& t = found[0];  // in shared memory, as registers are short here
      if (t.tokens == 0) return;
      const uint32_t tiles = tiles_of(t);
      if (threadIdx.x == 0) load_queries<Shape>(maps, t, q_tile, b, tiles);
      if (tiles > 0) copy_listed<Shape>(c, maps, t, k_tiles, v_tiles, b, tiles, warp, lane);
    } else if (threadIdx.x == 0) {
      uint32_t before = 0;
      for (uint32_t number = 0;; ++number) {
        const AttentionTile t = tile(number);
        if (t.tokens == 0) return;
        before =
            copy_tiles<Shape>(c, maps, t, q_tile, k_tiles, v_tiles, b, (t.seen + Shape::keys - 1) / Shape::keys, before, number);
        barrier_arrive(shared_address(&b.loaded));
      }
    }
  } else {
    take_registers<216>();
    uint32_t before = 0;
    for (uint32_t number = 0;; ++number) {
      const AttentionTile t = tile(number);
      if (t.tokens == 0) return;
      const uint32_t tiles = tiles_of(t);
      attend<T, Shape>(c, t, q_tile, k_tiles, v_tiles, b, tiles, before, number, group - 1);
      before += tiles;
    }
  }
#endif
}

}  // namespace
}  // namespace pcp_mla::cuda
