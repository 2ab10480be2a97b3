"""One run of vLLM's real engine on the CPU: ``python engine.py JOB RESULT``, both JSON. A process of its own, as a user has it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before vLLM is imported, here and in its workers, which are spawned on a CPU and import this file first.
os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_USE_V2_MODEL_RUNNER="1",  # prefill context parallelism lives there
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
STEP = 256  # new tokens of a step, at most
SHARED = 160  # tokens, ten blocks, that several prompts begin with


def give_triton_a_cpu() -> None:
    """The V2 model runner's own kernels are Triton's. Its interpreter runs them, but vLLM takes Triton only where it finds the
    driver of a device, of which any will do."""
    from types import SimpleNamespace

    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


give_triton_a_cpu()


def keep_what_was_asked_for() -> None:
    """vLLM turns chunked prefill and prefix caching off for MLA on a CPU; its code there can do both."""
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        tokens = config.scheduler_config.max_num_batched_tokens
        checked(cls, config)
        config.scheduler_config.enable_chunked_prefill = True
        config.scheduler_config.max_num_batched_tokens = tokens
        config.cache_config.enable_prefix_caching = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def tokens(count: int, seed: int) -> list[int]:
    import random

    return random.Random(seed).choices(range(2, 512), k=count)


def waves() -> list[dict[str, tuple[int, list[int]]]]:
    """Requests by name: the step at which one arrives, and its prompt. A wave begins when the one before it is done."""
    shared = tokens(SHARED, 1)
    return [
        {
            "chunked": (0, shared + tokens(173, 2)),  # more than a step takes
            "odd": (0, tokens(77, 3)),
            "shorter than 2P": (0, tokens(3, 4)),
            "shared": (3, shared + tokens(61, 5)),
            "two tokens": (3, tokens(2, 6)),
            "among decodes": (5, tokens(130, 7)),
            "late": (6, tokens(42, 8)),
            "late too": (6, shared + tokens(1, 9)),
        },
        {"one token": (0, tokens(1, 10))},  # other ranks have none
        {"cached": (0, shared + tokens(173, 2) + tokens(9, 11)), "again": (1, tokens(77, 3) + tokens(33, 12))},
    ]


TOKENS = 6  # that each request gets


def run_waves(llm: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False)
    done: dict[str, Any] = {}
    for wave in waves():
        waiting, step = dict(wave), 0
        while waiting or engine.has_unfinished_requests():
            for name in [name for name, (arrival, _) in waiting.items() if arrival <= step]:
                engine.add_request(name, {"prompt_token_ids": waiting.pop(name)[1]}, params)
            for output in engine.step():
                if output.finished:
                    (text,) = output.outputs
                    best = [{str(token): one.logprob for token, one in row.items()} for row in text.logprobs]
                    done[output.request_id] = {
                        "tokens": list(text.token_ids),
                        "logprobs": best,
                        "cached": output.num_cached_tokens,
                    }
            step += 1
    return done


# What workers are asked to do.


def begin(worker: Any, names: list[str] | None, workspace: int | None, damage: str | None, split: str | None) -> None:
    from pcp_mla.integrations.vllm import parts, prefill, switch
    from pcp_mla.integrations.vllm.planner import StepPlanner
    from pcp_mla.integrations.vllm.state import State

    if names is not None:
        switch(names)
    parts.counts.clear()
    for group in worker.model_runner.attn_groups:
        for part in group:
            builder = part.get_metadata_builder()
            builder.chunked_prefill_workspace_size = workspace or builder.chunked_prefill_workspace.shape[0]
    made = State.planner
    if made is not None:
        limit = State.workspace_rows if workspace is None else max(workspace, STEP)  # a plan keeps new tokens together
        State.planner = StepPlanner(made._manager, limit, made._communicator)
    if State.heads is not None:
        State.heads.split = split or "auto"
    worker.whole = getattr(worker, "whole", (prefill.expand_into, prefill.run_rows))
    prefill.expand_into, prefill.run_rows = worker.whole
    if damage is not None:
        DAMAGE[damage]()


def end(worker: Any) -> dict[str, Any]:
    import torch

    from pcp_mla.integrations.vllm import parts

    return {
        "rank": worker.rank,
        "counts": dict(parts.counts),
        "layers": parts.layers,
        "refused": parts.refused,
        "driver": torch.cuda.is_initialized(),
    }


def swap_two_keys() -> None:
    """The keys, not the values, of two tokens."""
    from pcp_mla.integrations.vllm import prefill

    own = prefill.expand_into

    def expand_into(latents: Any, rows: Any, weight: Any, k: Any, v: Any) -> None:
        own(latents, rows, weight, k, v)
        if len(k) > 40:
            k[[20, 40]] = k[[40, 20]]

    prefill.expand_into = expand_into


def drop_context() -> None:
    """Rows see their own tokens alone."""
    from pcp_mla.integrations.vllm import prefill

    own = prefill.run_rows

    def run_rows(name: str, q: Any, k: Any, v: Any, rows: Any, *args: Any, **named: Any) -> Any:
        lengths = rows.cu_seqlens_q.diff()
        starts = rows.cu_seqlens_k.clone()
        starts[:-1] += rows.seqused_k - lengths
        return own(name, q, k, v, rows._replace(cu_seqlens_k=starts, seqused_k=lengths), *args, **named)

    prefill.run_rows = run_rows


DAMAGE = {"swap": swap_two_keys, "drop": drop_context}


def main(job: dict[str, Any]) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(job["pcp"]))

    from vllm import LLM

    keep_what_was_asked_for()
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=STEP,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        dtype="float32",
        attention_backend="CPU_MLA",  # on CPUs with AMX another one would be chosen, which has no float32
        seed=0,
        prefill_context_parallel_size=job["pcp"],
    )
    result: dict[str, Any] = {"phases": []}
    for phase in job["phases"]:
        llm.reset_prefix_cache()
        llm.collective_rpc(begin, args=(phase.get("switch"), phase.get("workspace"), phase.get("damage"), phase.get("split")))
        outputs = run_waves(llm)
        result["phases"].append({"outputs": outputs, "ranks": llm.collective_rpc(end)})
    return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
