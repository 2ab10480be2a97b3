"""PCPMetadata: everything about one step's indices, as tensors on the device that computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .partition import Partition, partition
from .rank_rows import RankRows, rank_rows
from .shard_rows import ShardRows
from .slots import KeyChunk, PagedCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Partition arrays that live on the device from the start: they travel in one buffer, in this order.
_PACKED = (
    "row_table",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_k",
    "local_token_indices",
    "positions",
    "allgather_restore_idx",
    "hidden_restore_idx",
    "logits_indices",
)


@dataclass(frozen=True, eq=False)
class PCPMetadata:
    """What the ops need to know about a step. Made by :meth:`build`. :class:`Partition` defines the tensors, int32 on ``device``.

    ``R`` requests have ``2R`` rows; row 2i is request i's head, row 2i+1 its tail. Either may be empty. For an attention library
    that reads key starts and key lengths independently, one causal call with ``cu_seqlens_q``, ``cu_seqlens_k`` and ``seqused_k``
    is the whole attention of this rank, output in local order.

    Attributes:
        num_tokens: T, rows of q in local order.
        num_tokens_padded: Np, the same of the fullest rank.
        num_kv_tokens: N, rows of K and V in key order.
        num_head_tokens, num_tail_tokens: rows of q in all heads, in all tails; their sum is T.
        num_head_kv, num_tail_kv: rows of K that all heads, all tails attend to (a prefix of each request, copied for each).
        max_seqlen_q, max_seqlen_k: longest row.
        row_table: [5, R+1].
        cu_seqlens_q, cu_seqlens_k: [2R+1]. seqused_k: [2R].
        local_token_indices, positions: [T].
        allgather_restore_idx, hidden_restore_idx: gathered rows in restored, in natural order.
        logits_indices: [R].
    """

    partition: Partition = field(repr=False)
    device: torch.device
    num_tokens: int
    num_tokens_padded: int
    num_kv_tokens: int
    num_head_tokens: int
    num_tail_tokens: int
    num_head_kv: int
    num_tail_kv: int
    max_seqlen_q: int
    max_seqlen_k: int
    row_table: torch.Tensor = field(repr=False)
    cu_seqlens_q: torch.Tensor = field(repr=False)
    cu_seqlens_k: torch.Tensor = field(repr=False)
    seqused_k: torch.Tensor = field(repr=False)
    local_token_indices: torch.Tensor = field(repr=False)
    positions: torch.Tensor = field(repr=False)
    allgather_restore_idx: torch.Tensor = field(repr=False)
    hidden_restore_idx: torch.Tensor = field(repr=False)
    logits_indices: torch.Tensor = field(repr=False)

    @classmethod
    def build(
        cls,
        query_lens: Any,
        context_lens: Any = None,
        is_prefill: Any = None,
        *,
        world_size: int,
        rank: int,
        layout: str = "unpadded",
        decode_policy: str = "replicate",
        prompt_lens: Any = None,
        device: torch.device | str = "cpu",
    ) -> PCPMetadata:
        """Partition a batch and put the result on ``device``. Arguments and errors as :func:`pcp_mla.partition`."""
        part = partition(
            query_lens,
            context_lens,
            is_prefill,
            world_size=world_size,
            rank=rank,
            layout=layout,
            decode_policy=decode_policy,
            prompt_lens=prompt_lens,
        )
        return cls.from_partition(part, device)

    @classmethod
    def from_partition(cls, part: Partition, device: torch.device | str = "cpu") -> PCPMetadata:
        """Put ``part`` on ``device``: one host buffer, one copy."""
        arrays = {name: getattr(part, name) for name in _PACKED}
        packed = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays.values()])).to(device)
        pieces = torch.split(packed, [a.size for a in arrays.values()])
        tensors = {name: piece.view(arrays[name].shape) for name, piece in zip(arrays, pieces, strict=True)}
        totals = part.row_table[:, -1]
        return cls(
            partition=part,
            device=packed.device,
            num_tokens=part.num_tokens,
            num_tokens_padded=part.num_tokens_padded,
            num_kv_tokens=part.num_kv_tokens,
            num_head_tokens=int(totals[0]),
            num_tail_tokens=int(totals[1]),
            num_head_kv=int(totals[2]),
            num_tail_kv=int(totals[3]),
            max_seqlen_q=part.max_seqlen_q,
            max_seqlen_k=part.max_seqlen_k,
            **tensors,
        )

    @property
    def world_size(self) -> int:
        return self.partition.world_size

    @property
    def rank(self) -> int:
        return self.partition.rank

    @cached_property
    def num_requests(self) -> int:
        return self.partition.num_requests

    @property
    def num_local_rows(self) -> int:
        """Rows that local tensors may have: T, or in a padded plan, whose captured graph another batch will use, also Np."""
        return self.num_tokens

    @cached_property
    def num_context_tokens(self) -> int:
        """Tokens that the requests have in the cache, together."""
        return int(self.partition.context_lens.sum())

    @cached_property
    def is_replicated(self) -> bool:
        """Whether every rank has every new token of the step: decodes alone, in the layout that keeps one copy of each."""
        part = self.partition
        return part.layout == "unpadded" and part.decode_policy == "replicate" and not part.query_lens[part.is_prefill].any()

    @property
    def lengths(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """query_lens, context_lens and is_prefill, [R] each, on the host."""
        part = self.partition
        return part.query_lens, part.context_lens, part.is_prefill

    @cached_property
    def rank_rows(self) -> RankRows:
        """The rows of all ranks, for attention over everybody's queries: int32 tensors on ``device``, made when first asked for."""
        rows = rank_rows(self.partition)
        queries, keys, used = (self._put(array) for array in (rows.cu_seqlens_q, rows.cu_seqlens_k, rows.seqused_k))
        return RankRows(queries, keys, used, rows.max_seqlen_q, rows.max_seqlen_k)

    # Only a planner's metadata has places in a cache, and keys in chunks.

    @property
    def key_chunks(self) -> tuple[KeyChunk, ...]:
        return ()

    @property
    def paged_cache(self) -> PagedCache | None:
        return None

    @property
    def slot_mapping(self) -> torch.Tensor | None:
        return None

    @property
    def kv_rows(self) -> torch.Tensor | None:
        return None

    @property
    def shard_rows(self) -> ShardRows | None:
        """The rows of an exchange with the other shards of the cache; None where the shards are not the ranks of PCP x DCP."""
        return None

    # cu_seqlens of two separate attention calls, one over the heads and one over the tails.

    @property
    def cu_seqlens_q_head(self) -> torch.Tensor:
        return self.row_table[0]

    @property
    def cu_seqlens_q_tail(self) -> torch.Tensor:
        return self.row_table[1]

    @property
    def cu_seqlens_k_head(self) -> torch.Tensor:
        return self.row_table[2]

    @property
    def cu_seqlens_k_tail(self) -> torch.Tensor:
        return self.row_table[3]

    # Names of the first implementation. Nothing here needs them; they are made when somebody asks.

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    @cached_property
    def query_head_indices(self) -> torch.Tensor:
        return self._put(self.partition.query_head_indices)

    @cached_property
    def query_tail_indices(self) -> torch.Tensor:
        return self._put(self.partition.query_tail_indices)

    @cached_property
    def kv_head_indices(self) -> torch.Tensor:
        return self._put(self.partition.kv_head_indices)

    @cached_property
    def kv_tail_indices(self) -> torch.Tensor:
        return self._put(self.partition.kv_tail_indices)

    @cached_property
    def output_restore_idx(self) -> torch.Tensor:
        return self._put(self.partition.output_restore_idx)

    @cached_property
    def unpad_mask(self) -> torch.Tensor:
        return self._put(self.partition.unpad_mask)

    @cached_property
    def discard_request_mask(self) -> torch.Tensor:
        return self._put(self.partition.discard_request_mask)

    def padded_slot_mapping(self, slot_mapping: Any) -> torch.Tensor:
        """[sum(padded_lens)] int64 on the device; see :meth:`Partition.padded_slot_mapping`."""
        return self._put(self.partition.padded_slot_mapping(slot_mapping))


def check_meta(op: str, meta: Any) -> None:
    if not isinstance(meta, PCPMetadata):
        raise TypeError(f"{op}: meta must be a PCPMetadata, got {type(meta).__name__}")
