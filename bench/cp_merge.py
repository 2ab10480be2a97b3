"""cp_lse_a2a and cp_lse_ag_out_rs at decode shapes beside the same in plain torch, over NCCL on several GPUs, else over gloo.

Bytes: what a rank sends to the others. FLOPs: two an element of each partial. ``graph_us``: a call in a replayed CUDA graph of 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pcp_mla import cp_lse_a2a, cp_lse_ag_out_rs
from pcp_mla.groups import all_gather_rows, all_to_all_rows, group_rank, group_world_size, reduce_scatter_rows

from . import plain, timing

HEADS = 128
GPU_SHAPES = [(rows, dim) for dim in (512, 128) for rows in (1, 16, 64, 256)]
CPU_SHAPES = [(16, 512)]


def torch_ag_out_rs(out: torch.Tensor, lse: torch.Tensor, group: Any) -> torch.Tensor:
    lses = all_gather_rows(lse[None], group)
    factor = torch.exp(lse - torch.logsumexp(lses, 0))
    shares = (out.float() * factor[..., None]).unflatten(1, (len(lses), -1)).transpose(0, 1).contiguous()
    return reduce_scatter_rows(shares, group)[0].to(out.dtype)


def torch_a2a(out: torch.Tensor, lse: torch.Tensor, group: Any) -> torch.Tensor:
    world = group_world_size(group)
    outs = all_to_all_rows(out.unflatten(1, (world, -1)).transpose(0, 1).contiguous(), group)
    lses = all_to_all_rows(lse.unflatten(1, (world, -1)).transpose(0, 1).contiguous(), group)
    factors = torch.exp(lses - torch.logsumexp(lses, 0))
    return (outs * factors[..., None]).sum(0).to(out.dtype)


def inputs(rows: int, dim: int, group: Any, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's output and LSE, and its share of the heads of all ranks' outputs merged, by the textbook."""
    generator, world, rank = torch.Generator().manual_seed(7), group_world_size(group), group_rank(group)  # the same on every rank
    outs = torch.randn(world, rows, HEADS, dim, generator=generator).bfloat16()
    lses = torch.randn(world, rows, HEADS, generator=generator)
    merged = (outs.double() * lses.double().softmax(0)[..., None]).sum(0)
    return outs[rank].to(device), lses[rank].to(device), merged.unflatten(1, (world, -1))[:, rank].to(device)


def make_calls(out: torch.Tensor, lse: torch.Tensor, wanted: torch.Tensor, group: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """The paths of both ops, checked."""
    ops = {
        "cp_lse_a2a": {"ours": lambda: cp_lse_a2a(out, lse, group), "torch": lambda: torch_a2a(out, lse, group)},
        "cp_lse_ag_out_rs": {"ours": lambda: cp_lse_ag_out_rs(out, lse, group), "torch": lambda: torch_ag_out_rs(out, lse, group)},
    }
    for op, calls in ops.items():
        for name, call in calls.items():
            plain.check_close(f"{op} of {name}", call(), wanted)
    return ops


def measure(group: Any, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """All shapes, on one rank."""
    gpu = dist.get_backend(group) == "nccl"
    device, world = ("cuda" if gpu else "cpu"), dist.get_world_size(group)
    results = []
    with torch.inference_mode():
        for rows, dim in shapes:
            elements = rows * HEADS * dim
            for op, calls in make_calls(*inputs(rows, dim, group, device), group).items():
                per_element, lses = (2, 1) if op == "cp_lse_a2a" else (4, world)
                lse_bytes = rows * HEADS * 4 * lses
                result: dict[str, Any] = {
                    "op": op,
                    "rows": rows,
                    "heads": HEADS,
                    "dim": dim,
                    "ranks": world,
                    "bytes": (elements * per_element + lse_bytes) * (world - 1) // world,
                    "flops": 2 * elements,
                }
                for name, call in calls.items():
                    result[name] = {"cpu_us": timing.cpu_us(call, 5, 20)}
                    if gpu:
                        result[name] |= {"graph_us": timing.graph_us(call), "launches": timing.launches(call)}
                results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result of rank 0 a world size, shape and op."""
    yield from timing.over_ranks(device, measure, GPU_SHAPES, CPU_SHAPES)


def line(result: dict[str, Any]) -> str:
    text = f"{result['op']:17} W={result['ranks']} rows={result['rows']:<4} D={result['dim']} {result['bytes'] / 1e3:8.1f} kB"
    for name in ("ours", "torch"):
        numbers = result[name]
        text += f" | {name} cpu {numbers['cpu_us']:6.1f} us"
        if "graph_us" in numbers:
            text += f" graph {numbers['graph_us']:6.1f} us {numbers['launches']} launches"
    return text
