"""python -m bench [NAME ...] [--geometry GEOMETRY ...] [--out FOLDER] [--trace FILE] [--check | --base REF]: run benchmarks, print
a line a case, write FOLDER/<name>_<device>.json, with --geometry one geometry_<device>.json."""

from __future__ import annotations

import argparse
import gzip
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pcp_mla
from pcp_mla.plan.dims import MLADims

from . import geometry, ratios, timing

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
    "profile",
    "split",
    "kv_up_project",
)
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def commit() -> str:
    """The revision that runs; PCP_MLA_COMMIT names it where the tree was copied without its history."""
    if "PCP_MLA_COMMIT" in os.environ:
        return os.environ["PCP_MLA_COMMIT"]
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def about(hardware: str) -> dict[str, Any]:
    """What a file of results says of its run."""
    return {"hardware": hardware, "commit": commit(), "torch": torch.__version__, "pcp_mla": pcp_mla.__version__}


def line(result: dict[str, Any]) -> str:
    what = f"{result['op']:14} T={result['tokens']:<6} H={result['heads']:<3} P={result['P']} {result['bytes'] / 1e6:8.1f} MB"
    return f"{what} | {timing.columns(result)}"


def compare(names: Sequence[str], ref: str) -> int:
    """Each benchmark with the package of another revision and with this one, one behind the other; 1 if a path is slower."""
    folder = ROOT / "build" / "bench"
    tree = ratios.build(ref, ROOT)
    found = []
    for name in names:
        for side, at in (("base", tree), ("here", ROOT)):
            ratios.run(at, name, folder / side)
        for file in sorted((folder / "here").glob(f"{name}_*.json")):
            reports = [json.loads((folder / side / file.name).read_text()) for side in ("base", "here")]
            found += ratios.ratios(*reports)
    return 0 if ratios.show(found) else 1


def parse_geometries(texts: list[str]) -> list[MLADims]:
    return [geometry.parse(text) for given in texts for text in (geometry.ALL if given == "all" else (given,))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, help="folder of the JSON files; default: bench/results, with --check build/bench")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="requests to draw a batch of the layer's from (bench/layer.py)")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--check", action="store_true", help="compare with bench/results: 1 if a path is more than 10 %% slower")
    against.add_argument("--base", metavar="REF", help="build that revision too, and compare with it in the same run")
    parser.add_argument(
        "--geometry",
        nargs="+",
        default=[],
        metavar="GEOMETRY",
        help="nope,rope,v,rank (and xHEADS, 16) such as 192,64,256,512x20, or all: for ops whose speed depends on it, a size each",
    )
    args = parser.parse_args(arguments)
    if args.trace is not None:
        if not args.trace.is_file():
            parser.error(f"--trace must be a file, got {args.trace}")
        os.environ["PCP_MLA_TRACE"] = str(args.trace)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if args.base is not None:
        if args.geometry:
            parser.error("--base has no geometries")
        return compare(args.names or BENCHMARKS, args.base)
    out = args.out or (ROOT / "build" / "bench" if args.check else RESULTS)
    modules = {name: importlib.import_module(f"bench.{name}") for name in args.names or BENCHMARKS}
    try:
        geometries = parse_geometries(args.geometry)
    except ValueError as error:
        parser.error(str(error))
    if geometries:
        able = {name: module for name, module in modules.items() if "geometries" in inspect.signature(module.run).parameters}
        if args.names and able != modules:
            parser.error(f"no geometries of {next(iter(modules.keys() - able))!r}")
        modules = able
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    slug = hardware.split()[1].lower() if device == "cuda" and " " in hardware else device
    slug += f"x{torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
    made_by = about(hardware)
    out.mkdir(parents=True, exist_ok=True)
    found: list[ratios.Ratio] = []

    def write(name: str, benchmark: str, results: list[dict[str, Any]]) -> None:
        report = {"benchmark": benchmark, **made_by, "results": results}
        file = f"{name}_{slug}.json"
        if args.check and (RESULTS / file).is_file():
            found.extend(ratios.ratios(json.loads((RESULTS / file).read_text()), report))
        (out / file).write_text(json.dumps(report, indent=1) + "\n")

    if device == "cuda":
        ceilings = {"copy_gbps": timing.copy_gbps(), "gemm_tflops": timing.gemm_tflops()}
        made_by |= ceilings
        print(", ".join(f"{name} {rate:.0f}" for name, rate in ceilings.items()))
        print("shares: of a plain copy that moves the same bytes / of the copy bandwidth of 4 GiB")
    of_geometries = []
    for name, module in modules.items():
        results: list[dict[str, Any]] = []
        show = getattr(module, "line", line)  # a benchmark that moves no bytes has its own
        with torch.inference_mode():
            for result in module.run(device, geometries) if geometries else module.run(device):
                if trace := result.pop("trace", None):
                    packed = gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), mtime=0)
                    (out / f"{name}_{slug}.trace.json.gz").write_bytes(packed)
                print(show(result), flush=True)
                results.append(result)
        if geometries:
            of_geometries += results
        else:
            write(name, name, results)
    if geometries:
        write("geometry", " ".join([*args.names, "--geometry", *args.geometry]), of_geometries)
    return 0 if not args.check or ratios.show(found) else 1


if __name__ == "__main__":
    sys.exit(main())
