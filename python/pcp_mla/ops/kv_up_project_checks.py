"""What can be known of a kv_b_proj module before a step's collective and its cache write: tried once, and remembered."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from ..checks import check_last_dim, check_tensor, dtype_name
from ..plan.dims import MLADims

_Tried = tuple[int, int, torch.dtype, torch.device]
_tried: WeakKeyDictionary[torch.nn.Module, _Tried] = WeakKeyDictionary()


def check_expanded(op: str, name: str, expanded: object, rows: int, dims: MLADims, latents: torch.Tensor) -> torch.Tensor:
    """The module's result, where engines return a bias beside it. Raises unless it is [rows, heads * (nope + v)] as the latents."""
    result = expanded[0] if isinstance(expanded, tuple) and expanded else expanded
    check_tensor(op, name, result, (rows, dims.num_heads * dims.expanded_dim), "[rows, heads * (nope + v)]", latents.device)
    assert isinstance(result, torch.Tensor)
    if result.dtype != latents.dtype:
        raise TypeError(f"{op}: {name} must be {dtype_name(latents.dtype)} as the latents, got {dtype_name(result.dtype)}")
    check_last_dim(op, name, result)
    return result


def check_projection(op: str, module: torch.nn.Module, dims: MLADims, kv_c: torch.Tensor) -> None:
    """Raise ValueError or TypeError unless the module makes K and V of ``dims`` from such latents: its result for one row of zeros
    is looked at, when the module is seen first. Not under a compiler, which sees the shapes itself."""
    if torch.compiler.is_compiling():
        return
    kind = (dims.kv_lora_rank, dims.num_heads * dims.expanded_dim, kv_c.dtype, kv_c.device)
    if _tried.get(module) == kind:
        return
    features = getattr(module, "in_features", dims.kv_lora_rank)
    if features != dims.kv_lora_rank:
        raise ValueError(f"{op}: kv_b_proj must take kv_lora_rank = {dims.kv_lora_rank} numbers, got in_features {features}")
    row = kv_c.new_zeros(1, dims.kv_lora_rank)
    try:
        expanded = module(row)
    except Exception as error:
        raise ValueError(
            f"{op}: kv_b_proj must take any number of rows, got {type(error).__name__} for one of zeros: {error}"
        ) from error
    check_expanded(op, "kv_b_proj's result", expanded, 1, dims, row)
    _tried[module] = kind
