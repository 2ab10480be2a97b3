"""Drafts, several tokens that a request may go on with, through a model under PCP: beside prompts, or by assisted generation."""

from __future__ import annotations

import copy
import random
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import DynamicCache

from pcp_mla.integrations.transformers import (
    PCPCache,
    capture_graphs,
    captured,
    copy_sharing_weights,
    decode,
    enable_pcp,
    forward,
    prefill,
)
from pcp_mla.integrations.transformers.caches import CACHE_WORD
from pcp_mla.testing.played import PlayedGroup, play
from test_graphs import recorded  # noqa: F401  a fixture
from test_integration_forward import on_ranks
from test_integration_transformers import build, check_close, prompts, stock_logits


@pytest.fixture(scope="module", params=["v3", "v2"])
def model(request: pytest.FixtureRequest) -> Any:
    model = build(request.param)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def behind(model: Any, text: list[int], new: list[int]) -> torch.Tensor:
    """Logits of the stock model of ``new`` tokens behind ``text``, wherever it is."""
    return model(torch.tensor([text + new], device=model.device), use_cache=False).logits[0, len(text) :]


class Serving:
    """Requests that go on with drafts, of which some tokens are accepted, while others come and go; checked by the stock model."""

    def __init__(self, stock: Any, mine: Any, seed: int = 0) -> None:
        self.stock, self.mine, self.random = stock, mine, random.Random(seed)
        self.texts: list[list[int]] = []

    def step(self, kept: list[tuple[int, int]], drafts: list[int], new: list[int], **options: Any) -> None:
        """Go on with the first tokens of some requests, with drafts of so many tokens behind, beside new prompts."""
        last = options.get("logits") == "last"
        tokens = prompts([*drafts, *new])
        texts = [self.texts[i][:n] for i, n in kept] + [[]] * len(new)
        decodes = [True] * len(kept) + [False] * len(new)
        got = prefill(self.mine, tokens, prefix=[*kept, *[None] * len(new)], decodes=decodes, **options)
        wanted = [behind(self.stock, text, more) for text, more in zip(texts, tokens, strict=True)]
        if last:
            wanted = [rows if is_decode else rows[-1:] for rows, is_decode in zip(wanted, decodes, strict=True)]
        check_close(got, torch.cat(wanted))
        self.texts = [text + more for text, more in zip(texts, tokens, strict=True)]

    def accept(self, most: int) -> list[tuple[int, int]]:
        """Of each request but the last ``most`` tokens all, and of those some."""
        return [(i, len(text) - self.random.randint(0, min(most, len(text) - 1))) for i, text in enumerate(self.texts)]


@pytest.mark.parametrize("split", ["tokens", "heads"])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_drafts_beside_prompts(model: Any, world_size: int, layout: str, split: str) -> None:
    """Prompts join, drafts of one to six tokens go on, a part of each is accepted, and a request ends."""
    if split == "heads" and world_size not in (2, 3):
        pytest.skip("three heads over two or three ranks")

    def call(group: Any) -> None:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group, layout, split)
        serving = Serving(model, mine)
        serving.step([], [], [18, 5])
        serving.step(serving.accept(0), [3, 1], [30])
        serving.step(serving.accept(2), [6, 2, 4], [9], logits="last")
        serving.step(serving.accept(5)[1:], [2, 5, 3], [20], chunk_tokens=11)
        serving.step(serving.accept(2), [4, 1, 2, 6], [], logits="last")
        serving.step(serving.accept(4)[:2], [33, 2], [7], logits="last", chunk_tokens=40)

    play(world_size, call)


