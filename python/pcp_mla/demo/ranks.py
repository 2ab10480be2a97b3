"""Runs a model on P ranks: processes on CPU cores or on a GPU each, or all ranks in turn on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..groups import Group
from ..testing.launch import run_distributed
from ..testing.played import play
from .measure import LayerCosts, measure_layers
from .outcome import Outcome, StockRouting, Work, run_pcp

T = TypeVar("T")

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


def check_heads(op: str, split: str, heads: int, world_sizes: list[int]) -> None:
    """ValueError if so many heads cannot be shared out over some number of ranks."""
    if split == "heads" and max(world_sizes) > heads:
        wanted = "--pcp must not be more than the model's heads for --split heads"
        raise ValueError(f"{op}: {wanted}, got {max(world_sizes)} processes for {heads} heads")


def _run_rank(model: Any, group: Group, work: Work, stock: StockRouting) -> RankResult:
    from ..integrations.transformers.structure import model_dims

    outcome = run_pcp(model, group, work, stock)
    attention = model.model.layers[0].self_attn
    dims, device = model_dims(model), model.lm_head.weight.device
    costs = measure_layers(work.chunk_tokens, attention.kv_b_proj, dims, attention.scaling, group, device, work.split)
    return RankResult(outcome, costs)


def _load(model_file: str, device: torch.device) -> Any:
    # Mapped, not read: the processes share the file's pages, so P ranks need the memory of one model.
    return torch.load(model_file, map_location=device, mmap=True, weights_only=False)


def _process_main(group: Any, load: Callable[[torch.device], Any], fn: Callable[..., Any], *args: Any) -> Any:
    device = torch.device("cuda", group.rank()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    return fn(load(device), group, *args)


def on_ranks(world_size: int, load: Callable[[torch.device], Any], fn: Callable[..., T], *args: Any) -> tuple[str, list[T]]:
    """The backend that was chosen, and every rank's ``fn(model, group, *args)`` with the model that ``load(device)`` gives.
    All must be picklable.

    Raises:
        RankError, TimeoutError: as :func:`pcp_mla.testing.launch.run_distributed`.
    """
    backend = choose_backend(world_size)
    if backend != "played":
        return backend, run_distributed(world_size, _process_main, load, fn, *args, backend=backend, timeout=TIMEOUT)
    from ..integrations.transformers.weights import copy_sharing_weights

    model = load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return backend, play(world_size, lambda group: fn(copy_sharing_weights(model), group, *args))


def run_ranks(world_size: int, model_file: str, work: Work, stock: StockRouting) -> tuple[str, list[RankResult]]:
    """The demo's work by :func:`on_ranks`. ``stock``: how the stock model routed the prompts."""
    return on_ranks(world_size, partial(_load, model_file), _run_rank, work, stock)
