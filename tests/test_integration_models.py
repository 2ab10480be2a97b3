"""Every class of transformers with dense MLA gives under PCP what it gives without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers

from pcp_mla.integrations.transformers import copy_sharing_weights, decode, enable_pcp, generate, prefill
from pcp_mla.testing.played import play
from test_integration_modules import PROJECTIONS, offload
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


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", HERE)
@torch.no_grad()
def test_texts_and_calls_of_the_model(name: str, world_size: int) -> None:
    """Of a padded batch, where positions count pads, and greedily, by transformers' loop and by ours."""
    model, requests = small(name), prompts([13, 6])
    ids = torch.tensor([requests[0], [0] * 7 + requests[1]])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted, text = model(ids, attention_mask=mask).logits[mask.bool()], model.generate(ids, **options)
    texts = [stock_text(model, prompt, 6) for prompt in requests]
    assert len({token for each in texts for token in each}) > 2  # else equality says little

    def rank(group: Any) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], torch.Tensor]:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        rows = prefill(mine, requests, chunk_tokens=8, logits="last")
        logits = mine(ids, attention_mask=mask).logits[mask.bool()]
        return logits, rows, generate(mine, requests, 6), mine.generate(ids, **options)

    for logits, last, got, generated in play(world_size, rank):
        check_close(logits, wanted)
        check_close(last, stock_logits(model, requests)[[12, 18]])
        assert got == texts
        assert torch.equal(generated, text)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", HERE)
def test_shared_out_by_heads(name: str, world_size: int) -> None:
    model = small(name)

    def rank(group: Any) -> list[torch.Tensor]:
        mine = copy_sharing_weights(model)
        logits = chunked_then_shared(mine, group, split="heads")
        assert mine._pcp.split == "heads"
        return logits

    for logits in play(world_size, rank):
        check_chunked_then_shared(model, logits)


@pytest.mark.parametrize("change", ["weight of another class", "hook", "offloaded"])
@pytest.mark.parametrize("name", HERE)
@torch.no_grad()
def test_projections_that_are_more_than_their_weights(name: str, change: str) -> None:
    """Prefilled in two steps and decoded; not one weight of an offloaded model is there between calls."""
    model, prompt = small(name, tie_word_embeddings=False), prompts([13])[0]
    plain = stock_logits(model, [prompt])
    if change == "offloaded":
        for path, module in model.named_modules():
            # The first transformers read a router's weight without calling it.
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and not path.endswith("gate"):
                offload(module)
    else:
        for layer in model.model.layers:
            PROJECTIONS[change](layer.self_attn.kv_b_proj)
    wanted = stock_logits(model, [prompt])
    assert torch.equal(wanted, plain) == (change == "offloaded")

    def rank(group: Any) -> list[torch.Tensor]:
        mine = model if change == "offloaded" else copy_sharing_weights(model)
        enable_pcp(mine, group)
        return [prefill(mine, [prompt[:11]], chunk_tokens=8), decode(mine, [prompt[11]]), decode(mine, [prompt[12]])]

    for rows in play(1 if change == "offloaded" else 2, rank):  # ranks in one process would bring the same weights
        check_close(torch.cat(rows), wanted)


def prefill_of(model: Any, group: Any, requests: list[list[int]]) -> torch.Tensor:
    mine = copy_sharing_weights(model)
    enable_pcp(mine, group)
    return prefill(mine, requests, chunk_tokens=20)


@pytest.mark.parametrize("name", HERE)
def test_bfloat16(name: str) -> None:
    """As far from the model in float32 as the stock model is in bf16, or not much further. Without experts, whose choice rounding
    turns over."""
    dense = {"first_k_dense_replace": 2, "mlp_layer_types": ["dense", "dense"]}
    model, requests = small(name, 12, 64, 32, 64, **dense), prompts([43, 5])
    assert not any(hasattr(layer.mlp, "gate") for layer in model.model.layers)
    model.bfloat16()
    rounded = stock_logits(model, requests)
    ours = [prefill_of(model, None, requests), *play(2, lambda group: prefill_of(model, group, requests))]
    exact = stock_logits(model.float(), requests)
    error = (rounded - exact).square().mean().sqrt()
    assert 0 < error < 0.05 * exact.square().mean().sqrt()
    for logits in ours:
        assert logits.dtype == torch.bfloat16
        assert (logits - exact).square().mean().sqrt() < 1.25 * error


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
