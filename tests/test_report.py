"""docs/benchmarks.md, and tables and numbers of the README and other pages, are what the results say."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from bench import readme, report

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted({*readme.TABLES, *(page for page, _ in readme.sentences())})


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def wrong(page: str, text: str) -> list[str]:
    """Tables and sentences of a page that do not have the numbers of the results."""
    return [
        *(["its tables"] if readme.filled(page, text) != text else []),
        *(sentence for where, sentence in readme.sentences() if where == page and words(sentence) not in words(text)),
    ]


def test_page_is_of_the_results() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == "\n".join(report.lines()) + "\n", "run python -m bench.report"


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_of_the_results(page: str) -> None:
    assert wrong(page, (ROOT / page).read_text()) == [], "run python -m bench.readme; sentences are written by hand"


def test_a_number_that_is_off_is_found() -> None:
    text = (ROOT / "README.md").read_text()
    first = list(readme.layer())[2]
    assert wrong("README.md", text.replace(first, first.replace("/", "/ 1", 1))) == ["its tables"]
    *_, commit, ttft = (sentence for page, sentence in readme.sentences() if page == "README.md")
    assert wrong("README.md", text.replace(commit, "an H100 at 1234567:")) == [commit]
    number = ttft.split()[0]
    assert wrong("README.md", text.replace(f" {number} / ", f" {number}1 / ")) == [ttft]
    with pytest.raises(ValueError, match=r"README\.md has 0 tables that begin with"):
        readme.filled("README.md", text.replace("| new tokens | heads", "| tokens | heads"))
    with pytest.raises(ValueError, match=r"README\.md has 2 tables"):
        readme.filled("README.md", 2 * text)


def test_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``auto`` takes FlashAttention 3, ours is one path."""
    results: Any = copy.deepcopy(report.load("layer_h100"))
    for result in results["results"]:
        result.pop("ours_fa3", None)
    monkeypatch.setattr(readme, "load", lambda file: results)
    assert len(list(readme.layer())) == 2 + len(readme.LAYER)


def test_two_results_for_one_number() -> None:
    with pytest.raises(ValueError, match="too many values"):
        readme.find("layer_h100", heads=16)
