// Whether two tensors share memory, by their addresses. Exact for slices of one buffer that lie at equal or nested distances (K and
// V of one projection, kv_c and k_pe of one row); of others that reach into one another, yes. The same in Python:
// python/pcp_mla/checks.py.
#pragma once
#include <algorithm>
#include <utility>

#include "view.h"

namespace pcp_mla {

// Where a tensor's elements lie: `run` bytes, repeated in each dimension.
struct Span {
  const char *begin = nullptr, *end = nullptr;  // equal: no elements
  int64_t run = 0;
  int dims = 0;
  int64_t sizes[kMaxDims] = {}, strides[kMaxDims] = {};  // strides in bytes

  Span() = default;
  Span(const void* data, int64_t bytes) : begin(static_cast<const char*>(data)), end(begin + bytes), run(bytes) {}

  Span& repeat(int64_t size, int64_t stride) {
    if (size == 0) run = 0;
    if (run == 0) {
      end = begin;
    } else if (size > 1 && stride > 0) {  // what is expanded lies in one place
      sizes[dims] = size;
      strides[dims++] = stride;
      end += (size - 1) * stride;
    }
    return *this;
  }

  // From the largest distance to the smallest.
  void sort() {
    for (int i = 1; i < dims; ++i) {
      for (int j = i; j > 0 && strides[j] > strides[j - 1]; --j) {
        std::swap(strides[j], strides[j - 1]);
        std::swap(sizes[j], sizes[j - 1]);
      }
    }
  }

  // Bytes from the first to the last of one element of the dimensions before the i-th.
  int64_t extent(int i) const {
    int64_t bytes = run;
    for (; i < dims; ++i) bytes += (sizes[i] - 1) * strides[i];
    return bytes;
  }
};

inline Span span_of(const View& v) {
  Span s(v.data, v.item);
  for (int i = 0; i < v.dims; ++i) s.repeat(v.sizes[i], v.strides[i] * v.item);
  return s;
}

// Whether parts of a and b, of the dimensions from i and from j on, meet where b's part begins `apart` bytes behind a's.
inline bool meet(const Span& a, int i, const Span& b, int j, int64_t apart) {
  if (apart >= a.extent(i) || -apart >= b.extent(j)) return false;
  if (i == a.dims && j == b.dims) return true;
  const int64_t step = std::max(i < a.dims ? a.strides[i] : 0, j < b.dims ? b.strides[j] : 0);
  const bool in_a = i < a.dims && a.strides[i] == step, in_b = j < b.dims && b.strides[j] == step;
  const int64_t before = in_a ? a.sizes[i] - 1 : 0, behind = in_b ? b.sizes[j] - 1 : 0;
  i += in_a;
  j += in_b;
  // Repetitions whose difference is n are apart + n * step: only these n can meet.
  const auto floor_div = [](int64_t x, int64_t y) { return x / y - (x % y < 0); };
  const int64_t first = std::max(-before, floor_div(-b.extent(j) - apart, step) + 1);
  const int64_t last = std::min(behind, floor_div(a.extent(i) - apart - 1, step));
  if (last - first >= 4) return true;  // distances of many kinds: not worth a closer look
  for (int64_t n = first; n <= last; ++n) {
    if (meet(a, i, b, j, apart + n * step)) return true;
  }
  return false;
}

inline bool share_memory(const Span& a, const Span& b) {
  if (a.end <= b.begin || b.end <= a.begin || a.begin == a.end || b.begin == b.end) return false;
  Span x = a, y = b;
  x.sort();
  y.sort();
  return meet(x, 0, y, 0, y.begin - x.begin);
}

}  // namespace pcp_mla
