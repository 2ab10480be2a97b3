"""What calls of a model under PCP are given: masks and positions, token ids, options of the config, dtypes."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from pcp_mla.integrations.transformers import (
    capture_graphs,
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
from pcp_mla.testing.played import play
from test_integration_forward import on_ranks
from test_integration_transformers import build, check_close, prompts, stock_logits


@pytest.fixture(scope="module", params=["v3", "v2"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def free_blocks() -> Any:
    """Free blocks of a model under PCP, of all that it has."""
    return lambda model: (len(model.__dict__["_pcp"].blocks._free), model.__dict__["_pcp"].blocks.cache.shape[1])


def masked(seed: int, batch: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask with holes and pads wherever they fall; each request begins with a token, as the stock model wants."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, width, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    return torch.randint(50, (batch, width), generator=generator), mask


# Masks and positions.


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_masks_with_holes(model: Any, world_size: int, given: bool) -> None:
    """In two calls and a decode. Positions count columns, or are those given, however they jump."""
    ids, mask = masked(3, 3, 17)
    mask[:, -1] = 1
    positions = torch.randint(40, ids.shape, generator=torch.Generator().manual_seed(1)) if given else None
    calls = [slice(0, 9), slice(9, 16), slice(16, 17)]

    def call(model: Any) -> torch.Tensor:
        cache, logits = None, []
        for columns in calls:
            at = None if positions is None else positions[:, columns]
            out = model(ids[:, columns], attention_mask=mask[:, : columns.stop], position_ids=at, **{CACHE_WORD: cache})
            cache = out[CACHE_WORD]
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        wanted = call(model)[mask.bool()]
    for got in on_ranks(model, world_size, call):
        check_close(got[mask.bool()], wanted)


def test_right_pads_then_more(model: Any) -> None:
    """Between a request's tokens there are pads then."""
    ids, mask = masked(5, 2, 12)
    mask[:] = torch.tensor([[1] * 4 + [0] * 4 + [1] * 4, [1] * 12])

    def call(model: Any) -> torch.Tensor:
        cache = model(ids[:, :8], attention_mask=mask[:, :8])[CACHE_WORD]
        return model(ids[:, 8:], attention_mask=mask, **{CACHE_WORD: cache}).logits

    with torch.no_grad():
        wanted = call(model)
    for got in on_ranks(model, 2, call):
        check_close(got, wanted)


