"""PCPPlanner: all indices of a step in a few microseconds, in buffers whose addresses never change."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from ..groups import Group
from ..ops import native
from ..plan.partition import check_layout
from ..plan.slots import PagedCache
from .block_tables import KeptTables, check_tables
from .buffers import PlanBuffers
from .consistency import Comparison, digests
from .host import HostConfig, make_host_plan
from .planned import PlannedMetadata
from .staging import Staging
from .step_buffer import StepLayout

_INT32_MAX = 2**31 - 1


def _checked_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"PCPPlanner: {name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"PCPPlanner: {name} must be {limits}, got {value}")
    return int(value)


class PCPPlanner:
    """Plans steps of up to ``max_requests`` requests and ``max_tokens`` new tokens for one rank of a context-parallel group.

    A plan has two parts. The host fills one small buffer with what grows with the number of requests; on a GPU that is one copy
    from pinned memory. One launch then expands it to what grows with the number of tokens. Nothing is allocated, but for
    ``kv_rows`` without ``max_kv_tokens``, and on a GPU nothing is waited for, but for a copy of the second last plan that has not
    left the host yet.

    Args:
        max_requests, max_tokens: capacity. A decode counts as a request; new tokens are counted over all ranks, each once.
        world_size, rank: P, and this rank.
        layout, decode_policy: as :func:`pcp_mla.partition`.
        block_size: tokens of a block of the paged cache.
        dcp_world_size, dcp_rank, cp_interleave: W, this shard and I, if decode context parallelism shares the cache out. Where W is
            a multiple of P and the shards are the ranks of PCP x DCP (``dcp_rank // (W / P)`` is ``rank``), metadata have
            ``shard_rows``, for a :class:`ShardedExchange`.
        device: where the tensors are; ``pin_memory`` of the host's side: by default where the device is a GPU.
        max_kv_tokens: rows of ``kv_rows``, context included. Given, they are at a fixed address; by default in a buffer that grows.
        max_context_chunks: calls that the context may be split into by ``workspace_tokens``.
        group: whose ranks ``check_consistency`` compares, of PCP, or with ``shard_rows`` of PCP x DCP; with ``PCP_MLA_CHECK=1``
            every plan() does so.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.
        NotImplementedError: the padded layout with decode policy ``round_robin``.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        world_size: int,
        rank: int,
        *,
        layout: str = "unpadded",
        decode_policy: str = "replicate",
        block_size: int = 1,
        dcp_world_size: int = 1,
        dcp_rank: int = 0,
        cp_interleave: int = 1,
        device: torch.device | str = "cpu",
        pin_memory: bool | None = None,
        max_kv_tokens: int | None = None,
        max_context_chunks: int = 16,
        group: Group = None,
    ) -> None:
        self.world_size = _checked_int("world_size", world_size, 1, _INT32_MAX)
        self.rank = _checked_int("rank", rank, 0, self.world_size - 1)
        check_layout("PCPPlanner", layout, decode_policy)
        self.layout, self.decode_policy, self.group = layout, decode_policy, group
        self.max_requests = _checked_int("max_requests", max_requests, 0)
        self.max_tokens = _checked_int("max_tokens", max_tokens, 0, _INT32_MAX)
        shards = _checked_int("dcp_world_size", dcp_world_size, 1, _INT32_MAX)
        self.cache = PagedCache(
            _checked_int("block_size", block_size, 1, _INT32_MAX),
            shards,
            _checked_int("dcp_rank", dcp_rank, 0, shards - 1),
            _checked_int("cp_interleave", cp_interleave, 1, _INT32_MAX),
        )
        # Two chunks of L / 2P, rounded up, are at most L + 1 tokens.
        self.max_local_tokens = self.max_tokens + (min(self.max_tokens, self.max_requests) if layout == "padded" else 0)
        gathered = self.world_size * self.max_local_tokens
        if gathered > _INT32_MAX:
            raise ValueError(
                f"PCPPlanner: max_tokens must give less than 2**31 rows over all ranks, got {gathered} for {max_tokens}"
            )
        self.max_kv_tokens = -1 if max_kv_tokens is None else _checked_int("max_kv_tokens", max_kv_tokens, 0, _INT32_MAX)
        max_chunks = _checked_int("max_context_chunks", max_context_chunks, 0) + 1

        self.step_layout = StepLayout.build(self.max_requests, self.world_size, max_chunks)
        self._host = make_host_plan(
            HostConfig(
                max_requests=self.max_requests,
                max_tokens=self.max_tokens,
                max_local_tokens=self.max_local_tokens,
                max_kv_tokens=self.max_kv_tokens,
                max_context_chunks=max_chunks - 1,
                world_size=self.world_size,
                rank=self.rank,
                layout=self.layout,
                decode_policy=self.decode_policy,
                cache=self.cache,
                step_layout=self.step_layout,
            )
        )
        split = (self.world_size, self.rank, self.layout, self.decode_policy)
        self._buffers = PlanBuffers(self.step_layout, self.max_local_tokens, self.max_kv_tokens, self.cache, split, device)
        self.step, self.device = self._buffers.step, self._buffers.device
        checks = os.environ.get("PCP_MLA_CHECK") == "1" and group is not None
        self._comparison = Comparison(group, self.device) if checks else None
        # On a CPU the host writes the step buffer itself. Else two buffers in turn: one may still be on its way.
        on_cpu = self.device.type == "cpu"
        self._host_step = self.step.numpy() if on_cpu else None
        self._kept = KeptTables(self.max_requests) if on_cpu else None
        self._staging = [] if on_cpu else [Staging(self.step, self.step_layout.chunks_stop, pin_memory) for _ in range(2)]
        # The native planner brings a plan to a GPU by itself.
        self._sends = self.device.type == "cuda" and not native.status["_native_cuda"] and not native.status["_planner"]
        if self._sends:
            self._host.attach(self._addresses(), [(part.host.data_ptr(), part.sent.cuda_event) for part in self._staging])
        self._last: PlannedMetadata | None = None

    def _addresses(self) -> dict[str, int]:
        names = ("step", "local_token_indices", "positions", "allgather_restore_idx", "hidden_restore_idx", "slot_mapping")
        tensors = {name: getattr(self._buffers, name).data_ptr() for name in names}
        return {"transport": native.plan_transport(), "device_index": self.step.get_device(), **tensors}

    def plan(
        self,
        query_lens: Any,
        context_lens: Any = None,
        is_prefill: Any = None,
        block_tables: Any = None,
        *,
        num_tokens_padded: int | None = None,
        num_requests_padded: int | None = None,
        num_kv_tokens_padded: int | None = None,
        workspace_tokens: int | None = None,
        prompt_lens: Any = None,
    ) -> PlannedMetadata:
        """Plan a step. int32 and bool NumPy arrays are read as they are; lists, other integers and CPU tensors are converted.

        Args:
            query_lens, context_lens, is_prefill, prompt_lens: [R] as :func:`pcp_mla.partition`.
            block_tables: integers [R or more, blocks], numbers of each request's cache blocks (of this shard's, with DCP), of which
                those that its context and new tokens fill are read, now. A tensor on the planner's GPU must be int32 and is read
                there, without being checked: a token whose block has no slots has slot -1. Without block tables there are no
                ``slot_mapping`` and ``kv_rows``.
            num_tokens_padded: the local token count to pad to, for a captured graph.
            num_requests_padded: pads the batch with empty requests; the result is that of a batch with as many requests of no
            tokens.
            num_kv_tokens_padded: rows of ``kv_rows``, the last ones -1.
            workspace_tokens: rows of K and V that fit at a time; the context is split where N is larger.

        Returns:
            Metadata whose tensors are views of the planner's buffers: valid until the next plan().

        Raises:
            ValueError, TypeError: an argument does not fit the planner or the others, or a block in use has slots outside of
                0..2**31 - 1; the last plan is left as it was.
            RuntimeError: with ``PCP_MLA_CHECK=1``, if ranks differ, or plan() failed on another one, with whatever it was; see
                :meth:`check_consistency`.
        """
        row: list[int] = []
        comparison = self._comparison
        try:
            meta = self._plan(
                query_lens,
                context_lens,
                is_prefill,
                prompt_lens,
                block_tables,
                (num_requests_padded, num_tokens_padded, num_kv_tokens_padded, workspace_tokens),
            )
            if comparison is not None:
                row = self._digests(comparison)
        except BaseException:  # out of memory, an interrupt: the others must not go on without this rank
            if comparison is not None:
                comparison.tell_failure()
            raise
        if comparison is not None:
            self._compare(comparison, row)
        return meta

    def _plan(
        self, query_lens: Any, context_lens: Any, is_prefill: Any, prompt_lens: Any, tables: Any, sizes: Any
    ) -> PlannedMetadata:
        buffers, step, staging, kept = self._buffers, self._host_step, None, None
        if step is None and not self._sends:
            staging = self._staging[0]
            staging.sent.synchronize()
            step = staging.array
        rows = columns = -1
        on_host = None
        if tables is not None:
            tables = check_tables(tables, self.device)
            rows, columns = tables.shape
            if type(tables) is np.ndarray:
                on_host = tables
                if self._kept is not None:
                    kept = self._kept.of(columns)
        counts = self._host.plan(
            step,
            query_lens,
            context_lens,
            is_prefill,
            prompt_lens,
            *sizes,
            rows,
            columns,
            on_host,
            None if kept is None else kept.array,
        )
        asked = (sizes[1], sizes[3], prompt_lens is not None)
        if self._host_step is not None:  # expanded when somebody looks at it
            buffers.hold(counts, None if kept is None else kept.tensor, asked[1])
            self._kept = kept or self._kept
            self._last = meta = PlannedMetadata(buffers, counts, tables is not None, asked)
            return meta
        if on_host is not None:
            tables = torch.from_numpy(np.array(on_host[: counts["num_requests"]], np.int32, order="C")).to(self.device)
            rows = tables.shape[0]
        if tables is not None:
            buffers.make_room(counts["num_kv_tokens"])
        buffers.hold(counts, None, asked[1])
        self._last = meta = PlannedMetadata(buffers, counts, tables is not None, asked)
        if staging is None:
            address, stride = (0, 0) if tables is None else (tables.data_ptr(), tables.stride(0))
            self._host.send(address, stride, rows, columns, buffers.kv_address)
            buffers.tokens_expanded = buffers.keys_expanded = True
        else:
            self._staging.reverse()
            staging.send(len(meta.chunk_max_seqlens), self.step_layout)
            buffers.expand(tables, tokens=True, keys=tables is not None)
        buffers.expand_rank_rows()
        if tables is not None and buffers.shards_per_rank and meta.num_exchanged < 2**31:
            buffers.expand_shard_rows(tables, meta.sent_rows)
        return meta

    def largest_rank(self, query_lens: Any, is_prefill: Any = None) -> int:
        """Local tokens of the fullest rank, as plan() would count them: what must choose the captured graph, and with it the
        ``num_tokens_padded`` of the plan, on every rank alike. Arguments and errors as :meth:`plan`."""
        return self._host.largest_rank(query_lens, is_prefill)

    def check_consistency(self, group: Group = None) -> None:
        """Compare the last plan() of all ranks of ``group`` (by default the planner's): one small all-gather, all ranks must call
        it.

        Raises:
            RuntimeError: on every rank, if the ranks differ in what they must share; the message has the fields and the ranks.
            ValueError: the group is not the planner's world, or nothing was planned yet; the others learn of it.
        """
        comparison = Comparison(self.group if group is None else group, self.device)
        try:
            row = self._digests(comparison)
        except BaseException:
            comparison.tell_failure()
            raise
        self._compare(comparison, row)

    def _place(self, size: int) -> tuple[int, int]:
        """Rank and size that a group of ``size`` ranks should have: those of PCP, or of shards that are ranks of PCP x DCP."""
        flat = size == self.cache.dcp_world_size and self._buffers.shards_per_rank > 0
        return (self.cache.dcp_rank, size) if flat else (self.rank, self.world_size)

    def _wrong_place(self, comparison: Comparison) -> ValueError:
        rank, size = self._place(comparison.size)
        wanted, got = f"rank {rank} of {size}, as the planner", f"rank {comparison.rank} of {comparison.size}"
        return ValueError(f"PCPPlanner.check_consistency: group must have this process as {wanted}, got {got}")

    def _digests(self, comparison: Comparison) -> list[int]:
        rank, size = self._place(comparison.size)
        same_size = comparison.size == size
        if (same_size and comparison.rank != rank) or (not same_size and self._last is None):
            raise self._wrong_place(comparison)
        if self._last is None:
            raise ValueError("PCPPlanner.check_consistency: there must be a plan to compare, got none")
        return digests(self._last.shared_fields())

    def _compare(self, comparison: Comparison, row: list[int]) -> None:
        comparison.compare(row)  # names the size where some ranks have another world
        if comparison.size != self._place(comparison.size)[1]:
            raise self._wrong_place(comparison)
