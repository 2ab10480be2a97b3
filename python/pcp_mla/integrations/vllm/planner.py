"""The part ``planner``: a step of prefills planned by :class:`pcp_mla.PCPPlanner`, behind the interface of vLLM's ``PCPManager``.

One copy and one launch give positions, slots, where every hidden state comes from, and what attention reads. Steps with decodes are
vLLM's own. The rows of a request are its head and its tail, in this order, each of them there even if it has no tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from ...ops.attention.libraries import Rows
from ...plan.rank_rows import RankRows
from ...planner.planned import PlannedMetadata
from ...planner.planner import PCPPlanner
from . import parts
from .communicator import Communicator
from .rows import RowChunk, StepRows

# Of an InputBatch what says of a local batch that it is all prefills, in versions that have it.
_ALL_PREFILLS: dict[str, Any] = {
    "has_prefill": True,
    "decode_graph_eligible": False,
    "prefill_runs_as_decode_np": None,
    "dcp_local_seq_lens_cpu_upper_bound": None,
}


def refusal(manager: Any) -> str:
    """Why a manager's steps stay vLLM's; the empty string where this part takes them."""
    missing = [name for name in ("_block_tables", "_input_buffers", "dcp_world_size", "pcp_rank") if not hasattr(manager, name)]
    if missing:
        return f"a manager that is not known (it has no {missing[0]})"
    tables = manager._block_tables
    if manager.dcp_world_size > 1:
        return "decode context parallelism"
    if tables is None or manager._input_buffers is None:
        return "a manager without block tables"
    if tables.num_kv_cache_groups != 1:
        return f"{tables.num_kv_cache_groups} groups of caches"
    return ""


def step_rows(meta: PlannedMetadata, of: PlannedMetadata | RankRows) -> StepRows:
    """What attention reads, of a plan with block tables: for this rank's rows or those of all."""
    assert meta.kv_rows is not None
    chunks = []
    for chunk in of.key_chunks:
        seqlens = (of.cu_seqlens_q, chunk.cu_seqlens_k, chunk.seqused_k, of.max_seqlen_q, chunk.max_seqlen_k)
        chunks.append(RowChunk(chunk.first_row, chunk.num_rows, Rows(*seqlens, chunk.causal)))
    return StepRows(meta.kv_rows, tuple(chunks), {})


_MAX_WINDOWS = 16  # calls that context may be split into


class Plan:
    """A step of prefills: the batch that vLLM runs, its slots, what attention reads, and where hidden states come from."""

    def __init__(self, meta: PlannedMetadata, batch: Any, tables: torch.Tensor) -> None:
        assert meta.slot_mapping is not None
        self.meta, self.batch, self.tables, self.rows = meta, batch, tables, step_rows(meta, meta)
        self.slots, self.hidden_rows = meta.slot_mapping, meta.hidden_restore_idx

    def is_of(self, common: Any) -> bool:
        """Whether vLLM's common metadata are of this step's whole batch."""
        same = common.slot_mapping.data_ptr() == self.slots.data_ptr()
        return same and (common.num_reqs, common.num_actual_tokens) == (self.batch.num_reqs, self.batch.num_tokens)


