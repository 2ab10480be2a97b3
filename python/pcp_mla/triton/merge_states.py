"""Merges by log-sum-exp in Triton: one kernel, a program for some heads of one row over its whole width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..ops.registry import interpreted
from .rows import check_counts

TILE = 2048  # elements of a program: heads x width


@triton.jit
def _of_source(a, b, step, n):
    """Where partial n is: the first at a, the n-th behind it at b + (n - 1) step."""
    return tl.where(n == 0, a, b + tl.cast(n - 1, tl.int64) * step)


@triton.jit
def _score(lse_a, lse_b, step, n, counted, in_heads):
    """-inf for partials that are empty or not counted."""
    lse = tl.load(_of_source(lse_a, lse_b, step, n), mask=in_heads, other=0)
    return tl.where(((counted >> n) & 1 == 0) | (tl.abs(lse) == float("inf")), float("-inf"), lse)


@triton.jit
def _request(cu_seqlens, requests, steps, row):
    """Last request that starts at or before the row."""
    low = tl.zeros_like(row)
    high = low + requests
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= row
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["sources", "first", "last", "tokens", "rows", "requests", "steps"])
def merge_states_kernel(
    a, b, lse_a, lse_b, scale, row_op, cu_seqlens, out_rows, seqused_k, out, lse_out,
    sources, first, last, tokens, rows, requests, steps, heads, dim,
    a_row, a_head, b_step, b_row, b_head, lse_a_row, lse_a_head, lse_b_step, lse_b_row, lse_b_head,
    share_heads, out_share, out_row, out_head, lse_share_heads, lse_out_share, lse_out_row, lse_out_head,
    BASE2: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(heads, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    h = ((tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]

    counted = tl.full((), -1, tl.int64)  # bit n: partial n counts
    to = row
    if row_op is not None:
        entry = row
        inside = row >= 0
        if cu_seqlens is not None:
            entry = _request(cu_seqlens, requests, steps, row)
            inside = (tl.load(cu_seqlens) <= row) & (row < tl.load(cu_seqlens + requests))
        counted = tl.load(row_op + entry, mask=inside, other=0).to(tl.int64) & 3
    if out_rows is not None:
        to = tl.load(out_rows + row).to(tl.int64)
    in_heads = (h < heads) & (counted != 0) & (to >= 0) & (to < rows)
    if seqused_k is not None:
        counted = tl.zeros_like(counted)
        for n in range(sources):
            used = tl.load(seqused_k + tl.cast(n, tl.int64) * tokens + row) != 0
            counted |= used.to(tl.int64) << n

    lse_a += row * lse_a_row + h * lse_a_head
    lse_b += row * lse_b_row + h * lse_b_head
    per_unit: tl.constexpr = 1.0 if BASE2 else 1.4426950408889634  # log2(e)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    for n in range(sources):
        highest = tl.maximum(highest, _score(lse_a, lse_b, lse_b_step, n, counted, in_heads))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((HEADS,), tl.float32)
    for n in range(sources):
        total += tl.exp2((_score(lse_a, lse_b, lse_b_step, n, counted, in_heads) - highest) * per_unit)
    empty = total == 0
    total = tl.where(empty, 1.0, total)

    a += (row * a_row + h * a_head)[:, None]
    b += (row * b_row + h * b_head)[:, None]
    whole = tl.zeros((HEADS, BLOCK), tl.float32)
    started = h < 0
    for n in range(first, last):
        weight = tl.div_rn(tl.exp2((_score(lse_a, lse_b, lse_b_step, n, counted, in_heads) - highest) * per_unit), total)
        # Memory that no weight asks for may hold anything, NaN included.
        reads = (in_heads & (weight != 0))[:, None]
        part = weight[:, None] * tl.load(_of_source(a, b, b_step, n) + d, mask=reads & (d < dim), other=0).to(tl.float32)
        # Not added to zeros: that would make the -0 of a copied row 0.
        whole = tl.where(reads, tl.where(started[:, None], whole + part, part), whole)
        started |= weight != 0
    if scale is not None:
        whole = tl.clamp(tl.div_rn(whole, tl.load(scale)), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)

    # The results may be the inputs: every thread must have read before one writes.
    tl.debug_barrier()
    if lse_out is not None:
        lse_out += (h // lse_share_heads) * lse_out_share + to * lse_out_row + (h % lse_share_heads) * lse_out_head
        tl.store(lse_out, tl.where(empty, float("-inf"), highest + tl.log2(total) / per_unit), mask=in_heads)
    out += ((h // share_heads) * out_share + to * out_row + (h % share_heads) * out_head)[:, None]
    tl.store(out + d, whole.to(out.dtype.element_ty), mask=in_heads[:, None] & (d < dim))


def _sources(tensors: Sequence[torch.Tensor], dims: int) -> tuple[int, torch.Tensor, torch.Tensor, int]:
    """Number of partials, the first, the second, and the step from there to the next."""
    if len(tensors) > 2:
        stacked = torch.stack(list(tensors))
    elif tensors[0].dim() > dims:
        stacked = tensors[0]
    else:
        return len(tensors), tensors[0], tensors[-1], 0
    return len(stacked), stacked[0], stacked[min(1, len(stacked) - 1)], stacked.stride(0)


def _shares(x: torch.Tensor, dims: int) -> tuple[int, int, int, int]:
    """Heads of a share, and strides of shares, rows and heads: what is not cut into shares is one."""
    if x.dim() == dims:
        return x.shape[1], 0, x.stride(0), x.stride(1)
    return x.shape[2], x.stride(0), x.stride(1), x.stride(2)


def _launch(
    outs: tuple[int, torch.Tensor, torch.Tensor, int],
    lses: tuple[int, torch.Tensor, torch.Tensor, int],
    read: tuple[int, int],
    scale: torch.Tensor | None,
    base2: bool,
    out: torch.Tensor,
    lse_out: torch.Tensor | None,
    row_op: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    out_rows: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> None:
    """Merge by the weights of all ``lses`` the ``outs`` from ``read[0]`` on, before ``read[1]``."""
    _, a, b, b_step = outs
    sources, lse_a, lse_b, lse_b_step = lses
    tokens, heads, dim = a.shape
    if tokens == 0:
        return
    in_interpreter = interpreted()
    if out.dtype == torch.float8_e4m3fn and not in_interpreter and torch.cuda.get_device_capability(out.device) < (8, 9):
        raise NotImplementedError(
            "merge_states: Triton converts to float8_e4m3fn on GPUs of compute capability 8.9 and above only, "
            f"{torch.cuda.get_device_name(out.device)} is below"
        )
    # The interpreter truncates to bfloat16 and has no float8: there torch rounds.
    by_torch = in_interpreter and out.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    before, to = (out.float(), out.float()) if by_torch else (out, out)
    requests = 0 if row_op is None else len(row_op)
    block = triton.next_power_of_2(dim)
    head_block = min(triton.next_power_of_2(heads), max(1, TILE // block))
    programs = tokens * triton.cdiv(heads, head_block)
    check_counts("merge_states", programs=programs)
    merge_states_kernel[(programs,)](
        a,
        b,
        lse_a,
        lse_b,
        scale,
        row_op,
        cu_seqlens,
        out_rows,
        seqused_k,
        to,
        lse_out,
        sources,
        *read,
        tokens,
        to.shape[-3],
        requests,
        requests.bit_length(),
        heads,
        dim,
        *a.stride()[:2],
        b_step,
        *b.stride()[:2],
        *lse_a.stride(),
        lse_b_step,
        *lse_b.stride(),
        *_shares(to, 3),
        *((1, 0, 0, 0) if lse_out is None else _shares(lse_out, 2)),
        base2,
        head_block,
        block,
    )
    if by_torch:
        written = before.view(torch.int32) != to.view(torch.int32)
        bits = torch.uint8 if out.element_size() == 1 else torch.int16  # torch cannot put float8 into one place alone
        out.view(bits)[written] = to[written].to(out.dtype).view(bits)


def merge_n_attn_states_out(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    base2: bool,
    out: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """Arguments as :func:`pcp_mla.reference.merge_n_attn_states_out`; lists of more than two tensors are stacked first."""
    partials = _sources(outs, 3)
    _launch(partials, _sources(lses, 2), (0, partials[0]), scale, base2, out, lse_out)


def merge_n_attn_states(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], scale: torch.Tensor | None, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as :func:`pcp_mla.reference.merge_n_attn_states`; lists of more than two tensors are stacked first."""
    shape = outs[0].shape[-3:]
    out = outs[0].new_empty(shape, dtype=None if scale is None else torch.float8_e4m3fn)
    lse = outs[0].new_empty(shape[:2], dtype=torch.float32)
    merge_n_attn_states_out(outs, lses, scale, base2, out, lse)
    return out, lse


def merge_attn_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, scale: torch.Tensor | None, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as :func:`pcp_mla.reference.merge_attn_states`."""
    return merge_n_attn_states([out_a, out_b], [lse_a, lse_b], scale, base2)


def merge_attn_states_out(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    scale: torch.Tensor | None,
    row_op: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out_rows: torch.Tensor | None,
    base2: bool,
    out: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """Arguments as :func:`pcp_mla.reference.merge_attn_states_out`."""
    outs, lses = _sources([out_a, out_b], 3), _sources([lse_a, lse_b], 2)
    _launch(outs, lses, (0, 2), scale, base2, out, lse_out, row_op, cu_seqlens, out_rows)


def cp_correct_out(
    out: torch.Tensor,
    lses: torch.Tensor,
    seqused_k: torch.Tensor | None,
    rank: int,
    base2: bool,
    corrected: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """Arguments as :func:`pcp_mla.reference.cp_correct_out`."""
    # This rank's output stands for every partial; only its own is read.
    outs = (len(lses), out, out, 0)
    _launch(outs, _sources([lses], 2), (rank, rank + 1), None, base2, corrected, lse_out, seqused_k=seqused_k)
