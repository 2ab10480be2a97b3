"""Launches and time of one layer's PCP part: from this rank's q and latents to its output."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ..compare.seed_path import seed_layer
from ..exchange.heads import HeadExchange
from ..exchange.latents import LatentExchange
from ..groups import Group, group_rank, group_world_size
from ..layer.prefill import MLAPrefill
from ..plan.dims import MLADims
from ..planner.planner import PCPPlanner
from ..testing.played import PlayedGroup
from .outcome import is_within, largest_difference
from .routing import rounding_share

BLOCK_SIZE = 16
WARM_UP = 2
REPEATS = 7


@dataclass
class LayerCost:
    """``launches``: kernels, copies and memsets on a GPU, op calls on a CPU. ``milliseconds``: median."""

    launches: int
    milliseconds: float


@dataclass
class LayerCosts:
    """Both ways through the layer, the largest ``difference`` between their outputs, and how far rounding may move these apart."""

    ours: LayerCost
    seed: LayerCost
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return is_within(self.difference, self.tolerance)


class ReplayedGroup:
    """A played rank's end of a group whose collectives, from the second run of a function on, give again what they gave in the
    first, by a copy. So one rank can be measured without the other ranks' turns."""

    def __init__(self, group: PlayedGroup) -> None:
        self._group = group
        self._gathered: list[torch.Tensor] = []
        self._next = 0

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def world_size(self) -> int:
        return self._group.world_size

    def rewind(self) -> None:
        """The function is about to run again."""
        self._next = 0

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._next == len(self._gathered):
            self._gathered.append(self._group.all_gather(tensor))
        self._next += 1
        return self._gathered[self._next - 1].clone()

    def all_to_all_into(
        self, received: torch.Tensor, rows: torch.Tensor, received_sizes: Sequence[int], sizes: Sequence[int]
    ) -> None:
        if self._next == len(self._gathered):
            self._group.all_to_all_into(received, rows, received_sizes, sizes)
            self._gathered.append(received.clone())
        self._next += 1
        received.copy_(self._gathered[self._next - 1])


# Ops that only allocate, or only look at memory in another shape without saying so in their schema.
_NO_WORK = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten._unsafe_view.default,
}


class _OpCounter(TorchDispatchMode):
    """Counts op calls that do something: neither pure views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not view and func not in _NO_WORK:
            self.count += 1
        return func(*args, **(kwargs or {}))


def on_device(fn: Callable[[], Any], device: torch.device) -> list[Any]:
    """The profiler's events of kernels, copies and fills that ``fn`` puts on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn()
        torch.cuda.synchronize(device)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # Ranges that a library marks (NCCL its collectives) are shown on the device as well, over the kernels that they cover.
    return [event for event in events if not event.is_user_annotation]


def count_launches(fn: Callable[[], Any], device: torch.device) -> int:
    """Kernels, copies and fills that ``fn`` puts on a GPU; op calls other than views and allocations on a CPU."""
    if device.type == "cuda":
        return len(on_device(fn, device))
    with _OpCounter() as counter:
        fn()
    return counter.count


def _milliseconds(fn: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, to the end of its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


@torch.no_grad()
def measure_layers(
    tokens: int,
    kv_b_proj: torch.nn.Module,
    dims: MLADims,
    softmax_scale: float,
    group: Group,
    device: torch.device,
    split: str = "auto",
) -> LayerCosts:
    """Cost of our layer, shared out by ``split``, and of the seed path for a step of ``tokens`` new ones, on the same random
    inputs, called in turn. Both write a paged cache."""
    rank = group_rank(group)
    planner = PCPPlanner(1, tokens, group_world_size(group), rank, block_size=BLOCK_SIZE, device=device)
    blocks = -(-tokens // BLOCK_SIZE)
    meta = planner.plan([tokens], block_tables=torch.arange(blocks, dtype=torch.int32, device=device)[None])
    generator, dtype = torch.Generator().manual_seed(rank), next(kv_b_proj.parameters()).dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(meta.num_tokens, *shape, generator=generator).to(device, dtype)

    q, kv_c, k_pe = random(dims.num_heads, dims.qk_head_dim), random(dims.kv_lora_rank), random(dims.qk_rope_head_dim)

    cache = torch.empty(blocks, BLOCK_SIZE, dims.latent_dim, dtype=dtype, device=device)

    def runner(make: Callable[[Any], Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
        replayed = ReplayedGroup(group) if isinstance(group, PlayedGroup) else None
        layer = make(replayed or group)

        def run() -> torch.Tensor:
            if replayed is not None:
                replayed.rewind()
            return layer()

        return run

    def make_ours(end: Any) -> Callable[[], torch.Tensor]:
        form = (end, planner.max_local_tokens, dims, q.dtype, device)
        heads = None if split == "tokens" or dims.num_heads < planner.world_size else HeadExchange(*form)
        layer = MLAPrefill(dims, softmax_scale, LatentExchange(*form), heads=heads, split=split)
        return lambda: layer(q, kv_c, k_pe, kv_b_proj, meta, cache)

    ours = runner(make_ours)
    seed = runner(lambda end: lambda: seed_layer(q, kv_c, k_pe, kv_b_proj, meta, end, dims, softmax_scale, cache))
    got, wanted = ours(), seed()
    # Of a single layer, whose longest sums are the up-projection's.
    tolerance = rounding_share(1, dims.kv_lora_rank, dtype)[0] * (float(wanted.abs().max()) if wanted.numel() else 0.0)
    difference = largest_difference(got, wanted)
    times: dict[Callable[[], torch.Tensor], list[float]] = {ours: [], seed: []}
    for _ in range(WARM_UP + REPEATS):
        for run, taken in times.items():
            if isinstance(group, dist.ProcessGroup):
                dist.barrier(group)
            taken.append(_milliseconds(run, device))
    return LayerCosts(
        ours=LayerCost(count_launches(ours, device), median(times[ours][WARM_UP:])),
        seed=LayerCost(count_launches(seed, device), median(times[seed][WARM_UP:])),
        difference=difference,
        tolerance=tolerance,
    )
