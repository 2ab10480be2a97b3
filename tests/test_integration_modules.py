"""Modules of a model that are more than their weights: quantised, hooked, patched, offloaded; and what a model is after PCP."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5")

from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPPlanner
from pcp_mla.integrations.transformers import copy_sharing_weights, decode, disable_pcp, enable_pcp, prefill
from pcp_mla.integrations.transformers.caches import CACHE_WORD
from pcp_mla.testing.played import play
from test_integration_transformers import build, check_close, prompts, stock_logits

WIDTHS = {"num_attention_heads": 4, "num_key_value_heads": 4}


class Halved(torch.Tensor):
    """A weight that is kept halved, and that nothing but F.linear knows how to use."""

    kept: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> Halved:
        made = torch.Tensor._make_wrapper_subclass(Halved, weight.shape, dtype=weight.dtype, device=weight.device)
        made.kept = weight.detach() / 2
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return 2 * F.linear(args[0], args[1].kept)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halved.of(2 * args[0].kept)
        raise NotImplementedError(func)


def halve(linear: Any) -> None:
    linear.weight = torch.nn.Parameter(Halved.of(linear.weight * 1.5), requires_grad=False)


def add_bias(linear: Any) -> None:
    linear.bias = torch.nn.Parameter(0.3 * torch.randn(linear.out_features, generator=torch.Generator().manual_seed(5)))


def patch(linear: Any) -> None:
    """As adapters do that keep the class."""
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) / 8 for shape in ((4, 20), (linear.out_features, 4)))
    linear.forward = lambda x: F.linear(x, linear.weight) + x @ down.T @ up.T


def offload(module: Any) -> None:
    """The weights are there during a call only, as accelerate's hooks do it."""
    weight, forward = module.weight.detach(), module.forward
    away = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)

    def load_and_call(*inputs: torch.Tensor) -> torch.Tensor:
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        result = forward(*inputs)
        module.weight = away
        return result

    module.forward, module.weight = load_and_call, away


PROJECTIONS: dict[str, Callable[[Any], object]] = {
    "weight of another class": halve,
    "bias": add_bias,
    "hook": lambda linear: linear.register_forward_hook(lambda module, inputs, out: 1.5 * out),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],)),
    "patched forward": patch,
    "offloaded": offload,
}


@pytest.mark.parametrize("change", PROJECTIONS.values(), ids=PROJECTIONS)
@torch.no_grad()
def test_a_projection_that_is_more_than_its_weight_is_called(change: Callable[[Any], object]) -> None:
    """By steps of prefill and of decode, whose attention reads latents otherwise."""
    plain, model = build("v3", num_hidden_layers=2), build("v3", num_hidden_layers=2)
    for layer in model.model.layers:
        change(layer.self_attn.kv_b_proj)
    prompt = prompts([13])[0]
    wanted = stock_logits(model, [prompt])
    if change is not offload:
        assert float((wanted - stock_logits(plain, [prompt])).abs().max()) > 1e-2 * float(wanted.abs().max())

    def rank(group: Any) -> list[torch.Tensor]:
        mine = copy_sharing_weights(model) if change not in (patch, offload) else model
        if "_pcp" in mine.__dict__:
            disable_pcp(mine)
        enable_pcp(mine, group)
        return [prefill(mine, [prompt[:11]]), decode(mine, [prompt[11]]), decode(mine, [prompt[12]])]

    for rows in play(1 if change in (patch, offload) else 2, rank):
        check_close(torch.cat(rows), wanted)


def test_the_layer_takes_a_weight_of_another_class() -> None:
    """Without a module around it."""
    dims = MLADims(2, 16, 8, 12, 20)
    meta = PCPPlanner(1, 5, 1, 0).plan([5])
    layer = MLAPrefill(dims, 0.2, LatentExchange(None, 5, dims, torch.float32))
    q, kv_c, k_pe, weight = (torch.randn(shape) for shape in ((5, 2, 24), (5, 20), (5, 8), (56, 20)))
    torch.testing.assert_close(layer(q, kv_c, k_pe, Halved.of(weight), meta), layer(q, kv_c, k_pe, weight, meta))


@torch.no_grad()
def test_an_offloaded_model() -> None:
    """Not even the embedding is there between calls: what it gives says where the model computes."""
    model = build("v3", num_hidden_layers=2)
    prompt = prompts([9])[0]
    wanted = stock_logits(model, [prompt])
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            offload(module)
    context = enable_pcp(model)
    assert context.blocks.cache.device == torch.device("cpu")
    check_close(torch.cat([prefill(model, [prompt[:8]]), decode(model, [prompt[8]])]), wanted)
    check_close(model(torch.tensor([prompt])).logits[0], wanted)


