"""transformers' models under PCP whose prefill steps are shared out by heads: what they give by tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers

from pcp_mla import HeadExchange, MLADims
from pcp_mla.integrations.transformers import captured, copy_sharing_weights, decode, disable_pcp, enable, enable_pcp, prefill
from pcp_mla.integrations.transformers import split as splits
from pcp_mla.layer import steps
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
from test_integration_modules import PROJECTIONS
from test_integration_ranks import message
from test_integration_transformers import build, check_chunked_then_shared, check_close, chunked_then_shared, prompts, stock_logits

HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 2, "hidden_size": 60}
REFUSED = "NotImplementedError: enable_pcp: kv_b_proj must be a Linear without hooks in all layers for split 'heads', got a {}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stock() -> Any:
    return build("v3", **HEADS)


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each exchange of queries, by any rank, how many rows."""
    rows, right = [], HeadExchange.to_heads

    def counted(self: HeadExchange, q: torch.Tensor, meta: Any) -> torch.Tensor:
        rows.append(q.shape[0])
        return right(self, q, meta)

    monkeypatch.setattr(HeadExchange, "to_heads", counted)
    return rows


def check_as_by_tokens(by_heads: list[list[torch.Tensor]], by_tokens: list[list[torch.Tensor]]) -> None:
    for ours, theirs in zip(by_heads, by_tokens, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            check_close(one, other)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", ["v2", "v3", *(["glm"] if hasattr(transformers, "Glm4MoeLiteForCausalLM") else [])])
def test_chunks_and_shared_prefixes(name: str, world_size: int, layout: str, exchanged: list[int]) -> None:
    model, results = build(name, **HEADS), {}
    for split in ("tokens", "heads"):
        exchanged.clear()
        results[split] = play(world_size, lambda group, s=split: chunked_then_shared(copy_sharing_weights(model), group, layout, s))
        # Five steps of the first prefill, three of the second, an extension and a last one, of two layers; no decode.
        assert len(exchanged) == (10 * 2 * world_size if split == "heads" else 0)
    for logits in results["heads"]:
        check_chunked_then_shared(model, logits)
    check_as_by_tokens(results["heads"], results["tokens"])


def in_process(group: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    model = build("v3", **HEADS)
    results = []
    for split in ("tokens", "heads"):
        results.append(chunked_then_shared(model, group, split=split))
        disable_pcp(model)
    enable_pcp(model, group, split="heads")
    options = {"attention_mask": torch.ones(1, 9), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return *results, model.generate(torch.tensor(prompts([9])), **options)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes(world_size: int, stock: Any) -> None:
    ids = torch.tensor(prompts([9]))
    wanted = stock.generate(ids, attention_mask=torch.ones(1, 9), max_new_tokens=4, do_sample=False, pad_token_id=0)
    for by_tokens, by_heads, text in run_distributed(world_size, in_process):
        check_chunked_then_shared(stock, by_heads)
        check_as_by_tokens([by_heads], [by_tokens])
        assert torch.equal(text, wanted)


def test_ranks_without_tokens_compute_their_heads(stock: Any, exchanged: list[int]) -> None:
    def rank(group: Any) -> torch.Tensor:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group, split="heads")
        return prefill(model, [[7], [9]])

    for logits in play(4, rank):
        check_close(logits, stock_logits(stock, [[7], [9]]))
    assert len(exchanged) == 4 * 2
    assert exchanged.count(0) >= 2 * 2


def test_a_world_of_one_has_nothing_to_exchange(stock: Any, exchanged: list[int]) -> None:
    model = copy_sharing_weights(stock)
    context = enable_pcp(model, split="heads")
    check_close(prefill(model, prompts()), stock_logits(stock, prompts()))
    assert exchanged == []
    assert (context.heads, context.split) == (None, "tokens")


def test_what_is_exchanged_is_compared_with_the_switch(stock: Any, exchanged: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of all ranks meet each other, and not the heads."""
    monkeypatch.setenv("PCP_MLA_CHECK", "1")

    def rank(group: Any) -> list[str]:
        model = copy_sharing_weights(stock)
        enable_pcp(model, group, split="heads")
        check_close(prefill(model, prompts([9])), stock_logits(stock, prompts([9])))
        return [message(lambda: prefill(model, [[1, 2 + group.rank]])), message(lambda: decode(model, [3]))]

    for differing, after in play(2, rank):
        assert differing.startswith("RuntimeError: prefill: all ranks must make the same call")
        assert after == ""
    assert len(exchanged) == 4


def test_disabled_and_enabled_by_tokens(stock: Any, exchanged: list[int]) -> None:
    def rank(group: Any) -> None:
        model, request = copy_sharing_weights(stock), prompts([9])
        enable_pcp(model, group, split="heads")
        prefill(model, request)
        disable_pcp(model)
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(stock_logits(model, request), stock_logits(stock, request))
        count = len(exchanged)
        context = enable_pcp(model, group)
        check_close(prefill(model, request), stock_logits(stock, request))
        assert len(exchanged) == count
        assert (context.heads, context.split) == (None, "tokens")  # as nothing else pays on a CPU

    play(2, rank)


# What auto takes.


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads can be taken by cost, which says that they pay from ten tokens on."""
    monkeypatch.setattr(enable, "agree_on_heads", lambda model, group, split, dims, *_: None if split == "tokens" else dims)
    monkeypatch.setattr(steps, "heads_pay", lambda heads, dims, dtype, meta: meta.lengths[0].sum() >= 10)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_auto_takes_heads_step_by_step(stock: Any, exchanged: list[int]) -> None:
    def rank(group: Any) -> list[int]:
        model, counts = copy_sharing_weights(stock), []
        enable_pcp(model, group)
        for length in (9, 10, 4, 30):
            before = len(exchanged)
            check_close(prefill(model, prompts([length])), stock_logits(stock, prompts([length])))
            counts.append(len(exchanged) > before)
        return counts

    assert play(2, rank) == [[False, True, False, True]] * 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_hooks_that_come_later(stock: Any, exchanged: list[int]) -> None:
    def rank(group: Any, split: str) -> str:
        model = build("v3", **HEADS)
        enable_pcp(model, group, split=split)
        before = prefill(model, prompts([12]))
        model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda module, given, out: 1.0 * out)
        exchanged.clear()
        return message(lambda: check_close(prefill(model, prompts([12])), before))

    assert play(2, lambda group: rank(group, "auto")) == [""] * 2
    assert len(exchanged) == 2  # of the second layer
    for told in play(2, lambda group: rank(group, "heads")):
        assert told.startswith("NotImplementedError: MLAPrefill: kv_b_proj must be a weight, or a Linear without hooks, for split")


# What is refused.


def test_unknown(stock: Any) -> None:
    with pytest.raises(ValueError, match="enable_pcp: split must be one of auto, tokens, heads, got 'rows'"):
        enable_pcp(copy_sharing_weights(stock), split="rows")


def told_by_ranks(world_size: int, change: Any, splits: list[str], **changes: Any) -> list[str]:
    """What each rank says to being enabled, and then to a prefill."""

    def rank(group: Any) -> str:
        model = build("v3", **HEADS | changes)
        change(group.rank, model.model.layers[1].self_attn.kv_b_proj)
        wanted = stock_logits(model, prompts([9]))
        told = message(lambda: enable_pcp(model, group, split=splits[group.rank]))
        if told:
            assert "_pcp" not in model.__dict__
            assert not any("forward" in layer.self_attn.__dict__ for layer in model.model.layers)
        else:
            told = message(lambda: check_close(prefill(model, prompts([9])), wanted))
        return told

    return play(world_size, rank)


def nothing(rank: int, projection: Any) -> None:
    pass


@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name != "bias"])
def test_modules_whose_heads_cannot_be_had_alone(name: str) -> None:
    def change(rank: int, projection: Any) -> None:
        if rank == 1:
            PROJECTIONS[name](projection)

    assert told_by_ranks(2, change, ["heads"] * 2) == [REFUSED.format("Linear in layer 1 on rank 1")] * 2
    assert told_by_ranks(2, lambda _, projection: PROJECTIONS[name](projection), ["auto"] * 2) == [""] * 2


