// A tensor without torch: what a call looks at. Filled from a stable tensor (checks.h) or, past the dispatcher, from DLPack
// (direct/bindings.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

namespace pcp_mla {

// The numbers of torch's dtypes and devices, which its stable ABI keeps; checks.h compares them with torch's own.
constexpr int32_t kUInt8 = 0, kInt32 = 3, kInt64 = 4, kFloat16 = 5, kFloat32 = 6, kBFloat16 = 15, kFloat8E4M3 = 24;
constexpr int32_t kCudaDevice = 1;

struct Kind {
  int32_t dtype, device_type, device_index;
  bool same_device(const Kind& other) const { return device_type == other.device_type && device_index == other.device_index; }
};

constexpr int kMaxDims = 4;

struct View {
  char* data;
  Kind kind;
  int32_t dims, item;  // item: bytes of an element
  int64_t sizes[kMaxDims], strides[kMaxDims];

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= sizes[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = dims - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= sizes[i];
    }
    return true;
  }
};

}  // namespace pcp_mla
