"""``past_key_values`` of a model under PCP: requests in its latent blocks, with all that transformers asks of a cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .calls import in_turn
from .context import PCPContext
from .paged_cache import CachedRequests
from .stock import CausalLMOutputWithPast, DynamicCache, DynamicLayer

# What transformers calls a cache, in arguments and results: `past_key_values` until 5.23, `cache` from then on.
CACHE_WORD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _context_of(op: str, cache: PCPCache) -> PCPContext:
    return cache.context


class PCPCache(DynamicCache):
    """A cache of a model under PCP: requests in its latent blocks, which go when this goes. A copy shares their blocks.

    What changes it is a call of its model: it waits for its turn, and over several ranks it is for all of them to make.

    An empty ``DynamicCache`` that is given to the model becomes one (:meth:`adopt`): whoever made it goes on with it.

    Attributes:
        requests: real tokens only.
        real: bool [B, columns], on the CPU: which columns of the ``input_ids`` so far are tokens, and which are pads.
    """

    def __init__(self, context: PCPContext) -> None:
        self._start(context)

    def _start(self, context: PCPContext) -> None:
        self.context, self.requests, self.real = context, CachedRequests(), torch.zeros(0, 0, dtype=torch.bool)
        self.layer_class_to_replicate, self.offloading = None, False

    @classmethod
    def adopt(cls, cache: DynamicCache, context: PCPContext) -> PCPCache:
        """Make an empty cache of transformers' own one of these."""
        adopted: Any = cache
        del adopted.layers
        adopted.__class__ = cls
        adopted._start(context)
        return adopted

    def __del__(self) -> None:
        context = self.__dict__.get("context")  # torch.compile makes objects that are never started
        if context is not None:
            context.blocks.release(self.requests)

    @in_turn("PCPCache.copy", _context_of)
    def __copy__(self) -> PCPCache:
        copy = PCPCache(self.context)
        copy.take(self._chosen(range(len(self.requests.lengths))), self.real)
        return copy

    def __deepcopy__(self, memo: Any) -> PCPCache:
        return self.__copy__()

    def __reduce__(self) -> Any:
        raise TypeError("PCPCache: cannot be pickled, its latents are in the blocks of a model under PCP")

    def _chosen(self, indices: Iterable[int]) -> CachedRequests:
        lengths = self.requests.lengths
        return self.context.blocks.fork_prefixes(self.requests, [(i, lengths[i]) for i in indices])

    def take(self, requests: CachedRequests, real: torch.Tensor) -> None:
        """These take the place of the requests so far."""
        self.context.blocks.release(self.requests)
        self.requests, self.real = requests, real

    @property
    def columns(self) -> int:
        """Of the ``input_ids`` so far, pads counted: what transformers takes for the length."""
        return self.real.shape[1]

    def _layers(self) -> list[_Layer]:
        return [_Layer(self)] * self.context.blocks.cache.shape[0]

    layers: Any = property(_layers, doc="What transformers asks of each layer, which is the same of all.")

    @in_turn("PCPCache.reset", _context_of)
    def reset(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.take(CachedRequests(), self.real[:0, :0])

    @in_turn("PCPCache.reorder_cache", _context_of)
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Request i becomes what request ``beam_idx[i]`` was."""
        self._select(beam_idx)

    @in_turn("PCPCache.batch_select_indices", _context_of)
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)

    @in_turn("PCPCache.batch_repeat_interleave", _context_of)
    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.requests.lengths)).repeat_interleave(repeats))

    def _select(self, indices: torch.Tensor) -> None:
        if self.columns:
            chosen = torch.arange(len(self.requests.lengths))[indices.cpu()]  # which a mask and negative numbers may do too
            requests = self._chosen(chosen.tolist())
            with self.context.blocks.released_on_failure(requests):
                self.context.wait_for_all()
            self.take(requests, self.real[chosen])

    @in_turn("PCPCache.crop", _context_of)
    def crop(self, tokens_to_remove: int) -> None:
        """Take columns off the end: so many if the number is negative, all behind so many if it is positive; 0 changes nothing."""
        columns, count = self.columns, int(tokens_to_remove)
        left = max(0, columns + count) if count <= 0 else min(columns, count)
        if left == 0 and columns:
            self._reset()
        elif left < columns:
            real = self.real[:, :left]
            lengths = real.sum(1).tolist()
            self.context.blocks.make_room_to_shorten(self.requests, lengths)
            self.context.wait_for_all()
            self.context.blocks.shorten(self.requests, lengths)
            self.real = real


class _Layer(DynamicLayer):
    """A layer of a :class:`PCPCache`, as far as transformers asks. What is done to a cache is done to all its layers at once."""

    def __init__(self, cache: PCPCache) -> None:
        self._columns = cache.columns
        self.is_initialized = self._columns > 0

    def get_seq_length(self) -> int:
        return self._columns

    def lazy_initialization(self, *_: Any) -> None:
        """Blocks are taken when there are tokens for them."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("PCPCache: its layers have no keys and values of their own, ask the cache as a whole")

    keys = values = property(_refuse)
    offload = prefetch = reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse

    def _refuse_model(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"PCPCache: {CACHE_WORD} must go to the model under PCP that filled it, got to another or after disable_pcp"
        )

    update = get_mask_sizes = _refuse_model


def empty_cache(given: Any) -> bool:
    """Whether it is a cache of transformers' own that can become a :class:`PCPCache`. TypeError and NotImplementedError for what is
    neither that nor one already."""
    if given is None or isinstance(given, PCPCache):
        return False
    name = type(given).__name__
    if type(given) is not DynamicCache or given.offloading or any(given.is_sliding):
        wanted = "None, a DynamicCache or a PCPCache, which grow in the blocks of the model"
        raise NotImplementedError(
            f"forward: {CACHE_WORD} must be {wanted}, got {name}{' (offloaded or sliding)' * (name == 'DynamicCache')}"
        )
    if given.get_seq_length():
        raise TypeError(f"forward: {CACHE_WORD} must be of a model under PCP or empty, got a filled {name}")
    return True
