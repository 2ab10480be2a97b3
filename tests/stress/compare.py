"""Comparisons, with tolerances that follow from the types: what rounding explains, element by element, and no more."""

from __future__ import annotations

import torch

from stress.memory import bits

EPS32 = 2.0**-23


def same_bits(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Every bit equal, -0 and NaN patterns included."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)} is not {tuple(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"{name}: {got.dtype} is not {wanted.dtype}"
    wrong = bits(got) != bits(wanted)
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ, the first at {first}: "
            f"{got[tuple(first)].item()} is not {wanted[tuple(first)].item()}"
        )


def rounding(dtype: torch.dtype, exact: torch.Tensor) -> torch.Tensor:
    """How far the nearest number of ``dtype`` may be from each exact one: half a step, also among the numbers next to 0."""
    limits = torch.finfo(dtype)
    smallest_step = limits.tiny * limits.eps
    return torch.maximum(exact.abs() * (limits.eps / 2), torch.tensor(smallest_step / 2, dtype=torch.float64))


def close(name: str, got: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor | float) -> None:
    """Finite numbers within ``allowed`` of the exact ones, besides one rounding to their own type; infinities and NaN where the
    exact ones are. ``exact`` is float64."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)} is not {tuple(exact.shape)}"
    values = got.detach().cpu().double()
    finite = exact.isfinite()
    odd = torch.where(finite, ~values.isfinite(), (values != exact) & ~(values.isnan() & exact.isnan()))
    # A product that rounds up leaves its half step a little: the next of the second order.
    limit = (rounding(got.dtype, torch.where(finite, exact, 0)) + allowed) * (1 + 2.0**-10)
    off = finite & ((values - exact).abs() > limit)
    wrong = odd | off
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        at = tuple(first)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at {first}: {values[at].item()} is not "
            f"{exact[at].item()} within {limit[at].item():.3g}"
        )
