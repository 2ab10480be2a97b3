"""What a long command is doing, on stderr."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

# Seconds between signs of life where stderr is no terminal.
_INTERVAL = 20.0


class Progress:
    """Use as ``with Progress("building the model"):``. On a terminal one line counts the seconds; elsewhere a line at the start,
    one every 20 seconds and one at the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._done = threading.Event()
        self._terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def _show(self, end: str) -> None:
        elapsed = f"{time.monotonic() - self._start:6.1f} s  {self._what}"
        sys.stderr.write(f"\r{elapsed}" if self._terminal else f"{elapsed}{end}\n")
        sys.stderr.flush()

    def _tick(self) -> None:
        while not self._done.wait(0.5 if self._terminal else _INTERVAL):
            self._show(" ...")

    def __enter__(self) -> Progress:
        self._show(" ...")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._show(": done" if kind is None else ": stopped")
        if self._terminal:
            sys.stderr.write("\n")
