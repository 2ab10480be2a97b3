"""The evaluation solves its problems, finds what is no rounding, and scores by hand-made answers as it should."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from bench import train_tiny
from pcp_mla import HeadExchange, evaluation
from pcp_mla.cli import main
from pcp_mla.demo import ranks
from pcp_mla.evaluation import MODEL, load_model
from pcp_mla.evaluation.answers import Answer, stock_answers
from pcp_mla.evaluation.compare import score, table
from pcp_mla.evaluation.problems import VOCABULARY, Item, encode, evaluation_items
from test_demo import put_scale_off
from test_integration_transformers import build


def evaluate(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and the runs, stock first."""
    file = tmp_path / "eval.json"
    code = main(["eval", *options, "--json", str(file)])
    return code, json.loads(file.read_text())["runs"]


@pytest.mark.timeout(900)
def test_exact_match_is_the_same_at_every_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, runs = evaluate(tmp_path, "--pcp", "1", "2", "4", "--limit", "100")
    assert code == 0, capsys.readouterr().out
    stock = runs[0]
    assert [run["run"] for run in runs] == ["stock", "1", "2", "4"]
    assert stock["exact_match"] > 0.9
    for run in runs:
        # In float32 texts part where two tokens are within some 1e-4 of each other, if anywhere.
        parted = 100 - run["same_text"]
        assert parted <= 1
        assert run["other_verdict"] <= parted
        assert abs(run["exact_match"] - stock["exact_match"]) <= parted / 100 + 1e-9
        assert run["unexplained"] == 0
        assert (run["logit_difference"] > 0) == (run is not stock)
    assert "|arithmetic|     5|    4|exact_match|" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_chunks_and_cached_prefixes(tmp_path: Path) -> None:
    code, runs = evaluate(tmp_path, "--pcp", "2", "--limit", "12", "--chunk", "1500", "--prefix-cache")
    assert code == 0
    assert (runs[1]["same_text"], runs[1]["unexplained"]) == (12, 0)


def test_a_model_of_another_geometry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As bench/train_tiny.py builds and saves it, here untrained: it is loaded, and says the same at any number of ranks."""
    torch.manual_seed(0)
    model = train_tiny.build_model("glm")
    assert 3.5e6 < sum(p.numel() for p in model.parameters()) < 4.5e6
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    code, runs = evaluate(tmp_path, "--model", str(tmp_path), "--pcp", "2", "--limit", "2")
    assert code == 1
    assert "the stock model solves no problem" in capsys.readouterr().out
    assert [(run["same_text"], run["unexplained"]) for run in runs] == [(2, 0)] * 2


@pytest.fixture(scope="module")
def short() -> tuple[list[Item], list[Answer]]:
    """Some short items and the stock model's answers."""
    items = sorted(evaluation_items(60), key=lambda item: len(item.prompt_ids))[:2]
    return items, list(stock_answers(load_model(MODEL, torch.device("cpu")), items, lambda count: None))


# The verdict, over ranks in this process, on the short items.


