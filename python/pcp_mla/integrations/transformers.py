"""Prefill context parallelism for transformers' own DeepSeek-V2 and V3 models.

:func:`enable_pcp` replaces the forward of every attention module; :func:`prefill`, :func:`extend`, :func:`decode` and
:func:`generate` drive the model. For inference only.

A prefill cuts every request over the ranks. Every rank sees all latents in each layer, so it keeps the whole latent cache, in
natural order, and a decode step runs on all ranks alike, with no collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..exchange import Group, all_gather_rows, group_rank, group_world_size
from ..metadata import PCPMetadata
from ..partition import check_layout
from ..pipeline import MLADims, attend_latents, check_layer_inputs, exchange_latents
from .deepseek import check_model, copy_sharing_weights, model_dims, project_inputs

__all__ = ["PCPContext", "copy_sharing_weights", "decode", "disable_pcp", "enable_pcp", "extend", "generate", "prefill"]


@dataclass
class LatentCache:
    """Tokens that each request has in the cache, and one tensor per attention module, [sum(lengths), kv_lora_rank + rope] in
    natural order."""

    lengths: list[int] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class PCPStep:
    """A running step: its metadata, its group (None in a decode step), the cache before it and the cache after it."""

    meta: PCPMetadata
    group: Group
    before: LatentCache
    after: LatentCache


@dataclass
class PCPContext:
    """What a model under PCP carries.

    Attributes:
        group, world_size, rank, layout: as enabled.
        dims: widths of its attention.
        cache: of the requests that the last :func:`prefill` started; a step that fails leaves it as it was.
        step: the running step, None between steps.
    """

    group: Group
    world_size: int
    rank: int
    layout: str
    dims: MLADims
    cache: LatentCache = field(default_factory=LatentCache)
    step: PCPStep | None = None


def _context(op: str, model: Any) -> PCPContext:
    check_model(op, model)
    if "_pcp" not in model.__dict__:
        raise ValueError(f"{op}: model must be under PCP, call enable_pcp first")
    return model.__dict__["_pcp"]


def enable_pcp(model: Any, group: Group = None, layout: str = "unpadded") -> PCPContext:
    """Make ``model`` compute its attention by prefill context parallelism, until :func:`disable_pcp`.

    Args:
        model: transformers' ``DeepseekV2ForCausalLM`` or ``DeepseekV3ForCausalLM``, the same weights on every rank.
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
    context = PCPContext(group, group_world_size(group, "enable_pcp"), group_rank(group), layout, dims)
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
    meta = step.meta
    q, kv_c, k_pe = (x[: meta.num_tokens] for x in project_inputs(attention, hidden_states, position_embeddings, dims))
    check_layer_inputs("attention", q, kv_c, k_pe, meta, dims)
    latents = exchange_latents(kv_c, k_pe, meta, step.group, step.before.latents.get(attention.layer_idx))
    step.after.latents[attention.layer_idx] = _without_pads(latents, meta)
    out = hidden_states.new_zeros(hidden_states.shape[1], dims.num_heads * dims.v_head_dim)
    out[: meta.num_tokens] = attend_latents(q, latents, attention.kv_b_proj, meta, dims, attention.scaling).flatten(1)
    return attention.o_proj(out)[None], None


def _without_pads(latents: torch.Tensor, meta: PCPMetadata) -> torch.Tensor:
    """[N, W] in key order to [sum(context + new), W]: what the cache keeps."""
    part = meta.partition
    if not part.num_pcp_pads.any():
        return latents
    kept = (part.context_lens + part.query_lens).tolist()
    return torch.cat([piece[:n] for piece, n in zip(latents.split(np.diff(part.cu_seqlens_kv).tolist()), kept, strict=True)])


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


