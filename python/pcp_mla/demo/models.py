"""The demo's models: transformers' own classes, published shapes cut in depth, seeded random weights, a vocabulary of bytes."""

from __future__ import annotations

import copy
from typing import Any

import torch

VOCABULARY = 256  # one token a byte
MODELS = ("tiny", "v2-lite", "v3")

# The tiny model in each class of transformers with dense MLA.
TINY = {
    "tiny": "DeepseekV3",
    "tiny-v2": "DeepseekV2",
    "tiny-glm": "Glm4MoeLite",
    "tiny-youtu": "Youtu",
    "tiny-axk1": "AXK1",
    "tiny-mistral4": "Mistral4",
    "tiny-minicpm3": "MiniCPM3",
}
NAMES = tuple(dict.fromkeys((*MODELS, *TINY)))

# Small widths. Value heads are narrower than query heads, as in the real models.
_TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
# DeepSeek-V2-Lite with 3 of its 27 layers.
_V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "max_position_embeddings": 163840,
}
# DeepSeek-V3 with 2 of its 61 layers and 8 of its 256 experts.
_V3: dict[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 163840,
}
# As published: V2-Lite has 0.707 for both mscale values, V3 has 1.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
# What a class does besides must be seen: queries scaled by their position from the 257th on, logits that are halved.
_OF_CLASS: dict[str, dict[str, Any]] = {
    "tiny-mistral4": {
        "rope_parameters": _YARN
        | {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 256, "llama_4_scaling_beta": 0.1}
    },
    "tiny-minicpm3": {"dim_model_base": 128},
}

# Scores [prompts, heads, tokens, tokens] that torch's SDPA may keep in memory: 1 GiB in float32.
_MAX_SCORES = 2**28

# Logits must depend on what attention reads, or a wrong order of the keys would hardly show: these gains make scores differ by a
# few units instead of nearly none, and what attention adds as large as the residual stream.
_QUERY_GAIN = 3.0
_OUTPUT_GAIN = 3.0


def make_config(name: str) -> Any:
    """Configuration of one of ``MODELS`` or ``TINY``; ImportError without transformers, or without the class."""
    import transformers

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if name in TINY:
        kind = f"{TINY[name]}Config"
        if not hasattr(transformers, kind):
            raise ImportError(f"demo: transformers must have a {kind} for {name}, got transformers {transformers.__version__}")
        return getattr(transformers, kind)(**copy.deepcopy(common | _TINY | _OF_CLASS.get(name, {})))
    if name == "v2-lite":
        return transformers.DeepseekV2Config(
            **common, **_V2_LITE, rope_parameters=_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
        )
    if name == "v3":
        return transformers.DeepseekV3Config(**common, **_V3, rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})
    raise ValueError(f"demo: model must be one of {', '.join(NAMES)}, got {name!r}")


def build_model(name: str) -> Any:
    """The model in float32 on the CPU, in eval mode, always with the same weights."""
    import transformers

    config = make_config(name)
    # Keeps the scale of what passes through a projection.
    config.initializer_range = config.hidden_size**-0.5
    kind = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1776)
        model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
        for layer in model.model.layers:
            attention = layer.self_attn
            (attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj).weight.mul_(_QUERY_GAIN)
            attention.o_proj.weight.mul_(_OUTPUT_GAIN)
    return model


def register_padded_attention() -> str:
    """The name of torch's SDPA, for transformers, over V padded with zeros to K's width, as transformers itself pads it for
    FlashAttention: torch's flash kernels take one width, and all scores are in memory without them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        padded = torch.nn.functional.pad(value, (0, query.shape[-1] - value.shape[-1]))
        out, weights = sdpa_attention_forward(module, query, key, padded, *rest, **options)
        return out[..., : value.shape[-1]], weights

    AttentionInterface.register("sdpa_padded", attend)
    AttentionMaskInterface.register("sdpa_padded", sdpa_mask)
    return "sdpa_padded"


def bound_memory(model: Any, tokens: int, prompts: int = 1) -> None:
    """Let the stock model read prompts of so many tokens on a CPU, padding V if torch would keep too many scores in memory."""
    if model.device.type == "cpu" and prompts * model.config.num_attention_heads * tokens**2 > _MAX_SCORES:
        model.set_attn_implementation(register_padded_attention())
