"""The exchange of heads: queries to the ranks that have their heads, outputs back, over gloo, NCCL, played ranks and alone."""

import itertools

import pytest
import torch

from batches import random_bytes, same_bits
from pcp_mla import HeadExchange, PCPMetadata, PCPPlanner, heads_of
from pcp_mla.exchange import heads as heads_module
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.layer.graphs import PiecewiseGraph
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

ROOM, QK, V = 160, 12, 8
# New tokens, context, which are prefills: a large step, then smaller ones, whose pads must not show what it left; ranks without a
# token, decodes beside prefills and alone, no token at all.
STEPS = [
    ([70, 9], [0, 16], [True, True]),
    ([1], [0], [True]),
    ([5, 1, 1, 30], [3, 9, 40, 0], [True, False, False, True]),
    ([1, 1, 2], [3, 9, 40], [False, False, False]),
    ([0], [0], [True]),
    ([151], [0], [True]),
]
HEADS = (5, 16, 20)
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def dims_of(num_heads, qk=QK, v=V):
    return MLADims(num_heads, qk - 4, 4, v, 12)


def rows_of(metas, width, num_heads, dtype, seed):
    """What any rank can make for all: [Np, heads, width] of each rank's tokens, pads zeros. Replicated decodes are the same."""
    natural = random_bytes(
        (sum(metas[0].partition.query_lens), num_heads, width), dtype, metas[0].device, torch.Generator().manual_seed(seed)
    )
    rows = []
    for meta in metas:
        of = torch.zeros(meta.num_tokens_padded, num_heads, width, device=meta.device).to(dtype)
        of.view(torch.uint8)[: meta.num_tokens] = natural.view(torch.uint8)[meta.local_token_indices.long()]
        rows.append(of)
    return rows


def forms(x):
    """The same rows: as they are, between others, transposed."""
    wide = torch.zeros(len(x), x.shape[1] + 1, x.shape[2] + 3, dtype=torch.float32, device=x.device).to(x.dtype)
    wide[:, 1:, 1:-2] = x
    return [x, wide[:, 1:, 1:-2], x.transpose(0, 1).contiguous().transpose(0, 1)]


def exchange_all(group, device, layout="unpadded", dtypes=DTYPES):
    """Every step there and back, in every form; whether all is what indexing says."""
    world, rank = group_world_size(group), group_rank(group)
    same = []
    for num_heads, dtype, widths in itertools.product(HEADS, dtypes, ((QK, V), (V, QK))):
        if num_heads < world:
            continue
        exchange = HeadExchange(group, ROOM, dims_of(num_heads, *widths), dtype, device)
        first, last = heads_of(num_heads, world, rank)
        assert exchange.heads == slice(first, last)
        for number, step in enumerate(STEPS):
            metas = [PCPMetadata.build(*step, world_size=world, rank=r, layout=layout, device=device) for r in range(world)]
            meta = metas[rank]
            queries, outs = (rows_of(metas, width, num_heads, dtype, 2 * number + i) for i, width in enumerate(widths))
            wanted = torch.cat(queries)[:, first:last]
            out, back = torch.cat(outs)[:, first:last], outs[rank][: meta.num_tokens]
            for q, o, given in zip(forms(queries[rank][: meta.num_tokens]), forms(out), (False, True, False), strict=True):
                got = exchange.to_heads(q, meta)
                assert world > 1 or got is q
                same.append(same_bits(got, wanted[: len(got)]))
                assert len(got) == (world * meta.num_tokens_padded if world > 1 else meta.num_tokens)
                result = forms(torch.empty_like(back))[1] if given else None
                got = exchange.to_tokens(o if world > 1 else o[: meta.num_tokens], meta, result)
                assert result is None or got is result
                same.append(got.shape == back.shape and same_bits(got, back))
    return same


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gloo(world):
    for same in run_distributed(world, exchange_all, "cpu"):
        assert same
        assert all(same)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_nccl():
    for same in run_distributed(2, exchange_all, "cuda", backend="nccl"):
        assert same
        assert all(same)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_played_and_alone(device, layout):
    for world in (2, 5, 8):
        for same in play(world, lambda group: exchange_all(group, device, layout, DTYPES[1:2])):
            assert same
            assert all(same)
    assert all(exchange_all(None, device, layout))


