"""docs/benchmarks.md is what the results say."""

from pathlib import Path

from bench import report

ROOT = Path(__file__).resolve().parent.parent


def test_page_is_of_the_results():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == "\n".join(report.lines()) + "\n", "run python -m bench.report"
