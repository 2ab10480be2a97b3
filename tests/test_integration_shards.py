"""Tensor parallelism beside PCP: heads shared out over some ranks, and tokens over others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate

pytest.importorskip("transformers", minversion="5")

from pcp_mla import HeadExchange
from pcp_mla.integrations.transformers import decode, enable_pcp, extend, generate, prefill, shards
from pcp_mla.testing.launch import run_distributed
from test_integration_models import HERE, small
from test_integration_transformers import check_close, prompts, stock_logits, stock_text


def made(name: str) -> Any:
    return small(name, 4, tie_word_embeddings=False)


def sharded(group: Any, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """On one of 2 x 2 ranks: heads shared out over two, and tokens over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pcp", "tp"))
    request, results = prompts([13])[0], {}
    exchanged: list[tuple[int, int]] = []
    to_heads = HeadExchange.to_heads

    def noted(self: HeadExchange, q: torch.Tensor, meta: Any) -> torch.Tensor:
        queries = to_heads(self, q, meta)
        exchanged.append((q.shape[1], queries.shape[1]))
        return queries

    HeadExchange.to_heads = noted
    for name, split in cases:
        model, before = made(name), len(exchanged)
        plan = [model._expand_parallel_plan(model.tp_plan)] if hasattr(model, "_expand_parallel_plan") else []  # since 5.24
        apply_tensor_parallelism(model, mesh["tp"], *plan)
        enable_pcp(model, mesh["pcp"].get_group(), split=split)
        with torch.no_grad():
            rows = [prefill(model, [request[:11]]), extend(model, [[request[11]]]), decode(model, [request[12]])]
            whole = model(torch.tensor([request])).logits[0]
            heads = model.model.layers[0].self_attn.kv_b_proj(torch.zeros(1, 20)).shape[1] // 28
        text = generate(model, [request[:6], request[4:]], 4)
        results[name, split] = [torch.cat(rows), whole], heads, text, exchanged[before:]
    return results


def test_tensor_parallelism() -> None:
    pytest.importorskip("transformers.distributed.tensor_parallel")
    # Plans of transformers for some classes leave their attention whole.
    shared_out = {name: 1 + any("kv_b_proj" in module for module in made(name).tp_plan) for name in HERE}
    assert (shared_out["DeepseekV2"], shared_out["DeepseekV3"]) == (2, 1)
    cases = [
        (name, split)
        for name, shares in shared_out.items()
        for split in ("tokens", "heads")
        if shards.COLWISE or (shares, split) != (2, "heads")
    ]
    request, results = prompts([13])[0], run_distributed(4, sharded, cases)
    for name, split in cases:
        shares, model = shared_out[name], made(name)
        wanted, texts = stock_logits(model, [request]), [stock_text(model, prompt, 4) for prompt in (request[:6], request[4:])]
        for rank in results:
            logits, heads, text, exchanged = rank[name, split]
            assert heads == 4 // shares
            # Two steps of prefill, a whole forward, and that of the text, of two layers; a head of two, or two of four.
            assert exchanged == ([(heads, heads // 2)] * 8 if split == "heads" else [])
            for rows in logits:
                check_close(rows, wanted)
            assert text == texts


def seen_through(group: Any) -> dict[str, bool]:
    """Whether a ``kv_b_proj`` that was shared out goes by its rows alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import ColwiseParallel

    mesh, found = init_device_mesh("cpu", (2,)), {}
    latents = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    for name, style in {"rows": ColwiseParallel(), "gathered": ColwiseParallel(output_layouts=Replicate())}.items():
        for change in ("", "patched before", "patched behind", "hook", "pre-hook", "bias"):
            linear = torch.nn.Linear(20, 56, bias=change == "bias").requires_grad_(False)
            if change == "patched before":
                linear.forward = partial(torch.nn.Linear.forward, linear)
            for parameter in dict(linear.named_parameters()):
                style.shard_param(linear, parameter, mesh)
            style.install_forward(linear, mesh)
            if change == "patched behind":
                linear.forward = partial(linear.forward)
            elif change == "hook":
                linear.register_forward_hook(lambda *given: given[-1])
            elif change == "pre-hook":
                linear.register_forward_pre_hook(lambda *given: given[-1])
            projection = shards.local_projection(linear)
            found[f"{name} {change}".strip()] = projection is not linear
            if projection is not linear:
                with torch.no_grad():
                    assert torch.equal(torch.nn.functional.linear(latents, projection), linear(latents))
    return found


def test_what_is_seen_through() -> None:
    if shards.COLWISE is None:
        pytest.skip("of another transformers")
    for found in run_distributed(2, seen_through):
        assert [name for name, alone in found.items() if alone] == ["rows"]
        assert len(found) == 12
