"""transformers' own forwards with something else in the place of what they would call.

A model's attention does more than project: it rotates, norms, scales queries by their position. All that stays its own code, run
with two things replaced: the expansion of latents to K and V, which is in a method ``expand_kv`` (in ``kv_b_proj``, before
transformers had that), and the attention function, which transformers looks up by the name in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from .stock import ALL_ATTENTION_FUNCTIONS

_NAME = "pcp_mla"
# What modules hand on to an attention function, and it need not know.
_KNOWN = ("position_ids", "use_cache", "cache_position", "return_dict")


class StandIn:
    """``self`` for a forward: an object as it is, but for what is replaced."""

    def __init__(self, stood_for: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, stood_for=stood_for)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["stood_for"]
        if name not in own.__dict__:
            method = next((vars(kind)[name] for kind in type(own).__mro__ if name in vars(kind)), None)
            if isinstance(method, FunctionType):
                return MethodType(method, self)
        return getattr(own, name)


def _attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    strange = [name for name, option in options.items() if option is not None and option is not False and name not in _KNOWN]
    if dropout:
        strange.append("dropout")
    if is_causal is False:
        strange.append("keys behind a query")
    if attention_mask is not module.mask:
        strange.append("a mask of its own")
    if strange:
        raise NotImplementedError(f"attention: {type(module.stood_for).__name__} must have no {', '.join(strange)} under PCP")
    return module.attend(query, *module.latents(key, value), query.shape[-1] ** -0.5 if scaling is None else scaling), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention_function)


class AttentionStandIn(StandIn):
    """An attention module whose forward calls ``attend(q, k_pe, kv_c, scale)``, with q [1, heads, T, nope + rope], k_pe [1, 1, T,
    rope] and kv_c [1, 1, T, kv_lora_rank] as they are cached, for [1, T, heads, v]. Its ``kv_b_proj`` is not called."""

    def __init__(self, attention: Any, attend: Callable[..., torch.Tensor], mask: Any) -> None:
        config = StandIn(attention.config, _attn_implementation=_NAME)
        super().__init__(attention, attend=attend, mask=mask, config=config, kv_c=None)
        self.kv_b_proj = self._keep
        if hasattr(attention, "expand_kv"):
            self.expand_kv = lambda kv_c, k_pe: (k_pe, kv_c)

    def _keep(self, kv_c: torch.Tensor) -> torch.Tensor:
        """In place of ``kv_b_proj``, for a forward that makes K and V itself: those of one head, of which k_pe alone is read."""
        self.kv_c = kv_c[:, None]
        return kv_c.new_zeros(1).expand(*kv_c.shape[:-1], self.qk_nope_head_dim + self.v_head_dim)

    def latents(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k_pe and kv_c of what the forward takes for K and V."""
        return (key, value) if self.kv_c is None else (key[..., self.qk_nope_head_dim :], self.kv_c)


def own_attention(attention: Any, attend: Callable[..., torch.Tensor], *args: Any, **options: Any) -> Any:
    """What the forward of the module's class returns for these arguments, with ``attend`` for its attention."""
    mask = options.get("attention_mask")
    return type(attention).forward(AttentionStandIn(attention, attend, mask), *args, **options)


class _Hidden:
    """Output of a model without its head."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def own_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] of last hidden states [..., hidden] by the forward of the model's class: some scale them."""
    behind = StandIn(model, model=lambda **_: _Hidden(hidden.reshape(1, -1, hidden.shape[-1])))
    logits = type(model).forward(behind, return_dict=True).logits
    return logits.view(*hidden.shape[:-1], logits.shape[-1])
