"""Checks of a single tensor that ops of all kinds have in common, with one wording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
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


def check_count(op: str, name: str, x: Any, least: int = 0) -> None:
    """Raise unless ``x`` is an int of at least ``least``."""
    if not isinstance(x, Integral) or isinstance(x, bool):
        raise TypeError(f"{op}: {name} must be an int, got {x!r}")
    if x < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {x}")


def check_no_gradients(op: str, name: str, x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: {name} must not require gradients, there is no backward: call under torch.no_grad()")


def check_not_expanded(op: str, name: str, x: torch.Tensor) -> None:
    """Raise unless what is written has a place of its own for each element."""
    strides = x.stride()
    if 0 in strides and x.numel() and any(size > 1 and stride == 0 for size, stride in zip(x.shape, strides, strict=True)):
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


def check_output(op: str, name: str, x: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless ``x`` can be written as it is: this shape, dtype and device, contiguous."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must have dtype {dtype_name(dtype)}, got {dtype_name(x.dtype)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {x.stride()}")
    check_no_gradients(op, name, x)


def _meet(x: list[tuple[int, int]], x_run: int, y: list[tuple[int, int]], y_run: int, apart: int) -> bool:
    """Whether runs of bytes, repeated as (stride, size) say, largest stride first, meet where y's begin ``apart`` behind x's."""

    def extent(repeats: list[tuple[int, int]], run: int) -> int:
        return run + sum((size - 1) * stride for stride, size in repeats)

    if apart >= extent(x, x_run) or -apart >= extent(y, y_run):
        return False
    if not x and not y:
        return True
    step = max(repeats[0][0] for repeats in (x, y) if repeats)
    before = behind = 0
    if x and x[0][0] == step:
        before, x = x[0][1] - 1, x[1:]
    if y and y[0][0] == step:
        behind, y = y[0][1] - 1, y[1:]
    # Repetitions whose difference is n are apart + n * step: only these n can meet.
    first = max(-before, (-extent(y, y_run) - apart) // step + 1)
    last = min(behind, (extent(x, x_run) - apart - 1) // step)
    if last - first >= 4:  # distances of many kinds: not worth a closer look
        return True
    return any(_meet(x, x_run, y, y_run, apart + n * step) for n in range(first, last + 1))


def _repeats(x: torch.Tensor) -> list[tuple[int, int]]:
    pairs = zip(x.stride(), x.shape, strict=True)
    return sorted(((stride * x.element_size(), size) for stride, size in pairs if size > 1 and stride > 0), reverse=True)


def _bytes(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last; (0, 0) where there is no memory."""
    try:
        begin = x.data_ptr()
    except RuntimeError:  # a tensor that only stands for one
        return 0, 0
    if begin == 0 or x.is_contiguous():
        return begin, begin + (x.nbytes if begin else 0)
    last = sum([(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)])
    return begin, begin + (last + 1) * x.element_size()


def _reach(x: tuple[int, int], y: tuple[int, int]) -> bool:
    return x[0] < y[1] and y[0] < x[1] and x[0] < x[1] and y[0] < y[1]


def share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the two have bytes in common, by their addresses. Exact for slices of one buffer that lie at equal or nested
    distances (K and V of one projection, kv_c and k_pe of one row); of others that reach into one another, yes. As
    csrc/overlap.h."""
    places = _bytes(x), _bytes(y)
    if not _reach(*places):
        return False
    apart, strides, item = places[1][0] - places[0][0], x.stride(), x.element_size()
    if len(strides) > 1 and strides == y.stride() and item == y.element_size() and strides[-1] == 1 and apart % item == 0:
        # The usual case at once: columns of one buffer, each within a row.
        row = max(strides[-2], 1)
        column = apart // item % row
        if x.shape[-1] <= column <= row - y.shape[-1] and all(stride % row == 0 for stride in strides[:-1]):
            return False
    return _meet(_repeats(x), item, _repeats(y), y.element_size(), apart)


def is_same_tensor(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether each element of the one is that of the other, in the same place."""
    if x.dtype != y.dtype or x.shape != y.shape or x.data_ptr() != y.data_ptr():
        return False
    return all(size <= 1 or a == b for size, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))


def check_apart(op: str, name: str, written: Any, others: Mapping[str, Any], may_be: Mapping[str, Any] | None = None) -> None:
    """Raise unless ``written`` shares no memory with the ``others``, and none with those of ``may_be`` unless it is that tensor.
    What is no tensor is passed over."""
    if not isinstance(written, torch.Tensor) or torch.compiler.is_compiling():  # under a compiler tensors have no addresses
        return
    place = _bytes(written)
    for other_name, other in {**others, **(may_be or {})}.items():
        if not isinstance(other, torch.Tensor) or not _reach(place, _bytes(other)) or not share_memory(written, other):
            continue
        in_place = may_be is not None and other_name in may_be
        if in_place and is_same_tensor(written, other):
            continue
        unless = f" unless it is {other_name} itself" if in_place else ""
        distance = written.data_ptr() - other.data_ptr()
        raise ValueError(f"{op}: {name} must not share memory with {other_name}{unless}, got addresses {distance:+d} bytes apart")
