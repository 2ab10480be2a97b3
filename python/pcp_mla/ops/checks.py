"""Checks of arguments that several ops share; those of one op stand with it, those of any tensor in ``pcp_mla.checks``.

The native ops check their tensors too, in C++, where it costs next to nothing, but can only raise RuntimeError. So a call to a
native op runs the checks here only when it was refused, to say why with the documented type; all other implementations run them
first.
"""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_last_dim, check_no_gradients, check_not_expanded, check_tensor, dtype_name
from ..plan.metadata import PCPMetadata

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels compute with


def check_ragged(op: str, name: str, x: Any, meta: PCPMetadata, dtype: torch.dtype | None) -> None:
    """Raise unless ``x`` is [tokens, heads, dim] as kernels take it, of ``dtype`` if given."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must have 3 dimensions [tokens, heads, dim], got {x.dim()}: {tuple(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{op}: {name} must have at least one head and a width of at least 1, got {tuple(x.shape)}")
    check_last_dim(op, name, x)
    if x.element_size() > 8:
        raise TypeError(f"{op}: {name} must have a dtype of at most 8 bytes, got {dtype_name(x.dtype)}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{op}: {name} must have dtype {dtype_name(dtype)} as the tensors before it, got {dtype_name(x.dtype)}")
    if x.device != meta.device:
        raise ValueError(f"{op}: {name} must be on {meta.device}, where the metadata is, got {x.device}")
    check_no_gradients(op, name, x)


def check_input(op: str, name: str, x: torch.Tensor) -> None:
    """Raise unless ``x`` can be read as it is."""
    check_last_dim(op, name, x)
    check_no_gradients(op, name, x)


def check_scaled(op: str, name: str, x: torch.Tensor, scale: Any) -> None:
    """Raise unless ``x`` is float8_e4m3fn, and ``scale`` one float32 beside it."""
    check_tensor(op, "scale", scale.reshape(-1) if isinstance(scale, torch.Tensor) else scale, (1,), "[1]", x.device)
    if scale.dtype != torch.float32:
        raise TypeError(f"{op}: scale must be float32, got {dtype_name(scale.dtype)}")
    check_no_gradients(op, "scale", scale)
    if x.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{op}: {name} must be float8_e4m3fn with a scale, got {dtype_name(x.dtype)}")


def check_out(
    op: str, name: str, out: Any, rows: int, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise unless ``out`` [rows or more, heads, dim] or [rows or more, dim] can be written as it is, in the dtype given or that
    of ``like``."""
    check_tensor(op, name, out, (None, *shape), "[rows, heads, dim]" if len(shape) == 2 else "[rows, dim]", like.device)
    if out.shape[0] < rows:
        raise ValueError(f"{op}: {name} must have at least {rows} rows, got {out.shape[0]}")
    if out.dtype != (dtype or like.dtype):
        raise TypeError(f"{op}: {name} must be {dtype_name(dtype or like.dtype)}, got {dtype_name(out.dtype)}")
    check_input(op, name, out)
    check_not_expanded(op, name, out)
