"""A model under PCP called as any other: forward, past_key_values, and transformers' own generate."""

from __future__ import annotations

import copy
import gc
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import DynamicCache

from pcp_mla.integrations.transformers import PCPCache, copy_sharing_weights, disable_pcp, enable_pcp, generate, prefill
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
from test_integration_transformers import build, check_close, prompts

LENGTHS = [13, 1, 30, 8]
PAD = 0


def padded(requests: list[list[int]], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask of a batch."""
    width = max(map(len, requests))
    pads = [[PAD] * (width - len(request)) for request in requests]
    ids = [p + r if left else r + p for p, r in zip(pads, requests, strict=True)]
    mask = [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in zip(pads, requests, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture(scope="module", params=["v3", "v2"])
def model(request: pytest.FixtureRequest) -> Any:
    model = build(request.param, **({"q_lora_rank": None} if request.param == "v2" else {}))
    model.generation_config.pad_token_id = PAD
    return model


def on_ranks(model: Any, world_size: int, call: Any) -> list[Any]:
    """``call(model under PCP)`` on every rank."""

    def rank(group: Any) -> Any:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        with torch.inference_mode():
            return call(mine)

    return play(world_size, rank)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prefill_chunk_size": 7},
        {"use_cache": False},
        {"repetition_penalty": 1.2},
    ],
    ids=["greedy", "beams", "chunks", "no cache", "penalty"],
)
def test_generate_is_that_of_the_stock_model(model: Any, world_size: int, options: dict[str, Any]) -> None:
    ids, mask = padded(prompts(LENGTHS))
    options = {"max_new_tokens": 9, "do_sample": False} | options

    def text(model: Any) -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, **options)

    wanted = text(model)
    for got in on_ranks(model, world_size, text):
        assert torch.equal(got, wanted)


def test_generate_stops(model: Any) -> None:
    """At a token that some requests come to and others do not, by both ways of generating."""
    requests = prompts(LENGTHS)
    ids, mask = padded(requests)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)[:, ids.shape[1] :]
    stop = int(free[0, 4])
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=stop)
    rows = wanted[:, ids.shape[1] :].tolist()
    assert sum(stop in row[:-1] for row in rows) in range(1, len(rows))

    def both(model: Any) -> tuple[torch.Tensor, list[list[int]], list[list[int]]]:
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=stop)
        ours = generate(model, requests, 9, eos_token_id=[stop])
        prefill(model, [requests[2][:11]])
        prefix: list[Any] = [None, None, (0, 11), None]
        rest = [request[11:] if i == 2 else request for i, request in enumerate(requests)]
        return whole, ours, generate(model, rest, 9, eos_token_id=stop, chunk_tokens=6, prefix=prefix)

    cut = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    for whole, ours, chunked in on_ranks(model, 2, both):
        assert torch.equal(whole, wanted)
        assert ours == chunked == cut


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("keep", [0, 1, torch.tensor([3, 12])])
def test_forward_of_a_padded_batch(model: Any, left: bool, keep: Any) -> None:
    ids, mask = padded(prompts(LENGTHS), left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep).logits
    real = mask.bool()[:, -keep:] if isinstance(keep, int) else mask.bool()[:, keep]
    for given in (positions, None):
        got = on_ranks(model, 2, lambda m, given=given: m(ids, attention_mask=mask, position_ids=given, logits_to_keep=keep))
        for out in got:
            assert out.logits.shape == wanted.shape
            check_close(out.logits[real], wanted[real])


def test_a_conversation_goes_on_in_its_cache(model: Any) -> None:
    """Second prompts behind the first answers, by the cache alone: nothing is read again. The cache of a call stays usable."""
    first, second = padded(prompts([6, 11])), padded(prompts([4, 4]))

    def talk(model: Any) -> list[torch.Tensor]:
        ids, mask = first
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, second[0]], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        again = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=5, do_sample=False)
        return [out.sequences, again]

    wanted = talk(model)
    for got in on_ranks(model, 2, talk):
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


def test_blocks_go_with_the_cache(model: Any) -> None:
    mine = copy_sharing_weights(model)
    blocks = enable_pcp(mine).blocks
    out = mine(torch.tensor([[1, 2, 3]]))
    cache = out.past_key_values
    assert isinstance(cache, PCPCache)
    assert cache.get_seq_length() == 3
    assert len(blocks._free) == blocks.cache.shape[1] - 1
    before = cache.requests
    with mock.patch.object(mine.model, "forward", side_effect=RuntimeError), pytest.raises(RuntimeError):
        mine(torch.tensor([[1]]), past_key_values=cache)
    assert cache.requests is before
    assert mine(torch.tensor([[4]]), past_key_values=cache).past_key_values is cache
    assert cache.requests.lengths == [4]
    assert mine(torch.tensor([[4]]), use_cache=False).past_key_values is None
    assert len(blocks._free) == blocks.cache.shape[1] - 1
    cache.reset()
    assert (cache.get_seq_length(), len(blocks._free)) == (0, blocks.cache.shape[1])
    mine(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    del out, cache, before
    gc.collect()
    assert len(blocks._free) == blocks.cache.shape[1]
    assert set(blocks._users) == {0}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_cache_goes_its_own_way(model: Any, duplicate: Any) -> None:
    """A prompt read once, and two answers to it."""
    mine = copy_sharing_weights(model)
    blocks = enable_pcp(mine).blocks
    prompt, tails = torch.tensor([prompts([21])[0]]), [torch.tensor([prompts([5])[0]]), torch.tensor([prompts([9])[0]])]
    cache = mine(prompt).past_key_values
    caches = [duplicate(cache), cache]
    for tail, past in zip(tails, caches, strict=True):
        with torch.no_grad():
            wanted = model(torch.cat([prompt, tail], 1)).logits[:, 21:]
        check_close(mine(tail, past_key_values=past).logits, wanted)
    assert [past.requests.lengths for past in caches] == [[26], [30]]
    del cache, past
    caches.clear()
    gc.collect()
    assert set(blocks._users) == {0}


@pytest.mark.parametrize("filled", [False, True])
def test_pads_alone_and_a_cache_of_the_caller(model: Any, filled: bool) -> None:
    """A first call of nothing but pads, or of tokens, into an empty cache that transformers made, which stands for ours then."""
    ids, mask = padded(prompts([4, 11]))
    width = 3 if not filled else 8
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits

    def in_two(model: Any) -> torch.Tensor:
        cache = DynamicCache()
        first = model(ids[:1, :width], attention_mask=mask[:1, :width], past_key_values=cache)
        assert first.logits.shape == (1, width, wanted.shape[2])
        return model(ids[:1, width:], attention_mask=mask[:1], past_key_values=cache).logits

    for got in on_ranks(model, 2, in_two):
        real = mask[0, width:].bool()
        check_close(got[0, real], wanted[0, width:][real])


def test_decode_with_a_projection_that_is_not_plain(model: Any) -> None:
    """It is called, on all keys, where a plain one's weight is applied to the queries."""
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, inputs, out: out * 1.5)
    prompt = torch.tensor([prompts([9])[0]])
    with torch.no_grad():
        wanted = other(prompt).logits[:, 5:]
    enable_pcp(other)
    cache = other(prompt[:, :5]).past_key_values
    for step in range(5, 9):
        check_close(other(prompt[:, step : step + 1], past_key_values=cache).logits, wanted[:, step - 5 : step - 4])


