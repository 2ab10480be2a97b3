"""A layer shared out by heads, against the same by tokens: outputs and caches to the bit.

Of a head, nothing is computed that depends on how many there are, but for matrix libraries on a CPU, whose sums of one column may
depend on how many columns there are. Latents and weights are therefore small multiples of a power of two, of which every sum is
exact; queries are any numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch

from bench import peers
from pcp_mla import HeadExchange, LatentExchange, MLADims, MLAPrefill, PCPMetadata, PCPPlanner
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.layer import steps
from pcp_mla.ops.attention import support
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
from test_attention_backends import library  # noqa: F401

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


def test_many_layers_of_a_step() -> None:
    """Steps in turn, and layers of each; the first result is not overwritten by the next layer's."""

    def rank(group: Any) -> bool:
        layers = Layers(group, MLADims(5, *SMALL), torch.float32, "cpu", "auto")
        metas = [plan(CASES[name], 3, group.rank) for name in ("context", "decodes")]
        inputs = [Inputs(meta, layers.dims, torch.float32, seed) for seed in (1, 2, 3) for meta in metas]
        outs = {}
        for split, layer in layers.layers.items():
            outs[split] = [
                layer(x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache.clone()) for x, meta in zip(inputs, metas * 3, strict=True)
            ]
        return all(map(torch.equal, *outs.values()))

    assert play(3, rank) == [True] * 3


class Untouched:
    """In place of exchanges: nothing may be exchanged. As a LatentExchange, or as one of heads."""

    def __init__(self, heads: HeadExchange) -> None:
        for name in ("form", "heads", "max_tokens", "group"):
            setattr(self, name, getattr(heads, name))

    def publish(self, *_: Any) -> None:
        pytest.fail("exchanged")

    to_heads = to_tokens = publish


class Alone:
    """A rank of two, by itself."""

    rank, world_size = 0, 2

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def all_to_all_into(self, *_: Any) -> None:
        raise AssertionError


class Quantised(torch.nn.Linear):
    pass


