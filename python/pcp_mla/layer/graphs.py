"""CUDA graphs of a function that makes collectives: captured in pieces, the collectives between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..exchange.heads import HeadExchange
from ..exchange.latents import LatentExchange

T = TypeVar("T")


class PiecewiseGraph:
    """A function's work as CUDA graphs, with what must run anew each time between them: collectives, whose library or whose other
    ranks a graph cannot stand for.

    The function is to read and write tensors that stay where they are, such as those of a planner's padded plan. While it is
    captured nothing is computed, but the collectives are made, on whatever is in their buffers: all ranks capture alike. It should
    have run before, for what is made only once (handles, compiled kernels). A replay is on the device's current stream.

    Args:
        pool: ``torch.cuda.graph_pool_handle()`` to share with other graphs that are never replayed at the same time.
        device: whose work is captured, by default the current one.
    """

    def __init__(self, pool: Any = None, device: torch.device | str | None = None) -> None:
        self._shared_pool = self._pool = pool
        named = torch.device("cuda" if device is None else device)
        self._device = torch.device("cuda", torch.cuda.current_device()) if named.index is None else named
        self._pieces: list[Callable[[], None]] = []
        self._open: torch.cuda.CUDAGraph | None = None

    @property
    def num_pieces(self) -> int:
        """Graphs and calls between them."""
        return len(self._pieces)

    def capture(self, fn: Callable[[], T], exchanges: Sequence[LatentExchange | HeadExchange] = ()) -> T:
        """Capture ``fn()``, the collectives of ``exchanges`` between pieces, and return its result, which every replay writes.

        Raises:
            RuntimeError: captured already, or CUDA refuses to capture what ``fn`` does; torch can capture nothing more in this
                process then.
            Exception: what ``fn`` raises itself. Nothing is captured then, and a later call may capture.
        """
        if self._pieces:
            raise RuntimeError("PiecewiseGraph.capture: the graph must be new, got one that is captured")
        if self._shared_pool is None:  # a new one each time: of a failed capture's pool the graphs are gone, torch takes it no more
            self._pool = torch.cuda.graph_pool_handle()
        stream, caller = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):  # where a capture that failed must end, too
            try:
                self._begin()
                for exchange in exchanges:
                    exchange.around = self.gap
                result = fn()
                self._end()
            except BaseException:
                if self._open is not None:
                    with contextlib.suppress(RuntimeError):  # CUDA may have ended the capture
                        self._open.capture_end()
                self._pieces.clear()
                raise
            finally:
                self._open = None
                for exchange in exchanges:
                    exchange.around = None
        caller.wait_stream(stream)
        return result

    def gap(self, call: Callable[[], None]) -> None:
        """While capturing: make this call between two graphs, now and in every replay."""
        self._end()
        self._pieces.append(call)
        call()
        self._begin()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            for piece in self._pieces:
                piece()

    def _begin(self) -> None:
        self._open = torch.cuda.CUDAGraph()
        # Other threads may work on meanwhile: a collective library's watchdog, ranks that are played.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        assert self._open is not None
        graph, self._open = self._open, None
        graph.capture_end()
        self._pieces.append(graph.replay)
