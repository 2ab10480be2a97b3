"""K of all heads from its two parts."""

from __future__ import annotations

import torch

from ..checks import check_apart, check_tensor, dtype_name
from .checks import check_input, check_out
from .registry import ALL_NATIVE, direct, fake_in_place, register, select

_op = register("concat_k", fake_in_place)


def _concat(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor) -> None:
    calls = direct()
    if calls is None or not calls.concat_k(k_nope, k_pe, out):
        _op(k_nope, k_pe, out)


def concat_row(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """:func:`concat_k` of one head, [N, nope] and [N, rope] into [N, nope + rope], for arguments that are known to fit."""
    calls = direct()
    if calls is None or not calls.concat_k(left, right, out):
        _op(left.unsqueeze(1), right, out.unsqueeze(1))


def concat_k(k_nope: torch.Tensor, k_pe: torch.Tensor, *, out: torch.Tensor | None = None, backend: str = "auto") -> torch.Tensor:
    """K from its two parts in one launch, for engines whose ``kv_b_proj`` is a module of its own (quantised, say).

    Args:
        k_nope: [N, H, nope], any strides with a contiguous last dimension: a slice of the projection's output as it is.
        k_pe: [N, rope] or [N, 1, rope] rotated keys that all heads share.
        out: [N, H, nope + rope] to write and return, any strides with a contiguous last dimension. It must share no
            memory with the inputs.
        backend: as :func:`pcp_fused_gather`.

    One dtype for all, of at most 8 bytes: nothing is computed.

    Returns:
        [N, H, nope + rope].

    Raises:
        ValueError, TypeError: an argument does not fit the others; before anything is written.
        NotImplementedError: a tensor requires gradients.
        RuntimeError: the named backend is not available.
    """
    op = "concat_k"
    check_tensor(op, "k_nope", k_nope, (None, None, None), "[tokens, heads, nope]", None)
    if isinstance(k_pe, torch.Tensor) and k_pe.dim() == 3 and k_pe.shape[1] == 1:
        k_pe = k_pe[:, 0]
    check_tensor(op, "k_pe", k_pe, (len(k_nope), None), "[tokens, rope]", k_nope.device)
    shape = (k_nope.shape[1], k_nope.shape[2] + k_pe.shape[1])
    if 0 in (*k_nope.shape[1:], k_pe.shape[1]):
        raise ValueError(f"{op}: k_nope and k_pe must have heads and widths of at least 1, got {shape}")
    if k_pe.dtype != k_nope.dtype:
        raise TypeError(f"{op}: k_pe must be {dtype_name(k_nope.dtype)} as k_nope, got {dtype_name(k_pe.dtype)}")
    if k_nope.element_size() > 8:
        raise TypeError(f"{op}: k_nope must have a dtype of at most 8 bytes, got {dtype_name(k_nope.dtype)}")
    check_input(op, "k_nope", k_nope)
    check_input(op, "k_pe", k_pe)
    if out is None:
        out = k_nope.new_empty(len(k_nope), *shape)
    else:
        check_out(op, "out", out, len(k_nope), shape, k_nope)
        if len(out) != len(k_nope):
            raise ValueError(f"{op}: out must have {len(k_nope)} rows, got {len(out)}")
    others = {"k_nope": k_nope, "k_pe": k_pe}
    if backend != "auto" or not ALL_NATIVE:
        check_apart(op, "out", out, others)
    call = _concat if backend == "auto" else select(op, backend, k_nope.device.type)
    try:
        call(k_nope, k_pe, out)
    except RuntimeError:
        check_apart(op, "out", out, others)
        raise
    return out
