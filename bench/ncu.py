"""Hardware counters of our kernels, each launched once at one size: what bench/ncu.sh runs under ncu, and the JSON from its CSV.

``python -m bench.ncu calls WORK`` launches them, in NVTX ranges of their names, between cudaProfilerStart and cudaProfilerStop, and
writes what they compute to WORK. ``python -m bench.ncu json CSV WORK FOLDER`` writes FOLDER/ncu_<device>.json. Kernels that wait
for other GPUs are not there: ncu runs a kernel several times.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pcp_mla import PCPMetadata
from pcp_mla.ops.registry import availability

from . import attention, fused_gather, kv_up_project, latent_cache, merge_states
from .__main__ import about
from .geometry import DEEPSEEK

# What is written, by the first of ncu's metrics that a GPU's generation has: shares of the peak, and what was moved.
METRICS = {
    "duration_us": ("gpu__time_duration.sum",),
    "tensor": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
    ),
    "issue": ("sm__inst_issued.avg.pct_of_peak_sustained_elapsed",),
    "l2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram_read_bytes": ("dram__bytes_read.sum",),
    "dram_write_bytes": ("dram__bytes_write.sum",),
}
_UNITS = {"": 1.0, "%": 0.01, "ns": 1e-3, "us": 1.0, "ms": 1e3, "usecond": 1.0, "nsecond": 1e-3, "msecond": 1e3}
_UNITS |= {f"{prefix}byte": 1000.0**power for power, prefix in enumerate(("", "K", "M", "G"))}
TOKENS, HEADS, RANKS = 8192, 16, 2
Calls = dict[str, Callable[[], Any]]


def calls(tokens: int, heads: int, device: str) -> tuple[Calls, dict[str, int]]:
    """A call of each op by each backend that has kernels here, checked, and the FLOPs of each: 0 where these do not count."""
    dims = replace(DEEPSEEK, num_heads=heads)
    meta = PCPMetadata.build([tokens], world_size=RANKS, rank=0, device=device)
    partials = [torch.randn(tokens, heads, merge_states.DIM, device=device).bfloat16() for _ in range(4)]
    lses = [torch.randn(heads, tokens, device=device).T for _ in range(4)]
    x = attention.inputs(tokens, dims, RANKS, device)
    kernels = ["cuda", "triton"] if device == "cuda" else ["cpu"]
    backends = [name for name in kernels if not availability("fused_gather")[name]]
    of_products = [name for name in backends if not availability("kv_up_project")[name]] or ["reference"]
    by_op = {
        "fused_gather": fused_gather.gather_paths(meta, heads, backends)[0],
        "fused_restore": fused_gather.restore_paths(meta, heads, backends)[0],
        **latent_cache.make_paths(tokens, dims, device, backends),
        "merge_attn_states": merge_states.make_paths(partials[:2], lses[:2], backends),
        "merge_n_attn_states": merge_states.make_paths(partials, lses, backends),
        **kv_up_project.make_paths(tokens, dims, device, of_products),
        "pcp_attention": attention.make_paths(*x, device),
    }
    work = {
        "kv_up_project": 2 * tokens * heads * dims.expanded_dim * dims.kv_lora_rank,
        "pcp_attention": attention.flops(meta, dims),
    }
    found = {f"{op} {name}": paths[name] for op, paths in by_op.items() for name in backends if name in paths}
    return found, {name: work.get(name.split()[0], 0) for name in found}


def launch(file: Path) -> None:
    """Under ncu; FLOPs of each call, in their order, to ``file``."""
    with torch.inference_mode():
        found, work = calls(TOKENS, HEADS, "cuda")
        file.write_text(json.dumps(work))
        for call in found.values():
            call()
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            for name, call in found.items():
                with torch.cuda.nvtx.range(name):
                    call()
                torch.cuda.synchronize()


def read(lines: list[str]) -> list[dict[str, Any]]:
    """A kernel a row, from ncu's raw page as CSV, whose second line has the units; what else the process printed is left out."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3:
        raise ValueError(f"ncu measured no kernel: {lines[-1].strip() if lines else 'its output is empty'}")
    names, units = rows[:2]
    results = []
    for row in rows[2:]:
        cells = dict(zip(names, zip(row, units, strict=True), strict=True))
        ranges = [cell for name, (cell, _) in cells.items() if "Push/Pop" in name and cell]
        result: dict[str, Any] = {"range": ranges[0] if ranges else "", "kernel": cells["Kernel Name"][0].split("(")[0]}
        for key, metrics in METRICS.items():
            metric = next((metric for metric in metrics if metric in cells), None)
            if metric is not None:
                value, unit = cells[metric]
                result[key] = float(value.replace(",", "")) * _UNITS[unit]
        results.append(result)
    return results


def label(results: list[dict[str, Any]], names: list[str]) -> None:
    """Which call each kernel is of: by its NVTX range, or where ncu does not show it by the order, if there are as many."""
    for number, result in enumerate(results):
        text = result.pop("range")
        inside = [name for name in names if name in text]
        if inside:
            result["call"] = max(inside, key=len)
        elif len(results) == len(names):
            result["call"] = names[number]


def roofline(result: dict[str, Any], flops: int) -> None:
    """What a kernel reaches: GB/s of DRAM, and where it multiplies matrices TFLOP/s, and FLOPs a byte of DRAM."""
    moved = result["dram_read_bytes"] + result["dram_write_bytes"]
    result["dram_gbps"] = moved / result["duration_us"] / 1e3
    if flops:
        result |= {"tflops": flops / result["duration_us"] / 1e6, "flops_per_byte": flops / moved}


def write(counted: Path, computed: Path, folder: Path) -> None:
    results, work = read(counted.read_text().splitlines()), json.loads(computed.read_text())
    label(results, list(work))
    for result in results:
        roofline(result, work.get(result.get("call", ""), 0))
        print(" ".join(f"{name} {x:.4g}" if isinstance(x, float) else str(x) for name, x in result.items()))
    hardware = torch.cuda.get_device_name()
    report = {"benchmark": "ncu", **about(hardware), "tokens": TOKENS, "heads": HEADS, "P": RANKS, "results": results}
    (folder / f"ncu_{hardware.split()[1].lower()}.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.ncu", description=__doc__)
    parser.add_argument(
        "what", choices=["calls", "metrics", "json"], help="launch the kernels, print ncu's metrics, write the JSON"
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="WORK, or CSV WORK FOLDER")
    args = parser.parse_args()
    if args.what == "metrics":
        print("\n".join(metric for metrics in METRICS.values() for metric in metrics))
    elif args.what == "calls":
        launch(*args.files)
    else:
        write(*args.files)


if __name__ == "__main__":
    main()
