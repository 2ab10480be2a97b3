"""The buffer that carries a step's plan to the device: where each array lies in it, and how NumPy fills it from the specification.

``csrc/planner/planner.cpp`` writes the same numbers faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..plan.partition import IntArray, Partition, _prefix_sum
from ..plan.rank_rows import num_rank_rows
from ..plan.shard_rows import shard_starts
from ..plan.slots import KeyChunk, PagedCache


def _aligned(count: int) -> int:
    """int32s of a place that keeps the next one at a multiple of 16 bytes."""
    return -(-count // 4) * 4


class StepLayout(NamedTuple):
    """Starts of the arrays, in int32s, of a planner for up to ``max_requests`` requests. A start does not depend on the step; an
    array takes as much of its place as the step's R requests need.

    The *request table*, int32 [5 + P, R + 1], is all that the ``plan_expand`` op reads. Its rows are: prefix sums of
    ``query_lens``; of ``context_lens``; of the requests' rows in key order; the length of a chunk (of the decode, for a decode);
    the first rank that holds the decode, -1 for a prefill; and for each rank prefix sums of its local tokens. It is also all that
    the ``plan_rank_rows`` op reads, whose tables, ``rank_rows_size`` int32s, are a buffer of their own. The ``plan_shard_rows`` op
    reads ``shard_starts`` [R + 1] besides.
    """

    offsets: dict[str, int]
    chunks_stop: int
    size: int
    rank_rows_size: int

    @classmethod
    def build(cls, max_requests: int, world_size: int, max_chunks: int) -> StepLayout:
        rows = 2 * max_requests
        places = {
            "row_table": 5 * (max_requests + 1),
            "cu_seqlens_q": rows + 1,
            "cu_seqlens_k": rows + 1,
            "seqused_k": rows,
            "logits_indices": max_requests,
            "discard_request_mask": -(-max_requests // 4),  # one byte a request
            "shard_starts": max_requests + 1,
            "request_table": (5 + world_size) * (max_requests + 1),
        }
        offsets, at = {}, 0
        for name, count in places.items():
            offsets[name] = at
            at += _aligned(count)
        offsets["chunks"] = at
        offsets["chunk_starts"] = 0
        offsets["chunk_cu_seqlens_k"] = _aligned(max_requests)
        offsets["chunk_seqused_k"] = offsets["chunk_cu_seqlens_k"] + _aligned(rows + 1)
        offsets["chunk_stride"] = offsets["chunk_seqused_k"] + _aligned(rows)
        size, rank_rows = at + max_chunks * offsets["chunk_stride"], num_rank_rows(world_size, max_requests) + 1
        return cls(offsets, at + offsets["chunk_stride"], size, (3 + 2 * max_chunks) * rank_rows)

    def chunk(self, number: int) -> int:
        """Start of the tables of the given key chunk."""
        return self.offsets["chunks"] + number * self.offsets["chunk_stride"]


def request_table(part: Partition) -> IntArray:
    """[5 + P, R + 1] int32; see :class:`StepLayout`."""
    decode = np.cumsum(~part.is_prefill) - 1
    owner = decode % part.world_size if part.decode_policy == "round_robin" else np.zeros_like(decode)
    chunk = np.where(part.is_prefill, -(-part.query_lens // (2 * part.world_size)), part.query_lens)
    local = [_prefix_sum(lens) for lens in part.chunk_lens.sum(axis=2)]
    rows = [_prefix_sum(part.query_lens), _prefix_sum(part.context_lens), part.cu_seqlens_kv, np.append(chunk, 0)]
    return np.stack([*rows, np.append(np.where(part.is_prefill, -1, owner), 0), *local]).astype(np.int32)


def fill(layout: StepLayout, step: IntArray, part: Partition, chunks: Sequence[KeyChunk], cache: PagedCache) -> None:
    """Write the arrays of ``part`` and the tables of its key chunks into ``step`` [layout.size] int32."""

    def put(start: int, array: IntArray) -> None:
        step[start : start + array.size] = array.reshape(-1)

    for name in ("row_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "logits_indices"):
        put(layout.offsets[name], getattr(part, name))
    mask = part.discard_request_mask.view(np.uint8)
    step.view(np.uint8)[4 * layout.offsets["discard_request_mask"] :][: len(mask)] = mask
    put(layout.offsets["shard_starts"], shard_starts(part.context_lens, cache))
    put(layout.offsets["request_table"], request_table(part))
    for number, chunk in enumerate(chunks):
        for name in ("starts", "cu_seqlens_k", "seqused_k"):
            put(layout.chunk(number) + layout.offsets[f"chunk_{name}"], getattr(chunk, name))
