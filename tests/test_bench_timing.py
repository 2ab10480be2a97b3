"""Times of the benchmarks are medians, without the warm-up and what is done between the calls: on a clock that calls advance."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import timing

HOURS = 3600.0


class Clock:
    """Seconds, and a call that takes the next of some durations."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def call(self, durations: list[float]) -> Callable[[], None]:
        left = iter(durations)
        return lambda: self.spend(next(left))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the host's clock and of the GPU's, whose events, streams and graphs do nothing but look at it."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = clock.now

        def elapsed_time(self, end: Event) -> float:
            return (end.time - self.time) * 1e3

    class Graph:
        """A replay takes as long as what was captured, the second one five times that and the third one twice."""

        def __init__(self) -> None:
            self.slower = itertools.cycle([1, 5, 2])

        def replay(self) -> None:
            clock.spend(self.captured * next(self.slower))

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        begin = clock.now
        yield
        graph.captured = clock.now - begin

    empty = torch.empty
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(1, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: clock.spend(HOURS))
    return clock


def test_gpu_time_is_the_median(clock: Clock) -> None:
    assert timing.gpu_us(clock.call([HOURS] * 3 + [5e-6, 1e-6, 90e-6, 3e-6, 4e-6]), repeats=5) == pytest.approx(4)


def test_gpu_times_are_taken_in_turn(clock: Clock) -> None:
    order: list[str] = []
    calls = {name: clock.call([HOURS] * 3 + us) for name, us in (("a", [5e-6, 1e-6, 3e-6]), ("b", [9e-6, 7e-6, 8e-6]))}
    noted = {name: lambda name=name: (order.append(name), calls[name]()) for name in calls}
    assert timing.gpu_times(noted, 3) == {"a": pytest.approx([5, 1, 3]), "b": pytest.approx([9, 7, 8])}
    assert order == [*"aaabbb", *"ababab"]


def test_cpu_time_is_the_median_of_means(clock: Clock) -> None:
    durations = [1e-6, 3e-6, 10e-6, 20e-6, 2e-6, 4e-6]  # means 2, 15, 3
    assert timing.cpu_us(clock.call([HOURS] * 3 + durations), repeats=3, calls=2) == pytest.approx(3)


def test_graph_time_is_of_one_call(clock: Clock) -> None:
    assert timing.graph_us(clock.call([HOURS, 2e-6, 4e-6, 6e-6]), repeats=3, calls=3) == pytest.approx(2 * 4)


def test_times_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {True: [20.0, 90.0, 30.0, 10.0], False: [7.0, 5.0, 6.0, 8.0]}
    monkeypatch.setattr(timing, "gpu_times", lambda calls, repeats, cold=True: dict.fromkeys(calls, taken[cold]))
    monkeypatch.setattr(timing, "kernels", lambda call: {"launches": 3, "kernels_us": call()})
    wanted = {"gpu_us": 25.0, "gpu_us_p20": 10.0, "gpu_us_p80": 90.0, "warm_us": 6.5, "launches": 3}
    assert timing.on_gpu({"a": lambda: 4.0, "b": lambda: 5.0}) == {
        "a": {**wanted, "kernels_us": 4.0},
        "b": {**wanted, "kernels_us": 5.0},
    }


def test_kernels_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Event:
        class time_range:
            elapsed_us = staticmethod(lambda: 5.0)

    def on_device(fn: Callable[[], Any], device: torch.device) -> list[Any]:
        before = len(calls)
        fn()
        return [Event] * 2 * (len(calls) - before)

    monkeypatch.setattr(timing, "on_device", on_device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert timing.kernels(lambda: calls.append(1)) == {"launches": 2, "kernels_us": 10.0}
    assert len(calls) == 1 + 3
    assert timing.launches(lambda: calls.append(1)) == 2


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_us", lambda *_, **__: 7.0)
    monkeypatch.setattr(timing, "graph_us", lambda *_, **__: 15.0)
    monkeypatch.setattr(timing, "on_gpu", lambda calls: {name: {"gpu_us": 20.0} for name in calls})
    paths = {"a": lambda: None, "b": lambda: None}
    assert timing.measure(paths, {"bytes": 30_000_000}) == {"a": {"cpu_us": 7.0}, "b": {"cpu_us": 7.0}}
    result = {"bytes": 30_000_000, "copy_us": 10.0, "copy_gbps": 3000.0}
    a = {"cpu_us": 7.0, "gpu_us": 20.0, "share_of_copy": 0.5, "share_of_bandwidth": 0.5}
    b = {"bytes": 15_000_000, "copy_us": 5.0, "cpu_us": 7.0, "gpu_us": 20.0, "share_of_copy": 0.25, "share_of_bandwidth": 0.25}
    own = {"b": {"bytes": 15_000_000, "copy_us": 5.0}}
    assert timing.measure(paths, result, own) == {"a": a, "b": b}
    assert timing.measure({"a": paths["a"]}, result, graph=True) == {"a": a | {"graph_us": 15.0}}


def test_copies_count_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    randint, made = torch.randint, []
    monkeypatch.setattr(torch, "randint", lambda *rest, device, **options: made.append(randint(*rest, **options)) or made[-1])
    monkeypatch.setattr(timing, "gpu_us", lambda call, *_: call() is not None and 2.0)
    assert timing.copy_gbps(1000) == pytest.approx(0.5)
    assert made[0].nbytes == 500
