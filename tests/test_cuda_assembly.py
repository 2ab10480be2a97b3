"""What the assembler makes of the tensor core kernels: right results can come of products that wait for one another."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module", params=["attention", "kv_up_project"])
def compiled(request, tmp_path_factory):
    """Name, cubin and what was said of an op's kernels for sm_90a."""
    cubin = tmp_path_factory.mktemp("assembly") / f"{request.param}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(Path(torch.__file__).parent / "include")]
    command += [str(SOURCES / f"{request.param}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return request.param, cubin, done.stdout + done.stderr


def test_products_are_not_serialized_and_nothing_is_spilled(compiled):
    _, _, report = compiled
    assert "serialized" not in report
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= 2
    assert set(spills) == {("0", "0")}


def test_the_softmax_stands_between_the_waits(compiled):
    """That for the scores and that for the product with V, which it is to hide: all exponentials that a thread has of a tile."""
    name, cubin, _ = compiled
    knobs = pytest.importorskip("triton.knobs")
    if name != "attention":
        pytest.skip("it has no softmax")
    text = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = text.split("Function : ")[1:]
    assert len(kernels) >= 8
    for kernel in kernels:
        loops = re.findall(r"DEPBAR\.LE gsb0, 0x1 (.*?)DEPBAR\.LE gsb0, 0x0 ", kernel, re.DOTALL)
        assert len(loops) == 2  # of tiles without a mask, and with one
        exponentials = 32 if "ELi256ELi64" in kernel else 64
        assert all(loop.count("MUFU.EX2") >= exponentials for loop in loops)
