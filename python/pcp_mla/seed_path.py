"""The same layer in the way of the first implementations, to compare with: rows gathered and restored around two attention calls.

Per layer: two all-gathers, two restores, kv_b_proj, two copies for K, small integer ops for the lengths, six ``index_select``, an
attention call for the heads and one for the tails, a concat and a restore.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .exchange import Group, all_gather_rows, check_group, check_latents
from .metadata import PCPMetadata
from .pipeline import KVProjection, MLADims, attend_row, build_kv, check_layer_inputs, project_kv, restore_to_key_order


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


def seed_cu_seqlens(meta: PCPMetadata) -> torch.Tensor:
    """[R+1, 4] int32: ``cu_seqlens`` of the queries of heads and of tails, of the keys of heads and of tails.

    Worked out on the device in every layer, in four small ops; the padded layout's first version used floor divisions.
    """
    lengths = torch.cat([meta.cu_seqlens_q.diff().view(-1, 2), meta.seqused_k.view(-1, 2)], dim=1)
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))


def gather_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata) -> tuple[VarlenCall, VarlenCall]:
    """Copy the rows of the two attention calls together: q in local order, k and v in key order."""
    cu_seqlens, host = seed_cu_seqlens(meta).unbind(1), meta.partition.row_table
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


def attend_call(call: VarlenCall, softmax_scale: float) -> torch.Tensor:
    """[Tq, heads, Dv]: one attention call, request by request."""
    starts_q, starts_k = call.host_cu_seqlens_q.tolist(), call.host_cu_seqlens_k.tolist()
    out = []
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        if rows.stop > rows.start:
            out.append(attend_row(call.q[rows], call.k[keys], call.v[keys], softmax_scale))
    return torch.cat(out) if out else call.q.new_empty(0, call.q.shape[1], call.v.shape[2])


def seed_layer(
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
    """MLA attention of this rank's tokens. Arguments, result and errors as :func:`pcp_mla.pipeline.pcp_layer`."""
    check_layer_inputs("seed_layer", q, kv_c, k_pe, meta, dims)
    check_group("seed_layer", group, meta)
    check_latents("seed_layer", kv_c, k_pe, meta)
    old_kv_c, old_k_pe = (None, None) if context is None else context.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
    kv_c = restore_to_key_order(gather_part(kv_c, meta, group), meta, old_kv_c)
    k_pe = restore_to_key_order(gather_part(k_pe, meta, group), meta, old_k_pe)
    k, v = build_kv(project_kv(kv_c, kv_b_proj, dims), k_pe, dims)
    head, tail = gather_calls(q, k, v, meta)
    out = torch.cat([attend_call(head, softmax_scale), attend_call(tail, softmax_scale)])
    return out.index_select(0, meta.output_restore_idx)
