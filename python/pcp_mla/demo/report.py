"""The demo's result as numbers, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .outcome import Comparison, Outcome, compare, is_within
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
    """One line of the table. Launches and times are those of the rank with the most, what differs is of the rank furthest off."""

    pcp: int
    backend: str
    tokens_per_rank: list[int]
    comparison: Comparison
    seed_launches: int
    our_launches: int
    seed_milliseconds: float
    our_milliseconds: float
    layer_difference: float
    layer_tolerance: float
    routing_ties: int
    logits_agree: bool
    text_agrees: bool
    layer_agrees: bool

    @property
    def agrees(self) -> bool:
        return self.logits_agree and self.text_agrees and self.layer_agrees


def _furthest(comparison: Comparison) -> float:
    return max(comparison.logit_difference, comparison.second_difference)


def _is_tie(comparison: Comparison, tolerance: Tolerance) -> bool:
    """Whether rounding explains that the texts part."""
    return comparison.parting_margin is not None and comparison.parting_margin <= 2 * tolerance.value


def _logits_agree(comparison: Comparison, tolerance: Tolerance) -> bool:
    return is_within(_furthest(comparison), tolerance.value)


def _text_agrees(comparison: Comparison, tolerance: Tolerance) -> bool:
    return comparison.parts_at is None or _is_tie(comparison, tolerance)


def make_row(stock: Outcome, results: list[RankResult], backend: str, tokens_per_rank: list[int], tolerance: Tolerance) -> PCPRow:
    # Every rank holds all logits.
    comparisons = [compare(stock, result.outcome) for result in results]
    comparison = max(comparisons, key=lambda c: (not (_logits_agree(c, tolerance) and _text_agrees(c, tolerance)), _furthest(c)))
    layer = max((result.costs for result in results), key=lambda costs: (not costs.agrees, costs.difference))
    return PCPRow(
        pcp=len(results),
        backend=backend,
        tokens_per_rank=tokens_per_rank,
        comparison=comparison,
        seed_launches=max(result.costs.seed.launches for result in results),
        our_launches=max(result.costs.ours.launches for result in results),
        seed_milliseconds=max(result.costs.seed.milliseconds for result in results),
        our_milliseconds=max(result.costs.ours.milliseconds for result in results),
        layer_difference=layer.difference,
        layer_tolerance=layer.tolerance,
        routing_ties=sum(result.outcome.ties for result in results),
        logits_agree=_logits_agree(comparison, tolerance),
        text_agrees=_text_agrees(comparison, tolerance),
        layer_agrees=layer.agrees,
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
            near = "a tie within the tolerance" if _is_tie(c, tolerance) else "no tie"
            lines.append(f"P={row.pcp}: at the parting the stock logits of the two tokens are {c.parting_margin:.2e} apart: {near}")
        if row.routing_ties:
            lines.append(f"P={row.pcp}: {row.routing_ties} routings were ties within rounding, broken as in the stock model")
        if c.expert_changes:
            lines.append(
                f"P={row.pcp}: {c.expert_changes} expert choices differ by more than a tie, and change the logits from there on"
            )
    return lines


def failures(rows: list[PCPRow], tolerance: Tolerance) -> list[str]:
    """What is wrong and at which P; nothing if the model under PCP is the stock model."""
    reasons = []
    if not tolerance.value > 0:
        reasons.append("the stock model's logits are all zero: that others are the same shows nothing")
    for what, apart in (
        ("logits beyond the tolerance", [str(row.pcp) for row in rows if not row.logits_agree]),
        ("the continuation parts from the stock model's without a tie", [str(row.pcp) for row in rows if not row.text_agrees]),
    ):
        if apart:
            reasons.append(f"{what}, P = {', '.join(apart)}")
    for row in rows:
        if not row.layer_agrees:
            by = f"{row.layer_difference:.2e}, more than {row.layer_tolerance:.2e}"
            reasons.append(f"a layer's output differs from the seed path's by {by}, P = {row.pcp}")
    return reasons


def as_json(facts: dict[str, Any], rows: list[PCPRow], tolerance: Tolerance) -> dict[str, Any]:
    lines = [asdict(row) | {"agrees": row.agrees} for row in rows]
    return {**facts, "tolerance": asdict(tolerance), "rows": lines, "agrees": not failures(rows, tolerance)}
