"""Varlen attention in Triton: a program has one tile of a row's queries in one head, and goes through the row's keys.

A row has its queries, its first key and its number of keys apart from other rows, so rows can share keys. q and K come in two parts
side by side, each with pointers and strides of its own (nope and rope, or any other split), so that 192 is not padded to 256, and a
k_pe that the heads share need not be copied to them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _items_from(level, lowest, tiles, CAUSAL: tl.constexpr):
    """Of each row, how many of its work items are at least ``level`` tiles long."""
    if CAUSAL:
        return tl.maximum(tiles - tl.maximum(level - lowest, 0), 0)
    return tl.where(lowest >= level, tiles, 0)


@triton.jit
def work_item(
    item, cu_seqlens_q, seqused_k, rows, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Row and tile of the item-th work item, longest first: the last ones to start then are the ones that end soon. Row -1 if there
    are not so many. A work item is a tile of QUERIES queries of a row; SKIP leaves out rows without keys."""
    i = tl.arange(0, ROWS)
    first = tl.load(cu_seqlens_q + i, mask=i < rows, other=0)
    length = tl.load(cu_seqlens_q + i + 1, mask=i < rows, other=0) - first
    used = tl.load(seqused_k + i, mask=i < rows, other=0)
    tiles = tl.cdiv(length, QUERIES)
    if SKIP:
        tiles = tl.where(used > 0, tiles, 0)
    # Under a causal mask a row's items are ``lowest``, lowest + 1, ... tiles long; else all are ``lowest``.
    lowest = (tl.maximum(used - length, 0) if CAUSAL else used) // QUERIES
    low = 0
    high = tl.max(lowest + tiles) + 1
    row = -1
    tile = 0
    if item < tl.sum(tiles):
        while high - low > 1:  # the longest level that has the item among those at or above it
            middle = (low + high) // 2
            above = tl.sum(_items_from(middle, lowest, tiles, CAUSAL)) > item
            low = tl.where(above, middle, low)
            high = tl.where(above, high, middle)
        longer = _items_from(low + 1, lowest, tiles, CAUSAL)
        here = _items_from(low, lowest, tiles, CAUSAL) - longer
        ends = tl.cumsum(here)
        left = item - tl.sum(longer)
        row = tl.sum((ends <= left).to(tl.int32))
        tile = tl.sum(tl.where(i == row, low - lowest if CAUSAL else left - ends + here, 0))
    return row, tile


