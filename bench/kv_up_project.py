"""kv_up_project beside the bare GEMM and beside torch's restore, kv_b_proj and K concat; concat_k beside torch's two copies.

bf16, latents in blocks of 64 anywhere in a cache. Bytes: latents, weight, K and V once. FLOPs: of the GEMM.
"apart" leaves k_pe out of K: it writes less, and has its own bytes; so has "float8", of latents that are half as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from pcp_mla import concat_k, kv_up_project
from pcp_mla.ops.registry import availability
from pcp_mla.plan.dims import MLADims

from . import plain, timing
from .geometry import DEEPSEEK, fields
from .geometry import name as geometry_name

BLOCK = 64
# Tokens, heads, of DeepSeek's widths.
GPU_SHAPES = [(512, 16), (4096, 16), (32768, 16), (131072, 16), (32768, 128)]
CPU_SHAPES = [(512, 16)]
GEOMETRY_TOKENS = {"cuda": 32768, "cpu": 128}
Paths = dict[str, Callable[[], Any]]


def make_paths(tokens: int, dims: MLADims, device: str, backends: list[str]) -> dict[str, Paths]:
    """The paths of both ops, checked."""
    rank, nope, heads = dims.kv_lora_rank, dims.qk_nope_head_dim, dims.num_heads
    cache = torch.randn(2 * tokens, dims.latent_dim, device=device).bfloat16()
    blocks = torch.randperm(2 * tokens // BLOCK, device=device)[: tokens // BLOCK]
    rows = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten().int()
    weight = (torch.randn(heads * dims.expanded_dim, rank, device=device) * rank**-0.5).bfloat16()
    kv_c = cache[rows.long(), :rank].contiguous()
    expanded = F.linear(kv_c, weight).view(tokens, heads, -1)
    k_pe = cache[rows.long(), rank:].contiguous()
    k = torch.full((tokens, heads, dims.qk_head_dim), torch.nan, dtype=torch.bfloat16, device=device)
    v = torch.full((tokens, heads, dims.v_head_dim), torch.nan, dtype=torch.bfloat16, device=device)
    k_nope = torch.full((tokens, heads, nope), torch.nan, dtype=torch.bfloat16, device=device)
    rope = torch.full_like(k_pe, torch.nan)

    def copies() -> torch.Tensor:
        k[..., :nope] = expanded[..., :nope]
        k[..., nope:] = k_pe[:, None]
        return k

    def in_torch() -> tuple[torch.Tensor, torch.Tensor]:
        restored = torch.index_select(cache, 0, rows)
        projected = F.linear(restored[:, :rank], weight).view(tokens, heads, -1)
        k[..., :nope] = projected[..., :nope]
        k[..., nope:] = restored[:, None, rank:]
        return k, projected[..., nope:]

    project: Paths = {"gemm": lambda: F.linear(kv_c, weight), "torch": in_torch}
    concat: Paths = {"torch": copies} if dims.qk_rope_head_dim > 0 else {}  # else there is nothing to put together
    for backend in backends:
        project[backend] = lambda backend=backend: kv_up_project(cache, rows, weight, dims, k_out=k, v_out=v, backend=backend)
        if concat:
            concat[backend] = lambda backend=backend: concat_k(expanded[..., :nope], k_pe, out=k, backend=backend)
    project["apart"] = lambda: kv_up_project(cache, rows, weight, dims, k_out=k_nope, v_out=v, k_pe_apart=True, k_pe_out=rope)
    scale = torch.full((1,), 0.02, device=device)
    narrow = (cache.float() / scale).to(torch.float8_e4m3fn)
    project["float8"] = lambda: kv_up_project(narrow, rows, weight, dims, scale=scale, k_out=k, v_out=v)
    whole = [x.clone() for x in in_torch()]
    rounded = (narrow[rows.long()].float() * scale).bfloat16()
    of_float8 = F.linear(rounded[:, :rank], weight).view(tokens, heads, -1)
    float8_k = torch.cat([of_float8[..., :nope], rounded[:, None, rank:].expand(-1, heads, -1)], dim=2)
    wanted = {"apart": [whole[0][..., :nope], whole[1], k_pe], "float8": [float8_k, of_float8[..., nope:]]}
    for name, call in project.items():
        if name != "gemm":
            for out in (k, v, k_nope, rope):
                out.fill_(torch.nan)
            for got, right in zip(call(), wanted.get(name, whole), strict=True):
                plain.check_close(f"the up-projection by {name}", got, right)
    wanted_k = copies().clone()
    for name, call in concat.items():
        k.fill_(torch.nan)
        plain.check_equal(f"the concat by {name}", call(), wanted_k)
    return {"kv_up_project": project} | ({"concat_k": concat} if concat else {})


def run(device: str, geometries: Sequence[MLADims] = ()) -> Iterator[dict[str, Any]]:
    """One result a size and op, or a geometry and op; shares as in bench/fused_gather.py."""
    gpu = device == "cuda"
    bandwidth = timing.copy_gbps() if gpu else 0.0
    compared = gpu and not geometries and not availability("kv_up_project")["triton"]
    backends = ["auto", "triton"] if compared else ["auto"]
    shapes = [(tokens, replace(DEEPSEEK, num_heads=heads)) for tokens, heads in (GPU_SHAPES if gpu else CPU_SHAPES)]
    for tokens, dims in [(GEOMETRY_TOKENS[device], dims) for dims in geometries] or shapes:
        heads = dims.num_heads
        outputs, weights = heads * (dims.qk_head_dim + dims.v_head_dim), heads * dims.expanded_dim * dims.kv_lora_rank
        work = {
            "kv_up_project": (2 * (tokens * (dims.latent_dim + outputs) + weights), 2 * tokens * weights),
            "concat_k": (2 * tokens * (heads * (dims.qk_nope_head_dim + dims.qk_head_dim) + dims.qk_rope_head_dim), 0),
        }
        for op, paths in make_paths(tokens, dims, device, backends).items():
            moved, flops = work[op]
            result: dict[str, Any] = {"op": op, "tokens": tokens, "heads": heads, "bytes": moved, "flops": flops}
            result |= fields(dims) if geometries else {}
            if gpu:
                result |= {"copy_gbps": bandwidth, "copy_us": timing.copy_us(moved)}
            less = {"apart": 2 * tokens * (heads - 1) * dims.qk_rope_head_dim, "float8": tokens * dims.latent_dim}
            own: dict[str, dict[str, Any]] = {name: {"bytes": moved - less[name]} for name in less.keys() & paths.keys()}
            for numbers in own.values() if gpu else ():
                numbers["copy_us"] = timing.copy_us(numbers["bytes"])
            result |= timing.measure(paths, result, own)
            if gpu and "gemm" in paths:
                for name in paths:
                    result[name]["of_gemm"] = result[name]["gpu_us"] / result["gemm"]["gpu_us"]
            yield result


def line(result: dict[str, Any]) -> str:
    what = (
        f"{result['op']:13} T={result['tokens']:<6} H={result['heads']:<3} {geometry_name(result)} {result['bytes'] / 1e6:7.1f} MB"
    )
    return f"{what} | {timing.columns(result)}"
