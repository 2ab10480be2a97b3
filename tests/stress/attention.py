"""pcp_attention by every backend that is there."""

from __future__ import annotations

import functools

import torch

from bench.peers import load_fa3
from pcp_mla import pcp_attention
from pcp_mla.ops.attention.support import LIBRARIES, availability, find, refusal
from stress.compare import close
from stress.draw import Draw
from stress.families import DEVICE, Arguments, Family
from stress.memory import blank, dtype_of, outside_untouched, place, place_lse, put, random_numbers
from stress.plain_attention import combine, plain_attention
from stress.plain_plan import PlainPlan
from stress.steps import draw_padding, draw_step, draw_workspace, metadata, step_sizes

DTYPES = ["bfloat16", "float16", "float32", "float64"]


@functools.cache
def backends() -> list[str]:
    load_fa3()
    return ["auto", *(name for name, reason in availability().items() if not reason)]


def can(backend: str, dtype: torch.dtype, width: int, v_width: int, listed: bool, shares_starts: bool) -> bool:
    if backend == "auto":
        return True
    if refusal(backend, dtype, width, v_width, listed):
        return False
    return backend not in LIBRARIES or find(backend).shares_starts or not shares_starts


def draw_attention(draw: Draw) -> Arguments:
    backend = draw.choice(backends())
    step = draw_step(draw, **step_sizes(draw, backend))
    workspace, prev, listed = draw_workspace(draw, step), draw.chance(0.4), draw.chance(0.3)
    calls = len(PlainPlan(**step).chunks(workspace))
    chunk = draw.int(0, calls - 1) if workspace is not None and calls and draw.chance(0.9) else None
    small = [1, 3, 8, 16, 24]
    while True:
        if DEVICE == "cuda" and draw.chance(0.7):
            width, v_width = draw.choice([(192, 128), (128, 128), (64, 64), (96, 48), (256, 256), (576, 512)])
        else:
            width, v_width = draw.choice(small) + 1, draw.choice(small)
        dtype = draw.choice(DTYPES)
        if can(backend, dtype_of(dtype), width, v_width, listed, chunk is not None or prev):
            break
        if draw.chance(0.02):
            backend = "auto"
    rope = draw.int(1, width - 1) if draw.chance(0.4) else 0
    return {
        "device": DEVICE,
        "backend": backend,
        "step": step,
        "padding": draw_padding(draw, step),
        "workspace": workspace,
        "chunk": chunk,
        "heads": draw.int(1, 3),
        "widths": (width, v_width, rope),
        "dtype": dtype,
        "scale": draw.choice([0.05, 0.2, 0.5]),
        "seed": draw.seed(),
        "views": [draw.view(3), draw.view(3), draw.view(3), draw.view(2), draw.view(3)],
        "lse_views": [draw.view(2), draw.view(2)],
        "lse_transposed": draw.chance(0.5),
        "pads": draw.chance(0.4),
        "more_keys": draw.choice([0, 0, 1, 70]),
        "listed": listed,
        "return_lse": draw.chance(0.6),
        "prev": prev,
        "out": draw.choice([None, "new", "prev"] if prev else [None, "new"]),
    }


def seen_keys(plan: PlainPlan, workspace: int | None, chunk: int | None) -> tuple[int, list[list[int]]]:
    """Number of keys of the call, and those that each local token sees."""
    count, causal, _, starts, used = plan.chunks(None if chunk is None else workspace)[chunk or 0]
    rows = [row for pair in plan.rows[plan.rank] for row in pair]
    return count, [
        list(range(start, start + (n - len(row) + i + 1 if causal else n)))
        for row, start, n in zip(rows, starts, used, strict=False)
        for i in range(len(row))
    ]


def check_pcp_attention(
    device, backend, step, padding, workspace, chunk, heads, widths, dtype, scale, seed, views, lse_views, lse_transposed, pads,
    more_keys, listed, return_lse, prev, out,
) -> None:  # fmt: skip
    kind, plan = dtype_of(dtype), PlainPlan(**step)
    meta = metadata(step, device, padding, workspace)
    width, v_width, rope = widths
    tokens, local = len(plan.local[plan.rank]), plan.local[plan.rank]
    rows = tokens
    if pads:
        rows = plan.fullest if padding is None else padding["num_tokens_padded"]
    count, seen = seen_keys(plan, workspace, chunk)
    planned = (padding or {}).get("num_kv_tokens_padded", count) if chunk is None else count
    total = planned + more_keys
    q = random_numbers((tokens, heads, width), kind, seed)
    k = random_numbers((total, heads, width), kind, seed + 1)
    v = random_numbers((total, heads, v_width), kind, seed + 2)
    k_pe = random_numbers((total, rope), kind, seed + 3)
    if rope:
        k[..., width - rope :] = k_pe[:, None]
    state = plain_attention(q, k, v, seen, scale, kind)
    earlier = random_numbers((rows, heads, v_width), kind, seed + 4)
    earlier_lse = random_numbers((rows, heads), torch.float32, seed + 5, 3.0)
    earlier_lse[::4] = -torch.inf
    earlier[::4] = 0
    kept = [t for t in range(tokens) if prev and out == "prev" and not seen[t]]
    exact, lse, slack, lse_slack = combine((earlier[:tokens], earlier_lse[:tokens]), state, kind) if prev else state

    # Keys behind the call's last, and queries behind the rank's last, may be anything.
    k[planned:], v[planned:], k_pe[planned:] = torch.nan, torch.nan, torch.nan
    kv_rows = None
    if listed:
        place_of = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        k, v, k_pe = (torch.empty_like(x).index_copy(0, place_of, x) for x in (k, v, k_pe))
        kv_rows = place_of[:planned].clone()
        kv_rows[count:] = -1
        kv_rows = kv_rows.int().to(device)
    wide_q = blank((rows, heads, width), kind, "cpu").tensor
    put(wide_q[:tokens], q)
    target, target_lse = blank((rows, heads, v_width), kind, device, views[4]), blank((rows, heads), torch.float32, device)
    state_in = (place(earlier, views[4], device), place_lse(earlier_lse, lse_views[0], lse_transposed, device)) if prev else None
    into = state_in if out == "prev" else (target.tensor, target_lse.tensor)
    result = pcp_attention(
        place(wide_q, views[0], device),
        place(k[..., : width - rope].contiguous(), views[1], device),
        place(v, views[2], device),
        meta,
        softmax_scale=scale,
        return_lse=return_lse,
        k_pe=place(k_pe, views[3], device) if rope else None,
        kv_rows=kv_rows,
        prev=state_in,
        chunk=None if chunk is None else meta.key_chunks[chunk],
        out=None if out is None else into if return_lse else into[0],
        backend=backend,
    )
    got, got_lse = result if return_lse else (result, None)
    assert len(got) == rows
    real = [t for t, (request, i) in enumerate(local) if i < plan.queries[request] and t not in kept]
    close("out", got[real], exact[real], slack[real])
    close("rows without keys", got[kept], earlier[kept].double(), 0.0)
    if got_lse is not None:
        close("lse", got_lse[real], lse[real], lse_slack[real])
    if out == "new":
        assert got[tokens:].isnan().all(), "rows behind the rank's last token must stay as they are"
        assert outside_untouched(target)


FAMILIES = [Family(draw_attention, check_pcp_attention)]
