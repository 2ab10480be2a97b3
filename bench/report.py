"""python -m bench.report: writes docs/benchmarks.md from bench/results/*.json."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .geometry import name as geometry_name

ROOT = Path(__file__).resolve().parent.parent

HEAD = """# Benchmarks

`python -m bench.report` makes this page from the files in [bench/results](../bench/results), which `bench/gpu.sh`
writes after the GPU tests and compute-sanitizer, or `python -m bench NAME` one of them. Times are medians by device
events with a cold L2, unless a column says otherwise; a path whose result is wrong has none. "Share" is of a plain
device copy that moves the same bytes, and counts the fewest bytes that the op can move. CPU time is to issue a call,
on slow virtual machines: compare within a row. Columns of vLLM and FlashAttention 3 need these, installed or named by
`PCP_MLA_VLLM_OPS` and `PCP_MLA_FA3`.

![How near each op comes to what bounds it](img/shares.svg)"""

# In docs/img; the timeline is drawn where bench/results has a trace of two ranks.
PICTURES = {"The layer": ["layer"], "The layer on real ranks": ["efficiency", "timeline"], "Inside vLLM": ["ttft"]}

LAYER = """Latents in, output in local order out, rank 0 of P played (collectives are copies of their result). "seed": the first
implementation's way. "rows": virtual rows, keys gathered and expanded for each head and tail. Both over FlashAttention 3,
as "FA3", which is ours with it; "ours" is with the backend that `auto` takes. "Floor": all FLOPs at the rate of a large
GEMM, and the bytes of exchange and cache. The last column is ours by stages: checks, exchange and cache write;
up-projection; attention. A row with cached tokens is a serving step drawn from a trace of requests (`--trace FILE`)."""

GRAPHS = """4096 tokens through eight MLA layers with their projections, DeepSeek-V2-Lite's widths, P = 2. "Piecewise": CUDA
graphs between the collectives. "Peers": with a `PeerExchange`, and in one graph of all eight. "Compiled": torch.compile of all
eight. Wall time is from a call to its end on the GPU. One GPU: rank 0 played."""

OVERLAP = """DeepSeek-V3's query projection (1536 to 128 heads of 192) and the exchange of a rank's latents by `MLAPrefill.start`,
one behind the other and side by side on two streams; the kernel of a `PeerExchange` with so many multiprocessors, µs."""

EVALUATION = """Exact match of the small model of `bench/train_tiny.py` on 500 word problems, bf16, as transformers' own model and
at P ranks; "same text": answers that are the stock model's token by token. "fp8": over a float8 cache with a scale of 1."""

RANKS = """Real ranks over NCCL: time of a layer of 16 heads on the slowest rank, calls one after another, host time of one, and
the parallel efficiency t(1) / (P t(P)). "Collective" and "peers": ours with a `LatentExchange` and with a `PeerExchange`."""

ATTENTION = """One call over shared key starts, widths 192 and 128, bf16, rank 0 of P; TFLOP/s (µs). The CUDA and the Triton kernel
with `k_pe` apart, with K in one piece, with `kv_rows` in order, in blocks of 64 and random, with `prev`; FlashAttention
3 (fa3-fwd), torch's FlashAttention 2, K in one piece."""

UP_PROJECT = """bf16, DeepSeek's widths, latents in shuffled blocks of 64. "GEMM" is the bare product on gathered latents; "torch" a
restore, the product and two copies."""

CACHE = """576-wide bf16 latents. "Graph" is a call in a CUDA graph, L2 warm. vLLM: `concat_and_cache_mla` and
`gather_and_maybe_dequant_cache`."""

GEOMETRY = """Widths of K, k_pe and V, and the rank: DeepSeek's, GLM-4.7-Flash's, narrow K, without rope, MiniCPM3's.
Up-projection, concat and cache: 32768 tokens; attention: 16384, P = 2, rank 0. "In GEMMs" is the up-projection over the bare
product, with K in one piece and with `k_pe` apart (or without rope the same again), from float8 latents; µs a head is the
fewer of the first two. FlashAttention 3: K in one piece, V padded ("+") where it takes no narrower one."""

