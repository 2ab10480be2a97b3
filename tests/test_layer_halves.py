"""A layer in two halves: what is published before q is there, and the attention over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPMetadata, PCPPlanner
from pcp_mla.layer import prefill
from pcp_mla.testing.played import play

DIMS = MLADims(num_heads=3, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=7)
SCALE, BLOCK = 0.35, 4
TABLES = torch.arange(12, dtype=torch.int32).flip(0).view(2, 6)


class Inputs:
    def __init__(self, tokens: int, seed: int, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(seed)
        shapes = (tokens, 3, 12), (tokens, 7), (tokens, 4), (39, 7), (12, BLOCK, 11)
        tensors = (torch.randn(*shape, generator=random).to(device) for shape in shapes)
        self.q, self.kv_c, self.k_pe, self.weight, self.cache = tensors


def plan(group: Any = None, device: str = "cpu") -> PCPMetadata:
    world, rank = (1, 0) if group is None else (group.world_size, group.rank)
    return PCPPlanner(2, 20, world, rank, block_size=BLOCK, device=device).plan([13, 5], [6, 9], None, TABLES.to(device))


def test_two_layers_are_started_before_one_is_finished() -> None:
    def rank(group: Any) -> bool:
        meta, exchange = plan(group), LatentExchange(group, 20, DIMS, torch.float32)
        layers = [MLAPrefill(DIMS, scale, exchange) for scale in (SCALE, 2 * SCALE)]
        inputs = [Inputs(meta.num_tokens, 10 * group.rank + seed) for seed in (1, 2)]
        for x, seed in zip(inputs, (1, 2), strict=True):
            x.weight = Inputs(1, seed).weight
        wanted = [layer(x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache.clone()) for layer, x in zip(layers, inputs, strict=True)]
        started = [layer.start(x.kv_c, x.k_pe, meta, x.cache) for layer, x in zip(layers, inputs, strict=True)]
        got = [layer.finish(x.q, x.weight, half) for layer, x, half in zip(layers, inputs, started, strict=True)]
        assert all(map(torch.equal, got, wanted))
        return not torch.equal(*got)

    assert all(play(2, rank))


def test_nothing_is_published_again() -> None:
    calls: list[str] = []

    class Counted(LatentExchange):
        def publish(self, *given: Any, **how: Any) -> torch.Tensor:
            calls.append("publish")
            return super().publish(*given, **how)

    x, meta = Inputs(18, 0), plan()
    layer = MLAPrefill(DIMS, SCALE, Counted(None, 20, DIMS, torch.float32))
    started = layer.start(x.kv_c, x.k_pe, meta, x.cache)
    assert calls == ["publish"]
    first = layer.finish(x.q, x.weight, started)
    assert torch.equal(layer.finish(x.q, x.weight, started), first)
    assert not torch.equal(layer.finish(x.q, 2 * x.weight, started), first)
    assert calls == ["publish"]


def test_heads_are_the_second_half_s() -> None:
    x, meta, exchange = Inputs(18, 0), plan(), LatentExchange(None, 20, DIMS, torch.float32)
    started = MLAPrefill(MLADims(9, 2, 4, 3, 7), SCALE, exchange).start(x.kv_c, x.k_pe, meta, x.cache)
    wanted = MLAPrefill(DIMS, SCALE, exchange)(x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache)
    assert torch.equal(MLAPrefill(DIMS, SCALE, exchange).finish(x.q, x.weight, started), wanted)


class NoExchange:
    def publish(self, *_: Any, **__: Any) -> None:
        pytest.fail("exchanged")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"meta": None}, TypeError, "meta must be a PCPMetadata, got NoneType"),
        ({"kv_c": [0.0]}, TypeError, "kv_c must be a torch.Tensor, got list"),
        ({"kv_c": torch.zeros(17, 7)}, ValueError, r"kv_c must have shape \(18, 7\), got \(17, 7\)"),
        ({"k_pe": torch.zeros(18, 5)}, ValueError, r"k_pe must have shape \(18, 4\), got \(18, 5\)"),
        ({"k_pe": torch.zeros(18, 4).half()}, TypeError, "k_pe must be torch.float32, as kv_c, got torch.float16"),
        ({"kv_c": torch.zeros(18, 7).requires_grad_()}, NotImplementedError, "inputs must not require gradients"),
        ({"k_pe": torch.zeros(4, 18).T}, ValueError, "k_pe must have a contiguous last dimension"),
        ({"cache": None}, ValueError, "cache must be given, as meta has 15 tokens of context, got None"),
        ({"cache": torch.zeros(12, BLOCK, 12)}, ValueError, r"cache must be .* = \(any, 4, 11\), got \(12, 4, 12\)"),
        ({"stream": 3}, TypeError, "stream must be a torch.cuda.Stream or None, got int"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "second layer"])
def test_bad_input_of_the_first_half(change: dict[str, Any], error: type[Exception], message: str, first: bool) -> None:
    x = Inputs(18, 0)
    arguments = {"kv_c": x.kv_c, "k_pe": x.k_pe, "meta": plan(), "cache": x.cache}
    if not first:
        MLAPrefill(DIMS, SCALE, LatentExchange(None, 20, DIMS, torch.float32)).start(**arguments)
    with pytest.raises(error, match=f"MLAPrefill.start: {message}"):
        MLAPrefill(DIMS, SCALE, NoExchange()).start(**arguments | change)  # type: ignore[arg-type]


def test_backend_is_chosen_before_the_first_half() -> None:
    x = Inputs(18, 0)
    with pytest.raises(NotImplementedError, match="backend 'fa2' does not support dtype float32"):
        MLAPrefill(DIMS, SCALE, NoExchange(), "fa2").start(x.kv_c, x.k_pe, plan(), x.cache)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [0.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"q": torch.zeros(17, 3, 12)}, ValueError, r"q must have shape \(18, 3, 12\), got \(17, 3, 12\)"),
        ({"q": torch.zeros(18, 3, 11)}, ValueError, r"q must have shape \(18, 3, 12\), got \(18, 3, 11\)"),
        ({"q": torch.zeros(18, 3, 12).half()}, TypeError, "q must be torch.float32, as kv_c, got torch.float16"),
        ({"q": torch.zeros(18, 3, 12).requires_grad_()}, NotImplementedError, "inputs must not require gradients"),
        ({"kv_b_proj": torch.zeros(40, 7)}, ValueError, r"kv_b_proj must have a weight of shape \(39, 7\), got \(40, 7\)"),
        ({"kv_b_proj": torch.zeros(39, 7).half()}, TypeError, "kv_b_proj must have a weight of torch.float32, as kv_c, got"),
        ({"kv_b_proj": torch.nn.Linear(7, 39)}, NotImplementedError, "inputs must not require gradients"),
        ({"kv_b_proj": torch.nn.Identity()}, ValueError, r"kv_b_proj's result must have shape .* = \(1, 39\), got \(1, 7\)"),
        ({"started": None}, TypeError, "started must be what start returned, got NoneType"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "second layer"])
def test_bad_input_of_the_second_half(change: dict[str, Any], error: type[Exception], message: str, first: bool) -> None:
    x, layer = Inputs(18, 0), MLAPrefill(DIMS, SCALE, LatentExchange(None, 20, DIMS, torch.float32))
    arguments = {"q": x.q, "kv_b_proj": x.weight, "started": layer.start(x.kv_c, x.k_pe, plan(), x.cache)}
    if not first:
        layer.finish(**arguments)
    with pytest.raises(error, match=f"MLAPrefill.finish: {message}"):
        layer.finish(**arguments | change)


def test_latents_of_other_widths() -> None:
    x, exchange = Inputs(18, 0), LatentExchange(None, 20, DIMS, torch.float32)
    started = MLAPrefill(DIMS, SCALE, exchange).start(x.kv_c, x.k_pe, plan(), x.cache)
    with pytest.raises(ValueError, match=r"started must have latents of widths \(4, 7\), as this layer's, got \(7, 4\)"):
        MLAPrefill(MLADims(3, 5, 7, 5, 4), SCALE, exchange).finish(x.q, x.weight, started)


def test_padded_latents_want_a_padded_q() -> None:
    meta = PCPPlanner(2, 20, 1, 0, block_size=BLOCK).plan(
        [13, 5], [6, 9], None, TABLES, num_tokens_padded=20, num_kv_tokens_padded=40
    )
    layer = MLAPrefill(DIMS, SCALE, LatentExchange(None, 20, DIMS, torch.float32))
    for rows, others in ((18, 20), (20, 18)):
        x = Inputs(rows, 0)
        started = layer.start(x.kv_c, x.k_pe, meta, x.cache)
        for _ in range(2):
            assert len(layer.finish(x.q, x.weight, started)) == rows
            with pytest.raises(ValueError, match=rf"q must have shape \({rows}, 3, 12\), got \({others}, 3, 12\)"):
                layer.finish(Inputs(others, 0).q, x.weight, started)


@pytest.mark.gpu
def test_a_stream_of_its_own() -> None:
    """Beside a product on the current stream; what is published is waited for, and kept until it has been read."""
    meta, x = plan(device="cuda"), Inputs(18, 0, "cuda")
    layer = MLAPrefill(DIMS, SCALE, LatentExchange(None, 20, DIMS, torch.float32, "cuda"))
    wanted, stream = layer(x.q, x.kv_c, x.k_pe, x.weight, meta, x.cache.clone()), torch.cuda.Stream()
    large = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        cache, kv_c, k_pe = x.cache.clone(), x.kv_c.clone(), x.k_pe.clone()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
        started = layer.start(kv_c, k_pe, meta, cache, stream=stream)
        del kv_c, k_pe
        torch.full((18, 7), torch.nan, device="cuda"), torch.full((18, 4), torch.nan, device="cuda")
        large @ large
        assert isinstance(started, prefill.Started)
        assert torch.equal(layer.finish(x.q, x.weight, started), wanted)


@pytest.mark.gpu
def test_a_stream_of_another_device() -> None:
    x, layer = Inputs(18, 0), MLAPrefill(DIMS, SCALE, NoExchange())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream must be on cpu, where the metadata is, got cuda:0"):
        layer.start(x.kv_c, x.k_pe, plan(), x.cache, stream=torch.cuda.Stream(0))
