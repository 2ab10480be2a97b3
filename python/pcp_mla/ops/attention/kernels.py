"""Our own implementations of attention over rows, and which of them a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import reference
from ..registry import HAS_TRITON, direct, fake_in_place, register_composed, triton_form
from . import support


def able(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    out: torch.Tensor,
    prev_out: torch.Tensor | None,
) -> str:
    """The backend, or in place of ``cuda`` another of our own for tensors that it does not reach."""
    if name == "cuda" and support.out_of_reach(q, k, v, k_pe, out, prev_out):
        return "triton" if HAS_TRITON else "torch"
    return name


def _on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    kv_rows: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor,
    prev_out: torch.Tensor | None,
    prev_lse: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """The CUDA kernel if it takes these tensors, else Triton's."""
    name = support.choose("auto", q.device, q.dtype, q.shape[2], v.shape[2], kv_rows is not None)
    name = able(name, q, k, v, k_pe, out, prev_out)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    kernel(name)(q, k, v, k_pe, kv_rows, *lengths, prev_out, prev_lse, softmax_scale, causal, out, lse)


_attention = register_composed("attention", fake_in_place, cpu=reference.attention, cuda=_on_cuda)
_wgmma = torch.ops.pcp_mla.attention_wgmma.default


def by_wgmma(*args: Any) -> None:
    calls = direct()
    if calls is None or not calls.attention(*args):
        _wgmma(*args)


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    v_width: int,
    listed: bool,
    longest: int = 0,
    apart: bool = False,
) -> str:
    """As :func:`support.choose`; under a compiler, where looking for libraries is nothing to compile, ``auto`` on a GPU is the op
    that chooses among our own kernels when it runs."""
    if not torch.compiler.is_compiling():
        return support.choose(backend, device, dtype, width, v_width, listed, longest, apart)
    if backend != "auto" and device.type == "cuda":
        raise NotImplementedError(f"pcp_attention: backend must be auto under torch.compile on a GPU, got {backend!r}")
    return "auto"


def kernel(name: str) -> Callable[..., None]:
    """Our own implementation: the op under a compiler, else past the dispatcher, which costs more than the launch."""
    if torch.compiler.is_compiling():
        return _attention
    if name == "cuda":
        return by_wgmma
    return triton_form("attention") if name == "triton" else reference.attention
