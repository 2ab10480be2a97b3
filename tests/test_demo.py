"""The demo as a command: what it prints and writes, its exit codes, and what it says to bad input."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers

from pcp_mla import HeadExchange, MLADims, demo
from pcp_mla.demo import measure, models, outcome, ranks, report
from pcp_mla.integrations import transformers as integration
from pcp_mla.integrations.transformers import paged_cache
from pcp_mla.planner.planned import PlannedMetadata
from pcp_mla.testing.launch import RankError
from pcp_mla.testing.played import play


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks in this process, so that what a test changes holds for them."""
    monkeypatch.setattr(ranks, "choose_backend", lambda world_size: "played")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table_rows(text: str) -> list[list[str]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"P\s+backend", line))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : lines.index("", start)]]


@pytest.mark.timeout(120)
def test_two_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, result = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("Süße Früchte, " * 10)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "61", "--text", str(text), "--json", str(result))) == 0
    out, err = capfd.readouterr()
    backend = ranks.choose_backend(2)
    row = table_rows(out)[0]
    assert row[:3] == ["2", backend, "29 to 32"]
    assert float(row[3]) < 1e-4
    assert row[4:6] == ["100.00%", "16 of 16 equal"]
    assert float(row[6]) < 1e-4
    assert "second prompt of 30 tokens, the first 15 of them" in out
    assert row[-1] == "agrees"
    assert str(text) in out
    assert "61 tokens" in out
    assert "PASS" in out
    assert "under PCP, P = 2: 100%" in err
    assert "4/4" in err
    written = json.loads(result.read_text())
    assert written["agrees"] is True
    assert written["tokens"] == 61
    assert written["class"] == "DeepseekV3ForCausalLM"
    [line] = written["rows"]
    assert line["tokens_per_rank"] == [29, 32]
    assert f"{line['comparison']['logit_difference']:.2e}" == row[3]
    assert f"{line['comparison']['second_difference']:.2e}" == row[6]
    assert line["comparison"]["logit_difference"] <= written["tolerance"]["value"]
    assert line["comparison"]["continuation"] == written["continuation"]
    assert [str(line["seed_launches"]), str(line["our_launches"])] == row[7:9]
    assert line["seed_launches"] > line["our_launches"] > 5
    assert line["layer_difference"] < line["layer_tolerance"] < 1e-4


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("name", [name for name in models.TINY if name != "tiny"])
def test_classes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not hasattr(transformers, f"{models.TINY[name]}Config"):
        with pytest.raises(ImportError, match=f"demo: transformers must have a {models.TINY[name]}Config for {name}"):
            models.make_config(name)
        return
    result = tmp_path / "result.json"
    assert demo.run(arguments("--model", name, "--pcp", "2", "--max-tokens", "48", "--json", str(result))) == 0
    written, out = json.loads(result.read_text()), capsys.readouterr().out
    assert written["class"] == f"{models.TINY[name]}ForCausalLM"
    assert (written["experts"] is None) == (name in ("tiny-youtu", "tiny-minicpm3"))
    assert ("no experts" in out) == (written["experts"] is None)


def put_scale_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every softmax scale by 1 %, of models that are put under PCP of two ranks."""
    right = integration.enable_pcp

    def enable(model: Any, group: Any, **options: Any) -> None:
        if group.world_size == 2:
            for layer in model.model.layers:
                layer.self_attn.scaling *= 1.01
        right(model, group, **options)

    monkeypatch.setattr(integration, "enable_pcp", enable)


@pytest.mark.timeout(120)
def test_only_what_differs_is_named(
    played: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A softmax scale that is 1 % off at one P of three."""
    put_scale_off(monkeypatch)
    file = tmp_path / "result.json"
    assert demo.run(arguments("--pcp", "1", "2", "3", "--max-tokens", "40", "--json", str(file))) == 1
    out = capsys.readouterr().out
    rows = table_rows(out)
    assert [row[:3] for row in rows] == [["1", "played", "40"], ["2", "played", "20"], ["3", "played", "12 to 14"]]
    assert [row[-1] for row in rows] == ["agrees", "DIFFERS", "agrees"]
    assert "\nFAIL: logits beyond the tolerance, P = 2\n" in out
    assert "PASS" not in out
    result = json.loads(file.read_text())
    assert result["agrees"] is False
    assert [row["agrees"] for row in result["rows"]] == [True, False, True]
    assert result["rows"][1]["comparison"]["logit_difference"] > 10 * result["tolerance"]["value"]


