// kv_up_project: tensors and sizes of a call. Definition: python/pcp_mla/reference/kv_up_project.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks.h"

namespace pcp_mla {

constexpr int kUpProjectTile = 128;  // rows behind the last one are zeroed up to a multiple of this

struct UpProject {
  const char* latents;
  int64_t block_stride, row_stride;  // bytes
  uint32_t block_size, num_slots;
  bool listed;          // else every slot
  const int32_t* rows;  // [count] slots
  const char* weight;   // [heads * (nope + v), rank]
  int64_t weight_stride;
  char *k, *v;
  int64_t k_row, k_head, v_row, v_head;  // bytes
  uint32_t count, written;               // rows, and with those that are zeroed
  uint32_t heads, rank, nope, rope, v_dim;
  Kind kind;

  UpProject(const View& l, const View* listed_rows, const View& w, const View& ko, const View& vo) {
    constexpr const char* op = "kv_up_project";
    kind = w.kind;
    check(l.dims == 2 || l.dims == 3, op, ": latents must be [rows, width] or [num_blocks, block_size, width]");
    check(w.dims == 2 && ko.dims == 3 && vo.dims == 3, op, ": weight must have 2 dimensions, k_out and v_out 3");
    for (const View* x : {&l, &ko, &vo}) {
      check(x->kind.same_device(kind) && x->kind.dtype == kind.dtype && (x->strides[x->dims - 1] == 1), op,
            ": all tensors must have one dtype and device, and a contiguous last dimension");
    }
    check(w.strides[1] == 1, op, ": weight must have a contiguous last dimension");
    const int64_t width = l.sizes[l.dims - 1], item = l.item;
    const int64_t slots = l.sizes[0] * (l.dims == 3 ? l.sizes[1] : 1);
    int64_t entries = slots;
    listed = listed_rows != nullptr;
    rows = nullptr;
    if (listed) {
      const View& r = *listed_rows;
      check(r.kind.same_device(kind) && r.kind.dtype == kInt32 && r.dims == 1 && r.is_contiguous(), op,
            ": rows must be a contiguous int32 list on the device of the latents");
      entries = r.sizes[0];
      rows = reinterpret_cast<const int32_t*>(r.data);
      check_outputs(op, ko, vo, span_of(r));
    }
    for (const View* x : {&l, &w}) check_outputs(op, ko, vo, span_of(*x));
    check_apart(op, "k_out", span_of(ko), "v_out", span_of(vo));
    check(slots <= INT32_MAX && entries <= INT32_MAX - kUpProjectTile && ko.sizes[0] >= entries && vo.sizes[0] >= entries, op,
          ": k_out and v_out must have at least as many rows as there are, fewer than 2**31");
    const int64_t most = (entries + kUpProjectTile - 1) / kUpProjectTile * kUpProjectTile;
    check(std::min(ko.sizes[0], most) == std::min(vo.sizes[0], most), op, ": k_out and v_out must have as many rows");
    rank = static_cast<uint32_t>(w.sizes[1]);
    heads = static_cast<uint32_t>(ko.sizes[1]);
    check(rank > 0 && width >= rank && heads > 0 && vo.sizes[1] == heads && ko.sizes[2] >= width - rank, op,
          ": k_out must be [rows, heads, nope + rope] and v_out [rows, heads, v], with rope = width - kv_lora_rank");
    rope = static_cast<uint32_t>(width - rank);
    nope = static_cast<uint32_t>(ko.sizes[2] - rope);
    v_dim = static_cast<uint32_t>(vo.sizes[2]);
    check(w.sizes[0] == int64_t{heads} * (nope + v_dim) && w.sizes[0] <= INT32_MAX, op,
          ": weight must be [heads * (nope + v), kv_lora_rank], less than 2**31 rows");
    latents = l.data;
    block_size = static_cast<uint32_t>(l.dims == 3 ? l.sizes[1] : 1);
    num_slots = static_cast<uint32_t>(slots);
    block_stride = l.strides[0] * item;
    row_stride = l.dims == 3 ? l.strides[1] * item : 0;
    weight = w.data;
    weight_stride = w.strides[0] * item;
    k = ko.data;
    v = vo.data;
    k_row = ko.strides[0] * item;
    k_head = ko.strides[1] * item;
    v_row = vo.strides[0] * item;
    v_head = vo.strides[1] * item;
    count = static_cast<uint32_t>(entries);
    written = static_cast<uint32_t>(std::min(ko.sizes[0], most));
  }

  // Where row n's latent lies, in bytes; -1 for a row of zeros.
  PCP_HOST_DEVICE int64_t offset(uint32_t n) const {
    if (n >= count) return -1;
    const uint32_t slot = listed ? static_cast<uint32_t>(rows[n]) : n;  // -1 is a large number
    if (slot >= num_slots) return -1;
    if (block_size == 1) return slot * block_stride;
    const uint32_t block = slot / block_size;
    return block * block_stride + (slot - block * block_size) * row_stride;
  }

 private:
  static void check_outputs(const char* op, const View& k_out, const View& v_out, const Span& input) {
    check_apart(op, "k_out", span_of(k_out), "the inputs", input);
    check_apart(op, "v_out", span_of(v_out), "the inputs", input);
  }
};

}  // namespace pcp_mla
