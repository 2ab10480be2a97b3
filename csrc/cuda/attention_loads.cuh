// pcp_attention on sm_90: what a block works on, and how it comes into shared memory.
#pragma once
#include "../attention.h"
#include "attention_items.cuh"
#include "hopper.cuh"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

constexpr int kQueries = 128;
constexpr int kAttentionThreads = 3 * kGroupThreads;
constexpr int kGroupQueries = 64;
constexpr int kStages = 2;

// Slabs of q and K, the width of V, the keys of a tile, and the width of q and K up to which products go.
template <int kQSlabs, int kVWidth, int kKeyTile, int kQWidth = kQSlabs * kSlab>
struct AttentionShape {
  static constexpr int slabs = kQSlabs, q_width = kQWidth, v_width = kVWidth, keys = kKeyTile, v_slabs = kVWidth / kSlab;
  static constexpr uint32_t slab_bytes = keys * kRowBytes, q_slab_bytes = kQueries * kRowBytes;
  static constexpr uint32_t q_bytes = slabs * q_slab_bytes, k_bytes = slabs * slab_bytes, v_bytes = v_slabs * slab_bytes;
  static constexpr uint32_t bytes = kAtomBytes + q_bytes + kStages * (k_bytes + v_bytes);
};

struct AttentionMaps {
  CUtensorMap q, k, k_pe, v;
};

struct ListedKeys {  // where K and V lie: rows[i] is the row of key i
  const int32_t* rows;
  const char *k, *k_pe, *v;
  int64_t k_row, k_head, k_pe_row, v_row, v_head;  // bytes
  uint32_t last_pieces;                            // of 16 bytes, in K's last slab
};

struct AttentionCall {
  AttentionRows rows;
  uint32_t items, tiles, head_group, k_slabs;  // items: of a head, at most; tiles: of all; k_slabs: of k, without k_pe
  float scale;                                 // of scores, times log2(e)
  ListedKeys listed;
  const char* prev_out;
  int64_t prev_token, prev_head;  // bytes
  Lse prev_lse;
  char* out;
  int64_t out_token, out_head;  // bytes
  Lse lse;
  uint32_t* drawn;  // tiles that blocks have taken beyond their first; null: they take one each
};

struct AttentionBarriers {
  uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t found[2], loaded;  // a tile to work on; all of one is loaded or on its way
};

// What a block works on.
struct AttentionTile {
  int32_t head, first_token, tokens;  // queries, of which there may be less than kQueries; none: there is no tile
  int32_t first_key, used, seen;      // of the row; keys that any of the queries sees
  int32_t first_limit;                // keys that the first query sees; each further one sees one more, or just as many
};

#ifdef PCP_MLA_HOPPER

__device__ inline AttentionTile attention_tile(const AttentionCall& c, uint32_t block, uint32_t lane) {
  const uint32_t in_group = block % (c.items * c.head_group), head = block / (c.items * c.head_group) * c.head_group;
  const AttentionItem item = attention_item<kQueries>(c.rows, in_group / c.head_group, lane);
  AttentionTile t{};
  if (item.row < 0) return t;
  const int32_t begin = c.rows.cu_seqlens_q[item.row], length = c.rows.cu_seqlens_q[item.row + 1] - begin;
  t.head = head + in_group % c.head_group;
  t.first_token = begin + item.tile * kQueries;
  t.tokens = min(kQueries, length - item.tile * kQueries);
  t.first_key = c.rows.cu_seqlens_k[item.row];
  t.used = c.rows.seqused_k[item.row];
  t.first_limit = c.rows.causal ? t.used - length + item.tile * kQueries + 1 : t.used;
  t.seen = c.rows.causal ? min(t.first_limit + kQueries - 1, t.used) : t.used;
  t.seen = max(t.seen, 0);
  return t;
}

// The number of another tile for this block; `tiles` if there is none. The last block to find none leaves the count as it was.
__device__ inline uint32_t draw(const AttentionCall& c, uint32_t lane) {
  if (c.drawn == nullptr) return c.tiles;
  uint32_t drawn = 0;
  if (lane == 0) {
    drawn = atomicAdd(c.drawn, 1);
    if (drawn == c.tiles - 1) *c.drawn = 0;
  }
  return min(gridDim.x + __shfl_sync(~0u, drawn, 0), c.tiles);
}

// A warp finds the block's tiles, each as late as it can be: when all of the one before is on its way.
__device__ inline void find_tiles(const AttentionCall& c, AttentionTile (&found)[2], const AttentionBarriers& b, uint32_t lane) {
  uint32_t next = blockIdx.x;
  for (uint32_t number = 0;; ++number) {
    AttentionTile t{};
    for (; next < c.tiles; next = draw(c, lane)) {
      t = attention_tile(c, next, lane);
      if (t.tokens > 0) break;
    }
    if (lane == 0) {
      found[number % 2] = t;
      barrier_arrive(shared_address(&b.found[number % 2]));
    }
    if (t.tokens == 0) return;
    if (c.drawn != nullptr) barrier_wait(shared_address(&b.loaded), number & 1);
    next = draw(c, lane);
  }
}

