"""One MLA layer under prefill context parallelism: latents of this rank in, attention output of this rank out.

Every stage is one small function, so that a fused kernel can take its place. Nothing is gathered or restored around the attention:
the head and the tail of a request are two rows over one K/V prefix, and q is in local order already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .exchange import Group, all_gather_latents
from .metadata import PCPMetadata


@dataclass(frozen=True)
class MLADims:
    """Widths of an MLA layer: q and k are ``qk_head_dim`` wide, v ``v_head_dim``, a latent ``kv_lora_rank + qk_rope_head_dim``."""

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def expanded_dim(self) -> int:
        """Of a head in ``kv_b_proj``'s output."""
        return self.qk_nope_head_dim + self.v_head_dim

    @property
    def latent_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


KVProjection = torch.nn.Module | torch.Tensor


def check_layer_inputs(op: str, q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, meta: PCPMetadata, dims: MLADims) -> None:
    """Raise ValueError or TypeError unless the shapes and dtypes are those of ``dims`` and ``meta``."""
    wanted = {
        "q": (q, (meta.num_tokens, dims.num_heads, dims.qk_head_dim)),
        "kv_c": (kv_c, (meta.num_tokens, dims.kv_lora_rank)),
        "k_pe": (k_pe, (meta.num_tokens, dims.qk_rope_head_dim)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype}, as q, got {tensor.dtype}")


def restore_to_key_order(gathered: torch.Tensor, meta: PCPMetadata, context: torch.Tensor | None = None) -> torch.Tensor:
    """Latents of the new tokens in natural order, each request's cached ones in front of them.

    Args:
        gathered: [P * Np, W] rank-major.
        context: [sum(context_lens), W] cached latents in natural order; None if no request has any.

    Returns:
        [N, W] in key order.

    Raises:
        ValueError: ``context`` has not as many rows as ``meta`` counts, or another width.
    """
    part = meta.partition
    new = gathered.index_select(0, meta.allgather_restore_idx[: int(part.padded_lens.sum())])  # a padded plan's index has more
    cached = int(part.context_lens.sum())
    shape = (0, gathered.shape[1]) if context is None else tuple(context.shape)
    if shape != (cached, gathered.shape[1]):
        raise ValueError(f"restore_to_key_order: context must have shape {(cached, gathered.shape[1])}, got {shape}")
    if context is None or cached == 0:
        return new
    old_parts = context.split(part.context_lens.tolist())
    new_parts = new.split(part.padded_lens.tolist())
    return torch.cat([piece for pair in zip(old_parts, new_parts, strict=True) for piece in pair])


def exchange_latents(
    kv_c: torch.Tensor, k_pe: torch.Tensor, meta: PCPMetadata, group: Group, context: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, kv_lora_rank] and [T, rope] of this rank to the latents of all, [N, kv_lora_rank + rope] in key order."""
    return restore_to_key_order(all_gather_latents(kv_c, k_pe, meta, group), meta, context)


def project_kv(kv_c: torch.Tensor, kv_b_proj: KVProjection, dims: MLADims) -> torch.Tensor:
    """[N, kv_lora_rank] to [N, heads, nope + v] by a linear module or its weight [heads * (nope + v), kv_lora_rank].

    ValueError if the weight has another shape.
    """
    weight = kv_b_proj if isinstance(kv_b_proj, torch.Tensor) else getattr(kv_b_proj, "weight", None)
    shape = (dims.num_heads * (dims.expanded_dim), dims.kv_lora_rank)
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"project_kv: kv_b_proj must have a weight of shape {shape}, got {tuple(weight.shape)}")
    expanded = F.linear(kv_c, kv_b_proj) if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj(kv_c)
    return expanded.view(-1, dims.num_heads, dims.expanded_dim)


def build_kv(expanded: torch.Tensor, k_pe: torch.Tensor, dims: MLADims) -> tuple[torch.Tensor, torch.Tensor]:
    """K [N, heads, nope + rope], k_pe [N, rope] shared by all heads, and V [N, heads, v], a strided view of ``expanded``."""
    k_nope, v = expanded.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=-1)
    k = expanded.new_empty(expanded.shape[0], dims.num_heads, dims.qk_head_dim)
    k[..., : dims.qk_nope_head_dim] = k_nope
    k[..., dims.qk_nope_head_dim :] = k_pe[:, None, :]
    return k, v


def attend_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """Causal attention of one row, aligned bottom-right: query j of n sees the first m - n + j + 1 of m keys.

    q [n, heads, D], k [m, heads, D], v [m, heads, Dv], m >= n >= 1; returns [n, heads, Dv].
    """
    n, m = q.shape[0], k.shape[0]
    mask = None
    # torch's is_causal is aligned top-left: only right for n = m. A single query sees every key.
    if 1 < n < m:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=1 < n == m,
        scale=softmax_scale,
    )
    return out[0].transpose(0, 1)


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, softmax_scale: float) -> torch.Tensor:
    """Attention of all rows over the shared K/V: q [T, heads, D] in local order, k and v [N, heads, ...] in key order.

    Returns [T, heads, Dv] in local order. The row bounds come from the host: nothing waits for the device.
    """
    part = meta.partition
    starts_q, starts_k, used = part.cu_seqlens_q.tolist(), part.cu_seqlens_k.tolist(), part.seqused_k.tolist()
    rows = []
    for row, length in enumerate(used):
        if length == 0:
            continue
        keys = slice(starts_k[row], starts_k[row] + length)
        rows.append(attend_row(q[starts_q[row] : starts_q[row + 1]], k[keys], v[keys], softmax_scale))
    return torch.cat(rows) if rows else q.new_empty(0, q.shape[1], v.shape[2])


def attend_latents(
    q: torch.Tensor, latents: torch.Tensor, kv_b_proj: KVProjection, meta: PCPMetadata, dims: MLADims, softmax_scale: float
) -> torch.Tensor:
    """q [T, heads, nope + rope] in local order, latents [N, kv_lora_rank + rope] in key order: [T, heads, v] in local order."""
    kv_c, k_pe = latents.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
    k, v = build_kv(project_kv(kv_c, kv_b_proj, dims), k_pe, dims)
    return attend_rows(q, k, v, meta, softmax_scale)


def pcp_layer(
    q: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    group: Group,
    dims: MLADims,
    softmax_scale: float,
    context: torch.Tensor | None = None,
) -> torch.Tensor:
    """MLA attention of this rank's tokens over all tokens of their requests.

    Args:
        q: [T, heads, nope + rope] in local order, rope applied.
        kv_c: [T, kv_lora_rank] normed latents in local order, same dtype.
        k_pe: [T, rope] rotated keys in local order, same dtype.
        kv_b_proj: linear module, or its weight [heads * (nope + v), kv_lora_rank].
        meta: the step, for this rank of ``group``.
        group: a ``torch.distributed`` process group, a :class:`PlayedGroup`, or None for a world of one rank.
        context: [sum(context_lens), kv_lora_rank + rope] cached latents in natural order, if any request has some.

    Returns:
        [T, heads, v] in local order.

    Raises:
        ValueError, TypeError: an argument does not fit ``dims`` or ``meta``; the message has its name and value.
    """
    check_layer_inputs("pcp_layer", q, kv_c, k_pe, meta, dims)
    latents = exchange_latents(kv_c, k_pe, meta, group, context)
    return attend_latents(q, latents, kv_b_proj, meta, dims, softmax_scale)
