"""The list of wrong changes is of this tree: each can be made, and the test that is to catch it is there."""

import re
from pathlib import Path

import pytest

from mutants.changes import CHANGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.what)
def test_a_change_can_be_made(change):
    assert (ROOT / change.file).read_text().count(change.right) == 1
    assert change.wrong != change.right
    file, _, name = change.test.partition("[")[0].partition("::")
    assert re.search(rf"^def {name or 'test_'}", (ROOT / file).read_text(), re.MULTILINE)
