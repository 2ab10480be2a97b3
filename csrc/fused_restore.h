// pcp_fused_restore: what the CPU and the CUDA kernel share: checks and allocation.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks.h"

namespace pcp_mla {

using OptionalTensor = std::optional<Tensor>;

struct Lse {  // [tokens, heads] float32, strides in elements
  const float* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
};

struct FusedRestore {
  static constexpr const char* op = "pcp_fused_restore";
  RowTable rows;
  Ragged head, tail;
  Lse lse_head, lse_tail;
  char* out;
  bool has_lse = false;  // LSEs of no tokens have no address
  float* lse = nullptr;

  FusedRestore(const Tensor& out_head, const Tensor& out_tail, const OptionalTensor& lse_head_in, const OptionalTensor& lse_tail_in,
               const Tensor& row_table, const Tensor& out_to, const Tensor* lse_to)
      : head(ragged(op, "out_head", out_head)), tail(ragged(op, "out_tail", out_tail)) {
    check(head.kind.same_device(tail.kind), op, ": out_head and out_tail must be on one device");
    check(head.kind.dtype == tail.kind.dtype && head.heads == tail.heads && head.dim == tail.dim, op,
          ": out_head and out_tail must have one dtype, head count and width");
    check(lse_head_in.has_value() == lse_tail_in.has_value(), op, ": lse_head and lse_tail must both be given or neither");
    check(num_tokens() <= INT32_MAX, op, ": row counts must be less than 2**31");
    rows = row_table_of(op, row_table, head.kind);
    check_output(op, "out_head", out_to, num_tokens(), head);
    out = static_cast<char*>(out_to.data_ptr());
    check_written("out", out_to, head.span(), tail.span(), row_table);
    has_lse = lse_head_in.has_value();
    if (!has_lse) return;
    lse_head = lse_of("lse_head", *lse_head_in, head.tokens);
    lse_tail = lse_of("lse_tail", *lse_tail_in, tail.tokens);
    check(lse_to != nullptr && lse_to->is_contiguous(), op, ": the LSE output must be contiguous");
    lse = const_cast<float*>(lse_of("the LSE output", *lse_to, num_tokens()).data);
    const Span in_head = span_of(view_of(*lse_head_in)), in_tail = span_of(view_of(*lse_tail_in));
    check_written("the LSE output", *lse_to, in_head, in_tail, row_table);
    check_written("the LSE output", *lse_to, head.span(), tail.span(), out_to);
    check_apart(op, "out", span_of(view_of(out_to)), "lse_head", in_head);
    check_apart(op, "out", span_of(view_of(out_to)), "lse_tail", in_tail);
  }

  // Outputs for the allocating form: out, and lse, which is empty where none is wanted.
  static std::tuple<Tensor, Tensor> allocate(const Tensor& out_head, const Tensor& out_tail, bool with_lse) {
    const Ragged a = ragged(op, "out_head", out_head), b = ragged(op, "out_tail", out_tail);
    Kind lse_kind = a.kind;
    lse_kind.dtype = aoti_torch_dtype_float32();
    const int64_t tokens = a.tokens + b.tokens;
    return {empty<3>({tokens, a.heads, a.dim}, a.kind), with_lse ? empty<2>({tokens, a.heads}, lse_kind) : empty<1>({0}, lse_kind)};
  }

  int64_t num_tokens() const { return head.tokens + tail.tokens; }

 private:
  static void check_written(const char* name, const Tensor& t, const Span& of_heads, const Span& of_tails, const Tensor& beside) {
    const Span written = span_of(view_of(t));
    for (const Span& other : {of_heads, of_tails, span_of(view_of(beside))})
      check_apart(op, name, written, "another tensor", other);
  }

  Lse lse_of(const char* name, const Tensor& t, int64_t tokens) const {
    const Kind k = kind_of(t);
    check(k.same_device(head.kind) && k.dtype == aoti_torch_dtype_float32() && t.dim() == 2 && t.size(0) == tokens &&
              t.size(1) == head.heads,
          op, ": ", name, " must be float32 [", tokens, ", ", head.heads, "] on the device of the outputs");
    return {static_cast<const float*>(t.data_ptr()), t.stride(0), t.stride(1)};
  }
};

// Both forms of the op around a device's kernel.
template <void (*run)(const FusedRestore&)>
struct FusedRestoreOp {
  static void write(const Tensor& out_head, const Tensor& out_tail, const OptionalTensor& lse_head, const OptionalTensor& lse_tail,
                    const Tensor& row_table, const Tensor& out, const OptionalTensor& lse) {
    run(FusedRestore(out_head, out_tail, lse_head, lse_tail, row_table, out, lse ? &*lse : nullptr));
  }

  static std::tuple<Tensor, Tensor> allocate(const Tensor& out_head, const Tensor& out_tail, const OptionalTensor& lse_head,
                                             const OptionalTensor& lse_tail, const Tensor& row_table) {
    auto [out, lse] = FusedRestore::allocate(out_head, out_tail, lse_head.has_value());
    run(FusedRestore(out_head, out_tail, lse_head, lse_tail, row_table, out, &lse));
    return {out, lse};
  }
};

}  // namespace pcp_mla
