"""Builds the native libraries with CMake and ninja. Everything else is in pyproject.toml.

Environment:
    PCP_MLA_NATIVE=0        install pure Python: no compiler needed, ops run through Triton or torch
    PCP_MLA_CUDA=auto|1|0   build the CUDA library if nvcc is found (auto, the default), always, or never
    PCP_MLA_PYTHONS="P P"   interpreters to build the Python modules for, in a wheel for all (`make wheel`); default: this one
    PCP_MLA_WERROR=1        warnings of the compilers are errors
    PCP_MLA_SANITIZE=1      build with the address sanitizer; `make test-asan` does, and preloads its runtime
    MAX_JOBS=N              compile jobs at a time
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
MODULES = ("_planner", "_direct")
PYTHONS = os.environ.get("PCP_MLA_PYTHONS", "").split()


def target_torch() -> tuple[str, str]:
    """Include and library folder of the torch that the package will run with.

    An isolated build has an interpreter of its own packages, on PYTHONPATH, and no torch; the torch that counts is the one that the
    same interpreter sees without PYTHONPATH.
    """
    query = (
        "import json, torch; from pathlib import Path; root = Path(torch.__file__).parent; "
        "print(json.dumps([torch.__version__, str(root / 'include'), str(root / 'lib')]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", query], env=env, capture_output=True, text=True, cwd="/")
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(
            f"pcp-mla: no torch in {sys.executable} ({reason}). Install torch 2.10 or newer first, then build again; "
            "PCP_MLA_NATIVE=0 installs without native libraries."
        )
    version, include, lib = json.loads(found.stdout.strip().splitlines()[-1])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise SystemExit(f"pcp-mla: torch must be 2.10 or newer, got {version} in {sys.executable}")
    return include, lib


def find_nvcc() -> str | None:
    """nvcc as CMake would find it: CUDACXX, the PATH, CUDA_HOME."""
    for candidate in (
        os.environ.get("CUDACXX"),
        "nvcc",
        os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"),
    ):
        if candidate and (path := shutil.which(candidate)):
            return path
    return None


def wants_cuda() -> str | None:
    """The nvcc to use, or None for a build without CUDA. Never asks whether a GPU is here: build machines have none."""
    choice = os.environ.get("PCP_MLA_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"pcp-mla: PCP_MLA_CUDA must be auto, 1 or 0, got {choice!r}")
    nvcc = find_nvcc() if choice != "0" else None
    if choice == "1" and nvcc is None:
        raise SystemExit("pcp-mla: PCP_MLA_CUDA=1 needs nvcc, and none is in CUDACXX, on PATH or in CUDA_HOME")
    if choice == "auto" and nvcc is None:
        print("pcp-mla: no nvcc found, building without the CUDA library (PCP_MLA_CUDA=1 would insist on it)")
    return nvcc


def target_pythons() -> list[tuple[str, str]]:
    """Include folder and suffix of the modules of each interpreter to build for."""
    query = "import json, sysconfig as s; print(json.dumps([s.get_path('include'), s.get_config_var('EXT_SUFFIX')]))"
    found = []
    for python in PYTHONS or [sys.executable]:
        try:
            done = subprocess.run([python, "-I", "-c", query], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"pcp-mla: PCP_MLA_PYTHONS must name interpreters, got {python!r} ({error})") from None
        include, suffix = json.loads(done.stdout)
        if not (Path(include) / "Python.h").is_file():
            raise SystemExit(f"pcp-mla: the headers of {python} must be installed, got no Python.h in {include}")
        found.append((include, suffix))
    return found


class WheelForAll(bdist_wheel):
    """A wheel that several Pythons can install: each finds its own modules by their suffix, and any other does without."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class CMakeBuild(build_ext):
    """All in one CMake run. The op libraries load through torch.ops.load_library and carry no Python ABI; the modules do."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(MODULES):
            return super().get_ext_filename(fullname)
        return fullname.replace(".", os.sep) + ".so"

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def run(self) -> None:
        import pybind11  # a build requirement: not there for a pure Python installation

        include, lib = target_torch()
        nvcc = wants_cuda()
        includes, suffixes = zip(*target_pythons(), strict=True)
        package = HERE / "python" / "pcp_mla" if self.inplace else Path(self.build_lib).resolve() / "pcp_mla"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_native*.so"):  # what this build leaves out must not be loaded
            stale.unlink()
        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(HERE),
            "-B",
            str(build),
            f"-DPCP_MLA_TORCH_INCLUDE={include}",
            f"-DPCP_MLA_TORCH_LIB={lib}",
            f"-DPCP_MLA_PYTHON_INCLUDE={';'.join(includes)}",
            f"-DPCP_MLA_PYBIND11_INCLUDE={pybind11.get_include()}",
            f"-DPCP_MLA_PYTHON_SUFFIX={';'.join(suffixes)}",
            f"-DPCP_MLA_OUTPUT={package}",
            f"-DPCP_MLA_SANITIZE={'ON' if os.environ.get('PCP_MLA_SANITIZE') == '1' else 'OFF'}",
            f"-DPCP_MLA_BUILD_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DPCP_MLA_WERROR={'ON' if os.environ.get('PCP_MLA_WERROR') == '1' else 'OFF'}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        for command in (configure, ["cmake", "--build", str(build), *jobs]):
            try:
                failed = subprocess.run(command, check=False).returncode != 0
            except FileNotFoundError:
                raise SystemExit(
                    "pcp-mla: cmake must be installed to build the native libraries: pip install cmake ninja"
                ) from None
            if failed:
                hint = " (PCP_MLA_CUDA=0 builds without CUDA)" if nvcc else ""
                raise SystemExit(f"pcp-mla: native build failed in: {' '.join(command)}{hint}")


if os.environ.get("PCP_MLA_NATIVE", "1") == "0":
    native: dict = {}
else:
    extensions = [Extension(f"pcp_mla.{name}", sources=[]) for name in ("_native", *MODULES)]
    native = {"ext_modules": extensions, "cmdclass": {"build_ext": CMakeBuild}}
    if PYTHONS:
        native["cmdclass"]["bdist_wheel"] = WheelForAll

setup(**native)
