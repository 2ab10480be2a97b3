"""Whether the layers of a step are shared out by tokens or by heads."""

from __future__ import annotations

from typing import Any

import torch

from ..exchange.heads import HeadExchange
from ..exchange.peer_heads import PeerHeadExchange
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from ..plan.split_cost import Work, attention_pairs, over_nodes, rates_of, split_seconds

SPLITS = ("auto", "tokens", "heads")  # of MLAPrefill, and of all that pass one on to it


def check_known(op: str, split: Any) -> None:
    """Raise ValueError unless ``split`` is one of these."""
    if split not in SPLITS:
        raise ValueError(f"{op}: split must be one of {', '.join(SPLITS)}, got {split!r}")


def heads_pay(heads: HeadExchange | PeerHeadExchange, dims: MLADims, dtype: torch.dtype, meta: PCPMetadata) -> bool:
    """By what a layer costs on a GPU of this kind; never on a CPU, nor under a compiler. Only numbers that all ranks share are
    looked at: they must come to the same, and have GPUs of one kind."""
    if meta.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    rates = rates_of(torch.cuda.get_device_name(meta.device))
    queries, contexts, _ = meta.lengths
    keys = int(queries.sum() + contexts.sum())  # without pads, of which each rank's plan may have as many as it likes
    work = Work(keys, meta.num_tokens_padded, attention_pairs(queries, contexts))
    # Peers are of one node.
    wire = over_nodes(rates.collective, meta.world_size) if isinstance(heads, HeadExchange) else rates.peers
    by_tokens, by_heads = split_seconds(rates, dims, work, meta.world_size, dtype.itemsize, wire)
    return by_heads < by_tokens