def test_each_row_and_head_goes_to_its_place():
    """Numbers that say whose they are: rank, row, head, column."""
    lengths, world, num_heads = [23], 3, 5

    def run(group):
        meta = PCPMetadata.build(lengths, world_size=world, rank=group.rank)
        exchange = HeadExchange(group, ROOM, dims_of(num_heads), torch.float32)

        def numbers(rows, heads, width, rank):
            at = torch.meshgrid(torch.arange(rows), torch.arange(heads), torch.arange(width), indexing="ij")
            return (1000000 * (rank + 1) + 10000 * at[0] + 100 * at[1] + at[2]).float()

        padded = meta.num_tokens_padded
        got = exchange.to_heads(numbers(meta.num_tokens, num_heads, QK, group.rank), meta).view(world, padded, -1, QK)
        for rank in range(world):
            rows = PCPMetadata.build(lengths, world_size=world, rank=rank).num_tokens
            assert torch.equal(got[rank, :rows], numbers(rows, num_heads, QK, rank)[:, exchange.heads])
            assert not got[rank, rows:].any()
        # Heads of a rank, and rows of all: what rank s sends of its h-th head of row t of rank r.
        mine = exchange.heads.stop - exchange.heads.start
        back = exchange.to_tokens(numbers(world * padded, mine, V, group.rank), meta)
        for rank in range(world):
            first, last = heads_of(num_heads, world, rank)
            of = numbers(world * padded, last - first, V, rank)[group.rank * padded :][: meta.num_tokens]
            assert torch.equal(back[:, first:last], of)

    play(world, run)


def test_rows_of_a_padded_plan():
    """Local tensors may have Np rows, of which the pads travel as they are, and come back."""

    def run(group):
        planner = PCPPlanner(2, 60, 2, group.rank, block_size=8)
        meta = planner.plan([13, 4], [0, 0], [True, True], torch.arange(16, dtype=torch.int32).view(2, 8), num_tokens_padded=16)
        assert meta.num_tokens < meta.num_local_rows == 16
        exchange = HeadExchange(group, 16, dims_of(5), torch.float32)
        q = torch.arange(16.0 * 5 * QK).view(16, 5, QK) + 10000 * group.rank
        for rows in (16, meta.num_tokens):
            got = exchange.to_heads(q[:rows], meta).view(2, 16, -1, QK)
            assert torch.equal(got[group.rank, :rows], q[:rows, exchange.heads])
            assert not got[group.rank, rows:].any()
            out = torch.ones(32, got.shape[2], V)
            assert exchange.to_tokens(out, meta).shape == (rows, 5, V)
            assert exchange.to_tokens(out, meta, torch.zeros(16, 5, V)).all()

    play(2, run)


def test_collectives_go_by_what_is_around_them():
    def run(group):
        meta = PCPMetadata.build([9], world_size=2, rank=group.rank)
        exchange = HeadExchange(group, 9, dims_of(4), torch.float32)
        calls = []
        exchange.around = calls.append
        q, out = torch.ones(meta.num_tokens, 4, QK), torch.ones(2 * meta.num_tokens_padded, 2, V)
        there, back = exchange.to_heads(q, meta), exchange.to_tokens(out, meta)
        assert len(calls) == 2
        for fill in (3.0, 5.0):  # as a replay does: the same calls on what is in the buffers by then
            exchange._packed.fill_(fill)
            calls[0]()
            assert (there == fill).all()
        out.fill_(7.0)
        calls[1]()
        assert (exchange._packed[: meta.num_tokens_padded * 4 * V] == 7.0).all()
        assert back.shape == (meta.num_tokens, 4, V)

    play(2, run)


@pytest.mark.gpu
def test_graphs_between_the_collectives():
    """Captured in pieces, replayed with other queries."""

    def run(group):
        meta = PCPMetadata.build([31], world_size=2, rank=group.rank, device="cuda")
        exchange, graph = HeadExchange(group, 20, dims_of(5), torch.float32, "cuda"), PiecewiseGraph()
        q = torch.zeros(meta.num_tokens, 5, QK, device="cuda")

        def layer():
            return exchange.to_tokens(exchange.to_heads(q, meta)[..., :V] * 2, meta) + 1

        layer()
        result = graph.capture(layer, [exchange])
        assert graph.num_pieces == 5
        for number in range(3):
            q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * number + group.rank)))
            graph.replay()
            assert torch.equal(result, q[..., :V] * 2 + 1)

    with torch.no_grad():
        play(2, run)


