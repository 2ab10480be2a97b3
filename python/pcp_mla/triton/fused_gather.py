"""pcp_fused_gather in Triton: one launch, each row read once and written to the heads, to the tails, or to both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.fused_gather import check_gathered, gathered_shapes
from .rows import ROWS, check_counts, copy_shape, copy_view, place_key, place_query


@triton.jit
def _copy(source, to_head, to_tail, row, head, tail, unit, stride_t, stride_h, heads, dim, BLOCK: tl.constexpr):
    blocks = tl.cdiv(dim, BLOCK)
    h = unit // blocks
    d = (unit % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (d < dim)[None, :]
    in_head = (head >= 0)[:, None] & inside
    in_tail = (tail >= 0)[:, None] & inside
    # 64-bit: rows * heads * dim passes 2**31 at long contexts.
    value = tl.load(source + row.to(tl.int64)[:, None] * stride_t + h.to(tl.int64) * stride_h + d[None, :], mask=in_head | in_tail)
    within = h.to(tl.int64) * dim + d
    width = tl.cast(heads, tl.int64) * dim  # a size of 1 is a constant, which has no methods
    tl.store(to_head + head.to(tl.int64)[:, None] * width + within[None, :], value, mask=in_head)
    tl.store(to_tail + tail.to(tl.int64)[:, None] * width + within[None, :], value, mask=in_tail)


@triton.jit(do_not_specialize=["requests", "steps", "q_rows", "kv_rows", "q_programs", "qk_programs", "head_rows", "tail_rows"])
def fused_gather_kernel(
    q, k, v, q_head, k_head, v_head, q_tail, k_tail, v_tail, table, requests, steps, q_rows, kv_rows, q_programs, qk_programs,
    head_rows, tail_rows,
    q_stride_t, q_stride_h, q_heads, q_dim, k_stride_t, k_stride_h, k_heads, k_dim, v_stride_t, v_stride_h, v_heads, v_dim,
    ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lane = tl.arange(0, ROWS)
    if program < q_programs:
        units = q_heads * tl.cdiv(q_dim, BLOCK_Q)
        row = (program // units) * ROWS + lane
        head, tail = place_query(table, requests, steps, row)
        head = tl.where((row < q_rows) & (head < head_rows), head, -1)
        tail = tl.where((row < q_rows) & (tail < tail_rows), tail, -1)  # pad rows of q count on past the last tail
        _copy(q, q_head, q_tail, row, head, tail, program % units, q_stride_t, q_stride_h, q_heads, q_dim, BLOCK_Q)
    else:
        if program < qk_programs:
            units = k_heads * tl.cdiv(k_dim, BLOCK_K)
            local = program - q_programs
            row = (local // units) * ROWS + lane
            head, tail = place_key(table, requests, steps, row)
            head = tl.where(row < kv_rows, head, -1)
            tail = tl.where(row < kv_rows, tail, -1)
            _copy(k, k_head, k_tail, row, head, tail, local % units, k_stride_t, k_stride_h, k_heads, k_dim, BLOCK_K)
        else:
            units = v_heads * tl.cdiv(v_dim, BLOCK_V)
            local = program - qk_programs
            row = (local // units) * ROWS + lane
            head, tail = place_key(table, requests, steps, row)
            head = tl.where(row < kv_rows, head, -1)
            tail = tl.where(row < kv_rows, tail, -1)
            _copy(v, v_head, v_tail, row, head, tail, local % units, v_stride_t, v_stride_h, v_heads, v_dim, BLOCK_V)


def fused_gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_table: torch.Tensor,
    num_head_tokens: int,
    num_tail_tokens: int,
    num_head_kv: int,
    num_tail_kv: int,
) -> tuple[torch.Tensor, ...]:
    """Arguments and results as :func:`pcp_mla.reference.fused_gather`."""
    counts = (num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv)
    out = tuple(q.new_empty(shape) for shape in gathered_shapes(q, k, v, counts))
    fused_gather_out(q, k, v, row_table, *counts, *out)
    return out


def fused_gather_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_table: torch.Tensor,
    num_head_tokens: int,
    num_tail_tokens: int,
    num_head_kv: int,
    num_tail_kv: int,
    *out: torch.Tensor,
) -> None:
    """Arguments as :func:`pcp_mla.reference.fused_gather_out`."""
    inputs = (q, k, v)
    check_gathered(q, k, v, (num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv), out)
    rows = (min(num_head_tokens + num_tail_tokens, q.shape[0]), k.shape[0], k.shape[0])
    shapes = [copy_shape(x) for x in inputs]
    programs = [triton.cdiv(n, ROWS) * heads * triton.cdiv(dim, block) for n, (heads, dim, block) in zip(rows, shapes, strict=True)]
    requests = row_table.shape[1] - 1
    if requests == 0 or sum(programs) == 0:
        return
    check_counts("pcp_fused_gather", queries=rows[0], keys=rows[1], programs=sum(programs))
    sides = [(x.stride(0), x.stride(1), heads, dim) for x, (heads, dim, _) in zip(inputs, shapes, strict=True)]
    fused_gather_kernel[(sum(programs),)](
        *(copy_view(x) for x in (*inputs, *out)),
        row_table,
        requests,
        requests.bit_length(),
        rows[0],
        rows[1],
        programs[0],
        programs[0] + programs[1],
        num_head_tokens,
        num_tail_tokens,
        *(number for side in sides for number in side),
        ROWS,
        *(block for _, _, block in shapes),
    )
