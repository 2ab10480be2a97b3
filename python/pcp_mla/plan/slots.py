"""Where tokens lie in the paged latent cache, in plain NumPy: the specification of a planner's slots and key rows.

The cache is ``[num_blocks, block_size]`` rows of one token; a *slot* is a row's number in it, -1 means none. With decode context
parallelism it is shared out over ``W`` shards in runs of ``I`` tokens: position ``p`` is on shard ``(p // I) % W``, as its
``(p // (I * W)) * I + p % I``-th token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_count
from .partition import IntArray, Partition, _prefix_sum, _ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class PagedCache:
    """Shape of the cache: tokens of a block, number of shards W, this shard, interleave size I."""

    block_size: int = 1
    dcp_world_size: int = 1
    dcp_rank: int = 0
    cp_interleave: int = 1

    def __post_init__(self) -> None:
        for name in ("block_size", "dcp_world_size", "cp_interleave"):
            check_count("PagedCache", name, getattr(self, name), 1)
        check_count("PagedCache", "dcp_rank", self.dcp_rank)
        if self.dcp_rank >= self.dcp_world_size:
            raise ValueError(f"PagedCache: dcp_rank must be in 0..{self.dcp_world_size - 1}, got {self.dcp_rank}")

    def slots(self, block_tables: NDArray[Any], requests: NDArray[Any], positions: NDArray[Any]) -> NDArray[np.int64]:
        """int64 slots of tokens, given their requests and their positions in them; -1 where another shard holds the token, and of a
        block whose number is negative or too large: an int32 must hold the slot."""
        group, within = np.divmod(positions.astype(np.int64), self.cp_interleave)
        turn, shard = np.divmod(group, self.dcp_world_size)
        block, offset = np.divmod(turn * self.cp_interleave + within, self.block_size)
        mine = shard == self.dcp_rank
        blocks = np.full(positions.shape, -1, np.int64)
        blocks[mine] = block_tables[requests[mine], block[mine]]
        known = (blocks >= 0) & (blocks < 2**31)
        slots = np.where(known, blocks, 0) * self.block_size + offset
        return np.where(known & (slots < 2**31), slots, -1)

    def held(self, lengths: NDArray[Any], shard: int) -> NDArray[np.int64]:
        """Tokens that a shard has of sequences of so many; the first shard never has fewer than another one."""
        turns, rest = np.divmod(np.asarray(lengths, np.int64), self.cp_interleave * self.dcp_world_size)
        return turns * self.cp_interleave + np.clip(rest - shard * self.cp_interleave, 0, self.cp_interleave)

    def blocks_of(self, lengths: NDArray[Any]) -> NDArray[np.int64]:
        """Blocks that this shard needs for sequences of so many tokens."""
        return -(-self.held(lengths, self.dcp_rank) // self.block_size)


def slot_mapping(part: Partition, block_tables: NDArray[Any], cache: PagedCache) -> NDArray[np.int64]:
    """[P * Np] int64 slot of each row in gathered order, -1 for pads and for the further copies of a decode."""
    requests = np.repeat(np.arange(part.num_requests), part.query_lens)
    offsets = _ranges(np.zeros_like(part.query_lens), part.query_lens)
    return part.gathered_slot_mapping(cache.slots(block_tables, requests, part.context_lens[requests] + offsets))


@dataclass(frozen=True, eq=False)
class KeyChunk:
    """One attention call's keys: rows ``first_row ... first_row + num_rows - 1`` of ``kv_rows``, in the call's own key order.

    Attributes:
        causal: whether the mask is causal (bottom-right); a chunk of context is seen by every query.
        max_seqlen_k: longest row.
        starts: [R] position in its sequence of each request's first key here.
        cu_seqlens_k: [2R+1] where each row's keys start, counted from ``first_row``; not lengths.
        seqused_k: [2R] keys of each row, 0 for a row without queries or without keys here.
    """

    first_row: int
    num_rows: int
    causal: bool
    max_seqlen_k: int
    starts: Any
    cu_seqlens_k: Any
    seqused_k: Any


def _chunk(first_row: int, causal: bool, starts: IntArray, prefix: IntArray, used: IntArray) -> KeyChunk:
    cu_seqlens_k = np.append(np.repeat(prefix[:-1], 2), prefix[-1]).astype(np.int32)
    longest = int(used.max(initial=0))
    return KeyChunk(first_row, int(prefix[-1]), causal, longest, starts.astype(np.int32), cu_seqlens_k, used.astype(np.int32))


def key_chunks(part: Partition, workspace_tokens: int | None = None) -> list[KeyChunk]:
    """The attention calls of a step whose K and V must not be more than ``workspace_tokens`` rows at a time.

    If all N rows fit: one causal call in key order. Else the context of all requests, one after another, is cut into windows of
    ``workspace_tokens`` rows, each a call without a mask, and the new tokens are the last call. The outputs are merged by their
    LSEs.
    """
    if workspace_tokens is not None:
        check_count("key_chunks", "workspace_tokens", workspace_tokens, 1)
    if workspace_tokens is None or part.num_kv_tokens <= workspace_tokens:
        return [_chunk(0, True, np.zeros_like(part.context_lens), part.cu_seqlens_kv, part.seqused_k)]
    context, has_queries = _prefix_sum(part.context_lens), part.seqused_k > 0
    chunks = []
    for first in range(0, int(context[-1]), workspace_tokens):
        prefix = np.clip(context - first, 0, workspace_tokens)
        starts = np.clip(first - context[:-1], 0, part.context_lens)
        chunks.append(_chunk(first, False, starts, prefix, np.where(has_queries, np.repeat(np.diff(prefix), 2), 0)))
    used = np.where(has_queries, part.seqused_k - np.repeat(part.context_lens, 2), 0)
    return [*chunks, _chunk(int(context[-1]), True, part.context_lens, _prefix_sum(part.padded_lens), used)]


def kv_rows(part: Partition, block_tables: NDArray[Any], cache: PagedCache, workspace_tokens: int | None = None) -> IntArray:
    """[N] int32 slot of every key: in key order, or if that is more than ``workspace_tokens`` rows, all context, then all new
    tokens. Rows of pads are -1."""
    lengths = part.context_lens + part.padded_lens
    requests = np.repeat(np.arange(part.num_requests), lengths)
    positions = _ranges(np.zeros_like(lengths), lengths)
    real = positions < (part.context_lens + part.query_lens)[requests]
    slots = np.full(len(positions), -1, np.int32)
    slots[real] = cache.slots(block_tables, requests[real], positions[real])
    if workspace_tokens is not None:
        check_count("key_chunks", "workspace_tokens", workspace_tokens, 1)
    if workspace_tokens is None or part.num_kv_tokens <= workspace_tokens:
        return slots
    cached = positions < part.context_lens[requests]
    return np.concatenate([slots[cached], slots[~cached]])
