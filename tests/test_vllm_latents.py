"""vLLM's group as a communicator of this package, and the exchange of latents over it, packed."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from batches import same_bits
from fake_vllm import modules
from pcp_mla import LatentExchange, write_latent_cache
from pcp_mla.exchange.peer_memory import PeersUnavailable
from pcp_mla.groups import CommunicatorHandle, all_gather_into, gathers_in_place, group_rank, group_world_size
from pcp_mla.integrations.vllm import latents, parts, register
from pcp_mla.integrations.vllm.communicator import Communicator
from pcp_mla.integrations.vllm.latents import StepExchange
from pcp_mla.integrations.vllm.state import State
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play

RANK, ROPE = 12, 4
DIMS = MLADims(1, 1, ROPE, 1, RANK)


def coordinator(group):
    """What vLLM has on a CPU: no communicator of its own."""
    return SimpleNamespace(
        rank_in_group=dist.get_rank(group),
        world_size=dist.get_world_size(group),
        device_communicator=SimpleNamespace(),
        device_group=group,
    )


def played(group):
    """One whose pynccl communicator is a played group's."""

    def all_gather(gathered, rows):
        gathered.copy_(group.all_gather(rows))

    pynccl = SimpleNamespace(disabled=False, all_gather=all_gather)
    return SimpleNamespace(
        rank_in_group=group.rank,
        world_size=group.world_size,
        device_communicator=SimpleNamespace(pynccl_comm=pynccl),
        device_group="must not be used",
    )


# The communicator.


def collectives(group, make):
    communicator = Communicator(make(group))
    rows = torch.tensor([[communicator.rank, 1.0], [communicator.rank, 2.0]])
    gathered = torch.full((2 * communicator.world_size, 2), torch.nan)
    all_gather_into(gathered, rows, communicator)
    in_place = torch.full_like(gathered, torch.nan)
    mine = in_place[2 * communicator.rank :][:2]
    mine.copy_(rows)
    all_gather_into(in_place, mine, communicator)
    return {
        "kinds": (isinstance(communicator, CommunicatorHandle), gathers_in_place(communicator)),
        "rank": (group_rank(communicator), group_world_size(communicator)),
        "results": [x.tolist() for x in (gathered, in_place, communicator.all_gather(rows))],
    }


def check_collectives(results):
    for rank, result in enumerate(results):
        assert result["kinds"] == (True, True)
        assert result["rank"] == (rank, len(results))
        wanted = [[float(r), n] for r in range(len(results)) for n in (1.0, 2.0)]
        assert result["results"] == [wanted] * 3


def test_a_group_without_pynccl(vllm):
    check_collectives(run_distributed(2, collectives, coordinator))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_pynccl_is_used_where_it_is(world):
    check_collectives(play(world, lambda group: collectives(group, played)))


def test_pynccl_that_is_disabled_is_not_used():
    def rank(group):
        made = played(group)
        pynccl = made.device_communicator.pynccl_comm
        used = Communicator(made).all_gather_into == pynccl.all_gather
        pynccl.disabled = True
        return used, Communicator(made).all_gather_into == pynccl.all_gather

    assert play(2, rank) == [(True, False)] * 2


def test_what_is_no_communicator():
    """A played group has no call that gathers into a tensor; the exchange gathers into one of its own."""
    assert play(2, gathers_in_place) == [False, False]
    assert not gathers_in_place(None)
    assert not isinstance(SimpleNamespace(rank=0, world_size=1), CommunicatorHandle)


# All rows of all ranks.


def every_row(group, make):
    """Steps of one exchange, and their addresses; numbers say whose row it is."""
    handle = make(group) if make is not None else group
    exchange = LatentExchange(handle, 8, DIMS, torch.float32)
    results = []
    for count in (8, 3, 1, 0, 5):
        rows = torch.arange(count * 16.0).view(count, 16) + 1000 * exchange.rank
        got = exchange.all_gather_rows(rows[:, :RANK].clone(), rows[:, RANK:].clone())
        results.append((got.clone(), got.data_ptr() if count else 0))
    return results


def both_groups(group):
    return every_row(group, None), every_row(group, as_communicator)


def check_every_row(ranks):
    for results in ranks:
        for count, (got, _) in zip((8, 3, 1, 0, 5), results, strict=True):
            wanted = [torch.arange(count * 16.0).view(count, 16) + 1000 * rank for rank in range(len(ranks))]
            assert torch.equal(got, torch.cat(wanted))
        assert len({address for _, address in results if address}) == 1


def as_communicator(group):
    return Communicator(coordinator(group))


def as_played(group):
    return Communicator(played(group))


def test_rows_over_gloo_and_vllms_communicator():
    for ranks in zip(*run_distributed(2, both_groups), strict=True):
        check_every_row(ranks)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("make", [None, as_played])
