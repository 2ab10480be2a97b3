"""concat_k in Triton: a program writes a tile of rows of one head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import ROWS, check_counts, copy_view


@triton.jit(do_not_specialize=["tokens"])
def concat_k_kernel(
    k_nope, k_pe, out, tokens, heads, nope, rope, nope_stride_t, nope_stride_h, pe_stride, out_stride_t, out_stride_h,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // heads).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    h = (tl.program_id(0) % heads).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    exists = n < tokens
    first = tl.load(k_nope + n * nope_stride_t + h * nope_stride_h + d, mask=exists & (d < nope))
    second = tl.load(k_pe + n * pe_stride + d - nope, mask=exists & (d >= nope) & (d < nope + rope))
    to = out + n * out_stride_t + h * out_stride_h + d
    tl.store(to, tl.where(d < nope, first, second), mask=exists & (d < nope + rope))


def concat_k(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor) -> None:
    """Arguments as :func:`pcp_mla.reference.concat_k`."""
    tokens, heads, nope = k_nope.shape
    if tokens == 0:
        return
    programs = triton.cdiv(tokens, ROWS) * heads
    check_counts("concat_k", programs=programs)
    concat_k_kernel[(programs,)](
        *(copy_view(x) for x in (k_nope, k_pe, out)),
        tokens,
        heads,
        nope,
        k_pe.shape[1],
        k_nope.stride(0),
        k_nope.stride(1),
        k_pe.stride(0),
        out.stride(0),
        out.stride(1),
        ROWS,
        triton.next_power_of_2(out.shape[2]),
    )
