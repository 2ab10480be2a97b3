"""write_latent_cache and gather_latents in Triton: rows are copied as they are, float8 is converted by torch before or after."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import ROWS, check_counts, copy_view

_FP8_MAX = 448.0  # of float8_e4m3fn


@triton.jit
def token_slot(block_table, cu_seqlens, starts, n, sequences, steps, columns, table_stride, block_size, STARTS: tl.constexpr):
    """Slot of the token that row n is of its sequence; -1 for none."""
    low = tl.zeros_like(n)
    high = low + sequences
    for _ in range(steps):  # the last sequence that starts at or before n
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= n
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    inside = (n >= tl.load(cu_seqlens)) & (n < tl.load(cu_seqlens + sequences))
    position = n - tl.load(cu_seqlens + low)
    if STARTS:
        position += tl.load(starts + low)
    inside &= (position >= 0) & (position // block_size < columns)
    block = tl.load(block_table + low * table_stride + position // block_size, mask=inside, other=-1).to(tl.int64)
    return tl.where(block >= 0, block * block_size + position % block_size, -1)


@triton.jit(do_not_specialize=["count", "sequences", "steps", "columns", "num_slots"])
def latent_cache_kernel(
    cache, outside, slots, block_table, cu_seqlens, starts, count, sequences, steps, columns, num_slots, width,
    block_size, block_stride, row_stride, outside_stride, table_stride,
    WRITE: tl.constexpr, TABLE: tl.constexpr, STARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = n < count
    if TABLE:
        slot = token_slot(block_table, cu_seqlens, starts, n, sequences, steps, columns, table_stride, block_size, STARTS)
    else:
        slot = tl.load(slots + n, mask=exists, other=-1).to(tl.int64)
    found = (exists & (slot >= 0) & (slot < num_slots))[:, None]
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_width = d < width
    cached = cache + (slot // block_size * block_stride + slot % block_size * row_stride)[:, None] + d
    here = outside + (n * outside_stride)[:, None] + d
    if WRITE:
        tl.store(cached, tl.load(here, mask=found & in_width), mask=found & in_width)
    else:
        tl.store(here, tl.load(cached, mask=found & in_width, other=0), mask=exists[:, None] & in_width)


def _launch(
    cache: torch.Tensor,
    outside: torch.Tensor,
    slots: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    starts: torch.Tensor | None,
    write: bool,
) -> None:
    count, width = outside.shape
    block_size = cache.shape[1] if cache.dim() == 3 else 1
    sequences, columns = (0, 0) if block_table is None else block_table.shape
    block = min(1024, triton.next_power_of_2(width))
    programs = triton.cdiv(count, ROWS) * triton.cdiv(width, block)
    check_counts("write_latent_cache" if write else "gather_latents", programs=programs)
    latent_cache_kernel[(programs,)](
        copy_view(cache),
        copy_view(outside),
        slots,
        block_table,
        cu_seqlens,
        starts,
        count,
        sequences,
        sequences.bit_length(),
        columns,
        cache.shape[0] * block_size,
        width,
        block_size,
        cache.stride(0),
        cache.stride(1) if cache.dim() == 3 else 0,
        outside.stride(0),
        0 if block_table is None else block_table.stride(0),
        write,
        slots is None,
        starts is not None,
        ROWS,
        block,
    )


def write_latent_cache(latents: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Arguments as :func:`pcp_mla.reference.write_latent_cache`."""
    if scale is not None:
        latents = (latents.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(cache.dtype)
    if len(latents):
        _launch(cache, latents, slot_mapping, None, None, None, True)


def gather_latents(
    cache: torch.Tensor,
    rows: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    starts: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Arguments as :func:`pcp_mla.reference.gather_latents`."""
    if not len(out):
        return
    if block_table is not None and not block_table.numel():
        out.view(torch.uint8).zero_()
        return
    raw = out if scale is None else torch.empty(out.shape, dtype=cache.dtype, device=out.device)
    _launch(cache, raw, rows, block_table, cu_seqlens, starts, False)
    if scale is not None:
        out.copy_(raw.float() * scale)
