"""Row-table lookups and row copies shared by the Triton kernels; the same maths as csrc/row_table.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 8  # rows of a program
LIMIT = 2**31 - 2**16  # of what kernels count in 32 bits; a program's tile goes on behind the last row

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def copy_view(x: torch.Tensor) -> torch.Tensor:
    """Bytes are bytes: types that Triton has not on every GPU (fp8, complex) are copied as integers."""
    return x if x.dtype in _FLOATS else x.view(_INTEGERS[x.element_size()])


def copy_shape(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """heads, dim and block width to copy rows of ``tensors`` with; heads count as one where no tensor has gaps between them."""
    heads, dim = tensors[0].shape[1:]
    if all(x.stride(1) == dim for x in tensors):
        heads, dim = 1, heads * dim
    return heads, dim, min(1024, triton.next_power_of_2(dim))


def check_counts(op: str, **counts: int) -> None:
    """Raise ValueError unless these fit the kernel's 32-bit numbers; all offsets in memory have 64."""
    for name, count in counts.items():
        if count >= LIMIT:
            raise ValueError(f"{op}: {name.replace('_', ' ')} of a Triton launch must be less than {LIMIT}, got {count}")


@triton.jit
def place_query(table, requests, steps, t):
    """Row of local token t among the heads or among the tails; -1 in the other."""
    columns = requests + 1
    low = tl.zeros_like(t)
    high = low + requests
    for _ in range(steps):  # the last request that starts at or before t
        middle = (low + high) // 2
        before = tl.load(table + middle) + tl.load(table + columns + middle) <= t
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    head = tl.load(table + low)
    tail = tl.load(table + columns + low)
    in_head = tl.load(table + low + 1) - head
    offset = t - head - tail
    is_head = offset < in_head
    return tl.where(is_head, head + offset, -1), tl.where(is_head, -1, tail + offset - in_head)


@triton.jit
def place_key(table, requests, steps, n):
    """Row of key n among the heads' and among the tails' keys; -1 where one does not attend to it."""
    columns = requests + 1
    k_head = table + 2 * columns
    k_tail = table + 3 * columns
    starts = table + 4 * columns
    low = tl.zeros_like(n)
    high = low + requests
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= n
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    offset = n - tl.load(starts + low)
    head = tl.load(k_head + low)
    tail = tl.load(k_tail + low)
    in_head = offset < tl.load(k_head + low + 1) - head
    in_tail = offset < tl.load(k_tail + low + 1) - tail
    return tl.where(in_head, head + offset, -1), tl.where(in_tail, tail + offset, -1)
