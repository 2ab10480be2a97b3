"""What the ranks of a model under PCP are given, compared: digests of a call and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...planner.consistency import Comparison, differences, digest
from .paged_cache import CachedRequests


def contents(value: Any) -> Any:
    """What of an argument must be equal on all ranks, in Python's own types. Addresses and block numbers are a rank's own."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [contents(entry) for entry in value]
    if isinstance(value, dict):
        return {name: contents(value[name]) for name in sorted(value)}
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, CachedRequests):
        return [value.lengths, value.history]
    if hasattr(value, "get_seq_length"):  # a cache of transformers or of ours
        columns = int(value.get_seq_length())
        return [columns, *(contents(getattr(value, name, None)) for name in ("requests", "real"))] if columns else [0]
    return type(value).__qualname__


def compare(comparison: Comparison, op: str, values: dict[str, Any]) -> None:
    """Compare ``values`` of all ranks, the first of which says what the others are. One collective.

    Raises:
        RuntimeError: on every rank but those that failed, if any two differ or some rank failed; the message has names and ranks.
    """
    names = list(values)
    columns = comparison.gather(f"{op}: the call", [digest(value) for value in values.values()])
    differing = differences(names[:1], columns[:1]) or differences(names, columns)  # other calls have other arguments
    if differing:
        raise RuntimeError(f"{op}: all ranks must make the same call with the same arguments, but these differ: {differing}")
