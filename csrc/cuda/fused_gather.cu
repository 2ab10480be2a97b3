// pcp_fused_gather: one launch copies q, k and v to the heads and the tails.
//
// A block takes a tile of rows of one tensor in source order, looks up where each goes and moves it. A row of k or v that the head
// and the tail of a request both attend to is read once and written twice, so that device memory moves the least bytes possible.
#include "../fused_gather.h"

#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

struct Side {
  Rows in;
  char *head, *tail;
  int64_t row_bytes;
  int32_t rows, tile;
};

struct Params {
  RowTable table;
  Side q, k, v;
  unsigned q_blocks, qk_blocks;
  // What a wrong table must not write past.
  int32_t q_rows[2], kv_rows[2];
};

template <typename Vec>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) fused_gather_kernel(const __grid_constant__ Params p) {
  __shared__ int64_t to_head[kMaxTileRows], to_tail[kMaxTileRows];
  const bool is_q = blockIdx.x < p.q_blocks;
  const bool is_k = !is_q && blockIdx.x < p.qk_blocks;
  const Side& side = is_q ? p.q : is_k ? p.k : p.v;
  const unsigned block = blockIdx.x - (is_q ? 0 : is_k ? p.q_blocks : p.qk_blocks);
  const int32_t first = block * side.tile;
  const int32_t rows = min(side.tile, side.rows - first);

  bool wanted = false;
  if (threadIdx.x < rows) {
    const Place place = is_q ? p.table.place_query(first + threadIdx.x) : p.table.place_key(first + threadIdx.x);
    const int32_t* limits = is_q ? p.q_rows : p.kv_rows;
    to_head[threadIdx.x] = place.head < limits[0] ? place.head * side.row_bytes : -1;
    to_tail[threadIdx.x] = place.tail < limits[1] ? place.tail * side.row_bytes : -1;
    wanted = place.head >= 0 || place.tail >= 0;
  }
  if (!__syncthreads_or(wanted)) return;

  const char* source = side.in.data + first * side.in.row_stride;
  const auto load = [&](uint32_t e, Vec& value) {
    const uint32_t row = side.in.per_row.divide(e);
    if (to_head[row] < 0 && to_tail[row] < 0) return;
    const uint32_t c = e - row * side.in.vecs;
    value = __ldg(reinterpret_cast<const Vec*>(source + row * side.in.row_stride + side.in.template offset<Vec>(c)));
  };
  const auto store = [&](uint32_t e, const Vec& value) {
    const uint32_t row = side.in.per_row.divide(e);
    const int64_t within = int64_t{e - row * side.in.vecs} * sizeof(Vec);
    if (to_head[row] >= 0) *reinterpret_cast<Vec*>(side.head + to_head[row] + within) = value;
    if (to_tail[row] >= 0) *reinterpret_cast<Vec*>(side.tail + to_tail[row] + within) = value;
  };
  move_accesses<Vec>(rows * side.in.vecs, load, store);
}

Side side_of(const GatherSide& from, int64_t rows, int vec_bytes) {
  const int64_t row_bytes = from.in.heads * from.in.width;
  return {Rows(from.in, vec_bytes), from.head, from.tail, row_bytes, static_cast<int32_t>(rows), tile_rows(row_bytes, rows)};
}

void run(const FusedGather& g) {
  if (g.rows.requests == 0) return;
  const uintptr_t outputs = reinterpret_cast<uintptr_t>(g.q.head) | reinterpret_cast<uintptr_t>(g.q.tail) |
                            reinterpret_cast<uintptr_t>(g.k.head) | reinterpret_cast<uintptr_t>(g.k.tail) |
                            reinterpret_cast<uintptr_t>(g.v.head) | reinterpret_cast<uintptr_t>(g.v.tail);
  const int bytes = access_bytes({&g.q.in, &g.k.in, &g.v.in}, outputs);
  Params p{};
  p.table = g.rows;
  p.q = side_of(g.q, g.num_tokens, bytes);
  p.k = side_of(g.k, g.k.in.tokens, bytes);
  p.v = side_of(g.v, g.v.in.tokens, bytes);
  p.q_blocks = blocks(p.q.rows, p.q.tile);
  p.qk_blocks = p.q_blocks + blocks(p.k.rows, p.k.tile);
  p.q_rows[0] = static_cast<int32_t>(g.q.head_rows);
  p.q_rows[1] = static_cast<int32_t>(g.q.tail_rows);
  p.kv_rows[0] = static_cast<int32_t>(g.k.head_rows);
  p.kv_rows[1] = static_cast<int32_t>(g.k.tail_rows);
  const unsigned grid = p.qk_blocks + blocks(p.v.rows, p.v.tile);
  if (grid == 0) return;
  with_access(bytes, [&](auto vec) { launch(fused_gather_kernel<decltype(vec)>, grid, kThreads, g.q.in.kind, p); });
}

}  // namespace
}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) {
  m.impl("fused_gather", TORCH_BOX(&pcp_mla::FusedGatherOp<pcp_mla::cuda::run>::allocate));
  m.impl("fused_gather_out", TORCH_BOX(&pcp_mla::FusedGatherOp<pcp_mla::cuda::run>::write));
}
