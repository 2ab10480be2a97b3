"""concat_k: a key of all heads in front, rotated keys behind."""

from __future__ import annotations

import torch


def concat_k(k_nope: torch.Tensor, k_pe: torch.Tensor, out: torch.Tensor) -> None:
    """``k_nope`` [N, H, nope] and ``k_pe`` [N, rope], which all heads share, side by side in ``out`` [N, H, nope + rope]."""
    nope = k_nope.shape[2]
    out[..., :nope] = k_nope
    out[..., nope:] = k_pe[:, None]
