"""One MLA layer, latents in and output in local order out, three ways: MLAPrefill, with our own attention kernel and with
FlashAttention 3 ("ours_fa3"), and over the latter the first implementation's way and virtual rows.

"seed": two all-gathers, two restores, a cache write, kv_b_proj and K concat in torch, lengths worked out on the device, six
index_select, two attention calls, a concat and a restore. "rows": one all-gather, restore and cache write; every head and tail a
sequence of its own, its keys gathered, expanded and concatenated for it alone; one attention call. Both in torch, and with vLLM's
cache write where it is (bench/peers.py).

On one GPU rank 0 of P is played, the collectives being copies of what they would give. On several, the ranks are real, over
NCCL: time of a layer at each number of ranks, and the parallel efficiency t(1) / (P t(P)). Widths and dtype are DeepSeek's, bf16,
the cache in blocks of 64. --trace, or PCP_MLA_TRACE, names a trace of requests (CSV: time, input tokens, cached of them) to
take one more batch from.

The floor is the time of all FLOPs at the rate of a large GEMM, and of the bytes that exchange and cache must move at the bandwidth
of a large copy.
"""

from __future__ import annotations

import csv
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPPlanner, PeerExchange
from pcp_mla.compare.seed_path import build_kv
from pcp_mla.exchange.latents import pack_latents
from pcp_mla.layer.stages import STAGES
from pcp_mla.ops.attention import support
from pcp_mla.ops.attention.call import run_rows
from pcp_mla.ops.attention.libraries import Rows
from pcp_mla.ops.latent_cache import write_rows
from pcp_mla.testing.launch import run_distributed

from . import attention, peers, plain, timing
from .seed import SeedPath

