"""Two runs side by side: the same cases and paths, what stands for a path, and which are slower."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

import bench.__main__ as runner
from bench import ratios


def report(**us: float) -> dict[str, Any]:
    results = [
        {"op": "x", "tokens": 8, "heads": 2, "bytes": 5, "copy_us": 1.0, "ours": {"cpu_us": 9.0, **us}, "gone": {"cpu_us": 1.0}}
    ]
    return {"results": results}


def test_paths_of_the_same_case():
    after = report(gpu_us=6.0)
    after["results"][0] |= {"bytes": 7, "copy_us": 2.0, "new": {"cpu_us": 3.0}}
    after["results"].append(after["results"][0] | {"tokens": 16})
    del after["results"][0]["gone"]
    assert list(ratios.ratios(report(gpu_us=4.0), after)) == [("x tokens=8 heads=2", "ours", "gpu_us", 4.0, 6.0)]


@pytest.mark.parametrize(
    ("us", "what"), [({"graph_us": 2.0, "gpu_us": 1.0}, "graph_us"), ({"wall_us": 1.0}, "wall_us"), ({}, "cpu_us")]
)
def test_what_stands_for_a_path(us, what):
    assert [r.what for r in ratios.ratios(report(**us), report(**us))] == [what, "cpu_us"]


def test_slower_ones_are_said(capsys):
    found = list(ratios.ratios(report(gpu_us=100.0), report(gpu_us=111.0)))
    assert not ratios.show(found)
    assert "x tokens=8 heads=2 | ours gpu_us 100.0 -> 111.0: 1.110  SLOWER" in capsys.readouterr().out
    assert ratios.show(list(ratios.ratios(report(gpu_us=100.0), report(gpu_us=109.0))))
    assert "2 times compared, 0 more than 10% slower" in capsys.readouterr().out
    assert not ratios.show([])


def test_check_against_committed_results(tmp_path, monkeypatch, capsys):
    """The planner's on this machine, beside results that say it took no time, and then ages."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    assert runner.main(["overlap", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("overlap_*.json")
    committed = json.loads(file.read_text())

    def rescaled(by: float) -> int:
        changed = json.loads(json.dumps(committed))
        for result in changed["results"]:
            for numbers in result.values():
                if isinstance(numbers, dict):
                    numbers["cpu_us"] *= by
        file.write_text(json.dumps(changed))
        return runner.main(["overlap", "--check", "--out", str(tmp_path / "new")])

    assert rescaled(1e-3) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert rescaled(1e3) == 0
    assert "SLOWER" not in capsys.readouterr().out


def test_another_revision_runs_with_its_own_package(tmp_path, monkeypatch):
    """In a repository whose only benchmark says which of its revisions it is of."""

    def git(*args: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "bench").mkdir()
    (tmp_path / "python").mkdir()
    (tmp_path / "setup.py").write_text("open('built', 'w').close()")
    (tmp_path / ".gitignore").write_text("build/\nbuilt\n")
    (tmp_path / "bench" / "__init__.py").touch()
    script = "import json, pathlib, sys, us\nout = pathlib.Path(sys.argv[3])\nout.mkdir(parents=True, exist_ok=True)\n"
    script += (
        "numbers = {'results': [{'op': 'a', 'ours': {'gpu_us': us.US}}]}\n(out / 'a_gpu.json').write_text(json.dumps(numbers))\n"
    )
    (tmp_path / "bench" / "__main__.py").write_text(script)
    for us in (20, 10, 30):
        (tmp_path / "python" / "us.py").write_text(f"US = {us}.0\n")
        git("add", "-A")
        git("commit", "-q", "-m", f"{us}")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    shown: list[ratios.Ratio] = []
    monkeypatch.setattr(ratios, "show", lambda found: shown.extend(found) or not found)
    for ref, before in (("HEAD~1", 10.0), ("HEAD~2", 20.0)):
        assert runner.compare(["a"], ref) == 1
        assert shown.pop() == ("a", "ours", "gpu_us", before, 30.0)
    assert (tmp_path / "build" / "base" / "built").exists()
    assert not (tmp_path / "built").exists()
    with pytest.raises(subprocess.CalledProcessError):
        runner.compare(["a"], "nowhere")
