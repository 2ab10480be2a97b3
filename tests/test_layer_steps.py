"""What the layers of a step share: it must be of this step, this layer and these tensors, whatever was called before."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPMetadata, PCPPlanner
from pcp_mla.layer import prefill, steps
from pcp_mla.ops.attention import call, support
from pcp_mla.ops.attention.libraries import of_op
from pcp_mla.testing.played import play
from test_attention_backends import shifted

DIMS = MLADims(num_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, kv_lora_rank=32)
SCALE, BLOCK, TOKENS = 0.3, 4, 24
TABLES = torch.arange(24, dtype=torch.int32).flip(0).view(2, 12)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for FlashAttention 3 in the place of fa2; the calls of it that the layers of a step share."""
    found, shared = of_op(torch.ops.pcp_mla_test.fa3.default), []
    monkeypatch.setattr(call, "find", lambda backend: found)
    monkeypatch.setattr(support, "missing", lambda backend, device: "")
    prepare = call.prepared_call

    def counted(*arguments: Any) -> Callable[..., None] | None:
        run = prepare(*arguments)
        return run and (lambda *tensors: shared.append(tensors) or run(*tensors))

    monkeypatch.setattr(steps, "prepared_call", counted)
    return shared


class Inputs:
    """Tensors of a layer whose rank has all the tokens of a step."""

    def __init__(self, tokens: int = TOKENS, dims: MLADims = DIMS, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).bfloat16()

        self.q = values(tokens, dims.num_heads, dims.qk_head_dim)
        self.kv_c, self.k_pe = values(tokens, dims.kv_lora_rank), values(tokens, dims.qk_rope_head_dim)
        self.weight = values(dims.num_heads * dims.expanded_dim, dims.kv_lora_rank)
        self.cache = values(24, BLOCK, dims.latent_dim)

    def __call__(self, layer: MLAPrefill, meta: PCPMetadata, **changes: Any) -> torch.Tensor:
        names = ("q", "kv_c", "k_pe", "kv_b_proj", "cache")
        own = dict(zip(names, (self.q, self.kv_c, self.k_pe, self.weight, self.cache), strict=True))
        return layer(**own | {"meta": meta} | changes)


def planner() -> PCPPlanner:
    return PCPPlanner(2, 48, 1, 0, block_size=BLOCK)


def plan(lengths: list[int], contexts: list[int], **options: Any) -> PCPMetadata:
    return planner().plan(lengths, contexts, None, TABLES, **options)


def layer_of(dims: MLADims = DIMS, scale: float = SCALE, group: Any = None) -> MLAPrefill:
    return MLAPrefill(dims, scale, LatentExchange(group, 48, dims, torch.bfloat16), "fa2")


def test_plans_of_the_same_sizes(library: list[Any]) -> None:
    """Only lengths differ: of planners of their own, and of one."""
    plans, layer, inputs = planner(), layer_of(), Inputs()
    batches = [([20, 4], [3, 9]), ([4, 20], [9, 3]), ([12, 12], [6, 6]), ([20, 4], [3, 9])]
    wanted = []
    for batch in batches:
        steps._steps.clear()  # each as if it were the first
        wanted.append(inputs(layer, plan(*batch), cache=inputs.cache.clone()))
    apart = [plan(*batch) for batch in batches]
    for metas in (apart, apart, (plans.plan(*batch, None, TABLES) for batch in batches)):
        assert all(
            torch.equal(inputs(layer, meta, cache=inputs.cache.clone()), out) for meta, out in zip(metas, wanted, strict=True)
        )
    assert len(library) == 16


def test_a_plan_that_is_over(library: list[Any]) -> None:
    plans, layer, inputs = planner(), layer_of(), Inputs()
    over = plans.plan([20, 4], [3, 9], None, TABLES)
    meta = plans.plan([4, 20], [9, 3], None, TABLES)
    inputs(layer, meta)
    with pytest.raises(RuntimeError, match="before the next plan"):
        inputs(layer, over)
    assert len(library) == 1


def test_a_step_goes_with_its_metadata(library: list[Any]) -> None:
    layer, inputs = layer_of(), Inputs()
    gc.collect()
    before = len(steps._steps)
    for _ in range(3):
        meta = plan([20, 4], [3, 9])
        inputs(layer, meta)
        inputs(layer, meta)
        assert len(steps._steps[meta]) == 1
    del meta
    gc.collect()
    assert len(steps._steps) == before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda meta: pickle.loads(pickle.dumps(meta))])
