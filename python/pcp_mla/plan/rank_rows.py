"""The rows of all ranks in plain NumPy: the specification of the tables for attention over everybody's queries, some heads each.

Queries lie in the gathered order there, [P * Np, heads, D]. Rank by rank they are 2R rows, the heads and tails of the requests, and
one more of the rank's pads, which has no keys. All is known of the batch, whichever rank asks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .partition import Partition, _prefix_sum
from .slots import KeyChunk, key_chunks

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RankRows:
    """Rows of one attention call over the queries of all ranks: P * (2R + 1), rank-major; row 2R of a rank is that of its pads.

    Attributes:
        cu_seqlens_q: [P(2R+1)+1] row starts in the gathered order.
        cu_seqlens_k: [P(2R+1)+1] where each row's keys start in key order; neither lengths nor rising.
        seqused_k: [P(2R+1)] keys of each row, 0 for pads and other rows without queries.
        max_seqlen_q, max_seqlen_k: longest row, be it of pads.
        key_chunks: the calls over some of the keys, with ``cu_seqlens_k`` and ``seqused_k`` of these rows; none without a planner.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_k: Any
    max_seqlen_q: int
    max_seqlen_k: int
    key_chunks: tuple[KeyChunk, ...] = ()


def num_rank_rows(world_size: int, num_requests: int) -> int:
    return world_size * (2 * num_requests + 1)


def _all_rows(starts_and_used: list[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Key starts [2R+1] and keys [2R] of each rank, one after another, with rows of pads between them."""
    starts = np.concatenate([*(start for start, _ in starts_and_used), starts_and_used[-1][0][-1:]])
    return starts, np.concatenate([np.append(used, 0) for _, used in starts_and_used]).astype(np.int32)


def rank_rows(part: Partition, workspace_tokens: int | None = None) -> RankRows:
    """The tables of a batch, and of its key chunks (:func:`pcp_mla.plan.slots.key_chunks`)."""
    parts = [replace(part, rank=rank) for rank in range(part.world_size)]
    lengths = [np.append(each.chunk_lens[rank], part.num_tokens_padded - each.num_tokens) for rank, each in enumerate(parts)]
    by_rank = [key_chunks(each, workspace_tokens) for each in parts]
    chunks = []
    for pieces in zip(*by_rank, strict=True):
        starts, used = _all_rows([(piece.cu_seqlens_k, piece.seqused_k) for piece in pieces])
        longest = max(piece.max_seqlen_k for piece in pieces)
        chunks.append(replace(pieces[0], cu_seqlens_k=starts, seqused_k=used, max_seqlen_k=longest))
    return RankRows(
        _prefix_sum(np.concatenate(lengths)),
        *_all_rows([(each.cu_seqlens_k, each.seqused_k) for each in parts]),
        max(int(each.max()) for each in lengths),
        max(each.max_seqlen_k for each in parts),
        tuple(chunks),
    )


def longest_rows(
    lengths: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    world_size: int,
    layout: str,
    decode_policy: str,
    windows: tuple[int, int],
) -> tuple[int, int, tuple[int, ...]]:
    """``max_seqlen_q`` and ``max_seqlen_k`` of the rows, and the latter of each chunk, without making them.

    Of query_lens, context_lens and is_prefill, [R] each, and how many chunks there are, of how many rows of context each. The first
    rank's head is as long as any chunk, and somebody has the last one.
    """
    query, context, prefill = lengths
    chunk, (count, window) = -(-query // (2 * world_size)), windows
    last = np.where(prefill & (layout == "padded"), 2 * world_size * chunk, query)
    cut, held = chunk[prefill], last[prefill] - np.arange(2 * world_size)[:, None] * chunk[prefill]
    tokens = np.clip(held, 0, cut).sum(axis=1)
    tokens = tokens[:world_size] + tokens[: world_size - 1 : -1]  # of each rank: its head, and its tail from behind
    if decode_policy == "round_robin":
        tokens += [query[~prefill][rank::world_size].sum() for rank in range(world_size)]
    longest_q = max(int(np.where(prefill, chunk, query).max(initial=0)), int(np.ptp(tokens)))
    longest = longest_q, int(np.where(query > 0, context + last, 0).max(initial=0))
    if count <= 1:
        return *longest, (longest[1],) * count
    starts, chunks = _prefix_sum(context), []
    for first in range(0, (count - 1) * window, window):
        chunks.append(int(np.diff(np.clip(starts - first, 0, window))[query > 0].max(initial=0)))
    return *longest, (*chunks, int(last.max(initial=0)))
