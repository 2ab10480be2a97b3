"""The part ``exchange``: the latents of all ranks in one collective, and from its buffer straight into their cache slots."""

from __future__ import annotations

from typing import Any

import torch

from ...exchange.latents import LatentExchange
from ...ops.latent_cache import write_latent_cache, write_rows
from ...plan.dims import MLADims
from . import parts
from .communicator import Communicator

E4M3 = ("fp8", "fp8_e4m3")  # what vLLM calls caches of float8_e4m3fn with a scale


class PackedExchange:
    """The exchanges of a process, one for each kind of latents, whichever layer they are of.

    vLLM asks for the latents to cache in one call and writes them in the next, passing on the very tensors that it was given. They
    are views of the exchange's buffer, so that vLLM's own write works too.
    """

    def __init__(self, communicator: Communicator, max_tokens: int) -> None:
        self._communicator, self._max_tokens = communicator, max_tokens
        self._outgrown: list[LatentExchange] = []  # graphs may have their addresses
        self._exchanges: dict[tuple[Any, ...], LatentExchange] = {}
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # all, kv_c and k_pe of what was gathered last

    def of(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> LatentExchange:
        """The exchange for such latents, made for steps of ``max_tokens`` or, if there are more, for these."""
        key = (kv_c.dtype, kv_c.device, kv_c.shape[1], k_pe.shape[-1])
        found = self._exchanges.get(key)
        if found is None or found.max_tokens < kv_c.shape[0]:
            if found is not None:
                self._outgrown.append(found)
            dims, room = MLADims(1, 1, key[3], 1, key[2]), max(self._max_tokens, kv_c.shape[0])
            found = self._exchanges[key] = LatentExchange(self._communicator, room, dims, kv_c.dtype, kv_c.device)
        return found

    def gather(
        self, kv_c: torch.Tensor, k_pe: torch.Tensor, slot_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What vLLM is to cache: [P * n, kv_lora_rank], [P * n, 1, rope] and their slots.

        Replicated decodes travel too, and rank 0's copies are what every rank caches: others have no slot.
        """
        packed = self.of(kv_c, k_pe).all_gather_rows(kv_c, k_pe.view(kv_c.shape[0], -1))
        if self._last is None or packed is not self._last[0]:  # one for all layers of a step
            self._last = packed, packed[:, : kv_c.shape[1]], packed[:, None, kv_c.shape[1] :]
        parts.counts["exchange"] += 1
        slots = slot_mapping if slot_mapping.shape[0] == packed.shape[0] else slot_mapping[: packed.shape[0]]
        return *self._last[1:], slots

    def write(self, kv_c: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, cache_dtype: str, scale: torch.Tensor) -> bool:
        """Write the rows that were gathered last, if these are they and the cache is of a kind that the op knows."""
        if self._last is None or kv_c is not self._last[1]:
            return False
        packed = self._last[0]
        if cache_dtype in E4M3:
            write_latent_cache(packed, cache.view(torch.float8_e4m3fn), slots, scale=scale)
        elif cache.dtype == kv_c.dtype:
            write_rows(packed, cache, slots, None)
        else:
            return False
        parts.counts["cache_write"] += 1
        return True
