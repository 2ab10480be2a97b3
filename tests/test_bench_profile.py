"""The trace of a layer, and kernels' counters out of what ncu writes."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ncu, profile
from bench.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the layer is not small")
def test_trace_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--out", str(tmp_path)]) == 0
    assert "profile T=128" in capsys.readouterr().out
    packed = (tmp_path / "profile_cpu.trace.json.gz").read_bytes()
    trace = json.loads(gzip.decompress(packed))
    for rank in (0, 1):
        for path in ("seed", "collective"):
            calls = profile.calls_of(trace, path, rank)
            assert len(calls) == profile.CALLS
            assert all(len(work) > 10 for _, _, work in calls)
    (result,) = json.loads((tmp_path / "profile_cpu.json").read_text())["results"]
    assert set(result) >= {"seed", "collective"}
    assert "trace" not in result
    # Both ranks call one another: their calls are at the same time.
    first, second = (profile.calls_of(trace, "seed", rank)[-1] for rank in (0, 1))
    assert max(first[0], second[0]) < min(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize("variable", ["NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH"])
def test_another_profiler_is_left_alone(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: pytest.fail("there is one already"))
    calls: list[str] = []
    assert profile.record({"seed": lambda: calls.append("seed")}, None) is None
    assert len(calls) == 1 + profile.CALLS


def of_gpu(rank: int, moment: int) -> dict[str, Any]:
    """As the profiler writes it for a rank with a GPU: CPU and GPU are processes, the latter named by its number."""

    def named(pid: int) -> dict[str, Any]:
        return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 0, "args": {"name": "python3"}}

    def event(cat: str, name: str, pid: int, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": 7, "ts": ts, "dur": dur}

    cpu = 100 + rank
    return {
        "schemaVersion": 1,
        "baseTimeNanoseconds": 1000 * moment,
        "trace_name": "/tmp/somewhere",
        "traceEvents": [
            *(named(pid) for pid in (cpu, 0, 1)),
            event("user_annotation", "layer seed", cpu, 50 - moment, 20),
            event("cpu_op", "aten::mm", cpu, 51 - moment, 2),
            {"ph": "s", "id": 9, "pid": cpu, "tid": 7, "ts": 51 - moment, "cat": "ac2g", "name": "ac2g"},
            {"ph": "f", "id": 9, "pid": rank, "tid": 7, "ts": 60 - moment, "cat": "ac2g", "name": "ac2g", "bp": "e"},
            event("kernel", f"gemm of {rank}", rank, 60 - moment, 8),
            event("gpu_memcpy", "Memcpy", rank, 90 - moment, 1),
        ],
    }


def test_ranks_in_one_trace() -> None:
    trace = profile.merge([of_gpu(0, 10), of_gpu(1, 30)])
    assert "trace_name" not in trace
    for rank in (0, 1):
        ((start, length, work),) = profile.calls_of(trace, "seed", rank)
        assert (start, length) == (0, 20)
        assert [(event["name"], event["ts"]) for event in work] == [(f"gemm of {rank}", 10)]
    arrows = [(event["id"], event["pid"]) for event in trace["traceEvents"] if event["ph"] in "sf"]
    assert arrows == [("0.9", 100), ("0.9", 0), ("1.9", 101), ("1.9", 1)]
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names == {100: "rank 0", 0: "rank 0", 101: "rank 1", 1: "rank 1"}


RANGE = '"<default domain>:{}:none:none:none:none:ASCII:none"'
METRICS = [metrics[0] for metrics in ncu.METRICS.values()]
UNITS = ["us", "%", "%", "%", "%", "Mbyte", "Kbyte"]


def raw_page(*rows: tuple[str, str, str], metrics: list[str] = METRICS, units: list[str] = UNITS) -> list[str]:
    head = ",".join(f'"{name}"' for name in ["ID", "Kernel Name", "thread Domain:Push/Pop_Range:Msg", *metrics])
    unit = ",".join(f'"{name}"' for name in ["", "", "", *units])
    return ["==PROF== Connected to process 7", head, unit, *(f'"0","{kernel}",{text},{values}' for kernel, text, values in rows)]


VALUES = '"10","50","12.5","25","90","1,003","500"'


def test_counters_of_kernels() -> None:
    page = raw_page(
        ("merge_kernel<2>(Params)", RANGE.format("merge_attn_states cuda"), VALUES),
        ("attention_kernel", RANGE.format("pcp_attention triton"), VALUES),
    )
    results = ncu.read(page)
    ncu.label(results, ["pcp_attention cuda", "pcp_attention triton", "merge_attn_states cuda"])
    assert [result["call"] for result in results] == ["merge_attn_states cuda", "pcp_attention triton"]
    assert [result["kernel"] for result in results] == ["merge_kernel<2>", "attention_kernel"]
    of = results[1]
    assert of["duration_us"] == pytest.approx(10)
    assert [of[name] for name in ("tensor", "issue", "l2", "dram")] == pytest.approx([0.5, 0.125, 0.25, 0.9])
    ncu.roofline(of, 2_007_000_000)
    assert of["dram_gbps"] == pytest.approx(1.0035e9 / 10e-6 / 1e9)
    assert of["tflops"] == pytest.approx(200.7)
    assert of["flops_per_byte"] == pytest.approx(2)
    ncu.roofline(results[0], 0)
    assert "tflops" not in results[0]


def test_units_and_names_of_an_older_ncu() -> None:
    metrics = [metrics[-1] for metrics in ncu.METRICS.values()]
    (of,) = ncu.read(raw_page(("concat_k_kernel", '""', VALUES), metrics=metrics, units=["nsecond", *UNITS[1:]]))
    assert of["duration_us"] == pytest.approx(0.01)
    assert of["tensor"] == pytest.approx(0.5)
    ncu.label(results := [of], ["concat_k cuda"])
    assert results[0]["call"] == "concat_k cuda"
    ncu.label(results := [{"range": ""}], ["a", "b"])
    assert "call" not in results[0]


def test_no_counters() -> None:
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        ncu.read(["==ERROR== ERR_NVGPUCTRPERM - no permission"])


@torch.inference_mode()
def test_every_kernel_is_launched_under_ncu() -> None:
    """By the names that bench/ncu.sh has."""
    found, work = ncu.calls(128, 2, "cpu")
    assert list(found) == list(work)
    assert {"fused_gather cpu", "write_latent_cache cpu", "merge_n_attn_states cpu"} <= set(found)
    pattern = re.search(r"ours='(.*)'", (ROOT / "bench" / "ncu.sh").read_text())[1]
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    kernels = set(re.findall(r"(\w+_kernel)\(const", sources))
    assert len(kernels) > 8
    left_out = {kernel for kernel in kernels if not re.fullmatch(pattern, kernel) and not kernel.startswith("plan_")}
    assert left_out == {"exchange_heads_kernel", "publish_latents_kernel"}  # which wait for other ranks


def test_metrics_for_the_script() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-m", "bench.ncu", "metrics"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [metric for metrics in ncu.METRICS.values() for metric in metrics], done.stderr
