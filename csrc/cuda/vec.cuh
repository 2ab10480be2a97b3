// Row copies: tiles of rows moved in accesses of up to 16 bytes, many in flight, each row to a place that was looked up once.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>

#include "../checks.h"

namespace pcp_mla::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;        // independent loads of a thread
constexpr int kMaxTileRows = 32;  // rows of a block: one thread each looks its place up
constexpr int64_t kTileBytes = 16 << 10;
constexpr int kBlocksPerSm = 8;  // all threads that an SM holds: caps registers at 32

// Null for none. CUDA would tell it again to whoever asks after the next launch, which has nothing to do with it.
inline const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

inline void check_cuda(cudaError_t error) {
  const char* text = text_of(error);
  check(text == nullptr, "pcp_mla: CUDA error: ", text);
}

inline cudaStream_t current_stream(const Kind& kind) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(kind.device_index, &stream) == 0, "pcp_mla: no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Restores the caller's device; costs nothing where it is current already. torch's guard does it: going back to a GPU that was
// never used would make a context there, some hundreds of MB, and torch only notes that it is the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Kind& kind) {
    const int32_t device = kind.device_index;
    int before = -1;
    check_cuda(cudaGetDevice(&before));
    if (before != device) check(aoti_torch_create_cuda_guard(device, &guard_) == 0, "pcp_mla: no CUDA device ", device);
  }
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_cuda_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardHandle guard_ = nullptr;
};

// Division by a number known at launch: one multiplication instead of some twenty instructions. Exact for 0 <= n < 2^31
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994).
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

// A [rows, heads, width] side of a copy, in accesses of sizeof(Vec) bytes. Heads without gaps count as one.
struct Rows {
  const char* data;
  int64_t row_stride, head_stride;  // bytes
  uint32_t vecs;                    // of a row
  Divider per_row, per_head;

  Rows() = default;
  Rows(const Ragged& r, int vec_bytes) : data(r.data), row_stride(r.token_stride), head_stride(r.head_stride) {
    const int64_t row_bytes = r.heads * r.width;
    check(row_bytes / vec_bytes < (int64_t{1} << 25), "pcp_mla: a row must be smaller than 2**25 accesses, got ", row_bytes,
          " bytes");
    vecs = static_cast<uint32_t>(row_bytes / vec_bytes);
    per_row = Divider(std::max(vecs, 1u));
    const bool gapless = head_stride == r.width;
    per_head = gapless ? per_row : Divider(std::max(static_cast<uint32_t>(r.width / vec_bytes), 1u));
  }

  // Offset in a strided row of its c-th access.
  template <typename Vec>
  __device__ int64_t offset(uint32_t c) const {
    const uint32_t head = per_head.divide(c);
    return head * head_stride + int64_t{c - head * per_head.divisor} * sizeof(Vec);
  }
};

// The widest access, 1 to 16 bytes, that every address and stride of these tensors, and the outputs' addresses, allow.
inline int access_bytes(std::initializer_list<const Ragged*> tensors, uintptr_t outputs) {
  uint64_t bits = 16 | outputs;
  for (const Ragged* t : tensors) {
    bits |= reinterpret_cast<uintptr_t>(t->data) | t->width;
    if (t->tokens > 1) bits |= t->token_stride;
    if (t->heads > 1) bits |= t->head_stride;
  }
  return static_cast<int>(bits & (~bits + 1));
}

// Rows of a block: enough bytes to keep loads in flight, few enough to fill the GPU.
inline int tile_rows(int64_t row_bytes, int64_t rows) {
  const int64_t by_size = kTileBytes / std::max<int64_t>(row_bytes, 1);
  const int64_t by_count = rows / 512;
  return static_cast<int>(std::clamp<int64_t>(std::min(by_size, by_count), 1, kMaxTileRows));
}

inline unsigned blocks(int64_t rows, int tile) { return static_cast<unsigned>((rows + tile - 1) / tile); }

// A block's accesses 0 ... total - 1, each loaded and then stored: a thread has kUnroll loads in flight. load(e, value) may leave
// the value as it is where store(e, value) wants none.
template <typename Value, typename Load, typename Store>
__device__ __forceinline__ void move_accesses(uint32_t total, const Load& load, const Store& store) {
  for (uint32_t base = threadIdx.x; base < total; base += kThreads * kUnroll) {
    Value value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t e = base + u * kThreads;
      if (e >= total) break;
      load(e, value[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t e = base + u * kThreads;
      if (e >= total) break;
      store(e, value[u]);
    }
  }
}

// One launch, on the device of `kind` and its current stream.
template <typename Params>
void launch(void (*kernel)(Params), unsigned grid, int threads, const Kind& kind, const Params& params) {
  const DeviceGuard guard(kind);
  kernel<<<grid, threads, 0, current_stream(kind)>>>(params);
  check_cuda(cudaGetLastError());
}

// Calls fn with a value of the type to copy in.
template <typename Fn>
void with_access(int bytes, const Fn& fn) {
  switch (bytes) {
    case 16: return fn(uint4{});
    case 8: return fn(uint2{});
    case 4: return fn(uint32_t{});
    case 2: return fn(uint16_t{});
    default: return fn(uint8_t{});
  }
}

}  // namespace pcp_mla::cuda
