"""Plans on a GPU: by every way there, of one moment, on the planner's device and the current stream; and memory of theirs."""

import gc

import numpy as np
import pytest
import torch

from pcp_mla import PCPPlanner, partition
from pcp_mla.ops import native
from pcp_mla.plan.slots import PagedCache, kv_rows
from plans import assert_equal, assert_plan

pytestmark = pytest.mark.gpu

TABLES = np.random.default_rng(0).permutation(4 * 30).reshape(4, 30).astype(np.int32)
BATCH = ([40, 1, 0, 9], [7, 60, 3, 0], [True, False, True, True])
CYCLES = 100_000_000  # some 50 ms


@pytest.fixture(params=["native planner sends", "torch sends", "NumPy plans, torch sends"])
def sends(request, monkeypatch):
    if request.param != "native planner sends":
        monkeypatch.setitem(native.status, "_native_cuda", "not built: for this test")
    if request.param.startswith("NumPy"):
        monkeypatch.setitem(native.status, "_planner", "not built: for this test")
    return request.param


def make(device="cuda", **options):
    return PCPPlanner(6, 100, 2, 1, block_size=4, device=device, **options)


def spec():
    return partition(*BATCH, world_size=2, rank=1)


@pytest.mark.usefixtures("sends")
def test_plans_are_the_specification():
    planner = PCPPlanner(64, 4000, 4, 2, block_size=16, device="cuda", max_context_chunks=20)
    rng = np.random.default_rng(1)
    for number in range(40):
        count = int(rng.integers(0, 60))
        lengths, contexts = rng.integers(0, 60, count).astype(np.int32), rng.integers(0, 90, count).astype(np.int32)
        prefill, tables = rng.random(count) < 0.5, rng.integers(0, 9999, (count, 10), dtype=np.int32)
        part = partition(lengths, contexts, prefill, world_size=4, rank=2)
        workspace = max(1, int(part.padded_lens.sum()), part.num_kv_tokens // 3) if number % 2 else None
        given = (torch.from_numpy(tables).cuda(), tables, torch.from_numpy(tables).long())[number % 3]
        meta = planner.plan(lengths, contexts, prefill, given, workspace_tokens=workspace)
        assert_plan(meta, part, tables, PagedCache(16), workspace)


@pytest.mark.usefixtures("sends")
def test_plans_follow_one_another_while_the_gpu_is_busy():
    planner, kept = make(), []
    torch.cuda._sleep(CYCLES)
    for length in range(1, 60):
        kept.append((length, planner.plan([length]).positions.clone(), planner.plan([length, 3]).seqused_k.clone()))
    for length, positions, used in kept:
        assert positions.tolist() == partition([length], world_size=2, rank=1).positions.tolist()
        assert used.tolist() == partition([length, 3], world_size=2, rank=1).seqused_k.tolist()


@pytest.mark.usefixtures("sends")
@pytest.mark.parametrize("max_kv_tokens", [None, 200])
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_plan_is_of_one_moment(max_kv_tokens, where):
    """The caller writes the next step's tables on the same stream before anybody has looked at the plan."""
    tables = torch.from_numpy(TABLES.copy()).to(where)
    meta = make(max_kv_tokens=max_kv_tokens).plan(*BATCH, tables)
    tables.fill_(1)
    assert_plan(meta, spec(), TABLES, PagedCache(4), None)


@pytest.mark.usefixtures("sends")
def test_what_is_first_read_in_a_capture_is_not_made_there():
    """A graph holds no address of a table, which is gone when it is replayed; a later plan is what it shows."""
    planner, sizes = make(max_kv_tokens=200), {"num_tokens_padded": 60, "num_requests_padded": 6, "num_kv_tokens_padded": 180}
    tables = torch.from_numpy(TABLES).cuda()
    meta = planner.plan(*BATCH, tables, **sizes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = meta.kv_rows + 0, meta.slot_mapping + 0, meta.positions + 0
    tables.fill_(2**31 - 1)
    graph.replay()
    part = spec()
    assert seen[0].tolist()[: part.num_kv_tokens] == kv_rows(part, TABLES, PagedCache(4)).tolist()
    other = planner.plan([30], [50], None, TABLES[1:2], **sizes)
    graph.replay()
    for array, name in zip(seen, ("kv_rows", "slot_mapping", "positions"), strict=True):
        assert_equal(array.cpu(), getattr(other, name).cpu(), name)
    part = partition([30], [50], world_size=2, rank=1)
    assert seen[0].tolist()[: part.num_kv_tokens] == kv_rows(part, TABLES[1:2], PagedCache(4)).tolist()


@pytest.mark.usefixtures("sends")
def test_tables_on_the_gpu_must_be_int32_and_have_slots():
    planner = make()
    meta = planner.plan(*BATCH, torch.from_numpy(TABLES).cuda())
    for wrong in (torch.int64, torch.uint8, torch.float32):
        with pytest.raises(TypeError, match=r"block_tables must be int32 on cuda:0, got"):
            planner.plan(*BATCH, torch.from_numpy(TABLES).cuda().to(wrong))
    with pytest.raises(ValueError, match=r"block_tables must have 2 dimensions \[requests, blocks\], got 1"):
        planner.plan(*BATCH, torch.from_numpy(TABLES).cuda()[0])
    with pytest.raises(ValueError, match="got 4294967301 for block 1 of request 0"):
        planner.plan([8], None, None, [[3, 2**32 + 5]])
    assert_plan(meta, spec(), TABLES, PagedCache(4), None)
    tables = TABLES.copy()
    tables[0, 3], tables[1, 2], tables[3, 0] = -1, 2**31 - 1, 2**29
    meta = planner.plan(*BATCH, torch.from_numpy(tables).cuda())
    assert_plan(meta, spec(), tables, PagedCache(4), None)
    assert (meta.kv_rows == -1).sum() >= 12
    strided = torch.from_numpy(np.repeat(TABLES, 2, axis=1)).cuda()[:, ::2]
    assert_plan(planner.plan(*BATCH, strided), spec(), TABLES, PagedCache(4), None)
    for empty in (torch.empty(0, 5), torch.empty(5, 0).T, torch.empty(0, 0), torch.empty(3, 0)):
        assert planner.plan([], None, None, empty.int().cuda(), num_kv_tokens_padded=3).kv_rows.tolist() == [-1] * 3


@pytest.mark.usefixtures("sends")
@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=pytest.mark.multi_gpu)])
def test_a_plan_goes_to_its_device_on_that_devices_current_stream(device):
    """Whatever device is current: the plan is behind what the stream does, here a late write of the block tables."""
    planner, side = make(device), torch.cuda.Stream(device)
    tables = torch.zeros(TABLES.shape, dtype=torch.int32, device=device)
    given = torch.from_numpy(TABLES).to(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        tables.copy_(given)
        with torch.cuda.device(0):
            meta = planner.plan(*BATCH, tables)
            assert torch.cuda.current_device() == 0
        tables.fill_(1)
        assert_plan(meta, spec(), TABLES, PagedCache(4), None)
    assert meta.slot_mapping.device == torch.device(device)


@pytest.mark.usefixtures("sends")
def test_pinned_buffers_outlive_their_planner_until_they_are_sent():
    """The allocator would give them to the next who asks, while the GPU still has to read them."""
    planner = make()
    planner.plan([3])
    torch.cuda.synchronize()
    blocks, size = {part.host.data_ptr() for part in planner._staging}, len(planner._staging[0].host)
    torch.cuda._sleep(CYCLES)
    meta = planner.plan(*BATCH)
    table = meta.row_table
    del planner, meta
    others = [torch.empty(size, dtype=torch.int32, pin_memory=True) for _ in range(4)]
    assert not blocks & {other.data_ptr() for other in others}
    for other in others:
        other.fill_(-7)
    assert table.tolist() == spec().row_table.tolist()


@pytest.mark.usefixtures("sends")
def test_memory_goes_with_planner_and_metadata():
    tables = torch.from_numpy(TABLES).cuda()
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        planner = PCPPlanner(64, 100_000, 2, 1, block_size=4, device="cuda")
        meta = planner.plan(*BATCH, tables)
        meta.kv_rows, meta.key_chunks, meta.slot_mapping  # noqa: B018
        assert torch.cuda.memory_allocated() > before + 2**20
        del planner
        assert_plan(meta, spec(), TABLES, PagedCache(4), None)
        del meta
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
