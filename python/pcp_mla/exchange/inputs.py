"""What exchanges of latents and of heads check, whichever way these go."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_count, check_last_dim, check_no_gradients
from ..groups import Group, check_group
from ..plan.metadata import PCPMetadata, check_meta


def check_form(op: str, max_tokens: Any, dims: Any, dtype: Any) -> None:
    """Raise ValueError or TypeError unless an exchange can be made for such a layer."""
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


def check_step(op: str, group: Group, meta: Any, max_tokens: int) -> None:
    """Raise ValueError or TypeError unless ``meta`` is a step of this rank that the exchange has room for."""
    check_meta(op, meta)
    check_group(op, group, meta)
    check_room(op, meta, max_tokens)


def check_heads(
    op: str, name: str, x: Any, counts: tuple[int, ...], form: tuple[int, int], dtype: torch.dtype, meta: PCPMetadata
) -> None:
    """Raise ValueError or TypeError unless ``x`` is [tokens, *form] of one of these numbers of tokens, the first of which is the
    step's, for an exchange of this dtype; NotImplementedError if it requires gradients."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must have 3 dimensions [tokens, heads, width], got {x.dim()}")
    if x.shape[0] not in counts:
        raise ValueError(f"{op}: {name} must have {counts[0]} rows, as the step that meta describes, got {x.shape[0]}")
    if x.shape[1:] != form:
        wanted = f"{form[0]} heads of width {form[1]}"
        raise ValueError(f"{op}: {name} must have {wanted}, got {x.shape[1]} of width {x.shape[2]}")
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, as the exchange, got {x.dtype}")
    if x.device != meta.device:
        raise ValueError(f"{op}: {name} must be on {meta.device}, as meta, got {x.device}")
    check_last_dim(op, name, x)
    check_no_gradients(op, name, x)
