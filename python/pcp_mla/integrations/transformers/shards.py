"""What transformers' tensor parallelism makes of a ``kv_b_proj``, seen through: a product with this rank's rows of its weight."""

from __future__ import annotations

import contextlib
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from ...layer.projection import KVProjection

COLWISE: type | None = None
with contextlib.suppress(ImportError):  # of another transformers: its modules are called
    from transformers.distributed.tensor_parallel import ColwiseParallel as COLWISE


def local_projection(kv_b_proj: Any) -> KVProjection:
    """This rank's rows of the weight, if a product with them is all that ``kv_b_proj`` does under tensor parallelism; else itself.
    Looked at in every call, as hooks come and go."""
    weight, forward = kv_b_proj._parameters.get("weight"), kv_b_proj.__dict__.get("forward")
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),) or not isinstance(forward, FunctionType):
        return kv_b_proj
    hooked = torch.nn.modules.module._has_any_global_hook() or kv_b_proj._forward_hooks or kv_b_proj._forward_pre_hooks
    if type(kv_b_proj) is not torch.nn.Linear or kv_b_proj.bias is not None or hooked:
        return kv_b_proj
    cells = (cell.cell_contents for cell in forward.__closure__ or ())
    within = dict(zip(forward.__code__.co_freevars, cells, strict=True))
    style, inner = within.get("self"), within.get("original_forward")
    plain = inner == MethodType(torch.nn.Linear.forward, kv_b_proj)
    if type(style) is not COLWISE or style.output_layouts != Shard(-1) or not style.use_local_output or not plain:
        return kv_b_proj
    return weight.to_local().detach()
