"""pcp_fused_restore: check, call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checks import check_apart, check_no_gradients, dtype_name
from ..plan.metadata import PCPMetadata, check_meta
from ..reference.fused_restore import check_restored
from .checks import check_ragged
from .registry import ALL_NATIVE, fake_in_place, register, select


def _fused_restore_fake(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    row_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = out_head.shape[0] + out_tail.shape[0]
    lse_shape = (0,) if lse_head is None else (tokens, out_head.shape[1])
    return out_head.new_empty(tokens, *out_head.shape[1:]), out_head.new_empty(lse_shape, dtype=torch.float32)


_fused_restore = register("fused_restore", _fused_restore_fake)
_fused_restore_out = register("fused_restore_out", fake_in_place)


def pcp_fused_restore(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    meta: PCPMetadata,
    *,
    out: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put the outputs of two attention calls back in local order, with their LSEs: one launch. The way back of
    :func:`pcp_fused_gather`; equal to ``torch.cat([out_head, out_tail])[meta.output_restore_idx]``.

    Args:
        out_head: [num_head_tokens, H, Dv], any row and head strides with a contiguous last dimension.
        out_tail: [num_tail_tokens, H, Dv], the same dtype.
        lse_head, lse_tail: float32 [num_head_tokens, H] and [num_tail_tokens, H], any strides (FlashAttention's [H, tokens] is
            passed as ``lse.T``), or both None.
        out: tensors to write and return, out and lse (None without LSEs), contiguous; they must share no memory with the inputs,
            the metadata or each other.
        meta, backend: as for :func:`pcp_fused_gather`. Dtypes of the outputs likewise.

    Returns:
        out [T, H, Dv] and lse [T, H], both contiguous; lse is None if none was given. With the metadata of a padded plan,
        [Np, ...]: rows from T on are undefined.

    Raises:
        ValueError, TypeError: an argument does not fit the metadata or the others; before any launch.
        NotImplementedError: an input or an output requires gradients.
        RuntimeError: the named backend is not available.
    """
    if out is not None and (not isinstance(out, tuple) or len(out) != 2 or (lse_head is None) != (out[1] is None)):
        raise TypeError("pcp_fused_restore: out must be a pair of a tensor and an LSE, the latter None where no LSE is given")
    native = backend == "auto" and ALL_NATIVE
    if not (native and _restore_rows_fit(out_head, out_tail, lse_head, lse_tail, meta, out)):
        _check(out_head, out_tail, lse_head, lse_tail, meta, out)
    try:
        if out is None:
            call = _fused_restore if backend == "auto" else select("fused_restore", backend, out_head.device.type)
            restored, restored_lse = call(out_head, out_tail, lse_head, lse_tail, meta.row_table)
            if len(restored) > meta.num_tokens_padded:  # counts of a padded plan are limits of heads and of tails, not of both
                restored, restored_lse = restored[: meta.num_tokens_padded], restored_lse[: meta.num_tokens_padded]
            return restored, None if lse_head is None else restored_lse
        call = _fused_restore_out if backend == "auto" else select("fused_restore_out", backend, out_head.device.type)
        call(out_head, out_tail, lse_head, lse_tail, meta.row_table, *out)
        return out
    except RuntimeError:
        _check(out_head, out_tail, lse_head, lse_tail, meta, out)
        raise


def _check(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    meta: PCPMetadata,
    out: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> None:
    _check_inputs(out_head, out_tail, lse_head, lse_tail, meta)
    if out is not None:
        check_restored(out_head, out_tail, lse_head, *out)
        inputs = {"out_head": out_head, "out_tail": out_tail, "lse_head": lse_head, "lse_tail": lse_tail}
        _check_apart(inputs, meta.row_table, *out)


def _restore_rows_fit(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    meta: PCPMetadata,
    out: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> bool:
    try:
        tensors = (out_head, out_tail, lse_head, lse_tail, *(out or ()))
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return False
        same_device = out_head.device == out_tail.device == meta.device
        if lse_head is not None and lse_tail is not None:
            same_device = same_device and lse_head.device == lse_tail.device == meta.device
        return same_device and out_head.shape[0] == meta.num_head_tokens and out_tail.shape[0] == meta.num_tail_tokens
    except (AttributeError, IndexError):
        return False


def _check_inputs(out_head: Any, out_tail: Any, lse_head: Any, lse_tail: Any, meta: Any) -> None:
    """Raise unless the inputs of ``pcp_fused_restore`` fit each other and ``meta``."""
    op = "pcp_fused_restore"
    check_meta(op, meta)
    check_ragged(op, "out_head", out_head, meta, None)
    check_ragged(op, "out_tail", out_tail, meta, out_head.dtype)
    head, tail = tuple(out_head.shape), tuple(out_tail.shape)
    if head[1:] != tail[1:]:
        raise ValueError(f"{op}: out_tail must have the heads and width of out_head, {head[1:]}, got {tail[1:]}")
    for name, given, rows in (("out_head", head[0], meta.num_head_tokens), ("out_tail", tail[0], meta.num_tail_tokens)):
        if given != rows:
            raise ValueError(f"{op}: {name} must have the {rows} rows of the metadata, got {given}")
    if (lse_head is None) != (lse_tail is None):
        raise ValueError(f"{op}: lse_head and lse_tail must both be given or both be None")
    for name, lse, shape in (("lse_head", lse_head, head[:2]), ("lse_tail", lse_tail, tail[:2])):
        if lse is None:
            continue
        if not isinstance(lse, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(lse).__name__}")
        if lse.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {dtype_name(lse.dtype)}")
        if lse.shape != shape:
            raise ValueError(f"{op}: {name} must have shape [tokens, heads] = {shape}, got {tuple(lse.shape)}")
        if lse.device != meta.device:
            raise ValueError(f"{op}: {name} must be on {meta.device}, got {lse.device}")
        check_no_gradients(op, name, lse)


def _check_apart(
    inputs: Mapping[str, torch.Tensor | None], row_table: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """Raise unless each output of ``fused_restore`` has its memory to itself."""
    others = {**inputs, "meta.row_table": row_table}
    check_apart("pcp_fused_restore", "out[0]", out, others)
    check_apart("pcp_fused_restore", "out[1]", lse, {**others, "out[0]": out})
