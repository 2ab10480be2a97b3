"""The partition is a specification: worked cases by hand, and properties that must hold for any batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import batches, every_rank
from pcp_mla import PCPMetadata, partition


def test_padded_worked_case():
    batch = {"query_lens": [1, 5, 8], "is_prefill": [False, True, True], "world_size": 2, "layout": "padded"}
    first, second = (partition(**batch, rank=rank) for rank in range(2))
    for part in (first, second):
        assert part.local_lens.tolist() == [1, 4, 4]
        assert part.num_pcp_pads.tolist() == [1, 3, 0]
        assert part.allgather_restore_idx.tolist() == [0, 9, 1, 2, 10, 11, 12, 13, 3, 4, 5, 6, 14, 15, 16, 17, 7, 8]
        assert part.unpad_mask.tolist() == [True, False] + [True] * 5 + [False] * 3 + [True] * 8
        assert part.logits_indices.tolist() == [0, 6, 17]
    assert first.positions.tolist() == [0, 0, 1, 6, 7, 0, 1, 6, 7]
    assert second.positions.tolist() == [0, 2, 3, 4, 5, 2, 3, 4, 5]
    assert first.local_token_indices.tolist() == [0, 1, 2, -1, -1, 6, 7, 12, 13]
    slots = np.arange(100, 114)
    assert first.padded_slot_mapping(slots).tolist() == [100, -1, *range(101, 106), -1, -1, -1, *range(106, 114)]
    assert first.gathered_slot_mapping(slots).tolist() == [
        *(100, 101, 102, -1, -1, 106, 107, 112, 113),
        *(-1, 103, 104, 105, -1, 108, 109, 110, 111),
    ]


def test_unpadded_worked_case():
    first, second = (partition([7], world_size=2, rank=rank) for rank in range(2))
    assert first.local_token_indices.tolist() == [0, 1, 6]
    assert second.local_token_indices.tolist() == [2, 3, 4, 5]
    assert first.num_tokens_padded == second.num_tokens_padded == 4
    assert first.gathered_token_indices.tolist() == [0, 1, 6, -1, 2, 3, 4, 5]
    assert first.hidden_restore_idx.tolist() == [0, 1, 4, 5, 6, 7, 2]


def test_rows_share_their_key_start():
    part = partition([8, 1, 5], [100, 40, 0], [True, False, True], world_size=2, rank=1)
    # Request 0: chunks of 2, rank 1 has [2, 4) and [4, 6). Request 1: a decode. Request 2: chunks 2, 2, 1, 0: [2, 4) and [4, 5).
    assert part.cu_seqlens_q.tolist() == [0, 2, 4, 5, 5, 7, 8]
    assert part.cu_seqlens_k.tolist() == [0, 0, 108, 108, 149, 149, 154]
    assert part.seqused_k.tolist() == [104, 106, 41, 0, 4, 5]
    assert (part.max_seqlen_q, part.max_seqlen_k) == (2, 106)
    assert part.positions.tolist() == [102, 103, 104, 105, 40, 2, 3, 4]


def test_largest_local_count_is_what_dispatch_uses():
    part = partition([1, 1, 1, 8], is_prefill=[False, False, False, True], world_size=2, rank=0)
    assert part.num_tokens_padded == 7


def test_round_robin_deals_decodes_out():
    batch = {"query_lens": [1, 4, 2, 1], "is_prefill": [False, True, False, False], "world_size": 2, "decode_policy": "round_robin"}
    first, second = (partition(**batch, rank=rank) for rank in range(2))
    assert first.local_token_indices.tolist() == [0, 1, 4, 7]
    assert second.local_token_indices.tolist() == [2, 3, 5, 6]


@given(batches())
def test_every_token_is_on_exactly_one_rank(batch):
    parts = every_rank(batch)
    held = np.concatenate([p.local_token_indices for p in parts])
    counts = np.bincount(held[held >= 0], minlength=sum(batch["query_lens"]))
    copies = np.where(parts[0].is_prefill | (batch["decode_policy"] == "round_robin"), 1, batch["world_size"])
    assert counts.tolist() == np.repeat(copies, parts[0].query_lens).tolist()
    if batch["layout"] == "unpadded":
        assert (held >= 0).all()
    else:
        assert len({p.num_tokens for p in parts}) == 1


@given(batches())
def test_restore_of_partition_is_the_identity(batch):
    parts = every_rank(batch)
    part = parts[batch["rank"]]
    gathered = np.full(part.world_size * part.num_tokens_padded, -2)
    for rank, p in enumerate(parts):
        start = rank * p.num_tokens_padded
        gathered[start : start + p.num_tokens] = p.local_token_indices
    total = sum(batch["query_lens"])
    assert gathered[part.hidden_restore_idx].tolist() == list(range(total))
    restored = gathered[part.allgather_restore_idx]
    assert restored[part.unpad_mask].tolist() == list(range(total))
    assert (restored[part.logits_indices[part.query_lens > 0]] == np.cumsum(part.query_lens)[part.query_lens > 0] - 1).all()
    assert len(set(part.allgather_restore_idx.tolist())) == len(part.allgather_restore_idx) == part.padded_lens.sum()
    inverse = part.gathered_token_indices
    assert (inverse[part.hidden_restore_idx] == np.arange(total)).all()
    assert (inverse >= 0).sum() == total


@given(batches())
def test_rows_describe_causal_attention(batch):
    """Seen from a row, query j of n ends at key seqused - n + j: this must be the query's own position, in its own request."""
    part = every_rank(batch)[batch["rank"]]
    for row in range(2 * part.num_requests):
        request = row // 2
        begin, end = part.cu_seqlens_q[row : row + 2]
        last_keys = part.seqused_k[row] - (end - begin) + np.arange(end - begin)
        assert (last_keys == part.positions[begin:end]).all()
        room = part.context_lens[request] + part.padded_lens[request]
        assert part.seqused_k[row] <= room
        assert part.cu_seqlens_k[row] == (part.context_lens + part.padded_lens)[:request].sum()
    assert part.cu_seqlens_q[-1] == part.num_tokens == len(part.positions)
    assert part.cu_seqlens_k[-1] == part.num_kv_tokens


