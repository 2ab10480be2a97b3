"""Memory of a GPU that the ranks of one host see of one another, by CUDA's handles between processes.

What is opened is agreed upon: every step is taken by all ranks or by none, and where it is not, all of them hear the same reason.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..groups import Group, all_gather_rows, group_rank, group_world_size
from ..ops import native

MAX_PEERS, MAX_SMS = 16, 132  # csrc/publish_latents.h
FLAG_BYTES = 2**16  # room for the flags of a rank, in front of its staging buffer
_HANDLE_BYTES = 64
_WORD = 0x70637020_6D6C6100  # of a store that is tried out, the rank added
_tokens: dict[int, str] = {}  # by process: a fork has its own


class MailboxForm(ctypes.Structure):
    """What a mailbox is made of (csrc/cuda/peer_memory.cu)."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("device", "rank", "world", "max_blocks", "dtype", "kv_lora_rank", "rope")),
        *((name, ctypes.c_uint64) for name in ("timeout_ns", "flag_bytes", "staging_bytes")),
        ("memory", ctypes.c_void_p * MAX_PEERS),
    )


class PeersUnavailable(RuntimeError):
    """Why ranks cannot see one another's memory: the same words on every rank."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(native.PACKAGE / "_native_cuda.so"))
    number, pointer, size = ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint64
    for name, arguments in {
        "pcp_mla_peer_allocate": (number, size, pointer),
        "pcp_mla_peer_release": (number, pointer),
        "pcp_mla_peer_export": (number, pointer, pointer, pointer),
        "pcp_mla_peer_import": (number, pointer, pointer),
        "pcp_mla_peer_close": (number, pointer),
        "pcp_mla_peer_store": (number, pointer, size),
        "pcp_mla_peer_load": (number, pointer, pointer),
        "pcp_mla_mailbox_make": (pointer, pointer),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return library


@functools.cache
def _mailboxes() -> ctypes.PyDLL:
    """What looks at a mailbox that is there: no other thread publishes meanwhile."""
    library, pointer = ctypes.PyDLL(str(native.PACKAGE / "_native_cuda.so")), ctypes.c_void_p
    library.pcp_mla_mailbox_attach.argtypes, library.pcp_mla_mailbox_attach.restype = (pointer, pointer, pointer), None
    library.pcp_mla_mailbox_failure.argtypes, library.pcp_mla_mailbox_failure.restype = (pointer,), ctypes.c_char_p
    library.pcp_mla_mailbox_free.argtypes, library.pcp_mla_mailbox_free.restype = (pointer,), None
    return library


def call(name: str, *arguments: Any) -> None:
    """A function of csrc/cuda/peer_memory.cu. RuntimeError with what it says."""
    wrong = getattr(_library(), f"pcp_mla_{name}")(*arguments)
    if wrong:
        raise RuntimeError(wrong.decode())


def make_mailbox(form: MailboxForm) -> int:
    made = ctypes.c_void_p()
    call("mailbox_make", ctypes.byref(form), ctypes.byref(made))
    assert made.value is not None
    return made.value


def attach(mailbox: int, addresses: Sequence[int], form: Sequence[int]) -> None:
    """A cache, by rank; its form is dtype, number of dimensions, sizes and strides."""
    of, numbers = (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(form))(*form)
    _mailboxes().pcp_mla_mailbox_attach(mailbox, of, numbers)


def free_mailbox(mailbox: int) -> None:
    _mailboxes().pcp_mla_mailbox_free(mailbox)


def failure(mailbox: int) -> str:
    """Which call failed, and which ranks did not come or made a different one; the empty string where none failed."""
    return _mailboxes().pcp_mla_mailbox_failure(mailbox).decode()


def allocate(device: int, count: int) -> int:
    """Address of so many bytes, zeros, that other processes can open."""
    at = ctypes.c_void_p()
    call("peer_allocate", device, count, ctypes.byref(at))
    assert at.value is not None
    return at.value


class _Bytes:
    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "|u1", "data": (address, False), "version": 3}


def as_tensor(address: int, count: int, device: torch.device) -> torch.Tensor:
    """The bytes there, which stay somebody else's."""
    with torch.inference_mode(False):
        return torch.as_tensor(_Bytes(address, count), device=device)


