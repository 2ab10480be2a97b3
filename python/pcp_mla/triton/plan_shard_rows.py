"""plan_shard_rows in Triton: one launch, a lane for each entry; as csrc/plan_shard_rows.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .plan_expand import _find, _key_place, _slot

BLOCK = 256


@triton.jit(do_not_specialize=["requests", "steps", "rows", "fresh", "num_context", "kv_count", "context_programs", "row_programs"])
def plan_shard_rows_kernel(
    table, starts, blocks, slots, context_out, slots_out, kv_out,
    requests, steps, world, rows, each, fresh, num_context, kv_count, context_programs, row_programs,
    block_stride, block_rows, columns, block_size, shards, shard, interleave,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    width = requests + 1
    natural = table
    context = table + width
    keys = table + 2 * width
    sent = fresh + num_context
    lane = tl.arange(0, BLOCK)
    if tl.program_id(0) < context_programs:
        n = tl.program_id(0) * BLOCK + lane
        inside = n < num_context
        held = inside & (n < tl.load(starts + requests))
        low = _find(starts, starts, requests, steps, n, False)
        local = n - tl.load(starts + low)
        position = ((local // interleave).to(tl.int64) * shards + shard) * interleave + local % interleave
        real = held & (position < tl.load(context + low + 1) - tl.load(context + low))
        slot = _slot(
            blocks, block_stride, block_rows, columns, block_size, shards, shard, interleave, low, position.to(tl.int32), real
        )
        tl.store(context_out + n, slot.to(tl.int32), mask=inside)
    elif tl.program_id(0) < context_programs + row_programs:
        n = (tl.program_id(0) - context_programs) * BLOCK + lane
        inside = n < shards * sent
        of = n // sent
        row = n - of * sent
        holder = of // each
        local = (of - holder * each) * fresh + row
        real = inside & (row < fresh) & (local < rows)
        slot = tl.load(slots + holder.to(tl.int64) * rows + local, mask=real, other=-1)
        tl.store(slots_out + n, slot, mask=inside)
    else:
        n = (tl.program_id(0) - context_programs - row_programs) * BLOCK + lane
        low, position = _key_place(context, keys, requests, steps, n, SPLIT)
        begin = tl.load(context + low)
        cached = tl.load(context + low + 1) - begin
        token = position - cached
        query = tl.load(natural + low + 1) - tl.load(natural + low)
        real = (n < kv_count) & (n < tl.load(keys + requests)) & (token < query)
        group = position // interleave
        turn = group // shards
        old_row = (group - turn * shards) * sent + fresh + tl.load(starts + low) + turn * interleave + position % interleave
        chunk = tl.load(table + 3 * width + low)
        owner = tl.load(table + 4 * width + low)
        new = real & (token >= 0)
        prefill = owner < 0
        number = tl.where(new & prefill, token // tl.maximum(chunk, 1), 0)
        tail = number >= world
        holder = tl.where(prefill, tl.where(tail, 2 * world - 1 - number, number), owner)
        restored = tl.load(keys + low + 1) - tl.load(keys + low) - cached
        head = tl.minimum(tl.maximum(restored - holder * chunk, 0), chunk)
        local = tl.load(table + (5 + holder) * width + low, mask=new, other=0) + token
        local += tl.where(tail, head, 0) - tl.where(prefill, number * chunk, 0)
        part = local // tl.maximum(fresh, 1)
        new_row = (holder * each + part) * sent + local - part * fresh
        tl.store(kv_out + n, tl.where(real, tl.where(token < 0, old_row, new_row), -1), mask=n < kv_count)


def plan_shard_rows(
    request_table: torch.Tensor,
    shard_starts: torch.Tensor,
    block_tables: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_slots: torch.Tensor,
    shard_slots: torch.Tensor,
    kv_rows: torch.Tensor,
    num_requests: int,
    world_size: int,
    num_tokens_padded: int,
    num_context: int,
    num_kv_rows: int,
    split: bool,
    block_size: int,
    dcp_world_size: int,
    dcp_rank: int,
    cp_interleave: int,
) -> None:
    """Arguments and results as :func:`pcp_mla.reference.plan_shard_rows`."""
    each = dcp_world_size // world_size
    fresh = triton.cdiv(num_tokens_padded, each)
    exchanged = dcp_world_size * (fresh + num_context)
    if num_requests == 0:  # the kernel looks a request up for every lane
        for out in (context_slots[:num_context], shard_slots[:exchanged], kv_rows[:num_kv_rows]):
            out.fill_(-1)
        return
    programs = [triton.cdiv(count, BLOCK) for count in (num_context, exchanged, num_kv_rows)]
    if sum(programs) == 0:
        return
    plan_shard_rows_kernel[(sum(programs),)](
        request_table,
        shard_starts,
        block_tables,
        slot_mapping,
        context_slots,
        shard_slots,
        kv_rows,
        num_requests,
        num_requests.bit_length(),
        world_size,
        num_tokens_padded,
        each,
        fresh,
        num_context,
        num_kv_rows,
        *programs[:2],
        block_tables.stride(0),
        *block_tables.shape,
        block_size,
        dcp_world_size,
        dcp_rank,
        cp_interleave,
        split,
        BLOCK,
    )