def _step(model: Any, context: PCPContext, cache: LatentCache, requests: list[list[int]], decode: bool = False) -> torch.Tensor:
    """Run new tokens of every request after those in ``cache``: last hidden states [new tokens, hidden] in natural order."""
    device = model.model.embed_tokens.weight.device
    lengths = [len(request) for request in requests]
    if not sum(lengths):
        raise ValueError("step: requests must hold at least one token, got none")
    group = None if decode else context.group
    meta = PCPMetadata.build(
        lengths,
        cache.lengths,
        [not decode] * len(requests),
        world_size=group_world_size(group),
        rank=group_rank(group),
        layout=context.layout,
        device=device,
    )
    tokens = np.concatenate([*(np.asarray(request, np.int64) for request in requests), np.zeros(1, np.int64)])
    local = tokens[meta.partition.local_token_indices]  # index -1, a pad, takes the last entry: token 0
    positions = meta.partition.positions.astype(np.int64)
    if not meta.num_tokens:
        # Modules of the model fail on no tokens at all; the attention leaves this one out.
        local, positions = np.zeros(1, np.int64), np.zeros(1, np.int64)
    after = LatentCache([old + new for old, new in zip(cache.lengths, lengths, strict=True)])
    context.step = PCPStep(meta, group, cache, after)
    try:
        hidden = model.model(
            input_ids=torch.from_numpy(local)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            # A four-dimensional mask is passed on as it is, and ours is not read: without it, positions that jump (head to tail,
            # request to request) are taken for packed sequences and a [T, T] mask is built.
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
            use_cache=False,
        ).last_hidden_state[0, : meta.num_tokens]
    finally:
        context.step = None
    padded = hidden.new_zeros(meta.num_tokens_padded, hidden.shape[1])
    padded[: meta.num_tokens] = hidden
    restored = all_gather_rows(padded, group).index_select(0, meta.hidden_restore_idx)
    context.cache = after
    return restored


def _new_cache(requests: list[list[int]]) -> LatentCache:
    return LatentCache([0] * len(requests))


def _check_count(argument: str, context: PCPContext, requests: list[list[int]]) -> None:
    count = len(context.cache.lengths)
    if len(requests) != count:
        raise ValueError(
            f"{argument} must have one entry for each of the {count} requests of the last prefill, got {len(requests)}"
        )


@torch.no_grad()
def prefill(model: Any, requests: Sequence[Sequence[int]]) -> torch.Tensor:
    """Start new requests; what the cache held is dropped.

    Args:
        requests: token ids of each request; lengths may differ and be 0, not all of them.

    Returns:
        Logits [sum of lengths, vocabulary] in natural order, on every rank.

    Raises:
        TypeError, ValueError: wrong model, not under PCP, token ids out of range, or no token at all.
    """
    context, lists = _context("prefill", model), _token_lists("prefill", model, requests)
    return model.lm_head(_step(model, context, _new_cache(lists), lists))


@torch.no_grad()
def extend(model: Any, requests: Sequence[Sequence[int]]) -> torch.Tensor:
    """Add a further chunk of tokens to each request of the last :func:`prefill`; arguments, result and errors as there."""
    context, lists = _context("extend", model), _token_lists("extend", model, requests)
    _check_count("extend: requests", context, lists)
    return model.lm_head(_step(model, context, context.cache, lists))


@torch.no_grad()
def decode(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Add one token to each request of the last :func:`prefill`: logits [R, vocabulary], computed by every rank on its own.

    Errors as :func:`prefill`.
    """
    context, lists = _context("decode", model), _token_lists("decode", model, [[token] for token in tokens])
    _check_count("decode: tokens", context, lists)
    return model.lm_head(_step(model, context, context.cache, lists, decode=True))


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
    hidden = _step(model, context, _new_cache(lists), lists)
    ends = torch.from_numpy(np.cumsum([len(prompt) for prompt in lists]) - 1).to(hidden.device)
    tokens = model.lm_head(hidden.index_select(0, ends)).argmax(-1).tolist()
    chosen = [tokens]
    while len(chosen) < n:
        tokens = decode(model, tokens).argmax(-1).tolist()
        chosen.append(tokens)
    return [list(request) for request in zip(*chosen, strict=True)]
