"""A layer shared out by heads, against the same by tokens: outputs and caches to the bit.

Of a head, nothing is computed that depends on how many there are, but for matrix libraries on a CPU, whose sums of one column may
depend on how many columns there are. Latents and weights are therefore small multiples of a power of two, of which every sum is
exact; queries are any numbers.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch

from bench import peers
from pcp_mla import HeadExchange, LatentExchange, MLADims, MLAPrefill, PCPMetadata, PCPPlanner, PeerHeadExchange
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.layer import steps
from pcp_mla.layer.attend import attend_step
from pcp_mla.layer.graphs import PiecewiseGraph
from pcp_mla.ops.attention import support
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

peers.load_fa3()

SCALE, BLOCK, ROOM = 0.35, 4, 120
SMALL, LARGE = (8, 4, 5, 16), (128, 64, 128, 512)  # nope, rope, v, kv_lora_rank


class Case(NamedTuple):
    lengths: list[int]
    contexts: list[int]
    prefills: list[bool] | None = None
    policy: str = "replicate"
    layout: str = "unpadded"
    options: dict[str, Any] = {}  # noqa: RUF012
    cached: bool = True


MIXED = ([21, 1, 9, 2], [30, 5, 0, 12], [True, False, True, False])
PADDED = {"num_tokens_padded": 50, "num_requests_padded": 6, "num_kv_tokens_padded": 200}
CASES = {
    "odd lengths": Case([37, 5, 1], [0, 0, 0], cached=False),
    "odd lengths, cached": Case([37, 5, 1], [0, 0, 0]),
    "context": Case([23, 8], [19, 45]),
    "chunks": Case([11, 6], [40, 33], options={"workspace_tokens": 30}),
    "decodes": Case(*MIXED),
    "decodes, round robin": Case(*MIXED, policy="round_robin"),
    "decodes, in chunks": Case(*MIXED, options={"workspace_tokens": 36}),
    "padded layout": Case(*MIXED, layout="padded"),
    "padded layout, no cache": Case([9, 1, 4], [0, 0, 0], [True, False, True], layout="padded", cached=False),
    "decodes alone": Case([1, 2], [9, 3], [False, False]),
    "ranks without tokens": Case([1], [3]),
    "no tokens": Case([0], [3]),
    "padded plan": Case(*MIXED, options=PADDED),
    "padded plan, in chunks": Case(*MIXED, options=PADDED | {"workspace_tokens": 40}),
}


def exact_values(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=generator) / 8


class Inputs:
    """A rank's part of what all ranks know, by a seed; of a padded plan Np rows, pads NaN."""

    def __init__(self, meta: PCPMetadata, dims: MLADims, dtype: torch.dtype, seed: int = 0) -> None:
        random, device = torch.Generator().manual_seed(seed), meta.device
        total = sum(meta.lengths[0].tolist())
        natural = [
            torch.randn(total, dims.num_heads, dims.qk_head_dim, generator=random),
            exact_values(random, total, dims.kv_lora_rank),
            exact_values(random, total, dims.qk_rope_head_dim),
        ]
        index = meta.local_token_indices[: meta.num_tokens].cpu().long()
        rows = [torch.full((meta.num_local_rows, *x.shape[1:]), torch.nan) for x in natural]
        for row, x in zip(rows, natural, strict=True):
            row[: len(index)] = torch.cat([x, torch.ones_like(x[:1]) if len(x) else x.new_ones(1, *x.shape[1:])])[index]
        self.q, self.kv_c, self.k_pe = (row.to(device, dtype) for row in rows)
        self.weight = exact_values(random, dims.num_heads * dims.expanded_dim, dims.kv_lora_rank).to(device, dtype)
        self.cache = exact_values(random, 100, BLOCK, dims.latent_dim).to(device, dtype)


