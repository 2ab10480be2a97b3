"""Where the weights of a model are, and copies of its modules over the same ones."""

from __future__ import annotations

import copy
from typing import Any

import torch


def model_place(model: Any) -> tuple[torch.dtype, torch.device]:
    """Where the model computes, and in which dtype. ValueError if its weights are on the meta device and nothing moves them."""
    embedding = model.model.embed_tokens
    dtype, device = embedding.weight.dtype, embedding.weight.device
    if device.type == "meta":  # offloaded: hooks move weights and inputs
        with torch.no_grad():
            embedded = embedding(torch.zeros(1, dtype=torch.int64))
        dtype, device = embedded.dtype, embedded.device
    if device.type == "meta":
        raise ValueError("enable_pcp: model must have weights, or hooks that bring them, got weights on the meta device")
    return dtype, device


def copy_sharing_weights(model: torch.nn.Module) -> Any:
    """A copy of the module tree over the same parameters and buffers. The copy of a model under PCP is not under PCP."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    context = model.__dict__.get("_pcp")
    memo[id(context)] = context
    other = copy.deepcopy(model, memo)
    if context is not None:
        del other.__dict__["_pcp"]
        for replaced in context.replaced:
            replaced.put_back_in_copy(memo)
    return other
