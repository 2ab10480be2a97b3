// LSE merges: what the CPU and the CUDA kernel share: the arguments of one call, its checks, and allocation. Definition:
// python/pcp_mla/reference/merge_states.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace pcp_mla {

constexpr int kMaxPartials = 64;

struct Partial {
  const char* out;  // [T, H, D], the last dimension contiguous
  const float* lse;
  int64_t token_stride, head_stride;  // bytes
  int64_t lse_token_stride, lse_head_stride;
};

// [S, T, H / S, ...] results: heads in S shares; one share is the plain [T, H, ...].
struct ShareStrides {
  int64_t share, token, head;
  PCP_HOST_DEVICE int64_t offset(int64_t token_, int32_t head_, int32_t heads_of_share) const {
    const int64_t start = token_ * token;
    if (head_ < heads_of_share) return start + head_ * head;  // the usual case: one share, no division
    return start + head_ / heads_of_share * share + head_ % heads_of_share * head;
  }
};

// All of a call but the partials.
struct MergeJob {
  int64_t tokens;
  int32_t heads, dim;
  int32_t count;  // of LSEs
  int32_t only;   // the one partial whose output is read and scaled, -1 for the sum of all
  bool base2;
  // What is there: a tensor without elements has no address.
  bool has_ops;     // else all partials of all rows
  bool by_request;  // row_op has an entry a request, not a row
  bool has_rows;    // else in order
  bool has_used;    // else as the LSEs say
  bool has_lse;
  int32_t requests;
  const int32_t* row_op;
  const int32_t* cu_seqlens;
  const int32_t* out_rows;
  const int32_t* seqused_k;  // [count, tokens]
  const float* scale;        // one number, null for all outputs but fp8
  char* out;
  ShareStrides out_strides;  // bytes
  float* lse;
  ShareStrides lse_strides;      // elements
  int32_t out_heads, lse_heads;  // heads of a share
  int64_t out_limit;             // rows of out

  // Which partials count in a row: bit n for partial n, if there are two.
  PCP_HOST_DEVICE int32_t row_bits(int64_t row) const {
    if (!has_ops) return -1;
    if (!by_request) return row_op[row] & 3;
    if (row < cu_seqlens[0] || row >= cu_seqlens[requests]) return 0;
    int32_t low = 0, high = requests;
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (cu_seqlens[middle] <= row ? low : high) = middle;
    }
    return row_op[low] & 3;
  }
  PCP_HOST_DEVICE int64_t target_row(int64_t row) const {
    const int64_t to = has_rows ? out_rows[row] : row;
    return to < out_limit ? to : -1;
  }
  PCP_HOST_DEVICE bool is_empty(int32_t n, int64_t row, float lse_of_n) const {
    return lse_of_n == INFINITY || lse_of_n == -INFINITY || (has_used && seqused_k[n * tokens + row] == 0);
  }
};

struct MergeStates {
  const char* op;
  MergeJob job{};
  Partial partials[kMaxPartials];
  Kind kind{};
  int32_t out_dtype = 0;

  MergeStates(const char* name, bool base2) : op(name) {
    job.only = -1;
    job.base2 = base2;
  }

  void add(const View& out, const View& lse) {
    check(job.count < kMaxPartials, op, ": there must be at most ", kMaxPartials, " partials");
    check(out.dims == 3, op, ": a partial must have 3 dimensions [tokens, heads, dim], got ", out.dims);
    set_shape(out, 0);
    check(out.kind.same_device(kind) && out.kind.dtype == kind.dtype && out.sizes[0] == job.tokens && out.sizes[1] == job.heads &&
              out.sizes[2] == job.dim && (out.strides[2] == 1 || job.dim == 1),
          op, ": partials must have one shape, dtype and device, and a contiguous last dimension");
    check(lse.kind.same_device(kind) && lse.kind.dtype == kFloat32 && lse.dims == 2 && lse.sizes[0] == job.tokens &&
              lse.sizes[1] == job.heads,
          op, ": an LSE must be float32 [", job.tokens, ", ", job.heads, "] on the device of the partials");
    partials[job.count] = {nullptr, reinterpret_cast<const float*>(lse.data), 0, 0, lse.strides[0], lse.strides[1]};
    set_output(job.count++, out.data, out.strides, out.item);
  }

  // [N, T, H, D] and [N, T, H].
  void add_stacked(const View& out, const View& lse) {
    check(out.dims == 4 && (out.strides[3] == 1 || out.sizes[3] == 1), op,
          ": partials must be [N, tokens, heads, dim] with a contiguous last dimension");
    set_shape(out, 1);
    add_lses(lse, out.sizes[0]);
    for (int32_t n = 0; n < job.count; ++n) set_output(n, out.data + n * out.strides[0] * out.item, out.strides + 1, out.item);
  }

