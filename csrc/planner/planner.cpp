#include "planner.h"

#include <algorithm>
#include <bit>
#include <sstream>
#include <stdexcept>

namespace pcp_mla::planner {
namespace {

template <typename... Args>
void require(bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream text;
  text << "PCPPlanner.plan: ";
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

int64_t clip(int64_t value, int64_t high) { return std::clamp<int64_t>(value, 0, high); }

}  // namespace

Planner::Planner(const Config& config)
    : config_(config),
      per_rank_(config.world_size),
      blocks_(config.max_requests),
      no_context_(config.max_requests, 0),
      all_prefill_(config.max_requests, 1) {
  chunk_max_.reserve(config.max_context_chunks + 1);
  const auto size = static_cast<uint64_t>(config.block_size);
  block_shift_ = 31 + std::bit_width(size - 1);
  per_block_ = ((uint64_t{1} << block_shift_) + size - 1) / size;
}

Planner::Cut Planner::cut(int64_t query, bool prefill, int64_t decode) const {
  const int64_t world = config_.world_size;
  if (!prefill) return {query, config_.padded ? query * world : query, config_.round_robin ? decode % world : 0};
  const int64_t chunk = (query + 2 * world - 1) / (2 * world);
  return {chunk, config_.padded ? chunk * 2 * world : query, -1};
}

int64_t Planner::head(const Cut& c, int64_t query, int64_t rank) const {
  if (c.owner >= 0) return config_.round_robin && rank != c.owner ? 0 : query;
  return clip(c.padded - rank * c.chunk, c.chunk);
}

int64_t Planner::tail(const Cut& c, int64_t rank) const {
  return c.owner >= 0 ? 0 : clip(c.padded - (2 * config_.world_size - 1 - rank) * c.chunk, c.chunk);
}

// The batch with what was left out.
Batch Planner::complete(const Batch& batch) const {
  Batch full = batch;
  if (!full.context_lens) full.context_lens = no_context_.data();
  if (!full.is_prefill) full.is_prefill = all_prefill_.data();
  return full;
}

void Planner::check_batch(const Batch& batch) const {
  const auto sum = [&](const char* name, const int32_t* values) {
    int64_t total = 0;
    int32_t all = 0;
    for (int64_t i = 0; values && i < batch.count; ++i) {
      total += values[i];
      all |= values[i];
    }
    if (all < 0) {
      const int64_t i = std::find_if(values, values + batch.count, [](int32_t v) { return v < 0; }) - values;
      require(false, name, " must not be negative, got ", values[i], " for request ", i);
    }
    require(total <= INT32_MAX, name, " must add up to less than 2**31, got ", total);
    return total;
  };
  require(batch.count <= config_.max_requests, "query_lens must have at most ", config_.max_requests,
          " requests, as the planner was made for, got ", batch.count);
  const int64_t total = sum("query_lens", batch.query_lens);
  require(total <= config_.max_tokens, "query_lens must add up to at most ", config_.max_tokens,
          " tokens, as the planner was made for, got ", total);
  sum("context_lens", batch.context_lens);
  sum("prompt_lens", batch.prompt_lens);
}

// Totals over the requests.
Counts Planner::measure(const Batch& batch) {
  Counts n{};
  std::fill(per_rank_.begin(), per_rank_.end(), 0);
  int64_t decodes = 0, replicated = 0;
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t query = batch.query_lens[i];
    const bool prefill = batch.is_prefill[i];
    const Cut c = cut(query, prefill, decodes);
    decodes += !prefill;
    n.new_tokens += query;
    n.restored += c.padded;
    n.context += batch.context_lens[i];
    if (prefill) {
      for (int64_t k = 0; k < config_.world_size; ++k) per_rank_[k] += head(c, query, k) + tail(c, k);
    } else if (config_.round_robin) {
      per_rank_[c.owner] += query;
    } else {
      replicated += query;
    }
  }
  for (int64_t& tokens : per_rank_) tokens += replicated;
  n.requests = batch.count;
  n.prefills = batch.count - decodes;
  n.tokens = per_rank_[config_.rank];
  n.tokens_padded = *std::max_element(per_rank_.begin(), per_rank_.end());
  n.kv_tokens = n.kv_rows = n.context + n.restored;
  n.chunks = 1;
  return n;
}

// Tokens that a shard has of a sequence of so many.
int64_t Planner::held(int64_t length, int64_t shard) const {
  if (config_.dcp_world_size == 1) return length;
  const int64_t round = config_.cp_interleave * config_.dcp_world_size;
  return length / round * config_.cp_interleave + clip(length % round - shard * config_.cp_interleave, config_.cp_interleave);
}

// Blocks of this shard for a sequence of so many tokens.
int64_t Planner::blocks_of(int64_t length) const {
  length = held(length, config_.dcp_rank);
  if (length == 0) return 0;
  // Exact for less than 2**31 tokens; 256 divisions would take as long as half of the plan.
  return static_cast<int64_t>((static_cast<uint64_t>(length - 1) * per_block_) >> block_shift_) + 1;
}

void Planner::check_block_tables(const Batch& batch, const Sizes& sizes) const {
  if (sizes.block_columns < 0) return;
  require(sizes.block_rows >= batch.count, "block_tables must have a row for each of the ", batch.count, " requests, got ",
          sizes.block_rows);
  int64_t longest = 0, request = 0;
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t length = int64_t{batch.context_lens[i]} + batch.query_lens[i];
    if (length > longest) longest = length, request = i;
  }
  // This shard's part of a sequence grows with the sequence: the longest one needs most blocks.
  const int64_t blocks = blocks_of(longest);
  require(blocks <= sizes.block_columns, "block_tables must have at least ", blocks, " blocks of ", config_.block_size, " for the ",
          longest, " context and new tokens of request ", request, ", got ", sizes.block_columns);
}

