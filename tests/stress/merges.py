"""merge_attn_states, merge_n_attn_states and cp_correct_out against sums in float64."""

from __future__ import annotations

import torch

from pcp_mla import cp_correct_out, merge_attn_states, merge_n_attn_states
from stress.compare import close, same_bits
from stress.draw import Draw
from stress.expected import refused
from stress.families import DEVICE, Arguments, Family, backends
from stress.memory import blank, dtype_of, outside_untouched, place, place_lse, random_numbers
from stress.plain_merge import check_scaled, merged, random_lses

FLOAT8 = torch.float8_e4m3fn
BACKENDS = backends("merge_attn_states")
DTYPES = ["bfloat16", "float16", "float32"]


def draw_sizes(draw: Draw, backend: str) -> Arguments:
    small = backend == "triton" and DEVICE == "cpu"
    return {
        "device": DEVICE,
        "backend": backend,
        "tokens": draw.size(12 if small else 200),
        "heads": draw.int(1, 3 if small else 6),
        "dim": draw.choice([1, 2, 5, 8, 16, 24] if small else [1, 2, 5, 8, 16, 33, 64, 128, 192, 512]),
        "dtype": draw.choice(DTYPES),
        "seed": draw.seed(),
        "spread": draw.choice([0.0, 1.0, 8.0]),
        "base": draw.choice(["e", "2"]),
        "scale": draw.choice([None, None, None, 0.02, 1.0, 0.0003]),
    }


def draw_merge(draw: Draw) -> Arguments:
    sizes = draw_sizes(draw, draw.choice(BACKENDS))
    tokens = sizes["tokens"]
    out = draw.choice(["new", "wide", "a", "b"]) if draw.chance(0.7) else None
    rows, total = None, tokens
    if out is not None and draw.chance(0.5):
        total = tokens + draw.int(0, 5) if out in ("new", "wide") else tokens
        order = draw.shuffled(total)[:tokens]
        rows = [draw.choice([-1, total, 2**31 - 1]) if draw.chance(0.1) else row for row in order]
    if sizes["scale"] is not None and out in ("a", "b"):
        out = "new"
    ops = requests = None
    if out is not None and draw.chance(0.5):
        if draw.chance(0.5):
            cuts = sorted(draw.int(0, tokens) for _ in range(draw.int(0, 4)))
            requests = [draw.choice([0, draw.int(0, tokens)]) if draw.chance(0.2) else 0, *cuts]
            requests = sorted(requests)
        ops = [draw.int(0, 3) for _ in range(tokens if requests is None else len(requests) - 1)]
    return sizes | {
        "views": [draw.view(3) for _ in range(3)],
        "lse_views": [draw.view(2) for _ in range(3)],
        "lse_transposed": draw.chance(0.4),
        "out": out,
        "lse_out": draw.choice([None, "new"] if total > tokens else [None, "new", "a", "b"]),
        "out_rows": rows,
        "num_out_rows": total,
        "row_op": ops,
        "cu_seqlens": requests,
    }


