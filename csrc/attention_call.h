// What a call of pcp_attention's kernel is given.
#pragma once
#include "view.h"

namespace pcp_mla {

// Null where there is none.
struct AttentionArguments {
  const View &q, &k, &v, *k_pe, *kv_rows, &cu_seqlens_q, &cu_seqlens_k, &seqused_k, *prev_out, *prev_lse;
  double softmax_scale;
  bool causal;
  const View &out, *lse;
};

}  // namespace pcp_mla
