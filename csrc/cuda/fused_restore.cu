// pcp_fused_restore: one launch fetches every local row, and its LSE, from the heads or from the tails.
#include "../fused_restore.h"

#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

struct Params {
  RowTable table;
  Rows head, tail;
  Lse lse_head, lse_tail;
  char* out;
  float* lse;
  int64_t row_bytes;
  int32_t rows, tile, heads;
  unsigned lse_blocks;           // the first blocks move the LSEs, the others the outputs
  int32_t head_rows, tail_rows;  // what a wrong table must not read past
};

// rows * heads floats; neighbouring threads take neighbouring rows, which lie together in FlashAttention's [heads, tokens].
__device__ void copy_lse(const Params& p, const int32_t* from, int32_t first, int32_t rows) {
  for (uint32_t e = threadIdx.x; e < rows * p.heads; e += kThreads) {
    const uint32_t h = e / rows, row = e % rows;
    const int32_t index = from[row];
    const Lse& source = index >= 0 ? p.lse_head : p.lse_tail;
    const int64_t source_row = index >= 0 ? index : -1 - index;
    p.lse[int64_t{first + static_cast<int32_t>(row)} * p.heads + h] =
        __ldg(source.data + source_row * source.token_stride + h * source.head_stride);
  }
}

template <typename Vec>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) fused_restore_kernel(const __grid_constant__ Params p) {
  // The row to fetch: n for row n of the heads, -1 - n for row n of the tails.
  __shared__ int32_t from[kMaxTileRows];
  const bool is_lse = blockIdx.x < p.lse_blocks;
  const int32_t tile = is_lse ? kMaxTileRows : p.tile;
  const int32_t first = (blockIdx.x - (is_lse ? 0 : p.lse_blocks)) * tile;
  const int32_t rows = min(tile, p.rows - first);
  if (threadIdx.x < rows) {
    const Place place = p.table.place_query(first + threadIdx.x);
    const bool in_head = place.head >= 0;
    const int64_t index = in_head ? min(place.head, int64_t{p.head_rows} - 1) : min(place.tail, int64_t{p.tail_rows} - 1);
    from[threadIdx.x] = static_cast<int32_t>(in_head ? index : -1 - index);
  }
  __syncthreads();
  if (is_lse) {
    copy_lse(p, from, first, rows);
    return;
  }

  char* out = p.out + first * p.row_bytes;
  const auto load = [&](uint32_t e, Vec& value) {
    const uint32_t row = p.head.per_row.divide(e);
    const uint32_t c = e - row * p.head.vecs;
    const int32_t index = from[row];
    const Rows& source = index >= 0 ? p.head : p.tail;
    const int64_t source_row = index >= 0 ? index : -1 - index;
    value = __ldg(reinterpret_cast<const Vec*>(source.data + source_row * source.row_stride + source.template offset<Vec>(c)));
  };
  const auto store = [&](uint32_t e, const Vec& value) { *reinterpret_cast<Vec*>(out + int64_t{e} * sizeof(Vec)) = value; };
  move_accesses<Vec>(rows * p.head.vecs, load, store);
}

void run(const FusedRestore& r) {
  if (r.rows.requests == 0 || r.num_tokens() == 0) return;
  const int bytes = access_bytes({&r.head, &r.tail}, reinterpret_cast<uintptr_t>(r.out));
  Params p{};
  p.table = r.rows;
  p.head = Rows(r.head, bytes);
  p.tail = Rows(r.tail, bytes);
  p.lse_head = r.lse_head;
  p.lse_tail = r.lse_tail;
  p.out = r.out;
  p.lse = r.lse;
  p.row_bytes = r.head.heads * r.head.width;
  p.rows = static_cast<int32_t>(r.num_tokens());
  p.tile = tile_rows(p.row_bytes, p.rows);
  p.heads = static_cast<int32_t>(r.head.heads);
  p.head_rows = static_cast<int32_t>(r.head.tokens);
  p.tail_rows = static_cast<int32_t>(r.tail.tokens);
  p.lse_blocks = r.has_lse ? blocks(p.rows, kMaxTileRows) : 0;
  const unsigned grid = p.lse_blocks + blocks(p.rows, p.tile);
  with_access(bytes, [&](auto vec) { launch(fused_restore_kernel<decltype(vec)>, grid, kThreads, r.head.kind, p); });
}

}  // namespace
}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) {
  m.impl("fused_restore", TORCH_BOX(&pcp_mla::FusedRestoreOp<pcp_mla::cuda::run>::allocate));
  m.impl("fused_restore_out", TORCH_BOX(&pcp_mla::FusedRestoreOp<pcp_mla::cuda::run>::write));
}