@pytest.mark.timeout(120)
def test_one_rank_that_differs_fails(played: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ranks.run_pcp

    def moved(model: Any, group: Any, *rest: Any) -> outcome.Outcome:
        result = right(model, group, *rest)
        if group.rank == 1:
            result.second_logits[2, 5] += 1e-3
        return result

    monkeypatch.setattr(ranks, "run_pcp", moved)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "12")) == 1
    out = capsys.readouterr().out
    assert table_rows(out)[0][-1] == "DIFFERS"
    assert "FAIL: logits beyond the tolerance, P = 2" in out


@pytest.mark.timeout(120)
def test_another_layer_than_the_seed_path_fails(
    played: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = measure.seed_layer

    def wrong(*inputs: Any) -> torch.Tensor:
        *rest, scale, cache = inputs
        return right(*rest, scale * 1.01, cache)

    monkeypatch.setattr(measure, "seed_layer", wrong)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "12")) == 1
    out = capsys.readouterr().out
    assert [row[-1] for row in table_rows(out)] == ["DIFFERS"]
    assert re.search(r"^FAIL: a layer's output differs from the seed path's by \S+, more than \S+, P = 2$", out, re.MULTILINE)
    assert "beyond the tolerance" not in out
    assert "PASS" not in out


@pytest.mark.timeout(120)
def test_a_model_that_says_nothing_fails(played: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All logits are zero, under PCP as well."""

    def silent(name: str) -> Any:
        model = models.build_model(name)
        torch.nn.init.zeros_(model.lm_head.weight)
        return model

    monkeypatch.setattr(demo, "build_model", silent)
    assert demo.run(arguments("--pcp", "1", "--max-tokens", "8")) == 1
    out = capsys.readouterr().out
    assert "FAIL: the stock model's logits are all zero: that others are the same shows nothing" in out
    assert "PASS" not in out


@pytest.mark.timeout(120)
def test_steps(played: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(arguments("--pcp", "1", "2", "--max-tokens", "100", "--chunk-tokens", "16")) == 0
    out = capsys.readouterr().out
    assert "prefill    in steps of 16 tokens; then a second prompt of 50 tokens, the first 25 of them" in out
    for row in table_rows(out):
        assert row[2] == {"1": "16", "2": "8"}[row[0]]
        assert 0 < float(row[3]) < 1e-4
        assert 0 < float(row[6]) < 1e-4
        assert row[-1] == "agrees"


@pytest.mark.timeout(120)
def test_by_heads(played: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls, file = {}, tmp_path / "result.json"
    for split in ("tokens", "heads", "auto"):
        words = ("--pcp", "1", "3", "--max-tokens", "50", "--chunk-tokens", "32", "--split", split, "--json", str(file))
        assert demo.run(arguments(*words)) == 0
        out = capsys.readouterr().out
        assert ("prefill    in steps of 32 tokens; then" if split == "auto" else f"32 tokens, by {split}; then") in out
        assert json.loads(file.read_text())["split"] == split
        calls[split] = [int(row[8]) for row in table_rows(out)]
    assert calls["auto"] == calls["tokens"]  # on a CPU
    assert calls["heads"][0] == calls["tokens"][0]
    assert calls["heads"][1] > calls["tokens"][1]


@pytest.mark.timeout(120)
def test_wrong_heads_fail(played: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two heads' outputs change places on their way back, in the model and in the layer."""
    right = HeadExchange.to_tokens

    def swapped(self: HeadExchange, out: torch.Tensor, meta: Any, result: Any = None) -> torch.Tensor:
        return right(self, out.flip(1), meta, result)

    monkeypatch.setattr(HeadExchange, "to_tokens", swapped)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "40", "--split", "heads")) == 1
    out = capsys.readouterr().out
    assert "FAIL: logits beyond the tolerance, P = 2" in out
    assert "FAIL: a layer's output differs from the seed path's by" in out


