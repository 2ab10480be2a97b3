"""Importing: it never wakes the driver, so that a process can fork afterwards, and it survives libraries that do not load."""

import subprocess
import sys
import types

import pytest
import torch

from pcp_mla.ops import native

# Everything by which torch wakes the driver, made to fail, before any module of the package is imported.
SPY = """
import importlib, pkgutil, torch

def refuse(*args, **kwargs):
    raise AssertionError("the driver was asked")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, refuse)
import pcp_mla
packages = ("pcp_mla.demo", "pcp_mla.evaluation", "pcp_mla.integrations")  # these import transformers, which may ask for itself
names = [m.name for m in pkgutil.walk_packages(pcp_mla.__path__, "pcp_mla.") if not m.name.startswith(("pcp_mla._", *packages))]
assert "pcp_mla.layer.prefill" in names and "pcp_mla.triton.attention_kernel" in names, names
for name in names:
    if not name.startswith("pcp_mla.triton") or importlib.util.find_spec("triton"):
        importlib.import_module(name)
"""

FORK = """
import os, torch, pcp_mla
lse = torch.zeros(3, 2)
child = os.fork()
if child == 0:
    code = 1
    try:
        a, b = torch.ones(3, 2, 16, device="cuda"), torch.full((3, 2, 16), 3.0, device="cuda")
        out, _ = pcp_mla.merge_attn_states(a, lse.cuda(), b, lse.cuda())
        code = 0 if torch.equal(out.cpu(), torch.full((3, 2, 16), 2.0)) else 2
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

# What a library that is broken in an unforeseen way may do.
BROKEN = """
import importlib, torch
load, find = torch.ops.load_library, importlib.import_module

def broken(*args):
    raise LookupError("of another torch")

torch.ops.load_library = broken
importlib.import_module = lambda name, *rest: broken() if name in ("pcp_mla._planner", "pcp_mla._direct") else find(name, *rest)
import pcp_mla
from pcp_mla.ops import native
assert all(native.status[name].startswith("did not load: ") for name in ("_native", "_planner")), native.status
assert native.status["_native_cuda"] and native.direct is None, native.status
meta = pcp_mla.PCPPlanner(2, 9, 2, 0).plan([9])
q, kv = torch.randn(meta.num_tokens, 2, 8), torch.randn(meta.num_kv_tokens, 2, 8)
assert torch.equal(pcp_mla.pcp_fused_gather(q, kv, kv, meta).k_tail, kv[meta.kv_tail_indices])
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_leaves_the_driver_alone() -> None:
    run(SPY)


@pytest.mark.gpu
def test_a_child_computes_after_the_import() -> None:
    run(FORK)


def test_import_with_libraries_that_do_not_load() -> None:
    run(BROKEN)


def test_a_name_that_torch_has_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(address: int, torch: types.ModuleType) -> None:
        raise AttributeError("module 'torch._C' has no attribute '_len_torch_dispatch_stack'")

    module = types.SimpleNamespace(connect=connect)
    monkeypatch.setitem(sys.modules, "pcp_mla._direct", module)  # type: ignore[arg-type]
    monkeypatch.setattr(native, "status", native.status | {"_native_cuda": ""})
    monkeypatch.setattr(native, "_exported", lambda name: 0)
    assert native._load_direct() is None
    assert native.status["_direct"].startswith("did not connect: module 'torch._C' has no attribute")


def test_stages_are_marked_where_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcp_mla.layer import stages

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: pytest.fail(name))
    with stages.stage("exchange", torch.zeros(1)):
        pass
