// The row table of a step: five prefix sums over R requests (see Partition.row_table in python/pcp_mla/plan/partition.py).
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PCP_HOST_DEVICE __host__ __device__
#else
#define PCP_HOST_DEVICE
#endif

namespace pcp_mla {

struct Place {
  int64_t head;  // row among the heads, -1 for none
  int64_t tail;  // row among the tails, -1 for none
};

struct RowTable {
  const int32_t* data;  // [5, requests + 1]
  int32_t requests;

  PCP_HOST_DEVICE const int32_t* q_head() const { return data; }
  PCP_HOST_DEVICE const int32_t* q_tail() const { return data + (requests + 1); }
  PCP_HOST_DEVICE const int32_t* k_head() const { return data + 2 * (requests + 1); }
  PCP_HOST_DEVICE const int32_t* k_tail() const { return data + 3 * (requests + 1); }
  PCP_HOST_DEVICE const int32_t* keys() const { return data + 4 * (requests + 1); }

  // Where local token t goes: to the heads or to the tails.
  PCP_HOST_DEVICE Place place_query(int64_t t) const {
    const int32_t *head = q_head(), *tail = q_tail();
    int32_t low = 0, high = requests;  // last request that starts at or before t: empty requests in front of it are passed over
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (int64_t{head[middle]} + tail[middle] <= t ? low : high) = middle;
    }
    const int64_t offset = t - head[low] - tail[low];
    const int64_t in_head = head[low + 1] - head[low];
    return offset < in_head ? Place{head[low] + offset, -1} : Place{-1, tail[low] + offset - in_head};
  }

  // Where row n of K and V in key order goes: to the head's prefix, to the tail's, to both or to none.
  PCP_HOST_DEVICE Place place_key(int64_t n) const {
    const int32_t *starts = keys(), *head = k_head(), *tail = k_tail();
    int32_t low = 0, high = requests;
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (starts[middle] <= n ? low : high) = middle;
    }
    const int64_t offset = n - starts[low];
    return {offset < head[low + 1] - head[low] ? head[low] + offset : -1,
            offset < tail[low + 1] - tail[low] ? tail[low] + offset : -1};
  }
};

}  // namespace pcp_mla