def plan(case: Case, world: int, rank: int, device: str = "cpu") -> PCPMetadata:
    planner = PCPPlanner(6, ROOM // 2, world, rank, layout=case.layout, decode_policy=case.policy, block_size=BLOCK, device=device)
    tables = torch.randperm(100, generator=torch.Generator().manual_seed(7)).int().view(4, 25)[: len(case.lengths)].to(device)
    return planner.plan(case.lengths, case.contexts, case.prefills, tables if case.cached else None, **case.options)


class Layers:
    """The two ways of a rank, and what they were given."""

    def __init__(self, group: Any, dims: MLADims, dtype: torch.dtype, device: str, backend: str) -> None:
        self.group, self.dims, self.dtype, self.device = group, dims, dtype, device
        self.exchange, self.heads = (kind(group, ROOM, dims, dtype, device) for kind in (LatentExchange, HeadExchange))
        self.layers = {split: MLAPrefill(dims, SCALE, self.exchange, backend, self.heads, split) for split in ("tokens", "heads")}

    def compare(self, case: Case, seed: int = 0, projection: Any = None, halves: bool = False) -> bool:
        meta = plan(case, group_world_size(self.group), group_rank(self.group), self.device)
        x = Inputs(meta, self.dims, self.dtype, seed)
        results = []
        for layer in self.layers.values():
            cache = x.cache.clone() if case.cached else None
            weight = x.weight if projection is None else projection(x.weight)
            if halves:
                out = layer.finish(x.q, weight, layer.start(x.kv_c, x.k_pe, meta, cache))
            else:
                out = layer(x.q, x.kv_c, x.k_pe, weight, meta, cache)
            assert out.shape == (meta.num_local_rows, self.dims.num_heads, self.dims.v_head_dim)
            results.append((out[: meta.num_tokens].clone(), cache))
        (by_tokens, one), (by_heads, other) = results
        by = {step.kind.split: step.heads is not None for step in steps._steps[meta]}
        assert by == {"tokens": False, "heads": group_world_size(self.group) > 1}
        assert not by_tokens.isnan().any()
        return torch.equal(by_tokens, by_heads) and (one is None or torch.equal(one, other))


def failures(
    group: Any, device: str = "cpu", backend: str = "auto", widths: Any = SMALL, dtypes: Any = (torch.float32,)
) -> list[str]:
    failed = []
    for heads in (5, 16, 20):
        if heads < group_world_size(group):
            continue
        for dtype in dtypes:
            layers = Layers(group, MLADims(heads, *widths), dtype, device, backend)
            failed += [
                f"{heads} heads, {dtype}, {name}, halves {halves}"
                for name, case in CASES.items()
                for halves in (False, True)
                if not layers.compare(case, halves=halves)
            ]
    return failed


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_gloo(world: int) -> None:
    assert run_distributed(world, failures, timeout=300.0) == [[]] * world


GPU = [pytest.param("cuda", name, LARGE, marks=pytest.mark.gpu, id=name) for name in ("auto", "cuda", "fa3", "fa2", "triton")]


@pytest.mark.parametrize(("device", "backend", "widths"), [pytest.param("cpu", "torch", SMALL, id="cpu"), *GPU])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_played(device: str, backend: str, widths: Any, world: int) -> None:
    reason = "" if backend == "auto" else support.missing(backend, torch.device(device, 0))
    if device == "cuda" and reason:
        pytest.skip(f"{backend}: {reason}")
    dtypes = (torch.float32, torch.bfloat16, torch.float64) if device == "cpu" else (torch.bfloat16,)
    assert play(world, lambda group: failures(group, device, backend, widths, dtypes)) == [[]] * world


def test_our_kernel_in_the_interpreter() -> None:
    """Triton's attention, with keys in two parts; a module with a bias; on uneven shares of heads."""

    def rank(group: Any) -> list[bool]:
        layers = Layers(group, MLADims(3, 16, 16, 16, 32), torch.float32, "cpu", "triton")

        def biased(weight: torch.Tensor) -> torch.nn.Module:
            linear = torch.nn.Linear(32, len(weight)).requires_grad_(False)
            linear.weight.copy_(weight)
            linear.bias.copy_(torch.arange(len(weight)) / 4)
            return linear

        chunked = Case([7, 3], [9, 12], options={"workspace_tokens": 12})
        return [layers.compare(chunked), layers.compare(Case([7, 1], [5, 9]), projection=biased)]

    assert play(2, rank) == [[True, True]] * 2


class AsPeers(PeerHeadExchange):
    """Of peers, whose outputs come to lie where the last ones did, the words alone."""

    def __init__(self, heads: HeadExchange) -> None:
        self._by = heads
        for name in ("form", "heads", "max_tokens", "group"):
            setattr(self, name, getattr(heads, name))

    def to_heads(self, q: torch.Tensor, meta: PCPMetadata) -> torch.Tensor:
        return self._by.to_heads(q, meta)

    def to_tokens(self, out: torch.Tensor, meta: PCPMetadata, result: torch.Tensor | None = None) -> torch.Tensor:
        assert result is None
        return self._by.to_tokens(out, meta)


@pytest.mark.parametrize("by_peers", [False, True])
def test_many_layers_of_a_step(by_peers: bool) -> None:
    """Steps in turn, and layers of each; the first result is not overwritten by the next layer's."""

    def rank(group: Any) -> bool:
        layers = Layers(group, MLADims(5, *SMALL), torch.float32, "cpu", "auto")
        if by_peers:
            layers.layers["heads"] = dataclasses.replace(layers.layers["heads"], heads=AsPeers(layers.heads))
        metas = [plan(CASES[name], 3, group.rank) for name in ("context", "decodes")]
        inputs = [Inputs(meta, layers.dims, torch.float32, seed) for seed in (1, 2, 3) for meta in metas]
        outs = {}
        for split, layer in layers.layers.items():
            outs[split] = [
                layer(x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache.clone()) for x, meta in zip(inputs, metas * 3, strict=True)
            ]
        return all(map(torch.equal, *outs.values()))

    assert play(3, rank) == [True] * 3


# Padded plans of one size, the first of which is captured.
REPLAYED = [
    CASES["padded plan"],
    Case([40], [60], options=PADDED),
    Case([3, 1, 1], [0, 50, 9], [True, False, False], options=PADDED),
]


def padded_planner(group: Any, device: str) -> PCPPlanner:
    return PCPPlanner(6, ROOM // 2, group.world_size, group.rank, block_size=BLOCK, device=device, max_kv_tokens=200)


def planned(planner: PCPPlanner, case: Case, dims: MLADims, dtype: torch.dtype) -> tuple[PCPMetadata, Inputs]:
    tables = torch.randperm(100, generator=torch.Generator().manual_seed(7)).int().view(4, 25)[: len(case.lengths)]
    meta = planner.plan(case.lengths, case.contexts, case.prefills, tables.to(planner.device), **case.options)
    return meta, Inputs(meta, dims, dtype, len(case.lengths))


def test_a_step_s_tables_are_those_of_the_plan_that_is_there() -> None:
    """What a captured graph has of the first plan of a size, addresses and numbers, is right for the others, too."""

    def rank(group: Any) -> bool:
        layers = Layers(group, MLADims(5, *SMALL), torch.float32, "cpu", "auto")
        planner, layer = padded_planner(group, "cpu"), layers.layers["heads"]
        captured: Any = None
        for case in REPLAYED:
            meta, x = planned(planner, case, layers.dims, torch.float32)
            wanted = layers.layers["tokens"](x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache)
            assert torch.equal(layer(x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache)[: meta.num_tokens], wanted[: meta.num_tokens])
            captured = captured or next(step for step in steps._steps[meta] if step.heads is not None)
            part = x.weight[captured.weight_rows]
            got = attend_step(captured, x.q, x.cache, part, part, meta)
            assert torch.equal(got[: meta.num_tokens], wanted[: meta.num_tokens])
        return True

    assert play(3, rank) == [True] * 3


def test_exchanges_and_plans_are_not_kept() -> None:
    """What layers know of a step has their exchange of heads, which knows its last step: both go with who made them."""
    held: list[Any] = []

    def rank(group: Any) -> None:
        layers = Layers(group, MLADims(5, *SMALL), torch.float32, "cpu", "auto")
        meta = plan(CASES["context"], 2, group.rank)
        x = Inputs(meta, layers.dims, torch.float32)
        layers.layers["heads"](x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache)
        held.extend(map(weakref.ref, (layers.heads, meta)))

    play(2, rank)
    gc.collect()
    assert [of() for of in held] == [None] * 4


@pytest.mark.gpu
def test_graphs_are_replayed_with_other_plans() -> None:
    """Captured in pieces between the collectives, over the first plan of a size."""

    def rank(group: Any) -> bool:
        layers = Layers(group, MLADims(5, *LARGE), torch.bfloat16, "cuda", "auto")
        planner, layer, graph = padded_planner(group, "cuda"), layers.layers["heads"], PiecewiseGraph()
        first, given = planned(planner, REPLAYED[0], layers.dims, torch.bfloat16)

        def step() -> torch.Tensor:
            return layer(given.q, given.kv_c, given.k_pe, given.weight, first, given.cache)

        step()
        result = graph.capture(step, [layers.exchange, layers.heads])
        for case in (*REPLAYED, REPLAYED[0]):
            meta, x = planned(planner, case, layers.dims, torch.bfloat16)
            for name in ("q", "kv_c", "k_pe", "weight", "cache"):
                getattr(given, name).copy_(getattr(x, name))
            graph.replay()
            wanted = layers.layers["tokens"](x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache)
            assert torch.equal(result[: meta.num_tokens], wanted[: meta.num_tokens])
            assert torch.equal(given.cache, x.cache)
        return True

    with torch.no_grad():
        assert play(2, rank) == [True] * 2