  // The output of one partial and the LSEs [W, T, H] of all.
  void add_only(const View& out, const View& lses, const View* seqused_k, int64_t rank) {
    check(out.dims == 3 && (out.strides[2] == 1 || out.sizes[2] == 1), op,
          ": out must be [tokens, heads, dim] with a contiguous last dimension");
    set_shape(out, 0);
    add_lses(lses, lses.dims == 3 ? lses.sizes[0] : 0);
    check(rank >= 0 && rank < job.count, op, ": rank must be in 0..", job.count - 1);
    job.only = static_cast<int32_t>(rank);
    set_output(job.only, out.data, out.strides, out.item);
    job.has_used = seqused_k != nullptr;
    if (seqused_k) job.seqused_k = integers("seqused_k", *seqused_k, 2, job.count * job.tokens);
  }

  void set_rows(const View* row_op, const View* cu_seqlens, const View* out_rows) {
    if (cu_seqlens) {
      check(row_op != nullptr, op, ": cu_seqlens must come with row_op");
      check(row_op->numel() < INT32_MAX, op, ": there must be less than 2**31 requests");
      job.requests = static_cast<int32_t>(row_op->numel());
      job.cu_seqlens = integers("cu_seqlens", *cu_seqlens, 1, row_op->numel() + 1);
    }
    if (row_op) job.row_op = integers("row_op", *row_op, 1, cu_seqlens ? row_op->numel() : job.tokens);
    job.has_ops = row_op != nullptr;
    job.by_request = cu_seqlens != nullptr;
    job.has_rows = out_rows != nullptr;
    if (out_rows) job.out_rows = integers("out_rows", *out_rows, 1, job.tokens);
  }

  void set_results(const View& out, const View* lse, const View* scale) {
    out_dtype = out.kind.dtype;
    check(out.kind.same_device(kind) && (scale ? out_dtype == kFloat8E4M3 : out_dtype == kind.dtype || out_dtype == kFloat32), op,
          ": the output must be of the inputs' dtype, float32 or, with a scale, float8_e4m3fn, on their device");
    job.out = out.data;
    job.out_heads = result(out, 3, job.out_strides, out.item);
    const int last = out.dims - 1;
    check(out.sizes[last] == job.dim && (job.dim == 1 || out.strides[last] == 1), op,
          ": the output must have the inputs' width, contiguous");
    job.out_limit = out.sizes[last - 2];
    check(job.has_rows || job.out_limit == job.tokens, op, ": the output must have ", job.tokens, " rows");
    if (scale) {
      check(scale->kind.same_device(kind) && scale->kind.dtype == kFloat32 && scale->numel() == 1, op,
            ": scale must be one float32");
      job.scale = reinterpret_cast<const float*>(scale->data);
    }
    const Span to = span_of(out);
    check_others("out", to);
    for (int32_t n = 0; n < job.count; ++n) {
      if (!is_output(n, out)) check_apart(op, "out", to, "a partial", span_of_output(n));
      check_apart(op, "out", to, "an LSE", span_of_lse(n));
    }
    job.has_lse = lse != nullptr;
    if (!job.has_lse) return;
    check(lse->kind.same_device(kind) && lse->kind.dtype == kFloat32, op, ": the LSE output must be float32");
    job.lse = reinterpret_cast<float*>(lse->data);
    job.lse_heads = result(*lse, 2, job.lse_strides, 1);
    check(lse->sizes[lse->dims - 2] == job.out_limit, op, ": the LSE output must have ", job.out_limit, " rows");
    const Span lse_to = span_of(*lse);
    check_others("the LSE output", lse_to);
    check_apart(op, "the LSE output", lse_to, "out", to);
    for (int32_t n = 0; n < job.count; ++n) {
      if (!is_lse(n, *lse)) check_apart(op, "the LSE output", lse_to, "an LSE", span_of_lse(n));
      check_apart(op, "the LSE output", lse_to, "a partial", span_of_output(n));
    }
  }

 private:
  int64_t item_ = 0;  // bytes of an element of the partials

  // Of the partials: [tokens, heads, dim] from dimension `at` on.
  void set_shape(const View& v, int at) {
    if (job.heads > 0) return;
    kind = v.kind;
    check(kind.dtype == kBFloat16 || kind.dtype == kFloat16 || kind.dtype == kFloat32, op,
          ": partials must be bfloat16, float16 or float32");
    check(v.sizes[at + 1] > 0 && v.sizes[at + 2] > 0, op, ": partials must have at least one head and a width of at least 1");
    check(v.sizes[at] * v.sizes[at + 1] <= INT32_MAX && v.sizes[at + 2] <= INT32_MAX, op,
          ": tokens * heads must be less than 2**31");
    job.tokens = v.sizes[at];
    job.heads = static_cast<int32_t>(v.sizes[at + 1]);
    job.dim = static_cast<int32_t>(v.sizes[at + 2]);
  }

