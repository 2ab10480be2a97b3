// write_latent_cache and gather_latents: what the CPU and the CUDA kernel share. Both move rows between a tensor [n, W] and a paged
// cache. Definition: python/pcp_mla/reference/latent_cache.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "checks.h"

namespace pcp_mla {

// Where the slots of a cache lie.
struct CacheSlots {
  int64_t count, block_size, block_stride, row_stride;  // strides in bytes

  // In bytes from where the cache begins; -1 for a slot that there is not.
  PCP_HOST_DEVICE int64_t offset(int64_t slot) const {
    return slot < 0 || slot >= count ? -1 : slot / block_size * block_stride + slot % block_size * row_stride;
  }
};

// Those of a cache of rows of so many numbers, which outside of it are of kind `outside`: the same in the cache, or with a scale
// float8 there.
inline CacheSlots cache_slots(const char* op, const View& c, const Kind& outside, int64_t width, const View* scale) {
  check(c.dims == 2 || c.dims == 3, op, ": cache must be [num_blocks, block_size, width] or [num_slots, width]");
  check(c.item <= 8, op, ": cache must have a dtype of at most 8 bytes, got ", c.item);
  const int last = c.dims - 1;
  check(c.kind.same_device(outside) && c.sizes[last] == width, op, ": cache and latents must have one device and width");
  check(c.strides[last] == 1 || width == 1, op, ": cache must have a contiguous last dimension");
  if (scale == nullptr) {
    check(c.kind.dtype == outside.dtype, op, ": cache and latents must have one dtype, or a scale");
  } else {
    check(c.kind.dtype == kFloat8E4M3 && (outside.dtype == kBFloat16 || outside.dtype == kFloat16 || outside.dtype == kFloat32), op,
          ": with a scale the cache must be float8_e4m3fn and the latents bfloat16, float16 or float32");
    check(scale->kind.same_device(outside) && scale->kind.dtype == kFloat32 && scale->numel() == 1, op,
          ": scale must be one float32 on the device of the cache");
  }
  const int64_t block_size = c.dims == 3 ? c.sizes[1] : 1;
  check(block_size > 0, op, ": a block must have at least one token");
  return {c.sizes[0] * block_size, block_size, c.strides[0] * c.item, c.dims == 3 ? c.strides[1] * c.item : 0};
}

// Which slot row n has: by a list of slots, or by the tokens of sequences.
struct CacheRows {
  enum class By { kSlots, kRows, kSequences } by;
  const int64_t* slots;  // [n]
  const int32_t* rows;   // [n], the same in 32 bits
  const int32_t *block_table, *cu_seqlens, *starts;
  bool has_starts;  // else every sequence from its first token
  int64_t table_stride;
  int32_t sequences, columns;

  // Not one of the cache's for none.
  PCP_HOST_DEVICE int64_t slot(int64_t n, int64_t block_size) const {
    return by == By::kSlots ? slots[n] : by == By::kRows ? rows[n] : token_slot(n, block_size);
  }

 private:
  PCP_HOST_DEVICE int64_t token_slot(int64_t n, int64_t block_size) const {
    if (sequences == 0 || n < cu_seqlens[0] || n >= cu_seqlens[sequences]) return -1;
    int32_t low = 0, high = sequences;
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (cu_seqlens[middle] <= n ? low : high) = middle;
    }
    const int64_t position = n - cu_seqlens[low] + (has_starts ? starts[low] : 0);
    if (position < 0 || position / block_size >= columns) return -1;
    const int64_t block = block_table[low * table_stride + position / block_size];
    return block < 0 ? -1 : block * block_size + position % block_size;
  }
};

struct LatentCache {
  const char* op;
  CacheRows rows{};
  CacheSlots slots;
  char *cache, *outside;             // outside: the tensor [n, W]
  int64_t outside_stride;            // bytes
  int64_t count, width;              // rows, elements of a row
  int32_t cache_item, outside_item;  // bytes of an element
  const float* scale;                // null: rows are copied as they are; it is never empty
  Kind kind;                         // of the outside tensor

