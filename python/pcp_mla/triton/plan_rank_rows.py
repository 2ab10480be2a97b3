"""plan_rank_rows in Triton: one launch, a lane for each row; as csrc/cuda/plan_rank_rows.cu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit(do_not_specialize=["requests", "world", "rows", "chunks", "window"])
def plan_rank_rows_kernel(table, out, requests, world, rows, chunks, window, BLOCK: tl.constexpr):
    width = requests + 1
    each = 2 * requests + 1
    total = world * each
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n <= total
    behind = n >= total
    rank = tl.where(behind, 0, n // each)
    row = n - rank * each
    pads = behind | (row == 2 * requests)
    i = tl.where(pads, requests, row // 2)
    after = tl.where(pads, i, i + 1)
    tail = (row % 2 == 1) & (pads == 0)
    local = table + (5 + rank) * width
    begin = tl.load(local + i)
    held = tl.load(local + after) - begin
    context = tl.load(table + width + i)
    context_len = tl.load(table + width + after) - context
    key = tl.load(table + 2 * width + i)
    length = tl.load(table + 2 * width + after) - key - context_len
    chunk = tl.load(table + 3 * width + i)
    decode = tl.load(table + 4 * width + i) >= 0
    head = tl.where(decode, held, tl.minimum(tl.maximum(length - rank * chunk, 0), chunk))
    count = tl.where(pads, 0, tl.where(tail, held - head, head))
    first = tl.where(decode, 0, tl.where(tail, 2 * world - 1 - rank, rank) * chunk)
    used = tl.where(count > 0, first + count, 0)
    query = rank * rows + begin + tl.where(tail, head, 0)
    tl.store(out + n, tl.where(behind, world * rows, query), mask=inside)
    stride = total + 1
    tl.store(out + stride + n, key, mask=inside)
    tl.store(out + 2 * stride + n, tl.where(count > 0, context_len + used, 0), mask=inside)
    at = out + 3 * stride + n
    for window_number in range(chunks - 1):
        low = window_number * window
        start = tl.minimum(tl.maximum(context - low, 0), window)
        end = tl.minimum(tl.maximum(context + context_len - low, 0), window)
        tl.store(at, start, mask=inside)
        tl.store(at + stride, tl.where(count > 0, end - start, 0), mask=inside)
        at += 2 * stride
    tl.store(at, key - context, mask=inside & (chunks > 0))
    tl.store(at + stride, used, mask=inside & (chunks > 0))


def plan_rank_rows(
    request_table: torch.Tensor,
    out: torch.Tensor,
    num_requests: int,
    world_size: int,
    num_tokens_padded: int,
    num_chunks: int,
    workspace_tokens: int,
) -> None:
    """Arguments and results as :func:`pcp_mla.reference.plan_rank_rows`."""
    programs = triton.cdiv(world_size * (2 * num_requests + 1) + 1, BLOCK)
    plan_rank_rows_kernel[(programs,)](
        request_table, out, num_requests, world_size, num_tokens_padded, num_chunks, workspace_tokens, BLOCK
    )