// A plan is of one moment, and its block numbers have slots of their own: what is in use is looked at once, all of it.
template <typename Entry>
void Planner::check_entries(const HostTables& tables, int64_t count) const {
  const int64_t limit = (int64_t{1} << 31) / config_.block_size;
  for (int64_t i = 0; i < count; ++i) {
    const auto* row = reinterpret_cast<const Entry*>(tables.entries + i * tables.row_bytes);
    std::make_unsigned_t<Entry> all = 0;
    for (int32_t j = 0; j < blocks_[i]; ++j) all |= static_cast<std::make_unsigned_t<Entry>>(row[j]);
    if (all < static_cast<uint64_t>(limit)) continue;  // then so is each
    for (int32_t j = 0; j < blocks_[i]; ++j) {
      require(row[j] >= 0 && row[j] < limit, "block_tables must have numbers of 0 to ", limit - 1, ", so that slots of blocks of ",
              config_.block_size, " stay below 2**31, got ", row[j], " for block ", j, " of request ", i);
    }
  }
}

template <typename Entry>
void Planner::keep_entries(const HostTables& tables, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) {
    const auto* row = reinterpret_cast<const Entry*>(tables.entries + i * tables.row_bytes);
    std::copy_n(row, blocks_[i], tables.kept + i * tables.kept_stride);
  }
}

void Planner::read_tables(const Batch& batch, const HostTables& tables) {
  for (int64_t i = 0; i < batch.count; ++i) {
    blocks_[i] = static_cast<int32_t>(blocks_of(int64_t{batch.context_lens[i]} + batch.query_lens[i]));
  }
  tables.wide ? check_entries<int64_t>(tables, batch.count) : check_entries<int32_t>(tables, batch.count);
  if (tables.kept == nullptr) return;
  tables.wide ? keep_entries<int64_t>(tables, batch.count) : keep_entries<int32_t>(tables, batch.count);
}

void Planner::check_sizes(const Batch& batch, const Sizes& sizes, Counts& n) const {
  require(n.kv_tokens <= INT32_MAX, "context_lens and padded query_lens together must add up to less than 2**31, got ",
          n.kv_tokens);
  if (sizes.requests >= 0) {
    require(sizes.requests >= batch.count && sizes.requests <= config_.max_requests, "num_requests_padded must be ", batch.count,
            " (the requests) to ", config_.max_requests, ", got ", sizes.requests);
    n.requests = sizes.requests;
  }
  if (sizes.tokens >= 0) {
    require(sizes.tokens >= n.tokens_padded && sizes.tokens <= config_.max_local_tokens, "num_tokens_padded must be ",
            n.tokens_padded, " (the tokens of the fullest rank) to ", config_.max_local_tokens, ", got ", sizes.tokens);
    n.tokens_padded = sizes.tokens;
  }
  if (sizes.kv_tokens >= 0) {
    require(sizes.kv_tokens >= n.kv_tokens && sizes.kv_tokens <= INT32_MAX, "num_kv_tokens_padded must be at least ", n.kv_tokens,
            " (context and new tokens), got ", sizes.kv_tokens);
    n.kv_rows = sizes.kv_tokens;
  }
  require(config_.max_kv_tokens < 0 || n.kv_rows <= config_.max_kv_tokens,
          "context and new tokens must be at most max_kv_tokens = ", config_.max_kv_tokens, ", got ", n.kv_rows);
  if (sizes.workspace >= 0 && n.kv_tokens > sizes.workspace) {
    require(n.restored <= sizes.workspace && sizes.workspace > 0, "workspace_tokens must be at least the ", n.restored,
            " rows of the new tokens, got ", sizes.workspace);
    const int64_t chunks = (n.context + sizes.workspace - 1) / sizes.workspace;
    require(chunks <= config_.max_context_chunks, "workspace_tokens must be large enough for ", n.context, " context tokens in ",
            config_.max_context_chunks, " chunks (max_context_chunks), got ", sizes.workspace);
    n.chunks = chunks + 1;
  }
  check_block_tables(batch, sizes);
}

