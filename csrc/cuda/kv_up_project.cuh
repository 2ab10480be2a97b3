// kv_up_project on sm_90: gather, product with the weight and K concat in one launch.
//
// A block keeps the latents of 128 rows in shared memory, kv_c in slabs of 64 columns and k_pe, and multiplies them with weights,
// which stream through a ring of stages. One warp issues these loads, two gather latents, each slab of the next rows as soon as
// the last product has read the old one, and two warpgroups take the output tiles in turn: one multiplies while the other stores.
// A tile is 128 of the weight's rows, wherever heads and their K and V end: each half of it has a place of its own to go to. A
// thread's results are exchanged with its neighbours so that 64 bytes of a row leave together.
#pragma once
#include <cuda_fp8.h>

#include "../kv_up_project.h"
#include "hopper.cuh"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

constexpr int kRows = kUpProjectTile;
constexpr int kColumns = 128;  // of a tile, two halves
constexpr uint32_t kStageBytes = kColumns * kRowBytes;
constexpr int kBlockThreads = 3 * kGroupThreads;
constexpr uint32_t kSlabBytes = kRows * kRowBytes;
constexpr int kMaxStages = 10;
constexpr int kMaxSlabs = 12;  // with that of k_pe

// Items are a tile of rows and a share of the tiles of columns, two at least, so that both warpgroups have a tile of each. Columns
// change slowest: blocks that run together share their weights in L2.
struct Schedule {
  uint32_t row_tiles, column_tiles, shares, items;
  uint32_t slabs, all_slabs, stages;  // of kv_c, and with that of k_pe, where there is one
};

struct Barriers {
  uint64_t slab_full[kMaxSlabs], slab_empty[kMaxSlabs], stage_full[kMaxStages], stage_empty[kMaxStages];
  uint64_t turn[2];  // of each warpgroup: the other one has seen all stages of the tile before
};

#ifdef PCP_MLA_HOPPER

constexpr int kGatherWarps = 2;

// A place in the ring of stages and the parity of its phase.
struct Ring {
  uint32_t stage = 0, parity = 0;
  __device__ void advance(uint32_t by, uint32_t stages) {
    stage += by;
    while (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

struct Item {
  uint32_t first_row, first_tile, end_tile;
};

inline __device__ Item item_at(const Schedule& s, uint32_t number) {
  const uint32_t share = number / s.row_tiles, tile = number - share * s.row_tiles;
  const uint32_t even = s.column_tiles / s.shares, larger = s.column_tiles % s.shares;  // the first shares have a tile more
  const uint32_t first = share * even + min(share, larger);
  return {tile * kRows, first, first + even + (share < larger)};
}

// Where 64 columns of a tile go.
struct Half {
  char* to;  // of row 0; null behind the last head
  int64_t row_stride;
};

inline __device__ Half half_at(const UpProject& u, uint32_t column) {
  const uint32_t width = u.nope + u.v_dim, head = column / width, in_head = column - head * width;
  if (head >= u.heads) return {};
  if (in_head >= u.nope) return {u.v + head * u.v_head + (in_head - u.nope) * 2, u.v_row};
  return {u.k + head * u.k_head + in_head * 2, u.k_row};
}

// The last tile may reach behind the weight: zeros come from there.
inline __device__ void load_weights(const Schedule& s, const CUtensorMap* map, uint32_t stages, const Barriers& b) {
  Ring ring;
  for (uint32_t number = blockIdx.x; number < s.items; number += gridDim.x) {
    const Item item = item_at(s, number);
    for (uint32_t tile = item.first_tile; tile < item.end_tile; ++tile) {
      for (uint32_t slab = 0; slab < s.slabs; ++slab) {
        const uint32_t full = shared_address(&b.stage_full[ring.stage]);
        barrier_wait(shared_address(&b.stage_empty[ring.stage]), ring.parity ^ 1);
        barrier_arrive_expect(full, kStageBytes);
        tensor_load_2d(stages + ring.stage * kStageBytes, map, full, slab * kSlab, tile * kColumns);
        ring.advance(1, s.stages);
      }
    }
  }
}

// A lane's part of the latents: 16 bytes of a slab's rows, as they lie in shared memory. Eight lanes a row; `warp` counts the
// gathering warps.
struct Gather {
  static constexpr uint32_t rows_a_warp = kRows / kGatherWarps, step = 8, in_warp = step / kGatherWarps, turns = kRows / step;
  uint32_t warp, lane, piece, to;
  int64_t from[turns];  // of the lane's rows; -1 for zeros

  __device__ Gather(uint32_t slabs, uint32_t warp, uint32_t lane) : warp(warp), lane(lane), piece(lane % 8) {
    const uint32_t row_in_step = warp * in_warp + lane / 8;
    to = slabs + row_in_step * kRowBytes + ((piece ^ row_in_step) << 4);
  }
  __device__ void look_up(const UpProject& u, uint32_t first_row) {
    int64_t looked_up[rows_a_warp / 32];
#pragma unroll
    for (uint32_t h = 0; h < rows_a_warp / 32; ++h) {
      const uint32_t n = h * 32 + lane;
      looked_up[h] = u.offset(first_row + n / in_warp * step + warp * in_warp + n % in_warp);
    }
#pragma unroll
    for (uint32_t i = 0; i < turns; ++i) {
      from[i] = __shfl_sync(~0u, looked_up[i * in_warp / 32], i * in_warp % 32 + lane / 8);
    }
  }
  __device__ bool has(const UpProject& u, const Schedule& s, uint32_t slab) const { return slab < s.slabs || piece < u.rope / 8; }
  __device__ uint32_t place(uint32_t slab, uint32_t turn) const { return to + slab * kSlabBytes + turn * step * kRowBytes; }
};

// Two float8 numbers of a latent, multiplied and rounded once.
template <typename T>
__device__ uint32_t scaled(uint32_t both, float scale) {
  const __half2 exact = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(both), __NV_E4M3);
  const float2 x = __half22float2(exact);
  return pack<T>(x.x * scale, x.y * scale);
}

// What has arrived of a slab is made what products take. Float8 numbers lie in the first half of the place that they grow into,
// which is nobody's but the lane's.
template <typename T, bool kFloat8Latents>
__device__ void finish(const Gather& gather, uint32_t slab, float scale, const Barriers& b) {
  if constexpr (kFloat8Latents) {
    uint2 x[Gather::turns];  // all of them first: one waits for none of the others
#pragma unroll
    for (uint32_t i = 0; i < Gather::turns; ++i) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x[i].x), "=r"(x[i].y) : "r"(gather.place(slab, i)) : "memory");
    }
#pragma unroll
    for (uint32_t i = 0; i < Gather::turns; ++i) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(gather.place(slab, i)), "r"(scaled<T>(x[i].x & 0xFFFF, scale)),
                   "r"(scaled<T>(x[i].x >> 16, scale)), "r"(scaled<T>(x[i].y & 0xFFFF, scale)), "r"(scaled<T>(x[i].y >> 16, scale))
                   : "memory");
    }
  }
  proxy_fence();
  barrier_arrive(shared_address(&b.slab_full[slab]));
}

