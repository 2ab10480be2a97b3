import os

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def refused(monkeypatch):
    """Counts the calls past the dispatcher, and those that did nothing."""
    from pcp_mla.ops import native

    class Counted:
        def __init__(self):
            self.count = self.calls = 0

        def __getattr__(self, name):
            def call(*args):
                done = getattr(native_direct, name)(*args)
                self.calls += 1
                self.count += not done
                return done

            return call

    native_direct, counted = native.direct, Counted()
    monkeypatch.setattr(native, "direct", counted)
    return counted


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Writes what the plug-in sees of a vLLM, and imports nothing of it."""
    from fake_vllm import played_vllm

    with played_vllm(tmp_path, monkeypatch) as write:
        yield write


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA GPUs"))
        elif item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
