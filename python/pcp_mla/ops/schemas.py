"""The schema of every op, written once: kernels in csrc/ register themselves for these names."""

SCHEMAS = {
    "fused_gather": (
        "(Tensor q, Tensor k, Tensor v, Tensor row_table, SymInt num_head_tokens, SymInt num_tail_tokens, "
        "SymInt num_head_kv, SymInt num_tail_kv) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "fused_gather_out": (
        "(Tensor q, Tensor k, Tensor v, Tensor row_table, SymInt num_head_tokens, SymInt num_tail_tokens, "
        "SymInt num_head_kv, SymInt num_tail_kv, Tensor(a!) q_head, Tensor(b!) k_head, Tensor(c!) v_head, Tensor(d!) q_tail, "
        "Tensor(e!) k_tail, Tensor(f!) v_tail) -> ()"
    ),
    "fused_restore": (
        "(Tensor out_head, Tensor out_tail, Tensor? lse_head, Tensor? lse_tail, Tensor row_table) -> (Tensor, Tensor)"
    ),
    "fused_restore_out": (
        "(Tensor out_head, Tensor out_tail, Tensor? lse_head, Tensor? lse_tail, Tensor row_table, Tensor(a!) out, "
        "Tensor(b!)? lse) -> ()"
    ),
    "plan_expand": (
        "(Tensor request_table, Tensor? block_tables, Tensor(a!) local_token_indices, Tensor(b!) positions, "
        "Tensor(c!) allgather_restore_idx, Tensor(d!) hidden_restore_idx, Tensor(e!) slot_mapping, Tensor(f!) kv_rows, "
        "SymInt num_requests, SymInt world_size, SymInt rank, SymInt num_tokens_padded, SymInt num_kv_rows, bool split, "
        "SymInt block_size, SymInt dcp_world_size, SymInt dcp_rank, SymInt cp_interleave) -> ()"
    ),
    "plan_rank_rows": (
        "(Tensor request_table, Tensor(a!) out, SymInt num_requests, SymInt world_size, SymInt num_tokens_padded, "
        "SymInt num_chunks, SymInt workspace_tokens) -> ()"
    ),
    "plan_shard_rows": (
        "(Tensor request_table, Tensor shard_starts, Tensor block_tables, Tensor slot_mapping, Tensor(a!) context_slots, "
        "Tensor(b!) shard_slots, Tensor(c!) kv_rows, SymInt num_requests, SymInt world_size, SymInt num_tokens_padded, "
        "SymInt num_context, SymInt num_kv_rows, bool split, SymInt block_size, SymInt dcp_world_size, SymInt dcp_rank, "
        "SymInt cp_interleave) -> ()"
    ),
    "merge_attn_states": (
        "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor? scale, bool base2) -> (Tensor, Tensor)"
    ),
    "merge_attn_states_out": (
        "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor? scale, Tensor? row_op, Tensor? cu_seqlens, "
        "Tensor? out_rows, bool base2, Tensor(a!) out, Tensor(b!)? lse_out) -> ()"
    ),
    "merge_n_attn_states": "(Tensor[] outs, Tensor[] lses, Tensor? scale, bool base2) -> (Tensor, Tensor)",
    "merge_n_attn_states_out": (
        "(Tensor[] outs, Tensor[] lses, Tensor? scale, bool base2, Tensor(a!) out, Tensor(b!)? lse_out) -> ()"
    ),
    "write_latent_cache": "(Tensor latents, Tensor(a!) cache, Tensor slot_mapping, Tensor? scale) -> ()",
    "gather_latents": (
        "(Tensor cache, Tensor? rows, Tensor? block_table, Tensor? cu_seqlens, Tensor? starts, Tensor? scale, Tensor(a!) out) -> ()"
    ),
    "concat_k": "(Tensor k_nope, Tensor k_pe, Tensor(a!) out) -> ()",
    "kv_up_project": (
        "(Tensor latents, Tensor? rows, Tensor weight, Tensor? scale, Tensor(a!) k_out, Tensor(b!) v_out, "
        "Tensor(c!)? k_pe_out) -> ()"
    ),
    "kv_up_project_wgmma": (
        "(Tensor latents, Tensor? rows, Tensor weight, Tensor? scale, Tensor(a!) k_out, Tensor(b!) v_out, "
        "Tensor(c!)? k_pe_out) -> ()"
    ),
    "cp_correct_out": (
        "(Tensor out, Tensor lses, Tensor? seqused_k, SymInt rank, bool base2, Tensor(a!) corrected, Tensor(b!)? lse_out) -> ()"
    ),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_pe, Tensor? kv_rows, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqused_k, "
        "Tensor? prev_out, Tensor? prev_lse, float softmax_scale, bool causal, Tensor(a!) out, Tensor(b!)? lse) -> ()"
    ),
    "attention_wgmma": (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_pe, Tensor? kv_rows, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqused_k, "
        "Tensor? prev_out, Tensor? prev_lse, float softmax_scale, bool causal, Tensor(a!) out, Tensor(b!)? lse) -> ()"
    ),
}
