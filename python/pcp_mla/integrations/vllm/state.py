"""What the parts share in a process, and what is made in it once."""

from __future__ import annotations

from typing import Any

from . import parts
from .communicator import Communicator
from .heads import StepHeads
from .latents import StepExchange
from .parts import logger
from .planner import StepPlanner
from .prefill import LayerPrefill


class State:
    """Of a process, whose layers are made and called one after the other."""

    communicator: Communicator | None = None
    exchange: StepExchange | None = None
    by_peers = True  # whether all layers' caches are of kinds that other ranks can store to
    batch: Any = None  # the last step's rows on this rank
    layers: list[LayerPrefill] = []  # noqa: RUF012  the state of a process
    max_tokens = 0  # of a step
    max_local_tokens = 0  # of a rank's in a step of prefills, whose tokens are shared out
    heads: StepHeads | None = None
    workspace_rows = 0  # rows of K and V that a call may need, if its keys can be shared out over several
    reserved = False
    taking_rows = False  # while metadata is built for layers whose context this package attends to
    planner: StepPlanner | None = None
    told = False


def tell() -> None:
    """Say what runs here, once."""
    if not State.told:
        State.told = True
        from pcp_mla import __version__

        logger.info("pcp-mla %s %s", __version__, parts.summary())


def communicator() -> Communicator:
    if State.communicator is None:
        from vllm.distributed.parallel_state import get_pcp_group

        State.communicator = Communicator(get_pcp_group())
    return State.communicator


def exchange_for(like: Any) -> StepExchange:
    if State.exchange is None:
        State.exchange = StepExchange(communicator(), State.max_tokens, State.by_peers and like.is_cuda)
    return State.exchange
