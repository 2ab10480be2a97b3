"""What a layer costs where its tokens are shared out over the ranks, and where its heads are: by a few rates of a GPU.

Shared out by tokens, every rank expands every key for every head. By heads, a rank expands H / P of them, and sends queries out and
outputs back. Publishing the latents costs the same, and so does attention, but for heads that do not share out evenly.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .dims import MLADims

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


NODE, NETWORK = 8, 50e9  # GPUs that have a wire; bytes/s of each to other nodes


class Wire(NamedTuple):
    """Of a way to exchange.

    Attributes:
        launch: seconds of an exchange without its bytes, launch and barrier.
        rate: bytes/s that a rank sends to others, while it receives as many.
    """

    launch: float
    rate: float


class Rates(NamedTuple):
    """Of a GPU, as measured (``bench kv_up_project``, ``attention`` and ``heads``).

    Attributes:
        gemm, attention: FLOP/s of the up-projection, of attention over long rows.
        peers, collective: exchanges by stores to peers, and by a collective and what packs for it.
    """

    gemm: float
    attention: float
    peers: Wire
    collective: Wire


class Work(NamedTuple):
    """A step, by numbers that all ranks share.

    Attributes:
        keys: N, rows of K and V.
        rows: Np, local tokens of the fullest rank.
        pairs: of a query and a key that it sees, over all requests.
    """

    keys: int
    rows: int
    pairs: float


@functools.cache
def rates_of(gpu: str) -> Rates:
    """Those of the kind that the GPU's name has in it (``data/split_cost.json``). Of another kind the wire counts as a slow one."""
    known = json.loads((resources.files("pcp_mla") / "data" / "split_cost.json").read_text())
    rates = next((rates for kind, rates in known.items() if kind in gpu), known["other"])
    return Rates(rates["gemm"], rates["attention"], Wire(**rates["peers"]), Wire(**rates["collective"]))


def over_nodes(wire: Wire, world_size: int) -> Wire:
    """That of a rank among so many, in nodes of ``NODE``, of which all but its own are at the other end of the network."""
    if world_size <= NODE:
        return wire
    far = (world_size - NODE) / (world_size - 1)
    return wire._replace(rate=1 / ((1 - far) / wire.rate + far / NETWORK))


def attention_pairs(query_lens: ArrayLike, context_lens: ArrayLike) -> float:
    queries = np.asarray(query_lens, np.float64)
    return float((queries * (np.asarray(context_lens, np.float64) + (queries + 1) / 2)).sum())


def up_project_seconds(rates: Rates, dims: MLADims, keys: int, heads: int) -> float:
    """K and V of so many heads, for a rank."""
    return 2.0 * keys * heads * dims.expanded_dim * dims.kv_lora_rank / rates.gemm


def attention_seconds(rates: Rates, dims: MLADims, pairs: float, heads: float) -> float:
    """Of so many pairs, for so many heads."""
    return 2.0 * pairs * heads * (dims.qk_head_dim + dims.v_head_dim) / rates.attention


def head_exchange_seconds(wire: Wire, dims: MLADims, rows: int, world_size: int, itemsize: int) -> float:
    """Queries out and outputs back, for the rank that sends or receives most: that of the fewest heads, or of the most."""
    fewest, most = dims.num_heads // world_size, -(-dims.num_heads // world_size)
    heads = max(dims.num_heads - fewest, (world_size - 1) * most)
    return 2 * wire.launch + float(rows) * heads * (dims.qk_head_dim + dims.v_head_dim) * itemsize / wire.rate


def split_seconds(rates: Rates, dims: MLADims, work: Work, world_size: int, itemsize: int, wire: Wire) -> tuple[float, float]:
    """What the two ways, by tokens and by heads, do not have in common, for the rank with most to do: of values of ``itemsize``
    bytes, which take this wire. Fewer heads than ranks cannot be shared out: infinity."""
    heads = dims.num_heads
    by_tokens = up_project_seconds(rates, dims, work.keys, heads)
    if heads < world_size:
        return by_tokens, float("inf")
    most = -(-heads // world_size)
    by_tokens += attention_seconds(rates, dims, work.pairs, heads / world_size)
    by_heads = up_project_seconds(rates, dims, work.keys, most) + attention_seconds(rates, dims, work.pairs, most)
    return by_tokens, by_heads + head_exchange_seconds(wire, dims, work.rows, world_size, itemsize)
