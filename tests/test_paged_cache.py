"""The blocks that a model under PCP keeps latents in: what each request reads is what was written for it."""

from unittest import mock

import numpy as np
import pytest
import torch

from pcp_mla.integrations.transformers.paged_cache import BLOCK_SIZE, CachedRequests, LatentBlocks
from pcp_mla.plan.slots import PagedCache


class Model:
    """Requests as lists of numbers, beside blocks that hold one number a token in two layers."""

    def __init__(self):
        self.blocks = LatentBlocks(2, 1, torch.int64, torch.device("cpu"))
        self.requests, self.texts, self.next = CachedRequests(), [], 0

    def slots(self, requests, row, start, count):
        positions = np.arange(start, start + count)
        return torch.from_numpy(PagedCache(BLOCK_SIZE).slots(requests.block_tables(), np.full(count, row), positions))

    def add(self, requests, texts, lengths):
        """Write new numbers for each request, as a step does."""
        self.blocks.reserve(requests, lengths)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            new = list(range(self.next, self.next + length))
            self.next += length
            slots = self.slots(requests, row, requests.lengths[row], length)
            for layer, cache in enumerate(self.blocks.cache):
                cache.view(-1)[slots] = torch.tensor(new, dtype=torch.int64) + layer * 10**6
            requests.lengths[row] += length
            text += new

    def check(self):
        assert self.requests.lengths == [len(text) for text in self.texts]
        for row, text in enumerate(self.texts):
            slots = self.slots(self.requests, row, 0, len(text))
            for layer, cache in enumerate(self.blocks.cache):
                assert (cache.view(-1)[slots] - layer * 10**6).tolist() == text
        used = {block for blocks in self.requests.blocks for block in blocks}
        assert len(used) + len(set(self.blocks._free)) == len(self.blocks._free) + len(used) == self.blocks.cache.shape[1]
        assert used.isdisjoint(self.blocks._free)


@pytest.mark.parametrize("seed", range(5))
def test_random_steps(seed):
    """Extensions, new requests over prefixes of old ones, and steps that fail halfway."""
    random, model = np.random.default_rng(seed), Model()
    for _ in range(60):
        count = len(model.texts)
        if random.random() < 0.5:
            after, texts = model.blocks.fork(model.requests), [list(text) for text in model.texts]
        else:
            prefixes = []
            for _ in range(random.integers(1, 5)):
                row = int(random.integers(0, count)) if count else 0
                usable = count and random.random() < 0.7
                prefixes.append((row, int(random.integers(0, len(model.texts[row]) + 1))) if usable else None)
            after = model.blocks.fork_prefixes(model.requests, prefixes)
            texts = [model.texts[p[0]][: p[1]] if p else [] for p in prefixes]
        model.add(after, texts, random.integers(0, 40, len(texts)).tolist())
        if random.random() < 0.4:  # while the old requests may use the same blocks
            lengths = [int(random.integers(0, len(text) + 1)) for text in texts]
            model.blocks.shorten(after, lengths)
            texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
            model.add(after, texts, random.integers(0, 10, len(texts)).tolist())
        if random.random() < 0.3:
            model.blocks.release(after)
        else:
            model.blocks.release(model.requests)
            model.requests, model.texts = after, texts
        model.check()


def test_full_blocks_of_a_prefix_are_shared():
    blocks = LatentBlocks(1, 1, torch.float32, torch.device("cpu"))
    old = CachedRequests([0], [[]])
    blocks.reserve(old, [3 * BLOCK_SIZE])
    old.lengths = [3 * BLOCK_SIZE]
    new = blocks.fork_prefixes(old, [(0, 2 * BLOCK_SIZE), (0, 2 * BLOCK_SIZE + 1), None])
    assert new.blocks[0] == new.blocks[1][:2] == old.blocks[0][:2]
    assert new.blocks[1][2] != old.blocks[0][2]
    assert new.blocks[2] == []
    blocks.release(old)
    assert blocks._free.count(old.blocks[0][2]) == 1
    assert set(blocks._free).isdisjoint(old.blocks[0][:2])


def test_shortened_requests_free_their_blocks_and_copy_what_others_use():
    blocks = LatentBlocks(1, 1, torch.int64, torch.device("cpu"))
    old = CachedRequests([0], [[]])
    blocks.reserve(old, [3 * BLOCK_SIZE])
    old.lengths = [3 * BLOCK_SIZE]
    blocks.cache.copy_(torch.arange(blocks.cache.numel()).view_as(blocks.cache))
    new, own = blocks.fork(old), [list(row) for row in old.blocks]
    blocks.shorten(new, [2 * BLOCK_SIZE])
    assert new.blocks == [own[0][:2]]  # full: nobody writes there
    blocks.shorten(new, [BLOCK_SIZE + 3])
    assert new.lengths == [BLOCK_SIZE + 3]
    assert new.blocks[0][0] == own[0][0]
    assert new.blocks[0][1] not in own[0]
    assert torch.equal(blocks.cache[0, new.blocks[0][1]], blocks.cache[0, own[0][1]])
    copied = new.blocks[0][1]
    blocks.shorten(new, [BLOCK_SIZE + 1])
    assert new.blocks[0][1] == copied  # which nobody else uses
    assert old.blocks == own
    blocks.shorten(new, [0])
    blocks.release(old)
    assert set(blocks._users) == {0}
    assert len(blocks._free) == len(set(blocks._free)) == blocks.cache.shape[1]


def test_a_copy_that_fails_leaves_no_block_in_use():
    blocks = LatentBlocks(1, 1, torch.int64, torch.device("cpu"))
    old = CachedRequests([0], [[]])
    blocks.reserve(old, [2 * BLOCK_SIZE])
    old.lengths = [2 * BLOCK_SIZE]
    blocks.grow(4)
    before = sorted(blocks._free)
    with pytest.raises(IndexError):
        blocks.fork_prefixes(old, [(0, BLOCK_SIZE + 3), (0, 5), (1, 3)])
    assert sorted(blocks._free) == before
    assert sorted(blocks._users, reverse=True)[:2] == [1, 1]
    assert sum(blocks._users) == 2


def test_a_pool_whose_growth_was_interrupted_grows_on():
    blocks = LatentBlocks(1, 1, torch.int64, torch.device("cpu"))
    with mock.patch.object(blocks, "_counts", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        blocks.grow(3)
    blocks.grow(5)
    assert blocks.cache.shape[1] == len(blocks._users)
    assert len(blocks._free) >= 5


def test_a_pool_that_cannot_grow_leaves_requests_as_they_are():
    blocks = LatentBlocks(1, 1, torch.int64, torch.device("cpu"))
    old = CachedRequests([0, 0], [[], []])
    blocks.reserve(old, [2 * BLOCK_SIZE] * 2)
    old.lengths = [2 * BLOCK_SIZE] * 2
    new = blocks.fork(old)
    assert not blocks._free
    with mock.patch.object(blocks, "grow", side_effect=MemoryError), pytest.raises(MemoryError):
        blocks.shorten(new, [3, BLOCK_SIZE + 1])
    assert (new.lengths, new.blocks) == (old.lengths, old.blocks)
    assert set(blocks._users) == {2}
