// pcp_mla._direct: CUDA ops called past torch's dispatcher, on tensors that DLPack's C exchange interface shows without a copy.
//
// Every function says whether it did the work. False, before anything was launched, where gradients or a mode could want to see the
// op, or where an argument is no plain CUDA tensor or was refused: the caller goes through the dispatcher then, which knows
// gradients, modes and subclasses and gives errors their words.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "../direct_ops.h"

namespace py = pybind11;

namespace pcp_mla {
namespace {

const DirectOps* ops = nullptr;
const DLPackExchangeAPI* dlpack = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;  // torch's objects are kept alive by torch
PyObject *grad_enabled = nullptr, *mode_count = nullptr;

// Whether gradients are on or a mode is active: either may want to see every op.
bool is_watched() {
  const auto grad = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(grad_enabled));
  if (!grad) throw py::error_already_set();
  if (grad.ptr() != Py_False) return true;
  const auto modes = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(mode_count));
  if (!modes) throw py::error_already_set();
  return PyLong_AsLong(modes.ptr()) != 0;
}

// -1 for dtypes that no op takes, or that are rare.
int32_t dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return -1;
  switch (type.code) {
    case kDLBfloat: return kBFloat16;
    case kDLFloat: return type.bits == 32 ? kFloat32 : type.bits == 16 ? kFloat16 : -1;
    case kDLInt: return type.bits == 32 ? kInt32 : type.bits == 64 ? kInt64 : -1;
    case kDLUInt: return type.bits == 8 ? kUInt8 : -1;
    case kDLFloat8_e4m3fn: return kFloat8E4M3;
    default: return -1;
  }
}

bool view(py::handle tensor, View& to) {
  const PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (type != tensor_type && type != parameter_type) return false;  // a subclass may hold anything
  DLTensor t;
  if (dlpack->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device.device_type != kDLCUDA || t.ndim > kMaxDims) return false;
  to.data = static_cast<char*>(t.data) + t.byte_offset;
  to.kind = {dtype_of(t.dtype), kCudaDevice, t.device.device_id};
  to.dims = t.ndim;
  to.item = (t.dtype.bits + 7) / 8;
  for (int i = 0; i < t.ndim; ++i) {
    to.sizes[i] = t.shape[i];
    to.strides[i] = t.strides[i];
  }
  return to.kind.dtype >= 0;
}

// Views of a call's arguments; null for None.
class Arguments {
 public:
  const View& need(py::handle tensor) {
    ok_ = ok_ && view(tensor, views_[used_]);
    return views_[used_++];
  }
  const View* take(py::handle tensor) { return tensor.is_none() ? nullptr : &need(tensor); }
  bool ok() const { return ok_; }

 private:
  View views_[16];
  int used_ = 0;
  bool ok_ = !is_watched();
};

bool merge_attn_states(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b, py::handle scale, py::handle row_op,
                       py::handle cu_seqlens, py::handle out_rows, bool base2, py::handle out, py::handle lse_out) {
  Arguments a;
  const View &va = a.need(out_a), &la = a.need(lse_a), &vb = a.need(out_b), &lb = a.need(lse_b), &vo = a.need(out);
  const View *vs = a.take(scale), *vr = a.take(row_op), *vc = a.take(cu_seqlens), *vp = a.take(out_rows), *vl = a.take(lse_out);
  return a.ok() && ops->merge_attn_states(va, la, vb, lb, vs, vr, vc, vp, base2, vo, vl) == nullptr;
}

bool merge_n_attn_states(const py::list& outs, const py::list& lses, py::handle scale, bool base2, py::handle out,
                         py::handle lse_out) {
  Arguments a;
  std::vector<View> views(outs.size()), lse_views(lses.size());
  if (outs.size() != lses.size()) return false;
  for (size_t n = 0; n < outs.size(); ++n) {
    if (!view(outs[n], views[n]) || !view(lses[n], lse_views[n])) return false;
  }
  const View &vo = a.need(out), *vs = a.take(scale), *vl = a.take(lse_out);
  return a.ok() && ops->merge_n_attn_states(views.data(), lse_views.data(), views.size(), vs, base2, vo, vl) == nullptr;
}

bool cp_correct_out(py::handle out, py::handle lses, py::handle seqused_k, int64_t rank, bool base2, py::handle corrected,
                    py::handle lse_out) {
  Arguments a;
  const View &vo = a.need(out), &vl = a.need(lses), &vc = a.need(corrected), *vs = a.take(seqused_k), *vm = a.take(lse_out);
  return a.ok() && ops->cp_correct_out(vo, vl, vs, rank, base2, vc, vm) == nullptr;
}

bool concat_k(py::handle k_nope, py::handle k_pe, py::handle out) {
  Arguments a;
  const View &vn = a.need(k_nope), &vp = a.need(k_pe), &vo = a.need(out);
  return a.ok() && ops->concat_k(vn, vp, vo) == nullptr;
}

