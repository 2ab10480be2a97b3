"""The host's side of the copy that carries a plan to a GPU, for planners that do not bring it there themselves."""

from __future__ import annotations

import weakref
from collections import deque

import torch

from .step_buffer import StepLayout

# Pinned buffers whose planner is gone, with the event of their last copy. Torch's allocator does not know of copies that it has not
# issued, and would give a block away that is still read. To wait, or even to look, where a planner ends could break a graph that is
# being captured just then.
_on_their_way: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()


def _drop_sent() -> None:
    for _ in range(len(_on_their_way)):
        try:
            host, sent = _on_their_way.popleft()
        except IndexError:  # another thread, which looks at the rest, was faster
            return
        if not sent.query():
            _on_their_way.append((host, sent))


class Staging:
    """A host buffer beside the device's ``step`` buffer. ``sent`` is when the last copy out of it is over: write only after
    that."""

    def __init__(self, step: torch.Tensor, usual: int, pin_memory: bool | None) -> None:
        _drop_sent()
        pinned = step.is_cuda if pin_memory is None else pin_memory
        self.host = torch.zeros(step.shape, dtype=step.dtype, pin_memory=pinned)
        self._step, self._device = step, step.device
        self.array = self.host.numpy()
        self.sent = torch.cuda.Event()
        self.sent.record(torch.cuda.current_stream(self._device))  # from here on it has an address
        weakref.finalize(self, _on_their_way.append, (self.host, self.sent)).atexit = False
        # Views cost as much as the copy's launch: those of a plan with one key chunk are made once.
        self._usual = (step[:usual], self.host[:usual])

    def send(self, num_chunks: int, layout: StepLayout) -> None:
        """Copy what a plan with so many key chunks has written, on the current stream."""
        to, source = self._usual
        if num_chunks > 1:
            stop = layout.chunk(num_chunks)
            to, source = self._step[:stop], self.host[:stop]
        to.copy_(source, non_blocking=True)
        self.sent.record(torch.cuda.current_stream(self._device))
