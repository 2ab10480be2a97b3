"""Every class of transformers with dense MLA gives under PCP what it gives without, and what PCP cannot take is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers

from pcp_mla.integrations.transformers import copy_sharing_weights, enable_pcp, generate, prefill
from pcp_mla.testing.played import play
from test_integration_transformers import (
    check_chunked_then_shared,
    check_close,
    chunked_then_shared,
    prompts,
    stock_logits,
    stock_text,
)

# Positions of more than 8, of 50: queries are scaled by their position.
LLAMA_4 = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
CLASSES: dict[str, dict[str, Any]] = {
    "DeepseekV2": {},
    "DeepseekV3": {},
    "Glm4MoeLite": {},
    "Youtu": {},
    "Mistral4": {"rope_parameters": LLAMA_4, "max_position_embeddings": 32},
    "AXK1": {},
    "MiniCPM3": {"dim_model_base": 20},
}
HERE = [name for name in CLASSES if hasattr(transformers, f"{name}ForCausalLM")]  # the first transformers 5 have three of them
# Heads and widths: nope, rope, v.
GEOMETRIES = {
    "5 x (16, 8, 12)": (5, 16, 8, 12),
    "20 x (192, 64, 256)": (20, 192, 64, 256),
    "12 x (64, 32, 64)": (12, 64, 32, 64),
}


def small(name: str, heads: int = 5, nope: int = 16, rope: int = 8, v: int = 12, **changes: Any) -> Any:
    widths = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": v, "kv_lora_rank": 20, "q_lora_rank": 28}
    common: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 60,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(3)
    given = copy.deepcopy(common | widths | CLASSES.get(name, {}) | changes)  # configurations fill in what they are given
    config = getattr(transformers, f"{name}Config")(**given)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", HERE)
def test_logits_in_chunks_and_behind_shared_prefixes(name: str, geometry: tuple[int, ...], world_size: int) -> None:
    model = small(name, *geometry)
    for logits in play(world_size, lambda group: chunked_then_shared(copy_sharing_weights(model), group)):
        check_chunked_then_shared(model, logits)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.skipif("Mistral4" not in HERE, reason="of a later transformers")
def test_a_class_that_can_do_without_rope(world_size: int) -> None:
    model = small("Mistral4", 5, 256, 0, 256)
    for logits in play(world_size, lambda group: chunked_then_shared(copy_sharing_weights(model), group)):
        check_chunked_then_shared(model, logits)


@pytest.mark.parametrize("name", HERE)
@torch.no_grad()
def test_texts_and_calls_of_the_model(name: str) -> None:
    """Of a padded batch, where positions count pads, and greedily."""
    model, requests = small(name), prompts([13, 6])
    ids = torch.tensor([requests[0], [0] * 7 + requests[1]])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    wanted = model(ids, attention_mask=mask).logits[mask.bool()]
    texts = [stock_text(model, prompt, 6) for prompt in requests]

    def rank(group: Any) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        rows = prefill(mine, requests, chunk_tokens=8, logits="last")
        return mine(ids, attention_mask=mask).logits[mask.bool()], rows, generate(mine, requests, 6)

    for logits, last, got in play(2, rank):
        check_close(logits, wanted)
        check_close(last, stock_logits(model, requests)[[12, 18]])
        assert got == texts


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("Mistral4", {"rope_parameters": LLAMA_4 | {"llama_4_scaling_beta": 0.0}}, id="queries by position"),
        pytest.param("MiniCPM3", {"dim_model_base": 60}, id="logits"),
    ],
)
def test_scales_of_a_class_count(name: str, change: dict[str, Any]) -> None:
    """Else that they are equal says nothing of them."""
    if name not in HERE:
        pytest.skip("of a later transformers")
    ours, other = (stock_logits(small(name, **changes), prompts([30])) for changes in ({}, change))
    assert float((ours - other).abs().max()) > 1e-2 * float(ours.abs().max())


# What is refused.


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


SPARSE = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
OTHERS = {
    "DeepseekV32": (SPARSE, "layer_types must be full_attention in all layers, got "),
    "LongcatFlash": ({"num_layers": 1, "zero_expert_num": 1}, "got a LongcatFlashForCausalLM with a ModuleList in layer 0"),
}


@pytest.mark.parametrize("name", [name for name in OTHERS if hasattr(transformers, f"{name}ForCausalLM")])
def test_classes_that_are_not_dense_mla(name: str) -> None:
    changes, message = OTHERS[name]
    assert message in refusal(small(name, **changes))
