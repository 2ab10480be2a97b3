"""pcp_fused_gather and pcp_fused_restore."""

from __future__ import annotations

import torch

from ..ops.checks import check_gathered, check_restored


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
