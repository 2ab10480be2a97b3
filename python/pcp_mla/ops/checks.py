"""Every check of the ops' arguments, with the errors that their docstrings name.

The native ops check their tensors too, in C++, where it costs next to nothing, but can only raise RuntimeError. So a call to a
native op runs these checks only when it was refused, to say why with the documented type; all other implementations run them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checks import check_apart, check_last_dim, check_no_gradients, dtype_name
from ..plan.metadata import PCPMetadata


def check_ragged(op: str, name: str, x: Any, meta: PCPMetadata, dtype: torch.dtype | None) -> None:
    """Raise unless ``x`` is [tokens, heads, dim] as kernels take it, of ``dtype`` if given."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must have 3 dimensions [tokens, heads, dim], got {x.dim()}: {tuple(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{op}: {name} must have at least one head and a width of at least 1, got {tuple(x.shape)}")
    check_last_dim(op, name, x)
    if x.element_size() > 8:
        raise TypeError(f"{op}: {name} must have a dtype of at most 8 bytes, got {dtype_name(x.dtype)}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{op}: {name} must have dtype {dtype_name(dtype)} as the tensors before it, got {dtype_name(x.dtype)}")
    if x.device != meta.device:
        raise ValueError(f"{op}: {name} must be on {meta.device}, where the metadata is, got {x.device}")
    check_no_gradients(op, name, x)


def check_meta(op: str, meta: Any) -> None:
    if not isinstance(meta, PCPMetadata):
        raise TypeError(f"{op}: meta must be a PCPMetadata, got {type(meta).__name__}")


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


def gathered_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    """Shapes of the six outputs of ``fused_gather``. ``counts``: queries of heads, of tails, keys of heads, of tails."""
    q_head, q_tail, kv_head, kv_tail = counts
    rows = (q_head, kv_head, kv_head, q_tail, kv_tail, kv_tail)
    return [(n, *x.shape[1:]) for n, x in zip(rows, (q, k, v, q, k, v), strict=True)]


def check_gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: tuple[int, int, int, int], out: Sequence[torch.Tensor]
) -> None:
    """Raise unless ``out`` are the six outputs of ``fused_gather`` for these inputs and row counts."""
    names = ("q_head", "k_head", "v_head", "q_tail", "k_tail", "v_tail")
    for name, x, shape in zip(names, out, gathered_shapes(q, k, v, counts), strict=True):
        check_output("pcp_fused_gather", f"out.{name}", x, shape, q.dtype, q.device)


def check_gathered_apart(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_table: torch.Tensor, out: Mapping[str, torch.Tensor]
) -> None:
    """Raise unless each output of ``fused_gather`` has its memory to itself."""
    others = {"q": q, "k": k, "v": v, "meta.row_table": row_table}
    for name, x in out.items():
        check_apart("pcp_fused_gather", f"out.{name}", x, others)
        others[f"out.{name}"] = x


def check_gather(q: Any, k: Any, v: Any, meta: Any) -> None:
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


def check_restored(
    out_head: torch.Tensor, out_tail: torch.Tensor, lse_head: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """Raise unless ``out`` and ``lse`` are outputs of ``fused_restore`` for these inputs."""
    op, rows = "pcp_fused_restore", out_head.shape[0] + out_tail.shape[0]
    check_output(op, "out[0]", out, (rows, *out_head.shape[1:]), out_head.dtype, out_head.device)
    if lse_head is not None:
        check_output(op, "out[1]", lse, (rows, out_head.shape[1]), torch.float32, out_head.device)


def check_restored_apart(
    inputs: Mapping[str, torch.Tensor | None], row_table: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """Raise unless each output of ``fused_restore`` has its memory to itself."""
    others = {**inputs, "meta.row_table": row_table}
    check_apart("pcp_fused_restore", "out[0]", out, others)
    check_apart("pcp_fused_restore", "out[1]", lse, {**others, "out[0]": out})


def check_restore(out_head: Any, out_tail: Any, lse_head: Any, lse_tail: Any, meta: Any) -> None:
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