@triton.jit
def _tile(data, stride, row, rows, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, LISTED: tl.constexpr,
          FLOAT32: tl.constexpr):  # fmt: skip
    """[keys, BLOCK] of K or V: the tile from row ``row`` on, or the listed ``rows``, a pad (-1) being row 0. ``data`` is at the
    head's part of row 0."""
    KEYS: tl.constexpr = exists.shape[0]
    d = tl.arange(0, BLOCK)[None, :]
    if LISTED:
        # In bytes, and of numbers without a sign, an address is one multiply-add; else it is six instructions of the loop's 400.
        element: tl.constexpr = data.dtype.element_ty
        step = (stride * (element.primitive_bitwidth // 8)).to(tl.uint32)
        offset = tl.maximum(rows, 0)[:, None].to(tl.uint32).to(tl.int64) * step.to(tl.int64)
        at = ((data + d).to(tl.pointer_type(tl.int8), bitcast=True) + offset).to(tl.pointer_type(element), bitcast=True)
    else:
        at = data + row.to(tl.int64) * stride + (tl.arange(0, KEYS) * stride)[:, None] + d
    if MASKED:  # past the row's end there may be anything, and 0 * NaN is NaN
        x = tl.load(at, mask=exists[:, None] & (d < WIDTH), other=0)
    elif WIDTH != BLOCK:
        x = tl.load(at, mask=d < WIDTH, other=0)
    else:
        x = tl.load(at)
    if FLOAT32:
        x = x.to(tl.float32)
    return x


@triton.jit
def _listed(kv_rows, key, n, used, LISTED: tl.constexpr):
    """Where the row's keys ``n`` are listed to be, 0 for those past its end; without a list nothing that is used. As they are: were
    pads seen to here, the assembler would put the wait for the load between the loop's products, and half the gap to a call without
    a list comes from there."""
    return tl.load(kv_rows + key + n, mask=n < used, other=0) if LISTED else n


@triton.jit
def _attend(
    acc, total, highest, q_a, q_b, data, strides, kv_rows, key, first, last, used, limit, scale,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, LISTED: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """Take the row's keys first ... last - 1 in, the row's key 0 being at ``key``: output, sum and greatest score (times log2(e))
    so far. ``data``, ``strides`` and the widths are each of K's first part, its second, and V."""
    rows = _listed(kv_rows, key, first + tl.arange(0, KEYS), used, LISTED)
    for start in range(first, last, KEYS):
        n = start + tl.arange(0, KEYS)
        row = key + start
        exists = n < used
        score = tl.zeros((q_a.shape[0], KEYS), tl.float32)
        if WIDTH_B:
            k = _tile(data[1], strides[1], row, rows, exists, WIDTH_B, BLOCK_B, MASKED, LISTED, FLOAT32)
            score = tl.dot(q_b, k.T, score, input_precision="ieee")
        k = _tile(data[0], strides[0], row, rows, exists, WIDTH_A, BLOCK_A, MASKED, LISTED, FLOAT32)
        score = tl.dot(q_a, k.T, score, input_precision="ieee")
        if MASKED:
            score = tl.where(n[None, :] < limit[:, None], score, float("-inf"))
        new = tl.maximum(highest, tl.max(score, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        p = tl.exp2(score * scale - base[:, None])
        factor = tl.exp2(highest - base)
        total = total * factor + tl.sum(p, 1)
        acc = acc * factor[:, None]
        v = _tile(data[2], strides[2], row, rows, exists, WIDTH_V, BLOCK_V, MASKED, LISTED, FLOAT32)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        highest = new
        # Of the next keys, so that their loads, which the compiler moves ahead, do not wait for their addresses.
        rows = _listed(kv_rows, key, n + KEYS, used, LISTED)
    return acc, total, highest


@triton.jit(do_not_specialize=["items", "rows"])
def attention_kernel(
    q, k_a, k_b, v, kv_rows, cu_seqlens_q, cu_seqlens_k, seqused_k, prev_out, prev_lse, out, lse,
    scale, items, rows, head_group,
    q_stride_t, q_stride_h, k_a_stride_n, k_a_stride_h, k_b_stride_n, k_b_stride_h, v_stride_n, v_stride_h,
    prev_stride_t, prev_stride_h, prev_lse_stride_t, prev_lse_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr, FLOAT32: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Programs that run together read the keys of few heads, which stay in L2.
    group = tl.program_id(0) // (items * head_group)
    local = tl.program_id(0) % (items * head_group)
    head = group * head_group + local % head_group
    row, tile = work_item(local // head_group, cu_seqlens_q, seqused_k, rows, QUERIES, CAUSAL, IN_PLACE, ROWS)
    if row < 0:
        return
    t0 = tl.load(cu_seqlens_q + row)
    length = tl.load(cu_seqlens_q + row + 1) - t0
    used = tl.load(seqused_k + row)
    key = tl.load(cu_seqlens_k + row)
    m = tile * QUERIES + tl.arange(0, QUERIES)
    in_row = m < length
    t = (t0 + m).to(tl.int64)
    h = head.to(tl.int64)

    d = tl.arange(0, BLOCK_A)[None, :]
    at = q + (t * q_stride_t + h * q_stride_h)[:, None]
    q_a = tl.load(at + d, mask=in_row[:, None] & (d < WIDTH_A), other=0)
    q_b = q_a
    if WIDTH_B:
        d = tl.arange(0, BLOCK_B)[None, :]
        q_b = tl.load(at + WIDTH_A + d, mask=in_row[:, None] & (d < WIDTH_B), other=0)
    if FLOAT32:
        q_a = q_a.to(tl.float32)
        q_b = q_b.to(tl.float32)

    d = tl.arange(0, BLOCK_V)[None, :]
    if prev_out is None:
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    else:
        # An earlier result is a softmax under way: its greatest score may be any number, so take the LSE and a sum of 1.
        highest = tl.load(prev_lse + t * prev_lse_stride_t + h * prev_lse_stride_h, mask=in_row, other=float("-inf"))
        counts = tl.abs(highest) != float("inf")
        highest = tl.where(counts, highest * 1.4426950408889634, float("-inf"))
        total = counts.to(tl.float32)
        at = prev_out + (t * prev_stride_t + h * prev_stride_h)[:, None] + d
        acc = tl.load(at, mask=counts[:, None] & (d < WIDTH_V), other=0).to(tl.float32)

    limit = used + tl.zeros_like(m)  # keys that each query sees, and the numbers of them that all and any of the tile's queries see
    seen_by_all = used
    seen = used
    if CAUSAL:
        limit = tl.minimum(used - length + m + 1, used)
        seen_by_all = tl.maximum(used - length + tile * QUERIES + 1, 0)
        seen = tl.minimum(used - length + (tile + 1) * QUERIES, used)
    unmasked = tl.minimum(seen_by_all, used) // KEYS * KEYS
    data = (k_a + h * k_a_stride_h, k_b + h * k_b_stride_h, v + h * v_stride_h)
    strides = (k_a_stride_n, k_b_stride_n, v_stride_n)
    LISTED: tl.constexpr = kv_rows is not None
    acc, total, highest = _attend(
        acc, total, highest, q_a, q_b, data, strides, kv_rows, key, 0, unmasked, used, limit, scale,
        WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, False, LISTED, FLOAT32,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q_a, q_b, data, strides, kv_rows, key, unmasked, seen, used, limit, scale,
        WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, True, LISTED, FLOAT32,
    )  # fmt: skip

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    to = out + (t * out_stride_t + h * out_stride_h)[:, None] + d
    tl.store(to, acc.to(out.dtype.element_ty), mask=in_row[:, None] & (d < WIDTH_V))
    if lse is not None:
        value = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse + t * lse_stride_t + h * lse_stride_h, value, mask=in_row)
