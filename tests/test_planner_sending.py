"""How a plan is brought to a device, with the device played in the host's memory; and how long what it needs lives."""

import ctypes
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pcp_mla import PCPPlanner, partition
from pcp_mla.ops import native
from pcp_mla.plan.slots import PagedCache
from pcp_mla.planner import staging
from plans import assert_plan

POINTER, INT32, INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Job(ctypes.Structure):
    """ExpandJob of csrc/request_table.h."""

    _fields_ = [
        *[("table", POINTER), ("requests", INT32), ("world", INT32)],
        *[("blocks", POINTER), ("row_stride", INT64), ("block_rows", INT64), ("columns", INT64)],
        *[(name, ctypes.c_uint32) for name in ("block_size", "shards", "shard", "interleave")],
        *[("rank", INT32), ("rows", INT32), ("kv_rows", INT32), ("has_slots", ctypes.c_bool), ("split", ctypes.c_bool)],
        *[(name, POINTER) for name in ("local", "positions", "restore", "hidden", "slots", "kv")],
    ]


class Submission(ctypes.Structure):
    """PlanSubmission of csrc/plan_transport.h."""

    _fields_ = [
        *[("host", POINTER), ("device", POINTER), ("bytes", INT64), ("copied", POINTER), ("device_index", INT32)],
        ("job", Job),
    ]


WAIT, SUBMIT = ctypes.CFUNCTYPE(POINTER, POINTER), ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(Submission))


class Transport(ctypes.Structure):
    _fields_ = [("submission_bytes", ctypes.c_size_t), ("wait", WAIT), ("submit", SUBMIT)]


def view(address, shape, kind, stride=None):
    """A tensor over memory at an address; without rows apart it has as many elements as its shape."""
    count = int(np.prod(shape)) if stride is None else (shape[0] - 1) * stride + shape[1] if shape[0] else 0
    if count == 0:
        return torch.empty(shape, dtype=kind)
    size = {torch.int32: 4, torch.int64: 8}[kind]
    flat = torch.frombuffer((ctypes.c_char * (size * count)).from_address(address), dtype=kind)
    return flat.view(shape) if stride is None else flat.as_strided(shape, (stride, 1))


class Played:
    """A device: copies when told to, and expands what the job points to by the op's CPU form."""

    def __init__(self):
        self.waits, self.jobs, self.error = [], [], None
        self.transport = Transport(ctypes.sizeof(Submission), WAIT(self._wait), SUBMIT(self._submit))
        self._text = ctypes.create_string_buffer(b"it is broken")

    def _answer(self, what):
        return ctypes.addressof(self._text) if self.error == what else None

    def _wait(self, copied):
        self.waits.append(copied)
        return self._answer("wait")

    def _submit(self, submission):
        s = submission.contents
        job = s.job
        self.jobs.append((s.host, s.copied, job.block_rows if job.has_slots else None))
        if self.error != "submit":
            ctypes.memmove(s.device, s.host, s.bytes)
            gathered = job.world * job.rows
            tables = view(job.blocks, (job.block_rows, job.columns), torch.int32, job.row_stride) if job.has_slots else None
            torch.ops.pcp_mla.plan_expand(
                view(job.table, ((5 + job.world) * (job.requests + 1),), torch.int32),
                tables,
                *(view(at, (job.rows,), torch.int32) for at in (job.local, job.positions)),
                *(view(at, (gathered,), torch.int32) for at in (job.restore, job.hidden)),
                view(job.slots, (gathered,), torch.int64),
                view(job.kv, (job.kv_rows,), torch.int32),
                *(job.requests, job.world, job.rank, job.rows, job.kv_rows, job.split),
                *(job.block_size, job.shards, job.shard, job.interleave),
            )
        return self._answer("submit")


class PlayedEvent:
    """Of a stream that has done its work at once; what is asked of it stays in ``calls``."""

    def __init__(self, number):
        self.cuda_event, self.calls = number, []

    def query(self):
        return True

    def record(self, stream):
        self.calls.append("record")

    def synchronize(self):
        self.calls.append("synchronize")


@pytest.fixture(params=["native planner sends", "torch sends", "NumPy plans, torch sends"])
def send_by(request, monkeypatch):
    if request.param.startswith("NumPy"):
        monkeypatch.setitem(native.status, "_planner", "not built: for this test")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return request.param


def planner_of_a_device(send_by, device, **options):
    """A planner that takes the CPU for a device."""
    planner = PCPPlanner(6, 100, 2, 1, block_size=4, max_context_chunks=9, **options)
    planner._host_step = planner._kept = None
    with pytest.MonkeyPatch.context() as patch:
        numbers = iter((7, 8))
        patch.setattr(torch.cuda, "Event", lambda: PlayedEvent(next(numbers)))
        patch.setattr(torch.cuda, "current_stream", lambda device: None)
        planner._staging = [staging.Staging(planner.step, planner.step_layout.chunks_stop, False) for _ in range(2)]
    for part in planner._staging:
        part.host.fill_(-99)
    if send_by.startswith("native"):
        planner._sends = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "plan_transport", lambda: ctypes.addressof(device.transport))
            addresses = planner._addresses()
        planner._host.attach(addresses, [(part.host.data_ptr(), part.sent.cuda_event) for part in planner._staging])
    return planner


