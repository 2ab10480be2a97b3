"""Whether all ranks of a group have made the same plan: digests of what they must share, compared on every rank."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from .exchange import Group, all_gather_rows

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


def check_same(group: Group, device: torch.device, values: dict[str, Any] | None) -> None:
    """Compare ``values`` of all ranks, one entry for each of FIELDS; None from a rank whose plan() failed. One collective.

    Raises:
        RuntimeError: on every rank, if any two differ or some rank failed; the message has the fields and the ranks.
    """
    row = [0] * (1 + len(FIELDS)) if values is None else [1, *(_digest(values[name]) for name in FIELDS)]
    on_device = isinstance(group, dist.ProcessGroup) and dist.get_backend(group) == "nccl"
    rows = torch.tensor([row], dtype=torch.int64, device=device if on_device else "cpu")
    made, *columns = all_gather_rows(rows, group).T.tolist()
    if values is None:
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
