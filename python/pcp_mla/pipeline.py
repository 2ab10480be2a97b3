"""One MLA layer under prefill context parallelism: latents of this rank in, attention output of this rank out.

Every stage is one small function, so that a fused kernel can take its place. Nothing is gathered or restored in between: rows are
written and read by their address, the head and the tail of a request are two rows over one K/V prefix, and q is in local order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .latent_cache import write_latent_cache
from .latent_exchange import LatentExchange
from .merge import merge_attn_states
from .metadata import PCPMetadata
from .slots import KeyChunk
from .up_project import kv_up_project


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

# Numbers in a mask, or in a block of scores, that is made at a time.
_BLOCK = 2**24


def _plain_weight(kv_b_proj: KVProjection) -> torch.Tensor | None:
    """[heads * (nope + v), kv_lora_rank] if a product with it is all that ``kv_b_proj`` does; subclasses may hold it quantised."""
    if isinstance(kv_b_proj, torch.Tensor):
        return kv_b_proj
    return kv_b_proj.weight if type(kv_b_proj) is torch.nn.Linear and kv_b_proj.bias is None else None


def check_layer_inputs(
    op: str,
    q: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    dims: MLADims,
    cache: torch.Tensor | None,
) -> None:
    """Raise ValueError, TypeError or NotImplementedError unless shapes and dtypes are those of ``dims`` and ``meta``."""
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
    weight = kv_b_proj.weight if type(kv_b_proj) is torch.nn.Linear else _plain_weight(kv_b_proj)
    shape = (dims.num_heads * dims.expanded_dim, dims.kv_lora_rank)
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"{op}: kv_b_proj must have a weight of shape {shape}, got {tuple(weight.shape)}")
    if weight is not None and weight.dtype != q.dtype:
        raise TypeError(f"{op}: kv_b_proj must have a weight of {q.dtype}, as q, got {weight.dtype}")
    parameters = [kv_b_proj] if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj.parameters()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, kv_c, k_pe, *parameters)):
        raise NotImplementedError(f"{op}: inputs must not require gradients, there is no backward: call under torch.no_grad()")
    _check_cache(op, kv_c, meta, dims, cache)


def _check_cache(op: str, kv_c: torch.Tensor, meta: PCPMetadata, dims: MLADims, cache: torch.Tensor | None) -> None:
    if cache is None:
        cached = int(meta.partition.context_lens.sum())
        if cached:
            raise ValueError(f"{op}: cache must be given, as meta has {cached} tokens of context, got None")
        return
    paged = meta.paged_cache
    if paged is None:
        raise ValueError(f"{op}: meta must have cache slots, as a cache is given: plan it with block tables, got none")
    if paged.dcp_world_size > 1:
        raise NotImplementedError(f"{op}: meta must be for a cache that is not shared out, got {paged.dcp_world_size} DCP shards")
    shape = (paged.block_size, dims.latent_dim)
    if cache.dim() != 3 or tuple(cache.shape[1:]) != shape:
        raise ValueError(
            f"{op}: cache must be [num_blocks, block_size, width] = (any, {shape[0]}, {shape[1]}), got {tuple(cache.shape)}"
        )
    if cache.stride(2) != 1 and cache.shape[2] > 1:
        raise ValueError(f"{op}: cache must have a contiguous last dimension, got strides {cache.stride()}")
    if cache.dtype != kv_c.dtype:
        raise TypeError(f"{op}: cache must be {kv_c.dtype}, as kv_c, got {cache.dtype}")
    if cache.device != kv_c.device:
        raise ValueError(f"{op}: cache must be on {kv_c.device}, as kv_c, got {cache.device}")


def expand_rows(
    latents: torch.Tensor, rows: torch.Tensor, kv_b_proj: KVProjection, dims: MLADims
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [n, heads, nope + rope] and V [n, heads, v] of the latents at ``rows`` (int32 [n]), by a weight or a module."""
    weight = _plain_weight(kv_b_proj)
    if weight is not None:
        return kv_up_project(latents, rows, weight, dims)
    assert not isinstance(kv_b_proj, torch.Tensor)
    return kv_up_project(latents, rows, None, dims, linear=kv_b_proj)


def attend_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """Causal attention of one row, aligned bottom-right: query j of n sees the first m - n + j + 1 of m keys.

    q [n, heads, D], k [m, heads, D], v [m, heads, Dv], m >= n >= 1; returns [n, heads, Dv].
    """
    n, m, width = q.shape[0], k.shape[0], v.shape[2]
    if q.device.type == "cpu" and width < q.shape[2]:
        # torch's flash kernel for CPUs takes one width; without it all scores are in memory at a time, and it is slower.
        v = F.pad(v, (0, q.shape[2] - width))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # torch's is_causal is aligned top-left: only right for n = m. A single query sees every key.
    if n in (1, m):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, scale=softmax_scale)
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


