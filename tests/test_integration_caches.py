"""Caches of a model under PCP, also those that the caller made: they do what transformers' own do, and say what they cannot."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from pcp_mla.integrations.transformers import PCPCache, copy_sharing_weights, disable_pcp, enable_pcp
from pcp_mla.integrations.transformers.caches import CACHE_WORD
from test_integration_forward import PAD, on_ranks, padded
from test_integration_transformers import build, check_close, prompts


@pytest.fixture(scope="module", params=["v3", "v2"])
def model(request: pytest.FixtureRequest) -> Any:
    model = build(request.param)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def under_pcp(model: Any) -> Any:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    return mine


def row(*lengths: int) -> torch.Tensor:
    return torch.tensor(prompts(list(lengths)))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("lengths", [[5], [4, 9]], ids=["one", "padded batch"])
@pytest.mark.parametrize("configured", [True, False])
def test_a_conversation_in_a_cache_of_the_caller(model: Any, configured: bool, lengths: list[int], world_size: int) -> None:
    def talk(model: Any) -> tuple[list[torch.Tensor], list[int]]:
        cache = DynamicCache(config=model.config) if configured else DynamicCache()
        text, mask = padded(prompts(lengths))
        answers, columns = [], []
        for turn in range(3):
            asked = row(*[3 + turn] * len(lengths))
            text = torch.cat([text, asked], 1)
            mask = torch.cat([mask, torch.ones(len(lengths), text.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
            text = model.generate(text, attention_mask=mask, **{CACHE_WORD: cache}, max_new_tokens=4, do_sample=False)
            answers.append(text)
            columns.append(int(cache.get_seq_length()))
        return answers, columns

    wanted, lengths_wanted = talk(model)
    for got, columns in on_ranks(model, world_size, talk):
        assert columns == lengths_wanted
        assert all(map(torch.equal, got, wanted))


CHANGES = {
    "crop": lambda cache: cache.crop(-4),
    "crop into the first block": lambda cache: cache.crop(-15),
    "crop all": lambda cache: cache.crop(-18),
    "no change": lambda cache: None,
    "crop twice": lambda cache: (cache.crop(-2), cache.crop(-5)),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "repeat, crop": lambda cache: (cache.batch_repeat_interleave(2), cache.crop(-6)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_a_cache_are_those_of_the_stock_one(model: Any, change: Any) -> None:
    """Then it goes on as the stock model's does."""
    ids = row(18, 18)

    def changed(model: Any) -> tuple[list[torch.Tensor], int]:
        cache = DynamicCache(config=model.config)
        logits = []
        for columns in (slice(0, 11), slice(11, 18)):
            logits.append(model(ids[:, columns], **{CACHE_WORD: cache}).logits)
        change(cache)
        length = int(cache.get_seq_length())
        batch = {"select": 1, "repeat": 4, "repeat, crop": 4}.get(name, 2)
        for new in (row(*[5] * batch), row(*[1] * batch)):
            logits.append(model(new, **{CACHE_WORD: cache}).logits)
        return logits, length

    name = next(name for name, known in CHANGES.items() if known is change)
    with torch.no_grad():
        wanted, length = changed(model)
    for got, columns in on_ranks(model, 2, changed):
        assert columns == length
        for one, other in zip(got, wanted, strict=True):
            check_close(one, other)


def test_a_reset_cache_begins_anew(model: Any) -> None:
    mine, cache = under_pcp(model), DynamicCache(config=model.config)
    mine(row(9, 9), **{CACHE_WORD: cache})
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    with torch.no_grad():
        check_close(mine(row(7), **{CACHE_WORD: cache}).logits, model(row(7)).logits)
    cache.crop(3)  # a positive number is what is left
    assert cache.get_seq_length() == 3
    for count in (5, 0):
        cache.crop(count)
        assert cache.get_seq_length() == 3


@pytest.mark.parametrize("left", [True, False])
def test_crop_counts_columns_and_keeps_tokens(model: Any, left: bool) -> None:
    """Of requests with pads; a request may lose all its tokens."""
    ids, mask = padded(prompts([2, 11, 20]), left)
    further = row(4, 4, 4)
    for columns in (19, 7, 1):

        def call(model: Any, columns: int = columns) -> torch.Tensor:
            cache = model(ids, attention_mask=mask)[CACHE_WORD]
            cache.crop(columns - 20)
            whole = torch.cat([mask[:, :columns], torch.ones_like(further)], 1)
            return model(further, attention_mask=whole, **{CACHE_WORD: cache}).logits

        with torch.no_grad():
            wanted = call(model)
        for got in on_ranks(model, 2, call):
            check_close(got, wanted)