class StepPlanner:
    """Plans the steps of one manager, whose buffers it writes to as the manager would.

    Args:
        limit: rows of K and V that an attention call may need, if its keys can be shared out over several.
    """

    def __init__(self, manager: Any, limit: int, communicator: Communicator) -> None:
        self._manager, self._limit, self._communicator = manager, limit, communicator
        buffers, tables = manager._input_buffers, manager._block_tables
        block_size = getattr(tables, "kernel_block_sizes", tables.block_sizes)[0]
        self._planner = PCPPlanner(
            buffers.max_num_reqs // 2,
            buffers.max_num_tokens,
            manager.pcp_world_size,
            manager.pcp_rank,
            block_size=block_size,
            device=manager.device,
            max_context_chunks=_MAX_WINDOWS,
        )
        rank, world = manager.pcp_rank, manager.pcp_world_size
        self._chunks = np.array([rank, 2 * world - 1 - rank], np.int32)
        self.plan: Plan | None = None

    def partition(self, batch: Any) -> Any:
        """The local batch, or None where the step is vLLM's."""
        self.plan = None
        if not batch.is_prefilling_np.all() or batch.num_draft_tokens:
            return None
        if int(batch.num_computed_tokens_np.sum()) > _MAX_WINDOWS * self._limit:
            return None
        tables = self._tables(batch)
        query_lens, context_lens = batch.num_scheduled_tokens, batch.num_computed_tokens_np
        meta = self._planner.plan(query_lens, context_lens, block_tables=tables, workspace_tokens=self._limit)
        self.plan = Plan(meta, self._local(batch, meta), tables)
        parts.counts["plan"] += 1
        return self.plan.batch

    def _tables(self, batch: Any) -> torch.Tensor:
        tables = self._manager._block_tables
        if batch.num_reqs == 1:
            at = int(batch.idx_mapping_np[0])
            return tables.block_tables[0].gpu[at : at + 1]
        return tables.gather_block_tables(batch.idx_mapping, batch.num_reqs)[0]

    def _local(self, batch: Any, meta: PlannedMetadata) -> Any:
        buffers, tokens, padded = self._manager._input_buffers, meta.num_tokens, meta.num_tokens_padded
        length = batch.num_scheduled_tokens[:, None]
        chunk = -(-length // (2 * self._manager.pcp_world_size))
        offsets = np.minimum(chunk * self._chunks, length)
        lengths = np.minimum(length - offsets, chunk).ravel()
        starts = (batch.num_computed_tokens_np[:, None] + offsets).ravel()
        requests = np.arange(2 * batch.num_reqs) // 2
        query_start_loc = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=query_start_loc[1:])
        prefill_lens = batch.prefill_len_np[requests]

        input_ids, positions = buffers.input_ids[:padded], buffers.positions[:padded]
        torch.index_select(batch.input_ids, 0, meta.local_token_indices, out=input_ids[:tokens])
        positions[:tokens].copy_(meta.positions)
        is_padding = buffers.is_padding[:padded]
        is_padding[:tokens].fill_(False)
        if tokens < padded:
            is_padding[tokens:].fill_(True)
            input_ids[tokens:].zero_()
            positions[tokens:].zero_()
        # Tensors for sampling stay those of the whole batch, with which it will be done.
        local = copy.copy(batch)
        vars(local).update(
            req_ids=[name for name in batch.req_ids for _ in range(2)],
            num_reqs=len(lengths),
            num_reqs_after_padding=len(lengths),
            idx_mapping_np=batch.idx_mapping_np[requests],
            num_scheduled_tokens=lengths,
            num_tokens=tokens,
            num_tokens_after_padding=padded,
            query_start_loc=meta.cu_seqlens_q,
            query_start_loc_np=query_start_loc,
            seq_lens=meta.seqused_k,
            seq_lens_cpu_upper_bound=torch.from_numpy(starts + lengths),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=starts,
            prefill_len_np=prefill_lens,
            num_computed_prefill_tokens_np=np.minimum(starts, prefill_lens),
            is_prefilling_np=np.ones(len(lengths), np.bool_),
            max_seq_len_np=None,
            input_ids=input_ids,
            positions=positions,
            is_padding=is_padding,
            prompt_lens=None,
        )
        vars(local).update((name, value) for name, value in _ALL_PREFILLS.items() if hasattr(batch, name))
        return local

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[Np, width] of this rank to [tokens, width] of the whole batch, in its order."""
        assert self.plan is not None
        gathered = self._communicator.all_gather(hidden_states.contiguous())
        return torch.index_select(gathered, 0, self.plan.hidden_rows)
