"""The README's code runs, its commands exist, and so does every option, name and variable in them."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.__main__ as benchmarks
import bench.vllm.__main__ as vllm_benchmark
from pcp_mla import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
CODE_SPANS = re.findall(r"`(python\s+-m\s[^`]+|make\s[^`]+)`", README)
OPTIONS = sorted(set(re.findall(r"`(--[\w-]+)[^`]*`", README)))
SETTING = re.compile(r"(\w+)=\S*")
MAKEFILE = (ROOT / "Makefile").read_text()
SOURCES = "".join(path.read_text() for folder in ("python", "bench") for path in (ROOT / folder).rglob("*.py"))
SOURCES += (ROOT / "setup.py").read_text()
MAINS = {"pcp_mla": cli.main, "bench": benchmarks.main, "bench.vllm": vllm_benchmark.main}


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_length():
    assert len(README.splitlines()) <= 200
    assert COMMANDS


@pytest.mark.parametrize("block", [0, 1])
def test_python_block_runs(block):
    """These two look at what they compute themselves."""
    assert "assert " in PYTHON[block]
    exec(compile(PYTHON[block], f"README.md python block {block}", "exec"), {})


@torch.no_grad()
def test_model_under_pcp_says_what_it_says_without():
    transformers = pytest.importorskip("transformers", minversion="5")
    assert len(PYTHON) == 3
    names = {}
    exec(compile(PYTHON[2], "README.md python block 2", "exec"), names)
    model = names["model"]
    assert isinstance(model, transformers.DeepseekV3ForCausalLM)
    torch.testing.assert_close(names["logits"], model(torch.tensor([[1, 2, 3, 7, 8, 9]])).logits[0, 3:], rtol=1e-4, atol=1e-5)
    text = [1, 2, 3, 4]
    for _ in range(8):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert names["answer"] == [text[4:]]


@functools.cache
def pip_help():
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True, check=True)
    return done.stdout


def options_in(words):
    return [word.split("=")[0] for word in words if word.startswith("--")]


def names(option, text):
    """Whether a help text or a list of settings has the word."""
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text) is not None


def check_command(command, capsys):
    """AssertionError unless the command is there with all that it is given."""
    words = shlex.split(command, comments=True)
    while SETTING.fullmatch(words[0]):
        assert names(SETTING.fullmatch(words.pop(0))[1], SOURCES), command
    if words[0] == "make":
        targets = [word for word in words[1:] if not SETTING.fullmatch(word)]
        settings = [SETTING.fullmatch(word)[1] for word in words[1:] if SETTING.fullmatch(word)]
        assert all(re.search(rf"^{name} \?=", MAKEFILE, re.MULTILINE) for name in settings), command
        done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["python", "-m"]:
        with pytest.raises(SystemExit) as ended:
            MAINS[words[2]]([*words[3:], "--help"])
        assert ended.value.code == 0, command
        shown = capsys.readouterr().out
        assert all(names(option, shown) for option in options_in(words[3:])), command
        if words[2] == "bench":
            assert all(word in benchmarks.BENCHMARKS for word in words[3:] if not word.startswith("-")), command
    elif words[:2] == ["pip", "install"]:
        assert all(names(option, pip_help()) for option in options_in(words)), command
        for place in (word for word in words[2:] if not word.startswith("-")):
            folder, extras = re.fullmatch(r"([^[]+)(?:\[(.*)\])?", place).groups()
            project = (ROOT / folder / "pyproject.toml").read_text() if (ROOT / folder / "pyproject.toml").is_file() else ""
            assert project, command
            known = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
            assert all(re.search(rf"^{extra} = ", known, re.MULTILINE) for extra in (extras or "").split(",") if extra), command
    else:
        assert (ROOT / words[0]).is_file(), command


@pytest.mark.parametrize("command", [*COMMANDS, *CODE_SPANS])
def test_command_exists(command, capsys):
    check_command(command, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make stress SECOND=3",
        "python -m bench nothing",
        "python -m bench layer --traces x.csv",
        "python -m pcp_mla environment",
        "python -m pcp_mla demo --pcpp 2",
        "python -m pcp_mla demo --model v9",
        "pip install ./nowhere",
        "pip install '.[nothing]'",
        "pip install --no-built-isolation .",
        "PCP_MLA_CUDDA=1 pip install .",
        "bench/cpu.sh",
    ],
)
def test_commands_that_do_not_exist(command, capsys):
    with pytest.raises(AssertionError):
        check_command(command, capsys)


@pytest.mark.parametrize("module", MAINS)
def test_module_is_a_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("option", OPTIONS)
def test_option_exists(option, capsys):
    shown = pip_help()
    for main, command in ((cli.main, ["demo"]), (cli.main, ["eval"]), (benchmarks.main, [])):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        shown += capsys.readouterr().out
    assert names(option, shown)


def test_variables_exist():
    variables = set(re.findall(r"\bPCP_MLA_\w+", README))
    assert variables
    assert [variable for variable in variables if not names(variable, SOURCES)] == []