EXCHANGE = """Two all-gathers, two restores and a cache write in torch beside one packed all-gather and `write_latent_cache`, and
beside stores to the caches of all ranks by one kernel ([peers.md](peers.md)), in a CUDA graph. The last columns are that
kernel's with so many multiprocessors."""

HEADS = """Queries of a rank's tokens to the ranks that have their heads, and outputs back ([peers.md](peers.md)): both ways, in
a CUDA graph, by one all-to-all each way with what packs for it, and by stores to the other ranks. The last column is these with
so many multiprocessors."""

SPLIT = """One layer by tokens, by heads, and as `split="auto"` chooses, by peers: GPU time on the slowest rank.
[scaling.md](scaling.md) has the same beside what is computed, and rank 0 of P played."""

MERGE = """bf16, 128 wide, LSEs in FlashAttention's layout; "torch" is the textbook formula."""

CP_MERGE = """Over a group, 128 heads, in a CUDA graph, µs."""

GATHER = """bf16, widths 192, 192, 128, rank 0. From the first implementation's torch code (six `index_select`; two `cat`
and two `index_select`) to ours. A key that head and tail share counts as one read and two writes."""


VLLM = """Time to first token, median (least), PCP 2 by vLLM 0.26's own code and with the plug-in in turn on one engine; tensor
parallelism on two such GPUs in an earlier run (b629107). What it means: [vllm.md](vllm.md)."""


