"""What a model under PCP carries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...groups import Group
from ...plan.dims import MLADims
from ...planner.consistency import Comparison
from .agreement import compare
from .forwards import ReplacedForward
from .paged_cache import CachedRequests, LatentBlocks
from .steps import PCPStep, StepPlanner, StepsInGraphs
from .structure import check_model
from .turns import Turns


@dataclass
class PCPContext:
    """What a model under PCP carries.

    Attributes:
        group, world_size, rank, layout: as enabled.
        dims: widths of its attention.
        heads, split: widths of what this rank's exchange of heads exchanges, and how prefill steps are shared out; ``None`` and
            ``tokens`` where that is by tokens alone.
        blocks: the latent cache of all layers.
        requests: those that the last :func:`prefill` started; a step that fails leaves them as they were.
        planner, decode_planner: for steps of the group, and for those that each rank makes on its own.
        turns: of the threads that call the model.
        comparison: by which the ranks compare what they are given, if they do: see :mod:`pcp_mla.integrations.transformers.calls`.
        replaced: forwards of the model's modules.
        offloaded: whether its weights were on the meta device when it was enabled, for hooks to bring them.
        captured, captured_decodes: steps in CUDA graphs, if any were captured.
        step: the running step, None between steps.
        in_collectives: whether the other ranks may be in a step's collectives, its plan's comparison among them.
        told: whether all ranks know of a failure within the running call.
    """

    group: Group
    world_size: int
    rank: int
    layout: str
    dims: MLADims
    blocks: LatentBlocks
    planner: StepPlanner
    decode_planner: StepPlanner
    turns: Turns
    heads: MLADims | None = None
    split: str = "tokens"
    comparison: Comparison | None = None
    replaced: list[ReplacedForward] = field(default_factory=list)
    offloaded: bool = False
    requests: CachedRequests = field(default_factory=CachedRequests)
    captured: StepsInGraphs | None = None
    captured_decodes: StepsInGraphs | None = None
    step: PCPStep | None = None
    in_collectives: bool = False
    told: bool = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError(
            "a model under PCP can be neither copied nor pickled: call disable_pcp first, or copy_sharing_weights for a copy over "
            "the same weights"
        )

    def compare(self, op: str, values: dict[str, Any]) -> None:
        """What :func:`.agreement.compare` does, if the ranks compare at all. Of its errors all ranks know."""
        if self.comparison is not None:
            try:
                compare(self.comparison, op, values)
            except RuntimeError:
                self.told = True
                raise

    def wait_for_all(self) -> None:
        """Between what may fail on one rank alone and what keeps its results: RuntimeError if it failed on another one."""
        self.compare("step", {"the call": "end of a step"})

    def tell_failure(self) -> None:
        """To the other ranks, unless they know, or are in a step's collectives and cannot hear of it."""
        if self.comparison is not None and not self.in_collectives and not self.told:
            self.told = True
            self.comparison.tell_failure()

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
            self.wait_for_all()
        self.blocks.release(self.requests)
        self.requests, self.turns.owner = requests, threading.current_thread()


def context_of(op: str, model: Any) -> PCPContext:
    """The context of a model under PCP. TypeError for another kind of model, ValueError for one that is not under PCP."""
    if "_pcp" not in getattr(model, "__dict__", {}):
        check_model(op, model)
        raise ValueError(f"{op}: model must be under PCP, call enable_pcp first")
    return model.__dict__["_pcp"]


def context_at_place(op: str, model: Any) -> PCPContext:
    """As :func:`context_of`, for what computes: also ValueError for a model that was converted or moved since."""
    context, weight = context_of(op, model), model.model.embed_tokens.weight
    dtype, device = context.blocks.dtype, context.blocks.cache.device
    if weight.dtype != dtype or (weight.device != device and not (weight.is_meta and context.offloaded)):
        was, now = f"{dtype} on {device}", f"{weight.dtype} on {weight.device}"
        raise ValueError(f"{op}: model must be {was}, as it was put under PCP, got {now}: convert or move it, then call enable_pcp")
    return context
