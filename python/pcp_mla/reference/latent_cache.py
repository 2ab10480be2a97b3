"""write_latent_cache and gather_latents: rows of latents to and from a paged cache."""

from __future__ import annotations

import torch

_FP8_MAX = 448.0  # of float8_e4m3fn


def _paged(cache: torch.Tensor) -> torch.Tensor:
    """[num_blocks, block_size, W], also of a cache [num_slots, W]."""
    return cache if cache.dim() == 3 else cache[:, None]


def write_latent_cache(latents: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Row n of ``latents`` [n, W] to slot ``slot_mapping[n]`` of ``cache``; with a ``scale`` the cache holds float8_e4m3fn numbers
    that give the latents when multiplied by it. Slots outside of the cache (-1) are not written."""
    paged = _paged(cache)
    block_size = paged.shape[1]
    wanted = (slot_mapping >= 0) & (slot_mapping < paged.shape[0] * block_size)
    slots, rows = slot_mapping[wanted], latents[wanted]
    if scale is not None:
        rows = (rows.float() / scale).clamp(-_FP8_MAX, _FP8_MAX)
    rows, to = rows.to(cache.dtype), (slots // block_size, slots % block_size)
    if cache.element_size() == 1:  # torch has no index_put for float8
        paged.view(torch.uint8)[to] = rows.view(torch.uint8)
    else:
        paged[to] = rows


def gather_latents(
    cache: torch.Tensor,
    rows: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    starts: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Slot ``rows[n]`` of ``cache`` to row n of ``out`` [n, W], or in place of ``rows`` the tokens of sequences.

    Row n then belongs to the sequence r whose ``cu_seqlens`` [R + 1] it lies in, and is its token ``starts[r] + n - cu_seqlens[r]``
    (``starts`` may be None: 0), whose block ``block_table`` [R, blocks] names. Rows without a slot in the cache are zeros.
    """
    paged = _paged(cache)
    block_size = paged.shape[1]
    n = torch.arange(out.shape[0], device=out.device)
    if rows is not None:
        slots = rows.long()
    elif block_table is None or cu_seqlens is None or block_table.numel() == 0:
        slots = torch.full_like(n, -1)
    else:
        sequence = torch.searchsorted(cu_seqlens.long(), n, right=True) - 1
        inside = (sequence >= 0) & (sequence < block_table.shape[0])
        sequence = sequence.clamp(0, block_table.shape[0] - 1)
        position = n - cu_seqlens.long()[sequence] + (0 if starts is None else starts.long()[sequence])
        inside &= (position >= 0) & (position // block_size < block_table.shape[1])
        blocks = block_table.long()[sequence, (position // block_size).clamp(0, block_table.shape[1] - 1)]
        slots = torch.where(inside & (blocks >= 0), blocks * block_size + position % block_size, -1)
    found = (slots >= 0) & (slots < paged.shape[0] * block_size)
    slots = slots[found]
    at = (slots // block_size, slots % block_size)
    values = paged.view(torch.uint8)[at].view(cache.dtype) if cache.element_size() == 1 else paged[at]
    if scale is not None:
        values = values.float() * scale
    out.view(torch.uint8).zero_()
    if out.element_size() == 1:
        out.view(torch.uint8)[found] = values.view(torch.uint8)
    else:
        out[found] = values.to(out.dtype)
