"""A model put under PCP and taken from it, and its steps captured in graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...groups import Group, group_rank, group_world_size
from ...layer.split import check_known
from ...plan.partition import check_layout
from ...planner.consistency import Comparison
from .cache_scale import cache_scales
from .calls import in_turn
from .captured import CapturedSteps
from .context import PCPContext, context_at_place, context_of
from .forward import model_forward
from .forwards import ReplacedForward
from .model_step import attention_forward
from .paged_cache import BLOCK_SIZE, LatentBlocks
from .requests import is_pair
from .split import agree_on_heads
from .steps import StepPlanner
from .structure import attentions_of, check_model, check_structure, follow_attention, model_dims
from .turns import Turns
from .weights import model_place


def enable_pcp(
    model: Any,
    group: Group = None,
    layout: str = "unpadded",
    split: str = "auto",
    *,
    cache_dtype: torch.dtype | None = None,
    cache_scale: float | Sequence[float] | None = None,
) -> PCPContext:
    """Make ``model`` compute its attention by prefill context parallelism, until :func:`disable_pcp`.

    Args:
        model: a causal language model of transformers with MLA in every layer, whichever its class (:mod:`.structure`), the same
            weights on every rank, on its device and in its dtype: the cache is made for these.
        group: a ``torch.distributed`` process group, a :class:`PlayedGroup`, or None for a world of one rank. Played ranks need a
            model each: see :func:`copy_sharing_weights`.
        layout: as :func:`pcp_mla.partition`.
        split: of prefill steps, as :class:`pcp_mla.MLAPrefill`: ``tokens``; ``heads``, by an exchange of queries and outputs beside
            that of latents; or ``auto``, which is ``tokens`` on a CPU, and where ``heads`` is refused. The same on all ranks.
        cache_dtype: of the latent cache: None for the model's, or ``torch.float8_e4m3fn``. Every token is attended to as the cache
            holds it. The same on all ranks, as the next.
        cache_scale: that the numbers of a float8 cache are multiplied by: one for all layers (by default 1), or one for each.

    Raises:
        TypeError: a model without MLA in every layer, or for ``heads`` a group that has no all-to-all.
        ValueError: unknown layout, split or ``cache_dtype``, a scale that is not positive, the model is under PCP already, has no
            weights, or has other widths in other layers; on every rank, if their splits or caches differ or, for ``heads``, there
            are fewer heads than ranks. It is as it was after any error.
        NotImplementedError: what the model has besides and PCP cannot take, by name: rope frequencies that depend on the length of
            the input, sliding windows, layers of other types, modules or parameters that are not known (indexers, attention
            sinks), attention that is not causal, or whose K and V are not what ``kv_b_proj`` gives; on every rank, for ``heads``,
            if on any of them a ``kv_b_proj`` is more than a weight and a bias.
    """
    check_model("enable_pcp", model)
    check_layout("enable_pcp", layout, "replicate")
    check_known("enable_pcp", split)
    if "_pcp" in model.__dict__:
        raise ValueError("enable_pcp: model must not be under PCP already, call disable_pcp first")
    check_structure(model)
    dims, place = model_dims(model), model_place(model)
    layers = model.config.num_hidden_layers
    scales = cache_scales("enable_pcp", cache_dtype, cache_scale, layers, place[0])
    follow_attention(model, place[1])
    world, rank = group_world_size(group, "enable_pcp"), group_rank(group)
    blocks = LatentBlocks(layers, dims.latent_dim, *place, scales)
    heads = agree_on_heads(model, group, split, dims, place[1], scales)
    split = "tokens" if heads is None else split
    planner = StepPlanner(group, layout, dims, *place, heads, split)
    decode_planner = StepPlanner(None, layout, dims, *place)
    turns = Turns(blocks.lock, world, place[1])
    checks = os.environ.get("PCP_MLA_CHECK") == "1" and group is not None
    comparison = Comparison(group, place[1]) if checks else None
    context = PCPContext(group, world, rank, layout, dims, blocks, planner, decode_planner, turns, heads, split, comparison)
    context.offloaded = model.model.embed_tokens.weight.is_meta
    try:
        for attention in attentions_of(model):
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
        decode_sizes: (new tokens, one or those of a draft of each request, keys of all requests) likewise.
        max_requests: of a step.

    Raises:
        TypeError, ValueError: not under PCP, not on a GPU, a size that is no pair of positive numbers, or one of decodes that more
            requests than ``max_requests`` could fill; nothing is changed then.
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
