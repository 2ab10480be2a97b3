"""The model's own forward under PCP, so that calls of it, and transformers' ``generate``, work as without."""

from __future__ import annotations

import operator
from typing import Any

import torch

from .caches import CACHE_WORD, PCPCache, empty_cache
from .calls import in_turn
from .context import context_at_place
from .model_step import run_step
from .paged_cache import CachedRequests
from .requests import check_token_ids
from .stand_in import own_logits
from .stock import CausalLMOutputWithPast

# New tokens of a request behind cached ones, as of a draft that is to be verified, up to which every rank computes all of them: in
# a step without collectives, of which so few tokens cost no more than one, and by attention that expands no keys.
_DECODE_TOKENS = 32

# What a config, too, can ask for. A model under PCP has its own tokens' states only, and no attention weights.
_RECORDINGS = ("output_attentions", "output_hidden_states", "output_router_logits")


def _check_options(model: Any, options: dict[str, Any]) -> None:
    recordings = {name: getattr(model.config, name, None) for name in _RECORDINGS}
    unknown = [name for name, value in (recordings | options).items() if value is not None and value is not False]
    if unknown:
        raise NotImplementedError(f"forward: {', '.join(unknown)} not supported by a model under PCP")


def _new_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, before: torch.Tensor) -> torch.Tensor:
    """bool [B, S], on the CPU: which of the new columns are tokens. ``before`` [B, columns] likewise for those so far."""
    batch, width = input_ids.shape
    if attention_mask is None:
        if not before.all():
            raise ValueError("forward: attention_mask must be given, as the cache has pads, got None")
        return torch.ones(batch, width, dtype=torch.bool)
    columns = before.shape[1]
    if attention_mask.dim() != 2 or attention_mask.shape != (batch, columns + width):
        wanted = f"[batch, columns so far and new] = {(batch, columns + width)}"
        raise ValueError(f"forward: attention_mask must be {wanted}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool().cpu()
    if not torch.equal(mask[:, :columns], before):
        raise ValueError("forward: attention_mask must have what it had before for the columns so far, got a change")
    return mask[:, columns:]


def _positions(position_ids: torch.Tensor | None, batch: int, width: int, columns: int) -> torch.Tensor:
    """int64 [B, S], on the CPU: as given, or columns from the first on, as in the stock model. Only differences within a request
    count, so pads before all of its tokens change nothing."""
    if position_ids is None:
        return torch.arange(columns, columns + width).expand(batch, width)
    if position_ids.shape not in ((batch, width), (1, width)):
        raise ValueError(f"forward: position_ids must be {(batch, width)} or {(1, width)}, got {tuple(position_ids.shape)}")
    return position_ids.cpu().long().expand(batch, width)


def _kept(numbers: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Those of ``numbers`` [B, S] whose logits are wanted: [B, n], or [n] by a mask."""
    if not isinstance(logits_to_keep, torch.Tensor):
        try:
            return numbers[:, slice(-operator.index(logits_to_keep), None)]  # 0 keeps all
        except TypeError:
            got = type(logits_to_keep).__name__
            raise TypeError(f"forward: logits_to_keep must be an int or a tensor of columns, got {got}") from None
    columns = logits_to_keep.cpu()
    if columns.dim() < 2:
        return numbers[:, columns]
    return numbers[columns] if columns.dtype == torch.bool else numbers.take_along_dim(columns, 1)


@torch.compiler.disable  # Lengths, blocks and plans change with every call. Modules that are compiled by themselves stay so.
@in_turn("forward")
@torch.no_grad()
def model_forward(
    model: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    cache: Any = None,
    **options: Any,
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    """Logits of a batch of prompts, or of what follows one, with the requests in ``past_key_values``.

    As transformers' own forward, but for what inference has no use for. Every rank is given the same batch and gets all logits.

    Args:
        input_ids: int64 [B, S].
        attention_mask: [B, S so far and new], 0 at pads, wherever they are; pads are not computed, their hidden states are 0.
        position_ids: [B, S] or [1, S]; without them positions count columns, pads too, as in the stock model.
        past_key_values: None, the :class:`PCPCache` of an earlier call, which is updated, or an empty ``DynamicCache``, which
            becomes one. Of two forwards' names for it, ``past_key_values`` and ``cache``, either can be used.
        logits_to_keep: how many of the last columns, or which columns, [n], [B, n] or bool [B, S]; 0 for all. Other hidden states
            are not exchanged.

    Raises:
        ValueError, TypeError: an argument does not fit the others, or the model is no longer in its dtype and on its device.
        NotImplementedError: an option that a model under PCP has not (labels, embeddings, all hidden states, attention weights,
            also if its configuration asks for them), a cache of another kind, or packed sequences.
        RuntimeError: with ``PCP_MLA_CHECK=1``, on every rank, if the ranks' calls or arguments differ, or another rank fails.
    """
    context = context_at_place("forward", model)
    return_dict = options.pop("return_dict", None)
    options.pop("cache_position", None)  # of transformers before 5.4: what follows from the cache
    _check_options(model, options)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise TypeError(f"forward: input_ids must be a tensor [batch, tokens], got {type(input_ids).__name__}")
    if cache is not None and past_key_values is not None:
        raise TypeError("forward: cache must be given once, got cache and past_key_values")
    given = past_key_values if cache is None else cache
    stored = PCPCache(context) if given is None or empty_cache(given) else given
    if stored.context is not context:
        raise ValueError(f"forward: {CACHE_WORD} must be of this model since it is under PCP, got another's")
    batch, width = input_ids.shape
    if stored.columns and stored.real.shape[0] != batch:
        raise ValueError(f"forward: input_ids must have the {stored.real.shape[0]} requests of the cache, got {batch}")
    before = stored.real if stored.columns else torch.ones(batch, 0, dtype=torch.bool)
    started = stored.requests if stored.columns else CachedRequests([0] * batch, [[] for _ in range(batch)])
    real = _new_tokens(input_ids, attention_mask, before)
    positions = _positions(position_ids, batch, width, stored.columns)
    keep = given is not None or (model.config.use_cache if use_cache is None else use_cache)
    if attention_mask is None and not keep and bool((positions.diff(dim=1) != 1).any()):
        raise NotImplementedError(
            "forward: position_ids that jump, without mask and cache, are packed sequences: give each its row"
        )
    tokens = [row[mask].tolist() for row, mask in zip(input_ids.cpu(), real, strict=True)]
    check_token_ids("forward", model, tokens)
    total = sum(map(len, tokens))
    numbers = torch.full((batch, width), -1)
    numbers[real] = torch.arange(total)
    kept = _kept(numbers, logits_to_keep)
    wanted = kept >= 0
    rows = None if torch.equal(kept, numbers) else kept[wanted]
    extended = context.blocks.fork(started)
    decodes = [stored.columns > 0 and all(len(new) <= _DECODE_TOKENS for new in tokens)] * batch
    with context.blocks.released_on_failure(extended):
        if total:
            hidden = run_step(model, context, extended, tokens, decodes, positions=positions[real], rows=rows)
        else:  # nothing but pads
            hidden = context.blocks.cache.new_zeros(0, model.config.hidden_size, dtype=context.blocks.dtype)
        placed = hidden.new_zeros(*kept.shape, hidden.shape[1])
        placed[wanted.to(hidden.device)] = hidden
        logits = own_logits(model, placed)
        context.wait_for_all()
    if not keep:
        context.blocks.release(extended)
    else:
        if given is not None and given is not stored:
            stored = PCPCache.adopt(given, context)
        stored.take(extended, torch.cat([before, real], 1))
    fields: dict[str, Any] = {"logits": logits, CACHE_WORD: stored if keep else None}
    result = CausalLMOutputWithPast(**fields)
    return result if (model.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
