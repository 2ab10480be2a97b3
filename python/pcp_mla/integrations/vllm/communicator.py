"""vLLM's prefill-context-parallel group as a communicator of this package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist


class Communicator:
    """One rank's end of a ``GroupCoordinator``: its pynccl communicator, which runs on the current stream, where it has one; else
    the group of torch.distributed that vLLM has anyway. No second NCCL communicator is opened."""

    def __init__(self, coordinator: Any) -> None:
        self.rank: int = coordinator.rank_in_group
        self.world_size: int = coordinator.world_size
        pynccl = getattr(coordinator.device_communicator, "pynccl_comm", None)
        self._group = coordinator.device_group
        # [n, ...] of this rank, which may be its part of the other tensor, to [P * n, ...] of all.
        self.all_gather_into = self._by_torch
        # Bytes: block r of the second for rank r, block r of the first from rank r; and how many there are of each.
        self.all_to_all_into = self._all_to_all_by_torch
        if pynccl is not None and not pynccl.disabled:
            self.all_gather_into, self.all_to_all_into = pynccl.all_gather, partial(_by_sends, pynccl)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        self.all_gather_into(gathered, tensor)
        return gathered

    def _by_torch(self, gathered: torch.Tensor, rows: torch.Tensor) -> None:
        # gloo says nothing of a part of the result as its input
        dist.all_gather_into_tensor(gathered, rows.clone() if rows.device.type == "cpu" else rows, group=self._group)

    def _all_to_all_by_torch(
        self, received: torch.Tensor, rows: torch.Tensor, received_sizes: Sequence[int], sizes: Sequence[int]
    ) -> None:
        dist.all_to_all_single(received, rows, list(received_sizes), list(sizes), group=self._group)


def _by_sends(pynccl: Any, received: torch.Tensor, rows: torch.Tensor, received_sizes: Sequence[int], sizes: Sequence[int]) -> None:
    """vLLM's own has no all-to-all: a send to every rank and a receipt from every rank, this one among them, in one launch."""
    pynccl.group_start()
    for rank, (block, into) in enumerate(zip(rows.split(list(sizes)), received.split(list(received_sizes)), strict=True)):
        pynccl.send(block, rank)
        pynccl.recv(into, rank)
    pynccl.group_end()