BLOCK = 64
SCALE = 192**-0.5
Batch = tuple[list[int], list[int], int, int]  # new tokens, cached tokens, heads, ranks
GPU_BATCHES: list[Batch] = [
    *(([n // 4] * 4 if n == 512 else [n], [], 16, p) for n in (512, 4096, 8192, 16384, 32768, 131072) for p in (2, 8)),
    ([32768], [], 128, 8),
]
CPU_BATCHES: list[Batch] = [([128], [], 2, 2)]
RANKS_BATCHES = ([2048], [4096], [8192], [4096] * 4, [32768], [131072])  # new tokens of each request


def trace_batch(path: str, tokens: int = 32768, ranks: int = 2) -> Batch:
    """Requests of a trace, one after another, until they have ``tokens`` new ones: a serving step with cached prefixes."""
    new: list[int] = []
    cached: list[int] = []
    with open(path, newline="") as file:
        for _, total, prefix, *_ in list(csv.reader(file))[1:]:
            if (length := min(int(total) - int(prefix), tokens - sum(new))) > 0:
                new.append(length)
                cached.append(int(prefix))
    return new, cached, 16, ranks


class Copied:
    """A :class:`LatentExchange` of a played rank: its own rows are packed, the others' are copied from where they are."""

    def __init__(self, exchange: LatentExchange, gathered: torch.Tensor) -> None:
        self._exchange, self._others, self._buffer = exchange, gathered, torch.empty_like(gathered)

    def publish(self, kv_c: torch.Tensor, k_pe: torch.Tensor, meta: Any, cache: torch.Tensor, scale: Any = None) -> torch.Tensor:
        self._buffer.copy_(self._others)
        pack_latents(kv_c, k_pe, self._buffer[: meta.num_tokens])
        write_rows(self._buffer, cache, meta.slot_mapping, scale)
        return cache


class Layer:
    """Inputs of rank ``rank`` of a step, and the paths."""

    def __init__(self, batch: Batch, group: Any, rank: int, device: str) -> None:
        lengths, contexts, heads, world = batch
        contexts = contexts or [0] * len(lengths)
        self.batch: Batch = (lengths, contexts, heads, world)
        self.dims = MLADims(heads, 128, 64, 128, 512)
        totals = [n + c for n, c in zip(lengths, contexts, strict=True)]
        columns = -(-max(totals) // BLOCK)
        tables = (
            torch.randperm(len(totals) * columns, generator=torch.Generator().manual_seed(3)).int().view(-1, columns).to(device)
        )
        self.tables = tables
        planner = PCPPlanner(len(totals), sum(lengths), world, rank, block_size=BLOCK, device=device)
        self.meta = planner.plan(lengths, contexts, None, tables)
        random = torch.Generator(device=device).manual_seed(5)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=random).bfloat16()

        meta, dims = self.meta, self.dims
        self.cache = values(len(totals) * columns, BLOCK, dims.latent_dim)
        self.weight = values(heads * dims.expanded_dim, dims.kv_lora_rank) * dims.kv_lora_rank**-0.5
        gathered = values(world * meta.num_tokens_padded, dims.latent_dim)
        mine = gathered[rank * meta.num_tokens_padded :][: meta.num_tokens]
        self.kv_c, self.k_pe = (x.contiguous() for x in mine.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=1))
        self.q = values(meta.num_tokens, heads, dims.qk_head_dim)
        self.parts = [x.contiguous() for x in gathered.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=1)]
        self.gathered = gathered
        exchange = LatentExchange(group, planner.max_local_tokens, dims, torch.bfloat16, device)
        self.group, self.room, self.device = group, planner.max_local_tokens, device
        self.backend = support.choose("auto", self.q.device, torch.bfloat16, 192, 128, False, meta.max_seqlen_q, heads)
        self.library = self.backend if support.missing("fa3", self.q.device) else "fa3"
        self.exchange: Any = exchange if group is not None else Copied(exchange, gathered)
        self.layer = MLAPrefill(dims, SCALE, self.exchange, self.backend)
        self.layer_by_library = MLAPrefill(dims, SCALE, self.exchange, self.library)
        # Virtual rows: every row's keys on their own.
        used = meta.partition.seqused_k
        starts = np.repeat(meta.partition.cu_seqlens_kv[:-1], 2)
        index = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, used, strict=True)])
        self.row_slots = meta.kv_rows[torch.from_numpy(index).to(device)]
        self.row_cu_seqlens = torch.from_numpy(np.append(0, used.cumsum()).astype(np.int32)).to(device)
        self.seed_path = SeedPath(meta, group, dims, self.library)

    def seed(self) -> torch.Tensor:
        return self.seed_path(self.q, self.kv_c, self.k_pe, self.weight, self.cache, self.parts)

    def parts_of(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv_c, k_pe = latents.split([self.dims.kv_lora_rank, self.dims.qk_rope_head_dim], dim=1)
        return kv_c, k_pe

    def by(self, layer: MLAPrefill) -> torch.Tensor:
        return layer(self.q, self.kv_c, self.k_pe, self.weight, self.meta, self.cache)

    def ours(self) -> torch.Tensor:
        return self.by(self.layer)

    def ours_fa3(self) -> torch.Tensor:
        return self.by(self.layer_by_library)

    @functools.cached_property
    def layer_by_peers(self) -> MLAPrefill:
        exchange = PeerExchange(self.group, self.room, self.dims, torch.bfloat16, self.device, caches=[self.cache])
        return MLAPrefill(self.dims, SCALE, exchange, self.backend)

    def peers(self) -> torch.Tensor:
        return self.by(self.layer_by_peers)

    @functools.cached_property
    def layer_by_peers_and_library(self) -> MLAPrefill:
        return MLAPrefill(self.dims, SCALE, self.layer_by_peers.exchange, self.library)

    def peers_fa3(self) -> torch.Tensor:
        return self.by(self.layer_by_peers_and_library)

    def rows(self) -> torch.Tensor:
        meta = self.meta
        mine = torch.cat([self.kv_c, self.k_pe], dim=1)
        restored = self.seed_path.gather(mine, self.gathered).index_select(0, meta.allgather_restore_idx)
        self.seed_path.write(*self.parts_of(restored), self.cache)
        latents = self.cache.view(-1, self.dims.latent_dim).index_select(0, self.row_slots)
        k, v = build_kv(*self.parts_of(latents), self.weight, self.dims)
        lengths = (meta.cu_seqlens_q, self.row_cu_seqlens, meta.seqused_k, meta.max_seqlen_q, meta.max_seqlen_k, True)
        return run_rows(self.library, self.q, k, v, Rows(*lengths), SCALE, False)[0]

    def plain(self) -> torch.Tensor:
        """What all of them must give."""
        lengths, contexts, _, world = self.batch
        latents = plain.natural_order(self.gathered, lengths, world)
        for request, context in enumerate(contexts):
            numbers = torch.arange(context, device=self.tables.device)
            cached = self.cache[self.tables[request, numbers // BLOCK].long(), numbers % BLOCK]
            latents[request] = torch.cat([cached, latents[request]])
        widths = (self.dims.qk_nope_head_dim, self.dims.v_head_dim)
        return plain.mla(self.q, latents, self.weight, widths, SCALE, lengths, world, self.meta.rank)

    def paths(self, *names: str) -> dict[str, Callable[[], torch.Tensor]]:
        """These, checked."""
        calls = {name: getattr(self, name) for name in names}
        wanted = self.plain()
        for name, call in calls.items():
            plain.check_close(name, call(), wanted, 2**-6)
        return calls

    def work(self) -> tuple[int, int]:
        """FLOPs of the up-projection and the attention; bytes of the exchange's result, and of its way into the cache."""
        meta, dims = self.meta, self.dims
        flops = attention.flops(meta, dims) + 2 * meta.num_kv_tokens * self.weight.numel()
        return flops, 4 * 2 * len(self.gathered) * dims.latent_dim


class _Clock:
    """In place of a stage of the pipeline: how long the host takes to issue it."""

    def __init__(self) -> None:
        self.spent = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.spent += time.perf_counter() - self._began


def stages_cpu_us(call: Callable[[], Any], repeats: int, calls: int) -> dict[str, float]:
    """Host time of each stage of our layer and of the checks around them, as :func:`timing.cpu_us` of the whole."""
    clocks = {name: _Clock() for name in ("exchange", "up_project", "attention")}
    samples = []
    with mock.patch.dict(STAGES, clocks):
        for _ in range(repeats):
            for clock in clocks.values():
                clock.spent = 0.0
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            total = time.perf_counter() - began
            stages = [clock.spent for clock in clocks.values()]
            samples.append([*stages, total - sum(stages)])
    medians = (statistics.median(column) / calls * 1e6 for column in zip(*samples, strict=True))
    return dict(zip((*clocks, "checks"), medians, strict=True))


def played(batch: Batch, device: str, rates: tuple[float, float] | None) -> dict[str, Any]:
    """Rank 0 of a batch."""
    layer = Layer(batch, None, 0, device)
    flops, moved = layer.work()
    result: dict[str, Any] = {"op": "layer", "tokens": sum(batch[0]), "requests": len(batch[0]), "context": sum(batch[1])}
    result |= {"heads": batch[2], "P": batch[3], "flops": flops, "bytes": moved, "backend": layer.backend}
    if rates is not None:
        result["floor_us"] = flops / rates[0] / 1e6 + moved / rates[1] / 1e3
    # Where `auto` takes FlashAttention 3 by itself, ours is one path.
    paths = layer.paths("seed", "rows", *(["ours_fa3"] if layer.library != layer.backend else []), "ours")
    for name, call in paths.items():
        result[name] = {"cpu_us": timing.cpu_us(call, 7, 10 if rates else 1)}
    if rates is not None:
        for name, times in timing.on_gpu(paths, 15).items():
            result[name] |= times | {"share_of_floor": result["floor_us"] / times["gpu_us"]}
    result["ours"]["stages_cpu_us"] = stages_cpu_us(layer.ours, 7, 10 if rates else 1)
    return result


def on_ranks(group: Any, batches: tuple[list[int], ...]) -> list[dict[str, Any]]:
    """Time of a layer on real ranks, in microseconds: of calls one after another, on the slowest rank."""
    peers.load_fa3()
    results = []
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    with torch.inference_mode():
        for lengths in batches:
            layer = Layer((lengths, [], 16, world), group, rank, "cuda")
            result: dict[str, Any] = {"op": "layer", "tokens": sum(lengths), "requests": len(lengths), "heads": 16, "P": world}
            result["backend"] = layer.backend
            calls = 10 if sum(lengths) < 65536 else 1  # of longer ones each takes a tenth of a second
            for name, call in layer.paths("seed", "rows", "ours", "peers_fa3", "peers").items():
                times = []
                for _ in range(9):
                    dist.barrier(group)
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    for _ in range(calls):
                        call()
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - began) / calls * 1e6)
                slowest = torch.tensor(statistics.median(times[2:]), device="cuda")
                dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
                result[name] = {
                    "wall_us": float(slowest),
                    "cpu_us": timing.cpu_us(call, 5, min(calls, 5)),
                    "launches": timing.launches(call),
                }
            layer.layer_by_peers.exchange.close()  # type: ignore[union-attr]
            results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result a batch, or on several GPUs one a size and number of ranks."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus > 1:
        alone: dict[tuple[int, int], float] = {}
        for world in (1, 2, 4, 8):
            if world > gpus:
                break
            for result in run_distributed(world, on_ranks, RANKS_BATCHES, backend="nccl", timeout=300.0)[0]:
                size = result["tokens"], result["requests"]
                alone.setdefault(size, result["peers"]["wall_us"])
                for name in ("seed", "rows", "ours", "peers_fa3", "peers"):
                    result[name]["efficiency"] = alone[size] / world / result[name]["wall_us"]
                yield result
        return
    batches, rates = (GPU_BATCHES, (timing.gemm_tflops(), timing.copy_gbps())) if gpus else (CPU_BATCHES, None)
    peers.load_fa3()
    if os.environ.get("PCP_MLA_TRACE"):
        batches = [*batches, trace_batch(os.environ["PCP_MLA_TRACE"])]
    for batch in batches:
        yield played(batch, device, rates)


def line(result: dict[str, Any]) -> str:
    text = f"layer T={result['tokens']:<6} H={result['heads']:<3} P={result['P']} {result['backend']}"
    if "floor_us" in result:
        text += f" R={result['requests']} context {result['context']} floor {result['floor_us']:.0f} us"
    for name, numbers in result.items():
        if not isinstance(numbers, dict):
            continue
        text += f" | {name}"
        if "gpu_us" in numbers:
            text += f" {numbers['gpu_us']:.0f} us {numbers['share_of_floor']:.0%} {numbers['launches']} launches"
        if "wall_us" in numbers:
            text += f" {numbers['wall_us']:.0f} us efficiency {numbers['efficiency']:.2f} {numbers['launches']} launches"
        text += f" cpu {numbers['cpu_us']:.0f} us"
        if "stages_cpu_us" in numbers:
            stages = numbers["stages_cpu_us"]
            text += f" ({', '.join(f'{stage} {us:.0f}' for stage, us in stages.items())})"
    return text
