"""pcp_fused_restore in Triton: one launch, every local row and its LSE fetched from the heads or from the tails."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.fused_restore import check_restored
from .rows import ROWS, check_counts, copy_shape, copy_view, place_query


@triton.jit(do_not_specialize=["requests", "steps", "rows", "head_rows", "tail_rows"])
def fused_restore_kernel(
    out_head, out_tail, lse_head, lse_tail, out, lse, table, requests, steps, rows, head_rows, tail_rows,
    head_stride_t, head_stride_h, tail_stride_t, tail_stride_h, heads, dim,
    lse_head_stride_t, lse_head_stride_h, lse_tail_stride_t, lse_tail_stride_h, lse_heads,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK)
    unit = program % (heads * blocks)
    row = (program // (heads * blocks)) * ROWS + tl.arange(0, ROWS)
    head, tail = place_query(table, requests, steps, row)
    in_head = ((row < rows) & (head >= 0) & (head < head_rows))[:, None]
    in_tail = ((row < rows) & (tail >= 0) & (tail < tail_rows))[:, None]
    head = head.to(tl.int64)[:, None]
    tail = tail.to(tl.int64)[:, None]
    to = row.to(tl.int64)[:, None]

    h = (unit // blocks).to(tl.int64)
    d = ((unit % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    in_width = d < dim
    from_head = tl.load(out_head + head * head_stride_t + h * head_stride_h + d, mask=in_head & in_width)
    from_tail = tl.load(out_tail + tail * tail_stride_t + h * tail_stride_h + d, mask=in_tail & in_width)
    tl.store(out + to * heads * dim + h * dim + d, tl.where(in_head, from_head, from_tail), mask=(in_head | in_tail) & in_width)

    if BLOCK_LSE > 0:  # noqa: SIM102 - one condition is of compile time, the other is not
        if unit == 0:
            n = tl.arange(0, BLOCK_LSE).to(tl.int64)[None, :]
            is_head = n < lse_heads
            a = tl.load(lse_head + head * lse_head_stride_t + n * lse_head_stride_h, mask=in_head & is_head)
            b = tl.load(lse_tail + tail * lse_tail_stride_t + n * lse_tail_stride_h, mask=in_tail & is_head)
            tl.store(lse + to * lse_heads + n, tl.where(in_head, a, b), mask=(in_head | in_tail) & is_head)


def fused_restore(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    row_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as :func:`pcp_mla.reference.fused_restore`."""
    rows = out_head.shape[0] + out_tail.shape[0]
    out = out_head.new_empty(rows, *out_head.shape[1:])
    lse = out_head.new_empty((0,) if lse_head is None else (rows, out_head.shape[1]), dtype=torch.float32)
    fused_restore_out(out_head, out_tail, lse_head, lse_tail, row_table, out, lse)
    return out, lse


def fused_restore_out(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    row_table: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Arguments as :func:`pcp_mla.reference.fused_restore_out`."""
    check_restored(out_head, out_tail, lse_head, out, lse)
    rows, lse_heads = out.shape[:2]
    heads, dim, block = copy_shape(out_head, out_tail)
    requests = row_table.shape[1] - 1
    if requests == 0 or rows == 0:
        return
    programs = triton.cdiv(rows, ROWS) * heads * triton.cdiv(dim, block)
    check_counts("pcp_fused_restore", rows=rows, programs=programs)
    # Without LSEs the kernel still wants pointers to float32; it touches none of them.
    block_lse, lses, lse_strides = 0, [row_table.view(torch.float32)] * 3, [0, 0, 0, 0]
    if lse_head is not None and lse_tail is not None and lse is not None:
        block_lse, lses = triton.next_power_of_2(lse_heads), [lse_head, lse_tail, lse]
        lse_strides = [*lse_head.stride(), *lse_tail.stride()]
    fused_restore_kernel[(programs,)](
        copy_view(out_head),
        copy_view(out_tail),
        *lses[:2],
        copy_view(out),
        lses[2],
        row_table,
        requests,
        requests.bit_length(),
        rows,
        out_head.shape[0],
        out_tail.shape[0],
        out_head.stride(0),
        out_head.stride(1),
        out_tail.stride(0),
        out_tail.stride(1),
        heads,
        dim,
        *lse_strides,
        lse_heads,
        ROWS,
        block,
        block_lse,
    )