__device__ inline void init_barriers(AttentionBarriers& b, bool listed) {
  const auto init = [](const uint64_t& barrier, uint32_t arrivals) { barrier_init(shared_address(&barrier), arrivals); };
  const uint32_t loading = listed ? kGroupThreads : 1;
  init(b.q_full, 1);
  init(b.q_empty, 2 * kGroupWarps);
  init(b.loaded, 1);
  for (int i = 0; i < 2; ++i) init(b.found[i], 1);
  for (int i = 0; i < kStages; ++i) {
    init(b.k_full[i], loading);
    init(b.v_full[i], loading);
    init(b.k_empty[i], 2 * kGroupWarps);
    init(b.v_empty[i], 2 * kGroupWarps);
  }
  barrier_init_fence();
}

// The number-th load of K or of V: its stage, and the parity of the phase that it fills.
__device__ inline uint32_t stage_of(uint32_t number) { return number % kStages; }
__device__ inline uint32_t parity_of(uint32_t number) { return number / kStages & 1; }

// Says that all is there where there are no keys to multiply with.
template <typename Shape>
__device__ void load_queries(const AttentionMaps& maps, const AttentionTile& t, uint32_t q_tile, const AttentionBarriers& b,
                             uint32_t tiles) {
  const uint32_t full = shared_address(&b.q_full);
  if (tiles == 0) return barrier_arrive(full);
  barrier_arrive_expect(full, Shape::q_bytes);
  for (uint32_t slab = 0; slab < Shape::slabs; ++slab) {
    tensor_load_3d(q_tile + slab * Shape::q_slab_bytes, &maps.q, full, slab * kSlab, t.first_token, t.head);
  }
}

// One thread brings everything of the block's number-th tile of queries by tensor copies, after `before` tiles of K and V, and
// returns how many there have been then.
template <typename Shape>
__device__ uint32_t copy_tiles(const AttentionCall& c, const AttentionMaps& maps, const AttentionTile& t, uint32_t q_tile,
                               uint32_t k_tiles, uint32_t v_tiles, const AttentionBarriers& b, uint32_t tiles, uint32_t before,
                               uint32_t number) {
  const auto load_k = [&](uint32_t j) {
    const uint32_t load = before + j, full = shared_address(&b.k_full[stage_of(load)]);
    const uint32_t to = k_tiles + stage_of(load) * Shape::k_bytes;
    barrier_wait(shared_address(&b.k_empty[stage_of(load)]), parity_of(load) ^ 1);
    barrier_arrive_expect(full, Shape::k_bytes);
    const int32_t key = t.first_key + static_cast<int32_t>(j) * Shape::keys;
    for (uint32_t slab = 0; slab < c.k_slabs; ++slab) {
      tensor_load_3d(to + slab * Shape::slab_bytes, &maps.k, full, slab * kSlab, key, t.head);
    }
    if (c.k_slabs < Shape::slabs) tensor_load_2d(to + c.k_slabs * Shape::slab_bytes, &maps.k_pe, full, 0, key);
  };
  const auto load_v = [&](uint32_t j) {
    const uint32_t load = before + j, full = shared_address(&b.v_full[stage_of(load)]);
    const uint32_t to = v_tiles + stage_of(load) * Shape::v_bytes;
    barrier_wait(shared_address(&b.v_empty[stage_of(load)]), parity_of(load) ^ 1);
    barrier_arrive_expect(full, Shape::v_bytes);
    for (uint32_t slab = 0; slab < Shape::v_slabs; ++slab) {
      tensor_load_3d(to + slab * Shape::slab_bytes, &maps.v, full, slab * kSlab, t.first_key + j * Shape::keys, t.head);
    }
  };
  if (tiles > 0) load_k(0);
  if (number > 0) barrier_wait(shared_address(&b.q_empty), (number - 1) & 1);  // also says that all know the tile before
  load_queries<Shape>(maps, t, q_tile, b, tiles);
  if (tiles == 0) return before;
  for (uint32_t j = 1; j < tiles; ++j) {
    load_k(j);
    load_v(j - 1);
  }
  load_v(tiles - 1);
  return before + tiles;
}

