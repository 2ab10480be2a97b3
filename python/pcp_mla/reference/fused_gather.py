"""pcp_fused_gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_output


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[start, ..., start+length-1] for every pair, one after another."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def local_rows(row_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


def gathered_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    """Shapes of the six outputs of ``fused_gather``. ``counts``: queries of heads, of tails, keys of heads, of tails."""
    q_head, q_tail, kv_head, kv_tail = counts
    rows = (q_head, kv_head, kv_head, q_tail, kv_tail, kv_tail)
    return [(n, *x.shape[1:]) for n, x in zip(rows, (q, k, v, q, k, v), strict=True)]


def check_gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: tuple[int, int, int, int], out: Sequence[torch.Tensor]
) -> None:
    """Raise unless ``out`` are the six outputs of ``fused_gather`` for these inputs and row counts."""
    names = ("q_head", "k_head", "v_head", "q_tail", "k_tail", "v_tail")
    for name, x, shape in zip(names, out, gathered_shapes(q, k, v, counts), strict=True):
        check_output("pcp_fused_gather", f"out.{name}", x, shape, q.dtype, q.device)


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
    heads, tails = local_rows(row_table)
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
