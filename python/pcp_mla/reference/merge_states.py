"""LSE merges: partial attention outputs over disjoint keys to the output over all of them.

With s_n the log-sum-exp of partial n, the whole is sum_n exp(s_n - s) out_n, where s = log sum_n exp(s_n) (the combination step of
FlashDecoding; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). An infinite s_n of either sign says that
partial n attended to nothing: it counts as -inf and its output is not read. A partial whose weight is 0 is not read either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LN_2 = 0.6931471805599453
_FP8_MAX = 448.0  # of float8_e4m3fn


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_weights(lses: torch.Tensor, base2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each partial's factor [N, T, H] and the merged LSE [T, H], from ``lses`` [N, T, H] in either base."""
    scores = torch.where(lses.isinf(), -torch.inf, lses * _LN_2 if base2 else lses)
    highest = scores.amax(0)
    highest = torch.where(highest == -torch.inf, 0, highest)
    weights = torch.exp(scores - highest)
    total = weights.sum(0)
    merged = highest + torch.log(total)
    return weights / torch.where(total == 0, 1, total), merged / _LN_2 if base2 else merged


def _weighted(outs: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """[T, H, D] in float32, float64 for float64."""
    total, started = None, None
    for x, w in zip(outs, weights.to(_wide(outs[0].dtype))[..., None], strict=True):
        term, counts = w * x, w != 0
        if total is None or started is None:
            total, started = torch.where(counts, term, 0), counts
        else:  # not added to zeros: that would make the -0 of a copied row 0
            total = torch.where(counts, torch.where(started, total + term, term), total)
            started = started | counts
    assert total is not None
    return total


def _rounded(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return x.to(dtype)
    return (x / scale.to(x.dtype)).clamp(-_FP8_MAX, _FP8_MAX).to(dtype)


def merge_n_attn_states(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], scale: torch.Tensor | None, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """N partial outputs [T, H, D] and LSEs [T, H], or one tensor [N, T, H, D] and one [N, T, H], merged: one rounding, to the
    inputs' dtype, or with a ``scale`` to the float8_e4m3fn numbers that give the outputs when multiplied by it."""
    if len(outs) == 1 and outs[0].dim() == 4:
        outs, lses = list(outs[0]), list(lses[0])
    weights, lse = merge_weights(torch.stack(list(lses)), base2)
    dtype = outs[0].dtype if scale is None else torch.float8_e4m3fn
    return _rounded(_weighted(outs, weights), dtype, scale), lse


def merge_n_attn_states_out(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    base2: bool,
    out: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """The same into given tensors; ``out`` may be float32 too."""
    if len(outs) == 1 and outs[0].dim() == 4:
        outs, lses = list(outs[0]), list(lses[0])
    weights, lse = merge_weights(torch.stack(list(lses)), base2)
    out.copy_(_rounded(_weighted(outs, weights), out.dtype, scale))
    if lse_out is not None:
        lse_out.copy_(lse)


def merge_attn_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, scale: torch.Tensor | None, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two partials merged."""
    return merge_n_attn_states([out_a, out_b], [lse_a, lse_b], scale, base2)


def merge_attn_states_out(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    scale: torch.Tensor | None,
    row_op: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out_rows: torch.Tensor | None,
    base2: bool,
    out: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """Two partials merged into given tensors, which may be the inputs themselves.

    ``row_op`` int32 [T], or [R] for requests whose rows ``cu_seqlens`` [R + 1] gives, says which partials count: bit 0 a, bit 1 b.
    Row t goes to row ``out_rows[t]``. Rows without a partial, behind the last request or with a place outside of ``out`` are not
    written.
    """
    rows = torch.arange(out_a.shape[0], device=out_a.device)
    op = torch.full_like(rows, 3)
    if row_op is not None and cu_seqlens is None:
        op = row_op.long() & 3
    elif row_op is not None and cu_seqlens is not None:
        request = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
        inside = (request >= 0) & (request < len(row_op))
        op = torch.where(inside, row_op.long()[request.clamp(0, len(row_op) - 1)] & 3, 0) if len(row_op) else torch.zeros_like(rows)
    to = rows if out_rows is None else out_rows.long()
    lses = torch.stack(
        [torch.where((op & 1)[:, None] != 0, lse_a, -torch.inf), torch.where((op & 2)[:, None] != 0, lse_b, -torch.inf)]
    )
    weights, lse = merge_weights(lses, base2)
    merged = _rounded(_weighted([out_a, out_b], weights), out.dtype, scale)
    written = (op != 0) & (to >= 0) & (to < out.shape[0])
    out[to[written]] = merged[written]
    if lse_out is not None:
        lse_out[to[written]] = lse[written]


def cp_correct_out(
    out: torch.Tensor,
    lses: torch.Tensor,
    seqused_k: torch.Tensor | None,
    rank: int,
    base2: bool,
    corrected: torch.Tensor,
    lse_out: torch.Tensor | None,
) -> None:
    """``corrected`` = ``out`` [T, H, D] times this rank's factor among ``lses`` [W, T, H], and the merged LSE: over the ranks,
    the corrected outputs add up to the output over all keys. A rank with ``seqused_k`` [W, T] of 0 counts as empty whatever its
    LSE. The results may be 4- and 3-dimensional, [S, T, H / S, D] and [S, T, H / S]: heads in S shares."""
    scores = lses if seqused_k is None else torch.where(seqused_k[..., None] == 0, -torch.inf, lses)
    weights, lse = merge_weights(scores, base2)
    rows = _weighted([out], weights[rank][None])
    if corrected.dim() == 4:
        rows = rows.unflatten(1, (corrected.shape[0], -1)).transpose(0, 1)
    corrected.copy_(rows)
    if lse_out is not None:
        lse_out.copy_(lse if lse_out.dim() == 2 else lse.unflatten(1, (lse_out.shape[0], -1)).transpose(0, 1))
