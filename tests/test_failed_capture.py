"""A capture that fails: its error comes through, no stream is left capturing, and the graph can be captured once more."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pcp_mla.layer.graphs import PiecewiseGraph


class Machine:
    """Streams and graphs as CUDA and torch have them: a capture ends on the stream that it began on, or not at all, and a pool
    whose graphs are gone is none any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing = self.stream(), []
        self.graphs_of: dict[Any, weakref.WeakSet[Any]] = {}
        machine = self

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                graphs = machine.graphs_of.setdefault(pool, weakref.WeakSet([self]))
                assert graphs, "the pool is gone"
                graphs.add(self)
                self.on = machine.current
                machine.capturing.append(self.on)

            def capture_end(self) -> None:
                if machine.current is not self.on:
                    raise RuntimeError("Capture must end on the same stream it began on.")
                machine.capturing.remove(self.on)

            def replay(self) -> None: ...

        for name, stand_in in {
            "Stream": self.stream,
            "current_stream": lambda device: self.current,
            "current_device": lambda: 0,
            "stream": self.switch,
            "CUDAGraph": Graph,
            "graph_pool_handle": object,
            "device": lambda device: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @staticmethod
    def stream(device: Any = None) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def switch(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


def fails_and_works(x: torch.Tensor, fail_behind_a_gap: bool) -> None:
    exchange: Any = types.SimpleNamespace(around=None)
    graph = PiecewiseGraph()
    calls = []

    def step() -> torch.Tensor:
        y = x + 1
        exchange.around(lambda: calls.append("collective"))
        return y * 2

    def fails() -> None:
        if fail_behind_a_gap:
            step()
        raise LookupError("of the function")

    with pytest.raises(LookupError, match="of the function"):
        graph.capture(fails, [exchange])
    assert graph.num_pieces == 0
    assert exchange.around is None
    calls.clear()
    graph.capture(step, [exchange])
    assert graph.num_pieces == 3
    assert exchange.around is None
    graph.replay()
    assert calls == ["collective"] * 2


@pytest.mark.parametrize("fail_behind_a_gap", [False, True])
def test_a_function_that_fails_leaves_no_stream_capturing(monkeypatch: pytest.MonkeyPatch, fail_behind_a_gap: bool) -> None:
    machine = Machine(monkeypatch)
    before = machine.current
    fails_and_works(torch.zeros(3), fail_behind_a_gap)
    assert not machine.capturing
    assert machine.current is before


def test_a_collective_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, graph = Machine(monkeypatch), PiecewiseGraph()
    exchange: Any = types.SimpleNamespace(around=None)

    def refuses() -> None:
        raise ConnectionError("no answer")

    with pytest.raises(ConnectionError, match="no answer"):
        graph.capture(lambda: exchange.around(refuses), [exchange])
    assert not machine.capturing
    assert graph.num_pieces == 0
    assert exchange.around is None


@pytest.mark.gpu
@pytest.mark.parametrize("fail_behind_a_gap", [False, True])
def test_a_gpu_is_not_left_capturing(fail_behind_a_gap: bool) -> None:
    """Whole devices are waited for only while nothing captures in this thread."""
    x = torch.zeros(3, device="cuda")
    (x + 1) * 2  # loads the kernels
    before = torch.cuda.current_stream()
    fails_and_works(x, fail_behind_a_gap)
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == before
    assert not torch.cuda.is_current_stream_capturing()
    graph = PiecewiseGraph()
    out = graph.capture(lambda: x + 1)
    x.fill_(4)
    graph.replay()
    assert out.tolist() == [5, 5, 5]


# In a process of its own: where CUDA itself refuses, torch captures nothing more.
REFUSED = """
import torch
from pcp_mla.layer.graphs import PiecewiseGraph

x = torch.zeros(3, device="cuda")
x + 1
graph, before = PiecewiseGraph(), torch.cuda.current_stream()

def waits():
    y = x + 1
    torch.cuda.synchronize()
    return y

try:
    graph.capture(waits)
except RuntimeError as error:
    assert "captur" in str(error), error
else:
    raise AssertionError("a wait was captured")
assert graph.num_pieces == 0
assert torch.cuda.current_stream() == before
assert (x + 1).tolist() == [1.0, 1.0, 1.0]
torch.cuda.synchronize()
assert torch.cuda.is_current_stream_capturing() is False
"""


@pytest.mark.gpu
def test_what_cuda_refuses_to_capture() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
