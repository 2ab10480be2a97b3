"""write_latent_cache and gather_latents beside torch's indexing and, where they are (bench/peers.py), vLLM's ops.

bf16 latents (DeepSeek's are 576 wide), blocks of 64, a request's blocks anywhere in the cache. Bytes: every row read and written
once. FLOPs: none. ``graph_us`` is the time of a call in a CUDA graph of 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pcp_mla import gather_latents, write_latent_cache
from pcp_mla.ops.registry import availability
from pcp_mla.plan.dims import MLADims

from . import peers, plain, timing
from .geometry import DEEPSEEK, fields

BLOCK = 64
GEOMETRY_TOKENS = {"cuda": 32768, "cpu": 128}
GPU_TOKENS = (512, 4096, 32768, 131072)
CPU_TOKENS = (512, 4096)
Paths = dict[str, Callable[[], Any]]


def make_paths(tokens: int, dims: MLADims, device: str, backends: list[str]) -> dict[str, Paths]:
    """The paths of both ops, checked."""
    width, rank = dims.latent_dim, dims.kv_lora_rank
    latents = torch.randn(tokens, width, device=device).bfloat16()
    blocks = torch.randperm(2 * tokens // BLOCK, device=device)[: tokens // BLOCK].int()
    slots = (blocks[:, None].long() * BLOCK + torch.arange(BLOCK, device=device)).flatten()
    rows, out = slots.int(), torch.empty_like(latents)
    cache = torch.zeros(2 * tokens // BLOCK, BLOCK, width, dtype=torch.bfloat16, device=device)
    flat = cache.view(-1, width)
    write: Paths = {"torch": lambda: flat.index_copy_(0, slots, latents)}
    gather: Paths = {"torch": lambda: torch.index_select(flat, 0, rows, out=out)}
    for backend in backends:
        write[backend] = lambda backend=backend: write_latent_cache(latents, cache, slots, backend=backend)
        gather[backend] = lambda backend=backend: gather_latents(cache, rows, out=out, backend=backend)
    table, ends = blocks[None], torch.tensor([0, tokens], dtype=torch.int32, device=device)
    gather["auto table"] = lambda: gather_latents(cache, block_table=table, cu_seqlens=ends, out=out)
    if cache.is_cuda and dims.qk_rope_head_dim > 0 and peers.has_vllm_ops():
        vllm, scale = torch.ops._C_cache_ops, torch.ones(1, device=device)
        kv_c, k_pe = latents[:, :rank].contiguous(), latents[:, rank:].contiguous()
        sequence = torch.zeros(tokens, dtype=torch.int32, device=device)
        write["vllm"] = lambda: vllm.concat_and_cache_mla(kv_c, k_pe, cache, slots, "auto", scale)
        gather["vllm"] = lambda: vllm.gather_and_maybe_dequant_cache(cache, out, table, ends, sequence, tokens, "auto", scale, None)
    wanted = torch.zeros_like(flat)
    wanted[slots] = latents
    for name, call in write.items():
        cache.zero_()
        call()
        plain.check_equal(f"the write by {name}", flat, wanted)
    for name, call in gather.items():
        out.zero_()
        call()
        plain.check_equal(f"the gather by {name}", out, latents)
    return {"write_latent_cache": write, "gather_latents": gather}


def run(device: str, geometries: Sequence[MLADims] = ()) -> Iterator[dict[str, Any]]:
    """One result a size and op, or a geometry and op; shares as in bench/fused_gather.py."""
    gpu = device == "cuda"
    bandwidth = timing.copy_gbps() if gpu else 0.0
    compared = gpu and not geometries and not availability("gather_latents")["triton"]
    backends = ["auto", "triton"] if compared else ["auto"]
    shapes = [(tokens, DEEPSEEK) for tokens in (GPU_TOKENS if gpu else CPU_TOKENS)]
    for tokens, dims in [(GEOMETRY_TOKENS[device], dims) for dims in geometries] or shapes:
        moved = 2 * 2 * tokens * dims.latent_dim
        for op, paths in make_paths(tokens, dims, device, backends).items():
            result: dict[str, Any] = {"op": op, "tokens": tokens, "width": dims.latent_dim, "bytes": moved, "flops": 0}
            result |= fields(dims) if geometries else {}
            if gpu:
                result |= {"copy_gbps": bandwidth, "copy_us": timing.copy_us(moved)}
            result |= timing.measure(paths, result, graph=True)
            yield result


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['op']:18} T={result['tokens']:<6} {result['width']} wide {result['bytes'] / 1e6:6.1f} MB"
        + f" | {timing.columns(result)}"
    )
