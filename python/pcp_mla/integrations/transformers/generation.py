"""Prefills, decode steps and greedy generation of a model under PCP, without padding."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from .calls import in_turn
from .context import PCPContext, context_at_place, context_of
from .model_step import run_step
from .paged_cache import CachedRequests
from .requests import (
    check_count,
    check_logits,
    checked_decodes,
    checked_ends,
    checked_prefix,
    in_chunks,
    last_rows,
    token_list,
    token_lists,
)
from .stand_in import own_logits


def _prefill_hidden(
    model: Any,
    context: PCPContext,
    requests: CachedRequests,
    tokens: list[list[int]],
    chunk_tokens: int | None,
    logits: str,
    decodes: list[bool],
) -> torch.Tensor:
    """Last hidden states of a prefill in steps of ``chunk_tokens``: [sum of lengths, hidden], or for the ``"last"`` logits those
    of each request's last token and of all tokens of decodes."""
    if chunk_tokens is None:
        chunk_tokens = max(1, sum(map(len, tokens)))
    if chunk_tokens < 1:
        raise ValueError(f"prefill: chunk_tokens must be at least 1, got {chunk_tokens}")
    wanted, hidden = last_rows(tokens, decodes) if logits == "last" else None, []
    for step, new in enumerate(in_chunks(tokens, chunk_tokens)):
        first, rows = step * chunk_tokens, None
        if wanted is not None:
            rows = torch.from_numpy(wanted[(wanted >= first) & (wanted < first + chunk_tokens)] - first)
        hidden.append(run_step(model, context, requests, new, decodes, rows=rows))
    return torch.cat(hidden)


@in_turn("prefill")
@torch.no_grad()
def prefill(
    model: Any,
    requests: Sequence[Sequence[int]],
    *,
    chunk_tokens: int | None = None,
    prefix: Sequence[tuple[int, int] | None] | None = None,
    decodes: Sequence[bool] | None = None,
    logits: str = "all",
) -> torch.Tensor:
    """Start new requests; what the cache held is dropped, but for what the new ones share.

    Args:
        requests: token ids of each request, in a list or in a tensor or array of integers; lengths may differ and be 0, not all of
            them.
        chunk_tokens: tokens of a step; a longer prefill takes several steps (chunked prefill). By default one step.
        prefix: for each new request None, or ``(request, tokens)``: it begins with that many tokens of a request that is in the
            cache, whose blocks it shares. They are not computed again, and ``requests`` has the tokens behind them.
        decodes: which requests are decodes, by default none: their tokens, one or those of a draft that is to be verified, are not
            cut over the ranks, but computed by each. A step of decodes alone has no collective. What is not accepted of a draft
            goes by the next call's ``prefix``.
        logits: ``"all"``, or ``"last"`` for those of each request's last token alone, and of a decode's every token: no other
            hidden states are exchanged and projected. No request may be empty then.

    Returns:
        Logits [sum of lengths, vocabulary] in natural order, or, without decodes, [R, vocabulary], on every rank.

    Raises:
        TypeError, ValueError: wrong model, not under PCP or converted since, token ids or prefixes out of range, ``decodes`` that
            are no list of a bool for each request, or name one without a prefix, no token at all, or a call of another thread that
            this one must not go on with.
        RuntimeError: with ``PCP_MLA_CHECK=1``, on every rank, if the ranks' calls or arguments differ, or another rank fails.
    """
    context, lists = context_at_place("prefill", model), token_lists("prefill", model, requests)
    if prefix is not None:
        context.turns.check_owner("prefill")
    check_logits("prefill", logits, lists)
    prefixes = checked_prefix(context, prefix, len(lists))
    chosen = checked_decodes(decodes, prefixes)
    started = context.blocks.fork_prefixes(context.requests, prefixes)
    with context.update(started):
        return own_logits(model, _prefill_hidden(model, context, started, lists, chunk_tokens, logits, chosen))