  LatentCache(const char* name, const View& c, const View& o, const View* scale_view) : op(name) {
    check(o.dims == 2 && o.sizes[1] > 0, op, ": latents must be [rows, width]");
    check(o.strides[1] == 1 || o.sizes[1] == 1, op, ": latents must have a contiguous last dimension");
    slots = cache_slots(op, c, o.kind, o.sizes[1], scale_view);
    scale = scale_view == nullptr ? nullptr : reinterpret_cast<const float*>(scale_view->data);
    cache = c.data;
    outside = o.data;
    outside_stride = o.strides[0] * o.item;
    count = o.sizes[0];
    width = o.sizes[1];
    cache_item = c.item;
    outside_item = o.item;
    kind = o.kind;
    check(count <= INT32_MAX && width * std::max(c.item, o.item) <= INT32_MAX, op, ": there must be less than 2**31 rows");
  }

  // Exactly one of these says which slots rows have.
  void set_slots(const View& v) {
    rows.by = CacheRows::By::kSlots;
    rows.slots = list_of<int64_t>(op, "slot_mapping", v, count, kind, "the cache");
  }
  void set_rows(const View& v) {
    rows.by = CacheRows::By::kRows;
    rows.rows = list_of<int32_t>(op, "rows", v, count, kind, "the cache");
  }
  void set_sequences(const View& table, const View& cu_seqlens, const View* starts) {
    check(table.kind.same_device(kind) && table.kind.dtype == kInt32 && table.dims == 2 &&
              (table.strides[1] == 1 || table.sizes[1] <= 1),
          op, ": block_table must be int32 [sequences, blocks] with a contiguous last dimension on the device of the cache");
    check(table.sizes[0] < INT32_MAX && table.sizes[1] <= INT32_MAX, op, ": block_table must be smaller than 2**31 each way");
    rows.by = CacheRows::By::kSequences;
    rows.block_table = reinterpret_cast<const int32_t*>(table.data);
    rows.table_stride = table.strides[0];
    rows.sequences = static_cast<int32_t>(table.sizes[0]);
    rows.columns = static_cast<int32_t>(table.sizes[1]);
    rows.cu_seqlens = list_of<int32_t>(op, "cu_seqlens", cu_seqlens, table.sizes[0] + 1, kind, "the cache");
    rows.has_starts = starts != nullptr;
    if (starts) rows.starts = list_of<int32_t>(op, "starts", *starts, table.sizes[0], kind, "the cache");
  }

  // Of row n in the cache, in bytes; -1 where it has no slot.
  PCP_HOST_DEVICE int64_t offset(int64_t n) const { return slots.offset(rows.slot(n, slots.block_size)); }
};

// The ops around a device's kernel: rows into the cache, rows out of it.
template <void (*run_write)(const LatentCache&), void (*run_gather)(const LatentCache&)>
struct LatentCacheOps {
  static void check_alone(const char* op, const char* name, const View& written,
                          std::initializer_list<std::pair<const char*, const View*>> others) {
    const Span span = span_of(written);
    for (const auto& [other_name, other] : others) {
      if (other) check_apart(op, name, span, other_name, span_of(*other));
    }
  }

  static void write(const View& latents, const View& cache, const View& slots, const View* scale) {
    LatentCache c("write_latent_cache", cache, latents, scale);
    c.set_slots(slots);
    check_alone(c.op, "cache", cache, {{"latents", &latents}, {"slot_mapping", &slots}, {"scale", scale}});
    if (c.count > 0) run_write(c);
  }

  static void write_latent_cache(const Tensor& latents, const Tensor& cache, const Tensor& slot_mapping,
                                 const std::optional<Tensor>& scale) {
    write(view_of(latents), view_of(cache), view_of(slot_mapping), OptionalView(scale));
  }

  static void gather_latents(const Tensor& cache, const std::optional<Tensor>& rows, const std::optional<Tensor>& block_table,
                             const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& starts,
                             const std::optional<Tensor>& scale, const Tensor& out) {
    const OptionalView s(scale), first(starts), listed(rows), table(block_table), sequences(cu_seqlens);
    const View from = view_of(cache), to = view_of(out);
    LatentCache c("gather_latents", from, to, s);
    check(rows.has_value() != (block_table.has_value() && cu_seqlens.has_value()), c.op,
          ": there must be either rows or block_table and cu_seqlens");
    if (rows) {
      c.set_rows(*listed.view);
    } else {
      c.set_sequences(*table.view, *sequences.view, first);
    }
    check_alone(
        c.op, "out", to,
        {{"cache", &from}, {"rows", listed}, {"block_table", table}, {"cu_seqlens", sequences}, {"starts", first}, {"scale", s}});
    if (c.count > 0) run_gather(c);
  }
};

}  // namespace pcp_mla