template <typename T, bool kFloat8Latents>
__device__ void load_latents(const UpProject& u, const Schedule& s, uint32_t slabs, const Barriers& b, uint32_t warp,
                             uint32_t lane) {
  constexpr uint32_t bytes = kFloat8Latents ? 8 : 16;  // of a lane's piece, where it comes from
  const float scale = kFloat8Latents ? *u.scale : 1.0f;
  Gather gather(slabs, warp, lane);
  uint32_t parity = 0;
  for (uint32_t number = blockIdx.x; number < s.items; number += gridDim.x, parity ^= 1) {
    gather.look_up(u, item_at(s, number).first_row);
    for (uint32_t slab = 0; slab < s.all_slabs; ++slab) {
      barrier_wait(shared_address(&b.slab_empty[slab]), parity ^ 1);
      const bool wanted = gather.has(u, s, slab);
#pragma unroll
      for (uint32_t i = 0; i < Gather::turns; ++i) {
        const int64_t from = gather.from[i];
        const char* at = u.latents + (from < 0 ? 0 : from + (slab * 8 + gather.piece) * bytes);
        if (wanted) copy_async<bytes>(gather.place(slab, i), at, from < 0);
      }
      copy_async_commit();
      if (slab >= 2) {
        copy_async_wait<2>();
        finish<T, kFloat8Latents>(gather, slab - 2, scale, b);
      }
    }
    copy_async_wait<0>();
    for (uint32_t slab = s.all_slabs < 2 ? 0 : s.all_slabs - 2; slab < s.all_slabs; ++slab) {
      finish<T, kFloat8Latents>(gather, slab, scale, b);
    }
  }
}

