"""Dual-chunk-swap partition of a ragged batch, in plain NumPy.

This file is the readable specification of every index of a step: which rank holds which token, in which order, and where each token
is found again after an all-gather. Anything that computes the same numbers faster is tested against it.

A prefill request of ``L`` new tokens is cut into ``2P`` chunks of ``c = ceil(L / 2P)`` tokens. Rank ``r`` holds chunk ``r`` (the
*head*) and chunk ``2P-1-r`` (the *tail*), one after the other, so that every rank has about the same causal work. A decode request
(one or a few tokens) is not cut: it is a head without a tail.

Orders of tokens:

* natural: requests one after another, each from its first token.
* local: what one rank holds: for every request its head, then its tail.
* gathered (rank-major): rank 0's local tokens, rank 1's, ..., each rank padded to ``num_tokens_padded``.
* key order: natural, with each request's cached context in front of its new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

LAYOUTS = ("unpadded", "padded")
DECODE_POLICIES = ("replicate", "round_robin")

IntArray: TypeAlias = "NDArray[np.int32]"
BoolArray: TypeAlias = "NDArray[np.bool_]"


def _prefix_sum(lengths: NDArray[Any]) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> IntArray:
    """[start, start+1, ..., start+length-1] for every pair, one after another."""
    before = np.cumsum(lengths) - lengths
    return (np.repeat(starts - before, lengths) + np.arange(int(np.sum(lengths)))).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Partition:
    """One rank's share of a batch of ``R`` requests. Made by :func:`partition`; arrays are int32 unless said otherwise.

    Attributes:
        world_size, rank, layout, decode_policy: as given to :func:`partition`.
        query_lens, context_lens: [R] new tokens and cached tokens of each request.
        is_prefill: [R] bool.
        discard_request_mask: [R] bool, requests that sample nothing in this step.
        padded_lens: [R] tokens of each request in the restored order: ``query_lens`` in the unpadded layout; in the padded one
            a multiple of 2P for a prefill and P copies of a replicated decode.
        chunk_starts, chunk_lens: [P, R, 2] every rank's head and tail: offset in the request, and length.
    """

    world_size: int
    rank: int
    layout: str
    decode_policy: str
    query_lens: IntArray
    context_lens: IntArray
    is_prefill: BoolArray
    discard_request_mask: BoolArray
    padded_lens: IntArray
    chunk_starts: IntArray
    chunk_lens: IntArray

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    @cached_property
    def tokens_per_rank(self) -> IntArray:
        """[P] local tokens of every rank."""
        return self.chunk_lens.sum(axis=(1, 2), dtype=np.int32)

    @property
    def num_tokens(self) -> int:
        """T, the local tokens of this rank."""
        return int(self.tokens_per_rank[self.rank])

    @property
    def num_tokens_padded(self) -> int:
        """Np, the local tokens of the fullest rank: what every rank sends, and what graph dispatch must use."""
        return int(self.tokens_per_rank.max())

    @cached_property
    def local_lens(self) -> IntArray:
        """[R] local tokens of each request on this rank."""
        return self.chunk_lens[self.rank].sum(axis=1, dtype=np.int32)

    @property
    def num_pcp_pads(self) -> IntArray:
        """[R] pad tokens (and copies of decodes) that the restored order holds beyond the real ones."""
        return self.padded_lens - self.query_lens

    # Rows of the attention call: request i has rows 2i (head) and 2i+1 (tail); either may be empty.

    @cached_property
    def cu_seqlens_q(self) -> IntArray:
        """[2R+1] row starts in local order."""
        return _prefix_sum(self.chunk_lens[self.rank].reshape(-1))

    @cached_property
    def cu_seqlens_k(self) -> IntArray:
        """[2R+1] row starts in key order: a request's head and tail share one start. Differences are NOT lengths; see seqused_k."""
        return np.append(np.repeat(self.cu_seqlens_kv[:-1], 2), self.cu_seqlens_kv[-1])

    @cached_property
    def seqused_k(self) -> IntArray:
        """[2R] keys that a row may attend to, counted from its start: context + chunk start + chunk length; 0 for an empty row."""
        lens = self.chunk_lens[self.rank]
        used = self.context_lens[:, None] + self.chunk_starts[self.rank] + lens
        return np.where(lens > 0, used, 0).astype(np.int32).reshape(-1)

    @cached_property
    def cu_seqlens_kv(self) -> IntArray:
        """[R+1] request starts in key order."""
        return _prefix_sum(self.context_lens + self.padded_lens)

    @property
    def num_kv_tokens(self) -> int:
        """N, rows of K and V in key order."""
        return int(self.cu_seqlens_kv[-1])

    @property
    def max_seqlen_q(self) -> int:
        return int(self.chunk_lens[self.rank].max(initial=0))

    @property
    def max_seqlen_k(self) -> int:
        return int(self.seqused_k.max(initial=0))

    @cached_property
    def row_table(self) -> IntArray:
        """[5, R+1] prefix sums that describe every copy around two separate attention calls: queries of the heads, queries of the
        tails, keys of the heads, keys of the tails (all four: ``cu_seqlens`` of those calls), and request starts in key order."""
        lens, used = self.chunk_lens[self.rank], self.seqused_k.reshape(-1, 2)
        columns = (lens[:, 0], lens[:, 1], used[:, 0], used[:, 1], np.diff(self.cu_seqlens_kv))
        return np.stack([_prefix_sum(c) for c in columns])

    # Per-token arrays.

    @cached_property
    def positions(self) -> IntArray:
        """[T] position of each local token in its sequence, context included. Pads count on past the end."""
        lens = self.chunk_lens[self.rank]
        return _ranges((self.context_lens[:, None] + self.chunk_starts[self.rank]).reshape(-1), lens.reshape(-1))

    @cached_property
    def local_token_indices(self) -> IntArray:
        """[T] index of each local token in natural order, -1 for a pad."""
        request = np.repeat(np.arange(self.num_requests), self.local_lens)
        offset = self.positions - self.context_lens[request]
        index = (_prefix_sum(self.query_lens)[:-1])[request] + offset
        return np.where(offset < self.query_lens[request], index, -1).astype(np.int32)

    @cached_property
    def unpad_mask(self) -> BoolArray:
        """[sum(padded_lens)] bool: which rows of the restored order are real tokens (the first copy of a replicated decode)."""
        return _ranges(np.zeros_like(self.padded_lens), self.padded_lens) < np.repeat(self.query_lens, self.padded_lens)

    @cached_property
    def allgather_restore_idx(self) -> IntArray:
        """[sum(padded_lens)] where each row of the restored order lies in the gathered order."""
        world, count = self.world_size, self.num_requests
        lens = self.chunk_lens.reshape(world, -1)
        local_starts = (np.cumsum(lens, axis=1) - lens).reshape(world, count, 2)
        gathered_starts = local_starts + (np.arange(world) * self.num_tokens_padded)[:, None, None]
        # A request's chunks in natural order: every rank's head, then the tails from the last rank back to the first. A replicated
        # decode has P heads: in the padded layout all of them are restored, in the unpadded one the first.
        starts = np.concatenate([gathered_starts[:, :, 0], gathered_starts[::-1, :, 1]]).T
        lengths = np.concatenate([self.chunk_lens[:, :, 0], self.chunk_lens[::-1, :, 1]]).T.copy()
        if self.layout == "unpadded" and self.decode_policy == "replicate":
            lengths[~self.is_prefill, 1:] = 0
        return _ranges(starts.reshape(-1), lengths.reshape(-1))

    @cached_property
    def hidden_restore_idx(self) -> IntArray:
        """[sum(query_lens)] where each real token, in natural order, lies in the gathered order."""
        return self.allgather_restore_idx[self.unpad_mask]

    @cached_property
    def gathered_token_indices(self) -> IntArray:
        """[P * Np] the inverse: each gathered row's token in natural order, -1 for pads and for the further copies of a decode."""
        out = np.full(self.world_size * self.num_tokens_padded, -1, np.int32)
        out[self.hidden_restore_idx] = np.arange(len(self.hidden_restore_idx), dtype=np.int32)
        return out

    @cached_property
    def logits_indices(self) -> IntArray:
        """[R] row of each request's last token in the restored order, -1 where a request has no token in this step."""
        last = _prefix_sum(self.padded_lens)[:-1] + self.query_lens - 1
        return np.where(self.query_lens > 0, last, -1).astype(np.int32)

    # Index tensors of the first implementation: index_select arguments around two attention calls.

    @cached_property
    def query_head_indices(self) -> IntArray:
        """Local rows of all heads."""
        return _ranges(self.cu_seqlens_q[:-1:2], self.chunk_lens[self.rank, :, 0])

    @cached_property
    def query_tail_indices(self) -> IntArray:
        """Local rows of all tails."""
        return _ranges(self.cu_seqlens_q[1:-1:2], self.chunk_lens[self.rank, :, 1])

    @cached_property
    def kv_head_indices(self) -> IntArray:
        """Key-order rows that each head attends to, request by request."""
        return _ranges(self.cu_seqlens_kv[:-1], self.seqused_k[0::2])

    @cached_property
    def kv_tail_indices(self) -> IntArray:
        """Key-order rows that each tail attends to, request by request."""
        return _ranges(self.cu_seqlens_kv[:-1], self.seqused_k[1::2])

    @cached_property
    def output_restore_idx(self) -> IntArray:
        """[T] where each local row lies in the concatenation of the heads' and the tails' outputs."""
        out = np.empty(self.num_tokens, np.int32)
        out[np.concatenate([self.query_head_indices, self.query_tail_indices])] = np.arange(self.num_tokens, dtype=np.int32)
        return out

    def padded_slot_mapping(self, slot_mapping: ArrayLike) -> NDArray[np.int64]:
        """[sum(padded_lens)] int64 cache slots in the restored order, -1 for pads, from ``slot_mapping`` [sum(query_lens)]."""
        out = np.full(len(self.unpad_mask), -1, np.int64)
        out[self.unpad_mask] = self._slots(slot_mapping)
        return out

    def gathered_slot_mapping(self, slot_mapping: ArrayLike) -> NDArray[np.int64]:
        """[P * Np] int64 cache slots in the gathered order, -1 for pads and copies, from ``slot_mapping`` [sum(query_lens)]."""
        index = self.gathered_token_indices
        slots = np.append(self._slots(slot_mapping), -1)
        return slots[index]

    def _slots(self, slot_mapping: ArrayLike) -> NDArray[np.int64]:
        slots = np.asarray(slot_mapping, np.int64)
        total = int(self.query_lens.sum())
        if slots.shape != (total,):
            raise ValueError(f"slot_mapping: must have shape ({total},), one slot per new token, got {slots.shape}")
        return slots


