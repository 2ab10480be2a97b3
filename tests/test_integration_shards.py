"""Tensor parallelism beside PCP: heads shared out over some ranks, and tokens over others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from pcp_mla.integrations.transformers import decode, enable_pcp, extend, generate, prefill
from pcp_mla.testing.launch import run_distributed
from test_integration_transformers import build, check_close, prompts, stock_logits, stock_text

SHARDED = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}


def sharded(group: Any, names: list[str]) -> dict[str, Any]:
    """On one of 2 x 2 ranks: heads shared out over two, and tokens over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pcp", "tp"))
    request, results = prompts([13])[0], {}
    for name in names:
        model = build(name, **SHARDED)
        plan = [model._expand_parallel_plan(model.tp_plan)] if hasattr(model, "_expand_parallel_plan") else []  # since 5.24
        apply_tensor_parallelism(model, mesh["tp"], *plan)
        enable_pcp(model, mesh["pcp"].get_group())
        with torch.no_grad():
            rows = [prefill(model, [request[:11]]), extend(model, [[request[11]]]), decode(model, [request[12]])]
            whole = model(torch.tensor([request])).logits[0]
            heads = model.model.layers[0].self_attn.kv_b_proj(torch.zeros(1, 20)).shape[1] // 28
        results[name] = [torch.cat(rows), whole], heads, generate(model, [request[:6], request[4:]], 4)
    return results


def test_tensor_parallelism() -> None:
    pytest.importorskip("transformers.distributed.tensor_parallel")
    request, results = prompts([13])[0], run_distributed(4, sharded, ["v2", "v3"])
    for name, shares in {"v2": 2, "v3": 1}.items():  # transformers' plan for V3 leaves its attention whole
        model = build(name, **SHARDED)
        wanted, texts = stock_logits(model, [request]), [stock_text(model, prompt, 4) for prompt in (request[:6], request[4:])]
        for rank in results:
            logits, heads, text = rank[name]
            assert heads == 4 // shares
            for rows in logits:
                check_close(rows, wanted)
            assert text == texts
