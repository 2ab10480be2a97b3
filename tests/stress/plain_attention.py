"""Softmax attention of one query after another in float64, and how far off the types allow a result to be."""

from __future__ import annotations

import torch

from stress.compare import EPS32


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list[list[int]], scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [T, H, Dv], LSE [T, H] and what each may be off by, of queries [T, H, D] that see the listed rows of k and v.

    Scores are sums of D products in float32 (or float64): their error is that of the sum of sizes, times the square root of D. A
    weight is off by its score's error and by one rounding to ``dtype``, in which attention kernels multiply it with v; sums over
    keys add theirs.
    """
    unit = 2.0**-52 if dtype == torch.float64 else EPS32
    rounded = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    heads, width = q.shape[1:]
    out = torch.zeros(len(q), heads, v.shape[2], dtype=torch.float64)
    lse = torch.full((len(q), heads), -torch.inf, dtype=torch.float64)
    slack, lse_slack = torch.zeros_like(out), torch.zeros_like(lse)
    q, k, v = q.double(), k.double(), v.double()
    for t, keys in enumerate(seen):
        if not keys:
            continue
        mine, values = k[keys], v[keys]
        scores = torch.einsum("hd,mhd->hm", q[t], mine) * scale
        sizes = torch.einsum("hd,mhd->hm", q[t].abs(), mine.abs()).amax(1) * scale
        top = scores.amax(1)
        weights = torch.exp(scores - top[:, None])
        total = weights.sum(1)
        lse[t] = top + total.log()
        out[t] = torch.einsum("hm,mhd->hd", weights / total[:, None], values)
        size = torch.einsum("hm,mhd->hd", weights / total[:, None], values.abs())
        error = unit * ((4 + width**0.5) * sizes + 8)  # of a score, and of exp and log
        slack[t] = size * (2 * error + rounded + unit * (4 + len(keys) ** 0.5))[:, None] + smallest * values.abs().sum(0)
        lse_slack[t] = error + EPS32 * (lse[t].abs() + 1)
    return out, lse, slack, lse_slack


def combine(
    prev: tuple[torch.Tensor, torch.Tensor],
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """An earlier output and LSE merged with a state of :func:`plain_attention`; the latter may have been rounded before."""
    out, lse, slack, lse_slack = state
    old, old_lse = (x.double() for x in prev)
    top = torch.maximum(lse, old_lse)
    safe = torch.where(top == -torch.inf, 0, top)
    powers = torch.exp(lse - safe), torch.exp(old_lse - safe)
    total = powers[0] + powers[1]
    whole = torch.where(total == 0, -torch.inf, safe + total.log())
    ours, theirs = (p / torch.where(total == 0, 1, total) for p in powers)
    merged = ours[..., None] * out + torch.where(theirs[..., None] == 0, 0, theirs[..., None] * old)
    spread = (whole.abs() + lse.nan_to_num(0, 0, 0).abs() + old_lse.nan_to_num(0, 0, 0).abs() + 8) * EPS32 + lse_slack
    spread = torch.where(whole.isfinite(), spread, 0)
    rounded = torch.finfo(dtype).eps / 2
    more = (
        ours[..., None] * (slack + rounded * out.abs())
        + (out.abs() + old.abs().nan_to_num(0, 0, 0)) * (spread * (EPS32 + ours * theirs * 2) + EPS32 * 4)[..., None]
    )
    return merged, whole, more, spread
