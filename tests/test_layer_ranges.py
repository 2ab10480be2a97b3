"""NVTX ranges around a layer's stages: where a profiler listens, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pcp_mla.layer import stages as layer_stages

VARIABLES = ("PCP_MLA_NVTX", "NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")
NO_TOOL, DEPTH = -2, 0  # what a push gives without a tool, and the depth that a tool gives


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of ranges as they are opened, and "pop"; no variable is set, and nobody listens."""
    names: list[str] = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    listen(monkeypatch, names, NO_TOOL)
    layer_stages._has_listener.cache_clear()
    yield names
    layer_stages._has_listener.cache_clear()


def listen(monkeypatch: pytest.MonkeyPatch, names: list[str], depth: int) -> None:
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: names.append(name) or depth)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: names.append("pop") or depth)


def stages() -> None:
    for name in ("exchange", "up_project"):
        with layer_stages.STAGES[name]:
            pass


RANGES = ["pcp_mla.exchange", "pop", "pcp_mla.up_project", "pop"]
PROBE = ["pcp_mla", "pop"]


def test_nobody_listens(pushed: list[str]) -> None:
    stages()
    stages()
    assert pushed == PROBE


def test_a_tool_that_answers(pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    listen(monkeypatch, pushed, DEPTH)
    stages()
    assert pushed == PROBE + RANGES


@pytest.mark.parametrize("name", VARIABLES[1:])
def test_a_profiler_that_set_a_variable(name: str, pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/some/where.so")
    stages()
    assert pushed == RANGES


@pytest.mark.parametrize(("asked", "depth", "wanted"), [("1", NO_TOOL, RANGES), ("0", DEPTH, [])])
def test_what_is_asked_for(asked: str, depth: int, wanted: Any, pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCP_MLA_NVTX", asked)
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "/some/where.so")
    listen(monkeypatch, pushed, depth)
    stages()
    assert pushed == wanted


def test_no_ranges_on_a_cpu(pushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCP_MLA_NVTX", "1")
    with layer_stages.stage("exchange", torch.zeros(1)):
        pass
    assert pushed == []
