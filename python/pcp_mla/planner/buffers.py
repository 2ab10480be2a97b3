"""A planner's tensors: where a plan lies on the device, and how its per-token arrays get there."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.plan_expand import plan_expand
from ..ops.plan_rank_rows import plan_rank_rows
from ..ops.plan_shard_rows import plan_shard_rows
from ..plan.shard_rows import shards_per_rank
from ..plan.slots import PagedCache
from .step_buffer import StepLayout


class PlanBuffers:
    """What plans are written to, and all that a metadata keeps alive: it knows its buffers, they know neither it nor the planner.

    Attributes:
        plan: number of the plan that they hold, from 1 on.
        tables: on a CPU [max_requests, blocks], the block numbers as they were when they were planned; None elsewhere, where a plan
            is expanded at once.
        rank_rows: tables of all ranks' rows; None until somebody asks for them.
        shards_per_rank: D, where the shards of the cache are the ranks of PCP x DCP; else 0.
        shard_rows: ``context_slots``, ``slot_mapping`` and ``kv_rows`` of :class:`pcp_mla.plan.shard_rows.ShardRows`, each in a
            buffer that grows.
    """

    def __init__(
        self,
        layout: StepLayout,
        max_local_tokens: int,
        max_kv_tokens: int,
        cache: PagedCache,
        split: tuple[int, int, str, str],
        device: torch.device | str,
    ) -> None:
        self.world_size, self.rank, self.layout, self.decode_policy = split
        self.step_layout, self.cache = layout, cache
        self._cache_numbers = (cache.block_size, cache.dcp_world_size, cache.dcp_rank, cache.cp_interleave)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self.step = torch.zeros(layout.size, dtype=torch.int32, device=device)
            self.device = self.step.device

            def empty(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
                return torch.empty(count, dtype=dtype, device=self.device)

            gathered = self.world_size * max_local_tokens
            self.local_token_indices = empty(max_local_tokens)
            self.positions = empty(max_local_tokens)
            self.allgather_restore_idx = empty(gathered)
            self.hidden_restore_idx = empty(gathered)
            self.slot_mapping = empty(gathered, torch.int64)
            self.kv_rows = empty(max(0, max_kv_tokens))
            self.request_table = self.step[layout.offsets["request_table"] : layout.offsets["chunks"]]
        self.kv_address = self.kv_rows.data_ptr()
        self.tables: torch.Tensor | None = None
        self.plan = 0
        self.tokens_expanded = self.keys_expanded = self.rank_rows_expanded = self.shard_rows_expanded = False
        self.rank_rows: torch.Tensor | None = None
        self.shards_per_rank = shards_per_rank(cache, self.world_size, self.rank) if cache.dcp_world_size > 1 else 0
        self.shard_rows = [self.kv_rows[:0], self.slot_mapping[:0], self.kv_rows[:0]]
        self._counts = (0, 0, 0, 0, 0)

    def hold(self, counts: dict[str, Any], tables: torch.Tensor | None, workspace_tokens: int | None) -> None:
        """From now on they hold the plan of these counts (:data:`pcp_mla.planner.host.COUNTS`): nothing is expanded yet."""
        self.plan += 1
        self.tables = tables
        self.tokens_expanded = self.keys_expanded = self.rank_rows_expanded = self.shard_rows_expanded = False
        chunks = len(counts["chunk_max_seqlens"])
        split = (chunks, int(workspace_tokens or 0)) if chunks > 1 else (0, 0)
        self._counts = (counts["num_requests"], counts["num_tokens_padded"], counts["num_kv_tokens"], *split)

    def make_room(self, keys: int) -> None:
        """Let ``kv_rows`` be at least so long, at another address if it was not."""
        if self.kv_rows.shape[0] < keys:
            with torch.inference_mode(False):
                self.kv_rows = torch.empty(2 * keys, dtype=torch.int32, device=self.device)
            self.kv_address = self.kv_rows.data_ptr()

    def expand(self, tables: torch.Tensor | None, tokens: bool, keys: bool) -> None:
        """Fill the plan's per-token arrays, its key rows, or both: one launch."""
        requests, rows, kv_rows, chunks, _ = self._counts
        plan_expand(
            self.request_table,
            tables,
            self.local_token_indices,
            self.positions,
            self.allgather_restore_idx,
            self.hidden_restore_idx,
            self.slot_mapping,
            self.kv_rows,
            requests,
            self.world_size,
            self.rank,
            rows if tokens else 0,
            kv_rows if keys else 0,
            chunks > 1,
            *self._cache_numbers,
        )
        self.tokens_expanded |= tokens
        self.keys_expanded |= keys

    def expanded_tokens(self, name: str) -> torch.Tensor:
        """A per-token array, filled."""
        if not self.tokens_expanded:
            self.expand(self.tables, tokens=True, keys=False)
        return getattr(self, name)

    def expanded_keys(self) -> torch.Tensor:
        """``kv_rows``, filled."""
        if not self.keys_expanded:
            self.make_room(self._counts[2])
            self.expand(self.tables, tokens=False, keys=True)
        return self.kv_rows

    def expand_rank_rows(self) -> None:
        """Fill the tables of all ranks' rows, if anybody has asked for them."""
        if self.rank_rows is not None:
            requests, rows, _, chunks, window = self._counts
            plan_rank_rows(self.request_table, self.rank_rows, requests, self.world_size, rows, chunks, window)
            self.rank_rows_expanded = True

    def expanded_rank_rows(self) -> torch.Tensor:
        """``rank_rows``, filled; on a GPU from now on with every plan, for graphs that read it."""
        if self.rank_rows is None:
            with torch.inference_mode(False):
                self.rank_rows = torch.empty(self.step_layout.rank_rows_size, dtype=torch.int32, device=self.device)
        if not self.rank_rows_expanded:
            self.expand_rank_rows()
        return self.rank_rows

    def expand_shard_rows(self, tables: torch.Tensor, sent: tuple[int, int]) -> None:
        """Fill the tables of the exchange with the other shards, each of which sends so many new rows and rows of context."""
        requests, rows, keys, chunks, _ = self._counts
        sizes = (sent[1], self.cache.dcp_world_size * sum(sent), keys)
        for number, (buffer, size) in enumerate(zip(self.shard_rows, sizes, strict=True)):
            if buffer.shape[0] < size:
                with torch.inference_mode(False):
                    self.shard_rows[number] = torch.empty(2 * size, dtype=buffer.dtype, device=self.device)
        starts = self.step[self.step_layout.offsets["shard_starts"] :][: requests + 1]
        slots = self.expanded_tokens("slot_mapping")
        lists = (self.request_table, starts, tables, slots, *self.shard_rows)
        plan_shard_rows(*lists, requests, self.world_size, rows, sent[1], keys, chunks > 1, *self._cache_numbers)
        self.shard_rows_expanded = True

    def expanded_shard_rows(self, sent: tuple[int, int]) -> list[torch.Tensor]:
        """``shard_rows``, filled."""
        if not self.shard_rows_expanded:
            assert self.tables is not None
            self.expand_shard_rows(self.tables, sent)
        return self.shard_rows