@torch.no_grad()
def test_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = torch.tensor([prompts([9])[0]])
    for options in ({}, {"preload_module_classes": ["DeepseekV3Attention"]}):
        model = build("v3", num_hidden_layers=2)
        wanted = model(ids).logits
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), **options)
        assert model.model.embed_tokens.weight.device.type == "meta"
        enable_pcp(model)
        check_close(model(ids).logits, wanted)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
        disable_pcp(model)
        check_close(model(ids).logits, wanted)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert not any("forward" in module.__dict__ and "_hf_hook" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_quantised_by_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = build("v3", num_hidden_layers=2), torch.tensor([prompts([9])[0]])
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    wanted, text = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    enable_pcp(model)
    check_close(model(ids).logits, wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)


def test_weights_that_nobody_brings() -> None:
    with torch.device("meta"):
        model = build("v3", num_hidden_layers=1)
    with pytest.raises(ValueError, match="enable_pcp: model must have weights, or hooks that bring them, got weights on the meta"):
        enable_pcp(model)
    assert "_pcp" not in model.__dict__


# What a model is after PCP.


def watched(model: Any) -> list[str]:
    """Puts forwards on the instances of the model and of its first attention, which note that they were called."""
    calls: list[str] = []
    for name, module in (("model", model), ("attention", model.model.layers[0].self_attn)):

        def forward(*args: Any, _name: str = name, _stock: Any = module.forward, **options: Any) -> Any:
            calls.append(_name)
            return _stock(*args, **options)

        module.forward = forward
    return calls


def forwards(model: Any) -> list[dict[str, Any]]:
    """What is on the instances of all modules."""
    names = ("forward", "_old_forward", "_pcp")
    return [{name: module.__dict__[name] for name in names if name in module.__dict__} for module in model.modules()]


@torch.no_grad()
def test_disable_puts_earlier_forwards_back() -> None:
    model, ids = build("v3", num_hidden_layers=2), torch.tensor([[1, 2, 3]])
    calls = watched(model)
    before = forwards(model)
    wanted = model(ids).logits
    for _ in range(2):
        enable_pcp(model)
        with pytest.raises(ValueError, match="must not be under PCP already"):
            enable_pcp(model)
        calls.clear()
        check_close(model(ids).logits, wanted)
        assert calls == []
        disable_pcp(model)
        assert forwards(model) == before
    assert torch.equal(model(ids).logits, wanted)
    assert calls == ["model", "attention"]


@torch.no_grad()
def test_forwards_that_are_put_over_those_of_pcp() -> None:
    """They go with it."""
    model = build("v3", num_hidden_layers=1)
    enable_pcp(model)
    calls = watched(model)
    model(torch.tensor([[1, 2, 3]]))
    assert calls == ["model", "attention"]
    disable_pcp(model)
    assert forwards(model) == [{} for _ in model.modules()]


class Hook:
    """What accelerate leaves on a module, in short: a forward on the instance that calls the one that was there."""

    def __init__(self, module: Any) -> None:
        self.calls = 0
        module._hf_hook, module._old_forward = self, module.forward
        module.forward = functools.update_wrapper(functools.partial(Hook.call, module), module._old_forward)

    @staticmethod
    def call(module: Any, *args: Any, **options: Any) -> Any:
        module._hf_hook.calls += 1
        return module._old_forward(*args, **options)

    @staticmethod
    def remove(module: Any) -> None:
        module.forward = module.__dict__.pop("_old_forward")
        del module._hf_hook


@pytest.mark.parametrize("first", [True, False], ids=["before PCP", "under PCP"])
@pytest.mark.parametrize("removed_first", [True, False])
@torch.no_grad()
def test_hooks_stay_around(first: bool, removed_first: bool) -> None:
    """An attention's hook may bring the weights of the modules in it."""
    model, ids = build("v3", num_hidden_layers=1), torch.tensor([[1, 2, 3]])
    modules = [model, model.model.layers[0].self_attn]
    wanted = model(ids).logits
    if not first:
        enable_pcp(model)
    hooks = [Hook(module) for module in modules]
    if first:
        enable_pcp(model)
    check_close(model(ids).logits, wanted)
    assert [hook.calls for hook in hooks] == [1, 1]
    for step in (0, 1):
        if removed_first == (step == 0):
            for module in modules:
                Hook.remove(module)
        else:
            disable_pcp(model)
            assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)


def test_an_error_while_enabling_leaves_the_model() -> None:
    model = build("v3", num_hidden_layers=3)
    last = model.model.layers[2].self_attn

    class Broken(type(last)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "forward":
                raise KeyError("broken")
            super().__setattr__(name, value)

    watched(model)
    before = forwards(model)
    last.__class__ = Broken
    with pytest.raises(KeyError, match="broken"):
        enable_pcp(model)
    assert forwards(model) == before


@torch.no_grad()
def test_copies(tmp_path: Any) -> None:
    model, ids = build("v3", num_hidden_layers=2), torch.tensor([[1, 2, 3]])
    attention = model.model.layers[1].self_attn
    attention.forward = functools.partial(type(attention).forward, attention)  # of a kind that a copy can have too
    wanted = model(ids).logits
    context = enable_pcp(model)
    cache = model(ids)[CACHE_WORD]
    for duplicate in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, tmp_path / "model.pt")):
        with pytest.raises(NotImplementedError, match="call disable_pcp first, or copy_sharing_weights"):
            duplicate(model)
    with pytest.raises((NotImplementedError, TypeError)):
        pickle.dumps(cache)
    other = copy_sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "_pcp" not in other.__dict__
    assert "forward" not in other.__dict__
    assert other.model.layers[1].self_attn.forward.args == (other.model.layers[1].self_attn,)
    assert torch.equal(other(ids).logits, wanted)
    assert enable_pcp(other) is not context
    check_close(other(ids).logits, wanted)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(type(model).from_pretrained(tmp_path / "saved")(ids).logits, wanted)
    disable_pcp(model)
    assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
