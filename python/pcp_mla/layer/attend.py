"""A step's keys expanded and attended to, for queries that are this rank's, or all ranks' of some heads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..exchange.peer_heads import PeerHeadExchange
from ..ops.attention.call import attend, attend_ranks
from ..ops.attention.libraries import apart
from ..ops.kv_up_project import expand
from ..plan.metadata import PCPMetadata
from ..plan.slots import KeyChunk
from .projection import Projection, expand_rows
from .stages import stage
from .steps import LayerStep

State = tuple[torch.Tensor, torch.Tensor]  # an output and its LSE


def attend_step(
    step: LayerStep,
    q: torch.Tensor,
    latents: torch.Tensor,
    projection: Projection,
    weight: torch.Tensor | None,
    meta: PCPMetadata,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, heads, v] of this rank's tokens, for inputs that are known to fit; ``weight`` if it is all of ``projection``, which is
    that of the step's heads; ``scale`` if the latents are float8."""
    heads = step.heads
    if heads is None:
        return _attend_all(step, q, latents, projection, weight, meta, scale)
    with stage("exchange", q):
        queries = heads.to_heads(q, meta)
    out = _attend_all(step, queries, latents, projection, weight, meta, scale)
    with stage("exchange", q):
        if isinstance(heads, PeerHeadExchange):  # whose next outputs come to lie there; given a result it would copy, too
            return heads.to_tokens(out, meta).clone()
        return heads.to_tokens(out, meta, q.new_empty(*q.shape[:2], out.shape[2]))


def _attend_all(
    step: LayerStep,
    q: torch.Tensor,
    latents: torch.Tensor,
    projection: Projection,
    weight: torch.Tensor | None,
    meta: PCPMetadata,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Over all keys, or over one chunk of them after another: that of the new tokens first."""
    if weight is not None and step.call is not None and q.shape[0] and not apart(q):
        return _attend_at_once(step, step.call, q, latents, weight, scale)
    *context, new = step.chunks or (None,)
    if not context:
        return _attend(step, q, latents, projection, meta, scale, None, None)[0]
    state = _attend(step, q, latents, projection, meta, scale, new, None)
    for chunk in context:
        _attend(step, q, latents, projection, meta, scale, chunk, state)
    return state[0]


def _attend_at_once(
    step: LayerStep,
    call: Callable[..., None],
    q: torch.Tensor,
    latents: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """What :func:`_attend` does without a chunk, by the call that the layers of the step share."""
    with stage("up_project", q):
        k, v, *k_pe = expand(latents, step.rows, weight, step.dims, step.apart, scale)
    with stage("attention", q):
        out = q.new_empty(q.shape[0], step.dims.num_heads, step.dims.v_head_dim)
        call(q, k, v, out, *k_pe)
    return out


def _attend(
    step: LayerStep,
    q: torch.Tensor,
    latents: torch.Tensor,
    projection: Projection,
    meta: PCPMetadata,
    scale: torch.Tensor | None,
    chunk: KeyChunk | None,
    prev: State | None,
) -> State:
    """Output and LSE over the keys of a chunk, merged into ``prev`` in place; without a chunk over all keys, and no LSE."""
    rows = step.rows if chunk is None else step.rows[chunk.first_row : chunk.first_row + chunk.num_rows]
    with stage("up_project", q):
        k, v, *apart = expand_rows(latents, rows, projection, step.dims, step.apart, scale, q.dtype)
        k_pe = apart[0] if apart else None
    with stage("attention", q):
        # Everything was checked, or made here.
        if step.ranks is not None:
            given = (step.ranks, meta.num_kv_tokens, step.scale, chunk is not None, k_pe)
            whole, lse = attend_ranks(step.backend, q, k, v, *given, prev=prev, chunk=chunk, out=prev)
            return whole, whole if lse is None else lse
        if chunk is None:
            out = attend(step.backend, q, k, v, meta, step.scale, k_pe=k_pe)
            assert isinstance(out, torch.Tensor)
            return out, out
        state = attend(step.backend, q, k, v, meta, step.scale, True, k_pe, prev=prev, chunk=chunk, out=prev)
        assert isinstance(state, tuple)
        assert state[1] is not None
        return state[0], state[1]
