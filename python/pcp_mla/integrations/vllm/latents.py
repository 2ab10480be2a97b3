"""The part ``exchange``: the latents of all ranks in their cache slots: by one kernel that stores to the caches of all of them
where GPUs see one another's memory, else by one collective and a write out of its buffer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...exchange.choose import choose_exchange
from ...exchange.latents import LatentExchange
from ...exchange.peer_memory import PeersUnavailable
from ...exchange.peers import PeerExchange
from ...ops.latent_cache import write_latent_cache, write_rows
from ...plan.dims import MLADims
from . import parts
from .communicator import Communicator
from .parts import logger

E4M3 = ("fp8", "fp8_e4m3")  # what vLLM calls caches of float8_e4m3fn with a scale
TIMEOUT = 300.0  # seconds: ranks compile kernels at their own speed


class _Gathered(NamedTuple):
    """What vLLM was given last.

    Attributes:
        peers: the exchange that has yet to store it; None where a collective has gathered it.
        rows: [P * n, W] of all ranks, if gathered.
        kv_c, k_pe: as given: parts of ``rows``, or this rank's own.
    """

    peers: PeerExchange | None
    rows: torch.Tensor | None
    kv_c: torch.Tensor
    k_pe: torch.Tensor


class StepExchange:
    """The exchanges of a process, one for each kind of latents, whichever layer they are of.

    vLLM asks for the latents to cache in one call and writes them in the next, passing on the very tensors that it was given. What
    a collective gathered is views of the exchange's buffer, so that vLLM's own write works too. Where ranks store to one another's
    caches the first call gives this rank's own latents back, and the second one does it all.

    Args:
        by_peers: whether the caches of all layers are of kinds that can be stored to.
    """

    def __init__(self, communicator: Communicator, max_tokens: int, by_peers: bool = False) -> None:
        self._communicator, self._max_tokens, self._by_peers = communicator, max_tokens, by_peers
        self._outgrown: list[Any] = []  # graphs may have their addresses
        self._exchanges: dict[tuple[Any, ...], LatentExchange | PeerExchange] = {}
        self._last: _Gathered | None = None
        self._attached: set[int] = set()
        self.step = 0  # to be counted up

    def of(self, kv_c: torch.Tensor, k_pe: torch.Tensor) -> LatentExchange | PeerExchange:
        """The exchange for such latents, made for steps of ``max_tokens`` or, if there are more, for these."""
        key = (kv_c.dtype, kv_c.device, kv_c.shape[1], k_pe.shape[-1])
        found = self._exchanges.get(key)
        if found is None or found.max_tokens < kv_c.shape[0]:
            if found is not None:
                self._outgrown.append(found)
            dims, room = MLADims(1, 1, key[3], 1, key[2]), max(self._max_tokens, kv_c.shape[0])
            arguments = (self._communicator, room, dims, kv_c.dtype, kv_c.device)
            found = choose_exchange(*arguments, timeout=TIMEOUT) if self._by_peers else LatentExchange(*arguments)
            self._exchanges[key] = found
            self._attached.clear()
            way = "peers" if isinstance(found, PeerExchange) else "a collective"
            logger.debug("pcp-mla: latents of %d ranks by %s", self._communicator.world_size, way)
        return found

    def gather(
        self, kv_c: torch.Tensor, k_pe: torch.Tensor, slot_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What vLLM is to cache: [P * n, kv_lora_rank], [P * n, 1, rope] and their slots.

        Replicated decodes travel too, and rank 0's copies are what every rank caches: others have no slot.
        """
        exchange = self.of(kv_c, k_pe)
        parts.counts["exchange"] += 1
        count = self._communicator.world_size * kv_c.shape[0]
        slots = slot_mapping if slot_mapping.shape[0] == count else slot_mapping[:count]
        if isinstance(exchange, PeerExchange):
            self._last = _Gathered(exchange, None, kv_c, k_pe)
            return kv_c, k_pe, slots
        rows = exchange.all_gather_rows(kv_c, k_pe.view(kv_c.shape[0], -1))
        if self._last is None or rows is not self._last.rows:  # one for all layers of a step
            self._last = _Gathered(None, rows, rows[:, : kv_c.shape[1]], rows[:, None, kv_c.shape[1] :])
        return self._last.kv_c, self._last.k_pe, slots

    def write(self, kv_c: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, cache_dtype: str, scale: torch.Tensor) -> bool:
        """Write the rows that were gathered last, if these are they and the cache is of a kind that the op knows."""
        last = self._last
        if last is None or kv_c is not last.kv_c:
            if last is not None and last.peers is not None:  # vLLM's own write would put this rank's rows into others' slots
                raise RuntimeError(
                    f"pcp_mla: latents to cache must be those of the last gather: set {parts.VARIABLE} without exchange"
                )
            return False
        scaled = cache_dtype in E4M3
        if scaled:
            cache = cache.view(torch.float8_e4m3fn)
        if last.peers is not None:
            self._last = None
            self._attach(last.peers, cache)
            rows = (kv_c, last.k_pe.view(kv_c.shape[0], -1))
            last.peers.publish_rows(*rows, slots, cache, scale if scaled else None, self.step)
            parts.counts["cache_write"] += 1
            return True
        assert last.rows is not None
        if scaled:
            write_latent_cache(last.rows, cache, slots, scale=scale)
        elif cache.dtype == kv_c.dtype:
            write_rows(last.rows, cache, slots, None)
        else:
            return False
        parts.counts["cache_write"] += 1
        return True

    def _attach(self, exchange: PeerExchange, cache: torch.Tensor) -> None:
        """Open a layer's cache to the other ranks when it is first written to, which is on all of them."""
        address = cache.data_ptr()
        if address in self._attached or torch.cuda.is_current_stream_capturing():
            return
        self._attached.add(address)
        try:
            exchange.attach([cache])
        except PeersUnavailable as error:  # on every rank alike
            logger.warning("pcp-mla: a cache is filled by a launch of its own: %s", error)
