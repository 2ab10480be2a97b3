"""What the layers of a step have in common, worked out in the first of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..exchange.heads import HeadExchange
from ..exchange.peer_heads import PeerHeadExchange
from ..ops.attention.call import check_library, prepared_call, shares_starts
from ..ops.attention.support import choose, wants_apart
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from ..plan.rank_rows import RankRows
from .checks import check_head_exchange, check_shards
from .projection import some_heads
from .split import heads_pay


class Kind(NamedTuple):
    """Of layers that share a step."""

    dims: MLADims
    scale: float
    backend: str
    dtype: Any
    cached: bool
    heads: HeadExchange | PeerHeadExchange | None = None
    split: str = "tokens"
    scaled: bool = False  # the cache is float8, with a scale of each layer
    sharded: bool = False  # the exchange is one with the other shards of the cache


class LayerStep:
    """A step for layers of one kind, of which the first was checked. It holds tensors of the metadata, and not the metadata, with
    which it goes.

    Attributes:
        kind: of the layers.
        scale: of them.
        heads, ranks: where each rank computes some heads for all ranks' tokens, what exchanges these, and the rows of all ranks.
            Else None.
        dims: of the heads that this rank computes.
        weight_rows: of ``kv_b_proj``, those of these heads.
        backend: that was chosen.
        rows: int32, of each key its row in the published latents.
        chunks: of the metadata or of ``ranks``, those of context first; none, or one alone, for all keys at once.
        apart: whether K is left in two parts, the one that all heads share for itself.
        call: attention of all keys at once, for tensors that a library can reach: q [n >= 1, ...], K and V of all ``rows`` in
            contiguous tensors, the output, and if ``apart`` the rest of K. None where there is no such call.
    """

    def __init__(self, kind: Kind, meta: PCPMetadata) -> None:
        """Errors as :func:`choose`, :func:`check_library`, :func:`check_head_exchange` and :func:`check_shards`, and RuntimeError
        for a plan that is no longer the planner's."""
        check_shards("MLAPrefill", kind.sharded, meta)
        self.kind, dims, dtype, cached, self.scale = kind, kind.dims, kind.dtype, kind.cached, kind.scale
        self.ranks: RankRows | None = None
        self._share(meta)
        self.apart = wants_apart(self.backend, dims.qk_nope_head_dim, dims.qk_rope_head_dim)
        self.chunks = meta.key_chunks if self.ranks is None else self.ranks.key_chunks
        beyond = "the rows of all ranks" if self.ranks is not None else "chunk and prev" if len(self.chunks) > 1 else ""
        check_library(self.backend, beyond)
        rows = meta.kv_rows if cached else meta.allgather_restore_idx
        if kind.sharded and meta.shard_rows is not None:
            rows = meta.shard_rows.kv_rows
        assert rows is not None
        self.rows = rows
        self.call: Callable[..., Any] | None = None
        # Rows of K and V, contiguous, begin at multiples of 16 bytes: what else a library needs of them is known here.
        aligned = (dims.qk_head_dim * dtype.itemsize | dims.v_head_dim * dtype.itemsize) % 16 == 0
        if len(self.chunks) < 2 and aligned and 0 < rows.shape[0] <= meta.num_kv_tokens:
            self.call = prepared_call(self.backend, self.ranks or meta, self.scale)
        if not torch.compiler.is_compiling():  # which would make a graph for each number of tokens
            self._expect(dims, dtype, meta)

    def _share(self, meta: PCPMetadata) -> None:
        """Share the layers out by heads, if that is asked for or pays, and choose the backend."""
        dims, heads, split = self.kind.dims, self.kind.heads, self.kind.split
        if split == "tokens" or meta.world_size == 1:
            heads = None
        if heads is not None and split == "auto" and not heads_pay(heads, dims, self.kind.dtype, meta):
            heads = None
        if heads is not None:
            check_head_exchange("MLAPrefill", heads, self.kind.dtype, meta)
            self.ranks = meta.rank_rows
            self.backend = self._choose(self.ranks.max_seqlen_q, len(range(dims.num_heads)[heads.heads]), meta)
            if split == "auto" and not shares_starts(self.backend):
                self.ranks = heads = None
        if heads is None:
            self.backend = self._choose(meta.max_seqlen_q, dims.num_heads, meta)
        self.heads, mine = heads, slice(0, dims.num_heads) if heads is None else heads.heads
        self.dims, self.weight_rows = some_heads(dims, mine)

    def _choose(self, longest: int, heads: int, meta: PCPMetadata) -> str:
        """The backend for rows of which the longest has so many queries: of all ranks, or of this one. K is made as it wants it."""
        kind, dims = self.kind, self.kind.dims
        return choose(kind.backend, meta.device, kind.dtype, dims.qk_head_dim, dims.v_head_dim, False, longest, heads)

    def _expect(self, dims: MLADims, dtype: torch.dtype, meta: PCPMetadata) -> None:
        """Note what the usual inputs are like."""
        counts = {meta.num_tokens, meta.num_local_rows}
        self._latents = [((n, dims.kv_lora_rank), (n, dims.qk_rope_head_dim)) for n in counts]
        self._query = (dims.num_heads, dims.qk_head_dim)
        self._weight = (dims.num_heads * dims.expanded_dim, dims.kv_lora_rank)
        self._types, self._places = (dtype, dtype, torch.float8_e4m3fn if self.kind.scaled else dtype), (meta.device,) * 3
        paged = meta.paged_cache
        self._block = None if paged is None else (paged.block_size, dims.latent_dim)
        self._strides = [dims.latent_dim, 1]  # within a block of the cache

    def fits_latents(self, kv_c: Any, k_pe: Any, cache: Any, scale: Any) -> bool:
        """Whether the checks of these would find nothing, at a glance: they are as usual. Others may be right, too."""
        if not (isinstance(kv_c, torch.Tensor) and isinstance(k_pe, torch.Tensor)):
            return False
        room = kv_c
        if cache is not None:
            room = cache
            if not isinstance(cache, torch.Tensor) or cache.shape[1:] != self._block:
                return False
            apart, *strides = cache.stride()
            if not apart or strides != self._strides:
                return False
        return (
            (kv_c.shape, k_pe.shape) in self._latents
            and (kv_c.dtype, k_pe.dtype, room.dtype) == self._types
            and (kv_c.device, k_pe.device, room.device) == self._places
            and kv_c.stride()[1] == k_pe.stride()[1] == 1
            and not (torch.is_grad_enabled() and (kv_c.requires_grad or k_pe.requires_grad or room.requires_grad))
            and (scale is None or self._fits_scale(scale))
        )

    def _fits_scale(self, scale: Any) -> bool:
        return (
            isinstance(scale, torch.Tensor)
            and scale.shape in ((), (1,))
            and scale.dtype == torch.float32
            and scale.device == self._places[0]
            and not (torch.is_grad_enabled() and scale.requires_grad)
        )

    def fits_rest(self, q: Any, weight: torch.Tensor | None, count: int) -> bool:
        """The same of q, beside so many rows of latents, and of a weight that is all of ``kv_b_proj``."""
        return (
            weight is not None
            and isinstance(q, torch.Tensor)
            and q.shape == (count, *self._query)
            and weight.shape == self._weight
            and (q.dtype, weight.dtype) == self._types[:2]
            and (q.device, weight.device) == self._places[1:]
            and q.stride()[2] == weight.stride()[1] == 1
            and not (torch.is_grad_enabled() and (q.requires_grad or weight.requires_grad))
        )


# By the metadata itself: a copy of one has none, and what is pickled or copied of it is not that of the layers. Of steps that
# threads make at the same time either will do.
_steps: WeakKeyDictionary[PCPMetadata, list[LayerStep]] = WeakKeyDictionary()


def known_step(kind: Kind, meta: Any) -> LayerStep | None:
    """That of an earlier layer, if there was one. None for compilers, which make constants of what they see."""
    if torch.compiler.is_compiling() or not isinstance(meta, PCPMetadata):
        return None
    for step in _steps.get(meta, ()):
        if step.kind == kind:
            return step
    return None


def new_step(kind: Kind, meta: PCPMetadata) -> LayerStep:
    """The step for layers of a kind, to be found by :func:`known_step` from now on. Errors as :class:`LayerStep`."""
    step = LayerStep(kind, meta)
    if not torch.compiler.is_compiling():
        _steps.setdefault(meta, []).append(step)
    return step
