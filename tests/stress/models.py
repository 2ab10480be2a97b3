"""Small models without PCP, and what a sequence's logits are by them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from stress.compare import EPS32
from stress.families import DEVICE

VOCABULARY, LAYERS, HIDDEN = 40, 2, 48
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
MODELS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3 yarn": {"rope_parameters": YARN},
    "v3 halves": {"rope_interleave": False, "q_lora_rank": None},
    "v2": {"q_lora_rank": None},
    "v2 yarn": {"rope_parameters": YARN},
}


@functools.cache
def build(name: str) -> Any:
    """Weights so large that logits depend on what attention reads, and no experts: two that score alike would make any comparison
    a toss-up."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "first_k_dense_replace": LAYERS,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 20,
        "q_lora_rank": 28,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "initializer_range": 0.3,
        **MODELS[name],
    }
    torch.manual_seed(5)
    v2 = name.startswith("v2")
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**sizes)) if v2 else DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
    return model.eval().to(DEVICE)


class Stock:
    """The model's own logits of whole token lists, without a cache."""

    def __init__(self, name: str) -> None:
        self.model = build(name)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def logits(self, text: list[int]) -> torch.Tensor:
        key = tuple(text)
        if key not in self._known:
            self._known[key] = self.model(torch.tensor([text], device=DEVICE), use_cache=False).logits[0].cpu()
        return self._known[key]

    def check(self, name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Only the order of sums differs: 8 units of float32 for each root of the number of hidden states, of the largest logit."""
        assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)} is not {tuple(wanted.shape)}"
        difference = (got.cpu() - wanted).abs().max().item() if len(wanted) else 0.0
        assert difference <= tolerance(wanted), f"{name}: logits differ by {difference}, {tolerance(wanted):.2g} is allowed"


def tolerance(logits: torch.Tensor) -> float:
    return 8 * EPS32 * (LAYERS * HIDDEN) ** 0.5 * float(logits.abs().max()) if len(logits) else 0.0
