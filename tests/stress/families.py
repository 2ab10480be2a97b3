"""The families of cases, and how one is run: for a time, or a single one by its arguments."""

from __future__ import annotations

import os
import pprint
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pcp_mla.ops.registry import availability
from stress.draw import Draw

Arguments = dict[str, Any]
LAST = Path(tempfile.gettempdir()) / "pcp_mla_stress.sh"  # the case that runs: all there is when the process dies
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of products are float32 wherever ours are compared; cuBLAS would round them in between.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def backends(op: str) -> list[str]:
    """Every implementation of the op that is there for tensors on :data:`DEVICE`."""
    reasons = availability(op)
    return ["auto", *(name for name in (DEVICE, "triton", "reference") if not reasons[name])]


@dataclass(frozen=True)
class Family:
    """Cases of one op.

    Attributes:
        draw: a case's arguments, literals that can be printed.
        check: runs a case; raises if anything is wrong.
    """

    draw: Callable[[Draw], Arguments]
    check: Callable[..., None]

    @property
    def name(self) -> str:
        return self.check.__name__.removeprefix("check_")


class Failure(Exception):
    """A case that failed: where, and as a program that shows it."""


def arguments(family: Family, seed: int, number: int) -> Arguments:
    """What case ``number`` of a run with ``seed`` is."""
    return family.draw(Draw([seed, number, zlib.crc32(family.name.encode())]))


def literal(value: Any) -> str:
    return pprint.pformat(value, width=120, compact=True, sort_dicts=False).replace("\n", "\n        ")


def program(family: Family, case: Arguments) -> str:
    """The case as a program to be run from the repository's folder."""
    setting = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    given = "".join(f"    {name}={literal(value)},\n" for name, value in case.items())
    module, function = family.check.__module__, family.check.__name__
    return f"{setting}PYTHONPATH=python:tests:. python - <<'END'\nfrom {module} import {function}\n\n{function}(\n{given})\nEND\n"


def run(family: Family, seed: int, seconds: float) -> int:
    """As many cases as the time allows; how many.

    Raises:
        Failure: of the first case that fails, with the program.
    """
    end, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < end:
        case = arguments(family, seed, number)
        LAST.write_text(program(family, case))
        try:
            family.check(**case)
        except Exception as error:
            where = "".join(traceback.format_exception(error, limit=-4))
            raise Failure(f"{family.name}: case {number} of seed {seed} failed\n\n{where}\n{program(family, case)}") from error
        number += 1
    return number