// One warpgroup's share of the products, and their way out.
template <typename T>
__device__ void multiply(const UpProject& u, const Schedule& s, uint32_t slabs, uint32_t stages, const Barriers& b,
                         uint32_t group) {
  const uint32_t thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  Ring ring;
  uint32_t turn = 0, parity = 0;      // whose tile the next one is
  uint32_t turn_parity = group == 0;  // the first turn is free
  for (uint32_t number = blockIdx.x; number < s.items; number += gridDim.x, parity ^= 1) {
    const Item item = item_at(s, number);
    for (uint32_t tile = item.first_tile; tile < item.end_tile; ++tile, turn ^= 1) {
      if (turn != group) {
        ring.advance(s.slabs, s.stages);
        continue;
      }
      // A barrier tells a phase from the one before it, not from older ones: nobody may wait for a stage that is still to be
      // filled for an earlier tile. One multiplies at a time anyway.
      barrier_wait(shared_address(&b.turn[group]), turn_parity);
      turn_parity ^= 1;
      const bool is_last = tile + 2 >= item.end_tile;  // of this warpgroup in this item
      float sum[2][kColumns / 2];
      uint32_t before = 0;
      for (uint32_t slab = 0; slab < s.slabs; ++slab) {
        barrier_wait(shared_address(&b.slab_full[slab]), parity);
        barrier_wait(shared_address(&b.stage_full[ring.stage]), ring.parity);
        const uint64_t x = matrix_descriptor(slabs + slab * kSlabBytes);
        const uint64_t w = matrix_descriptor(stages + ring.stage * kStageBytes);
        product_fence();
#pragma unroll
        for (int k = 0; k < kSlab / 16; ++k) {  // a descriptor counts in 16 bytes
#pragma unroll
          for (int m = 0; m < 2; ++m) product<T>(sum[m], x + m * (kSlabBytes / 2 >> 4) + 2 * k, w + 2 * k, slab > 0 || k > 0);
        }
        product_commit();
        if (slab == s.slabs - 1 && lane == 0) barrier_arrive(shared_address(&b.turn[group ^ 1]));
        product_wait<1>();
        if (slab > 0) {
          barrier_release(b.stage_empty[before], lane);
          if (is_last) barrier_release(b.slab_empty[slab - 1], lane);
        }
        before = ring.stage;
        ring.advance(1, s.stages);
      }
      product_wait<0>();
      for (int m = 0; m < 2; ++m) settle(sum[m]);
      barrier_release(b.stage_empty[before], lane);
      if (is_last) barrier_release(b.slab_empty[s.slabs - 1], lane);

      const Half halves[2] = {half_at(u, tile * kColumns), half_at(u, tile * kColumns + kSlab)};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const uint32_t row = item.first_row + m * (kRows / 2) + warp * 16 + below * 8 + lane / 4;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            char* to = halves[h].to + row * halves[h].row_stride + lane % 4 * 16;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              uint32_t v[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float* pair = &sum[m][((2 * h + c) * 4 + i) * 4 + below * 2];
                v[i] = pack<T>(pair[0], pair[1]);
              }
              const uint4 value = gather_block(v, lane);
              if (row < u.written && halves[h].to != nullptr) *reinterpret_cast<uint4*>(to + c * 64) = value;
            }
          }
        }
      }
      if (u.rope == 0) continue;
      // The head whose K ends in this tile, of which there is one at most: a head has as many columns as a tile at least.
      const uint32_t width = u.nope + u.v_dim, end = (tile + 1) * kColumns, head = (end - u.nope) / width;
      const bool with_rope = end >= u.nope && end - u.nope - head * width < kColumns && head < u.pe_heads;
      if (with_rope || is_last) barrier_wait(shared_address(&b.slab_full[s.slabs]), parity);
      if (with_rope) {
        const uint32_t piece = thread % 8, from = slabs + s.slabs * kSlabBytes;
#pragma unroll
        for (uint32_t i = 0; i < kRows / 16; ++i) {
          const uint32_t in_tile = i * 16 + thread / 8, row = item.first_row + in_tile;
          if (piece >= u.rope / 8 || row >= u.written) continue;
          uint4 value;
          asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                       : "r"(from + in_tile * kRowBytes + ((piece ^ in_tile % 8) << 4)));
          *reinterpret_cast<uint4*>(u.pe + row * u.pe_row + head * u.pe_head + piece * 16) = value;
        }
      }
      if (is_last) {
        __syncwarp();
        barrier_release(b.slab_empty[s.slabs], lane);
      }
    }
  }
}

#endif

template <typename T, bool kFloat8Latents>
__global__ void __launch_bounds__(kBlockThreads, 1)
    kv_up_project_kernel(const __grid_constant__ UpProject u, const __grid_constant__ Schedule s,
                         const __grid_constant__ CUtensorMap weight) {
#ifdef PCP_MLA_HOPPER
  __shared__ Barriers b;
  extern __shared__ char memory[];
  const uint32_t slabs = (shared_address(memory) + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
  const uint32_t stages = slabs + s.all_slabs * kSlabBytes;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxSlabs; ++i) {
      barrier_init(shared_address(&b.slab_full[i]), kGatherWarps * 32);
      barrier_init(shared_address(&b.slab_empty[i]), 2 * kGroupWarps);
    }
    for (int i = 0; i < kMaxStages; ++i) {
      barrier_init(shared_address(&b.stage_full[i]), 1);
      barrier_init(shared_address(&b.stage_empty[i]), kGroupWarps);
    }
    for (uint64_t& turn : b.turn) barrier_init(shared_address(&turn), kGroupWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp >= kGroupWarps) {
    take_registers<192>();
    multiply<T>(u, s, slabs, stages, b, threadIdx.x / kGroupThreads - 1);
  } else {
    give_registers<120>();
    if (warp == 0 && lane == 0) load_weights(s, &weight, stages, b);
    if (warp > 0 && warp <= kGatherWarps) load_latents<T, kFloat8Latents>(u, s, slabs, b, warp - 1, lane);
  }
#endif
}

}  // namespace
}  // namespace pcp_mla::cuda
