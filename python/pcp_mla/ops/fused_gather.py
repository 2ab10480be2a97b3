"""pcp_fused_gather: check, call, name the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..checks import check_apart
from ..plan.metadata import PCPMetadata, check_meta
from ..reference.fused_gather import check_gathered, gathered_shapes
from .checks import check_ragged
from .registry import ALL_NATIVE, fake_in_place, register, select


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


_fused_gather = register("fused_gather", _fused_gather_fake)
_fused_gather_out = register("fused_gather_out", fake_in_place)


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
        _check(q, k, v, meta, out)
    counts = (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    try:
        if out is None:
            call = _fused_gather if backend == "auto" else select("fused_gather", backend, q.device.type)
            return GatheredRows(*call(q, k, v, meta.row_table, *counts))
        call = _fused_gather_out if backend == "auto" else select("fused_gather_out", backend, q.device.type)
        call(q, k, v, meta.row_table, *counts, *out)
        return out
    except RuntimeError:
        _check(q, k, v, meta, out)
        raise


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, out: GatheredRows | None) -> None:
    _check_inputs(q, k, v, meta)
    if out is not None:
        check_gathered(q, k, v, (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv), out)
        _check_apart(q, k, v, meta.row_table, out._asdict())


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


def _check_inputs(q: Any, k: Any, v: Any, meta: Any) -> None:
    """Raise unless the inputs of ``pcp_fused_gather`` fit each other and ``meta``."""
    op = "pcp_fused_gather"
    check_meta(op, meta)
    check_ragged(op, "q", q, meta, None)
    check_ragged(op, "k", k, meta, q.dtype)
    check_ragged(op, "v", v, meta, q.dtype)
    if q.shape[0] not in (meta.num_tokens, meta.num_tokens_padded):
        wanted = f"{meta.num_tokens} local tokens of the metadata (or {meta.num_tokens_padded} with pads)"
        raise ValueError(f"{op}: q must have the {wanted}, got {q.shape[0]}")
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != meta.num_kv_tokens:
            raise ValueError(f"{op}: {name} must have the {meta.num_kv_tokens} rows of the metadata's key order, got {x.shape[0]}")


def _check_apart(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_table: torch.Tensor, out: Mapping[str, torch.Tensor]
) -> None:
    """Raise unless each output of ``fused_gather`` has its memory to itself."""
    others = {"q": q, "k": k, "v": v, "meta.row_table": row_table}
    for name, x in out.items():
        check_apart("pcp_fused_gather", f"out.{name}", x, others)
        others[f"out.{name}"] = x
