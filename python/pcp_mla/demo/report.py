"""The demo's result as numbers, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .outcome import Comparison, Outcome, compare
from .ranks import RankResult
from .routing import rounding_share


@dataclass
class Tolerance:
    """``value``: the largest logit's share that rounding may move; see :func:`rounding_share`."""

    value: float
    derivation: str


def make_tolerance(stock: Outcome, layers: int, hidden: int, dtype: torch.dtype) -> Tolerance:
    (share, words), largest = rounding_share(layers, hidden, dtype), float(stock.logits.abs().max())
    return Tolerance(share * largest, f"{words} x largest logit {largest:.3f}")


@dataclass
class PCPRow:
    """One line of the table. Launches and times are those of the rank with the most."""

    pcp: int
    backend: str
    tokens_per_rank: list[int]
    comparison: Comparison
    seed_launches: int
    our_launches: int
    seed_milliseconds: float
    our_milliseconds: float
    layer_difference: float
    routing_ties: int
    agrees: bool


def make_row(stock: Outcome, results: list[RankResult], backend: str, tokens_per_rank: list[int], tolerance: Tolerance) -> PCPRow:
    # Every rank holds all logits: the row shows the rank that is furthest off.
    comparison = max(
        (compare(stock, result.outcome) for result in results), key=lambda c: max(c.logit_difference, c.second_difference)
    )
    return PCPRow(
        pcp=len(results),
        backend=backend,
        tokens_per_rank=tokens_per_rank,
        comparison=comparison,
        seed_launches=max(result.costs.seed.launches for result in results),
        our_launches=max(result.costs.ours.launches for result in results),
        seed_milliseconds=max(result.costs.seed.milliseconds for result in results),
        our_milliseconds=max(result.costs.ours.milliseconds for result in results),
        layer_difference=max(result.costs.difference for result in results),
        routing_ties=sum(result.outcome.ties for result in results),
        agrees=max(comparison.logit_difference, comparison.second_difference) <= tolerance.value,
    )


def _continuation(row: PCPRow, count: int) -> str:
    c = row.comparison
    return f"{count} of {count} equal" if c.parts_at is None else f"parts at {c.parts_at + 1} of {count}"


def format_table(rows: list[PCPRow], count: int, on_gpu: bool) -> str:
    """``count``: tokens of the greedy continuation. Both differences are the largest of any logit."""
    launches = "launches/layer" if on_gpu else "op calls/layer"
    header = ["P", "backend", "tokens/rank", "logit diff", "same argmax", "continuation", "shared prefix"]
    header += [f"{launches} seed", "ours", "ms/layer seed", "ours", "verdict"]
    lines = [header]
    for row in rows:
        low, high = min(row.tokens_per_rank), max(row.tokens_per_rank)
        cells = [
            str(row.pcp),
            row.backend,
            str(low) if low == high else f"{low} to {high}",
            f"{row.comparison.logit_difference:.2e}",
            f"{row.comparison.same_argmax:.2%}",
            _continuation(row, count),
            f"{row.comparison.second_difference:.2e}",
            str(row.seed_launches),
            str(row.our_launches),
            f"{row.seed_milliseconds:.2f}",
            f"{row.our_milliseconds:.2f}",
            "agrees" if row.agrees else "DIFFERS",
        ]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def notes(rows: list[PCPRow], tolerance: Tolerance) -> list[str]:
    """Lines that explain what the table cannot: where texts part, and experts chosen differently."""
    lines = []
    for row in rows:
        c = row.comparison
        if c.parts_at is not None and c.parting_margin is not None:
            near = "a tie within the tolerance" if c.parting_margin <= 2 * tolerance.value else "no tie"
            lines.append(f"P={row.pcp}: at the parting the stock logits of the two tokens are {c.parting_margin:.2e} apart: {near}")
        if row.routing_ties:
            lines.append(f"P={row.pcp}: {row.routing_ties} routings were ties within rounding, broken as in the stock model")
        if c.expert_changes:
            lines.append(
                f"P={row.pcp}: {c.expert_changes} expert choices differ by more than a tie, and change the logits from there on"
            )
    return lines


def as_json(facts: dict[str, Any], rows: list[PCPRow], tolerance: Tolerance) -> dict[str, Any]:
    return {**facts, "tolerance": asdict(tolerance), "rows": [asdict(row) for row in rows], "agrees": all(r.agrees for r in rows)}