// A warpgroup brings listed rows, each warp a quarter of a tile: by tensor copies where they lie one behind another, else eight
// lanes a row of a slab. What lies past the row's last key is zeros.
template <typename Shape>
__device__ void copy_listed(const AttentionCall& c, const AttentionMaps& maps, const AttentionTile& t, uint32_t k_tiles,
                            uint32_t v_tiles, const AttentionBarriers& b, uint32_t tiles, uint32_t warp, uint32_t lane) {
  constexpr uint32_t kWarpRows = Shape::keys / kGroupWarps, kTurns = kWarpRows / 4;
  const ListedKeys& l = c.listed;
  const uint32_t piece = lane % 8, first = warp * kWarpRows + lane / 8;
  const char *k = l.k + t.head * l.k_head + piece * 16, *v = l.v + t.head * l.v_head + piece * 16, *k_pe = l.k_pe + piece * 16;
  const auto look_up = [&](uint32_t j) {  // the row of each lane's key
    const int32_t key = j * Shape::keys + warp * kWarpRows + lane;
    if (lane >= kWarpRows || key >= t.used) return -1;
    return max(l.rows[t.first_key + key], 0);  // a pad, which only pads see, is row 0
  };
  const auto lie_together = [&](int32_t row) {
    const int32_t begin = __shfl_sync(~0u, row, 0);
    return __all_sync(~0u, lane >= kWarpRows || row == begin + static_cast<int32_t>(lane)) && begin >= 0;
  };
  // Row after row, so that each one's address is worked out once.
  const auto copy_rows = [&](int32_t row, auto&& copy_row) {
#pragma unroll
    for (uint32_t i = 0; i < kTurns; ++i) {
      const int32_t of = __shfl_sync(~0u, row, i * 4 + lane / 8);
      const uint32_t in_tile = first + i * 4;
      copy_row(static_cast<uint32_t>(max(of, 0)), of < 0, in_tile * kRowBytes + ((piece ^ in_tile % 8) << 4));
    }
  };
  const auto load_k = [&](uint32_t j, int32_t row) {
    const uint32_t full = shared_address(&b.k_full[stage_of(j)]), to = k_tiles + stage_of(j) * Shape::k_bytes;
    barrier_wait(shared_address(&b.k_empty[stage_of(j)]), parity_of(j) ^ 1);
    if (!lie_together(row)) {
      const bool apart = c.k_slabs < Shape::slabs;
      copy_rows(row, [&](uint32_t of, bool zeros, uint32_t in_slab) {
        const char* at = k + uint64_t{of} * static_cast<uint32_t>(l.k_row);
#pragma unroll
        for (int slab = 0; slab < Shape::slabs - 1; ++slab) {
          copy_async<16>(to + slab * Shape::slab_bytes + in_slab, at + slab * kRowBytes, zeros);
        }
        at = apart ? k_pe + uint64_t{of} * static_cast<uint32_t>(l.k_pe_row) : at + (Shape::slabs - 1) * kRowBytes;
        copy_async<16>(to + (Shape::slabs - 1) * Shape::slab_bytes + in_slab, at, zeros || piece >= l.last_pieces);
      });
    } else if (lane == 0) {
      const uint32_t at = to + warp * kWarpRows * kRowBytes;
      barrier_expect(full, Shape::k_bytes / kGroupWarps);
#pragma unroll 1
      for (uint32_t slab = 0; slab < c.k_slabs; ++slab) {
        tensor_load_3d(at + slab * Shape::slab_bytes, &maps.k, full, slab * kSlab, row, t.head);
      }
      if (c.k_slabs < Shape::slabs) tensor_load_2d(at + c.k_slabs * Shape::slab_bytes, &maps.k_pe, full, 0, row);
    }
    copy_async_arrive(full);
  };
  const auto load_v = [&](uint32_t j, int32_t row) {
    const uint32_t full = shared_address(&b.v_full[stage_of(j)]), to = v_tiles + stage_of(j) * Shape::v_bytes;
    barrier_wait(shared_address(&b.v_empty[stage_of(j)]), parity_of(j) ^ 1);
    if (!lie_together(row)) {
      copy_rows(row, [&](uint32_t of, bool zeros, uint32_t in_slab) {
        const char* at = v + uint64_t{of} * static_cast<uint32_t>(l.v_row);
#pragma unroll
        for (int slab = 0; slab < Shape::v_slabs; ++slab) {
          copy_async<16>(to + slab * Shape::slab_bytes + in_slab, at + slab * kRowBytes, zeros);
        }
      });
    } else if (lane == 0) {
      barrier_expect(full, Shape::v_bytes / kGroupWarps);
      for (uint32_t slab = 0; slab < Shape::v_slabs; ++slab) {
        tensor_load_3d(to + slab * Shape::slab_bytes + warp * kWarpRows * kRowBytes, &maps.v, full, slab * kSlab, row, t.head);
      }
    }
    copy_async_arrive(full);
  };
  int32_t row = look_up(0), next = look_up(1), before = 0;  // of the tile before, whose V comes after this one's K
  for (uint32_t j = 0; j < tiles; ++j) {
    load_k(j, row);
    if (j > 0) load_v(j - 1, before);
    before = row;
    row = next;
    next = look_up(j + 2);
  }
  load_v(tiles - 1, before);
  copy_async_commit();
  copy_async_wait<0>();  // no thread ends before its copies
}

#endif

}  // namespace
}  // namespace pcp_mla::cuda
