"""PeerExchange, and LatentExchange with its cache write, beside the first implementation's two all-gathers, two restores and a
cache write, over NCCL on several GPUs, else (without PeerExchange) over gloo.

The cache write there is vLLM's concat_and_cache_mla where its library is (bench/peers.py), else torch's. 576-wide bf16 latents of
one request, blocks of 64 anywhere in the caches of ten layers, which are written to in turn. Bytes: what a rank receives from the
others, and every latent read and written. ``graph_us``: a call in a replayed CUDA graph of 10; ``by_sms``: the same of PeerExchange
with so many multiprocessors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pcp_mla import LatentExchange, PCPPlanner, PeerExchange
from pcp_mla.compare.seed_path import gather_part
from pcp_mla.exchange.peer_memory import MAX_SMS
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.dims import MLADims

from . import peers, plain, timing

DIMS = MLADims(16, 128, 64, 128, 512)
BLOCK = 64
GPU_TOKENS = (512, 4096, 8192, 32768, 131072)
CPU_TOKENS = (512,)
LAYERS = 10
SMS = {8192: (1, 2, 4, 8, 16, 32), 32768: (1, 2, 4, 8, 16, 32)}  # beside the default, by tokens


class Step:
    """A rank's latents of one request, and the ways from there to the caches, each checked when it is asked for."""

    def __init__(self, tokens: int, group: Any, device: str) -> None:
        world, rank = group_world_size(group), group_rank(group)
        generator = torch.Generator().manual_seed(7)  # the same blocks and latents on every rank
        table = torch.randperm(2 * tokens // BLOCK, generator=generator)[: tokens // BLOCK].int()[None].to(device)
        self.meta = PCPPlanner(1, tokens, world, rank, block_size=BLOCK, device=device).plan([tokens], [0], [True], table)
        latents = torch.randn(tokens, DIMS.latent_dim, generator=generator).bfloat16().to(device)
        mine = latents[plain.local_tokens([tokens], world, rank)[1].to(device)]
        self.kv_c, self.k_pe = (part.contiguous() for part in mine.split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1))
        self.caches = [torch.zeros(2 * tokens // BLOCK, BLOCK, DIMS.latent_dim, device=device).bfloat16() for _ in range(LAYERS)]
        self.wanted = torch.zeros_like(self.caches[0])
        self.wanted[table[0].long()] = latents.view(-1, BLOCK, DIMS.latent_dim)
        self.group, self.device, self.scale = group, device, torch.ones(1, device=device)
        assert self.meta.slot_mapping is not None
        self.in_order = self.meta.slot_mapping[self.meta.allgather_restore_idx.long()]

    def checked(self, name: str, call: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
        """``call`` with a layer's cache after the other."""
        layers = itertools.cycle(self.caches)
        for cache in self.caches:
            cache.zero_()
        for _ in self.caches:
            call(next(layers))
        for cache in self.caches:
            plain.check_equal(f"the cache of {name}", cache, self.wanted)
        return lambda: call(next(layers))

    def seed(self, cache: torch.Tensor) -> None:
        restored = [
            gather_part(part, self.meta, self.group).index_select(0, self.meta.allgather_restore_idx)
            for part in (self.kv_c, self.k_pe)
        ]
        if self.device == "cuda" and peers.has_vllm_ops():
            torch.ops._C_cache_ops.concat_and_cache_mla(*restored, cache, self.in_order, "auto", self.scale)
        else:
            cache.view(-1, DIMS.latent_dim).index_copy_(0, self.in_order, torch.cat(restored, dim=1))

    def by(self, exchange: LatentExchange | PeerExchange) -> Callable[[torch.Tensor], Any]:
        return lambda cache: exchange.publish(self.kv_c, self.k_pe, self.meta, cache)

    def peers(self, max_sms: int = MAX_SMS) -> PeerExchange:
        room = self.meta.num_tokens_padded
        return PeerExchange(self.group, room, DIMS, torch.bfloat16, self.device, caches=self.caches, max_sms=max_sms)


def paths(step: Step) -> dict[str, Callable[[], None]]:
    """The ways by collectives, checked."""
    exchange = LatentExchange(step.group, step.meta.num_tokens_padded, DIMS, torch.bfloat16, step.device)
    return {name: step.checked(name, call) for name, call in (("seed", step.seed), ("ours", step.by(exchange)))}


def measure(group: Any, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """All sizes, on one rank."""
    gpu, world = dist.get_backend(group) == "nccl", dist.get_world_size(group)
    results = []
    with torch.inference_mode():
        for tokens in sizes:
            row = 2 * DIMS.latent_dim
            moved = tokens * row * (world - 1) // world + 2 * tokens * row
            result: dict[str, Any] = {"op": "exchange", "tokens": tokens, "ranks": world, "bytes": moved, "flops": 0}
            step = Step(tokens, group, "cuda" if gpu else "cpu")
            for name, call in paths(step).items():
                dist.barrier(group)
                result[name] = timing.in_graph(call, gpu, LAYERS)
            if gpu:
                exchange = step.peers()
                call = step.checked("peers", step.by(exchange))
                result["peers"] = timing.in_graph(call, gpu, LAYERS) | {"by_sms": {}}
                exchange.close()
                for sms in SMS.get(tokens, ()):
                    exchange = step.peers(sms)
                    result["peers"]["by_sms"][sms] = timing.graph_us(step.checked("peers", step.by(exchange)), calls=LAYERS)
                    exchange.close()
            results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result of rank 0 a world size and number of tokens."""
    yield from timing.over_ranks(device, measure, GPU_TOKENS, CPU_TOKENS)


def line(result: dict[str, Any]) -> str:
    text = f"{result['op']} P={result['ranks']} T={result['tokens']:<6} {result['bytes'] / 1e6:7.2f} MB"
    return text + timing.graph_columns(result, ("seed", "ours", "peers"))
