// exchange_heads: each access is read once and stored in the buffer of one rank. Warps take pieces for all ranks in turn, each rank
// beginning behind itself, so that no rank is stored to by all at once.
#include "../exchange_heads.h"

#include "direct.h"
#include "meeting.cuh"

namespace pcp_mla::cuda {
namespace {

constexpr int kLoads = 8;  // of a lane in flight
constexpr uint32_t kPiece = 32 * kLoads;

struct HeadsParams : Meeting {
  struct Block {
    const char* from;
    char* to;
    int64_t to_row;     // bytes
    uint32_t row, all;  // accesses: of a row, of all rows
    Divider per_row;
  } blocks[kMaxPeers];
  int64_t row_stride, head_stride;  // of what is read, bytes
  Divider per_head, per_rank;       // accesses of a head; pieces of all ranks
  uint32_t count, pieces;           // rows of a block that there are, behind them are zeros; pieces for all ranks
};

template <typename Vec>
__device__ __forceinline__ void store_heads(const HeadsParams& p) {
  const uint32_t lane = threadIdx.x % 32, step = gridDim.x * kMeetingWarps;
  for (uint32_t piece = blockIdx.x * kMeetingWarps + threadIdx.x / 32; piece < p.pieces; piece += step) {
    const uint32_t turn = p.per_rank.divide(piece), behind = piece - turn * p.world + p.rank + 1;
    const auto& b = p.blocks[behind < p.world ? behind : behind - p.world];
    const uint32_t first = turn * kPiece + lane;
    Vec value[kLoads];
    int64_t at[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const uint32_t e = first + 32 * u;
      at[u] = -1;
      if (e >= b.all) continue;
      const uint32_t row = b.per_row.divide(e), n = e - row * b.row, head = p.per_head.divide(n);
      at[u] = row * b.to_row + static_cast<int64_t>(n * sizeof(Vec));
      const char* from = b.from + row * p.row_stride + head * p.head_stride;
      value[u] = row < p.count ? *reinterpret_cast<const Vec*>(from + (n - head * p.per_head.divisor) * sizeof(Vec)) : Vec{};
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (at[u] >= 0) *reinterpret_cast<Vec*>(b.to + at[u]) = value[u];
    }
  }
}

template <typename Vec>
__global__ void __launch_bounds__(kMeetingThreads, 2) exchange_heads_kernel(const __grid_constant__ HeadsParams p) {
  meet(p, [&] { store_heads<Vec>(p); });
}

void check_rows(const Mailbox& mailbox, const HeadsCall& call) {
  constexpr const char* op = "exchange_heads";
  const View& x = call.x;
  const int64_t world = mailbox.world, rank = mailbox.rank;
  const int64_t mine = first_head(call.num_heads, world, rank + 1) - first_head(call.num_heads, world, rank);
  const int64_t heads = call.to_tokens ? mine : call.num_heads;
  check(call.num_heads >= world && call.padded >= 0 && call.offset >= 0, op, ": each rank must have a head");
  check(x.dims == 3 && x.sizes[1] == heads && x.sizes[2] == call.width, op, ": rows must be [tokens, ", heads, ", ", call.width,
        "]");
  const bool fits = call.to_tokens ? x.sizes[0] == world * call.padded
                                   : (x.sizes[0] == call.tokens || x.sizes[0] == call.local_rows) && x.sizes[0] <= call.padded;
  check(fits, op, ": there must be rows for the step's tokens, got ", x.sizes[0]);
  check(x.kind.dtype == mailbox.dtype && x.kind.device_type == kCudaDevice && x.kind.device_index == mailbox.device, op,
        ": rows must be of the exchange's dtype, on its GPU ", mailbox.device);
  check(x.strides[2] == 1 || x.sizes[2] == 1, op, ": rows must have a contiguous last dimension");
  check(heads_end(call, world) <= mailbox.staging_bytes, op, ": the exchange has no room for ", call.padded, " tokens a rank");
}

// Accesses of so many bytes. What is stored to may be aligned otherwise on another rank, which then takes others.
void set_blocks(HeadsParams& p, const HeadsCall& call, const HeadBlock* blocks, int64_t bytes) {
  const int64_t head = call.width * call.x.item / bytes;
  int64_t most = 0;
  for (int r = 0; r < p.world; ++r) {
    auto& b = p.blocks[r];
    const int64_t row = blocks[r].heads * head, all = call.padded * row;
    check(all < (int64_t{1} << 31) - kPiece, "exchange_heads: rows for a rank must be fewer than 2**31 accesses, got ", all);
    b.row = static_cast<uint32_t>(row);
    b.all = static_cast<uint32_t>(all);
    b.per_row = Divider(b.row);
    most = std::max(most, row);
  }
  const int64_t pieces = p.world * ((call.padded * most + kPiece - 1) / kPiece);
  check(pieces < (int64_t{1} << 31), "exchange_heads: there must be fewer than 2**31 pieces, got ", pieces);
  p.pieces = static_cast<uint32_t>(pieces);
  p.per_rank = Divider(p.world);
  // Heads without gaps count as one.
  p.per_head = Divider(static_cast<uint32_t>(p.head_stride == call.width * call.x.item ? most : head));
}

void exchange(Mailbox& mailbox, const HeadsCall& call) {
  check_alive("exchange_heads", mailbox);
  check_rows(mailbox, call);
  const View& x = call.x;
  if (call.padded == 0) return;
  HeadsParams p{};
  set_meeting(p, mailbox);
  p.row_stride = x.strides[0] * x.item;
  p.head_stride = x.strides[1] * x.item;
  p.count = static_cast<uint32_t>(call.to_tokens ? call.padded : x.sizes[0]);
  p.what = words_of(call.to_tokens ? 1 : 0, call.padded);
  const int64_t width = call.width * x.item;
  uint64_t bits = 16 | width | reinterpret_cast<uintptr_t>(x.data);
  if (x.sizes[0] > 1) bits |= p.row_stride;
  if (x.sizes[1] > 1) bits |= p.head_stride;
  HeadBlock blocks[kMaxPeers];
  for (int r = 0; r < p.world; ++r) {
    blocks[r] = block_for(call, p.world, p.rank, r);
    p.blocks[r].from = x.data + blocks[r].from;
    p.blocks[r].to = mailbox.staging.of[r] + blocks[r].to;
    p.blocks[r].to_row = blocks[r].to_row;
    bits |= reinterpret_cast<uintptr_t>(p.blocks[r].to);
  }
  const int bytes = static_cast<int>(bits & (~bits + 1));
  set_blocks(p, call, blocks, bytes);
  // What the grid is made from is the same on all ranks: bytes of all heads of a rank's tokens.
  const int64_t piece_bytes = int64_t{kPiece} * 16 * kMeetingWarps, all = call.padded * call.num_heads * width;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>((all + piece_bytes - 1) / piece_bytes, mailbox.max_blocks));
  const DeviceGuard guard(x.kind);
  p.wait_first = must_wait(mailbox, call, follow(mailbox, x.kind));
  with_access(bytes, [&](auto vec) { launch(exchange_heads_kernel<decltype(vec)>, grid, kMeetingThreads, x.kind, p); });
}

}  // namespace

void add_exchange_heads(DirectOps& ops) { ops.exchange_heads = directly<exchange, Mailbox&, const HeadsCall&>; }

}  // namespace pcp_mla::cuda
