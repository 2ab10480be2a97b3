"""The plan of a step over a paged cache, and the exchange that goes with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..exchange import Group, group_rank, group_world_size
from ..latent_exchange import LatentExchange
from ..metadata import PCPMetadata
from ..pipeline import MLADims
from ..planner import PCPPlanner
from .paged_cache import BLOCK_SIZE, CachedRequests


@dataclass
class PCPStep:
    """A running step: its plan and the exchange of its latents."""

    meta: PCPMetadata
    exchange: LatentExchange


class StepPlanner:
    """Plans the steps of one rank of a group, once a step for all layers. Planner and exchange are made anew for a larger step."""

    def __init__(self, group: Group, layout: str, dims: MLADims, dtype: torch.dtype, device: torch.device) -> None:
        self.group, self._layout, self._dims, self._dtype, self._device = group, layout, dims, dtype, device
        self._make(0, 0)

    def _make(self, max_requests: int, max_tokens: int) -> None:
        world, rank = group_world_size(self.group), group_rank(self.group)
        sizes = max_requests, max_tokens, world, rank
        self._planner = PCPPlanner(*sizes, layout=self._layout, block_size=BLOCK_SIZE, device=self._device)
        self._exchange = LatentExchange(self.group, self._planner.max_local_tokens, self._dims, self._dtype, self._device)

    def plan(self, lengths: list[int], cached: CachedRequests, decode: bool) -> PCPStep:
        """A step of ``lengths`` new tokens, whose blocks ``cached`` has already. Valid until the next one.

        The plan is of the requests that have some: the others' cached tokens would be expanded for nobody.
        """
        busy = [i for i, length in enumerate(lengths) if length]
        lengths, contexts = [lengths[i] for i in busy], [cached.lengths[i] for i in busy]
        planner = self._planner
        if len(busy) > planner.max_requests or sum(lengths) > planner.max_tokens:
            self._make(max(len(busy), planner.max_requests), max(sum(lengths), planner.max_tokens))
        meta = self._planner.plan(lengths, contexts, [not decode] * len(busy), cached.block_tables()[busy])
        return PCPStep(meta, self._exchange)