@given(batches())
def test_two_call_indices_agree_with_the_row_table(batch):
    part = every_rank(batch)[batch["rank"]]
    table = part.row_table
    order = np.concatenate([part.query_head_indices, part.query_tail_indices])
    assert order[part.output_restore_idx].tolist() == list(range(part.num_tokens))
    assert table[0, -1] == len(part.query_head_indices)
    assert table[1, -1] == len(part.query_tail_indices)
    assert table[2, -1] == len(part.kv_head_indices)
    assert table[3, -1] == len(part.kv_tail_indices)
    for i in range(part.num_requests):
        keys = part.kv_tail_indices[table[3, i] : table[3, i + 1]]
        assert keys.tolist() == list(range(table[4, i], table[4, i] + part.seqused_k[2 * i + 1]))


@given(st.integers(1, 16), st.integers(1, 200), st.data(), st.integers(0, 500))
def test_causal_work_is_the_same_on_all_ranks(world, chunk, data, context):
    """All ranks' queries see as many keys, to the last one; rank 0 lacks what its tail, the end of the request, is short of."""
    full, short = 2 * world * chunk, data.draw(st.integers(0, min(chunk, 2 * world) - 1))
    parts = [partition([full - short], [context], world_size=world, rank=rank) for rank in range(world)]
    work = [int((p.positions + 1).sum()) for p in parts]
    share = sum(range(context + 1, context + full + 1)) // world
    assert work == [share - sum(range(context + full - short + 1, context + full + 1)), *[share] * (world - 1)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_edge_lengths(world, layout):
    for length in (0, 1, 2 * world - 1, 2 * world, 2 * world + 1):
        parts = [partition([length], world_size=world, rank=rank, layout=layout) for rank in range(world)]
        chunk = -(-length // (2 * world))
        held = np.concatenate([p.local_token_indices for p in parts])
        assert sorted(held[held >= 0].tolist()) == list(range(length))
        assert all(p.chunk_lens.max(initial=0) == min(chunk, length) for p in parts)
        assert all((p.query_lens == 0) == p.discard_request_mask for p in parts)


def test_requests_short_of_their_prompt_do_not_sample():
    part = partition([4, 4, 0], [0, 4, 9], world_size=2, rank=0, prompt_lens=[8, 8, 9])
    assert part.discard_request_mask.tolist() == [True, False, True]
    assert part.logits_indices.tolist() == [3, 7, -1]


@given(batches())
@settings(max_examples=50)
def test_metadata_holds_the_partition(batch):
    part = every_rank(batch)[batch["rank"]]
    meta = PCPMetadata.build(**batch)
    names = ("row_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "local_token_indices", "positions", "allgather_restore_idx")
    lazy = ("query_head_indices", "query_tail_indices", "kv_head_indices", "kv_tail_indices", "output_restore_idx", "unpad_mask")
    for name in (*names, "hidden_restore_idx", "logits_indices", *lazy, "discard_request_mask"):
        assert np.array_equal(getattr(meta, name).numpy(), getattr(part, name)), name
    assert meta.row_table.is_contiguous()
    assert (meta.num_head_tokens, meta.num_tail_tokens) == (len(part.query_head_indices), len(part.query_tail_indices))
    assert (meta.num_head_kv, meta.num_tail_kv) == (len(part.kv_head_indices), len(part.kv_tail_indices))
    for name in ("num_tokens", "num_tokens_padded", "num_kv_tokens", "max_seqlen_q", "max_seqlen_k", "world_size", "rank"):
        assert getattr(meta, name) == getattr(part, name)
    assert (meta.num_requests, meta.num_local_rows) == (len(batch["query_lens"]), part.num_tokens)
    assert meta.num_context_tokens == sum(batch["context_lens"])
    slots = np.arange(sum(batch["query_lens"])) + 7
    assert np.array_equal(meta.padded_slot_mapping(slots).numpy(), part.padded_slot_mapping(slots))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"world_size": 2.0}, TypeError, "world_size must be an int, got 2.0"),
        ({"rank": 2}, ValueError, r"rank must be in 0\.\.1, got 2"),
        ({"rank": -1}, ValueError, r"rank must be in 0\.\.1, got -1"),
        ({"rank": True}, TypeError, "rank must be an int, got True"),
        ({"query_lens": [4, -3]}, ValueError, "query_lens must not be negative, got -3 for request 1"),
        ({"query_lens": [[4, 3]]}, ValueError, "query_lens must be one-dimensional, got 2"),
        ({"query_lens": [4.5, 3]}, TypeError, "query_lens must be integers, got float64"),
        ({"query_lens": [2**31 - 1, 5]}, ValueError, r"query_lens must add up to less than 2\*\*31, got 2147483652"),
        ({"context_lens": [1]}, ValueError, "context_lens must have one entry for each of the 2 requests, got 1"),
        ({"context_lens": [0, -1]}, ValueError, "context_lens must not be negative, got -1 for request 1"),
        ({"context_lens": [2**31 - 5, 0]}, ValueError, "context_lens and padded query_lens together must add up"),
        ({"query_lens": [2**31 - 1, 0], "layout": "padded"}, ValueError, "padded query_lens together .* got 2147483648"),
        (
            {"query_lens": [2**30, 0], "is_prefill": [False, True], "layout": "padded", "world_size": 4},
            ValueError,
            "padded query_lens together .* got 4294967296",
        ),
        ({"query_lens": np.array([2**63, 0], np.uint64)}, ValueError, "query_lens must add up .* got 9223372036854775808"),
        ({"is_prefill": [True]}, ValueError, "is_prefill must have one entry for each of the 2 requests"),
        ({"is_prefill": [1, 0]}, TypeError, "is_prefill must be bool, got int64"),
        ({"layout": "zigzag"}, ValueError, "layout must be one of unpadded, padded, got 'zigzag'"),
        ({"decode_policy": "none"}, ValueError, "decode_policy must be one of replicate, round_robin, got 'none'"),
        ({"layout": "padded", "decode_policy": "round_robin"}, NotImplementedError, "supports decode_policy 'replicate' only"),
        ({"prompt_lens": [3, 4, 5]}, ValueError, "prompt_lens must have one entry for each of the 2 requests, got 3"),
    ],
)
def test_bad_arguments(change, error, words):
    good = {"query_lens": [4, 3], "world_size": 2, "rank": 0}
    partition(**good)
    with pytest.raises(error, match=words):
        partition(**{**good, **change})


def test_bad_slot_mapping():
    with pytest.raises(ValueError, match=r"slot_mapping: must have shape \(7,\).* got \(6,\)"):
        partition([4, 3], world_size=2, rank=0).padded_slot_mapping(np.arange(6))
