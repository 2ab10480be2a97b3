// CUDA ops past the dispatcher: in eager inference its boxed arguments cost more than a small kernel's launch. _native_cuda has the
// table, direct/bindings.cpp calls through it. All return null or what was wrong, and then have done nothing.
#pragma once
#include <cstddef>

#include "attention_call.h"
#include "exchange_heads.h"
#include "publish_latents.h"
#include "view.h"

namespace pcp_mla {

struct DirectOps {
  size_t layout;  // kDirectLayout where it was compiled: another one is a library of another version
  const char* (*merge_attn_states)(const View& out_a, const View& lse_a, const View& out_b, const View& lse_b, const View* scale,
                                   const View* row_op, const View* cu_seqlens, const View* out_rows, bool base2, const View& out,
                                   const View* lse_out);
  const char* (*merge_n_attn_states)(const View* outs, const View* lses, size_t count, const View* scale, bool base2,
                                     const View& out, const View* lse_out);
  const char* (*cp_correct_out)(const View& out, const View& lses, const View* seqused_k, int64_t rank, bool base2,
                                const View& corrected, const View* lse_out);
  // Also [tokens, width] for k_nope and out: one head.
  const char* (*concat_k)(const View& k_nope, const View& k_pe, const View& out);
  const char* (*write_latent_cache)(const View& latents, const View& cache, const View& slot_mapping, const View* scale);
  // Only what the wgmma kernel is chosen for.
  const char* (*kv_up_project)(const View& latents, const View* rows, const View& weight, const View* scale, const View& k_out,
                               const View& v_out, const View* k_pe_out);
  // Only what the wgmma kernel takes.
  const char* (*attention)(const AttentionArguments& arguments);
  const char* (*publish_latents)(Mailbox& mailbox, const PublishCall& call, Published& where);
  const char* (*exchange_heads)(Mailbox& mailbox, const HeadsCall& call);
};

constexpr size_t kDirectLayout = sizeof(View) << 16 | sizeof(DirectOps);

}  // namespace pcp_mla
