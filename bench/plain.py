"""What the benchmarks' paths must give, by the textbook: nothing here comes from the package. A wrong result has no time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Rows = tuple[torch.Tensor, torch.Tensor]
_QUERIES = 2048  # at a time: their scores are in memory


class WrongResultError(Exception):
    """A path that would be timed gives something else than it must."""


def check_equal(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """WrongResultError unless both are the same numbers."""
    if not torch.equal(got, wanted):
        raise WrongResultError(f"{name} is wrong")


def check_close(name: str, got: torch.Tensor, wanted: torch.Tensor, share: float = 2**-7, least: float = 0.0) -> None:
    """WrongResultError where a row (of the last dimension) is further from the wanted one than ``share`` of that one's length, by
    default what it takes to round to bfloat16 on the way, and by more than ``least``."""
    if got.shape != wanted.shape:
        raise WrongResultError(f"{name} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
    off = (got.double() - wanted).norm(dim=-1) - share * wanted.double().norm(dim=-1)
    if not bool((off <= least).all()):  # not so with a NaN
        raise WrongResultError(
            f"{name} is wrong: {float((off > least).double().mean()):.1%} of the rows, by up to {float(off.max()):.2g}"
        )


def local_tokens(lengths: Sequence[int], ranks: int, rank: int) -> Rows:
    """Request and number within it, int64 [tokens], of each new token of a rank: of every request's 2P chunks it has two."""
    requests, tokens = [], []
    for request, length in enumerate(lengths):
        chunk = -(-length // (2 * ranks))
        for place in (rank, 2 * ranks - 1 - rank):
            part = torch.arange(min(place * chunk, length), min((place + 1) * chunk, length))
            requests.append(torch.full_like(part, request))
            tokens.append(part)
    return torch.cat(requests), torch.cat(tokens)


def natural_order(gathered: torch.Tensor, lengths: Sequence[int], ranks: int) -> list[torch.Tensor]:
    """Rows of each request, from those of all ranks one after another, a rank's padded to the most."""
    parts = gathered.unflatten(0, (ranks, -1))
    whole = [gathered.new_empty(length, *gathered.shape[1:]) for length in lengths]
    for rank, part in enumerate(parts):
        requests, tokens = local_tokens(lengths, ranks, rank)
        for request, rows in enumerate(whole):
            mine = requests == request
            rows[tokens[mine]] = part[: len(tokens)][mine]
    return whole


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, heads, Dv] and LSE [T, heads] of queries that see the keys up to number ``last`` [T], in float32."""
    out = torch.empty(*q.shape[:2], v.shape[2], device=q.device)
    lse = torch.empty(q.shape[:2], device=q.device)
    numbers = torch.arange(len(k), device=q.device)
    for head in range(q.shape[1]):
        keys, values = k[:, head].float(), v[:, head].float()
        for rows in torch.arange(len(q), device=q.device).split(_QUERIES):
            scores = q[rows, head].float() @ keys.T * softmax_scale
            scores.masked_fill_(numbers > last.to(q.device)[rows, None], -torch.inf)
            lse[rows, head] = scores.logsumexp(1)
            out[rows, head] = scores.softmax(1) @ values
    return out, lse


def mla(
    q: torch.Tensor,
    latents: Sequence[torch.Tensor],
    weight: torch.Tensor,
    widths: tuple[int, int],
    softmax_scale: float,
    lengths: Sequence[int],
    ranks: int,
    rank: int,
) -> torch.Tensor:
    """An MLA layer's output [T, heads, v] for a rank's new tokens; ``latents`` [context and new tokens, rank + rope] of each
    request, ``widths`` of K without rope and of V."""
    out = torch.empty(*q.shape[:2], widths[1], device=q.device)
    requests, tokens = local_tokens(lengths, ranks, rank)
    for request, rows in enumerate(latents):
        kv_c, k_pe = rows.split([weight.shape[1], rows.shape[1] - weight.shape[1]], dim=1)
        k_nope, v = F.linear(kv_c, weight).view(len(rows), q.shape[1], -1).split(widths, dim=2)
        k = torch.cat([k_nope, k_pe[:, None].expand(-1, q.shape[1], -1)], dim=2)
        mine = requests == request
        last = len(rows) - lengths[request] + tokens[mine]
        out[mine.to(q.device)] = attention(q[mine.to(q.device)], k, v, last, softmax_scale)[0]
    return out
