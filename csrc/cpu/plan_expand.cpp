// plan_expand on the CPU: tokens of a chunk are consecutive everywhere, so each array is filled in runs.
#include "../plan_expand.h"

#include <algorithm>
#include <numeric>

namespace pcp_mla::cpu {
namespace {

// count tokens of a request, from its token-th on, that lie at local row `at` of a rank.
void expand_run(const PlanExpand& p, int32_t rank, int32_t request, int32_t token, int32_t at, int32_t count) {
  const RequestTable& table = p.table;
  const int32_t gathered = rank * p.rows + at, query = table.query_len(request), context = table.context_len(request);
  const int32_t real = std::clamp(query - token, 0, count);
  const int32_t natural = table.natural()[request] + token;
  if (rank == p.rank) {
    std::iota(p.positions + at, p.positions + at + count, context + token);
    std::iota(p.local + at, p.local + at + real, natural);
    std::fill(p.local + at + real, p.local + at + count, -1);
  }
  const int32_t shifted = table.restored_shift(request, rank) + token;
  if (shifted >= 0 && shifted + count <= table.restored_len(request)) {
    int32_t* restore = p.restore + table.restored_start(request) + shifted;
    std::iota(restore, restore + count, gathered);
  }
  const bool first = table.is_first_copy(request, rank);
  if (first) std::iota(p.hidden + natural, p.hidden + natural + real, gathered);
  if (!p.has_slots) return;
  for (int32_t j = 0; j < count; ++j) {
    p.slots[gathered + j] = first && j < real ? p.cache.slot(request, context + token + j) : -1;
  }
}

void expand_rank(const PlanExpand& p, int32_t rank) {
  const RequestTable& table = p.table;
  const int32_t* local = table.local(rank);
  for (int32_t i = 0; i < table.requests; ++i) {
    const int32_t held = local[i + 1] - local[i];
    const int32_t head = table.owner()[i] < 0 ? std::min(held, table.head_len(i, rank)) : held;
    if (head > 0) expand_run(p, rank, i, table.head_start(i, rank), local[i], head);
    if (held > head) expand_run(p, rank, i, table.tail_start(i, rank), local[i] + head, held - head);
  }
  const int32_t end = local[table.requests];
  if (rank == p.rank) {
    std::fill(p.local + end, p.local + p.rows, -1);
    std::fill(p.positions + end, p.positions + p.rows, 0);
  }
  if (p.has_slots) std::fill(p.slots + int64_t{rank} * p.rows + end, p.slots + (int64_t{rank} + 1) * p.rows, int64_t{-1});
}

void expand_kv_rows(const PlanExpand& p) {
  const RequestTable& table = p.table;
  const int32_t contexts = table.context()[table.requests];
  for (int32_t i = 0; i < table.requests; ++i) {
    const int32_t context = table.context_len(i), length = context + table.query_len(i);
    const int32_t total = context + table.restored_len(i);
    int32_t* cached = p.kv + (p.split ? table.context()[i] : table.keys()[i]);
    int32_t* fresh = p.split ? p.kv + contexts + table.restored_start(i) - context : cached;
    for (int32_t n = 0; n < total; ++n) {
      (n < context ? cached : fresh)[n] = n < length ? static_cast<int32_t>(p.cache.slot(i, n)) : -1;
    }
  }
  std::fill(p.kv + table.keys()[table.requests], p.kv + p.kv_rows, -1);
}

// A table that does not fit would send writes outside of the outputs. On the CPU looking at it costs nothing.
void check_table(const PlanExpand& p) {
  const RequestTable& table = p.table;
  const auto rises = [&](const int32_t* prefix, int64_t limit) {
    bool ok = prefix[0] == 0 && prefix[table.requests] <= limit;
    for (int32_t i = 0; i < table.requests; ++i) ok = ok && prefix[i] <= prefix[i + 1];
    return ok;
  };
  bool ok = rises(table.context(), INT32_MAX) && rises(table.natural(), INT32_MAX);
  for (int32_t i = 0; ok && i < table.requests; ++i) ok = table.restored_len(i) >= table.query_len(i);
  if (p.rows > 0) {
    ok = ok && table.restored_start(table.requests) <= int64_t{table.world} * p.rows;
    for (int32_t k = 0; k < table.world; ++k) ok = ok && rises(table.local(k), p.rows);
    // A chunk's first token lies inside its request, so its run does, too.
    for (int32_t i = 0; ok && i < table.requests; ++i) {
      const int64_t chunk = table.chunk()[i], length = table.restored_len(i);
      for (int32_t k = 0; ok && k < table.world; ++k) {
        const int64_t held = table.local(k)[i + 1] - table.local(k)[i], head = std::clamp<int64_t>(length - k * chunk, 0, chunk);
        const int64_t tail = std::clamp<int64_t>(length - (2 * table.world - 1 - k) * chunk, 0, chunk);
        ok = table.owner()[i] < 0 ? held == head + tail : held == 0 || held == table.query_len(i);
      }
    }
  }
  if (p.kv_rows > 0) ok = ok && rises(table.keys(), p.kv_rows);
  check(ok, "plan_expand: request_table must describe a batch that fits the outputs");
}

void plan_expand(const Tensor& request_table, const std::optional<Tensor>& block_tables, const Tensor& local_token_indices,
                 const Tensor& positions, const Tensor& allgather_restore_idx, const Tensor& hidden_restore_idx,
                 const Tensor& slot_mapping, const Tensor& kv_rows, int64_t num_requests, int64_t world_size, int64_t rank,
                 int64_t num_tokens_padded, int64_t num_kv_rows, bool split, int64_t block_size, int64_t dcp_world_size,
                 int64_t dcp_rank, int64_t cp_interleave) {
  const PlanExpand p(request_table, block_tables, local_token_indices, positions, allgather_restore_idx, hidden_restore_idx,
                     slot_mapping, kv_rows, num_requests, world_size, rank, num_tokens_padded, num_kv_rows, split, block_size,
                     dcp_world_size, dcp_rank, cp_interleave);
  check_table(p);
  const int32_t requests = p.table.requests;
  if (p.rows > 0) {
    for (int32_t k = 0; k < p.table.world; ++k) expand_rank(p, k);
    const int64_t gathered = int64_t{p.table.world} * p.rows;
    std::fill(p.restore + p.table.restored_start(requests), p.restore + gathered, -1);
    std::fill(p.hidden + p.table.natural()[requests], p.hidden + gathered, -1);
  }
  if (p.kv_rows > 0) expand_kv_rows(p);
}

}  // namespace
}  // namespace pcp_mla::cpu

STABLE_TORCH_LIBRARY_IMPL(pcp_mla, CPU, m) { m.impl("plan_expand", TORCH_BOX(&pcp_mla::cpu::plan_expand)); }
