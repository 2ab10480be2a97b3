"""Headers of csrc that need no torch, compiled for tests of what the host decides."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "c++")


def host_library(folder, source):
    """A library of C++ source, which may include these headers, made in ``folder``."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    (folder / "source.cpp").write_text(source)
    target = folder / "library.so"
    subprocess.run([COMPILER, "-std=c++20", "-shared", "-fPIC", f"-I{CSRC}", folder / "source.cpp", "-o", target], check=True)
    return ctypes.CDLL(str(target))
