"""LatentExchange and write_latent_cache beside the first implementation's two all-gathers, two restores and a cache write, over
NCCL on several GPUs, else over gloo.

The cache write there is vLLM's concat_and_cache_mla where its library is (bench/peers.py), else torch's. 576-wide bf16 latents of
one request, blocks of 64 anywhere in the cache. Bytes: what a rank receives from the others, and every latent read and written.
``graph_us``: a call in a replayed CUDA graph of 10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pcp_mla import LatentExchange, PCPPlanner, write_latent_cache
from pcp_mla.compare.seed_path import gather_part
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.dims import MLADims

from . import peers, plain, timing

DIMS = MLADims(16, 128, 64, 128, 512)
BLOCK = 64
GPU_TOKENS = (512, 4096, 8192, 32768, 131072)
CPU_TOKENS = (512,)


def paths(tokens: int, group: Any, device: str) -> dict[str, Callable[[], None]]:
    """Both ways from a rank's latents to the cache, checked."""
    world, rank = group_world_size(group), group_rank(group)
    generator = torch.Generator().manual_seed(7)  # the same blocks and latents on every rank
    table = torch.randperm(2 * tokens // BLOCK, generator=generator)[: tokens // BLOCK].int()[None].to(device)
    meta = PCPPlanner(1, tokens, world, rank, block_size=BLOCK, device=device).plan([tokens], [0], [True], table)
    latents = torch.randn(tokens, DIMS.latent_dim, generator=generator).bfloat16().to(device)
    mine = latents[plain.local_tokens([tokens], world, rank)[1].to(device)]
    kv_c, k_pe = (part.contiguous() for part in mine.split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1))
    caches = {name: torch.zeros(2 * tokens // BLOCK, BLOCK, DIMS.latent_dim, device=device).bfloat16() for name in ("ours", "seed")}
    wanted = torch.zeros_like(caches["ours"])
    wanted[table[0].long()] = latents.view(-1, BLOCK, DIMS.latent_dim)
    exchange = LatentExchange(group, meta.num_tokens_padded, DIMS, torch.bfloat16, device)
    restore, slots = meta.allgather_restore_idx, meta.slot_mapping
    assert slots is not None
    in_order = slots[restore.long()]
    scale = torch.ones(1, device=device)

    def ours() -> None:
        write_latent_cache(exchange.all_gather(kv_c, k_pe, meta), caches["ours"], slots)

    def seed() -> None:
        restored = [gather_part(part, meta, group).index_select(0, restore) for part in (kv_c, k_pe)]
        if device == "cuda" and peers.has_vllm_ops():
            torch.ops._C_cache_ops.concat_and_cache_mla(*restored, caches["seed"], in_order, "auto", scale)
        else:
            caches["seed"].view(-1, DIMS.latent_dim).index_copy_(0, in_order, torch.cat(restored, dim=1))

    calls = {"ours": ours, "seed": seed}
    for name, call in calls.items():
        call()
        plain.check_equal(f"the cache of {name}", caches[name], wanted)
    return calls


def measure(group: Any, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """All sizes, on one rank."""
    gpu, world = dist.get_backend(group) == "nccl", dist.get_world_size(group)
    results = []
    with torch.inference_mode():
        for tokens in sizes:
            row = 2 * DIMS.latent_dim
            moved = tokens * row * (world - 1) // world + 2 * tokens * row
            result: dict[str, Any] = {"op": "exchange", "tokens": tokens, "ranks": world, "bytes": moved, "flops": 0}
            for name, call in paths(tokens, group, "cuda" if gpu else "cpu").items():
                dist.barrier(group)
                result[name] = {"cpu_us": timing.cpu_us(call, 5, 20)}
                if gpu:
                    result[name] |= {"graph_us": timing.graph_us(call, calls=10), "launches": timing.launches(call)}
            results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result of rank 0 a world size and number of tokens."""
    yield from timing.over_ranks(device, measure, GPU_TOKENS, CPU_TOKENS)


def line(result: dict[str, Any]) -> str:
    text = f"{result['op']} P={result['ranks']} T={result['tokens']:<6} {result['bytes'] / 1e6:7.2f} MB"
    for name in ("seed", "ours"):
        numbers = result[name]
        text += f" | {name} cpu {numbers['cpu_us']:6.1f} us"
        if "graph_us" in numbers:
            text += f" graph {numbers['graph_us']:6.1f} us {numbers['launches']} launches"
    return text
