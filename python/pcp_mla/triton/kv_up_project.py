"""kv_up_project in Triton, for GPUs and widths that the CUDA kernel has not: a program multiplies a tile of rows with some columns
of one head's K or V."""

from __future__ import annotations

import functools
import json
import warnings
from importlib import resources
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference.kv_up_project import UP_PROJECT_TILE
from .rows import check_counts

DEFAULT = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3}


@triton.jit
def latent_offset(rows, n, count, num_slots, block_size, block_stride, row_stride, LISTED: tl.constexpr):
    """Where row n's latent lies, and whether it has one."""
    slot = n.to(tl.int64)
    if LISTED:
        slot = tl.load(rows + n, mask=n < count, other=-1).to(tl.int64)
    found = (n < count) & (slot >= 0) & (slot < num_slots)
    slot = tl.where(found, slot, 0)
    return slot // block_size * block_stride + slot % block_size * row_stride, found


@triton.jit
def load_latents(at, mask, factor, dtype: tl.constexpr, SCALED: tl.constexpr):
    """Latents as they are, or with a scale bytes of float8_e4m3fn, by integers: GPUs before sm_89 have no conversion of it."""
    value = tl.load(at, mask=mask, other=0)
    if SCALED:
        bits = value.to(tl.uint16)
        wide = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # float16's sign, exponent and mantissa, its exponent 8 too small
        wide = tl.where((bits & 0x7F) == 0x7F, 0x7E00, wide).to(tl.uint16)  # NaN
        value = (wide.to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * factor).to(dtype)
    return value


