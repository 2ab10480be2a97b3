"""The plan of a step over a paged cache, and the exchange that goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ...exchange.heads import HeadExchange
from ...exchange.latents import LatentExchange
from ...groups import Group, group_rank, group_world_size
from ...plan.dims import MLADims
from ...plan.metadata import PCPMetadata
from ...planner.planner import PCPPlanner
from .latent_attention import TokenRows
from .paged_cache import BLOCK_SIZE, CachedRequests


@dataclass
class PCPStep:
    """A running step: its plan, the exchange of its latents, whether it is a decode step, of decodes alone, and how its layers are
    shared out, with an exchange of their heads where that is not by tokens alone."""

    meta: PCPMetadata
    exchange: LatentExchange
    is_decode: bool
    heads: HeadExchange | None = None
    split: str = "tokens"

    @cached_property
    def token_rows(self) -> TokenRows:
        """Of a decode step, for all its layers."""
        return TokenRows.of(self.meta)


class Batch(NamedTuple):
    """The requests of a step that have new tokens; the others' cached tokens would be expanded for nobody.

    A decode has a token or a few, which every rank computes; the others' are cut over the ranks.
    """

    lengths: list[int]
    contexts: list[int]
    is_prefill: list[bool]
    tables: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int], cached: CachedRequests, decodes: Sequence[bool]) -> Batch:
        busy = [i for i, length in enumerate(lengths) if length]
        tables = cached.block_tables()[busy]
        return cls([lengths[i] for i in busy], [cached.lengths[i] for i in busy], [not decodes[i] for i in busy], tables)


class StepsInGraphs(Protocol):
    """Captured steps; see :class:`.captured.CapturedSteps`."""

    def run(self, batch: Batch, natural: torch.Tensor) -> tuple[PCPMetadata, torch.Tensor] | None:
        """The step's plan and its last hidden states with pads; None if no graph has room for it."""


class StepPlanner:
    """Plans the steps of one rank of a group, once a step for all layers. Planner and exchanges are made anew for a larger step.

    Args:
        heads: widths of what an exchange of heads exchanges; None for steps that are shared out by tokens.
        split: of :class:`pcp_mla.MLAPrefill`, for steps that have one.
    """

    def __init__(
        self,
        group: Group,
        layout: str,
        dims: MLADims,
        dtype: torch.dtype,
        device: torch.device,
        heads: MLADims | None = None,
        split: str = "tokens",
    ) -> None:
        self.group, self._layout, self._dims, self._dtype, self._device = group, layout, dims, dtype, device
        self._heads_dims, self._split = heads, split
        self._make(0, 0)

    def _make(self, max_requests: int, max_tokens: int) -> None:
        world, rank = group_world_size(self.group), group_rank(self.group)
        sizes = max_requests, max_tokens, world, rank
        self._planner = PCPPlanner(*sizes, layout=self._layout, block_size=BLOCK_SIZE, device=self._device, group=self.group)
        room, place = self._planner.max_local_tokens, (self._dtype, self._device)
        self._exchange = LatentExchange(self.group, room, self._dims, *place)
        self._heads = None if self._heads_dims is None else HeadExchange(self.group, room, self._heads_dims, *place)

    def make_room(self, batch: Batch) -> None:
        """For the plan of such a step."""
        planner, tokens = self._planner, sum(batch.lengths)
        if len(batch.lengths) > planner.max_requests or tokens > planner.max_tokens:
            self._make(max(len(batch.lengths), planner.max_requests), max(tokens, planner.max_tokens))

    def plan(self, batch: Batch) -> PCPStep:
        """A step that there is room for, over a cache that has the blocks already. Valid until the next one."""
        meta = self._planner.plan(*batch)
        return PCPStep(meta, self._exchange, not any(batch.is_prefill), self._heads, self._split)
