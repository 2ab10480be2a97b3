"""The latents of all ranks and the context of all shards of a cache by one packed collective, into a buffer at a fixed address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..checks import check_count, check_not_expanded
from ..groups import Group, check_latents, gathering_into, gathers_in_place, group_rank, group_world_size
from ..ops.latent_cache import check_cache, gather_rows, write_rows
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata, check_meta
from ..plan.shard_rows import shards_per_rank
from ..plan.slots import PagedCache
from .inputs import check_form, check_kind, check_room
from .latents import pack_latents
from .peer_memory import agree


class ShardedExchange:
    """:class:`LatentExchange` for ranks each of which holds a shard of the cache: W = P * D of them, PCP outer, with PCP over P and
    the new tokens of a rank of PCP on D of them. Each sends its part of these and of every request's context in one
    ``all_gather_into_tensor``; how many rows that is follows from what all ranks share, so that their collectives are the same.

    Every rank of the group makes it, with the others: they compare what they were given.

    Args:
        group: ONE flat group of the W ranks, two or more, in the order of the shards (:func:`pcp_mla.flat_cp_group`); kinds as
            :class:`LatentExchange`.
        max_tokens: capacity, as local tokens of a rank of PCP with pads (``PCPPlanner.max_local_tokens``).
        max_context: capacity, as rows of context that a shard sends: at most ``tokens / W + requests * I`` of so many tokens of
            context.
        dims, device: as :class:`LatentExchange`; the buffers are W + 1 times ceil(max_tokens / D) + max_context rows.
        dtype: of the cache, which is what travels; float8 as bytes.
        shards: shape of the cache and this rank's shard (``PCPPlanner.cache``), the group's ranks being the shards.
        pcp_world_size: P, which divides W.

    Raises:
        ValueError, TypeError: on every rank, if an argument is out of range, of the wrong kind or not the same on one of them;
            on a rank alone, if ``group`` is none.
    """

    def __init__(
        self,
        group: Group,
        max_tokens: int,
        max_context: int,
        dims: MLADims,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        shards: PagedCache,
        pcp_world_size: int,
    ) -> None:
        op = "ShardedExchange"
        self.num_shards, self.shard = group_world_size(group, op), group_rank(group)
        wrong, form = None, None
        try:
            check_form(op, max_tokens, dims, dtype)
            check_count(op, "max_context", max_context)
            check_count(op, "pcp_world_size", pcp_world_size, 1)
            if not isinstance(shards, PagedCache):
                raise TypeError(f"{op}: shards must be a PagedCache, got {type(shards).__name__}")
            self._check_places(shards, pcp_world_size)
            widths = [dims.kv_lora_rank, dims.qk_rope_head_dim]
            numbers = [shards.block_size, shards.cp_interleave, pcp_world_size]
            form = [int(max_tokens), int(max_context), str(dtype), *widths, *numbers]
        except (ValueError, TypeError) as error:
            wrong = error
        self._compare(group, torch.device(device), wrong, form)
        self.group, self.max_tokens, self.max_context, self.shards = group, max_tokens, max_context, shards
        self.world_size, self.rank = pcp_world_size, self.shard * pcp_world_size // self.num_shards
        self.kv_lora_rank, self.width = dims.kv_lora_rank, dims.latent_dim
        self._in_place = gathers_in_place(group)
        new = -(-max_tokens * pcp_world_size // self.num_shards)
        sent = new + max_context
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self._gathered = torch.empty(self.num_shards * sent, self.width, dtype=dtype, device=device)
            self._send = self._gathered[:0] if self._in_place else self._gathered.new_empty(sent, self.width)
            self._first_slots = torch.arange(new, device=device)
        self._meta: PCPMetadata | None = None

    def _check_places(self, shards: PagedCache, pcp_world_size: int) -> None:
        """Raise ValueError unless the ranks of the group are the shards, and the ranks of PCP are so many of them."""
        op, here = "ShardedExchange", f"shard {self.shard} of {self.num_shards}"
        if self.num_shards < 2:
            raise ValueError(f"{op}: group must have at least 2 ranks, got {self.num_shards}")
        if (shards.dcp_world_size, shards.dcp_rank) != (self.num_shards, self.shard):
            got = f"shard {shards.dcp_rank} of {shards.dcp_world_size}"
            raise ValueError(f"{op}: shards must be {here}, as the rank of the group, got {got}")
        if self.num_shards % pcp_world_size:
            raise ValueError(f"{op}: pcp_world_size must divide the {self.num_shards} shards, got {pcp_world_size}")

    def _compare(self, group: Group, device: torch.device, wrong: Exception | None, form: list[Any] | None) -> None:
        """Raise on every rank, if what a rank was given is wrong, or not the same everywhere. No rank goes on without another."""
        told = agree(group, device, {"wrong": str(wrong or ""), "form": form}) if self.num_shards > 1 else []
        if wrong is not None:
            raise wrong
        for rank, each in enumerate(told):
            if each["wrong"]:
                raise ValueError(f"{each['wrong']} (on rank {rank})")
        names = ("max_tokens", "max_context", "dtype", "kv_lora_rank", "qk_rope_head_dim", "block_size", "cp_interleave")
        for name, *values in zip((*names, "pcp_world_size"), *(each["form"] for each in told), strict=False):
            if len(set(values)) > 1:
                raise ValueError(f"ShardedExchange: {name} must be the same on all ranks, got {', '.join(map(str, values))}")

    def publish(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The latents of all ranks and the context of all shards where the layer reads them, and this shard's new tokens in its
        cache: a gather of this shard's context, one collective, a write.

        What a request has of context must be in the shards' caches before the step: tokens that another request of the same step
        writes are not.

        Args:
            kv_c, k_pe: as :meth:`LatentExchange.all_gather`; the same on all D ranks of a rank of PCP.
            meta: the step, for this rank and this shard, of a planner with these ``shards``, with block tables of this shard.
            cache: this shard's, as :func:`write_latent_cache`, of the exchange's dtype.
            scale: with an exchange of float8_e4m3fn and latents that are not, as :func:`write_latent_cache`: they travel as the
                cache holds them.

        Returns:
            [W * (n + C), width], shard by shard: what ``meta.shard_rows.kv_rows`` counts in. Pads may be anything. It is a view of
            the exchange's buffer, valid until the next call.

        Raises:
            ValueError, TypeError: a tensor does not fit ``meta`` or the exchange, or the step has more rows than there is room
                for, which is so on every rank; before the collective.
            NotImplementedError: a tensor requires gradients, or a graph is being captured or compiled: how many rows are exchanged
                depends on the contexts.
        """
        op = "ShardedExchange.publish"
        if torch.compiler.is_compiling() or (self._gathered.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise NotImplementedError(f"{op}: a step with a cache that is shared out can be neither captured nor compiled")
        if meta is not self._meta:
            self._take(op, meta)
        check_latents(op, kv_c, k_pe, meta)
        dtype = self._gathered.dtype if scale is None else kv_c.dtype
        check_kind(op, kv_c, k_pe, (self.kv_lora_rank, self.width - self.kv_lora_rank), dtype)
        if cache is None:
            raise ValueError(f"{op}: cache must be given, as it is shared out, got None")
        check_cache(op, cache, "latents", self._rows if scale is None else kv_c.new_empty(0, self.width), scale)
        if cache.dtype != self._gathered.dtype:
            raise TypeError(f"{op}: cache must be {self._gathered.dtype}, as the exchange, got {cache.dtype}")
        check_not_expanded(op, "cache", cache)
        first, count = self._part
        count = min(count, max(0, kv_c.shape[0] - first))
        if count:
            part = kv_c[first : first + count], k_pe[first : first + count]
            if scale is None:
                pack_latents(*part, self._rows[:count])
            else:  # as if these rows were the first slots of a cache
                packed = kv_c.new_empty(count, self.width)
                pack_latents(*part, packed)
                write_rows(packed, self._rows, self._first_slots[:count], scale)
        if self._context.shape[0]:
            gather_rows(cache, self._context_slots, self._context)
        if self._collective is not None:
            self._collective()
        write_rows(self._exchanged, cache, self._slots, None)
        return self._exchanged

    def _take(self, op: str, meta: PCPMetadata) -> None:
        """Look at a step once."""
        check_meta(op, meta)
        if meta.paged_cache != self.shards or (meta.world_size, meta.rank) != (self.world_size, self.rank):
            here = f"rank {self.rank} of {self.world_size} with {self.shards}"
            raise ValueError(f"{op}: meta must be for {here}, got rank {meta.rank} of {meta.world_size} with {meta.paged_cache}")
        check_room(op, meta, self.max_tokens)
        each = shards_per_rank(self.shards, self.world_size, self.rank)
        rows = meta.shard_rows
        if rows is None:
            raise ValueError(f"{op}: meta must have shard_rows: plan it with more than one shard, got none")
        if rows.num_context > self.max_context:
            limit = f"at most {self.max_context} rows of context a shard (max_context)"
            raise ValueError(f"{op}: meta must have {limit}, got {rows.num_context}")
        sent = rows.num_new + rows.num_context
        self._exchanged = self._gathered[: self.num_shards * sent]
        mine = self._exchanged[self.shard * sent :][:sent] if self._in_place else self._send[:sent]
        self._rows, self._context = mine[: rows.num_new], mine[rows.num_new :]
        self._part = self.shard % each * rows.num_new, rows.num_new
        self._context_slots, self._slots = rows.context_slots, rows.slot_mapping
        self._collective = self._gathering(mine) if sent else None
        self._meta = meta

    def _gathering(self, rows: torch.Tensor) -> Callable[[], None]:
        gathered = self._exchanged
        if rows.element_size() == 1:  # collectives know bytes, but not every float8
            gathered, rows = gathered.view(torch.uint8), rows.view(torch.uint8)
        return gathering_into(gathered, rows, self.group)