def test_a_bias_is_had_with_its_heads(exchanged: list[int]) -> None:
    assert told_by_ranks(3, lambda _, projection: PROJECTIONS["bias"](projection), ["heads"] * 3) == [""] * 3
    assert len(exchanged) == 6


def test_fewer_heads_than_ranks() -> None:
    few = {"num_attention_heads": 2, "num_key_value_heads": 2}
    refused = "ValueError: enable_pcp: model must have a head for each of 3 ranks for split 'heads', got 2"
    assert told_by_ranks(3, nothing, ["heads"] * 3, **few) == [refused] * 3
    assert told_by_ranks(3, nothing, ["auto"] * 3, **few) == [""] * 3


def test_ranks_that_ask_for_different_splits() -> None:
    refused = "ValueError: enable_pcp: split must be the same on all ranks, got heads, auto, heads by rank"
    assert told_by_ranks(3, nothing, ["heads", "auto", "heads"]) == [refused] * 3


class Gathering:
    """A group that can do no more."""

    rank, world_size = 0, 2

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows])


def test_a_group_without_an_all_to_all(stock: Any) -> None:
    with pytest.raises(TypeError, match="enable_pcp: group must have all_to_all_into for split 'heads', a Gathering has none"):
        enable_pcp(copy_sharing_weights(stock), Gathering(), split="heads")
    enable_pcp(copy_sharing_weights(stock), Gathering())


