// pcp_attention's rows: tensors and sizes of a call. Definition: python/pcp_mla/reference/attention.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include "attention_call.h"
#include "checks.h"

namespace pcp_mla {

struct Lse {  // [tokens, heads] float32, of any strides
  float* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;  // numbers
};

struct Attention {
  Ragged q, k, v, out, prev_out{};  // prev_out.data null: none
  const char* k_pe = nullptr;
  int64_t k_pe_stride = 0, rope = 0;  // bytes; 0: K is in one piece
  const int32_t* kv_rows = nullptr;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  int64_t rows, keys;  // keys: that there can be
  Lse prev_lse, lse;
  float softmax_scale;
  bool causal, in_place;
  Kind kind;

  explicit Attention(const AttentionArguments& a)
      : q(ragged(op, "q", a.q)), k(ragged(op, "k", a.k)), v(ragged(op, "v", a.v)), out(ragged(op, "out", a.out)) {
    kind = q.kind;
    for (const Ragged* x : {&k, &v, &out}) {
      check(x->kind.same_device(kind) && x->kind.dtype == kind.dtype && x->heads == q.heads, op,
            ": q, k, v and out must have one dtype, device and number of heads");
    }
    check(v.tokens == k.tokens && out.tokens == q.tokens && out.dim == v.dim, op, ": v must have the rows of k, out those of q");
    if (a.k_pe != nullptr) {
      const View& x = *a.k_pe;
      check(x.kind.same_device(kind) && x.kind.dtype == kind.dtype && x.dims == 2 && x.sizes[0] == k.tokens && x.strides[1] == 1,
            op, ": k_pe must be [rows of k, rope], of its dtype, with a contiguous last dimension");
      k_pe = x.data;
      rope = x.sizes[1];
      k_pe_stride = x.strides[0] * x.item;
    }
    check(k.dim + rope == q.dim, op, ": K must be as wide as q, ", q.dim, ", got ", k.dim + rope);
    keys = k.tokens;
    if (a.kv_rows != nullptr) {
      kv_rows = list_of<int32_t>(op, "kv_rows", *a.kv_rows, a.kv_rows->sizes[0], kind, "q");
      keys = a.kv_rows->sizes[0];
      for (const int64_t stride : {k.token_stride, v.token_stride, k_pe_stride}) {
        check(stride <= UINT32_MAX, op, ": k, v and k_pe must have rows less than 2**32 bytes apart with kv_rows, got ", stride);
      }
    }
    rows = a.seqused_k.sizes[0];
    cu_seqlens_q = list_of<int32_t>(op, "cu_seqlens_q", a.cu_seqlens_q, rows + 1, kind, "q");
    cu_seqlens_k = list_of<int32_t>(op, "cu_seqlens_k", a.cu_seqlens_k, a.cu_seqlens_k.sizes[0], kind, "q");
    seqused_k = list_of<int32_t>(op, "seqused_k", a.seqused_k, rows, kind, "q");
    check(a.cu_seqlens_k.sizes[0] >= rows, op, ": cu_seqlens_k must have an entry for each row");
    if (a.prev_out != nullptr) {
      prev_out = ragged(op, "prev_out", *a.prev_out);
      check(prev_out.kind.same_device(kind) && prev_out.kind.dtype == kind.dtype && prev_out.tokens == q.tokens &&
                prev_out.heads == q.heads && prev_out.dim == v.dim && a.prev_lse != nullptr,
            op, ": prev_out must be as out, with prev_lse beside it");
      prev_lse = lse_of(*a.prev_lse, "prev_lse");
    }
    if (a.lse != nullptr) lse = lse_of(*a.lse, "lse");
    in_place = prev_out.data == out.data;
    for (const Ragged* x : {&q, &k, &v}) check_apart(op, "out", out.span(), "q, k or v", x->span());
    softmax_scale = static_cast<float>(a.softmax_scale);
    causal = a.causal;
  }

  static constexpr const char* op = "pcp_attention";

 private:
  Lse lse_of(const View& x, const char* name) const {
    check(x.kind.same_device(kind) && x.kind.dtype == kFloat32 && x.dims == 2 && x.sizes[0] == q.tokens && x.sizes[1] == q.heads,
          op, ": ", name, " must be float32 [tokens, heads] on the device of q");
    return {reinterpret_cast<float*>(x.data), x.strides[0], x.strides[1]};
  }
};

}  // namespace pcp_mla
