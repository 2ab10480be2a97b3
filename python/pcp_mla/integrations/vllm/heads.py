"""The part ``heads``: where that costs less, a rank attends with some heads for the tokens of all ranks, in place of all heads for
its own: of the keys, which every rank reads in its cache, it expands those of its heads alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...exchange.choose import choose_heads
from ...exchange.peer_memory import agree
from ...layer.split import heads_pay
from ...plan.dims import MLADims
from ...planner.planned import PlannedMetadata
from .communicator import Communicator
from .latents import TIMEOUT
from .parts import logger
from .planner import step_rows
from .prefill import LayerPrefill, is_plain
from .rows import HeadRows


def refusal(ours: LayerPrefill, others: Sequence[LayerPrefill], linear: Any, world_size: int) -> str:
    """Why the heads of a layer are not shared out; the empty string where they are. ``others`` are those of the process."""
    if not is_plain(linear):
        return "a kv_b_proj that is more than a product with its weight"
    if ours.dims.num_heads < world_size:
        return f"{ours.dims.num_heads} heads for {world_size} ranks"
    return "layers of several widths" if any(other.dims != ours.dims for other in others) else ""


class StepHeads:
    """The exchange of a process's layers, which are all alike, and in which steps it is used. All ranks make it together.

    Args:
        max_tokens: local tokens of a rank that there is room for; a step with more stays shared out by tokens.
        dims: of the layers.
        like: a tensor of the dtype and on the device of queries.

    Attributes:
        split: ``auto``, or ``heads`` for all steps that there is room for, whatever they cost: for tests and comparisons, the same
            on all ranks.
    """

    split = "auto"

    def __init__(self, communicator: Communicator, max_tokens: int, dims: MLADims, like: torch.Tensor) -> None:
        self._dims, self._dtype = dims, like.dtype
        self.exchange = choose_heads(communicator, max_tokens, dims, like.dtype, like.device, timeout=TIMEOUT)
        mine = torch.cuda.get_device_name(like.device) if like.is_cuda else "CPU"
        kinds = sorted({each["kind"] for each in agree(communicator, like.device, {"kind": mine})})
        self._alike = len(kinds) == 1  # else ranks would come to other costs
        if not self._alike:
            logger.warning("pcp-mla: heads are not shared out: ranks have GPUs of several kinds, %s", ", ".join(kinds))

    def of(self, meta: PlannedMetadata) -> HeadRows | None:
        """What the layers of a step share; None where its tokens are shared out. Only numbers that all ranks have decide, so that
        either all of them exchange in all layers or none."""
        if meta.num_tokens_padded > self.exchange.max_tokens:
            return None
        if self.split == "auto" and not (self._alike and heads_pay(self.exchange, self._dims, self._dtype, meta)):
            return None
        return HeadRows(step_rows(meta, meta.rank_rows), self.exchange, meta)