def test_rows_of_played_ranks(world, make):
    check_every_row(play(world, lambda group: every_row(group, make)))
    check_every_row([every_row(None, None)])


# What vLLM is given, and its write.


def mixed_step(group, rank, cache_dtype, dtype):
    """Two decodes, which every rank has, in slots 3 and 9 and -1 on others; three tokens of a prefill, one of them a pad on rank 1.
    Ranks' copies of a decode differ here, so that it can be seen whose is cached."""
    exchange = StepExchange(Communicator(played(group)), 0)
    kv_c, k_pe = torch.full((5, RANK), 1.0 + rank), torch.full((5, 1, ROPE), -1.0 - rank)
    kv_c[2:] += torch.arange(3)[:, None]
    slots = torch.tensor([3, 9, 0, 1, 2, -1, -1, 4, 5, -1, 77])
    got = exchange.gather(kv_c, k_pe, slots)
    cache = torch.full((3, 4, RANK + ROPE), 8.0).to(dtype)
    stored = cache.view(torch.uint8) if cache_dtype != "auto" else cache  # as vLLM has it
    taken = exchange.write(got[0], stored, got[2], cache_dtype, torch.tensor([0.5]))
    return [x.clone() for x in got], cache, taken


@pytest.mark.parametrize(
    ("cache_dtype", "dtype", "scale"),
    [
        ("auto", torch.float32, 1.0),
        ("fp8", torch.float8_e4m3fn, 0.5),
        ("fp8_e4m3", torch.float8_e4m3fn, 0.5),
    ],
)
def test_every_rank_caches_the_copies_of_rank_0(cache_dtype, dtype, scale, vllm):
    results = play(2, lambda group: mixed_step(group, group.rank, cache_dtype, dtype))
    for (kv_c, k_pe, slots), cache, taken in results:
        assert taken
        assert kv_c.shape == (10, RANK)
        assert k_pe.shape == (10, 1, ROPE)
        assert slots.tolist() == [3, 9, 0, 1, 2, -1, -1, 4, 5, -1]
        assert kv_c[:, 0].tolist() == [1, 1, 1, 2, 3, 2, 2, 2, 3, 4]
        wanted = torch.full((12, RANK + ROPE), 8.0)
        for slot, value, rope in ((3, 1, -1), (9, 1, -1), (0, 1, -1), (1, 2, -1), (2, 3, -1), (4, 2, -2), (5, 3, -2)):
            wanted[slot, :RANK], wanted[slot, RANK:] = value / scale, rope / scale
        assert same_bits(cache.flatten(0, 1), wanted.to(dtype))
    assert dict(parts.counts) == {"exchange": 2, "cache_write": 2}


def test_what_write_does_not_know_is_vllms(vllm):
    def rank(group):
        exchange = StepExchange(Communicator(played(group)), 0)
        kv_c, k_pe, scale = torch.randn(2, RANK), torch.randn(2, 1, ROPE), torch.ones(1)
        cache = torch.zeros(2, 4, RANK + ROPE)
        slots = torch.arange(4)
        assert not exchange.write(kv_c, cache, slots, "auto", scale)  # nothing was gathered
        gathered, _, slots = exchange.gather(kv_c, k_pe, slots)
        assert not exchange.write(gathered, cache.bfloat16(), slots, "auto", scale)
        assert not exchange.write(gathered.clone(), cache, slots, "auto", scale)
        assert not exchange.write(kv_c, cache, slots, "auto", scale)
        assert not cache.any()
        assert exchange.write(gathered, cache, slots, "auto", scale)
        return cache

    caches = play(2, rank)
    assert parts.counts["cache_write"] == 2
    assert caches[0].flatten(0, 1)[:4].count_nonzero() == 4 * (RANK + ROPE)
    assert torch.equal(caches[0], caches[1])


def test_vllms_own_write_can_take_them(vllm):
    """What is handed out lies in one buffer, and is still a [n, rank] and a [n, 1, rope]."""

    def rank(group):
        exchange = StepExchange(Communicator(played(group)), 0)
        kv_c, k_pe = torch.randn(3, RANK), torch.randn(3, 1, ROPE)
        got_c, got_pe, _ = exchange.gather(kv_c, k_pe, torch.arange(6))
        mine = slice(3 * group.rank, 3 * group.rank + 3)
        assert torch.equal(got_c[mine], kv_c)
        assert torch.equal(got_pe[mine], k_pe)
        packed = torch.cat((got_c, got_pe.squeeze(1)), 1)
        cache, ours = torch.zeros(2, 6, RANK + ROPE)
        write_latent_cache(packed, cache.view(1, 6, -1), torch.arange(6))
        assert exchange.write(got_c, ours.view(1, 6, -1), torch.arange(6), "auto", torch.ones(1))
        assert torch.equal(cache, ours)

    play(2, rank)


