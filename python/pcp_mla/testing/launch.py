"""Run a function on P ranks, one spawned process each, and get every rank's result or the first failure."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..checks import check_count


class RankError(RuntimeError):
    """A rank's process failed; the message has its rank and its traceback."""


def _rank_main(rank: int, world_size: int, folder: str, backend: str, timeout: float, threads: int, fn: Any, args: Any) -> None:
    try:
        if sys.platform == "linux":
            # All ranks are on this machine. Without this gloo looks the host's name up, which need not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(threads)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=torch.device("cuda", rank) if backend == "nccl" else None,
        )
        result = fn(dist.group.WORLD, *args)
        torch.save(result, os.path.join(folder, f"result{rank}.tmp"))
        os.rename(os.path.join(folder, f"result{rank}.tmp"), os.path.join(folder, f"result{rank}"))
        # A rank that ends early would close connections that others still read from.
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        code = 1
    # Without the interpreter's teardown: of a broken group it can wait for the other ranks, and after a good run a thread that is
    # not done yet, and asks for the interpreter then, is ended by force, and the process with it (exit code -6, now and then).
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _failure(folder: Path, failed: list[int], codes: list[int | None]) -> RankError:
    # The rank that failed first tells why; the others only that they lost it.
    written = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if written:
        rank = written[0].name.removeprefix("error")
        return RankError(f"rank {rank} of {len(codes)} failed:\n{written[0].read_text()}")
    return RankError(f"rank {failed[0]} of {len(codes)} ended with exit code {codes[failed[0]]} and left no message")


def run_distributed(
    world_size: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 120.0
) -> list[Any]:
    """Run ``fn(group, *args)`` in ``world_size`` processes and return their results in rank order.

    ``fn`` and ``args`` must be picklable (a function of a module), results savable by ``torch.save``; tensors come back on the CPU.
    The CPU's cores are shared out between the ranks.

    Args:
        backend: ``"gloo"``, or ``"nccl"`` with one GPU a rank.
        timeout: seconds that the ranks may take altogether, and each collective on its own.

    Raises:
        ValueError: ``world_size`` is less than 1.
        RankError: a rank failed; all are ended.
        TimeoutError: not done in time; all are ended.
    """
    check_count("run_distributed", "world_size", world_size, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="pcp-mla-") as name:
        folder = Path(name)
        common = (world_size, name, backend, timeout, max(1, cores // world_size), fn, args)
        ranks = [context.Process(target=_rank_main, args=(rank, *common), daemon=True) for rank in range(world_size)]
        deadline = time.monotonic() + timeout
        try:
            for process in ranks:
                process.start()
            while any(process.exitcode is None for process in ranks):
                if any(process.exitcode for process in ranks):
                    break
                if time.monotonic() > deadline:
                    running = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
                    raise TimeoutError(f"run_distributed: ranks {running} of {world_size} did not finish in {timeout:g} s")
                time.sleep(0.01)
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
            if failed:
                raise _failure(folder, failed, [process.exitcode for process in ranks])
        finally:
            for process in ranks:
                if process.pid is not None and process.exitcode is None:
                    process.kill()
                    process.join()
        return [torch.load(folder / f"result{rank}", map_location="cpu", weights_only=False) for rank in range(world_size)]