@pytest.fixture
def judge(short: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command on the first items, with these answers of the stock model: exit code, output, errors."""
    items, answers = short
    monkeypatch.setattr(ranks, "choose_backend", lambda world_size: "played")

    def run(*options: str, count: int = 2, stock: list[Answer] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(evaluation, "evaluation_items", lambda limit: items[:limit])
        monkeypatch.setattr(evaluation, "stock_answers", lambda *_: iter(answers[:count] if stock is None else stock))
        code = main(["eval", "--limit", str(count), *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def change(short: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the ranks repeat the stock model's answers, one of them those that a function makes of these."""
    given = short[1]

    def patch(world_size: int, rank: int, function: Callable[[list[Answer]], list[Answer]]) -> None:
        def answers(model: Any, group: Any, items: list[Item], *_: Any) -> list[Answer]:
            same = given[: len(items)]
            return function(same) if (group.world_size, group.rank) == (world_size, rank) else same

        monkeypatch.setattr(evaluation, "_answers_of_rank", answers)

    return patch


@pytest.mark.timeout(120)
def test_only_what_differs_is_named(judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A softmax scale that is 1 % off at one P of three. With the right one logits differ by far less than the tolerance."""
    put_scale_off(monkeypatch)
    file = tmp_path / "eval.json"
    code, out, _ = judge("--pcp", "1", "2", "3", "--json", str(file))
    assert code == 1
    assert re.search(r"^FAIL: answers differ by more: [12] at P = 2$", out, re.MULTILINE)
    assert "PASS" not in out
    result = json.loads(file.read_text())
    stock, *runs = result["runs"]
    assert (stock["exact_match"], stock["unexplained"]) == (1.0, 0)
    for run in runs:
        if run["run"] == "2":
            assert run["logit_difference"] > 10 * result["tolerance"]
            assert run["unexplained"] > 0
        else:
            assert 0 < run["logit_difference"] < result["tolerance"] / 4
            assert (run["unexplained"], run["same_text"]) == (0, 2)


def last_token(answers: list[Answer]) -> list[Answer]:
    *others, last = answers
    return [*others, Answer([*last.tokens[:-1], 0], last.logits)]


@pytest.mark.timeout(120)
def test_by_heads(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, right = [], HeadExchange.to_heads
    monkeypatch.setattr(HeadExchange, "to_heads", lambda *given: rows.append(given) or right(*given))
    code, out, _ = judge("--pcp", "1", "2", "--split", "heads", count=1)
    assert code == 0
    assert "split heads" in out
    assert rows
    code, _, err = judge("--pcp", "1", "99", "--split", "heads", count=1)
    assert code == 2
    assert "error: eval: --pcp must not be more than the model's heads for --split heads, got 99 processes for " in err


@pytest.mark.timeout(120)
def test_float8_caches_beside_the_model_s(judge: Any, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    code, out, _ = judge("--pcp", "1", "2", "--cache-dtype", "model", "fp8", "--json", str(file), count=1)
    assert code == 0
    assert "PASS: exact match with a float8 cache is within a standard error of the stock model's" in out
    result = json.loads(file.read_text())
    assert [run["run"] for run in result["runs"]] == ["stock", "1", "2", "1 fp8", "2 fp8"]
    for run in result["runs"]:  # the quantised ones were
        assert (run["logit_difference"] > result["tolerance"]) == ("fp8" in run["run"])
        assert run["exact_match"] == 1


def wrong(given: Answer) -> Answer:
    tokens = encode("#### 0 <end>")
    return Answer(tokens, given.logits[: len(tokens)])


def test_a_float8_cache_is_judged_by_exact_match(judge: Any, change: Any, short: Any) -> None:
    first, second = short[1][:2]
    change(1, 0, lambda answers: [first, wrong(second)])
    code, out, _ = judge("--pcp", "1", "2", "--cache-dtype", "fp8")
    assert code == 1
    assert "FAIL: exact match is more than a standard error from the stock model's at P = 1 fp8\n" in out
    assert "PASS" not in out
    # As many right answers, to other problems: a standard error says nothing against that, rounding does.
    for kind, right in (("fp8", True), ("model", False)):
        code, out, _ = judge("--pcp", "1", "--cache-dtype", kind, stock=[wrong(first), second])
        assert (code == 0) == ("PASS" in out) == right


@pytest.mark.parametrize("rank", [1, 2])
def test_ranks_that_differ_fail(judge: Any, change: Any, rank: int) -> None:
    change(3, rank, last_token)
    code, out, err = judge("--pcp", "1", "3")
    assert code == 1
    assert f"error: eval: ranks 0 and {rank} of 3 gave different answers" in err
    assert "PASS" not in out


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        (lambda answers: answers, None),
        (last_token, "FAIL: answers differ by more: 1 at P = 1"),
        (lambda answers: answers[:-1], "error: eval: the model at P = 1 gave 1 answers to 2 problems"),
        (lambda answers: [], "error: eval: the model at P = 1 gave 0 answers to 2 problems"),
        (lambda answers: [Answer([], answer.logits[:0]) for answer in answers], "FAIL: answers differ by more: 2 at P = 1"),
        (
            lambda answers: [Answer(answer.tokens[:-1], answer.logits[:-1]) for answer in answers],
            "FAIL: answers differ by more: 2 at P = 1",
        ),
        (
            lambda answers: [Answer(answer.tokens, answer.logits + torch.inf) for answer in answers],
            "FAIL: answers differ by more: 2 at P = 1",
        ),
        (
            lambda answers: [Answer(answer.tokens, answer.logits * torch.nan) for answer in answers],
            "FAIL: answers differ by more: 2 at P = 1",
        ),
    ],
    ids=["same", "token", "missing", "none", "empty", "cut", "inf", "nan"],
)
def test_answers_of_one_rank(judge: Any, change: Any, function: Any, failure: str | None) -> None:
    change(1, 0, function)
    code, out, err = judge("--pcp", "1")
    assert code == (failure is not None)
    assert ("PASS: no answer differs by more than rounding" in out) == (failure is None)
    assert failure is None or failure in out + err


def babble(answers: list[Answer]) -> list[Answer]:
    """Without a number behind the mark; in the first one without the mark."""
    texts = ["2 + 3 = 5. <end>", "2 + 3 = 5. ####"]
    return [answer(text) for text in texts[: len(answers)]]


@pytest.mark.parametrize("silent", [babble, lambda answers: [Answer([], torch.zeros(0, len(VOCABULARY))) for _ in answers]])
def test_a_model_that_answers_nothing_does_not_pass(judge: Any, change: Any, short: Any, silent: Any) -> None:
    """Neither alone nor if the stock model does not answer either, which is the same."""
    change(1, 0, silent)
    nothing = silent(short[1][:2])
    code, out, _ = judge("--pcp", "1", stock=nothing)
    assert code == 1
    assert "FAIL: the stock model solves no problem: that answers are the same shows nothing" in out
    assert "PASS" not in out
    assert out.count("|exact_match|↑  |0.0000|±  |0.0000|   2/2   |") == 2
    code, out, _ = judge("--pcp", "1")
    assert code == 1
    assert "FAIL: answers differ by more: 2 at P = 1" in out


def test_a_stock_model_that_leaves_a_problem_out(judge: Any, short: Any) -> None:
    code, _, err = judge("--pcp", "1", stock=short[1][:1])
    assert code == 1
    assert "error: eval: the stock model gave 1 answers to 2 problems" in err


def answer(text: str, second_best: str = "7", lead: float = 1.0) -> Answer:
    """Logits that prefer the text's tokens by ``lead`` to ``second_best``."""
    tokens = encode(text)
    logits = torch.zeros(len(tokens), len(VOCABULARY))
    logits[:, encode(second_best)] = 5 - lead
    logits[torch.arange(len(tokens)), tokens] = 5.0
    return Answer(tokens, logits)


def test_score() -> None:
    items = [Item([], "", 5), Item([], "", 6), Item([], "", 8), Item([], "", 9)]
    stock = [answer("#### 5 <end>"), answer("#### 6 <end>"), answer("#### 7 <end>", "8", 0.2), answer("#### 9 <end>")]
    same = score("stock", stock, stock, items, 0.1)
    assert (same.exact_match, same.same_text, same.other_verdict, same.logit_difference) == (0.75, 4, 0, 0.0)
    assert same.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    mine = [stock[0], answer("#### 6 <end>", lead=0.7), answer("#### 8 <end>"), stock[3]]
    tight, middle, loose = (score("2", mine, stock, items, tolerance) for tolerance in (0.1, 0.5, 6.0))
    assert (tight.exact_match, tight.same_text, tight.other_verdict) == (1.0, 3, 1)
    assert tight.largest_margin == pytest.approx(0.2)
    assert (tight.unexplained, middle.unexplained, loose.unexplained) == (2, 1, 0)
    for text in ("#### <end>", "2 + 3 = 5. <end>", "", "2 + 3 = 5. <end> #### 5", "####"):
        assert not answer(text or "<pad>").is_right(items[0])
    # The same logits, and the second best token: by a lead of 1.
    second = Answer([*stock[0].tokens[:-2], encode("7")[0]], stock[0].logits)
    for tolerance, unexplained in ((0.49, 1), (0.51, 0)):
        assert score("2", [second, *stock[1:]], stock, items, tolerance).unexplained == unexplained
    infinite = [Answer(a.tokens, torch.full_like(a.logits, torch.inf)) for a in stock]
    assert score("2", infinite, stock, items, torch.inf).unexplained == 4
    short = Answer(stock[1].tokens[:-1], stock[1].logits[:-1])
    for pair in ([stock[0], short, *stock[2:]], stock), (stock, [stock[0], short, *stock[2:]]):
        cut = score("2", *pair, items, 0.1)
        assert (cut.same_text, cut.unexplained) == (3, 1)
    broken = Answer(stock[0].tokens, torch.full_like(stock[0].logits, torch.nan))
    lost = score("2", [broken, *stock[1:]], stock, items, 0.1)
    assert (lost.logit_difference, lost.unexplained) == (torch.inf, 1)
    assert table([same, tight], 4).splitlines()[3].startswith("|arithmetic|     5|    2|exact_match|↑  |1.0000|±  |0.0000|")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "eval: --limit must be at least 1, got 0"),
        (["--pcp", "2", "0"], "eval: --pcp must be at least 1, got 0"),
        (["--chunk", "0"], "eval: --chunk must be at least 1, got 0"),
        (["--model", "/nowhere"], "eval: --model must be a folder with weights, got /nowhere"),
        (["--json", "/nowhere/x.json"], "eval: --json must be a file in a folder that exists"),
    ],
)
def test_bad_arguments(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *options]) == 2
    assert message in capsys.readouterr().err


def test_wrong_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("v2", q_lora_rank=None).save_pretrained(tmp_path)
    assert main(["eval", "--model", str(tmp_path)]) == 2
    assert f"--model must have a vocabulary of {len(VOCABULARY)} tokens, got 50" in capsys.readouterr().err
