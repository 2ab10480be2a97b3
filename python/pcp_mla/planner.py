"""PCPPlanner: all indices of a step in a few microseconds, in buffers whose addresses never change."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from . import native
from .backends import register
from .consistency import check_same
from .exchange import Group, group_rank, group_world_size
from .host_plan import make_host_plan
from .partition import check_layout
from .planned import PlannedMetadata
from .slots import PagedCache
from .staging import Staging
from .step_buffer import StepLayout

_plan_expand = register("plan_expand", lambda *args: None)


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
    from pinned memory. One launch then expands it to what grows with the number of tokens. Nothing is allocated and, on a GPU,
    nothing is waited for, but for a copy of the second last plan that has not left the host yet.

    Args:
        max_requests, max_tokens: capacity. A decode counts as a request; new tokens are counted over all ranks, each once.
        world_size, rank: P, and this rank.
        layout, decode_policy: as :func:`pcp_mla.partition`.
        block_size: tokens of a block of the paged cache.
        dcp_world_size, dcp_rank, cp_interleave: W, this shard and I, if decode context parallelism shares the cache out.
        device: where the tensors are; ``pin_memory`` of the host's side: by default where the device is a GPU.
        max_kv_tokens: rows of ``kv_rows``, context included. Given, every plan fills them at a fixed address; by default they are
            made when ``kv_rows`` is read, in a buffer that grows.
        max_context_chunks: calls that the context may be split into by ``workspace_tokens``.
        group: whose ranks ``check_consistency`` compares; with ``PCP_MLA_CHECK=1`` every plan() does so.

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
        self.world_size = _checked_int("world_size", world_size, 1)
        self.rank = _checked_int("rank", rank, 0, self.world_size - 1)
        check_layout("PCPPlanner", layout, decode_policy)
        self.layout, self.decode_policy, self.group = layout, decode_policy, group
        self.max_requests = _checked_int("max_requests", max_requests, 0)
        self.max_tokens = _checked_int("max_tokens", max_tokens, 0, 2**31 - 1)
        shards = _checked_int("dcp_world_size", dcp_world_size, 1)
        self.cache = PagedCache(
            _checked_int("block_size", block_size, 1, 2**31 - 1),
            shards,
            _checked_int("dcp_rank", dcp_rank, 0, shards - 1),
            _checked_int("cp_interleave", cp_interleave, 1, 2**31 - 1),
        )
        self._cache_numbers = (self.cache.block_size, shards, self.cache.dcp_rank, self.cache.cp_interleave)
        # A pad is at most two chunks of a request that is not longer than two tokens a rank.
        self.max_local_tokens = self.max_tokens + (min(self.max_tokens, 2 * self.max_requests) if layout == "padded" else 0)
        gathered = self.world_size * self.max_local_tokens
        if gathered > 2**31 - 1:
            raise ValueError(
                f"PCPPlanner: max_tokens must give less than 2**31 rows over all ranks, got {gathered} for {max_tokens}"
            )
        self.max_kv_tokens = -1 if max_kv_tokens is None else _checked_int("max_kv_tokens", max_kv_tokens, 0, 2**31 - 1)
        max_chunks = _checked_int("max_context_chunks", max_context_chunks, 0) + 1

        self.step_layout = StepLayout.build(self.max_requests, self.world_size, max_chunks)
        self._host = make_host_plan(self, max_chunks - 1)
        self._checks = os.environ.get("PCP_MLA_CHECK") == "1" and group is not None
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self.step = torch.zeros(self.step_layout.size, dtype=torch.int32, device=device)
            self.device = self.step.device

            def empty(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
                return torch.empty(count, dtype=dtype, device=self.device)

            self._local_token_indices = empty(self.max_local_tokens)
            self._positions = empty(self.max_local_tokens)
            self._allgather_restore_idx = empty(gathered)
            self._hidden_restore_idx = empty(gathered)
            self._slot_mapping = empty(gathered, torch.int64)
            self._kv_rows = empty(max(0, self.max_kv_tokens))
            self._request_table = self.step[self.step_layout.offsets["request_table"] : self.step_layout.offsets["chunks"]]
        # On a CPU the host writes the step buffer itself. Else two buffers in turn: one may still be on its way.
        on_cpu = self.device.type == "cpu"
        self._host_step = self.step.numpy() if on_cpu else None
        self._staging = [] if on_cpu else [Staging(self.step, self.step_layout.chunks_stop, pin_memory) for _ in range(2)]
        # The native planner brings a plan to a GPU by itself.
        self._sends = self.device.type == "cuda" and not native.status["_native_cuda"] and not native.status["_planner"]
        if self._sends:
            self._host.attach(self._addresses(), [(part.host.data_ptr(), part.sent.cuda_event) for part in self._staging])
        self._last: PlannedMetadata | None = None
        self._tokens_expanded = self._kv_expanded = False

    def _addresses(self) -> dict[str, int]:
        names = (
            "step",
            "local_token_indices",
            "positions",
            "allgather_restore_idx",
            "hidden_restore_idx",
            "slot_mapping",
            "kv_rows",
        )
        tensors = {name: getattr(self, "step" if name == "step" else f"_{name}").data_ptr() for name in names}
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
            block_tables: int32 [R or more, blocks] numbers of each request's cache blocks (of this shard's, with DCP); a tensor on
                the planner's device is read there. Without them there are no ``slot_mapping`` and ``kv_rows``.
            num_tokens_padded: the local token count to pad to, for a captured graph.
            num_requests_padded: pads the batch with empty requests; the result is that of a batch with as many requests of no
            tokens.
            num_kv_tokens_padded: rows of ``kv_rows``, the last ones -1.
            workspace_tokens: rows of K and V that fit at a time; the context is split where N is larger.

        Returns:
            Metadata whose tensors are views of the planner's buffers: valid until the next plan().

        Raises:
            ValueError, TypeError: an argument does not fit the planner or the others; the last plan is left as it was.
            RuntimeError: with ``PCP_MLA_CHECK=1``, if ranks differ; see :meth:`check_consistency`.
        """
        rows = columns = -1
        staging = None
        step = self._host_step
        if step is None and not self._sends:
            staging = self._staging[0]
            staging.sent.synchronize()
            step = staging.array
        try:
            if block_tables is not None:
                block_tables = self._checked_block_tables(block_tables)
                rows, columns = block_tables.shape
            counts = self._host.plan(
                step,
                query_lens,
                context_lens,
                is_prefill,
                prompt_lens,
                num_requests_padded,
                num_tokens_padded,
                num_kv_tokens_padded,
                workspace_tokens,
                rows,
                columns,
            )
        except (ValueError, TypeError):
            if self._checks:
                check_same(self.group, self.device, None)
            raise
        meta = PlannedMetadata(self, counts, block_tables, (num_tokens_padded, workspace_tokens, prompt_lens is not None))
        self._last = meta
        self._tokens_expanded = self._kv_expanded = False
        if self._sends:
            if block_tables is None:
                self._host.send(0, 0, -1)
            else:
                self._host.send(block_tables.data_ptr(), block_tables.stride(0), columns)
            self._tokens_expanded = True
            self._kv_expanded = block_tables is not None and self.max_kv_tokens >= 0
        elif staging is not None:
            self._staging.reverse()
            staging.send(len(meta.chunk_max_seqlens), self.step_layout)
            self._expand(tokens=True, keys=block_tables is not None and self.max_kv_tokens >= 0)
        if self._checks:
            self.check_consistency()
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
            ValueError: the group is not the planner's world, or nothing was planned yet.
        """
        group = self.group if group is None else group
        size, rank = group_world_size(group, "PCPPlanner.check_consistency"), group_rank(group)
        if (rank, size) != (self.rank, self.world_size):
            wanted = f"rank {self.rank} of {self.world_size}, as the planner"
            raise ValueError(f"PCPPlanner.check_consistency: group must have this process as {wanted}, got rank {rank} of {size}")
        if self._last is None:
            raise ValueError("PCPPlanner.check_consistency: there must be a plan to compare, got none")
        check_same(group, self.device, self._last.shared_fields())

    def _checked_block_tables(self, tables: Any) -> torch.Tensor:
        if (  # as engines have them; every attribute of a tensor costs some 100 ns
            type(tables) is torch.Tensor
            and tables.dtype == torch.int32
            and tables.dim() == 2
            and tables.stride(1) == 1
            and tables.device == self.device
        ):
            return tables
        if isinstance(tables, torch.Tensor):
            if tables.device != self.device and tables.device.type != "cpu":
                raise ValueError(f"PCPPlanner.plan: block_tables must be on {self.device} or on the CPU, got {tables.device}")
        else:
            array = np.asarray(tables)
            if array.dtype.kind not in "iu":
                raise TypeError(f"PCPPlanner.plan: block_tables must be integers, got {array.dtype}")
            tables = torch.from_numpy(np.require(array, requirements=("C", "W")))
        if tables.dim() != 2:
            raise ValueError(f"PCPPlanner.plan: block_tables must have 2 dimensions [requests, blocks], got {tables.dim()}")
        if tables.dtype.is_floating_point or tables.dtype == torch.bool:
            raise TypeError(f"PCPPlanner.plan: block_tables must be integers, got {str(tables.dtype)[6:]}")
        return tables.to(self.device, torch.int32).contiguous()

    def _expand(self, tokens: bool, keys: bool) -> None:
        """Fill the per-token arrays of the last plan, its key rows, or both: one launch."""
        meta = self._last
        assert meta is not None
        _plan_expand(
            self._request_table,
            meta._block_tables,
            self._local_token_indices,
            self._positions,
            self._allgather_restore_idx,
            self._hidden_restore_idx,
            self._slot_mapping,
            self._kv_rows,
            meta.num_requests,
            self.world_size,
            self.rank,
            meta.num_tokens_padded if tokens else 0,
            meta.num_kv_tokens if keys else 0,
            len(meta.chunk_max_seqlens) > 1,
            *self._cache_numbers,
        )
        self._tokens_expanded |= tokens
        self._kv_expanded |= keys

    def expanded_tokens(self, name: str) -> torch.Tensor:
        """The buffer of a per-token array, filled."""
        if not self._tokens_expanded:
            self._expand(tokens=True, keys=False)
        return getattr(self, name)

    def expanded_kv_rows(self) -> torch.Tensor:
        """The buffer of key rows, filled."""
        if not self._kv_expanded:
            assert self._last is not None
            needed = self._last.num_kv_tokens
            if len(self._kv_rows) < needed:
                with torch.inference_mode(False):
                    self._kv_rows = torch.empty(2 * needed, dtype=torch.int32, device=self.device)
            self._expand(tokens=False, keys=True)
        return self._kv_rows