  void set_output(int32_t n, char* data, const int64_t* strides, int64_t item) {
    partials[n].out = data;
    partials[n].token_stride = job.tokens > 1 ? strides[0] * item : 0;  // those of a single row or head may be anything
    partials[n].head_stride = job.heads > 1 ? strides[1] * item : 0;
    item_ = item;
  }

  // A result may be an input itself: an element is written where it, or the LSE that weighs it, was read. Where rows go elsewhere
  // others may still read what is overwritten.
  bool is_output(int32_t n, const View& out) const {
    const Partial& p = partials[n];
    return out.data == p.out && out.kind.dtype == kind.dtype && out.dims == 3 && !job.has_rows &&
           (job.tokens <= 1 || out.strides[0] * out.item == p.token_stride) &&
           (job.heads <= 1 || out.strides[1] * out.item == p.head_stride);
  }
  bool is_lse(int32_t n, const View& lse) const {
    const Partial& p = partials[n];
    return lse.data == reinterpret_cast<const char*>(p.lse) && lse.dims == 2 && !job.has_rows &&
           (job.tokens <= 1 || lse.strides[0] == p.lse_token_stride) && (job.heads <= 1 || lse.strides[1] == p.lse_head_stride);
  }

  Span span_of_output(int32_t n) const {
    const Partial& p = partials[n];
    if (p.out == nullptr) return {};
    return Span(p.out, job.dim * item_).repeat(job.tokens, p.token_stride).repeat(job.heads, p.head_stride);
  }
  Span span_of_lse(int32_t n) const {
    const Partial& p = partials[n];
    return Span(p.lse, sizeof(float))
        .repeat(job.tokens, p.lse_token_stride * int64_t{sizeof(float)})
        .repeat(job.heads, p.lse_head_stride * int64_t{sizeof(float)});
  }
  // What says where and how: contiguous integers and the scale.
  void check_others(const char* name, const Span& written) const {
    constexpr int64_t item = sizeof(int32_t);
    if (job.has_ops) check_apart(op, name, written, "row_op", {job.row_op, (job.by_request ? job.requests : job.tokens) * item});
    if (job.by_request) check_apart(op, name, written, "cu_seqlens", {job.cu_seqlens, (int64_t{job.requests} + 1) * item});
    if (job.has_rows) check_apart(op, name, written, "out_rows", {job.out_rows, job.tokens * item});
    if (job.has_used) check_apart(op, name, written, "seqused_k", {job.seqused_k, job.count * job.tokens * item});
    if (job.scale) check_apart(op, name, written, "scale", {job.scale, item});
  }

  void add_lses(const View& lses, int64_t count) {
    check(count >= 1 && count <= kMaxPartials, op, ": there must be LSEs of 1 to ", kMaxPartials, " partials");
    check(lses.kind.same_device(kind) && lses.kind.dtype == kFloat32 && lses.dims == 3 && lses.sizes[0] == count &&
              lses.sizes[1] == job.tokens && lses.sizes[2] == job.heads,
          op, ": LSEs must be float32 [", count, ", ", job.tokens, ", ", job.heads, "] on the device of the output");
    const auto* data = reinterpret_cast<const float*>(lses.data);
    for (int64_t n = 0; n < count; ++n) partials[n] = {nullptr, data + n * lses.strides[0], 0, 0, lses.strides[1], lses.strides[2]};
    job.count = static_cast<int32_t>(count);
  }

  const int32_t* integers(const char* name, const View& v, int32_t dims, int64_t count) const {
    check(v.kind.same_device(kind) && v.kind.dtype == kInt32 && v.dims == dims && v.numel() == count && v.is_contiguous(), op, ": ",
          name, " must be contiguous int32 of ", count, " entries on the device of the partials");
    return reinterpret_cast<const int32_t*>(v.data);
  }

  // Strides of [T, H, ...] or [S, T, H / S, ...] with `dims` dimensions in the former; returns the heads of a share.
  int32_t result(const View& v, int32_t dims, ShareStrides& to, int64_t item) const {
    check(v.dims == dims || (v.dims == dims + 1 && job.only >= 0), op, ": a result must have ", dims, " dimensions");
    const int shared = v.dims > dims;
    const int64_t shares = shared ? v.sizes[0] : 1, heads = v.sizes[shared + 1];
    check(shares * heads == job.heads, op, ": a result must have ", job.heads, " heads");
    for (int i = 0; i < v.dims; ++i) check(v.sizes[i] <= 1 || v.strides[i] != 0, op, ": a result must not be expanded");
    to = {shared ? v.strides[0] * item : 0, v.strides[shared] * item, v.strides[shared + 1] * item};
    return static_cast<int32_t>(heads);
  }
};

