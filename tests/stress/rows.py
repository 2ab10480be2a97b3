"""pcp_fused_gather and pcp_fused_restore: bit for bit."""

from __future__ import annotations

import torch

from pcp_mla import GatheredRows, pcp_fused_gather, pcp_fused_restore
from stress.compare import same_bits
from stress.draw import Draw
from stress.families import DEVICE, Arguments, Family, backends
from stress.memory import blank, dtype_of, place, place_lse, put, random_bytes, random_numbers
from stress.plain_plan import PlainPlan, before
from stress.steps import draw_padding, draw_step, metadata, step_sizes

BACKENDS = backends("fused_gather")
DTYPES = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "uint8", "int64"]


def draw_gather(draw: Draw) -> Arguments:
    backend = draw.choice(BACKENDS)
    step = draw_step(draw, **step_sizes(draw, backend))
    return {
        "device": DEVICE,
        "backend": backend,
        "step": step,
        "padding": draw_padding(draw, step),
        "dtype": draw.choice(DTYPES),
        "seed": draw.seed(),
        "shapes": [(draw.int(1, 4), draw.choice([1, 2, 3, 8, 16, 24, 37])) for _ in range(3)],
        "views": [draw.view(3) for _ in range(3)],
        "pads": draw.chance(0.3),
        "out": draw.chance(0.4),
    }


def check_pcp_fused_gather(device, backend, step, padding, dtype, seed, shapes, views, pads, out) -> None:
    meta, plan = metadata(step, device, padding), PlainPlan(**step)
    kind, sizes = dtype_of(dtype), padding or {}
    tokens = sizes.get("num_tokens_padded", plan.fullest) if pads else len(plan.local[plan.rank])
    counts = (tokens, *[sizes.get("num_kv_tokens_padded", sum(plan.key_sizes()))] * 2)
    values = [random_bytes((n, *shape), kind, seed + i) for i, (n, shape) in enumerate(zip(counts, shapes, strict=True))]
    given = [place(x, view, device) for x, view in zip(values, views, strict=True)]
    starts, used = before(plan.key_sizes()), plan.used()
    queries: list[list[int]] = [[], []]
    keys: list[list[int]] = [[], []]
    token = 0
    for request, pair in enumerate(plan.rows[plan.rank]):
        for half, row in enumerate(pair):
            queries[half] += range(token, token + len(row))
            keys[half] += range(starts[request], starts[request] + used[2 * request + half])
            token += len(row)
    wanted = [values[i][rows] for half in (0, 1) for i, rows in enumerate((queries[half], keys[half], keys[half]))]
    # Of a padded plan the counts are limits; rows behind those that the batch has are undefined.
    rooms = (meta.num_head_tokens, meta.num_head_kv, meta.num_head_kv, meta.num_tail_tokens, meta.num_tail_kv, meta.num_tail_kv)
    if padding is None:
        assert rooms == tuple(map(len, wanted)), f"counts of rows: {rooms} are not {tuple(map(len, wanted))}"
    placed = [blank((room, *x.shape[1:]), kind, device) for room, x in zip(rooms, wanted, strict=True)]
    rows = GatheredRows(*(p.tensor for p in placed)) if out else None
    got = pcp_fused_gather(*given, meta, out=rows, backend=backend)
    for name, result, room, right in zip(GatheredRows._fields, got, rooms, wanted, strict=True):
        assert len(result) == room
        same_bits(name, result[: len(right)], right)
    for x, value in zip(given, values, strict=True):
        same_bits("input", x, value)


def draw_restore(draw: Draw) -> Arguments:
    backend = draw.choice(BACKENDS)
    step = draw_step(draw, **step_sizes(draw, backend))
    return {
        "device": DEVICE,
        "backend": backend,
        "step": step,
        "padding": draw_padding(draw, step),
        "dtype": draw.choice(DTYPES),
        "seed": draw.seed(),
        "shape": (draw.int(1, 4), draw.choice([1, 2, 3, 8, 16, 24, 37])),
        "views": [draw.view(3) for _ in range(2)],
        "lse_views": [draw.view(2), draw.view(2)],
        "lse_transposed": draw.chance(0.5),
        "lse": draw.chance(0.7),
        "out": draw.chance(0.4),
    }


def check_pcp_fused_restore(device, backend, step, padding, dtype, seed, shape, views, lse_views, lse_transposed, lse, out) -> None:
    meta, plan = metadata(step, device, padding), PlainPlan(**step)
    kind = dtype_of(dtype)
    tokens = len(plan.local[plan.rank])
    whole, whole_lse = random_bytes((tokens, *shape), kind, seed), random_numbers((tokens, shape[0]), torch.float32, seed)
    whole_lse[::3] = -torch.inf
    rows: list[list[int]] = [[], []]
    token = 0
    for pair in plan.rows[plan.rank]:
        for half, row in enumerate(pair):
            rows[half] += range(token, token + len(row))
            token += len(row)
    rooms = (meta.num_head_tokens, meta.num_tail_tokens)

    def padded(x: torch.Tensor, half: int) -> torch.Tensor:
        part = blank((rooms[half], *x.shape[1:]), x.dtype, "cpu").tensor
        put(part[: len(rows[half])], x[rows[half]])
        return part

    parts = [place(padded(whole, half), views[half], device) for half in (0, 1)]
    lses: list[torch.Tensor | None] = [None, None]
    if lse:
        for half in (0, 1):
            lses[half] = place_lse(padded(whole_lse, half), lse_views[half], lse_transposed, device)
    room = sum(rooms)
    target, target_lse = blank((room, *shape), kind, device), blank((room, shape[0]), torch.float32, device)
    given = (target.tensor, target_lse.tensor if lse else None) if out else None
    got, got_lse = pcp_fused_restore(*parts, *lses, meta, out=given, backend=backend)
    assert out or len(got) == (tokens if padding is None else padding["num_tokens_padded"])
    same_bits("out", got[:tokens], whole)
    if lse:
        same_bits("lse", got_lse[:tokens], whole_lse)
    else:
        assert got_lse is None


FAMILIES = [Family(draw_gather, check_pcp_fused_gather), Family(draw_restore, check_pcp_fused_restore)]
