"""Ranks of one process on one GPU: a thread and a stream each, all at once, so that their kernels can wait for one another."""

import threading

import pytest
import torch

from pcp_mla.testing.launch import run_distributed


class ThreadGroup:
    """One rank's end of a group of threads."""

    def __init__(self, world_size, rank, shared, barrier):
        self.world_size, self.rank = world_size, rank
        self._shared, self._barrier = shared, barrier

    def all_gather(self, tensor):
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._shared[self.rank] = tensor
        self._barrier.wait(60)
        gathered = torch.cat([each.to(tensor.device) for each in self._shared])
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
        self._barrier.wait(60)
        return gathered


def run_threads(world_size, fn, *args):
    """``fn(group, *args)`` of every rank, by rank. A rank that fails ends the others at their next collective."""
    shared, barrier = [None] * world_size, threading.Barrier(world_size)
    results, errors = [None] * world_size, []

    def run(rank):
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                results[rank] = fn(ThreadGroup(world_size, rank, shared, barrier), *args)
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            errors.append((rank, error))
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        words = "; ".join(f"rank {rank}: {error!r}" for rank, error in errors)
        raise RuntimeError(f"{words}; {fn.__name__}{args}") from errors[0][1]
    return results


def in_own_process(fn):
    """``fn(group)`` in a process of its own, which a rank that waits in vain would take with it; with a queue for the kernels of
    each rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        return run_distributed(1, fn, timeout=240.0)[0]