def test_masks_that_do_not_fit(model: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    ids = torch.tensor([prompts([4])[0]])
    cache = mine(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]))[CACHE_WORD]
    with pytest.raises(ValueError, match=r"forward: attention_mask must have what it had before for .*, got a change"):
        mine(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]), **{CACHE_WORD: cache})  # as many tokens
    with pytest.raises(ValueError, match="forward: attention_mask must be given, as the cache has pads, got None"):
        mine(ids, **{CACHE_WORD: cache})
    with pytest.raises(NotImplementedError, match="forward: position_ids that jump, without mask and cache, are packed sequences"):
        mine(ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
    assert cache.requests.lengths == [3]


@pytest.mark.parametrize(
    "keep",
    [1, 5, 40, torch.tensor([11, 0, 4]), torch.tensor([[0, 7], [3, 3], [11, 1]]), torch.eye(3, 12, dtype=torch.bool)],
    ids=["one", "five", "more than there are", "columns", "columns of each", "mask"],
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_kept_logits_alone_are_exchanged(model: Any, world_size: int, keep: Any) -> None:
    ids, mask = masked(7, 3, 12)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    if isinstance(keep, int):
        wanted, real = logits[:, -keep:], mask[:, -keep:].bool()
    elif keep.dtype == torch.bool:
        wanted, real = logits[keep], mask[keep].bool()
    else:
        columns = keep.expand(3, -1)
        wanted, real = logits[torch.arange(3)[:, None], columns], mask.gather(1, columns).bool()
    exchanged: list[int] = []
    gather = model_step.all_gather_rows
    with mock.patch.object(model_step, "all_gather_rows", lambda x, group: exchanged.append(x.shape[0]) or gather(x, group)):
        outs = on_ranks(model, world_size, lambda model: model(ids, attention_mask=mask, logits_to_keep=keep).logits)
    for got in outs:
        assert got.shape == wanted.shape
        check_close(got[real], wanted[real])
    if real.sum() <= 3:  # fewer than a rank has
        assert set(exchanged) == {int(real.sum())} - {0}


@pytest.mark.parametrize("keep", [slice(1), 1.0, [1]])
def test_kept_logits_that_are_none(model: Any, keep: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    with pytest.raises(
        TypeError, match=f"forward: logits_to_keep must be an int or a tensor of columns, got {type(keep).__name__}"
    ):
        mine(torch.tensor([[1, 2]]), logits_to_keep=keep)
    assert mine(torch.tensor([[1, 2]]), logits_to_keep=np.int64(1)).logits.shape[1] == 1


def test_arguments_by_name(model: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(model=mine)
    logits = prefill(model=mine, requests=[[1, 2, 3]])
    assert torch.equal(prefill(mine, [[1, 2, 3]]), logits)
    assert extend(model=mine, requests=[[4]]).shape[0] == decode(model=mine, tokens=[5]).shape[0] == 1
    assert generate(model=mine, prompts=[[1, 2, 3]], n=2) == generate(mine, [[1, 2, 3]], 2)
    with pytest.raises(ValueError, match="capture_graphs: model must be on a CUDA device"):
        capture_graphs(model=mine, decode_sizes=[(1, 10)])
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        prefill(requests=[[1]])  # type: ignore[call-arg]


# Options.


def test_config_without_return_dict(model: Any) -> None:
    """Also where the modules inside are asked; a call may want an output all the same."""
    mine = copy.deepcopy(model)
    ids = torch.tensor([prompts([9])[0]])
    with torch.no_grad():
        wanted = model(ids).logits
    mine.config.return_dict = False
    for out in on_ranks(mine, 2, lambda model: (model(ids), model(ids, return_dict=True))):
        logits, cache = out[0]
        check_close(logits, wanted)
        assert cache.get_seq_length() == 9
        check_close(out[1].logits, wanted)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "output_router_logits"])
def test_recordings_are_refused(model: Any, name: str) -> None:
    mine = copy.deepcopy(model)
    mine.set_attn_implementation("eager")
    enable_pcp(mine)
    ids = torch.tensor([[1, 2, 3]])
    refused = pytest.raises(NotImplementedError, match=f"forward: {name} not supported by a model under PCP")
    with refused:
        mine(ids, **{name: True})
    setattr(mine.config, name, True)
    with refused:
        mine(ids)
    if name != "output_router_logits":
        with refused:
            mine.generate(ids, max_new_tokens=1, return_dict_in_generate=True)
    assert mine(ids, **{name: False}).logits.shape == (1, 3, 50)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_autocast(model: Any, world_size: int, plain: bool) -> None:
    """Prefill and decode: rounded as the stock model's, which itself differs from float32 by as much."""
    ids = torch.tensor([prompts([30])[0]])
    if not plain:  # then kv_b_proj is called
        model = copy.deepcopy(model)
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.register_forward_hook(lambda module, inputs, out: out * 1)

    def call(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids[:, :-1])
            return torch.cat([out.logits, model(ids[:, -1:], **{CACHE_WORD: out[CACHE_WORD]}).logits], 1)

    with torch.no_grad():
        exact, wanted = model(ids).logits, call(model)
    for got in on_ranks(model, world_size, call):
        assert got.dtype == wanted.dtype == torch.bfloat16
        assert float((got - exact).abs().mean()) < 1.5 * float((wanted - exact).abs().mean())


@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to("meta")], ids=["half", "double", "moved"]
)
def test_a_converted_model_is_refused(model: Any, convert: Any) -> None:
    mine = copy.deepcopy(model)
    context = enable_pcp(mine)
    prefill(mine, [[1, 2]])
    cache = mine(torch.tensor([[1, 2]]))[CACHE_WORD]
    convert(mine)
    before = len(context.blocks._free)
    calls = {
        "prefill": lambda: prefill(mine, [[1]]),
        "extend": lambda: extend(mine, [[1]]),
        "decode": lambda: decode(mine, [1]),
        "generate": lambda: generate(mine, [[1]], 1),
        "forward": lambda: mine(torch.tensor([[1]]), **{CACHE_WORD: cache}),
        "capture_graphs": lambda: capture_graphs(mine, decode_sizes=[(1, 16)]),
    }
    with mock.patch.object(model_step, "run_modules", side_effect=AssertionError):
        for op, call in calls.items():
            with pytest.raises(
                ValueError, match=f"{op}: model must be torch.float32 on cpu, as it was put under PCP, got .*enable_pcp"
            ):
                call()
    assert len(context.blocks._free) == before
    assert context.requests.lengths == [2]
    disable_pcp(mine)
    if mine.dtype == torch.float16:
        enable_pcp(mine)
        assert prefill(mine, [[1]]).dtype == torch.float16


