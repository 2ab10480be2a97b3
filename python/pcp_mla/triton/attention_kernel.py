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
def _tile(data, tiles, head, stride, row, rows, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
          LISTED: tl.constexpr, FLOAT32: tl.constexpr):  # fmt: skip
    """[keys, BLOCK] of K or V: the tile from row ``row`` on, or the listed ``rows``. ``data`` is at the head's part of row 0."""
    KEYS: tl.constexpr = exists.shape[0]
    d = tl.arange(0, BLOCK)[None, :]
    if LISTED:
        at = data + rows.to(tl.int64)[:, None] * stride + d
    else:
        at = data + row.to(tl.int64) * stride + (tl.arange(0, KEYS) * stride)[:, None] + d
    if MASKED:  # past the row's end there may be anything, and 0 * NaN is NaN
        x = tl.load(at, mask=exists[:, None] & (d < WIDTH), other=0)
    elif tiles is not None and not LISTED:
        x = tiles.load([head, row, 0]).reshape(KEYS, BLOCK)
    elif WIDTH != BLOCK:
        x = tl.load(at, mask=d < WIDTH, other=0)
    else:
        x = tl.load(at)
    if FLOAT32:
        x = x.to(tl.float32)
    return x


@triton.jit
def _scores(
    q_a, q_b, data, tiles, heads, strides, row, rows, exists, WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, MASKED: tl.constexpr, LISTED: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """[queries, keys] products of q and K, the smaller part first: the last product is the one that can overlap with other work."""
    score = tl.zeros((q_a.shape[0], exists.shape[0]), tl.float32)
    if WIDTH_B:
        k = _tile(data[1], tiles[1], heads[1], strides[1], row, rows, exists, WIDTH_B, BLOCK_B, MASKED, LISTED, FLOAT32)
        score = tl.dot(q_b, k.T, score, input_precision="ieee")
    k = _tile(data[0], tiles[0], heads[0], strides[0], row, rows, exists, WIDTH_A, BLOCK_A, MASKED, LISTED, FLOAT32)
    return tl.dot(q_a, k.T, score, input_precision="ieee")


@triton.jit
def _attend(
    acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, key, first, last, used, limit, scale,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, LISTED: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """Take the row's keys first ... last - 1 in, the row's key 0 being at ``key``: output, sum and greatest score (times log2(e))
    so far. ``data``, ``tiles``, ``heads``, ``strides`` and the widths are each of K's first part, its second, and V."""
    for start in range(first, last, KEYS):
        n = start + tl.arange(0, KEYS)
        row = key + start
        exists = n < used
        rows = n
        if LISTED:
            rows = tl.load(kv_rows + key + n, mask=exists, other=0) if MASKED else tl.load(kv_rows + key + n)
        score = _scores(
            q_a, q_b, data, tiles, heads, strides, row, rows, exists, WIDTH_A, WIDTH_B, BLOCK_A, BLOCK_B, MASKED, LISTED, FLOAT32
        )
        if MASKED:
            score = tl.where(n[None, :] < limit[:, None], score, float("-inf"))
        new = tl.maximum(highest, tl.max(score, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        p = tl.exp2(score * scale - base[:, None])
        factor = tl.exp2(highest - base)
        total = total * factor + tl.sum(p, 1)
        acc = acc * factor[:, None]
        v = _tile(data[2], tiles[2], heads[2], strides[2], row, rows, exists, WIDTH_V, BLOCK_V, MASKED, LISTED, FLOAT32)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        highest = new
    return acc, total, highest


@triton.jit
def _scaled(score, scale, FLOAT32: tl.constexpr):
    """A product that is rounded, not joined with the sums that it goes into: so the registers of ``score`` are free at once."""
    if FLOAT32:
        return score * scale
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [score, scale], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _attend_ahead(
    acc, total, highest, q_a, q_b, data, tiles, heads, strides, key, first, last, scale,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """As :func:`_attend` without masks, the scores of the next keys being multiplied while those of the last become weights.

    Triton lets a product of Hopper's tensor cores run on if nothing but the next iteration uses it, behind a product that it waits
    for. Hence the order: the weights of the keys before with V, on which is waited; the next scores; the weights of these.
    """
    if last > first:
        exists = tl.arange(0, KEYS) >= 0
        score = _scores(
            q_a,
            q_b,
            data,
            tiles,
            heads,
            strides,
            key + first,
            key,
            exists,
            WIDTH_A,
            WIDTH_B,
            BLOCK_A,
            BLOCK_B,
            False,
            False,
            FLOAT32,
        )
        p = tl.zeros((q_a.shape[0], KEYS), q_a.dtype)
        for start in range(first, last, KEYS):
            row = key + tl.maximum(start - KEYS, first)
            v = _tile(data[2], tiles[2], heads[2], strides[2], row, key, exists, WIDTH_V, BLOCK_V, False, False, FLOAT32)
            acc = tl.dot(p, v, acc, input_precision="ieee")
            scaled = _scaled(score, scale, FLOAT32)
            row = key + tl.minimum(start + KEYS, last - KEYS)
            score = _scores(
                q_a, q_b, data, tiles, heads, strides, row, key, exists, WIDTH_A, WIDTH_B, BLOCK_A, BLOCK_B, False, False, FLOAT32
            )
            new = tl.maximum(highest, tl.max(scaled, 1))
            weights = tl.exp2(scaled - new[:, None])
            factor = tl.exp2(highest - new)
            total = total * factor + tl.sum(weights, 1)
            acc = acc * factor[:, None]
            highest = new
            p = weights.to(q_a.dtype)
        v = _tile(data[2], tiles[2], heads[2], strides[2], key + last - KEYS, key, exists, WIDTH_V, BLOCK_V, False, False, FLOAT32)
        acc = tl.dot(p, v, acc, input_precision="ieee")
    return acc, total, highest


@triton.jit
def _attend_in_order(
    acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, key, first, last, used, limit, scale,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
    AHEAD: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        acc, total, highest = _attend_ahead(
            acc, total, highest, q_a, q_b, data, tiles, heads, strides, key, first, last, scale,
            WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, FLOAT32,
        )  # fmt: skip
    else:
        acc, total, highest = _attend(
            acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, key, first, last, used, limit, scale,
            WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, False, False, FLOAT32,
        )  # fmt: skip
    return acc, total, highest


@triton.jit(do_not_specialize=["items", "rows"])
def attention_kernel(
    q, k_a, k_b, v, k_a_tiles, k_b_tiles, v_tiles, kv_rows, cu_seqlens_q, cu_seqlens_k, seqused_k, prev_out, prev_lse, out, lse,
    scale, items, rows, head_group,
    q_stride_t, q_stride_h, k_a_stride_n, k_a_stride_h, k_b_stride_n, k_b_stride_h, v_stride_n, v_stride_h,
    prev_stride_t, prev_stride_h, prev_lse_stride_t, prev_lse_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr, FLOAT32: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, SEGMENT: tl.constexpr,
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
    tiles = (k_a_tiles, k_b_tiles, v_tiles)
    heads = (head, 0 if k_b_stride_h == 0 else head, head)
    strides = (k_a_stride_n, k_b_stride_n, v_stride_n)
    LISTED: tl.constexpr = kv_rows is not None
    if LISTED:
        for first in range(0, unmasked, SEGMENT):
            # Rows one after another need no table: looking ahead costs less than an address for every key.
            last = tl.minimum(first + SEGMENT, unmasked)
            n = first + tl.arange(0, SEGMENT)
            row0 = tl.load(kv_rows + key + first) - first
            in_order = tl.load(kv_rows + key + n, mask=n < last, other=0) == row0 + n
            if tl.sum((in_order | (n >= last)).to(tl.int32)) == SEGMENT:
                acc, total, highest = _attend_in_order(
                    acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, row0, first, last, used, limit, scale,
                    WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, AHEAD, FLOAT32,
                )  # fmt: skip
            else:
                acc, total, highest = _attend(
                    acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, key, first, last, used, limit, scale,
                    WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, False, True, FLOAT32,
                )  # fmt: skip
    else:
        acc, total, highest = _attend_in_order(
            acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, key, 0, unmasked, used, limit, scale,
            WIDTH_A, WIDTH_B, WIDTH_V, BLOCK_A, BLOCK_B, BLOCK_V, KEYS, AHEAD, FLOAT32,
        )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q_a, q_b, data, tiles, heads, strides, kv_rows, key, unmasked, seen, used, limit, scale,
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
