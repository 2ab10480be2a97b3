"""PCPPlanner.plan() beside the NumPy specification: host time of a step's indices. `python bench/planner.py` runs it alone.

No bytes worth counting and no FLOPs. On a CPU the per-token arrays are filled when they are first read: ``expand`` is that part.
On a GPU plan() issues all of it, a copy and a launch, and its ``cpu_us`` is all that the host does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":  # run as a file, this folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import plain, timing
from pcp_mla import Partition, PCPPlanner, partition
from pcp_mla.plan.slots import PagedCache, slot_mapping

BLOCK = 64
CONTEXT = 4096  # of a decode
# Tokens of the prefills, number of decodes, the most microseconds that plan() may take.
BATCHES = {
    "one 32k prefill": ([32768], 0, 10),
    "2 x 8k prefills + 128 decodes": ([8192] * 2, 128, 15),
    "256 decodes": ([], 256, 25),
}


NAMES = ("row_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "logits_indices", "local_token_indices", "positions")
NAMES += ("allgather_restore_idx", "hidden_restore_idx")


def arguments(prefills: list[int], decodes: int, device: str) -> dict[str, Any]:
    longest = max([*prefills, CONTEXT + 1])
    tables = np.arange((len(prefills) + decodes) * -(-longest // BLOCK), dtype=np.int32).reshape(len(prefills) + decodes, -1)
    return {
        "query_lens": np.array([*prefills, *[1] * decodes], np.int32),
        "context_lens": np.array([0] * len(prefills) + [CONTEXT] * decodes, np.int32),
        "is_prefill": np.array([True] * len(prefills) + [False] * decodes),
        "block_tables": torch.from_numpy(tables).to(device),
    }


def specification(lengths: dict[str, Any], tables: np.ndarray, world: int) -> Callable[[], Any]:
    """All that plan() and its expansion yield, by the NumPy specification."""

    def call() -> None:
        part = partition(**lengths, world_size=world, rank=0)
        for name in NAMES:
            getattr(part, name)
        slot_mapping(part, tables, PagedCache(BLOCK))

    return call


def check(meta: Any, part: Partition, tables: np.ndarray) -> None:
    """A plan beside the specification's."""
    wanted = {name: getattr(part, name) for name in NAMES} | {"slot_mapping": slot_mapping(part, tables, PagedCache(BLOCK))}
    for name, numbers in wanted.items():
        plain.check_equal(f"the plan's {name}", getattr(meta, name).cpu(), torch.from_numpy(numbers))


def run(device: str) -> Iterator[dict[str, Any]]:
    """One result a batch and world size."""
    for name, (prefills, decodes, limit) in BATCHES.items():
        for world in (2, 4, 8):
            given = arguments(prefills, decodes, device)
            lengths = {key: value for key, value in given.items() if key != "block_tables"}
            tables = given["block_tables"].cpu().numpy()
            tokens = int(given["query_lens"].sum())
            planner = PCPPlanner(256, 32768, world, 0, block_size=BLOCK, device=device)

            def plan(planner: PCPPlanner = planner, given: dict[str, Any] = given) -> Any:
                return planner.plan(**given)

            def expand(planner: PCPPlanner = planner) -> None:
                buffers = planner._buffers
                buffers.expand(buffers.tables, tokens=True, keys=False)

            part = partition(**lengths, world_size=world, rank=0)
            check(plan(), part, tables)
            result: dict[str, Any] = {
                "op": "planner",
                "batch": name,
                "tokens": tokens,
                "requests": len(part.query_lens),
                "P": world,
            }
            result |= {"bytes": 0, "flops": 0, "limit_us": limit, "plan": {"cpu_us": timing.cpu_us(plan, 100)}}
            if device == "cpu":
                result["expand"] = {"cpu_us": timing.cpu_us(expand)}
            else:
                torch.cuda.synchronize()
                result["plan"] |= {"gpu_us": timing.gpu_us(plan), "launches": timing.launches(plan)}
            result["numpy"] = {"cpu_us": timing.cpu_us(specification(lengths, tables, world), 5, 4)}
            yield result


def line(result: dict[str, Any]) -> str:
    text = (
        f"{result['batch']:30} P={result['P']} | plan cpu {result['plan']['cpu_us']:5.1f} us (limit {result['limit_us']} on a CPU)"
    )
    if "gpu_us" in result["plan"]:
        text += f" gpu {result['plan']['gpu_us']:.1f} us {result['plan']['launches']} copies and launches"
    else:
        text += f" | expand {result['expand']['cpu_us']:6.1f} us"
    return text + f" | NumPy specification {result['numpy']['cpu_us']:7.0f} us"


if __name__ == "__main__":
    from bench.__main__ import main

    sys.exit(main(["planner", *sys.argv[1:]]))
