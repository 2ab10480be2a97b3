"""What a model is taken for, and what PCP cannot take of one, refused by name when it is enabled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers

from pcp_mla.integrations.transformers import copy_sharing_weights, disable_pcp, enable_pcp, prefill
from pcp_mla.testing.played import play
from test_integration_models import HERE, small
from test_integration_transformers import check_close, prompts, stock_logits


def refusal(model: Any) -> str:
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises((NotImplementedError, TypeError, ValueError)) as caught:
        enable_pcp(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    return f"{caught.type.__name__}: {caught.value}"


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 2.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("name", [name for name in ("DeepseekV3", "MiniCPM3") if name in HERE])
def test_longrope(name: str) -> None:
    assert "rope_type must not be one of dynamic, longrope, got 'longrope'" in refusal(small(name, rope_parameters=LONGROPE))


@pytest.mark.parametrize(
    "set_rope",
    [
        lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"),
        lambda model: setattr(model.model.rotary_emb, "rope_type", {"full_attention": "dynamic"}),
        lambda model: setattr(model.config, "rope_parameters", {"full_attention": {"rope_type": "dynamic"}}),
    ],
)
def test_rope_wherever_its_type_is(set_rope: Any) -> None:
    model = small("DeepseekV3")
    set_rope(model)
    assert "rope_type must not be one of dynamic, longrope, got 'dynamic'" in refusal(model)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("sliding_window", 16, "NotImplementedError: enable_pcp: sliding_window must be None, got 16"),
        ("attention_chunk_size", 8, "NotImplementedError: enable_pcp: attention_chunk_size must be None, got 8"),
        (
            "layer_types",
            ["full_attention", "sliding_attention"],
            "NotImplementedError: enable_pcp: layer_types must be full_attention in all layers, got 'sliding_attention'",
        ),
    ],
)
def test_settings(setting: str, value: Any, message: str) -> None:
    model = small("DeepseekV3")
    setattr(model.config, setting, value)
    assert refusal(model) == message


def test_a_window_that_is_not_used() -> None:
    model = small("DeepseekV3")
    model.config.sliding_window, model.config.use_sliding_window = 16, False
    enable_pcp(model)


@pytest.mark.parametrize("where", ["attention of layer 1", "layer 1", "model"])
def test_modules_and_parameters_that_are_not_known(where: str) -> None:
    model = small("DeepseekV3")
    module = {"attention of layer 1": model.model.layers[1].self_attn, "layer 1": model.model.layers[1], "model": model.model}[
        where
    ]
    module.sinks, module.conv = torch.nn.Parameter(torch.zeros(5)), torch.nn.Conv1d(1, 1, 3)
    message = refusal(model)
    assert f"enable_pcp: {where}, a {type(module).__name__}, must have no modules or parameters besides " in message
    assert message.endswith("got conv, sinks")


def test_layers_of_different_widths() -> None:
    model = small("DeepseekV3")
    model.model.layers[1].self_attn.v_head_dim = 13
    assert "ValueError: enable_pcp: widths must be (16, 8, 12, 20) as in layer 0" in refusal(model)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_layers_that_share_an_index(index: int) -> None:
    """Each has its own part of the cache."""
    model = small("DeepseekV3")
    model.model.layers[1].self_attn.layer_idx = index
    wanted = f"ValueError: enable_pcp: layer_idx must be another one of 0 to 1 in each layer, got [0, {index}]"
    assert refusal(model) == wanted


def test_a_model_that_is_compiled_as_a_whole() -> None:
    with pytest.raises(TypeError, match=r"must be a causal language model of transformers .*, got a OptimizedModule"):
        enable_pcp(torch.compile(small("DeepseekV3"), backend="eager"))


Attention: Any = type(small("DeepseekV3").model.layers[0].self_attn)
FORWARD = Attention.forward


def hand_on(**more: Any) -> Any:
    return lambda self, *args, **options: FORWARD(self, *args, **options, **more)


def scaled_keys(self: Any, kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = Attention.expand_kv(self, kv_c, k_pe)
    keys[..., :16] *= 1.5
    return keys, values


def scaled_latents(self: Any, kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return Attention.expand_kv(self, self.kv_a_layernorm(kv_c), k_pe)


def scaled_rope(self: Any, kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return Attention.expand_kv(self, kv_c, 1.5 * k_pe)


def rope_afterwards(self: Any, hidden: torch.Tensor, **options: Any) -> Any:
    """What comes of the expansion is changed, not what goes into it."""
    expand = getattr(self, "expand_kv", None) or pytest.skip("of a later transformers")

    def changed(kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = expand(kv_c, k_pe)
        return torch.cat([keys[..., :-8], 1.5 * keys[..., -8:]], -1), values

    self.__dict__["expand_kv"] = changed
    return FORWARD(self, hidden, **options)


def without_attention(self: Any, hidden: torch.Tensor, **options: Any) -> Any:
    return self.o_proj(hidden), None


def masked(self: Any, hidden: torch.Tensor, **options: Any) -> Any:
    return FORWARD(self, hidden, **(options | {"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}))


MORE: dict[str, tuple[str, Any, str]] = {
    "window": ("forward", hand_on(sliding_window=8), "must have no sliding_window"),
    "sinks": ("forward", hand_on(s_aux=torch.zeros(5)), "must have no s_aux"),
    "cap": ("forward", hand_on(softcap=30.0), "must have no softcap"),
    "not causal": ("forward", hand_on(is_causal=False), "must have no keys behind a query"),
    "mask": ("forward", masked, "must have no a mask of its own"),
    "no attention": ("forward", without_attention, "it does not come to its attention function"),
    "keys": ("expand_kv", scaled_keys, "K and V are not what kv_b_proj gives"),
    "latents": ("expand_kv", scaled_latents, "kv_b_proj is not given the latents"),
    "rope": ("expand_kv", scaled_rope, "K does not end in k_pe"),
    "rope afterwards": ("forward", rope_afterwards, "K does not end in k_pe"),
}


@pytest.mark.parametrize("kind", [kind for kind in MORE if MORE[kind][0] == "forward" or hasattr(Attention, MORE[kind][0])])
def test_attention_that_does_more(kind: str) -> None:
    """A class of somebody's own: found by what its forward does."""
    name, method, message = MORE[kind]
    model = small("DeepseekV3")
    model.model.layers[1].self_attn.__class__ = type("Own", (Attention,), {name: method})
    got = refusal(model)
    assert got.startswith("NotImplementedError: enable_pcp: attention of layer 1, a Own, cannot be followed by PCP: "), got
    assert message in got


