"""pcp_fused_gather and pcp_fused_restore beside the first implementation's six index_select and cat + index_select.

Bytes are the fewest that the op can move: every input row that is needed once, every output row once. A key that the head and the
tail of a request both attend to is one read and two writes. FLOPs: none. Rank 0 is played: its tail attends to every key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pcp_mla import GatheredRows, PCPMetadata, pcp_fused_gather, pcp_fused_restore
from pcp_mla.ops.registry import availability

from . import plain, timing

WIDTHS = (192, 192, 128)
# Query lengths, heads.
GPU_SHAPES = [([128] * 4, 16), ([4096], 16), ([16384], 16), ([131072], 16), ([32768], 128)]
CPU_SHAPES = [([128] * 4, 16), ([4096], 16)]
Paths = dict[str, Callable[[], Any]]


def check(paths: Paths) -> None:
    """A wrong result has no time."""
    wanted = paths["seed"]()
    for name, call in paths.items():
        for a, b in zip(call(), wanted, strict=True):
            plain.check_equal(name, a, b)


def gather_paths(meta: PCPMetadata, heads: int, backends: list[str]) -> tuple[Paths, int]:
    device = meta.device
    q, k, v = (
        torch.randn(n, heads, d, dtype=torch.bfloat16, device=device)
        for n, d in zip((meta.num_tokens, meta.num_kv_tokens, meta.num_kv_tokens), WIDTHS, strict=True)
    )
    indices = (meta.query_head_indices, meta.kv_head_indices, meta.kv_head_indices)
    indices += (meta.query_tail_indices, meta.kv_tail_indices, meta.kv_tail_indices)

    def seed() -> list[torch.Tensor]:
        return [torch.index_select(x, 0, index) for x, index in zip((q, k, v) * 2, indices, strict=True)]

    paths: Paths = {"seed": seed}
    for backend in backends:
        paths[backend] = lambda backend=backend: pcp_fused_gather(q, k, v, meta, backend=backend)
        given = GatheredRows(*(torch.full_like(x, torch.nan) for x in seed()))
        paths[f"{backend} out="] = lambda backend=backend, given=given: pcp_fused_gather(q, k, v, meta, out=given, backend=backend)
    check(paths)
    used = int(meta.partition.seqused_k.reshape(-1, 2).max(axis=1).sum())
    key_rows = used + meta.num_head_kv + meta.num_tail_kv
    return paths, 2 * heads * (2 * meta.num_tokens * WIDTHS[0] + key_rows * (WIDTHS[1] + WIDTHS[2]))


def restore_paths(meta: PCPMetadata, heads: int, backends: list[str]) -> tuple[Paths, int]:
    rows = (meta.num_head_tokens, meta.num_tail_tokens)
    outs = [torch.randn(n, heads, WIDTHS[2], dtype=torch.bfloat16, device=meta.device) for n in rows]
    lses = [torch.randn(heads, n, device=meta.device).T for n in rows]
    index = meta.output_restore_idx

    def seed() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.index_select(torch.cat(outs), 0, index), torch.index_select(torch.cat(lses), 0, index)

    paths: Paths = {"seed": seed}
    for backend in backends:
        paths[backend] = lambda backend=backend: pcp_fused_restore(*outs, *lses, meta, backend=backend)
        given = tuple(torch.full_like(x, torch.nan) for x in seed())
        paths[f"{backend} out="] = lambda backend=backend, given=given: pcp_fused_restore(
            *outs, *lses, meta, out=given, backend=backend
        )
    check(paths)
    return paths, 2 * meta.num_tokens * heads * (2 * WIDTHS[2] + 4)


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result a shape, world size and op. ``share_of_copy`` is against a copy of the same bytes, ``share_of_bandwidth`` against
    the bandwidth of a very large copy."""
    gpu = device == "cuda"
    bandwidth = timing.copy_gbps() if gpu else 0.0
    reasons = availability("fused_gather")
    # "auto" is what users call: the CUDA or the C++ kernel where it is built.
    backends = ["auto", "triton"] if gpu and not reasons["triton"] else ["auto"]
    for lengths, heads in GPU_SHAPES if gpu else CPU_SHAPES:
        for world in (2, 8):
            meta = PCPMetadata.build(np.array(lengths), world_size=world, rank=0, device=device)
            for op, make in (("fused_gather", gather_paths), ("fused_restore", restore_paths)):
                paths, moved = make(meta, heads, backends)
                result: dict[str, Any] = {
                    "op": op,
                    "tokens": sum(lengths),
                    "requests": len(lengths),
                    "heads": heads,
                    "P": world,
                    "bytes": moved,
                    "flops": 0,
                }
                if gpu:
                    result |= {"copy_gbps": bandwidth, "copy_us": timing.copy_us(moved)}
                result |= timing.measure(paths, result)
                yield result
