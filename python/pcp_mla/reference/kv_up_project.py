"""kv_up_project: K and V of all heads from latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .concat_k import concat_k
from .latent_cache import gather_latents

UP_PROJECT_TILE = 128  # rows behind the last one are zeroed up to a multiple of this


def zero_tail(out: torch.Tensor, count: int) -> None:
    """Rows of ``out`` from ``count`` to the next multiple of UP_PROJECT_TILE."""
    if len(out) > count:
        out[count : -(-count // UP_PROJECT_TILE) * UP_PROJECT_TILE].zero_()


def kv_up_project(
    latents: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    k_pe_out: torch.Tensor | None,
) -> None:
    """Row n of ``latents``, or the row ``rows[n]`` of them, is ``kv_c`` [kv_lora_rank] and ``k_pe`` [rope] side by side.
    With a ``scale`` they are float8_e4m3fn, and are multiplied by it and rounded to the weight's dtype.

    ``weight @ kv_c`` has, head after head, nope numbers for K and v numbers for V; each head's K is completed by ``k_pe``, or with
    ``k_pe_out`` [rows, rope] ``k_pe`` goes there, once. Rows without a latent (-1) and rows of the results behind the last one, up
    to a multiple of UP_PROJECT_TILE, are zeros.
    """
    flat = latents.flatten(0, -2)
    if rows is not None:
        gathered = weight.new_empty(len(rows), flat.shape[1])
        gather_latents(latents, rows, None, None, None, scale, gathered)
        flat = gathered
    elif scale is not None:
        flat = (flat.float() * scale).to(weight.dtype)
    kv_c, k_pe = flat.split([weight.shape[1], flat.shape[1] - weight.shape[1]], dim=1)
    count, heads, v_dim = len(flat), *v_out.shape[1:]
    expanded = F.linear(kv_c, weight).view(count, heads, weight.shape[0] // heads)
    if k_pe_out is None:
        concat_k(expanded[..., :-v_dim], k_pe, k_out[:count])
    else:
        k_out[:count] = expanded[..., :-v_dim]
        k_pe_out[:count] = k_pe
        zero_tail(k_pe_out, count)
    v_out[:count] = expanded[..., -v_dim:]
    zero_tail(k_out, count)
    zero_tail(v_out, count)
