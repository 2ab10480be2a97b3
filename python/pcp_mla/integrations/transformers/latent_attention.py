"""Attention of a decode step over the latents themselves: ``kv_b_proj`` is applied to the few queries, not to all keys.

A head's score with a key is q_nope . (W_k kv_c) + q_pe . k_pe = (W_k^T q_nope) . kv_c + q_pe . k_pe, and its output W_v applied to
the sum of weighted kv_c (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). So all heads are queries over one head of keys as wide as
a latent, with kv_c as values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...ops.attention.call import run_rows
from ...ops.attention.libraries import Rows
from ...ops.attention.support import choose
from ...ops.latent_cache import gather_latents
from ...plan.dims import MLADims
from ...plan.metadata import PCPMetadata


class TokenRows(NamedTuple):
    """The tokens of a decode step as rows of their own: drafts see those before them, and a mask would be of heads beside tokens.

    Attributes:
        cu_seqlens_k: [T+1] where the keys of each token's request start.
        seqused_k: [T] keys up to the token, 0 of a pad.
    """

    cu_seqlens_k: torch.Tensor
    seqused_k: torch.Tensor

    @classmethod
    def of(cls, meta: PCPMetadata) -> TokenRows:
        """Of a plan for a world of one rank, whose local order is the natural one; pads behind it."""
        real = meta.local_token_indices >= 0
        tokens = torch.arange(real.shape[0] + 1, dtype=torch.int32, device=real.device)
        row = torch.searchsorted(meta.cu_seqlens_q[1:], tokens, right=True)
        return cls(meta.cu_seqlens_k.index_select(0, row), torch.where(real, meta.positions + 1, 0))


def latent_attention(
    q: torch.Tensor,
    weight: torch.Tensor,
    meta: PCPMetadata,
    rows: TokenRows,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    dims: MLADims,
    softmax_scale: float,
) -> torch.Tensor:
    """Every query attends to the keys of its request up to itself, whose new latents are in the cache already.

    Args:
        q: [T, heads, nope + rope] in local order, rope applied.
        weight: [heads * (nope + v), kv_lora_rank] of ``kv_b_proj``.
        meta: a world of one rank, of decodes alone, planned with block tables.
        rows: its tokens.
        cache: [num_blocks, block_size, W] contiguous.
        cache_scale: of a float8 cache, whose keys are brought together in q's dtype first.

    Returns:
        [T, heads, v].
    """
    tokens, heads, rank = q.shape[0], dims.num_heads, dims.kv_lora_rank
    by_head = weight.view(heads, dims.expanded_dim, rank)
    nope = dims.qk_nope_head_dim
    q_c = torch.bmm(q[..., :nope].transpose(0, 1), by_head[:, :nope]).transpose(0, 1)
    queries = torch.cat([q_c, q[..., nope:]], dim=-1).view(tokens * heads, 1, dims.latent_dim)
    kv_rows = meta.kv_rows
    assert kv_rows is not None
    if cache_scale is None:
        keys = cache.view(-1, 1, dims.latent_dim)
    else:
        keys, kv_rows = gather_latents(cache, kv_rows, scale=cache_scale, dtype=q.dtype)[:, None], None
    backend = choose("auto", q.device, q.dtype, dims.latent_dim, rank, True)
    if backend == "torch" and kv_rows is not None:  # which is faster over keys that lie together
        keys, kv_rows = keys.index_select(0, kv_rows.clamp(min=0)), None
    cu_seqlens_q = torch.arange(0, (tokens + 1) * heads, heads, dtype=torch.int32, device=q.device)
    all_rows = Rows(cu_seqlens_q, *rows, heads, meta.max_seqlen_k, causal=False)
    summed, _ = run_rows(backend, queries, keys, keys[..., :rank], all_rows, softmax_scale, False, kv_rows=kv_rows)
    out = torch.bmm(summed.view(tokens, heads, rank).transpose(0, 1), by_head[:, nope:].transpose(1, 2))
    return out.transpose(0, 1)
