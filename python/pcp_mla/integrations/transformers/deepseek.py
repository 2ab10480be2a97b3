"""What transformers' models with DeepSeek's attention compute before the attention itself: q and latents of a token."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch

from ...plan.dims import MLADims
from .stock import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, v2, v3


def _rope_of_v3(modeling: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Of a model file that has DeepSeek-V3's attention line by line."""

    def rotate(attention: Any, q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        interleaved = attention.config.rope_interleave
        apply = modeling.apply_rotary_pos_emb_interleave if interleaved else modeling.apply_rotary_pos_emb
        return apply(q_pe, k_pe, *embeddings)

    return rotate


# Classes of models and of their attention, and the model's own rope on [1, heads, T, rope] and [1, 1, T, rope].
_MODELS: list[tuple[type, type, Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = [
    (DeepseekV2ForCausalLM, v2.DeepseekV2Attention, lambda _, *arguments: v2.apply_rotary_emb(*arguments)),
    (DeepseekV3ForCausalLM, v3.DeepseekV3Attention, _rope_of_v3(v3)),
]
with contextlib.suppress(ImportError):  # GLM-4.7-Flash; not in the first transformers 5
    from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm

    _MODELS.append((glm.Glm4MoeLiteForCausalLM, glm.Glm4MoeLiteAttention, _rope_of_v3(glm)))
_SUPPORTED = tuple(model for model, _, _ in _MODELS)
# These change the frequencies with the longest position in the input, which differs from rank to rank.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def check_model(op: str, model: Any) -> None:
    """Raise TypeError unless ``model`` is one of the supported classes."""
    if not isinstance(model, _SUPPORTED):
        *most, last = (c.__name__ for c in _SUPPORTED)
        names = f"{', '.join(most)} or {last}"
        raise TypeError(f"{op}: model must be a {names}, got {type(model).__name__}")


def model_dims(model: Any) -> MLADims:
    """Widths of the model's attention. NotImplementedError if its rope frequencies depend on the length of the input."""
    config = model.config
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise NotImplementedError(
            f"enable_pcp: rope_type must not be one of {', '.join(_LENGTH_DEPENDENT_ROPE)}, got {rope_type!r}"
        )
    return MLADims(
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    )


def model_place(model: Any) -> tuple[torch.dtype, torch.device]:
    """Where the model computes, and in which dtype. ValueError if its weights are on the meta device and nothing moves them."""
    embedding = model.model.embed_tokens
    dtype, device = embedding.weight.dtype, embedding.weight.device
    if device.type == "meta":  # offloaded: hooks move weights and inputs
        with torch.no_grad():
            embedded = embedding(torch.zeros(1, dtype=torch.int64))
        dtype, device = embedded.dtype, embedded.device
    if device.type == "meta":
        raise ValueError("enable_pcp: model must have weights, or hooks that bring them, got weights on the meta device")
    return dtype, device


def copy_sharing_weights(model: torch.nn.Module) -> Any:
    """A copy of the module tree over the same parameters and buffers. The copy of a model under PCP is not under PCP."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    context = model.__dict__.get("_pcp")
    memo[id(context)] = context
    other = copy.deepcopy(model, memo)
    if context is not None:
        del other.__dict__["_pcp"]
        for replaced in context.replaced:
            replaced.put_back_in_copy(memo)
    return other


def _rotate(attention: Any, q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rotate = next(rotate for _, kind, rotate in _MODELS if isinstance(attention, kind))
    return rotate(attention, q_pe, k_pe, embeddings)


def project_inputs(
    attention: Any, hidden_states: torch.Tensor, embeddings: Any, dims: MLADims
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, T, hidden] to q [T, heads, nope + rope], kv_c [T, kv_lora_rank] normed, k_pe [T, rope], by the module's own weights.

    As many heads as the module has: tensor parallelism leaves it some of those of the configuration.
    """
    tokens = hidden_states.shape[1]
    if attention.q_lora_rank is None:
        q = attention.q_proj(hidden_states)
    else:
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))
    q = q.view(1, tokens, -1, dims.qk_head_dim).transpose(1, 2)
    q_nope, q_pe = q.split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], dim=-1)
    kv_c, k_pe = attention.kv_a_proj_with_mqa(hidden_states).split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
    q_pe, k_pe = _rotate(attention, q_pe, k_pe[:, None], embeddings)
    q = torch.cat([q_nope, q_pe], dim=-1)[0].transpose(0, 1)
    return q, attention.kv_a_layernorm(kv_c)[0], k_pe[0, 0]
