"""What callers give as requests, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .context import PCPContext


def token_lists(op: str, model: Any, requests: Any) -> list[list[int]]:
    """Lists of what may be lists, tensors or arrays of token ids, all of the model's vocabulary."""
    wanted = "a list with a list of token ids per request"
    if isinstance(requests, torch.Tensor | np.ndarray) and requests.ndim != 2:
        raise TypeError(f"{op}: requests must be {wanted}, got {type(requests).__name__} {tuple(requests.shape)}")
    if isinstance(requests, str | bytes) or not isinstance(requests, Sequence | torch.Tensor | np.ndarray):
        raise TypeError(f"{op}: requests must be {wanted}, got {type(requests).__name__}")
    strange = [type(r).__name__ for r in requests if not isinstance(r, Sequence | torch.Tensor | np.ndarray)]
    if strange:
        raise TypeError(f"{op}: requests must be {wanted}, got {strange[0]} in it")
    return [token_list(f"{op}: requests", model, request, f" in request {i}") for i, request in enumerate(requests)]


def token_list(argument: str, model: Any, tokens: Any, where: str = "") -> list[int]:
    """A list of what may be a list, a tensor or an array of token ids of the model's vocabulary."""
    wanted = f"{argument} must hold integer token ids, got"
    if isinstance(tokens, torch.Tensor | np.ndarray):
        integer = tokens.dtype.kind in "iu" if isinstance(tokens, np.ndarray) else _is_integer(tokens.dtype)
        if tokens.ndim != 1 or not integer:
            raise TypeError(f"{wanted} {type(tokens).__name__} {tuple(tokens.shape)} of {tokens.dtype}{where}")
        tokens = tokens.tolist()
    elif not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes):
        raise TypeError(f"{wanted} {type(tokens).__name__}{where}")
    if not all(type(token) is int for token in tokens):
        strange = [type(token).__name__ for token in tokens if isinstance(token, bool) or not isinstance(token, int | np.integer)]
        if strange:
            raise TypeError(f"{wanted} {strange[0]}{where}")
        tokens = list(map(int, tokens))
    _check_vocabulary(argument, model, tokens, where)
    return list(tokens)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _check_vocabulary(argument: str, model: Any, tokens: Sequence[int], where: str) -> None:
    """An embedding that fails on one rank would leave others in a collective."""
    vocabulary = model.config.vocab_size
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"{argument} must hold token ids in 0..{vocabulary - 1}, got {wrong}{where}")


def check_token_ids(op: str, model: Any, requests: Sequence[Sequence[int]]) -> None:
    """ValueError unless all are of the model's vocabulary."""
    for i, request in enumerate(requests):
        _check_vocabulary(f"{op}: requests", model, request, f" in request {i}")


def check_logits(op: str, logits: Any, requests: list[list[int]]) -> None:
    if logits not in ("all", "last"):
        raise ValueError(f"{op}: logits must be 'all' or 'last', got {logits!r}")
    if logits == "last" and not all(requests):
        raise ValueError(f"{op}: requests must have a token each for their last logits, got none for request {requests.index([])}")


def checked_ends(eos_token_id: Any) -> set[int]:
    """Tokens that end a text."""
    ends = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    strange = [type(end).__name__ for end in ends if type(end) is not int]
    if strange:
        raise TypeError(f"generate: eos_token_id must be an int, a list of ints or None, got {strange[0]}")
    return set(ends)


def in_chunks(tokens: list[list[int]], chunk_tokens: int) -> Iterator[list[list[int]]]:
    """The requests' tokens in steps of ``chunk_tokens``, in natural order: what each request has in the step, often nothing."""
    starts = np.cumsum([0, *map(len, tokens)]).tolist()
    for first in range(0, max(1, starts[-1]), chunk_tokens):
        last = first + chunk_tokens
        yield [new[max(0, first - start) : max(0, last - start)] for new, start in zip(tokens, starts, strict=False)]


def last_rows(tokens: list[list[int]], decodes: list[bool]) -> np.ndarray:
    """Numbers, in natural order, of each request's last token, and of all tokens of a decode. No request is empty."""
    rows: list[int] = []
    end = 0
    for new, decode in zip(tokens, decodes, strict=True):
        end += len(new)
        rows += range(end - len(new) if decode else end - 1, end)
    return np.array(rows, np.int64)


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


def checked_decodes(decodes: Any, prefixes: list[tuple[int, int] | None]) -> list[bool]:
    wanted = f"a bool for each of the {len(prefixes)} requests"
    if decodes is None:
        return [False] * len(prefixes)
    if not isinstance(decodes, Sequence) or isinstance(decodes, str | bytes) or not all(type(one) is bool for one in decodes):
        raise TypeError(f"prefill: decodes must be a list with {wanted}, got {decodes!r}")
    if len(decodes) != len(prefixes):
        raise ValueError(f"prefill: decodes must have {wanted}, got {len(decodes)}")
    bare = [i for i, (decode, prefix) in enumerate(zip(decodes, prefixes, strict=True)) if decode and not (prefix and prefix[1])]
    if bare:
        raise ValueError(f"prefill: decodes must have a prefix, what is in the cache of them, got none for request {bare[0]}")
    return list(decodes)


def check_count(argument: str, context: PCPContext, requests: list[list[int]]) -> None:
    count = len(context.requests.lengths)
    if len(requests) != count:
        raise ValueError(
            f"{argument} must have one entry for each of the {count} requests of the last prefill, got {len(requests)}"
        )
