"""A layer whose cache is shared out over the ranks of PCP x DCP, against the same with the whole cache on every rank: outputs and
caches to the bit.

Latents and weights are small multiples of a power of two, of which every sum is exact; queries are any numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from batches import as_bytes
from pcp_mla import (
    HeadExchange,
    LatentExchange,
    MLADims,
    MLAPrefill,
    PCPMetadata,
    PCPPlanner,
    ShardedExchange,
    gather_latents,
    write_latent_cache,
)
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.slots import PagedCache
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

DIMS = MLADims(num_heads=3, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=16)
SCALE, BLOCK, REQUESTS, ROOM = 0.35, 4, 6, 240


class Case(NamedTuple):
    lengths: list[int]
    contexts: list[int]
    prefills: list[bool] | None = None
    policy: str = "replicate"
    layout: str = "unpadded"
    options: dict[str, Any] = {}  # noqa: RUF012


MIXED = ([21, 1, 9, 2], [30, 5, 0, 140], [True, False, True, False])
PADDED = {"num_tokens_padded": 50, "num_requests_padded": 6, "num_kv_tokens_padded": 300}
CASES = {
    "no context": Case([37, 5, 1], [0, 0, 0]),
    "context": Case([23, 8], [19, 345]),
    "chunks": Case([11, 6], [140, 133], options={"workspace_tokens": 90}),
    "decodes": Case(*MIXED),
    "decodes, round robin": Case(*MIXED, policy="round_robin"),
    "decodes, in chunks": Case(*MIXED, options={"workspace_tokens": 66}),
    "padded layout": Case(*MIXED, layout="padded"),
    "decodes alone": Case([1, 2], [9, 3], [False, False]),
    "decodes alone, no context": Case([1, 2], [0, 0], [False, False]),
    "ranks without tokens": Case([1], [3]),
    "no new tokens": Case([0], [3]),
    "nothing": Case([0, 0], [0, 0]),
    "padded plan": Case(*MIXED, options=PADDED),
    "padded plan, in chunks": Case(*MIXED, options=PADDED | {"workspace_tokens": 80}),
}
INTERLEAVES = [1, 2, 64]
# PCP x DCP
WORLDS = [pytest.param(2, 2, id="2x2"), pytest.param(2, 4, id="2x4")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Texts:
    """What all ranks know of some requests, by a seed: queries, latents of all their tokens, and a weight."""

    def __init__(
        self, lengths: list[int], seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32, scaled: bool = False
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        place = {"device": device, "dtype": dtype}
        self.q = [torch.randn(n, DIMS.num_heads, DIMS.qk_head_dim, generator=random).to(**place) for n in lengths]
        self.latents = [(torch.randint(-8, 9, (n, DIMS.latent_dim), generator=random) / 8).to(**place) for n in lengths]
        weight = torch.randint(-8, 9, (DIMS.num_heads * DIMS.expanded_dim, DIMS.kv_lora_rank), generator=random) / 8
        self.weight = weight.to(**place)
        self.scale = torch.tensor([0.3], device=device) if scaled else None

    def local(self, meta: PCPMetadata) -> tuple[torch.Tensor, ...]:
        """q, kv_c and k_pe of this rank's new tokens in a step; pads NaN."""
        lengths, contexts, _ = meta.lengths
        index = meta.local_token_indices[: meta.num_tokens].long()
        made = []
        for rows in (self.q, self.latents):
            new = [x[c : c + n] for x, c, n in zip(rows, contexts, lengths, strict=False)]
            natural = torch.cat([*new, rows[0].new_ones(1, *rows[0].shape[1:])])  # the last one for pads of the layout
            padded = torch.full_like(natural[:1], torch.nan).expand(meta.num_local_rows, *natural.shape[1:]).clone()
            padded[: meta.num_tokens] = natural[index]
            made.append(padded)
        return made[0], *(x.contiguous() for x in made[1].split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], 1))


