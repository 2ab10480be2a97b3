"""Clocks and profiler ranges around functions of vLLM, the same for both sides: where a step's host time and GPU time go."""

from __future__ import annotations

import functools
import importlib
import re
import time
from collections import defaultdict
from typing import Any

LAYER = ("exchange", "cache write", "attention")  # once a layer
STEP = ("partition", "slots", "metadata", "restore")  # once a step


def install(worker: Any) -> None:
    """In every worker, once."""
    if getattr(worker, "pcp_mla_clock", None) is not None:
        return
    import torch

    clock: dict[str, float] = defaultdict(float)
    worker.pcp_mla_clock, worker.pcp_mla_profile = clock, None

    def wrap(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            if worker.pcp_mla_profile is not None:
                with torch.profiler.record_function(f"bench: {label}"):
                    return inner(*args, **kwargs)
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            clock[label] += time.perf_counter() - start
            return result

        setattr(owner, name, outer)

    mla = importlib.import_module("vllm.model_executor.layers.attention.mla_attention")
    manager = importlib.import_module("vllm.v1.worker.gpu.pcp_manager").PCPManager
    wrap(mla, "maybe_gather_mla_latent_cache_inputs", "exchange")
    wrap(type(worker.model_runner.model_state), "prepare_attn", "metadata")
    wrap(manager, "partition_batch", "partition")
    wrap(manager, "prepare_attn", "slots")
    wrap(manager, "restore_for_sampling", "restore")
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "impl"):
            wrap(layer.impl, "do_kv_cache_update", "cache write")
            wrap(layer, "forward_impl", "attention")


def read_clock(worker: Any) -> dict[str, float]:
    found = dict(worker.pcp_mla_clock)
    worker.pcp_mla_clock.clear()
    return found


def start_profile(worker: Any) -> None:
    import torch

    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    worker.pcp_mla_profile = torch.profiler.profile(activities=activities)
    worker.pcp_mla_profile.start()


def _kind(label: str, kernel: str) -> str:
    low = kernel.lower()
    if "publish_latents" in low:  # launched past what the profiler follows, as the next one
        return "exchange: stores to peers"
    if "exchange_heads" in low:
        return "heads: stores to peers"
    if "kv_up_project" in low:
        return "kv_b_proj"
    if label == "attention":
        for pattern, kind in (
            (r"flash|fwd_kernel|attnfwd", "attention kernel"),
            (r"gemm|nvjet|cutlass|xmma", "kv_b_proj"),
            (r"gather", "context gather"),
            (r"merge", "merge"),
            (r"nccl", "heads: collective"),
            (r"concat|copy", "K concat"),
        ):
            if re.search(pattern, low):
                return kind
        return "other in attention"
    if label == "exchange":
        return "exchange: collective" if "nccl" in low else "exchange: copies"
    return label or "elsewhere"


def stop_profile(worker: Any) -> dict[str, tuple[float, int]]:
    """GPU microseconds and launches by kind of kernel."""
    import torch

    torch.cuda.synchronize()
    profile, worker.pcp_mla_profile = worker.pcp_mla_profile, None
    profile.stop()
    found: dict[str, tuple[float, int]] = {}
    for event in profile.events():
        if not event.kernels:
            continue
        label, at = "", event
        while at is not None:
            if at.name.startswith("bench: "):
                label = at.name[7:]
                break
            at = at.cpu_parent
        for kernel in event.kernels:
            if not kernel.name.startswith("bench: "):
                kind = _kind(label, kernel.name)
                total, launches = found.get(kind, (0.0, 0))
                found[kind] = (total + kernel.duration, launches + 1)
    return found
