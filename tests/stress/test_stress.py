"""Every family for its share of the time: ``make stress SECONDS=120 SEED=7``."""

from __future__ import annotations

import importlib.util
import os
import secrets

import pytest
import torch

from stress import attention, exchange, latents, layer, merges, overlaps, planner, projections, rows
from stress.families import Failure, Family, run

SEED = int(os.environ.get("STRESS_SEED") or secrets.randbelow(2**31))
SECONDS = float(os.environ.get("STRESS_SECONDS") or 60)
MODULES = [rows, merges, latents, projections, attention, exchange, layer, planner, overlaps]
if importlib.util.find_spec("transformers"):
    from stress import walk

    MODULES.append(walk)
FAMILIES = [family for module in MODULES for family in module.FAMILIES]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Played ranks are threads with a pool each, and tiny products gain nothing from a second core.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.stress
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_random_cases(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    failure = None
    try:
        outcome = f"{family.name}: {run(family, SEED, SECONDS / len(FAMILIES))} cases, seed {SEED}"
    except Failure as error:
        failure = outcome = str(error)
    with capsys.disabled():  # as it is, to be pasted
        print(f"\n{outcome}", end="", flush=True)
    if failure is not None:
        pytest.fail(failure.partition("\n")[0], pytrace=False)
