"""The wrong changes: where, what is right, what is wrong instead, and the test that must fail."""

from typing import NamedTuple


class Change(NamedTuple):
    """``right`` stands once in ``file``; ``test`` is a pytest node."""

    what: str
    file: str
    right: str
    wrong: str
    test: str


CHANGES = (
    # The specification.
    Change(
        "tails are dealt in rank order",
        "python/pcp_mla/plan/partition.py",
        "number = np.stack([ranks, 2 * world_size - 1 - ranks], axis=1)",
        "number = np.stack([ranks, world_size + ranks], axis=1)",
        "tests/test_partition.py::test_causal_work_of_a_long_request_is_even",
    ),
    Change(
        "a replicated decode is restored P times without pads",
        "python/pcp_mla/plan/partition.py",
        'if self.layout == "unpadded" and self.decode_policy == "replicate":\n            lengths[~self.is_prefill, 1:] = 0',
        'if self.layout == "unpadded" and self.decode_policy == "replicate":\n            lengths[~self.is_prefill, 2:] = 0',
        "tests/test_partition.py::test_restore_of_partition_is_the_identity",
    ),
    Change(
        "a row sees one key too few",
        "python/pcp_mla/plan/partition.py",
        "return np.where(lens > 0, used, 0).astype(np.int32).reshape(-1)",
        "return np.where(lens > 0, used - 1, 0).astype(np.int32).reshape(-1)",
        "tests/test_partition.py::test_rows_describe_causal_attention",
    ),
    Change(
        "another shard's tokens have slots here",
        "python/pcp_mla/plan/slots.py",
        "mine = shard == self.dcp_rank",
        "mine = shard >= self.dcp_rank",
        "tests/test_planner.py::test_slots_one_token_at_a_time",
    ),
    Change(
        "a window of context is one row short",
        "python/pcp_mla/plan/slots.py",
        "prefix = np.clip(context - first, 0, workspace_tokens)",
        "prefix = np.clip(context - first, 0, workspace_tokens - 1)",
        "tests/test_planner.py::test_key_chunks_cover_every_key_once",
    ),
    # The native planner, and kernels in C++.
    Change(
        "round robin gives every decode to rank 0",
        "csrc/planner/planner.cpp",
        "config_.round_robin ? decode % world : 0",
        "config_.round_robin ? decode % 1 : 0",
        "tests/test_planner.py::test_plan_is_the_specification",
    ),
    Change(
        "the last chunk counts the context twice",
        "csrc/planner/planner.cpp",
        "lens[row] = used[row] > 0 ? used[row] - skipped : 0",
        "lens[row] = used[row] > 0 ? used[row] : 0",
        "tests/test_planner.py::test_plan_is_the_specification",
    ),
    Change(
        "the smallest rank is what graphs are dispatched by",
        "csrc/planner/planner.cpp",
        "n.tokens_padded = *std::max_element(",
        "n.tokens_padded = *std::min_element(",
        "tests/test_planner.py::test_dispatch_uses_the_largest_rank",
    ),
    Change(
        "a position behind the block table's last column reads on",
        "csrc/latent_cache.h",
        "if (position < 0 || position / block_size >= columns) return -1;",
        "if (position < 0) return -1;",
        "tests/test_latent_cache.py::test_tokens_behind_the_last_column",
    ),
    Change(
        "a merge adds an empty partial's output",
        "csrc/cpu/merge_states.cpp",
        "if (weights[n] == 0) continue;",
        "",
        "tests/test_merge_states.py::test_an_empty_partial_full_of_nan_is_not_read",
    ),
    Change(
        "a float8 result is not divided by its scale",
        "csrc/cpu/merge_states.cpp",
        "x /= *scale;",
        "",
        "tests/test_merge_n.py::test_float8_result",
    ),
    Change(
        "a merge of N sums in the partials' dtype",
        "csrc/cpu/merge_states.cpp",
        "sum[d] = started ? sum[d] + term : term;",
        "sum[d] = static_cast<float>(static_cast<T>(started ? sum[d] + term : term));",
        "tests/test_merge_n.py::test_float32_result",
    ),
    # Triton.
    Change(
        "the mask sees one key too many",
        "python/pcp_mla/triton/attention_kernel.py",
        "limit = tl.minimum(used - length + m + 1, used)",
        "limit = tl.minimum(used - length + m + 2, used)",
        "tests/test_attention.py::test_batches",
    ),
    Change(
        "a key's latent loses its last number",
        "python/pcp_mla/triton/kv_up_project.py",
        "mask=(c < rank)[:, None] & in_width",
        "mask=(c < rank - 1)[:, None] & in_width",
        "tests/test_up_project.py::test_shares_of_torchs_error",
    ),
    # The exchange.
    Change(
        "pads of a rank are sent as they are",
        "python/pcp_mla/exchange/latents.py",
        "rows[tokens:].zero_()",
        "pass",
        "tests/test_latent_exchange.py::test_played_and_alone",
    ),
)
