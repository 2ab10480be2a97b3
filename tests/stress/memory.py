"""Tensors somewhere in larger memory, whose surroundings must stay as they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

View = tuple[tuple[int, ...], int, int, int, int]


class Placed(NamedTuple):
    """A tensor, and the bytes that it lies in."""

    tensor: torch.Tensor
    buffer: torch.Tensor


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def size_of(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: str, view: View | None = None) -> Placed:
    """A tensor of these sizes full of 0xFF, which is NaN in every float type, between more of the same.

    ``view``: the order of the dimensions but the last in memory, which of the first one's rows are used (every n-th), elements
    before and behind each run of the last dimension, and elements in front of everything. None: contiguous.
    """
    order, step, before, after, offset = view or (tuple(range(len(shape) - 1)), 1, 0, 0, 0)
    stored = [shape[d] * (step if d == 0 else 1) for d in order] + [before + shape[-1] + after]
    item = size_of(dtype)
    buffer = torch.full(((offset + math.prod(stored)) * item,), 255, dtype=torch.uint8, device=device)
    whole = buffer[offset * item :].view(dtype).view(stored)
    tensor = whole.permute(*[order.index(d) for d in range(len(order))], len(order))[..., before : before + shape[-1]]
    return Placed(tensor[::step], buffer)


def put(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy bit for bit, also what torch has no copy for."""
    if tensor.numel():
        tensor.view(words(tensor)).copy_(values.view(words(values)))


def words(tensor: torch.Tensor) -> torch.dtype:
    """Integers as wide as the tensor's elements, for which a view never has other strides."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def place(values: torch.Tensor, view: View | None, device: str) -> torch.Tensor:
    """The values in memory as ``view`` says, NaN around them."""
    tensor = blank(tuple(values.shape), values.dtype, device, view).tensor
    put(tensor, values.to(device))
    return tensor


def place_lse(values: torch.Tensor, view: View | None, transposed: bool, device: str) -> torch.Tensor:
    """An LSE [T, H], in memory also as FlashAttention's [H, T]."""
    return place(values.T, view, device).T if transposed else place(values, view, device)


def outside_untouched(placed: Placed) -> bool:
    """Whether all bytes of a :func:`blank` but the tensor's own are what they were."""
    copy = placed.buffer.clone()
    inside = copy.view(torch.uint8)[placed.tensor.storage_offset() * placed.tensor.element_size() :]
    if placed.tensor.numel():
        item = placed.tensor.element_size()
        sizes, strides = (*placed.tensor.shape, item), (*(s * item for s in placed.tensor.stride()), 1)
        inside.as_strided(sizes, strides, inside.storage_offset()).fill_(255)
    return bool((copy == 255).all())


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """On the CPU: any bits, NaN patterns and infinities among them, for ops that only copy."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    return torch.randint(0, 256, (count * size_of(dtype),), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """On the CPU: normally distributed, rounded to ``dtype``."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers, on the CPU."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    put(plain, tensor)
    return plain.view(words(plain)).cpu()
