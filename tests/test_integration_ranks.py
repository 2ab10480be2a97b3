"""Ranks of a model under PCP that are given different things, with PCP_MLA_CHECK=1."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import DynamicCache

from pcp_mla.groups import group_rank
from pcp_mla.integrations.transformers import (
    copy_sharing_weights,
    decode,
    disable_pcp,
    enable_pcp,
    extend,
    generate,
    greedy_steps,
    model_step,
    prefill,
)
from pcp_mla.integrations.transformers.caches import CACHE_WORD
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
from test_integration_transformers import build, check_close, stock_logits

Call = Callable[[Any, int], Any]
DIFFER = "RuntimeError: {}: all ranks must make the same call with the same arguments, but these differ: {} of rank 0 and of rank 1"


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcomes(model: Any, group: Any, calls: list[Call]) -> list[str]:
    """What each call comes to on this rank; each finds three requests in the cache."""
    context = enable_pcp(model, group)
    prefill(model, [[1, 2, 3], [4, 5], [6]])
    cache = model(torch.tensor([[1, 2, 3]]))[CACHE_WORD]
    another = model(torch.tensor([[1, 2, 3], [0, 1, 2]]), attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))[CACHE_WORD]
    alike = model(torch.tensor([[3, 2, 1]]))[CACHE_WORD]
    told = []
    for call in calls:
        model.cache, model.another, model.alike = cache, another, alike
        told.append(message(lambda call=call: call(model, group_rank(group))))
        prefill(model, [[1, 2, 3], [4, 5], [6]])  # all ranks are there, and can go on
    del model.cache, model.another, model.alike, cache, another, alike
    assert len(context.blocks._free) == context.blocks.cache.shape[1] - 3
    return told


def ids(rank: int, *rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows[rank])[None]


CASES: dict[str, tuple[Call, str]] = {
    "lengths": (lambda m, r: prefill(m, [[1] * (4 + r)]), DIFFER.format("prefill", "requests")),
    "tokens": (lambda m, r: prefill(m, [[1, 2, 3 + r]]), DIFFER.format("prefill", "requests")),
    "a bad token": (lambda m, r: prefill(m, [[1, 50 * r]]), DIFFER.format("prefill", "requests")),
    "a kind": (lambda m, r: prefill(m, [[1, 2]] if r else 7), DIFFER.format("prefill", "requests")),
    "chunks": (lambda m, r: prefill(m, [[1] * 9], chunk_tokens=4 + r), DIFFER.format("prefill", "chunk_tokens")),
    "prefixes": (lambda m, r: prefill(m, [[1]], prefix=[(r, 2)]), DIFFER.format("prefill", "prefix")),
    "decodes": (
        lambda m, r: prefill(m, [[1], [2]], prefix=[(0, 2), (1, 1)], decodes=[True, r == 1]),
        DIFFER.format("prefill", "decodes"),
    ),
    "extend": (lambda m, r: extend(m, [[r], [], []]), DIFFER.format("extend", "requests")),
    "decode": (lambda m, r: decode(m, [1, 2, r]), DIFFER.format("decode", "tokens")),
    "last logits": (lambda m, r: prefill(m, [[1, 2]], logits=["all", "last"][r]), DIFFER.format("prefill", "logits")),
    "ends": (lambda m, r: generate(m, [[1, 2]], 2, eos_token_id=[3, 4 + r]), DIFFER.format("generate", "eos_token_id")),
    "counts": (lambda m, r: generate(m, [[1, 2]], 2 + r), DIFFER.format("generate", "n")),
    "ids": (lambda m, r: m(ids(r, [1, 2], [1, 3])), DIFFER.format("forward", "input_ids")),
    "widths": (lambda m, r: m(ids(r, [1, 2], [1, 2, 3])), DIFFER.format("forward", "input_ids")),
    "masks": (lambda m, r: m(ids(0, [1, 2]), attention_mask=ids(r, [0, 1], [1, 1])), DIFFER.format("forward", "attention_mask")),
    "caches": (
        lambda m, r: m(ids(0, [1, 2]), **{CACHE_WORD: m.cache if r else None}),
        DIFFER.format("forward", CACHE_WORD),
    ),
    "crop": (lambda m, r: m.cache.crop(-1 - r), DIFFER.format("PCPCache.crop", "tokens_to_remove")),
    "reorder": (
        lambda m, r: m.cache.reorder_cache(torch.tensor([0] * (1 + r))),
        DIFFER.format("PCPCache.reorder_cache", "beam_idx"),
    ),
    "select": (lambda m, r: m.cache.batch_select_indices([0, -1][r]), DIFFER.format("PCPCache.batch_select_indices", "indices")),
    "repeat": (
        lambda m, r: m.cache.batch_repeat_interleave(1 + r),
        DIFFER.format("PCPCache.batch_repeat_interleave", "repeats"),
    ),
    "one of two caches": (
        lambda m, r: [m.cache, m.another][r].reset(),
        DIFFER.format("PCPCache.reset", "the requests in the cache"),
    ),
    "one of two caches of a shape": (
        lambda m, r: m(ids(0, [1, 2]), **{CACHE_WORD: [m.cache, m.alike][r]}),
        DIFFER.format("forward", CACHE_WORD),
    ),
    "a copy of another": (
        lambda m, r: copy.copy([m.cache, m.another][r]),
        DIFFER.format("PCPCache.copy", "the requests in the cache"),
    ),
    "an equal crop": (lambda m, r: m.cache.crop(-1), ""),
    "a crop that both refuse": (lambda m, r: m.cache.crop(None), "TypeError: int() argument must be"),
    "equal": (lambda m, r: m(ids(0, [1, 2]), **{CACHE_WORD: m.cache}), ""),
    "equal, in another order": (
        lambda m, r: m(ids(0, [1, 2]), **dict([("return_dict", True), ("output_attentions", False)][:: 1 - 2 * r])),
        "",
    ),
    "equal, in other types": (lambda m, r: m([torch.tensor([[1, 2]]), torch.tensor([[1, 2]], dtype=torch.int32)][r]), ""),
    "equally bad": (
        lambda m, r: prefill(m, [[1, 50]]),
        "ValueError: prefill: requests must hold token ids in 0..49, got 50 in request 0",
    ),
}


@pytest.fixture(scope="module")
def stock() -> Any:
    return build("v3", num_hidden_layers=2)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCP_MLA_CHECK", "1")


def check_outcomes(told: list[list[str]]) -> None:
    for mine in told:
        assert len(mine) == len(CASES)
        for text, (name, (_, wanted)) in zip(mine, CASES.items(), strict=True):
            assert text.startswith(wanted) if wanted else text == "", name


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_every_rank_says_what_differs(stock: Any) -> None:
    calls = [call for call, _ in CASES.values()]
    check_outcomes(play(2, lambda group: outcomes(copy_sharing_weights(stock), group, calls)))


def outcomes_in_a_process(group: Any) -> list[str]:
    os.environ["PCP_MLA_CHECK"] = "1"
    with torch.no_grad():
        return outcomes(build("v3", num_hidden_layers=2), group, [call for call, _ in CASES.values()])


def test_every_rank_says_so_in_processes() -> None:
    check_outcomes(run_distributed(2, outcomes_in_a_process))


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_other_calls_and_layouts(stock: Any) -> None:
    def rank(group: Any) -> list[str]:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group)
        prefill(model, [[1, 2]])
        told = [message(lambda: decode(model, [1]) if group.rank else extend(model, [[1]]))]
        disable_pcp(model)
        enable_pcp(model, group, "padded" if group.rank else "unpadded")
        return [*told, message(lambda: prefill(model, [[1, 2, 3]]))]

    for number, (calls, layouts) in enumerate(play(2, rank)):
        assert calls == DIFFER.format(["extend", "decode"][number], "the call")
        assert layouts.endswith("these differ: layout of rank 0 and of rank 1")


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_texts_that_part(stock: Any) -> None:
    """As after sampling with other seeds: found with the first token that differs."""

    def rank(group: Any) -> list[str]:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group)
        x = torch.tensor([[1, 2, 3]])
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(x)}
        first = int(model(x).logits[0, -1].argmax())
        steps = greedy_steps(model, [[1, 2, 3]])
        tokens, _ = next(steps)
        tokens += group.rank
        return [
            message(lambda: model.generate(x, suppress_tokens=[first] if group.rank else None, **options)),
            message(lambda: decode(model, tokens.tolist())),
        ]

    for first, second in play(2, rank):
        assert first == DIFFER.format("forward", "input_ids")
        assert second == DIFFER.format("decode", "tokens")


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_a_rank_that_fails_alone(stock: Any) -> None:
    """Without room for its cache, before or within a decode, by a call that is none: the others hear of it, and all can go on."""

    def rank(group: Any) -> list[str]:
        model = copy_sharing_weights(stock)
        context = enable_pcp(model, group)
        prefill(model, [[1, 2, 3]])
        told = []
        for call in (
            lambda: prefill(model, [[1, 2]]),
            lambda: extend(model, [[1, 2]]),
            lambda: decode(model, [3]),
            lambda: generate(model, [[1, 2]], 3),
            lambda: model(torch.tensor([[1, 2]])),
        ):
            full = mock.patch.object(context.blocks, "reserve", side_effect=MemoryError("full"))
            with full if group.rank else contextlib.nullcontext():
                told.append(message(call))
            decode(model, [3])
        full = mock.patch.object(context.planner, "make_room", side_effect=MemoryError("full"))
        with full if group.rank else contextlib.nullcontext():  # behind the blocks, before the plan
            told.append(message(lambda: prefill(model, [[1, 2]])))
        decode(model, [3])
        told.append(message(lambda: prefill(model, [[1, 2]], **({"chunks": 3} if group.rank else {}))))
        if group.rank:
            model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: {}["broken"])
        told.append(message(lambda: decode(model, [3])))
        assert context.requests.lengths == [9]
        return told

    first, second = play(2, rank)
    assert second[:6] == ["MemoryError: full"] * 6
    assert second[6].startswith("TypeError: ")
    assert second[7] == "KeyError: 'broken'"
    assert [text.startswith("RuntimeError: ") and text.endswith("failed on rank 1") for text in first] == [True] * 8


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_a_rank_that_fails_behind_the_last_collective(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, failures = model_step._gather_rows, ["once"]

    def broken(padded: Any, group: Any, rows: Any) -> Any:
        gathered, places = gather(padded, group, rows)
        return gathered, places + len(gathered) if group.rank and failures and failures.pop() else places

    monkeypatch.setattr(model_step, "_gather_rows", broken)

    def rank(group: Any) -> list[str]:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group)
        return [message(lambda: prefill(model, [[1, 2, 3]])) for _ in range(2)]

    first, second = play(2, rank)
    assert second[0].startswith("IndexError: ")
    assert first[0].startswith("RuntimeError: ")
    assert first[0].endswith("failed on rank 1")
    assert first[1] == second[1] == ""


def refused_thread(group: Any) -> list[str]:
    os.environ["PCP_MLA_CHECK"] = "1"
    model = build("v3", num_hidden_layers=2)
    enable_pcp(model, group)
    told: list[str] = []

    def call() -> None:
        with torch.no_grad():
            told.append(message(lambda: prefill(model, [[1, 2, 3]])))

    going = threading.Event()

    def first() -> None:
        call()
        going.wait()

    thread = threading.Thread(target=first)
    thread.start()  # takes over, on every rank, and stays
    while not told:
        time.sleep(0.01)
    if group_rank(group):
        call()
    else:
        going.set()
        thread.join()
        call()
    going.set()
    return told


def test_a_thread_that_is_refused_is_told_to_the_others() -> None:
    (_, first), (_, second) = run_distributed(2, refused_thread, timeout=60)
    assert first.startswith("RuntimeError: ")
    assert first.endswith("failed on rank 1")
    assert second.startswith("ValueError: prefill: a model over several ranks must be called by one thread")


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_a_rank_that_fails_alone_with_a_cache_of_the_caller(stock: Any) -> None:
    """Behind the collectives of a step, or in a change of the cache: it is on all ranks as it was."""

    def rank(group: Any) -> tuple[list[str], torch.Tensor]:
        model, cache, told = copy_sharing_weights(stock), DynamicCache(), []
        context = enable_pcp(model, group)
        model(torch.tensor([[1, 2, 3, 4]]), **{CACHE_WORD: cache})
        other = copy.copy(cache)
        for place, call in (
            ((model.lm_head, "forward"), lambda: model(torch.tensor([[5, 6]]), **{CACHE_WORD: cache})),
            ((context.blocks, "make_room_to_shorten"), lambda: cache.crop(-1)),
            ((context.blocks, "fork_prefixes"), lambda: cache.reorder_cache(torch.tensor([0, 0]))),
            ((context.blocks, "fork_prefixes"), lambda: copy.deepcopy(cache)),
        ):
            broken = mock.patch.object(*place, side_effect=MemoryError("full"))
            with broken if group.rank else contextlib.nullcontext():
                told.append(message(call))
            assert cache.get_seq_length() == 4
        assert len(context.blocks._free) == context.blocks.cache.shape[1] - 2  # a block of each cache
        del other
        return told, model(torch.tensor([[5, 6]]), **{CACHE_WORD: cache}).logits[0]

    (first, one), (second, other) = play(2, rank)
    assert second == ["MemoryError: full"] * 4
    assert [text.startswith("RuntimeError: ") and text.endswith("failed on rank 1") for text in first] == [True] * 4
    wanted = stock_logits(stock, [[1, 2, 3, 4, 5, 6]])[4:]
    check_close(one, wanted)
    check_close(other, wanted)


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_texts_with_beams_and_with_an_assistant(stock: Any) -> None:
    """What transformers does to a cache by the way, it does alike on all ranks."""
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    ways = ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2})
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 49,
        "attention_mask": torch.ones_like(ids),
    }
    wanted = [stock.generate(ids, **options, **way) for way in ways]

    def rank(group: Any) -> list[torch.Tensor]:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group)
        return [model.generate(ids, **options, **way) for way in ways]

    for texts in play(2, rank):
        assert all(map(torch.equal, texts, wanted))


@pytest.mark.usefixtures("check")
@torch.no_grad()
def test_a_cache_that_pcp_has_left_asks_nobody(stock: Any) -> None:
    def rank(group: Any) -> int:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group)
        cache = model(torch.tensor([[1, 2]]))[CACHE_WORD]
        disable_pcp(model)
        if group.rank:
            cache.reset()
        return cache.get_seq_length()

    assert play(2, rank) == [2, 0]


@pytest.mark.parametrize("switch", [{}, {"PCP_MLA_CHECK": "0"}])
@torch.no_grad()
def test_without_the_switch_nothing_is_added(stock: Any, monkeypatch: pytest.MonkeyPatch, switch: dict[str, str]) -> None:
    monkeypatch.delenv("PCP_MLA_CHECK", raising=False)
    for name, value in switch.items():
        monkeypatch.setenv(name, value)

    def rank(group: Any) -> list[int]:
        model, gathers = copy_sharing_weights(stock), []
        enable_pcp(model, group)
        gather = group.all_gather
        group.all_gather = lambda rows: gathers.append(rows) or gather(rows)
        counts = []
        for call in (lambda: prefill(model, [[1, 2, 3]]), lambda: decode(model, [1]), lambda: model(torch.tensor([[1, 2]]))):
            call()
            counts.append(len(gathers))
        return counts

    assert play(2, rank) == [[3, 3, 6]] * 2  # a step's layers, and its last hidden states
