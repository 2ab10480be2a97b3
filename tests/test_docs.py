"""The pages: what they name is there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FAULTS = (TESTS.parent / "docs" / "faults.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py|stress/\w+\.py)::(\w+)`", FAULTS)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}::{name}" for file, name in NAMED])
def test_the_test_of_a_trap_is_there(file, name):
    assert re.search(rf"^ *def {name}\(", (TESTS / file).read_text(), re.MULTILINE)


def test_every_trap_has_a_test():
    rows = [line for line in FAULTS.splitlines() if line.startswith("| ") and not line.startswith(("| trap", "| ---"))]
    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"`[\w/]+\.py::\w+`", row.split(" | ")[1])] == []
