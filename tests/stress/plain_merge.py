"""Merges of attention states in float64, and how far off the types allow a result to be."""

from __future__ import annotations

import math

import torch

from stress.compare import EPS32, close
from stress.memory import random_numbers

LN2 = math.log(2)


def random_lses(shape: tuple[int, ...], seed: int, spread: float) -> torch.Tensor:
    """Some of them infinite, of either sign, and some far from the others."""
    lses = random_numbers(shape, torch.float32, seed, spread)
    kind = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    lses[kind < 0.15] = -torch.inf
    lses[(kind >= 0.15) & (kind < 0.2)] = torch.inf
    lses[(kind >= 0.2) & (kind < 0.23)] -= 1000
    return lses


def merged(
    outs: list[torch.Tensor], lses: list[torch.Tensor], base2: bool
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The merge in float64, row by row: output, LSE, factors, and what float32 sums may be off by.

    An infinite LSE of either sign is an empty partial, which is not read. A factor exp(x), x relative to the greatest LSE, is off
    by the rounding of x and of the function: (4 + |x|) units in all. The same goes for the sum of factors, and each sum adds a
    unit a partial.
    """
    unit = LN2 if base2 else 1.0
    scores = [torch.where(x.isinf(), -torch.inf, x.double() * unit) for x in lses]
    top = torch.stack(scores).amax(0)
    safe = torch.where(top == -torch.inf, 0, top)
    powers = [torch.exp(x - safe) for x in scores]
    total = torch.stack(powers).sum(0)
    lse = torch.where(total == 0, -torch.inf, (safe + total.log()) / unit)
    factors = [p / torch.where(total == 0, 1, total) for p in powers]
    # x is a difference of numbers in float32. In base 2 they are multiplied first: its error then grows with them.
    distance = [torch.where(x == -torch.inf, 0, (x - safe).abs() + (x.abs() + safe.abs() if base2 else 0)) for x in scores]
    whole = torch.zeros(outs[0].shape, dtype=torch.float64)
    slack = torch.zeros(outs[0].shape, dtype=torch.float64)
    sums = 4 + len(outs) + torch.stack([f * d for f, d in zip(factors, distance, strict=True)]).sum(0)
    for x, factor, far in zip(outs, factors, distance, strict=True):
        # A factor that float32 takes for 0 drops its output, NaN or not.
        term = torch.where((factor < 2.0**-126)[..., None], 0, factor[..., None] * x.double())
        whole += term
        slack += term.abs() * ((4 + far + sums) * EPS32)[..., None] + 2.0**-126
    lse_slack = torch.where(lse.isfinite(), (lse.abs() + sums / unit) * EPS32, 0)
    return whole, lse, factors, slack, lse_slack


def check_scaled(name: str, got: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor, scale: float | None) -> None:
    """As it is, or divided by ``scale`` in float8."""
    if scale is None:
        close(name, got, exact, slack)
        return
    divided = (exact / scale).clamp(-448, 448)
    close(name, got, divided, slack / scale + divided.abs() * 2 * EPS32)
