"""A plan is bit-equal to the NumPy specification, and the specification to a loop over tokens."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcp_mla import PCPMetadata, PCPPlanner, partition
from pcp_mla.ops import native
from pcp_mla.plan.slots import PagedCache, key_chunks, kv_rows, slot_mapping
from pcp_mla.planner.step_buffer import fill
from plans import (
    CAPACITY,
    STEP_ARRAYS,
    TOKEN_ARRAYS,
    assert_chunks,
    assert_equal,
    assert_plan,
    batch_of,
    block_tables_of,
    cases,
    check,
    plan_arguments,
    planner_of,
    workspace_of,
)


def naive_slot(tables, cache, request, position):
    """One token's slot, from the definition of the shared-out cache."""
    if (position // cache.cp_interleave) % cache.dcp_world_size != cache.dcp_rank:
        return -1
    local = position // (cache.cp_interleave * cache.dcp_world_size) * cache.cp_interleave + position % cache.cp_interleave
    return int(tables[request, local // cache.block_size]) * cache.block_size + local % cache.block_size


def test_native_planner_is_built():
    assert native.status["_planner"] == ""


@given(cases())
@settings(max_examples=300, deadline=None)
def test_plan_is_the_specification(case):
    check(case)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_numpy_host_plan_is_the_specification(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native.status, "_planner", "not built")
        check(case)


@given(cases())
@settings(deadline=None)
def test_step_buffer_is_the_specification(case):
    """Also what no tensor of the metadata shows: the request table that the expansion reads."""
    part = partition(**batch_of(case))
    workspace = workspace_of(case, part)
    planner = planner_of(case)
    planner.step.fill_(-7)
    wanted = planner.step.numpy().copy()
    fill(planner.step_layout, wanted, part, key_chunks(part, workspace), case["cache"])
    planner.plan(**plan_arguments(case), workspace_tokens=workspace)
    assert_equal(planner.step, wanted, "step")


@given(cases())
@settings(deadline=None)
def test_slots_one_token_at_a_time(case):
    part = partition(**batch_of(case))
    tables, cache = block_tables_of(case), case["cache"]
    slots = slot_mapping(part, tables, cache)
    wanted = np.full(len(slots), -1, np.int64)
    token = 0
    for request, (context, length) in enumerate(zip(part.context_lens, part.query_lens, strict=True)):
        for offset in range(length):
            wanted[part.hidden_restore_idx[token]] = naive_slot(tables, cache, request, context + offset)
            token += 1
    assert_equal(slots, wanted, "slot_mapping")
    shards = [slot_mapping(part, tables, PagedCache(**{**vars(cache), "dcp_rank": n})) for n in range(cache.dcp_world_size)]
    held = (np.array(shards).reshape(cache.dcp_world_size, -1) >= 0).sum(axis=0)
    assert held.max(initial=0) <= 1
    assert held.sum() == part.query_lens.sum()


@given(cases())
@settings(deadline=None)
def test_key_chunks_cover_every_key_once(case):
    """What all chunks give a row, put together, is what the row attends to: its context, then its new tokens."""
    part = partition(**batch_of(case))
    tables, cache, workspace = block_tables_of(case), case["cache"], workspace_of(case, part)
    rows = kv_rows(part, tables, cache, workspace)
    chunks = key_chunks(part, workspace)
    assert all(chunk.num_rows <= (workspace or part.num_kv_tokens) for chunk in chunks)
    assert [chunk.causal for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(chunk.num_rows for chunk in chunks) == len(rows) == part.num_kv_tokens
    for row in range(2 * part.num_requests):
        seen = []
        for chunk in chunks:
            used = chunk.seqused_k[row]
            if used:
                assert chunk.starts[row // 2] == len(seen)
            first = chunk.first_row + chunk.cu_seqlens_k[row]
            seen += rows[first : first + used].tolist()
        real = part.context_lens[row // 2] + part.query_lens[row // 2]
        wanted = [naive_slot(tables, cache, row // 2, p) if p < real else -1 for p in range(part.seqused_k[row])]
        assert seen == wanted


def test_worked_case():
    planner = PCPPlanner(4, 100, 2, 0, block_size=4)
    tables = [[7, 2, 0], [5, 9, 1]]
    meta = planner.plan([7, 1], [3, 6], [True, False], tables, workspace_tokens=9)
    # Request 0: positions 3 to 9, chunks 3, 4 | 5, 6 | 7, 8 | 9. Request 1: position 6, on both ranks, cached by rank 0's row.
    assert meta.positions.tolist() == [3, 4, 9, 6]
    assert meta.slot_mapping.tolist() == [31, 8, 1, 38, -1, 9, 10, 11, 0, -1]
    assert [(c.first_row, c.num_rows, c.causal) for c in meta.key_chunks] == [(0, 9, False), (9, 8, True)]
    assert meta.kv_rows.tolist() == [28, 29, 30, *(20, 21, 22, 23, 36, 37), *(31, 8, 9, 10, 11, 0, 1), 38]
    assert [c.seqused_k.tolist() for c in meta.key_chunks] == [[3, 3, 6, 0], [2, 7, 1, 0]]
    assert [c.starts.tolist() for c in meta.key_chunks] == [[0, 0], [3, 6]]
    assert meta.logits_indices.tolist() == [6, 7]


def test_dispatch_uses_the_largest_rank():
    planner = PCPPlanner(8, 100, 2, 0)
    batch = ([1, 1, 1, 8], [False, False, False, True])
    assert planner.largest_rank(*batch) == 7
    assert planner.plan(batch[0], None, batch[1]).num_tokens_padded == 7
    # Chunks of 2, 2, 1 and 0 tokens: rank 0 has two of them, rank 1 three.
    assert planner.largest_rank([5], [True]) == 3
    meta = planner.plan([5])
    assert (meta.num_tokens, meta.num_tokens_padded) == (2, 3)


def test_one_token_prefill_chunks_speculative_decodes_and_idle_requests():
    lengths, contexts, prefill = [1, 4, 0, 0, 3], [50, 10, 5, 0, 0], [True, False, True, False, True]
    for rank in range(4):
        part = partition(lengths, contexts, prefill, world_size=4, rank=rank, prompt_lens=[51, 14, 9, 3, 8])
        meta = PCPPlanner(8, 100, 4, rank).plan(lengths, contexts, prefill, prompt_lens=[51, 14, 9, 3, 8])
        assert_plan(meta, part, None, None, None)
        assert meta.discard_request_mask.tolist() == [False, False, True, True, True]
        assert meta.logits_indices.tolist() == [0, 4, -1, -1, 7]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_capacity_is_what_the_fullest_rank_can_need(world, layout):
    """It fits every batch of a small planner, and some batch fills it. In the padded layout a request needs a token more if it has
    one, or on one rank an odd number: where there are more tokens than requests, all of them cannot always."""
    for requests in range(1, 4):
        for tokens in range(7):
            planner = PCPPlanner(requests, tokens, world, 0, layout=layout)
            largest = 0
            for lengths in itertools.product(range(tokens + 1), repeat=requests):
                if sum(lengths) > tokens:
                    continue
                for prefill in itertools.product([False, True], repeat=requests):
                    meta = planner.plan(np.array(lengths, np.int32), None, np.array(prefill, bool))
                    assert meta.num_tokens_padded <= planner.max_local_tokens
                    largest = max(largest, meta.num_tokens_padded)
            unused = layout == "padded" and tokens > requests and (world > 1 or (tokens - requests) % 2)
            assert planner.max_local_tokens - largest == unused


def test_round_robin_can_leave_a_rank_without_tokens():
    part = partition([1], [9], [False], world_size=3, rank=2, decode_policy="round_robin")
    meta = PCPPlanner(8, 100, 3, 2, decode_policy="round_robin").plan([1], [9], [False])
    assert meta.num_tokens == 0
    assert_plan(meta, part, None, None, None)


@given(cases(), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None)
def test_padded_sizes(case, more_requests, more_tokens, more_keys):
    """Padded to more requests, the batch is one with as many empty requests; per-token arrays are the plain ones, then pads."""
    longer = batch_of(case)
    for name, pad in (("query_lens", 0), ("context_lens", 0), ("is_prefill", True), ("prompt_lens", 0)):
        if longer[name] is not None:
            longer[name] = [*longer[name], *[pad] * more_requests]
    part = partition(**longer)
    tables, cache, workspace = block_tables_of(case), case["cache"], workspace_of(case, part)
    rows, keys, world = part.num_tokens_padded + more_tokens, part.num_kv_tokens + more_keys, part.world_size
    meta = planner_of(case).plan(
        **plan_arguments(case),
        block_tables=tables,
        workspace_tokens=workspace,
        num_requests_padded=part.num_requests,
        num_tokens_padded=rows,
        num_kv_tokens_padded=keys,
    )
    for name in STEP_ARRAYS:
        assert_equal(getattr(meta, name), getattr(part, name), name)
    assert (meta.num_tokens, meta.num_tokens_padded, meta.num_kv_tokens) == (part.num_tokens, rows, keys)
    assert (meta.num_local_rows, meta.max_seqlen_q, meta.max_seqlen_k) == (rows, rows, keys)
    chunks = key_chunks(part, workspace)
    assert_chunks(meta.key_chunks, [replace(chunk, max_seqlen_k=chunk.num_rows) for chunk in chunks])

    def padded(array, length, pad=-1):
        return np.append(array, np.full(length - len(array), pad, array.dtype))

    def moved(index):  # ranks are further apart
        return np.where(index < 0, -1, index // max(1, part.num_tokens_padded) * rows + index % max(1, part.num_tokens_padded))

    assert_equal(meta.local_token_indices, padded(part.local_token_indices, rows), "local_token_indices")
    assert_equal(meta.positions, padded(part.positions, rows, 0), "positions")
    for name in ("allgather_restore_idx", "hidden_restore_idx"):
        assert_equal(getattr(meta, name), padded(moved(getattr(part, name)).astype(np.int32), world * rows), name)
    slots = np.full((world, rows), -1, np.int64)
    plain = slot_mapping(part, np.vstack([tables, np.zeros((more_requests, tables.shape[1]), np.int32)]), cache)
    slots[:, : part.num_tokens_padded] = plain.reshape(world, -1) if part.num_tokens_padded else 0
    assert_equal(meta.slot_mapping, slots.reshape(-1), "slot_mapping")
    plain_rows = kv_rows(part, np.vstack([tables, np.zeros((more_requests, tables.shape[1]), np.int32)]), cache, workspace)
    assert_equal(meta.kv_rows, padded(plain_rows, keys), "kv_rows")


def test_addresses_never_change():
    planner = PCPPlanner(**CAPACITY, world_size=2, rank=1, max_kv_tokens=2000)
    names = (*STEP_ARRAYS, *TOKEN_ARRAYS, "slot_mapping", "kv_rows")

    def addresses(lengths, contexts):
        tables = np.zeros((len(lengths), 200), np.int32)
        meta = planner.plan(lengths, contexts, block_tables=tables, workspace_tokens=sum(lengths))
        chunk = meta.key_chunks[0]
        return {
            **{name: getattr(meta, name).data_ptr() for name in names},
            **{name: getattr(chunk, name).data_ptr() for name in ("starts", "cu_seqlens_k", "seqused_k")},
        }

    first = addresses([60], [100])
    assert first == addresses([1, 1, 3], [9, 0, 120]) == addresses([5] * 16, [0] * 15 + [1]) == addresses([60], [0])


def test_plans_of_one_planner_do_not_mix():
    """A long plan, then a short one, in the same buffers; the first one's host-side specification stays its own."""
    planner = PCPPlanner(**CAPACITY, world_size=4, rank=2)
    lengths = np.array([400, 3, 90], np.int32)
    first = planner.plan(lengths)
    assert_plan(first, partition([400, 3, 90], world_size=4, rank=2), None, None, None)
    lengths[:] = 1
    second = planner.plan([2], [7])
    assert_plan(second, partition([2], [7], world_size=4, rank=2), None, None, None)
    assert first.partition.query_lens.tolist() == [400, 3, 90]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int16])
def test_inputs_of_any_kind(dtype):
    wanted = partition([4, 3], [1, 2], [True, False], world_size=2, rank=0)
    planner = PCPPlanner(4, 20, 2, 0)
    given_arrays = np.array([4, 3], dtype), np.array([1, 2], dtype), np.array([True, False])
    for arrays in (
        given_arrays,
        [list(map(int, a)) if a.dtype != bool else a.tolist() for a in given_arrays],
        [torch.from_numpy(a) for a in given_arrays],
        [np.repeat(a, 2)[::2] for a in given_arrays],
    ):
        assert_plan(planner.plan(*arrays), wanted, None, None, None)


def test_block_tables_of_any_kind():
    planner = PCPPlanner(4, 20, 2, 0, block_size=2)
    wanted = planner.plan([5], block_tables=[[3, 1, 2]]).slot_mapping.tolist()
    table = torch.tensor([[3, 9, 1, 9, 2, 9], [0] * 6], dtype=torch.int32)
    for tables in (table[:, ::2], table[:1, ::2].long(), table[:, ::2].numpy(), table[:, ::2].tolist()):
        assert planner.plan([5], block_tables=tables).slot_mapping.tolist() == wanted


def test_metadata_drives_the_ops_like_any_other():
    planner = PCPPlanner(8, 100, 2, 1)
    planned, built = planner.plan([9, 4], [3, 0]), PCPMetadata.build([9, 4], [3, 0], world_size=2, rank=1)
    assert isinstance(planned, PCPMetadata)
    for name in ("query_head_indices", "kv_tail_indices", "output_restore_idx", "unpad_mask", "cu_seqlens_k_tail"):
        assert torch.equal(getattr(planned, name), getattr(built, name))
    assert f"num_tokens={built.num_tokens}," in repr(planned)