def check_merge_attn_states(
    device, backend, tokens, heads, dim, dtype, seed, spread, base, scale, views, lse_views, lse_transposed, out, lse_out, out_rows,
    num_out_rows, row_op, cu_seqlens,
) -> None:  # fmt: skip
    kind = dtype_of(dtype)
    values = [random_numbers((tokens, heads, dim), kind, seed + i) for i in (0, 1)]
    lses = [random_lses((tokens, heads), seed + 10 * i, spread) for i in (0, 1)]
    for x, lse in zip(values, lses, strict=True):
        x[::3] = -0.0
        x[lse.isinf()] = torch.nan  # of a partial that attended to nothing
    ops = [3] * tokens if row_op is None else list(row_op)
    if cu_seqlens is not None:
        ops = [0] * tokens
        for r, op in enumerate(row_op):
            ops[cu_seqlens[r] : cu_seqlens[r + 1]] = [op] * (cu_seqlens[r + 1] - cu_seqlens[r])
    takes = torch.tensor(ops, dtype=torch.int64)[:, None]
    counted = [torch.where(takes >> i & 1 == 1, lse, -torch.inf) for i, lse in enumerate(lses)]
    exact, exact_lse, _, slack, lse_slack = merged(values, counted, base == "2")

    given = [place(x, view, device) for x, view in zip(values, views, strict=False)]
    given_lses = [place_lse(x, view, lse_transposed, device) for x, view in zip(lses, lse_views, strict=False)]
    result = torch.float32 if out == "wide" else kind
    target = blank((num_out_rows, heads, dim), FLOAT8 if scale is not None else result, device, views[2])
    target_lse = blank((num_out_rows, heads), torch.float32, device, lse_views[2])
    options = {
        "row_op": None if row_op is None else torch.tensor(row_op, dtype=torch.int32, device=device),
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device),
        "out_rows": None if out_rows is None else torch.tensor(out_rows, dtype=torch.int32, device=device),
        "scale": None if scale is None else torch.tensor(scale, device=device),
        "lse_base": base,
        "backend": backend,
    }
    into = {None: None, "a": given[0], "b": given[1]}.get(out, target.tensor)
    lse_into = {None: None, "a": given_lses[0], "b": given_lses[1]}.get(lse_out, target_lse.tensor)
    options |= {"out": into, "lse_out": lse_into}
    stays = values["ab".index(out)] if out in ("a", "b") else blank((num_out_rows, heads, dim), target.tensor.dtype, "cpu").tensor
    lse_stays = lses["ab".index(lse_out)] if lse_out in ("a", "b") else blank((num_out_rows, heads), torch.float32, "cpu").tensor
    call = (given[0], given_lses[0], given[1], given_lses[1])
    if tokens and out_rows is not None and ("a" in (out, lse_out) or "b" in (out, lse_out)):
        return refused(lambda: merge_attn_states(*call, **options), "merge_attn_states", "out")
    got, got_lse = (None if x is None else x.cpu() for x in merge_attn_states(*call, **options))
    places = list(range(tokens)) if out_rows is None else out_rows
    written = [t for t in range(tokens) if ops[t] and 0 <= places[t] < num_out_rows]
    to = [places[t] for t in written]
    check_scaled("out", got[to], exact[written], slack[written], scale)
    if scale is None and out != "wide":
        copied = [t for t in written if ops[t] in (1, 2) and lses[ops[t] - 1][t].isfinite().all()]
        rows = [values[ops[t] - 1][t] for t in copied]
        if rows:
            same_bits("copied rows", got[[places[t] for t in copied]], torch.stack(rows))
    others = sorted(set(range(num_out_rows)) - set(to))
    same_bits("rows that are not written", got[others], stays[others])
    if lse_out is not None or out is None:
        close("lse", got_lse[to], exact_lse[written], lse_slack[written])
        same_bits("LSEs that are not written", got_lse[others], lse_stays[others])
    else:
        assert got_lse is None
    assert outside_untouched(target)
    assert outside_untouched(target_lse)


def draw_merge_n(draw: Draw) -> Arguments:
    sizes = draw_sizes(draw, draw.choice(BACKENDS))
    few = sizes["backend"] == "triton" and DEVICE == "cpu"
    count = draw.choice([1, 2, 3, 5] if few else [1, 2, 3, 8, 17, 64] if sizes["tokens"] * sizes["dim"] < 2000 else [1, 2, 3, 8])
    stacked = draw.chance(0.4)
    out = draw.choice(["new", "wide", 0, count - 1]) if draw.chance(0.7) else None
    if sizes["scale"] is not None and isinstance(out, int):
        out = None
    return sizes | {
        "count": count,
        "views": None if stacked else [draw.view(3) for _ in range(count)],
        "lse_views": None if stacked else [draw.view(2) for _ in range(count)],
        "view": draw.view(4 if stacked else 3),
        "out_view": draw.view(3),
        "out": out,
        "lse_out": draw.chance(0.6),
    }


