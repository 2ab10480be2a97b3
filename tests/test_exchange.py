"""The latent all-gather over real processes, played ranks and no group; the process launcher; bad input."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pcp_mla.exchange import all_gather_latents
from pcp_mla.launch import RankError, run_distributed
from pcp_mla.metadata import PCPMetadata
from pcp_mla.played import PlayedGroup, play

LENGTHS = [5, 0, 1, 13]
KV, ROPE = 6, 2


def token_latents(total: int) -> torch.Tensor:
    """[total, KV + ROPE] numbers that tell every token and every column apart."""
    return torch.arange(total * (KV + ROPE), dtype=torch.float32).view(total, KV + ROPE) + 1


def local_latents(meta: PCPMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    natural = torch.cat([token_latents(int(meta.partition.query_lens.sum())), torch.full((1, KV + ROPE), -5.0)])
    rows = natural[meta.local_token_indices.long()]  # a pad takes the last row
    return rows[:, :KV], rows[:, KV:]


def gather(group: Any, world_size: int, rank: int, layout: str) -> torch.Tensor:
    meta = PCPMetadata.build(LENGTHS, world_size=world_size, rank=rank, layout=layout)
    return all_gather_latents(*local_latents(meta), meta, group)


def expected(world_size: int, layout: str) -> torch.Tensor:
    """Every rank's local rows, each padded with zeros, one after another."""
    blocks = []
    for rank in range(world_size):
        meta = PCPMetadata.build(LENGTHS, world_size=world_size, rank=rank, layout=layout)
        block = torch.zeros(meta.num_tokens_padded, KV + ROPE)
        block[: meta.num_tokens] = torch.cat(local_latents(meta), dim=1)
        blocks.append(block)
    return torch.cat(blocks)


def gather_in_process(group: Any, layout: str) -> torch.Tensor:
    return gather(group, group.size(), group.rank(), layout)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_gather_rank_major(world_size: int) -> None:
    for rank_result in run_distributed(world_size, gather_in_process, "unpadded"):
        assert torch.equal(rank_result, expected(world_size, "unpadded"))


@pytest.mark.multi_gpu
def test_gpus_gather_rank_major() -> None:
    for rank_result in run_distributed(2, gather_on_gpu, backend="nccl"):
        assert torch.equal(rank_result, expected(2, "unpadded"))


def gather_on_gpu(group: Any) -> torch.Tensor:
    meta = PCPMetadata.build(LENGTHS, world_size=group.size(), rank=group.rank(), device=f"cuda:{group.rank()}")
    kv_c, k_pe = local_latents(PCPMetadata.build(LENGTHS, world_size=group.size(), rank=group.rank()))
    return all_gather_latents(kv_c.to(meta.device), k_pe.to(meta.device), meta, group)


@pytest.mark.parametrize("layout", ["unpadded", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_played_ranks_gather_rank_major(world_size: int, layout: str) -> None:
    for rank_result in play(world_size, lambda group: gather(group, world_size, group.rank, layout)):
        assert torch.equal(rank_result, expected(world_size, layout))


def test_world_of_one_needs_no_group() -> None:
    assert torch.equal(gather(None, 1, 0, "unpadded"), expected(1, "unpadded"))


def test_strided_latents() -> None:
    meta = PCPMetadata.build([7], world_size=1, rank=0)
    wide = torch.randn(7, 3, KV + ROPE)
    out = all_gather_latents(wide[:, 1, :KV], wide[:, 1, KV:], meta, None)
    assert torch.equal(out, wide[:, 1])


# Bad input: the message has the argument and its value.


def good() -> tuple[torch.Tensor, torch.Tensor, PCPMetadata]:
    meta = PCPMetadata.build([7], world_size=1, rank=0)
    return torch.zeros(7, KV), torch.zeros(7, ROPE), meta


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_c": torch.zeros(6, KV)}, ValueError, "kv_c must have 7 rows, one per local token of meta, got 6"),
        ({"k_pe": torch.zeros(8, ROPE)}, ValueError, "k_pe must have 7 rows, one per local token of meta, got 8"),
        ({"kv_c": torch.zeros(7, 1, KV)}, ValueError, r"kv_c must have 2 dimensions \[tokens, width\], got 3"),
        ({"k_pe": torch.zeros(7, ROPE, dtype=torch.float16)}, TypeError, "k_pe must be torch.float32, as kv_c, got torch.float16"),
        ({"kv_c": [[0.0]]}, TypeError, "kv_c must be a tensor, got list"),
        ({"k_pe": torch.zeros(7, ROPE, device="meta")}, ValueError, "k_pe must be on cpu, as meta, got meta"),
        ({"group": "world"}, TypeError, "group must be a ProcessGroup, a PlayedGroup or None, got str"),
        (
            {"meta": PCPMetadata.build([7], world_size=2, rank=1)},
            ValueError,
            "meta must be for rank 0 of 1, as the group, got rank 1 of 2",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    kv_c, k_pe, meta = good()
    arguments = {"kv_c": kv_c, "k_pe": k_pe, "meta": meta, "group": None} | change
    with pytest.raises(error, match=f"all_gather_latents: {message}"):
        all_gather_latents(**arguments)


def test_metadata_of_another_rank_of_a_played_group() -> None:
    with pytest.raises(ValueError, match="meta must be for rank 0 of 2, as the group, got rank 1 of 2"):
        play(2, lambda group: gather(group, 2, 1 - group.rank, "unpadded"))


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