@pytest.mark.timeout(120)
def test_wrong_prefix_fails(played: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second prompt reads other tokens than those of the prefix; the first one agrees."""
    right = paged_cache.LatentBlocks.fork_prefixes

    def other_block(self: Any, requests: Any, prefixes: Any) -> Any:
        new = right(self, requests, prefixes)
        if new.lengths[0]:
            new.blocks[0][0] = requests.blocks[0][2]
        return new

    monkeypatch.setattr(paged_cache.LatentBlocks, "fork_prefixes", other_block)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "128")) == 1
    row = table_rows(capsys.readouterr().out)[0]
    assert float(row[3]) < 1e-4 < 1e-2 < float(row[6])
    assert row[-1] == "DIFFERS"


@pytest.mark.timeout(120)
def test_wrong_slots_fail(played: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = PlannedMetadata.__dict__["slot_mapping"].func

    def swapped(self: PlannedMetadata) -> torch.Tensor:
        slots = right(self).clone()
        if len(slots) > 20:  # a prompt's, not a decode step's
            slots[[3, 20]] = slots[[20, 3]]
        return slots

    wrong = cached_property(swapped)
    wrong.__set_name__(PlannedMetadata, "slot_mapping")
    monkeypatch.setattr(PlannedMetadata, "slot_mapping", wrong)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "64")) == 1
    out = capsys.readouterr().out
    row = table_rows(out)[0]
    tolerance = float(re.search(r"tolerance\s+(\S+)", out).group(1))
    assert row[-1] == "DIFFERS"
    assert float(row[3]) > 100 * tolerance
    assert "FAIL: logits beyond the tolerance, P = 2" in out
    assert "expert choices differ" in out


def broken(*_: Any, **__: Any) -> Any:
    raise RankError("rank 1 of 2 failed:\nKeyError: 'broken'")


def test_failed_rank_ends_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "run_ranks", broken)
    assert demo.run(arguments("--pcp", "2", "--max-tokens", "8")) == 1
    assert "error: rank 1 of 2 failed:\nKeyError: 'broken'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "backends"), [(0, ["gloo"] * 3), (1, ["nccl", "played", "played"]), (2, ["nccl", "nccl", "played"])]
)
def test_backend_by_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, backends: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [ranks.choose_backend(p) for p in (1, 2, 4)] == backends


@pytest.mark.parametrize("size", [1, 2, 99])
def test_default_text(size: int) -> None:
    name, prompt = demo.check_arguments(arguments("--max-tokens", str(size), "--pcp", "1"))
    assert (
        bytes(prompt)
        == b"In Congress, July 4, 1776\n\nThe unanimous Declaration of the thirteen united States of America\n\nWhen"[:size]
    )
    assert name.startswith("declaration.txt")


# Bad input: exit code 2 and one line.


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (["--max-tokens", "0"], None, "--max-tokens must be at least 1, got 0"),
        (["--max-tokens", "-5"], None, "--max-tokens must be at least 1, got -5"),
        (["--chunk-tokens", "0"], None, "--chunk-tokens must be at least 1, got 0"),
        (["--pcp", "2", "0"], None, "--pcp must be at least 1, got 0"),
        (["--pcp", "-1"], None, "--pcp must be at least 1, got -1"),
        (["--pcp", "2", "9", "--max-tokens", "8"], None, "--pcp must not be more than the tokens, got 9 processes for 8 tokens"),
        (["--pcp", "4", "--text", "FILE"], b"abc", "--pcp must not be more than the tokens, got 4 processes for 3 tokens"),
        (["--text", "FILE"], b"", "--text must not be empty, got 0 bytes in FILE"),
        (["--text", "FILE"], b"ab\xff", "--text must be UTF-8, got invalid start byte at byte 2 of FILE"),
        (["--text", "FILE"], None, "--text must be a readable file, got FILE (No such file or directory)"),
        (["--text", "."], None, "--text must be a readable file, got . (Is a directory)"),
        (
            ["--split", "heads", "--pcp", "2", "9"],
            None,
            "--pcp must not be more than the model's heads for --split heads, got 9 processes for 8 heads",
        ),
        (["--json", "FILE/out.json"], None, "--json must be a file in a folder that exists, got FILE/out.json"),
    ],
)
def test_bad_input(
    words: list[str], content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert demo.run(arguments(*(word.replace("FILE", str(file)) for word in words))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: demo: {message.replace('FILE', str(file))}\n"


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--model", "v9")
    assert "invalid choice: 'v9'" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_without_transformers() -> None:
    code = "import sys, argparse; sys.modules['transformers'] = None\nfrom pcp_mla import demo\np = argparse.ArgumentParser()\n"
    code += "demo.add_arguments(p)\nsys.exit(demo.run(p.parse_args([])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "pcp-mla[demo]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


# The parts that judge and measure.


def an_outcome(tokens: list[int], logits: torch.Tensor, steps: torch.Tensor, experts: list[int]) -> outcome.Outcome:
    return outcome.Outcome(logits, tokens, steps, torch.tensor([experts]), torch.zeros(1, 2))


def test_comparison_stops_where_the_texts_part() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    steps = torch.tensor([[1.0, 0.0], [0.5, 0.25], [9.0, 0.0]])
    stock = an_outcome([0, 0, 0], logits, steps, [1, 2, 3])
    moved = an_outcome(
        [0, 1, 1], torch.tensor([[0.0, 1.0], [0.75, 1.0]]), torch.tensor([[1.0, 0.0], [0.5, 3.0], [0.0, 99.0]]), [1, 4, 3]
    )
    result = outcome.compare(stock, moved)
    assert result.logit_difference == 2.75  # the step after the parting differs by 99, of another text
    assert (result.same_argmax, result.parts_at, result.parting_margin, result.expert_changes) == (0.5, 1, 0.25, 1)


def test_nan_never_agrees() -> None:
    stock = an_outcome([0], torch.zeros(1, 2), torch.zeros(1, 2), [])
    nan = torch.tensor([[0.0, float("nan")]])
    assert outcome.compare(stock, an_outcome([0], nan, torch.zeros(1, 2), [])).logit_difference == float("inf")
    assert outcome.compare(stock, replace(stock, second_logits=nan)).second_difference == float("inf")


def costs(difference: float = 0.0, tolerance: float = 1e-5) -> measure.LayerCosts:
    return measure.LayerCosts(measure.LayerCost(5, 1.0), measure.LayerCost(9, 1.0), difference, tolerance)


# Of four tokens; the tolerance is 0.1. What a rank of two has instead, and what is said of it.
STOCK = outcome.Outcome(torch.eye(4) * 8, [0, 1, 2], torch.eye(4)[:3] * 8, torch.zeros(4, 2), torch.eye(4)[:2] * 8)
LOGITS, TEXT = "logits beyond the tolerance, P = 2", "the continuation parts from the stock model's without a tie, P = 2"
LAYER = "a layer's output differs from the seed path's by"
JUDGED = [
    ({}, {}, []),
    ({"logits": STOCK.logits + 0.09}, {}, []),
    ({"logits": STOCK.logits + 0.11}, {}, [LOGITS]),
    ({"logits": STOCK.logits * 0}, {}, [LOGITS]),
    ({"logits": STOCK.logits[:1]}, {}, [LOGITS]),
    ({"logits": STOCK.logits[:0]}, {}, [LOGITS]),
    ({"step_logits": STOCK.step_logits - 0.11}, {}, [LOGITS]),
    ({"second_logits": STOCK.second_logits + 0.11}, {}, [LOGITS]),
    ({"second_logits": STOCK.second_logits[:0]}, {}, [LOGITS]),
    ({"second_logits": STOCK.second_logits + torch.inf}, {}, [LOGITS]),
    ({"tokens": [0, 1, 3]}, {}, [TEXT]),
    ({"tokens": [0, 1]}, {}, [TEXT]),
    ({"tokens": []}, {}, [TEXT]),
    ({"tokens": [], "step_logits": STOCK.step_logits[:0]}, {}, [LOGITS, TEXT]),
    ({}, {"difference": 9e-6}, []),
    ({}, {"difference": 1.1e-5}, [LAYER]),
    ({}, {"difference": 2e-6, "tolerance": 1e-6}, [LAYER]),
    ({}, {"difference": torch.inf, "tolerance": torch.inf}, [LAYER]),
]


@pytest.mark.parametrize(("changes", "layer", "reasons"), JUDGED)
@pytest.mark.parametrize("rank", [0, 1])
def test_verdict(rank: int, changes: dict[str, Any], layer: dict[str, float], reasons: list[str]) -> None:
    tolerance = report.Tolerance(0.1, "")
    results = [ranks.RankResult(STOCK, costs(5e-6)), ranks.RankResult(STOCK, costs(5e-6))]
    results[rank] = ranks.RankResult(replace(STOCK, **changes), costs(**layer))
    row = report.make_row(STOCK, results, "gloo", [2, 2], tolerance)
    said = report.failures([row], tolerance)
    assert len(said) == len(reasons)
    assert all(line.startswith(reason) for line, reason in zip(said, reasons, strict=True))
    assert row.agrees == report.as_json({}, [row], tolerance)["agrees"] == (not reasons)
    assert ("DIFFERS" in report.format_table([row], 3, False)) == bool(reasons)


def test_infinite_logits_agree_with_nothing() -> None:
    loud = replace(STOCK, logits=STOCK.logits + torch.inf)
    tolerance = report.make_tolerance(loud, 1, 1, torch.float32)
    assert not report.make_row(loud, [ranks.RankResult(loud, costs())], "gloo", [4], tolerance).agrees


def test_tolerance() -> None:
    stock = replace(STOCK, logits=torch.tensor([[1.0, -4.0]]))
    assert report.make_tolerance(stock, 2, 8, torch.float32).value == pytest.approx(8 * 2**-23 * 4 * 4)
    assert report.make_tolerance(stock, 2, 8, torch.bfloat16).value == pytest.approx(2**-7 * 20**0.5 * 4)


def test_note_on_a_tie() -> None:
    def row(margin: float) -> report.PCPRow:
        comparison = outcome.Comparison(1e-5, 1e-5, 1.0, 3, margin, 0, [])
        return report.PCPRow(2, "gloo", [4, 4], comparison, 9, 5, 1.0, 1.0, 0.0, 0.0, 3, True, True, True)

    tolerance = report.Tolerance(1e-4, "")
    assert "a tie within the tolerance" in report.notes([row(1e-4)], tolerance)[0]
    assert "3 routings were ties" in report.notes([row(1e-4)], tolerance)[1]
    assert "no tie" in report.notes([row(1e-3)], tolerance)[0]


@torch.no_grad()
def test_long_prompts_need_no_score_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = models.build_model("tiny"), torch.arange(200)[None]
    wanted = model(tokens, use_cache=False).logits
    models.bound_memory(model, 5_000)
    assert model.config._attn_implementation == "sdpa"
    models.bound_memory(model, 12_000)
    widths, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: widths.append((q.shape[-1], v.shape[-1])) or attend(q, k, v, **options),
    )
    torch.testing.assert_close(model(tokens, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)
    assert widths == [(48, 48)] * 4


def test_op_calls_count_work_only() -> None:
    x = torch.randn(4, 6)

    def work() -> None:
        y = torch.empty(6, 4)  # allocation
        y.copy_(x.t())  # a view and a copy
        y.view(24)[None].expand(2, 24).split(1)  # views
        torch.add(y, 1.0)

    assert measure.count_launches(work, torch.device("cpu")) == 2


@pytest.mark.gpu
def test_launches_count_kernels() -> None:
    x = torch.randn(1000, device="cuda")
    assert measure.count_launches(lambda: (x + 1).view(10, 100).mul_(2), x.device) == 2


def test_times_are_medians_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, seed = [900.0, 900.0, 5.0, 1.0, 2.0, 90.0, 6.0, 3.0, 4.0], [900.0, 900.0, 17.0, 11.0, 12.0, 99.0, 13.0, 16.0, 15.0]
    left = iter([time for pair in zip(ours, seed, strict=True) for time in pair])
    monkeypatch.setattr(measure, "_milliseconds", lambda *_: next(left))
    dims = MLADims(2, 16, 8, 16, 32)
    costs = measure.measure_layers(8, torch.nn.Linear(32, 64, bias=False), dims, 0.2, None, torch.device("cpu"))
    assert (costs.ours.milliseconds, costs.seed.milliseconds) == (4.0, 15.0)
    assert costs.seed.launches > costs.ours.launches > 0
    assert costs.agrees


def test_replayed_group_gives_the_first_run_again() -> None:
    def rank(group: Any) -> list[list[float]]:
        replayed = measure.ReplayedGroup(group)
        mine, runs = torch.tensor([float(group.rank)]), []
        for _ in range(2):
            replayed.rewind()
            first, second = replayed.all_gather(mine), replayed.all_gather(mine + 10)
            runs.append(torch.cat([first, second]).tolist())
            first.zero_()
        return runs

    assert play(2, rank) == [[[0.0, 1.0, 10.0, 11.0]] * 2] * 2


def test_replayed_group_gives_blocks_again() -> None:
    def rank(group: Any) -> list[list[int]]:
        replayed = measure.ReplayedGroup(group)
        mine, runs = torch.arange(3, dtype=torch.uint8) + 10 * group.rank, []
        for _ in range(2):
            replayed.rewind()
            received = torch.zeros(2 * (1 + group.rank), dtype=torch.uint8)
            replayed.all_to_all_into(received, mine, [1 + group.rank] * 2, [1, 2])
            runs.append([*received.tolist(), *replayed.all_gather(mine[:1]).tolist()])
        return runs

    assert play(2, rank) == [[[0, 10, 0, 10]] * 2, [[1, 2, 11, 12, 0, 10]] * 2]
