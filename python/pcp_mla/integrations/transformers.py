"""Prefill context parallelism for transformers' own DeepSeek-V2 and V3 models.

:func:`enable_pcp` replaces the forward of every attention module; :func:`prefill`, :func:`extend`, :func:`decode` and
:func:`generate` drive the model. For inference only.

A prefill cuts every request over the ranks. Every rank sees all latents in each layer, so it keeps the whole latent cache, in paged
blocks that requests with a common prefix share, and a decode step runs on all ranks alike, with no collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..exchange import Group, all_gather_rows, group_rank, group_world_size
from ..partition import check_layout
from ..pipeline import MLADims, MLAPrefill
from .deepseek import check_model, copy_sharing_weights, model_dims, project_inputs
from .paged_cache import CachedRequests, LatentBlocks
from .steps import PCPStep, StepPlanner

__all__ = ["PCPContext", "copy_sharing_weights", "decode", "disable_pcp", "enable_pcp", "extend", "generate", "prefill"]


@dataclass
class PCPContext:
    """What a model under PCP carries.

    Attributes:
        group, world_size, rank, layout: as enabled.
        dims: widths of its attention.
        blocks: the latent cache of all layers.
        requests: those that the last :func:`prefill` started; a step that fails leaves them as they were.
        planner, decode_planner: for steps of the group, and for those that each rank makes on its own.
        step: the running step, None between steps.
    """

    group: Group
    world_size: int
    rank: int
    layout: str
    dims: MLADims
    blocks: LatentBlocks
    planner: StepPlanner
    decode_planner: StepPlanner
    requests: CachedRequests = field(default_factory=CachedRequests)
    step: PCPStep | None = None

    @contextmanager
    def update(self, requests: CachedRequests) -> Iterator[None]:
        """Around steps that add tokens to ``requests``: if all succeed they take the place of the last ones, else they go."""
        try:
            yield
        except BaseException:
            self.blocks.release(requests)
            raise
        self.blocks.release(self.requests)
        self.requests = requests


def _context(op: str, model: Any) -> PCPContext:
    check_model(op, model)
    if "_pcp" not in model.__dict__:
        raise ValueError(f"{op}: model must be under PCP, call enable_pcp first")
    return model.__dict__["_pcp"]


def enable_pcp(model: Any, group: Group = None, layout: str = "unpadded") -> PCPContext:
    """Make ``model`` compute its attention by prefill context parallelism, until :func:`disable_pcp`.

    Args:
        model: transformers' ``DeepseekV2ForCausalLM`` or ``DeepseekV3ForCausalLM``, the same weights on every rank, on its device
            and in its dtype: the cache is made for these.
        group: a ``torch.distributed`` process group, a :class:`PlayedGroup`, or None for a world of one rank. Played ranks need a
            model each: see :func:`copy_sharing_weights`.
        layout: as :func:`pcp_mla.partition`.

    Raises:
        TypeError: another kind of model.
        ValueError: unknown layout, or the model is under PCP already.
        NotImplementedError: rope frequencies that depend on the length of the input.
    """
    check_model("enable_pcp", model)
    check_layout("enable_pcp", layout, "replicate")
    if "_pcp" in model.__dict__:
        raise ValueError("enable_pcp: model must not be under PCP already, call disable_pcp first")
    dims = model_dims(model)
    world, rank, weight = group_world_size(group, "enable_pcp"), group_rank(group), model.model.embed_tokens.weight
    place = weight.dtype, weight.device
    blocks = LatentBlocks(model.config.num_hidden_layers, dims.latent_dim, *place)
    planner, decode_planner = (StepPlanner(g, layout, dims, *place) for g in (group, None))
    context = PCPContext(group, world, rank, layout, dims, blocks, planner, decode_planner)
    model.__dict__["_pcp"] = context
    for layer in model.model.layers:
        layer.self_attn.forward = partial(_attention_forward, layer.self_attn, context)
    return context


def disable_pcp(model: Any) -> None:
    """Undo :func:`enable_pcp`. ValueError if the model is not under PCP, TypeError for another kind of model."""
    _context("disable_pcp", model)
    del model.__dict__["_pcp"]
    for layer in model.model.layers:
        del layer.self_attn.forward


def _attention_forward(
    attention: Any,
    context: PCPContext,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    step, dims = context.step, context.dims
    if step is None:
        raise ValueError("attention: the model is under PCP, call prefill, extend, decode or generate, got a direct call")
    tokens = step.meta.num_tokens
    q, kv_c, k_pe = (x[:tokens] for x in project_inputs(attention, hidden_states, position_embeddings, dims))
    cache = context.blocks.cache[attention.layer_idx]
    layer = MLAPrefill(dims, attention.scaling, step.exchange)
    attended = layer(q, kv_c, k_pe, attention.kv_b_proj, step.meta, cache)
    out = hidden_states.new_zeros(hidden_states.shape[1], dims.num_heads * dims.v_head_dim)
    out[:tokens] = attended.flatten(1)
    return attention.o_proj(out)[None], None


def _token_lists(op: str, model: Any, requests: Any) -> list[list[int]]:
    if (
        not isinstance(requests, Sequence)
        or isinstance(requests, str | bytes)
        or not all(isinstance(r, Sequence) for r in requests)
    ):
        raise TypeError(f"{op}: requests must be a list with a list of token ids per request, got {type(requests).__name__}")
    vocabulary = model.config.vocab_size
    for i, request in enumerate(requests):
        wrong = next((token for token in request if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{op}: requests must hold token ids in 0..{vocabulary - 1}, got {wrong} in request {i}")
    return [list(request) for request in requests]


def _step(model: Any, context: PCPContext, requests: CachedRequests, tokens: list[list[int]], decode: bool = False) -> torch.Tensor:
    """Run new tokens of every request and add them to ``requests``: last hidden states [new tokens, hidden] in natural order."""
    device = model.model.embed_tokens.weight.device
    lengths = [len(new) for new in tokens]
    if not sum(lengths):
        raise ValueError("step: requests must hold at least one token, got none")
    context.blocks.reserve(requests, lengths)
    planner = context.decode_planner if decode else context.planner
    step = planner.plan(lengths, requests, decode)
    meta = step.meta
    natural = torch.tensor([*(token for new in tokens for token in new), 0], device=device)
    local, positions = natural[meta.local_token_indices.long()], meta.positions.long()  # index -1, a pad, takes the last entry
    if not meta.num_tokens:
        # Modules of the model fail on no tokens at all; the attention leaves this one out.
        local, positions = natural[-1:], natural.new_zeros(1)
    context.step = step
    try:
        hidden = model.model(
            input_ids=local[None],
            position_ids=positions[None],
            # A four-dimensional mask is passed on as it is, and ours is not read: without it, positions that jump (head to tail,
            # request to request) are taken for packed sequences and a [T, T] mask is built.
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
            use_cache=False,
        ).last_hidden_state[0, : meta.num_tokens]
    finally:
        context.step = None
    padded = hidden.new_zeros(meta.num_tokens_padded, hidden.shape[1])
    padded[: meta.num_tokens] = hidden
    restored = all_gather_rows(padded, planner.group).index_select(0, meta.hidden_restore_idx)
    requests.lengths = [old + new for old, new in zip(requests.lengths, lengths, strict=True)]
    return restored


def _chunks(tokens: list[list[int]], chunk_tokens: int) -> Iterator[list[list[int]]]:
    """The requests' tokens in steps of ``chunk_tokens``, in natural order: what each request has in the step, often nothing."""
    starts = np.cumsum([0, *map(len, tokens)]).tolist()
    for first in range(0, max(1, starts[-1]), chunk_tokens):
        last = first + chunk_tokens
        yield [new[max(0, first - start) : max(0, last - start)] for new, start in zip(tokens, starts, strict=False)]


