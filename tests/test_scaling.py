"""The page of what a layer costs is that of the formulas as they are."""

from pathlib import Path

import pytest

from bench.scaling import costs, lines
from pcp_mla.plan.dims import MLADims
from pcp_mla.plan.split_cost import NODE, Work, attention_pairs, over_nodes, rates_of, split_seconds

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text()


def test_the_page_has_the_tables() -> None:
    made = "\n".join(lines()).splitlines()
    assert len(made) > 40
    assert [line for line in made if line not in PAGE.splitlines()] == []
    assert sum(line.startswith("|") for line in PAGE.splitlines()) == len(made)


@pytest.mark.parametrize(
    ("new", "context", "heads", "world"),
    [(8192, 0, 16, 2), (8192, 57344, 128, 8), (999, 5, 20, 3), (32768, 0, 16, 16), (8192, 0, 128, 64)],
)
def test_what_is_not_common_is_what_auto_compares(new: int, context: int, heads: int, world: int) -> None:
    rates = rates_of("H100")
    work = Work(new + context, -(-new // world), attention_pairs([new], [context]))
    wire = rates.peers if world <= NODE else over_nodes(rates.peers._replace(launch=rates.collective.launch), world)
    by_tokens, by_heads = split_seconds(rates, MLADims(heads, 128, 64, 128, 512), work, world, 2, wire)
    whole = costs(new, context, heads, world)
    assert whole[0] - whole[1] == pytest.approx(1e6 * (by_tokens - by_heads))
    assert world > NODE or whole[1] == pytest.approx(whole[2])
