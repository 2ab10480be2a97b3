"""The exchange of a layer's latents beside the projection of its q, on several GPUs: one after the other, and on two streams.

DeepSeek-V3's q projection without tensor parallelism, 1536 to 128 heads of 192 numbers, bf16. GPU time of both together, from
events, launches queued behind a running kernel; median. By a collective and its cache write, by peers with all multiprocessors, and
by peers with 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pcp_mla import LatentExchange, MLAPrefill
from pcp_mla.exchange.peer_memory import MAX_SMS

from . import timing
from .exchange import DIMS, Step

TOKENS, CPU_TOKENS = (2048, 8192, 32768), (128,)
WIDTH, COLUMNS = 1536, 128 * 192


def paths(step: Step, exchange: Any, stream: torch.cuda.Stream | None) -> dict[str, Callable[[], Any]]:
    """The projection alone, behind the exchange, and beside it if there is a stream for that."""
    layer, tokens = MLAPrefill(DIMS, DIMS.qk_head_dim**-0.5, exchange), step.meta.num_tokens
    latent, weight = (torch.randn(*shape, device=step.device).bfloat16() for shape in ((tokens, WIDTH), (COLUMNS, WIDTH)))
    cache = step.caches[0]

    def project() -> None:
        torch.nn.functional.linear(latent, weight)

    def serial() -> None:
        layer.start(step.kv_c, step.k_pe, step.meta, cache)
        project()

    def beside() -> None:
        started = layer.start(step.kv_c, step.k_pe, step.meta, cache, stream=stream)
        project()
        torch.cuda.current_stream().wait_event(started.published)

    return {"projection": project, "serial": serial} | ({"beside": beside} if stream is not None else {})


def measure(group: Any, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    gpu = torch.cuda.is_available()
    results = []
    with torch.inference_mode():
        for tokens in sizes:
            step = Step(tokens, group, "cuda" if gpu else "cpu")
            stream = torch.cuda.Stream(priority=-1) if gpu else None
            collective = LatentExchange(group, step.meta.num_tokens_padded, DIMS, torch.bfloat16, step.device)
            exchanges: dict[str, Any] = {"collective": collective}
            if gpu:
                exchanges |= {f"peers {sms}": step.peers(sms) for sms in (MAX_SMS, 16)}
            for name, exchange in exchanges.items():
                result: dict[str, Any] = {"op": "overlap", "tokens": tokens, "ranks": group.size(), "exchange": name}
                for path, call in paths(step, exchange, stream).items():
                    result[path] = {"gpu_us": timing.gpu_us(call, 15)} if gpu else {"cpu_us": timing.cpu_us(call, 3, 1)}
                results.append(result)
                if exchange is not collective:
                    exchange.close()
    return results


def run(device: str) -> Iterator[dict[str, Any]]:
    yield from timing.over_ranks(device, measure, TOKENS, CPU_TOKENS)


def line(result: dict[str, Any]) -> str:
    text = f"overlap P={result['ranks']} T={result['tokens']:<6} {result['exchange']:10}"
    for name in ("projection", "serial", "beside"):
        for key, value in result.get(name, {}).items():
            text += f" | {name} {key.removesuffix('_us')} {value:.1f} us"
    return text
