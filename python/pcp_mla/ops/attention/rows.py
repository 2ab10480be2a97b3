"""Attention row by row on torch's scaled_dot_product_attention: what a CPU has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .libraries import in_reach

# Numbers in a mask that is made at a time.
_BLOCK = 2**24


def attend_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool = True) -> torch.Tensor:
    """Attention of one row, causal and aligned bottom-right (query j of n sees the first m - n + j + 1 of m keys) or to all keys.

    q [n, heads, D], k [m, heads, D], v [m, heads, Dv], m >= n >= 1; returns [n, heads, Dv].
    """
    n, m, width = q.shape[0], k.shape[0], v.shape[2]
    if q.device.type == "cpu" and width < q.shape[2]:
        # torch's flash kernel for CPUs takes one width; without it all scores are in memory at a time, and it is slower.
        v = F.pad(v, (0, q.shape[2] - width))
    # On a GPU torch may choose a kernel by the widths that then has no form for these addresses.
    q, k, v = (in_reach(x).transpose(0, 1)[None] for x in (q, k, v))
    # torch's is_causal is aligned top-left: only right for n = m. A single query sees every key.
    if n in (1, m) or not causal:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and n > 1, scale=softmax_scale)
        return out[0, ..., :width].transpose(0, 1)
    pieces = []
    block = max(1, _BLOCK // m)
    for first in range(0, n, block):
        last = min(first + block, n)
        seen = m - n + last
        mask = torch.ones(last - first, seen, dtype=torch.bool, device=q.device).tril(m - n + first)
        queries, keys, values = q[:, :, first:last], k[:, :, :seen], v[:, :, :seen]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=softmax_scale)
        pieces.append(out[0, ..., :width].transpose(0, 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
) -> None:
    """What :func:`pcp_mla.reference.attention` computes, without lists of keys, an earlier result or an LSE. The lengths are
    read on the host."""
    starts, first_keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row, count in enumerate(seqused_k.tolist()):
        queries, keys = slice(starts[row], starts[row + 1]), slice(first_keys[row], first_keys[row] + count)
        if count:
            out[queries] = attend_row(q[queries], k[keys], v[keys], softmax_scale, causal)
        else:
            out[queries] = 0