def test_latents_of_two_kinds_have_exchanges_of_their_own(vllm):
    def rank(group):
        exchange = StepExchange(Communicator(played(group)), 0)
        small, wide = exchange.gather(torch.ones(2, 8), torch.ones(2, 1, 2), torch.arange(4)), torch.zeros(2, RANK)
        exchange.gather(wide, torch.zeros(2, 1, ROPE), torch.arange(4))
        assert small[0].eq(1).all()
        half = exchange.gather(torch.full((2, 8), 2.0).bfloat16(), torch.ones(2, 1, 2).bfloat16(), torch.arange(4))
        assert half[0].dtype == torch.bfloat16
        assert small[0].eq(1).all()

    play(2, rank)


class PlayedPeers:
    """In place of a PeerExchange, without a GPU: notes what it is asked to do."""

    max_tokens = 8

    def __init__(self, refused=()):
        self.refused, self.attached, self.published = refused, [], []

    def attach(self, caches):
        self.attached.append(caches[0].data_ptr())
        if self.attached[-1] in self.refused:
            raise PeersUnavailable("rank 0 of 2: sealed")

    def publish_rows(self, kv_c, k_pe, slots, cache, scale, step):
        self.published.append((kv_c, k_pe.shape, slots.tolist(), cache.dtype, scale, step))


@pytest.fixture
def peers(monkeypatch, vllm):
    made = PlayedPeers()
    monkeypatch.setattr(latents, "PeerExchange", PlayedPeers)
    monkeypatch.setattr(latents, "choose_exchange", lambda *_, **__: made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_peers_store_what_vllm_asks_to_cache(peers):
    """What is asked for first are this rank's own latents; a cache is opened once, in the step that first writes to it."""

    def rank(group):
        exchange = StepExchange(Communicator(played(group)), 0, True)
        kv_c, k_pe, scale, slots = torch.randn(3, RANK), torch.randn(3, 1, ROPE), torch.ones(1), torch.arange(9)
        caches = [torch.zeros(2, 4, RANK + ROPE), torch.zeros(2, 4, RANK + ROPE, dtype=torch.uint8)]
        for step in (1, 2):
            exchange.step = step
            for cache, kind in zip(caches, ("auto", "fp8"), strict=True):
                got = exchange.gather(kv_c, k_pe, slots)
                assert got[0] is kv_c
                assert got[1] is k_pe
                assert exchange.write(got[0], cache, got[2], kind, scale)
        assert peers.attached == [cache.data_ptr() for cache in caches]
        own, wanted = (3, ROPE), list(range(6))
        for at, (given, shape, numbers, dtype, factor, step) in enumerate(peers.published):
            assert given is kv_c
            assert (shape, numbers, step) == (own, wanted, 1 + at // 2)
            assert (dtype, factor) == ((torch.float32, None), (torch.float8_e4m3fn, scale))[at % 2]
        assert len(peers.published) == 4
        peers.attached.clear()
        peers.published.clear()

    play(2, rank)


def test_own_latents_are_not_left_to_vllms_write(peers):
    def rank(group):
        exchange = StepExchange(Communicator(played(group)), 0, True)
        kv_c, cache = torch.randn(3, RANK), torch.zeros(2, 4, RANK + ROPE)
        exchange.gather(kv_c, torch.randn(3, 1, ROPE), torch.arange(6))
        with pytest.raises(RuntimeError, match="latents to cache must be those of the last gather"):
            exchange.write(kv_c[:2], cache, torch.arange(6), "auto", torch.ones(1))

    play(2, rank)


def test_a_cache_that_cannot_be_opened_is_told_once(peers, caplog):
    def rank(group):
        exchange = StepExchange(Communicator(played(group)), 0, True)
        kv_c, k_pe, cache = torch.randn(3, RANK), torch.randn(3, 1, ROPE), torch.zeros(2, 4, RANK + ROPE)
        peers.refused = (cache.data_ptr(),)
        for _ in range(2):
            got = exchange.gather(kv_c, k_pe, torch.arange(6))
            assert exchange.write(got[0], cache, got[2], "auto", torch.ones(1))

    caplog.set_level("WARNING", "vllm.pcp_mla")
    play(1, rank)
    assert [record.getMessage() for record in caplog.records] == [
        "pcp-mla: a cache is filled by a launch of its own: rank 0 of 2: sealed"
    ]
    assert len(peers.published) == 2


def test_steps_are_counted(vllm):
    vllm()
    register()
    _, manager = modules()
    State.exchange = SimpleNamespace(step=4)
    manager.PCPManager().partition_batch(SimpleNamespace(), "graphs")
    assert State.exchange.step == 5
