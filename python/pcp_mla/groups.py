"""The collectives of a context-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from .checks import check_no_gradients
from .plan.metadata import PCPMetadata

# torch 2.13 renamed these and warns of the old names; 2.10 has the old ones only.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@runtime_checkable
class RankHandle(Protocol):
    """One rank's end of a group that is not a ``torch.distributed`` process group."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, ...] of this rank to [P * n, ...] of all, rank-major."""


@runtime_checkable
class CommunicatorHandle(RankHandle, Protocol):
    """One that gathers into a given tensor: an engine's own communicator, on the current stream."""

    def all_gather_into(self, gathered: torch.Tensor, rows: torch.Tensor) -> None:
        """The same into a given tensor, of which ``rows`` may be this rank's part."""


@runtime_checkable
class ExchangingHandle(RankHandle, Protocol):
    """One that can make an all-to-all of uneven blocks."""

    def all_to_all_into(
        self, received: torch.Tensor, rows: torch.Tensor, received_sizes: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """``rows`` [sum(sizes)], block r for rank r, to ``received`` [sum(received_sizes)], block r from rank r: bytes."""


# A torch.distributed process group, one rank's end of a played group, or None for a world of one rank.
Group = dist.ProcessGroup | RankHandle | None


def _has(group: Any, *methods: str) -> bool:
    """Whether a group is a :class:`RankHandle`, with these methods besides. To ask a protocol takes ten microseconds, in every
    layer."""
    return all(hasattr(group, name) for name in ("rank", "world_size", "all_gather", *methods))


def group_world_size(group: Group, op: str = "group_world_size") -> int:
    """P. TypeError if ``group`` is none of the kinds."""
    if group is None:
        return 1
    if isinstance(group, dist.ProcessGroup):
        return dist.get_world_size(group)
    if not _has(group):
        raise TypeError(f"{op}: group must be a ProcessGroup, a PlayedGroup or None, got {type(group).__name__}")
    return group.world_size


def gathers_in_place(group: Group) -> bool:
    """Whether a rank may pack its rows where they stay after :func:`all_gather_into`."""
    if isinstance(group, dist.ProcessGroup):
        return dist.get_backend(group) == "nccl"
    return isinstance(group, CommunicatorHandle)


def group_rank(group: Group) -> int:
    if group is None:
        return 0
    return dist.get_rank(group) if isinstance(group, dist.ProcessGroup) else group.rank


def check_group(op: str, group: Group, meta: PCPMetadata) -> None:
    """Raise ValueError or TypeError unless ``meta`` was made for this rank of ``group``."""
    size, rank = group_world_size(group, op), group_rank(group)
    if (meta.world_size, meta.rank) != (size, rank):
        raise ValueError(f"{op}: meta must be for rank {rank} of {size}, as the group, got rank {meta.rank} of {meta.world_size}")


def all_gather_rows(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...] of this rank, contiguous, to [P * n, ...] of all, rank-major: one collective, none for a world of one."""
    if group is None:
        return rows
    if not isinstance(group, dist.ProcessGroup):
        return group.all_gather(rows)
    gathered = rows.new_empty(group_world_size(group) * rows.shape[0], *rows.shape[1:])
    _all_gather_single(gathered, rows, group=group)
    return gathered


def _copy_all(gathered: torch.Tensor, rows: torch.Tensor, group: Group) -> None:
    gathered.copy_(all_gather_rows(rows, group))


def all_gather_into(gathered: torch.Tensor, rows: torch.Tensor, group: Group) -> None:
    """The same into a given tensor, contiguous; NCCL takes ``rows`` that are this rank's part of it."""
    gathering_into(gathered, rows, group)()


def gathering_into(gathered: torch.Tensor, rows: torch.Tensor, group: Group) -> Callable[[], None]:
    """:func:`all_gather_into` to be called often: what kind of group it is has been looked at."""
    if isinstance(group, dist.ProcessGroup):
        return partial(_all_gather_single, gathered, rows, group=group)
    handle: Any = group
    if _has(handle, "all_gather_into"):
        return partial(handle.all_gather_into, gathered, rows)
    return partial(_copy_all, gathered, rows, group)


def reduce_scatter_rows(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """[P * n, ...] of every rank, contiguous, to [n, ...]: this rank's block of the sum over the ranks. One collective, none for a
    world of one. A group that is not of torch.distributed adds in rank order."""
    if group is None:
        return rows
    size = group_world_size(group)
    if not isinstance(group, dist.ProcessGroup):
        return group.all_gather(rows).unflatten(0, (size, size, -1))[:, group.rank].sum(0)
    scattered = rows.new_empty(rows.shape[0] // size, *rows.shape[1:])
    _reduce_scatter_single(scattered, rows, group=group)
    return scattered


def all_reduce_rows(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """[n, ...] of every rank, contiguous, to their sum, on every rank; it may take the place of ``rows``. Otherwise as
    :func:`reduce_scatter_rows`."""
    if group is None:
        return rows
    if not isinstance(group, dist.ProcessGroup):
        return group.all_gather(rows).unflatten(0, (group.world_size, -1)).sum(0)
    dist.all_reduce(rows, group=group)
    return rows


def all_to_all_rows(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """[P * n, ...] of this rank, contiguous, block r for rank r, to [P * n, ...], block r from rank r: one collective, none for a
    world of one."""
    if group is None:
        return rows
    if not isinstance(group, dist.ProcessGroup):
        size = group.world_size
        return group.all_gather(rows).unflatten(0, (size, size, -1))[:, group.rank].flatten(0, 1)
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, group=group)
    return received


def check_all_to_all(op: str, group: Group, wanted_for: str = "") -> None:
    """Raise TypeError unless the group can make :func:`exchanging_into`."""
    if not (group is None or isinstance(group, dist.ProcessGroup) or _has(group, "all_to_all_into")):
        raise TypeError(f"{op}: group must have all_to_all_into{wanted_for}, a {type(group).__name__} has none")


def exchanging_into(
    received: torch.Tensor, rows: torch.Tensor, received_sizes: Sequence[int], sizes: Sequence[int], group: Group
) -> Callable[[], None]:
    """An all-to-all of uneven blocks of bytes, to be called: as :meth:`ExchangingHandle.all_to_all_into`."""
    if isinstance(group, dist.ProcessGroup):
        return partial(dist.all_to_all_single, received, rows, list(received_sizes), list(sizes), group=group)
    handle: Any = group  # see check_all_to_all
    return partial(handle.all_to_all_into, received, rows, received_sizes, sizes)


def check_latents(op: str, kv_c: torch.Tensor, k_pe: torch.Tensor, meta: PCPMetadata) -> None:
    """Raise ValueError or TypeError unless the two are this rank's latents of the step that ``meta`` describes."""
    for name, tensor in (("kv_c", kv_c), ("k_pe", k_pe)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} must have 2 dimensions [tokens, width], got {tensor.dim()}")
        if tensor.shape[0] not in (meta.num_tokens, meta.num_local_rows) or tensor.shape[0] != kv_c.shape[0]:
            wanted = f"{meta.num_tokens} rows, one per local token of meta"
            raise ValueError(f"{op}: {name} must have {wanted}, got {tensor.shape[0]}")
        if tensor.device != meta.device:
            raise ValueError(f"{op}: {name} must be on {meta.device}, as meta, got {tensor.device}")
        check_no_gradients(op, name, tensor)
    if kv_c.dtype != k_pe.dtype:
        raise TypeError(f"{op}: k_pe must be {kv_c.dtype}, as kv_c, got {k_pe.dtype}")
