// The host part of a step's plan: per-request tables, written into one int32 buffer. No torch, no Python, no allocation in plan().
//
// python/pcp_mla/plan/partition.py and slots.py define every number; python/pcp_mla/planner/step_buffer.py says where each array
// lies. What grows with the number of tokens is not made here but by the plan_expand op, from the request table.
#pragma once
#include <cstdint>
#include <vector>

namespace pcp_mla::planner {

// Where each array starts in the step buffer, in int32s. The chunk offsets are relative to a chunk's own start.
struct Offsets {
  int64_t row_table, cu_seqlens_q, cu_seqlens_k, seqused_k, logits_indices, discard_mask, shard_starts, requests;
  int64_t chunks, chunk_stride, chunk_starts, chunk_cu_seqlens_k, chunk_seqused_k;
};

struct Config {
  int64_t max_requests, max_tokens, max_local_tokens;
  int64_t max_kv_tokens;  // -1: no limit
  int64_t max_context_chunks;
  int64_t world_size, rank;
  bool padded, round_robin;
  int64_t block_size, dcp_world_size, dcp_rank, cp_interleave;
  Offsets at;
};

struct Batch {
  int64_t count;
  const int32_t* query_lens;
  const int32_t* context_lens;  // null: no context
  const uint8_t* is_prefill;    // null: all are
  const int32_t* prompt_lens;   // null: every request samples
};

// What the caller fixes beside the batch; -1 where it does not.
struct Sizes {
  int64_t requests, tokens, kv_tokens;  // padded counts
  int64_t workspace;                    // rows of K and V that fit at a time
  int64_t block_rows, block_columns;    // of the block tables
};

// Block tables on the host: their entries are checked, and kept if there is room for them. Only those of blocks in use are read.
struct HostTables {
  const char* entries;  // int32, or int64 if wide; null: the tables are on a GPU
  int64_t row_bytes;    // from one row to the next
  bool wide;
  int32_t* kept;  // null: not wanted
  int64_t kept_stride;
};

struct Counts {
  int64_t requests;
  int64_t tokens, tokens_padded;  // T, Np
  int64_t new_tokens, restored;   // of all ranks: rows in natural and in restored order
  int64_t kv_tokens, kv_rows;     // N, and N padded
  int64_t heads, tails, head_kv, tail_kv;
  int64_t max_seqlen_q, max_seqlen_k;
  int64_t context;  // cached tokens of all requests
  int64_t chunks;   // calls over keys: 1, or context chunks and one for the new tokens
  int64_t prefills;
};

class Planner {
 public:
  explicit Planner(const Config& config);

  // Throws std::invalid_argument before anything is written.
  Counts plan(const Batch& batch, const Sizes& sizes, const HostTables& tables, int32_t* step);

  // The local tokens of the fullest rank, as plan() would count them.
  int64_t largest_rank(const Batch& batch);

  // [chunks] longest key row of each chunk of the last plan.
  const std::vector<int32_t>& chunk_max_seqlens() const { return chunk_max_; }
  const Config& config() const { return config_; }

 private:
  struct Cut {  // how a request is shared out
    int64_t chunk, padded;
    int64_t owner;  // -1 for a prefill, else the first rank that holds the decode
  };
  Cut cut(int64_t query, bool prefill, int64_t decode) const;
  int64_t head(const Cut& c, int64_t query, int64_t rank) const;
  int64_t tail(const Cut& c, int64_t rank) const;
  Batch complete(const Batch& batch) const;
  void check_batch(const Batch& batch) const;
  Counts measure(const Batch& batch);
  void check_sizes(const Batch& batch, const Sizes& sizes, Counts& counts) const;
  int64_t held(int64_t length, int64_t shard) const;
  int64_t blocks_of(int64_t length) const;
  void check_block_tables(const Batch& batch, const Sizes& sizes) const;
  template <typename Entry>
  void check_entries(const HostTables& tables, int64_t count) const;
  template <typename Entry>
  void keep_entries(const HostTables& tables, int64_t count) const;
  void read_tables(const Batch& batch, const HostTables& tables);
  void write(const Batch& batch, Counts& counts, int32_t* step) const;
  void write_local_starts(const Batch& batch, const Counts& counts, int32_t* step) const;
  void write_chunks(const Sizes& sizes, const Counts& counts, int32_t* step);

  Config config_;
  uint64_t per_block_;  // 2**block_shift_ / block_size, rounded up: a length's blocks by one multiplication
  int block_shift_;
  std::vector<int64_t> per_rank_;
  std::vector<int32_t> blocks_;  // that each request of the last batch uses
  std::vector<int32_t> no_context_;
  std::vector<uint8_t> all_prefill_;
  std::vector<int32_t> chunk_max_;
};

}  // namespace pcp_mla::planner
