// pcp_attention on sm_90: which calls the kernel takes, and its launch.
#include <mutex>
#include <unordered_map>

#include "attention.cuh"
#include "direct.h"
#include "driver.h"

namespace pcp_mla::cuda {
namespace {

constexpr uint32_t kMaxItems = 1u << 30, kMaxGroup = 16;

// As a tensor copy sees [tokens, heads, width]: boxes of a slab's columns of some tokens of one head.
CUtensorMap map_of(const char* name, const Ragged& x, int tokens_of_box) {
  const cuuint64_t sizes[3] = {uint64_t(x.dim), uint64_t(x.tokens), uint64_t(x.heads)};
  // The stride of a dimension of one may be anything, and 0 makes no map.
  const int64_t width = (x.width + 15) / 16 * 16;
  const cuuint64_t strides[2] = {uint64_t(x.tokens > 1 ? x.token_stride : width), uint64_t(x.heads > 1 ? x.head_stride : width)};
  const cuuint32_t box[3] = {kSlab, cuuint32_t(tokens_of_box), 1};
  return encode<3>(name, x.kind, x.data, sizes, strides, box);
}

// Heads to take at a time, a divisor of all: few, so that many tiles read the same keys while these are in L2, but enough that
// there is work for each processor twice.
uint32_t head_group(uint32_t heads, uint64_t items, uint32_t processors) {
  while (heads % 2 == 0 && (heads > kMaxGroup || heads / 2 * items >= 2 * processors)) heads /= 2;
  return heads;
}

// Counts of tiles that are drawn, all 0 between calls. Calls that may run at the same time must not share one: each stream has its
// own, and so has each call that is captured, as its graph may be replayed beside anything. Null where there are no more.
constexpr uint32_t kStreamCounts = 4096, kCounts = 1 << 16;
__device__ uint32_t counts[kCounts];

uint32_t* count_for(int device, cudaStream_t stream) {
  struct Taken {
    uint32_t* first = nullptr;
    std::unordered_map<unsigned long long, uint32_t> of_stream;
    uint32_t captured = kStreamCounts;
  };
  static std::mutex mutex;
  static Taken taken[kMaxDevices];
  cudaStreamCaptureStatus status{};
  check_cuda(cudaStreamIsCapturing(stream, &status));
  const std::lock_guard lock(mutex);
  Taken& t = taken[device];
  if (t.first == nullptr) check_cuda(cudaGetSymbolAddress(reinterpret_cast<void**>(&t.first), counts));
  if (status != cudaStreamCaptureStatusNone) return t.captured < kCounts ? t.first + t.captured++ : nullptr;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetId(stream, &id));
  const auto known = t.of_stream.find(id);
  if (known != t.of_stream.end()) return t.first + known->second;
  if (t.of_stream.size() == kStreamCounts) return nullptr;
  return t.first + t.of_stream.emplace(id, static_cast<uint32_t>(t.of_stream.size())).first->second;
}

template <typename T, typename Shape>
void launch(const Attention& a) {
  const DeviceGuard guard(a.kind);
  const int device = a.kind.device_index;
  constexpr auto kernel = attention_kernel<T, Shape>;
  allow_shared_memory<kernel>("pcp_attention", device, Shape::bytes);

  AttentionCall c{};
  c.rows = {a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_k, static_cast<int32_t>(a.rows), a.causal, a.in_place};
  const uint64_t items = (a.q.tokens + kQueries - 1) / kQueries + a.rows;  // no row has more than one tile that is not full
  check(items * a.q.heads <= kMaxItems, "pcp_attention: there must be at most ", kMaxItems, " tiles of queries, got ",
        items * a.q.heads);
  c.items = static_cast<uint32_t>(items);
  c.tiles = static_cast<uint32_t>(items * a.q.heads);
  const uint32_t processors = static_cast<uint32_t>(device_attribute(cudaDevAttrMultiProcessorCount, device));
  c.head_group = head_group(static_cast<uint32_t>(a.q.heads), items, processors);
  c.k_slabs = static_cast<uint32_t>((a.k.dim + kSlab - 1) / kSlab);
  c.scale = a.softmax_scale * 1.4426950408889634f;
  c.prev_out = a.prev_out.data;
  c.prev_token = a.prev_out.token_stride;
  c.prev_head = a.prev_out.head_stride;
  c.prev_lse = a.prev_lse;
  c.out = a.out.data;
  c.out_token = a.out.token_stride;
  c.out_head = a.out.head_stride;
  c.lse = a.lse;
  AttentionMaps maps{};
  maps.q = map_of("q", a.q, kQueries);
  const bool listed = a.kv_rows != nullptr;
  if (listed) {
    const int64_t last = a.rope > 0 ? a.rope : a.k.dim - (c.k_slabs - 1) * kSlab;
    c.listed = {a.kv_rows,       a.k.data,      a.k_pe,           a.v.data,        a.k.token_stride,
                a.k.head_stride, a.k_pe_stride, a.v.token_stride, a.v.head_stride, static_cast<uint32_t>(last / 8)};
  }
  const uint32_t rows = listed ? Shape::keys / kGroupWarps : Shape::keys;  // of a tensor copy
  if (a.k.tokens > 0) {                                                    // else there is no map, and no row has a key
    maps.k = map_of("k", a.k, rows);
    maps.v = map_of("v", a.v, rows);
  }
  if (a.k_pe != nullptr && a.k.tokens > 0) {
    const cuuint64_t sizes[2] = {uint64_t(a.rope), uint64_t(a.k.tokens)},
                     strides[1] = {uint64_t(a.k.tokens > 1 ? a.k_pe_stride : kRowBytes)};
    const cuuint32_t box[2] = {kSlab, rows};
    maps.k_pe = encode<2>("k_pe", a.kind, a.k_pe, sizes, strides, box);
  }
  const cudaStream_t stream = current_stream(a.kind);
  uint32_t blocks = c.tiles;
  if (blocks > processors && !listed) {
    c.drawn = count_for(device, stream);
    if (c.drawn != nullptr) blocks = processors;
  }
  kernel<<<blocks, kAttentionThreads, Shape::bytes, stream>>>(c, maps);
  check_cuda(cudaGetLastError());
}

using Launch = void (*)(const Attention&);

template <typename T>
Launch launch_for(int64_t q_width, int64_t v_width) {
  const int64_t slabs = (q_width + kSlab - 1) / kSlab;
  if (slabs == 2 && q_width <= 96 && v_width == 64) return launch<T, AttentionShape<2, 64, 128, 96>>;
  if (slabs == 2 && v_width == 64) return launch<T, AttentionShape<2, 64, 128>>;
  if (slabs == 2 && v_width == 128) return launch<T, AttentionShape<2, 128, 128>>;
  if (slabs == 3 && v_width == 128) return launch<T, AttentionShape<3, 128, 128>>;
  if (slabs == 4 && v_width == 256) return launch<T, AttentionShape<4, 256, 64>>;
  return nullptr;
}

// Rows or heads that lie in one place, of which there is no tensor map.
bool is_expanded(const Ragged& x) { return (x.tokens > 1 && x.token_stride == 0) || (x.heads > 1 && x.head_stride == 0); }

bool is_aligned(const Attention& a) {
  uint64_t bits = a.k_pe_stride | reinterpret_cast<uintptr_t>(a.k_pe);
  for (const Ragged* x : {&a.q, &a.k, &a.v, &a.out, &a.prev_out}) {
    bits |= x->token_stride | x->head_stride | reinterpret_cast<uintptr_t>(x->data);
  }
  return bits % 16 == 0;
}

// What the kernel does not take of a call, null if it takes it all. The same in python/pcp_mla/ops/attention/support.py.
const char* refusal(const Attention& a, Launch* found) {
  if (a.kind.dtype != kBFloat16 && a.kind.dtype != kFloat16) return "it needs bfloat16 or float16";
  if (a.rope > 0 && (a.k.dim % kSlab != 0 || a.rope > kSlab || a.rope % 8 != 0)) {
    return "k beside k_pe must be a multiple of 64 wide, and k_pe one of 8, at most 64";
  }
  *found = a.kind.dtype == kFloat16 ? launch_for<__half>(a.q.dim, a.v.dim) : launch_for<__nv_bfloat16>(a.q.dim, a.v.dim);
  if (*found == nullptr) return "its widths of q and v are 65 to 128 and 64, 65 to 192 and 128, and 193 to 256 and 256";
  if (a.q.dim % 8 != 0 || !is_aligned(a)) return "rows and heads must lie at multiples of 16 bytes";
  if (std::max({a.q.tokens, a.k.tokens, a.keys}) > INT32_MAX - 256) return "there must be less than 2**31 tokens";
  if (is_expanded(a.k) || is_expanded(a.v) || is_expanded(a.q)) return "q, k and v must not be expanded";
  if (a.k_pe != nullptr && a.k.tokens > 1 && a.k_pe_stride == 0) return "k_pe must not be expanded";
  if (a.kind.device_type != kCudaDevice || !is_hopper(a.kind)) return "it needs a GPU of compute capability 9.0";
  return nullptr;
}

void run(const Attention& a, Launch launch) {
  if (a.q.tokens > 0 && a.rows > 0) launch(a);
}

void attention_wgmma(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_pe,
                     const std::optional<Tensor>& kv_rows, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                     const Tensor& seqused_k, const std::optional<Tensor>& prev_out, const std::optional<Tensor>& prev_lse,
                     double softmax_scale, bool causal, const Tensor& out, const std::optional<Tensor>& lse) {
  const View views[] = {view_of(q),         view_of(k),  view_of(v), view_of(cu_seqlens_q), view_of(cu_seqlens_k),
                        view_of(seqused_k), view_of(out)};
  const OptionalView pe(k_pe), listed(kv_rows), po(prev_out), pl(prev_lse), l(lse);
  const Attention a(
      {views[0], views[1], views[2], pe, listed, views[3], views[4], views[5], po, pl, softmax_scale, causal, views[6], l});
  Launch launch = nullptr;
  const char* wrong = refusal(a, &launch);
  check(wrong == nullptr, "pcp_attention: the CUDA kernel does not take this: ", wrong);
  run(a, launch);
}

const char* chosen(const AttentionArguments& arguments) {
  const Attention a(arguments);
  Launch launch = nullptr;
  if (const char* wrong = refusal(a, &launch)) return wrong;
  run(a, launch);
  return nullptr;
}

}  // namespace

void add_attention(DirectOps& ops) { ops.attention = directly<chosen>; }

}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) { m.impl("attention_wgmma", TORCH_BOX(&pcp_mla::cuda::attention_wgmma)); }
