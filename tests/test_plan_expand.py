"""plan_expand: every implementation fills the same arrays from one request table, and nothing beyond."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from batches import EVERYWHERE, IMPLEMENTATIONS
from pcp_mla import partition
from pcp_mla.ops.registry import select
from pcp_mla.plan.slots import PagedCache, kv_rows, slot_mapping
from pcp_mla.planner.step_buffer import request_table
from plans import TOKEN_ARRAYS, assert_equal, batch_of, block_tables_of, cases, workspace_of

GUARD = -99


def arguments(part, tables, cache, device, pads=3, workspace=None):
    """What the op takes, with outputs that are larger than it may fill."""
    rows, keys = part.num_tokens_padded + pads, part.num_kv_tokens + pads
    sizes = [rows, rows, *[part.world_size * rows] * 3, keys]
    outputs = [torch.full((n + 5,), GUARD, dtype=torch.int64 if i == 4 else torch.int32) for i, n in enumerate(sizes)]
    table = torch.from_numpy(request_table(part).reshape(-1))
    split = workspace is not None and part.num_kv_tokens > workspace
    tensors = [table, None if tables is None else torch.from_numpy(tables), *outputs]
    counts = (part.num_requests, part.world_size, part.rank, rows, 0 if tables is None else keys, split, *vars(cache).values())
    return [None if t is None else t.to(device) for t in tensors], counts


def run(device, backend, part, tables, cache, **options):
    tensors, counts = arguments(part, tables, cache, device, **options)
    call = torch.ops.pcp_mla.plan_expand if backend == "auto" else select("plan_expand", backend, device)
    assert call(*tensors, *counts) is None
    return [t.cpu().numpy() for t in tensors[2:]]


def expected(part, tables, cache, pads=3, workspace=None):
    rows, before = part.num_tokens_padded + pads, part.num_tokens_padded
    gathered = part.world_size * rows

    def padded(array, length, pad=-1):
        return np.concatenate([array, np.full(length - len(array), pad), [GUARD] * 5]).astype(array.dtype)

    def moved(index):
        return (index // max(1, before) * rows + index % max(1, before)).astype(np.int32)

    slots = np.full((part.world_size, rows), GUARD if tables is None else -1, np.int64)
    keys = np.full(part.num_kv_tokens + pads, GUARD, np.int32)
    if tables is not None:
        slots[:, :before] = slot_mapping(part, tables, cache).reshape(part.world_size, before)
        keys = padded(kv_rows(part, tables, cache, workspace), part.num_kv_tokens + pads)[:-5]
    return [
        padded(part.local_token_indices, rows),
        padded(part.positions, rows, 0),
        padded(moved(part.allgather_restore_idx), gathered),
        padded(moved(part.hidden_restore_idx), gathered),
        padded(slots.reshape(-1), gathered),
        padded(keys, len(keys)),
    ]


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
@given(cases())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_batches(device, backend, case):
    part = partition(**batch_of(case))
    workspace = workspace_of(case, part)
    tables = None if case["seed"] % 4 == 0 else block_tables_of(case)
    got = run(device, backend, part, tables, case["cache"], workspace=workspace)
    for name, a, b in zip(
        (*TOKEN_ARRAYS, "slot_mapping", "kv_rows"), got, expected(part, tables, case["cache"], workspace=workspace), strict=True
    ):
        assert_equal(a, b, name)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_more_than_one_block_of_rows(device, backend):
    """Long prefills beside decodes: boundaries of thread blocks within requests, both orders of the key rows."""

    part = partition([3000, 1, 700, 2], [10, 1500, 0, 9], [True, False, True, False], world_size=4, rank=2)
    cache = PagedCache(16, 2, 1, 4)
    tables = np.random.default_rng(0).permutation(4 * 200).reshape(4, 200).astype(np.int32)
    for workspace in (None, 4000):
        got = run(device, backend, part, tables, cache, workspace=workspace)
        for a, b in zip(got, expected(part, tables, cache, workspace=workspace), strict=True):
            assert_equal(a, b, "row")


@pytest.mark.parametrize(("device", "backend"), [p for p in IMPLEMENTATIONS if p.id != "reference-cuda"])
def test_one_long_request(device, backend):
    """Four chunks, of which rank 1 of 2 has the second and the third; a GPU's are so long that offsets pass 2**32 bytes."""
    chunk, block_size = (37, 16) if device == "cpu" else (2**28 + 5, 2**16)
    tokens, rows, guard = 4 * chunk, 2 * chunk, torch.full((5,), GUARD)
    blocks = -(-tokens // block_size)
    table = torch.from_numpy(request_table(partition([tokens], world_size=2, rank=1)).reshape(-1)).to(device)
    tables = torch.arange(blocks - 1, -1, -1, dtype=torch.int32, device=device)[None]
    kinds = [(rows, torch.int32)] * 2 + [(tokens, torch.int32)] * 2 + [(tokens, torch.int64), (tokens, torch.int32)]
    outputs = [torch.full((n + 5,), GUARD, dtype=kind, device=device) for n, kind in kinds]
    call = torch.ops.pcp_mla.plan_expand if backend == "auto" else select("plan_expand", backend, device)
    call(table, tables, *outputs, 1, 2, 1, rows, tokens, False, block_size, 1, 0, 1)

    def slots(token):
        return (blocks - 1 - token // block_size) * block_size + token % block_size

    step = 50 if device == "cpu" else 2**26
    for first in range(0, tokens, step):
        n = torch.arange(first, min(first + step, tokens), device=device)
        number = n // chunk
        place = torch.where(number < 2, number * rows, (3 - number) * rows + chunk) + n % chunk
        holder, row = n // rows, n % rows
        held = torch.where(row < chunk, holder * chunk + row, (3 - holder) * chunk + row - chunk)
        mine = held[holder == 1]
        local = slice(max(0, first - rows), max(0, first - rows) + len(mine))
        for got, wanted in zip(
            [x[local] for x in outputs[:2]] + [x[first : first + len(n)] for x in outputs[2:]],
            [mine, mine, place, place, slots(held), slots(n)],
            strict=True,
        ):
            assert torch.equal(got.long(), wanted)
    assert all(torch.equal(x[-5:].cpu().long(), guard) for x in outputs)


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
@pytest.mark.parametrize("workspace", [None, 60])
def test_blocks_without_slots_and_rows_that_are_not_there(device, backend, workspace):
    """A number that is negative or whose slots pass 31 bits, in a table that no host has seen, gives -1: no other block's slot."""
    part = partition([9, 8, 40, 5], [3, 40, 0, 2], world_size=2, rank=1)
    for block_size in (16, 24):
        cache = PagedCache(block_size)
        last = 2**31 // block_size
        tables = np.array([[-1, 3], [last, 2], [2**31 - 1, -(2**31)], [last - 1, 7]], np.int32)
        tables = np.append(tables, [[4], [5], [6], [8]], axis=1).astype(np.int32)
        got = run(device, backend, part, tables, cache, workspace=workspace)
        for a, b in zip(got, expected(part, tables, cache, workspace=workspace), strict=True):
            assert_equal(a, b, "row")
    short = run(device, backend, part, tables[:3], cache, workspace=workspace)
    tables[3] = -1  # a request that the table has no row for
    for a, b in zip(short, expected(part, tables, cache, workspace=workspace), strict=True):
        assert_equal(a, b, "row")


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
@pytest.mark.parametrize("tables", [np.empty((0, 5), np.int32), np.empty((3, 0), np.int32)], ids=["no rows", "no columns"])
def test_tables_without_entries(device, backend, tables):
    """Strides of such a table mean nothing, and it has no address: pads are written all the same."""
    tensors, counts = arguments(partition([], world_size=2, rank=1), None, PagedCache(), device)
    call = torch.ops.pcp_mla.plan_expand if backend == "auto" else select("plan_expand", backend, device)
    for table in (torch.from_numpy(tables), torch.from_numpy(tables.T.copy()).T):
        tensors[6].fill_(GUARD)
        requests, world, rank, rows, _, *rest = counts
        call(tensors[0], table.to(device), *tensors[2:], requests, world, rank, rows, 3, *rest)
        assert tensors[6].tolist() == [-1] * world * rows + [GUARD] * 5
        assert tensors[7].tolist()[:4] == [-1] * 3 + [GUARD]


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_only_key_rows_or_only_tokens(device, backend):

    part = partition([9, 4], [3, 5], world_size=2, rank=0)
    tables = np.arange(40, dtype=np.int32).reshape(2, 20)
    tensors, counts = arguments(part, tables, PagedCache(), device)
    call = torch.ops.pcp_mla.plan_expand if backend == "auto" else select("plan_expand", backend, device)
    requests, world, rank, rows, keys, *rest = counts
    call(*tensors, requests, world, rank, 0, keys, *rest)
    assert all((t == GUARD).all() for t in tensors[2:7])
    assert_equal(tensors[7].cpu(), expected(part, tables, PagedCache())[5], "kv_rows")
    tensors[7].fill_(GUARD)
    call(*tensors, requests, world, rank, rows, 0, *rest)
    assert (tensors[7] == GUARD).all()
    assert_equal(tensors[2].cpu(), expected(part, tables, PagedCache())[0], "local_token_indices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):

    part = partition([9, 4], [3, 5], world_size=2, rank=0)
    tensors, counts = arguments(part, np.arange(40, dtype=np.int32).reshape(2, 20), PagedCache(), device)
    torch.library.opcheck(torch.ops.pcp_mla.plan_expand.default, (*tensors, *counts))


def test_the_native_op_refuses_what_does_not_fit():
    """torch.ops is open to anyone: a table or an output that is too small must not reach memory."""

    part = partition([9, 4], [3, 5], world_size=2, rank=0)
    tables = np.arange(40, dtype=np.int32).reshape(2, 20)
    tensors, counts = arguments(part, tables, PagedCache(), "cpu", pads=0)
    op = torch.ops.pcp_mla.plan_expand
    for index in (0, *range(2, 8)):
        wrong = list(tensors)
        wrong[index] = tensors[index][:3]
        with pytest.raises(RuntimeError, match=r"plan_expand: \w+ must be a contiguous int\d\d vector of at least \d+"):
            op(*wrong, *counts)
    columns = part.num_requests + 1
    for row in (0, 1, 2, 3, 4, 5, 6):
        for value in (1000, -1000):
            wrong = [tensors[0].clone(), *tensors[1:]]
            wrong[0][row * columns + 1] += value
            if row == 4 and value == -1000:
                continue  # any negative owner is a prefill
            with pytest.raises(RuntimeError, match="request_table must describe a batch that fits"):
                op(*wrong, *counts)
    with pytest.raises(RuntimeError, match="block_tables must be int32"):
        op(tensors[0], tensors[1].long(), *tensors[2:], *counts)
    with pytest.raises(RuntimeError, match="kv_rows need block_tables"):
        op(tensors[0], None, *tensors[2:], *counts)
    cut = 2**32 + 1  # of which 32 bits are a number that would do
    wrong = ((1, 0), (2, 2), (6, 0), (7, 0), (8, 1), (9, 0), (0, cut), (1, cut), (3, cut), (4, cut), (6, cut), (7, cut), (9, cut))
    for position, value in wrong:
        with pytest.raises(RuntimeError, match="plan_expand: "):
            op(*tensors, *counts[:position], value, *counts[position + 1 :])
