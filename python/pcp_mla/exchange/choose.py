"""Which exchange a group can have."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..groups import Group
from ..plan.dims import MLADims
from .latents import LatentExchange
from .peer_memory import PeersUnavailable
from .peers import PeerExchange

VARIABLE = "PCP_MLA_EXCHANGE"
WAYS = ("nccl", "peers")


def asked() -> str:
    """``nccl``, ``peers``, or the empty string where the environment leaves it open.

    Raises:
        ValueError: it names neither.
    """
    way = os.environ.get(VARIABLE, "").strip()
    if way and way not in WAYS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(WAYS)}, got {way!r}")
    return way


def choose_exchange(
    group: Group,
    max_tokens: int,
    dims: MLADims,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
    *,
    caches: Sequence[torch.Tensor] = (),
    timeout: float = 60.0,
) -> LatentExchange | PeerExchange:
    """A :class:`PeerExchange` where every rank of the group can have one, else a :class:`LatentExchange`: the same on all ranks,
    which make it together. ``PCP_MLA_EXCHANGE=nccl`` on any rank means the latter.

    Arguments as :class:`PeerExchange`.

    Raises:
        ValueError, TypeError: as the two.
        PeersUnavailable: ``PCP_MLA_EXCHANGE=peers``, and memory cannot be shared.
    """
    way = asked()
    if torch.device(device).type != "cuda" and way != "peers":
        return LatentExchange(group, max_tokens, dims, dtype, device)
    why_not = f"{VARIABLE}=nccl" if way == "nccl" else ""
    try:
        return PeerExchange(group, max_tokens, dims, dtype, device, caches=caches, timeout=timeout, why_not=why_not)
    except PeersUnavailable:
        if way == "peers":
            raise
    return LatentExchange(group, max_tokens, dims, dtype, device)
