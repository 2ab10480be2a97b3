"""Two runs of a benchmark side by side: how many times as long each path takes, and which are slower than noise explains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 1.1  # of medians; hosts and clocks of GPUs of one kind differ by less
_TIMES = ("graph_us", "gpu_us", "wall_us", "cpu_us")  # what stands for a path: the first that it has
_ABOUT = ("bytes", "flops", "backend")  # of a result, not what it is of


class Ratio(NamedTuple):
    case: str
    path: str
    what: str
    before: float
    after: float

    @property
    def times(self) -> float:
        return self.after / self.before


def _case(result: dict[str, Any]) -> str:
    of = {name: value for name, value in result.items() if isinstance(value, int | str) and name not in _ABOUT}
    return " ".join(f"{name}={value}" if name != "op" else str(value) for name, value in of.items())


def ratios(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Ratio]:
    """Of every path of every case that both reports have."""
    earlier = {_case(result): result for result in before["results"]}
    for result in after["results"]:
        case = _case(result)
        for path, numbers in result.items():
            old = earlier.get(case, {}).get(path)
            if not isinstance(numbers, dict) or not isinstance(old, dict):
                continue
            what = next((name for name in _TIMES if name in numbers and name in old), None)
            if what is not None:
                yield Ratio(case, path, what, old[what], numbers[what])


def show(found: list[Ratio]) -> bool:
    """Print them, the slower ones marked; whether there is none of these, but something to compare."""
    for r in found:
        mark = "  SLOWER" if r.times > LIMIT else ""
        print(f"{r.case} | {r.path} {r.what} {r.before:.1f} -> {r.after:.1f}: {r.times:.3f}{mark}", flush=True)
    slower = sum(r.times > LIMIT for r in found)
    print(f"{len(found)} times compared, {slower} more than {LIMIT - 1:.0%} slower", flush=True)
    return bool(found) and slower == 0


def build(ref: str, root: Path) -> Path:
    """The revision ``ref`` of the repository at ``root`` in a worktree of its own, built. CalledProcessError where there is none
    or it does not build."""

    def git(*args: str, cwd: Path = root) -> str:
        return subprocess.run(["git", *args], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    tree, revision = root / "build" / "base", git("rev-parse", "--verify", f"{ref}^{{commit}}")
    git("worktree", "prune")
    if tree.exists():
        git("checkout", "-q", "--detach", revision, cwd=tree)
    else:
        git("worktree", "add", "-q", "--detach", str(tree), revision)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
    return tree


def run(tree: Path, name: str, out: Path) -> None:
    """One benchmark of the package in ``tree``, in a process of its own."""
    paths = [str(tree / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment.pop("PCP_MLA_COMMIT", None)
    subprocess.run([sys.executable, "-m", "bench", name, "--out", str(out)], cwd=tree, env=environment, check=True)
