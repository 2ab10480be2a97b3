"""plan_expand in Triton: one launch, a lane for each gathered row and for each row of K and V; as csrc/cuda/plan_expand.cu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def _find(starts, less, requests, steps, n, LESS: tl.constexpr):
    """Last request that starts at or before n; request i starts at starts[i], or at starts[i] - less[i]."""
    low = tl.zeros_like(n)
    high = low + requests
    for _ in range(steps):
        middle = (low + high) // 2
        start = tl.load(starts + middle)
        if LESS:
            start -= tl.load(less + middle)
        low = tl.where(start <= n, middle, low)
        high = tl.where(start <= n, high, middle)
    return low


@triton.jit
def _key_place(context, keys, requests, steps, n, SPLIT: tl.constexpr):
    """Whose row n of the keys is, and which token."""
    if SPLIT:
        contexts = tl.load(context + requests)
        cached = n < contexts
        fresh = n - contexts
        low = tl.where(
            cached, _find(context, context, requests, steps, n, False), _find(keys, context, requests, steps, fresh, True)
        )
        start = tl.load(context + low)
        old = tl.load(context + low + 1) - start
        position = tl.where(cached, n - start, old + fresh - (tl.load(keys + low) - start))
    else:
        low = _find(keys, keys, requests, steps, n, False)
        position = n - tl.load(keys + low)
    return low, position


@triton.jit
def _slot(blocks, block_stride, block_rows, columns, block_size, shards, shard, interleave, request, position, mask):
    group = position // interleave
    local = group // shards * interleave + position % interleave
    block = local // block_size
    held = mask & (group % shards == shard) & (block < columns) & (request < block_rows)
    number = tl.load(blocks + request.to(tl.int64) * block_stride + block, mask=held, other=-1).to(tl.int64)
    slot = number * block_size + local % block_size
    return tl.where((number < 0) | (slot > 2147483647), -1, slot)


@triton.jit(do_not_specialize=["requests", "steps", "rank", "rows", "kv_count", "gathered_programs"])
def plan_expand_kernel(
    table, blocks, local_out, positions_out, restore_out, hidden_out, slots_out, kv_out,
    requests, steps, world, rank, rows, kv_count, gathered_programs,
    block_stride, block_rows, columns, block_size, shards, shard, interleave,
    HAS_BLOCKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    width = requests + 1
    natural = table
    context = table + width
    keys = table + 2 * width
    if tl.program_id(0) < gathered_programs:
        g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = g < world * rows
        holder = tl.where(inside, g // rows, 0)
        t = g - holder * rows
        local = table + (5 + holder) * width
        held = inside & (t < tl.load(local + requests))
        low = _find(local, local, requests, steps, t, False)
        query = tl.load(natural + low + 1) - tl.load(natural + low)
        restored = tl.load(keys + low) - tl.load(context + low)
        restored_len = tl.load(keys + low + 1) - tl.load(context + low + 1) - restored
        chunk = tl.load(table + 3 * width + low)
        owner = tl.load(table + 4 * width + low)
        prefill = owner < 0
        offset = t - tl.load(local + low)
        head = tl.minimum(tl.maximum(restored_len - holder * chunk, 0), chunk)
        cut = tl.where(offset < head, holder * chunk + offset, (2 * world - 1 - holder) * chunk + offset - head)
        token = tl.where(prefill, cut, offset)
        position = tl.load(context + low + 1) - tl.load(context + low) + token
        index = tl.load(natural + low) + token
        real = held & (token < query)
        first = real & (prefill | (owner == holder))
        shifted = token + tl.where(prefill, 0, (holder - owner) * query)
        # Which entries lie behind the last restored token is known of each: no two lanes write to the same place.
        total = tl.load(keys + requests) - tl.load(context + requests)
        tl.store(restore_out + g, -1, mask=inside & (g >= total))
        tl.store(hidden_out + g, -1, mask=inside & (g >= tl.load(natural + requests)))
        tl.store(restore_out + restored + shifted, g, mask=held & (shifted >= 0) & (shifted < restored_len))
        tl.store(hidden_out + index, g, mask=first)
        mine = inside & (holder == rank)
        tl.store(local_out + t, tl.where(real, index, -1), mask=mine)
        tl.store(positions_out + t, tl.where(held, position, 0), mask=mine)
        if HAS_BLOCKS:
            slot = _slot(blocks, block_stride, block_rows, columns, block_size, shards, shard, interleave, low, position, first)
            tl.store(slots_out + g, slot, mask=inside)
    else:
        n = (tl.program_id(0) - gathered_programs) * BLOCK + tl.arange(0, BLOCK)
        low, position = _key_place(context, keys, requests, steps, n, SPLIT)
        length = tl.load(context + low + 1) - tl.load(context + low) + tl.load(natural + low + 1) - tl.load(natural + low)
        real = (n < kv_count) & (n < tl.load(keys + requests)) & (position < length)
        slot = _slot(blocks, block_stride, block_rows, columns, block_size, shards, shard, interleave, low, position, real)
        tl.store(kv_out + n, slot.to(tl.int32), mask=n < kv_count)


def plan_expand(
    request_table: torch.Tensor,
    block_tables: torch.Tensor | None,
    local_token_indices: torch.Tensor,
    positions: torch.Tensor,
    allgather_restore_idx: torch.Tensor,
    hidden_restore_idx: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_rows: torch.Tensor,
    num_requests: int,
    world_size: int,
    rank: int,
    num_tokens_padded: int,
    num_kv_rows: int,
    split: bool,
    block_size: int,
    dcp_world_size: int,
    dcp_rank: int,
    cp_interleave: int,
) -> None:
    """Arguments and results as :func:`pcp_mla.reference.plan_expand`."""
    gathered_programs = triton.cdiv(world_size * num_tokens_padded, BLOCK)
    programs = gathered_programs + triton.cdiv(num_kv_rows, BLOCK)
    if programs == 0:
        return
    if num_requests == 0:  # the kernel looks a request up for every lane
        for out in (local_token_indices[:num_tokens_padded], kv_rows[:num_kv_rows]):
            out.fill_(-1)
        positions[:num_tokens_padded] = 0
        for out in (allgather_restore_idx, hidden_restore_idx, *(() if block_tables is None else (slot_mapping,))):
            out[: world_size * num_tokens_padded] = -1
        return
    plan_expand_kernel[(programs,)](
        request_table,
        request_table if block_tables is None else block_tables,  # unused without block tables
        local_token_indices,
        positions,
        allgather_restore_idx,
        hidden_restore_idx,
        slot_mapping,
        kv_rows,
        num_requests,
        num_requests.bit_length(),
        world_size,
        rank,
        num_tokens_padded,
        num_kv_rows,
        gathered_programs,
        0 if block_tables is None else block_tables.stride(0),
        *((0, 0) if block_tables is None else block_tables.shape),
        block_size,
        dcp_world_size,
        dcp_rank,
        cp_interleave,
        block_tables is not None,
        split,
        BLOCK,
    )