def test_copies_of_metadata(copied: Callable[[PCPMetadata], PCPMetadata], library: list[Any]) -> None:
    """What layers did with the one says nothing of the other."""
    layer, inputs = layer_of(), Inputs()
    meta = PCPMetadata.build([20, 4], world_size=1, rank=0)
    wanted = inputs(layer, meta, cache=None)
    other = copied(meta)
    assert torch.equal(inputs(layer, other, cache=None), wanted)
    object.__setattr__(other, "seqused_k", other.seqused_k - 1)
    steps._steps.pop(other)
    assert not torch.equal(inputs(layer, other, cache=None), wanted)
    assert torch.equal(inputs(layer, meta, cache=None), wanted)


def test_layers_that_differ_share_nothing(library: list[Any]) -> None:
    """Dims of the same q, a scale, a dtype, no cache."""
    meta = plan([20, 4], [0, 0])
    others = [MLADims(2, 16, 8, 8, 32), MLADims(2, 8, 16, 16, 32), MLADims(4, 16, 8, 16, 32)]
    kinds = [(DIMS, SCALE), (DIMS, 2 * SCALE), *((dims, SCALE) for dims in others)]
    for _ in range(2):
        for dims, scale in kinds:
            inputs = Inputs(dims=dims)
            for cache in (inputs.cache, None):
                got = inputs(layer_of(dims, scale), meta, cache=cache)
                assert torch.equal(got, inputs(layer_of(dims, scale), plan([20, 4], [0, 0]), cache=cache))
    assert len(steps._steps[meta]) == 2 * len(kinds)
    exchange = LatentExchange(None, 48, DIMS, torch.float16)
    halves = {name: getattr(Inputs(), name).half() for name in ("q", "kv_c", "k_pe", "cache")}
    out = Inputs()(MLAPrefill(DIMS, SCALE, exchange, "fa2"), meta, kv_b_proj=Inputs().weight.half(), **halves)
    assert out.dtype == torch.float16
    halves = {name: x.float() for name, x in halves.items()}
    with pytest.raises(NotImplementedError, match="backend 'fa2' does not support dtype float32"):
        Inputs()(MLAPrefill(DIMS, SCALE, exchange, "fa2"), meta, kv_b_proj=Inputs().weight.float(), **halves)


def test_tensors_that_change(library: list[Any]) -> None:
    """The weight and the cache of every layer are its own, and a tensor is what it is now."""
    layer, meta, first, second = layer_of(), plan([20, 4], [3, 9]), Inputs(seed=1), Inputs(seed=2)
    linear = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(first.weight)
    wanted = [inputs(layer_of(), plan([20, 4], [3, 9]), cache=inputs.cache.clone()) for inputs in (first, second)]
    assert torch.equal(first(layer, meta, kv_b_proj=linear, cache=first.cache.clone()), wanted[0])
    linear.weight.data = second.weight
    assert torch.equal(second(layer, meta, kv_b_proj=linear), wanted[1])
    assert torch.equal(second(layer, meta, kv_b_proj=linear), wanted[1])
    linear.weight = torch.nn.Parameter(first.weight, requires_grad=False)
    assert torch.equal(first(layer, meta, kv_b_proj=linear), wanted[0])
    assert not torch.equal(first.cache, second.cache)
    linear.weight.data = torch.zeros(63, 32).bfloat16()
    with pytest.raises(ValueError, match=r"kv_b_proj must have a weight of shape \(64, 32\), got \(63, 32\)"):
        first(layer, meta, kv_b_proj=linear)
    first.cache.data = torch.zeros(24, BLOCK + 1, 40).bfloat16()
    with pytest.raises(ValueError, match="cache must be"):
        first(layer, meta)
    for name, tensor in (("q", second.q), ("kv_c", second.kv_c), ("k_pe", second.k_pe), ("kv_b_proj", second.weight)):
        with pytest.raises(NotImplementedError, match="inputs must not require gradients"):
            second(layer, meta, **{name: tensor.clone().requires_grad_()})
    with pytest.raises(ValueError, match="MLAPrefill: k_pe must have a contiguous last dimension"):
        second(layer, meta, k_pe=second.k_pe.T.contiguous().T)
    with pytest.raises(ValueError, match="MLAPrefill: kv_c must be on cpu, where the metadata is, got meta"):
        second(layer, meta, kv_c=second.kv_c.to("meta"))


