"""The metadata that a planner hands out: views of its buffers, made when somebody asks."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..plan.metadata import PCPMetadata
from ..plan.partition import Partition, partition
from ..plan.rank_rows import RankRows, longest_rows, num_rank_rows
from ..plan.shard_rows import ShardRows
from ..plan.slots import KeyChunk, PagedCache
from .buffers import PlanBuffers


class PlannedMetadata(PCPMetadata):
    """A :class:`PCPMetadata` in a planner's buffers. Its tensors hold the planner's *last* plan: the next one overwrites them. One
    that is asked for only then raises RuntimeError; counts and ``partition`` stay those of its own plan.

    Beside the fields of PCPMetadata:

    Attributes:
        num_requests: R, with those that pad the batch.
        paged_cache: shape of the cache that the slots are in; None without block tables.
        slot_mapping: [P * Np] int64 in gathered order, -1 for pads and further copies of a decode; None without block tables.
        kv_rows: int32 slot of every key, for the key chunks one after another; None without block tables.
        key_chunks: the attention calls over these rows; see :func:`pcp_mla.plan.slots.key_chunks`.
        discard_request_mask: [R] bool.

    In a plan that was padded (``num_tokens_padded=``) the per-token arrays have the sizes that a captured graph needs: [Np] the
    local ones, [P * Np] the restore indices, pads -1 (positions 0). The four counts of the two-call ops are upper limits there, and
    so are the lengths of the longest rows: Np and N, of a chunk its rows.
    """

    num_new_tokens: int
    num_restored: int
    num_context_tokens: int
    num_key_tokens: int
    chunk_max_seqlens: tuple[int, ...]
    batch: bytes
    _buffers: PlanBuffers
    _plan: int
    _has_slots: bool
    _asked: tuple[int | None, int | None, bool]

    def __init__(
        self,
        buffers: PlanBuffers,
        counts: dict[str, Any],
        has_slots: bool,
        asked: tuple[int | None, int | None, bool],
    ) -> None:
        counts["device"] = buffers.device
        counts["_buffers"] = buffers
        counts["_plan"] = buffers.plan
        counts["_has_slots"] = has_slots
        counts["_asked"] = asked  # num_tokens_padded, workspace_tokens, whether there were prompt_lens
        if asked[0] is not None:
            # A chunk's tail is never longer than its head.
            tokens, keys = counts["num_tokens_padded"], counts["num_kv_tokens"]
            counts.update(num_head_tokens=tokens, num_tail_tokens=tokens // 2, num_head_kv=keys, num_tail_kv=keys)
            counts.update(max_seqlen_q=tokens, max_seqlen_k=keys)
        object.__setattr__(self, "__dict__", counts)  # the base class is frozen

    @property
    def world_size(self) -> int:
        return self._buffers.world_size

    @property
    def rank(self) -> int:
        return self._buffers.rank

    @cached_property
    def partition(self) -> Partition:
        """The specification of this plan's batch, built anew: for looking things up on the host, not for every step."""
        words = 4 * self.num_requests
        return partition(
            *self.lengths,
            world_size=self.world_size,
            rank=self.rank,
            layout=self._buffers.layout,
            decode_policy=self._buffers.decode_policy,
            prompt_lens=np.frombuffer(self.batch[2 * words : 3 * words], np.int32) if self._asked[2] else None,
        )

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        query_lens, context_lens, _ = np.frombuffer(self.batch, np.int32, 3 * self.num_requests).reshape(3, -1)
        return query_lens, context_lens, np.frombuffer(self.batch, np.bool_, offset=12 * self.num_requests)

    @property
    def num_local_rows(self) -> int:
        return self.num_tokens if self._asked[0] is None else self.num_tokens_padded

    @cached_property
    def is_replicated(self) -> bool:
        """As in PCPMetadata; never of a padded plan, whose captured graph another batch will use."""
        buffers = self._buffers
        if self._asked[0] is not None or buffers.layout != "unpadded" or buffers.decode_policy != "replicate":
            return False
        query_lens, _, is_prefill = self.lengths
        return not query_lens[is_prefill].any()

    @property
    def paged_cache(self) -> PagedCache | None:
        return self._buffers.cache if self._has_slots else None

    def _current(self) -> PlanBuffers:
        buffers = self._buffers
        if buffers.plan != self._plan:
            what = f"got plan {self._plan} while the planner's buffers hold plan {buffers.plan}"
            raise RuntimeError(f"PlannedMetadata: a tensor must be read for the first time before the next plan(), {what}")
        return buffers

    # Arrays of the step buffer.

    def _step(self, name: str, count: int) -> torch.Tensor:
        buffers = self._current()
        return buffers.step.narrow(0, buffers.step_layout.offsets[name], count)

    @cached_property
    def row_table(self) -> torch.Tensor:
        return self._step("row_table", 5 * (self.num_requests + 1)).view(5, -1)

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        return self._step("cu_seqlens_q", 2 * self.num_requests + 1)

    @cached_property
    def cu_seqlens_k(self) -> torch.Tensor:
        return self._step("cu_seqlens_k", 2 * self.num_requests + 1)

    @cached_property
    def seqused_k(self) -> torch.Tensor:
        return self._step("seqused_k", 2 * self.num_requests)

    @cached_property
    def logits_indices(self) -> torch.Tensor:
        return self._step("logits_indices", self.num_requests)

    @cached_property
    def discard_request_mask(self) -> torch.Tensor:
        words = self._step("discard_request_mask", -(-self.num_requests // 4))
        return words.view(torch.bool)[: self.num_requests]

    @cached_property
    def key_chunks(self) -> tuple[KeyChunk, ...]:
        buffers, rows, window = self._current(), 2 * self.num_requests, self._asked[1] or 0
        offsets, step, last = buffers.step_layout.offsets, buffers.step, len(self.chunk_max_seqlens) - 1
        chunks, first = [], 0
        for number, longest in enumerate(self.chunk_max_seqlens):
            start = buffers.step_layout.chunk(number)
            count = min(window, self.num_context_tokens - first) if number < last else self.num_key_tokens - first
            tables = (
                step.narrow(0, start + offsets["chunk_starts"], self.num_requests),
                step.narrow(0, start + offsets["chunk_cu_seqlens_k"], rows + 1),
                step.narrow(0, start + offsets["chunk_seqused_k"], rows),
            )
            chunks.append(KeyChunk(first, count, number == last, longest if self._asked[0] is None else count, *tables))
            first += count
        return tuple(chunks)

    # Tables of all ranks.

    @cached_property
    def rank_rows(self) -> RankRows:
        """As in PCPMetadata, with key chunks. Once it was asked of a plan, every plan on a GPU fills the tables, at the same
        addresses for as many requests and chunks: captured graphs of padded plans can read them."""
        buffers, count = self._current(), len(self.chunk_max_seqlens)
        size = num_rank_rows(self.world_size, self.num_requests) + 1
        tables = (3 + 2 * (count if count > 1 else 0), size)
        queries, *keys = buffers.expanded_rank_rows().narrow(0, 0, tables[0] * size).view(tables)
        split, windows = (self.world_size, buffers.layout, buffers.decode_policy), (count, self._asked[1] or 0)
        longest_q, longest_k, longest = longest_rows(self.lengths, *split, windows)
        if self._asked[0] is not None:  # as of this rank's own rows
            longest_q, longest_k = self.max_seqlen_q, self.max_seqlen_k
            longest = tuple(chunk.max_seqlen_k for chunk in self.key_chunks)
        pairs = [(starts, used[:-1]) for starts, used in zip(keys[::2], keys[1::2], strict=True)]
        of_chunks = zip(self.key_chunks, pairs[1:] or pairs, longest, strict=True)
        chunks = (replace(chunk, cu_seqlens_k=k, seqused_k=n, max_seqlen_k=most) for chunk, (k, n), most in of_chunks)
        return RankRows(queries, *pairs[0], longest_q, longest_k, tuple(chunks))

    @property
    def shard_rows(self) -> ShardRows | None:
        """As in PCPMetadata; looked for anew each time, so that what is there is of this plan.

        Raises:
            ValueError: all shards together would send 2**31 rows or more.
        """
        buffers = self._buffers
        if not (self._has_slots and buffers.shards_per_rank):
            return None
        sent, total = self.sent_rows, self.num_exchanged
        if total >= 2**31:
            raise ValueError(f"PCPMetadata: shard_rows must be less than 2**31 rows of all shards, got {total}")
        context, slots, rows = self._current().expanded_shard_rows(sent)
        return ShardRows(*sent, context[: sent[1]], slots[:total], rows[: self.num_kv_tokens])

    @cached_property
    def sent_rows(self) -> tuple[int, int]:
        """Rows of new tokens and of context that each shard sends: of numbers that all ranks share. Only of a shared-out cache."""
        buffers = self._buffers
        return -(-self.num_tokens_padded // buffers.shards_per_rank), int(buffers.cache.held(self.lengths[1], 0).sum())

    @property
    def num_exchanged(self) -> int:
        return self._buffers.cache.dcp_world_size * sum(self.sent_rows)

    # Arrays over tokens.

    def _token_rows(self, name: str, count: int, padded_count: int) -> torch.Tensor:
        return self._current().expanded_tokens(name).narrow(0, 0, count if self._asked[0] is None else padded_count)

    @cached_property
    def local_token_indices(self) -> torch.Tensor:
        return self._token_rows("local_token_indices", self.num_tokens, self.num_tokens_padded)

    @cached_property
    def positions(self) -> torch.Tensor:
        return self._token_rows("positions", self.num_tokens, self.num_tokens_padded)

    @cached_property
    def allgather_restore_idx(self) -> torch.Tensor:
        return self._token_rows("allgather_restore_idx", self.num_restored, self.world_size * self.num_tokens_padded)

    @cached_property
    def hidden_restore_idx(self) -> torch.Tensor:
        return self._token_rows("hidden_restore_idx", self.num_new_tokens, self.world_size * self.num_tokens_padded)

    @cached_property
    def slot_mapping(self) -> torch.Tensor | None:
        if not self._has_slots:
            return None
        gathered = self.world_size * self.num_tokens_padded
        return self._token_rows("slot_mapping", gathered, gathered)

    @cached_property
    def kv_rows(self) -> torch.Tensor | None:
        if not self._has_slots:
            return None
        return self._current().expanded_keys().narrow(0, 0, self.num_kv_tokens)

    def shared_fields(self) -> dict[str, Any]:
        """What all ranks must have equal, by the names of :data:`pcp_mla.planner.consistency.FIELDS`."""
        words, buffers = 4 * self.num_requests, self._buffers
        padded, workspace = self._asked[:2]
        return {
            "query_lens": self.batch[:words],
            "context_lens": self.batch[words : 2 * words],
            "is_prefill": self.batch[3 * words :],
            "prompt_lens": (self._asked[2], self.batch[2 * words : 3 * words]),
            "world_size": buffers.world_size,
            "layout": buffers.layout,
            "decode_policy": buffers.decode_policy,
            "block_size": buffers.cache.block_size,
            "dcp_world_size": buffers.cache.dcp_world_size,
            "cp_interleave": buffers.cache.cp_interleave,
            "num_tokens_padded": None if padded is None else operator.index(padded),
            "workspace_tokens": None if workspace is None else operator.index(workspace),
        }
