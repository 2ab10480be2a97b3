"""What callers give as requests, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .context import PCPContext


def token_lists(op: str, model: Any, requests: Any) -> list[list[int]]:
    if (
        not isinstance(requests, Sequence)
        or isinstance(requests, str | bytes)
        or not all(isinstance(r, Sequence) for r in requests)
    ):
        raise TypeError(f"{op}: requests must be a list with a list of token ids per request, got {type(requests).__name__}")
    check_token_ids(op, model, requests)
    return [list(request) for request in requests]


def check_token_ids(op: str, model: Any, requests: Sequence[Sequence[int]]) -> None:
    """ValueError unless all are of the model's vocabulary: an embedding that fails on one rank leaves others in a collective."""
    vocabulary = model.config.vocab_size
    for i, request in enumerate(requests):
        wrong = next((token for token in request if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{op}: requests must hold token ids in 0..{vocabulary - 1}, got {wrong} in request {i}")


def in_chunks(tokens: list[list[int]], chunk_tokens: int) -> Iterator[list[list[int]]]:
    """The requests' tokens in steps of ``chunk_tokens``, in natural order: what each request has in the step, often nothing."""
    starts = np.cumsum([0, *map(len, tokens)]).tolist()
    for first in range(0, max(1, starts[-1]), chunk_tokens):
        last = first + chunk_tokens
        yield [new[max(0, first - start) : max(0, last - start)] for new, start in zip(tokens, starts, strict=False)]


def is_pair(entry: Any) -> bool:
    """Whether it is a tuple of two ints."""
    return isinstance(entry, tuple) and len(entry) == 2 and all(type(number) is int for number in entry)


def checked_prefix(context: PCPContext, prefix: Any, count: int) -> list[tuple[int, int] | None]:
    if prefix is None:
        return [None] * count
    lengths = context.requests.lengths
    wanted = f"a (request, tokens) or None for each of the {count} requests"
    if not isinstance(prefix, Sequence) or isinstance(prefix, str | bytes):
        raise TypeError(f"prefill: prefix must be a list with {wanted}, got {type(prefix).__name__}")
    if len(prefix) != count:
        raise ValueError(f"prefill: prefix must have {wanted}, got {len(prefix)}")
    for entry in prefix:
        if entry is None:
            continue
        if not is_pair(entry):
            raise TypeError(f"prefill: prefix must have {wanted}, got {entry!r}")
        request, tokens = entry
        if not 0 <= request < len(lengths):
            raise ValueError(f"prefill: prefix must name one of the {len(lengths)} requests of the last prefill, got {request}")
        if not 0 <= tokens <= lengths[request]:
            raise ValueError(f"prefill: prefix must have 0 to {lengths[request]} tokens of request {request}, got {tokens}")
    return list(prefix)


def check_count(argument: str, context: PCPContext, requests: list[list[int]]) -> None:
    count = len(context.requests.lengths)
    if len(requests) != count:
        raise ValueError(
            f"{argument} must have one entry for each of the {count} requests of the last prefill, got {len(requests)}"
        )
