"""Steps of a model in CUDA graphs, pieces around the collectives, replayed with batches that they were not captured with."""

from __future__ import annotations

import functools
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from pcp_mla import LatentExchange, MLADims, PCPPlanner
from pcp_mla.integrations.transformers import capture_graphs, captured, copy_sharing_weights, decode, enable_pcp, extend, prefill
from pcp_mla.layer.graphs import PiecewiseGraph
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
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


def stock_work(model: Any) -> list[torch.Tensor]:
    """The same by the stock model, each request anew and whole."""
    requests = prompts([13, 1, 5])
    logits = [stock(model, requests, [0, 0, 0])]
    for new in ([[3], [4], [5]], [[3], [4], [5]], [[3], [4], [5]], prompts([2, 7, 0])):
        done = [len(request) for request in requests]
        requests = [old + more for old, more in zip(requests, new, strict=True)]
        logits.append(stock(model, requests, done))
    first, second = prompts([30, 9])
    requests = [requests[0][:11] + first, second]
    logits.append(stock(model, requests, [11, 0]))
    logits.append(stock(model, [[*requests[0], 7], [*second, 8]], [41, 9]))
    (long,), (short,) = prompts([300]), prompts([4])
    return [*logits, stock(model, [long], [0]), stock(model, [[*long, 1]], [300]), stock(model, [short], [0])]


@functools.cache
def stock_on_the_cpu() -> list[torch.Tensor]:
    return stock_work(build("v3"))


@torch.no_grad()
def stock(model: Any, requests: list[list[int]], done: list[int]) -> torch.Tensor:
    """Logits of each request behind its first ``done`` tokens."""
    whole = [model(torch.tensor([ids], device=model.device), use_cache=False).logits[0] for ids in requests]
    return torch.cat([logits[n:] for logits, n in zip(whole, done, strict=True)])


def replayed_and_not(
    group: Any, model: Any, layout: str, split: str = "tokens"
) -> tuple[list[torch.Tensor], list[torch.Tensor], int, list[int]]:
    """Results of the stock model and with graphs, how many replays there were, and the pieces of the captured graphs."""
    wanted = stock_work(model)
    enable_pcp(model, group, layout, split)
    work(model)  # without graphs: kernels compile
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


def check(results: Any, world_size: int, collectives: int = 1) -> None:
    for wanted, got, count, pieces in results:
        for one, other in zip(got, wanted, strict=True):
            check_close(one, other)
        # All but the long prompt and its decode, which has too many keys; the chunked prefill has three steps.
        assert count == 1 + 3 + 1 + 3 + 1 + 1
        # Three layers: a graph before, between and behind their collectives.
        assert pieces == [1 + 2 * 3 * collectives if world_size > 1 else 1] * 2 + [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_replays_give_what_steps_give(world_size: int, layout: str) -> None:
    model = build("v3", first_k_dense_replace=3).cuda()
    check(play(world_size, lambda group: replayed_and_not(group, copy_sharing_weights(model), layout)), world_size)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_replays_by_heads(world_size: int) -> None:
    model = build("v3", first_k_dense_replace=3).cuda()
    results = play(world_size, lambda group: replayed_and_not(group, copy_sharing_weights(model), "unpadded", "heads"))
    check(results, world_size, collectives=3)


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


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's part of a capture on the CPU, where everything is run as it is captured: what was begun, ended and replayed."""
    events: list[str] = []

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"
            events.append("begin")

        def capture_end(self) -> None:
            events.append("end")

        def replay(self) -> None:
            events.append("replay")

    nowhere = mock.MagicMock()
    nowhere.__exit__.return_value = False
    for name in ("Stream", "current_stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nowhere)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return events


@pytest.mark.parametrize("fails", [False, True])
def test_an_exchange_is_as_before_once_it_was_captured(fails: bool, recorded: list[str]) -> None:
    """Its collective is a piece of the graph while that is captured, and a plain call afterwards, also where the capture failed."""
    dims = MLADims(1, 4, 2, 4, 6)

    def rank(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        exchange, graph = LatentExchange(group, 4, dims, torch.float32), PiecewiseGraph()
        meta = PCPPlanner(1, 8, 2, group.rank).plan([8])
        kv_c, k_pe = torch.full((4, 6), 1.0 + group.rank), torch.full((4, 2), 5.0)

        def step() -> torch.Tensor:
            gathered = exchange.all_gather(kv_c, k_pe, meta)
            if fails:
                raise ZeroDivisionError
            return gathered

        if fails:
            with pytest.raises(ZeroDivisionError):
                graph.capture(step, [exchange])
            assert graph.num_pieces == 0
        else:
            graph.capture(step, [exchange])
            assert graph.num_pieces == 3
        assert exchange.around is None
        kv_c += 2
        before = exchange.all_gather(kv_c, k_pe, meta).clone()
        kv_c += 2
        graph.replay()
        return before, exchange.all_gather(kv_c, k_pe, meta).clone()

    for results in play(2, rank):
        for result, added in zip(results, (2, 4), strict=True):
            assert result[:, 0].tolist() == [1.0 + added] * 4 + [2.0 + added] * 4
    assert recorded.count("begin") == recorded.count("end") == 4
    assert recorded.count("replay") == (0 if fails else 4)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_padded_steps_call_by_call(world_size: int, layout: str, recorded: list[str]) -> None:
    """What a rank does whose cache grew: the captured sizes, without the graphs."""
    model = build("v3")

    @torch.no_grad()
    def rank(group: Any) -> tuple[list[torch.Tensor], int, list[int]]:
        mine = copy_sharing_weights(model)
        context = enable_pcp(mine, group, layout)
        prefill(mine, prompts([300]))  # the cache is as large as it becomes
        taken = 0
        context.captured = captured.CapturedSteps(mine, context, False, PREFILLS, 5)
        context.captured_decodes = captured.CapturedSteps(mine, context, True, DECODES, 5)
        for steps in (context.captured, context.captured_decodes):
            steps._cache = lambda: None

            def counted(*arguments: Any, call: Any = steps._call) -> torch.Tensor:
                nonlocal taken
                taken += 1
                return call(*arguments)

            steps._call = counted  # type: ignore[method-assign]
        pieces = context.captured.num_pieces + context.captured_decodes.num_pieces
        return work(mine), taken, pieces

    wanted = stock_on_the_cpu()
    for got, taken, pieces in play(world_size, rank):
        assert taken == 10
        assert pieces == [7 if world_size > 1 else 1] * 2 + [1, 1]
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
