"""Steps and their metadata, drawn for the ops that take one."""

from __future__ import annotations

from typing import Any

from pcp_mla import PCPMetadata, PCPPlanner
from stress.draw import Draw
from stress.families import DEVICE, Arguments
from stress.plain_plan import PlainPlan


def draw_step(draw: Draw, most: int = 5, high: int = 40, world: int | None = None) -> Arguments:
    """The arguments of :class:`PlainPlan`."""
    world = world or draw.choice([1, 2, 3, 4, 5, 8])
    lengths = draw.lengths(world, most, high)
    layout = draw.choice(["unpadded", "padded"])
    return {
        "query_lens": lengths,
        "context_lens": [0 if draw.chance(0.4) else draw.int(0, high) for _ in lengths],
        "is_prefill": [draw.chance(0.7) for _ in lengths],
        "world_size": world,
        "rank": draw.int(0, world - 1),
        "layout": layout,
        "decode_policy": draw.choice(["replicate", "round_robin"]) if layout == "unpadded" else "replicate",
    }


def step_sizes(draw: Draw, backend: str) -> dict[str, int]:
    """Batches that the interpreter takes in some tenths of a second."""
    return {"most": 3, "high": 12} if backend == "triton" and DEVICE == "cpu" else {"most": 5, "high": draw.choice([9, 40, 150])}


def draw_padding(draw: Draw, step: Arguments) -> dict[str, int] | None:
    """What a plan for a captured graph is padded to; None for one that is not."""
    if draw.chance(0.7):
        return None
    plan = PlainPlan(**step)
    sizes = {
        "num_tokens_padded": plan.fullest,
        "num_requests_padded": len(plan.queries),
        "num_kv_tokens_padded": sum(plan.key_sizes()),
    }
    return {name: size + draw.choice([0, 1, 5]) for name, size in sizes.items()}


def draw_workspace(draw: Draw, step: Arguments) -> int | None:
    """None, or rows that the new tokens fit but all keys may not."""
    plan = PlainPlan(**step)
    new, keys = sum(plan.sizes), sum(plan.key_sizes())
    return None if draw.chance(0.4) else max(1, new, draw.int(keys // 4, keys))


def metadata(
    step: Arguments,
    device: str,
    padding: dict[str, int] | None = None,
    workspace: int | None = None,
    tables: Any = None,
    block_size: int = 1,
) -> PCPMetadata:
    """From :meth:`PCPMetadata.build`, or where a planner is needed from one that has just the room."""
    if padding is None and workspace is None and tables is None:
        return PCPMetadata.build(**step, device=device)
    requests, tokens = len(step["query_lens"]), sum(step["query_lens"])
    padded = padding or {}
    planner = PCPPlanner(
        max(requests, padded.get("num_requests_padded", 0)) + 1,
        tokens + padded.get("num_tokens_padded", 0) + 1,
        *(step[name] for name in ("world_size", "rank")),
        **{name: step[name] for name in ("layout", "decode_policy")},
        block_size=block_size,
        max_context_chunks=2000,
        device=device,
    )
    batch = [step[name] for name in ("query_lens", "context_lens", "is_prefill")]
    return planner.plan(*batch, tables, workspace_tokens=workspace, **padded)
