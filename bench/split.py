"""A layer whose tokens are shared out over the ranks, and one whose heads are: MLAPrefill with split "tokens", "heads" and "auto".

On one GPU rank 0 of P is played: copies of what it would be sent stand in for the wire. ``wire_us`` is what its bytes take at 370
GB/s, more than the copies: the second ratio of heads counts both. On several GPUs the ranks are real, by peers: GPU time on the
slowest rank. Widths and dtype are DeepSeek's, bf16, caches in blocks of 64, one request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pcp_mla import HeadExchange, MLAPrefill, PeerExchange, PeerHeadExchange
from pcp_mla.exchange.heads import HeadForm
from pcp_mla.plan.metadata import PCPMetadata
from pcp_mla.testing.launch import run_distributed

from . import peers, plain, timing
from .layer import SCALE, Batch, Layer

SPLITS = {"by_tokens": "tokens", "by_heads": "heads", "auto": "auto"}
WIRE = 370e9  # bytes a second, measured (bench exchange)
STEPS = [(8192, 0), (32768, 0), (131072, 0), (8192, 57344), (8192, 122880)]  # new tokens, cached ones
PLAYED: list[Batch] = [
    ([new], [cached], heads, ranks)
    for heads in (16, 128)
    for new, cached in STEPS
    for ranks in (2, 4, 8)
    if new < 131072 or heads == 16 or ranks == 8  # others take a second a call
]
ON_RANKS = [(new, cached, 16) for new, cached in STEPS[:2] + STEPS[3:]] + [(8192, 57344, 128)]
ON_CPU: list[Batch] = [([128], [64], 4, 2)]


class PlayedGroup:
    """Rank 0 of a group that is not there."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a played rank is alone")


class CopiedHeads(PeerHeadExchange):
    """Of a played rank: what the others would send is there, and copied."""

    def __init__(self, layer: Layer, out: torch.Tensor) -> None:
        world, padded = layer.meta.world_size, layer.meta.num_tokens_padded
        self.form = HeadForm(layer.dims, torch.bfloat16, world, 0)
        self.group, self.max_tokens, self.heads = PlayedGroup(world), padded, self.form.heads
        size = (world * padded, self.form.mine, layer.dims.qk_head_dim)
        self._others = torch.randn(*size, device=out.device, dtype=out.dtype)
        self._queries, self._outputs, self._sent = torch.zeros_like(self._others), out, torch.empty_like(out)

    def to_heads(self, q: torch.Tensor, meta: PCPMetadata) -> torch.Tensor:
        rows = meta.num_tokens_padded
        self._queries[rows:].copy_(self._others[rows:])
        self._queries[: len(q)].copy_(q[:, self.heads])
        return self._queries

    def to_tokens(self, out: torch.Tensor, meta: PCPMetadata, result: torch.Tensor | None = None) -> torch.Tensor:
        to = self._sent if result is None else result
        to.copy_(self._outputs)
        to[:, self.heads].copy_(out[: len(to)])
        return to


class Split:
    """The inputs of a rank of a step, and a layer of each split."""

    def __init__(self, batch: Batch, group: Any, rank: int, device: str) -> None:
        self.of = Layer(batch, group, rank, device)
        of, exchange = self.of, self.of.exchange
        self.open: list[Any] = []
        heads: Any
        if group is None:
            heads = CopiedHeads(of, of.ours())
        elif device == "cuda":
            exchange = PeerExchange(group, of.room, of.dims, torch.bfloat16, device, caches=[of.cache])
            heads = PeerHeadExchange(group, of.room, of.dims, torch.bfloat16, device)
            self.open = [exchange, heads]
        else:
            heads = HeadExchange(group, of.room, of.dims, torch.bfloat16, device)
        self.layers = {name: MLAPrefill(of.dims, SCALE, exchange, heads=heads, split=split) for name, split in SPLITS.items()}

    def paths(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Checked against one another."""
        calls = {name: lambda layer=layer: self.of.by(layer) for name, layer in self.layers.items()}
        wanted = calls["by_tokens"]().float()
        for name, call in calls.items():
            plain.check_close(name, call(), wanted, 2**-6)
        return calls

    def close(self) -> None:
        for exchange in self.open:
            exchange.close()


def described(batch: Batch, of: Layer) -> dict[str, Any]:
    (new, *_), (cached, *_), heads, ranks = batch
    dims, rows = of.dims, of.meta.num_tokens_padded
    sent = rows * heads * (dims.qk_head_dim + dims.v_head_dim) * 2 * (ranks - 1) // ranks
    result = {"op": "split", "tokens": new, "context": cached, "heads": heads, "P": ranks, "bytes": sent, "flops": of.work()[0]}
    return result | {"wire_us": sent / WIRE * 1e6}


def played(batch: Batch, device: str) -> dict[str, Any]:
    split = Split(batch, None, 0, device)
    result = described(batch, split.of)
    paths = split.paths()
    for name, call in paths.items():
        result[name] = {"cpu_us": timing.cpu_us(call, 5, 5)}
    for name, times in (timing.on_gpu(paths, 9) if device == "cuda" else {}).items():
        result[name] |= times
    return result


def on_ranks(group: Any, steps: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    peers.load_fa3()
    results = []
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    with torch.inference_mode():
        for new, cached, heads in steps:
            batch = ([new], [cached], heads, world)
            split = Split(batch, group, rank, "cuda")
            result = described(batch, split.of)
            paths = split.paths()
            for name, call in paths.items():
                dist.barrier(group)
                slowest = torch.tensor(timing.gpu_us(call, 15), device="cuda")
                dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
                result[name] = {"gpu_us": float(slowest), "cpu_us": timing.cpu_us(call, 5, 5), "launches": timing.launches(call)}
            split.close()
            results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result a step."""
    peers.load_fa3()
    if device == "cuda" and torch.cuda.device_count() > 1:
        for world in (2, 4, 8):
            if world <= torch.cuda.device_count():
                yield from run_distributed(world, on_ranks, ON_RANKS, backend="nccl", timeout=300.0)[0]
        return
    for batch in PLAYED if device == "cuda" else ON_CPU:
        yield played(batch, device)


def line(result: dict[str, Any]) -> str:
    text = f"split T={result['tokens']:<6} C={result['context']:<6} H={result['heads']:<3} P={result['P']}"
    text += f" wire {result['wire_us']:.0f} us"
    for name in SPLITS:
        of = result[name]
        text += f" | {name}"
        if "gpu_us" in of:
            text += f" {of['gpu_us']:.0f} us {of['launches']} launches"
        text += f" cpu {of['cpu_us']:.0f} us"
    if "gpu_us" in result["by_heads"]:
        by_tokens, by_heads = (result[name]["gpu_us"] for name in ("by_tokens", "by_heads"))
        text += f" | {by_tokens / by_heads:.2f}, with the wire {by_tokens / (by_heads + result['wire_us']):.2f} times"
    return text
