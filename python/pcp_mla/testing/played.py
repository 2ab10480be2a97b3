"""P ranks in one process, played one after another.

Each rank is a thread, but only the thread whose turn it is runs. At a collective a rank leaves its tensor and hands the turn on;
once the last rank has left its own, they go on in turn. So one GPU (or one core) shows what P of them would compute, in a fixed
order, with real collectives' semantics: every rank gets memory of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class _Abandoned(BaseException):
    """Ends a rank because another one failed. Not an Exception, so that the code under test does not catch it."""


class _Stage:
    """What the ranks share: whose turn it is, and the tensors left at the current collective."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.turn = 0
        self.changed = threading.Condition()
        self.left: list[Any] = []
        self.gathered: Any = None
        self.finished = 0
        self.error: BaseException | None = None

    def wait_for_turn(self, rank: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank or self.error is not None)
            if self.error is not None:
                raise _Abandoned

    def pass_turn(self) -> None:
        with self.changed:
            self.turn = (self.turn + 1) % self.world_size
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            if self.error is None:
                self.error = error
            self.changed.notify_all()


class PlayedGroup:
    """One rank's end of a group of ranks that :func:`play` runs in turn."""

    def __init__(self, stage: _Stage, rank: int) -> None:
        self._stage = stage
        self.rank = rank

    @property
    def world_size(self) -> int:
        return self._stage.world_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, ...] of this rank to [P * n, ...] of all, rank-major, in memory of this rank's own.

        Raises:
            RuntimeError: a rank has already finished, so that this collective can never complete.
            ValueError: shape or dtype differs between the ranks.
        """
        first = self._stage.left[0] if self._stage.left else tensor
        if not isinstance(first, torch.Tensor) or first.shape != tensor.shape or first.dtype != tensor.dtype:
            raise ValueError(f"all_gather: tensor must be {_words(first)} as on rank 0, got {_words(tensor)} on rank {self.rank}")
        return self._meet("all_gather", tensor, torch.cat).clone()

    def all_to_all_into(
        self, received: torch.Tensor, rows: torch.Tensor, received_sizes: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """As :meth:`pcp_mla.groups.ExchangingHandle.all_to_all_into`.

        Raises:
            RuntimeError: as :meth:`all_gather`.
            ValueError: the sizes do not fit a tensor, or what another rank sends.
        """
        op = "all_to_all_into"
        for name, tensor, of in (("rows", rows, sizes), ("received", received, received_sizes)):
            if tensor.dim() != 1 or len(of) != self.world_size or sum(of) != len(tensor):
                raise ValueError(
                    f"{op}: {name} must be blocks of {list(of)} for {self.world_size} ranks, got {tuple(tensor.shape)}"
                )
        if self._stage.left and not isinstance(self._stage.left[0], tuple):
            raise ValueError(f"{op}: rank 0 made another collective than rank {self.rank}")
        of_ranks = self._meet(op, rows.split(list(sizes)), _blocks_by_rank)[self.rank]
        if [len(block) for block in of_ranks] != list(received_sizes):
            sent = [len(block) for block in of_ranks]
            raise ValueError(f"{op}: received_sizes must be {sent}, as the ranks send, got {list(received_sizes)}")
        torch.cat(of_ranks, out=received)

    def _meet(self, op: str, mine: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """What ``combine`` makes of what all ranks leave: of memory that is theirs no more, and the same for all."""
        stage = self._stage
        if stage.finished:
            raise RuntimeError(f"{op}: rank {self.rank} waits for all ranks, but {stage.finished} of them finished without it")
        stage.left.append(mine)
        if len(stage.left) == stage.world_size:
            # Here, once: a rank that goes on may overwrite the tensor that it left. `gathered` itself stays until the next
            # collective completes, which is after every rank has taken its copy of this one.
            stage.gathered = combine(stage.left)
            stage.left = []
        stage.pass_turn()
        stage.wait_for_turn(self.rank)
        return stage.gathered


def _words(left: Any) -> str:
    return f"{tuple(left.shape)} {left.dtype}" if isinstance(left, torch.Tensor) else "another collective's"


def _blocks_by_rank(left: list[tuple[torch.Tensor, ...]]) -> list[list[torch.Tensor]]:
    """What each rank receives, by who sent it, of what each one sends, by whom it is for."""
    return [[block.clone() for block in of] for of in zip(*left, strict=True)]


def _modes_of_thread() -> list[Callable[[], AbstractContextManager[Any]]]:
    """What makes another thread see the modes of this one."""
    modes: list[Callable[[], AbstractContextManager[Any]]] = [
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            modes.append(partial(torch.autocast, device, torch.get_autocast_dtype(device)))
    if torch.cuda.is_initialized():  # else all of them are still to begin with the first device and its default stream
        modes.append(partial(torch.cuda.stream, torch.cuda.current_stream()))  # sets its device, too
    return modes


def play(world_size: int, fn: Callable[[PlayedGroup], T]) -> list[T]:
    """Run ``fn(group)`` for every rank, one after another, and return the results in rank order.

    The ranks see what belongs to a thread as the caller has it: grad and inference mode, autocast, current CUDA device and stream.
    An exception of one rank ends all of them and is raised here.

    Raises:
        ValueError: ``world_size`` is less than 1.
        RuntimeError: the ranks do not make the same number of collectives.
    """
    if world_size < 1:
        raise ValueError(f"play: world_size must be at least 1, got {world_size}")
    stage = _Stage(world_size)
    results: list[Any] = [None] * world_size
    modes = _modes_of_thread()

    def run(rank: int) -> None:
        try:
            stage.wait_for_turn(rank)
            with ExitStack() as entered:
                for mode in modes:
                    entered.enter_context(mode())
                results[rank] = fn(PlayedGroup(stage, rank))
            if stage.left:
                raise RuntimeError(f"play: rank {rank} finished while {len(stage.left)} ranks wait for it in a collective")
            stage.finished += 1
            stage.pass_turn()
        except _Abandoned:
            pass
        except BaseException as error:
            stage.fail(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt of the caller must end the ranks too
        stage.fail(error)
        raise
    if stage.error is not None:
        raise stage.error
    return results
