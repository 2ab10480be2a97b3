"""HeadExchange and PeerHeadExchange: queries to their heads' ranks and outputs back, over NCCL on several GPUs, else (the former
alone) over gloo.

bf16 queries 192 wide, outputs 128, of one request. A call is both ways, as in a layer. Bytes: what a rank sends to the others.
``graph_us``: a call in a replayed CUDA graph of 10; ``by_sms``: the same of PeerHeadExchange with so many multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pcp_mla import HeadExchange, PCPMetadata, PeerHeadExchange
from pcp_mla.exchange.peer_memory import MAX_SMS
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.dims import MLADims

from . import plain, timing

HEADS = (16, 128)
GPU_TOKENS = (512, 8192, 32768)
CPU_TOKENS = (512,)
CALLS = 10
SMS = {8192: (8, 16, 32, 64)}  # beside the default, by tokens


def numbers(tokens: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """[len(tokens), heads, width] that say whose they are, exact in bf16."""
    of = [torch.arange(n, device=tokens.device, dtype=torch.int32) for n in (heads, width)]
    return ((tokens[:, None, None] * 37 + of[0][:, None] * 11 + of[1]) % 251).bfloat16()


class Step:
    """A rank's queries of one request, what it must get of all ranks, and the same of outputs."""

    def __init__(self, tokens: int, num_heads: int, group: Any, device: str) -> None:
        world, rank = group_world_size(group), group_rank(group)
        metas = [PCPMetadata.build([tokens], world_size=world, rank=r, device=device) for r in range(world)]
        self.dims, self.meta, self.group, self.device = MLADims(num_heads, 128, 64, 128, 512), metas[rank], group, device
        self.of_ranks = [meta.local_token_indices for meta in metas]
        self.q, self.tokens = (numbers(self.of_ranks[rank], num_heads, width) for width in (192, 128))
        self.out = torch.empty(0, device=device)

    def rank_major(self, heads: slice, width: int) -> torch.Tensor:
        padded = self.meta.num_tokens_padded
        rows = torch.zeros(len(self.of_ranks), padded, heads.stop - heads.start, width, device=self.device).bfloat16()
        for to, tokens in zip(rows, self.of_ranks, strict=True):
            to[: len(tokens)] = numbers(tokens, self.dims.num_heads, width)[:, heads]
        return rows.flatten(0, 1)

    def checked(self, name: str, exchange: HeadExchange | PeerHeadExchange) -> Callable[[], None]:
        """Both ways."""
        self.out = self.rank_major(exchange.heads, 128)
        plain.check_equal(f"queries of {name}", exchange.to_heads(self.q, self.meta), self.rank_major(exchange.heads, 192))
        plain.check_equal(f"outputs of {name}", exchange.to_tokens(self.out, self.meta), self.tokens)

        def call() -> None:
            exchange.to_heads(self.q, self.meta)
            exchange.to_tokens(self.out, self.meta)

        return call

    def collective(self) -> HeadExchange:
        return HeadExchange(self.group, self.meta.num_tokens_padded, self.dims, torch.bfloat16, self.device)

    def peers(self, max_sms: int = MAX_SMS) -> PeerHeadExchange:
        return PeerHeadExchange(self.group, self.meta.num_tokens_padded, self.dims, torch.bfloat16, self.device, max_sms=max_sms)


def measure(group: Any, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """All sizes, on one rank."""
    gpu, world = dist.get_backend(group) == "nccl", dist.get_world_size(group)
    results = []
    with torch.inference_mode():
        for num_heads, tokens in ((num_heads, tokens) for num_heads in HEADS for tokens in sizes):
            step = Step(tokens, num_heads, group, "cuda" if gpu else "cpu")
            moved = step.meta.num_tokens_padded * num_heads * (192 + 128) * 2 * (world - 1) // world
            result: dict[str, Any] = {
                "op": "heads",
                "tokens": tokens,
                "heads": num_heads,
                "ranks": world,
                "bytes": moved,
                "flops": 0,
            }
            dist.barrier(group)
            result["nccl" if gpu else "gloo"] = timing.in_graph(step.checked("a collective", step.collective()), gpu, CALLS)
            if gpu:
                exchange = step.peers()
                result["peers"] = timing.in_graph(step.checked("peers", exchange), gpu, CALLS) | {"by_sms": {}}
                exchange.close()
                for sms in SMS.get(tokens, ()):
                    exchange = step.peers(sms)
                    result["peers"]["by_sms"][sms] = timing.graph_us(step.checked("peers", exchange), calls=CALLS)
                    exchange.close()
            results.append(result)
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result of rank 0 a world size, number of heads and of tokens."""
    yield from timing.over_ranks(device, measure, GPU_TOKENS, CPU_TOKENS)


def line(result: dict[str, Any]) -> str:
    text = f"{result['op']} P={result['ranks']} H={result['heads']:<3} T={result['tokens']:<6} {result['bytes'] / 1e6:7.2f} MB"
    return text + timing.graph_columns(result, ("gloo", "nccl", "peers"), result["bytes"])
