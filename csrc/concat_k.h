// concat_k: what the CPU and the CUDA kernel share. Definition: python/pcp_mla/reference/kv_up_project.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace pcp_mla {

struct ConcatK {
  Ragged nope, out;
  Ragged pe;  // one head

  ConcatK(const View& k_nope, const View& p, const View& result)
      : nope(ragged("concat_k", "k_nope", k_nope)), out(ragged("concat_k", "out", result)) {
    const bool fits = p.dims == 2 && (p.strides[1] == 1 || p.sizes[1] <= 1) && p.sizes[0] == nope.tokens;
    check(fits, "concat_k: k_pe must be [tokens, rope] with a contiguous last dimension");
    check(p.kind.same_device(nope.kind) && out.kind.same_device(nope.kind) && p.kind.dtype == nope.kind.dtype &&
              out.kind.dtype == nope.kind.dtype && out.tokens == nope.tokens && out.heads == nope.heads &&
              out.dim == nope.dim + p.sizes[1],
          "concat_k: out must be [tokens, heads, nope + rope] of the inputs' dtype, on their device");
    pe = {p.data, p.sizes[0], 1, p.sizes[1], p.sizes[1] * p.item, p.strides[0] * p.item, 0, p.kind};
    check_apart("concat_k", "out", out.span(), "k_nope", nope.span());
    check_apart("concat_k", "out", out.span(), "k_pe", pe.span());
  }
};

}  // namespace pcp_mla