TABLES = np.random.default_rng(0).permutation(5 * 20).reshape(5, 20).astype(np.int32)
STEPS = [
    ([9, 1, 0, 4], [7, 30, 3, 0], TABLES, None),
    ([30], [40], TABLES[2:], 30),
    ([], [], TABLES[:0], None),
    ([5, 6], [0, 0], None, None),
    ([3, 3], [70, 9], TABLES.astype(np.int64), 80),
    ([0, 0], [0, 0], TABLES[:, :0], None),
]


@pytest.mark.parametrize("max_kv_tokens", [None, 120])
def test_plans_arrive(send_by, max_kv_tokens):
    """Everything is expanded in plan(), as the tables are then."""
    device = Played()
    planner = planner_of_a_device(send_by, device, max_kv_tokens=max_kv_tokens)
    for lengths, contexts, tables, workspace in STEPS:
        given = None if tables is None else tables.copy()
        meta = planner.plan(lengths, contexts, None, given, workspace_tokens=workspace)
        if given is not None:
            given[:] = 1
        assert_plan(meta, partition(lengths, contexts, world_size=2, rank=1), tables, PagedCache(4), workspace)
    if send_by.startswith("native"):
        assert device.waits == [7, 8, 7, 8, 7, 8]
        assert [copied for _, copied, _ in device.jobs] == device.waits
        assert [job[0] for job in device.jobs[:2]] == [part.host.data_ptr() for part in planner._staging]
        assert [job[2] for job in device.jobs] == [4, 1, 0, None, 2, 2]  # rows of requests are all that is sent
    else:  # a buffer is written to when what it had is on the device
        assert [part.sent.calls for part in planner._staging] == [["record", *["synchronize", "record"] * 3]] * 2


def test_what_the_device_says_is_raised():
    device = Played()
    planner = planner_of_a_device("native", device)
    meta = planner.plan([5])
    for error in ("wait", "submit"):
        device.error = error
        with pytest.raises(RuntimeError, match="pcp_mla: CUDA error: it is broken"):
            planner.plan([6])
    device.error = None
    with pytest.raises(RuntimeError, match=r"before the next plan\(\)"):
        _ = meta.positions  # the second of them may have arrived
    assert_plan(planner.plan([7]), partition([7], world_size=2, rank=1), None, None, None)


def test_libraries_of_different_versions_are_refused():
    device = Played()
    device.transport.submission_bytes += 8
    with pytest.raises(RuntimeError, match="_planner and _native_cuda are of different versions: build both again"):
        planner_of_a_device("native", device)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_planner_and_metadata_go_at_once(send_by, on_cpu):
    """No cycle keeps a GPU's memory until the garbage collector finds it; and what is left of the two keeps what it shows."""
    device, part = Played(), partition([5, 3], [2, 4], world_size=2, rank=1)
    planner = PCPPlanner(4, 50, 2, 1, block_size=4) if on_cpu else planner_of_a_device(send_by, device)
    first = planner.plan([5, 3], [2, 4], None, TABLES)
    last = planner.plan([5, 3], [2, 4], None, TABLES)
    assert f"num_tokens={part.num_tokens}," in repr(last)
    assert len(last.key_chunks) == 1
    alive = [weakref.ref(x) for x in (first, planner, last, planner.step, planner._buffers)]
    gc.disable()
    try:
        del first
        assert alive[0]() is None
        del planner
        assert alive[1]() is None
        assert_plan(last, part, TABLES, PagedCache(4), None)
        table = last.row_table
        del last
        assert table.tolist() == part.row_table.tolist()
        del table
        assert [ref() for ref in alive] == [None] * 5
    finally:
        gc.enable()


def test_host_buffers_outlive_their_planner_until_they_are_sent(monkeypatch):
    """Torch's allocator knows nothing of copies that it has not issued: it gives a pinned block to the next who asks."""
    done = []
    event = SimpleNamespace(query=lambda: bool(done), record=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    step = torch.zeros(8, dtype=torch.int32)
    part = staging.Staging(step, 4, False)
    host = weakref.ref(part.host)
    del part
    assert host() is not None
    kept = staging.Staging(step, 4, False)
    assert host() is not None
    done.append(True)
    staging.Staging(step, 4, False)
    assert host() is None
    assert kept.host is not None
    del kept
    staging.Staging(step, 4, False)
    staging._drop_sent()
    assert not staging._on_their_way


def test_threads_drop_at_once(monkeypatch):
    """What one thread takes out, another one has counted."""
    sent = SimpleNamespace(query=lambda: True)

    class Shared(staging.deque):
        def __len__(self):
            count = super().__len__()
            self.clear()  # as another thread does between the count and the first one
            return count

    shared = Shared([("host", sent), ("host", sent)])
    monkeypatch.setattr(staging, "_on_their_way", shared)
    staging._drop_sent()
    assert not shared