def attend_row_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one row to some of its keys: all of them, or causal as :func:`attend_row`. Computed in float32.

    q [n, heads, D], k [m, heads, D], v [m, heads, Dv], m >= 1; returns out [n, heads, Dv] and LSE [n, heads], both float32.
    """
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    outs, lses = [], []
    block = max(1, _BLOCK // (m * q.shape[0]))
    for first in range(0, n, block):
        scores = q[:, first : first + block] @ k.mT * softmax_scale
        if causal:
            unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(m - n + first + 1)
            scores.masked_fill_(unseen, -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp() @ v)
    return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1).T


def _rows_of(meta: PCPMetadata, chunk: KeyChunk) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each row that has some of both, from the host: nothing waits for the device."""
    starts_q, starts_k, used = (x.tolist() for x in (meta.partition.cu_seqlens_q, chunk.cu_seqlens_k, chunk.seqused_k))
    for row, length in enumerate(used):
        if length:
            yield slice(starts_q[row], starts_q[row + 1]), slice(starts_k[row], starts_k[row] + length)


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, softmax_scale: float) -> torch.Tensor:
    """Attention of all rows over the shared K/V: q [T, heads, D] in local order, k and v [N, heads, ...] in key order.

    Returns [T, heads, Dv] in local order.
    """
    (chunk,) = meta.host_key_chunks
    rows = [attend_row(q[queries], k[keys], v[keys], softmax_scale) for queries, keys in _rows_of(meta, chunk)]
    return torch.cat(rows) if rows else q.new_empty(0, q.shape[1], v.shape[2])


def attend_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, chunk: KeyChunk, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all rows, q [T, heads, D], to their keys in one chunk, k and v [chunk.num_rows, heads, ...].

    Returns out [T, heads, Dv] and LSE [T, heads] in local order, float32; 0 and -inf where a row has no keys in the chunk.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float32)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for queries, keys in _rows_of(meta, chunk):
        out[queries], lse[queries] = attend_row_with_lse(q[queries], k[keys], v[keys], chunk.causal, softmax_scale)
    return out, lse


def attend_latents(
    q: torch.Tensor,
    latents: torch.Tensor,
    rows: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    dims: MLADims,
    softmax_scale: float,
) -> torch.Tensor:
    """Attention to latents anywhere, each expanded once for a request's head and tail.

    q [T, heads, nope + rope] in local order; latents [S, W] or [num_blocks, block_size, W]; rows int32 [N] where each key lies in
    them, for the key chunks one after another. Returns [T, heads, v] in local order.
    """
    chunks = meta.host_key_chunks
    if len(chunks) == 1:
        return attend_rows(q, *expand_rows(latents, rows, kv_b_proj, dims), meta, softmax_scale)
    out = lse = None
    for chunk in chunks:
        k, v = expand_rows(latents, rows[chunk.first_row :][: chunk.num_rows], kv_b_proj, dims)
        part = attend_chunk(q, k, v, meta, chunk, softmax_scale)
        if out is None or lse is None:
            out, lse = part
        else:
            merge_attn_states(out, lse, *part, out=out, lse_out=lse)
    assert out is not None
    return out.to(q.dtype)


def pcp_layer(
    q: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    exchange: LatentExchange,
    dims: MLADims,
    softmax_scale: float,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """MLA attention of this rank's tokens over all tokens of their requests, cached ones included.

    One collective; rank-major rows to their slots; K and V of the keys' slots, in key order; the attention. The order of the rows
    is restored by no op of its own. A step whose plan was given ``workspace_tokens`` never holds more rows of K and V at a time.

    Args:
        q: [T, heads, nope + rope] in local order, rope applied.
        kv_c: [T, kv_lora_rank] normed latents in local order, same dtype.
        k_pe: [T, rope] rotated keys in local order, same dtype.
        kv_b_proj: linear module, or its weight [heads * (nope + v), kv_lora_rank].
        meta: the step, for this rank of the exchange's group; with a cache, from :meth:`PCPPlanner.plan` with block tables.
        exchange: of this group, these widths and this dtype.
        cache: [num_blocks, block_size, kv_lora_rank + rope] this layer's paged latent cache, same dtype; the new tokens' latents
            are written to it. Not needed if no request has context.

    Returns:
        [T, heads, v] in local order.

    Raises:
        ValueError, TypeError: an argument does not fit ``dims``, ``meta`` or the exchange; the message has its name and value, and
            nothing was exchanged or written, but where the result of a module that is no ``nn.Linear`` has another shape.
        NotImplementedError: a cache that decode context parallelism shares out, or an input that requires gradients.
    """
    check_layer_inputs("pcp_layer", q, kv_c, k_pe, kv_b_proj, meta, dims, cache)
    latents = exchange.all_gather(kv_c, k_pe, meta)
    if cache is None:
        return attend_latents(q, latents, meta.allgather_restore_idx, kv_b_proj, meta, dims, softmax_scale)
    assert meta.slot_mapping is not None
    assert meta.kv_rows is not None
    write_latent_cache(latents, cache, meta.slot_mapping)
    return attend_latents(q, cache, meta.kv_rows, kv_b_proj, meta, dims, softmax_scale)
