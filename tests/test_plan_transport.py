"""What the libraries say to each other: another version is refused, and CUDA's errors come back from the plan's transport, without
a word of them to the launches that come after."""

import ctypes

import pytest
import torch

from pcp_mla import PCPPlanner, partition
from pcp_mla.ops import native
from test_planner_sending import Submission, Transport


class DirectOps(ctypes.Structure):
    """csrc/direct_ops.h."""

    _fields_ = [
        ("layout", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("merge", "merge_n", "correct", "concat", "write", "up_project")),
    ]


VIEW_BYTES = 96


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(VIEW_BYTES, id="without the table's size"),
        pytest.param(VIEW_BYTES << 16 | ctypes.sizeof(DirectOps) - 8, id="an op less"),
        pytest.param(VIEW_BYTES + 8 << 16 | ctypes.sizeof(DirectOps), id="other views"),
    ],
)
def test_direct_calls_of_another_version_are_refused(layout):
    direct = pytest.importorskip("pcp_mla._direct")
    other = DirectOps(layout)
    with pytest.raises(RuntimeError, match="pcp_mla: _direct and _native_cuda are of different versions: build both again"):
        direct.connect(ctypes.addressof(other), torch)


@pytest.mark.gpu
@pytest.mark.skipif(bool(native.status["_planner"]), reason="the native planner is not built")
def test_errors_of_a_gpu():
    """A copy from nowhere, no event, no such GPU: each is named, and a plan that comes after is sound."""
    transport = Transport.from_address(native.plan_transport())
    assert transport.submission_bytes == ctypes.sizeof(Submission)
    planner = PCPPlanner(3, 40, 2, 1, block_size=4, device="cuda")
    tables = torch.arange(30, dtype=torch.int32, device="cuda").view(3, 10)
    host, target = torch.ones(16, dtype=torch.int32, pin_memory=True), torch.zeros(16, dtype=torch.int32, device="cuda")
    event = torch.cuda.Event()
    event.record()

    def says(call, argument):
        address = call(argument)
        return "" if not address else ctypes.string_at(address).decode()

    def submission(**changes):
        whole = Submission(host=host.data_ptr(), device=target.data_ptr(), bytes=64, copied=event.cuda_event, device_index=0)
        for name, value in changes.items():
            setattr(whole, name, value)
        return ctypes.byref(whole)

    assert says(transport.submit, submission()) == ""
    assert says(transport.wait, event.cuda_event) == ""
    assert target.tolist() == [1] * 16
    for call, argument, words in (
        (transport.submit, submission(host=None), "invalid"),
        (transport.submit, submission(copied=None), "invalid"),
        (transport.submit, submission(device_index=60), "no CUDA device 60"),
        (transport.wait, None, "invalid"),
    ):
        assert words in says(call, argument)
        assert torch.cuda.current_device() == 0
        meta = planner.plan([9, 2], [3, 4], [True, False], tables)  # whose launch asks CUDA for errors
        part = partition([9, 2], [3, 4], [True, False], world_size=2, rank=1)
        assert meta.positions.tolist() == part.positions.tolist()
