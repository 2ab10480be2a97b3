"""A step's prefill rows as vLLM lays them out, and the keys that they share: what the attention calls of the step's layers need.

A *row* is a run of new tokens that follow one another in one request: with PCP its head or its tail chunk. Its queries see every
key of the request up to themselves, which all lie in the paged cache when the call is made. Rows of a request need not be adjacent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ...exchange.heads import HeadExchange
from ...exchange.peer_heads import PeerHeadExchange
from ...ops.attention.libraries import Rows
from ...ops.plan_expand import plan_expand
from ...plan.partition import IntArray
from ...planner.planned import PlannedMetadata


class RowChunk(NamedTuple):
    """One attention call: the keys at ``kv_rows[first : first + num_keys]``, of which :class:`Rows` says who sees which."""

    first: int
    num_keys: int
    rows: Rows


class StepRows(NamedTuple):
    """What the layers of a step share. ``kv_rows`` is int32: the slot of every key, each key once.

    ``calls`` are attention calls that layers share, by backend and scale. ``heads`` is there where the step's heads are shared out
    over the ranks, for layers whose call all ranks make, also those without tokens.

    Of several chunks, which are for a workspace that does not hold all keys, the last one has the new tokens, seen causally; those
    before it have context that every query of the request sees.
    """

    kv_rows: torch.Tensor
    chunks: tuple[RowChunk, ...]
    calls: dict[tuple[str, float], Any]
    heads: HeadRows | None = None


class HeadRows(NamedTuple):
    """The rows of all ranks in the order of ``exchange.to_heads``, and the step as the exchange knows it."""

    rows: StepRows
    exchange: HeadExchange | PeerHeadExchange
    meta: PlannedMetadata


class HostRows(NamedTuple):
    """The numbers of :class:`StepRows`: one buffer, and where everything lies in it.

    Attributes:
        table: [6, n + 1] in the buffer: the request table of ``plan_expand`` for a world of one rank, of which it reads the first
            three rows. Each row of the step is a request there: the longest row of a request has its keys, others have none.
        chunks: (first key, keys, longest, whether causal, offset of cu_seqlens_k, offset of seqused_k) of each call.
    """

    buffer: IntArray
    table: int
    chunks: tuple[tuple[int, int, int, bool, int, int], ...]
    num_keys: int
    max_seqlen_q: int


def _aligned(count: int) -> int:
    return -(-count // 4) * 4


def _prefix(lengths: Any) -> Any:
    return np.concatenate(([0], np.cumsum(lengths)))


def host_rows(query_lens: Any, seq_lens: Any, requests: Any, limit: int) -> HostRows:
    """Plan ``n`` rows.

    Args:
        query_lens: [n] tokens of each row, at least 1.
        seq_lens: [n] position of its last token, plus one.
        requests: [n] a number for each row that rows of one request share.
        limit: keys of a call, if they can be shared out over several: new tokens stay together.
    """
    count, starts = len(query_lens), seq_lens - query_lens
    order = np.lexsort((seq_lens, requests))
    last = np.append(requests[order[1:]] != requests[order[:-1]], True)
    group = np.empty(count, np.int64)
    group[order] = np.cumsum(last) - last
    longest = order[last]  # of each request, the row that has its keys
    first = order[np.append(True, last[:-1])]
    keys, context = np.zeros(count, np.int64), np.zeros(count, np.int64)
    keys[longest], context[longest] = seq_lens[longest], starts[first]
    total = int(keys.sum())
    new, old, all_keys = _prefix(keys - context), _prefix(context), _prefix(keys)
    mine = longest[group]  # of each row, where its request's keys stand
    split = total > limit and old[-1] > 0
    calls = []
    if split:
        for at in range(0, int(old[-1]), limit):
            window = np.clip(old - at, 0, limit)
            calls.append((at, int(window[-1]), False, window[mine], np.diff(window)[mine]))
        calls.append((int(old[-1]), int(new[-1]), True, new[mine], seq_lens - context[mine]))
    else:
        calls.append((0, total, True, all_keys[mine], seq_lens))
    places = [_aligned(count + 1), _aligned(6 * (count + 1)), *[_aligned(count + 1), _aligned(count)] * len(calls)]
    offsets = np.concatenate(([0], np.cumsum(places))).tolist()
    buffer = np.zeros(offsets[-1], np.int32)
    buffer[1 : count + 1] = np.cumsum(query_lens)
    table = buffer[offsets[1] : offsets[1] + 6 * (count + 1)].reshape(6, count + 1)
    table[0], table[1], table[2] = new, old, all_keys
    chunks = []
    for number, (at, num, causal, cu_seqlens_k, used) in enumerate(calls):
        where, what = offsets[2 + 2 * number], offsets[3 + 2 * number]
        buffer[where : where + count], buffer[where + count] = cu_seqlens_k, num
        buffer[what : what + count] = used
        chunks.append((at, num, int(used.max()), causal, where, what))
    return HostRows(buffer, offsets[1], tuple(chunks), total, int(query_lens.max()))


def step_rows(host: HostRows, num_rows: int, block_table: torch.Tensor, block_size: int) -> StepRows:
    """Bring the rows to the device of ``block_table``, int32 [num_rows, blocks]: one copy and one launch, nothing is waited for."""
    device = block_table.device
    buffer = torch.from_numpy(host.buffer)
    if device.type == "cuda":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    nothing = buffer[:0]
    kv_rows = torch.empty(host.num_keys, dtype=torch.int32, device=device)
    plan_expand(
        buffer[host.table : host.table + 6 * (num_rows + 1)],
        block_table,
        nothing,
        nothing,
        nothing,
        nothing,
        torch.empty(0, dtype=torch.int64, device=device),
        kv_rows,
        num_rows,
        1,
        0,
        0,
        host.num_keys,
        len(host.chunks) > 1,
        block_size,
        1,
        0,
        1,
    )
    cu_seqlens_q = buffer[: num_rows + 1]
    chunks = []
    for first, count, longest, causal, where, what in host.chunks:
        cu_seqlens_k, used = buffer[where : where + num_rows + 1], buffer[what : what + num_rows]
        chunks.append(RowChunk(first, count, Rows(cu_seqlens_q, cu_seqlens_k, used, host.max_seqlen_q, longest, causal)))
    return StepRows(kv_rows, tuple(chunks), {})
