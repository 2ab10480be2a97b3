"""The host part of a plan: the native planner, or NumPy's specification where it is not built. Both have one interface."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np

from ..ops import native
from ..plan.partition import Partition, partition
from ..plan.slots import PagedCache, key_chunks
from .block_tables import read_entries
from .step_buffer import StepLayout, fill

_OP = "PCPPlanner.plan"

# What the host part of a plan returns: fields of the metadata.
COUNTS = (
    "num_requests",
    "num_tokens",
    "num_tokens_padded",
    "num_new_tokens",
    "num_restored",
    "num_context_tokens",
    "num_key_tokens",
    "num_kv_tokens",
    "num_head_tokens",
    "num_tail_tokens",
    "num_head_kv",
    "num_tail_kv",
    "max_seqlen_q",
    "max_seqlen_k",
    "chunk_max_seqlens",
    "batch",
)


class HostConfig(NamedTuple):
    """What a planner was made for: its capacities, with ``max_kv_tokens`` -1 for any number, its place, and where a plan lies."""

    max_requests: int
    max_tokens: int
    max_local_tokens: int
    max_kv_tokens: int
    max_context_chunks: int
    world_size: int
    rank: int
    layout: str
    decode_policy: str
    cache: PagedCache
    step_layout: StepLayout


def make_host_plan(config: HostConfig) -> Any:
    """The host part of a planner."""
    if native.status["_planner"]:
        return NumpyHostPlan(config)
    numbers = {
        "max_requests": config.max_requests,
        "max_tokens": config.max_tokens,
        "max_local_tokens": config.max_local_tokens,
        "max_kv_tokens": config.max_kv_tokens,
        "max_context_chunks": config.max_context_chunks,
        "world_size": config.world_size,
        "rank": config.rank,
        "padded": config.layout == "padded",
        "round_robin": config.decode_policy == "round_robin",
        "block_size": config.cache.block_size,
        "dcp_world_size": config.cache.dcp_world_size,
        "dcp_rank": config.cache.dcp_rank,
        "cp_interleave": config.cache.cp_interleave,
    }
    return native.planner.Planner(numbers, config.step_layout.offsets, COUNTS)


def _optional_size(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        size = operator.index(value)
    except TypeError:
        size = None
    if size is None or isinstance(value, bool):
        raise TypeError(f"{_OP}: {name} must be an int, got {value!r}")
    if not 0 <= size < 2**63:
        raise ValueError(f"{_OP}: {name} must be 0 to 2**63 - 1, got {size}")
    return size


class NumpyHostPlan:
    """Fills the step buffer from :func:`pcp_mla.partition`. Arguments, results and errors as the native planner's."""

    def __init__(self, config: HostConfig) -> None:
        self._max_requests, self._max_tokens = config.max_requests, config.max_tokens
        self._max_local_tokens, self._max_kv_tokens = config.max_local_tokens, config.max_kv_tokens
        self._max_context_chunks = config.max_context_chunks
        self._cache, self._layout = config.cache, config.step_layout
        self._split: dict[str, Any] = {
            "world_size": config.world_size,
            "rank": config.rank,
            "layout": config.layout,
            "decode_policy": config.decode_policy,
        }

    def _partition(
        self, query_lens: Any, context_lens: Any, is_prefill: Any, prompt_lens: Any, requests: int | None = None
    ) -> Partition:
        try:
            part = partition(query_lens, context_lens, is_prefill, prompt_lens=prompt_lens, **self._split)
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).replace("partition:", f"{_OP}:", 1)) from None
        made_for = "as the planner was made for, got"
        count, total = part.num_requests, int(part.query_lens.sum())
        if count > self._max_requests:
            raise ValueError(f"{_OP}: query_lens must have at most {self._max_requests} requests, {made_for} {count}")
        if total > self._max_tokens:
            raise ValueError(f"{_OP}: query_lens must add up to at most {self._max_tokens} tokens, {made_for} {total}")
        if requests is None:
            return part
        if not count <= requests <= self._max_requests:
            limits = f"{count} (the requests) to {self._max_requests}"
            raise ValueError(f"{_OP}: num_requests_padded must be {limits}, got {requests}")
        empty = np.zeros(requests - count, np.int32)
        return partition(
            np.append(part.query_lens, empty),
            np.append(part.context_lens, empty),
            np.append(part.is_prefill, empty == 0),
            prompt_lens=None if prompt_lens is None else np.append(prompt_lens, empty).astype(np.int32),
            **self._split,
        )

    def largest_rank(self, query_lens: Any, is_prefill: Any) -> int:
        return self._partition(query_lens, None, is_prefill, None).num_tokens_padded

    def _check_block_tables(self, part: Partition, requests: int, rows: int, columns: int) -> None:
        if rows < requests:
            raise ValueError(f"{_OP}: block_tables must have a row for each of the {requests} requests, got {rows}")
        lengths = part.context_lens + part.query_lens
        if requests == 0:
            return
        request = int(lengths.argmax())
        blocks = int(self._cache.blocks_of(lengths[request]))
        if blocks > columns:
            what = f"at least {blocks} blocks of {self._cache.block_size} for the {lengths[request]} context and new tokens"
            raise ValueError(f"{_OP}: block_tables must have {what} of request {request}, got {columns}")

    def plan(
        self,
        step: np.ndarray,
        query_lens: Any,
        context_lens: Any,
        is_prefill: Any,
        prompt_lens: Any,
        num_requests_padded: int | None,
        num_tokens_padded: int | None,
        num_kv_tokens_padded: int | None,
        workspace_tokens: int | None,
        block_rows: int,
        block_columns: int,
        host_tables: np.ndarray | None,
        kept: np.ndarray | None,
    ) -> dict[str, Any]:
        requests = _optional_size("num_requests_padded", num_requests_padded)
        tokens = _optional_size("num_tokens_padded", num_tokens_padded)
        keys = _optional_size("num_kv_tokens_padded", num_kv_tokens_padded)
        workspace = _optional_size("workspace_tokens", workspace_tokens)
        part = self._partition(query_lens, context_lens, is_prefill, prompt_lens, requests)
        needed, total_keys = part.num_tokens_padded, part.num_kv_tokens
        if tokens is not None and not needed <= tokens <= self._max_local_tokens:
            limits = f"{needed} (the tokens of the fullest rank) to {self._max_local_tokens}"
            raise ValueError(f"{_OP}: num_tokens_padded must be {limits}, got {tokens}")
        if keys is not None and not total_keys <= keys <= 2**31 - 1:
            limits = f"at least {total_keys} (context and new tokens)"
            raise ValueError(f"{_OP}: num_kv_tokens_padded must be {limits}, got {keys}")
        kv_rows = total_keys if keys is None else keys
        if 0 <= self._max_kv_tokens < kv_rows:
            limits = f"at most max_kv_tokens = {self._max_kv_tokens}"
            raise ValueError(f"{_OP}: context and new tokens must be {limits}, got {kv_rows}")
        restored, context = int(part.padded_lens.sum()), int(part.context_lens.sum())
        if workspace is not None and total_keys > workspace:
            if workspace == 0 or restored > workspace:
                limits = f"at least the {restored} rows of the new tokens"
                raise ValueError(f"{_OP}: workspace_tokens must be {limits}, got {workspace}")
            if -(-context // workspace) > self._max_context_chunks:
                limits = f"{context} context tokens in {self._max_context_chunks} chunks (max_context_chunks)"
                raise ValueError(f"{_OP}: workspace_tokens must be large enough for {limits}, got {workspace}")
        if block_columns >= 0:
            given = len(np.asarray(query_lens))
            self._check_block_tables(part, given, block_rows, block_columns)
            if host_tables is not None:
                read_entries(host_tables, (part.context_lens + part.query_lens)[:given], self._cache, kept)

        chunks = key_chunks(part, workspace)
        fill(self._layout, step, part, chunks, self._cache)
        prompts = np.zeros(part.num_requests, np.int32)
        if prompt_lens is not None:
            prompts[: len(prompt_lens)] = prompt_lens
        batch = (part.query_lens, part.context_lens, prompts, part.is_prefill)
        values = (
            part.num_requests,
            part.num_tokens,
            needed if tokens is None else tokens,
            int(part.query_lens.sum()),
            restored,
            context,
            total_keys,
            kv_rows,
            *part.row_table[:4, -1].tolist(),
            part.max_seqlen_q,
            part.max_seqlen_k,
            tuple(chunk.max_seqlen_k for chunk in chunks),
            b"".join(array.tobytes() for array in batch),
        )
        return dict(zip(COUNTS, values, strict=True))
