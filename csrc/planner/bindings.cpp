// pcp_mla._planner: the planner over NumPy arrays. int32 and bool arrays are read where they lie, anything else is converted first.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../plan_transport.h"
#include "planner.h"

namespace py = pybind11;
using namespace pcp_mla::planner;

namespace {

using Int32s = py::array_t<int32_t, py::array::c_style>;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;

template <typename Error, typename... Args>
[[noreturn]] void fail(const Args&... message) {
  std::ostringstream text;
  text << "PCPPlanner.plan: ";
  (text << ... << message);
  throw Error(text.str());
}

std::string text_of(py::handle value) { return py::str(value); }

// -1 for None.
int64_t optional_size(const char* name, py::handle value) {
  if (value.is_none()) return -1;
  if (!PyIndex_Check(value.ptr()) || PyBool_Check(value.ptr()))
    fail<py::type_error>(name, " must be an int, got ", text_of(py::repr(value)));
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const int64_t size = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (size < 0 || overflow) fail<py::value_error>(name, " must be 0 to 2**63 - 1, got ", text_of(number));
  return size;
}

py::array as_array(const char* name, py::handle value, int64_t count) {
  auto array = py::array::ensure(value);
  if (!array) {
    PyErr_Clear();
    fail<py::type_error>(name, " must be one-dimensional and of numbers, got ", text_of(py::repr(value)));
  }
  if (array.ndim() != 1) fail<py::value_error>(name, " must be one-dimensional, got ", array.ndim(), " dimensions");
  if (count >= 0 && array.shape(0) != count) {
    fail<py::value_error>(name, " must have one entry for each of the ", count, " requests, got ", array.shape(0));
  }
  return array;
}

// One per-request argument: where its int32s are, and what keeps them alive.
class Lengths {
 public:
  explicit Lengths(int64_t capacity) : converted_(capacity) {}

  const int32_t* read(const char* name, py::handle value, int64_t count = -1) {
    if (value.is_none()) return nullptr;
    if (Int32s::check_(value)) {
      kept_ = py::reinterpret_borrow<py::array>(value);
      if (kept_.ndim() == 1 && (count < 0 || kept_.shape(0) == count)) return static_cast<const int32_t*>(kept_.data());
    }
    kept_ = as_array(name, value, count);
    if (!Int64s::check_(kept_)) {
      const char kind = kept_.dtype().kind();
      if (kept_.size() > 0 && kind != 'i' && kind != 'u') {
        fail<py::type_error>(name, " must be integers, got ", text_of(py::str(kept_.dtype())));
      }
      kept_ = Int64s::ensure(kept_.attr("astype")("int64"));
    }
    if (kept_.shape(0) > static_cast<py::ssize_t>(converted_.size())) {
      fail<py::value_error>(name, " must have at most ", converted_.size(), " requests, as the planner was made for, got ",
                            kept_.shape(0));
    }
    const auto* wide = static_cast<const int64_t*>(kept_.data());
    for (py::ssize_t i = 0; i < kept_.shape(0); ++i) {
      if (wide[i] > INT32_MAX) fail<py::value_error>(name, " must add up to less than 2**31, got ", wide[i], " for request ", i);
      if (wide[i] < 0) fail<py::value_error>(name, " must not be negative, got ", wide[i], " for request ", i);
      converted_[i] = static_cast<int32_t>(wide[i]);
    }
    return converted_.data();
  }
  int64_t count() const { return kept_.shape(0); }

 private:
  std::vector<int32_t> converted_;
  py::array kept_;
};

class Bound {
 public:
  Bound(const Config& config, const py::sequence& names)
      : planner_(config), query_(config.max_requests), context_(config.max_requests), prompt_(config.max_requests) {
    for (const py::handle name : names) names_.push_back(py::reinterpret_borrow<py::str>(name));
    if (names_.size() != 16) throw py::value_error("_planner: names must be 16, got " + std::to_string(names_.size()));
  }

  // From now on plans go to a GPU: into one of two host buffers in turn, the other may still be on its way, and off by `transport`.
  void attach(const py::dict& numbers, const py::sequence& staging) {
    const auto number = [&](const char* name) { return numbers[name].cast<int64_t>(); };
    const auto ints = [&](const char* name) { return reinterpret_cast<int32_t*>(number(name)); };
    const auto* transport = reinterpret_cast<const pcp_mla::PlanTransport*>(number("transport"));
    if (transport->submission_bytes != sizeof(pcp_mla::PlanSubmission)) {
      throw std::runtime_error("pcp_mla: _planner and _native_cuda are of different versions: build both again");
    }
    for (int i = 0; i < 2; ++i) {
      const auto pair = staging[i].cast<std::pair<int64_t, int64_t>>();
      staging_[i] = {reinterpret_cast<int32_t*>(pair.first), reinterpret_cast<void*>(pair.second)};
    }
    const Config& c = planner_.config();
    to_ = {};
    to_.device = ints("step");
    to_.device_index = static_cast<int32_t>(number("device_index"));
    to_.job.table = {ints("step") + c.at.requests, 0, static_cast<int32_t>(c.world_size)};
    to_.job.cache = {nullptr,
                     0,
                     0,
                     0,
                     static_cast<uint32_t>(c.block_size),
                     static_cast<uint32_t>(c.dcp_world_size),
                     static_cast<uint32_t>(c.dcp_rank),
                     static_cast<uint32_t>(c.cp_interleave)};
    to_.job.rank = static_cast<int32_t>(c.rank);
    to_.job.local = ints("local_token_indices");
    to_.job.positions = ints("positions");
    to_.job.restore = ints("allgather_restore_idx");
    to_.job.hidden = ints("hidden_restore_idx");
    to_.job.slots = reinterpret_cast<int64_t*>(number("slot_mapping"));
    transport_ = transport;
  }