int64_t Planner::largest_rank(const Batch& batch) {
  const Batch full = complete(batch);
  check_batch(full);
  return measure(full).tokens_padded;
}

Counts Planner::plan(const Batch& batch, const Sizes& sizes, const HostTables& tables, int32_t* step) {
  const Batch full = complete(batch);
  check_batch(full);
  Counts n = measure(full);
  check_sizes(full, sizes, n);
  if (tables.entries != nullptr) read_tables(full, tables);
  write(full, n, step);
  write_local_starts(full, n, step);
  write_chunks(sizes, n, step);
  return n;
}

void Planner::write(const Batch& batch, Counts& n, int32_t* step) const {
  const Offsets& at = config_.at;
  const int64_t world = config_.world_size, rank = config_.rank, requests = n.requests, columns = requests + 1;
  // Running sums stay in registers: to read one back from the array it was just stored to takes as long as all the rest.
  int32_t *const q_head = step + at.row_table, *const q_tail = q_head + columns, *const k_head = q_tail + columns;
  int32_t *const k_tail = k_head + columns, *const row_keys = k_tail + columns;
  int32_t *const natural = step + at.requests, *const contexts = natural + columns, *const keys = contexts + columns;
  int32_t *const chunk = keys + columns, *const owner = chunk + columns;
  int32_t *const cu_q = step + at.cu_seqlens_q, *const cu_k = step + at.cu_seqlens_k, *const used = step + at.seqused_k;
  int32_t *const logits = step + at.logits_indices, *const shard_starts = step + at.shard_starts;
  auto* const discard = reinterpret_cast<uint8_t*>(step + at.discard_mask);
  int32_t heads = 0, tails = 0, head_kv = 0, tail_kv = 0, key = 0, token = 0, cached = 0, sent = 0, longest_q = 0, longest_k = 0;
  int64_t decodes = 0;
  for (int64_t i = 0; i < requests; ++i) {
    const bool given = i < batch.count;  // the others are the empty ones that pad the batch
    const int32_t query = given ? batch.query_lens[i] : 0, context = given ? batch.context_lens[i] : 0;
    const bool prefill = !given || batch.is_prefill[i];
    const Cut c = cut(query, prefill, decodes);
    decodes += !prefill;
    const auto in_head = static_cast<int32_t>(head(c, query, rank)), in_tail = static_cast<int32_t>(tail(c, rank));
    const auto head_start = static_cast<int32_t>(prefill ? rank * c.chunk : 0);
    const auto tail_start = static_cast<int32_t>((2 * world - 1 - rank) * c.chunk);
    const int32_t used_head = in_head > 0 ? context + head_start + in_head : 0;
    const int32_t used_tail = in_tail > 0 ? context + tail_start + in_tail : 0;
    q_head[i] = heads;
    q_tail[i] = tails;
    k_head[i] = head_kv;
    k_tail[i] = tail_kv;
    row_keys[i] = keys[i] = cu_k[2 * i] = cu_k[2 * i + 1] = key;
    natural[i] = token;
    contexts[i] = cached;
    shard_starts[i] = sent;
    chunk[i] = static_cast<int32_t>(c.chunk);
    owner[i] = static_cast<int32_t>(c.owner);
    cu_q[2 * i] = heads + tails;
    cu_q[2 * i + 1] = heads + tails + in_head;
    used[2 * i] = used_head;
    used[2 * i + 1] = used_tail;
    logits[i] = query > 0 ? key - cached + query - 1 : -1;
    discard[i] = query == 0 || (batch.prompt_lens && int64_t{context} + query < batch.prompt_lens[i]);
    heads += in_head;
    tails += in_tail;
    head_kv += used_head;
    tail_kv += used_tail;
    key += context + static_cast<int32_t>(c.padded);
    token += query;
    cached += context;
    sent += static_cast<int32_t>(held(context, 0));  // the first shard never has fewer than another one
    longest_q = std::max({longest_q, in_head, in_tail});
    longest_k = std::max({longest_k, used_head, used_tail});
  }
  q_head[requests] = heads;
  q_tail[requests] = tails;
  k_head[requests] = head_kv;
  k_tail[requests] = tail_kv;
  row_keys[requests] = keys[requests] = cu_k[2 * requests] = key;
  natural[requests] = token;
  contexts[requests] = cached;
  shard_starts[requests] = sent;
  chunk[requests] = owner[requests] = 0;
  cu_q[2 * requests] = heads + tails;
  n.heads = heads;
  n.tails = tails;
  n.head_kv = head_kv;
  n.tail_kv = tail_kv;
  n.max_seqlen_q = longest_q;
  n.max_seqlen_k = longest_k;
}

