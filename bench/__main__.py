"""python -m bench [NAME ...] [--out FOLDER] [--trace FILE]: run benchmarks, print a line a case, write
FOLDER/<name>_<device>.json."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import pcp_mla

from . import timing

BENCHMARKS = (
    "attention",
    "cp_merge",
    "exchange",
    "fused_gather",
    "graphs",
    "heads",
    "latent_cache",
    "layer",
    "merge_states",
    "overlap",
    "planner",
    "split",
    "kv_up_project",
)
HERE = Path(__file__).resolve().parent


def commit() -> str:
    """The revision that runs; PCP_MLA_COMMIT names it where the tree was copied without its history."""
    if "PCP_MLA_COMMIT" in os.environ:
        return os.environ["PCP_MLA_COMMIT"]
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def line(result: dict[str, Any]) -> str:
    what = f"{result['op']:14} T={result['tokens']:<6} H={result['heads']:<3} P={result['P']} {result['bytes'] / 1e6:8.1f} MB"
    return f"{what} | {timing.columns(result)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="requests to draw a batch of the layer's from (bench/layer.py)")
    args = parser.parse_args(arguments)
    if args.trace is not None:
        if not args.trace.is_file():
            parser.error(f"--trace must be a file, got {args.trace}")
        os.environ["PCP_MLA_TRACE"] = str(args.trace)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    args.out.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        print("shares: of a plain copy that moves the same bytes / of the copy bandwidth of 4 GiB")
    for name in args.names or BENCHMARKS:
        results = []
        benchmark = importlib.import_module(f"bench.{name}")
        show = getattr(benchmark, "line", line)  # a benchmark that moves no bytes has its own
        with torch.inference_mode():
            for result in benchmark.run(device):
                print(show(result), flush=True)
                results.append(result)
        report = {
            "benchmark": name,
            "hardware": hardware,
            "commit": commit(),
            "torch": torch.__version__,
            "pcp_mla": pcp_mla.__version__,
            "results": results,
        }
        slug = hardware.split()[1].lower() if device == "cuda" and " " in hardware else device
        slug += f"x{torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
        (args.out / f"{name}_{slug}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
