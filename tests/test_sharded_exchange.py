"""The exchange with a cache that is shared out: its collectives, and what it refuses on every rank alike, so that none waits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pcp_mla import MLADims, PCPMetadata, PCPPlanner, ShardedExchange
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.slots import PagedCache
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

DIMS = MLADims(num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=12)
BLOCK = 4


def options_of(group: Any) -> dict[str, Any]:
    """Two ranks of PCP; a cache over all ranks of the group."""
    shards = PagedCache(BLOCK, group_world_size(group), group_rank(group), 2)
    numbers = {"max_tokens": 40, "max_context": 30, "dims": DIMS, "dtype": torch.float32}
    return numbers | {"shards": shards, "pcp_world_size": 2}


def plan(group: Any, lengths: list[int], contexts: list[int], **changes: Any) -> PCPMetadata:
    shards = options_of(group)["shards"]
    tables = np.arange(4 * len(lengths) * 10, dtype=np.int32).reshape(len(lengths), -1)
    place = {"world_size": 2, "rank": shards.dcp_rank * 2 // shards.dcp_world_size}
    return PCPPlanner(4, 60, **{**place, **vars(shards), **changes}).plan(lengths, contexts, None, tables)


def publish(exchange: ShardedExchange, meta: PCPMetadata, **changes: Any) -> torch.Tensor:
    """Latents of ones, and a cache of the shard's number."""
    generous = torch.full((200, BLOCK, 16), float(exchange.shard))
    given = {"kv_c": torch.ones(meta.num_tokens, 12), "k_pe": torch.ones(meta.num_tokens, 4), "cache": generous}
    return exchange.publish(**given | {"meta": meta} | changes)


def outcome(call: Any) -> str:
    try:
        call()
        return ""
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


CHANGES = {
    "max_tokens": ({"max_tokens": 50}, "max_tokens must be the same on all ranks, got 40, 40, 40, 50"),
    "max_context": ({"max_context": 31}, "max_context must be the same on all ranks, got 30, 30, 30, 31"),
    "dtype": ({"dtype": torch.float16}, "dtype must be the same on all ranks, got torch.float32, torch.float32, torch.float32, "),
    "widths": (
        {"dims": dataclasses.replace(DIMS, kv_lora_rank=8, qk_rope_head_dim=8)},
        "kv_lora_rank must be the same on all ranks, got 12, 12, 12, 8",
    ),
    "interleave": ({"shards": PagedCache(BLOCK, 4, 3, 5)}, "cp_interleave must be the same on all ranks, got 2, 2, 2, 5"),
    "blocks": ({"shards": PagedCache(8, 4, 3, 2)}, "block_size must be the same on all ranks, got 4, 4, 4, 8"),
    "PCP": ({"pcp_world_size": 4}, "pcp_world_size must be the same on all ranks, got 2, 2, 2, 4"),
    "a number": (
        {"shards": PagedCache(BLOCK, 8, 3, 2)},
        "shards must be shard 3 of 4, as the rank of the group, got shard 3 of 8",
    ),
    "a place": ({"shards": PagedCache(BLOCK, 4, 2, 2)}, "shards must be shard 3 of 4, as the rank of the group, got shard 2 of 4"),
    "a divisor": ({"pcp_world_size": 3}, "pcp_world_size must divide the 4 shards, got 3"),
    "nothing": ({"pcp_world_size": 0}, "pcp_world_size must be at least 1, got 0"),
    "room": ({"max_context": -1}, "max_context must be at least 0, got -1"),
    "a kind": ({"shards": 4}, "shards must be a PagedCache, got int"),
    "dims": ({"dims": 3}, "dims must be MLADims, got int"),
}


def told_of_changes(group: Any) -> list[str]:
    """For each change on the last rank alone, what this one is told; and that they find together again."""
    told = []
    for change, _ in CHANGES.values():
        mine = change if group_rank(group) == group_world_size(group) - 1 else {}
        told.append(outcome(lambda mine=mine: ShardedExchange(group, **options_of(group) | mine)))
    exchange = ShardedExchange(group, **options_of(group))
    told.append(str(publish(exchange, plan(group, [9, 2], [13, 3])).shape))
    return told