// Prefix sums of every rank's local tokens.
void Planner::write_local_starts(const Batch& batch, const Counts& n, int32_t* step) const {
  const int64_t columns = n.requests + 1;
  const int32_t* natural = step + config_.at.requests;
  int32_t* local = step + config_.at.requests + 5 * columns;
  for (int64_t k = 0; k < config_.world_size; ++k, local += columns) {
    if (n.prefills == 0 && !config_.round_robin) {  // every rank holds every token
      std::copy(natural, natural + columns, local);
      continue;
    }
    int32_t start = 0;
    int64_t decodes = 0;
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t query = batch.query_lens[i];
      const bool prefill = batch.is_prefill[i];
      local[i] = start;
      const Cut c = cut(query, prefill, decodes);
      decodes += !prefill;
      start += static_cast<int32_t>(head(c, query, k) + tail(c, k));
    }
    std::fill(local + batch.count, local + columns, start);
  }
}

void Planner::write_chunks(const Sizes& sizes, const Counts& n, int32_t* step) {
  const Offsets& at = config_.at;
  const int32_t* used = step + at.seqused_k;
  const int32_t* contexts = step + at.requests + (n.requests + 1);
  const int32_t* keys = contexts + (n.requests + 1);
  chunk_max_.clear();
  for (int64_t k = 0; k < n.chunks; ++k) {
    int32_t* chunk = step + at.chunks + k * at.chunk_stride;
    int32_t *starts = chunk + at.chunk_starts, *cu_k = chunk + at.chunk_cu_seqlens_k, *lens = chunk + at.chunk_seqused_k;
    const bool last = k == n.chunks - 1, split = n.chunks > 1;
    const int64_t window = k * sizes.workspace;
    int32_t longest = 0;
    for (int64_t i = 0; i < n.requests; ++i) {
      const int32_t context = contexts[i + 1] - contexts[i];
      if (last) {
        const int32_t skipped = split ? context : 0;
        starts[i] = skipped;
        cu_k[2 * i] = split ? keys[i] - contexts[i] : keys[i];
        for (int64_t row = 2 * i; row < 2 * i + 2; ++row) lens[row] = used[row] > 0 ? used[row] - skipped : 0;
      } else {
        const int64_t begin = clip(contexts[i] - window, sizes.workspace), end = clip(contexts[i + 1] - window, sizes.workspace);
        starts[i] = static_cast<int32_t>(clip(window - contexts[i], context));
        cu_k[2 * i] = static_cast<int32_t>(begin);
        for (int64_t row = 2 * i; row < 2 * i + 2; ++row) lens[row] = static_cast<int32_t>(used[row] > 0 ? end - begin : 0);
      }
      cu_k[2 * i + 1] = cu_k[2 * i];
      longest = std::max({longest, lens[2 * i], lens[2 * i + 1]});
    }
    const int64_t rows = last ? (split ? n.restored : n.kv_tokens) : std::min(sizes.workspace, n.context - window);
    cu_k[2 * n.requests] = static_cast<int32_t>(rows);
    chunk_max_.push_back(longest);
  }
}

}  // namespace pcp_mla::planner
