"""The latents of all ranks by one packed collective, into a buffer at a fixed address."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..checks import check_apart, check_not_expanded
from ..groups import Group, check_group, check_latents, gathering_into, gathers_in_place, group_rank, group_world_size
from ..ops.concat_k import concat_row
from ..ops.latent_cache import check_cache, write_rows
from ..ops.registry import ALL_NATIVE
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata, check_meta
from .inputs import check_form, check_kind, check_room


def pack_latents(kv_c: torch.Tensor, k_pe: torch.Tensor, latents: torch.Tensor) -> None:
    """[T, kv_lora_rank] and [T, rope] side by side into [T, W]: a key of one head."""
    concat_row(kv_c, k_pe, latents)


def _call(collective: Callable[[], None]) -> None:
    collective()


class LatentExchange:
    """Gives every rank of a context-parallel group the latents of all: rows of ``kv_lora_rank + qk_rope_head_dim`` numbers travel
    in one ``all_gather_into_tensor``, where two of them and two restores were.

    Args:
        group: ONE flat ``torch.distributed`` group (see :func:`pcp_mla.flat_cp_group`), an engine's own communicator
            (:class:`pcp_mla.groups.CommunicatorHandle`), a :class:`PlayedGroup`, or None for a world of one rank.
        max_tokens: capacity, as local tokens of a rank with pads (``PCPPlanner.max_local_tokens``).
        dims: of the layer: ``kv_lora_rank`` and ``qk_rope_head_dim``.
        dtype: of the latents; types of one byte (float8) travel as bytes.
        device: where the buffers are: P + 1 times ``max_tokens`` rows.

    Attributes:
        around: what makes the collective instead of a plain call, given it: :meth:`PiecewiseGraph.gap` while it captures.

    Raises:
        ValueError, TypeError: ``max_tokens`` is negative, or an argument is of the wrong kind.
    """

    around: Callable[[Callable[[], None]], None] | None = None

    def __init__(
        self, group: Group, max_tokens: int, dims: MLADims, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.world_size = group_world_size(group, "LatentExchange")
        self.rank = group_rank(group)
        check_form("LatentExchange", max_tokens, dims, dtype)
        self.group, self.max_tokens, self.kv_lora_rank = group, max_tokens, dims.kv_lora_rank
        self.width = dims.kv_lora_rank + dims.qk_rope_head_dim
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self._send = torch.empty(max_tokens, self.width, dtype=dtype, device=device)
            self._gathered = torch.empty(
                self.world_size * max_tokens if self.world_size > 1 else 0, self.width, dtype=dtype, device=device
            )
        self._in_place = gathers_in_place(group) and self.world_size > 1
        self._last: tuple[int, torch.Tensor, torch.Tensor, Callable[[], None] | None] | None = None

    def all_gather(self, kv_c: torch.Tensor, k_pe: torch.Tensor, meta: PCPMetadata) -> torch.Tensor:
        """One collective; none for a world of one, and none for a step of replicated decodes alone, which every rank has.

        Latents that lie side by side already, ``kv_c`` and ``k_pe`` being slices of one [T, W], are sent as they are if this rank
        has no pads; else they are packed.

        Args:
            kv_c: [T, kv_lora_rank] this rank's normed latents in local order; any row stride with a contiguous last dimension. Of a
                padded plan also [Np, ...], pads anything.
            k_pe: [T, qk_rope_head_dim] their rotated keys, likewise.
            meta: the step, for this rank of the group.

        Returns:
            [P * Np, W], rank-major: what ``meta.slot_mapping`` and ``meta.allgather_restore_idx`` count in. Pads are zeros;
            further copies of decodes, in which nothing counts, may be anything. It is a view of the exchange's buffer, valid until
            the next call (in a world of one it may be the input).

        Raises:
            ValueError, TypeError: a tensor does not fit ``meta`` or the exchange; before the collective.
            NotImplementedError: a tensor requires gradients.
        """
        op = "LatentExchange.all_gather"
        check_meta(op, meta)
        check_group(op, self.group, meta)
        check_latents(op, kv_c, k_pe, meta)
        tokens, padded = kv_c.shape[0], meta.num_tokens_padded
        check_room(op, meta, self.max_tokens)
        check_kind(op, kv_c, k_pe, (self.kv_lora_rank, self.width - self.kv_lora_rank), self._send.dtype)
        gathered = self._gathered[: self.world_size * padded]
        alone = self.world_size > 1 and meta.is_replicated  # what counts then is the place of rank 0's copy
        rows = self._side_by_side(kv_c, k_pe) if tokens == padded and not alone else None
        if rows is None:
            rows = gathered[:padded] if alone else self._place(gathered, padded)
            if tokens:
                pack_latents(kv_c, k_pe, rows[:tokens] if tokens < padded else rows)
            if tokens < padded:
                rows[tokens:].zero_()
        if self.world_size == 1:
            return rows
        if not alone:
            (self.around or _call)(self._collective(gathered, rows))
        return gathered

    def publish(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The latents of all ranks where the layer reads them: :meth:`all_gather`, and with a cache from there to their slots.

        Args:
            kv_c, k_pe, meta: as :meth:`all_gather`; with a cache, ``meta`` has slots (:meth:`PCPPlanner.plan` with block tables).
            cache, scale: as :func:`write_latent_cache`. The cache must share no memory with the latents.

        Returns:
            ``cache``, with the rows of all ranks at ``meta.slot_mapping``; without one, [P * Np, W] as :meth:`all_gather`.

        Raises:
            ValueError, TypeError: as :meth:`all_gather`, before the collective; as :func:`write_latent_cache`, behind it.
        """
        latents = self.all_gather(kv_c, k_pe, meta)
        if cache is None:
            return latents
        op = "LatentExchange.publish"
        if meta.slot_mapping is None:
            raise ValueError(f"{op}: meta must have cache slots, as a cache is given: plan it with block tables, got none")
        # In a world of one the latents may be the caller's, and no collective was made. Native ops look by themselves.
        beside = {"kv_c and k_pe": latents}
        if not (ALL_NATIVE or torch.compiler.is_compiling()):
            check_cache(op, cache, "latents", latents, scale)
            check_apart(op, "cache", cache, beside)
        check_not_expanded(op, "cache", cache)
        try:
            write_rows(latents, cache, meta.slot_mapping, scale)
        except RuntimeError:
            check_cache(op, cache, "latents", latents, scale)
            check_apart(op, "cache", cache, beside)
            raise
        return cache

    def all_gather_rows(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """The same for an engine that pads by itself and plans without this package: every row of every rank, pads as they are.

        For arguments that are known to fit: [n, kv_lora_rank] and [n, qk_rope_head_dim] with contiguous last dimensions, of the
        exchange's dtype, of the same n on every rank, at most ``max_tokens``. Returns [P * n, W], rank-major, as
        :meth:`all_gather`.
        """
        if self._last is None or self._last[0] != kv_c.shape[0]:  # the layers of a step have the same rows
            self._last = self._prepared(kv_c.shape[0])
        _, rows, gathered, collective = self._last
        pack_latents(kv_c, k_pe, rows)
        if collective is not None:
            (self.around or _call)(collective)
        return gathered

    def _place(self, gathered: torch.Tensor, count: int) -> torch.Tensor:
        """Where this rank packs ``count`` rows: where they stay, if the group gathers in place."""
        return gathered[self.rank * count :][:count] if self._in_place else self._send[:count]

    def _prepared(self, count: int) -> tuple[int, torch.Tensor, torch.Tensor, Callable[[], None] | None]:
        """Where ``count`` rows of each rank are packed, where they come together, and the collective."""
        if self.world_size == 1:
            return count, self._send[:count], self._send[:count], None
        gathered = self._gathered[: self.world_size * count]
        rows = self._place(gathered, count)
        return count, rows, gathered, self._collective(gathered, rows)

    def _collective(self, gathered: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
        if rows.element_size() == 1:  # collectives know bytes, but not every float8
            gathered, rows = gathered.view(torch.uint8), rows.view(torch.uint8)
        return gathering_into(gathered, rows, self.group)

    def _side_by_side(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor | None:
        """The two as one contiguous [T, W], if that is how they lie in memory."""
        if torch.compiler.is_compiling():  # they have no addresses then
            return None
        row, item = self.width, kv_c.element_size()
        strides = (row, 1)
        if kv_c.stride() != strides or k_pe.stride() != strides or k_pe.data_ptr() != kv_c.data_ptr() + self.kv_lora_rank * item:
            return None
        if kv_c.untyped_storage().data_ptr() != k_pe.untyped_storage().data_ptr():
            return None
        return kv_c.as_strided((kv_c.shape[0], row), strides)
