"""How ranks come to see one another's memory: every step by all or by none. CUDA is played: addresses and handles are numbers."""

import ctypes
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from pcp_mla.exchange import peer_memory
from pcp_mla.exchange.peer_memory import PeerMemory, PeersUnavailable
from pcp_mla.testing.played import play

DEVICE = torch.device("cpu", 0)


class PlayedCuda:
    """Allocations of 1000 bytes, whose handle is their number; what fails does so for one rank alone."""

    def __init__(self, monkeypatch):
        self.words, self.open, self.closed = {}, [], []
        self.lost = self.sealed = self.barred = None
        self.rank, self.processes, self.host = 0, {}, {}
        monkeypatch.setattr(peer_memory, "call", self)
        monkeypatch.setattr(peer_memory, "_process", lambda: f"process {self.processes.get(self.rank, self.rank)}")
        monkeypatch.setattr(peer_memory, "_host", lambda: self.host.get(self.rank, "here"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))

    def __call__(self, name, device, first, *rest):
        getattr(self, name)(first, *rest)

    def peer_export(self, address, handle, offset):
        if self.sealed == self.rank:
            raise RuntimeError("invalid argument")
        handle[0] = address // 1000
        offset._obj.value = address % 1000

    def peer_import(self, handle, base):
        if self.barred == self.rank:
            raise RuntimeError("peer access is not supported")
        self.open.append((self.rank, handle[0]))
        base._obj.value = 100_000 * (self.rank + 1) + 1000 * handle[0]

    def peer_close(self, base):
        self.closed.append((self.rank, base % 100_000 // 1000))

    def peer_store(self, address, value):
        if (self.rank, address // 1000) != self.lost:
            self.words[address] = value

    def peer_load(self, address, word):
        word._obj.value = self.words.get(address, 0)

    def play(self, world, fn):
        """Each rank's result or refusal."""

        def of_rank(group):
            ours = SimpleNamespace(world_size=world, rank=group.rank)
            ours.all_gather = lambda rows: self.turn(group, rows)
            self.rank = group.rank
            try:
                return fn(ours)
            except PeersUnavailable as error:
                return str(error)

        return play(world, of_rank)

    def turn(self, group, rows):
        gathered = group.all_gather(rows)
        self.rank = group.rank
        return gathered


@pytest.fixture
def cuda(monkeypatch):
    return PlayedCuda(monkeypatch)


def test_every_rank_finds_what_the_others_named(cuda):
    def rank(group):
        memory = PeerMemory(group, DEVICE)
        own = 1000 * (group.rank + 1)
        found = memory.everywhere([own + 16, own + 512], ["a kind"])
        again = memory.everywhere([own + 700])
        memory.close()
        return found, again

    results = cuda.play(3, rank)
    for r, (found, again) in enumerate(results):
        bases = [1000 * (o + 1) + (0 if o == r else 100_000 * (r + 1)) for o in range(3)]
        assert found == [[base + 16 for base in bases], [base + 512 for base in bases]]
        assert again == [[base + 700 for base in bases]]
    assert sorted(cuda.open) == sorted(cuda.closed) == [(r, o + 1) for r in range(3) for o in range(3) if o != r]


def attempt(group, refusal="", kind=None):
    return PeerMemory(group, DEVICE).everywhere([1000 * (group.rank + 1)], kind, refusal)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"sealed": 2},
            "rank 2 of 3: memory that other processes cannot open (expandable segments, or another allocator): invalid",
        ),
        ({"barred": 1}, "rank 1 of 3 cannot open the others' memory: peer access is not supported"),
        ({"host": {1: "elsewhere"}}, "rank 1 of 3 is on another host than rank 0"),
        ({"processes": {1: 2, 2: 2}}, "rank 2 of 3 shares a process and a stream with another one"),
    ],
)
def test_what_keeps_one_rank_keeps_all(cuda, change, words):
    for name, value in change.items():
        setattr(cuda, name, value)
    results = cuda.play(3, attempt)
    assert len(set(results)) == 1
    assert words in results[0]
    assert sorted(cuda.open) == sorted(cuda.closed)


def test_gpus_of_one_process(cuda):
    cuda.processes = {0: 5, 1: 5}
    results = cuda.play(2, lambda group: PeerMemory(group, torch.device("cpu", group.rank)).everywhere([1000]))
    assert results == ["rank 1 of 2 is of one process with a rank of another GPU"] * 2


def test_a_process_is_known_by_more_than_its_number(monkeypatch):
    """Containers count their processes by themselves."""
    first = peer_memory._process()
    assert peer_memory._process() == first
    monkeypatch.setattr(peer_memory, "_tokens", {})  # as in a process of its own
    assert peer_memory._process() != first
    assert peer_memory._process().split()[0] == first.split()[0]


def test_threads_that_ask_at_once_are_of_one_process(monkeypatch):
    """Each is between the question and its answer when the others ask, too."""
    monkeypatch.setattr(peer_memory, "_tokens", {})
    barrier, numbers = threading.Barrier(4), itertools.count()

    def token_hex(_):
        barrier.wait(10)
        return str(next(numbers))

    monkeypatch.setattr(peer_memory.secrets, "token_hex", token_hex)
    with ThreadPoolExecutor(4) as pool:
        assert len({asked.result() for asked in [pool.submit(peer_memory._process) for _ in range(4)]}) == 1


def test_refusals_and_kinds(cuda):
    assert cuda.play(2, lambda group: attempt(group, "no wish" if group.rank else "")) == ["rank 1 of 2: no wish"] * 2
    words = "rank 1 of 2 has ['bf16', 1], rank 0 ['bf16', 0]"
    assert cuda.play(2, lambda group: attempt(group, kind=["bf16", group.rank])) == [words] * 2
    assert not cuda.open


@pytest.mark.parametrize("lost", [None, (1, 1), (0, 2), (2, 3)])
def test_stores_that_do_not_arrive(cuda, lost):
    """From the rank first named, into the allocation of the other."""
    cuda.lost = lost

    def rank(group):
        PeerMemory(group, DEVICE).try_out([1000, 2000, 3000])
        return "fine"

    words = "fine" if lost is None else f"a store of rank {lost[0]} did not arrive on rank {lost[1] - 1}"
    assert cuda.play(3, rank) == [words] * 3


def test_structure_of_a_mailbox():
    """As csrc/cuda/peer_memory.cu has it: seven 32-bit numbers, a gap, three of 64 bits, an address a rank."""
    assert ctypes.sizeof(peer_memory.MailboxForm) == 8 * 4 + 3 * 8 + 8 * peer_memory.MAX_PEERS
    assert peer_memory.MailboxForm.timeout_ns.offset == 32
