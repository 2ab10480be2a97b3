// What launches ask about a GPU, and what they need of the driver itself. Its functions are looked up through the runtime: nothing
// is linked to its library, so that the package can be loaded where there is none.
#pragma once
#include <cuda.h>

#include <mutex>

#include "vec.cuh"

namespace pcp_mla::cuda {

constexpr int kMaxDevices = 64;

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline bool is_hopper(const Kind& kind) { return device_attribute(cudaDevAttrComputeCapabilityMajor, kind.device_index) == 9; }

// Lets a kernel have up to so many bytes of dynamic shared memory, the same in all calls of a device: set once for each, as threads
// that set it to what their own launches want would take it from one another.
template <auto kKernel>
void allow_shared_memory(const char* op, int device, int bytes) {
  static std::once_flag done[kMaxDevices];
  check(device < kMaxDevices, op, ": there must be at most ", kMaxDevices, " GPUs, got number ", device);
  std::call_once(done[device],
                 [bytes] { check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)); });
}

// A function of the driver as of CUDA 12.0: driver_function<decltype(cuFunction)>("cuFunction").
template <typename Function>
Function* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
  check(found == cudaDriverEntryPointSuccess, "pcp_mla: the driver has no ", name);
  return reinterpret_cast<Function*>(function);
}

// The map by which the copy engine moves boxes of a tensor, bfloat16 or float16 (of `kind`), to and from shared memory, where rows
// of 128 bytes are swizzled as hopper.cuh has it. Dimensions are named from the innermost one on, whose numbers lie together, so
// that its stride is not given; the others are in bytes, multiples of 16, as is the address. Outside of the tensor there are zeros.
template <int kDims>
CUtensorMap encode(const char* what, const Kind& kind, const void* data, const cuuint64_t (&sizes)[kDims],
                   const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims]) {
  static_assert(kDims >= 2 && kDims <= 5);
  static const auto encode_tiled = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  cuuint32_t steps[kDims];
  std::fill_n(steps, kDims, 1);
  const auto type = kind.dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const auto fill = [&] {
    return encode_tiled(&map, type, kDims, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = fill();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread's first call: the driver, unlike the runtime, makes no context current
    check_cuda(cudaSetDevice(kind.device_index));
    result = fill();
  }
  check(result == CUDA_SUCCESS, "pcp_mla: no tensor map for ", what, ", error ", static_cast<int>(result));
  return map;
}

}  // namespace pcp_mla::cuda
