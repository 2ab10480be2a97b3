"""A paged latent cache for all layers of a model: blocks from a pool, shared by requests that have a prefix in common."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

# Tokens of a block.
BLOCK_SIZE = 16


@dataclass
class CachedRequests:
    """Requests whose tokens are in the cache: how many tokens each has, and the numbers of its blocks in order.

    Attributes:
        history: a number for what made each one, tokens included, equal on all ranks that were given the same. Kept up only where
            ranks compare.
    """

    lengths: list[int] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)
    history: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = self.history or [0] * len(self.lengths)

    def block_tables(self) -> np.ndarray:
        """int32 [R, blocks of the longest], padded with 0."""
        tables = np.zeros((len(self.blocks), max(map(len, self.blocks), default=0)), np.int32)
        for row, blocks in zip(tables, self.blocks, strict=True):
            row[: len(blocks)] = blocks
        return tables


class LatentBlocks:
    """The blocks, and how many requests use each.

    A block that several requests use is full, or is written behind the tokens of all of them but one: nobody's tokens change.
    Every method may be called by any thread, :meth:`release` also by the garbage collector, which may come at any point of another.

    Attributes:
        cache: [layers, num_blocks, BLOCK_SIZE, W], a larger tensor after the pool has grown: of the latents' dtype or, with
            scales, float8.
        dtype: of the latents.
        lock: held while a step reads and writes the cache, and while it is copied or grows.
    """

    def __init__(
        self, layers: int, width: int, dtype: torch.dtype, device: torch.device, scales: Sequence[float] | None = None
    ) -> None:
        held = dtype if scales is None else torch.float8_e4m3fn
        self._scales: Sequence[torch.Tensor | None] = [None] * layers
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self.cache = torch.empty(layers, 0, BLOCK_SIZE, width, dtype=held, device=device)
            if scales is not None:
                self._scales = torch.tensor(scales, dtype=torch.float32, device=device).split(1)
        self.dtype = dtype
        self.lock = threading.RLock()
        self._users: list[int] = []
        self._free: list[int] = []
        self._counting = threading.Lock()  # of the two lists; never held while anything is waited for
        self._released: deque[CachedRequests] = deque()

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Its cache, and the scale of one of float8."""
        return self.cache[number], self._scales[number]

    @contextmanager
    def _counts(self) -> Iterator[None]:
        """Around a change of who uses what."""
        with self._counting:
            yield
        self._settle()

    def _settle(self) -> None:
        """Free the blocks of released requests, unless somebody is counting, who does so afterwards. Never waits: in a garbage
        collection the one who is counting may be this thread, or wait for it."""
        while self._released and self._counting.acquire(blocking=False):
            try:
                while self._released:
                    for blocks in self._released.popleft().blocks:
                        for block in blocks:
                            self._users[block] -= 1
                            if not self._users[block]:
                                self._free.append(block)
            finally:
                self._counting.release()

    def grow(self, free: int) -> None:
        """Make sure that so many blocks are free."""
        with self.lock:
            missing, old = free - len(self._free), self.cache.shape[1]
            if missing <= 0:
                return
            more = max(missing, old // 4)
            with torch.inference_mode(False), torch.no_grad():
                grown = self.cache.new_empty(self.cache.shape[0], old + more, *self.cache.shape[2:])
                grown[:, :old] = self.cache
            self.cache = grown
            with self._counts():
                self._users += [0] * (old + more - len(self._users))  # an interrupt may have left out some
                self._free += reversed(range(old, old + more))

    def _take(self, count: int) -> list[int]:
        """Free blocks, now with one user each; the pool grows if there are too few."""
        with self.lock:  # nobody else takes those that grow() has made
            self.grow(count)
            with self._counts():
                taken = [self._free.pop() for _ in range(count)]
                for block in taken:
                    self._users[block] += 1
        return taken

    def _use(self, blocks: Iterable[int]) -> None:
        with self._counts():
            for block in blocks:
                self._users[block] += 1

    def release(self, requests: CachedRequests) -> None:
        """The requests are done, and are not to be changed any more: blocks that no other one uses are free."""
        self._released.append(requests)
        self._settle()

    @contextmanager
    def released_on_failure(self, requests: CachedRequests) -> Iterator[None]:
        """Around what may fail before anybody else keeps the requests."""
        try:
            yield
        except BaseException:
            self.release(requests)
            raise

    def fork(self, requests: CachedRequests) -> CachedRequests:
        """The same requests over the same blocks, to add tokens to; the given ones stay as they are."""
        for blocks in requests.blocks:
            self._use(blocks)
        return CachedRequests(list(requests.lengths), [list(blocks) for blocks in requests.blocks], list(requests.history))

    def fork_prefixes(self, requests: CachedRequests, prefixes: Sequence[tuple[int, int] | None]) -> CachedRequests:
        """New requests: each begins with the first ``tokens`` tokens of an old one, as (request, tokens), or with none.

        Full blocks are shared; a block that the prefix fills in part is copied, as both requests may add tokens to it.
        """
        with self.lock:
            return self._forked_prefixes(requests, prefixes)

    def _forked_prefixes(self, requests: CachedRequests, prefixes: Sequence[tuple[int, int] | None]) -> CachedRequests:
        copies = self._take(sum(prefix is not None and prefix[1] % BLOCK_SIZE > 0 for prefix in prefixes))
        new = CachedRequests()
        try:
            for prefix in prefixes:
                request, tokens = prefix or (0, 0)
                full, rest = divmod(tokens, BLOCK_SIZE)
                blocks = requests.blocks[request][:full] if full else []
                self._use(blocks)
                new.lengths.append(tokens)
                new.blocks.append(blocks)
                new.history.append(hash((requests.history[request], tokens)) if tokens else 0)
                if rest:
                    blocks.append(copies.pop())
                    self.cache[:, blocks[-1]] = self.cache[:, requests.blocks[request][full]]
        except BaseException:
            self.release(CachedRequests(blocks=[copies, *new.blocks]))
            raise
        return new

    def make_room_to_shorten(self, requests: CachedRequests, lengths: Sequence[int]) -> None:
        """All of :meth:`shorten` that can fail; it changes none of the requests."""
        with self.lock:
            ends = [divmod(length, BLOCK_SIZE) for length in lengths]
            partial = [blocks[full] for blocks, (full, rest) in zip(requests.blocks, ends, strict=True) if rest]
            self.grow(sum(self._users[block] > 1 for block in partial))

    def shorten(self, requests: CachedRequests, lengths: Sequence[int]) -> None:
        """Keep the first tokens of each request only.

        A block that they no longer fill may get other tokens now: if somebody else uses it, the request goes on in a copy.
        """
        with self.lock:
            self.make_room_to_shorten(requests, lengths)
            for row, length in enumerate(lengths):
                full, rest = divmod(length, BLOCK_SIZE)
                blocks = requests.blocks[row]
                kept, left = blocks[: full + (rest > 0)], blocks[full + (rest > 0) :]
                if rest and self._users[kept[full]] > 1:
                    left.append(kept[full])
                    kept[full:] = self._take(1)
                    self.cache[:, kept[full]] = self.cache[:, left[-1]]
                requests.history[row] = hash((requests.history[row], length)) if length else 0
                requests.blocks[row], requests.lengths[row] = kept, length
                self.release(CachedRequests(blocks=[left]))

    def reserve(self, requests: CachedRequests, new_tokens: Sequence[int]) -> None:
        """Give each request the blocks that it needs for so many more tokens."""
        totals = [old + new for old, new in zip(requests.lengths, new_tokens, strict=True)]
        missing = [-(-total // BLOCK_SIZE) - len(blocks) for total, blocks in zip(totals, requests.blocks, strict=True)]
        taken = iter(self._take(sum(missing)))
        for blocks, count in zip(requests.blocks, missing, strict=True):
            blocks += [next(taken) for _ in range(count)]