def test_crop_leaves_shared_blocks_alone(model: Any) -> None:
    """Two caches over the same full blocks: what one writes after a crop is not what the other reads."""
    mine = under_pcp(model)
    blocks = mine.__dict__["_pcp"].blocks
    ids, tails = row(48), [row(9), row(5)]
    with torch.no_grad():
        wanted = [model(torch.cat([ids[:, :36], tails[0]], 1)).logits[:, 36:], model(torch.cat([ids, tails[1]], 1)).logits[:, 48:]]
    cache = mine(ids)[CACHE_WORD]
    other = copy.deepcopy(cache)
    assert len(blocks._free) == blocks.cache.shape[1] - 3  # shared
    cache.crop(-12)
    check_close(mine(tails[0], **{CACHE_WORD: cache}).logits, wanted[0])
    check_close(mine(tails[1], **{CACHE_WORD: other}).logits, wanted[1])
    cache.crop(-1)
    assert other.requests.lengths == [53]
    del cache, other
    gc.collect()
    assert set(blocks._users) == {0}
    assert len(blocks._free) == len(set(blocks._free)) == blocks.cache.shape[1]


ASKED = ["is_initialized", "is_sliding", "is_linear", "is_compileable", "is_croppable", "batch_size", "__len__", "get_max_length"]


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_answers_as_the_stock_one(model: Any, filled: bool) -> None:
    mine, ours, stock = under_pcp(model), DynamicCache(config=model.config), DynamicCache(config=model.config)
    for m, cache in ((mine, ours), (model, stock)):
        m(row(5, 5), **{CACHE_WORD: cache})
        if not filled:
            cache.crop(-5)
    asked = [name for name in ASKED if hasattr(DynamicCache, name)]
    assert len(asked) >= 4
    for name in asked:
        if name == "is_initialized" and not filled:  # a stock cache without columns says yes
            continue
        got, wanted = getattr(ours, name), getattr(stock, name)
        assert (got() if callable(got) else got) == (wanted() if callable(wanted) else wanted), name
    assert ours.get_seq_length() == ours.get_seq_length(1) == stock.get_seq_length()
    assert isinstance(ours, DynamicCache)
    assert repr(ours)
    with pytest.raises(NotImplementedError, match="PCPCache: its layers have no keys and values"):
        next(iter(ours))
    with pytest.raises(NotImplementedError, match="PCPCache: its layers"):
        ours.layers[0].crop(-1)
    with pytest.raises(TypeError, match="PCPCache: cannot be pickled"):
        pickle.dumps(ours)


def test_caches_that_are_refused(model: Any) -> None:
    """At once, by name, and they stay as they are."""
    mine, ids = under_pcp(model), row(6)

    class Another(DynamicCache):
        pass

    sliding = copy.deepcopy(model.config)
    sliding.sliding_window = 4
    sliding.layer_types = ["sliding_attention"] * sliding.num_hidden_layers
    kinds = [
        (StaticCache(config=model.config, max_cache_len=32), "got StaticCache"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "got EncoderDecoderCache"),
        (Another(), "got Another"),
        (DynamicCache(config=sliding), r"got DynamicCache \(offloaded or sliding\)"),
        ((), "got tuple"),
    ]
    for cache, message in kinds:
        with pytest.raises(NotImplementedError, match=rf"forward: {CACHE_WORD} must be None, a DynamicCache or .*, {message}"):
            mine(ids, **{CACHE_WORD: cache})
        assert not hasattr(cache, "context")
    with pytest.raises(NotImplementedError, match="got StaticCache"):
        mine.generate(ids, max_new_tokens=2, cache_implementation="static")
    filled = model(ids, use_cache=True)[CACHE_WORD]
    with pytest.raises(TypeError, match=f"forward: {CACHE_WORD} must be of a model under PCP or empty, got a filled DynamicCache"):
        mine(ids, **{CACHE_WORD: filled})
    assert filled.get_seq_length() == 6
    blocks = mine.__dict__["_pcp"].blocks
    assert len(blocks._free) == blocks.cache.shape[1]


