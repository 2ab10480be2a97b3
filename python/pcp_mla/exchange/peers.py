"""The latents of all ranks without a collective: each rank stores its own at their slots in the caches of all, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checks import check_apart, check_not_expanded
from ..groups import Group, check_latents
from ..ops.latent_cache import check_cache, write_rows
from ..ops.registry import direct
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from . import peer_memory
from .inputs import check_form, check_kind, check_step
from .peer_mailbox import DTYPES, PeerMailbox
from .peer_memory import MAX_SMS, PeersUnavailable

_IN_CACHE, _IN_STAGING = 1, 2  # csrc/publish_latents.h


class PeerExchange(PeerMailbox):
    """:class:`LatentExchange` for ranks of one host whose GPUs see one another's memory. One kernel stores this rank's rows at
    their slots in the caches of all ranks, tells them, and ends when the rows of all ranks are here. docs/peers.md says why no
    rank overwrites what another one still reads.

    Every rank of the group makes it, attaches and closes alike, and publishes the same steps in the same order, from one thread at
    a time. Calls follow one another, also those on other streams.

    Args:
        group, max_tokens, dims, dtype: as :class:`LatentExchange`. With ``group=None`` rows go straight to their slots.
        device: a GPU.
        caches: to :meth:`attach`.
        timeout: seconds that a call waits for other ranks, at most a day.
        max_sms: blocks that the kernel may have, of one multiprocessor each; the same on all ranks. All by default: with 16 and
            more it is nearly as fast, and leaves the others to a product beside it.
        why_not: why this rank does not want it, if so: it is told to all.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind.
        PeersUnavailable: (a RuntimeError) memory cannot be shared; raised on every rank alike, with the reason.
    """

    def __init__(
        self,
        group: Group,
        max_tokens: int,
        dims: MLADims,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        *,
        caches: Sequence[torch.Tensor] = (),
        timeout: float = 60.0,
        max_sms: int = MAX_SMS,
        why_not: str = "",
    ) -> None:
        check_form("PeerExchange", max_tokens, dims, dtype)
        super().__init__(group, max_tokens, dtype, device, timeout, max_sms)
        self.kv_lora_rank, self.width = dims.kv_lora_rank, dims.latent_dim
        size, widths = self.world_size * self.max_tokens * self.width, (self.kv_lora_rank, self.width - self.kv_lora_rank)
        self._staging = self._open(why_not, size, [self.kv_lora_rank, self.width], widths).view(-1, self.width)
        try:
            self.attach(caches)
        except PeersUnavailable:
            self.close()
            raise

    def attach(self, caches: Sequence[torch.Tensor]) -> None:
        """Open the caches of all ranks to one another: layers in the same order, of the same shape everywhere. A cache that was
        not attached is filled from the staging buffer, by a launch more.

        Args:
            caches: [num_blocks, block_size, W] each, any strides with a contiguous last dimension, on this exchange's GPU. They
                must not be freed before :meth:`close`.

        Raises:
            PeersUnavailable: on every rank, if one cannot share its memory (that of expandable segments, say).
        """
        self._check_open("PeerExchange.attach")
        why = next((f"a cache on {cache.device}, not on {self.device}" for cache in caches if cache.device != self.device), "")
        why = why or next((f"a cache of {cache.dtype}" for cache in caches if cache.dtype not in DTYPES), "")
        why = why or next((f"a cache of {cache.dim()} dimensions" for cache in caches if cache.dim() not in (2, 3)), "")
        if self.world_size > 1:
            forms = [[DTYPES.get(c.dtype, -1), c.dim(), *c.shape, *c.stride()] for c in caches]
            for of, form in zip(self._memory.everywhere([c.data_ptr() for c in caches], forms, why), forms, strict=True):
                peer_memory.attach(self._mailbox, of, form)
            self._keep(caches)

    def publish(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        meta: PCPMetadata,
        cache: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :meth:`LatentExchange.publish`, in one launch. A step of replicated decodes alone sends nothing.

        Raises:
            ValueError, TypeError: as :meth:`LatentExchange.publish`, before anything is launched: the other ranks wait for this
                one then, until their time is up.
            NotImplementedError: a tensor requires gradients, or a mode of torch's dispatcher is active.
            RuntimeError: an earlier call failed: a rank did not come in time, or made a different call.
        """
        if meta is not self._meta:
            self._take(meta)
        calls = direct()
        where: Any = 0
        if calls is not None:
            where = calls.publish_latents(self._mailbox, kv_c, k_pe, self._slots, cache, scale, *self._step)
        if where == _IN_CACHE:
            assert cache is not None
            return cache
        if where != _IN_STAGING:
            return self._refused(where, kv_c, k_pe, meta, cache, scale)
        if cache is None:
            return self._rows
        assert self._slots is not None
        self._write(self._rows, cache, self._slots, scale)
        return cache

    def publish_rows(
        self,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: torch.Tensor,
        scale: torch.Tensor | None = None,
        step: int = 0,
    ) -> None:
        """The same for an engine that pads by itself and plans without this package.

        Args:
            kv_c, k_pe: [n, kv_lora_rank] and [n, qk_rope_head_dim], of the same n on every rank, at most ``max_tokens``.
            slot_mapping: int64 [P * n], rank-major: no slot (-1) for pads, and of rows that several ranks have in all but one.
            cache, scale: as :meth:`publish`.
            step: a number that differs from one step to the next, the same on all ranks.

        Raises:
            RuntimeError: an argument does not fit, or an earlier call failed.
        """
        self._check_open("PeerExchange.publish_rows")
        count, calls = kv_c.shape[0], direct()
        rows = (count, count, self.rank * count, count, step, False)
        where: Any = 0
        if calls is not None:
            where = calls.publish_latents(self._mailbox, kv_c, k_pe, slot_mapping, cache, scale, *rows)
        if where == _IN_STAGING:
            self._write(self._staging[: self.world_size * count], cache, slot_mapping, scale)
        elif where != _IN_CACHE:
            self._check_status()
            raise RuntimeError(f"PeerExchange.publish_rows: {where or 'tensors must be plain, without gradients'}")

    def _write(self, rows: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Rows from the staging buffer to a cache that was not attached. A launch behind a call that failed fails, too."""
        try:
            write_rows(rows, cache, slot_mapping, scale)
        except RuntimeError:
            self._check_status()
            raise

    def _take(self, meta: PCPMetadata) -> None:
        """Look at a step once."""
        op = "PeerExchange.publish"
        check_step(op, self.group, meta, self.max_tokens)
        self._check_open(op)
        padded = meta.num_tokens_padded
        alone = self.world_size > 1 and meta.is_replicated
        self._number += 1
        self._step = (meta.num_tokens, meta.num_local_rows, self.rank * padded, padded, self._number, alone)
        self._slots, self._rows = meta.slot_mapping, self._staging[: self.world_size * padded]
        self._meta = meta

    def _refused(self, wrong: Any, kv_c: Any, k_pe: Any, meta: PCPMetadata, cache: Any, scale: torch.Tensor | None) -> torch.Tensor:
        """Say why a call was refused, or make it where only gradients were on."""
        op = "PeerExchange.publish"
        self._check_status()
        check_latents(op, kv_c, k_pe, meta)
        check_kind(op, kv_c, k_pe, (self.kv_lora_rank, self.width - self.kv_lora_rank), self.dtype)
        if cache is not None:
            if self._slots is None:
                raise ValueError(f"{op}: meta must have cache slots, as a cache is given: plan it with block tables, got none")
            check_cache(op, cache, "latents", kv_c.new_empty(0, self.width), scale)
            check_not_expanded(op, "cache", cache)
            check_apart(op, "cache", cache, {"kv_c": kv_c, "k_pe": k_pe, "slot_mapping": self._slots})
        if isinstance(wrong, str):
            raise RuntimeError(f"{op}: {wrong}")
        if not torch.is_grad_enabled():
            raise NotImplementedError(f"{op}: kv_c must be a plain tensor, outside of modes and compilers of torch")
        with torch.no_grad():
            return self.publish(kv_c, k_pe, meta, cache, scale=scale)

    def _forget(self, nothing: torch.Tensor) -> None:
        self._staging = self._rows = nothing.view(-1, self.width)
