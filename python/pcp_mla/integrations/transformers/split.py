"""Whether the layers of a model under PCP can be shared out by heads, which all ranks find out together when it is enabled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...exchange.peer_memory import agree
from ...groups import Group, check_all_to_all, group_world_size
from ...layer.projection import plain_weight, rows_of, weight_of
from ...plan.dims import MLADims
from .shards import local_projection


def own_heads(model: Any, dims: MLADims) -> tuple[list[int], str]:
    """How many heads the attention modules have on this rank, of which tensor parallelism may leave it some; and what kind of
    ``kv_b_proj`` the first one has whose heads cannot be had alone, or ""."""
    counts = set()
    for number, layer in enumerate(model.model.layers):
        projection = local_projection(layer.self_attn.kv_b_proj)
        weight, _ = weight_of(projection)
        if weight is None or (plain_weight(projection) is None and rows_of(projection, slice(0)) is None):
            return [], f"a {type(projection).__name__} in layer {number}"
        counts.add(weight.shape[0] // dims.expanded_dim)
    return sorted(counts), ""


def _refusal(told: list[dict[str, Any]], group: Group) -> Exception | None:
    """Why some rank cannot compute some heads for all tokens, if one cannot."""
    try:
        check_all_to_all("enable_pcp", group, " for split 'heads'")
    except TypeError as error:
        return error
    for rank, each in enumerate(told):
        if each["module"]:
            return NotImplementedError(
                f"enable_pcp: kv_b_proj must be a Linear without hooks in all layers for split 'heads', got {each['module']} on "
                f"rank {rank}"
            )
    counts = sorted({count for each in told for count in each["heads"]})
    if len(counts) != 1:
        return ValueError(f"enable_pcp: model must have equally many heads in all layers and ranks for split 'heads', got {counts}")
    if counts[0] < len(told):
        return ValueError(f"enable_pcp: model must have a head for each of {len(told)} ranks for split 'heads', got {counts[0]}")
    return None


def agree_on_heads(
    model: Any, group: Group, split: str, dims: MLADims, device: torch.device, scales: list[float] | None = None
) -> MLADims | None:
    """Widths of what an exchange of heads exchanges, with as many heads as this rank's modules have; None where no step can be
    shared out by heads, or none would be. All ranks come to the same, in two small collectives, and have caches of one kind.

    Raises:
        ValueError, TypeError, NotImplementedError: on every rank, where :func:`.enable.enable_pcp` says so.
    """
    if group_world_size(group) == 1:
        return None
    heads, module = own_heads(model, dims)
    told = agree(group, device, {"split": split, "heads": heads, "module": module, "scales": scales})
    splits = [each["split"] for each in told]
    if len(set(splits)) > 1:
        raise ValueError(f"enable_pcp: split must be the same on all ranks, got {', '.join(splits)} by rank")
    if any(each["scales"] != scales for each in told):
        raise ValueError("enable_pcp: cache_dtype and cache_scale must be the same on all ranks")
    if split == "tokens":
        return None
    refusal = _refusal(told, group)
    if split == "heads" and refusal is not None:
        raise refusal
    wanted = split == "heads" or device.type == "cuda"  # by its cost it is never taken on a CPU
    return replace(dims, num_heads=heads[0]) if wanted and refusal is None else None