@in_turn("extend")
@torch.no_grad()
def extend(model: Any, requests: Sequence[Sequence[int]]) -> torch.Tensor:
    """Add a further chunk of tokens to each request of the last :func:`prefill`; result and errors as there."""
    context, lists = context_at_place("extend", model), token_lists("extend", model, requests)
    context.turns.check_owner("extend")
    check_count("extend: requests", context, lists)
    extended = context.blocks.fork(context.requests)
    with context.update(extended):
        return own_logits(model, run_step(model, context, extended, lists, [False] * len(lists)))


@in_turn("decode")
@torch.no_grad()
def decode(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Add one token to each request of the last :func:`prefill`: logits [R, vocabulary], computed by every rank on its own.

    Errors as :func:`prefill`.
    """
    context, lists = context_at_place("decode", model), [[token] for token in token_list("decode: tokens", model, tokens)]
    context.turns.check_owner("decode")
    check_count("decode: tokens", context, lists)
    extended = context.blocks.fork(context.requests)
    with context.update(extended):
        return own_logits(model, run_step(model, context, extended, lists, [True] * len(lists)))


@torch.no_grad()
def greedy_steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    chunk_tokens: int | None = None,
    prefix: Sequence[tuple[int, int] | None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The likeliest tokens [R] behind each prompt and the logits [R, vocabulary] they are chosen from, step after step, without an
    end: take as many as are wanted. Arguments and errors as :func:`prefill`; ValueError also for an empty prompt, and if another
    call took the place of these requests between two steps."""
    logits, requests = _first_logits(model, prompts, chunk_tokens, prefix)
    while True:
        tokens = logits.argmax(-1)
        yield tokens, logits
        logits, requests = _next_logits(model, requests, tokens.tolist())


@in_turn("generate")
@torch.no_grad()
def _first_logits(model: Any, prompts: Any, chunk_tokens: int | None, prefix: Any) -> tuple[torch.Tensor, CachedRequests]:
    """Logits behind each prompt, and the requests to go on with."""
    context, lists = context_at_place("generate", model), token_lists("generate", model, prompts)
    if prefix is not None:
        context.turns.check_owner("generate")
    prefixes = checked_prefix(context, prefix, len(lists))
    if not all(lists):
        raise ValueError(f"generate: prompts must not be empty, got no tokens for prompt {lists.index([])}")
    started = context.blocks.fork_prefixes(context.requests, prefixes)
    with context.update(started):
        logits = own_logits(model, _prefill_hidden(model, context, started, lists, chunk_tokens, "last", [False] * len(lists)))
    return logits, context.requests


@in_turn("generate")
@torch.no_grad()
def _next_logits(model: Any, requests: CachedRequests, tokens: list[int]) -> tuple[torch.Tensor, CachedRequests]:
    """Logits behind one more token of each of ``requests``; they may go on in any thread. ValueError if they are not there."""
    context = context_of("generate", model)
    if context.requests is not requests:
        raise ValueError(
            "generate: the requests of the last prefill must be those of these steps, got others: another call came between"
        )
    context.turns.owner = threading.current_thread()
    return decode(model, tokens), context.requests


@in_turn("generate")
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    chunk_tokens: int | None = None,
    prefix: Sequence[tuple[int, int] | None] | None = None,
) -> list[list[int]]:
    """The ``n`` tokens that follow each prompt, greedily chosen, on every rank; fewer behind ``eos_token_id``, which is kept: a
    token, or several any of which ends a text.

    ``chunk_tokens`` and ``prefix`` as :func:`prefill`. Errors as there; ValueError also for an empty prompt and for ``n`` below 1,
    TypeError for an ``eos_token_id`` of another kind.
    """
    context_at_place("generate", model)
    ends = checked_ends(eos_token_id)
    if n < 1:
        raise ValueError(f"generate: n must be at least 1, got {n}")
    chosen: list[list[int]] = []
    for tokens, _ in islice(greedy_steps(model, prompts, chunk_tokens=chunk_tokens, prefix=prefix), n):
        chosen = chosen or [[] for _ in tokens]
        # Requests that have ended go on, for nobody, as rows of a batch whose size stays.
        for request, token in zip(chosen, tokens.tolist(), strict=True):
            request += [token] * ends.isdisjoint(request[-1:])
        if all(not ends.isdisjoint(request[-1:]) for request in chosen):
            break
    return chosen
