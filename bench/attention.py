"""pcp_attention's own kernels beside FlashAttention 2 and 3, all in the one-call form: bf16, rank 0 of P. FlashAttention 3 has V
padded to the width of q where it takes nothing else.

FLOPs: two for each multiplication that the causal mask leaves. K comes apart from ``k_pe``, or in one piece ("K"); "rows" are with
``kv_rows``, "prev" merges an earlier result. ``python -m bench.attention sweep`` times the Triton kernel's configurations, and some
of them with ``kv_rows``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pcp_mla import PCPMetadata, pcp_attention
from pcp_mla.ops.attention import support
from pcp_mla.plan.dims import MLADims

from . import peers, plain, timing
from .geometry import DEEPSEEK, fields
from .geometry import name as geometry_name

# Tokens, heads, ranks, of DeepSeek's widths.
GPU_SHAPES = [(4096, 16, 2), (16384, 16, 2), (32768, 16, 8), (32768, 128, 8)]
CPU_SHAPES = [(256, 2, 2)]
GEOMETRY_SHAPES = {"cuda": (16384, 2), "cpu": (256, 2)}  # tokens, ranks
Paths = dict[str, Callable[[], Any]]


def flops(meta: PCPMetadata, dims: MLADims) -> int:
    """Of the products with K and V that the causal mask leaves."""
    queries, keys = np.diff(meta.partition.cu_seqlens_q).astype(np.int64), meta.partition.seqused_k.astype(np.int64)
    pairs = int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())
    return 2 * (dims.qk_head_dim + dims.v_head_dim) * dims.num_heads * pairs


def inputs(tokens: int, dims: MLADims, ranks: int, device: str) -> tuple[PCPMetadata, dict[str, torch.Tensor]]:
    heads, nope, rope, v_dim = dims.num_heads, dims.qk_nope_head_dim, dims.qk_rope_head_dim, dims.v_head_dim
    meta = PCPMetadata.build([tokens], world_size=ranks, rank=0, device=device)
    q = torch.randn(meta.num_tokens, heads, nope + rope, device=device).bfloat16()
    expanded = torch.randn(tokens, heads, nope + v_dim, device=device).bfloat16()  # as kv_b_proj gives it
    k_pe = torch.randn(tokens, rope, device=device).bfloat16()
    k_nope, v = expanded.split([nope, v_dim], dim=-1)
    k = torch.cat([k_nope, k_pe[:, None].expand(-1, heads, -1)], dim=-1)
    return meta, {"q": q, "k": k, "v": v, "k_nope": k_nope, "k_pe": k_pe}


def check(paths: Paths, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int) -> None:
    """All, on rank 0."""
    _, last = plain.local_tokens([len(k)], ranks, 0)
    wanted, wanted_lse = plain.attention(q, k, v, last, q.shape[2] ** -0.5)
    for name, call in paths.items():
        out, lse = call()
        plain.check_close(name, out, wanted)
        plain.check_close(f"{name}'s LSE", lse[..., None], wanted_lse[..., None], 1e-4, 1e-4)


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: PCPMetadata, options: dict[str, Any]) -> Callable[[], Any]:
    """FlashAttention 3 with V as wide as q, to whose other columns nothing comes."""
    wide = F.pad(v, (0, q.shape[2] - v.shape[2]))

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = pcp_attention(q, k, wide, meta, **options, backend="fa3")
        return out[..., : v.shape[2]], lse

    return call


def libraries(meta: PCPMetadata, x: dict[str, torch.Tensor], options: dict[str, Any]) -> Paths:
    q, k, v = x["q"], x["k"], x["v"]
    paths: Paths = {}
    for name in ("fa3", "fa2"):
        if support.missing(name, q.device):
            continue
        if not support.refusal(name, q.dtype, q.shape[2], v.shape[2], False):
            paths[name] = lambda name=name: pcp_attention(q, k, v, meta, **options, backend=name)
        elif name == "fa3" and v.shape[2] < q.shape[2] <= 256:
            paths["fa3 padded"] = padded(q, k, v, meta, options)
    return paths


def plain_paths(meta: PCPMetadata, x: dict[str, torch.Tensor], device: str) -> Paths:
    """Our kernel, with K in two parts and in one, and libraries: for a geometry."""
    q, k, v, k_nope, k_pe = (x[name] for name in ("q", "k", "v", "k_nope", "k_pe"))
    options: dict[str, Any] = {"softmax_scale": q.shape[2] ** -0.5, "return_lse": True}
    paths: Paths = {}
    able = [n for n in ("cuda", "triton") if not support.missing(n, q.device)]
    able = [n for n in able if not support.refusal(n, q.dtype, q.shape[2], v.shape[2], False)]
    own = able[0] if able and device == "cuda" else "torch"
    if k_pe.shape[1] > 0:
        paths[own] = lambda: pcp_attention(q, k_nope, v, meta, k_pe=k_pe, **options, backend=own)
    paths[f"{own} K"] = lambda: pcp_attention(q, k, v, meta, **options, backend=own)
    paths |= libraries(meta, x, options)
    check(paths, q, k, v, meta.world_size)
    return paths


def make_paths(meta: PCPMetadata, x: dict[str, torch.Tensor], device: str) -> Paths:
    q, k, v, k_nope, k_pe = (x[name] for name in ("q", "k", "v", "k_nope", "k_pe"))
    options: dict[str, Any] = {"softmax_scale": q.shape[2] ** -0.5, "return_lse": True}
    if device == "cpu":
        paths: Paths = {"torch": lambda: pcp_attention(q, k, v, meta, **options)}
        check(paths, q, k, v, meta.world_size)
        return paths
    order = torch.arange(len(k), device=device, dtype=torch.int32)
    blocks = order.view(-1, 64)[torch.randperm(len(k) // 64, device=device)].flatten()  # a paged cache's
    mixed = torch.randperm(len(k), device=device)
    listed = mixed.int()

    def moved(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """K, k_pe and V of key i in row ``rows[i]``."""
        return tuple(torch.empty_like(part).index_copy_(0, rows.long(), part) for part in (k_nope, k_pe, v))

    (mixed_k, mixed_pe, mixed_v), (paged_k, paged_pe, paged_v) = moved(mixed), moved(blocks)
    # Weighs nothing, but is read and merged.
    nothing = (q.new_zeros(*q.shape[:2], v.shape[2]), torch.full(q.shape[:2], -40.0, device=device))
    paths = {}
    for name in ("cuda", "triton"):
        if support.missing(name, q.device):
            continue
        own = {**options, "backend": name}
        paths |= {
            name: lambda own=own: pcp_attention(q, k_nope, v, meta, k_pe=k_pe, **own),
            f"{name} K": lambda own=own: pcp_attention(q, k, v, meta, **own),
            f"{name} rows": lambda own=own: pcp_attention(q, k_nope, v, meta, k_pe=k_pe, kv_rows=order, **own),
            f"{name} blocks of rows": lambda own=own: pcp_attention(
                q, paged_k, paged_v, meta, k_pe=paged_pe, kv_rows=blocks, **own
            ),
            f"{name} random rows": lambda own=own: pcp_attention(q, mixed_k, mixed_v, meta, k_pe=mixed_pe, kv_rows=listed, **own),
            f"{name} prev": lambda own=own: pcp_attention(q, k_nope, v, meta, k_pe=k_pe, prev=nothing, **own),
        }
    paths |= libraries(meta, x, options)
    check(paths, q, k, v, meta.world_size)
    return paths


def run(device: str, geometries: Sequence[MLADims] = ()) -> Iterator[dict[str, Any]]:
    """One result a shape or a geometry."""
    gpu = device == "cuda"
    peers.load_fa3()
    shapes = [(tokens, ranks, replace(DEEPSEEK, num_heads=heads)) for tokens, heads, ranks in (GPU_SHAPES if gpu else CPU_SHAPES)]
    for tokens, ranks, dims in [(*GEOMETRY_SHAPES[device], dims) for dims in geometries] or shapes:
        meta, x = inputs(tokens, dims, ranks, device)
        heads, work = dims.num_heads, flops(meta, dims)
        result: dict[str, Any] = {"op": "attention", "tokens": tokens, "heads": heads, "P": ranks, "flops": work}
        result |= fields(dims) if geometries else {}
        paths = (plain_paths if geometries else make_paths)(meta, x, device)
        for name, call in paths.items():
            result[name] = {"cpu_us": timing.cpu_us(call, repeats=5, calls=5 if gpu else 1)}
        for name, times in (timing.on_gpu(paths) if gpu else {}).items():
            result[name] |= times | {"tflops": work / times["gpu_us"] / 1e6}
        yield result


def line(result: dict[str, Any]) -> str:
    what = f"attention T={result['tokens']:<6} H={result['heads']:<3} P={result['P']} {geometry_name(result)}"
    what += f" {result['flops'] / 1e12:.3f} TFLOP"
    parts = []
    for name, numbers in result.items():
        if isinstance(numbers, dict):
            gpu = f" {numbers['gpu_us']:.0f} us {numbers['tflops']:.0f} TFLOP/s" if "gpu_us" in numbers else ""
            parts.append(f"{name}{gpu} cpu {numbers['cpu_us']:.0f} us")
    return f"{what} | {' | '.join(parts)}"


# Queries and keys of a tile, heads at a time, warps, stages, registers a thread at most.
CONFIGURATIONS = [
    (128, 64, 16, 8, 3, None),
    (128, 64, 4, 8, 3, None),
    (128, 64, 2, 8, 3, None),
    (128, 64, 16, 8, 2, None),
    (128, 64, 16, 8, 4, None),
    (128, 128, 16, 8, 2, None),
    (128, 32, 16, 8, 4, None),
    (128, 32, 16, 8, 3, 128),
    (64, 64, 16, 4, 3, None),
    (64, 64, 16, 4, 2, None),
]
LISTED_CONFIGURATIONS = [
    (128, 64, 16, 8, 3, None),
    (128, 64, 16, 8, 4, None),
    (128, 32, 16, 8, 3, 128),
    (64, 64, 16, 4, 2, None),
]


def sweep(tokens: int = 16384, heads: int = 16, ranks: int = 2) -> None:
    """Time the kernel's configurations on one shape, K in two parts: plain, and with rows listed in order or at random."""
    from pcp_mla.triton.attention import attention

    dims = replace(DEEPSEEK, num_heads=heads)
    meta, x = inputs(tokens, dims, ranks, "cuda")
    work, scale = flops(meta, dims), dims.qk_head_dim**-0.5
    q, k, v, k_nope, k_pe = (x[name] for name in ("q", "k", "v", "k_nope", "k_pe"))
    lengths = (meta.cu_seqlens_q, meta.cu_seqlens_k, meta.seqused_k)
    order = torch.arange(tokens, device="cuda", dtype=torch.int32)
    tables = {"plain": None, "rows in order": order, "random rows": torch.randperm(tokens, device="cuda").int()}
    for name, rows in tables.items():
        moved = (k, v) if rows is None else (k[rows.long()], v[rows.long()])
        wanted, _ = plain.attention(q, *moved, plain.local_tokens([tokens], ranks, 0)[1], scale)
        got, lse = torch.empty(wanted.shape, dtype=q.dtype, device="cuda"), torch.empty(wanted.shape[:2], device="cuda")
        print(f"{name}\nqueries keys heads warps stages maxnreg      us  TFLOP/s")
        for queries, keys, group, warps, stages, registers in CONFIGURATIONS if rows is None else LISTED_CONFIGURATIONS:
            config = {"QUERIES": queries, "KEYS": keys, "HEADS": group, "num_warps": warps, "num_stages": stages}
            config["maxnreg"] = registers
            arguments = (q, k_nope, v, k_pe, rows, *lengths, None, None, scale, True, got, lse, config)
            head = f"{queries:7} {keys:4} {group:5} {warps:5} {stages:6} {registers!s:>7}"
            try:
                got.fill_(torch.nan)
                attention(*arguments)
            except Exception as error:  # too much shared memory, say
                print(f"{head} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            plain.check_close(f"the kernel by {config}", got, wanted)
            us = timing.gpu_us(lambda arguments=arguments: attention(*arguments))
            print(f"{head} {us:7.0f} {work / us / 1e6:8.0f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.attention", description=__doc__)
    parser.add_argument("what", choices=["sweep"], help="time the Triton kernel's configurations")
    parser.parse_args()
    with torch.inference_mode():
        sweep()
