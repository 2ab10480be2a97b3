"""Queries to the ranks that have their heads and outputs back to the ranks that have their tokens, by one all-to-all each way.

Between the two a rank computes some heads of all ranks' tokens in place of all heads of its own: of the keys, which every rank
expands from the latents by itself, it needs those of its heads alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch

from ..checks import check_apart, check_count, check_not_expanded
from ..groups import Group, check_all_to_all, exchanging_into, group_rank, group_world_size
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from .inputs import check_form, check_heads, check_step
from .latents import _call


def heads_of(num_heads: int, world_size: int, rank: int) -> tuple[int, int]:
    """A rank's first head and the one behind its last: ``num_heads // world_size`` each, the first ranks one more where heads are
    left over.

    Raises:
        ValueError: there are fewer heads than ranks, or no such rank.
        TypeError: an argument is no int.
    """
    op = "heads_of"
    check_count(op, "world_size", world_size, 1)
    check_count(op, "num_heads", num_heads, 1)
    check_count(op, "rank", rank)
    if rank >= world_size:
        raise ValueError(f"{op}: rank must be less than world_size {world_size}, got {rank}")
    if num_heads < world_size:
        raise ValueError(f"{op}: num_heads must be at least 1 for each of {world_size} ranks, got {num_heads}")
    share, more = divmod(num_heads, world_size)
    first = rank * share + min(rank, more)
    return first, first + share + (rank < more)


class HeadForm:
    """What an exchange of heads is made for, whichever way they go, and what it checks.

    Attributes:
        bounds: by rank: its first head and the one behind its last.
        heads: of this rank.
        mine: how many these are.
        num_heads, qk_head_dim, v_head_dim, dtype: of queries and outputs.

    Raises:
        ValueError: there are more ranks than heads.
    """

    def __init__(self, dims: MLADims, dtype: torch.dtype, world_size: int, rank: int) -> None:
        self.bounds = [heads_of(dims.num_heads, world_size, r) for r in range(world_size)]
        self.heads = slice(*self.bounds[rank])
        self.mine = self.heads.stop - self.heads.start
        self.num_heads, self.qk_head_dim, self.v_head_dim = dims.num_heads, dims.qk_head_dim, dims.v_head_dim
        self.dtype, self._world_size = dtype, world_size

    def check_queries(self, op: str, q: Any, meta: PCPMetadata) -> None:
        counts = (meta.num_tokens, meta.num_local_rows)
        check_heads(op, "q", q, counts, (self.num_heads, self.qk_head_dim), self.dtype, meta)

    def check_outputs(self, op: str, out: Any, meta: PCPMetadata, result: Any) -> None:
        local = (meta.num_tokens, meta.num_local_rows)
        counts = local if self._world_size == 1 else (self._world_size * meta.num_tokens_padded,)
        check_heads(op, "out", out, counts, (self.mine, self.v_head_dim), self.dtype, meta)
        if result is not None:
            check_heads(op, "result", result, local, (self.num_heads, self.v_head_dim), self.dtype, meta)
            check_not_expanded(op, "result", result)
            check_apart(op, "result", result, {"out": out})


def _block(buffer: torch.Tensor, begin: int, *shape: int) -> torch.Tensor:
    return buffer[begin : begin + math.prod(shape)].view(shape)


class HeadExchange:
    """Gives every rank of a context-parallel group the queries of its heads, of all ranks' tokens, and every token's outputs back
    to its rank, by one packed ``all_to_all_single`` each way.

    Every rank sends ``meta.num_tokens_padded`` rows, so that nothing depends on how many of them are tokens. Decodes that every
    rank has travel as any other row: each rank gets the outputs of its own copies back.

    Args:
        group: ONE flat ``torch.distributed`` group, an engine's own communicator
            (:class:`pcp_mla.groups.ExchangingHandle`), a :class:`PlayedGroup`, or None for a world of one rank.
        max_tokens: capacity, as local tokens of a rank with pads (``PCPPlanner.max_local_tokens``).
        dims: of the layer: ``num_heads``, at least one for each rank, and the widths of q and v.
        dtype: of queries and outputs.
        device: where the two buffers are: ``max_tokens * num_heads`` queries each, about.

    Attributes:
        heads: a slice, this rank's heads: :func:`heads_of`.
        form: what it is made for.
        around: what makes the collective instead of a plain call, given it: :meth:`PiecewiseGraph.gap` while it captures.

    Raises:
        ValueError: ``max_tokens`` is negative, or there are more ranks than heads.
        TypeError: an argument is of the wrong kind, or the group has no all-to-all.
    """

    around: Callable[[Callable[[], None]], None] | None = None

    def __init__(
        self, group: Group, max_tokens: int, dims: MLADims, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        op = "HeadExchange"
        self.world_size, self.rank, self.group = group_world_size(group, op), group_rank(group), group
        check_form(op, max_tokens, dims, dtype)
        check_all_to_all(op, group)
        self.max_tokens, self.form = max_tokens, HeadForm(dims, dtype, self.world_size, self.rank)
        self.heads, qk_head_dim, v_head_dim = self.form.heads, dims.qk_head_dim, dims.v_head_dim
        of_rank, of_all = dims.num_heads, self.world_size * self.form.mine  # heads of a token: of a rank's own, of what it gets
        sizes = of_rank * max(qk_head_dim, v_head_dim), max(of_all * qk_head_dim, of_rank * v_head_dim)
        room = max_tokens if self.world_size > 1 else 0
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside of it
            # By rank: this one's queries on their way out, outputs as they come back. Of the two directions only one is under way.
            self._packed = torch.empty(room * sizes[0], dtype=dtype, device=device)
            # What is returned: the queries of this rank's heads, or the outputs of its tokens.
            self._whole = torch.empty(room * sizes[1], dtype=dtype, device=device)
        # The step of the last queries, and how many rows they had. By reference: what layers know of a step, which lives as long as
        # its metadata, has this exchange.
        self._last: tuple[Callable[[], PCPMetadata | None], int] = (lambda: None, 0)

    def to_heads(self, q: torch.Tensor, meta: PCPMetadata) -> torch.Tensor:
        """One collective; none for a world of one.

        Args:
            q: [T, num_heads, qk_head_dim] in local order, any strides with a contiguous last dimension; of a padded plan also
                [Np, ...], pads anything.
            meta: the step, for this rank of the group.

        Returns:
            [P * Np, heads of this rank, qk_head_dim], rank-major: row ``r * Np + t`` is local row t of rank r. Pads are zeros, or
            what the pads of q were. It is a view of the exchange's buffer, valid until the next call; in a world of one, q.

        Raises:
            ValueError, TypeError: an argument does not fit the other, or the exchange; before the collective.
            NotImplementedError: q requires gradients.
        """
        op = "HeadExchange.to_heads"
        check_step(op, self.group, meta, self.max_tokens)
        self.form.check_queries(op, q, meta)
        (rows, num_heads, width), padded = q.shape, meta.num_tokens_padded
        self._last = (ref(meta), rows)
        if self.world_size == 1:
            return q
        for blocks, heads in self._by_rank(width, padded, q):
            blocks[:, :rows].copy_(heads)
            if rows < padded:
                blocks[:, rows:].zero_()
        whole = _block(self._whole, 0, self.world_size * padded, self.form.mine, width)
        self._exchange(whole, self._packed[: padded * num_heads * width], padded * width, True)
        return whole

    def to_tokens(self, out: torch.Tensor, meta: PCPMetadata, result: torch.Tensor | None = None) -> torch.Tensor:
        """One collective; none for a world of one.

        Args:
            out: [P * Np, heads of this rank, v_head_dim] rank-major, as :meth:`to_heads` gave the queries; packed first unless it
                is contiguous. In a world of one as many rows as q had.
            meta: the step.
            result: [T, num_heads, v_head_dim] to write to, any strides; of a padded plan also [Np, ...].

        Returns:
            ``result``, or [T, num_heads, v_head_dim] in local order, as many rows as q had: a view of the exchange's buffer, valid
            until the next call; in a world of one, ``out``.

        Raises:
            As :meth:`to_heads`.
        """
        op = "HeadExchange.to_tokens"
        check_step(op, self.group, meta, self.max_tokens)
        self.form.check_outputs(op, out, meta, result)
        if self.world_size == 1:
            return out if result is None else result.copy_(out)
        padded, width, num_heads = meta.num_tokens_padded, out.shape[2], self.form.num_heads
        self._exchange(self._packed[: padded * num_heads * width], out.contiguous(), padded * width, False)
        if result is None:
            of, rows = self._last
            result = _block(self._whole, 0, rows if of() is meta else meta.num_tokens, num_heads, width)
        for blocks, heads in self._by_rank(width, padded, result):
            heads.copy_(blocks[:, : result.shape[0]])
        return result

    def _by_rank(self, width: int, padded: int, rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The packed buffer and [T, num_heads, width] as [ranks, tokens, heads, width]: a pair for the ranks of each number of
        heads, of which there are at most two."""
        pairs = []
        share, more = divmod(rows.shape[1], self.world_size)
        for ranks, heads, first in ((more, share + 1, 0), (self.world_size - more, share, more * (share + 1))):
            if ranks:
                blocks = _block(self._packed, padded * first * width, ranks, padded, heads, width)
                pairs.append((blocks, rows[:, first : first + ranks * heads].unflatten(1, (ranks, heads)).transpose(0, 1)))
        return pairs

    def _exchange(self, received: torch.Tensor, sent: torch.Tensor, per_head: int, heads_come: bool) -> None:
        """All heads of this rank's tokens for its heads of all tokens, or back; as bytes, which collectives know of any dtype."""
        per_head *= sent.element_size()
        by_rank = [per_head * (end - first) for first, end in self.form.bounds]
        even = [per_head * self.form.mine] * self.world_size
        sizes = (even, by_rank) if heads_come else (by_rank, even)
        whole, part = received.view(-1).view(torch.uint8), sent.view(-1).view(torch.uint8)
        (self.around or _call)(exchanging_into(whole, part, *sizes, self.group))
