"""What a planner refuses, in both its forms: with the argument and its value, and with the last plan as it was."""

import numpy as np
import pytest
import torch

from pcp_mla import PCPPlanner
from pcp_mla.ops import native

BASE = "PCPPlanner.plan: "
NUMPY_ONLY = "not built: for this test"
TABLES = np.arange(16, dtype=np.int32).reshape(2, 8)
CASES = [
    ({"query_lens": [4, -3]}, ValueError, "query_lens must not be negative, got -3 for request 1"),
    ({"query_lens": np.array([4, -3], np.int32)}, ValueError, "query_lens must not be negative, got -3 for request 1"),
    ({"query_lens": [[4, 3]]}, ValueError, "query_lens must be one-dimensional, got 2 dimensions"),
    ({"query_lens": np.array([[4, 3]], np.int32)}, ValueError, "query_lens must be one-dimensional, got 2 dimensions"),
    ({"query_lens": [4.5, 3]}, TypeError, "query_lens must be integers, got float64"),
    (
        {"query_lens": [1] * 5, "context_lens": None, "is_prefill": None},
        ValueError,
        "query_lens must have at most 4 requests, .* got 5",
    ),
    (
        {"query_lens": np.ones(5, np.int32), "context_lens": None, "is_prefill": None},
        ValueError,
        "query_lens must have at most 4 requests, .* got 5",
    ),
    ({"query_lens": [60, 41]}, ValueError, "query_lens must add up to at most 100 tokens, .* got 101"),
    ({"query_lens": [2**31 - 1, 5]}, ValueError, r"query_lens must add up to less than 2\*\*31, got 2147483652"),
    ({"query_lens": [2**40, 5]}, ValueError, r"query_lens must add up to less than 2\*\*31, got 10995116277"),
    ({"context_lens": [1]}, ValueError, "context_lens must have one entry for each of the 2 requests, got 1"),
    ({"context_lens": np.array([0, -1], np.int32)}, ValueError, "context_lens must not be negative, got -1 for request 1"),
    ({"context_lens": [2**31 - 5, 0]}, ValueError, "context_lens and padded query_lens together must add up to less than"),
    ({"is_prefill": [True]}, ValueError, "is_prefill must have one entry for each of the 2 requests, got"),
    ({"is_prefill": [1, 0]}, TypeError, "is_prefill must be bool, got int64"),
    ({"prompt_lens": [3, 4, 5]}, ValueError, "prompt_lens must have one entry for each of the 2 requests, got 3"),
    ({"num_tokens_padded": 3}, ValueError, r"num_tokens_padded must be 4 \(the tokens of the fullest rank\) to 100, got 3"),
    ({"num_tokens_padded": 101}, ValueError, "num_tokens_padded must be 4 .* to 100, got 101"),
    ({"num_tokens_padded": 4.0}, TypeError, "num_tokens_padded must be an int, got 4.0"),
    ({"num_tokens_padded": True}, TypeError, "num_tokens_padded must be an int, got True"),
    ({"num_tokens_padded": -1}, ValueError, "num_tokens_padded must be 0 to .*, got -1"),
    ({"num_requests_padded": 1}, ValueError, r"num_requests_padded must be 2 \(the requests\) to 4, got 1"),
    ({"num_requests_padded": 5}, ValueError, "num_requests_padded must be 2 .* to 4, got 5"),
    ({"num_kv_tokens_padded": 9}, ValueError, r"num_kv_tokens_padded must be at least 19 \(context and new tokens\), got 9"),
    ({"num_kv_tokens_padded": 201}, ValueError, "context and new tokens must be at most max_kv_tokens = 200, got 201"),
    ({"context_lens": [190, 9]}, ValueError, "context and new tokens must be at most max_kv_tokens = 200, got 206"),
    ({"workspace_tokens": 6}, ValueError, "workspace_tokens must be at least the 7 rows of the new tokens, got 6"),
    ({"context_lens": [30, 0], "workspace_tokens": 7}, ValueError, "for 30 context tokens in 3 chunks .*, got 7"),
    ({"block_tables": TABLES[:1]}, ValueError, "block_tables must have a row for each of the 2 requests, got 1"),
    (
        {"block_tables": TABLES[:, :3]},
        ValueError,
        "block_tables must have at least 4 blocks of 4 for the 13 context and new tokens of request 0, got 3",
    ),
    (
        {"context_lens": [9, 10], "block_tables": TABLES[:, :3]},
        ValueError,
        "block_tables must have at least 4 blocks of 4 for the 13 context and new tokens of request 0, got 3",
    ),
    ({"block_tables": TABLES[0]}, ValueError, r"block_tables must have 2 dimensions \[requests, blocks\], got 1"),
    ({"block_tables": TABLES.astype(float)}, TypeError, "block_tables must be integers, got float64"),
    ({"block_tables": torch.zeros(2, 8, dtype=torch.bool)}, TypeError, "block_tables must be integers, got bool"),
    ({"block_tables": [[2**64] * 8] * 2}, TypeError, "block_tables must be integers, got object"),
    (
        {"block_tables": TABLES - 1},
        ValueError,
        "block_tables must have numbers of 0 to 536870911, .*, got -1 for block 0 of request 0",
    ),
    ({"block_tables": torch.zeros(2, 8)}, TypeError, "block_tables must be integers, got float32"),
    ({"block_tables": torch.zeros(2, 8, dtype=torch.int32, device="meta")}, ValueError, "block_tables must be on cpu .*, got meta"),
]


