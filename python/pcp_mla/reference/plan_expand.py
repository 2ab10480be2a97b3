"""plan_expand: a step's per-token arrays."""

from __future__ import annotations

import torch


def _slots(
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
    dcp_world_size: int,
    dcp_rank: int,
    cp_interleave: int,
) -> torch.Tensor:
    """int64 slots of tokens in this shard of the paged cache, -1 where another shard holds the token or its block has none."""
    group = positions // cp_interleave
    local = group // dcp_world_size * cp_interleave + positions % cp_interleave
    mine = (group % dcp_world_size == dcp_rank) & (local // block_size < block_tables.shape[1]) & (requests < block_tables.shape[0])
    blocks = torch.full_like(positions, -1)
    blocks[mine] = block_tables[requests[mine], local[mine] // block_size].long()
    slots = blocks * block_size + local % block_size
    return torch.where((blocks < 0) | (slots >= 2**31), -1, slots)


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
    """Fill a step's per-token arrays from its request table (see :class:`pcp_mla.planner.step_buffer.StepLayout`).

    ``local_token_indices`` and ``positions`` [Np], ``allgather_restore_idx`` and ``hidden_restore_idx`` [P * Np] and, if there are
    block tables, ``slot_mapping`` [P * Np] are written up to these counts, pads as -1 (positions as 0); ``kv_rows`` up to
    ``num_kv_rows``, in key order or, if ``split``, all context before all new tokens. Both parts may have no rows. A token whose
    block number is negative, or whose slot would be 2**31 or more, has slot -1.
    """
    table = request_table[: (5 + world_size) * (num_requests + 1)].view(5 + world_size, -1).long()
    natural, context, keys, chunk, owner = table[:5]
    query_lens, context_lens, restored = natural.diff(), context.diff(), keys - context
    restored_lens, cache = restored.diff(), (block_size, dcp_world_size, dcp_rank, cp_interleave)
    gathered = world_size * num_tokens_padded
    allgather_restore_idx[:gathered] = -1
    hidden_restore_idx[:gathered] = -1
    local_token_indices[:num_tokens_padded] = -1
    positions[:num_tokens_padded] = 0
    if block_tables is not None:
        slot_mapping[:gathered] = -1
    for holder in range(world_size if num_tokens_padded and num_requests else 0):
        local = table[5 + holder]
        request = torch.repeat_interleave(torch.arange(num_requests, device=table.device), local.diff())
        row = torch.arange(len(request), device=table.device)
        offset = row - local[request]
        head = torch.minimum((restored_lens - holder * chunk[:-1]).clamp(min=0), chunk[:-1])[request]
        in_tail = (owner[request] < 0) & (offset >= head)
        start = torch.where(in_tail, (2 * world_size - 1 - holder) * chunk[request] - head, holder * chunk[request])
        token = offset + torch.where(owner[request] < 0, start, 0)
        real = token < query_lens[request]
        at = holder * num_tokens_padded + row
        if holder == rank:
            local_token_indices[: len(row)] = torch.where(real, natural[request] + token, -1).int()
            positions[: len(row)] = (context_lens[request] + token).int()
        # A replicated decode's copies follow one another in the padded layout; in the unpadded one the first is all there is.
        shifted = token + torch.where(owner[request] < 0, 0, (holder - owner[request]) * query_lens[request])
        wanted = shifted < restored_lens[request]
        allgather_restore_idx[(restored[request] + shifted)[wanted]] = at[wanted].int()
        first = real & ((owner[request] < 0) | (owner[request] == holder))
        hidden_restore_idx[(natural[request] + token)[first]] = at[first].int()
        if block_tables is not None:
            slot_mapping[at[first]] = _slots(block_tables, request[first], (context_lens[request] + token)[first], *cache)
    if num_kv_rows and block_tables is not None:
        request = torch.repeat_interleave(torch.arange(num_requests, device=table.device), keys.diff())
        position = torch.arange(len(request), device=table.device) - keys[request]
        real = position < (context_lens + query_lens)[request]
        rows = torch.full_like(position, -1)
        rows[real] = _slots(block_tables, request[real], position[real], *cache)
        if split:
            cached = position < context_lens[request]
            rows = torch.cat([rows[cached], rows[~cached]])
        kv_rows[:num_kv_rows] = -1
        kv_rows[: len(rows)] = rows.int()
