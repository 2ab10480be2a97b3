"""Whether all ranks of a group have made the same plan: digests of what they must share, compared on every rank."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch
import torch.distributed as dist

from .exchange import Group, all_gather_into, group_rank, group_world_size

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


def _digest(value: Any) -> int:
    data = value if isinstance(value, bytes) else repr(value).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def digests(values: dict[str, Any]) -> list[int]:
    """A number for each of FIELDS that stands for its value."""
    return [_digest(values[name]) for name in FIELDS]


class Comparison:
    """One rank's side of comparing plans over a group. All that a comparison needs on a GPU is made here, so that a rank that is
    out of memory can still tell the others.

    Attributes:
        size, rank: of the group.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        on_device = isinstance(group, dist.ProcessGroup) and dist.get_backend(group) == "nccl"
        self.size, self.rank = group_world_size(group, "PCPPlanner.check_consistency"), group_rank(group)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            self._rows = torch.zeros(self.size + 1, 1 + len(FIELDS), dtype=torch.int64, device=device if on_device else "cpu")

    def compare(self, numbers: list[int] | None) -> None:
        """Compare the digests of all ranks' fields; None from a rank whose plan() failed. One collective.

        Raises:
            RuntimeError: on every rank but those that failed, if any two differ or some rank failed; the message has the fields
                and the ranks.
        """
        mine, gathered = self._rows[:1], self._rows[1:]
        mine.copy_(torch.tensor([[0] * mine.shape[1] if numbers is None else [1, *numbers]]))
        all_gather_into(gathered, mine, self._group)
        made, *columns = gathered.T.tolist()
        if numbers is None:
            return  # this rank raises the error of its own
        if not all(made):
            failed = [rank for rank, ok in enumerate(made) if not ok]
            raise RuntimeError(f"PCPPlanner.check_consistency: plan() failed on {_ranks(failed)}")
        differences = []
        for name, column in zip(FIELDS, columns, strict=True):
            alike: dict[int, list[int]] = {}
            for rank, value in enumerate(column):
                alike.setdefault(value, []).append(rank)
            if len(alike) > 1:
                differences.append(f"{name} of {' and of '.join(_ranks(ranks) for ranks in alike.values())}")
        if differences:
            raise RuntimeError(
                f"PCPPlanner.check_consistency: plans must be equal on all ranks, but these differ: {'; '.join(differences)}"
            )

    def tell_failure(self) -> None:
        """Take part in the others' comparison as the rank that failed. It raises nothing itself: what failed first is the error."""
        with contextlib.suppress(Exception):
            self.compare(None)
