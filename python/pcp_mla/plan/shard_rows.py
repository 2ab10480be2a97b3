"""The rows of an exchange with a cache that is shared out, in plain NumPy: who sends what, and where each key comes to lie.

The W shards of the cache are the ranks of PCP x DCP, PCP outer: rank p of P computes on D = W / P shards, p * D to p * D + D - 1,
which all have its new tokens (tensor parallelism gives them other heads). In one all-gather each shard sends

    n = ceil(Np / D) of its rank's rows in local order, then the rows of its part of every request's context

and every rank has the keys of all requests then. A request has as many rows of context of each shard as the first one holds, which
never holds fewer than another: who sends what follows from the lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .partition import IntArray, Partition, _prefix_sum, _ranges
from .slots import PagedCache

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ShardRows:
    """Of a step, for one shard. The exchanged rows are [W * (n + C), width], shard by shard.

    Attributes:
        num_new: n, rows of new tokens that each shard sends.
        num_context: C, rows of context that each shard sends.
        context_slots: [C] int32 slot of each row of context that this shard sends, -1 for pads.
        slot_mapping: [W * (n + C)] int64 slot of each exchanged row that this shard has to write: its new tokens; else -1.
        kv_rows: [N] int32 exchanged row of each key, in the order of the plan's ``kv_rows``, -1 for pads.
    """

    num_new: int
    num_context: int
    context_slots: Any
    slot_mapping: Any
    kv_rows: Any


def shards_per_rank(cache: PagedCache, world_size: int, rank: int) -> int:
    """D, if the shards of the cache are the ranks of PCP x DCP and this shard is one of the rank's; else 0."""
    each, rest = divmod(cache.dcp_world_size, world_size)
    return each if rest == 0 and cache.dcp_rank // each == rank else 0


def shard_starts(context_lens: NDArray[Any], cache: PagedCache) -> IntArray:
    """[R+1] where each request's rows begin among the C rows of context that a shard sends."""
    return _prefix_sum(cache.held(context_lens, 0))


def shard_rows(
    part: Partition,
    block_tables: NDArray[Any],
    cache: PagedCache,
    workspace_tokens: int | None = None,
    num_tokens_padded: int | None = None,
) -> ShardRows:
    """The rows of a step; the last two as in its plan."""
    world, interleave, padded = cache.dcp_world_size, cache.cp_interleave, part.num_tokens_padded
    each = shards_per_rank(cache, part.world_size, part.rank)
    starts, new = shard_starts(part.context_lens, cache), -(-(num_tokens_padded or padded) // each)
    total = new + int(starts[-1])

    held = np.diff(starts)
    requests = np.repeat(np.arange(part.num_requests), held)
    local = _ranges(np.zeros_like(held), held).astype(np.int64)
    turn, within = np.divmod(local, interleave)
    positions = (turn * world + cache.dcp_rank) * interleave + within
    real = positions < part.context_lens[requests]
    context_slots = np.full(len(local), -1, np.int32)
    context_slots[real] = cache.slots(block_tables, requests[real], positions[real])

    holder, row = np.divmod(part.hidden_restore_idx, padded or 1)
    at = (holder * each + row // (new or 1)) * total + row % (new or 1)  # of each new token, in natural order
    requests = np.repeat(np.arange(part.num_requests), part.query_lens)
    offsets = _ranges(np.zeros_like(part.query_lens), part.query_lens)
    slot_mapping = np.full(world * total, -1, np.int64)
    slot_mapping[at] = cache.slots(block_tables, requests, part.context_lens[requests] + offsets)

    lengths = part.context_lens + part.padded_lens
    requests, positions = np.repeat(np.arange(part.num_requests), lengths), _ranges(np.zeros_like(lengths), lengths)
    offsets = positions - part.context_lens[requests]
    cached, fresh = offsets < 0, (offsets >= 0) & (offsets < part.query_lens[requests])
    kv_rows = np.full(len(positions), -1, np.int32)
    group, within = np.divmod(positions[cached], interleave)
    turn, shard = np.divmod(group, world)
    kv_rows[cached] = shard * total + new + starts[requests[cached]] + turn * interleave + within
    kv_rows[fresh] = at[_prefix_sum(part.query_lens)[requests[fresh]] + offsets[fresh]]
    if workspace_tokens is not None and part.num_kv_tokens > workspace_tokens:
        kv_rows = np.concatenate([kv_rows[cached], kv_rows[~cached]])
    return ShardRows(new, total - new, context_slots, slot_mapping, kv_rows)
