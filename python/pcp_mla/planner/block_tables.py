"""Block tables as a planner is given them: what may be one, and the copy of a table on the host that makes a plan of one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plan.slots import PagedCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OP = "PCPPlanner.plan"


def check_tables(tables: Any, device: torch.device) -> NDArray[Any] | torch.Tensor:
    """int32 on ``device``, if that is not a CPU and they are there; else int32 or int64 in NumPy. Both [requests, blocks] with a
    contiguous last dimension, and the caller's own memory where that is possible.

    The numbers of a table on a GPU cannot be read on the host, so that they must be int32; those of a host are checked in plan().
    """
    if isinstance(tables, torch.Tensor):
        if not tables.is_cpu:
            return _on_device(tables, device)
        if tables.dtype != torch.int32 and (tables.dtype == torch.bool or tables.is_floating_point() or tables.is_complex()):
            raise TypeError(f"{_OP}: block_tables must be integers, got {str(tables.dtype)[6:]}")
        tables = tables.numpy()
    array = tables if type(tables) is np.ndarray else np.asarray(tables)
    if array.shape == (0,):  # a list of no rows
        array = array.reshape(0, 0)
    if array.dtype != np.int32 and array.dtype != np.int64:
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{_OP}: block_tables must be integers, got {array.dtype}")
        array = array.astype(np.int64)  # what it does not hold becomes negative, and is refused like that
    if array.ndim != 2:
        raise ValueError(f"{_OP}: block_tables must have 2 dimensions [requests, blocks], got {array.ndim}")
    return array if array.strides[1] == array.itemsize else np.ascontiguousarray(array)


def _on_device(tables: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tables.device != device:
        raise ValueError(f"{_OP}: block_tables must be on {device} or on the CPU, got {tables.device}")
    if tables.dtype != torch.int32:
        raise TypeError(f"{_OP}: block_tables must be int32 on {device}, got {str(tables.dtype)[6:]}")
    if tables.dim() != 2:
        raise ValueError(f"{_OP}: block_tables must have 2 dimensions [requests, blocks], got {tables.dim()}")
    return tables if tables.stride(1) == 1 else tables.contiguous()


class KeptTables:
    """Room for copies of block tables on the host: [max_requests, blocks] int32, wider where a table needs it."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._make(0)

    def _make(self, columns: int) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.empty(self._max_requests, columns, dtype=torch.int32)
        self.array, self._columns = self.tensor.numpy(), columns

    def of(self, columns: int) -> KeptTables:
        """Room for so many columns: this one, or a new one, so that a plan that fails leaves the last one's copy."""
        if columns <= self._columns:
            return self
        wider = KeptTables(self._max_requests)
        wider._make(max(columns, 2 * self._columns))
        return wider


def read_entries(array: NDArray[Any], lengths: NDArray[Any], cache: PagedCache, kept: NDArray[np.int32] | None) -> None:
    """Check the block numbers that sequences of these lengths use, and copy them to ``kept``.

    Raises:
        ValueError: one of them has no slots of 31 bits; nothing is copied.
    """
    limit = 2**31 // cache.block_size
    table = array[: len(lengths)]
    used = np.arange(table.shape[1]) < cache.blocks_of(lengths)[:, None]
    wrong = np.argwhere(used & ((table < 0) | (table >= limit)))
    if len(wrong):
        request, block = wrong[0]
        limits = f"numbers of 0 to {limit - 1}, so that slots of blocks of {cache.block_size} stay below 2**31"
        raise ValueError(
            f"{_OP}: block_tables must have {limits}, got {table[request, block]} for block {block} of request {request}"
        )
    if kept is not None:
        np.copyto(kept[: len(table), : table.shape[1]], table, where=used, casting="same_kind")