  // The counts, the longest key row of each chunk and the batch as bytes, by their names in the metadata. Written to `step`, or if
  // attached to a buffer that send() takes. Block tables on the host, int32 or int64 with a contiguous last dimension, are checked
  // and copied to `kept` [requests or more, at least their columns] int32, if it is not None.
  py::dict plan(py::handle step, py::handle query_lens, py::handle context_lens, py::handle is_prefill, py::handle prompt_lens,
                py::handle num_requests_padded, py::handle num_tokens_padded, py::handle num_kv_tokens_padded,
                py::handle workspace_tokens, int64_t block_rows, int64_t block_columns, py::handle host_tables, py::handle kept) {
    const Sizes sizes{optional_size("num_requests_padded", num_requests_padded),
                      optional_size("num_tokens_padded", num_tokens_padded),
                      optional_size("num_kv_tokens_padded", num_kv_tokens_padded),
                      optional_size("workspace_tokens", workspace_tokens),
                      block_rows,
                      block_columns};
    const Batch batch = read(query_lens, context_lens, is_prefill, prompt_lens);
    const HostTables tables = tables_of(host_tables, kept);
    int32_t* to = nullptr;
    if (transport_ == nullptr) {
      to = static_cast<int32_t*>(py::reinterpret_borrow<py::array>(step).mutable_data());
    } else {
      const py::gil_scoped_release released;
      check_sent(transport_->wait(staging_[0].copied));
      to = staging_[0].host;
    }
    const Counts n = planner_.plan(batch, sizes, tables, to);
    planned_ = n;
    py::tuple longest(n.chunks);
    for (int64_t k = 0; k < n.chunks; ++k) longest[k] = py::int_(planner_.chunk_max_seqlens()[k]);
    py::dict fields;
    size_t next = 0;
    const auto put = [&](py::object value) {
      if (PyDict_SetItem(fields.ptr(), names_[next++].ptr(), value.ptr()) != 0) throw py::error_already_set();
    };
    for (const int64_t number : {n.requests, n.tokens, n.tokens_padded, n.new_tokens, n.restored, n.context, n.kv_tokens, n.kv_rows,
                                 n.heads, n.tails, n.head_kv, n.tail_kv, n.max_seqlen_q, n.max_seqlen_k}) {
      put(py::int_(number));
    }
    put(std::move(longest));
    put(snapshot(batch, n.requests));
    return fields;
  }

  // Issue the last plan's copy and expansion on the current stream. Without block tables, block_columns is -1.
  void send(int64_t blocks, int64_t block_stride, int64_t block_rows, int64_t block_columns, int64_t kv_rows) {
    const Config& c = planner_.config();
    std::swap(staging_[0], staging_[1]);
    to_.host = staging_[1].host;
    to_.copied = staging_[1].copied;
    to_.bytes = (c.at.chunks + planned_.chunks * c.at.chunk_stride) * 4;
    auto& job = to_.job;
    job.table.requests = static_cast<int32_t>(planned_.requests);
    job.rows = static_cast<int32_t>(planned_.tokens_padded);
    job.has_slots = block_columns >= 0;
    job.kv_rows = job.has_slots ? static_cast<int32_t>(planned_.kv_rows) : 0;
    job.kv = reinterpret_cast<int32_t*>(kv_rows);
    job.split = planned_.chunks > 1;
    job.cache.blocks = reinterpret_cast<const int32_t*>(blocks);
    job.cache.row_stride = block_stride;
    job.cache.rows = block_rows;
    job.cache.columns = block_columns;
    check_sent(transport_->submit(to_));
  }

  int64_t largest_rank(py::handle query_lens, py::handle is_prefill) {
    return planner_.largest_rank(read(query_lens, py::none(), is_prefill, py::none()));
  }

 private:
  struct Staged {
    int32_t* host;
    void* copied;  // cudaEvent_t
  };

  static void check_sent(const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("pcp_mla: CUDA error: ") + error);
  }