using OptionalTensor = std::optional<Tensor>;

// The calls of a device's kernel, into given results.
template <void (*run)(const MergeStates&)>
struct MergeViews {
  static void merge(const View& out_a, const View& lse_a, const View& out_b, const View& lse_b, const View* scale,
                    const View* row_op, const View* cu_seqlens, const View* out_rows, bool base2, const View& out,
                    const View* lse_out) {
    MergeStates m("merge_attn_states", base2);
    m.add(out_a, lse_a);
    m.add(out_b, lse_b);
    m.set_rows(row_op, cu_seqlens, out_rows);
    m.set_results(out, lse_out, scale);
    run(m);
  }

  static void merge_n(const View* outs, const View* lses, size_t count, const View* scale, bool base2, const View& out,
                      const View* lse_out) {
    MergeStates m("merge_n_attn_states", base2);
    if (count == 1 && outs->dims == 4) {
      m.add_stacked(*outs, *lses);
    } else {
      for (size_t n = 0; n < count; ++n) m.add(outs[n], lses[n]);
    }
    check(count > 0, m.op, ": there must be at least one partial");
    m.set_results(out, lse_out, scale);
    run(m);
  }

  static void correct(const View& out, const View& lses, const View* seqused_k, int64_t rank, bool base2, const View& corrected,
                      const View* lse_out) {
    MergeStates m("cp_correct_out", base2);
    m.add_only(out, lses, seqused_k, rank);
    m.set_results(corrected, lse_out, nullptr);
    run(m);
  }
};

// The same as ops.
template <void (*run)(const MergeStates&)>
struct MergeOps {
  using Views = MergeViews<run>;

  static std::vector<View> views_of(const std::vector<Tensor>& tensors) {
    std::vector<View> views;
    views.reserve(tensors.size());
    for (const Tensor& t : tensors) views.push_back(view_of(t));
    return views;
  }

  // Results [tokens, heads, dim] and [tokens, heads] for partials like this one.
  static std::tuple<Tensor, Tensor> allocate(const View& of, bool fp8) {
    check(of.dims >= 3, "pcp_mla: a partial must have 3 dimensions [tokens, heads, dim], got ", of.dims);
    const int64_t* sizes = of.sizes + of.dims - 3;
    Kind out = of.kind, lse = of.kind;
    if (fp8) out.dtype = kFloat8E4M3;
    lse.dtype = kFloat32;
    return {empty<3>({sizes[0], sizes[1], sizes[2]}, out), empty<2>({sizes[0], sizes[1]}, lse)};
  }

  static std::tuple<Tensor, Tensor> merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                                          const OptionalTensor& scale, bool base2) {
    const View a = view_of(out_a);
    auto [out, lse] = allocate(a, scale.has_value());
    const View lse_out = view_of(lse);
    Views::merge(a, view_of(lse_a), view_of(out_b), view_of(lse_b), OptionalView(scale), nullptr, nullptr, nullptr, base2,
                 view_of(out), &lse_out);
    return {out, lse};
  }

  static void merge_out(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                        const OptionalTensor& scale, const OptionalTensor& row_op, const OptionalTensor& cu_seqlens,
                        const OptionalTensor& out_rows, bool base2, const Tensor& out, const OptionalTensor& lse_out) {
    Views::merge(view_of(out_a), view_of(lse_a), view_of(out_b), view_of(lse_b), OptionalView(scale), OptionalView(row_op),
                 OptionalView(cu_seqlens), OptionalView(out_rows), base2, view_of(out), OptionalView(lse_out));
  }

  static std::tuple<Tensor, Tensor> merge_n(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses,
                                            const OptionalTensor& scale, bool base2) {
    check(!outs.empty(), "merge_n_attn_states: there must be at least one partial");
    auto [out, lse] = allocate(view_of(outs[0]), scale.has_value());
    merge_n_out(outs, lses, scale, base2, out, lse);
    return {out, lse};
  }

  static void merge_n_out(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, const OptionalTensor& scale, bool base2,
                          const Tensor& out, const OptionalTensor& lse_out) {
    check(outs.size() == lses.size(), "merge_n_attn_states: there must be as many LSEs as partials");
    Views::merge_n(views_of(outs).data(), views_of(lses).data(), outs.size(), OptionalView(scale), base2, view_of(out),
                   OptionalView(lse_out));
  }

  static void correct_out(const Tensor& out, const Tensor& lses, const OptionalTensor& seqused_k, int64_t rank, bool base2,
                          const Tensor& corrected, const OptionalTensor& lse_out) {
    Views::correct(view_of(out), view_of(lses), OptionalView(seqused_k), rank, base2, view_of(corrected), OptionalView(lse_out));
  }
};

}  // namespace pcp_mla
