"""What a case is drawn from: numbers, lengths, and ways to lay a tensor out in memory."""

from __future__ import annotations

from typing import Any

import numpy as np


class Draw:
    """A seeded source of arguments: Python's own numbers, tuples and lists, so that a case can be printed."""

    def __init__(self, seed: list[int]) -> None:
        self._rng = np.random.default_rng(seed)

    def int(self, low: int, high: int) -> int:
        """low to high, both included."""
        return int(self._rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def choice(self, options: Any) -> Any:
        return options[self.int(0, len(options) - 1)]

    def seed(self) -> int:
        """For the numbers in a case's tensors."""
        return self.int(0, 2**31 - 1)

    def size(self, high: int) -> int:
        """0 or 1 to high, small ones more often."""
        return 0 if self.chance(0.06) else min(high, 1 + int(self._rng.exponential(high / 3)))

    def lengths(self, world: int, most: int, high: int) -> list[int]:
        """New tokens of up to ``most`` requests: many around the numbers where chunking changes."""
        edges = [0, 1, 2 * world - 1, 2 * world, 2 * world + 1]
        return [self.choice(edges) if self.chance(0.4) else self.int(0, high) for _ in range(self.int(0, most))]

    def view(self, dims: int) -> tuple[tuple[int, ...], int, int, int, int] | None:
        """How a tensor of so many dimensions lies in memory, as :func:`stress.memory.place` takes it: half of them contiguous."""
        plain = tuple(range(dims - 1))
        if self.chance(0.5):
            return None
        order = plain if self.chance(0.7) else tuple(reversed(plain))
        gaps = [self.choice([0, 0, 1, 3, 8, 16]) for _ in range(2)]
        return (order, self.choice([1, 1, 2, 3]), *gaps, self.choice([0, 0, 1, 5]))

    def shuffled(self, count: int) -> list[int]:
        return self._rng.permutation(count).tolist()
