"""What crosses ranks, played in one process: LatentExchange bit for bit, cp_lse_* against a merge in float64."""

from __future__ import annotations

import torch

import pcp_mla
from pcp_mla import LatentExchange
from pcp_mla.plan.dims import MLADims
from pcp_mla.testing.played import play
from stress.compare import EPS32, close, same_bits
from stress.draw import Draw
from stress.families import DEVICE, Arguments, Family
from stress.memory import bits, blank, dtype_of, place, put, random_bytes, random_numbers
from stress.merges import DTYPES
from stress.plain_merge import merged, random_lses
from stress.plain_plan import PlainPlan
from stress.steps import draw_padding, draw_step, metadata


def draw_exchange(draw: Draw) -> Arguments:
    step = draw_step(draw)
    del step["rank"]
    return {
        "device": DEVICE,
        "step": step,
        "padding": draw_padding(draw, step | {"rank": 0}),
        "widths": (draw.choice([1, 3, 8, 64]), draw.choice([1, 2, 8])),
        "dtype": draw.choice(["bfloat16", "float16", "float32", "float8_e4m3fn", "uint8"]),
        "seed": draw.seed(),
        "lie": draw.choice(["together", "apart", "apart"]),
        "views": [draw.view(2), draw.view(2)],
        "pads": draw.chance(0.5),
        "more": draw.int(0, 3),
        "calls": draw.int(1, 2),
    }


def check_LatentExchange(device, step, padding, widths, dtype, seed, lie, views, pads, more, calls) -> None:
    kind, dims = dtype_of(dtype), MLADims(1, 1, widths[1], 1, widths[0])
    world, padded = step["world_size"], padding is not None
    plans = [PlainPlan(**step, rank=rank, rank_tokens=(padding or {}).get("num_tokens_padded")) for rank in range(world)]
    natural = random_bytes((sum(step["query_lens"]), sum(widths)), kind, seed)

    def rank(group) -> list[torch.Tensor]:
        plan = plans[group.rank]
        meta = metadata(step | {"rank": group.rank}, device, padding)
        exchange = LatentExchange(group, plan.rank_tokens + more, dims, kind, device)
        rows = blank((plan.rank_tokens if padded and pads else len(plan.local[group.rank]), sum(widths)), kind, "cpu").tensor
        for n, token in enumerate(plan.local_token_indices()):
            if token >= 0:
                put(rows[n], natural[token])
        if lie == "together":
            kv_c, k_pe = place(rows, None, device).split(list(widths), dim=1)
        else:
            parts = rows.split(list(widths), dim=1)
            kv_c, k_pe = (place(part, view, device) for part, view in zip(parts, views, strict=True))
        for _ in range(calls):
            result = exchange.all_gather(kv_c, k_pe, meta)
        return result.clone()

    for r, got in enumerate(play(world, rank)):
        plan = plans[r]
        assert got.shape == (world * plan.rank_tokens, sum(widths))
        same_bits(f"tokens on rank {r}", got[plan.hidden_restore_idx()].cpu(), natural)
        if not pads and any(n and prefill for n, prefill in zip(step["query_lens"], step["is_prefill"], strict=True)):
            held = {m * plan.rank_tokens + n for m in range(world) for n in range(len(plan.local[m]))}
            behind = sorted(set(range(world * plan.rank_tokens)) - held)
            assert not bits(got)[behind].any(), f"pads on rank {r} must be zeros"


def draw_cp_lse(draw: Draw) -> Arguments:
    world = draw.choice([1, 2, 3, 4])
    return {
        "device": DEVICE,
        "function": draw.choice(["cp_lse_a2a", "cp_lse_ag_out_rs", "cp_lse_ag_out_ar"]),
        "world": world,
        "tokens": draw.size(40),
        "heads": world * draw.int(1, 3),
        "dim": draw.choice([1, 3, 8, 16, 40]),
        "dtype": draw.choice(DTYPES),
        "seed": draw.seed(),
        "spread": draw.choice([0.0, 1.0, 8.0]),
        "base": draw.choice(["e", "2"]),
        "used": draw.chance(0.5),
        "view": draw.view(3),
        "lse_view": draw.view(2),
        "return_lse": draw.chance(0.7),
    }


def check_cp_lse(device, function, world, tokens, heads, dim, dtype, seed, spread, base, used, view, lse_view, return_lse) -> None:
    kind = dtype_of(dtype)
    values = [random_numbers((tokens, heads, dim), kind, seed + r) for r in range(world)]
    lses = [random_lses((tokens, heads), seed + 10 * r, spread) for r in range(world)]
    keys = torch.randint(0, 3, (world, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    counted = [torch.where((keys[r] == 0)[:, None], -torch.inf, lses[r]) if used else lses[r] for r in range(world)]
    for x, lse in zip(values, counted, strict=True):
        x[lse.isinf()] = torch.nan
    exact, exact_lse, _, slack, lse_slack = merged(values, counted, base == "2")
    size = torch.stack([x.double().abs().nan_to_num(0) for x in values]).sum(0)

    def rank(group):
        r = group.rank
        return getattr(pcp_mla, function)(
            place(values[r], view, device),
            place(lses[r], lse_view, device),
            group,
            lse_base=base,
            seqused_k=keys[r].to(device) if used else None,
            return_lse=return_lse,
        )

    for r, result in enumerate(play(world, rank)):
        got, got_lse = result if return_lse else (result, None)
        share = heads // world if function != "cp_lse_ag_out_ar" else heads
        mine = slice(r * share, (r + 1) * share) if share < heads else slice(None)
        assert got.dtype == kind
        close(f"out of rank {r}", got, exact[:, mine], (slack + EPS32 * size)[:, mine])
        if got_lse is not None:
            close(f"lse of rank {r}", got_lse, exact_lse[:, mine], lse_slack[:, mine])


FAMILIES = [Family(draw_exchange, check_LatentExchange), Family(draw_cp_lse, check_cp_lse)]
