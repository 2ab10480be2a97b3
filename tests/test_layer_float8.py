"""The layer over a float8 cache with a scale: every token is attended to as the cache holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batches import same_bits
from pcp_mla import HeadExchange, LatentExchange, MLADims, MLAPrefill, PCPPlanner, PeerExchange
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.layer import prefill
from pcp_mla.testing.played import play

DIMS = MLADims(num_heads=3, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=16)
SOFTMAX, BLOCK, SCALE = 0.35, 4, 0.0117
LENGTHS, CONTEXTS, PREFILLS = [13, 1, 6], [7, 10, 0], [True, False, True]
TABLES = np.random.default_rng(0).permutation(15).astype(np.int32).reshape(3, 5)
FLOAT8 = torch.float8_e4m3fn
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def dequantised(latents: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """What a cache gives of latents that it was given."""
    factor = torch.tensor(scale, device=latents.device)
    return ((latents.float() / factor).clamp(-448, 448).to(FLOAT8).float() * factor).to(latents.dtype)


class Inputs:
    """All tokens of each request, cached ones first: q, latents, and a weight."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(3)
        totals = [new + old for new, old in zip(LENGTHS, CONTEXTS, strict=True)]
        shapes = (sum(totals), 3, 12), (sum(totals), DIMS.latent_dim), (39, 16)
        q, latents, weight = (torch.randn(*shape, generator=random).to(device, dtype) for shape in shapes)
        self.weight = weight
        self.q, self.latents = q.split(totals), latents.split(totals)

    def new(self, lengths: list[int], contexts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """q and latents of these steps' tokens, in natural order."""
        spans = [slice(old, old + new) for new, old in zip(lengths, contexts, strict=True)]
        return tuple(torch.cat([x[s] for x, s in zip(of, spans, strict=True)]) for of in (self.q, self.latents))  # type: ignore[return-value]

    def exact(self, lengths: list[int], contexts: list[int]) -> torch.Tensor:
        """[tokens, heads, v] in float64, over latents as a float8 cache holds them."""
        out = []
        for q, latents, new, old in zip(self.q, self.latents, lengths, contexts, strict=True):
            keys = dequantised(latents[: old + new]).double()
            expanded = (keys[:, :16] @ self.weight.double().T).view(-1, 3, 13)
            k = torch.cat([expanded[..., :8], keys[:, None, 16:].expand(-1, 3, -1)], dim=2)
            scores = torch.einsum("nhd,mhd->hnm", q[old : old + new].double(), k) * SOFTMAX
            places = torch.arange(old + new, device=q.device)
            scores.masked_fill_(places > places[old:, None], -torch.inf)
            out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), expanded[..., 8:]))
        return torch.cat(out)


