"""The public ops: check, call, name the outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..plan.metadata import PCPMetadata
from .checks import (
    check_gather,
    check_gathered,
    check_gathered_apart,
    check_restore,
    check_restored,
    check_restored_apart,
    gathered_shapes,
)
from .registry import ALL_NATIVE, register, select


class GatheredRows(NamedTuple):
    """q, k, v of the heads and of the tails: what two separate attention calls take. All contiguous."""

    q_head: torch.Tensor
    k_head: torch.Tensor
    v_head: torch.Tensor
    q_tail: torch.Tensor
    k_tail: torch.Tensor
    v_tail: torch.Tensor


def _fused_gather_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_table: torch.Tensor,
    num_head_tokens: int,
    num_tail_tokens: int,
    num_head_kv: int,
    num_tail_kv: int,
) -> tuple[torch.Tensor, ...]:
    shapes = gathered_shapes(q, k, v, (num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv))
    return tuple(q.new_empty(shape) for shape in shapes)


def _out_fake(*args: Any) -> None:
    """Ops that write into given tensors return nothing."""


_fused_gather = register("fused_gather", _fused_gather_fake)
_fused_gather_out = register("fused_gather_out", _out_fake)


def pcp_fused_gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    meta: PCPMetadata,
    *,
    out: GatheredRows | None = None,
    backend: str = "auto",
) -> GatheredRows:
    """Copy q, k and v to where two separate attention calls, one over the heads and one over the tails, want them: one launch.

    For attention libraries whose rows cannot share a key start. Equal to ``q[meta.query_head_indices]``,
    ``k[meta.kv_head_indices]``, ``v[meta.kv_head_indices]`` and the same for the tails. The calls' ``cu_seqlens`` are
    ``meta.cu_seqlens_q_head``, ``meta.cu_seqlens_k_head``, ``meta.cu_seqlens_q_tail``, ``meta.cu_seqlens_k_tail``; both are causal,
    aligned bottom-right.

    Args:
        q: [T or Np, H, Dq] in local order (rows past T = ``meta.num_tokens`` are not read).
        k: [N, H, Dk] in key order, N = ``meta.num_kv_tokens``.
        v: [N, H, Dv].
        meta: of this rank and step, on the same device.
        out: tensors to write and return, contiguous, such as an earlier call of the same step returned: the layers of a model can
            share them, and six allocations are most of what the call costs on the host. They must share no memory with the
            inputs, the metadata or one another: which rows are read last is not said.
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.

    Tensors are of any dtype up to 8 bytes (bf16, fp16, fp32, fp8, ...), one for all three, with any row and head strides and a
    contiguous last dimension; widths and head counts may differ. Not differentiable.

    Returns:
        :class:`GatheredRows`; row counts are ``meta.num_head_tokens``, ``num_head_kv``, ``num_tail_tokens``, ``num_tail_kv``.

    Raises:
        ValueError, TypeError: an argument does not fit the metadata or the others; before any launch.
        NotImplementedError: an input or an output requires gradients.
        RuntimeError: the named backend is not available.
    """
    if out is not None and not isinstance(out, GatheredRows):
        raise TypeError(f"pcp_fused_gather: out must be GatheredRows, got {type(out).__name__}")
    native = backend == "auto" and ALL_NATIVE
    if not (native and _gather_rows_fit(q, k, v, meta, out)):
        _check_gather(q, k, v, meta, out)
    counts = (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    try:
        if out is None:
            call = _fused_gather if backend == "auto" else select("fused_gather", backend, q.device.type)
            return GatheredRows(*call(q, k, v, meta.row_table, *counts))
        call = _fused_gather_out if backend == "auto" else select("fused_gather_out", backend, q.device.type)
        call(q, k, v, meta.row_table, *counts, *out)
        return out
    except RuntimeError:
        _check_gather(q, k, v, meta, out)
        raise


def _check_gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, out: GatheredRows | None) -> None:
    check_gather(q, k, v, meta)
    if out is not None:
        check_gathered(q, k, v, (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv), out)
        check_gathered_apart(q, k, v, meta.row_table, out._asdict())


def _gather_rows_fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, out: GatheredRows | None) -> bool:
    """What the native op cannot check: it does not see the metadata, and a tensor elsewhere may lead to another kernel."""
    try:
        kv_rows, rows = meta.num_kv_tokens, q.shape[0]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(out or ()))):
            return False
        same_device = q.device == k.device == v.device == meta.device
        return same_device and k.shape[0] == kv_rows == v.shape[0] and (rows == meta.num_tokens or rows == meta.num_tokens_padded)
    except (AttributeError, IndexError):
        return False


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
_fused_restore_out = register("fused_restore_out", _out_fake)


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
        _check_restore(out_head, out_tail, lse_head, lse_tail, meta, out)
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
        _check_restore(out_head, out_tail, lse_head, lse_tail, meta, out)
        raise


def _check_restore(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    meta: PCPMetadata,
    out: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> None:
    check_restore(out_head, out_tail, lse_head, lse_tail, meta)
    if out is not None:
        check_restored(out_head, out_tail, lse_head, *out)
        inputs = {"out_head": out_head, "out_tail": out_tail, "lse_head": lse_head, "lse_tail": lse_tail}
        check_restored_apart(inputs, meta.row_table, *out)


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