@triton.jit(do_not_specialize=["count", "written", "num_slots"])
def kv_up_project_kernel(
    latents, rows, weight, scale, k_out, v_out, k_pe_out, count, written, num_slots, block_size, block_stride, row_stride,
    weight_stride, k_stride_t, k_stride_h, v_stride_t, v_stride_h, pe_stride_t, pe_stride_h, pe_heads, heads, rank, nope, rope,
    v_dim, LISTED: tl.constexpr, SCALED: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs that run together take GROUP row tiles by all columns: both operands come from L2.
    row_tiles = tl.cdiv(written, ROWS)
    k_tiles = tl.cdiv(nope, COLUMNS)
    per_head = k_tiles + tl.cdiv(v_dim, COLUMNS)
    in_group = GROUP * heads * per_head
    group = tl.program_id(0) // in_group
    tiles = tl.minimum(row_tiles - group * GROUP, GROUP)
    local = tl.program_id(0) % in_group
    n = (group * GROUP + local % tiles) * ROWS + tl.arange(0, ROWS)
    head = (local // tiles) // per_head
    part = (local // tiles) % per_head
    is_k = part < k_tiles
    d = tl.where(is_k, part, part - k_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = d < tl.where(is_k, nope, v_dim)

    offset, found = latent_offset(rows, n, count, num_slots, block_size, block_stride, row_stride, LISTED)
    latent = latents + offset[:, None]
    columns = weight + (head * (nope + v_dim) + tl.where(is_k, 0, nope) + d).to(tl.int64)[None, :] * weight_stride
    factor = 1.0
    if SCALED:
        factor = tl.load(scale)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, DEPTH):
        c = start + tl.arange(0, DEPTH)
        x = load_latents(latent + c[None, :], found[:, None] & (c < rank)[None, :], factor, weight.dtype.element_ty, SCALED)
        w = tl.load(columns + c[:, None], mask=(c < rank)[:, None] & in_width[None, :], other=0)
        total = tl.dot(x, w, total, input_precision="ieee")

    exists = (n < written)[:, None]
    t = n.to(tl.int64)[:, None]
    value = total.to(k_out.dtype.element_ty)
    if is_k:
        to = k_out + t * k_stride_t + head.to(tl.int64) * k_stride_h
        tl.store(to + d[None, :], value, mask=exists & in_width[None, :])
        if (part == 0) & (head < pe_heads):
            r = tl.arange(0, ROPE)[None, :]
            k_pe = load_latents(latent + rank + r, found[:, None] & (r < rope), factor, weight.dtype.element_ty, SCALED)
            pe_to = k_pe_out + t * pe_stride_t + head.to(tl.int64) * pe_stride_h
            tl.store(pe_to + r, k_pe, mask=exists & (r < rope))
    else:
        to = v_out + t * v_stride_t + head.to(tl.int64) * v_stride_h
        tl.store(to + d[None, :], value, mask=exists & in_width[None, :])


@functools.cache
def _tuned() -> dict[str, Any]:
    return json.loads((resources.files("pcp_mla") / "data" / "kv_up_project.json").read_text())


def shape_class(rows: int, heads: int, dtype: torch.dtype) -> str:
    """What configurations are tuned for: few or many output tiles, two or four bytes."""
    size = "small" if rows * heads < 32768 else "large"
    return f"{size} {4 if dtype == torch.float32 else 2}"


@functools.cache
def configuration(gpu: str, shape: str) -> dict[str, int]:
    """The tuned tile of this GPU and class of shapes, else a small one that fits everywhere, and a warning, once."""
    for name, shapes in _tuned().items():
        if name in gpu and shape in shapes:
            return shapes[shape]
    if gpu != "interpreter":
        warnings.warn(f"kv_up_project: no tuned Triton configuration for {gpu} ({shape}), the default is used", stacklevel=2)
    return DEFAULT


def kv_up_project(
    latents: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    k_pe_out: torch.Tensor | None,
    config: dict[str, int] | None = None,
) -> None:
    """Arguments as :func:`pcp_mla.reference.kv_up_project`; ``config`` in place of the tuned one."""
    count = latents.shape[:-1].numel() if rows is None else len(rows)
    written = min(len(k_out), triton.cdiv(count, UP_PROJECT_TILE) * UP_PROJECT_TILE)
    heads, v_dim = v_out.shape[1:]
    rank = weight.shape[1]
    rope = latents.shape[-1] - rank
    nope = k_out.shape[2] if k_pe_out is not None else k_out.shape[2] - rope
    if written == 0:
        return
    if not latents.is_cuda and weight.dtype == torch.bfloat16:  # the interpreter multiplies it wrong and rounds it down
        outs = [x for x in (k_out, v_out, k_pe_out) if x is not None]
        k, v, *pe = [torch.empty_like(x[:written], dtype=torch.float32) for x in outs]
        wide = latents.float() if scale is None else (latents.float() * scale).to(weight.dtype).float()
        kv_up_project(wide, rows, weight.float(), None, k, v, pe[0] if pe else None)
        for out, result in zip(outs, (k, v, *pe), strict=True):
            out[:written] = result
        return
    if config is None:
        gpu = torch.cuda.get_device_name(latents.device) if latents.is_cuda else "interpreter"
        config = configuration(gpu, shape_class(count, heads, weight.dtype))
    per_head = triton.cdiv(nope, config["COLUMNS"]) + triton.cdiv(v_dim, config["COLUMNS"])
    block_size = latents.shape[1] if latents.dim() == 3 else 1
    programs = triton.cdiv(written, config["ROWS"]) * heads * per_head
    check_counts("kv_up_project", rows=max(count, written), rows_of_weight=weight.shape[0], programs=programs)
    # Where k_pe goes, and the first heads, which write it: all, or one where it stands apart.
    rope_to, pe_heads = (k_out[..., nope:], heads) if k_pe_out is None else (k_pe_out[:, None], 1)
    kv_up_project_kernel[(programs,)](
        latents if scale is None else latents.view(torch.uint8),
        rows,
        weight,
        scale,
        k_out,
        v_out,
        rope_to,
        count,
        written,
        latents.shape[0] * block_size,
        block_size,
        latents.stride(0),
        latents.stride(1) if latents.dim() == 3 else 0,
        weight.stride(0),
        k_out.stride(0),
        k_out.stride(1),
        v_out.stride(0),
        v_out.stride(1),
        rope_to.stride(0),
        rope_to.stride(1),
        pe_heads,
        heads,
        rank,
        nope,
        rope,
        v_dim,
        rows is not None,
        scale is not None,
        triton.next_power_of_2(max(rope, 1)),
        **config,
    )
