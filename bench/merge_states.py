"""merge_attn_states and merge_n_attn_states beside the textbook formula in torch and, where its library is loaded, vLLM's kernel.

Bytes: every partial, every LSE and the results once. FLOPs: two an output element and partial. LSEs are FlashAttention's [heads,
tokens], passed transposed. ``graph_us`` is the time of a call in a CUDA graph of 20, data in L2: what a decode step pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pcp_mla import merge_attn_states, merge_n_attn_states
from pcp_mla.ops.registry import availability

from . import peers, plain, timing

DIM = 128
# Tokens, heads, partials.
GPU_SHAPES = [(256, 16, 2), (4096, 16, 2), (16384, 16, 2), (4096, 128, 2), (16384, 128, 2)]
GPU_SHAPES += [(4096, 128, 4), (4096, 128, 8), (16384, 16, 4), (16384, 16, 8)]
CPU_SHAPES = [(256, 16, 2), (4096, 16, 2)]
Paths = dict[str, Callable[[], Any]]


def textbook(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logsumexp(torch.stack(lses), 0)
    return sum(out * torch.exp(x - lse)[..., None] for out, x in zip(outs, lses, strict=True)).to(outs[0].dtype), lse


def make_paths(outs: list[torch.Tensor], lses: list[torch.Tensor], backends: list[str]) -> Paths:
    paths: Paths = {"torch": lambda: textbook(outs, lses)}
    given = (torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], torch.nan))
    for backend in backends:
        if len(outs) == 2:
            paths[backend] = lambda backend=backend: merge_attn_states(outs[0], lses[0], outs[1], lses[1], backend=backend)
            paths[f"{backend} out="] = lambda backend=backend: merge_attn_states(
                outs[0], lses[0], outs[1], lses[1], out=given[0], lse_out=given[1], backend=backend
            )
        else:
            paths[backend] = lambda backend=backend: merge_n_attn_states(outs, lses, backend=backend)
    if len(outs) == 2 and outs[0].is_cuda and peers.has_vllm_ops():
        lse = torch.empty_like(lses[0].T.contiguous())

        def vllm() -> tuple[torch.Tensor, torch.Tensor]:
            torch.ops._C.merge_attn_states(given[0], lse, outs[0], lses[0].T, outs[1], lses[1].T, None, None)
            return given[0], lse.T

        paths["vllm"] = vllm
    wanted, wanted_lse = textbook([x.double() for x in outs], [x.double() for x in lses])
    for name, call in paths.items():
        got, got_lse = call()
        plain.check_close(name, got, wanted)
        plain.check_close(f"{name}'s LSE", got_lse[..., None], wanted_lse[..., None], 1e-5, 1e-5)
    return paths


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result a shape; shares as in bench/fused_gather.py."""
    gpu = device == "cuda"
    bandwidth = timing.copy_gbps() if gpu else 0.0
    backends = ["auto", "triton"] if gpu and not availability("merge_attn_states")["triton"] else ["auto"]
    for tokens, heads, partials in GPU_SHAPES if gpu else CPU_SHAPES:
        outs = [torch.randn(tokens, heads, DIM, device=device).bfloat16() for _ in range(partials)]
        lses = [torch.randn(heads, tokens, device=device).T for _ in range(partials)]
        moved = tokens * heads * (partials + 1) * (2 * DIM + 4)
        result: dict[str, Any] = {
            "op": "merge_attn_states" if partials == 2 else "merge_n_attn_states",
            "tokens": tokens,
            "heads": heads,
            "partials": partials,
            "bytes": moved,
            "flops": 2 * partials * tokens * heads * DIM,
        }
        if gpu:
            result |= {"copy_gbps": bandwidth, "copy_us": timing.copy_us(moved)}
        result |= timing.measure(make_paths(outs, lses, backends), result, graph=True)
        yield result


def line(result: dict[str, Any]) -> str:
    what = f"merge N={result['partials']} T={result['tokens']:<5} H={result['heads']:<3} {result['bytes'] / 1e6:7.1f} MB"
    return f"{what} | {timing.columns(result)}"
