"""The rows of all ranks: every implementation of plan_rank_rows against the specification, and a planner's tables."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from batches import EVERYWHERE, IMPLEMENTATIONS, every_rank
from pcp_mla import PCPMetadata, PCPPlanner, partition
from pcp_mla.ops.registry import select
from pcp_mla.plan.rank_rows import longest_rows, rank_rows
from pcp_mla.plan.slots import key_chunks
from pcp_mla.planner.step_buffer import request_table
from plans import assert_equal, batch_of, block_tables_of, cases, plan_arguments, planner_of, workspace_of

GUARD = -99


def plain(part, workspace):
    """The tables [3 + 2C, rows + 1] as lists, row by row from the partitions of all ranks."""
    ranks = every_rank({name: getattr(part, name) for name in FIELDS})
    by_rank = [key_chunks(each, workspace) for each in ranks]
    kinds = [ranks] + ([list(chunks) for chunks in zip(*by_rank, strict=True)] if len(by_rank[0]) > 1 else [])
    padded, tables = part.num_tokens_padded, [[]]
    for rank, each in enumerate(ranks):
        tables[0] += [rank * padded + start for start in each.cu_seqlens_q.tolist()]
    tables[0].append(len(ranks) * padded)
    for kind in kinds:
        end = int(kind[0].cu_seqlens_k[-1])
        tables.append([start for each in kind for start in each.cu_seqlens_k.tolist()] + [end])
        tables.append([used for each in kind for used in [*each.seqused_k.tolist(), 0]] + [0])
    return tables


FIELDS = ("query_lens", "context_lens", "is_prefill", "world_size", "layout", "decode_policy")


def stacked(rows):
    """RankRows as the op writes them."""
    kinds = [rows, *(rows.key_chunks if len(rows.key_chunks) > 1 else ())]
    pairs = [(np.asarray(kind.cu_seqlens_k.tolist()), np.asarray([*kind.seqused_k.tolist(), 0])) for kind in kinds]
    return [rows.cu_seqlens_q.tolist()] + [table.tolist() for pair in pairs for table in pair]


def run(device, backend, part, workspace, pads=0):
    chunks = len(key_chunks(part, workspace))
    counts = (chunks, workspace) if chunks > 1 else (0, 0)
    size = part.world_size * (2 * part.num_requests + 1) + 1
    out = torch.full(((3 + 2 * counts[0]) * size + 5,), GUARD, dtype=torch.int32, device=device)
    table = torch.from_numpy(request_table(part).reshape(-1)).to(device)
    call = torch.ops.pcp_mla.plan_rank_rows if backend == "auto" else select("plan_rank_rows", backend, device)
    assert call(table, out, part.num_requests, part.world_size, part.num_tokens_padded + pads, *counts) is None
    assert out[-5:].tolist() == [GUARD] * 5
    return out[:-5].view(-1, size).tolist()


def assert_rows(got, wanted):
    assert (got.max_seqlen_q, got.max_seqlen_k) == (wanted.max_seqlen_q, wanted.max_seqlen_k)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        assert_equal(getattr(got, name).cpu(), getattr(wanted, name), name)
    assert len(got.key_chunks) == len(wanted.key_chunks)
    for a, b in zip(got.key_chunks, wanted.key_chunks, strict=True):
        for field in dataclasses.fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name), field.name)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_the_specification(case):
    """Against the tables of each rank, and against every query's keys, one by one."""
    part = partition(**batch_of(case))
    workspace = workspace_of(case, part)
    rows = rank_rows(part, workspace)
    assert stacked(rows) == plain(part, workspace)
    assert all(array.dtype == np.int32 for array in (rows.cu_seqlens_q, rows.cu_seqlens_k, rows.seqused_k))
    assert rows.max_seqlen_k == max(rows.seqused_k, default=0)
    each = 2 * part.num_requests + 1
    assert rows.max_seqlen_q == np.diff(rows.cu_seqlens_q).max()
    for rank, of in enumerate(every_rank({name: getattr(part, name) for name in FIELDS})):
        seen = [
            (start, used - count + j + 1)
            for count, start, used in zip(np.diff(of.cu_seqlens_q), of.cu_seqlens_k, of.seqused_k, strict=False)
            for j in range(count)
        ]
        got = [
            (rows.cu_seqlens_k[i], rows.seqused_k[i] - count + j + 1)
            for i, count in enumerate(np.diff(rows.cu_seqlens_q))
            if i // each == rank and i % each != each - 1
            for j in range(count)
        ]
        assert got == seen
    chunks = (len(rows.key_chunks), workspace or 0)
    lengths = (part.query_lens, part.context_lens, part.is_prefill)
    assert longest_rows(lengths, part.world_size, part.layout, part.decode_policy, chunks) == (
        rows.max_seqlen_q,
        rows.max_seqlen_k,
        tuple(chunk.max_seqlen_k for chunk in rows.key_chunks),
    )


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
@given(cases())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_random_batches(device, backend, case):
    part = partition(**batch_of(case))
    workspace = workspace_of(case, part)
    assert run(device, backend, part, workspace) == plain(part, workspace)


@pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
def test_more_than_one_block_of_rows_and_pads(device, backend):
    lengths = np.random.default_rng(0).integers(0, 50, 200)
    part = partition(lengths, lengths[::-1], lengths % 3 > 0, world_size=4, rank=1)
    for workspace in (None, 2 * int(lengths.sum()) - 1):
        got, wanted = run(device, backend, part, workspace, pads=7), plain(part, workspace)
        rank = np.append(np.repeat(np.arange(4), 401), 4)
        assert got[0] == (np.array(wanted[0]) + 7 * rank).tolist()
        assert got[1:] == wanted[1:]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    table = torch.from_numpy(request_table(partition([9, 4], [3, 5], world_size=2, rank=0)).reshape(-1)).to(device)
    out = torch.empty(100, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.pcp_mla.plan_rank_rows.default, (table, out, 2, 2, 7, 0, 0))


def test_the_native_op_refuses_what_does_not_fit():
    """torch.ops is open to anyone: what is too small must not reach memory."""
    op, size = torch.ops.pcp_mla.plan_rank_rows, 7 * (2 * 5 + 1)
    table, out = torch.zeros(21, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    op(table, out, 2, 2, 7, 2, 4)
    with pytest.raises(RuntimeError, match="plan_rank_rows: request_table must be a contiguous int32 vector of at least 21 "):
        op(table[:-1], out, 2, 2, 7, 2, 4)
    for wrong in (out[:-1], out.long(), torch.zeros(2 * size, dtype=torch.int32)[::2], out.view(7, -1)):
        with pytest.raises(RuntimeError, match="plan_rank_rows: out must be a contiguous int32 vector of at least 77 "):
            op(table, wrong, 2, 2, 7, 2, 4)
    cut = 2**32 + 1  # of which 32 bits are a number that would do
    for position, value in (
        (0, -1),
        (0, cut),
        (1, 0),
        (1, cut),
        (2, -1),
        (2, cut),
        (2, 2**30),
        (3, -1),
        (3, cut),
        (4, -1),
        (4, cut),
    ):
        counts = [2, 2, 7, 2, 4]
        counts[position] = value
        with pytest.raises(RuntimeError, match="plan_rank_rows: "):
            op(table, out, *counts)
    with pytest.raises(RuntimeError, match="counts must be"):
        op(table, out, 2, 2, 7, 3, 2**30)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_planned_and_built(case):
    part = partition(**batch_of(case))
    tables, workspace = block_tables_of(case), workspace_of(case, part)
    meta = planner_of(case).plan(**plan_arguments(case), block_tables=tables, workspace_tokens=workspace)
    assert_rows(meta.rank_rows, rank_rows(part, workspace))
    built = PCPMetadata.from_partition(part).rank_rows
    assert_rows(built, dataclasses.replace(rank_rows(part), key_chunks=()))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_tables_stay_where_they_are(device):
    """Of padded plans, once one was asked; on a GPU each plan fills them without being asked."""
    planner = PCPPlanner(4, 100, 2, 1, device=device, max_context_chunks=3)
    sizes = {"num_tokens_padded": 40, "num_requests_padded": 4, "num_kv_tokens_padded": 150}
    first = planner.plan([20, 31], [5, 7], **sizes).rank_rows
    places = [getattr(first, name).data_ptr() for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")]
    assert (first.max_seqlen_q, first.max_seqlen_k) == (40, 150)
    for batch in (([9, 1, 4], [60, 2, 0], [True, False, True]), ([70], [0], None), ([], [], None)):
        meta = planner.plan(*batch, **sizes)
        held = {name: getattr(first, name).cpu() for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")}
        rows = meta.rank_rows
        assert [getattr(rows, name).data_ptr() for name in held] == places
        part = partition(*batch, world_size=2, rank=1)
        padded = rank_rows(partition(*(np.append(x, [0] * (4 - len(batch[0]))).astype(int) for x in batch[:2]),
                                     None if batch[2] is None else [*batch[2], True], world_size=2, rank=1))  # fmt: skip
        shift = np.append(np.repeat([0, 1], 9), 2) * (40 - part.num_tokens_padded)
        assert rows.cu_seqlens_q.tolist() == (padded.cu_seqlens_q + shift).tolist()
        assert rows.cu_seqlens_k.tolist() == padded.cu_seqlens_k.tolist()
        assert rows.seqused_k.tolist() == padded.seqused_k.tolist()
        if device == "cuda":
            assert all(torch.equal(x, getattr(rows, name).cpu()) for name, x in held.items())


def test_a_plan_that_is_over():
    planner = PCPPlanner(2, 40, 2, 0)
    over = planner.plan([9, 3])
    planner.plan([3, 9])
    with pytest.raises(RuntimeError, match="before the next plan"):
        _ = over.rank_rows
    assert over.lengths[0].tolist() == [9, 3]
