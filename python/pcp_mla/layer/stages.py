"""NVTX ranges around a layer's stages."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext

import torch

_NO_TOOL = -2  # NVTX_NO_PUSH_POP_TRACKING: what a push gives where nothing is attached


@functools.cache
def _has_listener() -> bool:
    """Whether ranges go to anyone: PCP_MLA_NVTX=1 or 0 says so, else what runs a profiler in this process (nsys, ncu and others set
    these), or what a first push gives. NVTX looks for its tool once, so that the answer stays."""
    asked = os.environ.get("PCP_MLA_NVTX", "")
    if asked in ("0", "1"):
        return asked == "1"
    if any(os.environ.get(name) for name in ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")):
        return True
    depth = torch.cuda.nvtx.range_push("pcp_mla")
    torch.cuda.nvtx.range_pop()
    return depth != _NO_TOOL


class _Stage:
    """An NVTX range around a stage, for a profiler's timeline if there is one: even to nobody, a push costs a microsecond."""

    def __init__(self, name: str) -> None:
        self._name = f"pcp_mla.{name}"

    def __enter__(self) -> None:
        if _has_listener():
            torch.cuda.nvtx.range_push(self._name)

    def __exit__(self, *_: object) -> None:
        if _has_listener():
            torch.cuda.nvtx.range_pop()


STAGES = {name: _Stage(name) for name in ("exchange", "up_project", "attention")}
_UNMARKED = nullcontext()


def stage(name: str, x: torch.Tensor) -> AbstractContextManager[None]:
    """The range of a stage, where its work is a GPU's. Whether there is a GPU is not asked: that wakes the driver, and forks of a
    process whose driver is awake cannot use CUDA."""
    return STAGES[name] if x.is_cuda and not torch.compiler.is_compiling() else _UNMARKED
