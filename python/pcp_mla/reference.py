"""Every op's definition in plain torch: the specification that kernels are tested against, and the fallback where none is built.

Works in any dtype on any device. Nothing here is fast; on a GPU it synchronises with the host.
"""

from __future__ import annotations

import torch

from .checks import check_gathered, check_restored


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[start, ..., start+length-1] for every pair, one after another."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def _local_rows(row_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Local rows of all heads and of all tails: a request's head lies in front of its tail."""
    q_head, q_tail = row_table[0].long(), row_table[1].long()
    heads = _ranges(q_head[:-1] + q_tail[:-1], q_head.diff())
    tails = _ranges(q_head[1:] + q_tail[:-1], q_tail.diff())
    return heads, tails


def _first_rows(x: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """x[index] as the first of ``count`` rows; the others are left as they are."""
    out = x.new_empty(count, *x.shape[1:])
    out[: len(index)] = x[index]
    return out


def fused_gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_table: torch.Tensor,
    num_head_tokens: int,
    num_tail_tokens: int,
    num_head_kv: int,
    num_tail_kv: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q of heads and tails, and for each of them the keys that it attends to: the first rows of its request. The counts are those
    of the row table or, for a captured graph, more: rows that the table does not describe are left as they are."""
    heads, tails = _local_rows(row_table)
    k_head, k_tail, keys = row_table[2].long(), row_table[3].long(), row_table[4].long()
    head_keys = _ranges(keys[:-1], k_head.diff())
    tail_keys = _ranges(keys[:-1], k_tail.diff())
    return (
        _first_rows(q, heads, num_head_tokens),
        _first_rows(k, head_keys, num_head_kv),
        _first_rows(v, head_keys, num_head_kv),
        _first_rows(q, tails, num_tail_tokens),
        _first_rows(k, tail_keys, num_tail_kv),
        _first_rows(v, tail_keys, num_tail_kv),
    )


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
    """The same into six given tensors."""
    counts = (num_head_tokens, num_tail_tokens, num_head_kv, num_tail_kv)
    check_gathered(q, k, v, counts, out)
    for to, rows in zip(out, fused_gather(q, k, v, row_table, *counts), strict=True):
        to.copy_(rows)


def fused_restore(
    out_head: torch.Tensor,
    out_tail: torch.Tensor,
    lse_head: torch.Tensor | None,
    lse_tail: torch.Tensor | None,
    row_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and LSEs if given (else an empty tensor), back in local order."""
    heads, tails = _local_rows(row_table)
    out = out_head.new_empty(len(out_head) + len(out_tail), *out_head.shape[1:])
    out[heads], out[tails] = out_head[: len(heads)], out_tail[: len(tails)]
    if lse_head is None or lse_tail is None:
        return out, out_head.new_empty(0, dtype=torch.float32)
    lse = lse_head.new_empty(len(out), lse_head.shape[1])
    lse[heads], lse[tails] = lse_head[: len(heads)], lse_tail[: len(tails)]
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
    """The same into given tensors."""
    check_restored(out_head, out_tail, lse_head, out, lse)
    restored, restored_lse = fused_restore(out_head, out_tail, lse_head, lse_tail, row_table)
    out.copy_(restored)
    if lse is not None and lse_head is not None:
        lse.copy_(restored_lse)


def _slots(
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
    dcp_world_size: int,
    dcp_rank: int,
    cp_interleave: int,
) -> torch.Tensor:
    """int64 slots of tokens in this shard of the paged cache, -1 where another shard holds the token."""
    group = positions // cp_interleave
    local = group // dcp_world_size * cp_interleave + positions % cp_interleave
    mine = (group % dcp_world_size == dcp_rank) & (local // block_size < block_tables.shape[1])
    slots = torch.full_like(positions, -1)
    blocks = block_tables[requests[mine], local[mine] // block_size].long()
    slots[mine] = blocks * block_size + local[mine] % block_size
    return slots


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
    """Fill a step's per-token arrays from its request table (see :class:`pcp_mla.step_buffer.StepLayout`).

    ``local_token_indices`` and ``positions`` [Np], ``allgather_restore_idx`` and ``hidden_restore_idx`` [P * Np] and, if there are
    block tables, ``slot_mapping`` [P * Np] are written up to these counts, pads as -1 (positions as 0); ``kv_rows`` up to
    ``num_kv_rows``, in key order or, if ``split``, all context before all new tokens. Both parts may have no rows.
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
