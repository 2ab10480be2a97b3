"""Steps of a model under PCP in CUDA graphs, captured for some sizes and dispatched by the step's."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...exchange.heads import HeadExchange
from ...exchange.latents import LatentExchange
from ...groups import group_rank, group_world_size
from ...layer.graphs import PiecewiseGraph
from ...layer.steps import Kind, LayerStep
from ...plan.metadata import PCPMetadata
from ...planner.planner import PCPPlanner
from .context import PCPContext
from .model_step import local_tokens, run_modules
from .paged_cache import BLOCK_SIZE
from .split import own_heads
from .steps import Batch, PCPStep


@dataclass
class _Capture:
    """One size: what the graph reads and what it writes; without the graph once that is outdated."""

    tokens: int
    keys: int
    split: str
    ids: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor | None
    graph: PiecewiseGraph | None


class CapturedSteps:
    """Prefill steps, in pieces between the layers' collectives; or decode steps, which have none, in one graph each.

    Args:
        model, context: a model under PCP, on a GPU.
        decode: whether these are decode steps.
        sizes: (local tokens of the fullest rank, keys of all requests with their context) that a graph has room for.
        max_requests: that a graph has room for.

    Attributes:
        num_pieces: of each captured size: graphs, and collectives between them.
    """

    def __init__(self, model: Any, context: PCPContext, decode: bool, sizes: Sequence[tuple[int, int]], max_requests: int) -> None:
        self._model, self._context, self._decode, self._max_requests = model, context, decode, max_requests
        group = None if decode else context.group
        world, cache, dtype = group_world_size(group), context.blocks.cache, context.blocks.dtype
        tokens, keys = (max(column) for column in zip(*sizes, strict=True))
        self._planner = PCPPlanner(
            max_requests,
            world * tokens,
            world,
            group_rank(group),
            layout=context.layout,
            block_size=BLOCK_SIZE,
            device=cache.device,
            max_kv_tokens=keys,
            group=group,
        )
        self._cache = weakref.ref(cache)  # a graph that is outdated must not keep the cache that it was bound to
        self._exchange = LatentExchange(group, tokens, context.dims, dtype, cache.device)
        heads = None if decode else context.heads
        self._heads = None if heads is None else HeadExchange(group, tokens, heads, dtype, cache.device)
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others find its memory in the pool.
        self._captures = [self._capture(pool, *size) for size in sorted(sizes, reverse=True)][::-1]
        self.num_pieces = [capture.graph.num_pieces for capture in self._captures if capture.graph is not None]

    def _plan(self, tokens: int, keys: int, batch: Batch) -> PCPMetadata:
        self._context.in_collectives = not self._decode
        return self._planner.plan(
            *batch,
            num_tokens_padded=tokens,
            num_requests_padded=self._max_requests,
            num_kv_tokens_padded=keys,
        )

    def _split(self, tokens: int, keys: int) -> str:
        """How all steps of a size are shared out: as one that fills it would be. In a graph that is settled, and steps that some
        ranks run call by call must do as the graph does."""
        context, planner, heads = self._context, self._planner, self._heads
        if context.heads is None or heads is None:
            return "tokens"
        if context.split != "auto":
            return context.split
        if own_heads(self._model, context.dims)[1]:  # by now
            return "tokens"
        pads = 2 * planner.world_size if planner.layout == "padded" else 0
        new = max(0, min(keys - pads, planner.world_size * tokens))
        while planner.largest_rank([new]) > tokens:  # chunks of a request are rounded up
            new -= 1
        table = np.arange(-(-keys // BLOCK_SIZE), dtype=np.int32)[None]
        meta = self._plan(tokens, keys, Batch([new], [max(0, keys - pads - new)], [True], table))
        scale = context.dims.qk_head_dim**-0.5  # which costs nothing, whatever it is
        kind = Kind(context.heads, scale, "auto", context.blocks.dtype, True, heads, "auto")
        return "tokens" if LayerStep(kind, meta).heads is None else "heads"

    def _call(self, meta: PCPMetadata, split: str, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with self._context.running(PCPStep(meta, self._exchange, self._decode, self._heads, split)):
            return run_modules(self._model, ids, positions)

    def _capture(self, pool: Any, tokens: int, keys: int) -> _Capture:
        device = self._planner.device
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            ids, positions = (torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(2))
        split = self._split(tokens, keys)
        # No requests: nothing is written to the cache.
        meta = self._plan(tokens, keys, Batch([], [], [], np.zeros((0, 1), np.int32)))
        graph = PiecewiseGraph(pool, device)
        self._call(meta, split, ids, positions)
        exchanges = [exchange for exchange in (self._exchange, self._heads) if exchange is not None]
        hidden = graph.capture(lambda: self._call(meta, split, ids, positions), exchanges)
        self._context.in_collectives = False
        return _Capture(tokens, keys, split, ids, positions, hidden, graph)

    def run(self, batch: Batch, natural: torch.Tensor) -> tuple[PCPMetadata, torch.Tensor] | None:
        """The step's plan and its last hidden states with pads [Np, hidden], valid until the next step; None if no graph has room
        for it.

        All ranks decide that alike. When a rank's cache grows may differ, so a step whose graph is bound to an earlier cache is run
        call by call, padded as the graph is: its collectives are those of the other ranks.
        """
        count, planner = len(batch.lengths), self._planner
        if count > self._max_requests or sum(batch.lengths) > planner.max_tokens:
            return None
        local = planner.largest_rank(batch.lengths, batch.is_prefill)
        keys = sum(batch.lengths) + sum(batch.contexts)
        if planner.layout == "padded":  # with pads behind a prefill, and copies of a decode
            for length, is_prefill in zip(batch.lengths, batch.is_prefill, strict=True):
                keys += 2 * planner.world_size if is_prefill else (planner.world_size - 1) * length
        fitting = (capture for capture in self._captures if capture.tokens >= local and capture.keys >= keys)
        capture = next(fitting, None)
        if capture is None:
            return None
        meta = self._plan(capture.tokens, capture.keys, batch)
        for buffer, values in zip((capture.ids, capture.positions), local_tokens(meta, natural), strict=True):
            buffer.copy_(values)
        if self._context.blocks.cache is not self._cache():
            for outdated in self._captures:  # their memory goes with them
                outdated.graph = outdated.hidden = None
        if capture.graph is None or capture.hidden is None:
            return meta, self._call(meta, capture.split, capture.ids, capture.positions)
        capture.graph.replay()
        return meta, capture.hidden
