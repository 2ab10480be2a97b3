// Schemas of all ops. Kernels register themselves from cpu/ and cuda/; fake kernels are in python/pcp_mla/ops/fused_gather.py, which also
// defines these schemas where this library is not built. tests/test_schemas.py compares the two.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pcp_mla, m) {
  m.def(
      "fused_gather(Tensor q, Tensor k, Tensor v, Tensor row_table, SymInt num_head_tokens, SymInt num_tail_tokens, "
      "SymInt num_head_kv, SymInt num_tail_kv) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "fused_gather_out(Tensor q, Tensor k, Tensor v, Tensor row_table, SymInt num_head_tokens, SymInt num_tail_tokens, "
      "SymInt num_head_kv, SymInt num_tail_kv, Tensor(a!) q_head, Tensor(b!) k_head, Tensor(c!) v_head, Tensor(d!) q_tail, "
      "Tensor(e!) k_tail, Tensor(f!) v_tail) -> ()");
  m.def(
      "fused_restore(Tensor out_head, Tensor out_tail, Tensor? lse_head, Tensor? lse_tail, Tensor row_table) -> (Tensor, Tensor)");
  m.def(
      "fused_restore_out(Tensor out_head, Tensor out_tail, Tensor? lse_head, Tensor? lse_tail, Tensor row_table, Tensor(a!) out, "
      "Tensor(b!)? lse) -> ()");
  m.def(
      "plan_expand(Tensor request_table, Tensor? block_tables, Tensor(a!) local_token_indices, Tensor(b!) positions, "
      "Tensor(c!) allgather_restore_idx, Tensor(d!) hidden_restore_idx, Tensor(e!) slot_mapping, Tensor(f!) kv_rows, "
      "SymInt num_requests, SymInt world_size, SymInt rank, SymInt num_tokens_padded, SymInt num_kv_rows, bool split, "
      "SymInt block_size, SymInt dcp_world_size, SymInt dcp_rank, SymInt cp_interleave) -> ()");
  m.def("merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor? scale, bool base2) -> (Tensor, Tensor)");
  m.def(
      "merge_attn_states_out(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor? scale, Tensor? row_op, "
      "Tensor? cu_seqlens, Tensor? out_rows, bool base2, Tensor(a!) out, Tensor(b!)? lse_out) -> ()");
  m.def("merge_n_attn_states(Tensor[] outs, Tensor[] lses, Tensor? scale, bool base2) -> (Tensor, Tensor)");
  m.def(
      "merge_n_attn_states_out(Tensor[] outs, Tensor[] lses, Tensor? scale, bool base2, Tensor(a!) out, Tensor(b!)? lse_out) "
      "-> ()");
  m.def(
      "cp_correct_out(Tensor out, Tensor lses, Tensor? seqused_k, SymInt rank, bool base2, Tensor(a!) corrected, "
      "Tensor(b!)? lse_out) -> ()");
  m.def("write_latent_cache(Tensor latents, Tensor(a!) cache, Tensor slot_mapping, Tensor? scale) -> ()");
  m.def(
      "gather_latents(Tensor cache, Tensor? rows, Tensor? block_table, Tensor? cu_seqlens, Tensor? starts, Tensor? scale, "
      "Tensor(a!) out) -> ()");
  m.def("concat_k(Tensor k_nope, Tensor k_pe, Tensor(a!) out) -> ()");
  m.def("kv_up_project(Tensor latents, Tensor? rows, Tensor weight, Tensor(a!) k_out, Tensor(b!) v_out) -> ()");
  m.def("kv_up_project_wgmma(Tensor latents, Tensor? rows, Tensor weight, Tensor(a!) k_out, Tensor(b!) v_out) -> ()");
}