def test_made_in_inference_mode_and_used_outside():
    def run(group):
        meta = PCPMetadata.build([9], world_size=2, rank=group.rank)
        with torch.inference_mode():
            exchange = HeadExchange(group, 9, dims_of(4), torch.float32)
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                q = torch.full((meta.num_tokens, 4, QK), 1.0 + group.rank)
                got = exchange.to_heads(q, meta)
                assert got[0].eq(1).all()
                exchange.to_tokens(got[..., :V], meta)

    play(2, run)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [((16, 4), [4, 4, 4, 4]), ((5, 4), [2, 1, 1, 1]), ((20, 8), [3, 3, 3, 3, 2, 2, 2, 2]), ((7, 1), [7]), ((3, 3), [1, 1, 1])],
)
def test_heads_of(arguments, wanted):
    bounds = [heads_of(*arguments, rank) for rank in range(arguments[1])]
    assert [last - first for first, last in bounds] == wanted
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == arguments[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, 4, 0), ValueError, "num_heads must be at least 1 for each of 4 ranks, got 3"),
        ((4, 4, 4), ValueError, "rank must be less than world_size 4, got 4"),
        ((4, 0, 0), ValueError, "world_size must be at least 1, got 0"),
        ((4, 2, -1), ValueError, "rank must be at least 0, got -1"),
        ((4.0, 2, 0), TypeError, "num_heads must be an int, got 4.0"),
    ],
)
def test_heads_of_what_cannot_be(arguments, error, words):
    with pytest.raises(error, match=words):
        heads_of(*arguments)


META = PCPMetadata.build([9], world_size=1, rank=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": 3}, TypeError, "{} must be a tensor, got int"),
        ({"x": torch.zeros(9, 4)}, ValueError, r"{} must have 3 dimensions \[tokens, heads, width\], got 2"),
        ({"x": torch.zeros(8, 4, 8)}, ValueError, "{} must have 9 rows, as the step that meta describes, got 8"),
        ({"x": torch.zeros(9, 3, 8)}, ValueError, "{} must have 4 heads of width 8, got 3 of width 8"),
        ({"x": torch.zeros(9, 4, 7)}, ValueError, "{} must have 4 heads of width 8, got 4 of width 7"),
        ({"x": torch.zeros(9, 4, 8).half()}, TypeError, "{} must be torch.float32, as the exchange, got torch.float16"),
        ({"x": torch.zeros(9, 4, 8, device="meta")}, ValueError, "{} must be on cpu, as meta, got meta"),
        ({"x": torch.zeros(9, 8, 4).transpose(1, 2)}, ValueError, r"{} must have a contiguous last dimension, got strides"),
        ({"x": torch.zeros(9, 4, 8, requires_grad=True)}, NotImplementedError, "{} must not require gradients"),
        ({"meta": None}, TypeError, "meta must be a PCPMetadata, got NoneType"),
        ({"meta": PCPMetadata.build([9], world_size=2, rank=0)}, ValueError, "meta must be for rank 0 of 1, as the group"),
        (
            {"x": torch.zeros(11, 4, 8), "meta": PCPMetadata.build([11], world_size=1, rank=0)},
            ValueError,
            "meta must have at most 10 tokens a rank .max_tokens., got 11",
        ),
    ],
)
@pytest.mark.parametrize(("call", "name"), [("to_heads", "q"), ("to_tokens", "out")])
def test_errors(call, name, change, error, words):
    exchange = HeadExchange(None, 10, dims_of(4, 8, 8), torch.float32)
    good = {"x": torch.zeros(9, 4, 8), "meta": META}
    getattr(exchange, call)(*good.values())
    with pytest.raises(error, match=f"HeadExchange.{call}: {words.format(name)}"):
        getattr(exchange, call)(*{**good, **change}.values())


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (torch.zeros(8, 4, 8), ValueError, "result must have 9 rows, as the step that meta describes, got 8"),
        (torch.zeros(9, 4, 8).double(), TypeError, "result must be torch.float32, as the exchange, got torch.float64"),
        (torch.zeros(1, 4, 8).expand(9, 4, 8), ValueError, "result must not be expanded"),
        (0, TypeError, "result must be a tensor, got int"),
    ],
)
def test_results_that_cannot_be_written(result, error, words):
    exchange, out = HeadExchange(None, 10, dims_of(4, 8, 8), torch.float32), torch.ones(9, 4, 8)
    with pytest.raises(error, match=words):
        exchange.to_tokens(out, META, result)
    with pytest.raises(ValueError, match="result must not share memory with out"):
        exchange.to_tokens(out, META, out)
    result = torch.zeros(9, 4, 8)
    assert exchange.to_tokens(out, META, result) is result
    assert result.all()


