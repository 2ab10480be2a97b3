"""What a long command is doing, on stderr: one bar for all commands."""

from __future__ import annotations

import sys
import threading
from typing import Any


def bar(what: str, count: int, unit: str, shown: bool = True) -> Any:
    """A tqdm bar of ``count`` units, for a ``with``: ``update(n)`` when n more are done, ``set_description`` for what is next."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is for several processes, and outlives one that ends at once
    return tqdm(total=count, desc=what, unit=unit, disable=not shown, file=sys.stderr)
