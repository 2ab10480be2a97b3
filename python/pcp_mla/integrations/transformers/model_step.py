"""A step of a model under PCP: what its modules compute, for the tokens of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...groups import Group, all_gather_rows
from ...layer.prefill import MLAPrefill
from ...layer.projection import plain_weight
from ...plan.metadata import PCPMetadata
from .context import PCPContext
from .latent_attention import latent_attention
from .paged_cache import CachedRequests
from .shards import local_projection
from .stand_in import own_attention
from .steps import Batch, PCPStep


def _exact(device_type: str) -> AbstractContextManager[None]:
    """Without autocast, where everything has the latents' dtype already."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def attention_forward(attention: Any, context: PCPContext, *args: Any, **options: Any) -> Any:
    """In place of the attention module's forward."""
    if context.step is None:
        raise ValueError("attention: the model is under PCP, call it as a whole, or prefill, extend, decode or generate")
    return own_attention(attention, partial(_attend, attention, context, context.step), *args, **options)


def _attend(
    attention: Any, context: PCPContext, step: PCPStep, q: torch.Tensor, k_pe: torch.Tensor, kv_c: torch.Tensor, scale: float
) -> torch.Tensor:
    """[1, T, heads, v] of q [1, heads, T, nope + rope] and the latents k_pe [1, 1, T, rope] and kv_c [1, 1, T, kv_lora_rank].

    As many heads as the module has: tensor parallelism leaves it some of those of the configuration.
    """
    dims, rows, tokens = context.dims, step.meta.num_local_rows, q.shape[2]
    cache, cache_scale = context.blocks.layer(attention.layer_idx)
    # Under autocast some of the three have another dtype than the weights.
    q, kv_c, k_pe = (x[:rows].to(context.blocks.dtype) for x in (q[0].transpose(0, 1), kv_c[0, 0], k_pe[0, 0]))
    if q.shape[1] != dims.num_heads:
        dims = replace(dims, num_heads=q.shape[1])
    projection = local_projection(attention.kv_b_proj)
    weight = plain_weight(projection) if step.is_decode else None
    with _exact(cache.device.type):
        if weight is not None:
            latents = torch.cat([kv_c, k_pe], dim=1)
            torch.ops.pcp_mla.write_latent_cache.default(latents, cache, step.meta.slot_mapping, cache_scale)
            attended = latent_attention(q, weight, step.meta, step.token_rows, cache, cache_scale, dims, scale)
        else:
            layer = MLAPrefill(dims, scale, step.exchange, heads=step.heads, split=step.split)
            attended = layer(q, kv_c, k_pe, projection, step.meta, cache, scale=cache_scale)
    if rows < tokens:  # of a rank without tokens, see run_step
        attended = torch.cat([attended, attended.new_zeros(tokens - rows, *attended.shape[1:])])
    return attended[None]


def run_modules(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, hidden] of token ids and positions [T], behind the last norm."""
    return model.model(
        input_ids=ids[None],
        position_ids=positions[None],
        # A four-dimensional mask is passed on as it is, and ours is not read: without it, positions that jump (head to tail,
        # request to request) are taken for packed sequences and a [T, T] mask is built.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        return_dict=True,
    ).last_hidden_state[0]


def local_tokens(meta: PCPMetadata, natural: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions in local order, of all new tokens in natural order and one more, which pads (index -1) take.

    ``natural`` has a row of token ids and, where positions do not count a request's tokens, one of positions.
    """
    local = natural[:, meta.local_token_indices.long()]
    return local[0], local[1] if len(local) > 1 else meta.positions.long()


def _gather_rows(padded: torch.Tensor, group: Group, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What has rows [n] of all ranks' local rows [Np, hidden], by their numbers in the gathered order, and where. Few rows are
    exchanged alone: each rank lays out what it has at each one's local row, and the owner's is taken. No rows are no collective."""
    count = rows.shape[0]
    if group is None or count == 0 or count >= padded.shape[0]:
        return all_gather_rows(padded, group) if count else padded, rows
    rows = rows.long()
    owners = rows.div(padded.shape[0], rounding_mode="floor")
    places = owners * count + torch.arange(count, device=rows.device)
    return all_gather_rows(padded.index_select(0, rows % padded.shape[0]), group), places


def run_step(
    model: Any,
    context: PCPContext,
    requests: CachedRequests,
    tokens: list[list[int]],
    decodes: Sequence[bool],
    *,
    positions: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run new tokens of every request and add them to ``requests``: last hidden states [new tokens, hidden] in natural order.

    Args:
        decodes: whether each request is a decode, whose tokens every rank computes; of decodes alone a step has no collective.
        positions: int64 [new tokens] on the CPU, in natural order, where they do not count each request's tokens.
        rows: int64 [n] on the CPU, which of the new tokens' hidden states are wanted, by default all; no others are exchanged.
    """
    device = context.blocks.cache.device
    lengths = [len(new) for new in tokens]
    if not sum(lengths):
        raise ValueError("step: requests must hold at least one token, got none")
    context.blocks.reserve(requests, lengths)
    natural = torch.tensor([[*(token for new in tokens for token in new), 0]])
    if positions is not None:
        natural = torch.cat([natural, torch.nn.functional.pad(positions, (0, 1))[None]])
    natural = natural.to(device)
    batch = Batch.of(lengths, requests, decodes)
    decode = not any(batch.is_prefill)
    captured = context.captured_decodes if decode else context.captured
    fitting = captured.run(batch, natural) if captured is not None else None
    if fitting is not None:
        meta, padded = fitting
    else:
        planner = context.decode_planner if decode else context.planner
        planner.make_room(batch)
        context.in_collectives = not decode
        step = planner.plan(batch)
        meta = step.meta
        ids, positions = local_tokens(meta, natural)
        if not meta.num_tokens:
            # Modules of the model fail on no tokens at all; the attention leaves this one out.
            ids, positions = natural[0, -1:], natural.new_zeros(1)
        with context.running(step):
            hidden = run_modules(model, ids, positions)[: meta.num_tokens]
        padded = hidden.new_zeros(meta.num_tokens_padded, hidden.shape[1])
        padded[: meta.num_tokens] = hidden
    order = meta.hidden_restore_idx[: sum(lengths)]
    if rows is not None:
        order = order.index_select(0, rows.to(device))
    gathered, places = _gather_rows(padded, None if decode else context.group, order)
    context.in_collectives = False
    restored = gathered.index_select(0, places)
    requests.lengths = [old + new for old, new in zip(requests.lengths, lengths, strict=True)]
    if context.comparison is not None:
        requests.history = [hash((old, *new)) for old, new in zip(requests.history, tokens, strict=True)]
    return restored
