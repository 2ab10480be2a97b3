"""The README's code runs and its commands exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
CODE_SPANS = re.findall(r"`(python -m [^`]+|make [^`]+)`", README)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_length():
    assert len(README.splitlines()) <= 200
    assert PYTHON
    assert COMMANDS


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_python_block_runs(block):
    exec(compile(PYTHON[block], f"README.md python block {block}", "exec"), {})


@pytest.mark.parametrize("command", [*COMMANDS, *CODE_SPANS])
def test_command_exists(command):
    words = shlex.split(command, comments=True)
    while words and "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    elif words[:2] == ["python", "-m"]:
        done = subprocess.run([sys.executable, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True)
    elif words[0] == "pip":
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True)
    else:
        assert (ROOT / words[0]).exists(), command
        return
    assert done.returncode == 0, done.stderr
