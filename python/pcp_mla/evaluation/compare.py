"""Whether the answers of two runs differ by more than rounding, and the table of all runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..demo.outcome import is_within, largest_difference
from .answers import Answer
from .problems import EXAMPLES, Item


@dataclass
class Score:
    """A run beside the stock model's.

    Attributes:
        run: ``stock`` or the number of ranks.
        exact_match, stderr: share of right answers, and its standard error as lm-eval has it, sqrt(p (1 - p) / (n - 1)).
        same_text: answers that are the stock model's token by token.
        other_verdict: answers that are right where the stock model's is wrong, or the other way round.
        logit_difference: largest, over the steps that chose from the same text.
        largest_margin: of the parted answers, by how much the stock model preferred its token where they part.
        unexplained: answers whose logits differ by more than rounding can move one, or that part where the margin is more than it
            can move two, or that end early.
    """

    run: str
    exact_match: float
    stderr: float
    same_text: int
    other_verdict: int
    logit_difference: float
    largest_margin: float
    unexplained: int


def score(run: str, answers: list[Answer], stock: list[Answer], items: list[Item], tolerance: float) -> Score:
    """Compare a run's answers with the stock model's: one Score. RuntimeError unless there is one for each item."""
    if len(answers) != len(items):
        who = "the stock model" if run == "stock" else f"the model at P = {run}"
        raise RuntimeError(f"eval: {who} gave {len(answers)} answers to {len(items)} problems")
    right = [answer.is_right(item) for answer, item in zip(answers, items, strict=True)]
    share, count = sum(right) / len(items), len(items)
    result = Score(run, share, math.sqrt(share * (1 - share) / max(1, count - 1)), 0, 0, 0.0, 0.0, 0)
    for answer, wanted, item in zip(answers, stock, items, strict=True):
        pairs = zip(answer.tokens, wanted.tokens, strict=False)
        parting = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        steps = min(len(answer.tokens), len(wanted.tokens)) if parting is None else parting + 1
        largest, margin = largest_difference(answer.logits[:steps], wanted.logits[:steps]), 0.0
        result.logit_difference = max(result.logit_difference, largest)
        result.other_verdict += answer.is_right(item) != wanted.is_right(item)
        # Rounding changes a token, and never leaves some out.
        explained = parting is not None or len(answer.tokens) == len(wanted.tokens)
        if parting is None:
            result.same_text += explained
        else:
            row = wanted.logits[parting]
            margin = float(row[wanted.tokens[parting]] - row[answer.tokens[parting]])
            result.largest_margin = max(result.largest_margin, margin)
        explained &= is_within(largest, tolerance) and margin <= 2 * tolerance
        result.unexplained += not explained
    return result


_HEAD = "|  Tasks   |n-shot| PCP |  Metric   |   |Value |   |Stderr|same text|other verdict|logit diff|"
_RULE = "|----------|-----:|----:|-----------|---|-----:|---|-----:|--------:|------------:|---------:|"


def table(scores: list[Score], count: int) -> str:
    """lm-eval's table with a row for each run, and what differs from the stock model."""
    rows = [
        f"|arithmetic|{EXAMPLES:6}|{s.run:>5}|exact_match|↑  |{s.exact_match:.4f}|±  |{s.stderr:.4f}"
        f"|{s.same_text:4}/{count:<4}|{s.other_verdict:13}|{s.logit_difference:10.1e}|"
        for s in scores
    ]
    return "\n".join([_HEAD, _RULE, *rows])


def as_json(scores: list[Score]) -> list[dict[str, object]]:
    return [asdict(score) for score in scores]
