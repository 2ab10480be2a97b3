"""Batches for a planner, and its specification in one piece."""

import numpy as np
from hypothesis import strategies as st

from batches import batches
from pcp_mla import PCPPlanner, partition
from pcp_mla.plan.slots import PagedCache, key_chunks, kv_rows, slot_mapping

STEP_ARRAYS = ("row_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "logits_indices", "discard_request_mask")
TOKEN_ARRAYS = ("local_token_indices", "positions", "allgather_restore_idx", "hidden_restore_idx")
NUMBERS = ("num_requests", "num_tokens", "num_kv_tokens", "max_seqlen_q", "max_seqlen_k", "world_size", "rank")
CAPACITY = {"max_requests": 16, "max_tokens": 1200, "max_context_chunks": 400}


def batch_of(case):
    """The arguments of ``partition``."""
    return {
        name: value for name, value in case.items() if name not in ("cache", "seed", "workspace", "more_requests", "more_tokens")
    }


def planner_of(case, **changes):
    options = {"layout": case["layout"], "decode_policy": case["decode_policy"], **vars(case["cache"]), **CAPACITY, **changes}
    return PCPPlanner(world_size=case["world_size"], rank=case["rank"], **options)


def plan_arguments(case):
    return {name: np.array(case[name], dtype) for name, dtype in LENGTHS.items() if case.get(name) is not None}


LENGTHS = {"query_lens": np.int32, "context_lens": np.int32, "is_prefill": np.bool_, "prompt_lens": np.int32}


def block_tables_of(case):
    """Blocks for every request's tokens, no block twice, and some columns nobody uses."""
    longest = max((q + c for q, c in zip(case["query_lens"], case["context_lens"], strict=True)), default=0)
    columns = -(-longest // case["cache"].block_size) + 1
    count = len(case["query_lens"])
    return np.random.default_rng(case["seed"]).permutation(count * columns).reshape(count, columns).astype(np.int32)


def workspace_of(case, part):
    """None, or a workspace that the new tokens fit but all keys may not."""
    if case["workspace"] is None:
        return None
    return max(1, int(part.padded_lens.sum()), int(part.num_kv_tokens * case["workspace"]))


@st.composite
def caches(draw):
    shards = draw(st.sampled_from([1, 1, 2, 3, 4]))
    return PagedCache(
        draw(st.sampled_from([1, 2, 16, 7])), shards, draw(st.integers(0, shards - 1)), draw(st.sampled_from([1, 2, 5, 16]))
    )


@st.composite
def cases(draw):
    case = draw(batches())
    count = len(case["query_lens"])
    prompts = st.lists(st.integers(0, 100), min_size=count, max_size=count)
    return case | {
        "prompt_lens": draw(st.one_of(st.none(), prompts)),
        "cache": draw(caches()),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "workspace": draw(st.sampled_from([None, 0.0, 0.3, 1.0])),
    }


def assert_equal(got, wanted, name):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.dtype == wanted.dtype, name
    assert np.array_equal(got, wanted), f"{name}: {got.tolist()} is not {wanted.tolist()}"


def assert_plan(meta, part, block_tables, cache, workspace):
    """``meta`` holds what ``part`` and the slots' specification say, bit for bit."""
    for name in STEP_ARRAYS + TOKEN_ARRAYS:
        assert_equal(getattr(meta, name).cpu(), getattr(part, name), name)
    for name in (*NUMBERS, "num_tokens_padded"):
        assert getattr(meta, name) == getattr(part, name), name
    totals = (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    assert totals == tuple(part.row_table[:4, -1].tolist())
    assert_chunks(meta.key_chunks, key_chunks(part, workspace))
    if block_tables is None:
        assert meta.slot_mapping is None
        assert meta.kv_rows is None
    else:
        assert_equal(meta.slot_mapping.cpu(), slot_mapping(part, block_tables, cache), "slot_mapping")
        assert_equal(meta.kv_rows.cpu(), kv_rows(part, block_tables, cache, workspace), "kv_rows")


def assert_chunks(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a.first_row, a.num_rows, a.causal, a.max_seqlen_k) == (b.first_row, b.num_rows, b.causal, b.max_seqlen_k)
        for name in ("starts", "cu_seqlens_k", "seqused_k"):
            assert_equal(getattr(a, name).cpu(), getattr(b, name), name)


def check(case, planner=None):
    """Plan a case and compare it with the specification."""
    part = partition(**batch_of(case))
    tables, workspace = block_tables_of(case), workspace_of(case, part)
    planner = planner_of(case) if planner is None else planner
    meta = planner.plan(**plan_arguments(case), block_tables=tables, workspace_tokens=workspace)
    assert_plan(meta, part, tables, case["cache"], workspace)
    return meta
