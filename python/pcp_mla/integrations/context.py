"""What a model under PCP carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..exchange import Group
from ..pipeline import MLADims
from .deepseek import check_model
from .paged_cache import CachedRequests, LatentBlocks
from .steps import PCPStep, StepPlanner

if TYPE_CHECKING:
    from .captured import CapturedSteps


@dataclass
class PCPContext:
    """What a model under PCP carries.

    Attributes:
        group, world_size, rank, layout: as enabled.
        dims: widths of its attention.
        blocks: the latent cache of all layers.
        requests: those that the last :func:`prefill` started; a step that fails leaves them as they were.
        planner, decode_planner: for steps of the group, and for those that each rank makes on its own.
        captured, captured_decodes: steps in CUDA graphs, if any were captured.
        step: the running step, None between steps.
        place: dtype and device of the model's weights when it was enabled, which its blocks are for.
    """

    group: Group
    world_size: int
    rank: int
    layout: str
    dims: MLADims
    blocks: LatentBlocks
    planner: StepPlanner
    decode_planner: StepPlanner
    requests: CachedRequests = field(default_factory=CachedRequests)
    captured: CapturedSteps | None = None
    captured_decodes: CapturedSteps | None = None
    step: PCPStep | None = None
    place: tuple[torch.dtype, torch.device] | None = None

    @contextmanager
    def running(self, step: PCPStep) -> Iterator[None]:
        """While the model's modules run."""
        self.step = step
        try:
            yield
        finally:
            self.step = None

    @contextmanager
    def update(self, requests: CachedRequests) -> Iterator[None]:
        """Around steps that add tokens to ``requests``: if all succeed they take the place of the last ones, else they go."""
        with self.blocks.released_on_failure(requests):
            yield
        self.blocks.release(self.requests)
        self.requests = requests


def context_of(op: str, model: Any) -> PCPContext:
    """The context of a model under PCP. TypeError for another kind of model, ValueError for one that is not under PCP."""
    check_model(op, model)
    if "_pcp" not in model.__dict__:
        raise ValueError(f"{op}: model must be under PCP, call enable_pcp first")
    return model.__dict__["_pcp"]


def place_of(model: Any) -> tuple[torch.dtype, torch.device]:
    weight = model.model.embed_tokens.weight
    return weight.dtype, weight.device


def context_at_place(op: str, model: Any) -> PCPContext:
    """As :func:`context_of`, for what computes: also ValueError for a model that was converted or moved since."""
    context, place = context_of(op, model), place_of(model)
    if place != context.place:
        was, now = ("{} on {}".format(*at) for at in (context.place or place, place))
        raise ValueError(f"{op}: model must be {was}, as it was put under PCP, got {now}: convert or move it, then call enable_pcp")
    return context