@torch.no_grad()
def test_modules_that_change(library: list[Any]) -> None:
    """Hooks, a bias, another weight in the place of the parameter: looked for in every layer."""
    layer, meta, inputs = layer_of(), plan([20, 4], [0, 0]), Inputs()
    linear = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
    linear.weight.copy_(inputs.weight)

    def run(module: Any) -> torch.Tensor:
        return inputs(layer, meta, kv_b_proj=module)

    plain, doubled = run(linear), run(2 * inputs.weight)
    assert torch.equal(run(linear), plain)
    assert not torch.equal(plain, doubled)
    for register in (linear.register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
        handle = register(lambda module, given, out: 2 * out)
        assert torch.equal(run(linear), doubled)
        handle.remove()
        assert torch.equal(run(linear), plain)
    linear.bias = torch.nn.Parameter(torch.ones(64).bfloat16())
    assert not torch.equal(run(linear), plain)
    linear.bias = None
    assert torch.equal(run(linear), plain)
    del linear.weight
    linear.weight = 2 * inputs.weight
    assert torch.equal(run(linear), doubled)


STEPS = [
    pytest.param([20, 4], [3, 9], {}, True, id="context"),
    pytest.param([20, 4], [0, 0], {}, True, id="no context"),
    pytest.param([20, 4], [25, 30], {"workspace_tokens": 30}, False, id="chunks"),
    pytest.param([17, 4], [3, 9], {"num_tokens_padded": TOKENS, "num_kv_tokens_padded": 48}, True, id="padded"),
    pytest.param([0, 0], [3, 9], {}, False, id="no tokens"),
]


@pytest.mark.parametrize(("lengths", "contexts", "options", "once"), STEPS)
@pytest.mark.parametrize("case", ["usual", "q apart", "a module"])
def test_the_shared_call_gives_the_bits_of_the_general_one(
    lengths: list[int],
    contexts: list[int],
    options: Any,
    once: bool,
    case: str,
    library: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, meta = Inputs(), plan(lengths, contexts, **options)
    if meta.num_local_rows != TOKENS:
        inputs = Inputs(tokens=meta.num_local_rows)
    changes: dict[str, Any] = {}
    if case == "q apart":
        changes["q"] = shifted(inputs.q)
    if case == "a module":
        changes["kv_b_proj"] = torch.nn.Linear(32, 64, dtype=torch.bfloat16).requires_grad_(False)
    got = [inputs(layer_of(), meta, cache=inputs.cache.clone(), **changes) for _ in range(2)]
    assert len(library) == (2 if once and case == "usual" else 0)
    monkeypatch.setattr(steps, "prepared_call", lambda *_: None)
    wanted = inputs(layer_of(), plan(lengths, contexts, **options), cache=inputs.cache.clone(), **changes)
    for out in got:
        assert torch.equal(out[: meta.num_tokens], wanted[: meta.num_tokens])


def test_threads_share_a_layer(library: list[Any]) -> None:
    """Ranks that are played are threads; all use one layer object for each rank, and a plan of their own."""

    def rank(group: Any) -> bool:
        layer = layer_of(group=group)
        for lengths in ([20, 4], [4, 20], [11, 13]) * 3:
            metas = [
                PCPPlanner(2, 48, group.world_size, group.rank, block_size=BLOCK).plan(lengths, [3, 9], None, TABLES) for _ in "ab"
            ]
            inputs = Inputs(tokens=metas[0].num_tokens, seed=group.rank)
            outs = [inputs(layer, meta, cache=inputs.cache.clone()) for meta in (metas[0], metas[0], metas[1])]
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])
        return True

    assert all(play(3, rank))


def test_compilers_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    meta, kind = plan([20, 4], [3, 9]), steps.Kind(DIMS, SCALE, "torch", torch.bfloat16, True)
    step = steps.new_step(kind, meta)
    assert steps.known_step(kind, meta) is step
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert steps.known_step(kind, meta) is None
    assert steps.new_step(kind, meta) is not step
    assert steps._steps[meta] == [step]


def test_later_layers_are_checked_at_a_glance(library: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual inputs; those that are right but unusual are looked at in full."""
    layer, meta, inputs = layer_of(), plan([20, 4], [3, 9]), Inputs()
    wanted = inputs(layer, meta)
    full: list[None] = []
    check = prefill.check_layer_inputs
    monkeypatch.setattr(prefill, "check_layer_inputs", lambda *given: full.append(None) or check(*given))
    rows = torch.cat([inputs.kv_c, inputs.k_pe], 1)
    assert torch.equal(inputs(layer, meta, kv_c=rows[:, :32], k_pe=rows[:, 32:]), wanted)
    assert full == []
    layers = torch.zeros(24, 5, BLOCK, 48).bfloat16()
    for cache, checks in ((layers.view(24, -1, BLOCK, 40)[:, 1], 0), (layers[:, 1, :, :40], 1)):
        cache.copy_(inputs.cache)
        assert torch.equal(inputs(layer, meta, cache=cache), wanted)
        assert len(full) == checks
