"""Steps of a model in CUDA graphs, pieces around the collectives, replayed with batches that they were not captured with; the layer
under torch.compile."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from torch._dynamo.testing import CompileCounterWithBackend

from bench.graphs import Echo
from pcp_mla import LatentExchange, MLADims, MLAPrefill, PCPPlanner
from pcp_mla.graphs import PiecewiseGraph
from pcp_mla.integrations import captured
from pcp_mla.integrations.transformers import capture_graphs, copy_sharing_weights, decode, enable_pcp, extend, prefill
from pcp_mla.launch import run_distributed
from pcp_mla.played import play
from test_integration_transformers import build, check_close, prompts

# (local tokens of the fullest rank, keys), (requests, keys).
PREFILLS, DECODES = [(20, 64), (64, 160)], [(2, 48), (5, 200)]


def work(model: Any) -> list[torch.Tensor]:
    """Steps of many shapes: some fit the small graphs, some the large ones, the long prompt none."""
    logits = [prefill(model, prompts([13, 1, 5]))]
    logits += [decode(model, [3, 4, 5]) for _ in range(3)]
    logits += [extend(model, prompts([2, 7, 0]))]
    logits += [prefill(model, prompts([30, 9]), prefix=[(0, 11), None], chunk_tokens=17)]
    logits += [decode(model, [7, 8]), prefill(model, prompts([300])), decode(model, [1]), prefill(model, prompts([4]))]
    return logits


def replayed_and_not(group: Any, model: Any, layout: str) -> tuple[list[torch.Tensor], list[torch.Tensor], int, list[int]]:
    """Results without graphs and with them, how many replays there were, and the pieces of the captured graphs."""
    enable_pcp(model, group, layout)
    wanted = work(model)
    capture_graphs(model, prefill_sizes=PREFILLS, decode_sizes=DECODES, max_requests=5)
    context = model.__dict__["_pcp"]
    count = 0
    for steps in (context.captured, context.captured_decodes):
        for capture in steps._captures:

            def counted(replay: Any = capture.graph.replay) -> None:
                nonlocal count
                count += 1
                replay()

            capture.graph.replay = counted
    got = work(model)
    return wanted, got, count, context.captured.num_pieces + context.captured_decodes.num_pieces


def check(results: Any, world_size: int) -> None:
    for wanted, got, count, pieces in results:
        for one, other in zip(got, wanted, strict=True):
            check_close(one, other)
        # All but the long prompt and its decode, which has too many keys; the chunked prefill has three steps.
        assert count == 1 + 3 + 1 + 3 + 1 + 1
        # Three layers: a graph before, between and behind their collectives.
        assert pieces == [7 if world_size > 1 else 1] * 2 + [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_replays_give_what_steps_give(world_size: int, layout: str) -> None:
    model = build("v3", first_k_dense_replace=3).cuda()
    check(play(world_size, lambda group: replayed_and_not(group, copy_sharing_weights(model), layout)), world_size)


def in_process(group: Any) -> Any:
    return replayed_and_not(group, build("v3", first_k_dense_replace=3).cuda(), "unpadded")


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replays_over_nccl() -> None:
    check(run_distributed(2, in_process, backend="nccl"), 2)


def outgrown(group: Any, model: Any) -> None:
    blocks = enable_pcp(model, group).blocks
    capture_graphs(model, prefill_sizes=[(64, 64)])
    steps, (capture,) = model.__dict__["_pcp"].captured, model.__dict__["_pcp"].captured._captures
    replay = capture.graph.replay
    with mock.patch.object(capture.graph, "replay", side_effect=replay) as counted:
        before = prefill(model, prompts([30]))
        assert counted.call_count == 1
    old = weakref.ref(blocks.cache)
    del replay, counted
    blocks.grow(blocks.cache.shape[1] + 100)
    check_close(prefill(model, prompts([30])), before)
    assert capture.graph is None
    assert capture.hidden is None
    assert old() is None
    assert steps._cache() is None


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_cache_that_grew_takes_its_graphs_along(world_size: int) -> None:
    model = build("v3", first_k_dense_replace=3).cuda()
    play(world_size, lambda group: outgrown(group, copy_sharing_weights(model)))


@pytest.mark.gpu
def test_one_capture_a_graph() -> None:
    x = torch.zeros(3, device="cuda")
    graph = PiecewiseGraph()
    x + 1
    out = graph.capture(lambda: x + 1)
    assert graph.num_pieces == 1
    x.fill_(4)
    graph.replay()
    assert out.tolist() == [5, 5, 5]
    with pytest.raises(RuntimeError, match="the graph must be new"):
        graph.capture(lambda: x)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_another_device_than_the_current_one() -> None:
    """Captured, replayed and played there, whatever the current device is."""
    assert torch.cuda.current_device() == 0
    x = torch.zeros(3, device="cuda:1")
    graph = PiecewiseGraph(device="cuda:1")
    x + 1
    out = graph.capture(lambda: x + 1)
    x.fill_(4)
    graph.replay()
    assert out.tolist() == [5, 5, 5]

    model = build("v3", first_k_dense_replace=3).to("cuda:1")
    check(play(2, lambda group: replayed_and_not(group, copy_sharing_weights(model), "unpadded")), 2)
    assert torch.cuda.current_device() == 0


class NoGraph:
    """Where nothing can be captured: what a capture runs, and no replay."""

    num_pieces = 0

    def __init__(self, pool: Any, device: Any) -> None: ...

    def capture(self, fn: Any, exchanges: Any) -> Any:
        return fn()


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_padded_steps_call_by_call(world_size: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank does whose cache grew: the captured sizes, without the graphs."""
    monkeypatch.setattr(captured, "PiecewiseGraph", NoGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = build("v3")

    @torch.no_grad()
    def rank(group: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        mine = copy_sharing_weights(model)
        context = enable_pcp(mine, group, layout)
        wanted, taken = work(mine), 0
        context.captured = captured.CapturedSteps(mine, context, False, PREFILLS, 5)
        context.captured_decodes = captured.CapturedSteps(mine, context, True, DECODES, 5)
        for steps in (context.captured, context.captured_decodes):
            steps._cache = lambda: None

            def counted(*arguments: Any, call: Any = steps._call) -> torch.Tensor:
                nonlocal taken
                taken += 1
                return call(*arguments)

            steps._call = counted  # type: ignore[method-assign]
        return wanted, work(mine), taken

    for wanted, got, taken in play(world_size, rank):
        assert taken == 10
        for one, other in zip(got, wanted, strict=True):
            check_close(one, other)


@pytest.mark.gpu
def test_graphs_of_a_new_model_stay_in_use() -> None:
    """Capturing one kind does not outdate the other, nor do prompts one after another, generate among them."""
    model = build("v3", first_k_dense_replace=3).cuda()
    ids = torch.tensor(prompts([30, 30]), device="cuda")
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    context = enable_pcp(model)
    capture_graphs(model, prefill_sizes=[(64, 64)], decode_sizes=[(2, 400)], max_requests=2)
    for _ in range(3):
        prefill(model, prompts([60]))
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, wanted)
    assert context.captured._cache() is context.captured_decodes._cache() is context.blocks.cache


def test_errors() -> None:
    model = build("v3")
    with pytest.raises(ValueError, match="capture_graphs: model must be under PCP"):
        capture_graphs(model)
    enable_pcp(model)
    with pytest.raises(ValueError, match="capture_graphs: model must be on a CUDA device, got cpu"):
        capture_graphs(model, decode_sizes=[(1, 10)])
    with pytest.raises(ValueError, match=r"capture_graphs: prefill_sizes must be positive, got \(0, 10\)"):
        capture_graphs(model, prefill_sizes=[(8, 10), (0, 10)])
    with pytest.raises(TypeError, match=r"capture_graphs: decode_sizes must be pairs of integers, got 8"):
        capture_graphs(model, decode_sizes=[8])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="capture_graphs: max_requests must be at least 32, as decode_sizes, got 16"):
        capture_graphs(model, decode_sizes=[(8, 10), (32, 10)])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("group", [None, Echo(rank=1)], ids=["alone", "of two"])