  static HostTables tables_of(py::handle host_tables, py::handle kept) {
    if (host_tables.is_none()) return {};
    const auto array = py::reinterpret_borrow<py::array>(host_tables);
    const bool wide = array.itemsize() == 8;
    if (array.ndim() != 2 || !(wide ? py::array_t<int64_t, 0>::check_(array) : py::array_t<int32_t, 0>::check_(array)) ||
        (array.size() > 0 && array.shape(1) > 1 && array.strides(1) != array.itemsize())) {
      throw std::invalid_argument("_planner: block_tables must be int32 or int64 with a contiguous last dimension");
    }
    HostTables tables{static_cast<const char*>(array.data()), array.strides(0), wide, nullptr, 0};
    if (!kept.is_none()) {
      auto to = py::reinterpret_borrow<py::array_t<int32_t>>(kept);
      tables.kept = to.mutable_data();
      tables.kept_stride = to.shape(1);
    }
    return tables;
  }

  Batch read(py::handle query_lens, py::handle context_lens, py::handle is_prefill, py::handle prompt_lens) {
    if (query_lens.is_none()) fail<py::type_error>("query_lens must be one-dimensional and of numbers, got None");
    Batch batch{};
    batch.query_lens = query_.read("query_lens", query_lens);
    batch.count = query_.count();
    batch.context_lens = context_.read("context_lens", context_lens, batch.count);
    batch.prompt_lens = prompt_.read("prompt_lens", prompt_lens, batch.count);
    if (!is_prefill.is_none()) {
      prefill_ = Bools::check_(is_prefill) ? py::reinterpret_borrow<py::array>(is_prefill) : as_array("is_prefill", is_prefill, -1);
      if (prefill_.size() > 0 && !Bools::check_(prefill_)) {
        if (prefill_.dtype().kind() != 'b') {
          fail<py::type_error>("is_prefill must be bool, got ", text_of(py::str(prefill_.dtype())));
        }
        prefill_ = Bools::ensure(prefill_);
      }
      if (prefill_.ndim() != 1 || prefill_.shape(0) != batch.count) {
        fail<py::value_error>("is_prefill must have one entry for each of the ", batch.count, " requests, got ", prefill_.size());
      }
      batch.is_prefill = static_cast<const uint8_t*>(prefill_.data());
    }
    return batch;
  }

  // query_lens, context_lens and prompt_lens as int32, is_prefill as bytes: the caller may change its arrays after plan().
  static py::bytes snapshot(const Batch& batch, int64_t requests) {
    auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, requests * 13));
    if (!bytes) throw py::error_already_set();
    char* to = PyBytes_AS_STRING(bytes.ptr());
    for (const int32_t* values : {batch.query_lens, batch.context_lens, batch.prompt_lens}) {
      const int64_t given = values ? batch.count : 0;
      if (given > 0) std::memcpy(to, values, given * 4);
      std::memset(to + given * 4, 0, (requests - given) * 4);
      to += requests * 4;
    }
    const int64_t given = batch.is_prefill ? batch.count : 0;
    if (given > 0) std::memcpy(to, batch.is_prefill, given);
    std::memset(to + given, 1, requests - given);
    return bytes;
  }

  Planner planner_;
  const pcp_mla::PlanTransport* transport_ = nullptr;  // null: plans stay on the host
  pcp_mla::PlanSubmission to_{};
  Staged staging_[2]{};
  Counts planned_{};
  Lengths query_, context_, prompt_;
  py::array prefill_;
  std::vector<py::str> names_;  // made once: a dictionary takes them as they are
};

}  // namespace

PYBIND11_MODULE(_planner, m) {
  py::class_<Bound>(m, "Planner")
      .def(py::init([](const py::dict& numbers, const py::dict& offsets, const py::sequence& names) {
        const auto number = [&](const char* name) { return numbers[name].cast<int64_t>(); };
        const auto offset = [&](const char* name) { return offsets[name].cast<int64_t>(); };
        Config c{};
        c.max_requests = number("max_requests");
        c.max_tokens = number("max_tokens");
        c.max_local_tokens = number("max_local_tokens");
        c.max_kv_tokens = number("max_kv_tokens");
        c.max_context_chunks = number("max_context_chunks");
        c.world_size = number("world_size");
        c.rank = number("rank");
        c.padded = number("padded") != 0;
        c.round_robin = number("round_robin") != 0;
        c.block_size = number("block_size");
        c.dcp_world_size = number("dcp_world_size");
        c.dcp_rank = number("dcp_rank");
        c.cp_interleave = number("cp_interleave");
        c.at = {offset("row_table"),      offset("cu_seqlens_q"),         offset("cu_seqlens_k"), offset("seqused_k"),
                offset("logits_indices"), offset("discard_request_mask"), offset("shard_starts"), offset("request_table"),
                offset("chunks"),         offset("chunk_stride"),         offset("chunk_starts"), offset("chunk_cu_seqlens_k"),
                offset("chunk_seqused_k")};
        return Bound(c, names);
      }))
      .def("attach", &Bound::attach)
      .def("plan", &Bound::plan)
      .def("send", &Bound::send)
      .def("largest_rank", &Bound::largest_rank);
}
