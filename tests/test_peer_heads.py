"""The exchange of heads by peers: what indexing says, by threads of one GPU and on several."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from batches import same_bits
from pcp_mla import PCPMetadata, PeerHeadExchange, heads_of
from pcp_mla.exchange.choose import choose_heads
from pcp_mla.exchange.peer_memory import PeersUnavailable, agree
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.launch import run_distributed
from peer_ranks import in_own_process, run_threads
from test_heads import DTYPES, HEADS, QK, ROOM, STEPS, V, dims_of, forms, rows_of


def settle(group):
    """Wait until this rank's calls are done, then for the others. To wait for a stream could keep other threads from what it waits
    for."""
    while not torch.cuda.current_stream().query():
        time.sleep(0.001)
    if group is not None:
        agree(group, torch.device("cuda", torch.cuda.current_device()), {})


def exchange_steps(group, layout, num_heads, dtype):
    """Every step there and back, in every form; whether all is what indexing says. Everything is made before the first call: ranks
    of one process wait for one another's kernels, and to allocate is to wait for kernels, too. So is to load a kernel: a first
    round waits after each call."""
    world, rank = group_world_size(group), group_rank(group)
    exchange = PeerHeadExchange(group, ROOM, dims_of(num_heads), dtype, timeout=20.0)
    first, last = heads_of(num_heads, world, rank)
    assert exchange.heads == slice(first, last)
    calls = []
    for number, step in enumerate(STEPS):
        metas = [PCPMetadata.build(*step, world_size=world, rank=r, layout=layout, device="cuda") for r in range(world)]
        meta = metas[rank]
        queries, outs = (rows_of(metas, width, num_heads, dtype, 2 * number + i) for i, width in enumerate((QK, V)))
        wanted, back = torch.cat(queries)[:, first:last], outs[rank][: meta.num_tokens]
        pairs = zip(forms(queries[rank][: meta.num_tokens]), forms(torch.cat(outs)[:, first:last]), strict=True)
        for form, (q, out) in enumerate(pairs):
            result = torch.empty_like(back) if form == 1 else None
            calls.append((exchange.to_heads, (q, meta), wanted, torch.empty_like(wanted)))
            calls.append((exchange.to_tokens, (out, meta, result), back, torch.empty_like(back)))
    with pytest.raises(ValueError, match=rf"PeerHeadExchange.to_heads: q must have {num_heads} heads of width 12, got 1 of"):
        exchange.to_heads(calls[0][1][0][:, :1], calls[0][1][1])
    with pytest.raises(ValueError, match=f"PeerHeadExchange.to_tokens: out must have {last - first} heads of width 8, got 0 of"):
        exchange.to_tokens(calls[1][1][0][:, :0], calls[1][1][1])
    same = []
    for first_round in (True, False):
        for *_, kept in calls:
            kept.zero_()
        settle(group)
        for call, arguments, _, kept in calls:
            kept.copy_(call(*arguments))
            if first_round:
                settle(group)
        settle(group)
        same += [same_bits(kept, right) for *_, right, kept in calls]
    settle(group)
    exchange.close()
    return same


def exchange_all(group, layout):
    world, same = group_world_size(group), []
    with torch.inference_mode():
        for num_heads, dtype in itertools.product(HEADS, DTYPES):
            if num_heads >= world:
                same += exchange_steps(group, layout, num_heads, dtype)
    return same


LAYOUTS, WORLDS = ("unpadded", "padded"), (2, 3, 8)


def exchange_on_threads(_):
    results = {}
    for world, layout in itertools.product(WORLDS, LAYOUTS):
        results[world, layout] = [(len(same), sum(same)) for same in run_threads(world, exchange_all, layout)]
    return results


@pytest.fixture(scope="module")
def on_threads():
    return in_own_process(exchange_on_threads)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_bits_of_all_ranks(world, layout, on_threads):
    ranks = on_threads[world, layout]
    assert len(ranks) == world
    assert all(calls == right > 0 for calls, right in ranks)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_processes():
    for same in run_distributed(2, exchange_all, "unpadded", backend="nccl"):
        assert same
        assert all(same)


@pytest.mark.gpu
def test_a_world_of_one():
    meta = PCPMetadata.build([9], world_size=1, rank=0, device="cuda")
    exchange = PeerHeadExchange(None, 9, dims_of(3), torch.float32)
    q, out = torch.zeros(9, 3, QK, device="cuda"), torch.ones(9, 3, V, device="cuda")
    result = torch.zeros_like(out)
    with torch.inference_mode():
        assert exchange.to_heads(q, meta) is q
        assert exchange.to_tokens(out, meta) is out
        assert exchange.to_tokens(out, meta, result) is result
        assert result.all()
        for call, x, words in (
            (exchange.to_heads, q[1:], "q must have 9 rows, as the step that meta describes, got 8"),
            (exchange.to_tokens, q, "out must have 3 heads of width 8, got 3 of width 12"),
        ):
            with pytest.raises(ValueError, match=words):
                call(x, meta)
    exchange.close()
    for call in (lambda: exchange.to_heads(q, meta), lambda: exchange.to_tokens(out, meta), exchange.check):
        with pytest.raises(RuntimeError, match="must not be closed"):
            call()


def exchange_in_graph(group):
    """Two layers there and back, captured and replayed with other queries each time; now and then one layer is not of the graph."""
    world, rank = group_world_size(group), group_rank(group)
    meta = PCPMetadata.build([150], world_size=world, rank=rank, device="cuda")
    exchange = PeerHeadExchange(group, ROOM, dims_of(5), torch.float32, timeout=20.0)
    q = torch.zeros(meta.num_tokens, 5, QK, device="cuda")
    kept = [torch.zeros(meta.num_tokens, 5, V, device="cuda") for _ in range(2)]

    def layer(number):
        got = exchange.to_heads(q, meta)
        kept[number].copy_(exchange.to_tokens(got[..., :V] * 2 + number, meta))

    with torch.inference_mode():
        layer(0), layer(1)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        layer(0), layer(1)
    same = []
    for number in range(30):
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(100 * number + rank)))
        graph.replay()
        if number % 3 == 0:
            with torch.inference_mode():
                layer(1)
        same += [torch.equal(to, q[..., :V] * 2 + i) for i, to in enumerate(kept)]
    exchange.check()
    return same


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_graph_of_two_layers():
    for same in run_distributed(2, exchange_in_graph, backend="nccl"):
        assert same
        assert all(same)


class StormStep:
    """A step's rows of this rank, and what it is to get; a number is added to all that is no pad."""

    def __init__(self, rng, world, rank, num_heads):
        lengths = [int(n) for n in rng.integers(1, 400, rng.integers(1, 4))]
        metas = [PCPMetadata.build(lengths, world_size=world, rank=r, device="cuda") for r in range(world)]
        self.meta, (first, last) = metas[rank], heads_of(num_heads, world, rank)

        def numbers(width):  # of all ranks: which row, head and column it is
            rows = torch.arange(world * self.meta.num_tokens_padded * num_heads * width, device="cuda") % 8191 * 1.0
            return rows.view(world, -1, num_heads, width)

        queries, outs = numbers(QK), numbers(V)
        self.real = torch.zeros(queries.shape[:2], device="cuda")
        for real, of, meta in zip(self.real, queries, metas, strict=True):
            real[: meta.num_tokens] = 1
            of[meta.num_tokens :] = 0
        self.real = self.real.flatten()[:, None, None]
        self.q, self.heads = queries[rank, : self.meta.num_tokens], queries.flatten(0, 1)[:, first:last]
        self.out, self.tokens = outs.flatten(0, 1)[:, first:last].contiguous(), outs[rank, : self.meta.num_tokens]


