"""A step's indices by loops over tokens, from what docs/planner.md and the docstrings say, and from nothing else of the package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cache:
    block_size: int
    shards: int
    shard: int
    interleave: int

    def slot(self, table: list[int], position: int) -> int:
        """Where a token of the sequence lies, -1 on another shard."""
        if position // self.interleave % self.shards != self.shard:
            return -1
        turns = position // (self.interleave * self.shards)
        here = turns * self.interleave + position % self.interleave
        return table[here // self.block_size] * self.block_size + here % self.block_size


class PlainPlan:
    """One rank's step.

    Attributes:
        rows: of every rank, for each request its head and its tail, as lists of offsets in the request's new tokens.
        local: of every rank, its tokens in order, as (request, offset).
        rank_tokens: Np. sizes: of each request in the restored order.
    """

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        is_prefill: list[bool],
        world_size: int,
        rank: int,
        layout: str = "unpadded",
        decode_policy: str = "replicate",
        rank_tokens: int | None = None,
    ) -> None:
        self.queries, self.contexts, self.world, self.rank = query_lens, context_lens, world_size, rank
        self.rows: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(world_size)]
        self.sizes: list[int] = []
        self.owners: list[list[tuple[int, int]]] = []  # of each request's restored rows: the rank, the offset
        decodes = 0
        for length, prefill in zip(query_lens, is_prefill, strict=True):
            chunk = -(-length // (2 * world_size))
            size = chunk * 2 * world_size if layout == "padded" else length
            owners = []
            for r in range(world_size):
                if prefill:
                    head = [i for i in range(r * chunk, (r + 1) * chunk) if i < size]
                    number = 2 * world_size - 1 - r
                    tail = [i for i in range(number * chunk, (number + 1) * chunk) if i < size]
                else:
                    mine = decode_policy == "replicate" or decodes % world_size == r
                    head, tail = list(range(length)) if mine else [], []
                self.rows[r].append((head, tail))
                owners += [(r, i) for i in head + tail]
            if prefill:
                owners.sort(key=lambda owner: owner[1])
            elif layout == "unpadded":
                owners = owners[:length]
            decodes += not prefill
            self.owners.append(owners)
            self.sizes.append(len(owners))
        self.local = [[(request, i) for request, (head, tail) in enumerate(rows) for i in head + tail] for rows in self.rows]
        self.fullest = max(map(len, self.local))
        self.rank_tokens = self.fullest if rank_tokens is None else rank_tokens

    # Orders. Natural: requests one after another. Gathered: rank after rank, each with rank_tokens rows.

    def natural(self, request: int, offset: int) -> int:
        return sum(self.queries[:request]) + offset if offset < self.queries[request] else -1

    def local_token_indices(self) -> list[int]:
        return [self.natural(request, i) for request, i in self.local[self.rank]]

    def positions(self) -> list[int]:
        return [self.contexts[request] + i for request, i in self.local[self.rank]]

    def allgather_restore_idx(self) -> list[int]:
        places = [{token: i for i, token in enumerate(tokens)} for tokens in self.local]
        return [r * self.rank_tokens + places[r][request, i] for request, owners in enumerate(self.owners) for r, i in owners]

    def hidden_restore_idx(self) -> list[int]:
        """Of the first copy of each real token."""
        restored, found, start = self.allgather_restore_idx(), [], 0
        for size, length in zip(self.sizes, self.queries, strict=True):
            found += restored[start : start + length]
            start += size
        return found

    def slot_mapping(self, tables: list[list[int]], cache: Cache) -> list[int]:
        slots = [-1] * (self.world * self.rank_tokens)
        places = iter(self.hidden_restore_idx())
        for request, length in enumerate(self.queries):
            for i in range(length):
                slots[next(places)] = cache.slot(tables[request], self.contexts[request] + i)
        return slots

    def logits_indices(self) -> list[int]:
        return [sum(self.sizes[:request]) + length - 1 if length else -1 for request, length in enumerate(self.queries)]

    # Keys: requests one after another, context first. Head and tail of a request share them.

    def key_sizes(self) -> list[int]:
        return [context + size for context, size in zip(self.contexts, self.sizes, strict=True)]

    def used(self) -> list[int]:
        """Keys of every row, head and tail of each request in turn."""
        return [
            self.contexts[request] + row[-1] + 1 if row else 0 for request, pair in enumerate(self.rows[self.rank]) for row in pair
        ]

    def kv_rows(self, tables: list[list[int]], cache: Cache, split: bool) -> list[int]:
        context, new = [], []
        for request, (old, length) in enumerate(zip(self.contexts, self.queries, strict=True)):
            both = [cache.slot(tables[request], p) for p in range(old + length)]
            both += [-1] * (self.sizes[request] - length)
            context += both[:old] if split else both
            new += both[old:] if split else []
        return context + new

    def chunks(self, workspace: int | None) -> list[tuple[int, bool, list[int], list[int], list[int]]]:
        """Every attention call: its number of keys, whether it is causal, and of each request the first key's position; of each row
        the first key and how many."""
        sizes, used = self.key_sizes(), self.used()
        if workspace is None or sum(sizes) <= workspace:
            return [(sum(sizes), True, [0] * len(sizes), double(before(sizes)), used)]
        calls = []
        total = sum(self.contexts)
        for first in range(0, total, workspace):
            inside, starts = [], []
            for request, context in enumerate(self.contexts):
                begin = sum(self.contexts[:request])
                window = [i for i in range(context) if first <= begin + i < first + workspace]
                inside.append(len(window))
                starts.append(window[0] if window else (0 if begin >= first else context))
            counts = [n if used[2 * r + half] else 0 for r, n in enumerate(inside) for half in (0, 1)]
            calls.append((sum(inside), False, starts, double(before(inside)), counts))
        new = [u - self.contexts[i // 2] if u else 0 for i, u in enumerate(used)]
        calls.append((sum(self.sizes), True, list(self.contexts), double(before(self.sizes)), new))
        return calls


def before(counts: list[int]) -> list[int]:
    """What is in front of each, and the sum."""
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def double(starts: list[int]) -> list[int]:
    """Of each request's two rows, and the end."""
    return [start for start in starts[:-1] for _ in (0, 1)] + starts[-1:]
