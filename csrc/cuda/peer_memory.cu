// Memory that the ranks of one host see of one another, by CUDA's handles between processes, and the mailboxes of publish_latents
// in it. Called through ctypes (python/pcp_mla/exchange/peer_memory.py), once for each exchange and cache. All return null or what
// was wrong, which lasts until the thread's next call.
#include <cstring>
#include <sstream>

#include "../publish_latents.h"
#include "direct.h"
#include "driver.h"
#include "vec.cuh"

namespace pcp_mla::cuda {
namespace {

Kind on(int32_t device) { return {kUInt8, kCudaDevice, device}; }

// Zeros, in an allocation of their own: another allocator's may not be what other processes can open.
void allocate(int32_t device, uint64_t bytes, void** at) {
  const DeviceGuard guard(on(device));
  check_cuda(cudaMalloc(at, bytes));
  check_cuda(cudaMemset(*at, 0, bytes));
  check_cuda(cudaDeviceSynchronize());
}

void release(int32_t device, void* at) {
  const DeviceGuard guard(on(device));
  check_cuda(cudaFree(at));
}

// A handle of the allocation in which `at` lies, and where in it.
void export_memory(int32_t device, const void* at, cudaIpcMemHandle_t* handle, uint64_t* offset) {
  static const auto range_of = driver_function<decltype(cuMemGetAddressRange)>("cuMemGetAddressRange");
  const DeviceGuard guard(on(device));
  check_cuda(cudaFree(nullptr));  // makes the context current in this thread
  CUdeviceptr base = 0;
  size_t bytes = 0;
  const auto address = reinterpret_cast<CUdeviceptr>(at);
  check(range_of(&base, &bytes, address) == CUDA_SUCCESS, "memory at ", at, " is not of a CUDA allocation");
  check_cuda(cudaIpcGetMemHandle(handle, reinterpret_cast<void*>(base)));
  *offset = address - base;
}

void import_memory(int32_t device, const cudaIpcMemHandle_t* handle, void** base) {
  const DeviceGuard guard(on(device));
  check_cuda(cudaIpcOpenMemHandle(base, *handle, cudaIpcMemLazyEnablePeerAccess));
}

void close_memory(int32_t device, void* base) {
  const DeviceGuard guard(on(device));
  check_cuda(cudaIpcCloseMemHandle(base));
}

__global__ void store_kernel(uint64_t* at, uint64_t value) { *at = value; }

// A store by a kernel, done when it returns.
void store(int32_t device, uint64_t* at, uint64_t value) {
  const DeviceGuard guard(on(device));
  store_kernel<<<1, 1>>>(at, value);
  check_cuda(cudaGetLastError());
  check_cuda(cudaDeviceSynchronize());
}

void load(int32_t device, const uint64_t* at, uint64_t* value) {
  const DeviceGuard guard(on(device));
  check_cuda(cudaMemcpy(value, at, sizeof(*value), cudaMemcpyDeviceToHost));
}

// What is given: all of a mailbox that does not begin as it is.
struct MailboxForm {
  int32_t device, rank, world, max_blocks, dtype, kv_lora_rank, rope;
  uint64_t timeout_ns, flag_bytes, staging_bytes;
  char* memory[kMaxPeers];  // of each rank: flags, then its staging buffer
};

void make_mailbox(const MailboxForm* form, Mailbox** made) {
  const MailboxForm& f = *form;
  check(f.world >= 1 && f.world <= kMaxPeers && f.rank >= 0 && f.rank < f.world, "a mailbox must be of at most ", kMaxPeers,
        " ranks, got rank ", f.rank, " of ", f.world);
  check(f.max_blocks >= 1 && f.max_blocks <= kMaxPublishBlocks, "a kernel must have 1 to ", kMaxPublishBlocks, " blocks, got ",
        f.max_blocks);
  check(f.flag_bytes >= sizeof(Flags), "flags need ", sizeof(Flags), " bytes, got ", f.flag_bytes);
  const DeviceGuard guard(on(f.device));
  PeerStatus* status = nullptr;
  check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&status), sizeof(PeerStatus), cudaHostAllocPortable | cudaHostAllocMapped));
  std::memset(status, 0, sizeof(PeerStatus));
  auto* box = new Mailbox{f.device, f.rank, f.world, f.max_blocks, f.dtype, f.kv_lora_rank, f.rope, f.timeout_ns};
  for (int r = 0; r < f.world; ++r) {
    box->flags[r] = reinterpret_cast<Flags*>(f.memory[r]);
    box->staging.of[r] = f.memory[r] + f.flag_bytes;
  }
  box->staging_bytes = static_cast<int64_t>(f.staging_bytes);
  box->status = status;
  *made = box;
}