def _checked_prefix(context: PCPContext, prefix: Any, count: int) -> list[tuple[int, int] | None]:
    if prefix is None:
        return [None] * count
    lengths = context.requests.lengths
    wanted = f"a (request, tokens) or None for each of the {count} requests"
    if not isinstance(prefix, Sequence) or isinstance(prefix, str | bytes):
        raise TypeError(f"prefill: prefix must be a list with {wanted}, got {type(prefix).__name__}")
    if len(prefix) != count:
        raise ValueError(f"prefill: prefix must have {wanted}, got {len(prefix)}")
    for entry in prefix:
        if entry is None:
            continue
        if not isinstance(entry, tuple) or len(entry) != 2 or not all(type(number) is int for number in entry):
            raise TypeError(f"prefill: prefix must have {wanted}, got {entry!r}")
        request, tokens = entry
        if not 0 <= request < len(lengths):
            raise ValueError(f"prefill: prefix must name one of the {len(lengths)} requests of the last prefill, got {request}")
        if not 0 <= tokens <= lengths[request]:
            raise ValueError(f"prefill: prefix must have 0 to {lengths[request]} tokens of request {request}, got {tokens}")
    return list(prefix)


def _check_count(argument: str, context: PCPContext, requests: list[list[int]]) -> None:
    count = len(context.requests.lengths)
    if len(requests) != count:
        raise ValueError(
            f"{argument} must have one entry for each of the {count} requests of the last prefill, got {len(requests)}"
        )


