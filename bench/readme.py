"""python -m bench.readme: writes tables in the README and other pages from bench/results. A table is found by its first line.

Numbers within sentences are to be there as :func:`sentences` has them; tests/test_report.py looks at both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from .report import ROOT, load, table, us

# Tokens, heads and ranks of the layer's rows, none of them cached.
LAYER = [(512, 16, 2), (4096, 16, 2), (8192, 16, 2), (16384, 16, 8), (32768, 16, 8), (131072, 16, 8), (32768, 128, 8)]


def find(file: str, **wanted: Any) -> dict[str, Any]:
    """The one result of a file with these values."""
    (result,) = (r for r in load(file)["results"] if all(r.get(name) == value for name, value in wanted.items()))
    return result


def layer() -> Iterable[str]:
    rows = []
    for tokens, heads, ranks in LAYER:
        r = find("layer_h100", tokens=tokens, heads=heads, P=ranks, context=0)
        requests = f" ({r['requests']} requests)" if r["requests"] > 1 else ""
        times = (us(r, "seed,rows,ours", key) for key in ("launches", "gpu_us", "cpu_us"))
        rows.append([f"{tokens}{requests}", heads, ranks, *times])
    columns = "launches, seed / rows / ours | GPU µs, seed / rows / ours | CPU µs, seed / rows / ours"
    return table(f"new tokens | heads | P | {columns}", rows)


def replaced() -> Iterable[str]:
    """Ops beside what they replace, each with the command that times it."""
    project = find("kv_up_project_h100", op="kv_up_project", tokens=32768, heads=16)
    write = find("latent_cache_h100", op="write_latent_cache", tokens=32768)
    merge = find("merge_states_h100", partials=2, tokens=4096, heads=128)
    attention = find("attention_h100", tokens=16384, heads=16, P=2)
    exchange = find("exchange_h200x2", tokens=8192, ranks=2)
    torch_and_ours = "GEMM alone / restore + GEMM + concat in torch / `kv_up_project` / with `k_pe` apart"
    ways = "two all-gathers, restores, write / one all-gather, write / stores to peers"
    what = [
        (f"up-projection, 32768 tokens, 16 heads: {torch_and_ours}", us(project, "gemm,torch,auto,apart"), "kv_up_project"),
        ("cache write, 32768 tokens: vLLM / `write_latent_cache`", us(write, "vllm,auto"), "latent_cache"),
        (
            "merge of two, 4096 tokens, 128 heads: torch / vLLM / `merge_attn_states`",
            us(merge, "torch,vllm,auto out="),
            "merge_states",
        ),
        (
            "attention, 16384 tokens, 16 heads, P = 2: FlashAttention 2 / our Triton kernel / our CUDA kernel / FlashAttention 3",
            us(attention, "fa2,triton,cuda,fa3"),
            "attention",
        ),
        (f"exchange and cache write, 8192 tokens, two H200s: {ways}", us(exchange, "seed,ours,peers", "graph_us"), "exchange"),
    ]
    return table("what | GPU µs | command", ([text, times, f"`python -m bench {name}`"] for text, times, name in what))


def heads_in_vllm() -> Iterable[str]:
    rows = []
    for r in sorted(load("vllm_heads_h200x2")["results"], key=lambda r: r["prompt"]):
        digits = 1 if r["vllm_ms"] < 500 else 0
        sides = [f"{r[f'{side}_ms']:.{digits}f} ({r[f'{side}_min_ms']:.{digits}f})" for side in ("vllm", "ours", "heads")]
        ratios = ", ".join(f"{r[f'ours_{of}'] / r[f'heads_{of}']:.2f}" for of in ("ms", "min_ms"))
        rows.append([r["prompt"], *sides, ratios])
    return table("prompt | vLLM | other parts | with `heads` | other parts / with `heads`, by medians, by the least", rows)


TABLES = {"README.md": (layer, replaced), "docs/vllm.md": (heads_in_vllm,)}


def sentences() -> Iterator[tuple[str, str]]:
    """Parts of pages with numbers in them: the page, and the words."""

    def ttft(file: str, prompt: int, step: int, digits: int = 0) -> str:
        r = find(file, case="ttft", prompt=prompt, step_tokens=step, tp=1)
        return f"{r['vllm_ms']:.{digits}f} / {r['ours_ms']:.{digits}f}"

    def times(prompt: int) -> str:
        r = find("vllm_v3-4l_h200x2", case="ttft", prompt=prompt)
        return f"{r['vllm_ms'] / r['ours_ms']:.2f} times"

    def planned(file: str, path: str, batch: str = "", digits: int = 0, unit: float = 1.0) -> str:
        times = [r[path]["cpu_us"] / unit for r in load(file)["results"] if batch in r["batch"]]
        return f"{min(times):.{digits}f} to {max(times):.{digits}f}"

    batches = ("one 32k prefill", "2 x 8k prefills + 128 decodes", "256 decodes")
    plan = ", ".join(planned("planner_cpu", "plan", batch) for batch in batches)
    in_numpy = ", ".join(planned("planner_cpu", "numpy", batch, 1, 1e3) for batch in batches)
    yield (
        "README.md",
        f"plan() takes {plan} µs for a 32k prefill, two 8k prefills with 128 decodes, 256 decodes; in NumPy {in_numpy} ms",
    )
    yield "README.md", f"one copy and one launch included, {planned('planner_h100', 'plan')} µs"
    (profiled,) = load("profile_h200x2")["results"]
    seed, by_peers = ((profiled[path]["launches"], f"{profiled[path]['range_us']:.0f}") for path in ("seed", "peers"))
    yield "README.md", f"{seed[0]} launches in {seed[1]} µs, ours in {by_peers[0]} and {by_peers[1]}"
    yield "README.md", f"an H100 at {load('layer_h100')['commit']}:"
    short = f"{ttft('vllm_v2-lite_h200x2', 1024, 8192)} at 1k and {ttft('vllm_v2-lite_h200x2', 8192, 8192)} at 8k tokens"
    long = [ttft("vllm_v2-lite_h200x2", 65536, step) for step in (8192, 32768)]
    yield "README.md", f"{short}, {long[0]} at 64k in steps of 8192, {long[1]} in steps of 32768"
    yield "docs/vllm.md", f"(`bench/results/vllm_heads_h200x2.json`, {load('vllm_heads_h200x2')['commit']})"
    eight, long_of_v3 = (ttft("vllm_v3-4l_h200x2", prompt, 8192, 1) for prompt in (8192, 65536))
    yield "docs/vllm.md", f"8k {eight} ms, {times(8192)}; 64k in steps of 8192 {long_of_v3} ms, {times(65536)}"


def filled(page: str, text: str) -> str:
    """The page's text with its tables as they should be; ValueError if one is not there, or twice."""
    for make in TABLES[page]:
        made = "\n".join(make()) + "\n"
        head = made.splitlines()[0]
        text, count = re.subn(rf"^{re.escape(head)}\n(\|.*\n)*", lambda _, made=made: made, text, flags=re.M)
        if count != 1:
            raise ValueError(f"{page} has {count} tables that begin with {head!r}")
    return text


if __name__ == "__main__":
    for page in TABLES:
        path = ROOT / page
        path.write_text(filled(page, path.read_text()))
