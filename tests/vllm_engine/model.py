"""A tiny DeepSeek-V2 with seeded random weights, whose tokens hang on every key that attention sees."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HEADS, NOPE, ROPE, V, RANK = 4, 64, 64, 64, 512  # vLLM's decode on a CPU knows latents of 512 and 64 alone
HIDDEN, MLP, LAYERS, VOCABULARY = 192, 192, 2, 512
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "q_lora_rank": None,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": V,
    "first_k_dense_replace": LAYERS,  # no experts: they have nothing to do with what is tested
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": MLP,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    # DeepSeek's own, which vLLM computes in torch on a CPU; its kernel there for plain RoPE goes wrong on MLA's strided queries
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_model(folder: Path) -> Path:
    """Queries and keys are twice as large as at an even start, so that a query sees few keys clearly, and attention outweighs the
    embedding that it is added to."""
    generator = torch.Generator().manual_seed(16)

    def random(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)

    weights = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN, 3.0),
    }
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        weights |= {
            layer + "input_layernorm.weight": torch.ones(HIDDEN),
            layer + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            layer + "self_attn.q_proj.weight": random(HEADS * (NOPE + ROPE), HIDDEN, 2.0),
            layer + "self_attn.kv_a_proj_with_mqa.weight": random(RANK + ROPE, HIDDEN, 2.0),
            layer + "self_attn.kv_a_layernorm.weight": torch.ones(RANK),
            layer + "self_attn.kv_b_proj.weight": random(HEADS * (NOPE + V), RANK, 2.0),
            layer + "self_attn.o_proj.weight": random(HIDDEN, HEADS * V, 2.0),
            layer + "mlp.gate_proj.weight": random(MLP, HIDDEN),
            layer + "mlp.up_proj.weight": random(MLP, HIDDEN),
            layer + "mlp.down_proj.weight": random(HIDDEN, MLP),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
