// kv_up_project on sm_90: schedule and launch of the kernel.
#include "direct.h"
#include "driver.h"
#include "kv_up_project.cuh"

namespace pcp_mla::cuda {
namespace {

constexpr uint32_t kMaxChosenRank = 512;  // wider ones leave too few stages: Triton's kernel is chosen then

CUtensorMap weight_map(const UpProject& u) {
  return encode("the weight of kv_up_project", u.kind, u.weight, {u.rank, uint64_t{u.heads} * (u.nope + u.v_dim)},
                {static_cast<uint64_t>(u.weight_stride)}, {kSlab, kColumns});
}

// In how many shares to take the tiles of columns: the fewest rounds of all blocks, each with the time of its tiles and some for
// the first latents.
uint32_t shares_of(uint32_t row_tiles, uint32_t column_tiles, uint32_t blocks) {
  constexpr double load = 1.4;  // in times of a tile
  uint32_t best = 1;
  double least = 1e30;
  for (uint32_t shares = 1; shares <= column_tiles / 2; ++shares) {
    const double rounds = static_cast<double>((uint64_t{row_tiles} * shares + blocks - 1) / blocks);
    if (rounds * (2 + load) >= least) break;  // more shares take no fewer rounds
    const double time = rounds * ((column_tiles + shares - 1) / shares + load);
    if (time < least) {
      least = time;
      best = shares;
    }
  }
  return best;
}

template <typename T, bool kFloat8Latents>
void launch(const UpProject& u) {
  const DeviceGuard guard(u.kind);
  const int device = u.kind.device_index;
  const uint32_t processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - static_cast<int>(sizeof(Barriers));
  Schedule s{};
  s.slabs = u.rank / kSlab;
  s.all_slabs = s.slabs + (u.rope > 0);
  const int fixed = static_cast<int>(kAtomBytes + s.all_slabs * kSlabBytes), stage = kStageBytes;
  s.stages = std::clamp((limit - fixed) / stage, 0, kMaxStages);
  check(s.all_slabs <= kMaxSlabs && s.stages >= 3, "kv_up_project: kv_lora_rank ", u.rank,
        " needs more shared memory than there is");
  s.row_tiles = (u.written + kRows - 1) / kRows;
  s.column_tiles = std::max(2u, (u.heads * (u.nope + u.v_dim) + kColumns - 1) / kColumns);
  s.shares = shares_of(s.row_tiles, s.column_tiles, processors);
  const uint64_t items = uint64_t{s.row_tiles} * s.shares;
  check(items <= INT32_MAX, "kv_up_project: rows * heads must make less than 2**31 tiles, got ", items);
  s.items = static_cast<uint32_t>(items);
  constexpr auto kernel = kv_up_project_kernel<T, kFloat8Latents>;
  const int bytes = fixed + static_cast<int>(s.stages) * stage;
  allow_shared_memory<kernel>("kv_up_project", device, limit);  // whatever the rank
  const CUtensorMap map = weight_map(u);
  kernel<<<std::min(s.items, processors), kBlockThreads, bytes, current_stream(u.kind)>>>(u, s, map);
  check_cuda(cudaGetLastError());
}

template <typename T>
void launch_for(const UpProject& u) {
  u.scale == nullptr ? launch<T, false>(u) : launch<T, true>(u);
}

bool has_dtype(const UpProject& u) { return u.kind.dtype == kBFloat16 || u.kind.dtype == kFloat16; }

bool has_widths(const UpProject& u) {
  return u.rank % kSlab == 0 && u.nope > 0 && u.nope % 64 == 0 && u.v_dim > 0 && u.v_dim % 64 == 0 && u.rope % 8 == 0 &&
         u.rope <= kSlab;
}

bool is_aligned(const UpProject& u) {
  uint64_t bits = u.weight_stride | u.k_row | u.k_head | u.v_row | u.v_head;
  for (const char* at : {u.weight, static_cast<const char*>(u.k), static_cast<const char*>(u.v)}) {
    bits |= reinterpret_cast<uintptr_t>(at);
  }
  if (u.rope > 0) bits |= u.pe_row | u.pe_head | reinterpret_cast<uintptr_t>(u.pe);  // a tensor of no width has odd strides
  const uint64_t latents = u.block_stride | u.row_stride | reinterpret_cast<uintptr_t>(u.latents);
  return bits % 16 == 0 && latents % (u.scale == nullptr ? 16 : 8) == 0;
}

void run(const UpProject& u) {
  if (u.written == 0) return;
  u.kind.dtype == kFloat16 ? launch_for<__half>(u) : launch_for<__nv_bfloat16>(u);
}

void kv_up_project_wgmma(const Tensor& latents, const std::optional<Tensor>& rows, const Tensor& weight,
                         const std::optional<Tensor>& scale, const Tensor& k_out, const Tensor& v_out,
                         const std::optional<Tensor>& k_pe_out) {
  const UpProject u(view_of(latents), OptionalView(rows), view_of(weight), OptionalView(scale), view_of(k_out), view_of(v_out),
                    OptionalView(k_pe_out));
  check(has_dtype(u), "kv_up_project: the CUDA kernel needs bfloat16 or float16");
  check(has_widths(u),
        "kv_up_project: the CUDA kernel needs kv_lora_rank, nope and v in multiples of 64 and rope of 8, at most 64; got ", u.rank,
        ", ", u.nope, ", ", u.v_dim, ", ", u.rope);
  check(is_aligned(u), "kv_up_project: the CUDA kernel needs rows at multiples of 16 bytes, float8 latents of 8");
  check(is_hopper(u.kind), "kv_up_project: the CUDA kernel needs a GPU of compute capability 9.0");
  run(u);
}

// The choice of _fits_wgmma in python/pcp_mla/ops/kv_up_project.py. What does not fit is no error: nothing is thrown for it.
const char* chosen(const View& latents, const View* rows, const View& weight, const View* scale, const View& k_out,
                   const View& v_out, const View* k_pe_out) {
  constexpr const char* refusal = "kv_up_project: not for the CUDA kernel";
  if (!is_hopper(weight.kind)) return refusal;
  const UpProject u(latents, rows, weight, scale, k_out, v_out, k_pe_out);
  if (!has_dtype(u) || !has_widths(u) || u.rank > kMaxChosenRank || !is_aligned(u)) return refusal;
  run(u);
  return nullptr;
}

}  // namespace

void add_kv_up_project(DirectOps& ops) { ops.kv_up_project = directly<chosen>; }

}  // namespace pcp_mla::cuda

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CUDA, m) { m.impl("kv_up_project_wgmma", TORCH_BOX(&pcp_mla::cuda::kv_up_project_wgmma)); }
