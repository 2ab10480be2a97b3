// concat_k on the CPU.
#include "../concat_k.h"

#include <torch/csrc/stable/ops.h>

#include "copy.h"

namespace pcp_mla::cpu {
namespace {

void concat_k(const Tensor& k_nope, const Tensor& k_pe, const Tensor& out) {
  const ConcatK c(view_of(k_nope), view_of(k_pe), view_of(out));
  torch::stable::parallel_for(0, c.out.tokens, grain(c.out.heads * c.out.width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t h = 0; h < c.out.heads; ++h) {
        char* to = c.out.data + n * c.out.token_stride + h * c.out.head_stride;
        std::memcpy(to, c.nope.data + n * c.nope.token_stride + h * c.nope.head_stride, c.nope.width);
        std::memcpy(to + c.nope.width, c.pe.data + n * c.pe.token_stride, c.pe.width);
      }
    }
  });
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) { m.impl("concat_k", TORCH_BOX(&pcp_mla::cpu::concat_k)); }
