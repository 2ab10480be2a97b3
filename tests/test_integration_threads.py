"""One model under PCP and several threads: served one after another or refused, and never each other's answers."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import DynamicCache

from pcp_mla.integrations.transformers import (
    copy_sharing_weights,
    decode,
    disable_pcp,
    enable_pcp,
    extend,
    generate,
    greedy_steps,
    prefill,
)
from pcp_mla.integrations.transformers.caches import CACHE_WORD, PCPCache
from pcp_mla.integrations.transformers.paged_cache import CachedRequests
from pcp_mla.testing.played import play
from test_integration_transformers import build, check_close, prompts, stock_logits, stock_text

PROMPTS = [prompts([17])[0][i:] for i in range(3)]


@pytest.fixture(scope="module")
def stock() -> Any:
    return build("v3", num_hidden_layers=2)


@pytest.fixture
def model(stock: Any) -> Any:
    """Under PCP, and so slow that threads which may meet in it do."""
    mine = copy_sharing_weights(stock)
    enable_pcp(mine)
    for layer in mine.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    return mine


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """All at once: results, or errors in their place."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def in_another_thread(call: Callable[[], Any]) -> Any:
    """Which goes on running, as a server's does."""
    pool = ThreadPoolExecutor(1)
    return pool, pool.submit(call).result()


@torch.no_grad()
def test_generate_and_forward(stock: Any, model: Any) -> None:
    wanted = [stock_text(stock, prompt, 4) for prompt in PROMPTS]
    logits = stock_logits(stock, [PROMPTS[1]])

    def chunks() -> torch.Tensor:
        """A conversation in steps, between those of the others."""
        out = model(torch.tensor([PROMPTS[1][:9]]))
        rest = [model(torch.tensor([[token]]), **{CACHE_WORD: out[CACHE_WORD]}).logits[0] for token in PROMPTS[1][9:]]
        return torch.cat([out.logits[0], *rest])

    calls: list[Callable[[], Any]] = [lambda prompt=prompt: generate(model, [prompt], 4) for prompt in PROMPTS]
    *texts, first, second = in_threads([*calls, chunks, chunks])
    assert texts == [[text] for text in wanted]
    check_close(first, logits)
    check_close(second, logits)
    blocks = model.__dict__["_pcp"].blocks
    generate(model, [[1]], 1)
    assert sum(blocks._users) == 1
    assert len(blocks._free) == blocks.cache.shape[1] - 1


@torch.no_grad()
def test_generate_of_transformers(stock: Any, model: Any) -> None:
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    wanted = [stock.generate(x, attention_mask=torch.ones_like(x), **options) for x in ids]
    texts = in_threads([lambda x=x: model.generate(x, attention_mask=torch.ones_like(x), **options) for x in ids])
    assert all(torch.equal(text, right) for text, right in zip(texts, wanted, strict=True))


@torch.no_grad()
def test_conversations_in_caches_of_the_callers(stock: Any, model: Any) -> None:
    """Each thread has a cache, which it copies and crops and goes on with."""

    def talk(model: Any, prompt: list[int]) -> torch.Tensor:
        cache, ids = DynamicCache(), torch.tensor([prompt])
        model(ids[:, :-2], **{CACHE_WORD: cache})
        ends = []
        for crop in (1, 4, 2):
            other = copy.deepcopy(cache)
            ends.append(model(ids[:, -2:], **{CACHE_WORD: other}).logits[0])
            other.crop(-crop)
            ends.append(model(ids[:, :3], **{CACHE_WORD: other}).logits[0])
        return torch.cat(ends)

    wanted = [talk(stock, prompt) for prompt in PROMPTS]
    for got, right in zip(in_threads([lambda prompt=prompt: talk(model, prompt) for prompt in PROMPTS]), wanted, strict=True):
        check_close(got, right)
    gc.collect()
    blocks = model.__dict__["_pcp"].blocks
    assert set(blocks._users) == {0}
    assert len(blocks._free) == len(set(blocks._free)) == blocks.cache.shape[1]


# And how many columns and requests there are then, if the step came first.
CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[int, int]]] = {
    "crop": (lambda cache: cache.crop(-3), (2, 1)),
    "reset": (lambda cache: cache.reset(), (0, 0)),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([0, 0])), (5, 2)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([0, 0, 0])), (5, 3)),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), (5, 2)),
    "copy": (copy.copy, (5, 1)),
}


@pytest.mark.parametrize(("change", "left"), CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_of_a_cache_waits_for_the_step(
    stock: Any, model: Any, change: Callable[[Any], Any], left: tuple[int, int]
) -> None:
    """Which adds to the very cache."""
    cache, pool, entered = DynamicCache(), ThreadPoolExecutor(1), threading.Event()
    model(torch.tensor([[1, 2, 3]]), **{CACHE_WORD: cache})
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: entered.set() or time.sleep(0.05))
    running = pool.submit(lambda: model(torch.tensor([[4, 5]]), **{CACHE_WORD: cache}).logits[0])
    entered.wait()
    changed = change(cache) or cache
    check_close(running.result(), stock_logits(stock, [[1, 2, 3, 4, 5]])[3:])
    assert (changed.get_seq_length(), len(changed.requests.lengths)) == left
    pool.shutdown()


