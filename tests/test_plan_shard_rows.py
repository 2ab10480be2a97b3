"""The rows of an exchange with a cache that is shared out: every implementation against the specification, that against loops over
tokens, and a planner's tables."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import EVERYWHERE, IMPLEMENTATIONS, batches, every_rank
from pcp_mla import PCPMetadata, PCPPlanner, partition
from pcp_mla.ops.registry import select
from pcp_mla.plan.shard_rows import shard_rows, shard_starts, shards_per_rank
from pcp_mla.plan.slots import PagedCache, slot_mapping
from pcp_mla.planner.step_buffer import request_table
from plans import batch_of, block_tables_of, plan_arguments, planner_of, workspace_of

GUARD = -99


@st.composite
def cases(draw):
    """A batch, and a cache whose shards are the ranks of PCP x DCP."""
    case = draw(batches())
    each = draw(st.sampled_from([1, 1, 2, 3, 4]))
    shard = case["rank"] * each + draw(st.integers(0, each - 1))
    block, interleave = draw(st.sampled_from([1, 2, 16, 7])), draw(st.sampled_from([1, 2, 5, 16, 64, 2**31 - 1]))
    cache = PagedCache(block, case["world_size"] * each, shard, interleave)
    workspace = draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    return case | {"prompt_lens": None, "cache": cache, "seed": draw(st.integers(0, 2**32 - 1)), "workspace": workspace}


def walk(part, cache, tables):
    """What each shard sends, (request, position) or None for a pad, and what this one writes, token by token."""
    world, each = cache.dcp_world_size, cache.dcp_world_size // part.world_size
    new, sends = -(-part.num_tokens_padded // each), []
    for shard in range(world):
        rank = every_rank({name: getattr(part, name) for name in FIELDS})[shard // each]
        natural = np.repeat(np.arange(part.num_requests), part.query_lens)
        first = np.cumsum(part.query_lens) - part.query_lens
        mine = [None if t < 0 else (natural[t], int(part.context_lens[natural[t]] + t - first[natural[t]])) for t in
                rank.local_token_indices.tolist()]  # fmt: skip
        mine += [None] * (new * each - len(mine))
        rows = mine[shard % each * new :][:new]
        for request, context in enumerate(part.context_lens.tolist()):
            held = [(request, p) for p in range(context) if p // cache.cp_interleave % world == shard]
            longest = sum(p // cache.cp_interleave % world == 0 for p in range(context))
            rows += held + [None] * (longest - len(held))
        sends.append(rows)
    return sends


FIELDS = ("query_lens", "context_lens", "is_prefill", "world_size", "layout", "decode_policy")


@given(cases())
@settings(max_examples=100, deadline=None)
def test_the_specification(case):
    """Every key of the step lies where its row says; every new token of this shard is written once, and nothing else."""
    part, cache, tables = partition(**batch_of(case)), case["cache"], block_tables_of(case)
    workspace = workspace_of(case, part)
    rows, sends = shard_rows(part, tables, cache, workspace), walk(part, cache, tables)
    assert {len(sent) for sent in sends} == {rows.num_new + rows.num_context}
    lengths = part.context_lens + part.padded_lens
    keys = [(r, p) for r in range(part.num_requests) for p in range(lengths[r])]
    if workspace is not None and part.num_kv_tokens > workspace:
        keys.sort(key=lambda key: key[1] >= part.context_lens[key[0]])  # stable: all context first
    exchanged = [key for sent in sends for key in sent]
    for key, row in zip(keys, rows.kv_rows.tolist(), strict=True):
        real = key[1] < part.context_lens[key[0]] + part.query_lens[key[0]]
        assert (exchanged[row] == key) if real else row == -1
    mine = sends[cache.dcp_rank][rows.num_new :]
    for key, slot in zip(mine, rows.context_slots.tolist(), strict=True):
        assert slot == (-1 if key is None else cache.slots(tables, *(np.array([n]) for n in key))[0])
    written = [(exchanged[n], slot) for n, slot in enumerate(rows.slot_mapping.tolist()) if slot >= 0]
    assert sorted(slot for _, slot in written) == sorted(slot for slot in slot_mapping(part, tables, cache).tolist() if slot >= 0)
    for key, slot in written:
        assert key[1] >= part.context_lens[key[0]]
        assert slot == cache.slots(tables, *(np.array([n]) for n in key))[0]


def run(device, backend, part, tables, cache, workspace, pads=(0, 0, 0)):
    """The three lists of the op, with pads of local rows, of rows of context and of keys."""
    padded, split = part.num_tokens_padded + pads[0], workspace is not None and part.num_kv_tokens > workspace
    starts = shard_starts(part.context_lens, cache)
    each = cache.dcp_world_size // part.world_size
    sizes = [int(starts[-1]) + pads[1], 0, part.num_kv_tokens + pads[2]]
    sizes[1] = cache.dcp_world_size * (-(-padded // each) + sizes[0])
    types = (torch.int32, torch.int64, torch.int32)
    outs = [torch.full((size + 5,), GUARD, dtype=dtype, device=device) for size, dtype in zip(sizes, types, strict=True)]
    slots = torch.full((part.world_size, padded), -1, dtype=torch.int64)
    slots[:, : part.num_tokens_padded] = torch.from_numpy(slot_mapping(part, tables, cache)).view(part.world_size, -1)
    given = (torch.from_numpy(request_table(part).reshape(-1)), torch.from_numpy(starts), torch.from_numpy(tables), slots.flatten())
    call = torch.ops.pcp_mla.plan_shard_rows if backend == "auto" else select("plan_shard_rows", backend, device)
    numbers = (part.num_requests, part.world_size, padded, sizes[0], sizes[2], split)
    form = (cache.block_size, cache.dcp_world_size, cache.dcp_rank, cache.cp_interleave)
    assert call(*(x.to(device) for x in given), *outs, *numbers, *form) is None
    assert all(out[size:].tolist() == [GUARD] * 5 for out, size in zip(outs, sizes, strict=True))
    return [out[:size].tolist() for out, size in zip(outs, sizes, strict=True)]


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
@given(cases())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_batches(device, backend, case):
    part, cache, tables = partition(**batch_of(case)), case["cache"], block_tables_of(case)
    workspace = workspace_of(case, part)
    wanted = shard_rows(part, tables, cache, workspace)
    got = run(device, backend, part, tables, cache, workspace)
    assert got == [wanted.context_slots.tolist(), wanted.slot_mapping.tolist(), wanted.kv_rows.tolist()]


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
def test_pads(device, backend):
    """More local rows than the fullest rank has move all rows; what no row has to fill is -1."""
    cache = PagedCache(4, 4, 1, 2)
    part = partition([9, 1, 0], [11, 6, 3], [True, False, True], world_size=2, rank=0)
    tables = np.arange(30, dtype=np.int32).reshape(3, 10)
    for workspace in (None, 13):
        wanted = shard_rows(part, tables, cache, workspace, part.num_tokens_padded + 3)
        context, slots, rows = run(device, backend, part, tables, cache, workspace, (3, 0, 4))
        assert context == wanted.context_slots.tolist()
        assert slots == wanted.slot_mapping.tolist()
        assert rows == [*wanted.kv_rows.tolist(), -1, -1, -1, -1]


def assert_rows(got, wanted):
    for field in dataclasses.fields(wanted):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(b, int):
            assert a == b, field.name
        else:
            assert a.cpu().numpy().dtype == b.dtype, field.name
            assert np.array_equal(a.cpu().numpy(), b), field.name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(cases())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_planner(device, case):
    """Steps of one planner, of growing and of fewer rows."""
    part, cache, tables = partition(**batch_of(case)), case["cache"], block_tables_of(case)
    if cache.dcp_world_size == 1:
        return
    planner = planner_of(case, device=device)
    for workspace in (None, workspace_of(case, part)):
        meta = planner.plan(**plan_arguments(case), block_tables=tables, workspace_tokens=workspace)
        assert_rows(meta.shard_rows, shard_rows(part, tables, cache, workspace))
        planner.plan([3], [5], None, np.zeros((1, 20), np.int32))
    assert planner.plan(**plan_arguments(case)).shard_rows is None  # without block tables


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padded_plans_and_tables_written_again(device):
    """The rows of one moment, at the addresses of the plan before."""
    planner = PCPPlanner(4, 40, 2, 1, block_size=4, dcp_world_size=4, dcp_rank=3, cp_interleave=2, device=device)
    part = partition([9, 1, 5], [11, 6, 0], [True, False, True], world_size=2, rank=1)
    tables = torch.arange(30, dtype=torch.int32).view(3, 10)
    arguments = ([9, 1, 5], [11, 6, 0], [True, False, True])
    wanted = shard_rows(part, tables.numpy(), planner.cache, None, 20)
    addresses = set()
    for _ in range(2):
        given = tables.to(device, copy=True)
        meta = planner.plan(*arguments, given, num_tokens_padded=20, num_kv_tokens_padded=50)
        given.fill_(7)
        rows = meta.shard_rows
        assert_rows(dataclasses.replace(rows, kv_rows=rows.kv_rows[: part.num_kv_tokens]), wanted)
        assert rows.kv_rows[part.num_kv_tokens :].tolist() == [-1] * (50 - part.num_kv_tokens)
        addresses.add((rows.context_slots.data_ptr(), rows.slot_mapping.data_ptr(), rows.kv_rows.data_ptr()))
    assert len(addresses) == 1
    planner.plan(*arguments, tables)
    stale = planner.plan(*arguments, tables)
    planner.plan(*arguments, tables)
    with pytest.raises(RuntimeError, match="before the next plan"):
        _ = stale.shard_rows


def test_shards_that_are_not_the_ranks():
    """No rows: of other numbers of shards, of a shard of another rank, of a cache that is not shared out, without a planner."""
    tables = np.zeros((1, 9), np.int32)
    for world, rank, shards, shard in ((2, 0, 3, 0), (2, 1, 4, 1), (2, 0, 4, 2), (4, 0, 2, 0), (1, 0, 1, 0)):
        planner = PCPPlanner(1, 9, world, rank, dcp_world_size=shards, dcp_rank=shard)
        assert planner.plan([4], [3], None, tables).shard_rows is None
    assert PCPMetadata.build([4], world_size=1, rank=0).shard_rows is None
    assert [shards_per_rank(PagedCache(1, 6, shard), 2, 1) for shard in range(6)] == [0, 0, 0, 3, 3, 3]


def test_more_rows_than_there_are_numbers():
    planner = PCPPlanner(2, 9, 1, 0, dcp_world_size=2, dcp_rank=1, cp_interleave=2**30, block_size=2**30)
    meta = planner.plan([4, 1], [2**30, 2**29], None, np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match=r"shard_rows must be less than 2\*\*31 rows of all shards, got 3221225478"):
        _ = meta.shard_rows


@pytest.mark.parametrize(("device", "backend"), [case for case in IMPLEMENTATIONS if case.id in ("cpu-native", "cuda")])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"world_size": 3}, "dcp_world_size a multiple of world_size"),
        ({"dcp_rank": 4}, "dcp_rank in 0..dcp_world_size - 1"),
        ({"num_context": -1}, "counts must be 0 to"),
        ({"num_context": 2**30}, "must send less than"),
        ({"context_slots": torch.zeros(1, dtype=torch.int32)}, "context_slots must be a contiguous int32 vector of at least 9"),
        ({"shard_slots": torch.zeros(99, dtype=torch.int32)}, "shard_slots must be a contiguous int64 vector"),
        ({"block_tables": torch.zeros(3, 10, dtype=torch.int64)}, "block_tables must be int32"),
    ],
)
def test_native_checks(device, backend, changes, words):
    part, cache = partition([9, 1, 0], [11, 6, 3], [True, False, True], world_size=2, rank=0), PagedCache(4, 4, 1, 2)
    arguments = {
        "request_table": torch.from_numpy(request_table(part).reshape(-1)),
        "shard_starts": torch.from_numpy(shard_starts(part.context_lens, cache)),
        "block_tables": torch.zeros(3, 10, dtype=torch.int32),
        "slot_mapping": torch.zeros(20, dtype=torch.int64),
        "context_slots": torch.zeros(9, dtype=torch.int32),
        "shard_slots": torch.zeros(99, dtype=torch.int64),
        "kv_rows": torch.zeros(40, dtype=torch.int32),
        "num_requests": 3, "world_size": 2, "num_tokens_padded": part.num_tokens_padded, "num_context": 9, "num_kv_rows": 30,
        "split": False, "block_size": 4, "dcp_world_size": 4, "dcp_rank": 1, "cp_interleave": 2,
    }  # fmt: skip
    call = select("plan_shard_rows", backend, device)

    def run(given):
        call(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in given.values()))

    run(arguments)
    with pytest.raises(RuntimeError, match=words):
        run(arguments | changes)
