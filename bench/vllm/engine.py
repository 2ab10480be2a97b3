"""One engine that both sides of a comparison run on, in turn: the plug-in's parts are switched in its workers."""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import models

MAX_LENGTH = 131072


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="v2-lite", choices=models.MODELS)
    parser.add_argument("--layers", type=int, help="of the model; all by default")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pcp", type=int, default=2)
    parser.add_argument("--gpu-memory", type=float, default=0.88, help="gpu_memory_utilization")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and graphs")


def _prepare() -> None:
    """Before vLLM is imported. PCP needs the V2 model runner; an engine core in this process lets the step budget be changed
    between prompts; functions are sent to the workers; vLLM has one thread an operator in worker processes, but not in this one."""
    import torch

    os.environ.update(VLLM_USE_V2_MODEL_RUNNER="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_USE_FLASHINFER_SAMPLER="0")
    torch.set_num_threads(1)


def build(args: argparse.Namespace, sides: Mapping[str, Sequence[str]]) -> Any:
    """An engine in which the parts of every side can be switched on."""
    _prepare()
    if args.split is not None:
        os.environ["PCP_MLA_VLLM"] = ",".join(sides["heads"])
    from vllm import LLM

    folder = Path(tempfile.gettempdir()) / f"pcp_mla_bench_{args.model}_{args.layers or 'all'}"
    start = time.perf_counter()
    graphs = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    llm = LLM(
        model=models.write(folder, args.model, args.layers),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        max_model_len=MAX_LENGTH + 64,
        max_num_seqs=16,
        max_num_batched_tokens=32768,
        tensor_parallel_size=args.tp,
        prefill_context_parallel_size=args.pcp,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        gpu_memory_utilization=args.gpu_memory,
        enforce_eager=args.eager,
        disable_log_stats=True,
        enable_flashinfer_autotune=False,
        compilation_config=None if args.eager else graphs,
    )
    llm.collective_rpc(_spread)
    if args.split is not None:
        llm.collective_rpc(_split, args=(args.split,))
    print(f"engine: {args.model}, tp {args.tp}, pcp {args.pcp}, up in {time.perf_counter() - start:.0f} s", flush=True)
    return llm


def set_step(llm: Any, tokens: int) -> None:
    """New tokens of a step, at most."""
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens


def prompt(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(10, 30000), k=count)


def generate(llm: Any, prompts: Sequence[list[int]], new: int = 1) -> tuple[float, list[list[int]]]:
    """Seconds for the prompts and ``new`` tokens of each, and the tokens."""
    seconds, outputs = _generate(llm, prompts, new)
    return seconds, [list(out.token_ids) for out in outputs]


def likely(llm: Any, prompts: Sequence[list[int]], new: int) -> list[list[tuple[int, dict[int, float]]]]:
    """Each new token of each prompt, and the log-probabilities of the likeliest ones in its place."""
    outputs = _generate(llm, prompts, new, logprobs=5)[1]
    return [
        [(token, {n: one.logprob for n, one in found.items()}) for token, found in zip(out.token_ids, out.logprobs, strict=True)]
        for out in outputs
    ]


def _generate(llm: Any, prompts: Sequence[list[int]], new: int, **options: Any) -> tuple[float, list[Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **options)
    requests = [{"prompt_token_ids": tokens} for tokens in prompts]
    start = time.perf_counter()
    outputs = llm.generate(requests, params, use_tqdm=False)
    return time.perf_counter() - start, [out.outputs[0] for out in outputs]


def forget(llm: Any) -> None:
    """Empty the prefix cache."""
    llm.llm_engine.reset_prefix_cache()


def _spread(worker: Any) -> None:
    """Weights that keep the size of activations in place of vLLM's dummy ones, of 1e-3 at most, those of norms among them: with
    these every score is nearly 0, attention is a mean, and logits are so flat that hardly a fault would change a token."""
    import torch

    for number, (name, weight) in enumerate(worker.model_runner.model.named_parameters()):
        if weight.dim() < 2:
            weight.data.fill_(1 if "norm" in name else 0)
            continue
        generator = torch.Generator(weight.device).manual_seed(number)
        size = 1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5
        weight.data.normal_(0, size, generator=generator)
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "W_UK_T"):  # what decodes have of kv_b_proj
            of_heads = layer.kv_b_proj.weight.data.view(layer.num_heads, -1, layer.kv_lora_rank)
            layer.W_UK_T.copy_(of_heads[:, : layer.qk_nope_head_dim])
            layer.W_UV.copy_(of_heads[:, layer.qk_nope_head_dim :].transpose(1, 2))


def _switch(worker: Any, names: Sequence[str]) -> None:
    from pcp_mla.integrations.vllm import switch

    switch(names)


def _split(worker: Any, split: str) -> None:
    from pcp_mla.integrations.vllm import parts
    from pcp_mla.integrations.vllm.state import State

    if State.heads is None:
        raise RuntimeError(f"bench.vllm: heads must be a part of the engine: {parts.summary()}")
    State.heads.split = split


def _counts(worker: Any) -> dict[str, int]:
    from pcp_mla.integrations.vllm import parts

    found = dict(parts.counts)
    parts.counts.clear()
    return found


def switch(llm: Any, names: Sequence[str]) -> None:
    """Let every worker run these parts of the plug-in."""
    llm.collective_rpc(_switch, args=(tuple(names),))


def counts(llm: Any) -> list[dict[str, int]]:
    """Calls of the plug-in on each rank since the last look."""
    return llm.collective_rpc(_counts)


def on_workers(llm: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    return llm.collective_rpc(function, args=args)
