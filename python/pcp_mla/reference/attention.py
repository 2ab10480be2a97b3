"""pcp_attention: softmax attention of rows that may share keys."""

from __future__ import annotations

import torch

from .merge_states import merge_attn_states

_QUERIES = 512  # at a time: a long row's scores need not be in memory at once


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [n, H, Dv] and LSE [n, H] of queries [n, H, D], of which the i-th sees the first ``seen[i]`` keys [m, H, D]."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    hidden = torch.arange(len(k), device=q.device) >= seen[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    return torch.einsum("hnm,mhd->nhd", weights, v), lse.T


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    kv_rows: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor,
    prev_out: torch.Tensor | None,
    prev_lse: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Row i has queries ``cu_seqlens_q[i]`` ... ``cu_seqlens_q[i + 1] - 1`` and ``seqused_k[i]`` keys from ``cu_seqlens_k[i]`` on,
    whatever those of other rows are.

    ``causal``: of a row's last query every key is seen, of each query before it one less; else all see all. ``kv_rows`` [N]
    says which row of k and v each key is; of a pad (-1), which only pads among the queries see, the first. With ``k_pe`` [N,
    rope] k is [N, H, nope], and all heads' keys go on with ``k_pe``. ``prev_out`` [T, H, Dv] and ``prev_lse`` [T, H] are merged
    in; where ``prev_out`` is ``out``, rows without keys are left alone.
    Computed in float32, float64 for float64. Queries without any key get 0 and -inf; tokens behind the last row are not written.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    starts, first_keys, used = cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), seqused_k.tolist()
    in_place = prev_out is not None and prev_out.data_ptr() == out.data_ptr()
    for row, count in enumerate(used):
        if count == 0 and in_place:
            continue
        index = torch.arange(first_keys[row], first_keys[row] + count, device=q.device)
        index = index if kv_rows is None else kv_rows[index].long().clamp(min=0)
        keys, values = k[index].to(wide), v[index].to(wide)
        if k_pe is not None:
            keys = torch.cat([keys, k_pe[index][:, None].expand(-1, keys.shape[1], -1).to(wide)], dim=-1)
        begin, end = starts[row : row + 2]
        for t in range(begin, end, _QUERIES):
            some = slice(t, min(t + _QUERIES, end))
            seen = torch.full((some.stop - t,), count, device=q.device)
            if causal:
                seen = count - end + 1 + torch.arange(t, some.stop, device=q.device)
            part, part_lse = _attend(q[some].to(wide), keys, values, softmax_scale, seen)
            if prev_out is not None and prev_lse is not None:
                part, part_lse = merge_attn_states(prev_out[some].to(wide), prev_lse[some], part, part_lse, None, False)
            out[some] = part.to(out.dtype)
            if lse is not None:
                lse[some] = part_lse.to(lse.dtype)