bool write_latent_cache(py::handle latents, py::handle cache, py::handle slot_mapping, py::handle scale) {
  Arguments a;
  const View &vl = a.need(latents), &vc = a.need(cache), &vm = a.need(slot_mapping), *vs = a.take(scale);
  return a.ok() && ops->write_latent_cache(vl, vc, vm, vs) == nullptr;
}

bool kv_up_project(py::handle latents, py::handle rows, py::handle weight, py::handle scale, py::handle k_out, py::handle v_out,
                   py::handle k_pe_out) {
  Arguments a;
  const View &vl = a.need(latents), &vw = a.need(weight), &vk = a.need(k_out), &vv = a.need(v_out);
  const View *vr = a.take(rows), *vs = a.take(scale), *vp = a.take(k_pe_out);
  return a.ok() && ops->kv_up_project(vl, vr, vw, vs, vk, vv, vp) == nullptr;
}

bool attention(py::handle q, py::handle k, py::handle v, py::handle k_pe, py::handle kv_rows, py::handle cu_seqlens_q,
               py::handle cu_seqlens_k, py::handle seqused_k, py::handle prev_out, py::handle prev_lse, double softmax_scale,
               bool causal, py::handle out, py::handle lse) {
  Arguments a;
  const View &vq = a.need(q), &vk = a.need(k), &vv = a.need(v), &sq = a.need(cu_seqlens_q), &sk = a.need(cu_seqlens_k),
             &used = a.need(seqused_k), &vo = a.need(out);
  const View *pe = a.take(k_pe), *rows = a.take(kv_rows), *po = a.take(prev_out), *pl = a.take(prev_lse), *vl = a.take(lse);
  return a.ok() && ops->attention({vq, vk, vv, pe, rows, sq, sk, used, po, pl, softmax_scale, causal, vo, vl}) == nullptr;
}

// Where the rows went (Published), 0 as other functions' false, or the words of what was wrong.
py::object publish_latents(int64_t mailbox, py::handle kv_c, py::handle k_pe, py::handle slot_mapping, py::handle cache,
                           py::handle scale, int64_t tokens, int64_t local_rows, int64_t first, int64_t padded, int64_t step,
                           bool alone) {
  Arguments a;
  const View &vc = a.need(kv_c), &vp = a.need(k_pe), *vm = a.take(slot_mapping), *vk = a.take(cache), *vs = a.take(scale);
  if (!a.ok()) return py::int_(0);
  Published where{};
  const PublishCall call{vc, vp, vm, vk, vs, tokens, local_rows, first, padded, step, alone};
  const char* wrong = ops->publish_latents(*reinterpret_cast<Mailbox*>(mailbox), call, where);
  if (wrong != nullptr) return py::str(wrong);
  return py::int_(static_cast<int>(where));
}

// True, false as other functions', or the words of what was wrong.
py::object exchange_heads(int64_t mailbox, py::handle x, int64_t tokens, int64_t local_rows, int64_t padded, int64_t step,
                          int64_t num_heads, int64_t width, int64_t offset, bool to_tokens) {
  Arguments a;
  const View& vx = a.need(x);
  if (!a.ok()) return py::bool_(false);
  const HeadsCall call{vx, tokens, local_rows, padded, step, num_heads, width, offset, to_tokens};
  const char* wrong = ops->exchange_heads(*reinterpret_cast<Mailbox*>(mailbox), call);
  if (wrong != nullptr) return py::str(wrong);
  return py::bool_(true);
}

// From now on calls go to the ops at this address, with the tensors of this torch.
void connect(int64_t address, const py::module_& torch) {
  const py::object type = torch.attr("Tensor");
  const auto* table = reinterpret_cast<const DirectOps*>(address);
  if (table->layout != kDirectLayout) {
    throw std::runtime_error("pcp_mla: _direct and _native_cuda are of different versions: build both again");
  }
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("pcp_mla: torch has another version of DLPack's exchange interface");
  }
  ops = table;
  dlpack = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  grad_enabled = torch.attr("is_grad_enabled").ptr();
  mode_count = torch.attr("_C").attr("_len_torch_dispatch_stack").ptr();
}

}  // namespace
}  // namespace pcp_mla

PYBIND11_MODULE(_direct, m) {
  m.def("connect", &pcp_mla::connect);
  m.def("merge_attn_states", &pcp_mla::merge_attn_states);
  m.def("merge_n_attn_states", &pcp_mla::merge_n_attn_states);
  m.def("cp_correct_out", &pcp_mla::cp_correct_out);
  m.def("concat_k", &pcp_mla::concat_k);
  m.def("write_latent_cache", &pcp_mla::write_latent_cache);
  m.def("kv_up_project", &pcp_mla::kv_up_project);
  m.def("attention", &pcp_mla::attention);
  m.def("publish_latents", &pcp_mla::publish_latents);
  m.def("exchange_heads", &pcp_mla::exchange_heads);
}
