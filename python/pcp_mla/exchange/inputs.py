"""What exchanges of latents check, whichever way these go."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_count, check_last_dim
from ..plan.metadata import PCPMetadata


def check_form(op: str, max_tokens: Any, dims: Any, dtype: Any) -> None:
    """Raise ValueError or TypeError unless an exchange can be made for such latents."""
    check_count(op, "max_tokens", max_tokens)
    if not hasattr(dims, "latent_dim"):
        raise TypeError(f"{op}: dims must be MLADims, got {type(dims).__name__}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype, got {type(dtype).__name__}")


def check_room(op: str, meta: PCPMetadata, max_tokens: int) -> None:
    padded = meta.num_tokens_padded
    if padded > max_tokens:
        raise ValueError(f"{op}: meta must have at most {max_tokens} tokens a rank (max_tokens), got {padded}")


def check_kind(op: str, kv_c: torch.Tensor, k_pe: torch.Tensor, widths: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError unless latents that are a step's are the exchange's, too: of its widths, kv_lora_rank and
    rope, and its dtype."""
    if (kv_c.shape[1], k_pe.shape[1]) != widths:
        wanted = f"{widths[0]} and {widths[1]} wide"
        raise ValueError(f"{op}: kv_c and k_pe must be {wanted}, got {kv_c.shape[1]} and {k_pe.shape[1]}")
    if kv_c.dtype != dtype:
        raise TypeError(f"{op}: kv_c must be {dtype}, as the exchange, got {kv_c.dtype}")
    check_last_dim(op, "kv_c", kv_c)
    check_last_dim(op, "k_pe", k_pe)