def storm(group, calls, seed, num_heads):
    """How many of so many calls gave something wrong: of random steps and ways, the same one twice in a row, too, on either of two
    streams, the ranks at their own pace."""
    world, rank = group_world_size(group), group_rank(group)
    shared, own = np.random.default_rng(seed), np.random.default_rng(seed + 1 + rank)
    bad, streams = torch.zeros((), dtype=torch.int64, device="cuda"), [torch.cuda.Stream() for _ in range(2)]

    def pause():
        if own.random() < 0.02:
            torch.cuda._sleep(int(own.integers(1000, 400_000)))

    with torch.inference_mode():
        steps = [StormStep(shared, world, rank, num_heads) for _ in range(12)]
        exchange = PeerHeadExchange(group, 1200, dims_of(num_heads), torch.float32, timeout=30.0)
        torch.cuda.synchronize()
        step = steps[0]
        for number in range(calls):
            if shared.random() < 0.3:
                step = steps[shared.integers(len(steps))]
            with torch.cuda.stream(streams[shared.integers(2)]):
                pause()
                if shared.random() < 0.5:
                    got, right = exchange.to_heads(step.q + number % 1000, step.meta), step.heads + step.real * (number % 1000)
                else:
                    got, right = exchange.to_tokens(step.out + number % 1000, step.meta), step.tokens + number % 1000
                pause()
                wrong = (got != right).any()
                bad += wrong
        exchange.check()
        exchange.close()
        return int(bad)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("num_heads", [4, 5])
def test_random_ways_steps_and_delays(num_heads):
    """STRESS_EXCHANGES sets how many."""
    calls = int(os.environ.get("STRESS_EXCHANGES", "2000"))
    assert run_distributed(2, storm, calls, 3, num_heads, backend="nccl", timeout=600.0) == [0, 0]


# Three ranks on threads, of which the second one does something else in its third call.
APART = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from peer_ranks import run_threads
from test_heads import QK, V, dims_of
from pcp_mla import PCPMetadata, PeerHeadExchange

