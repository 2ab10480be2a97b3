"""One rank's end of what ranks do by stores to one another's memory: a mailbox of flags and a buffer, opened by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checks import check_count
from ..groups import Group, group_rank, group_world_size
from ..ops import native
from . import peer_memory
from .peer_memory import FLAG_BYTES, MAX_PEERS, MAX_SMS, MailboxForm, PeerMemory, PeersUnavailable

_MAX_SECONDS = 86400.0
UNKNOWN: Any = object  # no step, nor as a reference to one, of which a call gives what nobody else has
_kept: dict[int, list[torch.Tensor]] = {}  # by mailbox: memory that other ranks may store to until it is closed
_TRIED_OUT = FLAG_BYTES - 8 * MAX_PEERS  # where in front of the buffer words are stored to see whether they arrive
DTYPES = {  # and their numbers in csrc/view.h
    torch.uint8: 0,
    torch.float16: 5,
    torch.float32: 6,
    torch.bfloat16: 15,
    torch.float8_e4m3fn: 24,
}


def refusal(device: torch.device, dtype: torch.dtype, world_size: int) -> str:
    """Why a rank cannot take part, as far as it knows alone; the empty string where it can."""
    if device.type != "cuda":
        return f"tensors on {device.type}"
    if native.direct is None:
        return f"no calls past the dispatcher ({native.status['_direct']})"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "a GPU before sm_80"
    if dtype not in DTYPES:
        return f"tensors of {dtype}"
    return f"{world_size} ranks, more than {MAX_PEERS}" if world_size > MAX_PEERS else ""


class PeerMailbox:
    """Made, checked and closed by every rank of the group alike.

    Args:
        group, max_tokens, dtype, device, timeout, max_sms: of the exchange.

    Raises:
        ValueError, TypeError: ``timeout`` or ``max_sms`` is out of range, or the group of the wrong kind.
    """

    def __init__(
        self, group: Group, max_tokens: int, dtype: torch.dtype, device: torch.device | str, timeout: float, max_sms: int
    ) -> None:
        self._op = op = type(self).__name__
        self.world_size, self.rank, self.group = group_world_size(group, op), group_rank(group), group
        check_count(op, "max_sms", max_sms, 1)
        if max_sms > MAX_SMS:
            raise ValueError(f"{op}: max_sms must be at most {MAX_SMS}, got {max_sms}")
        if not 0 < timeout <= _MAX_SECONDS:
            raise ValueError(f"{op}: timeout must be positive and at most {_MAX_SECONDS:g}, got {timeout}")
        self.max_tokens, self.dtype, self.timeout, self._max_sms = int(max_tokens), dtype, timeout, int(max_sms)
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._meta: Any = UNKNOWN
        self._number = 0  # of steps

    def _open(self, why_not: str, size: int, kind: Sequence[Any], widths: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """Memory of this rank, where all see it, and the mailbox that knows where that of all lies.

        Args:
            why_not: why this rank does not want it, if so.
            size: elements of the buffer; the same on all ranks, as ``kind``.
            kind: what the exchange was made with.
            widths: kv_lora_rank and rope, for latents.

        Returns:
            The buffer of this rank, [size].

        Raises:
            PeersUnavailable: on every rank, where one cannot take part.
        """
        why_not = why_not or refusal(self.device, self.dtype, self.world_size)
        if why_not and self.world_size == 1:
            raise PeersUnavailable(why_not)
        self._memory = PeerMemory(self.group, self.device)
        staging = size * self.dtype.itemsize
        self._own = 0
        if not why_not:
            try:
                self._own = peer_memory.allocate(self.device.index, FLAG_BYTES + staging)
            except RuntimeError as error:
                why_not = str(error)
        of = [self._own]
        if self.world_size > 1:
            try:
                common = [self._op, self.max_tokens, *kind, str(self.dtype), self._max_sms]
                of = self._memory.everywhere(of, common, why_not)[0]
                self._memory.try_out([address + _TRIED_OUT for address in of])
            except PeersUnavailable:
                self._memory.close()
                peer_memory.agree(self.group, self.device, {})  # nobody has the others' memory open
                if self._own:
                    peer_memory.call("peer_release", self.device.index, self._own)
                raise
        form = MailboxForm(self.device.index, self.rank, self.world_size, self._max_sms, DTYPES[self.dtype], *widths)
        form.timeout_ns, form.flag_bytes, form.staging_bytes = int(self.timeout * 1e9), FLAG_BYTES, staging
        form.memory[: len(of)] = of
        self._mailbox = peer_memory.make_mailbox(form)
        if not staging:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        return peer_memory.as_tensor(self._own + FLAG_BYTES, staging, self.device).view(self.dtype)

    def _keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Until :meth:`close`: other ranks may store to them."""
        _kept.setdefault(self._mailbox, []).extend(tensors)

    def _check_open(self, op: str) -> None:
        if not self._mailbox:
            raise RuntimeError(f"{op}: the exchange must not be closed")

    def _check_status(self) -> None:
        wrong = peer_memory.failure(self._mailbox)
        if wrong:
            raise RuntimeError(f"{self._op}: {wrong}")

    def check(self) -> None:
        """Wait for all calls so far. RuntimeError if one failed, with its number and the ranks that did not come or made a
        different call: this process can do nothing more on its GPU then."""
        self._check_open(f"{self._op}.check")
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            self._check_status()
            raise
        self._check_status()

    def close(self) -> None:
        """Give the memory back, on every rank: when all have done with it. Without it the memory stays until the process ends."""
        if not self._mailbox:
            return
        self.check()
        peer_memory.agree(self.group, self.device, {})  # nobody writes to the others any more
        self._memory.close()
        peer_memory.agree(self.group, self.device, {})  # nobody has the others' memory open
        mailbox, self._mailbox, self._meta = self._mailbox, 0, UNKNOWN
        peer_memory.free_mailbox(mailbox)
        self._forget(torch.empty(0, dtype=self.dtype, device=self.device))
        peer_memory.call("peer_release", self.device.index, self._own)
        _kept.pop(mailbox, None)

    def _forget(self, nothing: torch.Tensor) -> None:
        """Put ``nothing``, [0], in the place of every view of the buffer."""
        raise NotImplementedError
