"""What the pictures in docs/img show, from bench/results: numbers alone, which bench/pictures.py draws and puts into the files."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import profile
from .readme import find
from .report import ROOT, load, made_on

Series = dict[str, list[tuple[float, float]]]
IMAGES = ROOT / "docs" / "img"
LAYER_PATHS = {"seed": "seed path", "rows": "virtual rows", "ours": "pcp-mla"}
# A kernel's kind is that of the first pattern in its name.
KINDS = {
    "attention": r"flash|attention_kernel|fmha",
    "collective": r"nccl",
    "exchange": r"publish_latents|latent_cache|concat_and_cache",
    "up-projection": r"kv_up_project|gemm|nvjet|cutlass|cublas|xmma",
    "copies and indices": r"",
}


def _rounded(value: Any) -> Any:
    """Six digits, so that what is shown with three is rounded once."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, list | tuple) else value


def source(file: str) -> str:
    return f"bench/results/{file}.json: {made_on(file)}"


def layer() -> dict[str, Any]:
    """GPU time of one layer of 16 heads by new tokens, at each number of ranks."""
    panels = {}
    for ranks in (2, 8):
        rows = [r for r in load("layer_h100")["results"] if (r["heads"], r["P"], r["context"]) == (16, ranks, 0)]
        panels[f"P = {ranks}"] = {text: [(r["tokens"], r[path]["gpu_us"]) for r in rows] for path, text in LAYER_PATHS.items()}
    return {"panels": panels, "source": source("layer_h100")}


def shares() -> dict[str, Any]:
    """How near each op comes to what bounds it: a copy of its bytes, the bare product, FlashAttention 3."""
    bars = []

    def bar(text: str, of: str, share: float, microseconds: float) -> None:
        bars.append({"op": text, "of": of, "share": share, "us": microseconds})

    for op in ("fused_gather", "fused_restore"):
        r = find("fused_gather_h100", op=op, tokens=16384, heads=16, P=2)["auto out="]
        bar(f"pcp_{op}, 16384 tokens", "copy", r["share_of_copy"], r["gpu_us"])
    for op in ("write_latent_cache", "gather_latents"):
        r = find("latent_cache_h100", op=op, tokens=32768)["auto"]
        bar(f"{op}, 32768 tokens", "copy", r["share_of_copy"], r["gpu_us"])
    for partials, text in ((2, "merge_attn_states"), (4, "merge_n_attn_states of 4")):
        r = find("merge_states_h100", partials=partials, tokens=4096, heads=128)
        r = r.get("auto out=", r["auto"])
        bar(f"{text}, 4096 tokens", "copy", r["share_of_copy"], r["gpu_us"])
    r = find("kv_up_project_h100", op="concat_k", tokens=32768, heads=16)["auto"]
    bar("concat_k, 32768 tokens", "copy", r["share_of_copy"], r["gpu_us"])
    r = find("kv_up_project_h100", op="kv_up_project", tokens=32768, heads=16)
    for path, text in (("auto", "kv_up_project"), ("apart", "kv_up_project, k_pe apart")):
        bar(f"{text}, 32768 tokens", "GEMM", 1 / r[path]["of_gemm"], r[path]["gpu_us"])
    for tokens, ranks in ((4096, 2), (16384, 2), (32768, 8)):
        r = find("attention_h100", tokens=tokens, heads=16, P=ranks)
        for kernel, text in (("cuda", "CUDA"), ("triton", "Triton")):
            if kernel in r:
                share = r["fa3"]["gpu_us"] / r[kernel]["gpu_us"]
                bar(f"pcp_attention ({text}), {tokens} tokens, P = {ranks}", "FlashAttention 3", share, r[kernel]["gpu_us"])
    files = ("fused_gather", "latent_cache", "merge_states", "kv_up_project", "attention")
    return {"bars": bars, "source": f"bench/results/{{{','.join(files)}}}_h100.json"}


def ttft() -> dict[str, Any]:
    """Time to first token inside vLLM by prompt, at each number of tokens a step."""
    results = [r for r in load("vllm_v2-lite_h200x2")["results"] if r["case"] == "ttft"]
    panels: dict[str, Series] = {}
    for step in sorted({r["step_tokens"] for r in results}):
        rows = sorted((r for r in results if r["step_tokens"] == step), key=lambda r: r["prompt"])
        shared = [r for r in rows if r["pcp"] > 1]
        panels[f"steps of {step}"] = {
            "vLLM, PCP 2": [(r["prompt"], r["vllm_ms"]) for r in shared],
            "with pcp-mla": [(r["prompt"], r["ours_ms"]) for r in shared],
            "vLLM, TP 2": [(r["prompt"], r["vllm_ms"]) for r in rows if r["tp"] > 1],
        }
    return {"panels": panels, "source": source("vllm_v2-lite_h200x2")}


def efficiency() -> dict[str, Any]:
    """Of one layer on two GPUs, against ours by peers on one."""
    rows = [r for r in load("layer_h200x2")["results"] if r["P"] == 2]
    paths = LAYER_PATHS | {"ours": "pcp-mla, collective", "peers": "pcp-mla, peers"}
    names = [
        f"{r['tokens'] // r['requests']}" if r["requests"] == 1 else f"{r['requests']} x {r['tokens'] // r['requests']}"
        for r in rows
    ]
    bars = {text: [r[path]["efficiency"] for r in rows] for path, text in paths.items()}
    return {"tokens": names, "bars": bars, "source": source("layer_h200x2")}


def kind(kernel: str) -> str:
    return next(name for name, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def spans(trace: dict[str, Any], path: str) -> dict[str, Any]:
    """The call of a path that was neither the fastest nor the slowest on rank 0: its length, and kind, start and length of all that
    ran, in microseconds."""
    calls = sorted(profile.calls_of(trace, path), key=lambda call: call[1])
    start, length, work = calls[len(calls) // 2]
    return {"us": length, "spans": [[kind(event["name"]), event["ts"] - start, event["dur"]] for event in work]}


def trace_file() -> Path | None:
    """The shipped trace of two ranks, if there is one."""
    return next(iter(sorted((ROOT / "bench" / "results").glob("profile_*x2.trace.json.gz"))), None)


def timeline() -> dict[str, Any] | None:
    """One layer on the GPU of rank 0, the seed path and ours; None without a trace."""
    file = trace_file()
    if file is None:
        return None
    trace = json.loads(gzip.decompress(file.read_bytes()))
    paths = {"seed path": "seed", "pcp-mla, collective": "collective", "pcp-mla, peers": "peers"}
    name = file.name.removesuffix(".trace.json.gz")
    return {
        "paths": {text: spans(trace, path) for text, path in paths.items()},
        "source": source(name).replace(".json", ".trace.json.gz"),
    }


FIGURES: dict[str, Callable[[], dict[str, Any] | None]] = {
    "layer": layer,
    "shares": shares,
    "ttft": ttft,
    "efficiency": efficiency,
    "timeline": timeline,
}


def numbers() -> Iterable[tuple[str, dict[str, Any]]]:
    """Every picture's, as they are in its file."""
    for name, make in FIGURES.items():
        shown = make()
        if shown is not None:
            yield name, json.loads(json.dumps(_rounded(shown)))
