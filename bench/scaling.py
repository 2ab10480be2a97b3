"""python -m bench.scaling: the tables of docs/scaling.md, what a layer costs by tokens and by heads, from the rates of a GPU.

Nothing is measured here. Ranks are in nodes of eight: within one by peers, between nodes by collectives over the network.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pcp_mla import MLADims
from pcp_mla.plan.split_cost import (
    NETWORK,
    NODE,
    attention_pairs,
    attention_seconds,
    head_exchange_seconds,
    over_nodes,
    rates_of,
    up_project_seconds,
)

ITEM = 2  # bytes of a value
MEASURED = ("split_h200x2", "split_h200")  # in results/: two GPUs, and rank 0 played on one
RATES = rates_of("H100")
WORLDS = (2, 4, 8, 16, 32, 64)
STEPS = [(8192, 0), (32768, 0), (131072, 0), (8192, 57344), (8192, 122880)]


def costs(new: int, context: int, heads: int, world: int) -> tuple[float, float, float]:
    """Microseconds of a layer: by tokens; by heads, queries and outputs beyond a node over the network; by heads within a node and
    tokens over the nodes."""
    dims = MLADims(heads, 128, 64, 128, 512)
    pairs, keys, rows = attention_pairs([new], [context]), new + context, -(-new // world)
    nodes, inside, far = max(1, world // NODE), min(world, NODE), max(0, world - NODE) / world
    near, latents = RATES.peers, new * dims.latent_dim * ITEM
    wire = near._replace(launch=RATES.collective.launch) if far else near
    publish = wire.launch + latents * ((world - 1) / world / wire.rate + far / NODE / NETWORK) if world > 1 else 0.0

    def compute(of: int, share: float) -> float:
        """Of so many heads, for so much of all queries."""
        return publish + up_project_seconds(RATES, dims, keys, of) + attention_seconds(RATES, dims, pairs * share, of)

    if world == 1:
        return (compute(heads, 1) * 1e6,) * 3
    over_all = head_exchange_seconds(over_nodes(wire, world), dims, rows, world, ITEM)
    within = head_exchange_seconds(near, dims, rows, inside, ITEM)
    by_heads = compute(-(-heads // world), 1) + over_all if heads >= world else math.inf
    by_tokens, nested = compute(heads, 1 / world), compute(-(-heads // inside), 1 / nodes) + within
    return by_tokens * 1e6, by_heads * 1e6, nested * 1e6


def first(pays: Callable[[int], bool], limit: int = 2**20) -> str:
    """The least number that pays, from which on all do."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return str(high) if high < limit else "-"


def table(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n| {' | '.join('---' for _ in columns)} |"


def lines() -> Iterator[str]:
    """Of all tables, in the order of the page."""
    worlds = [f"P = {world}" for world in WORLDS]
    yield table("gemm", "attention", "peers", "collective", "network")
    ways = (f"{wire.launch:g}, {wire.rate:g}" for wire in (RATES.peers, RATES.collective))
    yield f"| {RATES.gemm:g} | {RATES.attention:g} | {' | '.join(ways)} | {NETWORK:g} |"
    yield table("new (cached)", "heads", "P = 1", *worlds)
    for heads in (16, 128):
        for new, context in STEPS:
            cells = [costs(new, context, heads, 1)[:1], *(costs(new, context, heads, p)[: 2 + (p > NODE)] for p in WORLDS)]
            texts = (" / ".join("-" if us == math.inf else f"{us:.0f}" for us in cell) for cell in cells)
            yield f"| {new} ({context}) | {heads} | {' | '.join(texts)} |"
    yield table("new (cached)", "heads", *worlds)
    for heads in (16, 128):
        for new, context in STEPS:
            ideal = {p: costs(new, context, heads, 1)[0] / p for p in WORLDS}
            ways = {p: costs(new, context, heads, p) for p in WORLDS}
            texts = (f"{ideal[p] / ways[p][0]:.2f} / {ideal[p] / min(ways[p]):.2f}" for p in WORLDS)
            yield f"| {new} ({context}) | {heads} | {' | '.join(texts)} |"
    yield table("heads pay from", "heads", *worlds)
    for heads in (16, 128):
        for what, new in (("new tokens, none cached", 0), ("cached tokens, 8192 new", 8192)):

            def pays(n: int, p: int, heads: int = heads, new: int = new) -> bool:
                by_tokens, *others = costs(new or n, n if new else 0, heads, p)
                return min(others) < by_tokens

            yield f"| {what} | {heads} | {' | '.join(first(lambda n, p=p, pays=pays: pays(n, p)) for p in WORLDS)} |"
    yield table("new (cached)", "heads", "P", "GPUs", "measured", "by the formula")
    results = Path(__file__).resolve().parent / "results"
    for file, gpus in zip(MEASURED, (2, 1), strict=True):
        for r in json.loads((results / f"{file}.json").read_text())["results"]:
            step = r["tokens"], r["context"], r["heads"], r["P"]
            times = " / ".join(f"{r[way]['gpu_us']:.0f}" for way in ("by_tokens", "by_heads"))
            formula = " / ".join(f"{us:.0f}" for us in costs(*step)[:2])
            yield f"| {step[0]} ({step[1]}) | {step[2]} | {step[3]} | {gpus} | {times} | {formula} |"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
