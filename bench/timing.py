"""How everything here is timed: device events around the call, cold L2, the launches queued behind a running kernel so that CPU
time does not count as GPU time, median of many. CPU time is what the host takes to issue a call. All in inference mode, as engines
run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pcp_mla.demo.measure import on_device
from pcp_mla.testing.launch import run_distributed

Call = Callable[[], Any]
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
_HEAD_START_CYCLES = 4_000_000  # about 2 ms: longer than any path here takes to issue its launches


def gpu_times(calls: Mapping[str, Call], repeats: int = 30, cold: bool = True) -> dict[str, list[float]]:
    """GPU times of each call in microseconds, one after another again and again: what the clock of a GPU that grows warm does to
    one it does to all. ``cold``: L2 is emptied before each."""
    flush = torch.empty(_FLUSH_BYTES if cold else 0, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        for _ in range(3):
            call()
    pairs: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(_HEAD_START_CYCLES)
            begin.record()
            call()
            end.record()
            pairs[name].append((begin, end))
            torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) * 1e3 for begin, end in timed] for name, timed in pairs.items()}


def gpu_us(call: Call, repeats: int = 30) -> float:
    """Median GPU time of ``call`` in microseconds, L2 cold."""
    return statistics.median(gpu_times({"": call}, repeats)[""])


def on_gpu(calls: Mapping[str, Call], repeats: int = 30) -> dict[str, dict[str, Any]]:
    """Of each path, in turn: median and 20th and 80th percentile with a cold L2, median with a warm one, all by events; the time
    that its kernels and copies take by the profiler, which is CUPTI's, and how many these are."""
    cold, warm = gpu_times(calls, repeats), gpu_times(calls, repeats, cold=False)
    results: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        times = {"gpu_us": statistics.median(cold[name])}
        times |= zip(("gpu_us_p20", "gpu_us_p80"), statistics.quantiles(cold[name], n=5)[::3], strict=True)
        results[name] = times | {"warm_us": statistics.median(warm[name])} | kernels(call)
    return results


def cpu_us(call: Call, repeats: int = 15, calls: int = 20) -> float:
    """Median host time of one ``call`` in microseconds: what it costs to issue on a GPU, what it takes on the CPU."""
    gpu = torch.cuda.is_available()
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    if gpu:
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def graph_us(call: Call, repeats: int = 30, calls: int = 20) -> float:
    """Median GPU time of one of ``calls`` in a replayed CUDA graph, in microseconds; the data is in L2 as far as it fits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times) * 1e3


def in_graph(call: Call, gpu: bool, calls: int) -> dict[str, Any]:
    """Host time of a collective's path; on a GPU also its time as one of so many calls in a graph, and its launches."""
    result: dict[str, Any] = {"cpu_us": cpu_us(call, 5, 20)}
    if gpu:
        result |= {"graph_us": graph_us(call, calls=calls), "launches": launches(call)}
    return result


def kernels(call: Call, calls: int = 3) -> dict[str, Any]:
    """Kernels, copies and fills that one ``call`` puts on the GPU, and the time that they take in microseconds, by the profiler."""
    call()
    torch.cuda.synchronize()
    events = on_device(lambda: [call() for _ in range(calls)], torch.device("cuda", torch.cuda.current_device()))
    return {"launches": len(events) // calls, "kernels_us": sum(event.time_range.elapsed_us() for event in events) / calls}


def launches(call: Call) -> int:
    """Kernels, copies and fills that one ``call`` puts on the GPU."""
    return kernels(call, 1)["launches"]


def copy_us(moved: int) -> float:
    """Time of a plain device copy that moves ``moved`` bytes, those read and those written both counted."""
    source = torch.randint(0, 256, (moved // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return gpu_us(lambda: target.copy_(source))


def copy_gbps(moved: int = 4 << 30) -> float:
    """Measured copy bandwidth in GB/s of a copy so large that its start and end do not count."""
    return moved / copy_us(moved) / 1e3


def gemm_tflops(size: int = 8192) -> float:
    """Measured rate of a large bf16 matrix product in TFLOP/s."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    return 2 * size**3 / gpu_us(lambda: a @ b, 10) / 1e6


def measure(
    calls: Mapping[str, Call], result: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]] | None = None, graph: bool = False
) -> dict[str, dict[str, Any]]:
    """Times of each path of ``result``, in turn, and where that has a copy's time and bandwidth, which are a GPU's, the shares of
    these. ``own``: what a path has instead of the result's bytes and copy."""
    gpu = "copy_us" in result
    own = own or {}
    measured: dict[str, dict[str, Any]] = {
        name: {**own.get(name, {}), "cpu_us": cpu_us(call, calls=20 if gpu else 1)} for name, call in calls.items()
    }
    for name, times in (on_gpu(calls) if gpu else {}).items():
        numbers, of = measured[name] | times, result | own.get(name, {})
        if graph:
            numbers["graph_us"] = graph_us(calls[name])
        numbers["share_of_copy"] = of["copy_us"] / numbers["gpu_us"]
        numbers["share_of_bandwidth"] = of["bytes"] / numbers["gpu_us"] / 1e3 / of["copy_gbps"]
        measured[name] = numbers
    return measured


def over_ranks(
    device: str, measure: Callable[..., list[dict[str, Any]]], gpu_sizes: Sequence[Any], cpu_sizes: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Rank 0's results of ``measure(group, sizes)``: at each number of GPUs that there are, over NCCL, else of two over gloo."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus < 2:
        yield from run_distributed(2, measure, cpu_sizes)[0]
        return
    for world in (2, 4, 8):
        if world <= gpus:
            yield from run_distributed(world, measure, gpu_sizes, backend="nccl", timeout=300.0)[0]


def graph_columns(result: dict[str, Any], names: Iterable[str], sent: int = 0) -> str:
    """Paths of :func:`in_graph` side by side, at what rate they send so many bytes, and their times with other numbers of
    multiprocessors."""
    text = ""
    for name in names:
        if name not in result:
            continue
        of = result[name]
        text += f" | {name} cpu {of['cpu_us']:6.1f} us"
        if "graph_us" in of:
            text += f" graph {of['graph_us']:6.1f} us {of['launches']} launches"
            text += f" {sent / of['graph_us'] / 1e3:.0f} GB/s" if sent else ""
        if of.get("by_sms"):
            text += f" ({', '.join(f'{sms} SMs {us:.1f}' for sms, us in of['by_sms'].items())})"
    return text


def columns(result: dict[str, Any]) -> str:
    """A result's paths side by side: GPU time, share of a plain copy and of the copy bandwidth, what else is known, host time."""
    parts = []
    for name, numbers in result.items():
        if not isinstance(numbers, dict):
            continue
        text = name
        if "gpu_us" in numbers:
            text += f" {numbers['gpu_us']:.1f} us {numbers['share_of_copy']:.0%}/{numbers['share_of_bandwidth']:.0%}"
            text += f" {numbers['launches']} launches" if "launches" in numbers else ""
            text += f" graph {numbers['graph_us']:.1f} us" if "graph_us" in numbers else ""
            text += f" {result['flops'] / numbers['gpu_us'] / 1e6:.0f} TFLOP/s" if result.get("flops") else ""
            text += f" {numbers['of_gemm']:.2f} GEMMs" if "of_gemm" in numbers else ""
        parts.append(f"{text} cpu {numbers['cpu_us']:.1f} us")
    return " | ".join(parts)