class Rank:
    """Planner, tables and cache of a rank: with a shard of the cache, or with all of it."""

    def __init__(self, lengths: list[int], world: int, rank: int, shards: PagedCache, device: str = "cpu", **split: str) -> None:
        self.shards, self.lengths = shards, np.array(lengths)
        columns = max(1, int(shards.blocks_of(self.lengths).max(initial=0)))
        # Each shard's blocks are its own, in an order of their own.
        blocks = np.random.default_rng(shards.dcp_rank).permutation(len(lengths) * columns + 3)
        self.tables = blocks[: len(lengths) * columns].astype(np.int32).reshape(len(lengths), columns)
        self.cache = torch.full((len(blocks), BLOCK, DIMS.latent_dim), torch.nan, device=device)
        self.planner = PCPPlanner(REQUESTS, ROOM, world, rank, **vars(shards), **split, device=device)

    def rows(self, lengths: Any) -> tuple[torch.Tensor, ...]:
        """Request, position and slot of the tokens of this shard."""
        requests = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.concatenate([np.arange(n) for n in (*lengths, 0)])
        slots = self.shards.slots(self.tables, requests, positions)
        held = slots >= 0
        return tuple(torch.from_numpy(x[held]).to(self.cache.device) for x in (requests, positions, slots))

    def put(self, texts: Texts, contexts: list[int]) -> None:
        starts = torch.from_numpy(np.cumsum([0, *self.lengths])).to(self.cache.device)
        requests, positions, slots = self.rows(contexts)
        self.cache = self.cache.to(torch.float8_e4m3fn if texts.scale is not None else texts.weight.dtype)
        write_latent_cache(torch.cat(texts.latents)[starts[requests] + positions], self.cache, slots, scale=texts.scale)

    def step(self, layer: MLAPrefill, texts: Texts, case: Case, halves: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of this rank and their outputs."""
        tables = torch.from_numpy(self.tables).to(self.cache.device)
        meta = self.planner.plan(case.lengths, case.contexts, case.prefills, tables, **case.options)
        q, kv_c, k_pe = texts.local(meta)
        if halves:
            out = layer.finish(q, texts.weight, layer.start(kv_c, k_pe, meta, self.cache, scale=texts.scale))
        else:
            out = layer(q, kv_c, k_pe, texts.weight, meta, self.cache, scale=texts.scale)
        return meta.local_token_indices[: meta.num_tokens].clone(), out[: meta.num_tokens].clone()


def split_of(case: Case) -> dict[str, str]:
    return {"layout": case.layout, "decode_policy": case.policy}


def totals(case: Case) -> list[int]:
    return [n + c for n, c in zip(case.lengths, case.contexts, strict=True)]


def whole(world: int, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, scaled: bool = False) -> list[Any]:
    """Tokens, outputs and the cache of every rank of PCP, each with the whole cache."""

    def run(group: Any) -> Any:
        texts = Texts(totals(case), 0, device, dtype, scaled)
        rank = Rank(totals(case), world, group.rank, PagedCache(BLOCK), device, **split_of(case))
        rank.put(texts, case.contexts)
        layer = MLAPrefill(DIMS, SCALE, LatentExchange(group, ROOM, DIMS, dtype, device))
        return *rank.step(layer, texts, case), rank

    return play(world, run)


def sharded(
    group: Any,
    world: int,
    interleave: int,
    cases: list[Case],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
) -> list[Any]:
    """The same of each case for one shard, in halves where its number is odd."""
    shards = PagedCache(BLOCK, group_world_size(group), group_rank(group), interleave)
    place, results = group_rank(group) * world // group_world_size(group), []
    of = torch.float8_e4m3fn if scaled else dtype
    exchange = ShardedExchange(group, ROOM, ROOM * 2, DIMS, of, device, shards=shards, pcp_world_size=world)
    layer = MLAPrefill(DIMS, SCALE, exchange)
    for number, case in enumerate(cases):
        texts = Texts(totals(case), 0, device, dtype, scaled)
        rank = Rank(totals(case), world, place, shards, device, **split_of(case))
        rank.put(texts, case.contexts)
        exchange._gathered.copy_(torch.tensor(torch.nan))  # nothing of an earlier step may count
        exchange._send.copy_(torch.tensor(torch.nan))
        tokens, out = rank.step(layer, texts, case, number % 2 == 1)
        results.append((tokens.cpu(), out.cpu(), rank.cache.cpu(), shards))
    return results


def of_all_interleaves(group: Any, world: int, cases: list[Case]) -> list[Any]:
    return [sharded(group, world, interleave, cases) for interleave in INTERLEAVES]


def compare(ranks: list[list[Any]], world: int, cases: list[Case], **where: Any) -> None:
    for number, case in enumerate(cases):
        wanted = whole(world, case, **where)
        for shard, results in enumerate(ranks):
            tokens, out, cache, shards = results[number]
            other_tokens, other, rank = wanted[shard * world // len(ranks)]
            assert torch.equal(tokens, other_tokens.cpu()), case
            assert not out.isnan().any(), case
            assert torch.equal(as_bytes(out), as_bytes(other.cpu())), case
            mine = Rank(totals(case), world, shard * world // len(ranks), shards)
            expected = mine.cache.to(cache.dtype)
            requests, positions, slots = mine.rows(totals(case))
            slots_there = PagedCache(BLOCK).slots(rank.tables, requests.numpy(), positions.numpy())
            rows = gather_latents(rank.cache.cpu(), torch.from_numpy(slots_there).int())
            write_latent_cache(rows, expected, slots)
            assert torch.equal(as_bytes(cache), as_bytes(expected)), case


@pytest.mark.parametrize(("world", "each"), WORLDS)
def test_gloo(world: int, each: int) -> None:
    cases = list(CASES.values())
    ranks = run_distributed(world * each, of_all_interleaves, world, cases)
    for results in zip(*ranks, strict=True):
        compare(list(results), world, cases)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("world", "each"), [(1, 2), (2, 1), (3, 1), (2, 2), (3, 2), (1, 5)])
def test_played(world: int, each: int, device: str) -> None:
    """Shards that are the ranks of PCP, of DCP alone, of both."""
    cases, interleave = list(CASES.values()), 2 + each
    compare(play(world * each, lambda group: sharded(group, world, interleave, cases, device)), world, cases, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_cache(dtype: torch.dtype, device: str) -> None:
    """Rows travel as the caches hold them, new ones too."""
    cases, form = list(CASES.values()), {"device": device, "dtype": dtype, "scaled": True}
    compare(play(4, lambda group: sharded(group, 2, 2, cases, **form)), 2, cases, **form)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_nccl() -> None:
    cases = list(CASES.values())
    compare(run_distributed(2, sharded, 2, 2, cases, "cuda", torch.bfloat16, backend="nccl"), 2, cases, device="cuda",
            dtype=torch.bfloat16)  # fmt: skip


STEPS = [([30, 0, 7], None), ([1, 12, 20], [False, True, True]), ([40, 1, 1], [True, False, False]), ([1, 1, 0], [False] * 3)]


def in_steps(group: Any, world: int, shards: PagedCache, by_shards: bool) -> list[Any]:
    """Three texts in steps, each in the cache for the next one, through two layers with caches of their own."""
    done, texts = [0, 0, 0], [Texts([72, 14, 28], seed) for seed in range(2)]
    place = group.rank * world // group.world_size
    ranks = [Rank([72, 14, 28], world, place, shards) for _ in texts]
    if by_shards:
        exchange: Any = ShardedExchange(group, ROOM, ROOM, DIMS, torch.float32, shards=shards, pcp_world_size=world)
    else:
        exchange = LatentExchange(group, ROOM, DIMS, torch.float32)
    layer, outs = MLAPrefill(DIMS, SCALE, exchange), []
    for lengths, prefills in STEPS:
        case = Case(lengths, done, prefills)
        outs += [rank.step(layer, text, case)[1] for rank, text in zip(ranks, texts, strict=True)]
        done = [d + n for d, n in zip(done, lengths, strict=True)]
    return outs


@pytest.mark.parametrize("interleave", INTERLEAVES)
@pytest.mark.parametrize(("world", "each"), [(2, 2), (2, 4), (3, 1)])
def test_what_one_step_writes_the_next_one_reads(world: int, each: int, interleave: int) -> None:
    wanted = play(world, lambda group: in_steps(group, world, PagedCache(BLOCK), False))
    shards = world * each
    got = play(shards, lambda group: in_steps(group, world, PagedCache(BLOCK, shards, group.rank, interleave), True))
    for shard, outs in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(outs, wanted[shard // each], strict=True))


def test_by_heads() -> None:
    """The exchange of heads is one of PCP: with shards that are its ranks, both go over one group."""

    def run(group: Any) -> list[bool]:
        shards, same = PagedCache(BLOCK, 3, group.rank, 2), []
        exchange = ShardedExchange(group, ROOM, ROOM, DIMS, torch.float32, shards=shards, pcp_world_size=3)
        heads = HeadExchange(group, ROOM, DIMS, torch.float32)
        for case in CASES.values():
            texts, outs = Texts(totals(case)), []
            for split in ("tokens", "heads"):
                rank = Rank(totals(case), 3, group.rank, shards, **split_of(case))
                rank.put(texts, case.contexts)
                outs.append(rank.step(MLAPrefill(DIMS, SCALE, exchange, heads=heads, split=split), texts, case)[1])
            same.append(torch.equal(*outs))
        return same

    assert play(3, run) == [[True] * len(CASES)] * 3


def test_refusals() -> None:
    """What the exchange cannot have is refused before anything is exchanged."""

    def run(group: Any) -> list[str]:
        case = Case([9, 4], [6, 3])
        texts, told = Texts(totals(case)), []

        def refused(exchange: Any, shards: PagedCache, place: int) -> None:
            rank = Rank(totals(case), 2, place, shards)
            with pytest.raises((ValueError, NotImplementedError)) as raised:
                rank.step(MLAPrefill(DIMS, SCALE, exchange), texts, case)
            told.append(f"{raised.type.__name__}: {raised.value}")
            assert rank.cache.isnan().all()

        own = ShardedExchange(group, ROOM, ROOM, DIMS, torch.float32, shards=PagedCache(BLOCK, 2, group.rank), pcp_world_size=2)
        refused(LatentExchange(group, ROOM, DIMS, torch.float32), PagedCache(BLOCK, 2, group.rank), group.rank)
        refused(own, PagedCache(BLOCK), group.rank)
        refused(own, PagedCache(BLOCK, 2, 1 - group.rank), group.rank)
        refused(own, PagedCache(BLOCK, 2, group.rank, 7), group.rank)
        refused(own, PagedCache(BLOCK, 3, group.rank), group.rank)
        return told

    first, _ = play(2, run)
    assert [words.split(": ", 2)[0] for words in first] == ["NotImplementedError"] + ["ValueError"] * 4
    assert "a cache that is not shared out, got 2 DCP shards, which take a ShardedExchange" in first[0]
    assert "whose shards are the ranks of PCP x DCP, got shard 0 of 1 on rank 0 of 2" in first[1]
    assert "whose shards are the ranks of PCP x DCP, got shard 1 of 2 on rank 0 of 2" in first[2]
    assert "meta must be for rank 0 of 2 with PagedCache(block_size=4, dcp_world_size=2, dcp_rank=0, cp_interleave=1)" in first[3]
    assert "whose shards are the ranks of PCP x DCP, got shard 0 of 3 on rank 0 of 2" in first[4]
