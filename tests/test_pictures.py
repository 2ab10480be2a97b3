"""Pictures show what the results say: by the numbers in their files, so that nothing is drawn here but where matplotlib is."""

from __future__ import annotations

import gzip
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench import figures, report

NUMBERS = dict(figures.numbers())
DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


def in_file(path: Path) -> Any:
    """The numbers of a picture."""
    (found,) = ET.parse(path).iterfind(DESCRIPTION)
    return json.loads(found.text or "")


@pytest.mark.parametrize("name", NUMBERS)
def test_picture_is_of_the_results(name: str) -> None:
    path = figures.IMAGES / f"{name}.svg"
    assert in_file(path) == NUMBERS[name], "run python -m bench.pictures"
    text = path.read_text()
    assert len(text) < 100_000
    assert "<dc:date>" not in text


def test_no_other_pictures() -> None:
    assert {path.stem for path in figures.IMAGES.glob("*.svg")} == set(NUMBERS)
    assert set(figures.FIGURES) - set(NUMBERS) <= {"timeline"}  # without a trace


def test_pages_show_all_pictures_and_no_others() -> None:
    pages = [report.ROOT / "README.md", *(report.ROOT / "docs").glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"!\[[^]]+\]\((?:docs/)?img/(\w+)\.svg\)", page.read_text())]
    assert set(shown) == set(NUMBERS)


def trace(paths: tuple[str, ...] = ("seed", "collective", "peers")) -> dict[str, Any]:
    """Of three calls a path on rank 0, the first of them slow; in each two kernels, the second as long as the path's place."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"rank {rank}"}}
        for pid, rank in ((100, 0), (0, 0), (1, 1))
    ]
    now = 0.0
    for place, path in enumerate(paths):
        for length in (500.0, 90.0, 100.0):
            range_of = {"ph": "X", "cat": "user_annotation", "name": f"layer {path}", "pid": 100, "ts": now, "dur": length}
            kernels = [
                {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_AllGather", "pid": 0, "ts": now + 10, "dur": length / 10},
                {"ph": "X", "cat": "kernel", "name": "flash::FlashAttnFwd", "pid": 0, "ts": now + 50, "dur": 1.0 + place},
                {"ph": "X", "cat": "kernel", "name": "of another rank", "pid": 1, "ts": now + 50, "dur": 1.0},
            ]
            events += [range_of, *kernels]
            now += 1000
    return {"traceEvents": events}


def test_timeline_is_of_the_call_in_the_middle() -> None:
    assert figures.spans(trace(), "peers") == {"us": 100, "spans": [["collective", 10, 10], ["attention", 50, 3]]}


def test_timeline_needs_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "trace_file", lambda: None)
    assert figures.timeline() is None
    assert "timeline" not in dict(figures.numbers())
    file = tmp_path / "profile_h100x2.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps(trace()).encode()))
    monkeypatch.setattr(figures, "trace_file", lambda: file)
    monkeypatch.setattr(report, "load", lambda name: {"hardware": "GPU", "commit": "1234567"})
    shown = figures.timeline()
    assert shown is not None
    assert list(shown["paths"]) == ["seed path", "pcp-mla, collective", "pcp-mla, peers"]
    assert shown["paths"]["seed path"]["spans"][1] == ["attention", 50, 1]
    assert shown["source"] == "bench/results/profile_h100x2.trace.json.gz: 2 GPU, 1234567"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void pcp_mla::attention_kernel<__nv_bfloat16, ...>", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("void pcp_mla::publish_latents_kernel<...>", "exchange"),
        ("void pcp_mla::kv_up_project_kernel<__nv_bfloat16, 256>", "up-projection"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "up-projection"),
        ("void at::native::indexSelectLargeIndex<...>", "copies and indices"),
        ("Memcpy DtoD (Device -> Device)", "copies and indices"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert figures.kind(kernel) == kind


@pytest.mark.parametrize("name", NUMBERS)
def test_the_same_numbers_give_the_same_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import pictures

    pictures.draw(name, NUMBERS[name], tmp_path)
    first = (tmp_path / f"{name}.svg").read_bytes()
    pictures.draw(name, NUMBERS[name], tmp_path)
    assert (tmp_path / f"{name}.svg").read_bytes() == first
    assert in_file(tmp_path / f"{name}.svg") == NUMBERS[name]
