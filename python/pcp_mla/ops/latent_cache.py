"""The paged latent cache: rows of latents into their slots, and slots to contiguous rows."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import (
    check_apart,
    check_count,
    check_last_dim,
    check_list,
    check_no_gradients,
    check_not_expanded,
    check_tensor,
    dtype_name,
)
from .checks import FLOATS, check_scaled
from .registry import ALL_NATIVE, direct, fake_in_place, register, select

_write = register("write_latent_cache", fake_in_place)
_gather = register("gather_latents", fake_in_place)


def write_rows(latents: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor | None) -> None:
    """:func:`write_latent_cache` for arguments that are known to fit, or a RuntimeError of the native op."""
    calls = direct()
    if calls is None or not calls.write_latent_cache(latents, cache, slot_mapping, scale):
        _write(latents, cache, slot_mapping, scale)


def gather_rows(cache: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """:func:`gather_latents` of slots, for arguments that are known to fit."""
    _gather(cache, rows, None, None, None, None, out)


def check_cache(op: str, cache: Any, name: str, rows: Any, scale: Any) -> None:
    """Raise unless ``rows`` [n, W] and ``cache`` hold latents of one width, in one dtype or in float8 with a scale."""
    if not isinstance(cache, torch.Tensor):
        raise TypeError(f"{op}: cache must be a torch.Tensor, got {type(cache).__name__}")
    if cache.dim() not in (2, 3) or 0 in cache.shape[1:]:
        raise ValueError(f"{op}: cache must be [num_blocks, block_size, width] or [num_slots, width], got {tuple(cache.shape)}")
    if cache.element_size() > 8:
        raise TypeError(f"{op}: cache must have a dtype of at most 8 bytes, got {dtype_name(cache.dtype)}")
    check_tensor(op, name, rows, (None, cache.shape[-1]), "[rows, width]", cache.device)
    for label, x in (("cache", cache), (name, rows)):
        check_last_dim(op, label, x)
        check_no_gradients(op, label, x)
    if scale is None:
        if cache.dtype != rows.dtype:
            raise TypeError(
                f"{op}: cache must be {dtype_name(rows.dtype)} as {name}, or come with a scale, got {dtype_name(cache.dtype)}"
            )
        return
    check_scaled(op, "cache", cache, scale)
    if rows.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be bfloat16, float16 or float32 with a scale, got {dtype_name(rows.dtype)}")


def write_latent_cache(
    latents: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Put latents into their slots of the paged cache: one launch. Rank-major rows as an all-gather leaves them, with the planner's
    ``slot_mapping``, come to lie in their natural order: there is no other restore.

    Args:
        latents: [n, W], any row stride with a contiguous last dimension.
        cache: [num_blocks, block_size, W] or [num_slots, W], any strides with a contiguous last dimension (a layer of a larger
            cache, say), of the latents' dtype or, with ``scale``, float8_e4m3fn. It must share no memory with the others.
        slot_mapping: int64 [n] slot of each row: ``block * block_size + offset``. A row with a slot outside of the cache (-1) is
            not written. Two rows must not have one slot.
        scale: float32 of one element, on the device: the cache holds ``latents / scale``, at most 448 in size.
        backend: as :func:`pcp_fused_gather`.

    Raises:
        ValueError, TypeError: an argument does not fit the others; before anything is written.
        NotImplementedError: a tensor requires gradients.
        RuntimeError: the named backend is not available.
    """
    op = "write_latent_cache"
    check_cache(op, cache, "latents", latents, scale)
    check_not_expanded(op, "cache", cache)
    check_list(op, "slot_mapping", slot_mapping, (latents.shape[0],), "[rows]", torch.int64, cache.device)
    others = {"latents": latents, "slot_mapping": slot_mapping, "scale": scale}
    if backend != "auto" or not ALL_NATIVE:
        check_apart(op, "cache", cache, others)
    call = write_rows if backend == "auto" else select(op, backend, cache.device.type)
    try:
        call(latents, cache, slot_mapping, scale)
    except RuntimeError:
        check_apart(op, "cache", cache, others)
        raise


