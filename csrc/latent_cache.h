// write_latent_cache and gather_latents: what the CPU and the CUDA kernel share. Both move rows between a tensor [n, W] and a paged
// cache. Definition: python/pcp_mla/reference/latent_cache.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "checks.h"

namespace pcp_mla {

// Where row n lies in the cache: by a list of slots, or by the tokens of sequences.
struct CacheRows {
  enum class By { kSlots, kRows, kSequences } by;
  const int64_t* slots;  // [n]
  const int32_t* rows;   // [n], the same in 32 bits
  const int32_t *block_table, *cu_seqlens, *starts;
  bool has_starts;  // else every sequence from its first token
  int64_t table_stride;
  int32_t sequences, columns;
  int64_t num_slots, block_size;

  // -1 for none.
  PCP_HOST_DEVICE int64_t slot(int64_t n) const {
    const int64_t slot = by == By::kSlots ? slots[n] : by == By::kRows ? rows[n] : token_slot(n);
    return slot < num_slots && slot >= 0 ? slot : -1;
  }

 private:
  PCP_HOST_DEVICE int64_t token_slot(int64_t n) const {
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
  char *cache, *outside;                             // outside: the tensor [n, W]
  int64_t block_stride, row_stride, outside_stride;  // bytes
  int64_t count, width;                              // rows, elements of a row
  int32_t cache_item, outside_item;                  // bytes of an element
  const float* scale = nullptr;                      // null: rows are copied as they are; it is never empty
  Kind kind;                                         // of the outside tensor

  LatentCache(const char* name, const View& cache_view, const View& outside_view, const View* scale_view) : op(name) {
    const View &c = cache_view, &o = outside_view;
    check(c.dims == 2 || c.dims == 3, op, ": cache must be [num_blocks, block_size, width] or [num_slots, width]");
    check(o.dims == 2 && o.sizes[1] > 0, op, ": latents must be [rows, width]");
    check(c.item <= 8, op, ": cache must have a dtype of at most 8 bytes, got ", c.item);
    const int last = c.dims - 1;
    check(c.kind.same_device(o.kind) && c.sizes[last] == o.sizes[1], op, ": cache and latents must have one device and width");
    check((o.strides[1] == 1 || o.sizes[1] == 1) && (c.strides[last] == 1 || c.sizes[last] == 1), op,
          ": cache and latents must have a contiguous last dimension");
    if (scale_view == nullptr) {
      check(c.kind.dtype == o.kind.dtype, op, ": cache and latents must have one dtype, or a scale");
    } else {
      const int32_t dtype = o.kind.dtype;
      check(c.kind.dtype == kFloat8E4M3 && (dtype == kBFloat16 || dtype == kFloat16 || dtype == kFloat32), op,
            ": with a scale the cache must be float8_e4m3fn and the latents bfloat16, float16 or float32");
      check(scale_view->kind.same_device(o.kind) && scale_view->kind.dtype == kFloat32 && scale_view->numel() == 1, op,
            ": scale must be one float32 on the device of the cache");
      scale = reinterpret_cast<const float*>(scale_view->data);
    }
    cache = c.data;
    outside = o.data;
    block_stride = c.strides[0] * c.item;
    row_stride = c.dims == 3 ? c.strides[1] * c.item : 0;
    outside_stride = o.strides[0] * o.item;
    count = o.sizes[0];
    width = o.sizes[1];
    cache_item = c.item;
    outside_item = o.item;
    kind = o.kind;
    check(count <= INT32_MAX && width * std::max(c.item, o.item) <= INT32_MAX, op, ": there must be less than 2**31 rows");
    rows.block_size = c.dims == 3 ? c.sizes[1] : 1;
    check(rows.block_size > 0, op, ": a block must have at least one token");
    rows.num_slots = c.sizes[0] * rows.block_size;
  }

  // Exactly one of these says where rows lie.
  void set_slots(const View& v) {
    rows.by = CacheRows::By::kSlots;
    rows.slots = reinterpret_cast<const int64_t*>(list("slot_mapping", v, kInt64, count));
  }
  void set_rows(const View& v) {
    rows.by = CacheRows::By::kRows;
    rows.rows = reinterpret_cast<const int32_t*>(list("rows", v, kInt32, count));
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
    rows.cu_seqlens = reinterpret_cast<const int32_t*>(list("cu_seqlens", cu_seqlens, kInt32, table.sizes[0] + 1));
    rows.has_starts = starts != nullptr;
    if (starts) rows.starts = reinterpret_cast<const int32_t*>(list("starts", *starts, kInt32, table.sizes[0]));
  }

  PCP_HOST_DEVICE int64_t cache_offset(int64_t slot) const {
    return slot / rows.block_size * block_stride + slot % rows.block_size * row_stride;
  }

 private:
  const char* list(const char* name, const View& v, int32_t dtype, int64_t entries) const {
    check(v.kind.same_device(kind) && v.kind.dtype == dtype && v.dims == 1 && v.sizes[0] == entries && v.is_contiguous(), op, ": ",
          name, " must be a contiguous ", dtype == kInt64 ? "int64" : "int32", " list of ", entries, " on the device of the cache");
    return v.data;
  }
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