class Rank:
    """A rank of a group, and its cache: of float8, or of what that holds, in the latents' dtype."""

    def __init__(
        self, group: Any, dtype: torch.dtype = torch.float32, device: str = "cpu", scaled: bool = True, **how: Any
    ) -> None:
        world, rank = group_world_size(group), group_rank(group)
        self.inputs, self.device, self.scaled = Inputs(dtype, device), device, scaled
        self.planner = PCPPlanner(3, 40, world, rank, block_size=BLOCK, device=device)
        cache = torch.full((15, BLOCK, DIMS.latent_dim), torch.nan, device=device)
        self.cache = cache.to(FLOAT8 if scaled else dtype)
        self.scale = torch.full((1,), SCALE, device=device) if scaled else None
        self.exchange = LatentExchange(group, 40, DIMS, dtype, device)
        self.layer = MLAPrefill(DIMS, SOFTMAX, self.exchange, **how)

    def step(
        self, lengths: list[int], contexts: list[int], prefills: list[bool] | None = None, kv_b_proj: Any = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's tokens, and its output."""
        meta = self.planner.plan(lengths, contexts, prefills, TABLES, **options)
        q, latents = self.inputs.new(lengths, contexts)
        tokens = meta.local_token_indices.long()
        self.given = q[tokens], *(latents if self.scaled else dequantised(latents))[tokens].split([16, 4], dim=1)
        self.meta = meta
        weight = self.inputs.weight if kv_b_proj is None else kv_b_proj
        q, kv_c, k_pe = self.given
        other = self.cache.clone()
        halves = self.layer.finish(q, weight, self.layer.start(kv_c, k_pe, meta, other, scale=self.scale))
        out = self.layer(q, kv_c, k_pe, weight, meta, self.cache, scale=self.scale)
        assert torch.equal(halves, out)
        assert same_bits(other, self.cache)
        return tokens, out

    def filled(self) -> Rank:
        """With the context of the step to come."""
        self.step(CONTEXTS, [0, 0, 0])
        return self


@devices
@pytest.mark.parametrize("split", ["tokens", "heads"])
@pytest.mark.parametrize("workspace", [None, 24])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_against_float64(device: str, world: int, workspace: int | None, split: str) -> None:
    """A prefix, a decode and a new prompt, all keys at once and in chunks."""

    def rank(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        heads = HeadExchange(group, 40, DIMS, torch.float32, device) if split == "heads" else None
        there = Rank(group, device=device, heads=heads, split=split).filled()
        result = there.step(LENGTHS, CONTEXTS, PREFILLS, workspace_tokens=workspace)
        assert (workspace is None) == (len(there.meta.key_chunks) < 2)
        return result

    exact, seen = Inputs(device=device).exact(LENGTHS, CONTEXTS), set()
    for tokens, out in play(world, rank):
        torch.testing.assert_close(out.double(), exact[tokens], rtol=2e-5, atol=2e-5)
        seen |= set(tokens.tolist())
    assert len(seen) == sum(LENGTHS)
    rounding = Inputs(device=device)
    rounding.latents = tuple(x + 0.01 for x in rounding.latents)  # what the check would see of a token that is not as cached
    assert (rounding.exact(LENGTHS, CONTEXTS) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["weight", "bias", "module"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_bits_over_a_cache_of_what_float8_holds(world: int, how: str, dtype: torch.dtype) -> None:
    """Which every rank was given as latents; by the weight, and by modules that must be called."""

    def rank(group: Any) -> None:
        linear = torch.nn.Linear(16, 39, bias=how == "bias", dtype=dtype).requires_grad_(False)
        linear.weight.copy_(Inputs(dtype).weight)
        if how == "module":
            linear.register_forward_hook(lambda module, given, result: 2 * result)
        ours, plain = (Rank(group, dtype, scaled=scaled).filled() for scaled in (True, False))
        for options in ({}, {"workspace_tokens": 24}):
            _, got = ours.step(LENGTHS, CONTEXTS, PREFILLS, linear, **options)
            _, wanted = plain.step(LENGTHS, CONTEXTS, PREFILLS, linear, **options)
            assert got.dtype == dtype
            assert torch.equal(got, wanted)
        assert torch.equal((ours.cache.float() * SCALE).to(dtype).nan_to_num(5), plain.cache.nan_to_num(5))

    play(world, rank)


@devices
@pytest.mark.parametrize("world", [1, 2])
def test_one_step_and_many_agree(device: str, world: int) -> None:
    """The caches to the bit, the outputs but for the order of sums."""

    def rank(group: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        whole = Rank(group, device=device)
        first, rest = [20, 11, 6], [0, 0, 0]
        tokens, out = whole.step(first, rest)
        natural = torch.zeros(sum(first), 3, 5, device=device)
        natural[tokens] = out
        parts, done, pieces = Rank(group, device=device), [0, 0, 0], []
        for lengths in ([7, 10, 0], [1, 1, 5], [12, 0, 1]):
            tokens, out = parts.step(lengths, done)
            request = np.repeat(np.arange(3), lengths)
            position = np.concatenate([np.arange(old, old + new) for old, new in zip(done, lengths, strict=True)])
            place = torch.from_numpy(np.array([0, 20, 31])[request] + position).to(device)
            pieces.append((place[tokens], out))
            done = [old + new for old, new in zip(done, lengths, strict=True)]
        assert done == first
        assert same_bits(whole.cache, parts.cache)
        return natural, pieces

    ranks = play(world, rank)
    whole = sum(natural for natural, _ in ranks)
    for _, pieces in ranks:
        for place, out in pieces:
            torch.testing.assert_close(out, whole[place], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_peers_of_one() -> None:
    there = Rank(None, torch.bfloat16, "cuda").filled()
    _, wanted = there.step(LENGTHS, CONTEXTS, PREFILLS)
    cache = there.cache.view(torch.uint8).clone().view(FLOAT8)
    exchange = PeerExchange(None, 40, DIMS, torch.bfloat16, "cuda", caches=[cache])
    layer = MLAPrefill(DIMS, SOFTMAX, exchange)
    with torch.inference_mode():
        out = layer(*there.given, there.inputs.weight, there.meta, cache, scale=there.scale)
    assert torch.equal(out, wanted)
    assert same_bits(cache, there.cache)
    exchange.close()


@pytest.mark.gpu
def test_graph() -> None:
    there = Rank(None, torch.bfloat16, "cuda").filled()
    _, wanted = there.step(LENGTHS, CONTEXTS, PREFILLS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = there.layer(*there.given, there.inputs.weight, there.meta, there.cache, scale=there.scale)
    there.cache.view(torch.uint8)[there.cache.float().isnan()] = 0
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)
    there.scale.mul_(2)  # of the cached tokens, too
    graph.replay()
    other = out.clone()
    assert not torch.equal(other, wanted)
    assert torch.equal(other, there.layer(*there.given, there.inputs.weight, there.meta, there.cache, scale=there.scale))


def test_later_layers_are_checked_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Rank(None).filled()
    there.step(LENGTHS, CONTEXTS, PREFILLS)
    full: list[None] = []
    check = prefill.check_layer_inputs
    monkeypatch.setattr(prefill, "check_layer_inputs", lambda *given: full.append(None) or check(*given))
    for scale in (there.scale.clone(), torch.tensor(SCALE)):
        there.layer(*there.given, there.inputs.weight, there.meta, there.cache, scale=scale)
    assert full == []
    there.layer(*there.given, there.inputs.weight, there.meta, there.cache, scale=there.scale[None])  # right, and unusual
    assert len(full) == 1


PLAIN = torch.zeros(15, BLOCK, 20)
ERRORS = [
    ({"scale": None}, TypeError, "cache must be torch.float32, as kv_c, or come with a scale, got torch.float8_e4m3fn"),
    ({"cache": PLAIN}, TypeError, "cache must be float8_e4m3fn with a scale, got float32"),
    ({"cache": PLAIN.to(torch.float8_e5m2)}, TypeError, "cache must be float8_e4m3fn with a scale, got float8_e5m2"),
    ({"scale": SCALE}, TypeError, "scale must be a torch.Tensor, got float"),
    ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \[1\] = \(1\), got \(2,\)"),
    ({"scale": torch.ones(1).double()}, TypeError, "scale must be float32, got float64"),
    ({"scale": torch.ones(1, device="meta")}, ValueError, "scale must be on cpu, .* got meta"),
    ({"scale": torch.ones(1, requires_grad=True)}, NotImplementedError, "scale must not require gradients"),
    ({"cache": torch.zeros(15, BLOCK, 19).to(FLOAT8)}, ValueError, r"cache must be .* = \(any, 4, 20\), got \(15, 4, 19\)"),
    ({"cache": torch.zeros(15, BLOCK, 20, device="meta").to(FLOAT8)}, ValueError, "cache must be on cpu, as kv_c, got meta"),
]


@pytest.mark.parametrize("half", [False, True], ids=["call", "start"])
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "second layer"])
@pytest.mark.parametrize(("change", "error", "words"), ERRORS)
def test_errors(change: dict[str, Any], error: type[Exception], words: str, first: bool, half: bool) -> None:
    class NoExchange:
        def publish(self, *_: Any, **__: Any) -> None:
            pytest.fail("exchanged")

    there = Rank(None).filled()
    meta = there.planner.plan(LENGTHS, CONTEXTS, PREFILLS, TABLES)
    if not first:
        there.step(LENGTHS, CONTEXTS, PREFILLS)
        meta = there.meta
    q, latents = there.inputs.new(LENGTHS, CONTEXTS)
    given = {"kv_c": latents[:, :16], "k_pe": latents[:, 16:], "meta": meta, "cache": there.cache, "scale": there.scale}
    layer = MLAPrefill(DIMS, SOFTMAX, NoExchange())  # type: ignore[arg-type]
    call, name = (layer.start, "MLAPrefill.start") if half else (layer, "MLAPrefill")
    with pytest.raises(error, match=f"{name}: {words}"):
        call(**given | change, **({} if half else {"q": q, "kv_b_proj": there.inputs.weight}))


def test_latents_that_kernels_do_not_quantise() -> None:
    there = Rank(None).filled()
    there.step(LENGTHS, CONTEXTS, PREFILLS)
    given = [x.double() for x in there.given]
    with pytest.raises(TypeError, match=r"kv_c must be bfloat16, float16 or float32 with a scale, got torch\.float64"):
        there.layer(*given, there.inputs.weight.double(), there.meta, there.cache, scale=there.scale)


def test_a_scale_without_a_cache() -> None:
    there = Rank(None)
    there.step([5, 0, 0], [0, 0, 0])
    with pytest.raises(ValueError, match="scale must come with a cache, got a Tensor and cache None"):
        there.layer(*there.given, there.inputs.weight, there.meta, None, scale=there.scale)
