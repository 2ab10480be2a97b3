"""The layer over our own attention kernel, whose place the definition takes here: what the kernel does not take, others do, as the
latents of the step are published by then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPMetadata, PCPPlanner, reference
from pcp_mla.ops.attention import call, kernels, support
from test_attention_backends import shifted

DIMS = MLADims(num_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=8, v_head_dim=64, kv_lora_rank=32)
TABLES = torch.arange(12, dtype=torch.int32).view(2, 6)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the kernel, which refuses what it cannot reach."""
    calls: list[Any] = []

    def kernel(*arguments: Any) -> None:
        q, k, v, k_pe, *_, prev_out, _, _, _, out, _ = arguments
        refused = support.out_of_reach(q, k, v, k_pe, out, prev_out)
        if refused:
            raise RuntimeError(f"the CUDA kernel does not take this: {refused}")
        calls.append(arguments)
        reference.attention(*arguments)

    monkeypatch.setattr(kernels, "_wgmma", kernel)
    for module in (call, kernels):
        monkeypatch.setattr(module, "HAS_TRITON", False)
    monkeypatch.setattr(support, "missing", lambda backend, device: "")
    return calls


def run(backend: str, meta: PCPMetadata, q: torch.Tensor) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    layer = MLAPrefill(DIMS, 0.3, LatentExchange(None, 24, DIMS, torch.bfloat16), backend)
    return layer(q, values(len(q), 32), values(len(q), 8), values(2 * 128, 32), meta, values(12, 4, 40))


@pytest.mark.parametrize("workspace", [None, 13])
@pytest.mark.parametrize("case", ["usual", "q apart", "q expanded"])
def test_queries_that_lie_anywhere(case: str, workspace: int | None, launched: list[Any]) -> None:
    meta = PCPPlanner(2, 24, 1, 0, block_size=4).plan([9, 4], [3, 9], None, TABLES, workspace_tokens=workspace)
    q = torch.randn(13, 2, 72, generator=torch.Generator().manual_seed(0)).bfloat16()
    given = {"usual": q, "q apart": shifted(q), "q expanded": q[:1].expand(13, -1, -1)}[case]
    got = run("cuda", meta, given)
    assert len(launched) == (len(meta.key_chunks) or 1) * (case == "usual")
    torch.testing.assert_close(got, run("torch", meta, given.contiguous()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("context", [0, 9])
def test_a_padded_step_without_keys(context: int, launched: list[Any]) -> None:
    """As engines replay where all requests are elsewhere; also new tokens' keys, of which there are none beside their context."""
    planner = PCPPlanner(2, 24, 1, 0, block_size=4)
    meta = planner.plan([0, 0], [0, context], None, TABLES, num_tokens_padded=24, workspace_tokens=8)
    assert 0 in [chunk.num_rows for chunk in meta.key_chunks]
    run("cuda", meta, torch.zeros(24, 2, 72).bfloat16())
    assert len(launched) == len(meta.key_chunks)


@pytest.mark.parametrize("takes", [True, False])
def test_the_direct_call_looks_for_itself(takes: bool, launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it took is not looked at again; what it refused goes to the op, or past what tensor copies do not reach."""
    asked: list[Any] = []

    class Direct:
        def attention(self, *arguments: Any) -> bool:
            asked.append(arguments)
            if takes:
                reference.attention(*arguments)
            return takes

    monkeypatch.setattr(kernels, "direct", Direct)
    if takes:
        monkeypatch.setattr(support, "out_of_reach", lambda *_: pytest.fail("looked at again"))
    meta = PCPPlanner(2, 24, 1, 0, block_size=4).plan([9, 4], [3, 9], None, TABLES)
    q = torch.randn(13, 2, 72, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = run("cuda", meta, q)
    assert (len(asked), len(launched)) == (1, 0 if takes else 1)
    torch.testing.assert_close(got, run("torch", meta, q), rtol=2e-2, atol=2e-2)
