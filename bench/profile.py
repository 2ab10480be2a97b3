"""A trace of one layer by the first implementation's way and by ours, for Perfetto and Chrome: docs/profiling.md.

On several GPUs by two real ranks over NCCL, ours by collectives and by peers; on one GPU rank 0 of two played; on a CPU two small
ranks over gloo. All ranks are in one file, which the command writes, compressed, beside the JSON of the numbers. Each call starts
when all ranks are ready for it and is waited for. Under nsys the same is done and marked without a profiler of our own: the region
that is worth a look lies between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pcp_mla.layer.stages import STAGES
from pcp_mla.testing.launch import run_distributed

from . import peers
from .layer import Batch, Layer

GPU_BATCH: Batch = ([8192], [], 16, 2)
CPU_BATCH: Batch = ([128], [], 2, 2)
CALLS = 3  # of each path: the first one may find the profiler not ready
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_KEPT = ("schemaVersion", "deviceProperties", "displayTimeUnit", "traceEvents")
Call = Callable[[], Any]


class Marked:
    """A range of this name in our profiler's trace, and on a GPU also NVTX's, which others read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self._record = torch.profiler.record_function(self.name)
        self._record.__enter__()
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        self._record.__exit__(None, None, None)


def has_other_profiler() -> bool:
    """Whether nsys or the like runs this process: there can be one that listens to CUPTI."""
    return any(os.environ.get(name) for name in ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"))


def record(paths: dict[str, Call], group: Any) -> dict[str, Any] | None:
    """What each path does in :data:`CALLS` calls, one range a call, as the profiler's JSON; None under another profiler."""
    gpu = torch.cuda.is_available()

    def wait() -> None:
        if group is not None:
            dist.barrier(group)
        if gpu:
            torch.cuda.synchronize()

    def run() -> None:
        with mock.patch.dict(STAGES, {name: Marked(f"pcp_mla.{name}") for name in STAGES}):
            for name, call in paths.items():
                for _ in range(CALLS):
                    wait()
                    with Marked(f"layer {name}"):
                        call()
                        if gpu:
                            torch.cuda.synchronize()
        wait()  # the first rank that stops stops nsys

    for call in paths.values():
        call()
    wait()
    with torch.cuda.profiler.profile() if gpu else contextlib.nullcontext():
        if has_other_profiler():
            run()
            return None
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
        with torch.profiler.profile(activities=activities) as profile:
            run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        with open(f"{folder}/trace.json") as file:
            return json.load(file)


def of_rank(group: Any, batch: Batch, device: str) -> tuple[str, dict[str, Any] | None]:
    """The attention's backend, and a rank's trace; without a group rank 0's, played."""
    peers.load_fa3()
    with torch.inference_mode():
        layer = Layer(batch, group, 0 if group is None else dist.get_rank(group), device)
        paths = layer.paths("seed", "ours", *(["peers"] if group is not None and device == "cuda" else []))
        named = {"collective" if name == "ours" else name: call for name, call in paths.items()}
        trace = record(named, group)
        if "peers" in paths:
            layer.layer_by_peers.exchange.close()  # type: ignore[union-attr]
    return layer.backend, trace


def merge(traces: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks in one trace: times from the same moment, arrows of one rank not joined with another's, names of ranks."""
    merged = {name: value for name, value in traces[0].items() if name in _KEPT} | {"traceEvents": []}
    start = min(event["ts"] for event in traces[0]["traceEvents"] if event["ph"] == "X")
    for rank, trace in enumerate(traces):
        shift = (trace.get("baseTimeNanoseconds", 0) - traces[0].get("baseTimeNanoseconds", 0)) / 1e3 - start
        events = trace["traceEvents"]
        used = {event["pid"] for event in events if event.get("cat") in ("cpu_op", *_ON_GPU)}
        for event in events:
            if event["pid"] not in used:
                continue
            if "ts" in event:
                event["ts"] = round(event["ts"] + shift, 3)
            if event["ph"] in "stf":
                event["id"] = f"{rank}.{event['id']}"
            if event["ph"] == "M" and event["name"] == "process_name":
                event["args"]["name"] = f"rank {rank}"
            merged["traceEvents"].append(event)
    return merged


def calls_of(trace: dict[str, Any], path: str, rank: int = 0) -> list[tuple[float, float, list[dict[str, Any]]]]:
    """Start and length in microseconds of each call of a path on a rank, and what ran on its GPU (its CPU, if there is none)."""
    named = [
        e for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name" and e["args"]["name"] == f"rank {rank}"
    ]
    pids = {event["pid"] for event in named}
    mine = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] in pids]
    ranges = sorted((e["ts"], e["dur"]) for e in mine if e.get("cat") == "user_annotation" and e["name"] == f"layer {path}")
    work = [event for event in mine if event.get("cat") in _ON_GPU] or [event for event in mine if event.get("cat") == "cpu_op"]
    work.sort(key=lambda event: event["ts"])
    return [(start, length, [e for e in work if start <= e["ts"] < start + length]) for start, length in ranges]


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result, its ``trace`` beside the numbers of rank 0, which are medians of the calls."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    batch = GPU_BATCH if gpus else CPU_BATCH
    if gpus == 1:
        ranks = [of_rank(None, batch, device)]
    else:
        ranks = run_distributed(2, of_rank, batch, device, backend="nccl" if gpus else "gloo", timeout=300.0)
    lengths, _, heads, world = batch
    result: dict[str, Any] = {"op": "profile", "tokens": sum(lengths), "heads": heads, "P": world, "backend": ranks[0][0]}
    traces = [trace for _, trace in ranks if trace is not None]
    if traces:
        result["trace"] = trace = merge(traces)
        for path in ("seed", "collective", "peers"):
            if calls := calls_of(trace, path):
                busy = statistics.median(sum(event["dur"] for event in work) for _, _, work in calls)
                length = statistics.median(length for _, length, _ in calls)
                result[path] = {"range_us": length} | ({"launches": len(calls[-1][2]), "kernels_us": busy} if gpus else {})
    yield result


def line(result: dict[str, Any]) -> str:
    text = f"profile T={result['tokens']} H={result['heads']} P={result['P']} {result['backend']}"
    for name, of in result.items():
        if isinstance(of, dict):
            text += f" | {name} {of['range_us']:.0f} us"
            text += f" {of['launches']} launches {of['kernels_us']:.0f} us of kernels" if "launches" in of else ""
    return text
