"""Played ranks, and the process launcher."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pcp_mla.groups import (
    all_gather_into,
    all_gather_rows,
    all_reduce_rows,
    all_to_all_rows,
    group_rank,
    group_world_size,
    reduce_scatter_rows,
)
from pcp_mla.testing.launch import RankError, run_distributed
from pcp_mla.testing.played import PlayedGroup, play

# Played ranks.


def test_played_ranks_run_one_at_a_time_and_in_order() -> None:
    log: list[tuple[int, str]] = []

    def rank(group: PlayedGroup) -> None:
        log.append((group.rank, "before"))
        group.all_gather(torch.zeros(1))
        log.append((group.rank, "after"))

    play(3, rank)
    assert log == [(r, part) for part in ("before", "after") for r in range(3)]


def test_played_collective_gives_each_rank_memory_of_its_own() -> None:
    def rank(group: PlayedGroup) -> torch.Tensor:
        mine = torch.tensor([float(group.rank)])
        first = group.all_gather(mine)
        # Neither the tensor that was left nor the result is shared with a rank that goes on later.
        mine.fill_(100.0)
        first.add_(10.0)
        second = group.all_gather(first)
        return second

    for result in play(3, rank):
        assert result.tolist() == [10.0, 11.0, 12.0] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.timeout(20)
def test_failure_of_a_played_rank_ends_all(failing: int, after: int) -> None:
    def rank(group: PlayedGroup) -> None:
        for i in range(3):
            if i == after and group.rank == failing:
                raise KeyError(f"rank {failing} broke")
            group.all_gather(torch.zeros(2))

    with pytest.raises(KeyError, match=f"rank {failing} broke"):
        play(3, rank)


@pytest.mark.parametrize("lazy", [0, 1])
@pytest.mark.timeout(20)
def test_played_ranks_must_make_the_same_collectives(lazy: int) -> None:
    def rank(group: PlayedGroup) -> None:
        if group.rank != lazy:
            group.all_gather(torch.zeros(2))

    with pytest.raises(RuntimeError, match="finished"):
        play(2, rank)


@pytest.mark.timeout(20)
def test_played_ranks_must_leave_the_same_shape() -> None:
    with pytest.raises(ValueError, match=r"tensor must be \(1,\) torch.float32 as on rank 0, got \(2,\) torch.float32 on rank 1"):
        play(2, lambda group: group.all_gather(torch.zeros(group.rank + 1)))


def test_played_ranks_have_the_callers_grad_mode() -> None:
    with torch.no_grad():
        assert play(2, lambda _: torch.is_grad_enabled()) == [False, False]
    with torch.inference_mode():
        assert play(2, lambda _: torch.is_inference_mode_enabled()) == [True, True]
    assert play(2, lambda _: torch.is_grad_enabled()) == [True, True]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_played_ranks_see_autocast(device):
    x = torch.ones(2, 2, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert play(2, lambda _: (x @ x).dtype) == [torch.bfloat16] * 2
    assert play(2, lambda _: (x @ x).dtype) == [torch.float32] * 2


@pytest.mark.gpu
def test_played_ranks_are_on_the_callers_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert play(2, lambda _: torch.cuda.current_stream()) == [stream] * 2
    assert play(2, lambda _: torch.cuda.current_stream()) == [torch.cuda.default_stream()] * 2


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_played_ranks_are_on_the_callers_device():
    with torch.cuda.device(1):
        assert play(2, lambda _: torch.cuda.current_device()) == [1, 1]


def collectives(group: Any) -> list[list[list[int]]]:
    """What this rank gets of rows [rank, block, row of it]: a block for each rank, of two rows."""
    world, rank = group_world_size(group), group_rank(group)
    rows = torch.tensor([[rank, block, n] for block in range(world) for n in range(2)])
    into = torch.full((world * len(rows), 3), -1)
    all_gather_into(into, rows, group)
    results = [call(rows.clone(), group) for call in (all_gather_rows, reduce_scatter_rows, all_reduce_rows, all_to_all_rows)]
    return [x.tolist() for x in (into, *results)]


def collectives_by_hand(world: int, rank: int) -> list[list[list[int]]]:
    ranks, sent = range(world), sum(range(world))
    everything = [[r, block, n] for r in ranks for block in ranks for n in range(2)]
    summed = [[[sent, world * block, world * n] for n in range(2)] for block in ranks]
    return [
        everything,
        everything,
        summed[rank],
        [row for block in summed for row in block],
        [[r, rank, n] for r in ranks for n in range(2)],
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_of_played_ranks(world: int) -> None:
    assert play(world, collectives) == [collectives_by_hand(world, rank) for rank in range(world)]


def test_collectives_alone() -> None:
    assert collectives(None) == collectives_by_hand(1, 0)


def test_play_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="play: world_size must be at least 1, got 0"):
        play(0, lambda group: None)


# The launcher of processes.


def fail_on_rank_1(group: Any) -> None:
    if group.rank() == 1:
        raise KeyError("rank 1 broke")
    torch.distributed.barrier(group)


def sleep(group: Any) -> None:
    time.sleep(60)


@pytest.mark.timeout(100)
def test_failure_of_a_process_ends_all_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:\n(?s:.*)fail_on_rank_1(?s:.*)rank 1 broke"):
        run_distributed(2, fail_on_rank_1)


@pytest.mark.timeout(50)
def test_processes_that_hang_are_ended() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 did not finish in 8 s"):
        run_distributed(1, sleep, timeout=8.0)


def test_run_distributed_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="run_distributed: world_size must be at least 1, got 0"):
        run_distributed(0, sleep)