def assert_told(ranks: list[list[str]]) -> None:
    for told in ranks:
        for words, (_, wanted) in zip(told[:-1], CHANGES.values(), strict=True):
            assert f"Error: ShardedExchange: {wanted}" in words
        assert told[-1] == "torch.Size([40, 16])"


def steps_with_too_much(group: Any) -> list[str]:
    """Steps that fit and steps that do not, in turn."""
    exchange, told = ShardedExchange(group, **options_of(group)), []
    made, usual = [], exchange._gathering

    def counted(rows: torch.Tensor) -> Any:
        call = usual(rows)
        return lambda: made.append(len(rows)) or call()

    exchange._gathering = counted  # type: ignore[method-assign]
    for lengths, contexts in (([9, 2], [13, 3]), ([1], [121]), ([5], [120]), ([60, 0], [0, 0]), ([0, 0], [0, 0]), ([3], [0])):
        told.append(outcome(lambda n=lengths, c=contexts: publish(exchange, plan(group, n, c))))
    return [*told, str(made)]


def assert_refused(ranks: list[list[str]]) -> None:
    """Without a collective, on every rank; the next step is exchanged again."""
    assert all(told == ranks[0] for told in ranks)
    shards, (first, second, third, *others, made) = len(ranks), ranks[0]
    words = "ValueError: ShardedExchange.publish: meta must have at most 30 rows of context a shard (max_context), got "
    assert [first, second, *others] == ["", words + ("31" if shards == 4 else "61"), "", "", ""]
    assert third == ("" if shards == 4 else words + "60")
    assert made == ("[10, 32, 15, 1]" if shards == 4 else "[16, 30, 2]")  # rows that each rank sent


def both(group: Any) -> tuple[list[str], list[str]]:
    return told_of_changes(group), steps_with_too_much(group)


def test_processes_that_differ_all_learn_of_it_and_none_waits() -> None:
    changes, steps = zip(*run_distributed(4, both), strict=True)
    assert_told(list(changes))
    assert all("(on rank 3)" in words for words in changes[0][7:-1])
    assert not any("(on rank 3)" in words for words in changes[3])
    assert_refused(list(steps))


def test_played_ranks_that_differ_all_learn_of_it() -> None:
    assert_told(play(4, told_of_changes))


@pytest.mark.parametrize("shards", [2, 4])
def test_steps_that_do_not_fit_are_refused_on_every_rank(shards: int) -> None:
    assert_refused(play(shards, steps_with_too_much))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kv_c": torch.zeros(4, 11)}, ValueError, "kv_c and k_pe must be 12 and 4 wide, got 11 and 4"),
        ({"kv_c": torch.zeros(3, 12)}, ValueError, "kv_c must have 4 rows, one per local token of meta, got 3"),
        ({"k_pe": torch.zeros(4, 4).half()}, TypeError, "k_pe must be torch.float32, as kv_c, got torch.float16"),
        ({"cache": None}, ValueError, "cache must be given, as it is shared out, got None"),
        ({"cache": torch.zeros(99, BLOCK, 15)}, ValueError, "latents must"),
        ({"cache": torch.zeros(99, BLOCK, 16).half()}, TypeError, "cache must be float32 as latents"),
        ({"cache": torch.zeros(1, 1, 16).expand(99, BLOCK, 16)}, ValueError, "cache must not be expanded"),
        ({"kv_c": torch.zeros(4, 12, requires_grad=True)}, NotImplementedError, "kv_c must not require gradients"),
        ({"scale": torch.ones(1)}, TypeError, "cache must be float8_e4m3fn with a scale, got float32"),
        (
            {"scale": torch.ones(1), "cache": torch.zeros(99, BLOCK, 16).to(torch.float8_e4m3fn)},
            TypeError,
            "cache must be torch.float32, as the exchange, got torch.float8_e4m3fn",
        ),
        ({"meta": 3}, TypeError, "meta must be a PCPMetadata, got int"),
        ({"meta": PCPMetadata.build([8], world_size=2, rank=0)}, ValueError, "got rank 0 of 2 with None"),
    ],
)
def test_what_is_refused_before_the_collective(changes: Any, error: Any, words: str) -> None:
    """On one rank alone: all give up, and nothing was exchanged or written."""

    def run(group: Any) -> None:
        exchange, meta = ShardedExchange(group, **options_of(group)), plan(group, [8], [8])
        assert publish(exchange, meta).shape == (2 * (4 + 4), 16)
        cache = torch.full((200, BLOCK, 16), 7.0)
        with pytest.raises(error, match=words):
            exchange.publish(**{"kv_c": torch.ones(4, 12), "k_pe": torch.ones(4, 4), "meta": meta, "cache": cache} | changes)
        assert (cache == 7).all()
        publish(exchange, meta)

    play(2, run)


