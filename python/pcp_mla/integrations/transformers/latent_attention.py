"""Attention of a decode step over the latents themselves: ``kv_b_proj`` is applied to the few queries, not to all keys.

A head's score with a key is q_nope . (W_k kv_c) + q_pe . k_pe = (W_k^T q_nope) . kv_c + q_pe . k_pe, and its output W_v applied to
the sum of weighted kv_c (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). So all heads are queries over one head of keys as wide as
a latent, with kv_c as values.
"""

from __future__ import annotations

import torch

from ...ops.attention.call import run_rows
from ...ops.attention.libraries import Rows
from ...ops.attention.support import choose
from ...plan.dims import MLADims
from ...plan.metadata import PCPMetadata


def latent_attention(
    q: torch.Tensor, weight: torch.Tensor, meta: PCPMetadata, cache: torch.Tensor, dims: MLADims, softmax_scale: float
) -> torch.Tensor:
    """Every query attends to all keys of its request, whose new latents are in the cache already.

    Args:
        q: [T, heads, nope + rope] in local order, rope applied.
        weight: [heads * (nope + v), kv_lora_rank] of ``kv_b_proj``.
        meta: a world of one rank, one token a request, planned with block tables.
        cache: [num_blocks, block_size, W] contiguous.

    Returns:
        [T, heads, v].
    """
    tokens, heads, rank = q.shape[0], dims.num_heads, dims.kv_lora_rank
    by_head = weight.view(heads, dims.expanded_dim, rank)
    nope = dims.qk_nope_head_dim
    q_c = torch.bmm(q[..., :nope].transpose(0, 1), by_head[:, :nope]).transpose(0, 1)
    queries = torch.cat([q_c, q[..., nope:]], dim=-1).view(tokens * heads, 1, dims.latent_dim)
    keys, kv_rows = cache.view(-1, 1, dims.latent_dim), meta.kv_rows
    assert kv_rows is not None
    backend = choose("auto", q.device, q.dtype, dims.latent_dim, rank, True)
    if backend == "torch":  # which is faster over keys that lie together
        keys, kv_rows = keys.index_select(0, kv_rows.clamp(min=0)), None
    rows = Rows(
        meta.cu_seqlens_q * heads, meta.cu_seqlens_k, meta.seqused_k, meta.max_seqlen_q * heads, meta.max_seqlen_k, causal=False
    )
    summed, _ = run_rows(backend, queries, keys, keys[..., :rank], rows, softmax_scale, False, kv_rows=kv_rows)
    out = torch.bmm(summed.view(tokens, heads, rank).transpose(0, 1), by_head[:, nope:].transpose(1, 2))
    return out.transpose(0, 1)
