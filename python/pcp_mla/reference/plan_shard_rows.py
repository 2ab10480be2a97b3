"""plan_shard_rows: the rows of an exchange with a cache that is shared out."""

from __future__ import annotations

import torch

from .plan_expand import _slots


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
    """Fill the tables of :class:`pcp_mla.plan.shard_rows.ShardRows` from a step's request table (see
    :class:`pcp_mla.planner.step_buffer.StepLayout`), the starts [R + 1] of each request's rows among the ``num_context`` rows of
    context that a shard sends, and the step's ``slot_mapping`` [P * Np].

    ``context_slots``, ``shard_slots`` (the ``slot_mapping`` of all exchanged rows) and ``kv_rows`` are written up to their counts,
    pads as -1.
    """
    table = request_table[: (5 + world_size) * (num_requests + 1)].view(5 + world_size, -1).long()
    natural, context, keys, chunk, owner = table[:5]
    starts, each = shard_starts[: num_requests + 1].long(), dcp_world_size // world_size
    query_lens, context_lens, count = natural.diff(), context.diff(), torch.arange(num_requests, device=table.device)
    fresh = -(-num_tokens_padded // each)
    sent = fresh + num_context

    request = torch.repeat_interleave(count, starts.diff())
    local = torch.arange(len(request), device=table.device) - starts[request]
    position = (local // cp_interleave * dcp_world_size + dcp_rank) * cp_interleave + local % cp_interleave
    real = position < context_lens[request]
    context_slots[:num_context] = -1
    cache = (block_size, dcp_world_size, dcp_rank, cp_interleave)
    context_slots[: len(request)][real] = _slots(block_tables, request[real], position[real], *cache).int()

    gathered = slot_mapping[: world_size * num_tokens_padded].view(world_size, num_tokens_padded)
    padded = torch.nn.functional.pad(gathered, (0, each * fresh - num_tokens_padded), value=-1)
    shard_slots[: dcp_world_size * sent] = -1
    shard_slots[: dcp_world_size * sent].view(dcp_world_size, sent)[:, :fresh] = padded.view(dcp_world_size, fresh)

    request = torch.repeat_interleave(count, keys.diff())
    position = torch.arange(len(request), device=table.device) - keys[request]
    token, cached = position - context_lens[request], position < context_lens[request]
    group = position // cp_interleave
    held = group // dcp_world_size * cp_interleave + position % cp_interleave
    of_context = group % dcp_world_size * sent + fresh + starts[request] + held
    decode = owner[request] >= 0
    number = torch.where(decode, 0, token // chunk[request].clamp(min=1)).clamp(0, 2 * world_size - 1)
    tail = number >= world_size
    holder = torch.where(decode, owner[request], torch.where(tail, 2 * world_size - 1 - number, number))
    head = torch.minimum(((keys - context).diff()[request] - holder * chunk[request]).clamp(min=0), chunk[request])
    local = table[5 + holder, request] + token - torch.where(decode, 0, number * chunk[request]) + torch.where(tail, head, 0)
    of_new = (holder * each + local // max(fresh, 1)) * sent + local % max(fresh, 1)
    rows = torch.where(cached, of_context, torch.where(token < query_lens[request], of_new, -1)).int()
    kv_rows[:num_kv_rows] = -1
    kv_rows[: len(rows)] = torch.cat([rows[cached], rows[~cached]]) if split else rows