def agree(group: Group, device: torch.device, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, by rank: two collectives."""
    on_host = isinstance(group, dist.ProcessGroup) and dist.get_backend(group) == "gloo"
    where = torch.device("cpu") if on_host else device
    data = json.dumps(mine).encode()
    lengths = all_gather_rows(torch.tensor([len(data)], device=where), group).tolist()
    rows = torch.zeros(max(lengths), dtype=torch.uint8)
    rows[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = all_gather_rows(rows.to(where), group).cpu().view(len(lengths), -1).numpy()
    return [json.loads(row.tobytes()[:length]) for row, length in zip(gathered, lengths, strict=True)]


@functools.cache
def _host() -> str:
    """What processes of one running system share, also from inside of containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _process() -> str:
    """What no other process says of itself, also where containers count processes by themselves. All threads say the same."""
    process = os.getpid()
    return _tokens.setdefault(process, f"{process} {secrets.token_hex(8)}")


def _exported(device: int, address: int) -> dict[str, Any]:
    handle, offset = (ctypes.c_ubyte * _HANDLE_BYTES)(), ctypes.c_uint64()
    try:
        call("peer_export", device, address, handle, ctypes.byref(offset))
    except RuntimeError as error:
        why = f"memory that other processes cannot open (expandable segments, or another allocator): {error}"
        raise RuntimeError(why) from error
    return {"handle": bytes(handle).hex(), "offset": offset.value, "address": address}


class PeerMemory:
    """What one rank has opened of the others.

    Args:
        group: all ranks of it take part in every call.
        device: of this rank.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        self._opened: dict[str, int] = {}  # handle: where the allocation begins here

    def everywhere(self, addresses: Sequence[int], kind: Any = None, refusal: str = "") -> list[list[int]]:
        """Where each of ``addresses`` of this rank, and of every other rank what it names there, lies for this process, by rank.

        Args:
            kind: what must be equal on all ranks.
            refusal: why this rank does not take part.

        Raises:
            PeersUnavailable: on every rank, and nothing stays open.
        """
        rank, world, index = group_rank(self._group), group_world_size(self._group), self._device.index
        mine: dict[str, Any] = {"host": _host(), "process": _process(), "device": index, "kind": kind, "why": refusal, "memory": []}
        if not refusal:
            try:
                mine["stream"] = torch.cuda.current_stream(self._device).cuda_stream
                mine["memory"] = [_exported(index, address) for address in addresses]
            except RuntimeError as error:
                mine["why"] = str(error)
        told = agree(self._group, self._device, mine)
        _check_told(told)
        new: list[str] = []
        found, why = [], ""
        try:
            found = [
                [memory["address"] if r == rank else self._open(told[r], memory, new) for r, memory in enumerate(of)]
                for of in zip(*(each["memory"] for each in told), strict=True)
            ]
        except (RuntimeError, ValueError) as error:
            why = f"rank {rank} of {world} cannot open the others' memory: {error}"
        why = self._any(why)
        if why:
            for handle in new:
                call("peer_close", index, self._opened.pop(handle))
            raise PeersUnavailable(why)
        return found

    def _any(self, why: str) -> str:
        """The first rank's reason that has one; the empty string where none has."""
        return next((each["why"] for each in agree(self._group, self._device, {"why": why}) if each["why"]), "")

    def _open(self, told: dict[str, Any], memory: dict[str, Any], new: list[str]) -> int:
        if told["process"] == _process():
            return memory["address"]
        handle = memory["handle"]
        if handle not in self._opened:
            base = ctypes.c_void_p()
            call("peer_import", self._device.index, bytes.fromhex(handle), ctypes.byref(base))
            assert base.value is not None
            self._opened[handle] = base.value
            new.append(handle)
        return self._opened[handle] + memory["offset"]

    def try_out(self, addresses: Sequence[int]) -> None:
        """Store a word in the memory of every rank, at 8 bytes for each rank from its address on, and look at what came here:
        systems are known on which memory can be opened, and stores to it are lost.

        Raises:
            PeersUnavailable: on every rank, where a word did not arrive on one.
        """
        rank, index, why = group_rank(self._group), self._device.index, ""
        try:
            for address in addresses:
                call("peer_store", index, address + 8 * rank, _WORD + rank)
        except RuntimeError as error:
            why = f"rank {rank} cannot store to the others' memory: {error}"
        agree(self._group, self._device, {})  # all have stored theirs
        try:
            for r in range(len(addresses)):
                word = ctypes.c_uint64()
                call("peer_load", index, addresses[rank] + 8 * r, ctypes.byref(word))
                if word.value != _WORD + r:
                    why = why or f"a store of rank {r} did not arrive on rank {rank}"
        except RuntimeError as error:
            why = why or f"rank {rank} cannot read what the others stored: {error}"
        why = self._any(why)
        if why:
            raise PeersUnavailable(why)

    def close(self) -> None:
        for handle in list(self._opened):
            call("peer_close", self._device.index, self._opened.pop(handle))


def _check_told(told: list[dict[str, Any]]) -> None:
    """Raise PeersUnavailable unless all ranks can and want to see the memory of all."""
    world = len(told)
    for rank, each in enumerate(told):
        if each["why"]:
            raise PeersUnavailable(f"rank {rank} of {world}: {each['why']}")
    for rank, each in enumerate(told):
        if each["host"] != told[0]["host"]:
            raise PeersUnavailable(f"rank {rank} of {world} is on another host than rank 0")
        if each["kind"] != told[0]["kind"]:
            raise PeersUnavailable(f"rank {rank} of {world} has {each['kind']}, rank 0 {told[0]['kind']}")
        for other in told[:rank]:
            if each["process"] != other["process"]:
                continue
            if each["device"] != other["device"]:
                raise PeersUnavailable(f"rank {rank} of {world} is of one process with a rank of another GPU")
            if each["stream"] == other["stream"]:
                raise PeersUnavailable(f"rank {rank} of {world} shares a process and a stream with another one")
