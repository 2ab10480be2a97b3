"""The evaluation solves its problems, finds what is no rounding, and scores by hand-made answers as it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from pcp_mla.cli import main
from pcp_mla.demo.routing import rounding_share
from pcp_mla.evaluation import MODEL, load_model
from pcp_mla.evaluation.answers import Answer, pcp_answers, stock_answers
from pcp_mla.evaluation.compare import score, table
from pcp_mla.evaluation.problems import VOCABULARY, Item, encode, evaluation_items
from pcp_mla.integrations.transformers import enable_pcp
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
    assert stock["exact_match"] > 0.7
    for run in runs:
        assert abs(run["exact_match"] - stock["exact_match"]) <= stock["stderr"]
        assert run["same_text"] >= 95
        assert run["unexplained"] == 0
    assert "|arithmetic|     5|    4|exact_match|" in capsys.readouterr().out


@pytest.mark.timeout(300)
def test_chunks_and_cached_prefixes(tmp_path: Path) -> None:
    code, runs = evaluate(tmp_path, "--pcp", "2", "--limit", "12", "--chunk", "1500", "--prefix-cache")
    assert code == 0
    assert runs[1]["same_text"] >= 11


@pytest.fixture(scope="module")
def short() -> tuple[list[Item], list[Answer], float]:
    """Some short items, the stock model's answers and what rounding may do."""
    items = sorted(evaluation_items(60), key=lambda item: len(item.prompt_ids))[:8]
    model = load_model(MODEL, torch.device("cpu"))
    answers = list(stock_answers(model, items, lambda count: None))
    share, _ = rounding_share(model.config.num_hidden_layers, model.config.hidden_size, torch.float32)
    return items, answers, share * max(float(answer.logits.abs().max()) for answer in answers)


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_a_wrong_scale_of_scores_is_no_rounding(short: Any, scale: float) -> None:
    """With the right scale the logits differ by far less than the tolerance, with another by far more."""
    items, stock, tolerance = short
    model = load_model(MODEL, torch.device("cpu"))
    for layer in model.model.layers:
        layer.self_attn.scaling *= scale
    enable_pcp(model)
    result = score("1", list(pcp_answers(model, items, None, False, lambda count: None)), stock, items, tolerance)
    if scale == 1:
        assert result.logit_difference < tolerance / 4
        assert (result.unexplained, result.same_text) == (0, 8)
    else:
        assert result.logit_difference > 10 * tolerance
        assert result.unexplained > 0


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
