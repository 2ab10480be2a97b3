"""``python -m mutants [WORD ...]``: makes each wrong change alone in a copy of the tree, and runs the test that is to catch it.

Words choose the changes whose file or test has one of them. Exit code 0: all are caught; 1: one is not, or a test fails without it.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutants.change import Change
from mutants.changes import CHANGES

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants"
KEPT_OUT = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info")
# A wrong change may make ranks wait for each other: no test that is named here takes a tenth of it.
LIMIT = 300


def make_copy() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT, COPY, ignore=KEPT_OUT)


def environment() -> dict[str, str]:
    """That of a process that imports the copy's package, and builds it without CUDA."""
    return {**os.environ, "PYTHONPATH": str(COPY / "python"), "PCP_MLA_CUDA": "0"}


def fails(tests: list[str]) -> tuple[bool, str]:
    """Whether a test of these fails, and pytest's last line. RuntimeError if they cannot be run."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"--timeout={LIMIT}", *tests]
    done = subprocess.run(command, cwd=COPY, env=environment(), capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest {' '.join(tests)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.returncode == 1, done.stdout.strip().splitlines()[-1]


def build() -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=environment(), check=True)


def is_caught(change: Change) -> bool:
    """Make the change, build if it is one of C++, run its test, and undo it."""
    file = COPY / change.file
    right = file.read_text()
    file.write_text(right.replace(change.right, change.wrong))
    try:
        if change.file.startswith("csrc/"):
            build()
        return fails([change.test])[0]
    finally:
        file.write_text(right)


def main(words: list[str]) -> int:
    chosen = [c for c in CHANGES if not words or any(word in c.file or word in c.test for word in words)]
    if not chosen:
        print(f"no change has one of {', '.join(words)} in its file or its test")
        return 1
    make_copy()
    if any(c.file.startswith("csrc/") for c in chosen):
        build()
    broken, line = fails(sorted({c.test for c in chosen}))
    if broken:
        print(f"tests fail as the tree is: {line}")
        return 1
    survived = 0
    # C++ last: what is built there stays until the next build.
    for change in sorted(chosen, key=lambda c: c.file.startswith("csrc/")):
        start = time.monotonic()
        caught = is_caught(change)
        survived += not caught
        verdict, seconds = "caught" if caught else "SURVIVED", time.monotonic() - start
        print(f"{verdict:8} {seconds:4.0f} s  {change.file}: {change.what} ({change.test})", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