def test_a_step_of_drafts_alone_has_no_collective(model: Any) -> None:
    """By ``prefill``, and by calls of the model with up to 32 tokens behind what it has."""
    met: list[str] = []
    meet = PlayedGroup._meet
    chunk = forward._DECODE_TOKENS

    def call(group: Any) -> None:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        serving = Serving(model, mine)
        serving.step([], [], [40, 7])
        before = len(met)
        serving.step(serving.accept(3), [5, 2], [])
        serving.step([(0, 40), (0, 12), (1, 6)], [1, 9, 3], [], logits="last")
        text = torch.tensor(prompts([90]))
        cache = mine(text[:, :20])[CACHE_WORD]
        assert len(met) > before
        for first, last, alone in ((20, 20 + chunk, True), (20 + chunk, 21 + 2 * chunk, False), (21 + 2 * chunk, 90, True)):
            before = len(met)
            logits = mine(text[:, first:last], **{CACHE_WORD: cache}).logits[0]
            check_close(logits, wanted[first:last])
            assert (len(met) == before) == alone
        assert before > 0

    wanted = stock_logits(model, prompts([90]))
    with mock.patch.object(PlayedGroup, "_meet", lambda group, op, *rest: met.append(op) or meet(group, op, *rest)):
        play(2, call)


@pytest.mark.parametrize("world_size", [1, 2])
def test_drafts_through_a_module_that_is_called(model: Any, world_size: int) -> None:
    """Whose hook makes a decode step expand its keys: causal within the draft."""

    def call(group: Any) -> None:
        mine = copy_sharing_weights(model)
        for layer in mine.model.layers:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
        enable_pcp(mine, group)
        serving = Serving(model, mine)
        serving.step([], [], [18, 5])
        serving.step(serving.accept(2), [4, 3], [])
        serving.step(serving.accept(2), [2, 5], [12], logits="last")

    play(world_size, call)


