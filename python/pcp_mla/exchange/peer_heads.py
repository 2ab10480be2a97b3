"""Queries to their heads' ranks and outputs back without a collective: stores to the others' buffers, a launch each way."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch

from ..groups import Group
from ..ops.registry import direct
from ..plan.dims import MLADims
from ..plan.metadata import PCPMetadata
from .heads import HeadForm
from .inputs import check_form, check_step
from .peer_mailbox import PeerMailbox
from .peer_memory import MAX_SMS

_ALIGNMENT = 256  # bytes: the outputs' part of the buffer begins at a multiple


class PeerHeadExchange(PeerMailbox):
    """:class:`HeadExchange` for ranks of one host whose GPUs see one another's memory. One kernel stores each of this rank's rows
    where the rank that it goes to reads it, and ends when the rows of all ranks are here. docs/peers.md says why no rank overwrites
    what another one still reads.

    Every rank of the group makes and closes it alike, and makes the same calls in the same order, from one thread at a time. Calls
    follow one another, also those on other streams. It has a mailbox and a buffer of its own, apart from a
    :class:`PeerExchange`'s.

    Args:
        group, max_tokens, dims, dtype: as :class:`HeadExchange`.
        device: a GPU.
        timeout, max_sms, why_not: as :class:`PeerExchange`.

    Attributes:
        heads: a slice, this rank's heads: :func:`heads_of`.
        form: what it is made for.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind, or there are more ranks than heads.
        PeersUnavailable: (a RuntimeError) memory cannot be shared; raised on every rank alike, with the reason.
    """

    def __init__(
        self,
        group: Group,
        max_tokens: int,
        dims: MLADims,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        *,
        timeout: float = 60.0,
        max_sms: int = MAX_SMS,
        why_not: str = "",
    ) -> None:
        check_form("PeerHeadExchange", max_tokens, dims, dtype)
        super().__init__(group, max_tokens, dtype, device, timeout, max_sms)
        self.form = HeadForm(dims, dtype, self.world_size, self.rank)
        self.heads = self.form.heads
        # The same on all ranks, of which some have one head less.
        most = -(-dims.num_heads // self.world_size)
        room, item = (self.max_tokens if self.world_size > 1 else 0), dtype.itemsize
        queries = -(-room * self.world_size * most * dims.qk_head_dim * item // _ALIGNMENT) * _ALIGNMENT
        self._outputs_at = queries // item
        kind = [dims.num_heads, dims.qk_head_dim, dims.v_head_dim]
        self._buffer = self._open(why_not, self._outputs_at + room * dims.num_heads * dims.v_head_dim, kind)
        self._there = (dims.num_heads, dims.qk_head_dim, 0, False)  # of calls, behind what the step says
        self._back = (dims.num_heads, dims.v_head_dim, queries, True)
        self._rows = -1  # of the last queries

    def to_heads(self, q: torch.Tensor, meta: PCPMetadata) -> torch.Tensor:
        """As :meth:`HeadExchange.to_heads`, in one launch.

        Raises:
            ValueError, TypeError: as :meth:`HeadExchange.to_heads`, before anything is launched: the other ranks wait for this one
                then, until their time is up.
            NotImplementedError: a tensor requires gradients, or a mode of torch's dispatcher is active.
            RuntimeError: an earlier call failed: a rank did not come in time, or made a different call.
        """
        op = "PeerHeadExchange.to_heads"
        if meta is None or meta is not self._meta():
            self._take(op, meta)
        if self.world_size == 1:
            self.form.check_queries(op, q, meta)
        else:
            wrong = self._store(q, self._there)
            if wrong is not True:
                self._check_status()
                self.form.check_queries(op, q, meta)
                self._again(op, "q", wrong, q, self._there)
        if q.shape[0] != self._rows:
            self._rows = q.shape[0]
            self._result = self._outputs[: self._rows]
        return q if self.world_size == 1 else self._queries

    def to_tokens(self, out: torch.Tensor, meta: PCPMetadata, result: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`HeadExchange.to_tokens`, in one launch; with ``result`` a copy more.

        Raises:
            As :meth:`to_heads`.
        """
        op = "PeerHeadExchange.to_tokens"
        if meta is None or meta is not self._meta():
            self._take(op, meta)
        if result is not None or self.world_size == 1:
            self.form.check_outputs(op, out, meta, result)
        if self.world_size > 1:
            wrong = self._store(out, self._back)
            if wrong is not True:
                self._check_status()
                self.form.check_outputs(op, out, meta, result)
                self._again(op, "out", wrong, out, self._back)
        if result is not None:
            return result.copy_(out if self.world_size == 1 else self._outputs[: result.shape[0]])
        return out if self.world_size == 1 else self._result

    def _take(self, op: str, meta: PCPMetadata) -> None:
        """Look at a step once."""
        check_step(op, self.group, meta, self.max_tokens)
        self._check_open(op)
        padded, form = meta.num_tokens_padded, self.form
        self._number += 1
        self._step = (meta.num_tokens, meta.num_local_rows, padded, self._number)
        if self.world_size > 1:
            rows, width = self.world_size * padded, form.qk_head_dim
            self._queries = self._buffer[: rows * form.mine * width].view(rows, form.mine, width)
            outputs = self._buffer[self._outputs_at :][: padded * form.num_heads * form.v_head_dim]
            self._outputs = outputs.view(padded, form.num_heads, form.v_head_dim)
        else:
            self._outputs = self._buffer.view(0, form.num_heads, form.v_head_dim)
        self._rows, self._result = meta.num_tokens, self._outputs[: meta.num_tokens]
        self._meta = ref(meta)  # what layers know of a step, which lives as long as its metadata, has this exchange

    def _store(self, x: torch.Tensor, way: tuple[int, int, int, bool]) -> Any:
        """True; or False or words, where nothing was launched."""
        calls = direct()
        return calls is not None and calls.exchange_heads(self._mailbox, x, *self._step, *way)

    def _again(self, op: str, name: str, wrong: Any, x: torch.Tensor, way: tuple[int, int, int, bool]) -> None:
        """Say why a call was refused whose arguments are right, or make it where only gradients were on."""
        if not wrong and torch.is_grad_enabled():
            with torch.no_grad():
                wrong = self._store(x, way)
        if isinstance(wrong, str):
            raise RuntimeError(f"{op}: {wrong}")
        if not wrong:
            raise NotImplementedError(f"{op}: {name} must be a plain tensor, outside of modes and compilers of torch")

    def _forget(self, nothing: torch.Tensor) -> None:
        self._buffer = self._queries = self._outputs = self._result = nothing
