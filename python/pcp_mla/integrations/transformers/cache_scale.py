"""The scale of each layer's float8 cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...ops.checks import FLOATS


def cache_scales(op: str, cache_dtype: Any, cache_scale: Any, layers: int, dtype: torch.dtype) -> list[float] | None:
    """One for each layer of a model of this dtype; None for a cache of the model's dtype. Raise ValueError or TypeError for what is
    no such cache."""
    if cache_dtype is None:
        if cache_scale is not None:
            raise ValueError(f"{op}: cache_scale must come with cache_dtype=torch.float8_e4m3fn, got {cache_scale!r}")
        return None
    if cache_dtype != torch.float8_e4m3fn:
        raise ValueError(f"{op}: cache_dtype must be None or torch.float8_e4m3fn, got {cache_dtype!r}")
    if dtype not in FLOATS:
        raise TypeError(f"{op}: model must be bfloat16, float16 or float32 for a float8 cache, got {dtype}")
    given = 1.0 if cache_scale is None else cache_scale
    scales = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * layers
    if len(scales) != layers:
        raise ValueError(f"{op}: cache_scale must be one number, or one for each of {layers} layers, got {len(scales)}")
    for scale in scales:
        if not isinstance(scale, int | float) or isinstance(scale, bool):
            raise TypeError(f"{op}: cache_scale must be a number, or one for each layer, got {scale!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"{op}: cache_scale must be positive, got {scale!r}")
    return [float(scale) for scale in scales]