# Token ids.


def test_token_ids_of_every_kind(model: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    lists = prompts([5, 5])
    wanted, after = prefill(mine, lists), decode(mine, [3, 4])
    text = generate(mine, lists, 3)
    for kind in (
        lambda x: torch.tensor(x, dtype=torch.int32),
        np.array,
        lambda x: [torch.tensor(row) for row in x],
        lambda x: [np.array(row, np.uint8) for row in x],
        lambda x: [tuple(np.int64(token) for token in row) for row in x],
    ):
        assert torch.equal(prefill(mine, kind(lists)), wanted)
        assert torch.equal(decode(mine, kind([[3, 4]])[0]), after)
        prefill(mine, lists)
        check_close(extend(mine, kind([[3], [4]])), after)
        assert generate(mine, kind(lists), 3) == text


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([[1, -1]], ValueError, r"requests must hold token ids in 0\.\.49, got -1 in request 0"),
        ([[1, 50]], ValueError, r"requests must hold token ids in 0\.\.49, got 50 in request 0"),
        ([np.array([3]), np.array([49, 50])], ValueError, r"requests must hold token ids in 0\.\.49, got 50 in request 1"),
        ([[1], torch.tensor([2, -3])], ValueError, r"requests must hold token ids in 0\.\.49, got -3 in request 1"),
        ([[2**70]], ValueError, r"requests must hold token ids in 0\.\.49, got 1180591620717411303424 in"),
        ([["a"]], TypeError, "requests must hold integer token ids, got str in request 0"),
        (["ab"], TypeError, "requests must hold integer token ids, got str in request 0"),
        ([[1, 2.0]], TypeError, "requests must hold integer token ids, got float in request 0"),
        ([[1, True]], TypeError, "requests must hold integer token ids, got bool in request 0"),
        ([[1, None]], TypeError, "requests must hold integer token ids, got NoneType in request 0"),
        ([[1, [2]]], TypeError, "requests must hold integer token ids, got list in request 0"),
        (
            [torch.tensor([1.0])],
            TypeError,
            r"requests must hold integer token ids, got Tensor \(1,\) of torch.float32 in",
        ),
        ([np.array([True])], TypeError, r"requests must hold integer token ids, got ndarray \(1,\) of bool in request 0"),
        (
            [torch.tensor([[1]])],
            TypeError,
            r"requests must hold integer token ids, got Tensor \(1, 1\) of torch.int64 in",
        ),
        (torch.tensor([1, 2]), TypeError, r"requests must be a list with a list of token ids per request, got Tensor \(2,\)"),
        ({1: 2}, TypeError, "requests must be a list with a list of token ids per request, got dict"),
    ],
)
def test_token_ids_that_are_none(model: Any, free_blocks: Any, given: Any, error: type[Exception], message: str) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    prefill(mine, [[1]] * len(given))
    before = free_blocks(mine)
    calls = {
        "prefill": lambda: prefill(mine, given),
        "extend": lambda: extend(mine, given),
        "generate": lambda: generate(mine, given, 1),
    }
    for op, call in calls.items():
        with pytest.raises(error, match=f"{op}: {message}"):
            call()
    assert free_blocks(mine) == before