def test_a_plan_that_is_over() -> None:
    def run(group: Any) -> None:
        exchange, shards = ShardedExchange(group, **options_of(group)), options_of(group)["shards"]
        planner = PCPPlanner(4, 60, 2, group.rank, **vars(shards))
        over, meta = (planner.plan([5], [n], None, np.zeros((1, 9), np.int32)) for n in (6, 8))
        with pytest.raises(RuntimeError, match="before the next plan"):
            publish(exchange, over)
        publish(exchange, meta)

    play(2, run)


def test_one_rank_alone() -> None:
    with pytest.raises(ValueError, match="group must have at least 2 ranks, got 1"):
        ShardedExchange(None, 4, 4, DIMS, torch.float32, shards=PagedCache(), pcp_world_size=1)
    with pytest.raises(TypeError, match="ShardedExchange: group must be a ProcessGroup, a PlayedGroup or None, got int"):
        ShardedExchange(3, 4, 4, DIMS, torch.float32, shards=PagedCache(), pcp_world_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_bits_of_all_types(dtype: torch.dtype) -> None:
    """Context and new tokens come bit by bit, at an address that stays, and rows of a step before do not show."""

    def run(group: Any) -> None:
        exchange, addresses = ShardedExchange(group, **options_of(group) | {"dtype": dtype}), set()
        for lengths, contexts in (([30, 9], [40, 15]), ([2, 1], [3, 0]), ([17, 0], [0, 9])):
            meta = plan(group, lengths, contexts)
            random = torch.Generator().manual_seed(meta.rank)
            kv_c, k_pe = (torch.randn(meta.num_tokens, n, generator=random).to(dtype) for n in (12, 4))
            cache = torch.randn(200 * BLOCK, 16, generator=torch.Generator().manual_seed(9 + group.rank)).to(dtype)
            before = cache.clone()
            got = exchange.publish(kv_c, k_pe, meta, cache).view(4, -1, 16).view(torch.uint8)
            rows, half = meta.shard_rows, group.rank % 2
            assert rows is not None
            mine = torch.cat([kv_c, k_pe], 1)[half * rows.num_new :][: rows.num_new].view(torch.uint8)
            assert torch.equal(got[group.rank, : len(mine)], mine)
            slots = rows.context_slots.long()
            held = before[slots.clamp(min=0)].view(torch.uint8) * (slots >= 0)[:, None]
            assert torch.equal(got[group.rank, rows.num_new :], held)
            written = rows.slot_mapping[rows.slot_mapping >= 0]
            changed = torch.ones(len(cache), dtype=torch.bool)
            changed[written] = False
            assert torch.equal(cache[changed].view(torch.uint8), before[changed].view(torch.uint8))
            addresses.add(got.data_ptr())
        assert len(addresses) == 1

    play(4, run)
