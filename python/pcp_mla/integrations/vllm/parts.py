"""Which parts of vLLM this package takes the place of, in this process: what was asked for, what was found, what ran.

A part is taken at three levels. The environment says which are wanted; what a vLLM version offers is looked at when its module is
imported; and each layer, once, when it is made, says whether it is of a kind that the part knows. Only what passes all three runs
here. The rest is vLLM's own code, untouched.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger("vllm.pcp_mla")  # a child of vLLM's logger, so that it is formatted and shown as the engine's lines are

VARIABLE = "PCP_MLA_VLLM"
PARTS = {
    "exchange": "one packed all-gather of the latents and one cache write, for two all-gathers, concatenations and a write",
    "prefill": "each key expanded once, and one attention call, for the calls over new tokens and context and their merges",
    "planner": "steps without decodes planned by one copy and one launch; needs prefill",
    "heads": "some heads for the tokens of all ranks, where that costs less than all heads for some tokens; needs the others",
}
NEEDS = {"planner": ("prefill",), "heads": ("exchange", "prefill", "planner")}  # without which a part does nothing
TRIED = "0.26.0 on two GPUs and 0.32.0 on a CPU; written with the sources of 0.33.0 beside it"
DEFAULT = ("exchange", "prefill", "planner")

enabled: set[str] = set()  # what was asked for
running: set[str] = set()  # read at every call: what was asked for and can be done for every layer
refused: dict[str, str] = {}  # part: why this vLLM has no place for it
layers: dict[str, dict[str, str]] = {}  # part: layer name: why it stays vLLM's; the empty string where it does not
counts: Counter[str] = Counter()  # calls that ran here: proof, for tests


def wanted(environment: str | None) -> tuple[str, ...]:
    """The parts that the variable asks for: the default ones if it is not set or ``1``, none for ``0``.

    Raises:
        ValueError: it names a part that there is not.
    """
    if environment is None or environment.strip() in ("", "1"):
        return DEFAULT
    if environment.strip() == "0":
        return ()
    names = tuple(name.strip() for name in environment.split(",") if name.strip())
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"{VARIABLE} must be 0, 1 or some of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    return names


def from_environment() -> tuple[str, ...]:
    return wanted(os.environ.get(VARIABLE))


def switch(names: Iterable[str]) -> None:
    """From the next step on run these parts of the ones that were taken, on every rank alike: what a comparison in one engine
    needs.

    Raises:
        ValueError: no such part.
    """
    names = set(names)
    if names - PARTS.keys():
        raise ValueError(f"switch: names must be some of {', '.join(PARTS)}, got {', '.join(sorted(names - PARTS.keys()))}")
    enabled.clear()
    enabled.update(names - refused.keys())
    _settle()


def _settle() -> None:
    running.clear()
    running.update(part for part in enabled if layers.get(part) and not any(layers[part].values()))


def runs(part: str) -> bool:
    """Whether a part runs here, and those that it needs."""
    return part in running and running.issuperset(NEEDS.get(part, ()))


def made(part: str, layer: str, why: str) -> None:
    """A layer was made that this part takes, or does not take for a reason."""
    layers.setdefault(part, {})[layer] = why
    _settle()


def parameters_are(function: Callable[..., Any], *names: str, more: tuple[str, ...] = ()) -> str:
    """Why a function of vLLM is not the one that was looked at: it must take ``names``, in this order, and beside them at most
    ``more``. The empty string where it is."""
    import inspect

    have = tuple(inspect.signature(function).parameters)
    if have[: len(names)] == names and have[len(names) :] == more[: len(have) - len(names)]:
        return ""
    return f"{function.__qualname__} takes ({', '.join(have)}), not ({', '.join((*names, *more))})"


def refuse(part: str, why: str) -> None:
    """Leave a part to vLLM in this process, if there is a reason."""
    if why:
        refused.setdefault(part, why)
        enabled.discard(part)
        _settle()


def summary() -> str:
    """One line: the parts that run here, and why others do not."""
    taken, waiting = [], []
    for part in PARTS:
        reasons = Counter(reason for reason in layers.get(part, {}).values() if reason)
        missing = [need for need in NEEDS.get(part, ()) if need not in taken]
        if part in refused:
            waiting.append(f"{part} not: {refused[part]}")
        elif part not in enabled:
            if part in DEFAULT:
                waiting.append(f"{part} not: {VARIABLE} leaves it out")
        elif missing:
            waiting.append(f"{part} not: it needs {', '.join(missing)}")
        elif reasons:
            made = len(layers[part])
            words = (reason if count == made else f"{reason} in {count} of {made} layers" for reason, count in reasons.items())
            waiting.append(f"{part} not: {', '.join(words)}")
        else:
            taken.append(part)
    return f"takes the place of vLLM's {', '.join(taken) or 'nothing'}" + "".join(f"; {reason}" for reason in waiting)