@torch.no_grad()
def prefill(
    model: Any,
    requests: Sequence[Sequence[int]],
    *,
    chunk_tokens: int | None = None,
    prefix: Sequence[tuple[int, int] | None] | None = None,
) -> torch.Tensor:
    """Start new requests; what the cache held is dropped, but for what the new ones share.

    Args:
        requests: token ids of each request; lengths may differ and be 0, not all of them.
        chunk_tokens: tokens of a step; a longer prefill takes several steps (chunked prefill). By default one step.
        prefix: for each new request None, or ``(request, tokens)``: it begins with that many tokens of a request that is in the
            cache, whose blocks it shares. They are not computed again, and ``requests`` has the tokens behind them.

    Returns:
        Logits [sum of lengths, vocabulary] in natural order, on every rank.

    Raises:
        TypeError, ValueError: wrong model, not under PCP, token ids or prefixes out of range, or no token at all.
    """
    context, lists = _context("prefill", model), _token_lists("prefill", model, requests)
    prefixes = _checked_prefix(context, prefix, len(lists))
    if chunk_tokens is None:
        chunk_tokens = max(1, sum(map(len, lists)))
    if chunk_tokens < 1:
        raise ValueError(f"prefill: chunk_tokens must be at least 1, got {chunk_tokens}")
    started = context.blocks.fork_prefixes(context.requests, prefixes)
    with context.update(started):
        return torch.cat([model.lm_head(_step(model, context, started, new)) for new in _chunks(lists, chunk_tokens)])


@torch.no_grad()
def extend(model: Any, requests: Sequence[Sequence[int]]) -> torch.Tensor:
    """Add a further chunk of tokens to each request of the last :func:`prefill`; result and errors as there."""
    context, lists = _context("extend", model), _token_lists("extend", model, requests)
    _check_count("extend: requests", context, lists)
    extended = context.blocks.fork(context.requests)
    with context.update(extended):
        return model.lm_head(_step(model, context, extended, lists))


@torch.no_grad()
def decode(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Add one token to each request of the last :func:`prefill`: logits [R, vocabulary], computed by every rank on its own.

    Errors as :func:`prefill`.
    """
    context, lists = _context("decode", model), _token_lists("decode", model, [[token] for token in tokens])
    _check_count("decode: tokens", context, lists)
    extended = context.blocks.fork(context.requests)
    with context.update(extended):
        return model.lm_head(_step(model, context, extended, lists, decode=True))


@torch.no_grad()
def generate(model: Any, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """The ``n`` tokens that follow each prompt, greedily chosen, on every rank.

    Errors as :func:`prefill`; ValueError also for an empty prompt and for ``n`` below 1.
    """
    context, lists = _context("generate", model), _token_lists("generate", model, prompts)
    if n < 1:
        raise ValueError(f"generate: n must be at least 1, got {n}")
    if not all(lists):
        raise ValueError(f"generate: prompts must not be empty, got no tokens for prompt {lists.index([])}")
    started = context.blocks.fork_prefixes(context.requests, [None] * len(lists))
    with context.update(started):
        hidden = _step(model, context, started, lists)
    ends = torch.from_numpy(np.cumsum([len(prompt) for prompt in lists]) - 1).to(hidden.device)
    tokens = model.lm_head(hidden.index_select(0, ends)).argmax(-1).tolist()
    chosen = [tokens]
    while len(chosen) < n:
        tokens = decode(model, tokens).argmax(-1).tolist()
        chosen.append(tokens)
    return [list(request) for request in zip(*chosen, strict=True)]
