"""The exchange by peers: caches of all ranks bit-equal to a write of all latents, by threads of one GPU and on several."""

import functools
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

from batches import random_bytes, same_bits
from pcp_mla import LatentExchange, PCPMetadata, PCPPlanner, PeerExchange, reference, write_latent_cache
from pcp_mla.exchange import choose
from pcp_mla.exchange.choose import choose_exchange
from pcp_mla.exchange.peer_memory import PeersUnavailable, agree
from pcp_mla.groups import group_rank, group_world_size
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.launch import run_distributed
from pcp_mla.testing.played import play
from peer_ranks import in_own_process, run_threads
from peer_storm import models, storm

DIMS = MLADims(2, 8, 16, 8, 48)
BLOCK, BLOCKS, ROOM = 8, 40, 160
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
# New tokens, cached ones, which are prefills: some ranks have no token, some steps decodes beside prefills or alone.
STEPS = [
    ([70, 9], [0, 16], [True, True]),
    ([1], [0], [True]),
    ([5, 1, 1, 30], [3, 9, 40, 0], [True, False, False, True]),
    ([1, 1, 2], [3, 9, 40], [False, False, False]),
    ([150], [0], [True]),
    ([3], [2], [True]),
]


def plan(step, world, rank, device, layout="unpadded"):
    """A step's metadata, whose blocks any rank can work out. The planner is its own, so that it stays."""
    return _planned(STEPS.index(step), world, rank, device, layout)


