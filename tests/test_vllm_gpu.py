"""The plug-in on a GPU: the plans that a CPU has, and a layer's prefill at DeepSeek's widths, which is what the ops give."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pcp_mla import MLADims
from pcp_mla.integrations.vllm import prefill as part
from pcp_mla.integrations.vllm.planner import StepPlanner
from pcp_mla.integrations.vllm.prefill import LayerPrefill
from pcp_mla.integrations.vllm.rows import host_rows, step_rows
from pcp_mla.ops.attention.call import run_rows
from pcp_mla.ops.attention.support import choose
from pcp_mla.ops.kv_up_project import expand
from test_vllm_planner import batch_of, manager
from test_vllm_rows import ColumnParallelLinear, Layer, Metadata

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("inference")]
HEADS, DIMS, BLOCK = 4, MLADims(4, 128, 64, 128, 512), 16
ROWS = ([130, 64, 130, 1], [390, 64, 776, 777], [3, 8, 3, 3])  # tokens, ends, requests
TABLE = torch.arange(4 * 50, dtype=torch.int32).view(4, 50).flip(0).contiguous()


@pytest.mark.parametrize("limit", [100, 100_000])
def test_rows_are_those_of_the_cpu(limit):
    host = host_rows(*(np.array(column, np.int32) for column in ROWS), limit)
    here, there = (step_rows(host, 4, TABLE.to(device), BLOCK) for device in ("cpu", "cuda"))
    assert torch.equal(there.kv_rows.cpu(), here.kv_rows)
    for one, other in zip(here.chunks, there.chunks, strict=True):
        assert one[:2] == other[:2]
        assert one.rows[3:] == other.rows[3:]
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one.rows[:3], other.rows[:3], strict=True))


@pytest.mark.parametrize("limit", [44, 1000])
@pytest.mark.parametrize("states", [[4], [4, 0, 2]])
def test_plans_are_those_of_the_cpu(states, limit):
    new, computed = [13, 1, 30][: len(states)], [5, 0, 37][: len(states)]
    for rank in range(2):
        plans = []
        for device in ("cpu", "cuda"):
            engine = manager(2, rank)
            engine.device = torch.device(device)
            for owner, name in (
                (engine._input_buffers, "input_ids"),
                (engine._input_buffers, "positions"),
                (engine._input_buffers, "is_padding"),
                (engine._block_tables.block_tables[0], "gpu"),
            ):
                setattr(owner, name, getattr(owner, name).to(device))
            batch = batch_of(new, computed, states)
            batch.idx_mapping, batch.input_ids = batch.idx_mapping.to(device), batch.input_ids.to(device)
            planner = StepPlanner(engine, limit, None)
            assert planner.partition(batch) is planner.plan.batch
            plans.append(planner.plan)
        here, there = plans
        for name in ("input_ids", "positions", "is_padding", "query_start_loc", "seq_lens"):
            assert torch.equal(getattr(there.batch, name).cpu(), getattr(here.batch, name)), name
        assert torch.equal(there.slots.cpu(), here.slots)
        assert torch.equal(there.hidden_rows.cpu(), here.hidden_rows)
        assert torch.equal(there.rows.kv_rows.cpu(), here.rows.kv_rows)
        assert len(there.rows.chunks) == len(here.rows.chunks)
        for one, other in zip(here.rows.chunks, there.rows.chunks, strict=True):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(one.rows[:3], other.rows[:3], strict=True))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("limit", [100, 100_000])
def test_a_layer_is_what_the_ops_give(limit, kept, monkeypatch):
    monkeypatch.setattr(part, "WORKSPACE", part.Workspace())
    if kept:
        part.WORKSPACE.keep(torch.empty(0, dtype=torch.bfloat16, device="cuda"), 2**23)
    generator = torch.Generator("cuda").manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    weight, cache, q = randn(HEADS * 256, 512) / 20, randn(200, BLOCK, 576), randn(325, HEADS, 192)
    host = host_rows(*(np.array(column, np.int32) for column in ROWS), limit)
    step = step_rows(host, 4, TABLE.cuda(), BLOCK)
    names = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    dims = {name: getattr(DIMS, name) for name in names}
    impl = SimpleNamespace(forward_mha=None, kv_b_proj=ColumnParallelLinear(weight), scale=0.07, kv_cache_dtype="auto", **dims)
    layers = [LayerPrefill(Layer(impl)) for _ in range(2)]
    backend = choose("auto", q.device, q.dtype, 192, 128, False)
    wanted, lse = torch.empty(325, HEADS, 128, device="cuda").bfloat16(), torch.empty(325, HEADS, device="cuda")
    *context, last = step.chunks
    assert len(context) == (0 if limit > 1000 else 3)
    for chunk in (last, *context):
        k, v = expand(cache, step.kv_rows[chunk.first : chunk.first + chunk.num_keys], weight, DIMS)
        prev = None if chunk is last else (wanted, lse)
        run_rows(backend, q, k, v, chunk.rows, 0.07, bool(context), prev=prev, out=wanted, lse=lse if context else None)
    for layer in layers:  # the second one takes the call that the first one prepared
        out = torch.full((325, HEADS * 128), torch.nan, device="cuda").bfloat16()
        layer.forward_impl(q, None, None, cache, Metadata(step, 325), out)
        assert torch.equal(out.view(325, HEADS, 128), wanted)
    assert len(step.calls) == (0 if context else 1)