// `form`: dtype, dimensions, sizes, strides.
void attach(Mailbox* box, char* const* of, const int64_t* form) {
  AttachedCache cache{};
  std::copy(of, of + box->world, cache.at.of);
  cache.number = box->attached++;
  cache.dtype = static_cast<int32_t>(form[0]);
  cache.dims = static_cast<int32_t>(form[1]);
  std::copy(form + 2, form + 2 + cache.dims, cache.sizes);
  std::copy(form + 2 + cache.dims, form + 2 + 2 * cache.dims, cache.strides);
  box->caches[of[box->rank]] = cache;
}

// Which call failed, and by which ranks; empty where none did.
const char* failure(const Mailbox* box) {
  thread_local std::string text;
  const volatile PeerStatus& s = *box->status;
  std::ostringstream words;
  if (s.failed != 0) {
    words << "call " << s.epoch << " of rank " << box->rank;
    const char* before = ": ";
    for (int r = 0; r < box->world; ++r) {
      if (s.how[r] == 0) continue;
      words << before << "rank " << r;
      if (s.how[r] == PeerStatus::kMissing) {
        words << " did not come within " << static_cast<double>(box->timeout_ns) / 1e9 << " s (its last call: " << s.seen[r] << ")";
      } else {
        words << " made a different call";
      }
      before = ", ";
    }
  }
  text = words.str();
  return text.c_str();
}

void free_mailbox(Mailbox* box) {
  if (box->event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(box->event));
  cudaFreeHost(box->status);
  cudaGetLastError();  // of a context that has ended
  delete box;
}

}  // namespace
}  // namespace pcp_mla::cuda

#define PCP_EXPORT extern "C" __attribute__((visibility("default")))

PCP_EXPORT const char* pcp_mla_peer_allocate(int32_t device, uint64_t bytes, void** at) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::allocate>(device, bytes, at);
}
PCP_EXPORT const char* pcp_mla_peer_release(int32_t device, void* at) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::release>(device, at);
}
PCP_EXPORT const char* pcp_mla_peer_export(int32_t device, const void* at, cudaIpcMemHandle_t* handle, uint64_t* offset) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::export_memory>(device, at, handle, offset);
}
PCP_EXPORT const char* pcp_mla_peer_import(int32_t device, const cudaIpcMemHandle_t* handle, void** base) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::import_memory>(device, handle, base);
}
PCP_EXPORT const char* pcp_mla_peer_close(int32_t device, void* base) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::close_memory>(device, base);
}
PCP_EXPORT const char* pcp_mla_peer_store(int32_t device, uint64_t* at, uint64_t value) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::store>(device, at, value);
}
PCP_EXPORT const char* pcp_mla_peer_load(int32_t device, const uint64_t* at, uint64_t* value) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::load>(device, at, value);
}
PCP_EXPORT const char* pcp_mla_mailbox_make(const pcp_mla::cuda::MailboxForm* form, pcp_mla::Mailbox** made) {
  return pcp_mla::cuda::directly<pcp_mla::cuda::make_mailbox>(form, made);
}
PCP_EXPORT void pcp_mla_mailbox_attach(pcp_mla::Mailbox* box, char* const* of, const int64_t* form) {
  pcp_mla::cuda::attach(box, of, form);
}
PCP_EXPORT const char* pcp_mla_mailbox_failure(const pcp_mla::Mailbox* box) { return pcp_mla::cuda::failure(box); }
PCP_EXPORT void pcp_mla_mailbox_free(pcp_mla::Mailbox* box) { pcp_mla::cuda::free_mailbox(box); }
