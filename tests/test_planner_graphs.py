"""Plans of one padded size fit one captured graph: the ops read the planner's buffers, whose addresses and sizes stay."""

import numpy as np
import pytest
import torch

from batches import EVERYWHERE, random_bytes, same_bits
from pcp_mla import PCPMetadata, PCPPlanner, partition, pcp_fused_gather, pcp_fused_restore
from pcp_mla.plan.slots import PagedCache
from plans import assert_plan
from test_fused_gather import expected

SIZES = {"num_tokens_padded": 48, "num_requests_padded": 6, "num_kv_tokens_padded": 160}
# Different numbers of requests, tokens, heads and tails: [lengths, contexts, is_prefill].
BATCHES = [
    ([40, 24], [0, 30], [True, True]),
    ([1, 1, 1, 60, 1, 5], [9, 3, 30, 7, 0, 2], [False, False, False, True, False, True]),
    ([1] * 5, [11] * 5, [False] * 5),
    ([93], [4], [True]),
    ([], [], []),
]
HEADS, WIDTHS = 3, (24, 24, 16)


def make_planner(device, rank=1):
    return PCPPlanner(6, 100, 2, rank, block_size=4, device=device, max_kv_tokens=160)


def plan(planner, batch):
    tables = torch.arange(6 * 30, dtype=torch.int32).view(6, 30).to(planner.device)
    return planner.plan(*(np.array(a, t) for a, t in zip(batch, (np.int32, np.int32, bool), strict=True)), tables, **SIZES)