def hooked(weight: torch.Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    linear.register_forward_hook(lambda module, given, out: 2 * out)
    return linear


MODULES = {"a subclass": lambda w: Quantised(*w.T.shape, bias=False).requires_grad_(False), "hooks": hooked,
           "a subclass of Tensor": lambda w: w.as_subclass(type("Sharded", (torch.Tensor,), {}))}  # fmt: skip


def refused(change: Any, error: Any, message: str, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Nothing is exchanged, and the cache is as it was."""
    dims = MLADims(5, *SMALL)
    heads: Any = Untouched(HeadExchange(Alone(), ROOM, dims, dtype))
    for name, value in changes.items():
        setattr(heads, name, value)
    meta = plan(CASES["context"], 2, 0)
    x = Inputs(meta, dims, torch.float32)
    layer, before = MLAPrefill(dims, SCALE, heads, "auto", heads, "heads"), x.cache.clone()
    with pytest.raises(error, match=message):
        layer(x.q, x.kv_c, x.k_pe, x.weight if change is None else change(x.weight), meta, x.cache)
    assert torch.equal(x.cache, before)


@pytest.mark.parametrize("name", MODULES)
def test_modules_whose_heads_cannot_be_had_alone(name: str) -> None:
    refused(
        MODULES[name], NotImplementedError, "MLAPrefill: kv_b_proj must be a weight, or a Linear without hooks, for split 'heads'"
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_tokens": 15}, ValueError, r"MLAPrefill: meta must have at most 15 tokens a rank \(max_tokens\), got 16"),
        (
            {"dtype": torch.bfloat16},
            TypeError,
            "MLAPrefill: heads must be an exchange of torch.float32, as q, got torch.bfloat16",
        ),
        ({"group": None}, ValueError, "MLAPrefill: meta must be for rank 0 of 1, as the group, got rank 0 of 2"),
    ],
)
def test_exchanges_of_another_kind(changes: Any, error: Any, message: str) -> None:
    refused(None, error, message, **changes)


def test_a_library_without_lengths_of_its_own(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    library("old")
    dims = MLADims(2, 16, 8, 16, 32)
    heads: Any = Untouched(HeadExchange(Alone(), ROOM, dims, torch.bfloat16))
    meta = plan(CASES["odd lengths"], 2, 0)
    x = Inputs(meta, dims, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="the rows of all ranks need seqused_k, which this version of fa2 lacks"):
        MLAPrefill(dims, SCALE, heads, "fa2", heads, "heads")(x.q, x.kv_c, x.k_pe, x.weight, meta)
    monkeypatch.setattr(steps, "heads_pay", lambda *_: True)
    kind = steps.Kind(dims, SCALE, "fa2", torch.bfloat16, False, heads, "auto")
    assert steps.LayerStep(kind, meta).heads is None


def test_what_cannot_be_made() -> None:
    dims = MLADims(5, *SMALL)
    exchange, heads = LatentExchange(None, ROOM, dims, torch.float32), HeadExchange(None, ROOM, dims, torch.float32)
    with pytest.raises(ValueError, match="MLAPrefill: heads must be a HeadExchange for split 'heads', got None"):
        MLAPrefill(dims, SCALE, exchange, split="heads")
    with pytest.raises(ValueError, match="MLAPrefill: split must be one of auto, tokens, heads, got 'rows'"):
        MLAPrefill(dims, SCALE, exchange, heads=heads, split="rows")
    for name, other in (("num_heads", (6, *SMALL)), ("qk_head_dim", (5, 9, 4, 5, 16)), ("v_head_dim", (5, 8, 4, 6, 16))):
        with pytest.raises(ValueError, match=f"MLAPrefill: heads must have {name} "):
            MLAPrefill(MLADims(*other), SCALE, exchange, heads=heads)
    assert MLAPrefill(dims, SCALE, exchange).split == "auto"


class TestAuto:
    """What auto takes, told by whether the exchange of heads is called."""

    def count(self, world: int, projection: Any = None, start: bool = False) -> list[int]:
        dims = MLADims(5, *SMALL)

        class Counted(HeadExchange):
            calls = 0

            def to_heads(self, *given: Any) -> torch.Tensor:
                self.calls += 1
                return super().to_heads(*given)

        def rank(group: Any) -> int:
            heads = Counted(group, ROOM, dims, torch.float32)
            layer = MLAPrefill(dims, SCALE, LatentExchange(group, ROOM, dims, torch.float32), heads=heads)
            meta = plan(CASES["context"], world, group.rank)
            x = Inputs(meta, dims, torch.float32)
            weight = x.weight if projection is None else projection(x.weight)
            by_tokens = dataclasses.replace(layer, split="tokens")
            for _ in range(2):
                out = layer(x.q, x.kv_c, x.k_pe, weight, meta, x.cache)
                assert torch.equal(out, by_tokens(x.q, x.kv_c, x.k_pe, weight, meta, x.cache))
            return heads.calls

        return play(world, rank)

    def test_a_cpu(self) -> None:
        assert self.count(2) == [0, 0]

    def test_by_cost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(steps, "heads_pay", lambda *given: asked.append(given) or True)
        assert self.count(2) == [2, 2]
        assert len(asked) == 2  # once a step and kind on each rank
        assert self.count(1) == [0]

    @pytest.mark.parametrize("name", MODULES)
    def test_modules_whose_heads_cannot_be_had_alone(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "heads_pay", lambda *_: True)
        assert self.count(2, MODULES[name]) == [0, 0]


def test_all_ranks_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a rank knows of itself alone nothing enters: how many tokens it has, how long its rows are."""
    from pcp_mla.layer import split

    monkeypatch.setattr(split.torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    seen: list[Any] = []
    monkeypatch.setattr(split, "split_seconds", lambda *given: seen.append(given) or (1.0, 0.0))
    dims = MLADims(16, 128, 64, 128, 512)
    for case in CASES.values():
        seen.clear()
        longest = set()
        for rank in range(3):
            meta = plan(case, 3, rank)
            longest.add((meta.rank_rows.max_seqlen_q, meta.rank_rows.max_seqlen_k))
            object.__setattr__(meta, "device", torch.device("cuda"))
            heads = HeadExchange(None, ROOM, dims, torch.bfloat16)
            split.heads_pay(heads, dims, torch.bfloat16, meta)
        assert len(set(seen)) == 1
        assert len(seen) == 3
        assert len(longest) == 1
