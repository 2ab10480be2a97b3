"""What a run of a model gives, stock or under PCP, and how two runs compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..groups import Group, all_gather_rows, group_rank, group_world_size
from ..plan.metadata import PCPMetadata
from .models import bound_memory
from .routing import RecordRouting, Routing, tie_share


@dataclass
class Work:
    """What both models do: read ``prompt`` (under PCP in steps of ``chunk_tokens``, shared out by ``split``), continue it by
    ``count`` greedy tokens, and read ``second``, whose first ``shared`` tokens are the prompt's (under PCP they are in the cache).
    """

    prompt: list[int]
    count: int
    chunk_tokens: int
    second: list[int]
    shared: int
    split: str = "auto"

    @classmethod
    def make(cls, prompt: list[int], count: int, chunk_tokens: int | None, split: str = "auto") -> Work:
        """A second prompt of the first quarter and the last one; a single step by default."""
        shared = max(1, len(prompt) // 4)
        size = len(prompt) if chunk_tokens is None else min(chunk_tokens, len(prompt))
        return cls(prompt, count, size, prompt[:shared] + prompt[-shared:], shared, split)


@dataclass
class Outcome:
    """``logits`` [T, vocabulary] of the prompt; ``tokens`` [n] its greedy continuation; ``step_logits`` [n, vocabulary] that each
    was chosen from; ``experts`` [T, choices of all MoE layers], sorted within a layer; ``second_logits`` of the second prompt's
    tokens behind the shared ones; ``ties``: choices for this rank's tokens that were broken as the stock model broke them. On the
    CPU."""

    logits: torch.Tensor
    tokens: list[int]
    step_logits: torch.Tensor
    experts: torch.Tensor
    second_logits: torch.Tensor
    ties: int = 0


@dataclass
class StockRouting:
    """How the stock model routed the two prompts, on the CPU."""

    prompt: Routing
    second: Routing


@dataclass
class Comparison:
    """One run against the stock one.

    ``logit_difference``: largest over the prompt and the continuation's steps, up to where it parts. ``second_difference``: largest
    over the second prompt. ``same_argmax``: share of the prompt's tokens. ``parts_at``: first token of the continuation that
    differs, None if none does. ``parting_margin``: how far apart the stock logits of the two tokens are there.
    ``expert_changes``: expert choices for the prompt's tokens that differ.
    ``continuation``: the run's own.
    """

    logit_difference: float
    second_difference: float
    same_argmax: float
    parts_at: int | None
    parting_margin: float | None
    expert_changes: int
    continuation: list[int]


def _continue(logits: torch.Tensor, count: int, step: Callable[[int], torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after the last row of ``logits``; ``step(token)`` gives the next row [vocabulary]."""
    rows = [logits[-1]]
    tokens = [int(rows[-1].argmax())]
    while len(tokens) < count:
        rows.append(step(tokens[-1]))
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows).cpu()


def _sorted_experts(routing: Routing, tokens: int, device: torch.device) -> torch.Tensor:
    """[tokens, choices of all layers], sorted within a layer."""
    layers = [experts[:tokens].sort(dim=-1).values for experts in routing.experts]
    return torch.cat(layers, dim=1) if layers else torch.empty(tokens, 0, dtype=torch.int64, device=device)


@torch.no_grad()
def run_stock(model: Any, work: Work) -> tuple[Outcome, StockRouting]:
    """The model as it is, in one process, each prompt in one pass, with transformers' own cache for the continuation."""
    from ..integrations.transformers.caches import CACHE_WORD

    device = model.lm_head.weight.device
    bound_memory(model, len(work.prompt))
    with RecordRouting(model) as record:
        first = model(torch.tensor([work.prompt], device=device), use_cache=True)
    cache = {CACHE_WORD: first[CACHE_WORD]}

    def step(token: int) -> torch.Tensor:
        return model(torch.tensor([[token]], device=device), **cache, use_cache=True).logits[0, -1]

    tokens, rows = _continue(first.logits[0], work.count, step)
    experts = _sorted_experts(record.routing, len(work.prompt), device)
    with RecordRouting(model) as second:
        second_logits = model(torch.tensor([work.second], device=device), use_cache=False).logits[0, work.shared :]
    routings = (r.routing.rows(torch.arange(len(text))) for r, text in ((record, work.prompt), (second, work.second)))
    return Outcome(first.logits[0].cpu(), tokens, rows, experts.cpu(), second_logits.cpu()), StockRouting(*routings)


