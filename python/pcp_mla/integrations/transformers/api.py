"""Prefill context parallelism for transformers' own DeepSeek-V2, V3 and GLM-4.7-Flash models.

:func:`enable_pcp` replaces the forward of the model and of every attention module: calls of the model and its own ``generate``
work as before, and :func:`prefill`, :func:`extend`, :func:`decode` and :func:`generate` drive it without padding. For inference
only.

A prefill cuts every request over the ranks. Every rank sees all latents in each layer, so it keeps the whole latent cache, in paged
blocks that requests with a common prefix share, and a decode step runs on all ranks alike, with no collective, over the latents.

Threads that call one model are served one after another, a :func:`generate` as a whole. Requests of a prefill belong to the thread
that made it: another one's :func:`extend` or :func:`decode` is refused, as is a second thread over several ranks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from ...groups import Group, group_rank, group_world_size
from ...plan.partition import check_layout
from ...planner.consistency import Comparison
from .caches import PCPCache
from .calls import in_turn
from .captured import CapturedSteps
from .context import PCPContext, context_at_place, context_of
from .deepseek import check_model, copy_sharing_weights, model_dims, model_place
from .forward import model_forward
from .forwards import ReplacedForward
from .model_step import attention_forward, run_step
from .paged_cache import BLOCK_SIZE, CachedRequests, LatentBlocks
from .requests import check_count, check_logits, checked_ends, checked_prefix, in_chunks, is_pair, token_list, token_lists
from .steps import StepPlanner
from .turns import Turns

__all__ = [
    "PCPCache",
    "PCPContext",
    "capture_graphs",
    "copy_sharing_weights",
    "decode",
    "disable_pcp",
    "enable_pcp",
    "extend",
    "generate",
    "greedy_steps",
    "prefill",
]


def enable_pcp(model: Any, group: Group = None, layout: str = "unpadded") -> PCPContext:
    """Make ``model`` compute its attention by prefill context parallelism, until :func:`disable_pcp`.

    Args:
        model: transformers' ``DeepseekV2ForCausalLM``, ``DeepseekV3ForCausalLM`` or ``Glm4MoeLiteForCausalLM``, the same weights on
            every rank, on its device and in its dtype: the cache is made for these.
        group: a ``torch.distributed`` process group, a :class:`PlayedGroup`, or None for a world of one rank. Played ranks need a
            model each: see :func:`copy_sharing_weights`.
        layout: as :func:`pcp_mla.partition`.

    Raises:
        TypeError: another kind of model.
        ValueError: unknown layout, the model is under PCP already, or has no weights. It is as it was after any error.
        NotImplementedError: rope frequencies that depend on the length of the input.
    """
    check_model("enable_pcp", model)
    check_layout("enable_pcp", layout, "replicate")
    if "_pcp" in model.__dict__:
        raise ValueError("enable_pcp: model must not be under PCP already, call disable_pcp first")
    dims, place = model_dims(model), model_place(model)
    world, rank = group_world_size(group, "enable_pcp"), group_rank(group)
    attentions = [layer.self_attn for layer in model.model.layers]
    blocks = LatentBlocks(model.config.num_hidden_layers, dims.latent_dim, *place)
    planner, decode_planner = (StepPlanner(g, layout, dims, *place) for g in (group, None))
    turns = Turns(blocks.lock, world, place[1])
    checks = os.environ.get("PCP_MLA_CHECK") == "1" and group is not None
    comparison = Comparison(group, place[1]) if checks else None
    context = PCPContext(group, world, rank, layout, dims, blocks, planner, decode_planner, turns, comparison)
    context.offloaded = model.model.embed_tokens.weight.is_meta
    try:
        for attention in attentions:
            context.replaced.append(ReplacedForward(attention, partial(attention_forward, attention, context)))
        context.replaced.append(ReplacedForward(model, partial(model_forward, model)))
        model.__dict__["_pcp"] = context
    except BaseException:
        _put_back(context)
        raise
    return context


def _put_back(context: PCPContext) -> None:
    for replaced in context.replaced:
        replaced.put_back()


def disable_pcp(model: Any) -> None:
    """Undo :func:`enable_pcp`: every forward that it replaced is what it was, also one that somebody had put on the instance.

    ValueError if the model is not under PCP, TypeError for another kind of model.
    """
    context = context_of("disable_pcp", model)
    with context.blocks.lock:  # not within another thread's step
        model.__dict__.pop("_pcp")
        _put_back(context)
        context.comparison = None  # caches that it leaves are for nobody


@in_turn("capture_graphs")
@torch.no_grad()
def capture_graphs(
    model: Any,
    *,
    prefill_sizes: Sequence[tuple[int, int]] = (),
    decode_sizes: Sequence[tuple[int, int]] = (),
    max_requests: int = 16,
) -> None:
    """Capture CUDA graphs of steps: prefills in pieces between the layers' collectives, decodes whole. Steps that fit one are
    replayed from then on, the smallest that fits; others run as before. All ranks must call it alike.

    A graph is bound to the latent cache as it is: this is first given room for twice the keys of the largest size, as new requests
    take theirs before the old ones go. When it has grown since, steps are padded as before but run call by call.

    Args:
        prefill_sizes: (tokens of the fullest rank, keys of all requests with their context) that a graph has room for.
        decode_sizes: (requests, keys of all requests) likewise.
        max_requests: of a step.

    Raises:
        TypeError, ValueError: not under PCP, not on a GPU, a size that is no pair of positive numbers or has more than
            ``max_requests`` requests; nothing is changed then.
        RuntimeError: a module of the model does what CUDA cannot capture (some implementations of experts wait for the GPU).
    """
    context = context_at_place("capture_graphs", model)
    for name, sizes in (("prefill_sizes", prefill_sizes), ("decode_sizes", decode_sizes)):
        for size in sizes:
            if not is_pair(size):
                raise TypeError(f"capture_graphs: {name} must be pairs of integers, got {size!r}")
            if min(size) < 1:
                raise ValueError(f"capture_graphs: {name} must be positive, got {size}")
    requests = max((requests for requests, _ in decode_sizes), default=1)
    if max_requests < requests:
        raise ValueError(f"capture_graphs: max_requests must be at least {requests}, as decode_sizes, got {max_requests}")
    if not model.model.embed_tokens.weight.is_cuda:
        raise ValueError(f"capture_graphs: model must be on a CUDA device, got {model.model.embed_tokens.weight.device}")
    keys = max((keys for _, keys in (*prefill_sizes, *decode_sizes)), default=0)
    context.blocks.grow(2 * (-(-keys // BLOCK_SIZE) + max_requests))
    prefills, decodes = (
        CapturedSteps(model, context, decode, sizes, max_requests) if sizes else None
        for decode, sizes in ((False, prefill_sizes), (True, decode_sizes))
    )
    context.captured, context.captured_decodes = prefills, decodes


def _prefill_hidden(
    model: Any, context: PCPContext, requests: CachedRequests, tokens: list[list[int]], chunk_tokens: int | None, logits: str
) -> torch.Tensor:
    """Last hidden states of a prefill in steps of ``chunk_tokens``: [sum of lengths, hidden], or [R, hidden] of the last tokens."""
    if chunk_tokens is None:
        chunk_tokens = max(1, sum(map(len, tokens)))
    if chunk_tokens < 1:
        raise ValueError(f"prefill: chunk_tokens must be at least 1, got {chunk_tokens}")
    ends, hidden = np.cumsum([len(new) for new in tokens]) - 1, []
    for step, new in enumerate(in_chunks(tokens, chunk_tokens)):
        first, rows = step * chunk_tokens, None
        if logits == "last":
            rows = torch.from_numpy(ends[(ends >= first) & (ends < first + chunk_tokens)] - first)
        hidden.append(run_step(model, context, requests, new, rows=rows))
    return torch.cat(hidden)


@in_turn("prefill")
@torch.no_grad()
def prefill(
    model: Any,
    requests: Sequence[Sequence[int]],
    *,
    chunk_tokens: int | None = None,
    prefix: Sequence[tuple[int, int] | None] | None = None,
    logits: str = "all",
) -> torch.Tensor:
    """Start new requests; what the cache held is dropped, but for what the new ones share.

    Args:
        requests: token ids of each request, in a list or in a tensor or array of integers; lengths may differ and be 0, not all of
            them.
        chunk_tokens: tokens of a step; a longer prefill takes several steps (chunked prefill). By default one step.
        prefix: for each new request None, or ``(request, tokens)``: it begins with that many tokens of a request that is in the
            cache, whose blocks it shares. They are not computed again, and ``requests`` has the tokens behind them.
        logits: ``"all"``, or ``"last"`` for those of each request's last token alone: no other hidden states are exchanged and
            projected. No request may be empty then.

    Returns:
        Logits [sum of lengths, vocabulary] in natural order, or [R, vocabulary], on every rank.

    Raises:
        TypeError, ValueError: wrong model, not under PCP or converted since, token ids or prefixes out of range, no token at all,
            or a call of another thread that this one must not go on with.
        RuntimeError: with ``PCP_MLA_CHECK=1``, on every rank, if the ranks' calls or arguments differ, or another rank fails.
    """
    context, lists = context_at_place("prefill", model), token_lists("prefill", model, requests)
    if prefix is not None:
        context.turns.check_owner("prefill")
    check_logits("prefill", logits, lists)
    started = context.blocks.fork_prefixes(context.requests, checked_prefix(context, prefix, len(lists)))
    with context.update(started):
        return model.lm_head(_prefill_hidden(model, context, started, lists, chunk_tokens, logits))


@in_turn("extend")
@torch.no_grad()
def extend(model: Any, requests: Sequence[Sequence[int]]) -> torch.Tensor:
    """Add a further chunk of tokens to each request of the last :func:`prefill`; result and errors as there."""
    context, lists = context_at_place("extend", model), token_lists("extend", model, requests)
    context.turns.check_owner("extend")
    check_count("extend: requests", context, lists)
    extended = context.blocks.fork(context.requests)
    with context.update(extended):
        return model.lm_head(run_step(model, context, extended, lists))


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
        return model.lm_head(run_step(model, context, extended, lists, decode=True))


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
        logits = model.lm_head(_prefill_hidden(model, context, started, lists, chunk_tokens, "last"))
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
