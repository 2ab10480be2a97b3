"""Which exchange a group can have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..groups import Group, group_world_size
from ..plan.dims import MLADims
from .heads import HeadExchange
from .latents import LatentExchange
from .peer_heads import PeerHeadExchange
from .peer_memory import PeersUnavailable, agree
from .peers import PeerExchange

P = TypeVar("P")
C = TypeVar("C")
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
    which make it together. ``PCP_MLA_EXCHANGE=nccl`` on any rank means the latter. Caches that cannot be attached are no hindrance.

    Arguments as :class:`PeerExchange`.

    Raises:
        ValueError, TypeError: as the two.
        PeersUnavailable: ``PCP_MLA_EXCHANGE=peers``, and memory cannot be shared.
    """
    exchange = _chosen(
        group,
        torch.device(device),
        lambda on: PeerExchange(group, max_tokens, dims, dtype, on, timeout=timeout),
        lambda on: LatentExchange(group, max_tokens, dims, dtype, on),
    )
    if not isinstance(exchange, LatentExchange):
        with contextlib.suppress(PeersUnavailable):  # on all ranks: rows go by the staging buffer
            exchange.attach(caches)
    return exchange


def choose_heads(
    group: Group,
    max_tokens: int,
    dims: MLADims,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
    *,
    timeout: float = 60.0,
) -> HeadExchange | PeerHeadExchange:
    """A :class:`PeerHeadExchange` or a :class:`HeadExchange`, as :func:`choose_exchange` chooses. Arguments as the former."""
    return _chosen(
        group,
        torch.device(device),
        lambda on: PeerHeadExchange(group, max_tokens, dims, dtype, on, timeout=timeout),
        lambda on: HeadExchange(group, max_tokens, dims, dtype, on),
    )


def _chosen(
    group: Group, device: torch.device, peers: Callable[[torch.device], P], collective: Callable[[torch.device], C]
) -> P | C:
    """What the group can have, made on ``device``. Errors as :func:`choose_exchange`."""
    way = _agreed(group, device)
    if way == "nccl" or (device.type != "cuda" and not way):
        return collective(device)
    try:
        return peers(device)
    except PeersUnavailable:
        if way == "peers":
            raise
        return collective(device)


def _agreed(group: Group, device: torch.device) -> str:
    """What the environment of any rank asks for: ``nccl`` before ``peers``. Errors as :func:`asked`, on every rank."""
    mine: dict[str, str] = {"way": "", "wrong": ""}
    try:
        mine["way"] = asked()
    except ValueError as error:
        mine["wrong"] = str(error)
    told = [mine] if group_world_size(group) == 1 else agree(group, device, mine)
    for rank, each in enumerate(told):
        if each["wrong"]:
            raise ValueError(each["wrong"] if len(told) == 1 else f"rank {rank}: {each['wrong']}")
    return next((way for way in WAYS if any(each["way"] == way for each in told)), "")