def test_last_rows_of_drafts_alone_are_projected(model: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    projected: list[int] = []
    prefill(mine, prompts([12, 20]))
    mine.lm_head.register_forward_pre_hook(lambda _, inputs: projected.append(inputs[0].numel() // inputs[0].shape[-1]))
    prefix = [(0, 12), None, (1, 20)]
    prefill(mine, prompts([4, 30, 2]), prefix=prefix, decodes=[True, False, True], logits="last", chunk_tokens=16)
    assert sum(projected) == 4 + 1 + 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_last_logits_are_rows_of_all(model: Any, world_size: int) -> None:
    """Of the same hidden states; a matrix library may add up the products of a row otherwise, by how many there are."""

    def call(group: Any) -> None:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        whole, last = (prefill(mine, prompts([9, 1, 30]), logits=logits) for logits in ("all", "last"))
        assert last.shape == (3, 50)
        error = (last - whole[[8, 9, 39]]).abs().max() / whole.abs().max()
        assert error <= torch.finfo(last.dtype).eps * 48**0.5

    play(world_size, call)


def test_decodes_that_are_none(model: Any) -> None:
    mine = copy_sharing_weights(model)
    blocks = enable_pcp(mine).blocks
    prefill(mine, prompts([9]))
    free = len(blocks._free)
    message = "prefill: decodes must be a list with a bool for each of the 1 requests, got"
    for decodes in ([1], "a", 5):
        with pytest.raises(TypeError, match=message):
            prefill(mine, [[1]], prefix=[(0, 9)], decodes=decodes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefill: decodes must have a bool for each of the 1 requests, got 2"):
        prefill(mine, [[1]], prefix=[(0, 9)], decodes=[True, False])
    for prefix in (None, [(0, 9), None], [(0, 9), (0, 0)]):
        bare = 0 if prefix is None else 1
        with pytest.raises(ValueError, match=f"prefill: decodes must have a prefix, .*, got none for request {bare}"):
            prefill(mine, [[1], [2]], prefix=prefix, decodes=[True, True])
    assert len(blocks._free) == free


# Steps of captured sizes.


def drafted(model: Any, mine: Any) -> int:
    """Steps of drafts and of one token each, alone and beside prompts, and crops: how many there are."""
    serving = Serving(model, mine)
    serving.step([], [], [18, 5])
    serving.step(serving.accept(0), [3, 1], [30])
    serving.step(serving.accept(2), [2, 4, 1], [])
    serving.step(serving.accept(3), [1, 1, 1], [])
    serving.step(serving.accept(1), [5, 3, 6], [8], logits="last")
    cache, text = DynamicCache(config=mine.config), prompts([60])
    for first, last, crop in ((0, 21, 0), (21, 26, 3), (23, 30, 6), (24, 25, 0), (25, 33, 8), (25, 40, 0)):
        logits = mine(torch.tensor([text[0][first:last]], device=mine.device), **{CACHE_WORD: cache}).logits[0]
        check_close(logits, behind(model, text[0][:first], text[0][first:last]))
        cache.crop(-crop)
    return 11


# (local tokens of the fullest rank, keys), (tokens, keys). The copies of drafts of four ranks do not fit 66 keys.
PREFILLS, DECODES = [(20, 66), (64, 200)], [(4, 80), (16, 200)]


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_padded_steps_call_by_call(model: Any, world_size: int, layout: str, recorded: list[str]) -> None:  # noqa: F811
    """The captured sizes without the graphs: each step finds one that has room, drafts and copies of decodes counted."""

    @torch.no_grad()
    def rank(group: Any) -> tuple[int, int]:
        mine = copy_sharing_weights(model)
        context = enable_pcp(mine, group, layout)
        prefill(mine, prompts([300]))
        context.captured = captured.CapturedSteps(mine, context, False, PREFILLS, 16)
        context.captured_decodes = captured.CapturedSteps(mine, context, True, DECODES, 16)
        taken = 0
        for steps in (context.captured, context.captured_decodes):
            steps._cache = lambda: None

            def counted(*arguments: Any, call: Any = steps._call) -> torch.Tensor:
                nonlocal taken
                taken += 1
                return call(*arguments)

            steps._call = counted  # type: ignore[method-assign]
        return drafted(model, mine), taken

    for steps, taken in play(world_size, rank):
        assert taken == steps


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_replays_of_drafts(world_size: int, layout: str) -> None:
    """Graphs go on over a cache that was cropped."""
    model = build("v3", first_k_dense_replace=3).cuda()

    def rank(group: Any) -> tuple[int, int]:
        mine = copy_sharing_weights(model)
        context = enable_pcp(mine, group, layout)
        drafted(model, mine)  # kernels compile
        capture_graphs(mine, prefill_sizes=PREFILLS, decode_sizes=DECODES, max_requests=16)
        replays = 0
        for steps in (context.captured, context.captured_decodes):
            for capture in steps._captures:

                def counted(replay: Any = capture.graph.replay) -> None:
                    nonlocal replays
                    replays += 1
                    replay()

                capture.graph.replay = counted
        return drafted(model, mine), replays

    for steps, replays in play(world_size, rank):
        assert replays == steps


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("helper", ["prompt lookup", "another model"])
def test_assisted_generation_by_graphs(helper: str, world_size: int) -> None:
    """The text is that of plain greedy generation; its drafts are replayed, its cache is cropped in between."""
    model, small = build("v3", first_k_dense_replace=3).cuda(), build("v3", num_hidden_layers=1).cuda()
    for one in (model, small):
        one.generation_config.eos_token_id = None
    ids = torch.tensor(prompts([6]), device="cuda").repeat(1, 4)
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(ids, **options)
    never = min(set(range(50)) - set(wanted[0].tolist()))
    chosen: dict[str, Any] = {"prompt_lookup_num_tokens": 4} if helper == "prompt lookup" else {"assistant_model": small}

    def rank(group: Any) -> None:
        mine, replays = copy_sharing_weights(model), 0
        context = enable_pcp(mine, group)
        mine.generate(ids, **options)
        capture_graphs(mine, decode_sizes=[(1, 200), (8, 200), (24, 200)], max_requests=24)
        for capture in context.captured_decodes._captures:

            def counted(replay: Any = capture.graph.replay) -> None:
                nonlocal replays
                replays += 1
                replay()

            capture.graph.replay = counted
        assert torch.equal(mine.generate(ids, **options, **chosen, eos_token_id=never), wanted)
        assert replays
        assert torch.equal(mine.generate(ids, **options), wanted)

    with mock.patch.object(PCPCache, "crop", autospec=True, side_effect=PCPCache.crop) as crops:
        play(world_size, rank)
    assert crops.call_count


# Assisted generation.


@pytest.mark.parametrize("world_size", [1, 2])
def test_drafts_of_a_batch(model: Any, world_size: int) -> None:
    """A loop as a user may write it, with drafts by chance: greedy texts, whatever was drafted."""
    first, wanted_tokens = prompts([11, 4, 20]), 12
    wanted = [model.generate(torch.tensor([text]), max_new_tokens=wanted_tokens, do_sample=False)[0, len(text) :] for text in first]

    def call(group: Any) -> list[list[int]]:
        mine, chance = copy_sharing_weights(model), random.Random(1)
        enable_pcp(mine, group)
        texts = [[*text, token] for text, token in zip(first, prefill(mine, first, logits="last").argmax(-1).tolist(), strict=True)]
        done = [len(text) for text in first]
        while min(len(text) - len(start) for text, start in zip(texts, first, strict=True)) < wanted_tokens:
            drafts = []
            for text, start, answer in zip(texts, first, wanted, strict=True):
                right = answer[len(text) - len(start) :][: chance.randint(0, 3)].tolist()
                drafts.append(text[-1:] + right + [chance.randrange(50) for _ in range(chance.randint(0, 2))])
            logits = prefill(mine, drafts, prefix=list(enumerate(done)), decodes=[True] * 3)
            for i, rows in enumerate(logits.argmax(-1).split([len(draft) for draft in drafts])):
                likeliest, accepted = rows.tolist(), 0
                while accepted + 1 < len(drafts[i]) and drafts[i][accepted + 1] == likeliest[accepted]:
                    accepted += 1
                texts[i] += likeliest[: accepted + 1]
                done[i] += accepted + 1
        decode(mine, [1, 2, 3])
        return [text[len(start) :][:wanted_tokens] for text, start in zip(texts, first, strict=True)]

    for got in play(world_size, call):
        assert got == [answer.tolist() for answer in wanted]


@pytest.mark.parametrize("world_size", [1, 2])
def test_slots_of_cropped_drafts_are_taken_again(model: Any, world_size: int) -> None:
    """Beside a copy that shares the beginning, and stays: no more blocks than the tokens need, on every rank."""
    text = prompts([60])[0]
    wanted = stock_logits(model, [text])

    def call(mine: Any) -> tuple[list[list[int]], int]:
        blocks, cache = mine.__dict__["_pcp"].blocks, DynamicCache(config=mine.config)
        mine(torch.tensor([text[:21]]), **{CACHE_WORD: cache})
        other, tables = copy.copy(cache), []
        for start in range(21, 52, 2):
            wrong = [(token + 1) % 50 for token in text[start + 2 : start + 8]]
            logits = mine(torch.tensor([text[start : start + 2] + wrong]), **{CACHE_WORD: cache}).logits[0, :2]
            check_close(logits, wanted[start : start + 2])
            cache.crop(-6)
            assert cache.requests.lengths == [start + 2]
            used = {block for requests in (cache.requests, other.requests) for row in requests.blocks for block in row}
            assert len(blocks._free) == blocks.cache.shape[1] - len(used)
            tables.append(list(cache.requests.blocks[0]))
        check_close(mine(torch.tensor([text[21:30]]), **{CACHE_WORD: other}).logits[0], wanted[21:30])
        return tables, blocks.cache.shape[1]

    results = on_ranks(model, world_size, call)
    for tables, size in results:
        assert all(len(table) == -(-(23 + 2 * i) // 16) for i, table in enumerate(tables))
        assert size == results[0][1]


@pytest.mark.parametrize("tokens", [0, 32])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_few_tokens_are_cut_or_not(model: Any, world_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the model with pads, whose requests have up to seven tokens behind others, one of them none in the last call."""
    monkeypatch.setattr(forward, "_DECODE_TOKENS", tokens)
    generator = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(50, (3, 26), generator=generator), (torch.rand(3, 26, generator=generator) < 0.8).long()
    mask[:, 0] = mask[:, -8] = 1
    mask[1, -7:] = 0

    def call(model: Any) -> torch.Tensor:
        cache, logits = DynamicCache(config=model.config), []
        for columns in (slice(0, 10), slice(10, 17), slice(17, 19), slice(19, 26)):
            out = model(ids[:, columns], attention_mask=mask[:, : columns.stop], **{CACHE_WORD: cache})
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        wanted = call(model)[mask.bool()]
    for got in on_ranks(model, world_size, call):
        check_close(got[mask.bool()], wanted)
