"""What the attention of transformers' DeepSeek-V2 and V3 models computes before the attention itself: q and latents of a token."""

from __future__ import annotations

import copy
from typing import Any

import torch

try:
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
except ImportError as error:
    raise ImportError(f'transformers 5 with DeepSeek-V2 and V3 is needed: pip install "pcp-mla[demo]" ({error})') from error

from ..pipeline import MLADims

_SUPPORTED = (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM)
# These change the frequencies with the longest position in the input, which differs from rank to rank.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def check_model(op: str, model: Any) -> None:
    """Raise TypeError unless ``model`` is one of the supported classes."""
    if not isinstance(model, _SUPPORTED):
        names = " or ".join(c.__name__ for c in _SUPPORTED)
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


def copy_sharing_weights(model: torch.nn.Module) -> Any:
    """A copy of the module tree over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _rotate(attention: Any, q_pe: torch.Tensor, k_pe: torch.Tensor, embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own rope on [1, heads, T, rope] and [1, 1, T, rope]."""
    if isinstance(attention, v2.DeepseekV2Attention):
        return v2.apply_rotary_emb(q_pe, k_pe, embeddings)
    apply = v3.apply_rotary_pos_emb_interleave if attention.config.rope_interleave else v3.apply_rotary_pos_emb
    return apply(q_pe, k_pe, *embeddings)


def project_inputs(
    attention: Any, hidden_states: torch.Tensor, embeddings: Any, dims: MLADims
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, T, hidden] to q [T, heads, nope + rope], kv_c [T, kv_lora_rank] normed, k_pe [T, rope], by the module's own weights."""
    tokens = hidden_states.shape[1]
    if attention.q_lora_rank is None:
        q = attention.q_proj(hidden_states)
    else:
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))
    q = q.view(1, tokens, dims.num_heads, dims.qk_head_dim).transpose(1, 2)
    q_nope, q_pe = q.split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], dim=-1)
    kv_c, k_pe = attention.kv_a_proj_with_mqa(hidden_states).split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
    q_pe, k_pe = _rotate(attention, q_pe, k_pe[:, None], embeddings)
    q = torch.cat([q_nope, q_pe], dim=-1)[0].transpose(0, 1)
    return q, attention.kv_a_layernorm(kv_c)[0], k_pe[0, 0]
