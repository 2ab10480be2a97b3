// kv_up_project: tensors and sizes of a call. Definition: python/pcp_mla/reference/kv_up_project.py.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <span>

#include "checks.h"

namespace pcp_mla {

constexpr int kUpProjectTile = 128;  // rows behind the last one are zeroed up to a multiple of this

struct UpProject {
  const char* latents;               // of the weight's type, or with a scale float8
  const float* scale;                // of float8 latents, which it gives when they are multiplied by it; null: there is none
  int64_t block_stride, row_stride;  // bytes
  uint32_t block_size, num_slots;
  bool listed;          // else every slot
  const int32_t* rows;  // [count] slots
  const char* weight;   // [heads * (nope + v), rank]
  int64_t weight_stride;
  char *k, *v, *pe;                                       // pe: where k_pe goes, to each head or to a place of its own
  int64_t k_row, k_head, v_row, v_head, pe_row, pe_head;  // bytes
  uint32_t pe_heads;                                      // the first heads, which write k_pe: all, or one where it stands apart
  uint32_t count, written;                                // rows, and with those that are zeroed
  uint32_t heads, rank, nope, rope, v_dim;
  Kind kind;

  UpProject(const View& l, const View* listed_rows, const View& w, const View* scale_view, const View& ko, const View& vo,
            const View* po) {
    constexpr const char* op = "kv_up_project";
    const bool apart = po != nullptr;
    const Output all[] = {{"k_out", &ko}, {"v_out", &vo}, {"k_pe_out", po}};
    const std::span outputs(all, apart ? 3 : 2);
    kind = w.kind;
    check(l.dims == 2 || l.dims == 3, op, ": latents must be [rows, width] or [num_blocks, block_size, width]");
    check(w.dims == 2 && ko.dims == 3 && vo.dims == 3, op, ": weight must have 2 dimensions, k_out and v_out 3");
    check(!apart || po->dims == 2, op, ": k_pe_out must have 2 dimensions");
    check(scale_view == nullptr ||
              (l.kind.dtype == kFloat8E4M3 && (kind.dtype == kBFloat16 || kind.dtype == kFloat16 || kind.dtype == kFloat32)),
          op, ": with a scale latents must be float8_e4m3fn and weight bfloat16, float16 or float32");
    for (const View* x : {&l, &ko, &vo, po}) {
      const int32_t dtype = x == &l && scale_view != nullptr ? kFloat8E4M3 : kind.dtype;
      check(x == nullptr || (x->kind.same_device(kind) && x->kind.dtype == dtype && x->strides[x->dims - 1] == 1), op,
            ": all tensors must have one dtype and device, and a contiguous last dimension");
    }
    scale = nullptr;
    if (scale_view != nullptr) {
      check(scale_view->kind.same_device(kind) && scale_view->kind.dtype == kFloat32 && scale_view->numel() == 1, op,
            ": scale must be one float32 on the device of the latents");
      scale = reinterpret_cast<const float*>(scale_view->data);
    }
    check(w.strides[1] == 1, op, ": weight must have a contiguous last dimension");
    const int64_t width = l.sizes[l.dims - 1], item = w.item;
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
    }
    check(slots <= INT32_MAX && entries <= INT32_MAX - kUpProjectTile, op, ": there must be fewer than 2**31 latents and rows");
    const int64_t most = (entries + kUpProjectTile - 1) / kUpProjectTile * kUpProjectTile;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto& [name, view] = outputs[i];
      check(view->sizes[0] >= entries, op, ": ", name, " must have at least as many rows as there are");
      check(std::min(view->sizes[0], most) == std::min(ko.sizes[0], most), op, ": ", name, " must have as many rows as k_out");
      const Span written_to = span_of(*view);
      for (const View* input : {&l, listed_rows, &w, scale_view}) {
        if (input != nullptr) check_apart(op, name, written_to, "the inputs", span_of(*input));
      }
      for (const Output& other : outputs.first(i)) check_apart(op, name, written_to, other.name, span_of(*other.view));
    }
    rank = static_cast<uint32_t>(w.sizes[1]);
    heads = static_cast<uint32_t>(ko.sizes[1]);
    const int64_t rope_of_k = apart ? 0 : width - rank;
    check(rank > 0 && width >= rank && heads > 0 && vo.sizes[1] == heads && ko.sizes[2] >= rope_of_k, op,
          ": k_out must be [rows, heads, nope + rope] and v_out [rows, heads, v], with rope = width - kv_lora_rank");
    rope = static_cast<uint32_t>(width - rank);
    check(!apart || po->sizes[1] == rope, op, ": k_pe_out must be [rows, rope], with rope = width - kv_lora_rank");
    nope = static_cast<uint32_t>(ko.sizes[2] - rope_of_k);
    v_dim = static_cast<uint32_t>(vo.sizes[2]);
    check(w.sizes[0] == int64_t{heads} * (nope + v_dim) && w.sizes[0] <= INT32_MAX, op,
          ": weight must be [heads * (nope + v), kv_lora_rank], less than 2**31 rows");
    latents = l.data;
    block_size = static_cast<uint32_t>(l.dims == 3 ? l.sizes[1] : 1);
    num_slots = static_cast<uint32_t>(slots);
    block_stride = l.strides[0] * l.item;
    row_stride = l.dims == 3 ? l.strides[1] * l.item : 0;
    weight = w.data;
    weight_stride = w.strides[0] * item;
    k = ko.data;
    v = vo.data;
    k_row = ko.strides[0] * item;
    k_head = ko.strides[1] * item;
    v_row = vo.strides[0] * item;
    v_head = vo.strides[1] * item;
    pe = apart ? po->data : k + nope * item;
    pe_row = apart ? po->strides[0] * item : k_row;
    pe_head = apart ? 0 : k_head;
    pe_heads = apart ? 1 : heads;
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
  struct Output {
    const char* name;
    const View* view;
  };
};

}  // namespace pcp_mla
