"""Checks of a single tensor that ops of all kinds have in common, with one wording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, x: Any, shape: Sequence[int | None], words: str, device: torch.device | None) -> None:
    """Raise unless ``x`` is a tensor of this shape, None for any size, on the device if given."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != len(shape):
        raise ValueError(f"{op}: {name} must have {len(shape)} dimensions {words}, got {x.dim()}: {tuple(x.shape)}")
    if any(wanted is not None and size != wanted for size, wanted in zip(x.shape, shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} must have shape {words} = ({wanted}), got {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, as the tensors before it, got {x.device}")


def check_last_dim(op: str, name: str, x: torch.Tensor) -> None:
    """Raise unless neighbours in the last dimension are neighbours in memory."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{op}: {name} must have a contiguous last dimension, got strides {x.stride()}")


def check_no_gradients(op: str, name: str, x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: {name} must not require gradients, there is no backward: call under torch.no_grad()")


def check_not_expanded(op: str, name: str, x: torch.Tensor) -> None:
    """Raise unless what is written has a place of its own for each element."""
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{op}: {name} must not be expanded, got strides {x.stride()} for {tuple(x.shape)}")


def check_list(
    op: str, name: str, x: Any, shape: Sequence[int | None], words: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless ``x`` is a contiguous tensor of these integers."""
    check_tensor(op, name, x, shape, words, device)
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype_name(dtype)}, got {dtype_name(x.dtype)}")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {x.stride()}")