def test_a_cache_goes_to_its_model_only(model: Any) -> None:
    mine, other, ids = under_pcp(model), under_pcp(model), row(6)
    cache = DynamicCache(config=model.config)
    mine(ids, **{CACHE_WORD: cache})
    with pytest.raises(ValueError, match=f"forward: {CACHE_WORD} must be of this model since it is under PCP, got another's"):
        other(ids, **{CACHE_WORD: cache})
    refused = f"PCPCache: {CACHE_WORD} must go to the model under PCP that filled it"
    with pytest.raises(ValueError, match=refused):
        model(ids, **{CACHE_WORD: cache})
    assert cache.get_seq_length() == 6
    disable_pcp(mine)
    with pytest.raises(ValueError, match=refused):
        mine.generate(row(8), **{CACHE_WORD: cache}, max_new_tokens=2)
    enable_pcp(mine)
    with pytest.raises(ValueError, match="since it is under PCP"):
        mine(ids, **{CACHE_WORD: cache})
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_failed_call_leaves_the_callers_cache(model: Any) -> None:
    mine, cache, ids = under_pcp(model), DynamicCache(config=model.config), row(6)
    with mock.patch.object(mine.model, "forward", side_effect=KeyError), pytest.raises(KeyError):
        mine(ids, **{CACHE_WORD: cache})
    assert type(cache) is DynamicCache
    assert model(ids, **{CACHE_WORD: cache})[CACHE_WORD] is cache  # a stock model's still


def test_a_given_cache_is_filled_also_without_use_cache(model: Any) -> None:
    mine, ids = under_pcp(model), row(6)
    for m in (mine, model):
        cache = DynamicCache(config=m.config)
        assert m(ids, **{CACHE_WORD: cache}, use_cache=False)[CACHE_WORD] is cache
        assert cache.get_seq_length() == 6


def test_both_words(model: Any) -> None:
    mine, ids = under_pcp(model), row(6)
    with torch.no_grad():
        wanted = model(ids).logits[:, 4:]
    for word in ("past_key_values", "cache"):
        cache = DynamicCache()
        mine(ids[:, :4], **{word: cache})
        assert isinstance(cache, PCPCache)
        check_close(mine(ids[:, 4:], **{word: cache}).logits, wanted)
    with pytest.raises(TypeError, match="forward: cache must be given once, got cache and past_key_values"):
        mine(ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("helper", ["prompt lookup", "the model itself", "another model"])
def test_assisted_generation(model: Any, helper: str, world_size: int) -> None:
    """Its candidates are cropped off the cache again where the model chooses otherwise."""
    ids = row(6).repeat(1, 4)
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **options)
    never = min(set(range(50)) - set(wanted[0].tolist()))  # a prompt lookup wants to know an end
    small = build("v3", num_hidden_layers=1)
    small.generation_config.eos_token_id = None
    crops: list[int] = []
    crop = PCPCache.crop

    def text(model: Any) -> torch.Tensor:
        chosen = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "the model itself": {"assistant_model": model},
            "another model": {"assistant_model": small},
        }
        return model.generate(ids, **options, **chosen[helper], eos_token_id=never)

    with mock.patch.object(PCPCache, "crop", lambda cache, count: crops.append(count) or crop(cache, count)):
        for got in on_ranks(model, world_size, text):
            assert torch.equal(got, wanted)
    assert crops


def test_compiled_without_noise(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is not traced, and no half-made cache complains when it goes; what was compiled by itself is called so."""
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    mine, cache, ids = under_pcp(model), DynamicCache(config=model.config), row(9)
    with torch.no_grad():
        wanted = model(ids).logits
    graphs: list[Any] = []
    mine.model.layers[0].mlp.compile(backend=lambda module, inputs: graphs.append(module) or module.forward)
    compiled = torch.compile(mine, backend="eager")
    check_close(compiled(ids).logits, wanted)
    assert len(graphs) == 1
    compiled(ids[:, :5], **{CACHE_WORD: cache})
    check_close(compiled(ids[:, 5:], **{CACHE_WORD: cache}).logits, wanted[:, 5:])
    del compiled
    object.__new__(PCPCache).__del__()
    gc.collect()
    assert not ignored