def test_attention_that_sees_what_follows() -> None:
    model = small("DeepseekV3")
    model.model.layers[1].self_attn.is_causal = False
    assert refusal(model) == "NotImplementedError: enable_pcp: attention of layer 1 must be causal, got is_causal=False"


def test_what_is_handed_on_later() -> None:
    model = small("DeepseekV3")
    attention = model.model.layers[1].self_attn
    enable_pcp(model)
    attention.training, attention.attention_dropout = True, 0.1
    with pytest.raises(NotImplementedError, match="attention: DeepseekV3Attention must have no dropout under PCP"):
        prefill(model, [[1, 2, 3]])


SPARSE = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
OTHERS = {
    "DeepseekV32": (SPARSE, "layer_types must be full_attention in all layers, got "),
    "LongcatFlash": ({"num_layers": 1, "zero_expert_num": 1}, "got a LongcatFlashForCausalLM with a ModuleList in layer 0"),
}


@pytest.mark.parametrize("name", [name for name in OTHERS if hasattr(transformers, f"{name}ForCausalLM")])
def test_classes_that_are_not_dense_mla(name: str) -> None:
    changes, message = OTHERS[name]
    assert message in refusal(small(name, **changes))


# Classes of somebody's own that are taken.


@torch.no_grad()
def test_a_class_of_somebodys_own_whose_queries_are_scaled() -> None:
    """What it does to its queries and to its sums is its own."""

    def gated(self: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
        out, weights = FORWARD(self, hidden_states, **options)
        return out * hidden_states.sigmoid(), weights

    model, plain = small("DeepseekV3"), small("DeepseekV3")
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("Own", (Attention,), {"forward": gated})
        layer.self_attn.scaling *= 1.5
    wanted = stock_logits(model, prompts())
    assert float((wanted - stock_logits(plain, prompts())).abs().max()) > 1e-2 * float(wanted.abs().max())

    def rank(group: Any) -> torch.Tensor:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        return prefill(mine, prompts())

    for logits in play(2, rank):
        check_close(logits, wanted)


@torch.no_grad()
def test_what_else_is_in_a_class() -> None:
    """Static methods, and an expansion that its forward does not use."""

    class Own(Attention):
        @staticmethod
        def doubled(hidden: torch.Tensor) -> torch.Tensor:
            return 2 * hidden

        def expand_kv(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> Any:
            raise AssertionError

        def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
            def expanded(kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                by_head = self.kv_b_proj(kv_c[:, 0]).unflatten(-1, (-1, 28)).transpose(1, 2)
                keys = torch.cat([by_head[..., :16], k_pe.expand(-1, by_head.shape[1], -1, -1)], -1)
                return keys, by_head[..., 16:]

            self.__dict__["expand_kv"] = expanded
            out = FORWARD(self, self.doubled(hidden_states), **options)
            del self.__dict__["expand_kv"]
            return out

    if not hasattr(Attention, "expand_kv"):
        pytest.skip("of a later transformers")
    model, plain = small("DeepseekV3"), stock_logits(small("DeepseekV3"), prompts())
    for layer in model.model.layers:
        layer.self_attn.__class__ = Own
        layer.input_layernorm.weight.mul_(0.7)
    wanted = stock_logits(model, prompts())
    assert float((wanted - plain).abs().max()) > 1e-2 * float(wanted.abs().max())

    def rank(group: Any) -> torch.Tensor:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        return prefill(mine, prompts())

    for logits in play(2, rank):
        check_close(logits, wanted)


@pytest.mark.parametrize("what", ["layers", "attention", "body"])
@torch.no_grad()
def test_modules_that_are_compiled(what: str) -> None:
    """Before PCP is enabled: torch.compile returns a module around each. What is inside is put under PCP, and put back."""
    model = small("DeepseekV3", first_k_dense_replace=2)  # the first transformers' experts cannot be compiled
    wanted = stock_logits(model, prompts([9]))
    body, compiled = model.model, lambda module: torch.compile(module, backend="eager")
    attentions = [layer.self_attn for layer in body.layers]
    if what == "body":
        model.model = compiled(body)
    for number, layer in enumerate(body.layers):
        if what == "layers":
            body.layers[number] = compiled(layer)
        elif what == "attention":
            layer.self_attn = compiled(layer.self_attn)
    enable_pcp(model)
    check_close(prefill(model, prompts([9])), wanted)
    disable_pcp(model)
    assert not any("forward" in attention.__dict__ for attention in attentions)
    check_close(stock_logits(model, prompts([9])), wanted)
