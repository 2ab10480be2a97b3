// publish_latents: each row is read once and stored at its slot in every rank's cache, 16 bytes an access. Then every block tells
// every rank, and the first one waits for the blocks of all: when the kernel has ended, the rows of all ranks are here.
#include "../publish_latents.h"

#include <algorithm>

#include "../latent_cache.h"
#include "direct.h"
#include "latent_forms.cuh"
#include "meeting.cuh"

namespace pcp_mla::cuda {
namespace {

constexpr int kWarps = kMeetingWarps;
constexpr int64_t kWarpRows = 4;  // at most, of a warp at a time
constexpr int kLoads = 9;         // of a lane in flight: four rows of 576 two-byte numbers are nine accesses of 16 bytes

struct PublishParams : Meeting {
  const char *kv_c, *k_pe;
  int64_t kv_c_stride, k_pe_stride;  // bytes
  int32_t count, rows, warp_rows;    // rows there are; with pads, which become zeros
  uint32_t kv_c_accesses, accesses;  // of a row
  Divider per_row;
  const int64_t* of_rows;  // slots of this rank's rows; null: they lie one behind the other from `first` on
  int64_t first;
  CacheSlots slots;
  const float* scale;
  Everywhere to;

  // Offset of a row in a cache, -1 for none.
  __device__ int64_t place(int32_t row) const { return slots.offset(of_rows == nullptr ? first + row : of_rows[row]); }
};

template <typename Form>
__device__ void store_rows(const PublishParams& p) {
  using Outside = typename Form::Outside;
  using Cached = typename Form::Cached;
  constexpr int loads = sizeof(Outside) >= 16 ? kLoads : 2;
  const float scale = p.scale == nullptr ? 1.0f : *p.scale;
  const int lane = threadIdx.x % 32, step = gridDim.x * kWarps * p.warp_rows;
  for (int32_t first = (blockIdx.x * kWarps + threadIdx.x / 32) * p.warp_rows; first < p.rows; first += step) {
    const int32_t rows = min(p.warp_rows, p.rows - first);
    const int64_t place = lane < rows ? p.place(first + lane) : -1;
    const uint32_t total = rows * p.accesses;
    for (uint32_t base = lane; base - lane < total; base += 32 * loads) {
      Outside value[loads];
      int64_t at[loads];
#pragma unroll
      for (int u = 0; u < loads; ++u) {
        const uint32_t e = base + 32 * u, row = min(p.per_row.divide(e), static_cast<uint32_t>(rows - 1)), n = e - row * p.accesses;
        const int64_t of_row = __shfl_sync(~0u, place, row);
        at[u] = e < total && of_row >= 0 ? of_row + static_cast<int64_t>(n * sizeof(Cached)) : -1;
        if (at[u] < 0) continue;
        const int32_t number = first + static_cast<int32_t>(row);
        const char* from = n < p.kv_c_accesses ? p.kv_c + number * p.kv_c_stride + n * sizeof(Outside)
                                               : p.k_pe + number * p.k_pe_stride + (n - p.kv_c_accesses) * sizeof(Outside);
        value[u] = number < p.count ? *reinterpret_cast<const Outside*>(from) : Outside{};
      }
#pragma unroll
      for (int u = 0; u < loads; ++u) {
        if (at[u] < 0) continue;
        const Cached cached = Form::to_cache(value[u], scale);
        for (int r = 0; r < p.world; ++r) *reinterpret_cast<Cached*>(p.to.of[r] + at[u]) = cached;
      }
    }
  }
}

template <typename Form>
__global__ void __launch_bounds__(kMeetingThreads, 2) publish_latents_kernel(const __grid_constant__ PublishParams p) {
  if (p.world == 1) return store_rows<Form>(p);
  meet(p, [&] { store_rows<Form>(p); });
}

template <typename Form>
void launch_form(PublishParams& p, const Kind& kind, int64_t width, int64_t kv_c_width, int64_t elements, unsigned grid) {
  p.kv_c_accesses = static_cast<uint32_t>(kv_c_width / elements);
  p.accesses = static_cast<uint32_t>(width / elements);
  check(p.accesses < (1u << 20), "publish_latents: a row must be smaller than 2**20 accesses");
  p.per_row = Divider(p.accesses);
  launch(publish_latents_kernel<Form>, grid, kMeetingThreads, kind, p);
}

void check_latents(const Mailbox& mailbox, const View& kv_c, const View& k_pe) {
  const bool fit = kv_c.dims == 2 && k_pe.dims == 2 && kv_c.sizes[0] == k_pe.sizes[0] && kv_c.sizes[1] == mailbox.kv_lora_rank &&
                   k_pe.sizes[1] == mailbox.rope;
  check(fit, "publish_latents: kv_c and k_pe must be [tokens, ", mailbox.kv_lora_rank, "] and [tokens, ", mailbox.rope, "]");
  check(kv_c.kind.dtype == mailbox.dtype && k_pe.kind.dtype == mailbox.dtype && kv_c.kind.same_device(k_pe.kind) &&
            kv_c.kind.device_type == kCudaDevice && kv_c.kind.device_index == mailbox.device,
        "publish_latents: kv_c and k_pe must be of the exchange's dtype, on its GPU ", mailbox.device);
  check((kv_c.strides[1] == 1 || kv_c.sizes[1] == 1) && (k_pe.strides[1] == 1 || k_pe.sizes[1] == 1),
        "publish_latents: kv_c and k_pe must have a contiguous last dimension");
}

bool is_attached(const AttachedCache& a, const View& c) {
  bool same = a.dtype == c.kind.dtype && a.dims == c.dims;
  for (int i = 0; same && i < c.dims; ++i) same = a.sizes[i] == c.sizes[i] && a.strides[i] == c.strides[i];
  return same;
}

void set_staging(PublishParams& p, const Mailbox& mailbox, const PublishCall& call, int64_t width) {
  const int64_t row = width * call.kv_c.item, all = int64_t{mailbox.world} * call.padded;
  check(all * row <= mailbox.staging_bytes, "publish_latents: the exchange has no room for ", call.padded, " tokens a rank");
  p.to = mailbox.staging;
  p.first = call.first;
  p.slots = {all, 1, row, 0};
  p.rows = static_cast<int32_t>(call.padded);
}

// Where rows go: to `call.cache` in all ranks, if all have opened one another's, else to the staging buffers.
Published set_places(PublishParams& p, const Mailbox& mailbox, const PublishCall& call, int64_t width) {
  if (call.cache == nullptr) {
    set_staging(p, mailbox, call, width);
    p.what = words_of(-1, call.padded);
    return Published::kStaging;
  }
  constexpr const char* op = "publish_latents";
  const View& c = *call.cache;
  p.slots = cache_slots(op, c, call.kv_c.kind, width, call.scale);
  for (int i = 0; i < c.dims - 1; ++i) check(c.sizes[i] <= 1 || c.strides[i] != 0, op, ": cache must not be expanded");
  check(call.slot_mapping != nullptr, op, ": slot_mapping must be given with a cache");
  const View& slots = *call.slot_mapping;
  const int64_t length = int64_t{mailbox.world} * call.padded;
  const int64_t* listed = list_of<int64_t>(op, "slot_mapping", slots, length, call.kv_c.kind, "the cache");
  const Span written = span_of(c);
  for (const View* other : {&call.kv_c, &call.k_pe, &slots}) check_apart(op, "cache", written, "what is read", span_of(*other));
  const bool local = call.alone || mailbox.world == 1;
  const auto known = mailbox.caches.find(c.data);
  if (!local && known == mailbox.caches.end()) {
    set_staging(p, mailbox, call, width);
    p.what = words_of(-2, call.padded);
    return Published::kStaging;
  }
  if (local) {
    p.to.of[0] = c.data;
  } else {
    check(is_attached(known->second, c), "publish_latents: cache must have the shape, strides and dtype that it was attached with");
    p.to = known->second.at;
    p.what = words_of(known->second.number, call.padded);
  }
  p.scale = call.scale == nullptr ? nullptr : reinterpret_cast<const float*>(call.scale->data);
  p.of_rows = listed + (call.alone ? 0 : call.first);
  return Published::kCache;
}

// The widest accesses that all addresses and strides allow, which may be others on another rank.
void launch_rows(PublishParams& p, const Mailbox& mailbox, const PublishCall& call, int64_t width) {
  const View& kv_c = call.kv_c;
  // The grid, though, is the same on all ranks, whatever rows they have.
  const int64_t rows = std::max<int64_t>(p.world == 1 ? p.rows : call.padded, 1);
  p.warp_rows = static_cast<int32_t>(std::clamp<int64_t>(rows / (int64_t{mailbox.max_blocks} * kWarps), 1, kWarpRows));
  const unsigned grid = std::min<int64_t>(blocks(rows, p.warp_rows * kWarps), mailbox.max_blocks);
  const int64_t kv_c_width = kv_c.sizes[1], item = kv_c.item;
  uint64_t outside = p.kv_c_stride | p.k_pe_stride | reinterpret_cast<uintptr_t>(p.kv_c) | reinterpret_cast<uintptr_t>(p.k_pe);
  uint64_t cached = p.slots.block_stride | p.slots.row_stride;
  for (int r = 0; r < p.world; ++r) cached |= reinterpret_cast<uintptr_t>(p.to.of[r]);
  if (p.scale == nullptr) {
    const uint64_t bits = outside | cached | kv_c_width * item | width * item | 16;
    with_access(static_cast<int>(bits & (~bits + 1)), [&](auto vec) {
      launch_form<Copy<decltype(vec)>>(p, kv_c.kind, width * item, kv_c_width * item, sizeof(vec), grid);
    });
    return;
  }
  const auto scaled = [&](auto type) {
    using T = decltype(type);
    constexpr int n = 8;
    if ((kv_c_width | width | cached) % n == 0 && outside % std::min<size_t>(16, n * sizeof(T)) == 0) {
      return launch_form<Scaled<T, n>>(p, kv_c.kind, width, kv_c_width, n, grid);
    }
    launch_form<Scaled<T, 1>>(p, kv_c.kind, width, kv_c_width, 1, grid);
  };
  if (kv_c.kind.dtype == kBFloat16) return scaled(__nv_bfloat16{});
  if (kv_c.kind.dtype == kFloat16) return scaled(__half{});
  scaled(float{});
}

void publish(Mailbox& mailbox, const PublishCall& call, Published& where) {
  const View &kv_c = call.kv_c, &k_pe = call.k_pe;
  check_alive("publish_latents", mailbox);
  check_latents(mailbox, kv_c, k_pe);
  const int64_t width = kv_c.sizes[1] + k_pe.sizes[1], count = kv_c.sizes[0];
  check((count == call.tokens || count == call.local_rows) && count <= call.padded && call.first >= 0 &&
            call.padded <= INT32_MAX / 2 && width * kv_c.item <= INT32_MAX,
        "publish_latents: kv_c must have ", call.tokens, " rows, got ", count);
  PublishParams p{};
  p.kv_c = kv_c.data;
  p.k_pe = k_pe.data;
  p.kv_c_stride = kv_c.strides[0] * kv_c.item;
  p.k_pe_stride = k_pe.strides[0] * k_pe.item;
  p.count = p.rows = static_cast<int32_t>(count);
  where = set_places(p, mailbox, call, width);
  set_meeting(p, mailbox);
  if (call.alone) p.world = 1;
  if (call.alone && where == Published::kStaging) p.to.of[0] = p.to.of[mailbox.rank], p.first = 0;
  const DeviceGuard guard(kv_c.kind);
  if (mailbox.world > 1) {
    const uint64_t capture = follow(mailbox, kv_c.kind);
    p.wait_first = must_wait(mailbox, p.to.of[call.alone ? 0 : mailbox.rank], call, capture);
  }
  if (p.world == 1 && p.rows == 0) return;

  launch_rows(p, mailbox, call, width);
}

}  // namespace

void add_publish_latents(DirectOps& ops) { ops.publish_latents = directly<publish, Mailbox&, const PublishCall&, Published&>; }

}  // namespace pcp_mla::cuda