def test_decoded_tokens_that_are_none(model: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    prefill(mine, [[1], [2]])
    with pytest.raises(ValueError, match=r"decode: tokens must hold token ids in 0\.\.49, got -1"):
        decode(mine, [1, -1])
    with pytest.raises(ValueError, match=r"decode: tokens must hold token ids in 0\.\.49, got 50"):
        decode(mine, torch.tensor([49, 50]))
    with pytest.raises(TypeError, match="decode: tokens must hold integer token ids, got float"):
        decode(mine, [1, 2.0])
    with pytest.raises(ValueError, match=r"forward: requests must hold token ids in 0\.\.49, got -1 in request 0"):
        mine(torch.tensor([[1, -1]]))


# The last logits.


@pytest.mark.parametrize("chunk_tokens", [None, 1, 6, 50])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_last_logits(model: Any, layout: str, world_size: int, chunk_tokens: int | None) -> None:
    """Of requests shorter and longer than the ranks are many, that end in any of the steps, also behind a prefix."""
    first, second = prompts([13, 1, 8, 2]), prompts([3, 1])

    def call(group: Any) -> list[torch.Tensor]:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group, layout)
        logits = [prefill(mine, first, chunk_tokens=chunk_tokens, logits="last")]
        logits.append(prefill(mine, second, prefix=[(0, 11), (2, 8)], chunk_tokens=chunk_tokens, logits="last"))
        return [*logits, decode(mine, [5, 6])]

    texts = [first[0][:11] + second[0], first[2] + second[1]]
    ends = [first, texts, [[*text, token] for text, token in zip(texts, [5, 6], strict=True)]]
    wanted = [torch.stack([stock_logits(model, [text])[-1] for text in step]) for step in ends]
    for got in play(world_size, call):
        for one, other in zip(got, wanted, strict=True):
            check_close(one, other)


def test_last_rows_alone_are_exchanged_and_projected(model: Any) -> None:
    exchanged: list[int] = []
    projected: list[int] = []
    gather = model_step.all_gather_rows

    def call(group: Any) -> None:
        mine = copy_sharing_weights(model)
        enable_pcp(mine, group)
        mine.lm_head.register_forward_pre_hook(lambda _, inputs: projected.append(inputs[0].shape[-2]))
        prefill(mine, prompts([30, 20]), chunk_tokens=25, logits="last")  # no request ends in the first step
        next(greedy_steps(mine, prompts([30, 20])))

    with mock.patch.object(model_step, "all_gather_rows", lambda x, group: exchanged.append(x.shape[0]) or gather(x, group)):
        play(2, call)
    assert sorted(exchanged) == sorted([2, 2] * 2)
    assert projected == [2] * 4


def test_last_logits_that_are_none(model: Any, free_blocks: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    prefill(mine, [[1]])
    before = free_blocks(mine)
    with pytest.raises(ValueError, match="prefill: requests must have a token each for their last logits, got none for request 1"):
        prefill(mine, [[1], []], logits="last")
    with pytest.raises(ValueError, match="prefill: logits must be 'all' or 'last', got 'first'"):
        prefill(mine, [[1]], logits="first")
    assert free_blocks(mine) == before


def test_any_of_several_ends(model: Any) -> None:
    mine = copy_sharing_weights(model)
    enable_pcp(mine)
    free = generate(mine, prompts([6, 9]), 8)
    ends = [free[0][2], free[1][5]]
    cut = [row[: min(row.index(end) for end in ends if end in row) + 1] for row in free]
    assert (
        generate(mine, prompts([6, 9]), 8, eos_token_id=ends) == generate(mine, prompts([6, 9]), 8, eos_token_id=tuple(ends)) == cut
    )
    assert generate(mine, prompts([6, 9]), 8, eos_token_id=[]) == free


# Blocks.


def test_blocks_of_steps_are_given_back(model: Any, free_blocks: Any) -> None:
    """Many prefills, chunks and decodes, and failures among them: at any time the requests have what they need, and no more."""
    mine = copy_sharing_weights(model)
    context = enable_pcp(mine)

    def check() -> None:
        used = {block for blocks in context.requests.blocks for block in blocks}
        free, total = free_blocks(mine)
        assert free == total - len(used)
        assert len(used) <= sum(-(-length // 16) for length in context.requests.lengths)

    sizes = []
    for _ in range(3):
        prefill(mine, prompts([30, 18]), chunk_tokens=20)
        check()
        prefill(mine, prompts([1, 3]), prefix=[(0, 21), (0, 30)])
        check()
        for _ in range(17):
            decode(mine, [1, 2])
            check()
        extend(mine, [[1] * 17, []])
        check()
        for step in (lambda: decode(mine, [1, 2]), lambda: extend(mine, [[1], [2]]), lambda: prefill(mine, prompts([40]))):
            with mock.patch.object(mine.model, "forward", side_effect=KeyError), pytest.raises(KeyError):
                step()
            check()
            with mock.patch.object(mine.lm_head, "forward", side_effect=KeyError), pytest.raises(KeyError):
                step()
            check()
        sizes.append(context.blocks.cache.shape[1])
    assert sizes[1] == sizes[2]  # the same steps need no more room again
