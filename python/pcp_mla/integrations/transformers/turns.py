"""Threads that call one model under PCP: one after another, and none goes on with another's requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turns:
    """Whose turn it is.

    A step fills buffers of the planner and of the exchange that the next one overwrites, so a call has the model to itself. Over
    several ranks that is not enough: each rank would serve its threads in an order of its own, and collectives of different calls
    would meet. There one thread makes all calls: the one that enabled PCP, until another one takes over.

    Attributes:
        depth: of calls within calls of the thread whose turn it is; 0 between them.
        stream: of the last call, on a GPU.
        owner: the thread whose requests :func:`extend` and :func:`decode` go on with.
    """

    def __init__(self, lock: Any, world_size: int, device: torch.device) -> None:
        self._lock = lock
        self._device, self._several_ranks = device, world_size > 1
        self._maker = self._user = threading.current_thread()
        self.depth = 0
        self.stream: Any = None
        self.owner: threading.Thread | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around a call."""
        with self._lock:
            if self._device.type == "cuda":
                self._follow_the_last_stream()
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1

    def check_user(self, op: str) -> None:
        """In a turn: ValueError if another thread than this one calls a model over several ranks."""
        thread, user = threading.current_thread(), self._user
        if thread is user or not self._several_ranks:
            return
        if user is not self._maker and user.is_alive():
            raise ValueError(
                f"{op}: a model over several ranks must be called by one thread, as its ranks must make the same calls in the same "
                f"order, got thread {thread.name!r} beside {user.name!r}"
            )
        self._user = thread

    def _follow_the_last_stream(self) -> None:
        # The lock orders what the host does; what the last call left to the GPU may still run, on another stream.
        stream = torch.cuda.current_stream(self._device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
        self.stream = stream

    def check_owner(self, op: str) -> None:
        """ValueError if the requests of the last prefill are those of another thread that still runs."""
        thread, owner = threading.current_thread(), self.owner
        if owner is not None and owner is not thread and owner.is_alive():
            raise ValueError(
                f"{op}: the requests of the last prefill must be of this thread, {thread.name!r}, got those of {owner.name!r}: "
                "what follows a prefill belongs to its thread, and a prefill of any thread ends the last one"
            )
