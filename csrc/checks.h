// Tensors as kernels see them, the checks that keep a kernel inside its memory, and allocation. For native ops these are the first
// checks; python/pcp_mla/ops/checks.py runs only after a refusal, to give it the documented type.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "overlap.h"
#include "row_table.h"
#include "view.h"

namespace pcp_mla {

using torch::stable::Tensor;

static_assert(kUInt8 == static_cast<int>(c10::ScalarType::Byte) && kInt32 == static_cast<int>(c10::ScalarType::Int) &&
              kInt64 == static_cast<int>(c10::ScalarType::Long) && kFloat16 == static_cast<int>(c10::ScalarType::Half) &&
              kFloat32 == static_cast<int>(c10::ScalarType::Float) && kBFloat16 == static_cast<int>(c10::ScalarType::BFloat16) &&
              kFloat8E4M3 == static_cast<int>(c10::ScalarType::Float8_e4m3fn) &&
              kCudaDevice == static_cast<int>(c10::DeviceType::CUDA));

template <typename... Args>
void check(bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline Kind kind_of(const Tensor& t) {
  Kind k{};
  aoti_torch_get_dtype(t.get(), &k.dtype);
  aoti_torch_get_device_type(t.get(), &k.device_type);
  aoti_torch_get_device_index(t.get(), &k.device_index);
  return k;
}

inline View view_of(const Tensor& t) {
  check(t.dim() <= kMaxDims, "pcp_mla: a tensor must have at most ", kMaxDims, " dimensions, got ", t.dim());
  View v{static_cast<char*>(t.data_ptr()),       kind_of(t), static_cast<int32_t>(t.dim()),
         static_cast<int32_t>(t.element_size()), {},         {}};
  const auto sizes = t.sizes(), strides = t.strides();
  for (int i = 0; i < v.dims; ++i) {
    v.sizes[i] = sizes[i];
    v.strides[i] = strides[i];
  }
  return v;
}

// What is written must have its memory to itself.
inline void check_apart(const char* op, const char* name, const Span& written, const char* other_name, const Span& other) {
  check(!share_memory(written, other), op, ": ", name, " must not share memory with ", other_name);
}

// The numbers of a list of so many, int32 or int64, on the device of `beside`, which is that of `whose`.
template <typename Number>
const Number* list_of(const char* op, const char* name, const View& v, int64_t length, const Kind& beside, const char* whose) {
  constexpr bool is_long = std::is_same_v<Number, int64_t>;
  static_assert(is_long || std::is_same_v<Number, int32_t>);
  check(v.kind.same_device(beside) && v.kind.dtype == (is_long ? kInt64 : kInt32) && v.dims == 1 && v.sizes[0] == length &&
            v.is_contiguous(),
        op, ": ", name, " must be a contiguous ", is_long ? "int64" : "int32", " list of ", length, " on the device of ", whose);
  return reinterpret_cast<const Number*>(v.data);
}

// A view of a tensor that may be missing: null then.
struct OptionalView {
  std::optional<View> view;
  explicit OptionalView(const std::optional<Tensor>& t) {
    if (t) view = view_of(*t);
  }
  operator const View*() const { return view ? &*view : nullptr; }
};

struct Ragged {  // [tokens, heads, dim] with a contiguous last dimension
  char* data;
  int64_t tokens, heads, dim;
  int64_t width;                      // bytes of one head
  int64_t token_stride, head_stride;  // bytes
  Kind kind;
  Span span() const { return Span(data, width).repeat(tokens, token_stride).repeat(heads, head_stride); }
};

inline Ragged ragged(const char* op, const char* name, const View& v) {
  check(v.dims == 3, op, ": ", name, " must have 3 dimensions [tokens, heads, dim], got ", v.dims);
  check(v.sizes[1] > 0 && v.sizes[2] > 0, op, ": ", name, " must have at least one head and a width of at least 1");
  check(v.item <= 8, op, ": ", name, " must have a dtype of at most 8 bytes, got ", v.item);
  check(v.strides[2] == 1 || v.sizes[2] <= 1, op, ": ", name, " must have a contiguous last dimension, got stride ", v.strides[2]);
  const int64_t item = v.item;
  return {v.data, v.sizes[0], v.sizes[1], v.sizes[2], v.sizes[2] * item, v.strides[0] * item, v.strides[1] * item, v.kind};
}

inline Ragged ragged(const char* op, const char* name, const Tensor& t) { return ragged(op, name, view_of(t)); }

// An output must be contiguous, with the heads, width, dtype and device of the rows that it receives.
inline void check_output(const char* op, const char* name, const Tensor& t, int64_t rows, const Ragged& of) {
  const Kind k = kind_of(t);
  check(k.same_device(of.kind) && k.dtype == of.kind.dtype && t.dim() == 3 && t.size(0) == rows && t.size(1) == of.heads &&
            t.size(2) == of.dim && t.is_contiguous(),
        op, ": an output of ", name, " must be contiguous [", rows, ", ", of.heads, ", ", of.dim, "] of its dtype, on its device");
}

inline RowTable row_table_of(const char* op, const Tensor& t, const Kind& beside) {
  const Kind k = kind_of(t);
  check(k.same_device(beside), op, ": row_table must be on the device of the other tensors");
  check(k.dtype == aoti_torch_dtype_int32() && t.dim() == 2 && t.size(0) == 5 && t.size(1) >= 1 && t.is_contiguous(), op,
        ": row_table must be a contiguous int32 tensor [5, requests + 1]");
  return {static_cast<const int32_t*>(t.data_ptr()), static_cast<int32_t>(t.size(1) - 1)};
}

// torch::stable::empty goes through the dispatcher and its boxed arguments; this one call is several times as fast.
template <int N>
Tensor empty(const int64_t (&sizes)[N], const Kind& kind) {
  int64_t strides[N];
  int64_t stride = 1;
  for (int i = N - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(N, sizes, strides, kind.dtype, kind.device_type, kind.device_index, &handle) != 0) {
    throw std::runtime_error("pcp_mla: allocation failed");
  }
  return Tensor(handle);
}

}  // namespace pcp_mla
