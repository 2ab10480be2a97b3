// The table of ops past the dispatcher.
#include "direct.h"

extern "C" __attribute__((visibility("default"))) const pcp_mla::DirectOps* pcp_mla_direct_ops() {
  static const pcp_mla::DirectOps table = [] {
    pcp_mla::DirectOps ops{pcp_mla::kDirectLayout};
    pcp_mla::cuda::add_merges(ops);
    pcp_mla::cuda::add_concat_k(ops);
    pcp_mla::cuda::add_latent_cache(ops);
    pcp_mla::cuda::add_kv_up_project(ops);
    pcp_mla::cuda::add_attention(ops);
    pcp_mla::cuda::add_publish_latents(ops);
    pcp_mla::cuda::add_exchange_heads(ops);
    return ops;
  }();
  return &table;
}