def test_requests_belong_to_a_thread(model: Any) -> None:
    prefill(model, [[1, 2, 3]])
    mine = "the requests of the last prefill must be of this thread, 'MainThread', got those of 'ThreadPoolExecutor-"
    first, _ = in_another_thread(lambda: prefill(model, [[4, 5]]))
    for call in (lambda: decode(model, [1]), lambda: extend(model, [[1]]), lambda: generate(model, [[1]], 1, prefix=[(0, 2)])):
        with pytest.raises(ValueError, match=mine):
            call()
    assert first.submit(lambda: decode(model, [1])).result().shape == (1, 50)
    prefill(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="got those of 'MainThread'"):
        first.submit(lambda: decode(model, [1])).result()
    first.submit(lambda: prefill(model, [[4, 5]])).result()
    first.shutdown()
    assert decode(model, [1]).shape == (1, 50)  # nobody else is there any more


def test_steps_that_another_call_comes_between(stock: Any, model: Any) -> None:
    wanted = stock_text(stock, PROMPTS[0], 4)
    steps = greedy_steps(model, [PROMPTS[0]])
    got = [int(tokens) for tokens, _ in islice(steps, 2)]
    pool, more = in_another_thread(lambda: [int(tokens) for tokens, _ in islice(steps, 2)])  # as servers run generators
    assert got + more == wanted
    others = greedy_steps(model, [PROMPTS[1]])
    next(others)
    with pytest.raises(ValueError, match="the requests of the last prefill must be those of these steps, got others"):
        next(steps)
    assert int(next(others)[0]) == stock_text(stock, PROMPTS[1], 2)[1]
    pool.shutdown()


def test_one_thread_over_several_ranks(stock: Any) -> None:
    def rank(group: Any) -> list[str]:
        mine = copy_sharing_weights(stock)
        context = enable_pcp(mine, group)
        pools = [ThreadPoolExecutor(1) for _ in range(2)]
        outcomes = []
        for pool in (None, pools[0], pools[1], None):  # a warm-up, the engine's thread, and two that come too late
            try:
                # A decode has no collective: a played rank's belong to its own thread.
                context.turns.owner = None
                call = lambda: decode(mine, [])  # noqa: E731
                _ = call() if pool is None else pool.submit(call).result()
            except ValueError as error:
                outcomes.append(str(error))
        for pool in pools:
            pool.shutdown()
        prefill(mine, [[1, 2, 3]])  # the only one left
        return outcomes

    for outcomes in play(2, rank):
        assert len(outcomes) == 4
        assert outcomes[0] == outcomes[1] == "step: requests must hold at least one token, got none"
        for late in outcomes[2:]:
            assert "decode: a model over several ranks must be called by one thread" in late
            assert "beside 'ThreadPoolExecutor-" in late


def test_a_change_of_a_cache_by_another_thread_over_several_ranks(stock: Any) -> None:
    """Is refused as any other call."""

    def rank(group: Any) -> None:
        mine = copy_sharing_weights(stock)
        enable_pcp(mine, group)
        cache = PCPCache(mine.__dict__["_pcp"])
        pool = ThreadPoolExecutor(1)
        pool.submit(cache.reset).result()  # takes over
        with pytest.raises(ValueError, match=r"PCPCache.crop: a model over several ranks must be called by one thread"):
            cache.crop(-1)
        pool.shutdown()

    play(2, rank)


def test_a_call_within_a_step(model: Any) -> None:
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: prefill(model, [[1]]))
    with pytest.raises(ValueError, match="prefill: must come between steps of the model, got a call from within one"):
        prefill(model, [[1, 2]])
    handle.remove()
    prefill(model, [[1, 2]])


def test_disable_waits_for_the_step(stock: Any, model: Any) -> None:
    pool = ThreadPoolExecutor(1)
    entered = threading.Event()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: entered.set() or time.sleep(0.05))
    running = pool.submit(lambda: prefill(model, [[1, 2, 3]]))
    entered.wait()
    disable_pcp(model)
    check_close(running.result(), stock_logits(stock, [[1, 2, 3]]))
    pool.shutdown()


def test_release_never_waits(model: Any) -> None:
    """It comes from the garbage collector: within a step of another rank's thread, or while this thread itself counts blocks."""
    blocks = model.__dict__["_pcp"].blocks
    requests = CachedRequests([0], [[]])
    blocks.reserve(requests, [40])
    free = len(blocks._free)
    with blocks.lock:
        pool, _ = in_another_thread(lambda: blocks.release(blocks.fork(requests)))
    pool.shutdown()
    with blocks._counts():
        blocks.release(requests)
        assert len(blocks._free) == free
    assert len(blocks._free) == free + 3
    assert set(blocks._users) == {0}
