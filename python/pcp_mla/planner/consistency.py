"""Whether all ranks of a group have the same: digests, compared on every rank; above all of plans, of what they must share."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..groups import Group, all_gather_into, group_rank, group_world_size

# What the ranks' collectives depend on. Block tables are not among it: a rank's cache is its own.
FIELDS = (
    "query_lens",
    "context_lens",
    "is_prefill",
    "prompt_lens",
    "world_size",
    "layout",
    "decode_policy",
    "block_size",
    "dcp_world_size",
    "cp_interleave",
    "num_tokens_padded",
    "workspace_tokens",
)


def digest(value: Any) -> int:
    """A number that stands for a value of Python's own types."""
    data = value if isinstance(value, bytes) else repr(value).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def digests(values: dict[str, Any]) -> list[int]:
    """A number for each of FIELDS that stands for its value."""
    return [digest(values[name]) for name in FIELDS]


def differences(names: Iterable[str], columns: Iterable[Sequence[int]]) -> str:
    """Which of the columns, of a number from each rank, are not all equal, and which ranks have the same; "" if all are equal."""
    found = []
    for name, column in zip(names, columns, strict=True):
        alike: dict[int, list[int]] = {}
        for rank, value in enumerate(column):
            alike.setdefault(value, []).append(rank)
        if len(alike) > 1:
            found.append(f"{name} of {' and of '.join(_ranks(ranks) for ranks in alike.values())}")
    return "; ".join(found)


class Comparison:
    """One rank's side of comparing digests over a group. All that a comparison needs on a GPU is made here, so that a rank that is
    out of memory can still tell the others. Every comparison is of as many numbers as one of plans, whatever they are: a rank
    that failed need not know which one the others are in.

    Attributes:
        size, rank: of the group.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        on_device = isinstance(group, dist.ProcessGroup) and dist.get_backend(group) == "nccl"
        self.size, self.rank = group_world_size(group, "PCPPlanner.check_consistency"), group_rank(group)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self._rows = torch.zeros(self.size + 1, 1 + len(FIELDS), dtype=torch.int64, device=device if on_device else "cpu")

    def gather(self, call: str, numbers: Sequence[int] | None) -> list[list[int]]:
        """Numbers of all ranks, at most one for each of FIELDS: of each number a column. None, and then nothing, on a rank whose
        ``call`` failed. One collective.

        Raises:
            RuntimeError: on every rank but those that failed, if some did; the message has the ranks.
        """
        mine, gathered = self._rows[:1], self._rows[1:]
        row = [0] if numbers is None else [1, *numbers]
        mine.copy_(torch.tensor([row + [0] * (mine.shape[1] - len(row))]))
        all_gather_into(gathered, mine, self._group)
        made, *columns = gathered.T.tolist()
        if numbers is None:
            return []  # this rank raises the error of its own
        if not all(made):
            raise RuntimeError(f"{call} failed on {_ranks([rank for rank, ok in enumerate(made) if not ok])}")
        return columns[: len(numbers)]

    def compare(self, numbers: Sequence[int]) -> None:
        """Compare the digests of all ranks' fields. One collective.

        Raises:
            RuntimeError: on every rank but those that failed, if any two differ or some rank failed; the message has the fields
                and the ranks.
        """
        differing = differences(FIELDS, self.gather("PCPPlanner.check_consistency: plan()", numbers))
        if differing:
            raise RuntimeError(f"PCPPlanner.check_consistency: plans must be equal on all ranks, but these differ: {differing}")

    def tell_failure(self) -> None:
        """Take part in the others' comparison as the rank that failed. It raises nothing itself: what failed first is the error."""
        with contextlib.suppress(Exception):
            self.gather("", None)
