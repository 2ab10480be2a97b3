"""The same layer in the way of the first implementations, to compare with: rows gathered and restored around two attention calls.

Per layer: two all-gathers, two restores, the cache write, kv_b_proj, two copies for K, small integer ops for the lengths, six
``index_select``, an attention call for the heads and one for the tails, a concat and a restore.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..groups import Group, all_gather_rows, check_group, check_latents
from ..layer.checks import check_layer_inputs
from ..layer.projection import KVProjection
from ..ops.attention.rows import attend_row
from ..ops.latent_cache import gather_latents, write_latent_cache
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata


@dataclass(frozen=True)
class VarlenCall:
    """Arguments of one variable-length attention call over R requests.

    q [Tq, heads, D], k [Tk, heads, D], v [Tk, heads, Dv]; ``cu_seqlens_q`` and ``cu_seqlens_k`` int32 [R+1] on the device, and the
    same on the host for an attention that is called request by request.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    host_cu_seqlens_q: np.ndarray
    host_cu_seqlens_k: np.ndarray


def gather_part(part: torch.Tensor, meta: PCPMetadata, group: Group) -> torch.Tensor:
    """[T, W] of this rank to [P * Np, W] of all: one of the two collectives."""
    return all_gather_rows(F.pad(part, (0, 0, 0, meta.num_tokens_padded - meta.num_tokens)).contiguous(), group)


def build_kv(kv_c: torch.Tensor, k_pe: torch.Tensor, kv_b_proj: KVProjection, dims: MLADims) -> tuple[torch.Tensor, torch.Tensor]:
    """K [N, heads, nope + rope] and V [N, heads, v], a strided view, of latents in key order."""
    expanded = F.linear(kv_c, kv_b_proj) if isinstance(kv_b_proj, torch.Tensor) else kv_b_proj(kv_c)
    k_nope, v = expanded.view(-1, dims.num_heads, dims.expanded_dim).split([dims.qk_nope_head_dim, dims.v_head_dim], dim=-1)
    k = k_nope.new_empty(len(k_nope), dims.num_heads, dims.qk_head_dim)
    k[..., : dims.qk_nope_head_dim] = k_nope
    k[..., dims.qk_nope_head_dim :] = k_pe[:, None, :]
    return k, v


def seed_cu_seqlens(meta: PCPMetadata) -> torch.Tensor:
    """[4, R+1] int32: ``cu_seqlens`` of the queries of heads and of tails, of the keys of heads and of tails.

    Worked out on the device in every layer, in four small ops; the padded layout's first version used floor divisions.
    """
    lengths = torch.cat([meta.cu_seqlens_q.diff().view(-1, 2), meta.seqused_k.view(-1, 2)], dim=1)
    return F.pad(lengths.T.cumsum(1, dtype=torch.int32), (1, 0))


def gather_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata) -> tuple[VarlenCall, VarlenCall]:
    """Copy the rows of the two attention calls together: q in local order, k and v in key order."""
    cu_seqlens, host = seed_cu_seqlens(meta).unbind(0), meta.partition.row_table
    head = VarlenCall(
        q.index_select(0, meta.query_head_indices),
        k.index_select(0, meta.kv_head_indices),
        v.index_select(0, meta.kv_head_indices),
        cu_seqlens[0],
        cu_seqlens[2],
        host[0],
        host[2],
    )
    tail = VarlenCall(
        q.index_select(0, meta.query_tail_indices),
        k.index_select(0, meta.kv_tail_indices),
        v.index_select(0, meta.kv_tail_indices),
        cu_seqlens[1],
        cu_seqlens[3],
        host[1],
        host[3],
    )
    return head, tail


class SeedPath:
    """What follows the two collectives, step by step: benchmarks put an engine's own ops in place of some."""

    def __init__(self, meta: PCPMetadata, dims: MLADims, softmax_scale: float) -> None:
        self.meta, self.dims, self.softmax_scale = meta, dims, softmax_scale

    def restore(self, kv_c: torch.Tensor, k_pe: torch.Tensor, cache: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both parts [P * Np, ...] of the latents, rank-major, to key order [N, ...]; with a cache, written to it."""
        meta, rank = self.meta, self.dims.kv_lora_rank
        if cache is not None:
            assert meta.slot_mapping is not None
            write_latent_cache(kv_c, cache[..., :rank], meta.slot_mapping)
            write_latent_cache(k_pe, cache[..., rank:], meta.slot_mapping)
            if meta.num_context_tokens:
                kv_c, k_pe = gather_latents(cache, meta.kv_rows).split([rank, self.dims.qk_rope_head_dim], dim=1)
                return kv_c, k_pe
        return kv_c.index_select(0, meta.allgather_restore_idx), k_pe.index_select(0, meta.allgather_restore_idx)

    def attend(self, call: VarlenCall) -> torch.Tensor:
        """[Tq, heads, Dv]: one attention call, request by request."""
        starts_q, starts_k = call.host_cu_seqlens_q.tolist(), call.host_cu_seqlens_k.tolist()
        out = []
        for i in range(len(starts_q) - 1):
            rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
            if rows.stop > rows.start:
                out.append(attend_row(call.q[rows], call.k[keys], call.v[keys], self.softmax_scale))
        return torch.cat(out) if out else call.q.new_empty(0, call.q.shape[1], call.v.shape[2])

    def run(
        self, q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, kv_b_proj: KVProjection, cache: torch.Tensor | None
    ) -> torch.Tensor:
        """q in local order and both parts of the latents, rank-major, to the output [T, heads, v] in local order."""
        k, v = build_kv(*self.restore(kv_c, k_pe, cache), kv_b_proj, self.dims)
        out = torch.cat([self.attend(call) for call in gather_calls(q, k, v, self.meta)])
        return out.index_select(0, self.meta.output_restore_idx)


def seed_layer(
    q: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b_proj: KVProjection,
    meta: PCPMetadata,
    group: Group,
    dims: MLADims,
    softmax_scale: float,
    cache: torch.Tensor | None = None,
) -> torch.Tensor:
    """MLA attention of this rank's tokens. As :class:`pcp_mla.MLAPrefill`, but with the group in place of the exchange, and
    with all keys expanded at a time."""
    check_layer_inputs("seed_layer", q, kv_c, k_pe, kv_b_proj, meta, dims, cache)
    check_group("seed_layer", group, meta)
    check_latents("seed_layer", kv_c, k_pe, meta)
    if len(meta.key_chunks) > 1:
        raise NotImplementedError(f"seed_layer: meta must have one key chunk, got {len(meta.key_chunks)}")
    parts = gather_part(kv_c, meta, group), gather_part(k_pe, meta, group)
    return SeedPath(meta, dims, softmax_scale).run(q, *parts, kv_b_proj, cache)
