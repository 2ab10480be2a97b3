"""Which experts a model's routers choose, and what to do where the choice is a tie.

Two experts whose scores differ by less than float32's rounding error are chosen by accident: a sum in another order turns the
choice over, and the logits of all later tokens move with it. In a long text there are some such ties. A run that is compared with
the stock model therefore breaks them as the stock model did; a choice that differs by more than a tie is left as it is, and shows.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import dtype_name


@dataclass
class Routing:
    """What every MoE layer chose: per layer, experts int64 [tokens, k] and their weights [tokens, k]."""

    experts: list[torch.Tensor]
    weights: list[torch.Tensor]

    def rows(self, index: torch.Tensor) -> Routing:
        """The tokens at ``index``, on its device."""
        return Routing(*([x.to(index.device)[index] for x in part] for part in (self.experts, self.weights)))


# Numbers that a layer rounds to its dtype one after another: norms, projections, scores, outputs, sums.
_ROUNDINGS = 10


def rounding_share(layers: int, hidden: int, dtype: torch.dtype) -> tuple[float, str]:
    """How far results of a model may be apart, as a share of the largest of them, and how that was worked out.

    In float32 8 eps sqrt(layers * hidden): every layer adds up ``hidden`` products per number, in an order that depends on how many
    tokens are computed at once; independent rounding errors grow with the square root of their number, and 8 is for all that this
    leaves out. Narrower types are summed in float32 and what counts is that all in between is rounded to them, by half an eps some
    ten times a layer, twice that: eps sqrt(layers * 10).
    """
    factor, each, name = (8, hidden, "hidden") if dtype == torch.float32 else (1, _ROUNDINGS, "roundings")
    eps = torch.finfo(dtype).eps
    words = f"{factor} x {dtype_name(dtype)} eps {eps:.2e} x sqrt({layers} layers x {each} {name})"
    return factor * eps * math.sqrt(layers * each), words


def tie_share(layers: int, hidden: int, dtype: torch.dtype) -> float:
    """Scores that differ by less than this share of the largest are a tie. In narrow types ties of whole groups of experts are no
    rarity, and turn over choices whose own scores are further apart."""
    return rounding_share(layers, hidden, dtype)[0] * (1 if dtype == torch.float32 else 8)


def chosen_apart(scores: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[tokens]: how far apart the scores of two choices are. ``scores`` [tokens, experts], ``ours`` and ``theirs`` [tokens, k].

    The largest score that only one choice holds, less the smallest that only the other holds; 0 where the two are the same set.
    """
    held = torch.zeros_like(scores, dtype=torch.bool)
    a, b = held.scatter(1, ours, True), held.scatter(1, theirs, True)
    only_one = a ^ b
    high = scores.masked_fill(~only_one, -math.inf).amax(dim=1)
    low = scores.masked_fill(~only_one, math.inf).amin(dim=1)
    return torch.where(only_one.any(dim=1), high - low, torch.zeros_like(high))


class RecordRouting(AbstractContextManager["RecordRouting"]):
    """Records what the routers of ``model`` choose while the context lasts; with ``stock``, ties are broken as it has them.

    Args:
        stock: the stock model's choices for the tokens that this run computes, in their order; more tokens than those may follow.
        tie: scores that differ by less than this share of the largest score are a tie.
    """

    def __init__(self, model: Any, stock: Routing | None = None, tie: float = 0.0) -> None:
        self._routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self._stock, self._tie = stock, tie
        self._hooks: list[Any] = []
        self.routing = Routing([], [])
        self.ties = 0

    def _record(self, _module: Any, _inputs: Any, output: Any) -> Any:
        scores, weights, experts = output
        if self._stock is not None:
            layer = len(self.routing.experts)
            wanted, wanted_weights = self._stock.experts[layer], self._stock.weights[layer]
            known = len(wanted)
            apart = chosen_apart(scores[:known], experts[:known], wanted)
            is_tie = (apart > 0) & (apart <= self._tie * scores.abs().max())
            self.ties += int(is_tie.sum())
            experts, weights = experts.clone(), weights.clone()
            experts[:known][is_tie] = wanted[is_tie]
            weights[:known][is_tie] = wanted_weights[is_tie].to(weights.dtype)
        self.routing.experts.append(experts)
        self.routing.weights.append(weights)
        return scores, weights, experts

    def __enter__(self) -> RecordRouting:
        self._hooks = [router.register_forward_hook(self._record) for router in self._routers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