def generate_in_a_process(group: Any) -> list[list[int]]:
    model = build("v3")
    enable_pcp(model, group)
    ids, mask = padded(prompts(LENGTHS))
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=PAD).tolist()


def test_generate_in_processes() -> None:
    ids, mask = padded(prompts(LENGTHS))
    wanted = build("v3").generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=PAD).tolist()
    assert run_distributed(2, generate_in_a_process) == [wanted, wanted]


def test_errors(model: Any) -> None:
    mine, other = copy_sharing_weights(model), copy_sharing_weights(model)
    enable_pcp(mine)
    enable_pcp(other)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits, cache = mine(ids, return_dict=False)
    assert torch.equal(logits, mine(ids).logits)
    assert cache.get_seq_length() == 3
    for options, error, message in [
        ({"labels": ids}, NotImplementedError, "forward: labels not supported"),
        ({"output_hidden_states": True}, NotImplementedError, "forward: output_hidden_states not supported"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask must be .* = \(2, 3\), got \(2, 4\)"),
        ({"position_ids": torch.tensor([[0, 1]])}, ValueError, r"position_ids must be \(2, 3\) or \(1, 3\), got \(1, 2\)"),
        ({"past_key_values": model(ids).past_key_values}, TypeError, "must be of a model under PCP or empty, got a filled"),
        ({"past_key_values": mine(ids[:1]).past_key_values}, ValueError, "input_ids must have the 1 requests of the cache, got 2"),
        ({"past_key_values": other(ids).past_key_values}, ValueError, "must be of this model since it is under PCP"),
    ]:
        with pytest.raises(error, match=message):
            mine(ids, **options)
    with pytest.raises(ValueError, match=r"forward: requests must hold token ids in 0\.\.49, got 50 in request 0"):
        mine(torch.tensor([[1, 50]]))
    with pytest.raises(TypeError, match="generate: eos_token_id must be an int, a list of ints or None, got str"):
        generate(mine, [[1]], 2, eos_token_id=[1, "2"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"input_ids must be a tensor \[batch, tokens\], got NoneType"):
        mine(inputs_embeds=None)
    disable_pcp(mine)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, model(ids).logits)
