"""Runs the demo's model on P ranks: processes on CPU cores or on a GPU each, or all ranks in turn on one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..exchange import Group
from ..launch import run_distributed
from ..played import play
from .measure import LayerCosts, measure_layers
from .outcome import Outcome, StockRouting, Work, run_pcp

# Seconds for all that P ranks do; long enough for the largest model on two cores.
TIMEOUT = 3600.0


@dataclass
class RankResult:
    """What one rank saw: the outcome, whole on every rank, and what the layer cost it."""

    outcome: Outcome
    costs: LayerCosts


def choose_backend(world_size: int) -> str:
    """``"nccl"`` with a GPU a rank, ``"gloo"`` without a GPU, ``"played"`` (ranks in turn on one GPU) in between."""
    gpus = torch.cuda.device_count()
    return "gloo" if gpus == 0 else "nccl" if gpus >= world_size else "played"


def _run_rank(model: Any, group: Group, work: Work, stock: StockRouting) -> RankResult:
    from ..integrations.deepseek import model_dims

    outcome = run_pcp(model, group, work, stock)
    attention = model.model.layers[0].self_attn
    device = model.lm_head.weight.device
    costs = measure_layers(work.chunk_tokens, attention.kv_b_proj, model_dims(model), attention.scaling, group, device)
    return RankResult(outcome, costs)


def _process_main(group: Any, model_file: str, work: Work, stock: StockRouting) -> RankResult:
    device = torch.device("cuda", group.rank()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    # Mapped, not read: the processes share the file's pages, so P ranks need the memory of one model.
    model = torch.load(model_file, map_location=device, mmap=True, weights_only=False)
    return _run_rank(model, group, work, stock)


def run_ranks(world_size: int, model_file: str, work: Work, stock: StockRouting) -> tuple[str, list[RankResult]]:
    """The backend that was chosen, and every rank's result. ``stock``: how the stock model routed the prompts.

    Raises:
        RankError, TimeoutError: as :func:`pcp_mla.launch.run_distributed`.
    """
    backend = choose_backend(world_size)
    if backend != "played":
        given = (model_file, work, stock)
        return backend, run_distributed(world_size, _process_main, *given, backend=backend, timeout=TIMEOUT)
    from ..integrations.deepseek import copy_sharing_weights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = torch.load(model_file, map_location=device, mmap=True, weights_only=False)
    return backend, play(world_size, lambda group: _run_rank(copy_sharing_weights(model), group, work, stock))