def _run_steps(
    model: Any, group: Group, text: list[int], cached: int, size: int, stock: Routing
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A request of ``text`` in steps of ``size`` tokens, but for its first ``cached`` tokens, which the last request begins with.

    Logits, experts and ties as in :class:`Outcome`, of the tokens that were not cached.
    """
    from ..integrations.transformers import extend, prefill

    device = model.lm_head.weight.device
    tie = tie_share(model.config.num_hidden_layers, model.config.hidden_size, model.dtype)
    logits, experts, ties = [], [], 0
    for start in range(cached, len(text), size):
        new = text[start : start + size]
        meta = PCPMetadata.build([len(new)], world_size=group_world_size(group), rank=group_rank(group), device=device)
        with RecordRouting(model, stock.rows(meta.local_token_indices + start), tie) as record:
            if start > cached:
                logits.append(extend(model, [new]))
            else:
                logits.append(prefill(model, [new], prefix=[(0, cached) if cached else None]))
        local = _sorted_experts(record.routing, meta.num_tokens, device)
        padded = local.new_zeros(meta.num_tokens_padded, local.shape[1])
        padded[: meta.num_tokens] = local
        experts.append(all_gather_rows(padded, group).index_select(0, meta.hidden_restore_idx))
        ties += record.ties
    return torch.cat(logits), torch.cat(experts), ties


@torch.no_grad()
def run_pcp(model: Any, group: Group, work: Work, stock: StockRouting) -> Outcome:
    """The same under PCP; every rank gets the whole outcome. ``model`` is put under PCP and left so. Routing ties are broken as in
    ``stock``."""
    from ..integrations.transformers import decode, enable_pcp

    enable_pcp(model, group, split=work.split)
    logits, experts, ties = _run_steps(model, group, work.prompt, 0, work.chunk_tokens, stock.prompt)
    tokens, rows = _continue(logits, work.count, lambda token: decode(model, [token])[0])
    second, _, more_ties = _run_steps(model, group, work.second, work.shared, work.chunk_tokens, stock.second)
    return Outcome(logits.cpu(), tokens, rows, experts.cpu(), second.cpu(), ties + more_ties)


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Infinite where the shapes differ or something is no number: neither must look like agreement."""
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours - theirs).abs().nan_to_num(nan=math.inf, posinf=math.inf).max()) if ours.numel() else 0.0


def is_within(difference: float, tolerance: float) -> bool:
    """Never for an infinite difference: where numbers are infinite, a tolerance that is a share of them is so, too."""
    return math.isfinite(difference) and difference <= tolerance


def compare(stock: Outcome, other: Outcome) -> Comparison:
    common = min(len(stock.tokens), len(other.tokens))
    parts_at = next((i for i in range(common) if stock.tokens[i] != other.tokens[i]), None)
    if parts_at is None and len(stock.tokens) != len(other.tokens):
        parts_at = common
    # Past the parting the two continue different texts; the step where they part still has the same text before it.
    steps = len(stock.tokens) if parts_at is None else parts_at + 1
    margin = None
    if parts_at is not None and parts_at < common:
        row = stock.step_logits[parts_at]
        margin = float(row[stock.tokens[parts_at]] - row[other.tokens[parts_at]])
    same_shape = other.logits.shape == stock.logits.shape
    return Comparison(
        logit_difference=max(
            largest_difference(other.logits, stock.logits), largest_difference(other.step_logits[:steps], stock.step_logits[:steps])
        ),
        second_difference=largest_difference(other.second_logits, stock.second_logits),
        same_argmax=float((other.logits.argmax(-1) == stock.logits.argmax(-1)).double().mean()) if same_shape else 0.0,
        parts_at=parts_at,
        parting_margin=margin,
        expert_changes=int((other.experts != stock.experts).sum()) if same_shape else stock.experts.numel(),
        continuation=other.tokens,
    )
