"""``kv_b_proj``: whether it is its weight and nothing else, its part for some heads, and K and V by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn.modules import module as _modules

from ..ops.kv_up_project import expand, kv_up_project
from ..plan.dims import MLADims

KVProjection = torch.nn.Module | torch.Tensor
Projection = KVProjection | Callable[[torch.Tensor], torch.Tensor]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _own(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A parameter, past ``Module.__getattr__``, unless something else has its name."""
    parameters = module._parameters
    return parameters[name] if name in parameters and name not in module.__dict__ else getattr(module, name)


def weight_of(kv_b_proj: KVProjection) -> tuple[torch.Tensor | None, bool]:
    """The weight of what is called, but has the one that it says, and whether a product with it is all that ``kv_b_proj`` does.

    Subclasses of Linear and of Tensor may hold a weight quantised or in shards, forwards of an instance and hooks before it may put
    another one in its place: of these modules None. A bias and hooks behind change what comes of it. Looked at in every call, as
    hooks come and go.
    """
    if isinstance(kv_b_proj, torch.Tensor):
        return kv_b_proj, type(kv_b_proj) in _PLAIN
    if type(kv_b_proj) is not torch.nn.Linear or "forward" in kv_b_proj.__dict__:
        return None, False
    if kv_b_proj._forward_pre_hooks or _modules._global_forward_pre_hooks:
        return None, False
    weight = _own(kv_b_proj, "weight")
    if type(weight) not in _PLAIN:
        return None, False
    hooked = kv_b_proj._forward_hooks or _modules._global_forward_hooks
    return weight, not hooked and _own(kv_b_proj, "bias") is None


def plain_weight(kv_b_proj: KVProjection) -> torch.Tensor | None:
    """[heads * (nope + v), kv_lora_rank] if a product with it is all that ``kv_b_proj`` does."""
    weight, plain = weight_of(kv_b_proj)
    return weight if plain else None


def some_heads(dims: MLADims, heads: slice) -> tuple[MLADims, slice]:
    """Widths of a layer of these heads alone, and their rows in the weight of all."""
    rows = slice(heads.start * dims.expanded_dim, heads.stop * dims.expanded_dim)
    return replace(dims, num_heads=heads.stop - heads.start), rows


def _linear(weight: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(latents, weight)


def rows_of(kv_b_proj: KVProjection, rows: slice) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The product with these rows of a weight and their bias, where that is all that ``kv_b_proj`` does, and it is not
    :func:`plain_weight`, whose rows are a weight themselves. None of others: what they make of all rows they need not of some."""
    weight, _ = weight_of(kv_b_proj)
    if weight is None or isinstance(kv_b_proj, torch.Tensor) or kv_b_proj._forward_hooks or _modules._global_forward_hooks:
        return None
    bias = _own(kv_b_proj, "bias")
    if type(bias) not in _PLAIN:
        return None
    assert bias is not None
    return partial(torch.nn.functional.linear, weight=weight[rows], bias=bias[rows])


def expand_rows(
    latents: torch.Tensor,
    rows: torch.Tensor,
    kv_b_proj: Projection,
    dims: MLADims,
    apart: bool,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """K [n, heads, nope + rope] and V [n, heads, v] of the latents at ``rows`` (int32 [n]), by a weight, a module or a function;
    with ``apart`` K [n, heads, nope], and last k_pe [n, rope]. Of ``dtype``, as the latents if these have no ``scale``."""
    weight = plain_weight(kv_b_proj) if isinstance(kv_b_proj, torch.Tensor | torch.nn.Module) else None
    if weight is not None:
        return expand(latents, rows, weight, dims, apart, scale)
    linear = partial(_linear, kv_b_proj) if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj
    return kv_up_project(latents, rows, None, dims, linear=linear, scale=scale, dtype=dtype, k_pe_apart=apart)
