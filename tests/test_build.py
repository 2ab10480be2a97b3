"""Installing: what setup.py refuses, what sdist and wheels hold, and that what is installed from them works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(__file__).resolve().parent / "packaging" / "installed.py"
CUDA_LIBRARY = ROOT / "python" / "pcp_mla" / "_native_cuda.so"

PURE_PYTHON = """
import torch, pcp_mla
from pcp_mla.ops import native
assert native.status["_native"].startswith("not built"), native.status
meta = pcp_mla.PCPMetadata.build([9, 4], world_size=2, rank=0)
q, kv = torch.randn(meta.num_tokens, 2, 8), torch.randn(meta.num_kv_tokens, 2, 8)
rows = pcp_mla.pcp_fused_gather(q, kv, kv, meta)
assert torch.equal(rows.k_tail, kv[meta.kv_tail_indices])
assert torch.equal(pcp_mla.pcp_fused_restore(rows.q_head, rows.q_tail, None, None, meta)[0], q)
torch.library.opcheck(torch.ops.pcp_mla.fused_restore.default, (rows.q_head, rows.q_tail, None, None, meta.row_table))
assert native.status["_planner"].startswith("not built"), native.status
assert pcp_mla.PCPPlanner(2, 9, 2, 0).plan([4]).positions.tolist() == [0, 3]
try:
    pcp_mla.pcp_fused_gather(q, kv, kv, meta, backend="cpu")
except RuntimeError as error:
    assert "backend 'cpu' is not available: not built" in str(error)
else:
    raise AssertionError("a backend that is not built answered")
"""


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads, without anything that was built in place."""
    copy = tmp_path / "source"
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def bare_python(tmp_path):
    """An interpreter without torch, as the target of an isolated build: the build's own packages come by PYTHONPATH."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    return tmp_path / "bare" / "bin" / "python"


def build(source, python, **env):
    full = {k: v for k, v in os.environ.items() if not k.startswith("PCP_MLA")} | env
    full["PYTHONPATH"] = sysconfig.get_path("purelib")
    return subprocess.run([python, "setup.py", "-q", "build_ext"], cwd=source, env=full, capture_output=True, text=True)


def pretend_torch(python, version):
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    package = Path(site) / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")


def test_no_torch(source, bare_python):
    done = build(source, bare_python)
    assert done.returncode != 0
    assert "pcp-mla: no torch in" in done.stderr
    assert "Install torch 2.10 or newer first" in done.stderr


def test_torch_too_old(source, bare_python):
    pretend_torch(bare_python, "2.9.1+cpu")
    done = build(source, bare_python)
    assert done.returncode != 0
    assert "torch must be 2.10 or newer, got 2.9.1+cpu" in done.stderr


def test_cuda_without_nvcc(source, bare_python):
    pretend_torch(bare_python, "2.10.0")
    done = build(source, bare_python, PCP_MLA_CUDA="1", PATH="/nonexistent", CUDA_HOME="/nonexistent", CUDACXX="")
    assert done.returncode != 0
    assert "PCP_MLA_CUDA=1 needs nvcc" in done.stderr


def test_unknown_cuda_choice(source, bare_python):
    pretend_torch(bare_python, "2.10.0")
    done = build(source, bare_python, PCP_MLA_CUDA="yes")
    assert done.returncode != 0
    assert "PCP_MLA_CUDA must be auto, 1 or 0, got 'yes'" in done.stderr


def test_unknown_python(source, bare_python):
    pretend_torch(bare_python, "2.10.0")
    done = build(source, bare_python, PCP_MLA_CUDA="0", PCP_MLA_PYTHONS="/nowhere/python")
    assert done.returncode != 0
    assert "PCP_MLA_PYTHONS must name interpreters, got '/nowhere/python'" in done.stderr


def test_a_wheel_for_several_pythons_is_for_any(source):
    env = {**os.environ, "PCP_MLA_PYTHONS": sys.executable}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--skip-build"]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.whl")
    assert "-py3-none-linux" in path.name


def sdist(source, tmp_path):
    """The archive of sources, made by the tree's own backend."""
    command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'sdist')!r})"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "sdist").glob("*.tar.gz")
    return path


def wheel(source, tmp_path, **env):
    full = {**os.environ, **env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", source]
    done = subprocess.run(command, env=full, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "wheels").glob("*.whl")
    return path


def unpack(path, tmp_path):
    """Runs Python on what the wheel holds, away from the source tree."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "installed")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "installed" in run("-c", "import pcp_mla; print(pcp_mla.__file__)")
    return run


def test_pure_python_wheel(source, tmp_path):
    path = wheel(source, tmp_path, PCP_MLA_NATIVE="0")
    assert path.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert "pcp_mla/data/declaration.txt" in names
    assert not [name for name in names if name.endswith(".so")]
    unpack(path, tmp_path)("-c", PURE_PYTHON)


@pytest.mark.timeout(900)
def test_native_wheel_of_the_sources_archive(source, tmp_path):
    archive = sdist(source, tmp_path)
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    files = [path.relative_to(source) for folder in ("csrc", "python/pcp_mla") for path in (source / folder).rglob("*.*")]
    assert {str(path) for path in files} <= names
    path = wheel(archive, tmp_path, PCP_MLA_CUDA="0")
    built = {name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert built - {f"pcp_mla/_direct{suffix}"} == {"pcp_mla/_native.so", f"pcp_mla/_planner{suffix}"}
    run = unpack(path, tmp_path)
    run(INSTALLED, "_native", "_planner")
    pytest.importorskip("transformers", minversion="5")
    assert "PASS" in run("-m", "pcp_mla", "demo", "--pcp", "2", "--max-tokens", "32")
    assert "PASS" in run("-m", "pcp_mla", "eval", "--pcp", "2", "--limit", "2")


@pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="built without nvcc")
def test_cuda_library_holds_both_architectures_and_ptx():
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def listed(what):
        return subprocess.run([tool, what, CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout

    for stem in (path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")):
        assert f"{stem}.sm_80.cubin" in listed("--list-elf")
        assert f"{stem}.sm_90.cubin" in listed("--list-elf")
        assert f"{stem}.sm_90.ptx" in listed("--list-ptx")