def table(columns: str, rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    names = columns.split(" | ")
    for cells in (names, ["---"] * len(names), *rows):
        yield f"| {' | '.join(str(cell) for cell in cells)} |"


def us(result: dict[str, Any], names: str, key: str = "gpu_us", digits: int = 0) -> str:
    """Times of paths, such as "40 / 20"; "-" for a path that is not there."""
    return " / ".join(f"{result[name][key]:.{digits}f}" if name in result else "-" for name in names.split(","))


def load(file: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text())


def head(title: str, first: str, text: str) -> Iterator[str]:
    yield from ["", f"## {title}", "", textwrap.fill(f"{first} {text}", 132, break_on_hyphens=False), ""]
    for picture in PICTURES.get(title, []):
        if (ROOT / "docs" / "img" / f"{picture}.svg").is_file():
            yield from [f"![{title}: {picture}](img/{picture}.svg)", ""]


def made_on(file: str) -> str:
    """Of how many GPUs of which kind a file's results are, and of which commit."""
    report = load(file)
    count = f"{file.rsplit('x', 1)[1]} " if "x" in file.rsplit("_", 1)[1] else ""
    return f"{count}{report['hardware']}, {report['commit']}"


def source(file: str) -> str:
    """How a file's results were made."""
    return f"`python -m bench {load(file)['benchmark']}`, {made_on(file)}."


def section(title: str, file: str, text: str, columns: str, cells: Callable[[dict[str, Any]], Iterable[Any]]) -> Iterator[str]:
    """A file's results, a row each."""
    yield from head(title, source(file), text)
    yield from table(columns, map(cells, load(file)["results"]))


def by_stages(stages: dict[str, float]) -> str:
    """Host time of checks, exchange and cache write, of up-projection, and of attention."""
    first = stages["checks"] + stages["exchange"] + stages.get("cache_write", 0.0)  # a stage of its own before the exchange had it
    return " / ".join(f"{t:.0f}" for t in (first, stages["up_project"], stages["attention"]))


def graphs() -> Iterator[str]:
    yield from head("A prefill in CUDA graphs", source("graphs_h100"), GRAPHS)
    paths = "seed,ours,piecewise,peers,one graph,compiled"
    yield from table(
        "GPUs | wall µs, seed / ours / piecewise / peers / one graph / compiled | CPU µs, the same",
        (
            [where, us(r, paths, "wall_us"), us(r, paths, "cpu_us")]
            for where, file in (("H100, played", "graphs_h100"), ("two H200s, NCCL", "graphs_h200x2"))
            for r in load(file)["results"]
        ),
    )


def evaluation() -> Iterator[str]:
    runs = [load(file) for file in ("eval_h100", "eval_cached_h100", "eval_fp8_h100")]
    yield from head("Accuracy", f"`python -m pcp_mla eval --pcp 1 2 4 8 --limit 500`, {runs[0]['hardware']}.", EVALUATION)
    rows = []
    for report in runs:
        mode = f"chunks of {report['chunk']}, prefix caching" if report["prefix_cache"] else "whole prompts"
        for r in report["runs"]:
            share = f"{r['exact_match']:.4f} ± {r['stderr']:.4f}"
            rows.append([mode, r["run"], share, f"{r['same_text']}/{report['problems']}", f"{r['logit_difference']:.2f}"])
    yield from table("prefill | P | exact match | same text | largest difference of logits", rows)


def attention() -> Iterator[str]:
    """Our kernels with all that they take, and libraries beside the first of them."""
    yield from head("Attention", source("attention_h100"), ATTENTION)
    rows = []
    for r in load("attention_h100")["results"]:
        for kernel in ("cuda", "triton"):
            if kernel not in r:
                continue
            names = [f"{kernel}{form}" for form in ("", " K", " rows", " blocks of rows", " random rows", " prev")]
            names += ["fa3", "fa2"]
            cells = [f"{r[n]['tflops']:.0f} ({r[n]['gpu_us']:.0f})" if n in r else "" for n in names]
            rows.append([r["tokens"], r["heads"], r["P"], kernel, *cells])
    forms = "k_pe apart | K | rows in order | blocks of rows | random rows | prev"
    yield from table(f"T | heads | P | kernel | {forms} | FA3 | FA2", rows)


def attention_cells(r: dict[str, Any]) -> list[str]:
    """TFLOP/s of our kernel and of FlashAttention 3, and the former's share of the latter."""
    ours = max(numbers["tflops"] for name, numbers in r.items() if name.split(" ")[0] in ("cuda", "triton"))
    beside = next((name for name in ("fa3", "fa3 padded") if name in r), None)
    if beside is None:
        return [f"{ours:.0f}", "-", "-"]
    theirs = r[beside]["tflops"]
    return [f"{ours:.0f}", f"{theirs:.0f}{'' if beside == 'fa3' else ' +'}", f"{ours / theirs:.0%}"]


def geometries() -> Iterator[str]:
    """A row a geometry, from the results of its ops."""
    yield from head("Other geometries", source("geometry_h100"), GEOMETRY)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for r in load("geometry_h100")["results"]:
        rows.setdefault((geometry_name(r), r["heads"]), {})[r["op"]] = r
    cells = []
    for (name, heads), ops in rows.items():
        up, concat = ops["kv_up_project"], ops.get("concat_k")
        shares = " / ".join(f"{up[path]['of_gemm']:.2f}" for path in ("auto", "apart", "float8"))
        best = min(up[path]["gpu_us"] for path in ("auto", "apart"))
        caches = [ops[op] for op in ("write_latent_cache", "gather_latents") if op in ops]
        cache = [f"{r['auto']['share_of_copy']:.0%}" for r in caches] or ["-", "-"]
        cells.append(
            [
                name,
                heads,
                us(up, "gemm,auto,apart,float8"),
                shares,
                f"{best / heads:.1f} / {up['float8']['gpu_us'] / heads:.1f}",
                "-" if concat is None else f"{concat['auto']['share_of_copy']:.0%}",
                *cache,
                *attention_cells(ops["attention"]),
            ]
        )
    yield from table(
        "K + k_pe / V | heads | up-projection, µs, GEMM / ours / apart / float8 | in GEMMs | µs a head, bf16 / float8 "
        "| concat, share of copy | cache write | gather | attention, TFLOP/s | FA3 | of FA3",
        cells,
    )


def ranks_cells(r: dict[str, Any]) -> list[Any]:
    times = (us(r, "seed,rows,ours,peers_fa3,peers", key) for key in ("launches", "wall_us", "cpu_us"))
    return [f"{r['tokens']} ({r['requests']})", r["P"], *times, f"{r['peers']['efficiency']:.2f}"]


def exchange_cells(r: dict[str, Any]) -> list[Any]:
    times = (us(r, "seed,ours,peers", key, digits) for key, digits in (("launches", 0), ("graph_us", 1), ("cpu_us", 0)))
    return [r["tokens"], r["ranks"], *times, " / ".join(f"{t:.0f}" for t in r["peers"]["by_sms"].values()) or "-"]


def heads_cells(r: dict[str, Any]) -> list[Any]:
    times = (us(r, "nccl,peers", key, digits) for key, digits in (("launches", 0), ("graph_us", 1), ("cpu_us", 0)))
    by_sms = " / ".join(f"{t:.0f}" for t in r["peers"]["by_sms"].values()) or "-"
    return [r["tokens"], r["ranks"], r["heads"], f"{r['bytes'] / 1e6:.0f}", *times, by_sms]


def merge_cells(r: dict[str, Any]) -> list[Any]:
    best = "auto out=" if "auto out=" in r else "auto"
    return [
        r["partials"],
        r["tokens"],
        r["heads"],
        f"{r['bytes'] / 1e6:.0f}",
        us(r, f"torch,vllm,{best}", digits=1),
        f"{r[best]['share_of_copy']:.0%}",
        us(r, f"vllm,{best}", "graph_us", 1),
        us(r, f"vllm,{best}", "cpu_us"),
    ]


def vllm() -> Iterator[str]:
    """Every prompt, and beside PCP tensor parallelism on the same GPUs where it was timed."""
    rows = []
    for file in ("vllm_v2-lite_h200x2", "vllm_v3-4l_h200x2"):
        results = [r for r in load(file)["results"] if r["case"] == "ttft"]
        tensor = {(r["prompt"], r["step_tokens"]): r for r in results if r["tp"] > 1}
        for r in results:
            if r["pcp"] > 1:
                times = [f"{r[f'{side}_ms']:.1f} ({r[f'{side}_min_ms']:.1f})" for side in ("vllm", "ours")]
                beside = tensor.get((r["prompt"], r["step_tokens"]))
                other = "-" if beside is None else f"{beside['vllm_ms']:.1f} ({beside['vllm_min_ms']:.1f})"
                rows.append([r["model"], r["prompt"], r["step_tokens"], *times, f"{r['vllm_ms'] / r['ours_ms']:.2f}", other])
    yield from head("Inside vLLM", source("vllm_v2-lite_h200x2").replace("bench vllm", "bench.vllm"), VLLM)
    yield from table("model | prompt | tokens a step | vLLM, ms | with the plug-in, ms | times | TP 2, ms", rows)


def lines() -> Iterator[str]:
    yield HEAD
    yield from section(
        "The layer",
        "layer_h100",
        LAYER,
        "new tokens (cached) | requests | heads | P | launches, seed / rows / FA3 / ours | GPU µs, the same | seed / ours "
        "| share of the floor | CPU µs, the same | ours by stages",
        lambda r: [
            f"{r['tokens']} ({r['context']})" if r["context"] else r["tokens"],
            r["requests"],
            r["heads"],
            r["P"],
            us(r, "seed,rows,ours_fa3,ours", "launches"),
            us(r, "seed,rows,ours_fa3,ours"),
            f"{r['seed']['gpu_us'] / r['ours']['gpu_us']:.2f}",
            f"{r['ours']['share_of_floor']:.0%}",
            us(r, "seed,rows,ours_fa3,ours", "cpu_us"),
            by_stages(r["ours"]["stages_cpu_us"]),
        ],
    )
    yield from graphs()
    yield from evaluation()
    yield from section(
        "The layer on real ranks",
        "layer_h200x2",
        RANKS,
        "tokens (requests) | P | launches, seed / rows / collective / peers, FA3 / peers | wall µs | CPU µs | efficiency of peers",
        ranks_cells,
    )
    yield from attention()
    yield from section(
        "Up-projection and concat",
        "kv_up_project_h100",
        UP_PROJECT,
        "op | T | heads | GPU µs, GEMM / torch / ours / Triton / `k_pe` apart | ours in GEMMs, apart | share "
        "| CPU µs, torch / ours",
        lambda r: [
            f"`{r['op']}`",
            r["tokens"],
            r["heads"],
            us(r, "gemm,torch,auto,triton,apart"),
            f"{r['auto']['of_gemm']:.2f}, {r['apart']['of_gemm']:.2f}" if r["flops"] else "-",
            "-" if r["flops"] else f"{r['auto']['share_of_copy']:.0%}",
            us(r, "torch,auto", "cpu_us"),
        ],
    )
    yield from geometries()
    yield from section(
        "Latent cache",
        "latent_cache_h100",
        CACHE,
        "op | T | GPU µs, torch / vLLM / ours | share | of a 4 GiB copy's bandwidth | graph µs, vLLM / ours | CPU µs, vLLM / ours",
        lambda r: [
            f"`{r['op']}`",
            r["tokens"],
            us(r, "torch,vllm,auto", digits=1),
            f"{r['auto']['share_of_copy']:.0%}",
            f"{r['auto']['share_of_bandwidth']:.0%}",
            us(r, "vllm,auto", "graph_us", 1),
            us(r, "vllm,auto", "cpu_us"),
        ],
    )
    yield from section(
        "Exchange and cache write",
        "exchange_h200x2",
        EXCHANGE,
        "T | P | launches, seed / collective / peers | graph µs, seed / collective / peers | CPU µs, the same "
        "| peers, 1 / 2 / 4 / 8 / 16 / 32 SMs",
        exchange_cells,
    )
    yield from section(
        "Exchange beside a projection",
        "overlap_h200x2",
        OVERLAP,
        "T | P | exchange | projection alone | one behind the other | side by side",
        lambda r: [r["tokens"], r["ranks"], r["exchange"], *(us(r, path) for path in ("projection", "serial", "beside"))],
    )
    yield from section(
        "Exchange of heads",
        "heads_h200x2",
        HEADS,
        "T | P | heads | MB a rank sends | launches, collective / peers | graph µs, collective / peers | CPU µs, the same "
        "| peers, 8 / 16 / 32 / 64 SMs",
        heads_cells,
    )
    yield from section(
        "The layer by tokens and by heads",
        "split_h200x2",
        SPLIT,
        "new tokens (cached) | heads | P | launches, tokens / heads | µs, tokens / heads / auto | tokens / heads",
        lambda r: [
            f"{r['tokens']} ({r['context']})",
            r["heads"],
            r["P"],
            us(r, "by_tokens,by_heads", "launches"),
            us(r, "by_tokens,by_heads,auto"),
            f"{r['by_tokens']['gpu_us'] / r['by_heads']['gpu_us']:.2f}",
        ],
    )
    yield from section(
        "Merges",
        "merge_states_h100",
        MERGE,
        "partials | T | heads | MB | GPU µs, torch / vLLM / ours | share | graph µs, vLLM / ours | CPU µs, vLLM / ours",
        merge_cells,
    )
    yield from section(
        "Merges over a group",
        "cp_merge_h200x2",
        CP_MERGE,
        "op | ranks | rows | width | torch + NCCL / ours",
        lambda r: [f"`{r['op']}`", r["ranks"], r["rows"], r["dim"], us(r, "torch,ours", "graph_us")],
    )
    yield from section(
        "Gather and restore around two calls",
        "fused_gather_h100",
        GATHER,
        "op | T | heads | P | MB | launches, seed / ours | GPU µs, seed / ours | share | CPU µs, seed / ours / ours with `out=`",
        lambda r: [
            f"`pcp_{r['op']}`",
            r["tokens"],
            r["heads"],
            r["P"],
            f"{r['bytes'] / 1e6:.0f}",
            us(r, "seed,auto", "launches"),
            us(r, "seed,auto out="),
            f"{r['auto out=']['share_of_copy']:.0%}",
            us(r, "seed,auto,auto out=", "cpu_us"),
        ],
    )
    yield from vllm()


if __name__ == "__main__":
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines()) + "\n")