def check_layout(op: str, layout: str, decode_policy: str) -> None:
    """Raise unless the two are known (ValueError) and go together (NotImplementedError)."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if decode_policy not in DECODE_POLICIES:
        raise ValueError(f"{op}: decode_policy must be one of {', '.join(DECODE_POLICIES)}, got {decode_policy!r}")
    if layout == "padded" and decode_policy == "round_robin":
        raise NotImplementedError(f"{op}: the padded layout supports decode_policy 'replicate' only, got 'round_robin'")


def _lengths(name: str, values: ArrayLike, count: int | None = None) -> IntArray:
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"partition: {name} must be one-dimensional, got {given.ndim} dimensions")
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(f"partition: {name} must be integers, got {given.dtype}")
    if count is not None and len(given) != count:
        raise ValueError(f"partition: {name} must have one entry for each of the {count} requests, got {len(given)}")
    if (given < 0).any():
        i = int(np.argmax(given < 0))
        raise ValueError(f"partition: {name} must not be negative, got {given[i]} for request {i}")
    total = sum(given.tolist())  # Python's integers do not overflow
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"partition: {name} must add up to less than 2**31, got {total}")
    return given.astype(np.int32)


def partition(
    query_lens: Sequence[int] | ArrayLike,
    context_lens: Sequence[int] | ArrayLike | None = None,
    is_prefill: Sequence[bool] | ArrayLike | None = None,
    *,
    world_size: int,
    rank: int,
    layout: str = "unpadded",
    decode_policy: str = "replicate",
    prompt_lens: Sequence[int] | ArrayLike | None = None,
) -> Partition:
    """Split a batch over ``world_size`` ranks by dual-chunk swap.

    Args:
        query_lens: [R] new tokens of each request in this step; 0 is allowed.
        context_lens: [R] tokens that each request already has in the cache; none by default.
        is_prefill: [R] bool; False marks a decode request, which is not cut. All are prefills by default.
        world_size: P, at least 1.
        rank: 0 ... P-1.
        layout: ``"unpadded"``: chunks of ceil(L/2P), the last ones short or empty, ranks padded to the largest in collectives.
            ``"padded"``: every prefill is padded to a multiple of 2P and every decode copied to each rank, so that all ranks hold
            equally many tokens.
        decode_policy: ``"replicate"``: every rank computes every decode. ``"round_robin"``: the j-th decode of the batch goes to
            rank j mod P (unpadded layout only).
        prompt_lens: [R] full lengths known so far; a request that has not reached its own samples nothing. Default: all sample.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; the message has its name and value.
        NotImplementedError: ``padded`` with ``round_robin``.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int | np.integer):
        raise TypeError(f"partition: world_size must be an int, got {world_size!r}")
    if world_size < 1:
        raise ValueError(f"partition: world_size must be at least 1, got {world_size}")
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"partition: rank must be an int, got {rank!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"partition: rank must be in 0..{world_size - 1}, got {rank}")
    check_layout("partition", layout, decode_policy)
    queries = _lengths("query_lens", np.asarray(query_lens))
    count = len(queries)
    contexts = _lengths("context_lens", np.zeros(count, np.int32) if context_lens is None else np.asarray(context_lens), count)
    prefill = np.ones(count, np.bool_) if is_prefill is None or count == 0 else np.asarray(is_prefill)
    if prefill.dtype != np.bool_:
        raise TypeError(f"partition: is_prefill must be bool, got {prefill.dtype}")
    if prefill.shape != (count,):
        raise ValueError(f"partition: is_prefill must have one entry for each of the {count} requests, got shape {prefill.shape}")
    reached = contexts + queries
    prompts = reached if prompt_lens is None else _lengths("prompt_lens", np.asarray(prompt_lens), count)

    chunk = -(-queries.astype(np.int64) // (2 * world_size))
    padded = queries.astype(np.int64)
    if layout == "padded":
        padded = np.where(prefill, chunk * 2 * world_size, padded * world_size)
    total = int(contexts.sum(dtype=np.int64) + padded.sum())
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"partition: context_lens and padded query_lens together must add up to less than 2**31, got {total}")

    ranks = np.arange(world_size)
    number = np.stack([ranks, 2 * world_size - 1 - ranks], axis=1)[:, None, :]  # [P, 1, 2] chunk numbers of each rank
    cut = padded[None, :, None]
    starts = np.minimum(number * chunk[None, :, None], cut)
    ends = np.minimum((number + 1) * chunk[None, :, None], cut)
    lens = ends - starts
    decodes = np.flatnonzero(~prefill)
    starts[:, decodes, :] = 0
    lens[:, decodes, :] = 0
    if decode_policy == "replicate":
        lens[:, decodes, 0] = queries[decodes]
    else:
        lens[np.arange(len(decodes)) % world_size, decodes, 0] = queries[decodes]
    return Partition(
        world_size=int(world_size),
        rank=int(rank),
        layout=layout,
        decode_policy=decode_policy,
        query_lens=queries,
        context_lens=contexts,
        is_prefill=prefill,
        discard_request_mask=(reached < prompts) | (queries == 0),
        padded_lens=padded.astype(np.int32),
        chunk_starts=starts.astype(np.int32),
        chunk_lens=lens.astype(np.int32),
    )