def test_the_layer_compiles_whole(device: str, group: Any) -> None:
    """One graph, and padded plans of a size share it from the third at the latest: numbers that vary have become symbols."""
    dims = MLADims(2, 128, 64, 128, 512)
    world, rank = (1, 0) if group is None else (2, 1)
    planner = PCPPlanner(4, 256 * world, world, rank, block_size=16, device=device, max_kv_tokens=700)
    tables = torch.arange(4 * 40, dtype=torch.int32, device=device).view(4, 40)
    layer = MLAPrefill(dims, 192**-0.5, LatentExchange(group, planner.max_local_tokens, dims, torch.bfloat16, device), "auto")
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    cache, weight = values(160, 16, 576), values(2 * 256, 512) * 512**-0.5
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*arguments: Any) -> torch.Tensor:
        return layer(*arguments)

    batches = [([100, 1], [20, 5]), ([37, 60, 1], [0, 8, 3]), ([200], [100]), ([50, 50], [1, 1]), ([9, 9, 9, 9], [0, 0, 3, 7])]
    with torch.no_grad():
        for number, (lengths, contexts) in enumerate(batches):
            sizes = {"num_tokens_padded": 256, "num_requests_padded": 4, "num_kv_tokens_padded": 700}
            meta = planner.plan(lengths, contexts, [length > 1 for length in lengths], tables, **sizes)
            inputs = values(256, 2, 192), values(256, 512), values(256, 64), weight, meta
            theirs, mine = cache.clone(), cache.clone()
            wanted, got = layer(*inputs, theirs)[: meta.num_tokens], compiled(*inputs, mine)[: meta.num_tokens]
            assert torch.equal(mine, theirs)
            assert torch.allclose(got, wanted, atol=2**-5)
            assert counter.frame_count <= min(number + 1, 3)