def check_merge_n_attn_states(
    device, backend, tokens, heads, dim, dtype, seed, spread, base, scale, count, views, lse_views, view, out_view, out, lse_out
) -> None:
    kind = dtype_of(dtype)
    values = [random_numbers((tokens, heads, dim), kind, seed + i) for i in range(count)]
    lses = [random_lses((tokens, heads), seed + 10 * i, spread) for i in range(count)]
    for x, lse in zip(values, lses, strict=True):
        x[lse.isinf()] = torch.nan
    exact, exact_lse, _, slack, lse_slack = merged(values, lses, base == "2")
    if views is None:
        outs, given_lses = place(torch.stack(values), view, device), place(torch.stack(lses), None, device)
    else:
        outs = [place(x, v, device) for x, v in zip(values, views, strict=True)]
        given_lses = [place(x, v, device) for x, v in zip(lses, lse_views, strict=True)]
    target = blank(
        (tokens, heads, dim), FLOAT8 if scale is not None else torch.float32 if out == "wide" else kind, device, out_view
    )
    target_lse = blank((tokens, heads), torch.float32, device)
    into = outs[out] if isinstance(out, int) else target.tensor if out is not None else None
    got, got_lse = merge_n_attn_states(
        outs,
        given_lses,
        out=into,
        lse_out=target_lse.tensor if lse_out and into is not None else None,
        lse_base=base,
        scale=None if scale is None else torch.tensor(scale, device=device),
        backend=backend,
    )
    check_scaled("out", got, exact, slack, scale)
    if lse_out or into is None:
        close("lse", got_lse, exact_lse, lse_slack)
    else:
        assert got_lse is None
    assert outside_untouched(target)


def draw_correct(draw: Draw) -> Arguments:
    sizes = draw_sizes(draw, draw.choice(BACKENDS))
    del sizes["scale"]
    few = sizes["backend"] == "triton" and DEVICE == "cpu"
    ranks = draw.choice([1, 2, 3, 5] if few else [1, 2, 3, 4, 8, 64] if sizes["tokens"] < 40 else [1, 2, 8])
    shares = draw.choice([n for n in (1, 2, 3) if sizes["heads"] % n == 0])
    return sizes | {
        "ranks": ranks,
        "rank": draw.int(0, ranks - 1),
        "view": draw.view(3),
        "lse_view": draw.view(3),
        "out_view": draw.view(4),
        "corrected": draw.choice([None, "itself", "same", "float32"]),
        "shares": shares if draw.chance(0.5) else None,
        "lse_out": draw.chance(0.6),
        "used": draw.chance(0.5),
    }


def check_cp_correct_out(
    device, backend, tokens, heads, dim, dtype, seed, spread, base, ranks, rank, view, lse_view, out_view, corrected, shares,
    lse_out, used,
) -> None:  # fmt: skip
    kind = dtype_of(dtype)
    values, lses = random_numbers((tokens, heads, dim), kind, seed), random_lses((ranks, tokens, heads), seed, spread)
    keys = torch.randint(0, 3, (ranks, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    counted = torch.where((keys == 0)[..., None], -torch.inf, lses) if used else lses
    values[counted[rank].isinf()] = torch.nan
    nothing = torch.zeros_like(values)
    exact, exact_lse, _, slack, lse_slack = merged(
        [values if r == rank else nothing for r in range(ranks)], list(counted), base == "2"
    )
    given = place(values, view, device)
    shape, lse_shape = (tokens, heads, dim), (tokens, heads)
    if shares is not None and corrected in ("same", "float32"):
        shape, lse_shape = (shares, tokens, heads // shares, dim), (shares, tokens, heads // shares)
    target = blank(shape, torch.float32 if corrected == "float32" else kind, device, out_view if len(shape) == 4 else None)
    target_lse = blank(lse_shape, torch.float32, device)
    into: dict[str | None, torch.Tensor | None] = {None: None, "itself": given}
    got, got_lse = cp_correct_out(
        given,
        place(lses, lse_view, device),
        rank,
        corrected=into.get(corrected, target.tensor),
        lse_out=target_lse.tensor if lse_out else None,
        lse_base=base,
        seqused_k=keys.to(device) if used else None,
        backend=backend,
    )
    if got.dim() == 4:
        got = got.transpose(0, 1).flatten(1, 2)
    if got_lse.dim() == 3:
        got_lse = got_lse.transpose(0, 1).flatten(1, 2)
    assert got.dtype == (torch.float32 if corrected in (None, "float32") else kind)
    close("corrected", got, exact, slack)
    close("lse", got_lse, exact_lse, lse_slack)
    assert outside_untouched(target)


FAMILIES = [
    Family(draw_merge, check_merge_attn_states),
    Family(draw_merge_n, check_merge_n_attn_states),
    Family(draw_correct, check_cp_correct_out),
]
