"""A prefill of 4096 tokens through eight MLA layers: the first implementation's path and ours, call by call; ours as CUDA graphs in
pieces between the collectives; ours by peers, call by call and as one CUDA graph; ours under torch.compile.

A layer has DeepSeek-V2-Lite's widths and the four projections around the attention, bf16, the caches in blocks of 64. On one GPU
rank 0 of two is timed, and the other rank's latents are copies of its own; on several the ranks are real, over NCCL. CPU time is
what the host takes to issue a prefill, wall time that of a prefill from its call to its end on the GPU.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPPlanner, PeerExchange
from pcp_mla.groups import all_gather_rows, group_rank, group_world_size
from pcp_mla.layer.graphs import PiecewiseGraph
from pcp_mla.ops.attention import support

from . import peers, plain, timing
from .seed import SeedPath

BLOCK, TOKENS, CPU_TOKENS, LAYERS, HIDDEN = 64, 4096, 128, 8, 2048
DIMS = MLADims(16, 128, 64, 128, 512)


class Echo:
    """A rank of two that have the same rows."""

    world_size = 2

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor])


class Stack:
    """Eight layers of a rank, and the paths through them."""

    def __init__(self, group: Any, tokens: int, device: str) -> None:
        world, rank = group_world_size(group), group_rank(group)
        planner = PCPPlanner(1, tokens, world, rank, block_size=BLOCK, device=device, max_kv_tokens=tokens)
        table = torch.arange(-(-tokens // BLOCK), dtype=torch.int32, device=device)[None]
        sizes = {"num_tokens_padded": tokens // world, "num_requests_padded": 1, "num_kv_tokens_padded": tokens}
        self.meta = planner.plan([tokens], [0], [True], table, **sizes)
        unpadded = PCPPlanner(1, tokens, world, rank, block_size=BLOCK, device=device)
        random = torch.Generator(device=device).manual_seed(7)

        def matrix(columns: int, rows: int) -> torch.Tensor:
            return (torch.randn(columns, rows, device=device, generator=random) * rows**-0.5).bfloat16()

        heads, width, rank_width = DIMS.num_heads, DIMS.qk_head_dim, DIMS.latent_dim
        self.weights = [
            (matrix(heads * width, HIDDEN), matrix(rank_width, HIDDEN), matrix(heads * DIMS.expanded_dim, DIMS.kv_lora_rank),
             matrix(HIDDEN, heads * DIMS.v_head_dim) * 0.5)  # as there are no norms
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.caches = [torch.zeros(table.shape[1], BLOCK, rank_width, device=device).bfloat16() for _ in range(LAYERS)]
        self.tokens, self.group = tokens, group
        self.hidden = torch.randn(tokens // world, HIDDEN, device=device, generator=random).bfloat16()
        self.exchange = LatentExchange(group, planner.max_local_tokens, DIMS, torch.bfloat16, device)
        self.layer = MLAPrefill(DIMS, width**-0.5, self.exchange)
        self.room, self.device = planner.max_local_tokens, device
        backend = "torch" if device == "cpu" else "triton" if support.missing("fa3", self.hidden.device) else "fa3"
        self.seed_path = SeedPath(unpadded.plan([tokens], [0], [True], table), group, DIMS, backend)

    def forward(self, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Projections and residuals around ``attend(q, kv_c, k_pe, weight, cache)``."""
        hidden = self.hidden
        for (to_q, to_latent, to_kv, to_out), cache in zip(self.weights, self.caches, strict=True):
            q = (hidden @ to_q.T).view(-1, DIMS.num_heads, DIMS.qk_head_dim)
            kv_c, k_pe = (hidden @ to_latent.T).split([DIMS.kv_lora_rank, DIMS.qk_rope_head_dim], dim=1)
            hidden = hidden + attend(q, kv_c, k_pe, to_kv, cache).flatten(1) @ to_out.T
        return hidden

    def seed(self) -> torch.Tensor:
        return self.forward(self.seed_path)

    def attend(
        self, q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        return self.layer(q, kv_c, k_pe, weight, self.meta, cache)

    def ours(self) -> torch.Tensor:
        return self.forward(self.attend)

    @functools.cached_property
    def layer_by_peers(self) -> MLAPrefill:
        exchange = PeerExchange(self.group, self.room, DIMS, torch.bfloat16, self.device, caches=self.caches)
        return MLAPrefill(DIMS, self.layer.softmax_scale, exchange)

    def attend_by_peers(
        self, q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        return self.layer_by_peers(q, kv_c, k_pe, weight, self.meta, cache)

    def peers(self) -> torch.Tensor:
        return self.forward(self.attend_by_peers)

    def checked(self, name: str, attend: Callable[..., torch.Tensor]) -> None:
        """``attend`` in every layer beside what it must give, on the same inputs."""
        world, rank = group_world_size(self.group), group_rank(self.group)

        def both(
            q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor
        ) -> torch.Tensor:
            got = attend(q, kv_c, k_pe, weight, cache)
            gathered = all_gather_rows(torch.cat([kv_c, k_pe], dim=1), self.group)
            latents = plain.natural_order(gathered, [self.tokens], world)
            widths = (DIMS.qk_nope_head_dim, DIMS.v_head_dim)
            wanted = plain.mla(q, latents, weight, widths, DIMS.qk_head_dim**-0.5, [self.tokens], world, rank)
            plain.check_close(name, got, wanted, 2**-6)
            return got

        self.forward(both)

    def paths(self, graphs: bool) -> dict[str, Callable[[], torch.Tensor]]:
        """All, checked: seed and ours by layers, the others against ours."""
        self.checked("seed", self.seed_path)
        self.checked("ours", self.attend)
        calls: dict[str, Callable[[], torch.Tensor]] = {"seed": self.seed, "ours": self.ours}
        wanted = self.ours()
        if graphs:
            graph = PiecewiseGraph()
            out = graph.capture(self.ours, [self.exchange])
            out.fill_(torch.nan)
            graph.replay()
            plain.check_equal("piecewise", out, wanted)
            calls["piecewise"] = graph.replay  # type: ignore[assignment]
        if graphs and isinstance(self.group, dist.ProcessGroup):
            self.checked("peers", self.attend_by_peers)
            calls["peers"], graph = self.peers, PiecewiseGraph()
            out = graph.capture(self.peers)
            out.fill_(torch.nan)
            graph.replay()
            plain.check_equal("one graph", out, wanted)
            assert graph.num_pieces == 1
            calls["one graph"] = graph.replay  # type: ignore[assignment]
        calls["compiled"] = torch.compile(self.ours, fullgraph=True)
        # What the layers add to their input, as a whole: of a late token it is small beside the rounding of the sum.
        got = calls["compiled"]()
        plain.check_close("compiled", (got - self.hidden).flatten(), (wanted - self.hidden).flatten(), 2**-4)
        return calls


def measured(call: Callable[[], Any], gpu: bool) -> dict[str, float]:
    walls = []
    for _ in range(20 if gpu else 3):
        if dist.is_initialized():
            dist.barrier()
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - began)
    return {"cpu_us": timing.cpu_us(call, 7, 3), "wall_us": statistics.median(walls) * 1e6}


def of_rank(group: Any, sizes: Sequence[int]) -> list[dict[str, Any]]:
    peers.load_fa3()
    gpu, results = torch.cuda.is_available(), []
    with torch.inference_mode():
        for tokens in sizes:
            stack = Stack(group, tokens, "cuda" if gpu else "cpu")
            result: dict[str, Any] = {"op": "graphs", "tokens": tokens, "heads": DIMS.num_heads, "layers": LAYERS}
            result |= {"P": group_world_size(group), "played": not isinstance(group, dist.ProcessGroup)}
            for name, call in stack.paths(gpu).items():
                result[name] = measured(call, gpu)
                if gpu and result["played"]:
                    result[name]["launches"] = timing.launches(call)
            results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    if torch.cuda.device_count() > 1:
        yield from timing.over_ranks(device, of_rank, [TOKENS], [])
    else:
        yield from of_rank(Echo(), [TOKENS if device == "cuda" else CPU_TOKENS])


def line(result: dict[str, Any]) -> str:
    text = f"graphs T={result['tokens']} H={result['heads']} P={result['P']}{' played' if result['played'] else ''} {LAYERS} layers"
    for name, numbers in result.items():
        if isinstance(numbers, dict):
            text += f" | {name} wall {numbers['wall_us']:.0f} us cpu {numbers['cpu_us']:.0f} us"
            text += f" {numbers['launches']} launches" if "launches" in numbers else ""
    return text