@pytest.mark.parametrize(
    ("others", "device", "heads"),
    [
        ({}, "cuda", 5),
        ({}, "cpu", None),
        ({"module": "a Linear in layer 0"}, "cuda", None),
        ({"heads": [4, 5]}, "cuda", None),
        ({"heads": [4]}, "cuda", None),
    ],
)
def test_auto_is_the_same_on_all_ranks(
    stock: Any, monkeypatch: pytest.MonkeyPatch, others: dict[str, Any], device: str, heads: int | None
) -> None:
    """Whatever another rank says of its modules."""
    monkeypatch.setattr(splits, "agree", lambda group, device, mine: [mine, mine | others, mine])
    dims = MLADims(7, 16, 8, 12, 20)
    got = play(2, lambda group: splits.agree_on_heads(stock, group, "auto", dims, torch.device(device)))
    assert got == [None if heads is None else replace(dims, num_heads=heads)] * 2


# Captured steps, without a GPU: what would be captured.


class Called:
    """In place of a graph: the function is called, and what makes its collectives is noted."""

    exchanges: list[Any] = []  # noqa: RUF012

    def __init__(self, pool: Any, device: Any) -> None:
        self.num_pieces = 0

    def capture(self, fn: Any, exchanges: Any) -> torch.Tensor:
        Called.exchanges.append([type(exchange).__name__ for exchange in exchanges])
        return fn()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("split", ["tokens", "heads", "auto"])
@torch.no_grad()
def test_steps_of_a_captured_size_are_shared_out_alike(
    stock: Any, monkeypatch: pytest.MonkeyPatch, exchanged: list[int], split: str
) -> None:
    """Those that fit a graph which is outdated on this rank, and on others perhaps is not: by auto, as the whole size is."""
    monkeypatch.setattr(captured, "PiecewiseGraph", Called)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    Called.exchanges.clear()

    def rank(group: Any) -> list[int]:
        model = copy_sharing_weights(stock)
        context = enable_pcp(model, group, split=split)
        context.blocks.grow(100)
        context.captured = captured.CapturedSteps(model, context, False, [(4, 64), (30, 64), (30, 200)], 4)
        assert [capture.split for capture in context.captured._captures] == {
            "tokens": ["tokens"] * 3,
            "heads": ["heads"] * 3,
            "auto": ["tokens", "heads", "heads"],
        }[split]
        context.blocks.grow(200)
        counts = []
        for lengths in ([3, 4], [9], [9, 60], [300]):
            before = len(exchanged)
            check_close(prefill(model, prompts(lengths)), stock_logits(stock, prompts(lengths)))
            counts.append(len(exchanged) - before)
        return counts

    for counts in play(2, rank):
        assert [count > 0 for count in counts] == {
            "tokens": [False] * 4,
            "heads": [True] * 4,
            "auto": [False, True, True, True],
        }[split]
    assert Called.exchanges == [["LatentExchange"] + ["HeadExchange"] * (split != "tokens")] * 6