@functools.cache
def _planned(number, world, rank, device, layout):
    lengths, contexts, prefills = STEPS[number]
    blocks = np.random.default_rng(sum(lengths)).permutation(BLOCKS).astype(np.int32)
    needed = [-(-(new + old) // BLOCK) for new, old in zip(lengths, contexts, strict=True)]
    tables = np.full((len(lengths), max(needed)), -1, np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(needed), needed, strict=True)):
        tables[row, :count] = blocks[end - count : end]
    planner = PCPPlanner(8, ROOM, world, rank, block_size=BLOCK, device=device, layout=layout)
    meta = planner.plan(lengths, contexts, prefills, torch.from_numpy(tables).to(device))
    if device != "cpu":  # ranks have streams of their own
        torch.cuda.current_stream().synchronize()
    return meta


def latents_of(step, number, world, dtype, device, layout):
    """Of all ranks, rank-major, as an all-gather leaves them; pads are zeros. Replicated decodes are the same everywhere."""
    metas = [plan(step, world, rank, device, layout) for rank in range(world)]
    natural = random_bytes((sum(step[0]), DIMS.latent_dim), dtype, device, torch.Generator().manual_seed(number))
    gathered = torch.zeros(world, metas[0].num_tokens_padded, DIMS.latent_dim, device=device).to(dtype)
    for to, meta in zip(gathered, metas, strict=True):
        to.view(torch.uint8)[: meta.num_tokens] = natural.view(torch.uint8)[meta.local_token_indices.long()]
    return gathered


def forms(latents):
    """The same kv_c and k_pe, side by side, apart, and at odd addresses."""
    rank = DIMS.kv_lora_rank
    item = latents.element_size()
    wide = torch.zeros(len(latents), (latents.shape[1] + 3) * item, dtype=torch.uint8, device=latents.device)
    wide[:, item : -2 * item] = latents.view(torch.uint8)
    wide = wide.view(latents.dtype)
    return [
        (latents[:, :rank], latents[:, rank:]),
        (latents[:, :rank].clone(), latents[:, rank:].clone()),
        (wide[:, 1 : 1 + rank], wide[:, 1 + rank : -2]),
    ]


def publish_all(group, device, dtype, layout, attached, scale=None):
    """Publish every step in every form into two layers' caches in turn; whether all is as it should be.

    Everything is made before the first call: ranks of one process wait for one another's kernels, and to allocate is to wait for
    kernels, too.
    """
    world, rank = group_world_size(group), group_rank(group)
    of = dtype if scale is None else torch.float8_e4m3fn
    whole = random_bytes((2, BLOCKS, BLOCK, DIMS.latent_dim), of, device, torch.Generator().manual_seed(5))
    caches, wanted, spare = [whole[0], whole[1]], [whole[0].clone(), whole[1].clone()], whole[0].clone()
    exchange = PeerExchange(group, ROOM, DIMS, dtype, device, caches=caches if attached else (), timeout=20.0)
    scale = None if scale is None else torch.full((1,), scale, device=device)
    calls = []
    for number, (step, form, layer) in enumerate(itertools.product(STEPS, range(3), range(2))):
        meta = plan(step, world, rank, device, layout)
        gathered = latents_of(step, number, world, dtype, device, layout)
        kv_c, k_pe = forms(gathered[rank, : meta.num_tokens])[form]
        reference.write_latent_cache(gathered.flatten(0, 1), wanted[layer], meta.slot_mapping, scale)
        write_latent_cache(gathered.flatten(0, 1), spare, meta.slot_mapping, scale=scale)  # its kernel is loaded then
        calls.append((kv_c, k_pe, meta, caches[layer], wanted[layer].clone(), torch.empty_like(whole[0])))
        if scale is None:
            rows = gathered.flatten(0, 1)
            if meta.is_replicated and world > 1:
                rows = gathered[0, : meta.num_tokens]
            calls.append((kv_c, k_pe, meta, None, rows, torch.empty_like(rows)))
    if world > 1:
        agree(group, torch.device(device), {})
    for kv_c, k_pe, meta, cache, right, kept in calls:
        got = exchange.publish(kv_c, k_pe, meta, cache, scale=scale)
        assert cache is None or got is cache
        kept.copy_(got[: len(right)])
    while not torch.cuda.current_stream().query():  # to wait for it could keep other threads from what it waits for
        time.sleep(0.001)
    exchange.close()
    return [same_bits(kept, right) for *_, right, kept in calls]


FORMS = list(itertools.product(("unpadded", "padded"), (True, False), DTYPES, (None,)))
FORMS += [("unpadded", attached, dtype, 0.37) for attached in (True, False) for dtype in DTYPES[:3]]
WORLDS = (1, 2, 3, 8)


def publish_on_threads(_):
    """Calls, and those that were right, of each rank, by number of ranks and form. One rank alone comes first: kernels are loaded
    when they are first used, for which a GPU may stop, too."""
    results = {}
    for world, form in itertools.product(WORLDS, FORMS):
        layout, attached, dtype, scale = form
        arguments = ("cuda", dtype, layout, attached, scale)
        if world == 1:
            with torch.inference_mode():
                ranks = [publish_all(None, *arguments)]
        else:
            ranks = run_threads(world, publish_all, *arguments)
        results[(world, *form)] = [(len(same), sum(same)) for same in ranks]
    return results


@pytest.fixture(scope="module")
def on_threads():
    return in_own_process(publish_on_threads)


@pytest.mark.gpu
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_of_all_ranks(world, form, on_threads):
    ranks = on_threads[(world, *form)]
    assert len(ranks) == world
    assert all(calls == right > 0 for calls, right in ranks)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("attached", [True, False])
def test_processes(attached):
    for dtype in (torch.bfloat16, torch.float32):
        for same in run_distributed(2, publish_all, "cuda", dtype, "unpadded", attached, backend="nccl"):
            assert same
            assert all(same)


def publish_in_graph(group):
    """Two layers and a read of both, captured and replayed with other latents each time."""
    world, rank = group_world_size(group), group_rank(group)
    meta = plan(STEPS[0], world, rank, "cuda")
    caches = [torch.zeros(BLOCKS, BLOCK, DIMS.latent_dim, device="cuda") for _ in range(2)]
    exchange = PeerExchange(group, ROOM, DIMS, torch.float32, "cuda", caches=caches, timeout=20.0)
    mine = torch.zeros(meta.num_tokens, DIMS.latent_dim, device="cuda")
    kept = [torch.zeros_like(cache) for cache in caches]

    def layers():
        for cache, to in zip(caches, kept, strict=True):
            exchange.publish(mine[:, : DIMS.kv_lora_rank], mine[:, DIMS.kv_lora_rank :], meta, cache)
            to.copy_(cache)

    with torch.inference_mode():
        layers()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        layers()
    same = []
    for number in range(30):
        gathered = latents_of(STEPS[0], number, world, torch.float32, "cuda", "unpadded")
        mine.copy_(gathered[rank, : meta.num_tokens])
        graph.replay()
        right = kept[0].clone()
        reference.write_latent_cache(gathered.flatten(0, 1), right, meta.slot_mapping, None)
        same += [same_bits(to, right) for to in kept]
    exchange.check()
    return same


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_graph_of_a_step():
    for same in run_distributed(2, publish_in_graph, backend="nccl"):
        assert same
        assert all(same)


# Three ranks on threads, of which the second one does something else in its second call.
APART = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from peer_ranks import run_threads
from test_peer_exchange import DIMS, ROOM, STEPS, plan
from pcp_mla import PeerExchange, write_latent_cache

def run(group):
    meta = plan(STEPS[0], 3, group.rank, "cuda")
    exchange = PeerExchange(group, ROOM, DIMS, torch.float32, "cuda", timeout=1.0)
    latents = torch.zeros(meta.num_tokens, DIMS.latent_dim, device="cuda")
    cache = torch.zeros(40, 8, DIMS.latent_dim, device="cuda")
    kv_c, k_pe = latents[:, :DIMS.kv_lora_rank], latents[:, DIMS.kv_lora_rank:]
    # A cache that was not attached is written by a kernel more. To load it while this rank waits would keep the others from coming.
    write_latent_cache(torch.zeros(3 * meta.num_tokens_padded, DIMS.latent_dim, device="cuda"), cache, meta.slot_mapping)
    exchange.publish(kv_c, k_pe, meta)
    torch.cuda.current_stream().synchronize()
    group.all_gather(torch.zeros(1))
    if group.rank == 1 and {how!r} == "absent":
        return "absent"
    began = time.monotonic()
    try:
        exchange.publish(kv_c, k_pe, meta, cache if group.rank == 1 else None)
        exchange.check()
    except RuntimeError as error:
        print(f"{{error}} after {{time.monotonic() - began:.0f}} s", flush=True)
        try:
            exchange.publish(kv_c, k_pe, meta)
        except RuntimeError:
            print(f"and again from rank {{group.rank}}", flush=True)

try:
    run_threads(3, run)
except RuntimeError:  # the context is gone when the streams are waited for
    pass
"""


def told_of(how):
    script = APART.format(tests=str(Path(__file__).resolve().parent), how=how)
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout, done.stderr
    return done.stdout


@pytest.mark.gpu
def test_a_rank_that_is_missing_is_named_in_time():
    assert re.search(r"call 2 of rank [02]: rank 1 did not come within 1 s \(its last call: 1\) after \d s", told_of("absent"))


@pytest.mark.gpu
def test_a_rank_that_makes_another_call_is_named_at_once():
    assert re.search(r"call 2 of rank \d: rank \d made a different call.* after \d s", told_of("elsewhere"))


@pytest.mark.gpu
def test_arguments_are_checked_before_anything_is_sent():
    meta = plan(STEPS[0], 1, 0, "cuda")
    cache = torch.zeros(BLOCKS, BLOCK, DIMS.latent_dim, device="cuda")
    exchange = PeerExchange(None, ROOM, DIMS, torch.float32, "cuda")
    kv_c = torch.ones(meta.num_tokens, DIMS.kv_lora_rank, device="cuda")
    k_pe = torch.ones(meta.num_tokens, DIMS.qk_rope_head_dim, device="cuda")
    other = PCPMetadata.build([5], world_size=2, rank=0, device="cuda")
    for error, match, arguments in (
        (ValueError, "kv_c must have 79 rows", (kv_c[1:], k_pe, meta, cache)),
        (ValueError, "kv_c must have 79 rows", (kv_c[1:], k_pe[1:], meta, cache)),
        (ValueError, "48 and 16 wide, got 64 and 16", (kv_c.new_ones(len(kv_c), 64), k_pe, meta, cache)),
        (TypeError, "kv_c must be torch.float32, as the exchange", (kv_c.half(), k_pe.half(), meta, cache.half())),
        (ValueError, "contiguous last dimension", (torch.ones(48, len(kv_c), device="cuda").T, k_pe, meta, cache)),
        (ValueError, "must be on cuda:0, as meta", (kv_c.cpu(), k_pe.cpu(), meta, cache)),
        (TypeError, "kv_c must be a tensor", (None, k_pe, meta, cache)),
        (TypeError, "cache must be float32 as latents", (kv_c, k_pe, meta, cache.half())),
        (ValueError, "latents must have shape", (kv_c, k_pe, meta, cache[:, :, 1:])),
        (ValueError, "cache must not be expanded", (kv_c, k_pe, meta, cache[:1].expand(BLOCKS, -1, -1))),
        (ValueError, "cache must not share memory with kv_c", (cache.view(-1, 64)[:79, :48], k_pe, meta, cache)),
        (ValueError, "meta must be for rank 0 of 1", (kv_c, k_pe, other, None)),
        (TypeError, "meta must be a PCPMetadata", (kv_c, k_pe, None, None)),
    ):
        with pytest.raises(error, match=match), torch.inference_mode():
            exchange.publish(*arguments)
    with pytest.raises(NotImplementedError, match="must not require gradients"):
        exchange.publish(kv_c.clone().requires_grad_(), k_pe, meta, cache)
    assert not cache.any()
    assert exchange.publish(kv_c, k_pe, meta, cache) is cache  # also where gradients are on
    assert cache.sum() == 79 * 64
    exchange.close()
    for call in (
        lambda: exchange.publish(kv_c, k_pe, meta, cache),
        lambda: exchange.publish_rows(kv_c, k_pe, meta.slot_mapping, cache),
        lambda: exchange.attach([cache]),
        exchange.check,
    ):
        with pytest.raises(RuntimeError, match="must not be closed"):
            call()
    with pytest.raises(TypeError, match="meta must be a PCPMetadata"):
        exchange.publish(kv_c, k_pe, None)


def unwilling(group):
    """One rank's refusal is everyone's."""
    said = agree(group, torch.device("cpu"), {"rank": group_rank(group), "long": "x" * 100 * group_rank(group)})
    assert [(each["rank"], len(each["long"])) for each in said] == [(rank, 100 * rank) for rank in range(len(said))]
    words = []
    for why in ("", "a reason" if group_rank(group) == 1 else ""):
        with pytest.raises(PeersUnavailable) as caught:
            PeerExchange(group, 4, DIMS, torch.float32, "cpu", why_not=why)
        words.append(str(caught.value))
    return words


def test_a_refusal_is_the_same_everywhere():
    assert run_distributed(3, unwilling) == [["rank 0 of 3: tensors on cpu"] * 2] * 3


@pytest.mark.gpu
def test_ranks_that_share_a_stream_are_refused():
    def make(group):
        with pytest.raises(PeersUnavailable, match="rank 1 of 2 shares a process and a stream with another one"):
            PeerExchange(group, 4, DIMS, torch.float32, "cuda")
        return type(choose_exchange(group, 4, DIMS, torch.float32, "cuda"))

    assert play(2, make) == [LatentExchange] * 2


def chosen(group, device):
    return type(choose_exchange(group, ROOM, DIMS, torch.float32, device)).__name__


def test_choice(monkeypatch):
    assert chosen(None, "cpu") == "LatentExchange"
    monkeypatch.setenv("PCP_MLA_EXCHANGE", "peers")
    with pytest.raises(PeersUnavailable, match="tensors on cpu"):
        chosen(None, "cpu")
    monkeypatch.setenv("PCP_MLA_EXCHANGE", "mpi")
    with pytest.raises(ValueError, match="PCP_MLA_EXCHANGE must be one of nccl, peers, got 'mpi'"):
        chosen(None, "cpu")


def test_caches_that_cannot_be_attached_are_no_hindrance(monkeypatch):
    """Rows go by the staging buffer then."""

    class Sealed:
        def __init__(self, *arguments, timeout):
            assert timeout == 7.0

        def attach(self, caches):
            assert caches == ["a cache"]
            raise PeersUnavailable("sealed")

    monkeypatch.setattr(choose, "PeerExchange", Sealed)
    monkeypatch.setenv("PCP_MLA_EXCHANGE", "peers")
    assert isinstance(choose_exchange(None, 4, DIMS, torch.float32, "cpu", caches=["a cache"], timeout=7.0), Sealed)


def chosen_by_ranks(group, device, ways):
    """What the ranks get, or why not, where each asks for a way of its own."""
    results = []
    for pair in ways:
        os.environ["PCP_MLA_EXCHANGE"] = pair[group_rank(group)]
        try:
            results.append(chosen(group, device))
        except (ValueError, PeersUnavailable) as error:
            results.append(str(error))
    return results


def test_a_way_that_one_rank_asks_for():
    ways = [("", ""), ("peers", "nccl"), ("", "peers"), ("mpi", "peers"), ("nccl", "mpi")]
    refused = "PCP_MLA_EXCHANGE must be one of nccl, peers, got 'mpi'"
    wanted = ["LatentExchange"] * 2 + ["rank 0 of 2: tensors on cpu", f"rank 0: {refused}", f"rank 1: {refused}"]
    assert run_distributed(2, chosen_by_ranks, "cpu", ways) == [wanted] * 2


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_choice_of_one_rank_is_that_of_all():
    ways = [("", ""), ("", "nccl"), ("peers", "")]
    assert (
        run_distributed(2, chosen_by_ranks, "cuda", ways, backend="nccl")
        == [["PeerExchange", "LatentExchange", "PeerExchange"]] * 2
    )


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "max_tokens must be at least 0, got -1", {"max_tokens": -1}),
        (TypeError, "dims must be MLADims", {"dims": None}),
        (TypeError, "dtype must be a torch.dtype", {"dtype": "bf16"}),
        (ValueError, "timeout must be positive and at most 86400, got 0", {"timeout": 0}),
        (ValueError, "timeout must be positive and at most 86400, got inf", {"timeout": float("inf")}),
        (ValueError, "max_sms must be at most 132, got 133", {"max_sms": 133}),
        (ValueError, "max_sms must be at least 1, got 0", {"max_sms": 0}),
        (PeersUnavailable, "tensors on cpu", {}),
    ],
)
def test_constructor(error, match, change):
    with pytest.raises(error, match=match):
        PeerExchange(**{"group": None, "max_tokens": 4, "dims": DIMS, "dtype": torch.float32, "device": "cpu", **change})


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("kind", [storm, models])
def test_random_orders_sizes_and_delays(kind, attached):
    """STRESS_EXCHANGES sets how many."""
    calls = int(os.environ.get("STRESS_EXCHANGES", "2000"))
    assert run_distributed(2, kind, calls, 3, attached, backend="nccl", timeout=600.0) == [0, 0]


# One rank of two: what it does instead of its third call is on the command line.
ENDING = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from test_peer_exchange import DIMS, ROOM, STEPS, plan
from pcp_mla import PeerExchange
from pcp_mla.groups import all_gather_rows

rank, how, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.cuda.set_device(rank)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
with torch.inference_mode():
    meta = plan(STEPS[0], 2, rank, "cuda")
    exchange = PeerExchange(dist.group.WORLD, ROOM, DIMS, torch.float32, "cuda", timeout=3.0)
    latents = torch.zeros(meta.num_tokens, DIMS.latent_dim, device="cuda")
    call = lambda kv_c: exchange.publish(kv_c, latents[:, DIMS.kv_lora_rank :], meta)
    for _ in range(2):
        call(latents[:, : DIMS.kv_lora_rank])
    exchange.check()
    dist.barrier()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            try:
                call(latents[:, :5])
            except ValueError:
                time.sleep(6)
                os._exit(0)
        if how == "late":
            time.sleep(5)
    began = time.monotonic()
    try:
        for _ in range(2):  # of a rank that gave up the rows are there: who comes late finds out in the call behind
            call(latents[:, : DIMS.kv_lora_rank])
            exchange.check()
        print("no error", flush=True)
    except RuntimeError as error:
        print(f"{{error}} ({{time.monotonic() - began:.1f}} s)", flush=True)
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("how", ["killed", "raises", "late"])
def test_ranks_that_end_or_come_late(how, tmp_path):
    """The other one says whom it waited for, when its time is up."""
    script = ENDING.format(tests=str(Path(__file__).resolve().parent))
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), how, str(tmp_path)], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    match = re.search(r"rank 1 did not come within 3 s \(its last call: 2\) \((\d+\.\d) s\)", said[0][0])
    assert match, said
    assert 2.9 < float(match[1]) < 6
    assert how != "late" or "rank 0 did not come within 3 s" in said[1][0], said