def run(group):
    meta = PCPMetadata.build([70], world_size=3, rank=group.rank, device="cuda")
    exchange = PeerHeadExchange(group, 80, dims_of(5), torch.float32, timeout=1.0)
    mine = exchange.heads.stop - exchange.heads.start
    q = torch.zeros(meta.num_tokens, 5, QK, device="cuda")
    out = torch.zeros(3 * meta.num_tokens_padded, mine, V, device="cuda")
    exchange.to_heads(q, meta)
    exchange.to_tokens(out, meta)
    torch.cuda.current_stream().synchronize()
    group.all_gather(torch.zeros(1))
    if group.rank == 1 and {how!r} == "absent":
        return "absent"
    began = time.monotonic()
    try:
        exchange.to_tokens(out, meta) if group.rank == 1 else exchange.to_heads(q, meta)
        exchange.check()
    except RuntimeError as error:
        print(f"{{error}} after {{time.monotonic() - began:.0f}} s", flush=True)

try:
    run_threads(3, run)
except RuntimeError:  # the context is gone when the streams are waited for
    pass
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("absent", r"PeerHeadExchange: call 3 of rank [02]: rank 1 did not come within 1 s \(its last call: 2\) after \d s"),
        ("elsewhere", r"PeerHeadExchange: call 3 of rank \d: rank \d made a different call.* after \d s"),
    ],
)
def test_a_rank_that_is_missing_or_makes_another_call_is_named(how, words):
    script = APART.format(tests=str(Path(__file__).resolve().parent), how=how)
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert re.search(words, done.stdout), (done.stdout, done.stderr)


# One rank of two, which comes late to its third call.
LATE = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from test_heads import QK, V, dims_of
from pcp_mla import PCPMetadata, PeerHeadExchange

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.cuda.set_device(rank)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
with torch.inference_mode():
    meta = PCPMetadata.build([70], world_size=2, rank=rank, device="cuda")
    exchange = PeerHeadExchange(dist.group.WORLD, 80, dims_of(4), torch.float32, timeout=3.0)
    q = torch.zeros(meta.num_tokens, 4, QK, device="cuda")
    out = torch.zeros(2 * meta.num_tokens_padded, 2, V, device="cuda")
    exchange.to_heads(q, meta)
    exchange.to_tokens(out, meta)
    exchange.check()
    dist.barrier()
    if rank == 1:
        time.sleep(5)
    try:
        for call, x in ((exchange.to_heads, q), (exchange.to_tokens, out)):  # rows of a rank that gave up are there
            call(x, meta)
            exchange.check()
        print("no error", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_a_late_rank_ends_all(tmp_path):
    script = LATE.format(tests=str(Path(__file__).resolve().parent))
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert "PeerHeadExchange: call 3 of rank 0: rank 1 did not come within 3 s (its last call: 2)" in said[0][0], said
    assert "rank 0 did not come within 3 s" in said[1][0], said


def chosen(group, device):
    return type(choose_heads(group, ROOM, dims_of(4), torch.float32, device)).__name__


def test_choice(monkeypatch):
    assert chosen(None, "cpu") == "HeadExchange"
    monkeypatch.setenv("PCP_MLA_EXCHANGE", "peers")
    with pytest.raises(PeersUnavailable, match="tensors on cpu"):
        chosen(None, "cpu")
    monkeypatch.setenv("PCP_MLA_EXCHANGE", "mpi")
    with pytest.raises(ValueError, match="PCP_MLA_EXCHANGE must be one of nccl, peers, got 'mpi'"):
        chosen(None, "cpu")


def refused(group):
    """One rank's refusal is everyone's."""
    words = []
    for why in ("", "a reason"):
        with pytest.raises(PeersUnavailable) as caught:
            PeerHeadExchange(group, 4, dims_of(4), torch.float32, "cpu", why_not=why if group_rank(group) else "")
        words.append(str(caught.value))
    return words


def test_a_refusal_is_the_same_everywhere():
    assert run_distributed(2, refused) == [["rank 0 of 2: tensors on cpu"] * 2] * 2


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_choice_of_several_gpus():
    assert run_distributed(2, chosen, "cuda", backend="nccl") == ["PeerHeadExchange"] * 2


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "PeerHeadExchange: max_tokens must be at least 0, got -1", {"max_tokens": -1}),
        (TypeError, "dims must be MLADims", {"dims": None}),
        (TypeError, "dtype must be a torch.dtype", {"dtype": "bf16"}),
        (ValueError, "PeerHeadExchange: timeout must be positive and at most 86400, got 0", {"timeout": 0}),
        (ValueError, "max_sms must be at most 132, got 133", {"max_sms": 133}),
        (PeersUnavailable, "tensors on cpu", {}),
    ],
)
def test_constructor(error, match, change):
    arguments = {"group": None, "max_tokens": 4, "dims": MLADims(4, 8, 4, 8, 12), "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(error, match=match):
        PeerHeadExchange(**{**arguments, **change})