@pytest.fixture(params=["native", "numpy"])
def planner(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setitem(native.status, "_planner", NUMPY_ONLY)
    return PCPPlanner(4, 100, 2, 0, block_size=4, max_kv_tokens=200, max_context_chunks=3)


@pytest.mark.parametrize(("change", "error", "words"), CASES)
def test_bad_plan_leaves_the_last_one(planner, change, error, words):
    good = {"query_lens": [4, 3], "context_lens": [9, 3], "is_prefill": [True, True], "block_tables": TABLES}
    meta = planner.plan(**good)
    before = planner.step.clone()
    with pytest.raises(error, match=BASE + ".*" + words):
        planner.plan(**{**good, **change})
    assert torch.equal(planner.step, before)
    # The arrays that had not been read are still those of the good plan.
    other = PCPPlanner(4, 100, 2, 0, block_size=4, max_kv_tokens=200).plan(**good)
    for name in ("row_table", "positions", "local_token_indices", "allgather_restore_idx", "slot_mapping", "kv_rows"):
        assert torch.equal(getattr(meta, name), getattr(other, name)), name


@pytest.mark.parametrize(("change", "error", "words"), [case for case in CASES if case[0].keys() & {"query_lens", "is_prefill"}])
def test_a_bad_batch_has_no_largest_rank(planner, change, error, words):
    batch = {"query_lens": [4, 3], "is_prefill": [True, True], **change}
    batch.pop("context_lens", None)
    with pytest.raises(error, match=BASE + words):
        planner.largest_rank(**batch)


# What just fits a planner with this room, in each way that it can be full, and what does not.
FULL = {"max_requests": 3, "max_tokens": 5, "max_kv_tokens": 26, "max_context_chunks": 3}
LIMITS = {
    "requests": ({"query_lens": [1] * 3}, {"query_lens": [1] * 4}, "query_lens must have at most 3 requests"),
    "tokens": ({"query_lens": [2, 3]}, {"query_lens": [3, 3]}, "query_lens must add up to at most 5 tokens"),
    "keys": ({"context_lens": [20, 2]}, {"context_lens": [20, 3]}, "at most max_kv_tokens = 26, got 27"),
    "padded requests": ({"num_requests_padded": 3}, {"num_requests_padded": 4}, r"2 \(the requests\) to 3, got 4"),
    "padded tokens": ({"num_tokens_padded": 8}, {"num_tokens_padded": 9}, "fullest rank. to 8, got 9"),
    "padded keys": ({"num_kv_tokens_padded": 26}, {"num_kv_tokens_padded": 27}, "at most max_kv_tokens = 26, got 27"),
    "chunks": (
        {"context_lens": [11, 7], "workspace_tokens": 6},
        {"context_lens": [11, 8], "workspace_tokens": 6},
        "for 19 context tokens in 3 chunks",
    ),
    "workspace": ({"workspace_tokens": 4}, {"workspace_tokens": 3}, "at least the 4 rows of the new tokens, got 3"),
    "no new tokens": (
        {"query_lens": [0, 0], "context_lens": [5, 1], "workspace_tokens": 2},
        {"query_lens": [0, 0], "context_lens": [5, 1], "workspace_tokens": 0},
        "workspace_tokens must be at least the 0 rows of the new tokens, got 0",
    ),
}


@pytest.mark.parametrize("host", ["native", "numpy"])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_can_be_reached(host, limit, monkeypatch):
    if host == "numpy":
        monkeypatch.setitem(native.status, "_planner", NUMPY_ONLY)
    fits, too_much, words = LIMITS[limit]
    planner, batch = PCPPlanner(**FULL, world_size=1, rank=0, layout="padded"), {"query_lens": [1, 1], "context_lens": None}
    meta = planner.plan(**{**batch, **fits})
    asked = [fits.get(name) for name in ("num_requests_padded", "num_tokens_padded", "num_kv_tokens_padded")]
    got = (meta.num_requests, meta.num_tokens_padded, meta.num_kv_tokens)
    assert all(size in (None, number) for size, number in zip(asked, got, strict=True))
    with pytest.raises(ValueError, match=BASE + ".*" + words):
        planner.plan(**{**batch, **too_much})


@pytest.mark.parametrize("host", ["native", "numpy"])
def test_key_rows_are_counted_in_31_bits(host, monkeypatch):
    if host == "numpy":
        monkeypatch.setitem(native.status, "_planner", NUMPY_ONLY)
    planner = PCPPlanner(2, 10, 2, 0)
    assert planner.plan([3], num_kv_tokens_padded=2**31 - 1).num_kv_tokens == 2**31 - 1
    with pytest.raises(ValueError, match=r"num_kv_tokens_padded must be at least 3 .*, got 2147483648"):
        planner.plan([3], num_kv_tokens_padded=2**31)
    assert planner.plan([3], [2**31 - 4]).num_kv_tokens == 2**31 - 1
    with pytest.raises(ValueError, match=r"must add up to less than .*, got 2147483648"):
        planner.plan([3], [2**31 - 3])


@pytest.mark.parametrize("host", ["native", "numpy"])
def test_shards_need_fewer_blocks(host, monkeypatch):
    """Of 13 tokens in runs of 2, shard 0 of 2 has 7 and shard 1 has 6: two blocks and one block of 6."""
    if host == "numpy":
        monkeypatch.setitem(native.status, "_planner", NUMPY_ONLY)
    for shard, blocks in ((0, 2), (1, 1)):
        planner = PCPPlanner(4, 100, 2, 0, block_size=6, dcp_world_size=2, dcp_rank=shard, cp_interleave=2)
        planner.plan([13], block_tables=TABLES[:, :blocks])
        with pytest.raises(ValueError, match=f"at least {blocks} blocks"):
            planner.plan([13], block_tables=TABLES[:, : blocks - 1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_requests": -1}, ValueError, "max_requests must be at least 0, got -1"),
        ({"max_tokens": 10.0}, TypeError, "max_tokens must be an int, got 10.0"),
        ({"max_tokens": 2**30}, ValueError, r"max_tokens must give less than 2\*\*31 rows over all ranks, got"),
        ({"world_size": 0}, ValueError, r"world_size must be in 1\.\.2147483647, got 0"),
        ({"dcp_world_size": 2**31}, ValueError, r"dcp_world_size must be in 1\.\.2147483647, got 2147483648"),
        ({"rank": 2}, ValueError, r"rank must be in 0\.\.1, got 2"),
        ({"layout": "zigzag"}, ValueError, "layout must be one of unpadded, padded, got 'zigzag'"),
        ({"decode_policy": "none"}, ValueError, "decode_policy must be one of replicate, round_robin, got 'none'"),
        ({"layout": "padded", "decode_policy": "round_robin"}, NotImplementedError, "supports decode_policy 'replicate' only"),
        ({"block_size": 0}, ValueError, "block_size must be in 1"),
        ({"dcp_world_size": 2, "dcp_rank": 2}, ValueError, r"dcp_rank must be in 0\.\.1, got 2"),
        ({"cp_interleave": 0}, ValueError, "cp_interleave must be in 1"),
    ],
)
def test_bad_planner(change, error, words):
    good = {"max_requests": 4, "max_tokens": 10, "world_size": 2, "rank": 0}
    PCPPlanner(**good)
    with pytest.raises(error, match=f"PCPPlanner: .*{words}"):
        PCPPlanner(**{**good, **change})
