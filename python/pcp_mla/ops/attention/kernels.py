"""Our own implementations of attention over rows, and which of them a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import reference
from ..registry import HAS_TRITON, direct, fake_in_place, register_composed, triton_form
from . import support


def _on_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pe: Any, kv_rows: Any, *rest: Any) -> None:
    """The CUDA kernel if it takes these tensors, else Triton's."""
    name = support.choose("auto", q.device, q.dtype, q.shape[2], v.shape[2], kv_rows is not None)
    kernel(name)(q, k, v, k_pe, kv_rows, *rest)


_attention = register_composed("attention", fake_in_place, cpu=reference.attention, cuda=_on_cuda)
_wgmma = torch.ops.pcp_mla.attention_wgmma.default


def by_wgmma(*args: Any) -> None:
    """The CUDA kernel, or in its place another of our own for tensors that it does not reach; arguments as of the op."""
    calls = direct()
    if calls is not None and calls.attention(*args):  # which looks by itself, and does nothing where it refuses
        return
    q, k, v, k_pe, *_, prev_out, _, _, _, out, _ = args
    reached = not support.out_of_reach(q, k, v, k_pe, out, prev_out)
    (_wgmma if reached else kernel("triton" if HAS_TRITON else "torch"))(*args)


def kernel(name: str) -> Callable[..., None]:
    """Our own implementation: the op under a compiler, else past the dispatcher, which costs more than the launch."""
    if torch.compiler.is_compiling():
        return _attention
    if name == "cuda":
        return by_wgmma
    return triton_form("attention") if name == "triton" else reference.attention
