"""The model's own forward under PCP, so that calls of it, and transformers' ``generate``, work as without."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .context import PCPContext, context_of
from .model_step import run_step
from .paged_cache import CachedRequests
from .requests import check_token_ids


class PCPCache(Cache):
    """``past_key_values`` of a model under PCP: requests in the latent cache, which go when this goes. A copy shares their blocks.

    Attributes:
        requests: real tokens only.
        columns: of the ``input_ids`` so far, pads counted, which is what transformers takes for the length.
    """

    def __init__(self, context: PCPContext) -> None:
        self.context, self.requests, self.columns = context, CachedRequests(), 0
        super().__init__(layers=[])

    def __del__(self) -> None:
        self.context.blocks.release(self.requests)

    def __copy__(self) -> PCPCache:
        copy = PCPCache(self.context)
        copy.take(self._chosen(range(len(self.requests.lengths))), self.columns)
        return copy

    def __deepcopy__(self, memo: Any) -> PCPCache:
        return self.__copy__()

    def _chosen(self, indices: Iterable[int]) -> CachedRequests:
        lengths = self.requests.lengths
        return self.context.blocks.fork_prefixes(self.requests, [(i, lengths[i]) for i in indices])

    def take(self, requests: CachedRequests, columns: int) -> None:
        """These take the place of the requests so far."""
        self.context.blocks.release(self.requests)
        self.requests, self.columns = requests, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reset(self) -> None:
        self.take(CachedRequests(), 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Request i becomes what request ``beam_idx[i]`` was."""
        self.take(self._chosen(beam_idx.tolist()), self.columns)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.requests.lengths)).repeat_interleave(repeats))

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("PCPCache.crop: not supported, nor is what needs it (assisted generation)")


def _cache_of(context: PCPContext, given: Any) -> PCPCache:
    """The cache to go on with. An empty one of another kind stands for a new one from then on."""
    cache = getattr(given, "pcp_cache", given)
    if not isinstance(cache, PCPCache):
        if given is not None and given.get_seq_length():
            raise TypeError(f"forward: past_key_values must be of a model under PCP or empty, got a filled {type(given).__name__}")
        cache = PCPCache(context)
        if given is not None:
            given.pcp_cache = cache
    if cache.context is not context:
        raise ValueError("forward: past_key_values must be of this model since it is under PCP, got another's")
    return cache


def _new_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, columns: int, lengths: list[int]) -> torch.Tensor:
    """bool [B, S], on the CPU: which of the new columns are tokens. ``lengths`` of the requests so far."""
    batch, width = input_ids.shape
    if attention_mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    if attention_mask.dim() != 2 or attention_mask.shape != (batch, columns + width):
        wanted = f"[batch, columns so far and new] = {(batch, columns + width)}"
        raise ValueError(f"forward: attention_mask must be {wanted}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool().cpu()
    if mask[:, :columns].sum(1).tolist() != lengths:
        raise ValueError("forward: attention_mask must have what it had before for the columns so far, got a change")
    return mask[:, columns:]


def _check_positions(position_ids: torch.Tensor | None, real: torch.Tensor, lengths: list[int]) -> None:
    """Positions count a request's real tokens: a call that wants others would get wrong results."""
    if position_ids is None:
        return
    expected = real.long().cumsum(1) - 1 + torch.tensor(lengths)[:, None]
    if not torch.equal(position_ids.cpu().expand_as(real)[real], expected[real]):
        raise ValueError("forward: position_ids must count the tokens of each request from 0, pads left out, got others")


@torch.no_grad()
def model_forward(
    model: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **options: Any,
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    """Logits of a batch of prompts, or of what follows one, with the requests in ``past_key_values``.

    As transformers' own forward, but for what inference has no use for. Every rank is given the same batch and gets all logits.

    Args:
        input_ids: int64 [B, S].
        attention_mask: [B, S so far and new], 0 at pads, on either side; pads are not computed, their hidden states are 0.
        position_ids: [B, S] or [1, S], if given those that follow from the mask.
        past_key_values: None, the :class:`PCPCache` of an earlier call, which is updated, or an empty cache of any kind, which
            stands for a new one in later calls.
        logits_to_keep: how many of the last columns, or which columns; 0 for all.

    Raises:
        ValueError, TypeError: an argument does not fit the others.
        NotImplementedError: an option that a model under PCP has not (labels, embeddings, all hidden states, attention weights).
    """
    context = context_of("forward", model)
    return_dict = options.pop("return_dict", None)
    options.pop("cache_position", None)  # of transformers before 5.4: what follows from the cache
    unknown = [name for name, value in options.items() if value is not None and value is not False]
    if unknown:
        raise NotImplementedError(f"forward: {', '.join(unknown)} not supported by a model under PCP")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise TypeError(f"forward: input_ids must be a tensor [batch, tokens], got {type(input_ids).__name__}")
    cache = _cache_of(context, past_key_values)
    batch, width = input_ids.shape
    if cache.columns and len(cache.requests.lengths) != batch:
        raise ValueError(f"forward: input_ids must have the {len(cache.requests.lengths)} requests of the cache, got {batch}")
    started = cache.requests if cache.columns else CachedRequests([0] * batch, [[] for _ in range(batch)])
    real = _new_tokens(input_ids, attention_mask, cache.columns, started.lengths)
    _check_positions(position_ids, real, started.lengths)
    tokens = [row[mask].tolist() for row, mask in zip(input_ids.cpu(), real, strict=True)]
    check_token_ids("forward", model, tokens)
    extended = context.blocks.fork(started)
    is_decode = cache.columns > 0 and all(len(new) == 1 for new in tokens)
    with context.blocks.released_on_failure(extended):
        if any(tokens):
            hidden = run_step(model, context, extended, tokens, is_decode)
        else:  # nothing but pads
            hidden = model.lm_head.weight.new_zeros(0, model.config.hidden_size)
    keep = model.config.use_cache if use_cache is None else use_cache
    if keep:
        cache.take(extended, cache.columns + width)
    else:
        context.blocks.release(extended)
    columns = hidden.new_zeros(batch, width, hidden.shape[1])
    columns[real.to(hidden.device)] = hidden
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
    result = CausalLMOutputWithPast(logits=model.lm_head(columns[:, kept]), past_key_values=cache if keep else None)
    return result.to_tuple() if return_dict is False else result
