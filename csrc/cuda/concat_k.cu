// concat_k: every access of the result is fetched from k_nope or from k_pe.
#include "../concat_k.h"

#include "direct.h"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

struct Params {
  Rows nope, out;
  const char* pe;
  int64_t pe_stride;
  uint32_t nope_vecs;  // of a head
  Divider per_row, per_head;
  int32_t tokens, tile;
};

constexpr int kConcatBlocksPerSm = 6;  // two sources want more registers than one

template <typename Vec>
__global__ void __launch_bounds__(kThreads, kConcatBlocksPerSm) concat_k_kernel(const __grid_constant__ Params p) {
  const int64_t first = int64_t{blockIdx.x} * p.tile;
  const int32_t rows = static_cast<int32_t>(min(int64_t{p.tile}, p.tokens - first));
  const auto load = [&](uint32_t e, Vec& value) {
    const uint32_t row = p.per_row.divide(e), c = e - row * p.per_row.divisor;
    const uint32_t head = p.per_head.divide(c), n = c - head * p.per_head.divisor;
    const char* from = n < p.nope_vecs ? p.nope.data + (first + row) * p.nope.row_stride + head * p.nope.head_stride
                                       : p.pe + (first + row) * p.pe_stride - int64_t{p.nope_vecs} * sizeof(Vec);
    value = __ldg(reinterpret_cast<const Vec*>(from) + n);
  };
  const auto store = [&](uint32_t e, const Vec& value) {
    const uint32_t row = p.per_row.divide(e), c = e - row * p.per_row.divisor;
    char* to = const_cast<char*>(p.out.data) + (first + row) * p.out.row_stride;
    *reinterpret_cast<Vec*>(to + p.out.template offset<Vec>(c)) = value;
  };
  move_accesses<Vec>(rows * p.per_row.divisor, load, store);
}

void run(const ConcatK& c) {
  if (c.out.tokens == 0) return;
  check(c.out.tokens <= INT32_MAX, "concat_k: there must be less than 2**31 tokens");
  const int bytes = access_bytes({&c.nope, &c.pe, &c.out}, 0);
  Params p{Rows(c.nope, bytes),
           Rows(c.out, bytes),
           c.pe.data,
           c.pe.token_stride,
           static_cast<uint32_t>(c.nope.width / bytes),
           {},
           {},
           static_cast<int32_t>(c.out.tokens),
           tile_rows(c.out.heads * c.out.width, c.out.tokens)};
  p.per_row = p.out.per_row;
  p.per_head = Divider(static_cast<uint32_t>(c.out.width / bytes));
  with_access(bytes, [&](auto vec) { launch(concat_k_kernel<decltype(vec)>, blocks(p.tokens, p.tile), kThreads, c.out.kind, p); });
}

void concat_k(const Tensor& k_nope, const Tensor& k_pe, const Tensor& out) {
  run(ConcatK(view_of(k_nope), view_of(k_pe), view_of(out)));
}

// [tokens, width] as one head.
View with_heads(const View& v) {
  if (v.dims != 2) return v;
  return {v.data, v.kind, 3, v.item, {v.sizes[0], 1, v.sizes[1]}, {v.strides[0], v.sizes[1], v.strides[1]}};
}

void concat(const View& k_nope, const View& k_pe, const View& out) { run(ConcatK(with_heads(k_nope), k_pe, with_heads(out))); }

}  // namespace

void add_concat_k(DirectOps& ops) { ops.concat_k = directly<concat>; }

}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) { m.impl("concat_k", TORCH_BOX(&pcp_mla::cuda::concat_k)); }
