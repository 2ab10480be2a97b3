"""The public ops: check, call, name the outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .backends import register, select
from .metadata import PCPMetadata

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)


class GatheredRows(NamedTuple):
    """q, k, v of the heads and of the tails: what two separate attention calls take. All contiguous."""

    q_head: torch.Tensor
    k_head: torch.Tensor
    v_head: torch.Tensor
    q_tail: torch.Tensor
    k_tail: torch.Tensor
    v_tail: torch.Tensor


def _check_ragged(op: str, name: str, x: Any, meta: PCPMetadata, dtype: torch.dtype | None) -> torch.Size:
    """The shape of ``x``, read once: an attribute of a tensor costs some 100 ns, and all this is on the way to every launch."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) != 3:
        raise ValueError(f"{op}: {name} must have 3 dimensions [tokens, heads, dim], got {len(shape)}: {tuple(shape)}")
    if shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"{op}: {name} must have at least one head and a width of at least 1, got {tuple(shape)}")
    if x.stride(2) != 1 and shape[2] > 1:
        raise ValueError(f"{op}: {name} must have a contiguous last dimension, got strides {x.stride()}")
    if dtype is None and x.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be one of {', '.join(str(d)[6:] for d in _DTYPES)}, got {str(x.dtype)[6:]}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{op}: {name} must have dtype {str(dtype)[6:]} as the tensors before it, got {str(x.dtype)[6:]}")
    if x.device != meta.device:
        raise ValueError(f"{op}: {name} must be on {meta.device}, where the metadata is, got {x.device}")
    return shape


def _check_meta(op: str, meta: Any) -> None:
    if not isinstance(meta, PCPMetadata):
        raise TypeError(f"{op}: meta must be a PCPMetadata, got {type(meta).__name__}")


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
    return (
        q.new_empty(num_head_tokens, *q.shape[1:]),
        k.new_empty(num_head_kv, *k.shape[1:]),
        v.new_empty(num_head_kv, *v.shape[1:]),
        q.new_empty(num_tail_tokens, *q.shape[1:]),
        k.new_empty(num_tail_kv, *k.shape[1:]),
        v.new_empty(num_tail_kv, *v.shape[1:]),
    )


_fused_gather = register("fused_gather", _fused_gather_fake)


def pcp_fused_gather(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, *, backend: str = "auto"
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
        backend: ``auto``, ``cuda``, ``triton``, ``cpu`` or ``reference``.

    Tensors are bf16, fp16, fp32, fp64, fp8 (e4m3fn, e5m2) or uint8, one dtype for all three, any row and head strides with a
    contiguous last dimension; widths and head counts may differ. Not differentiable.

    Returns:
        :class:`GatheredRows`; row counts are ``meta.num_head_tokens``, ``num_head_kv``, ``num_tail_tokens``, ``num_tail_kv``.

    Raises:
        ValueError, TypeError: an argument does not fit the metadata or the others; before any launch.
        RuntimeError: the named backend is not available.
    """
    op = "pcp_fused_gather"
    _check_meta(op, meta)
    rows = _check_ragged(op, "q", q, meta, None)[0]
    k_rows = _check_ragged(op, "k", k, meta, q.dtype)[0]
    v_rows = _check_ragged(op, "v", v, meta, q.dtype)[0]
    if rows != meta.num_tokens and rows != meta.num_tokens_padded:
        counts = f"{meta.num_tokens} local tokens of the metadata (or {meta.num_tokens_padded} with pads)"
        raise ValueError(f"{op}: q must have the {counts}, got {rows}")
    for name, given in (("k", k_rows), ("v", v_rows)):
        if given != meta.num_kv_tokens:
            raise ValueError(f"{op}: {name} must have the {meta.num_kv_tokens} rows of the metadata's key order, got {given}")
    call = _fused_gather if backend == "auto" else select("fused_gather", backend, q.device.type)
    out = call(q, k, v, meta.row_table, meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv)
    return GatheredRows(*out)


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


def pcp_fused_restore(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    meta: PCPMetadata,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put the outputs of two attention calls back in local order, with their LSEs: one launch. The way back of
    :func:`pcp_fused_gather`; equal to ``torch.cat([out_head, out_tail])[meta.output_restore_idx]``.

    Args:
        out_head: [num_head_tokens, H, Dv], any row and head strides with a contiguous last dimension.
        out_tail: [num_tail_tokens, H, Dv], the same dtype.
        lse_head, lse_tail: float32 [num_head_tokens, H] and [num_tail_tokens, H], any strides (FlashAttention's [H, tokens] is
            passed as ``lse.T``), or both None.
        meta, backend: as for :func:`pcp_fused_gather`. Dtypes of the outputs likewise.

    Returns:
        out [T, H, Dv] and lse [T, H], both contiguous; lse is None if none was given.

    Raises:
        ValueError, TypeError: an argument does not fit the metadata or the others; before any launch.
        RuntimeError: the named backend is not available.
    """
    op = "pcp_fused_restore"
    _check_meta(op, meta)
    head = _check_ragged(op, "out_head", out_head, meta, None)
    tail = _check_ragged(op, "out_tail", out_tail, meta, out_head.dtype)
    if head[1:] != tail[1:]:
        raise ValueError(f"{op}: out_tail must have the heads and width of out_head, {tuple(head[1:])}, got {tuple(tail[1:])}")
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
            raise TypeError(f"{op}: {name} must be float32, got {str(lse.dtype)[6:]}")
        if lse.shape != shape:
            raise ValueError(f"{op}: {name} must have shape [tokens, heads] = {tuple(shape)}, got {tuple(lse.shape)}")
        if lse.device != meta.device:
            raise ValueError(f"{op}: {name} must be on {meta.device}, got {lse.device}")
    call = _fused_restore if backend == "auto" else select("fused_restore", backend, out_head.device.type)
    out, lse_out = call(out_head, out_tail, lse_head, lse_tail, meta.row_table)
    return out, None if lse_head is None else lse_out