def test_outputs_of_other_numbers_of_rows_or_heads():
    """They are refused before the collective, on every rank."""

    def run(group):
        meta = PCPMetadata.build([9], world_size=2, rank=group.rank)
        exchange = HeadExchange(group, 9, dims_of(5), torch.float32)
        rows, mine = 2 * meta.num_tokens_padded, 3 - group.rank
        for shape, words in (
            ((rows - 1, mine, V), f"out must have {rows} rows, as the step that meta describes, got {rows - 1}"),
            ((rows, 5, V), f"out must have {mine} heads of width {V}, got 5 of width {V}"),
        ):
            with pytest.raises(ValueError, match=words):
                exchange.to_tokens(torch.zeros(shape), meta)

    heads = play(2, run)
    assert heads == [None, None]


def test_nothing_is_sent_in_a_world_of_one(monkeypatch):
    def no_collective(*_):
        raise AssertionError("a collective was called")

    monkeypatch.setattr(heads_module, "exchanging_into", no_collective)
    exchange = HeadExchange(None, 10, dims_of(3), torch.float32)
    q, out = torch.zeros(9, 3, QK), torch.zeros(9, 3, V)
    assert exchange.to_heads(q, META) is q
    assert exchange.to_tokens(out, META) is out


class Gathering:
    """A handle that cannot exchange."""

    rank, world_size = 0, 2

    def all_gather(self, tensor):
        raise AssertionError("a collective was called")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_tokens": -1}, ValueError, "max_tokens must be at least 0, got -1"),
        ({"dims": None}, TypeError, "dims must be MLADims, got NoneType"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"group": 3}, TypeError, "group must be a ProcessGroup, a PlayedGroup or None, got int"),
        ({"group": Gathering()}, TypeError, "group must have all_to_all_into, a Gathering has none"),
    ],
)
def test_constructor(change, error, words):
    arguments = {"group": None, "max_tokens": 4, "dims": dims_of(4), "dtype": torch.float32, **change}
    with pytest.raises(error, match=words):
        HeadExchange(**arguments)


def test_more_ranks_than_heads():
    def run(group):
        with pytest.raises(ValueError, match="num_heads must be at least 1 for each of 4 ranks, got 3"):
            HeadExchange(group, 4, dims_of(3), torch.float32)

    play(4, run)


@pytest.mark.parametrize(
    ("received", "sizes", "words"),
    [
        ([1, 2], [2, 1], r"received_sizes must be \[2, 1\], as the ranks send, got \[1, 2\]"),
        ([1, 2], [1, 1], r"rows must be blocks of \[1, 1\] for 2 ranks, got \(3,\)"),
        ([3], [1, 2], r"received must be blocks of \[3\] for 2 ranks, got \(3,\)"),
    ],
)
@pytest.mark.timeout(20)
def test_played_blocks_must_fit(received, sizes, words):
    def run(group):
        one = torch.zeros(3, dtype=torch.uint8)
        group.all_to_all_into(one.clone(), one, received, sizes if group.rank == 0 or len(received) != 2 else sizes[::-1])

    with pytest.raises(ValueError, match=words):
        play(2, run)


@pytest.mark.parametrize("gathers", [0, 1])
@pytest.mark.timeout(20)
def test_played_ranks_must_make_the_same_collective(gathers):
    def run(group):
        one = torch.zeros(2, dtype=torch.uint8)
        if group.rank == gathers:
            group.all_gather(one)
        else:
            group.all_to_all_into(one.clone(), one, [1, 1], [1, 1])

    with pytest.raises(ValueError, match="another collective"):
        play(2, run)