def inputs(device, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = (SIZES["num_tokens_padded"], SIZES["num_kv_tokens_padded"], SIZES["num_kv_tokens_padded"])
    return [random_bytes((n, HEADS, d), torch.bfloat16, device, generator) for n, d in zip(rows, WIDTHS, strict=True)]


def two_calls(tensors, meta, backend):
    """Gather, a stand-in for two attention calls that keeps rows apart, and restore."""
    got = pcp_fused_gather(*tensors, meta, backend=backend)
    lses = [x[..., 0].view(torch.int16).float() for x in (got.q_head, got.q_tail)]
    return got, pcp_fused_restore(got.q_head, got.q_tail, *lses, meta, backend=backend)


def assert_rows(result, tensors, batch, meta):
    """The first rows are those that a plan without padding gives; restoring what was gathered gives q back."""
    exact = PCPMetadata.build(*batch, world_size=2, rank=meta.rank, device=meta.device)
    q, k, v = tensors
    wanted = expected(q[: exact.num_tokens], k[: exact.num_kv_tokens], v[: exact.num_kv_tokens], exact)
    got, (out, lse) = result
    for name, rows in zip(got._fields, wanted, strict=True):
        assert same_bits(getattr(got, name)[: len(rows)], rows), name
    assert out.shape[0] == lse.shape[0] == SIZES["num_tokens_padded"]
    assert same_bits(out[: exact.num_tokens], q[: exact.num_tokens])
    assert same_bits(lse[: exact.num_tokens], q[: exact.num_tokens, :, 0].view(torch.int16).float())


@pytest.mark.parametrize(("device", "backend"), EVERYWHERE)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_call_ops_with_padded_counts(device, backend, batch, rank):
    meta = plan(make_planner(device, rank), batch)
    assert (meta.num_head_tokens, meta.num_tail_tokens, meta.num_head_kv, meta.num_tail_kv) == (48, 24, 160, 160)
    tensors = inputs(meta.device, 1)
    rows, restored = two_calls(tensors, meta, backend)
    assert_rows((rows, restored), tensors, batch, meta)
    # Nothing comes from behind the tails, whose last rows belong to nobody here.
    real = int(partition(*batch, world_size=2, rank=rank).chunk_lens[rank, :, 1].sum())
    tails = torch.full((2 * 48, HEADS, WIDTHS[0]), torch.nan, dtype=torch.bfloat16, device=device)
    tails[:real], tails[real:24] = rows.q_tail[:real], 0
    lses = torch.ones(48, HEADS, device=device), torch.ones(2 * 48, HEADS, device=device)
    lses[1][real:24] = 0
    out = torch.zeros_like(tails[: 48 + 24]), torch.zeros(48 + 24, HEADS, device=device)
    pcp_fused_restore(rows.q_head, tails[:24], lses[0], lses[1][:24], meta, out=out, backend=backend)
    assert same_bits(out[0][: meta.num_tokens], restored[0][: meta.num_tokens])
    if backend in ("cpu", "triton"):  # the others leave anything in the rows behind
        assert not any(x[meta.num_tokens :].any() for x in out)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_replay_after_a_new_plan(backend):
    """One graph, captured over the first plan: a new plan and new tensors are all that a replay needs."""
    planner = make_planner("cuda")
    meta = plan(planner, BATCHES[0])
    tensors = inputs(planner.device, 0)
    cache = torch.zeros(6 * 30 * 4 + 1, dtype=torch.int64, device="cuda")
    gathered = torch.arange(2 * SIZES["num_tokens_padded"], device="cuda")

    def step():
        cache.zero_()
        cache.scatter_(0, meta.slot_mapping.remainder(len(cache)), gathered + 1)  # -1 goes to the last row
        keys = cache[meta.kv_rows.long()]
        return two_calls(tensors, meta, backend), keys, meta.positions + 0, meta.hidden_restore_idx + 0, meta.seqused_k + 0

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, keys, positions, restored, used = step()
    for seed, batch in enumerate([*BATCHES, BATCHES[0]]):
        for a, b in zip(tensors, inputs(planner.device, seed), strict=True):
            a.copy_(b)
        new = plan(planner, batch)
        graph.replay()
        assert_rows(rows, tensors, batch, new)
        exact = partition(*batch, world_size=2, rank=1)
        assert positions[: exact.num_tokens].tolist() == exact.positions.tolist()
        assert used[: 2 * exact.num_requests].tolist() == exact.seqused_k.tolist()
        total = int(exact.query_lens.sum())
        assert (restored[total:] == -1).all()
        # Every new token's latent is found through its request's key rows, where the gathered row said it was.
        starts = exact.cu_seqlens_kv[:-1] + exact.context_lens
        fresh = [start + n for start, length in zip(starts, exact.query_lens, strict=True) for n in range(length)]
        assert (keys.cpu()[fresh] - 1).tolist() == restored[:total].tolist()


@pytest.mark.gpu
def test_plans_on_a_gpu_are_the_specification():
    planner = PCPPlanner(64, 4000, 4, 2, block_size=16, device="cuda", max_context_chunks=20)
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(0, 60))
        lengths, contexts = rng.integers(0, 60, count).astype(np.int32), rng.integers(0, 90, count).astype(np.int32)
        prefill, tables = rng.random(count) < 0.5, rng.integers(0, 9999, (count, 10), dtype=np.int32)
        part = partition(lengths, contexts, prefill, world_size=4, rank=2)
        workspace = max(1, int(part.padded_lens.sum()), part.num_kv_tokens // 3)
        meta = planner.plan(lengths, contexts, prefill, torch.from_numpy(tables).cuda(), workspace_tokens=workspace)
        assert_plan(meta, part, tables, PagedCache(16), workspace)


@pytest.mark.gpu
def test_host_buffers_are_not_overwritten_before_they_are_sent():
    """Plans issued while the GPU is still busy: each copy carries its own plan."""
    planner = PCPPlanner(8, 100, 2, 0, device="cuda")
    kept = []
    torch.cuda._sleep(20_000_000)
    for length in range(1, 60):
        kept.append((length, planner.plan([length]).positions.clone(), planner.plan([length, 3]).seqused_k.clone()))
    for length, positions, used in kept:
        assert positions.tolist() == partition([length], world_size=2, rank=0).positions.tolist()
        assert used.tolist() == partition([length, 3], world_size=2, rank=0).seqused_k.tolist()


@pytest.mark.gpu
def test_one_copy_and_one_launch():
    planner = make_planner("cuda")
    tables = torch.zeros(6, 30, dtype=torch.int32, device="cuda")
    batch = [np.array(a, t) for a, t in zip(BATCHES[1], (np.int32, np.int32, bool), strict=True)]
    planner.plan(*batch, tables)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        planner.plan(*batch, tables)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 2, names
    assert sum("Memcpy HtoD" in name for name in names) == 1, names