def gather_latents(
    cache: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    block_table: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    num_rows: int | None = None,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Copy latents out of the paged cache to contiguous rows: one launch.

    Args:
        cache, scale, backend: as :func:`write_latent_cache`; what is read is multiplied by ``scale``.
        rows: int32 [n] slot of each row, the planner's ``kv_rows``. A row with a slot outside of the cache (-1) becomes zeros.
        block_table, cu_seqlens, starts: in place of ``rows``, tokens of R sequences as engines describe them: row n of those from
            ``cu_seqlens[r]`` to ``cu_seqlens[r + 1] - 1`` is token ``starts[r] + n - cu_seqlens[r]`` of sequence r (without
            ``starts``: from its first), in block ``block_table[r, token // block_size]``. All int32: [R, blocks], [R + 1], [R].
            Rows outside of all sequences, and tokens before the first or behind the last column of ``block_table``, become zeros.
        num_rows: n, with ``block_table`` and without ``out``.
        dtype: of the result, with ``scale`` and without ``out``: bf16 (by default), fp16 or fp32.
        out: [n, W] to write and return, any row stride. It must share no memory with the others.

    Returns:
        [n, W] of the cache's dtype, or of ``dtype`` with ``scale``.

    Raises:
        ValueError, TypeError: an argument does not fit the others; before anything is written.
        NotImplementedError: a tensor requires gradients.
        RuntimeError: the named backend is not available.
    """
    op = "gather_latents"
    if (rows is None) == (block_table is None) or (block_table is None) != (cu_seqlens is None):
        raise ValueError(f"{op}: rows must be given, or else block_table and cu_seqlens")
    if starts is not None and block_table is None:
        raise ValueError(f"{op}: starts must come with block_table, got rows")
    if out is None:
        if not isinstance(cache, torch.Tensor):
            raise TypeError(f"{op}: cache must be a torch.Tensor, got {type(cache).__name__}")
        if rows is not None:
            check_tensor(op, "rows", rows, (None,), "[rows]", None)
            num_rows = len(rows)
        if num_rows is None:
            raise ValueError(f"{op}: num_rows or out must be given with block_table")
        if not torch.compiler.is_compiling():
            check_count(op, "num_rows", num_rows)
        if cache.dim() < 1:
            raise ValueError(f"{op}: cache must be [num_blocks, block_size, width] or [num_slots, width], got {tuple(cache.shape)}")
        of = cache.dtype if scale is None else dtype or torch.bfloat16
        out = torch.empty(num_rows, cache.shape[-1], dtype=of, device=cache.device)
    check_cache(op, cache, "out", out, scale)
    check_not_expanded(op, "out", out)
    if rows is not None:
        check_list(op, "rows", rows, (out.shape[0],), "[rows]", torch.int32, cache.device)
    else:
        check_tensor(op, "block_table", block_table, (None, None), "[sequences, blocks]", cache.device)
        assert block_table is not None
        if block_table.dtype != torch.int32:
            raise TypeError(f"{op}: block_table must be int32, got {dtype_name(block_table.dtype)}")
        check_last_dim(op, "block_table", block_table)
        sequences = block_table.shape[0]
        check_list(op, "cu_seqlens", cu_seqlens, (sequences + 1,), "[sequences + 1]", torch.int32, cache.device)
        if starts is not None:
            check_list(op, "starts", starts, (sequences,), "[sequences]", torch.int32, cache.device)
    others = {"cache": cache, "rows": rows, "block_table": block_table, "cu_seqlens": cu_seqlens, "starts": starts, "scale": scale}
    if backend != "auto" or not ALL_NATIVE:
        check_apart(op, "out", out, others)
    call = _gather if backend == "auto" else select(op, backend, cache.device.type)
    try:
        call(cache, rows, block_table, cu_seqlens, starts, scale, out)
    except RuntimeError:
        check_apart(op, "out", out, others)
        raise
    return out
