"""plan_rank_rows: the row tables of all ranks."""

from __future__ import annotations

import torch


def plan_rank_rows(
    request_table: torch.Tensor,
    out: torch.Tensor,
    num_requests: int,
    world_size: int,
    num_tokens_padded: int,
    num_chunks: int,
    workspace_tokens: int,
) -> None:
    """Fill the tables of :class:`pcp_mla.plan.rank_rows.RankRows` from a step's request table (see
    :class:`pcp_mla.planner.step_buffer.StepLayout`).

    ``out`` is written as [3 + 2 * ``num_chunks``, P * (2R + 1) + 1]: ``cu_seqlens_q``; then ``cu_seqlens_k`` and ``seqused_k`` of
    all keys at once, and of each chunk, the last entry of a ``seqused_k`` 0. Chunks are windows of ``workspace_tokens`` rows of all
    context, and last the new tokens; 0 where the keys are not split.
    """
    table = request_table[: (5 + world_size) * (num_requests + 1)].view(5 + world_size, -1).long()
    _, context, keys, chunk, owner = table[:5]
    context_lens, restored = context.diff(), keys - context
    ranks = torch.arange(world_size, device=table.device)[:, None]
    length, cut, decode = restored.diff(), chunk[:-1], owner[:-1] >= 0
    held = table[5:].diff(dim=1)
    head = torch.where(decode, held, torch.minimum((length - ranks * cut).clamp(min=0), cut))
    heads_end = torch.where(decode, 0, ranks * cut) + head
    tails_end = (2 * world_size - 1 - ranks) * cut + held - head
    count = torch.stack([head, held - head], 2).flatten(1)
    used = torch.stack([heads_end, tails_end], 2).flatten(1) + context_lens.repeat_interleave(2)
    starts = table[5:, :-1] + ranks * num_tokens_padded
    starts = torch.stack([starts, starts + head], 2).flatten(1)
    ends = table[5:, -1:] + ranks * num_tokens_padded

    def keys_of(prefix: torch.Tensor, used: torch.Tensor) -> list[torch.Tensor]:
        begin = torch.cat([prefix[:-1].repeat_interleave(2), prefix[-1:]]).repeat(world_size)
        shown = torch.nn.functional.pad(torch.where(count > 0, used, 0), (0, 1))
        return [torch.cat([begin, prefix[-1:]]), torch.nn.functional.pad(shown.flatten(), (0, 1))]

    rows = [torch.nn.functional.pad(torch.cat([starts, ends], 1).flatten(), (0, 1), value=world_size * num_tokens_padded)]
    rows += keys_of(keys, used)
    for first in range(0, (num_chunks - 1) * workspace_tokens, workspace_tokens or 1):
        prefix = (context - first).clamp(0, workspace_tokens)
        rows += keys_of(prefix, prefix.diff().repeat_interleave(2).expand_as(used))
    if num_chunks:
        rows += keys_of(restored, used - context_lens.repeat_interleave(2))
    written = torch.stack(rows).flatten()
    out[: len(written)] = written.int()
